//! Monitoring of the running container: waits for events of the watchers, records and logs them,
//! and returns those that need a decision of the state machine.

use futures_util::FutureExt as _;
use futures_util::future::OptionFuture;

use crate::docker::client::Container;
use crate::docker::nvidia_runtime::GpuInjection;
use crate::flower::connection::Connection;
use crate::flower::liveness::LivenessFailure;
use crate::gpu;
use crate::gpu::reason::Finding;
use crate::opennebula::superlink::{Discovery, SuperLink};
use crate::values::GpuUuid;

use super::state_machine::{ContainerEvent, Event};
use super::watchers::{ContainerRun, ContainerWatchers, WatchEvent, WatchedContainer};
use super::{NodeSpec, Supervisor};

impl Supervisor<'_> {
    /// Monitors the container until an event needs a decision of the state machine.
    pub(super) async fn monitor(&mut self) -> Event {
        let Some(container) = self.container.clone() else {
            return Event::Failed;
        };
        if self.state_machine.verdict().devices().is_empty() {
            self.gpu_monitor.reset();
        }
        let mut run = match self.run.take() {
            Some(run) if run.matches_container(&container) => run,
            _ => ContainerRun::new(&container),
        };
        self.startup = None;
        let event = loop {
            self.report_running(&container, &run);
            let event = self.next_event(&container, &mut run).await;
            if let Some(event) = self.handle_event(event, &container, &mut run).await {
                break event;
            }
        };
        let up_for = run.monitored_since.elapsed();
        self.run = Some(run);
        Event::Container { event, up_for }
    }

    /// Waits for the next event of any watcher. The other watchers keep their progress; see
    /// [`watchers`](super::watchers).
    async fn next_event(&mut self, container: &Container, run: &mut ContainerRun) -> WatchEvent {
        let node = &self.node;
        let devices = self.state_machine.verdict().devices();
        let connected = is_connected(node, run);
        self.superlink_watcher.set_connected(connected);
        let checks_health = node.settings.container.health_check && node.release().serves_health();
        let watchers = run.watchers.get_or_insert_with(|| {
            let tcp = (!node.log_reports_connection())
                .then(|| (node.superlink.address.port(), run.tcp_connected));
            let injected_by_hook = node.injection == GpuInjection::Runtime;
            let paused = run.paused;
            let watched = WatchedContainer { container, paused, tcp, devices, injected_by_hook };
            ContainerWatchers::new(&self.engine, &watched)
        });
        if self.state_machine.awaits_gpu() && self.gpu_available.is_none() {
            let (config, settings) = (node.config.clone(), node.settings.clone());
            let available = async move { gpu::wait_until_available(&config, &settings).await };
            self.gpu_available = Some(available.boxed_local());
        }
        let unresponsive = self.liveness.wait_until_unresponsive(container, connected);
        tokio::select! {
            event = watchers.next() => event,
            failure = unresponsive, if checks_health => {
                WatchEvent::Unresponsive(failure)
            }
            found = self.superlink_watcher.changed() => {
                WatchEvent::SuperLinkChanged(Box::new(found))
            }
            finding = self.gpu_monitor.next_failure(devices), if !devices.is_empty() => {
                WatchEvent::GpuFailed(finding)
            }
            Some(()) = OptionFuture::from(self.gpu_available.as_mut()) => {
                self.gpu_available = None;
                WatchEvent::GpuAvailable
            }
        }
    }

    /// Records and logs an event, and returns it if it needs a decision of the state machine.
    async fn handle_event(
        &mut self,
        event: WatchEvent,
        container: &Container,
        run: &mut ContainerRun,
    ) -> Option<ContainerEvent> {
        match event {
            WatchEvent::Exited(code) => return Some(ContainerEvent::Exited(code)),
            WatchEvent::GpuFailed(finding) => return Some(ContainerEvent::GpuFailed(finding)),
            WatchEvent::GpuAvailable => return Some(ContainerEvent::GpuAvailable),
            WatchEvent::GpuLost(finding) => return Some(self.on_gpu_lost(&finding)),
            WatchEvent::SuperLinkChanged(found) => return Some(self.on_superlink_changed(*found)),
            WatchEvent::Unresponsive(failure) => {
                return self.on_unresponsive(&failure, container).await;
            }
            WatchEvent::Connection(connection) => {
                self.log_connection(connection);
                run.connection = connection;
            }
            WatchEvent::TcpConnected(connected) => {
                self.log_tcp_connection(connected);
                run.tcp_connected = connected;
            }
            WatchEvent::Paused(paused) => {
                self.log_paused(paused);
                run.paused = paused;
            }
        }
        None
    }

    fn on_gpu_lost(&mut self, finding: &Finding) -> ContainerEvent {
        self.status_note = None;
        let name = &self.node.settings.container.name;
        tracing::warn!(
            container = %name,
            gpu_uuid = finding.gpu_uuid.as_ref().map(GpuUuid::as_str),
            pci_address = finding.pci_address.map(tracing::field::display),
            "container {name} lost its GPU; recreating it: {}",
            finding.summary
        );
        self.node.reporter.set_step("Container lost its GPU, recreating it");
        ContainerEvent::GpuLost
    }

    /// Ignores the failure if the container is paused: a paused process answers no health check.
    async fn on_unresponsive(
        &self,
        failure: &LivenessFailure,
        container: &Container,
    ) -> Option<ContainerEvent> {
        let name = &self.node.settings.container.name;
        let inspected = self.engine.inspect_container(&container.id).await;
        if matches!(inspected, Ok(Some(container)) if container.paused) {
            tracing::debug!(container = %name, "container {name} is paused; ignoring its health");
            return None;
        }
        tracing::warn!(
            container = %name,
            "Flower is unresponsive; restarting container {name}: {failure}"
        );
        self.node.reporter.set_step("Flower is unresponsive, restarting the container");
        Some(ContainerEvent::Unresponsive)
    }

    fn on_superlink_changed(&mut self, found: Discovery) -> ContainerEvent {
        for warning in &found.warnings {
            tracing::warn!("{warning}");
        }
        let partition = self.node.superlink.partition;
        self.node.superlink = SuperLink { partition, ..found.superlink };
        self.superlink_watcher = self.node.watch_superlink();
        let (name, address) = (&self.node.settings.container.name, &self.node.superlink.address);
        tracing::info!(
            container = %name,
            superlink = %address,
            "the service's SuperLink changed to {address}; recreating container {name}"
        );
        ContainerEvent::SuperLinkChanged
    }

    fn log_connection(&self, connection: Connection) {
        let (name, address) = (&self.node.settings.container.name, &self.node.superlink.address);
        match connection {
            Connection::Connected { node_id, .. } => tracing::info!(
                container = %name,
                superlink = %address,
                "connected to the SuperLink {address} as SuperNode {node_id}"
            ),
            Connection::Lost { .. } => tracing::info!(
                container = %name,
                superlink = %address,
                "not connected to the SuperLink {address}"
            ),
            Connection::Unknown => {}
        }
    }

    fn log_tcp_connection(&self, connected: bool) {
        let (name, address) = (&self.node.settings.container.name, &self.node.superlink.address);
        let article = if connected { "a" } else { "no" };
        tracing::info!(
            container = %name,
            superlink = %address,
            "container {name} has {article} TCP connection to the SuperLink {address}"
        );
    }

    pub(super) fn log_paused(&self, paused: bool) {
        let name = &self.node.settings.container.name;
        if paused {
            tracing::warn!(
                container = %name,
                "container {name} is paused; resume it with: docker unpause {name}"
            );
        } else {
            tracing::info!(container = %name, "container {name} is no longer paused");
        }
    }

    /// Reports the running container, its device and its connection.
    fn report_running(&self, container: &Container, run: &ContainerRun) {
        let NodeSpec { distribution, superlink, reporter, .. } = &self.node;
        reporter.update(|status| {
            status.set_container_running(container.started(), run.paused);
            status.set_verdict(self.state_machine.verdict(), *distribution);
            status.superlink = Some(superlink.address.clone());
            status.partition = superlink.partition;
            status.set_connected(is_connected(&self.node, run));
            status.note = self.status_note.clone();
            status.set_ready();
        });
    }
}

fn is_connected(node: &NodeSpec, run: &ContainerRun) -> bool {
    let connected = if node.log_reports_connection() {
        run.connection.node_id().is_some()
    } else {
        run.tcp_connected
    };
    connected && !run.paused
}
