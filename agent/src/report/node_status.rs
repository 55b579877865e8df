//! Status of the node. Each fact is stored once; the sinks derive everything else.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime};

use crate::config::Framework;
use crate::gpu::monitor_child::Reading;
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::opennebula::partition::Partition;
use crate::system::os_release::Distribution;
use crate::values::GpuUuid;
use crate::values::{HostPort, Version, sanitize_line};

/// Maximum number of XID counters, so that a faulty driver cannot grow the metrics without limit.
const MAX_XID_COUNTERS: usize = 1024;

/// Readiness of the node as reported to the service manager.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// Detection, preflight and launch.
    #[default]
    Starting,
    /// Preflight has finished; the first attempt to find the SuperLink has not.
    Prepared,
    /// Only the SuperLink is missing. Discovery can take hours and must not delay the boot, so the
    /// unit counts as started.
    WaitingForSuperLink,
    /// The container runs, or ran and is being restarted.
    Ready,
    /// A reload is in progress.
    Reloading,
    /// The agent is about to exit.
    Stopping,
}

impl Readiness {
    /// Whether the service manager considers the unit started.
    pub(crate) fn is_started(self) -> bool {
        matches!(self, Self::WaitingForSuperLink | Self::Ready)
    }
}

/// Current activity of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Activity {
    /// A step of the daemon or the supervisor, with its progress if it reports any.
    Step {
        /// The step, in one line.
        name: String,
        progress: Option<String>,
    },
    /// Discovery retries; [`NodeStatus::superlink_wait`] has the reason.
    WaitingForSuperLink,
    /// The container runs.
    Running,
}

/// The container and its restarts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ContainerStatus {
    pub name: String,
    pub running: bool,
    pub paused: bool,
    /// Time of the last start, kept after the container has exited.
    pub started_at: Option<SystemTime>,
    /// Restarts since the agent started.
    pub restarts: u64,
    pub last_restart: Option<SystemTime>,
}

/// An XID of one GPU. The name is kept because the GPU may be gone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct GpuXid {
    pub uuid: GpuUuid,
    pub name: String,
    pub xid: u64,
}

/// Occurrences of one XID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct XidCount {
    pub total: u64,
    pub last: SystemTime,
}

/// The state of the node.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NodeStatus {
    pub readiness: Readiness,
    pub activity: Activity,
    /// Why the SuperLink is unknown and when the next attempt follows.
    pub superlink_wait: Option<String>,
    pub flower_version: Option<Version>,
    pub framework: Option<Framework>,
    pub container: ContainerStatus,
    /// What the node runs on; `None` until the first container runs.
    pub verdict: Option<Verdict>,
    /// Selects the distribution-specific fix of a finding.
    pub distribution: Distribution,
    /// Whether no process may use the GPUs of the verdict, because a GPU in use cannot be reset.
    pub gpus_released: bool,
    pub superlink: Option<HostPort>,
    pub partition: Option<Partition>,
    /// Whether Flower is connected to the SuperLink.
    pub connected: bool,
    pub connection_changed_at: Option<SystemTime>,
    /// Addition to the status line of a running node.
    pub note: Option<String>,
    /// State of the DCGM exporter, if one is wanted.
    pub exporter: Option<String>,
    /// Latest reading of each GPU of the verdict, by UUID.
    pub gpu_readings: BTreeMap<GpuUuid, (Reading, Instant)>,
    /// XIDs of these GPUs and of earlier ones.
    pub xids: BTreeMap<GpuXid, XidCount>,
}

impl Default for NodeStatus {
    fn default() -> Self {
        Self {
            readiness: Readiness::default(),
            activity: Activity::Step { name: String::new(), progress: None },
            superlink_wait: None,
            flower_version: None,
            framework: None,
            container: ContainerStatus::default(),
            verdict: None,
            distribution: Distribution::default(),
            gpus_released: false,
            superlink: None,
            partition: None,
            connected: false,
            connection_changed_at: None,
            note: None,
            exporter: None,
            gpu_readings: BTreeMap::new(),
            xids: BTreeMap::new(),
        }
    }
}

/// Transitions.
impl NodeStatus {
    /// Enters a step.
    pub(crate) fn set_step(&mut self, name: &str) {
        self.activity = Activity::Step { name: name.into(), progress: None };
    }

    /// Reports progress within a step.
    pub(crate) fn set_progress(&mut self, name: &str, progress: &str) {
        let (name, progress) = (name.to_owned(), Some(progress.to_owned()));
        self.activity = Activity::Step { name, progress };
    }

    /// Records the start of a run from detection: the first one, or one after a reload.
    pub(crate) fn begin_run(
        &mut self,
        container_name: &str,
        version: &Version,
        framework: Framework,
    ) {
        self.container.name = container_name.to_owned();
        (self.flower_version, self.framework) = (Some(version.clone()), Some(framework));
        self.set_connected(false);
        self.end_superlink_wait();
    }

    /// Records a failed attempt to find the SuperLink.
    pub(crate) fn set_superlink_wait(&mut self, reason: String) {
        self.superlink_wait = Some(reason);
        self.activity = Activity::WaitingForSuperLink;
        if self.readiness == Readiness::Prepared {
            self.readiness = Readiness::WaitingForSuperLink;
        }
    }

    /// Records that preflight has finished and only the SuperLink is missing.
    pub(crate) fn mark_prepared(&mut self) {
        let waits = self.superlink_wait.is_some();
        if waits {
            self.activity = Activity::WaitingForSuperLink;
        }
        self.readiness = match self.readiness {
            Readiness::Stopping => Readiness::Stopping,
            readiness if waits || readiness.is_started() => Readiness::WaitingForSuperLink,
            _ => Readiness::Prepared,
        };
    }

    /// Ends the wait for the SuperLink. A unit that has started stays started.
    pub(crate) fn end_superlink_wait(&mut self) {
        self.superlink_wait = None;
        self.readiness = match self.readiness {
            Readiness::WaitingForSuperLink => Readiness::Ready,
            Readiness::Prepared => Readiness::Starting,
            readiness => readiness,
        };
    }

    /// Records the verdict of the running container. Removes the readings of other GPUs.
    pub(crate) fn set_verdict(&mut self, verdict: &Verdict, distribution: Distribution) {
        self.gpus_released = false;
        let in_use = |uuid: &GpuUuid| verdict.devices().iter().any(|device| device.uuid == *uuid);
        self.gpu_readings.retain(|uuid, _| in_use(uuid));
        if self.verdict.as_ref() != Some(verdict) {
            self.verdict = Some(verdict.clone());
        }
        self.distribution = distribution;
    }

    /// Records that the container runs since `started_at`. A new time counts as a restart.
    pub(crate) fn set_container_running(&mut self, started_at: Option<SystemTime>, paused: bool) {
        let container = &mut self.container;
        if container.started_at.is_some() && container.started_at != started_at {
            container.restarts += 1;
            container.last_restart = started_at;
        }
        (container.running, container.paused) = (true, paused);
        container.started_at = started_at;
    }

    /// Records that the container has exited or is about to be stopped.
    pub(crate) fn set_container_stopped(&mut self) {
        self.container.running = false;
        self.set_connected(false);
    }

    pub(crate) fn set_connected(&mut self, connected: bool) {
        if self.connected != connected {
            self.connected = connected;
            self.connection_changed_at = Some(SystemTime::now());
        }
    }

    /// Records that startup or a reload has finished: the container runs.
    pub(crate) fn set_ready(&mut self) {
        (self.readiness, self.activity) = (Readiness::Ready, Activity::Running);
    }

    /// Records the start of a reload. Returns the readiness for [`NodeStatus::cancel_reload`];
    /// `None` if the service manager does not consider the unit started, or another reload is in
    /// progress.
    pub(crate) fn begin_reload(&mut self) -> Option<Readiness> {
        let before = self.readiness.is_started().then_some(self.readiness)?;
        self.readiness = Readiness::Reloading;
        Some(before)
    }

    /// Records the end of a reload that has changed nothing.
    pub(crate) fn cancel_reload(&mut self, before: Readiness) {
        self.readiness = before;
    }

    /// Records that the agent is about to exit.
    pub(crate) fn begin_stop(&mut self, step: &str) {
        self.readiness = Readiness::Stopping;
        self.set_step(step);
    }

    /// Records a reading. Readings of a GPU that is not in use are ignored.
    pub(crate) fn record_reading(&mut self, uuid: &GpuUuid, reading: Reading) {
        if self.device(uuid).is_some() {
            self.gpu_readings.insert(uuid.clone(), (reading, Instant::now()));
        }
    }

    /// Counts `count` occurrences of an XID.
    pub(crate) fn count_xid(&mut self, uuid: &GpuUuid, xid: u64, count: u64) {
        let name = self.device(uuid).and_then(|device| device.name.clone()).unwrap_or_default();
        let key = GpuXid { uuid: uuid.clone(), name, xid };
        if self.xids.len() < MAX_XID_COUNTERS || self.xids.contains_key(&key) {
            let last = SystemTime::now();
            let entry = self.xids.entry(key).or_insert(XidCount { total: 0, last });
            *entry = XidCount { total: entry.total.saturating_add(count), last };
        }
    }
}

/// Derived values that more than one sink needs.
impl NodeStatus {
    /// The devices of the verdict; none on the CPU.
    pub(crate) fn devices(&self) -> &[GpuDevice] {
        self.verdict.as_ref().map_or(&[], Verdict::devices)
    }

    fn device(&self, uuid: &GpuUuid) -> Option<&GpuDevice> {
        self.devices().iter().find(|device| device.uuid == *uuid)
    }

    /// The GPUs that processes may use; `None` until the first container runs.
    pub(crate) fn gpus_in_use(&self) -> Option<&[GpuDevice]> {
        let verdict = self.verdict.as_ref()?;
        Some(if self.gpus_released { &[] } else { verdict.devices() })
    }

    /// The status line without the progress of a step.
    pub(crate) fn headline(&self) -> String {
        match &self.activity {
            Activity::Step { name, .. } => sanitize_line(name),
            Activity::WaitingForSuperLink => {
                sanitize_line(self.superlink_wait.as_deref().unwrap_or_default())
            }
            Activity::Running => sanitize_line(&self.running_line()),
        }
    }

    /// The status line, as `systemctl status` and `supernode-agent status` show it.
    pub(crate) fn line(&self) -> String {
        match &self.activity {
            Activity::Step { name, progress: Some(progress) } => {
                sanitize_line(&format!("{name}: {progress}"))
            }
            _ => self.headline(),
        }
    }

    fn running_line(&self) -> String {
        let mut line = match &self.verdict {
            None => "Running".to_owned(),
            Some(Verdict::Gpu { devices, .. }) => {
                let devices: Vec<String> = devices.iter().map(ToString::to_string).collect();
                format!("Running on {}", devices.join(", "))
            }
            Some(Verdict::Cpu { finding: None }) => {
                "Running on the CPU (FL_GPU_ENABLED is not YES)".into()
            }
            Some(Verdict::Cpu { finding: Some(finding) }) => {
                format!("Running on the CPU: {}: {}", finding.reason, finding.summary)
            }
        };
        if let Some(superlink) = &self.superlink {
            let connected = if self.connected { "connected to" } else { "not connected to" };
            line.push_str(&format!("; {connected} {superlink}"));
        }
        if self.container.paused {
            line.push_str(&format!("; paused: docker unpause {}", self.container.name));
        }
        if let Some(note) = &self.note {
            line.push_str(&format!("; {note}"));
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::gpu::reason::{Finding, Reason};
    use crate::values::PciAddress;

    fn device(uuid: &str) -> GpuDevice {
        GpuDevice {
            index: 0,
            uuid: GpuUuid::parse(uuid).unwrap(),
            name: Some("NVIDIA A100".into()),
            pci_address: PciAddress::parse("0000:01:00.0"),
            memory_mib: None,
            minor: None,
        }
    }

    fn on_gpu(uuid: &str) -> Verdict {
        Verdict::Gpu { devices: vec![device(uuid)], missing: Vec::new() }
    }

    fn seconds(number: u64) -> Option<SystemTime> {
        Some(SystemTime::UNIX_EPOCH + Duration::from_secs(number))
    }

    #[test]
    fn unit_is_started_once_only_the_superlink_is_missing() {
        let mut status = NodeStatus::default();
        status.mark_prepared();
        assert_eq!(status.readiness, Readiness::Prepared, "the first attempt still runs");
        status.set_superlink_wait("attempt 2".into());
        assert_eq!(status.readiness, Readiness::WaitingForSuperLink);

        let mut status = NodeStatus::default();
        status.set_superlink_wait("attempt 2".into());
        status.set_step("Pulling it");
        assert_eq!((status.readiness, status.line().as_str()), (Readiness::Starting, "Pulling it"));
        status.mark_prepared();
        assert_eq!(status.readiness, Readiness::WaitingForSuperLink);
        assert_eq!(status.line(), "attempt 2");
        status.end_superlink_wait();
        assert_eq!(status.readiness, Readiness::Ready);
    }

    #[test]
    fn superlink_found_at_once_does_not_start_the_unit() {
        let mut status = NodeStatus::default();
        status.mark_prepared();
        status.end_superlink_wait();
        assert_eq!(status.readiness, Readiness::Starting);
    }

    #[test]
    fn started_unit_stays_started_through_a_new_run() {
        let mut status = NodeStatus::default();
        status.set_ready();
        status.begin_run("n", &Version::new(1, 31, 0), Framework::PyTorch);
        assert_eq!(status.readiness, Readiness::Ready);
        status.mark_prepared();
        assert!(status.readiness.is_started());
        status.end_superlink_wait();
        assert_eq!(status.readiness, Readiness::Ready);
    }

    #[test]
    fn cancelled_reload_restores_readiness_and_line() {
        let mut status = NodeStatus::default();
        assert_eq!(status.begin_reload(), None, "the unit has not started");
        status.set_superlink_wait("attempt 2".into());
        status.mark_prepared();
        let before = status.clone();
        let readiness = status.begin_reload().unwrap();
        assert_eq!(status.begin_reload(), None, "one reload at a time");
        assert_eq!(status.line(), before.line());
        status.cancel_reload(readiness);
        assert_eq!(status, before);
    }

    #[test]
    fn running_line_has_device_connection_and_note() {
        let mut status = NodeStatus::default();
        status.container.name = "node".into();
        status.superlink = Some(HostPort::parse("h:1").unwrap());
        status.set_verdict(&Verdict::gpu_not_enabled(), Distribution::Debian);
        status.set_ready();
        assert_eq!(
            status.line(),
            "Running on the CPU (FL_GPU_ENABLED is not YES); not connected to h:1"
        );
        status.set_verdict(&on_gpu("GPU-1"), Distribution::Debian);
        status.set_connected(true);
        status.set_container_running(None, true);
        status.note = Some("a note".into());
        assert_eq!(
            status.line(),
            "Running on NVIDIA A100 (GPU-1, 0000:01:00.0); connected to h:1; \
             paused: docker unpause node; a note"
        );
        let finding = Finding::new(Reason::GpuFailed, "XID 79\nsecond line");
        status.set_verdict(&Verdict::cpu(finding), Distribution::Debian);
        assert!(
            status.line().starts_with("Running on the CPU: gpu-failed: XID 79 second line; "),
            "{}",
            status.line()
        );
    }

    #[test]
    fn released_gpus_are_not_in_use() {
        let mut status = NodeStatus::default();
        assert_eq!(status.gpus_in_use(), None);
        status.set_verdict(&on_gpu("GPU-1"), Distribution::Debian);
        assert_eq!(status.gpus_in_use().map(<[_]>::len), Some(1));
        status.gpus_released = true;
        assert_eq!(status.gpus_in_use().map(<[_]>::len), Some(0));
        status.set_verdict(&on_gpu("GPU-1"), Distribution::Debian);
        assert_eq!(status.gpus_in_use().map(<[_]>::len), Some(1));
    }

    #[test]
    fn only_a_new_start_time_counts_as_restart() {
        let mut status = NodeStatus::default();
        status.set_container_running(seconds(1000), false);
        status.set_container_stopped();
        status.set_container_running(seconds(1000), false);
        assert_eq!((status.container.restarts, status.container.last_restart), (0, None));
        status.set_container_running(seconds(2000), false);
        assert_eq!((status.container.restarts, status.container.last_restart), (1, seconds(2000)));
    }

    #[test]
    fn connection_change_time_is_kept_while_unchanged() {
        let mut status = NodeStatus::default();
        status.set_connected(false);
        assert_eq!(status.connection_changed_at, None);
        status.set_connected(true);
        let changed_at = status.connection_changed_at;
        assert!(changed_at.is_some());
        status.set_connected(true);
        assert_eq!(status.connection_changed_at, changed_at);
    }

    #[test]
    fn readings_are_kept_for_gpus_in_use_only() {
        let mut status = NodeStatus::default();
        status.set_verdict(&on_gpu("GPU-1"), Distribution::Debian);
        for uuid in ["GPU-1", "GPU-2"] {
            status.record_reading(&GpuUuid::parse(uuid).unwrap(), Reading::default());
        }
        status.set_verdict(&on_gpu("GPU-1"), Distribution::Debian);
        assert_eq!(status.gpu_readings.keys().map(GpuUuid::as_str).collect::<Vec<_>>(), ["GPU-1"]);
        status.set_verdict(&Verdict::gpu_not_enabled(), Distribution::Debian);
        assert!(status.gpu_readings.is_empty());
    }

    #[test]
    fn xid_counters_are_bounded() {
        let mut status = NodeStatus::default();
        let uuid = GpuUuid::parse("GPU-1").unwrap();
        (0..10_000).for_each(|xid| status.count_xid(&uuid, xid, 1));
        status.count_xid(&uuid, 0, u64::MAX);
        assert_eq!(status.xids.len(), MAX_XID_COUNTERS);
        assert_eq!(status.xids.values().map(|count| count.total).max(), Some(u64::MAX));
    }
}
