//! The supervisor: owns the framework container and keeps it running.
//!
//! [`state_machine`] makes the decisions; this module and its submodules `launch`, `monitor` and
//! `notify` execute them. One iteration of [`Supervisor::run`]:
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
//! Its device node is gone or, with injection by the nvidia runtime, systemd applied its device
//! rules without NVIDIA's devices.
//!
//! 1. [`gpu_presence`] checks the device nodes every 5 s and the device rules every 15 s.
//! 2. [`Supervisor::on_gpu_lost`] logs a WARNING and updates the status.
//! 3. The state machine enters `Stopping`, or `StopDelayed` first if the container was started
//!    shortly before.
//! 4. `StopAndRemove` removes the container and stops the GPU monitor; `Inspect` then finds no
//!    container and a new one is created on the same GPU.
//! 5. If the new container has no GPU either, the launch falls back to the CPU with the fallback
//!    WARNING, or the agent exits if `FL_GPU_REQUIRED` is YES.
//!
//! # When a GPU fails
//!
//! 1. [`gpu_monitor`] reports a fatal XID, an NVML fault, a hang or a removed driver.
//! 2. `StateMachine::on_gpu_failed` decides by `gpu.on_failure`: ignore it; stop the container and
//!    probe the GPU up to three times; or move to the CPU at once.
//!
//! # When the agent receives a signal
//!
//! The supervisor does not handle signals. On SIGTERM, SIGINT, SIGUSR1 and a SIGHUP that changes
//! the configuration, the daemon drops the future of [`NodeSpec::supervise`]. This cancels the
//! watchers and the calls in progress and kills the GPU monitor's child; the container keeps
//! running. The daemon then stops the container (SIGTERM, SIGINT), leaves it to the next agent
//! (SIGUSR1), or starts a new supervisor, which adopts the container if it still matches its spec
//! and replaces it otherwise (SIGHUP).

pub(crate) mod exporter;
pub(crate) mod gpu_monitor;
pub(crate) mod gpu_presence;
mod launch;
mod monitor;
mod notify;
mod state_machine;
mod watchers;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;

use crate::config::settings::Settings;
use crate::config::{Config, LogLevel};
use crate::container::image::{FrameworkImage, flower_version};
use crate::container::plan::{self, ContainerInputs};
use crate::container::site_hook;
use crate::docker::client::{Client, Container, EngineError};
use crate::docker::nvidia_runtime::GpuInjection;
use crate::docker::spec::ContainerSpec;
use crate::flower::liveness::Liveness;
use crate::flower::release::Release;
use crate::gpu::detect_gpus;
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::logging;
use crate::opennebula::onegate::OneGateAccess;
use crate::opennebula::superlink::SuperLink;
use crate::report::Reporter;
use crate::report::fallback::GpuRequired;
use crate::supervisor::gpu_monitor::GpuMonitor;
use crate::system::atomic_file;
use crate::system::info::SystemInfo;
use crate::system::os_release::Distribution;
use crate::system::systemd::{TimeoutExtension, Watchdog};
use state_machine::{
    Command, ContainerEvent, Event, ExitReason, GracePeriod, Policy, StateMachine, Transition,
};
use watchers::{ContainerRun, SuperLinkWatcher};

/// Everything that the supervisor needs to create and monitor the framework container, except the
/// verdict.
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

/// Why a launch failed.
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
    /// The last monitored run of that container.
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

    /// Creates the directories and files that the container mounts. Called before every launch,
    /// because a directory may have been removed since the last one.
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
    /// Executes commands until the state machine exits.
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

    /// Returns an upper bound on the duration of a command, for the watchdog. Each call within a
    /// command has its own timeout of at most two minutes. Monitoring has no upper bound.
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
            Command::CheckEngine => Ok(Event::Engine { answers: self.engine.info().await.is_ok() }),
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
}

fn short_id(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}
