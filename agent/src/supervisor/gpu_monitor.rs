//! The watcher, from outside: a child process of the same binary that watches the GPUs in use, see
//! [`crate::gpu::monitor_child`].
//!
//! ```text
//!            ┌── died, or could not be started ──> pause ──> probe: the GPU is well ──┐
//! start ──> reading ──fatal XID, fault, library gone──> failed                        └──> start
//!            │                                            ^        │
//!            └── no heartbeat: killed ────────────────────┴── probe: it is not
//! ```

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

use crate::config::Config;
use crate::config::settings::Settings;
use crate::gpu::detect_gpus;
use crate::gpu::diagnose::signal_name;
use crate::gpu::monitor_child::MonitorMessage;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::gpu::xid::{Class, Xid};
use crate::report::Reporter;

/// The hidden subcommand that the child runs.
pub(crate) const SUBCOMMAND: &str = "nvml-watch";

/// More than a line of the child ever has.
const MAX_LINE_BYTES: usize = 1 << 16;
/// Two of these without a word, and it hangs. Not one of the double length: a VM that was suspended
/// finds its first limit over before the child could speak.
const SILENCE: Duration = Duration::from_secs(8);
const MAX_SILENCES: u32 = 2;
/// The pause before a child that has died is started again: the first and the longest. With each
/// comes a probe, which finds a GPU that is lost, within half a minute even where it takes all of
/// its time: so it is a short one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(8);
/// A life of this length makes the next pause the first again.
const HEALTHY_AFTER: Duration = Duration::from_secs(600);
/// So many deaths in a row are told.
const DEATHS_TOLD: u32 = 3;

/// What was told already is not told again: the device and what it is about.
type Told = BTreeSet<(String, About)>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum About {
    Xid(Option<u64>),
    Health,
    Library,
    Silence,
    Death,
}

/// Monitors the GPUs of a node through one child process, which is killed when this value is
/// dropped.
pub(crate) struct GpuMonitor {
    config: Rc<Config>,
    settings: Rc<Settings>,
    /// Receives readings and counts of XIDs.
    reporter: Rc<Reporter>,
    phase: Phase,
    /// The UUIDs of the GPUs that the phase is about.
    uuids: Vec<String>,
    pause: Duration,
    /// Exits in a row without a run of [`HEALTHY_AFTER`].
    deaths: u32,
    /// Events without consequences that were logged.
    told: Told,
    /// Failures that were reported for this container.
    failures: Told,
}

/// What the monitor does now. It is kept while the caller handles other events.
enum Phase {
    /// No child runs; the next call starts one.
    Idle,
    Running(Box<MonitorProcess>),
    /// The child exited, `how` is the end of a sentence; the probe follows at `until`.
    BackingOff {
        how: String,
        until: Instant,
    },
    Probing {
        how: String,
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
            pause: FIRST_PAUSE,
            deaths: 0,
            told: Told::new(),
            failures: Told::new(),
        }
    }

    /// Kills the child, until it is needed again, and forgets the reported failures: in another
    /// container, or after a retry, a failure counts again.
    pub(crate) fn reset(&mut self) {
        self.failures.clear();
        self.phase = Phase::Idle;
    }

    /// Waits until one of `devices`, at least one, fails in a way that was not reported yet. An
    /// event without consequences is logged, once.
    ///
    /// Cancel safe: the child, the backoff and the probe go on with the next call.
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
                        Err(error) => self.back_off(format!("could not be started: {error}")),
                    }
                    None
                }
                Phase::Running(process) => {
                    let event = process.next_event().await;
                    self.on_event(event, devices)
                }
                Phase::BackingOff { how, until } => {
                    tokio::time::sleep_until(*until).await;
                    let how = std::mem::take(how);
                    self.phase = Phase::Probing { how, verdict: self.probe() };
                    None
                }
                Phase::Probing { how, verdict } => {
                    let verdict = verdict.await;
                    let how = std::mem::take(how);
                    self.phase = Phase::Idle;
                    self.judge_probe(&how, &verdict, devices)
                }
            };
            if let Some(finding) = failure {
                return finding;
            }
        }
    }

    fn on_event(&mut self, event: MonitorEvent, devices: &[GpuDevice]) -> Option<Finding> {
        if let MonitorEvent::Message(message) = event {
            return self.judge(message, devices);
        }
        if let Phase::Running(process) = &self.phase
            && process.since.elapsed() >= HEALTHY_AFTER
        {
            (self.pause, self.deaths) = (FIRST_PAUSE, 0);
        }
        self.phase = Phase::Idle;
        let how = match event {
            MonitorEvent::Message(_) => return None,
            MonitorEvent::Silence(length) => {
                let seconds = length.as_secs();
                let what = format!(
                    "NVIDIA's driver does not answer: the watcher gave no sign of life for {seconds} s and was killed"
                );
                let failure = self.failed(devices, None, About::Silence, what);
                if failure.is_some() {
                    return failure;
                }
                "hung and was killed".to_owned()
            }
            MonitorEvent::Exited(how) => how,
        };
        self.back_off(how);
        None
    }

    /// Delays the probe that follows an exit of the child.
    fn back_off(&mut self, how: String) {
        self.deaths += 1;
        let seconds = self.pause.as_secs();
        let text =
            format!("the GPU watcher {how}; starting it again in {seconds} s if the GPU is well");
        match self.deaths {
            ..DEATHS_TOLD => tracing::info!("{text}"),
            DEATHS_TOLD => tracing::warn!(
                "{text}; it has not lived long {DEATHS_TOLD} times: faults are noticed only by a probe every {} s",
                MAX_PAUSE.as_secs()
            ),
            _ => tracing::debug!("{text}"),
        }
        self.phase = Phase::BackingOff { how, until: Instant::now() + self.pause };
        self.pause = (self.pause * 2).min(MAX_PAUSE);
    }

    fn probe(&self) -> LocalBoxFuture<'static, Verdict> {
        let (config, settings) = (Rc::clone(&self.config), Rc::clone(&self.settings));
        let probe = async move { detect_gpus(&config, &settings, Duration::ZERO).await.verdict };
        probe.boxed_local()
    }

    /// Returns the failure of a GPU that the probe after an exit of the child does not find.
    fn judge_probe(
        &mut self,
        how: &str,
        verdict: &Verdict,
        devices: &[GpuDevice],
    ) -> Option<Finding> {
        let lost = devices
            .iter()
            .find(|device| !verdict.devices().iter().any(|found| found.uuid == device.uuid))?;
        let why = match verdict.finding() {
            Some(finding) => format!("{}: {}", finding.reason, finding.summary),
            None => "the driver does not list it as usable any more".into(),
        };
        let what = format!("the GPU watcher {how}, and a probe says: {why}");
        self.failed(devices, Some(&lost.uuid), About::Death, what)
    }

    /// What follows from what the child said.
    fn judge(&mut self, notice: MonitorMessage, devices: &[GpuDevice]) -> Option<Finding> {
        match notice {
            MonitorMessage::Started { unsupported } => {
                if !unsupported.is_empty() && self.deaths == 0 {
                    tracing::info!(
                        "no events are to be had of {}: its health alone is looked after",
                        unsupported.join(", ")
                    );
                }
                None
            }
            // The end follows.
            MonitorMessage::Heartbeat | MonitorMessage::Failed { .. } => None,
            MonitorMessage::Reading { uuid, reading } => {
                self.reporter.update(|status| status.record_reading(&uuid, reading));
                None
            }
            MonitorMessage::Event { uuid, xid, count } => {
                self.judge_event(uuid, xid, count, devices)
            }
            MonitorMessage::Fault { uuid, fault } => {
                self.failed(devices, Some(&uuid), About::Health, fault.describe())
            }
            MonitorMessage::Unhealthy { uuid, health_issues } => {
                self.failed(devices, Some(&uuid), About::Health, health_issues.join("; "))
            }
            MonitorMessage::LibraryRemoved { path } => {
                let what = format!(
                    "libnvidia-ml has gone from {path}: the driver was removed under the node"
                );
                self.failed(devices, None, About::Library, what)
            }
        }
    }

    fn judge_event(
        &mut self,
        uuid: String,
        xid: Option<u64>,
        times: u64,
        devices: &[GpuDevice],
    ) -> Option<Finding> {
        if let Some(xid) = xid {
            self.reporter.update(|status| status.count_xid(&uuid, xid, times));
        }
        let (class, text) = match xid.map(Xid) {
            Some(xid) => (xid.class(), xid.to_string()),
            None => (
                Class::FatalForWorkload,
                "a double-bit ECC error, which cannot be corrected".into(),
            ),
        };
        if class.is_fatal() {
            return self.failed(devices, Some(&uuid), About::Xid(xid), text);
        }
        let title = devices
            .iter()
            .find(|device| device.uuid == uuid)
            .map_or_else(|| uuid.clone(), ToString::to_string);
        if !self.told.insert((uuid, About::Xid(xid))) {
            tracing::debug!("{title}: {text}, {times} times more");
        } else if class == Class::Application {
            tracing::warn!("{title}: {text}; the node goes on, and the next ones are not told");
        } else {
            tracing::info!("{title}: {text}; the node goes on, and the next ones are not told");
        }
        None
    }

    /// The finding about a failure of one device, or of all; `None` where it was told already.
    fn failed(
        &mut self,
        devices: &[GpuDevice],
        uuid: Option<&str>,
        about: About,
        what: String,
    ) -> Option<Finding> {
        let device = devices.iter().find(|device| uuid.is_none_or(|uuid| device.uuid == uuid));
        let whose = device
            .map_or_else(|| uuid.unwrap_or_default().to_owned(), |device| device.uuid.clone());
        if !self.failures.insert((whose, about)) {
            tracing::debug!("once more: {what}");
            return None;
        }
        let titles: Vec<String> = match (uuid, device) {
            (Some(_), Some(device)) => vec![device.to_string()],
            _ => devices.iter().map(ToString::to_string).collect(),
        };
        Some(Finding {
            gpu_uuid: device.map(|device| device.uuid.clone()),
            pci_address: device.map(|device| device.pci_address.clone()),
            ..Finding::new(Reason::GpuFailed, format!("{}: {what}", titles.join(", ")))
        })
    }
}

enum MonitorEvent {
    Message(MonitorMessage),
    /// The child was silent for this long.
    Silence(Duration),
    /// The child exited: how, as the end of a sentence.
    Exited(String),
}

/// The child process. Dropping it kills the child.
struct MonitorProcess {
    child: Child,
    group: Option<Pid>,
    out: BufReader<ChildStdout>,
    /// The part of a line that was read.
    line: Vec<u8>,
    since: Instant,
    /// How long the child may be silent: [`MAX_SILENCES`] times in a row.
    timeout: Duration,
    silent_until: Instant,
    silences: u32,
    last_words: Option<String>,
    /// How long the child has to exit after it closed its output.
    exits_until: Option<Instant>,
}

impl MonitorProcess {
    fn start(settings: &Settings, uuids: &[String]) -> io::Result<Self> {
        // Readings are needed only for the metrics endpoint.
        let readings = settings.metrics.address().map(|_| "--readings");
        let mut child = Command::new("/proc/self/exe")
            .arg(SUBCOMMAND)
            .args(readings)
            .arg("--")
            .arg(&settings.gpu.nvml_library)
            .args(uuids)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Its own process group: what the library starts is killed with the child.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let out =
            child.stdout.take().ok_or_else(|| io::Error::other("it has no standard output"))?;
        let since = Instant::now();
        // The child starts with the same calls as the probe.
        let timeout = (settings.gpu.probe_timeout / MAX_SILENCES).max(SILENCE);
        Ok(Self {
            group: child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw),
            child,
            out: BufReader::new(out),
            line: Vec::new(),
            since,
            timeout,
            silent_until: since + timeout,
            silences: 0,
            last_words: None,
            exits_until: None,
        })
    }

    /// Waits for the next event. Cancel safe.
    async fn next_event(&mut self) -> MonitorEvent {
        loop {
            let line = match timeout_at(self.silent_until, self.next_line()).await {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) => return MonitorEvent::Exited(self.exit().await),
                Ok(Err(error)) => {
                    return MonitorEvent::Exited(format!("could not be read: {error}"));
                }
                Err(_) => {
                    self.silences += 1;
                    if self.silences == MAX_SILENCES {
                        return MonitorEvent::Silence(self.timeout * MAX_SILENCES);
                    }
                    self.silent_until = Instant::now() + self.timeout;
                    continue;
                }
            };
            self.timeout = SILENCE;
            (self.silences, self.silent_until) = (0, Instant::now() + SILENCE);
            match serde_json::from_slice(&line) {
                Ok(MonitorMessage::Failed { fault }) => self.last_words = Some(fault.describe()),
                Ok(notice) => return MonitorEvent::Message(notice),
                Err(_) => return MonitorEvent::Exited("said what is not understood".into()),
            }
        }
    }

    /// Returns the next line; `None` at the end of the output. Cancel safe.
    async fn next_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let chunk = self.out.fill_buf().await?;
            if chunk.is_empty() {
                return Ok(None);
            }
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let length = end.map_or(chunk.len(), |end| end + 1);
            if self.line.len() + length > MAX_LINE_BYTES {
                return Err(io::Error::other("it talks without end"));
            }
            self.line.extend_from_slice(&chunk[..length]);
            self.out.consume(length);
            if end.is_some() {
                return Ok(Some(std::mem::take(&mut self.line)));
            }
        }
    }

    /// Waits until the child, which has closed its output, exits; returns how. Cancel safe.
    async fn exit(&mut self) -> String {
        const TIMEOUT: Duration = Duration::from_secs(1);
        let until = *self.exits_until.get_or_insert_with(|| Instant::now() + TIMEOUT);
        let status = timeout_at(until, self.child.wait()).await;
        let how = match status {
            Ok(Ok(status)) => match status.signal() {
                Some(signal) => format!("died by signal {signal}{}", signal_name(signal)),
                None => format!("ended ({status})"),
            },
            _ => "closed its output".into(),
        };
        match self.last_words.take() {
            Some(words) => format!("{how}: {words}"),
            None => how,
        }
    }
}

impl Drop for MonitorProcess {
    fn drop(&mut self) {
        // A process that hangs inside the driver may not even die of SIGKILL: it is not waited for.
        if let Some(group) = self.group {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use one_context::Context;

    use super::*;
    use crate::config::Prebaked;

    fn watch() -> GpuMonitor {
        let context = Context::parse(b"FL_GPU_ENABLED='YES'\n").unwrap();
        let (config, _) = Config::from_context(&context, &Prebaked::default()).unwrap();
        GpuMonitor::new(&config, &Settings::default(), Rc::new(Reporter::new(None)))
    }

    fn devices() -> Vec<GpuDevice> {
        ["GPU-a", "GPU-b"]
            .into_iter()
            .map(|uuid| GpuDevice {
                index: 0,
                uuid: uuid.into(),
                name: Some("NVIDIA L4".into()),
                pci_address: format!("0000:01:00.{}", uuid.len()),
                memory_mib: None,
                minor: None,
            })
            .collect()
    }

    fn event(uuid: &str, xid: Option<u64>) -> MonitorMessage {
        MonitorMessage::Event { uuid: uuid.into(), xid, count: 1 }
    }

    #[test]
    fn a_fatal_xid_is_a_failure_with_number_meaning_and_device_and_is_told_once() {
        let (mut watch, devices) = (watch(), devices());
        let finding = watch.judge(event("GPU-b", Some(79)), &devices).unwrap();
        assert_eq!(finding.reason, Reason::GpuFailed);
        assert!(
            finding.summary.contains("NVIDIA L4 (GPU-b, ") && finding.summary.contains("XID 79: "),
            "{finding:?}"
        );
        assert_eq!(finding.gpu_uuid.as_deref(), Some("GPU-b"));
        assert_eq!(finding.pci_address.as_deref(), Some("0000:01:00.5"));
        assert_eq!(watch.judge(event("GPU-b", Some(79)), &devices), None);
        assert!(watch.judge(event("GPU-a", Some(79)), &devices).is_some(), "another device");
        assert!(watch.judge(event("GPU-b", None), &devices).is_some(), "another fault");
        watch.reset();
        assert!(watch.judge(event("GPU-b", Some(79)), &devices).is_some());
    }

    #[test]
    fn an_applications_xid_is_no_failure() {
        let mut watch = watch();
        for xid in [8, 13, 31, 43, 45, 63, 94, 154] {
            assert_eq!(watch.judge(event("GPU-a", Some(xid)), &devices()), None, "{xid}");
        }
    }

    #[test]
    fn what_concerns_the_driver_names_every_device() {
        let mut watch = watch();
        let finding = watch
            .judge(MonitorMessage::LibraryRemoved { path: "/lib/x".into() }, &devices())
            .unwrap();
        assert!(
            finding.summary.contains("GPU-a") && finding.summary.contains("GPU-b"),
            "{finding:?}"
        );
    }
}
