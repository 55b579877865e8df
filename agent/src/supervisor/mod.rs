//! The supervisor: owns the framework container and keeps it running.
//!
//! [`state_machine`] decides, this module executes. One round of [`Supervisor::run`]:
//!
//! ```text
//!            Command                       Event
//! StateMachine ──> Supervisor::execute ──────────> StateMachine::handle
//!      ^             Inspect, CreateAndStart, Stop, …    │
//!      │             Monitor: waits for the watchers     │
//!      └──────────── next command <── notifications <────┘
//! ```
//!
//! # When the container loses its GPU
//!
//! The VM still has the GPU, but the container does not: its device node is gone, or systemd
//! applied its device rules without NVIDIA's devices.
//!
//! 1. [`gpu_presence`] notices within 5 s (device node) or 15 s (device rules).
//! 2. [`Supervisor::on_gpu_lost`] logs the WARNING and updates the status.
//! 3. The state machine enters `Stopping`, or `StopDelayed` first if the container was started
//!    shortly before.
//! 4. `StopAndRemove` ends the container and the GPU monitor; `Inspect` then finds no container and
//!    a new one is created on the same GPU.
//! 5. If the new container has no GPU either, the launch falls back to the CPU with a WARNING, or
//!    the agent exits if `FL_GPU_REQUIRED` is YES.
//!
//! # When a GPU fails
//!
//! 1. [`gpu_monitor`] reports a fatal XID, an NVML fault, a hang or a removed driver.
//! 2. `StateMachine::on_gpu_failed` decides by `gpu.on_failure`: ignore it; stop the container and
//!    probe the GPU up to three times; or move to the CPU at once.
//!
//! # When the agent receives a signal
//!
//! The supervisor does not know about signals. The daemon drops the future of
//! [`NodeSpec::supervise`], on SIGTERM as well as on a SIGHUP that changes the configuration. That
//! ends the watchers, the calls under way and the GPU monitor's child, and nothing else: the
//! container keeps running. The daemon then stops the container (SIGTERM), leaves it to the next
//! agent, or starts a new supervisor, which adopts the container if it still matches its spec and
//! replaces it otherwise (SIGHUP).

pub(crate) mod exporter;
pub(crate) mod gpu_monitor;
pub(crate) mod gpu_presence;
mod state_machine;
mod watchers;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{LocalBoxFuture, OptionFuture};
use tokio::time::Instant;

use crate::config::settings::Settings;
use crate::config::{Config, LogLevel};
use crate::container::image::{FrameworkImage, flower_version};
use crate::container::plan::{self, ContainerInputs};
use crate::container::site_hook;
use crate::docker::client::{Client, Container, EngineError};
use crate::docker::nvidia_runtime::GpuInjection;
use crate::docker::spec::{ContainerSpec, REASON_LABEL, REFUSED_HASH_LABEL, SUMMARY_LABEL};
use crate::flower::connection::Connection;
use crate::flower::liveness::{Liveness, LivenessFailure};
use crate::flower::release::Release;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::gpu::{self, detect_gpus};
use crate::logging;
use crate::opennebula::onegate::OneGateAccess;
use crate::opennebula::superlink::{Discovery, SuperLink};
use crate::report::fallback::{self, GpuRequired};
use crate::report::{NodeStatus, Reporter};
use crate::supervisor::gpu_monitor::GpuMonitor;
use crate::supervisor::gpu_presence::find_missing_devices;
use crate::system::atomic_file;
use crate::system::info::SystemInfo;
use crate::system::os_release::Distribution;
use crate::system::systemd::{TimeoutExtension, Watchdog};
use crate::values::GpuUuid;
use state_machine::{
    Command, ContainerEvent, Event, Existing, ExitReason, GracePeriod, Notification, Policy,
    RestartReason, StateMachine, Transition,
};
use watchers::{ContainerWatchers, SuperLinkWatcher, WatchEvent, WatchedContainer};

/// Everything that the framework container is created from, and the verdict aside, everything that
/// the supervisor needs.
#[derive(Debug)]
pub(crate) struct NodeSpec {
    pub(crate) config: Config,
    pub(crate) settings: Settings,
    /// `None` if the VM cannot use OneGate.
    pub(crate) onegate: Option<OneGateAccess>,
    pub(crate) superlink: SuperLink,
    pub(crate) image: FrameworkImage,
    pub(crate) system: SystemInfo,
    pub(crate) distribution: Distribution,
    pub(crate) injection: GpuInjection,
    pub(crate) reporter: Rc<Reporter>,
}

/// The node must restart from detection, because a GPU became available.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RestartRequested;

/// Why the container does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error(transparent)]
    Client(#[from] EngineError),
    #[error(transparent)]
    GpuRequired(#[from] GpuRequired),
    #[error(
        "{summary}; cannot remove that container: end the process that hangs \
         (ps -C nvidia-container-runtime), or restart Docker"
    )]
    NotRemoved {
        /// Why the container did not start with the GPU.
        summary: String,
        source: EngineError,
    },
    #[error("cannot write {path}")]
    Mounts { path: PathBuf, source: std::io::Error },
    #[error("cannot start the container: unexpected event in the state machine")]
    UnexpectedEvent,
}

/// Executes the commands of the state machine.
struct Supervisor<'a> {
    node: NodeSpec,
    watchdog: &'a Watchdog,
    state_machine: StateMachine,
    engine: Client,
    /// The container with the node's name, as last inspected.
    container: Option<Container>,
    /// The run of that container that was last monitored.
    run: Option<ContainerRun>,
    gpu_monitor: GpuMonitor,
    liveness: Liveness,
    superlink_watcher: SuperLinkWatcher,
    /// Completes when a GPU becomes available; `None` unless the state machine waits for one.
    gpu_available: Option<LocalBoxFuture<'static, ()>>,
    /// Addition to the status line.
    status_note: Option<String>,
    /// Why the last launch failed.
    launch_error: Option<LaunchError>,
    /// Extends the start timeout of the unit until the container runs.
    startup: Option<TimeoutExtension>,
}

/// One run of the container: from one start to the next.
struct ContainerRun {
    id: String,
    started_at: String,
    monitored_since: Instant,
    /// The connection to the SuperLink according to Flower's log.
    connection: Connection,
    /// Whether the container has a TCP connection to the SuperLink's port: used where Flower's log
    /// does not report the connection.
    tcp_connected: bool,
    paused: bool,
    /// Kept while one [`Command::Monitor`] follows another. Any other command drops, and thereby
    /// ends, the watchers.
    watchers: Option<ContainerWatchers>,
}

impl ContainerRun {
    fn new(container: &Container) -> Self {
        Self {
            id: container.id.clone(),
            started_at: container.started_at.clone(),
            monitored_since: Instant::now(),
            connection: Connection::default(),
            tcp_connected: false,
            paused: container.paused,
            watchers: None,
        }
    }

    fn is_of(&self, container: &Container) -> bool {
        self.id == container.id && self.started_at == container.started_at
    }
}

impl NodeSpec {
    /// Launches the container on this verdict and supervises it. `startup` is dropped once the
    /// container runs.
    ///
    /// Returns only to restart from detection, or on an error. On a signal the caller drops the
    /// future; see the module documentation.
    ///
    /// # Errors
    /// If the first launch fails, or if the GPU is required and unusable.
    pub(crate) async fn supervise(
        self,
        verdict: Verdict,
        engine: Client,
        startup: TimeoutExtension,
        watchdog: &Watchdog,
    ) -> Result<RestartRequested, LaunchError> {
        let policy = Policy {
            gpu_required: self.config.gpu.required,
            on_failure: self.settings.gpu.on_failure,
            on_available: self.settings.gpu.on_available,
        };
        let (state_machine, first_command) = StateMachine::new(policy, verdict);
        let reporter = Rc::clone(&self.reporter);
        let mut supervisor = Supervisor {
            gpu_monitor: GpuMonitor::new(&self.config, &self.settings, reporter),
            superlink_watcher: self.watch_superlink(),
            gpu_available: None,
            node: self,
            watchdog,
            state_machine,
            engine,
            container: None,
            run: None,
            liveness: Liveness::default(),
            status_note: None,
            launch_error: None,
            startup: Some(startup),
        };
        supervisor.run(first_command).await
    }

    fn container_spec(&self, verdict: &Verdict) -> ContainerSpec {
        plan::plan_container(&ContainerInputs {
            config: &self.config,
            settings: &self.settings,
            verdict,
            injection: &self.injection,
            superlink: Some(&self.superlink),
            image: &self.image,
            system: &self.system,
        })
    }

    fn release(&self) -> &'static Release {
        Release::of(flower_version(&self.config, &self.image.reference))
    }

    /// Whether Flower's log reports the connection to the SuperLink.
    fn log_reports_connection(&self) -> bool {
        matches!(self.config.log_level, LogLevel::Debug | LogLevel::Info)
            && self.release().logs_node_id()
    }

    /// Writes what the container mounts. Repeated before every launch, because a directory may have
    /// been removed in between.
    fn prepare_mounts(&self) -> Result<(), LaunchError> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| LaunchError::Mounts { path, source }
        };
        let data = &self.settings.container.data_dir;
        std::fs::create_dir_all(data).map_err(failed(data))?;
        if let Some(ca) = &self.superlink.ca {
            let file = self.settings.container.certs_dir.join(plan::CA_FILE);
            atomic_file::replace(&file, ca.pem().as_bytes()).map_err(failed(&file))?;
        }
        let state = &self.settings.state.dir;
        site_hook::write(state).map_err(failed(state))
    }

    fn watch_superlink(&self) -> SuperLinkWatcher {
        SuperLinkWatcher::new(&self.config, self.onegate.as_ref(), &self.superlink)
    }
}

impl Supervisor<'_> {
    /// Executes one command after another.
    async fn run(&mut self, mut command: Command) -> Result<RestartRequested, LaunchError> {
        loop {
            let event = match command {
                Command::Exit(ExitReason::RestartRequested) => return Ok(RestartRequested),
                Command::Exit(ExitReason::GpuRequired) => return Err(GpuRequired.into()),
                Command::Exit(ExitReason::LaunchFailed) => {
                    return Err(self.launch_error.take().unwrap_or(LaunchError::UnexpectedEvent));
                }
                command => {
                    let timeout = self.timeout_for(&command);
                    self.watchdog.guard(timeout, self.execute(command)).await
                }
            };
            let Transition { notifications, command: next } = self.state_machine.handle(event);
            notifications.into_iter().for_each(|notification| self.notify(notification));
            command = next;
        }
    }

    /// Upper bound of the duration of a command, for the watchdog: each call of a command has a
    /// timeout of its own, of at most two minutes. Monitoring has no upper bound.
    fn timeout_for(&self, command: &Command) -> Duration {
        const CALLS: Duration = Duration::from_secs(600);
        let Settings { gpu, container, .. } = &self.node.settings;
        match command {
            Command::Monitor => Duration::MAX,
            Command::Sleep(delay) | Command::BackOff(delay) => *delay + CALLS,
            _ => CALLS.saturating_add(container.stop_timeout).saturating_add(gpu.probe_timeout),
        }
    }

    async fn execute(&mut self, command: Command) -> Event {
        if command != Command::Monitor
            && let Some(run) = &mut self.run
        {
            run.watchers = None;
        }
        let result = match command {
            Command::Inspect => self.inspect().await,
            Command::RemoveExisting => self.remove_existing().await,
            Command::CreateAndStart => self.create_and_start().await,
            Command::StartExisting => self.start_existing().await,
            Command::RemoveFailed(finding) => self.remove_failed(finding).await,
            Command::Monitor => Ok(self.monitor().await),
            Command::PingEngine => Ok(Event::Engine { answers: self.engine.info().await.is_ok() }),
            Command::Reconnect => Ok(self.reconnect().await),
            Command::CheckRunning => Ok(self.check_running().await),
            Command::Sleep(delay) => {
                tokio::time::sleep(delay).await;
                Ok(Event::Done)
            }
            Command::BackOff(delay) => Ok(self.back_off(delay).await),
            Command::Stop(grace_period) => Ok(self.stop(grace_period).await),
            Command::StopAndRemove => Ok(self.stop_and_remove().await),
            Command::Probe => Ok(self.probe().await),
            Command::Exit(_) => Ok(Event::Done),
        };
        result.unwrap_or_else(|error| {
            self.launch_error = Some(error);
            Event::Failed
        })
    }

    /// The spec of the container on the current target. On the CPU because of a fallback, a label
    /// names the spec on the GPU, so that the next agent recognises the fallback.
    fn container_spec(&self) -> ContainerSpec {
        let mut spec = self.node.container_spec(self.state_machine.verdict());
        if let Some(gpu) = self.state_machine.fallback_from() {
            spec.labels.insert(REFUSED_HASH_LABEL.into(), self.node.container_spec(gpu).hash());
        }
        spec
    }

    async fn inspect(&mut self) -> Result<Event, LaunchError> {
        self.node.reporter.update(NodeStatus::container_stopped);
        self.node.prepare_mounts()?;
        let spec = self.container_spec();
        self.container = self.engine.inspect_container(&spec.name).await?;
        let Some(container) = &self.container else {
            return Ok(Event::Inspected(Existing::Absent));
        };
        let existing = match (container.running, container.spec_hash() == Some(&spec.hash())) {
            (true, true) => {
                match missing_devices(container, self.state_machine.verdict().devices()) {
                    None => Existing::UpToDate,
                    Some(finding) => Existing::WithoutGpu(finding),
                }
            }
            (true, false) => previous_fallback(container, &spec)
                .map_or(Existing::Outdated, Existing::CpuFallback),
            // An exited container is started again, and keeps its log, if a new one would be equal.
            (false, _) if container.is_made_from(&spec) => {
                let image = self.engine.find_image(&spec.image).await?;
                // If the image lost its name, no other container can be created.
                let same = image.is_none_or(|image| image.id == container.image_id);
                if same { Existing::Exited } else { Existing::Outdated }
            }
            (false, _) => Existing::Outdated,
        };
        Ok(Event::Inspected(existing))
    }

    async fn remove_existing(&self) -> Result<Event, LaunchError> {
        if let Some(container) = &self.container {
            let name = &self.node.settings.container.name;
            tracing::info!(
                container = %name,
                "replacing container {name} ({})",
                short_id(&container.id)
            );
            self.stop_and_remove_container(container).await?;
        }
        Ok(Event::Done)
    }

    async fn create_and_start(&mut self) -> Result<Event, LaunchError> {
        let spec = self.container_spec();
        let started = async {
            let id = self.engine.create(&spec).await?;
            self.engine.start(&id).await
        };
        let started = started.await;
        self.after_start(&spec, started).await
    }

    async fn start_existing(&mut self) -> Result<Event, LaunchError> {
        let id = self.container.as_ref().map(|container| container.id.as_str()).unwrap_or_default();
        let started = self.engine.start(id).await;
        if matches!(started, Err(EngineError::Refused { .. })) {
            // What the old container needs may be gone: only the refusal of a new one counts.
            return Ok(Event::Refused);
        }
        self.after_start(&self.container_spec(), started).await
    }

    /// Decides whether a start succeeded, failed because of the GPU, or failed.
    async fn after_start(
        &mut self,
        spec: &ContainerSpec,
        started: Result<(), EngineError>,
    ) -> Result<Event, LaunchError> {
        let verdict = self.state_machine.verdict();
        if let Err(error) = started {
            let on_gpu = matches!(verdict, Verdict::Gpu { .. });
            return match error.gpu_start_failure().filter(|_| on_gpu) {
                Some(why) => Ok(Event::GpuStartFailed(Finding::new(
                    Reason::RuntimeStartFailed,
                    format!("Docker did not start the container with the GPU: {why}"),
                ))),
                None => Err(error.into()),
            };
        }
        let Some(container) = self.engine.inspect_container(&spec.name).await? else {
            let message = "it was removed right after its start".into();
            return Err(EngineError::Failed { operation: "start the container", message }.into());
        };
        if let Some(finding) = missing_devices(&container, verdict.devices()) {
            return Ok(Event::GpuStartFailed(finding));
        }
        tracing::info!(
            container = %spec.name,
            image = %spec.image,
            "started the container {} ({}) from {} on {}",
            spec.name,
            short_id(&container.id),
            spec.image,
            match verdict {
                Verdict::Gpu { devices, .. } => list_devices(devices),
                Verdict::Cpu { .. } => "the CPU".into(),
            }
        );
        self.container = Some(container);
        Ok(Event::Done)
    }

    /// Fails while the container's runtime hangs: Docker 20.10 does not remove such a container.
    async fn remove_failed(&self, finding: Finding) -> Result<Event, LaunchError> {
        let removed = async {
            match self.engine.inspect_container(&self.node.settings.container.name).await? {
                Some(container) => self.engine.remove(&container).await,
                None => Ok(()),
            }
        };
        let not_removed = |source| LaunchError::NotRemoved { summary: finding.summary, source };
        removed.await.map_err(not_removed)?;
        Ok(Event::Done)
    }

    /// Monitors the container until an event needs a decision of the state machine.
    async fn monitor(&mut self) -> Event {
        let Some(container) = self.container.clone() else {
            return Event::Failed;
        };
        if self.state_machine.verdict().devices().is_empty() {
            self.gpu_monitor.reset();
        }
        let mut run = match self.run.take() {
            Some(run) if run.is_of(&container) => run,
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

    /// Waits for the next event of any watcher. No other watcher loses its progress, see
    /// [`watchers`].
    async fn next_event(&mut self, container: &Container, run: &mut ContainerRun) -> WatchEvent {
        let node = &self.node;
        let devices = self.state_machine.verdict().devices();
        let connected = is_connected(node, run);
        self.superlink_watcher.set_connected(connected);
        let checks_health = node.settings.container.health_check && node.release().serves_health();
        let watchers = run.watchers.get_or_insert_with(|| {
            let tcp = (!node.log_reports_connection())
                .then(|| (node.superlink.address.port(), run.tcp_connected));
            let by_hook = node.injection == GpuInjection::Runtime;
            let paused = run.paused;
            let watched = WatchedContainer { container, paused, tcp, devices, by_hook };
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

    /// Records and logs an event. Returns it if the state machine has to decide.
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

    fn log_paused(&self, paused: bool) {
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

    async fn reconnect(&mut self) -> Event {
        let engine = Client::connect(&self.node.settings.docker.socket).await;
        let answers = engine.is_ok();
        if let Ok(engine) = engine {
            self.engine = engine;
        }
        Event::Engine { answers }
    }

    async fn check_running(&self) -> Event {
        let Some(container) = &self.container else {
            return Event::ContainerRunning(false);
        };
        let inspected = self.engine.inspect_container(&container.id).await;
        Event::ContainerRunning(matches!(inspected, Ok(Some(container)) if container.running))
    }

    async fn back_off(&mut self, delay: Duration) -> Event {
        let devices = self.state_machine.verdict().devices();
        tokio::select! {
            finding = self.gpu_monitor.next_failure(devices), if !devices.is_empty() => {
                let event = ContainerEvent::GpuFailed(finding);
                Event::Container { event, up_for: Duration::ZERO }
            }
            () = tokio::time::sleep(delay) => Event::Done,
        }
    }

    async fn stop(&mut self, grace_period: GracePeriod) -> Event {
        const SHORT: Duration = Duration::from_secs(5);
        let configured = self.node.settings.container.stop_timeout;
        let grace_period = match grace_period {
            GracePeriod::Configured => configured,
            GracePeriod::Short => SHORT.min(configured),
        };
        self.gpu_monitor.reset();
        if let Some(container) = &self.container
            && let Err(error) = self.engine.stop(&container.id, grace_period).await
        {
            let name = &self.node.settings.container.name;
            let error = logging::error_chain(&error);
            tracing::warn!(container = %name, "cannot stop container {name}: {error}");
        }
        Event::Done
    }

    async fn stop_and_remove(&mut self) -> Event {
        self.gpu_monitor.reset();
        if let Some(container) = &self.container
            && let Err(error) = self.stop_and_remove_container(container).await
        {
            let name = &self.node.settings.container.name;
            let error = logging::error_chain(&error);
            tracing::error!(container = %name, "cannot remove container {name}: {error}");
        }
        Event::Done
    }

    async fn stop_and_remove_container(&self, container: &Container) -> Result<(), EngineError> {
        self.engine.stop(&container.id, self.node.settings.container.stop_timeout).await?;
        self.engine.remove(container).await
    }

    async fn probe(&self) -> Event {
        let NodeSpec { config, settings, .. } = &self.node;
        let probed = detect_gpus(config, settings, Duration::ZERO).await.verdict;
        let is_usable =
            |device: &GpuDevice| probed.devices().iter().any(|found| found.uuid == device.uuid);
        let healthy = self.state_machine.verdict().devices().iter().all(is_usable);
        let name = &settings.container.name;
        if healthy {
            tracing::info!(
                container = %name,
                "probe finds the GPU usable; restarting container {name} on it"
            );
        } else {
            let why = probed.finding().map_or("", |finding| &finding.summary);
            tracing::info!(container = %name, "probe finds the GPU unusable: {why}");
        }
        Event::GpuHealthy(healthy)
    }

    fn notify(&mut self, notification: Notification) {
        let NodeSpec { config, settings, distribution, reporter, .. } = &self.node;
        let name = &settings.container.name;
        match notification {
            Notification::Adopted => {
                if let Some(container) = &self.container {
                    tracing::info!(
                        container = %name,
                        "adopted the running container {name} ({})",
                        short_id(&container.id)
                    );
                    if container.paused {
                        self.log_paused(true);
                    }
                }
            }
            Notification::Replacing(finding) => tracing::warn!(
                container = %name,
                gpu_uuid = finding.gpu_uuid.as_ref().map(GpuUuid::as_str),
                pci_address = finding.pci_address.map(tracing::field::display),
                "replacing the running container {name}: {}",
                finding.summary
            ),
            Notification::CpuFallback(finding) => {
                fallback::warn_cpu_fallback(config, &finding, *distribution);
            }
            Notification::GpuRequired(finding) => {
                fallback::error_gpu_required(&finding, *distribution);
            }
            Notification::RequiredGpuLost(finding) => {
                fallback::error_required_gpu_failed(&finding, *distribution)
            }
            Notification::MovingToCpu => {
                self.status_note = None;
                self.gpu_monitor.reset();
                reporter.set_step("The GPU failed, moving to the CPU");
            }
            Notification::LaunchFailed => {
                let error = logging::error_chain(
                    &self.launch_error.take().unwrap_or(LaunchError::UnexpectedEvent),
                );
                tracing::error!(container = %name, "cannot start container {name}: {error}");
            }
            Notification::RestartScheduled(reason, delay) => self.notify_restart(reason, delay),
            Notification::EngineUnavailable => {
                let socket = settings.docker.socket.display();
                tracing::warn!("Docker engine at {socket} does not answer; waiting for it");
                reporter.set_step("Waiting for the Docker engine");
            }
            Notification::EngineAvailable => tracing::info!("Docker engine answers again"),
            Notification::GpuFaultIgnored(finding) => {
                fallback::warn_gpu_fault_ignored(&finding, *distribution);
                self.status_note =
                    Some(format!("GPU failure ignored (gpu.on_failure): {}", finding.summary));
            }
            Notification::GpuRetry(finding) => {
                self.status_note = None;
                fallback::warn_gpu_retry(&finding, *distribution);
                reporter.update(NodeStatus::container_stopped);
                reporter.update(|status| status.gpus_released = true);
                reporter.set_step(&format!("The GPU failed, retrying it: {}", finding.summary));
            }
            Notification::GpuProbeScheduled(delay) => {
                tracing::info!(container = %name, "probing the failed GPU in {} s", delay.as_secs())
            }
            Notification::GpuAvailable => {
                tracing::info!(
                    container = %name,
                    "GPU is usable now; restart flower-supernode to use it"
                );
                self.status_note = Some(
                    "the GPU is usable now: systemctl restart flower-supernode to use it".into(),
                );
            }
            Notification::GpuReclaimed => tracing::warn!(
                container = %name,
                "GPU is usable now and gpu.on_available is restart; replacing container {name}"
            ),
        }
    }

    fn notify_restart(&self, reason: RestartReason, delay: Duration) {
        let NodeSpec { settings, reporter, .. } = &self.node;
        let name = &settings.container.name;
        let what = match reason {
            RestartReason::Exited(Some(code)) => format!("exited with code {code}"),
            RestartReason::Exited(None) => "is gone".into(),
            RestartReason::LaunchFailed => "did not start".into(),
        };
        let seconds = delay.as_secs();
        reporter.update(NodeStatus::container_stopped);
        tracing::warn!(container = %name, "container {name} {what}; restarting it in {seconds} s");
        reporter.set_step(&format!("The container {what}, restarting it in {seconds} s"));
    }

    /// Reports that the container runs, on what, and whether it is connected.
    fn report_running(&self, container: &Container, run: &ContainerRun) {
        let NodeSpec { distribution, superlink, reporter, .. } = &self.node;
        reporter.update(|status| {
            status.container_runs(container.started(), run.paused);
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

fn list_devices(devices: &[GpuDevice]) -> String {
    devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Returns, from the container's labels, why it runs on the CPU instead of as `wanted` on the GPU;
/// `None` if it is not a fallback of `wanted`.
fn previous_fallback(container: &Container, wanted: &ContainerSpec) -> Option<Finding> {
    let label = |name: &str| container.labels.get(name).map(String::as_str);
    if label(REFUSED_HASH_LABEL) != Some(wanted.hash().as_str()) {
        return None;
    }
    let reason = Reason::from_code(label(REASON_LABEL)?)?;
    Some(Finding::new(reason, label(SUMMARY_LABEL)?))
}

/// Returns a finding about the devices that the container does not have; `None` also if that is
/// unknown.
fn missing_devices(container: &Container, devices: &[GpuDevice]) -> Option<Finding> {
    find_missing_devices(container, devices).unwrap_or_else(|error| {
        tracing::info!("cannot check whether the container has its GPU: {error}");
        None
    })
}

fn short_id(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}
