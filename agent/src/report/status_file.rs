//! Sink for the status file, which `supernode-agent status` reads.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::opennebula::partition::Partition;
use crate::report::node_status::NodeStatus;
use crate::system::{atomic_file, time};

/// Content of the status file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StatusReport {
    /// The agent's release.
    pub version: String,
    /// The agent's process.
    pub pid: u32,
    /// The status line.
    pub status: String,
    /// Time of the last change of the status line, not counting its progress (RFC 3339, UTC).
    pub since: String,
    /// The verdict in the form of `plan --json`; null until the first container runs.
    pub verdict: Json,
    pub superlink: Option<String>,
    #[serde(default)]
    pub connected: bool,
    #[serde(default)]
    pub partition: Option<Partition>,
    #[serde(default)]
    pub exporter: Option<String>,
}

impl StatusReport {
    /// Reads the report of the last agent; `None` if none has run since the boot.
    pub(crate) fn read(state_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path_in(state_dir)).ok()?).ok()
    }

    fn new(status: &NodeStatus, since: &str) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            status: status.line(),
            since: since.to_owned(),
            verdict: status
                .verdict
                .as_ref()
                .map_or(Json::Null, |verdict| verdict.to_json(status.distribution)),
            superlink: status.superlink.as_ref().map(ToString::to_string),
            connected: status.connected,
            partition: status.partition,
            exporter: status.exporter.clone(),
        }
    }
}

fn path_in(state_dir: &Path) -> PathBuf {
    state_dir.join("status.json")
}

/// Writes the report whenever it changes.
#[derive(Debug)]
pub(crate) struct StatusFile {
    path: PathBuf,
    headline: String,
    since: String,
    written: Option<StatusReport>,
}

impl StatusFile {
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self {
            path: path_in(state_dir),
            headline: String::new(),
            since: String::new(),
            written: None,
        }
    }

    pub(crate) fn update(&mut self, status: &NodeStatus) {
        let headline = status.headline();
        if self.headline != headline {
            (self.headline, self.since) = (headline, time::now());
        }
        let report = StatusReport::new(status, &self.since);
        if self.written.as_ref() == Some(&report) {
            return;
        }
        // Serialising the report cannot fail, because its keys are strings.
        let text = serde_json::to_string_pretty(&report).unwrap_or_default();
        match atomic_file::replace_volatile(&self.path, text.as_bytes()) {
            Ok(()) => self.written = Some(report),
            Err(error) => tracing::debug!("cannot write {}: {error}", self.path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::reason::{Finding, Reason};
    use crate::gpu::verdict::Verdict;
    use crate::system::os_release::Distribution;
    use crate::values::HostPort;

    #[test]
    fn report_has_the_facts_of_the_node() {
        let mut status = NodeStatus::default();
        let report = StatusReport::new(&status, "t");
        assert_eq!((report.verdict, report.superlink, report.connected), (Json::Null, None, false));
        let verdict = Verdict::cpu(Finding::new(Reason::GpuFailed, "XID 79"));
        status.set_verdict(&verdict, Distribution::Debian);
        status.superlink = Some(HostPort::parse("h:1").unwrap());
        status.set_connected(true);
        status.partition = Some(Partition { id: 1, count: 3 });
        status.exporter = Some("image at 127.0.0.1:9400".into());
        status.set_ready();
        let report = StatusReport::new(&status, "t");
        assert_eq!(report.verdict["reason"], "gpu-failed");
        assert_eq!(report.superlink.as_deref(), Some("h:1"));
        assert!(report.connected);
        assert_eq!(report.partition, Some(Partition { id: 1, count: 3 }));
        assert_eq!(report.exporter.as_deref(), Some("image at 127.0.0.1:9400"));
        assert_eq!(report.status, "Running on the CPU: gpu-failed: XID 79; connected to h:1");
    }

    #[test]
    fn progress_does_not_change_since() {
        let directory = std::env::temp_dir().join(format!("status-file-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (mut status, mut file) = (NodeStatus::default(), StatusFile::new(&directory));
        let mut after = |change: &dyn Fn(&mut NodeStatus)| {
            change(&mut status);
            file.update(&status);
            StatusReport::read(&directory).unwrap()
        };
        let first = after(&|status| status.set_step("Pulling it"));
        let second = after(&|status| status.set_progress("Pulling it", "3 %"));
        assert_eq!(second.status, "Pulling it: 3 %");
        assert_eq!(second.since, first.since);
        let third = after(&|status| status.set_step("Starting the container"));
        assert_ne!(third.since, first.since);
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn failed_write_is_repeated_at_the_next_update() {
        let directory = std::env::temp_dir().join(format!("status-retry-{}", std::process::id()));
        let (status, mut file) = (NodeStatus::default(), StatusFile::new(&directory));
        std::fs::write(&directory, "not a directory").unwrap();
        file.update(&status);
        assert_eq!(StatusReport::read(&directory), None);
        std::fs::remove_file(&directory).unwrap();
        file.update(&status);
        assert!(StatusReport::read(&directory).is_some());
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
