//! The container's life: adopted or replaced, watched, started again, stopped. The agent is its one
//! owner.
//!
//! What is to be done is decided in [`machine`], where it is drawn; here it is done.

pub mod exporter;
pub mod gpu_monitor;
pub mod gpu_presence;
pub mod state_machine;
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
use crate::flower::liveness::Liveness;
use crate::flower::release::Release;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::gpu::{self, detect_gpus};
use crate::logging;
use crate::opennebula::publisher::OneGateAccess;
use crate::opennebula::superlink::SuperLink;
use crate::report::Reporter;
use crate::supervisor::gpu_monitor::GpuMonitor;
use crate::supervisor::gpu_presence::devices_missing_in;
use crate::system::atomic_file;
use crate::system::info::SystemInfo;
use crate::system::os_release::Distribution;
use crate::system::systemd::{TimeoutExtension, Watchdog};
use state_machine::{
    Command, ContainerEvent, Event, Existing, ExitReason, GracePeriod, Notification, Policy,
    RestartReason, StateMachine, Transition,
};
use watchers::{ContainerWatchers, SuperLinkWatcher, WatchEvent, WatchedContainer};

/// The node: everything its container is made from.
#[derive(Debug)]
pub struct Node {
    /// What the operator wants.
    pub config: Config,
    /// Where things are.
    pub settings: Settings,
    /// The way to OneGate, where there is one.
    pub cloud: Option<OneGateAccess>,
    /// What the node connects to.
    pub superlink: SuperLink,
    /// The framework image.
    pub image: FrameworkImage,
    /// Memory and logging of the VM.
    pub system: SystemInfo,
    /// The distribution that fixes are for.
    pub distribution: Distribution,
    /// How the GPU gets in.
    pub access: GpuInjection,
    /// Who is told.
    pub reporter: Rc<Reporter>,
}

/// What a node is in want of that its supervisor cannot give: the story from the beginning, because
/// the GPU is usable now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartRequested;

/// Why the container does not run.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The engine.
    #[error(transparent)]
    Client(#[from] EngineError),
    /// There must be a GPU, and there is none.
    #[error("FL_GPU_REQUIRED is YES and no GPU is usable")]
    GpuRequired,
    /// The container did not come up on the GPU, and Docker does not let go of it.
    #[error(
        "{summary}; and Docker does not let go of that container: end what hangs (ps -C nvidia-container-runtime), or restart Docker"
    )]
    Stuck {
        /// What was found about the GPU.
        summary: String,
        /// What Docker said to the removal.
        source: EngineError,
    },
    /// What the container mounts cannot be made.
    #[error("cannot write {path}")]
    Mounts {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Who does what the machine decides.
struct Supervisor<'a> {
    node: Node,
    watchdog: &'a Watchdog,
    machine: StateMachine,
    engine: Client,
    /// What has the container's name, as it was seen last.
    container: Option<Container>,
    /// The run of it that is listened to.
    run: Option<ContainerRun>,
    gpu_monitor: GpuMonitor,
    liveness: Liveness,
    superlink_watcher: SuperLinkWatcher,
    /// Completes when a GPU becomes available; `None` unless the state machine waits for one.
    gpu_available: Option<LocalBoxFuture<'static, ()>>,
    /// What is true beside the verdict, for the status.
    status_note: Option<String>,
    /// Why the last launch failed.
    error: Option<LaunchError>,
    /// Until the container is up.
    starting: Option<TimeoutExtension>,
}

/// One run of the container: from one start to the next.
struct ContainerRun {
    id: String,
    started_at: String,
    /// When the supervisor first saw it.
    since: Instant,
    /// The connection to the SuperLink according to Flower's log.
    connection: Connection,
    /// Whether the container has a TCP connection to the SuperLink's port: used where Flower's log
    /// does not report the connection.
    tcp_connected: bool,
    paused: bool,
    /// Kept while the supervisor executes [`Command::Monitor`], one time after another; dropped, and
    /// thereby ended, by any other command.
    watchers: Option<ContainerWatchers>,
}

impl ContainerRun {
    fn new(container: &Container) -> Self {
        Self {
            id: container.id.clone(),
            started_at: container.started_at.clone(),
            since: Instant::now(),
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

impl Node {
    /// Brings the container up on this verdict and keeps it up; `starting` ends once it is up.
    /// Returns only where the story is to begin anew: a signal ends it from outside.
    ///
    /// # Errors
    /// When the container does not come up at first; when there must be a GPU, and the container
    /// does not come up on it or it has failed.
    pub async fn supervise(
        self,
        verdict: Verdict,
        engine: Client,
        starting: TimeoutExtension,
        watchdog: &Watchdog,
    ) -> Result<RestartRequested, LaunchError> {
        let policy = Policy {
            gpu_required: self.config.gpu_required,
            on_failure: self.settings.gpu.on_failure,
            on_late: self.settings.gpu.on_late,
        };
        let (machine, act) = StateMachine::new(policy, verdict);
        let reporter = Rc::clone(&self.reporter);
        let mut supervisor = Supervisor {
            gpu_monitor: GpuMonitor::new(&self.config, &self.settings, reporter),
            superlink_watcher: self.watch_superlink(),
            gpu_available: None,
            node: self,
            watchdog,
            machine,
            engine,
            container: None,
            run: None,
            liveness: Liveness::default(),
            status_note: None,
            error: None,
            starting: Some(starting),
        };
        supervisor.work(act).await
    }

    fn spec_on(&self, verdict: &Verdict) -> ContainerSpec {
        plan::plan_container(&ContainerInputs {
            config: &self.config,
            settings: &self.settings,
            verdict,
            injection: &self.access,
            superlink: Some(&self.superlink),
            image: &self.image,
            system: &self.system,
        })
    }

    fn release(&self) -> &'static Release {
        Release::of(flower_version(&self.config, &self.image.reference))
    }

    /// Whether the container's log tells when Flower has connected.
    fn log_reports_connection(&self) -> bool {
        matches!(self.config.log_level, LogLevel::Debug | LogLevel::Info)
            && self.release().logs_node_id()
    }

    /// Makes what the container's mounts need. Looked after at every start: a folder may have gone
    /// in between.
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
        SuperLinkWatcher::new(&self.config, self.cloud.as_ref(), &self.superlink)
    }
}

impl Supervisor<'_> {
    /// Does what the machine decides, one act after the other.
    async fn work(&mut self, mut act: Command) -> Result<RestartRequested, LaunchError> {
        loop {
            let event = match act {
                Command::Exit(ExitReason::RestartRequested) => return Ok(RestartRequested),
                Command::Exit(ExitReason::GpuRequired) => return Err(LaunchError::GpuRequired),
                Command::Exit(ExitReason::LaunchFailed) => {
                    return Err(self.error.take().unwrap_or_else(unexpected));
                }
                act => {
                    let limit = self.timeout_for(&act);
                    self.watchdog.guard(limit, self.execute(act)).await
                }
            };
            let Transition { notifications, command: next } = self.machine.handle(event);
            notifications.into_iter().for_each(|notification| self.notify(notification));
            act = next;
        }
    }

    /// More than an act takes whose every call has a limit of its own, of a minute or two at the
    /// most. A wait for a change has none by its nature.
    fn timeout_for(&self, act: &Command) -> Duration {
        const CALLS: Duration = Duration::from_secs(600);
        let Settings { gpu, container, .. } = &self.node.settings;
        match act {
            Command::Monitor => Duration::MAX,
            Command::Sleep(pause) | Command::BackOff(pause) => *pause + CALLS,
            _ => CALLS.saturating_add(container.stop_timeout).saturating_add(gpu.probe_timeout),
        }
    }

    async fn execute(&mut self, act: Command) -> Event {
        if act != Command::Monitor
            && let Some(run) = &mut self.run
        {
            run.watchers = None;
        }
        let done = match act {
            Command::Inspect => self.look().await,
            Command::RemoveExisting => self.clear().await,
            Command::CreateAndStart => self.make().await,
            Command::StartExisting => self.start_again().await,
            Command::RemoveFailed(finding) => self.discard(finding).await,
            Command::Monitor => Ok(self.watch().await),
            Command::PingEngine => Ok(Event::Engine { answers: self.engine.info().await.is_ok() }),
            Command::Reconnect => Ok(self.connect().await),
            Command::CheckRunning => Ok(self.see().await),
            Command::Sleep(pause) => {
                tokio::time::sleep(pause).await;
                Ok(Event::Done)
            }
            Command::BackOff(pause) => Ok(self.rest(pause).await),
            Command::Stop(grace) => Ok(self.stop(grace).await),
            Command::StopAndRemove => Ok(self.stop_and_remove_container().await),
            Command::Probe => Ok(self.probe().await),
            Command::Exit(_) => Ok(Event::Done),
        };
        done.unwrap_or_else(|error| {
            self.error = Some(error);
            Event::Failed
        })
    }

    fn spec(&self) -> ContainerSpec {
        let mut spec = self.node.spec_on(self.machine.verdict());
        if let Some(gpu) = self.machine.fallback_from() {
            spec.labels.insert(REFUSED_HASH_LABEL.into(), self.node.spec_on(gpu).hash());
        }
        spec
    }

    async fn look(&mut self) -> Result<Event, LaunchError> {
        self.node.reporter.down();
        self.node.prepare_mounts()?;
        let spec = self.spec();
        self.container = self.engine.inspect_container(&spec.name).await?;
        let Some(container) = &self.container else {
            return Ok(Event::Inspected(Existing::Absent));
        };
        let found = match (container.running, container.spec_hash() == Some(&spec.hash())) {
            (true, true) => match missing_in(container, self.machine.verdict().devices()) {
                None => Existing::UpToDate,
                Some(finding) => Existing::WithoutGpu(finding),
            },
            (true, false) => previous_fallback(container, &spec)
                .map_or(Existing::Outdated, Existing::CpuFallback),
            // One that has ended goes on, with its log, where it is what would be made now.
            (false, _) if container.is_made_from(&spec) => {
                let image = self.engine.find_image(&spec.image).await?;
                // Where the name was taken off the image, nothing else could be made.
                let same = image.is_none_or(|image| image.id == container.image_id);
                if same { Existing::Exited } else { Existing::Outdated }
            }
            (false, _) => Existing::Outdated,
        };
        Ok(Event::Inspected(found))
    }

    async fn clear(&self) -> Result<Event, LaunchError> {
        if let Some(old) = &self.container {
            let name = &self.node.settings.container.name;
            tracing::info!("replacing the container {name} ({})", short(&old.id));
            self.stop_and_remove(old).await?;
        }
        Ok(Event::Done)
    }

    async fn make(&mut self) -> Result<Event, LaunchError> {
        let spec = self.spec();
        let made = async {
            let id = self.engine.create(&spec).await?;
            self.engine.start(&id).await
        };
        let made = made.await;
        self.after_start(&spec, made).await
    }

    async fn start_again(&mut self) -> Result<Event, LaunchError> {
        let id = self.container.as_ref().map(|container| container.id.as_str()).unwrap_or_default();
        let started = self.engine.start(id).await;
        if matches!(started, Err(EngineError::Refused { .. })) {
            // What it was made with may have gone since: only one that is made now is judged.
            return Ok(Event::Refused);
        }
        self.after_start(&self.spec(), started).await
    }

    async fn after_start(
        &mut self,
        spec: &ContainerSpec,
        started: Result<(), EngineError>,
    ) -> Result<Event, LaunchError> {
        let verdict = self.machine.verdict();
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
        if let Some(finding) = missing_in(&container, verdict.devices()) {
            return Ok(Event::GpuStartFailed(finding));
        }
        tracing::info!(
            "started the container {} ({}) from {} on {}",
            spec.name,
            short(&container.id),
            spec.image,
            match verdict {
                Verdict::Gpu { devices, .. } => titles(devices),
                Verdict::Cpu { .. } => "the CPU".into(),
            }
        );
        self.container = Some(container);
        Ok(Event::Done)
    }

    /// Docker 20.10 holds on to a container for as long as its runtime hangs.
    async fn discard(&self, finding: Finding) -> Result<Event, LaunchError> {
        let removed = async {
            match self.engine.inspect_container(&self.node.settings.container.name).await? {
                Some(dead) => self.engine.remove(&dead).await,
                None => Ok(()),
            }
        };
        let stuck = |source| LaunchError::Stuck { summary: finding.summary, source };
        removed.await.map_err(stuck)?;
        Ok(Event::Done)
    }

    /// Monitors the container until an event that the state machine has to decide about.
    async fn watch(&mut self) -> Event {
        let Some(container) = self.container.clone() else {
            return Event::Failed;
        };
        if self.machine.verdict().devices().is_empty() {
            self.gpu_monitor.reset();
        }
        let mut run = match self.run.take() {
            Some(run) if run.is_of(&container) => run,
            _ => ContainerRun::new(&container),
        };
        self.starting = None;
        let event = loop {
            self.report_running(&container, &run);
            let event = self.next_event(&container, &mut run).await;
            if let Some(event) = self.handle_event(event, &container, &mut run).await {
                break event;
            }
        };
        let up_for = run.since.elapsed();
        self.run = Some(run);
        Event::Container { event, up_for }
    }

    /// Waits for the next event of any watcher. No other watcher loses its progress, see
    /// [`watchers`].
    async fn next_event(&mut self, container: &Container, run: &mut ContainerRun) -> WatchEvent {
        let node = &self.node;
        let devices = self.machine.verdict().devices();
        let connected = is_connected(node, run);
        self.superlink_watcher.set_connected(connected);
        let checks_health = node.settings.container.health_check && node.release().serves_health();
        let watchers = run.watchers.get_or_insert_with(|| {
            let tcp = (!node.log_reports_connection())
                .then(|| (node.superlink.address.port(), run.tcp_connected));
            let by_hook = node.access == GpuInjection::Runtime;
            let paused = run.paused;
            let watched = WatchedContainer { container, paused, tcp, devices, by_hook };
            ContainerWatchers::new(&self.engine, &watched)
        });
        if self.machine.awaits_gpu() && self.gpu_available.is_none() {
            let (config, settings) = (node.config.clone(), node.settings.clone());
            let available = async move { gpu::wait_until_available(&config, &settings).await };
            self.gpu_available = Some(available.boxed_local());
        }
        tokio::select! {
            event = watchers.next() => event,
            failure = self.liveness.wait_until_unresponsive(container, connected), if checks_health => {
                WatchEvent::Unresponsive(failure)
            }
            found = self.superlink_watcher.changed() => WatchEvent::SuperLinkChanged(Box::new(found)),
            finding = self.gpu_monitor.next_failure(devices), if !devices.is_empty() => {
                WatchEvent::GpuFailed(finding)
            }
            Some(()) = OptionFuture::from(self.gpu_available.as_mut()) => {
                self.gpu_available = None;
                WatchEvent::GpuAvailable
            }
        }
    }

    /// Tells the news, and answers with what is to be decided about.
    async fn handle_event(
        &mut self,
        news: WatchEvent,
        container: &Container,
        run: &mut ContainerRun,
    ) -> Option<ContainerEvent> {
        let (name, address) = (&self.node.settings.container.name, &self.node.superlink.address);
        Some(match news {
            WatchEvent::Exited(code) => ContainerEvent::Exited(code),
            WatchEvent::GpuFailed(finding) => ContainerEvent::GpuFailed(finding),
            WatchEvent::GpuAvailable => ContainerEvent::GpuAvailable,
            WatchEvent::GpuLost(finding) => {
                self.status_note = None;
                tracing::warn!(
                    gpu_uuid = finding.gpu_uuid,
                    pci_address = finding.pci_address,
                    "the container {name} has lost its GPU and is made anew: {}",
                    finding.summary
                );
                self.node.reporter.doing("The container has lost its GPU, making it anew");
                ContainerEvent::GpuLost
            }
            WatchEvent::Unresponsive(_) if self.is_paused(container).await => {
                tracing::debug!("the container is paused: it is not asked for its health");
                return None;
            }
            WatchEvent::Unresponsive(dead) => {
                tracing::warn!("Flower in the container {name} hangs and is started again: {dead}");
                self.node.reporter.doing("Flower hangs, starting the container again");
                ContainerEvent::Unresponsive
            }
            WatchEvent::SuperLinkChanged(found) => {
                for warning in &found.warnings {
                    tracing::warn!("{warning}");
                }
                let partition = self.node.superlink.partition;
                self.node.superlink = SuperLink { partition, ..found.superlink };
                self.superlink_watcher = self.node.watch_superlink();
                tracing::info!(
                    "the service has its SuperLink at {} now",
                    self.node.superlink.address
                );
                ContainerEvent::SuperLinkChanged
            }
            WatchEvent::Connection(connection) => {
                match connection {
                    Connection::Connected { node_id, .. } => {
                        tracing::info!(
                            "connected to the SuperLink {address} as SuperNode {node_id}"
                        );
                    }
                    Connection::Lost { .. } => {
                        tracing::info!("not connected to the SuperLink {address}")
                    }
                    Connection::Unknown => {}
                }
                run.connection = connection;
                return None;
            }
            WatchEvent::Paused(paused) => {
                if paused {
                    tracing::warn!("the container {name} is paused: docker unpause {name}");
                } else {
                    tracing::info!("the container {name} is not paused any more");
                }
                run.paused = paused;
                return None;
            }
            WatchEvent::TcpConnected(reached) => {
                let no = if reached { "" } else { "no " };
                tracing::info!("the container has {no}connection to the SuperLink {address}");
                run.tcp_connected = reached;
                return None;
            }
        })
    }

    async fn is_paused(&self, container: &Container) -> bool {
        matches!(self.engine.inspect_container(&container.id).await, Ok(Some(found)) if found.paused)
    }

    async fn connect(&mut self) -> Event {
        let engine = Client::connect(&self.node.settings.docker.socket).await;
        let answers = engine.is_ok();
        if let Ok(engine) = engine {
            self.engine = engine;
        }
        Event::Engine { answers }
    }

    async fn see(&mut self) -> Event {
        let Some(container) = &self.container else {
            return Event::ContainerRunning(false);
        };
        let runs = matches!(self.engine.inspect_container(&container.id).await, Ok(Some(found)) if found.running);
        Event::ContainerRunning(runs)
    }

    async fn rest(&mut self, pause: Duration) -> Event {
        let devices = self.machine.verdict().devices();
        tokio::select! {
            finding = self.gpu_monitor.next_failure(devices), if !devices.is_empty() => {
                Event::Container { event: ContainerEvent::GpuFailed(finding), up_for: Duration::ZERO }
            }
            () = tokio::time::sleep(pause) => Event::Done,
        }
    }

    async fn stop(&mut self, grace: GracePeriod) -> Event {
        const SHORT: Duration = Duration::from_secs(5);
        let whole = self.node.settings.container.stop_timeout;
        let grace = match grace {
            GracePeriod::Configured => whole,
            GracePeriod::Short => SHORT.min(whole),
        };
        self.gpu_monitor.reset();
        if let Some(container) = &self.container
            && let Err(error) = self.engine.stop(&container.id, grace).await
        {
            tracing::warn!("the container does not stop: {}", logging::error_chain(&error));
        }
        Event::Done
    }

    async fn stop_and_remove_container(&mut self) -> Event {
        self.gpu_monitor.reset();
        if let Some(container) = &self.container
            && let Err(error) = self.stop_and_remove(container).await
        {
            tracing::error!("the container cannot be removed: {}", logging::error_chain(&error));
        }
        Event::Done
    }

    async fn stop_and_remove(&self, container: &Container) -> Result<(), EngineError> {
        self.engine.stop(&container.id, self.node.settings.container.stop_timeout).await?;
        self.engine.remove(container).await
    }

    async fn probe(&self) -> Event {
        let found =
            detect_gpus(&self.node.config, &self.node.settings, Duration::ZERO).await.verdict;
        let is_well =
            |device: &GpuDevice| found.devices().iter().any(|found| found.uuid == device.uuid);
        let well = self.machine.verdict().devices().iter().all(is_well);
        if well {
            tracing::info!("a probe finds the GPU well: the container is started on it again");
        } else {
            let why = found.finding().map_or("", |finding| &finding.summary);
            tracing::info!("the GPU is not well: {why}");
        }
        Event::GpuHealthy(well)
    }

    fn notify(&mut self, notification: Notification) {
        let Node { config, settings, distribution, reporter, .. } = &self.node;
        let name = &settings.container.name;
        match notification {
            Notification::Adopted => {
                if let Some(container) = &self.container {
                    tracing::info!(
                        "adopted the running container {name} ({})",
                        short(&container.id)
                    );
                    if container.paused {
                        tracing::warn!("the container {name} is paused: docker unpause {name}");
                    }
                }
            }
            Notification::Replacing(finding) => {
                tracing::warn!("replacing the running container: {}", finding.summary)
            }
            Notification::CpuFallback(finding) => log_cpu_fallback(config, &finding, *distribution),
            Notification::GpuRequired(finding) => logging::error_required(&finding, *distribution),
            Notification::RequiredGpuLost(finding) => {
                logging::error_required_lost(&finding, *distribution)
            }
            Notification::MovingToCpu => {
                self.status_note = None;
                self.gpu_monitor.reset();
                reporter.doing("The GPU failed, moving to the CPU");
            }
            Notification::LaunchFailed => {
                let error = self.error.take().unwrap_or_else(unexpected);
                tracing::error!("the container does not come up: {}", logging::error_chain(&error));
            }
            Notification::RestartScheduled(cause, pause) => {
                let what = match cause {
                    RestartReason::Exited(Some(code)) => format!("ended with exit code {code}"),
                    RestartReason::Exited(None) => "is gone".into(),
                    RestartReason::LaunchFailed => "does not come up".into(),
                };
                let seconds = pause.as_secs();
                reporter.down();
                tracing::warn!("the container {name} {what}; starting it again in {seconds} s");
                reporter.doing(&format!("The container {what}, starting it again in {seconds} s"));
            }
            Notification::EngineUnavailable => {
                let socket = settings.docker.socket.display();
                tracing::warn!("the Docker engine at {socket} does not answer; waiting for it");
                reporter.doing("Waiting for the Docker engine");
            }
            Notification::EngineAvailable => tracing::info!("the Docker engine answers again"),
            Notification::GpuFaultIgnored(finding) => {
                logging::warn_ignored(&finding, *distribution);
                self.status_note =
                    Some(format!("the GPU failed, which is ignored: {}", finding.summary));
            }
            Notification::GpuRetry(finding) => {
                self.status_note = None;
                logging::warn_tried_again(&finding, *distribution);
                reporter.down();
                reporter.uses(&[]);
                reporter.doing(&format!("The GPU failed, trying it again: {}", finding.summary));
            }
            Notification::GpuProbeScheduled(pause) => {
                tracing::info!("looking at the GPU again in {} s", pause.as_secs())
            }
            Notification::GpuAvailable => {
                tracing::info!("GPU is usable now; restart flower-supernode to use it");
                self.status_note = Some(
                    "the GPU is usable now: systemctl restart flower-supernode to use it".into(),
                );
            }
            Notification::GpuReclaimed => {
                tracing::warn!(
                    "GPU is usable now, and gpu.on_late is restart: the container is replaced"
                );
            }
        }
    }

    /// Tells that the node runs, and on what.
    fn report_running(&self, container: &Container, run: &ContainerRun) {
        let Node { distribution, superlink, reporter, .. } = &self.node;
        let verdict = self.machine.verdict();
        reporter.up(container);
        reporter.decided(verdict, *distribution, superlink);
        reporter.news(|news| {
            news.gpus = verdict.devices().iter().filter_map(|device| device.name.clone()).collect();
            (news.gpu_status, news.fallback_reason) = match verdict {
                Verdict::Gpu { .. } => ("gpu", ""),
                Verdict::Cpu { finding: Some(finding) } => ("cpu-fallback", finding.reason.code()),
                Verdict::Cpu { finding: None } => ("cpu", ""),
            };
            news.partition = superlink.partition.map(|partition| partition.id);
        });
        let is_connected = is_connected(&self.node, run);
        reporter.connected(is_connected);
        let connected = if is_connected { "connected to" } else { "not connected to" };
        let mut status = format!("{}; {connected} {}", runs_on(verdict), superlink.address);
        if run.paused {
            status.push_str("; paused: docker unpause ");
            status.push_str(&self.node.settings.container.name);
        }
        if let Some(status_note) = &self.status_note {
            status.push_str("; ");
            status.push_str(status_note);
        }
        reporter.ready(&status);
    }
}

fn is_connected(node: &Node, run: &ContainerRun) -> bool {
    let reached = if node.log_reports_connection() {
        run.connection.node_id().is_some()
    } else {
        run.tcp_connected
    };
    reached && !run.paused
}

fn runs_on(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Gpu { devices, .. } => format!("Running on {}", titles(devices)),
        Verdict::Cpu { finding: None } => "Running on the CPU (FL_GPU_ENABLED is not YES)".into(),
        Verdict::Cpu { finding: Some(finding) } => {
            format!("Running on the CPU: {}: {}", finding.reason, finding.summary)
        }
    }
}

fn titles(devices: &[GpuDevice]) -> String {
    devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The error of a launch that failed without one.
fn unexpected() -> LaunchError {
    let message = "what has happened does not fit what was done".into();
    EngineError::Failed { operation: "bring the container up", message }.into()
}

/// Says why there is no GPU, and what helps on this distribution: the WARNING of the fallback, or
/// the error where a GPU is required.
///
/// # Errors
/// When there must be a GPU.
pub fn report_fallback(
    config: &Config,
    finding: &Finding,
    distribution: Distribution,
) -> Result<(), LaunchError> {
    if config.gpu_required {
        logging::error_required(finding, distribution);
        return Err(LaunchError::GpuRequired);
    }
    log_cpu_fallback(config, finding, distribution);
    Ok(())
}

fn log_cpu_fallback(config: &Config, finding: &Finding, distribution: Distribution) {
    logging::warn_fallback(finding, distribution);
    if let Some(fraction) = &config.memory_fraction {
        tracing::info!("FL_GPU_MEMORY_FRACTION={fraction} is idle: this node runs on the CPU");
    }
}

/// Whether `container` runs on the CPU because `wanted`, on the GPU, did not come up: why, as its
/// labels tell.
fn previous_fallback(container: &Container, wanted: &ContainerSpec) -> Option<Finding> {
    let label = |name: &str| container.labels.get(name).map(String::as_str);
    if label(REFUSED_HASH_LABEL) != Some(wanted.hash().as_str()) {
        return None;
    }
    let reason = Reason::from_code(label(REASON_LABEL)?)?;
    Some(Finding::new(reason, label(SUMMARY_LABEL)?))
}

/// The devices that are not in the container. Where it cannot be told, none.
fn missing_in(container: &Container, devices: &[GpuDevice]) -> Option<Finding> {
    devices_missing_in(container, devices).unwrap_or_else(|error| {
        tracing::info!("cannot see whether the GPU is in the container: {error}");
        None
    })
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}
