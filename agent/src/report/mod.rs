//! Status of the node: one value, [`NodeStatus`], and the sinks that render it: the service
//! manager, the status file, OneGate and the metrics.
//!
//! Each sink renders the part that concerns it and acts only if that part has changed. A sink that
//! fails never affects the node.

mod attributes;
pub(crate) mod fallback;
mod metrics;
pub(crate) mod metrics_server;
mod node_status;
mod service_manager;
mod status_file;

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::gpu::verdict::GpuDevice;
use crate::opennebula::onegate::OneGateAccess;
use crate::opennebula::publisher::Publisher;
use service_manager::ServiceManager;
use status_file::StatusFile;

pub(crate) use node_status::NodeStatus;
pub(crate) use status_file::StatusReport;

/// Minimum interval between progress updates.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Owns the [`NodeStatus`] and passes each change on to the sinks.
#[derive(Debug)]
pub(crate) struct Reporter {
    status: RefCell<NodeStatus>,
    service_manager: RefCell<ServiceManager>,
    status_file: Option<RefCell<StatusFile>>,
    publisher: RefCell<Option<Publisher>>,
    gpus_in_use: watch::Sender<Option<Vec<GpuDevice>>>,
    last_progress: Cell<Option<Instant>>,
}

impl Reporter {
    /// Creates a reporter. Without a `state_dir`, it neither writes the status file nor publishes
    /// attributes: only the agent that holds the lock does.
    pub(crate) fn new(state_dir: Option<&Path>) -> Self {
        Self {
            status: RefCell::default(),
            service_manager: RefCell::default(),
            status_file: state_dir.map(|dir| RefCell::new(StatusFile::new(dir))),
            publisher: RefCell::default(),
            gpus_in_use: watch::Sender::default(),
            last_progress: Cell::default(),
        }
    }

    /// Changes the status and updates the sinks.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut NodeStatus) -> T) -> T {
        let (line_changed, result) = {
            let mut status = self.status.borrow_mut();
            let before = status.headline();
            let result = change(&mut status);
            (status.headline() != before, result)
        };
        let status = self.status.borrow();
        if line_changed {
            tracing::debug!("status: {}", status.headline());
        }
        self.service_manager.borrow_mut().update(&status);
        if let Some(file) = &self.status_file {
            file.borrow_mut().update(&status);
        }
        if let Some(publisher) = &*self.publisher.borrow() {
            publisher.publish(attributes::attributes(&status, publisher.vm()));
        }
        self.gpus_in_use.send_if_modified(|in_use| {
            let changed = in_use.as_deref() != status.gpus_in_use();
            if changed {
                *in_use = status.gpus_in_use().map(<[_]>::to_vec);
            }
            changed
        });
        result
    }

    /// Enters a step.
    pub(crate) fn set_step(&self, name: &str) {
        self.update(|status| status.set_step(name));
    }

    /// Reports progress within a step, at most once a second; calls in between are dropped.
    pub(crate) fn set_progress(&self, name: &str, progress: &str) {
        if self.last_progress.get().is_some_and(|last| last.elapsed() < PROGRESS_INTERVAL) {
            return;
        }
        self.last_progress.set(Some(Instant::now()));
        self.update(|status| status.set_progress(name, progress));
    }

    /// Publishes through `onegate` from now on; `None` stops publishing.
    pub(crate) fn publish_through(&self, onegate: Option<&OneGateAccess>) {
        let Some(onegate) = onegate.filter(|_| self.status_file.is_some()) else {
            self.publisher.replace(None);
            return;
        };
        let mut publisher = self.publisher.borrow_mut();
        if !publisher.as_ref().is_some_and(|publisher| publisher.uses(onegate)) {
            let new = publisher.insert(Publisher::new(onegate.clone()));
            new.publish(attributes::attributes(&self.status.borrow(), new.vm()));
        }
    }

    /// Publishes that the node has stopped, and stops publishing.
    pub(crate) async fn publish_offline(&self) {
        let publisher = self.publisher.take();
        if let Some(publisher) = publisher {
            let attributes = attributes::offline_attributes(&self.status.borrow(), publisher.vm());
            publisher.publish_last(attributes).await;
        }
    }

    /// The metrics in Prometheus' text format.
    pub(crate) fn render_metrics(&self) -> String {
        metrics::render(&self.status.borrow(), Instant::now())
    }

    /// The GPUs in use, `None` until the first container runs; notifies of each change.
    pub(crate) fn gpus_in_use(&self) -> watch::Receiver<Option<Vec<GpuDevice>>> {
        self.gpus_in_use.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_reported_once_a_second_and_steps_at_once() {
        let directory = std::env::temp_dir().join(format!("reporter-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let reporter = Reporter::new(Some(&directory));
        let line = || StatusReport::read(&directory).unwrap().status;
        reporter.set_step("Pulling it");
        for percent in 0..100 {
            reporter.set_progress("Pulling it", &format!("{percent} %"));
        }
        assert_eq!(line(), "Pulling it: 0 %");
        reporter.set_step("Starting the container");
        assert_eq!(line(), "Starting the container");
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
