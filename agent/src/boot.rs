//! The story of `run`, from the context to the supervised container.

use std::path::Path;
use std::pin::pin;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use one_context::Context;
use one_context::source::{SourceError, read_context};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::values::ImageRef;
use crate::config::{self, Config, ConfigErrors, LogLevel, Prebaked, Remarks};
use crate::distribution::Distribution;
use crate::docker::engine::{Engine, EngineError, Image};
use crate::docker::runtime::{GpuAccess, choose_access, ensure_runtime};
use crate::gpu::detect_gpus;
use crate::gpu::verdict::Verdict;
use crate::journal;
use crate::lock::{Lock, LockError};
use crate::plan::{self, Machine};
use crate::report::Reporter;
use crate::settings::{Settings, SettingsError};
use crate::superlink::{SuperLink, SuperLinkError, static_superlink};
use crate::supervisor::{Anew, LaunchError, Node, announce};
use crate::systemd::{self, LongStep};

/// Exit code: a failure that a retry may cure.
pub const EXIT_RETRY: u8 = 1;
/// Exit code: the agent was asked to leave the container to the next one (sysexits.h, EX_TEMPFAIL).
pub const EXIT_LEFT: u8 = 75;
/// Exit code: an invalid configuration (sysexits.h, EX_CONFIG); systemd is told not to retry it.
pub const EXIT_CONFIG: u8 = 78;

/// Why the node does not run.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The context.
    #[error(transparent)]
    Context(#[from] SourceError),
    /// agent.toml, at a reload.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The variables.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// The SuperLink.
    #[error(transparent)]
    SuperLink(#[from] SuperLinkError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The container.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// No image.
    #[error("{0}")]
    Image(String),
    /// There is another agent, or it cannot be told.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The container still runs.
    #[error("the container {name} could not be stopped: {why}")]
    NotStopped {
        /// Its name.
        name: String,
        /// Why.
        why: String,
    },
    /// Signals.
    #[error("cannot listen for signals")]
    Signals(#[source] std::io::Error),
}

impl BootError {
    /// 78 where only the operator can mend it, a machine without the GPU that it must have among that, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Context(error) if error.is_invalid() => EXIT_CONFIG,
            Self::Settings(_) | Self::Config(_) | Self::SuperLink(_) => EXIT_CONFIG,
            Self::Launch(LaunchError::GpuRequired) => EXIT_CONFIG,
            _ => EXIT_RETRY,
        }
    }
}

/// The daemon, from start to end. A reload reads `settings_file` again.
pub async fn run(settings: Settings, settings_file: Option<&Path>) -> ExitCode {
    let lock = Lock::take(&settings.state.dir);
    // The status file is that of the agent that has the lock.
    let reporter = Rc::new(Reporter::new(lock.is_ok().then_some(settings.state.dir.as_path())));
    systemd::feed_watchdog();
    let result = match read_context(&settings.context.dir) {
        Ok(context) => {
            let (level, as_json) = config::log_settings(&context);
            journal::init(level, as_json);
            run_until_signal(&context, settings, settings_file, lock, &reporter).await
        }
        Err(error) => {
            journal::init(LogLevel::Info, false);
            Err(error.into())
        }
    };
    let error = match result {
        Ok(End::Stop) => {
            reporter.doing("Stopped");
            return ExitCode::SUCCESS;
        }
        Ok(End::Leave) => {
            reporter.stopping("Left; the container runs on for the next agent");
            return ExitCode::from(EXIT_LEFT);
        }
        Err(error) => error,
    };
    log_error(&error);
    reporter.stopping(&failure_line(&error));
    ExitCode::from(error.exit_code())
}

/// One entry for each thing that is wrong.
fn log_error(error: &BootError) {
    match error {
        BootError::Config(errors) => errors.0.iter().for_each(|line| tracing::error!("{line}")),
        error => tracing::error!("{}", journal::error_chain(error)),
    }
}

/// The line for `systemctl status`.
fn failure_line(error: &BootError) -> String {
    match error {
        BootError::Config(errors) => format!("Invalid configuration: {}", errors.0.join("; ")),
        error => format!("Failed: {}", journal::error_chain(error)),
    }
}

/// What the operator wants, whole: what a reload compares.
#[derive(Debug, Clone, PartialEq)]
struct Wish {
    config: Config,
    superlink: SuperLink,
    settings: Settings,
}

impl Wish {
    fn read(context: &Context, settings: Settings) -> Result<Self, BootError> {
        let (config, remarks) = configure(context, &settings)?;
        log_remarks(&config, &remarks);
        let superlink = static_superlink(&config)?;
        Ok(Self { config, superlink, settings })
    }

    /// Reads everything again. `None` where nothing has changed, or what is there now cannot be used.
    fn reloaded(&self, settings_file: Option<&Path>) -> Option<Self> {
        let read = || {
            let settings = Settings::load(settings_file)?;
            let context = read_context(&settings.context.dir)?;
            Self::read(&context, settings)
        };
        match read() {
            Ok(new) if new == *self => {
                tracing::info!("reload: nothing has changed");
                None
            }
            Ok(new) => {
                tracing::info!("reload: the configuration has changed");
                Some(new)
            }
            Err(error) => {
                log_error(&error);
                tracing::error!("reload: the new configuration cannot be used, the node goes on with the old one");
                None
            }
        }
    }
}

async fn run_until_signal(
    context: &Context,
    settings: Settings,
    settings_file: Option<&Path>,
    lock: Result<Lock, LockError>,
    reporter: &Rc<Reporter>,
) -> Result<End, BootError> {
    let mut wish = Wish::read(context, settings)?;
    let _lock = lock?;
    let mut signals = Signals::listen()?;
    let lived = live_until_signal(&mut wish, settings_file, &mut signals, reporter).await;
    // A node that must have a GPU does not go on without: neither does a container of before.
    let stops = matches!(lived, Ok(End::Stop) | Err(BootError::Launch(LaunchError::GpuRequired)));
    if !stops {
        return lived;
    }
    reporter.stopping("Stopping the container");
    let _extension = LongStep::begin();
    let stopped = tokio::select! {
        stopped = stop_container(&wish.settings) => stopped,
        name = signals.end() => Err(format!("{name} came again and ended the wait for it")),
    };
    let name = wish.settings.container.name;
    match (lived, stopped) {
        (lived, Ok(())) => lived,
        (Ok(_), Err(why)) => Err(BootError::NotStopped { name, why }),
        (Err(error), Err(why)) => {
            tracing::warn!("the container {name} could not be stopped: {why}");
            Err(error)
        }
    }
}

/// Keeps the node up, as the operator wants it by now, until a signal ends it.
async fn live_until_signal(
    wish: &mut Wish,
    settings_file: Option<&Path>,
    signals: &mut Signals,
    reporter: &Rc<Reporter>,
) -> Result<End, BootError> {
    loop {
        let mut life = pin!(live(wish.clone(), Rc::clone(reporter)));
        let new = loop {
            tokio::select! {
                lived = &mut life => {
                    let Anew = lived?;
                    break wish.clone();
                }
                signal = signals.next() => match signal {
                    Received::End(name) => {
                        tracing::info!("received {name}");
                        return Ok(End::Stop);
                    }
                    Received::Leave => {
                        tracing::info!("received SIGUSR1: the container is left to the next agent");
                        return Ok(End::Leave);
                    }
                    Received::Reload => {
                        if let Some(new) = wish.reloaded(settings_file) {
                            break new;
                        }
                    }
                },
            }
        };
        *wish = new;
    }
}

/// Brings the node up and keeps it up, until something new asks for the story from its beginning.
async fn live(wish: Wish, reporter: Rc<Reporter>) -> Result<Anew, BootError> {
    let Wish { config, superlink, settings } = wish;
    let starting = LongStep::begin();
    reporter.doing("Looking for the GPU and the Docker engine");
    let (engine, detection) = tokio::join!(
        Engine::wait_until_ready(&settings.docker.socket, settings.docker.ready_timeout),
        detect_gpus(&config, &settings, settings.gpu.wait),
    );
    let verdict = detection.verdict;
    let distribution = Distribution::read(&settings.machine.root);
    // The GPU's finding comes first: where a GPU is required, an absent engine must not hide that there is none.
    if let Some(finding) = verdict.finding() {
        announce(&config, finding, distribution)?;
    }
    let engine = engine?;
    let (verdict, access) = make_docker_able(&config, verdict, &engine, &settings, distribution).await?;
    let (image, found) = find_image(&config, &engine, &settings.container.name, &reporter).await?;
    let machine = Machine { image_python_path: found.variable("PYTHONPATH"), ..this_machine() };
    let announced = verdict.finding().map(|finding| finding.reason);
    let refused_hash = None;
    reporter.doing("Starting the container");
    let remark = None;
    let mut node = Node {
        config,
        settings,
        superlink,
        image,
        machine,
        distribution,
        access,
        verdict,
        reporter,
        refused_hash,
        announced,
        remark,
    };
    let container = node.bring_up(&engine).await?;
    drop(starting);
    node.report_running();
    Ok(node.supervise(engine, container).await?)
}

/// Reads and checks every variable.
///
/// # Errors
/// All that is wrong.
pub fn configure(context: &Context, settings: &Settings) -> Result<(Config, Remarks), ConfigErrors> {
    match Prebaked::read(&settings.container.prebaked_dir) {
        Ok(prebaked) => Config::from_context(context, &prebaked),
        Err(mut errors) => {
            // What is wrong with the variables is told in the same run.
            if let Err(more) = Config::from_context(context, &Prebaked::default()) {
                errors.0.extend(more.0);
            }
            Err(errors)
        }
    }
}

fn log_remarks(config: &Config, remarks: &Remarks) {
    for line in remarks.warnings() {
        tracing::warn!("{line}");
    }
    for line in remarks.idle.iter().chain(&remarks.notes) {
        tracing::info!("{line}");
    }
    if config.gpu_enabled && config.dcgm_enabled {
        tracing::info!("FL_DCGM_ENABLED is idle: this release starts no DCGM exporter");
    }
}

/// Chooses the way for the GPU and prepares it; a way that is barred makes the verdict CPU.
async fn make_docker_able(
    config: &Config,
    verdict: Verdict,
    engine: &Engine,
    settings: &Settings,
    distribution: Distribution,
) -> Result<(Verdict, GpuAccess), BootError> {
    let Verdict::Gpu { devices, missing } = &verdict else {
        return Ok((verdict, GpuAccess::Runtime));
    };
    let facts = engine.facts().await?;
    let access = choose_access(settings.gpu.injection, devices, Some(&facts));
    if access == GpuAccess::Runtime
        && let Err(finding) = ensure_runtime(engine, &facts, &settings.docker).await
    {
        announce(config, &finding, distribution)?;
        return Ok((Verdict::cpu(finding), access));
    }
    if !missing.is_empty() {
        tracing::warn!("not every GPU is used: {}", missing.join("; "));
    }
    Ok((verdict, access))
}

/// The image that is wanted, else the one that is on the machine since it was built.
async fn find_image(
    config: &Config,
    engine: &Engine,
    container: &str,
    reporter: &Reporter,
) -> Result<(ImageRef, Image), BootError> {
    let wanted = plan::wanted_image(config);
    if let Some(found) = engine.find_image(wanted.as_str()).await? {
        return Ok((wanted, found));
    }
    // The name was taken off the image, and a container that was made from it goes on.
    if let Some(running) = engine.find_container(container).await?.filter(|found| found.running)
        && running.image == wanted.as_str()
        && let Some(found) = engine.find_image(&running.image_id).await?
    {
        return Ok((wanted, found));
    }
    reporter.doing(&format!("Pulling {wanted}"));
    tracing::info!("pulling {wanted}");
    let pulled = engine.pull(&wanted, |step| reporter.progress(&format!("Pulling {wanted}: {step}"))).await;
    let error = match pulled {
        Ok(()) => match engine.find_image(wanted.as_str()).await? {
            Some(found) => return Ok((wanted, found)),
            None => "it was pulled and is not there".to_owned(),
        },
        Err(error) => error.to_string(),
    };
    let Some(prebaked) = plan::prebaked_image(config).filter(|prebaked| *prebaked != wanted) else {
        return Err(BootError::Image(format!("the image {wanted} is not to be had: {error}")));
    };
    let Some(found) = engine.find_image(prebaked.as_str()).await? else {
        return Err(BootError::Image(format!(
            "neither the image {wanted} nor the prebaked {prebaked} is to be had: {error}"
        )));
    };
    tracing::warn!("the image {wanted} is not to be had, the prebaked {prebaked} is used instead: {error}");
    Ok((prebaked, found))
}

/// What of this machine the container's specification depends on.
pub fn this_machine() -> Machine {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total_kib = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Machine {
        memory_mib: total_kib.unwrap_or(0) / 1024,
        has_journal: Path::new("/run/systemd/journal/socket").exists(),
        image_python_path: None,
    }
}

/// Stops the container, with its grace; an engine that hangs does not keep the agent.
async fn stop_container(settings: &Settings) -> Result<(), String> {
    const MORE_THAN_GRACE: Duration = Duration::from_secs(10);
    let (name, grace) = (&settings.container.name, settings.container.stop_timeout);
    let stop = async {
        let engine = Engine::connect(&settings.docker.socket).await?;
        match engine.find_container(name).await? {
            Some(container) if container.running && container.spec_hash().is_some() => {
                tracing::info!("stopping the container {name}");
                engine.stop(&container.id, grace).await
            }
            _ => Ok(()),
        }
    };
    match tokio::time::timeout(grace + MORE_THAN_GRACE, stop).await {
        // Without an engine there is, as far as can be told, no container.
        Ok(Err(error @ EngineError::Unreachable { .. })) => {
            tracing::warn!("{error}");
            Ok(())
        }
        Ok(stopped) => stopped.map_err(|error| error.to_string()),
        Err(_) => Err(format!("Docker gave no answer within {} s", (grace + MORE_THAN_GRACE).as_secs())),
    }
}

/// How a node's agent ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// With its container.
    Stop,
    /// Alone.
    Leave,
}

/// What a signal asks for.
enum Received {
    /// SIGTERM (systemctl stop) or SIGINT (a terminal).
    End(&'static str),
    /// SIGHUP (systemctl reload).
    Reload,
    /// SIGUSR1 (an upgrade of the package).
    Leave,
}

struct Signals {
    term: Signal,
    interrupt: Signal,
    hangup: Signal,
    leave: Signal,
}

impl Signals {
    fn listen() -> Result<Self, BootError> {
        let listen = |kind| signal(kind).map_err(BootError::Signals);
        Ok(Self {
            term: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
            leave: listen(SignalKind::user_defined1())?,
        })
    }

    async fn next(&mut self) -> Received {
        tokio::select! {
            _ = self.term.recv() => Received::End("SIGTERM"),
            _ = self.interrupt.recv() => Received::End("SIGINT"),
            _ = self.hangup.recv() => Received::Reload,
            _ = self.leave.recv() => Received::Leave,
        }
    }

    async fn end(&mut self) -> &'static str {
        loop {
            if let Received::End(name) = self.next().await {
                return name;
            }
        }
    }
}
