//! Log events about an unusable GPU: the one WARNING of a node that falls back to the CPU, and the
//! events for a GPU that is required, retried, or used despite a failure.
//!
//! Each is one log event with the MESSAGE_ID of the reason and the fields `FL_GPU_STATUS`,
//! `FL_GPU_REASON`, `FL_GPU_SUMMARY`, `FL_GPU_FIX`, `PCI_ADDRESS` and `GPU_UUID`. The decision is
//! made in `gpu::decide` (before the launch) and in `supervisor::state_machine` (afterwards).

use tracing::Level;

use crate::config::Config;
use crate::gpu::reason::Finding;
use crate::logging::ALWAYS_LOGGED;
use crate::system::os_release::Distribution;
use crate::values::GpuUuid;

/// A GPU is required and none is usable; already logged with its reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("FL_GPU_REQUIRED is YES and no GPU is usable")]
pub(crate) struct GpuRequired;

/// Logs a finding with the fix for `$distribution`. `$status` is the value of `fl_gpu_status`, and
/// `$text` the beginning of the message.
macro_rules! log_finding {
    ($level:expr, $finding:expr, $distribution:expr, $status:literal, $text:literal) => {{
        let fix = $finding.reason.fix($distribution);
        tracing::event!(
            target: ALWAYS_LOGGED,
            $level,
            message_id = $finding.reason.entry().message_id,
            fl_gpu_status = $status,
            fl_gpu_reason = $finding.reason.code(),
            fl_gpu_summary = $finding.summary,
            fl_gpu_fix = fix,
            pci_address = $finding.pci_address.map(tracing::field::display),
            gpu_uuid = $finding.gpu_uuid.as_ref().map(GpuUuid::as_str),
            concat!($text, ": {}: {}; fix: {}"),
            $finding.reason,
            $finding.summary,
            fix,
        )
    }};
}

/// Reports before the launch that no GPU is usable: a WARNING of the fallback to the CPU, or the
/// error if a GPU is required.
///
/// # Errors
/// If a GPU is required.
pub(crate) fn report(
    config: &Config,
    finding: &Finding,
    distribution: Distribution,
) -> Result<(), GpuRequired> {
    if config.gpu.required {
        error_gpu_required(finding, distribution);
        return Err(GpuRequired);
    }
    warn_cpu_fallback(config, finding, distribution);
    Ok(())
}

/// Warns that the node falls back to the CPU.
pub(crate) fn warn_cpu_fallback(config: &Config, finding: &Finding, distribution: Distribution) {
    log_finding!(
        Level::WARN,
        finding,
        distribution,
        "cpu-fallback",
        "no usable GPU; this node runs on the CPU"
    );
    if let Some(fraction) = &config.memory_fraction {
        tracing::info!(
            "FL_GPU_MEMORY_FRACTION={fraction} has no effect: this node runs on the CPU"
        );
    }
}

/// Reports that a GPU is required and none is usable.
pub(crate) fn error_gpu_required(finding: &Finding, distribution: Distribution) {
    log_finding!(
        Level::ERROR,
        finding,
        distribution,
        "required",
        "no usable GPU and FL_GPU_REQUIRED is YES; this node does not start"
    );
}

/// Reports that a required GPU has failed while the node ran.
pub(crate) fn error_required_gpu_failed(finding: &Finding, distribution: Distribution) {
    log_finding!(
        Level::ERROR,
        finding,
        distribution,
        "required",
        "GPU failed and FL_GPU_REQUIRED is YES; this node stops"
    );
}

/// Warns that a GPU has failed and is retried.
pub(crate) fn warn_gpu_retry(finding: &Finding, distribution: Distribution) {
    log_finding!(
        Level::WARN,
        finding,
        distribution,
        "retry",
        "GPU failed; retrying it (gpu.on_failure is restart)"
    );
}

/// Warns that a GPU has failed and the node continues to use it.
pub(crate) fn warn_gpu_failure_ignored(finding: &Finding, distribution: Distribution) {
    log_finding!(
        Level::WARN,
        finding,
        distribution,
        "ignored",
        "GPU failed; continuing with it (gpu.on_failure is ignore)"
    );
}
