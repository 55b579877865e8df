//! NVML errors: how a call failed, and the reason that its return code maps to.

use nvml_wrapper::error::NvmlError;
use serde::{Deserialize, Serialize};

use super::reason::Reason;

/// A failed call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The NVML function, or `dlopen`.
    pub call: String,
    /// How the call failed.
    pub kind: FaultKind,
    /// Error text of the library or the loader.
    pub text: String,
}

/// How a call failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// The library cannot be loaded.
    Library,
    /// The library lacks the function.
    Symbol,
    /// NVML return code (`nvmlReturn_t` in nvml.h).
    Code(u32),
    /// The call succeeded but its result is invalid.
    InvalidResponse,
}

/// What the agent knows about an NVML return code.
struct ReturnCode {
    code: u32,
    /// Reason of the fallback that this code leads to.
    reason: Reason,
    /// Whether the code, returned by an optional getter, means that the GPU itself is faulty.
    /// Not every GPU, driver or container supports every getter, so other codes mean "unknown".
    is_gpu_fault: bool,
    /// Text for the codes that nvml-wrapper does not know.
    text: Option<&'static str>,
}

/// Return codes that map to a specific reason. Every other code is `driver-error`.
const RETURN_CODES: &[ReturnCode] = &[
    code(4, Reason::PermissionDenied),       // NVML_ERROR_NO_PERMISSION
    gpu_fault(8, Reason::GpuUnhealthy),      // NVML_ERROR_INSUFFICIENT_POWER
    gpu_fault(9, Reason::DriverNotLoaded),   // NVML_ERROR_DRIVER_NOT_LOADED
    gpu_fault(11, Reason::GpuUnhealthy),     // NVML_ERROR_IRQ_ISSUE
    code(12, Reason::DriverLibraryMissing),  // NVML_ERROR_LIBRARY_NOT_FOUND
    code(13, Reason::DriverTooOld),          // NVML_ERROR_FUNCTION_NOT_FOUND
    gpu_fault(14, Reason::GpuUnhealthy),     // NVML_ERROR_CORRUPTED_INFOROM
    gpu_fault(15, Reason::GpuLost),          // NVML_ERROR_GPU_IS_LOST
    gpu_fault(16, Reason::GpuResetRequired), // NVML_ERROR_RESET_REQUIRED
    gpu_fault(17, Reason::PermissionDenied), // NVML_ERROR_OPERATING_SYSTEM
    code(18, Reason::DriverLibraryMismatch), // NVML_ERROR_LIB_RM_VERSION_MISMATCH
    code(23, Reason::DriverError).with_text("insufficient resources"),
    code(24, Reason::DriverError).with_text("frequency not supported"),
    code(25, Reason::DriverError).with_text("argument version mismatch"),
    code(26, Reason::DriverError).with_text("function deprecated"),
    gpu_fault(27, Reason::DriverNotReady).with_text("driver not ready"),
    code(28, Reason::GpuCountZero).with_text("no supported GPU found"),
    code(29, Reason::DriverError).with_text("invalid state"),
    code(30, Reason::DriverError).with_text("reset type not supported"),
    gpu_fault(999, Reason::DriverError), // NVML_ERROR_UNKNOWN
];

const fn code(code: u32, reason: Reason) -> ReturnCode {
    ReturnCode { code, reason, is_gpu_fault: false, text: None }
}

const fn gpu_fault(code: u32, reason: Reason) -> ReturnCode {
    ReturnCode { code, reason, is_gpu_fault: true, text: None }
}

impl ReturnCode {
    const fn with_text(self, text: &'static str) -> Self {
        Self { text: Some(text), ..self }
    }

    fn find(code: u32) -> Option<&'static Self> {
        RETURN_CODES.iter().find(|known| known.code == code)
    }
}

impl Fault {
    pub(super) fn new(call: &str, error: NvmlError) -> Self {
        let text = error.to_string();
        let kind = match error {
            NvmlError::LibloadingError(_) => FaultKind::Library,
            NvmlError::FailedToLoadSymbol(_) => FaultKind::Symbol,
            NvmlError::Utf8Error(_) | NvmlError::NulError(_) | NvmlError::IncorrectBits(_) => {
                FaultKind::InvalidResponse
            }
            error => FaultKind::Code(error.into()),
        };
        Self { call: call.into(), kind, text }
    }

    pub(super) fn invalid_response(call: &str, text: String) -> Self {
        Self { call: call.into(), kind: FaultKind::InvalidResponse, text }
    }

    /// Returns whether this fault of an optional getter means that the GPU is faulty.
    pub(super) fn is_gpu_fault(&self) -> bool {
        match self.kind {
            FaultKind::Code(code) => ReturnCode::find(code).is_some_and(|code| code.is_gpu_fault),
            FaultKind::Library | FaultKind::Symbol | FaultKind::InvalidResponse => false,
        }
    }

    /// Returns the reason of the fallback that this fault leads to.
    pub(crate) fn reason(&self) -> Reason {
        match self.kind {
            FaultKind::Library => Reason::DriverLibraryMissing,
            FaultKind::Symbol => Reason::DriverTooOld,
            FaultKind::InvalidResponse => Reason::DriverError,
            FaultKind::Code(code) => {
                ReturnCode::find(code).map_or(Reason::DriverError, |code| code.reason)
            }
        }
    }

    /// Describes the fault in one clause.
    pub(crate) fn describe(&self) -> String {
        let Self { call, kind, text } = self;
        match kind {
            FaultKind::Library => text.clone(),
            FaultKind::Symbol => format!("{call} is not available: {text}"),
            FaultKind::InvalidResponse => format!("{call} returned an invalid response: {text}"),
            FaultKind::Code(code) => {
                let text = ReturnCode::find(*code).and_then(|code| code.text).unwrap_or(text);
                format!("{call} returned NVML error {code}: {text}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sorted_by_code() {
        assert!(RETURN_CODES.is_sorted_by(|one, next| one.code < next.code));
    }

    #[test]
    fn description_names_call_and_code() {
        let describe =
            |kind| Fault { call: "nvmlInit_v2".into(), kind, text: "text".into() }.describe();
        for code in (1..=30).chain([999]) {
            let description = describe(FaultKind::Code(code));
            assert!(
                description.starts_with(&format!("nvmlInit_v2 returned NVML error {code}: ")),
                "{description}"
            );
        }
        assert_eq!(
            describe(FaultKind::Code(27)),
            "nvmlInit_v2 returned NVML error 27: driver not ready"
        );
        assert_eq!(describe(FaultKind::Symbol), "nvmlInit_v2 is not available: text");
        assert_eq!(
            describe(FaultKind::InvalidResponse),
            "nvmlInit_v2 returned an invalid response: text"
        );
        assert_eq!(describe(FaultKind::Library), "text");
    }
}
