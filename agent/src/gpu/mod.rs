//! The GPU: what is present (sysfs), what was assigned (context), what the driver says (NVML), and
//! what follows from it; and, while the node runs, what becomes of it.

pub mod kernel;
pub mod monitor_child;
pub mod nvml_library;
pub mod pci;
pub mod probe;
pub mod probe_child;
pub mod reason;
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

/// How often a driver that is still coming is looked for.
const PAUSE: Duration = Duration::from_millis(500);
/// Interval of reading sysfs for a GPU that becomes available after the start. Where sysfs shows a
/// driver, each probe doubles it, up to the maximum.
const LATE_INTERVAL: Duration = Duration::from_secs(10);
const MAX_LATE_INTERVAL: Duration = Duration::from_secs(300);

/// The verdict and what it rests on.
#[derive(Debug)]
pub struct Detection {
    /// What sysfs said.
    pub facts: PciFacts,
    /// What the probe said, where it was asked.
    pub outcome: Option<ProbeOutcome>,
    /// What follows.
    pub verdict: Verdict,
}

/// Finds out whether a GPU can be used. While the device is there and only the driver is still
/// missing, it is looked for again, for at most `wait`.
///
/// sysfs comes first, and NVML is not called at all where sysfs has decided: called as root on a
/// machine without a driver it would create device nodes.
pub async fn detect_gpus(config: &Config, settings: &Settings, wait: Duration) -> Detection {
    let deadline = Instant::now() + wait;
    loop {
        let detection = detect_once(config, settings).await;
        if !may_come(&detection.verdict) || Instant::now() + PAUSE > deadline {
            return detection;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether a node that runs on the CPU for this reason may find its GPU usable later: somebody
/// installs, loads or binds the driver, or plugs the device in. A GPU that failed is not among
/// them, nor a driver that hangs whoever asks it.
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

/// Looks for the GPU at a slow pace until it is usable.
pub async fn wait_until_available(config: &Config, settings: &Settings) {
    let mut backoff = Backoff::new(LATE_INTERVAL, MAX_LATE_INTERVAL);
    loop {
        tokio::time::sleep(backoff.next_delay(0.0)).await;
        let detection = detect_once(config, settings).await;
        if !detection.verdict.devices().is_empty() {
            return;
        }
        // Reading sysfs costs nothing; the probe loads NVIDIA's library.
        if detection.outcome.is_none() {
            backoff.reset();
        }
    }
}

async fn detect_once(config: &Config, settings: &Settings) -> Detection {
    let (sysfs, root) = (&settings.gpu.sysfs, &settings.machine.root);
    let facts = pci::read_facts(sysfs, || KernelFacts::read(sysfs, |path| root.join(path)));
    if !config.gpu_enabled {
        return Detection { facts, outcome: None, verdict: Verdict::not_wanted() };
    }
    if let Some(verdict) = verdict::before_the_probe(config, &facts) {
        return Detection { facts, outcome: None, verdict };
    }
    let outcome = probe::probe(&settings.gpu.nvml_library, settings.gpu.probe_timeout).await;
    let verdict = verdict::after_the_probe(config, &facts, &outcome);
    Detection { facts, outcome: Some(outcome), verdict }
}

/// Whether waiting may change the verdict: the device is there, the driver is on its way or may be.
fn may_come(verdict: &Verdict) -> bool {
    match verdict {
        Verdict::Cpu { finding: Some(finding) } => {
            matches!(finding.reason, Reason::DriverNotLoaded | Reason::DriverNotReady)
        }
        _ => false,
    }
}
