//! Parent side of the GPU monitor: runs the child process that waits for NVML events, and turns its
//! messages into failures of the GPUs in use. The child side is [`crate::gpu::monitor_child`].
//!
//! ```text
//! Idle ──started──> Running ──fatal XID, fault, driver removed──> failure
//!  ^                   ├──no heartbeat: child killed────────────> failure, then Idle
//!  │                   └──child exited──> BackingOff ──> Probing ──GPU unusable──> failure
//!  │                                                        │ GPU usable
//!  └────────────────────────────────────────────────────────┘
//! ```
//!
//! [`crate::gpu::xid`] classifies XIDs; the supervisor's state machine decides how to handle a
//! failure.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::{Instant, timeout_at};

use crate::backoff::Backoff;
use crate::config::Config;
use crate::config::settings::Settings;
use crate::gpu::detect_gpus;
use crate::gpu::diagnose::signal_name;
use crate::gpu::monitor_child::MonitorMessage;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::gpu::xid::{Class, Xid};
use crate::report::Reporter;
use crate::values::GpuUuid;

/// The hidden subcommand of the child.
pub(crate) const SUBCOMMAND: &str = "nvml-watch";

/// Maximum length of a line of the child's output.
const MAX_LINE_BYTES: usize = 1 << 16;
/// Timeout for the next message of the child, and the number of consecutive timeouts after which
/// the child is unresponsive. One timeout of twice the length is not sufficient: after the VM was
/// suspended, the first timeout has elapsed before the child can run.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(8);
const MAX_MISSED_HEARTBEATS: u32 = 2;
/// Initial and maximum delay between an exit of the child and the probe. The delays are short so
/// that a probe that takes its full timeout still detects a lost GPU within half a minute.
const INITIAL_DELAY: Duration = Duration::from_secs(1);
const MAX_DELAY: Duration = Duration::from_secs(8);
/// A child that ran for this long resets the delay.
const HEALTHY_AFTER: Duration = Duration::from_secs(600);
/// Number of consecutive exits that are logged, the last one as a WARNING.
const MAX_LOGGED_EXITS: u32 = 3;

/// Events that were already logged or reported: UUID of the GPU and kind of event.
type Reported = BTreeSet<(Option<GpuUuid>, EventKind)>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum EventKind {
    /// `None`: a double-bit ECC error without an XID.
    Xid(Option<u64>),
    Health,
    LibraryRemoved,
    Unresponsive,
    UnusableAfterExit,
}

/// Monitors the GPUs of a node through one child process, which is killed when this value is
/// dropped.
pub(crate) struct GpuMonitor {
    config: Rc<Config>,
    settings: Rc<Settings>,
    /// Receives readings and counts of XIDs.
    reporter: Rc<Reporter>,
    phase: Phase,
    /// The UUIDs of the monitored GPUs.
    uuids: Vec<GpuUuid>,
    /// Counts the exits of the child since it last ran for [`HEALTHY_AFTER`].
    backoff: Backoff,
    /// Events without consequences that were logged.
    logged_events: Reported,
    /// Failures that were reported for this container.
    reported_failures: Reported,
}

/// Current phase of the monitor. It is kept while the caller handles other events.
enum Phase {
    Idle,
    Running(Box<MonitorProcess>),
    /// The child exited; the probe follows at `until`.
    BackingOff {
        exit: String,
        until: Instant,
    },
    Probing {
        exit: String,
        verdict: LocalBoxFuture<'static, Verdict>,
    },
}

impl GpuMonitor {
    /// Returns a monitor that has not started its child.
    pub(crate) fn new(config: &Config, settings: &Settings, reporter: Rc<Reporter>) -> Self {
        Self {
            config: Rc::new(config.clone()),
            settings: Rc::new(settings.clone()),
            reporter,
            phase: Phase::Idle,
            uuids: Vec::new(),
            backoff: Backoff::new(INITIAL_DELAY, MAX_DELAY),
            logged_events: Reported::new(),
            reported_failures: Reported::new(),
        }
    }

    /// Kills the child and resets the reported failures, so that a failure in another container or
    /// after a retry is reported again. The next call of [`next_failure`](Self::next_failure)
    /// starts a new child.
    pub(crate) fn reset(&mut self) {
        self.reported_failures.clear();
        self.phase = Phase::Idle;
    }

    /// Waits for a failure of one of `devices`, which must not be empty, that was not reported yet.
    /// Logs each kind of event without consequences once.
    ///
    /// Cancel safe: the next call continues with the same child, backoff and probe.
    pub(crate) async fn next_failure(&mut self, devices: &[GpuDevice]) -> Finding {
        if !devices.iter().map(|device| &device.uuid).eq(&self.uuids) {
            self.uuids = devices.iter().map(|device| device.uuid.clone()).collect();
            self.phase = Phase::Idle;
        }
        loop {
            let failure = match &mut self.phase {
                Phase::Idle => {
                    match MonitorProcess::start(&self.settings, &self.uuids) {
                        Ok(process) => self.phase = Phase::Running(Box::new(process)),
                        Err(error) => self.back_off(format!("failed to start: {error}")),
                    }
                    None
                }
                Phase::Running(process) => {
                    let event = process.next_event().await;
                    self.on_event(event, devices)
                }
                Phase::BackingOff { exit, until } => {
                    tokio::time::sleep_until(*until).await;
                    let exit = std::mem::take(exit);
                    self.phase = Phase::Probing { exit, verdict: self.probe() };
                    None
                }
                Phase::Probing { exit, verdict } => {
                    let verdict = verdict.await;
                    let exit = std::mem::take(exit);
                    self.phase = Phase::Idle;
                    self.on_probed(&exit, &verdict, devices)
                }
            };
            if let Some(finding) = failure {
                return finding;
            }
        }
    }

    fn on_event(&mut self, event: ProcessEvent, devices: &[GpuDevice]) -> Option<Finding> {
        match event {
            ProcessEvent::Message(message) => self.on_message(message, devices),
            ProcessEvent::Unresponsive(silence) => {
                self.end_process();
                let what = format!(
                    "NVIDIA's driver does not answer: the GPU monitor sent no heartbeat for {} s \
                     and was killed",
                    silence.as_secs()
                );
                let failure = self.new_failure(devices, None, EventKind::Unresponsive, what);
                if failure.is_none() {
                    self.back_off("was unresponsive and was killed".into());
                }
                failure
            }
            ProcessEvent::Exited(how) => {
                self.end_process();
                self.back_off(how);
                None
            }
        }
    }

    fn end_process(&mut self) {
        if let Phase::Running(process) = &self.phase
            && process.started_at.elapsed() >= HEALTHY_AFTER
        {
            self.backoff.reset();
        }
        self.phase = Phase::Idle;
    }

    /// Schedules the probe that follows an exit of the child. `exit` completes "the GPU monitor …".
    fn back_off(&mut self, exit: String) {
        let delay = self.backoff.next_delay(0.0);
        let seconds = delay.as_secs();
        match self.backoff.attempts() {
            ..MAX_LOGGED_EXITS => tracing::info!(
                "GPU monitor {exit}; restarting it in {seconds} s if a probe finds the GPU usable"
            ),
            MAX_LOGGED_EXITS => tracing::warn!(
                "GPU monitor {exit}; it keeps exiting; probing the GPU every {} s instead",
                MAX_DELAY.as_secs()
            ),
            _ => tracing::debug!("GPU monitor {exit}; restarting it in {seconds} s"),
        }
        self.phase = Phase::BackingOff { exit, until: Instant::now() + delay };
    }

    fn probe(&self) -> LocalBoxFuture<'static, Verdict> {
        let (config, settings) = (Rc::clone(&self.config), Rc::clone(&self.settings));
        let probe = async move { detect_gpus(&config, &settings, Duration::ZERO).await.verdict };
        probe.boxed_local()
    }

    /// Returns a failure if the probe after an exit of the child does not find one of `devices`.
    fn on_probed(
        &mut self,
        exit: &str,
        verdict: &Verdict,
        devices: &[GpuDevice],
    ) -> Option<Finding> {
        let unusable = devices
            .iter()
            .find(|device| !verdict.devices().iter().any(|found| found.uuid == device.uuid))?;
        let why = match verdict.finding() {
            Some(finding) => format!("{}: {}", finding.reason, finding.summary),
            None => "the driver no longer lists it as usable".into(),
        };
        let what = format!("the GPU monitor {exit}, and a probe reports: {why}");
        self.new_failure(devices, Some(&unusable.uuid), EventKind::UnusableAfterExit, what)
    }

    fn on_message(&mut self, message: MonitorMessage, devices: &[GpuDevice]) -> Option<Finding> {
        match message {
            MonitorMessage::Started { unsupported } => {
                if !unsupported.is_empty() && self.backoff.attempts() == 0 {
                    let uuids: Vec<&str> = unsupported.iter().map(GpuUuid::as_str).collect();
                    tracing::info!(
                        "NVML events unsupported for {}; polling health only",
                        uuids.join(", ")
                    );
                }
                None
            }
            // The exit follows.
            MonitorMessage::Failed { .. } | MonitorMessage::Heartbeat => None,
            MonitorMessage::Reading { uuid, reading } => {
                self.reporter.update(|status| status.record_reading(&uuid, reading));
                None
            }
            MonitorMessage::Event { uuid, xid, count } => self.on_xid(uuid, xid, count, devices),
            MonitorMessage::Fault { uuid, fault } => {
                self.new_failure(devices, Some(&uuid), EventKind::Health, fault.describe())
            }
            MonitorMessage::Unhealthy { uuid, health_issues } => {
                let what = health_issues.join("; ");
                self.new_failure(devices, Some(&uuid), EventKind::Health, what)
            }
            MonitorMessage::LibraryRemoved { path } => {
                let what = format!(
                    "libnvidia-ml was removed from {path}: the driver was uninstalled while the \
                     node ran"
                );
                self.new_failure(devices, None, EventKind::LibraryRemoved, what)
            }
        }
    }

    /// Returns a failure for a fatal event, and logs any other event once.
    fn on_xid(
        &mut self,
        uuid: GpuUuid,
        xid: Option<u64>,
        count: u64,
        devices: &[GpuDevice],
    ) -> Option<Finding> {
        if let Some(xid) = xid {
            self.reporter.update(|status| status.count_xid(&uuid, xid, count));
        }
        let (class, text) = match xid.map(Xid) {
            Some(xid) => (xid.class(), xid.to_string()),
            None => (Class::FatalForWorkload, "an uncorrectable double-bit ECC error".into()),
        };
        let kind = EventKind::Xid(xid);
        if class.is_fatal() {
            return self.new_failure(devices, Some(&uuid), kind, text);
        }
        let device = devices.iter().find(|device| device.uuid == uuid);
        let name = device.map_or_else(|| uuid.to_string(), ToString::to_string);
        let pci_address = device.and_then(|device| device.pci_address);
        macro_rules! log_event {
            ($level:ident, $consequence:expr) => {
                tracing::$level!(
                    xid,
                    gpu_uuid = uuid.as_str(),
                    pci_address = pci_address.map(tracing::field::display),
                    "{name}: {text}; {}",
                    $consequence
                )
            };
        }
        let consequence = "the node continues, and further events of this kind are not logged";
        if self.logged_events.contains(&(Some(uuid.clone()), kind)) {
            log_event!(debug, format_args!("{count} more"));
        } else if class == Class::Application {
            log_event!(warn, consequence);
        } else {
            log_event!(info, consequence);
        }
        self.logged_events.insert((Some(uuid), kind));
        None
    }

    /// Returns the finding about a failure of one GPU, or of all if `uuid` is `None`; `None` if it
    /// was reported already.
    fn new_failure(
        &mut self,
        devices: &[GpuDevice],
        uuid: Option<&GpuUuid>,
        kind: EventKind,
        what: String,
    ) -> Option<Finding> {
        let device = devices.iter().find(|device| uuid.is_none_or(|uuid| device.uuid == *uuid));
        let failed_uuid = device.map(|device| &device.uuid).or(uuid).cloned();
        if !self.reported_failures.insert((failed_uuid, kind)) {
            tracing::debug!("GPU failure reported before: {what}");
            return None;
        }
        let names: Vec<String> = match (uuid, device) {
            (Some(_), Some(device)) => vec![device.to_string()],
            _ => devices.iter().map(ToString::to_string).collect(),
        };
        Some(Finding {
            gpu_uuid: device.map(|device| device.uuid.clone()),
            pci_address: device.and_then(|device| device.pci_address),
            ..Finding::new(Reason::GpuFailed, format!("{}: {what}", names.join(", ")))
        })
    }
}

enum ProcessEvent {
    Message(MonitorMessage),
    /// The child sent nothing for this long.
    Unresponsive(Duration),
    /// The child exited or its output is invalid; the text completes "the GPU monitor …".
    Exited(String),
}

/// The child process. Dropping it kills the child.
struct MonitorProcess {
    child: Child,
    process_group: Option<Pid>,
    stdout: BufReader<ChildStdout>,
    /// The incomplete line read so far.
    line: Vec<u8>,
    started_at: Instant,
    /// The child is unresponsive after [`MAX_MISSED_HEARTBEATS`] consecutive timeouts of this
    /// length.
    heartbeat_timeout: Duration,
    heartbeat_due: Instant,
    missed_heartbeats: u32,
    /// The fault that the child reported before its exit.
    failure: Option<String>,
    /// Deadline for the exit of a child that has closed its output.
    exit_due: Option<Instant>,
}

impl MonitorProcess {
    fn start(settings: &Settings, uuids: &[GpuUuid]) -> io::Result<Self> {
        // Readings are needed only for the metrics endpoint.
        let readings = settings.metrics.address().map(|_| "--readings");
        let mut child = Command::new("/proc/self/exe")
            .arg(SUBCOMMAND)
            .args(readings)
            .arg("--")
            .arg(&settings.gpu.nvml_library)
            .args(uuids.iter().map(GpuUuid::as_str))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // A separate process group, so that processes started by the library are killed as
            // well.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let stdout = child.stdout.take().ok_or_else(|| io::Error::other("no standard output"))?;
        let started_at = Instant::now();
        // The child starts with the same NVML calls as the probe.
        let heartbeat_timeout =
            (settings.gpu.probe_timeout / MAX_MISSED_HEARTBEATS).max(HEARTBEAT_TIMEOUT);
        Ok(Self {
            process_group: child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw),
            child,
            stdout: BufReader::new(stdout),
            line: Vec::new(),
            started_at,
            heartbeat_timeout,
            heartbeat_due: started_at + heartbeat_timeout,
            missed_heartbeats: 0,
            failure: None,
            exit_due: None,
        })
    }

    /// Waits for the next event. Cancel safe.
    async fn next_event(&mut self) -> ProcessEvent {
        loop {
            let line = match timeout_at(self.heartbeat_due, self.next_line()).await {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) => return ProcessEvent::Exited(self.exit().await),
                Ok(Err(error)) => {
                    return ProcessEvent::Exited(format!("sent unreadable output: {error}"));
                }
                Err(_) => {
                    self.missed_heartbeats += 1;
                    if self.missed_heartbeats == MAX_MISSED_HEARTBEATS {
                        let silence = self.heartbeat_timeout * MAX_MISSED_HEARTBEATS;
                        return ProcessEvent::Unresponsive(silence);
                    }
                    self.heartbeat_due = Instant::now() + self.heartbeat_timeout;
                    continue;
                }
            };
            self.heartbeat_timeout = HEARTBEAT_TIMEOUT;
            self.heartbeat_due = Instant::now() + HEARTBEAT_TIMEOUT;
            self.missed_heartbeats = 0;
            match serde_json::from_slice(&line) {
                Ok(MonitorMessage::Failed { fault }) => self.failure = Some(fault.describe()),
                Ok(message) => return ProcessEvent::Message(message),
                Err(_) => return ProcessEvent::Exited("sent an invalid message".into()),
            }
        }
    }

    /// Returns the next line; `None` at the end of the output. Cancel safe.
    async fn next_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let chunk = self.stdout.fill_buf().await?;
            if chunk.is_empty() {
                return Ok(None);
            }
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let length = end.map_or(chunk.len(), |end| end + 1);
            if self.line.len() + length > MAX_LINE_BYTES {
                return Err(io::Error::other("line too long"));
            }
            self.line.extend_from_slice(&chunk[..length]);
            self.stdout.consume(length);
            if end.is_some() {
                return Ok(Some(std::mem::take(&mut self.line)));
            }
        }
    }

    /// Waits for the exit of a child that has closed its output, and returns a description of the
    /// exit. Cancel safe.
    async fn exit(&mut self) -> String {
        const TIMEOUT: Duration = Duration::from_secs(1);
        let due = *self.exit_due.get_or_insert_with(|| Instant::now() + TIMEOUT);
        let how = match timeout_at(due, self.child.wait()).await {
            Ok(Ok(status)) => match status.signal() {
                Some(signal) => format!("was killed by signal {signal}{}", signal_name(signal)),
                None => format!("exited ({status})"),
            },
            _ => "closed its output".into(),
        };
        match self.failure.take() {
            Some(failure) => format!("{how}: {failure}"),
            None => how,
        }
    }
}

impl Drop for MonitorProcess {
    fn drop(&mut self) {
        // Does not wait: a process that hangs inside the driver may survive SIGKILL for a long
        // time.
        if let Some(process_group) = self.process_group {
            let _ = kill_process_group(process_group, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use one_context::Context;

    use super::*;
    use crate::config::Prebaked;
    use crate::values::PciAddress;

    fn monitor() -> GpuMonitor {
        let context = Context::parse(b"FL_GPU_ENABLED='YES'\n").unwrap();
        let (config, _) = Config::from_context(&context, &Prebaked::default()).unwrap();
        GpuMonitor::new(&config, &Settings::default(), Rc::new(Reporter::new(None)))
    }

    fn devices() -> Vec<GpuDevice> {
        ["GPU-a", "GPU-b"]
            .into_iter()
            .map(|uuid| GpuDevice {
                index: 0,
                uuid: GpuUuid::parse(uuid).unwrap(),
                name: Some("NVIDIA L4".into()),
                pci_address: PciAddress::parse("0000:01:00.5"),
                memory_mib: None,
                minor: None,
            })
            .collect()
    }

    fn event(uuid: &str, xid: Option<u64>) -> MonitorMessage {
        MonitorMessage::Event { uuid: GpuUuid::parse(uuid).unwrap(), xid, count: 1 }
    }

    #[test]
    fn fatal_xid_is_one_failure_naming_device_and_xid() {
        let (mut monitor, devices) = (monitor(), devices());
        let finding = monitor.on_message(event("GPU-b", Some(79)), &devices).unwrap();
        assert_eq!(finding.reason, Reason::GpuFailed);
        assert!(
            finding.summary.contains("NVIDIA L4 (GPU-b, ") && finding.summary.contains("XID 79: "),
            "{finding:?}"
        );
        assert_eq!(finding.gpu_uuid.as_ref().map(GpuUuid::as_str), Some("GPU-b"));
        assert_eq!(finding.pci_address, PciAddress::parse("0000:01:00.5"));
        assert_eq!(monitor.on_message(event("GPU-b", Some(79)), &devices), None);
        assert!(monitor.on_message(event("GPU-a", Some(79)), &devices).is_some(), "other device");
        assert!(monitor.on_message(event("GPU-b", None), &devices).is_some(), "other event");
        monitor.reset();
        assert!(monitor.on_message(event("GPU-b", Some(79)), &devices).is_some());
    }

    #[test]
    fn application_xid_is_not_a_failure() {
        let mut monitor = monitor();
        for xid in [8, 13, 31, 43, 45, 63, 94, 154] {
            assert_eq!(monitor.on_message(event("GPU-a", Some(xid)), &devices()), None, "{xid}");
        }
    }

    #[test]
    fn driver_failure_names_every_device() {
        let mut monitor = monitor();
        let removed = MonitorMessage::LibraryRemoved { path: "/lib/x".into() };
        let finding = monitor.on_message(removed, &devices()).unwrap();
        assert!(
            finding.summary.contains("GPU-a") && finding.summary.contains("GPU-b"),
            "{finding:?}"
        );
    }
}
