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

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::Instant;

use crate::config::Config;
use crate::config::settings::Settings;
use crate::gpu::monitor_child::MonitorMessage;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::{GpuDevice, describe_fault, signal_name};
use crate::gpu::xid::{Class, Xid};
use crate::report::Reporter;

/// The hidden subcommand that the child runs.
pub const SUBCOMMAND: &str = "nvml-watch";

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

/// The watch over the GPUs of a node. One child at a time; it ends with this value.
#[derive(Debug)]
pub struct GpuMonitor {
    /// Who hears of figures and XIDs.
    reporter: Rc<Reporter>,
    watcher: Option<MonitorProcess>,
    pause: Duration,
    deaths: u32,
    /// XIDs that change nothing.
    told: Told,
    /// Failures: told again only in a container that is made anew.
    failures: Told,
}

impl GpuMonitor {
    /// One that has not begun.
    pub fn new(reporter: Rc<Reporter>) -> Self {
        Self {
            reporter,
            watcher: None,
            pause: FIRST_PAUSE,
            deaths: 0,
            told: Told::new(),
            failures: Told::new(),
        }
    }

    /// Ends the child, until it is needed again. In another container, or at another try, what has
    /// failed may fail again.
    pub fn reset(&mut self) {
        self.failures.clear();
        self.watcher = None;
    }

    /// Watches `devices`, at least one, until one of them fails in a way that was not told yet.
    /// What changes nothing is logged, once.
    pub async fn until_failed(
        &mut self,
        config: &Config,
        settings: &Settings,
        devices: &[GpuDevice],
    ) -> Finding {
        loop {
            let death = match self.heard(settings, devices).await {
                MonitorEvent::Message(notice) => {
                    if let Some(finding) = self.judge(notice, devices) {
                        return finding;
                    }
                    continue;
                }
                MonitorEvent::Silence(length) => {
                    let seconds = length.as_secs();
                    let what = format!(
                        "NVIDIA's driver does not answer: the watcher gave no sign of life for {seconds} s and was killed"
                    );
                    match self.failed(devices, None, About::Silence, what) {
                        Some(finding) => return finding,
                        None => "hung and was killed".to_owned(),
                    }
                }
                MonitorEvent::End(how) => how,
            };
            if let Some(finding) = self.look_after_death(&death, config, settings, devices).await {
                return finding;
            }
        }
    }

    async fn heard(&mut self, settings: &Settings, devices: &[GpuDevice]) -> MonitorEvent {
        let uuids = || devices.iter().map(|device| device.uuid.clone());
        if self.watcher.as_ref().is_some_and(|watcher| !watcher.uuids.iter().cloned().eq(uuids())) {
            self.watcher = None;
        }
        let watcher = match &mut self.watcher {
            Some(watcher) => watcher,
            none => match MonitorProcess::start(settings, uuids().collect()) {
                Ok(watcher) => none.insert(watcher),
                Err(error) => return MonitorEvent::End(format!("could not be started: {error}")),
            },
        };
        let heard = watcher.hear().await;
        if !matches!(heard, MonitorEvent::Message(_)) {
            if watcher.since.elapsed() >= HEALTHY_AFTER {
                (self.pause, self.deaths) = (FIRST_PAUSE, 0);
            }
            self.watcher = None;
        }
        heard
    }

    /// Waits a little, and asks a probe: what is not well is a failure.
    async fn look_after_death(
        &mut self,
        death: &str,
        config: &Config,
        settings: &Settings,
        devices: &[GpuDevice],
    ) -> Option<Finding> {
        self.deaths += 1;
        let seconds = self.pause.as_secs();
        let text =
            format!("the GPU watcher {death}; starting it again in {seconds} s if the GPU is well");
        match self.deaths {
            ..DEATHS_TOLD => tracing::info!("{text}"),
            DEATHS_TOLD => tracing::warn!(
                "{text}; it has not lived long {DEATHS_TOLD} times: faults are noticed only by a probe every {} s",
                MAX_PAUSE.as_secs()
            ),
            _ => tracing::debug!("{text}"),
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(MAX_PAUSE);
        let verdict = crate::gpu::detect_gpus(config, settings, Duration::ZERO).await.verdict;
        let lost = devices
            .iter()
            .find(|device| !verdict.devices().iter().any(|found| found.uuid == device.uuid))?;
        let why = match verdict.finding() {
            Some(finding) => format!("{}: {}", finding.reason, finding.summary),
            None => "the driver does not list it as usable any more".into(),
        };
        self.failed(
            devices,
            Some(&lost.uuid),
            About::Death,
            format!("the GPU watcher {death}, and a probe says: {why}"),
        )
    }

    /// What follows from what the child said.
    fn judge(&mut self, notice: MonitorMessage, devices: &[GpuDevice]) -> Option<Finding> {
        match notice {
            MonitorMessage::Watching { unsupported } => {
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
                self.reporter.metrics(|values| values.read(&uuid, reading));
                None
            }
            MonitorMessage::Event { uuid, xid, times } => {
                self.judge_event(uuid, xid, times, devices)
            }
            MonitorMessage::Fault { uuid, fault } => {
                self.failed(devices, Some(&uuid), About::Health, describe_fault(&fault))
            }
            MonitorMessage::Unhealthy { uuid, health_issues } => {
                self.failed(devices, Some(&uuid), About::Health, health_issues.join("; "))
            }
            MonitorMessage::LibraryGone { path } => {
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
            self.reporter.metrics(|values| values.count_xid(&uuid, xid, times));
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
    /// Nothing for so long: it is killed.
    Silence(Duration),
    /// It has ended: how, as the end of a sentence.
    End(String),
}

/// The child.
#[derive(Debug)]
struct MonitorProcess {
    uuids: Vec<String>,
    child: Child,
    group: Option<Pid>,
    out: BufReader<ChildStdout>,
    /// The line of which a part was read.
    line: Vec<u8>,
    since: Instant,
    /// How long it may say nothing.
    limit: Duration,
    last_words: Option<String>,
}

impl MonitorProcess {
    fn start(settings: &Settings, uuids: Vec<String>) -> io::Result<Self> {
        // Nobody looks at figures where there is no page.
        let readings = settings.metrics.address().map(|_| "--readings");
        let mut child = Command::new("/proc/self/exe")
            .arg(SUBCOMMAND)
            .args(readings)
            .arg("--")
            .arg(&settings.gpu.nvml_library)
            .args(&uuids)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // A group of its own: what the library starts is killed with the child.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let out =
            child.stdout.take().ok_or_else(|| io::Error::other("it has no standard output"))?;
        Ok(Self {
            uuids,
            group: child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw),
            child,
            out: BufReader::new(out),
            line: Vec::new(),
            since: Instant::now(),
            // It begins with what the probe does.
            limit: (settings.gpu.probe_timeout / MAX_SILENCES).max(SILENCE),
            last_words: None,
        })
    }

    async fn hear(&mut self) -> MonitorEvent {
        let mut silences = 0;
        loop {
            let line = match tokio::time::timeout(self.limit, self.next_line()).await {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) => return MonitorEvent::End(self.end().await),
                Ok(Err(error)) => return MonitorEvent::End(format!("could not be read: {error}")),
                Err(_) => {
                    silences += 1;
                    if silences == MAX_SILENCES {
                        return MonitorEvent::Silence(self.limit * MAX_SILENCES);
                    }
                    continue;
                }
            };
            self.limit = SILENCE;
            match serde_json::from_slice(&line) {
                Ok(MonitorMessage::Failed { fault }) => {
                    self.last_words = Some(describe_fault(&fault))
                }
                Ok(notice) => return MonitorEvent::Message(notice),
                Err(_) => return MonitorEvent::End("said what is not understood".into()),
            }
        }
    }

    /// The next line; `None` at the end. One that is cut short by the caller's time limit is
    /// continued by the next call.
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

    /// How it has ended.
    async fn end(&mut self) -> String {
        const TIMEOUT: Duration = Duration::from_secs(1);
        let status = tokio::time::timeout(TIMEOUT, self.child.wait()).await;
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
    use super::*;

    fn watch() -> GpuMonitor {
        GpuMonitor::new(Rc::new(Reporter::new(None)))
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
        MonitorMessage::Event { uuid: uuid.into(), xid, times: 1 }
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
        let finding =
            watch.judge(MonitorMessage::LibraryGone { path: "/lib/x".into() }, &devices()).unwrap();
        assert!(
            finding.summary.contains("GPU-a") && finding.summary.contains("GPU-b"),
            "{finding:?}"
        );
    }
}
