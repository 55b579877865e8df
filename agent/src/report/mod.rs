//! What the agent tells of itself while it runs: one line for the service manager, the status file
//! that `status` reads, what the cloud hears, and the metrics.

pub mod metrics;
pub mod metrics_server;

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use tokio::sync::watch;

use crate::docker::client::Container;
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::logging;
use crate::opennebula::partition::Partition;
use crate::opennebula::publisher::{NodeAttributes, OneGateAccess, Publisher};
use crate::opennebula::superlink::SuperLink;
use crate::report::metrics::Values;
use crate::system::atomic_file;
use crate::system::os_release::Distribution;
use crate::system::systemd;
use crate::values::sanitize_line;

/// The content of the status file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The agent's release.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// What it is doing, in one line: what `systemctl status` shows.
    pub status: String,
    /// Since when (RFC 3339, UTC).
    pub since: String,
    /// What the node runs on, in the form of `plan --json`; null until that is decided.
    pub verdict: Json,
    /// The SuperLink that it connects to.
    pub superlink: Option<String>,
    /// Whether it is connected to it, as Flower says.
    #[serde(default)]
    pub connected: bool,
    /// The share of the data that the service has for it.
    #[serde(default)]
    pub partition: Option<Partition>,
    /// How the DCGM exporter is doing, where one is wanted.
    #[serde(default)]
    pub exporter: Option<String>,
}

impl Report {
    /// What the last agent left in `state_dir`; `None` where none has run since the machine is up.
    pub fn read(state_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(file_in(state_dir)).ok()?).ok()
    }
}

fn file_in(state_dir: &Path) -> PathBuf {
    state_dir.join("status.json")
}

/// Tells the service manager and keeps the status file.
#[derive(Debug)]
pub struct Reporter {
    file: Option<PathBuf>,
    report: RefCell<Report>,
    news: RefCell<NodeAttributes>,
    values: RefCell<Values>,
    gpus_in_use: watch::Sender<Option<Vec<GpuDevice>>>,
    publisher: RefCell<Option<Publisher>>,
    /// What is waited for beside the rest, once something is.
    waiting: RefCell<Option<String>>,
    /// Whether the rest is ready.
    rest_is_ready: Cell<bool>,
    /// Whether the service manager takes the node for ready.
    is_ready: Cell<bool>,
    /// When progress was told last.
    progress_told: Cell<Option<Instant>>,
}

impl Reporter {
    /// Keeps the status file in `state_dir`; without one only the service manager hears.
    pub fn new(state_dir: Option<&Path>) -> Self {
        let version = env!("CARGO_PKG_VERSION").into();
        let report = RefCell::new(Report { version, pid: std::process::id(), ..Report::default() });
        Self {
            file: state_dir.map(file_in),
            report,
            news: RefCell::default(),
            values: RefCell::default(),
            gpus_in_use: watch::Sender::default(),
            publisher: RefCell::default(),
            waiting: RefCell::default(),
            rest_is_ready: Cell::default(),
            is_ready: Cell::default(),
            progress_told: Cell::default(),
        }
    }

    /// Publishes by this way from now on. Only who keeps the status file does: there is one agent a
    /// machine.
    pub fn publish_by(&self, cloud: Option<&OneGateAccess>) {
        let Some(cloud) = cloud.filter(|_| self.file.is_some()) else {
            self.publisher.replace(None);
            return;
        };
        let mut publisher = self.publisher.borrow_mut();
        if !publisher.as_ref().is_some_and(|publisher| publisher.is_by(cloud)) {
            let new = publisher.insert(Publisher::new(cloud.clone()));
            new.publish(&self.news.borrow());
        }
    }

    /// Changes what is published.
    pub fn news(&self, change: impl FnOnce(&mut NodeAttributes)) {
        change(&mut self.news.borrow_mut());
        if let Some(publisher) = &*self.publisher.borrow() {
            publisher.publish(&self.news.borrow());
        }
    }

    /// Changes what the page with the metrics tells.
    pub fn metrics(&self, change: impl FnOnce(&mut Values)) {
        change(&mut self.values.borrow_mut());
    }

    /// The page with the metrics.
    pub fn page(&self) -> String {
        metrics::page(&self.values.borrow(), Instant::now())
    }

    /// The last words to the cloud.
    pub async fn finish(&self) {
        let publisher = self.publisher.take();
        if let Some(publisher) = publisher {
            publisher.finish().await;
        }
    }

    /// What is being done.
    pub fn doing(&self, status: &str) {
        let status = sanitize_line(status);
        tracing::debug!("status: {status}");
        systemd::status(&status);
        self.keep(|report| report.status = status);
    }

    /// How far it is, which may change many times a second: it is told once a second, and is no new
    /// thing to be done.
    pub fn progress(&self, status: &str) {
        const ONCE_IN: Duration = Duration::from_secs(1);
        if self.progress_told.get().is_some_and(|told| told.elapsed() < ONCE_IN) {
            return;
        }
        self.progress_told.set(Some(Instant::now()));
        let status = sanitize_line(status);
        systemd::status(&status);
        self.report.borrow_mut().status = status;
        self.write();
    }

    /// What is waited for beside the rest.
    pub fn waiting(&self, status: &str) {
        self.waiting.replace(Some(status.to_owned()));
        if self.rest_is_ready.get() { self.ready(status) } else { self.doing(status) }
    }

    /// Everything is ready but for what is waited for: it may be waited for by hours.
    pub fn rest_is_ready(&self) {
        self.rest_is_ready.set(true);
        if let Some(status) = &*self.waiting.borrow() {
            self.ready(status);
        }
    }

    /// Nothing is waited for any more.
    pub fn waited(&self) {
        self.waiting.replace(None);
        self.rest_is_ready.set(false);
    }

    /// What the node runs on, and what it connects to.
    pub fn decided(&self, verdict: &Verdict, distribution: Distribution, superlink: &SuperLink) {
        self.metrics(|values| values.decided(verdict));
        self.uses(verdict.devices());
        self.keep(|report| {
            report.verdict = verdict.to_json(distribution);
            report.superlink = Some(superlink.address.to_string());
            report.partition = superlink.partition;
        });
    }

    /// The GPUs that are in use. None while a GPU that failed is to be left alone: one that is in
    /// use cannot be reset.
    pub fn uses(&self, devices: &[GpuDevice]) {
        self.gpus_in_use.send_if_modified(|in_use| {
            let changes = in_use.as_deref() != Some(devices);
            if changes {
                *in_use = Some(devices.to_vec());
            }
            changes
        });
    }

    /// The GPUs that are in use, for who wants to hear of a change; `None` until the node is up.
    pub fn gpus_in_use(&self) -> watch::Receiver<Option<Vec<GpuDevice>>> {
        self.gpus_in_use.subscribe()
    }

    /// How the DCGM exporter is doing; `None` where none is wanted.
    pub fn exporter(&self, exporter: Option<String>) {
        self.keep(|report| report.exporter = exporter.map(|text| sanitize_line(&text)));
    }

    /// Whether the node is connected to its SuperLink.
    pub fn connected(&self, connected: bool) {
        self.metrics(|values| values.connected(connected));
        self.keep(|report| report.connected = connected);
        self.news(|news| news.ready = connected);
    }

    /// The container runs.
    pub fn up(&self, container: &Container) {
        self.metrics(|values| values.runs(container.started()));
    }

    /// The container does not run, or is about to be stopped.
    pub fn down(&self) {
        self.metrics(|values| values.up = false);
        self.connected(false);
    }

    /// The node runs, or waits for its SuperLink alone.
    pub fn ready(&self, status: &str) {
        let status = sanitize_line(status);
        systemd::ready(&status);
        self.is_ready.set(true);
        self.keep(|report| report.status = status);
    }

    /// The configuration is read again: whether the node was ready, and is not until that is told
    /// again.
    pub fn reloading(&self) -> bool {
        let was_ready = self.is_ready.take();
        if was_ready {
            systemd::reloading();
        }
        was_ready
    }

    /// The reload has changed nothing.
    pub fn ready_as_before(&self) {
        let status = self.report.borrow().status.clone();
        self.ready(&status);
    }

    /// The agent is on its way out.
    pub fn stopping(&self, status: &str) {
        let status = sanitize_line(status);
        systemd::stopping(&status);
        self.keep(|report| report.status = status);
    }

    fn keep(&self, change: impl FnOnce(&mut Report)) {
        let mut report = self.report.borrow_mut();
        let before = report.status.clone();
        change(&mut report);
        if report.status != before {
            report.since = logging::now();
        }
        drop(report);
        self.write();
    }

    fn write(&self) {
        // A structure of texts always has a JSON.
        let text = serde_json::to_string_pretty(&*self.report.borrow()).unwrap_or_default();
        // Without the file the node is what it is; `status` says that it is not known.
        if let Some(file) = &self.file
            && let Err(error) = atomic_file::replace_volatile(file, text.as_bytes())
        {
            tracing::debug!("cannot write {}: {error}", file.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_reaches_the_status_file_once_a_second_and_does_not_touch_since_when() {
        let dir = std::env::temp_dir().join(format!("supernode-report-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let reporter = Reporter::new(Some(&dir));
        reporter.doing("Pulling it");
        let since = Report::read(&dir).unwrap().since;
        for percent in 0..100 {
            reporter.progress(&format!("Pulling it: {percent} %"));
        }
        let told = Report::read(&dir).unwrap();
        assert_eq!((told.status.as_str(), &told.since), ("Pulling it: 0 %", &since));
        // What is done next is told at once.
        reporter.doing("Starting the container");
        assert_eq!(Report::read(&dir).unwrap().status, "Starting the container");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
