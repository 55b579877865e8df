//! The GPU: facts from sysfs ([`pci`]), the probe of NVML in a child process
//! ([`probe`], [`probe_child`]), and the decision between GPU and CPU ([`decide`]). While the node
//! runs, [`monitor_child`] watches the GPUs in use.

pub mod decide;
pub(crate) mod diagnose;
pub(crate) mod kernel;
pub mod monitor_child;
pub(crate) mod nvml_error;
pub(crate) mod nvml_library;
pub mod pci;
pub mod probe;
pub mod probe_child;
pub mod reason;
mod select;
#[cfg(test)]
mod test_fixtures;
pub mod verdict;
pub mod xid;

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::config::Config;
use crate::config::settings::Settings;
use kernel::KernelFacts;
use pci::PciFacts;
use probe::ProbeOutcome;
use reason::Reason;
use verdict::Verdict;

/// Interval while the driver is still loading.
const LOADING_INTERVAL: Duration = Duration::from_millis(500);
/// First interval of [`wait_until_available`]; each probe doubles it, up to the maximum.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(300);

/// The verdict and the facts it is based on.
#[derive(Debug)]
pub struct Detection {
    /// Facts from sysfs.
    pub facts: PciFacts,
    /// Result of the probe; `None` if the verdict does not need one.
    pub outcome: Option<ProbeOutcome>,
    /// The verdict.
    pub verdict: Verdict,
}

/// Reads the facts and decides whether the node runs on the GPU or the CPU. Retries for at most
/// `wait` while the device is present and only the driver is missing.
pub async fn detect_gpus(config: &Config, settings: &Settings, wait: Duration) -> Detection {
    let deadline = Instant::now() + wait;
    loop {
        let detection = detect_once(config, settings).await;
        if !is_driver_loading(&detection.verdict) || Instant::now() + LOADING_INTERVAL > deadline {
            return detection;
        }
        tokio::time::sleep(LOADING_INTERVAL).await;
    }
}

/// Returns whether the GPU can become usable while the node runs on the CPU: the operator installs,
/// loads or binds the driver, or attaches the device. Excludes a failed GPU and an unresponsive
/// driver, which would hang the caller.
pub fn is_recoverable(verdict: &Verdict) -> bool {
    verdict.finding().is_some_and(|finding| {
        matches!(
            finding.reason,
            Reason::GpuNotPresent
                | Reason::GpuNotPassedThrough
                | Reason::DriverNotLoaded
                | Reason::WrongDriver
                | Reason::DriverLibraryMissing
                | Reason::DriverLibraryMismatch
                | Reason::DriverNotReady
                | Reason::DriverError
                | Reason::PermissionDenied
                | Reason::GpuCountZero
        )
    })
}

/// Waits until a GPU is usable.
pub async fn wait_until_available(config: &Config, settings: &Settings) {
    let mut backoff = Backoff::new(RETRY_INTERVAL, MAX_RETRY_INTERVAL);
    loop {
        tokio::time::sleep(backoff.next_delay(0.0)).await;
        let detection = detect_once(config, settings).await;
        if !detection.verdict.devices().is_empty() {
            return;
        }
        // Reading sysfs costs nothing; a probe loads NVIDIA's library.
        if detection.outcome.is_none() {
            backoff.reset();
        }
    }
}

async fn detect_once(config: &Config, settings: &Settings) -> Detection {
    let (sysfs, root) = (&settings.gpu.sysfs, &settings.system.root);
    let facts = pci::read_facts(sysfs, || KernelFacts::read(sysfs, |path| root.join(path)));
    if let Some(verdict) = decide::decide_without_probe(&config.gpu, config.framework, &facts) {
        return Detection { facts, outcome: None, verdict };
    }
    let outcome = probe::probe(&settings.gpu.nvml_library, settings.gpu.probe_timeout).await;
    let verdict = decide::decide_gpu_or_cpu(&config.gpu, config.framework, &facts, &outcome);
    Detection { facts, outcome: Some(outcome), verdict }
}

/// Returns whether waiting may change the verdict: the device is present and the driver may be
/// loading.
fn is_driver_loading(verdict: &Verdict) -> bool {
    verdict.finding().is_some_and(|finding| {
        matches!(finding.reason, Reason::DriverNotLoaded | Reason::DriverNotReady)
    })
}
