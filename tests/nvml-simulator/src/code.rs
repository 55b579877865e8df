//! NVML's return codes and the texts of `nvmlErrorString`.

use std::ffi::CStr;

/// A return code of NVML other than success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Code(pub(crate) u32);

/// Result of a function's body.
pub(crate) type Answer<T = ()> = Result<T, Code>;

pub(crate) const SUCCESS: u32 = 0;
pub(crate) const UNINITIALIZED: Code = Code(1);
pub(crate) const INVALID_ARGUMENT: Code = Code(2);
pub(crate) const NOT_SUPPORTED: Code = Code(3);
pub(crate) const NOT_FOUND: Code = Code(6);
pub(crate) const INSUFFICIENT_SIZE: Code = Code(7);
pub(crate) const TIMEOUT: Code = Code(10);
pub(crate) const ARGUMENT_VERSION_MISMATCH: Code = Code(25);
pub(crate) const NOT_READY: Code = Code(27);
pub(crate) const UNKNOWN: Code = Code(999);

/// Codes in ascending order, with texts similar to the driver's.
const TEXTS: &[(u32, &CStr)] = &[
    (0, c"Success"),
    (1, c"Uninitialized"),
    (2, c"Invalid Argument"),
    (3, c"Not Supported"),
    (4, c"Insufficient Permissions"),
    (5, c"Already Initialized"),
    (6, c"Not Found"),
    (7, c"Insufficient Size"),
    (8, c"Insufficient External Power"),
    (9, c"Driver Not Loaded"),
    (10, c"Timeout"),
    (11, c"Interrupt Request Issue"),
    (12, c"NVML Shared Library Not Found"),
    (13, c"Function Not Found"),
    (14, c"Corrupted infoROM"),
    (15, c"GPU is lost"),
    (16, c"GPU requires reset"),
    (17, c"GPU access blocked by the operating system"),
    (18, c"Driver/library version mismatch"),
    (19, c"In Use"),
    (20, c"Insufficient Memory"),
    (21, c"No Data"),
    (22, c"vGPU ECC Not Supported"),
    (23, c"Insufficient Resources"),
    (24, c"Frequency Not Supported"),
    (25, c"Argument Version Mismatch"),
    (26, c"Deprecated"),
    (27, c"System Not Ready"),
    (28, c"No GPUs Found"),
    (29, c"Invalid State"),
    (999, c"Unknown Error"),
];

/// Returns the text of a return code, as `nvmlErrorString` returns it.
pub(crate) fn text(code: u32) -> &'static CStr {
    TEXTS.iter().find(|(known, _)| *known == code).map_or(c"Unknown Error", |(_, text)| text)
}
