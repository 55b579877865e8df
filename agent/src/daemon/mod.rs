//! The story of `run`, from the context to the supervised container.

pub mod discovery;

use std::path::Path;
use std::pin::pin;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use one_context::Context;
use one_context::source::{SourceError, read_context};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::settings::{Settings, SettingsError};
use crate::config::{self, Config, ConfigErrors, Diagnostics, LogLevel, Prebaked};
use crate::container::image::{FrameworkImage, flower_version, prebaked_image, wanted_image};
use crate::docker::client::{Client, EngineError, EngineInfo, Image};
use crate::docker::nvidia_runtime::{GpuInjection, choose_access, ensure_runtime};
use crate::flower::release;
use crate::gpu::detect_gpus;
use crate::gpu::verdict::Verdict;
use crate::logging;
use crate::opennebula::onegate::{OneGateAvailability, OneGateUnavailable};
use crate::opennebula::publisher::OneGateAccess;
use crate::opennebula::superlink::{self, SuperLinkError};
use crate::report::Reporter;
use crate::report::metrics_server;
use crate::supervisor::exporter::{self, Exporter};
use crate::supervisor::{LaunchError, NodeSpec, RestartRequested, report_fallback};
use crate::system::info::SystemInfo;
use crate::system::lock::{Lock, LockError};
use crate::system::os_release::Distribution;
use crate::system::systemd::{TimeoutExtension, Watchdog};
use crate::values::{ImageRef, Version};
use discovery::discover_superlink;

/// Exit code: a failure that a retry may cure.
pub const EXIT_RETRY: u8 = 1;
/// Exit code: the agent was asked to leave the container to the next one (sysexits.h, EX_TEMPFAIL).
pub const EXIT_HANDED_OVER: u8 = 75;
/// Exit code: an invalid configuration (sysexits.h, EX_CONFIG); systemd is told not to retry it.
pub const EXIT_CONFIG: u8 = 78;

/// Why the node does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
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
    Client(#[from] EngineError),
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
    /// 78 where only the operator can mend it, a machine without the GPU that it must have among
    /// that, else 1.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Context(error) if error.is_invalid() => EXIT_CONFIG,
            Self::Settings(_) | Self::Config(_) => EXIT_CONFIG,
            Self::SuperLink(error) if error.is_final() => EXIT_CONFIG,
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
    let watchdog = Watchdog::wanted();
    let result = match read_context(&settings.context.dir) {
        Ok(context) => {
            let (level, as_json) = config::log_settings(&context);
            logging::init(level, as_json);
            // Before anything can fail: what an earlier boot has published is not true any more.
            reporter.publish_by(OneGateAccess::of(&context, &settings).ok().as_ref());
            run_until_signal(&context, settings, settings_file, lock, &reporter, &watchdog).await
        }
        Err(error) => {
            logging::init(LogLevel::Info, false);
            Err(error.into())
        }
    };
    let error = match result {
        Ok(Shutdown::Stop) => {
            reporter.doing("Stopped");
            return ExitCode::SUCCESS;
        }
        Ok(Shutdown::HandOver) => {
            reporter.stopping("Left; the container runs on for the next agent");
            return ExitCode::from(EXIT_HANDED_OVER);
        }
        Err(error) => error,
    };
    log_error(&error);
    reporter.stopping(&failure_line(&error));
    reporter.finish().await;
    ExitCode::from(error.exit_code())
}

/// One entry for each thing that is wrong.
fn log_error(error: &BootError) {
    match error {
        BootError::Config(errors) => errors.0.iter().for_each(|line| tracing::error!("{line}")),
        error => tracing::error!("{}", logging::error_chain(error)),
    }
}

/// The line for `systemctl status`.
fn failure_line(error: &BootError) -> String {
    match error {
        BootError::Config(errors) => format!("Invalid configuration: {}", errors.0.join("; ")),
        error => format!("Failed: {}", logging::error_chain(error)),
    }
}

/// What the operator wants, whole: what a reload compares.
#[derive(Debug, Clone, PartialEq)]
struct DesiredState {
    config: Config,
    settings: Settings,
    /// The way to OneGate, or why there is none.
    cloud: Result<OneGateAccess, OneGateUnavailable>,
}

impl DesiredState {
    fn read(context: &Context, settings: Settings) -> Result<Self, BootError> {
        let (config, remarks) = configure(context, &settings)?;
        log_remarks(&remarks);
        let cloud = OneGateAccess::of(context, &settings);
        superlink::check_config(gate_of(&cloud), &config, SystemTime::now())?;
        Ok(Self { config, settings, cloud })
    }

    /// Reads everything again. `None` where nothing has changed, or what is there now cannot be
    /// used.
    fn reload(&self, settings_file: Option<&Path>) -> Option<Self> {
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
                tracing::error!(
                    "reload: the new configuration cannot be used, the node goes on with the old one"
                );
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
    watchdog: &Watchdog,
) -> Result<Shutdown, BootError> {
    let mut desired = DesiredState::read(context, settings)?;
    let _lock = lock?;
    let mut signals = Signals::listen()?;
    let outcome =
        serve_until_signal(&mut desired, settings_file, &mut signals, reporter, watchdog).await;
    // A node that must have a GPU does not go on without: neither does a container of before.
    let stops =
        matches!(outcome, Ok(Shutdown::Stop) | Err(BootError::Launch(LaunchError::GpuRequired)));
    if !stops {
        return outcome;
    }
    reporter.stopping("Stopping the container");
    let _extension = TimeoutExtension::begin();
    let stop = async {
        tokio::select! {
            ended = async { tokio::join!(stop_containers(&desired.settings), reporter.finish()) } => ended,
            name = signals.end() => (Err(format!("{name} came again and ended the wait for it")), ()),
        }
    };
    let (stopped, ()) = watchdog.guard(Duration::MAX, stop).await;
    let name = desired.settings.container.name;
    match (outcome, stopped) {
        (outcome, Ok(())) => outcome,
        (Ok(_), Err(why)) => Err(BootError::NotStopped { name, why }),
        (Err(error), Err(why)) => {
            tracing::warn!("the container {name} could not be stopped: {why}");
            Err(error)
        }
    }
}

/// Keeps the node up, as the operator wants it by now, until a signal ends it.
async fn serve_until_signal(
    desired: &mut DesiredState,
    settings_file: Option<&Path>,
    signals: &mut Signals,
    reporter: &Rc<Reporter>,
    watchdog: &Watchdog,
) -> Result<Shutdown, BootError> {
    loop {
        let mut life = pin!(run_with_metrics(desired.clone(), Rc::clone(reporter), watchdog));
        let new = loop {
            tokio::select! {
                outcome = &mut life => {
                    let RestartRequested = outcome?;
                    break desired.clone();
                }
                signal = signals.next() => match signal {
                    SignalEvent::Stop(name) => {
                        tracing::info!("received {name}");
                        return Ok(Shutdown::Stop);
                    }
                    SignalEvent::HandOver => {
                        tracing::info!("received SIGUSR1: the container is left to the next agent");
                        return Ok(Shutdown::HandOver);
                    }
                    SignalEvent::Reload => {
                        let was_ready = reporter.reloading();
                        match desired.reload(settings_file) {
                            // It is ready once that runs.
                            Some(new) => break new,
                            None if was_ready => reporter.ready_as_before(),
                            None => {}
                        }
                    }
                },
            }
        };
        *desired = new;
    }
}

fn gate_of(cloud: &Result<OneGateAccess, OneGateUnavailable>) -> OneGateAvailability<'_> {
    cloud.as_ref().map(OneGateAccess::gate)
}

/// The node's life, with the page of its metrics beside it.
async fn run_with_metrics(
    desired: DesiredState,
    reporter: Rc<Reporter>,
    watchdog: &Watchdog,
) -> Result<RestartRequested, BootError> {
    let Some(address) = desired.settings.metrics.address() else {
        return run_node(desired, reporter, watchdog).await;
    };
    let page = Rc::clone(&reporter);
    tokio::select! {
        outcome = run_node(desired, reporter, watchdog) => outcome,
        never = metrics_server::serve(address, || page.page()) => match never {},
    }
}

/// Brings the node up and keeps it up, until something new asks for the story from its beginning.
async fn run_node(
    desired: DesiredState,
    reporter: Rc<Reporter>,
    watchdog: &Watchdog,
) -> Result<RestartRequested, BootError> {
    let DesiredState { config, settings, cloud } = desired;
    let starting = TimeoutExtension::begin();
    reporter.publish_by(cloud.as_ref().ok());
    reporter.connected(false);
    reporter.news(|news| {
        (news.version, news.framework) = (config.version.to_string(), config.framework.to_string())
    });
    reporter.doing("Looking for the GPU and the Docker engine");
    let find = async {
        // The SuperLink is looked for meanwhile. It may come last by hours, which is no reason to
        // keep the machine's boot.
        let mut preparing = pin!(preflight(&config, &settings, &reporter));
        let mut searching = pin!(discover_superlink(&config, &settings, &cloud, &reporter));
        let mut early = None;
        let prepared = loop {
            tokio::select! {
                prepared = &mut preparing => break prepared?,
                found = &mut searching, if early.is_none() => early = Some(found?),
            }
        };
        let superlink = match early {
            Some(superlink) => superlink,
            None => {
                reporter.rest_is_ready();
                searching.await?
            }
        };
        reporter.waited();
        Ok::<_, BootError>((prepared, superlink))
    };
    // For as long as it takes: each of its steps has a limit of its own, but a SuperLink may be
    // waited for without end.
    let (prepared, superlink) = watchdog.guard(Duration::MAX, find).await?;
    let Preflight { engine, distribution, verdict, access, image } = prepared;
    warn_of_release(&config, &image.reference, superlink.version.as_ref());
    let system = SystemInfo::read();
    reporter.doing("Starting the container");
    let exporter = Exporter {
        config: config.clone(),
        settings: settings.clone(),
        access: access.clone(),
        system,
        reporter: Rc::clone(&reporter),
    };
    remove_orphans(&engine, &settings).await?;
    let cloud = cloud.ok();
    let node = NodeSpec {
        config,
        settings,
        onegate: cloud,
        superlink,
        image,
        system,
        distribution,
        injection: access,
        reporter,
    };
    tokio::select! {
        outcome = node.supervise(verdict, engine, starting, watchdog) => Ok(outcome?),
        never = exporter.keep() => match never {},
    }
}

/// What the container needs beside the SuperLink.
struct Preflight {
    engine: Client,
    distribution: Distribution,
    verdict: Verdict,
    access: GpuInjection,
    image: FrameworkImage,
}

async fn preflight(
    config: &Config,
    settings: &Settings,
    reporter: &Reporter,
) -> Result<Preflight, BootError> {
    let (engine, detection) = tokio::join!(
        reach_docker(config.gpu_enabled, settings),
        detect_gpus(config, settings, settings.gpu.wait),
    );
    let verdict = detection.verdict;
    let distribution = Distribution::read(&settings.machine.root);
    // The GPU's finding comes first: where a GPU is required, an absent engine must not hide that
    // there is none.
    if let Some(finding) = verdict.finding() {
        report_fallback(config, finding, distribution)?;
    }
    let (engine, facts) = engine?;
    let (verdict, access) =
        prepare_gpu_access(config, verdict, &engine, facts, settings, distribution).await?;
    let (reference, found) =
        resolve_image(config, &engine, &settings.container.name, reporter).await?;
    let image = FrameworkImage { reference, python_path: found.variable("PYTHONPATH") };
    Ok(Preflight { engine, distribution, verdict, access, image })
}

/// The engine, and where a GPU is wanted what it says of itself: that takes Docker 10 ms, while
/// NVML is asked.
async fn reach_docker(
    wants_gpu: bool,
    settings: &Settings,
) -> Result<(Client, Option<Result<EngineInfo, EngineError>>), EngineError> {
    let engine =
        Client::wait_until_ready(&settings.docker.socket, settings.docker.ready_timeout).await?;
    let facts = if wants_gpu { Some(engine.info().await) } else { None };
    Ok((engine, facts))
}

/// A release that the agent does not know, or that differs from the SuperLink's, is told before the
/// launch. That of an operator's own image is not known.
fn warn_of_release(config: &Config, image: &ImageRef, superlink: Option<&Version>) {
    if config.image.is_some() {
        return;
    }
    let version = flower_version(config, image);
    let other = superlink.and_then(|superlink| release::compatibility(version, superlink));
    for warning in release::too_old(version).into_iter().chain(other) {
        tracing::warn!("{warning}");
    }
}

/// Reads and checks every variable.
///
/// # Errors
/// All that is wrong.
pub fn configure(
    context: &Context,
    settings: &Settings,
) -> Result<(Config, Diagnostics), ConfigErrors> {
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

fn log_remarks(remarks: &Diagnostics) {
    for line in remarks.warnings() {
        tracing::warn!("{line}");
    }
    for line in remarks.idle.iter().chain(&remarks.notes) {
        tracing::info!("{line}");
    }
}

/// Chooses the way for the GPU and prepares it; a way that is barred makes the verdict CPU.
async fn prepare_gpu_access(
    config: &Config,
    verdict: Verdict,
    engine: &Client,
    facts: Option<Result<EngineInfo, EngineError>>,
    settings: &Settings,
    distribution: Distribution,
) -> Result<(Verdict, GpuInjection), BootError> {
    let (Verdict::Gpu { devices, missing }, Some(facts)) = (&verdict, facts) else {
        return Ok((verdict, GpuInjection::Runtime));
    };
    let facts = facts?;
    let access = choose_access(settings.gpu.injection, devices, Some(&facts));
    if access == GpuInjection::Runtime
        && let Err(finding) = ensure_runtime(engine, &facts, &settings.docker).await
    {
        report_fallback(config, &finding, distribution)?;
        return Ok((Verdict::cpu(finding), access));
    }
    if !missing.is_empty() {
        tracing::warn!("not every GPU is used: {}", missing.join("; "));
    }
    Ok((verdict, access))
}

/// The image that is wanted, else the one that is on the machine since it was built.
async fn resolve_image(
    config: &Config,
    engine: &Client,
    container: &str,
    reporter: &Reporter,
) -> Result<(ImageRef, Image), BootError> {
    let wanted = wanted_image(config);
    if let Some(found) = engine.find_image(wanted.as_str()).await? {
        return Ok((wanted, found));
    }
    // The name was taken off the image, and a container that was made from it goes on.
    if let Some(running) = engine.inspect_container(container).await?.filter(|found| found.running)
        && running.image == wanted.as_str()
        && let Some(found) = engine.find_image(&running.image_id).await?
    {
        return Ok((wanted, found));
    }
    reporter.doing(&format!("Pulling {wanted}"));
    tracing::info!("pulling {wanted}");
    let pulled =
        engine.pull(&wanted, |step| reporter.progress(&format!("Pulling {wanted}: {step}"))).await;
    let error = match pulled {
        Ok(()) => match engine.find_image(wanted.as_str()).await? {
            Some(found) => return Ok((wanted, found)),
            None => "it was pulled and is not there".to_owned(),
        },
        Err(error) => error.to_string(),
    };
    let Some(prebaked) = prebaked_image(config).filter(|prebaked| *prebaked != wanted) else {
        return Err(BootError::Image(format!("the image {wanted} is not to be had: {error}")));
    };
    let Some(found) = engine.find_image(prebaked.as_str()).await? else {
        return Err(BootError::Image(format!(
            "neither the image {wanted} nor the prebaked {prebaked} is to be had: {error}"
        )));
    };
    tracing::warn!(
        "the image {wanted} is not to be had, the prebaked {prebaked} is used instead: {error}"
    );
    Ok((prebaked, found))
}

/// Takes away what runs of ours under another name, because somebody gave it one or
/// `container.name` was changed: it would train beside the node, on the same GPU.
async fn remove_orphans(engine: &Client, settings: &Settings) -> Result<(), EngineError> {
    for name in engine.find_orphans(settings).await? {
        tracing::warn!(
            "the container {name} is this node's, under another name: it is stopped and removed"
        );
        if let Some(stray) = engine.inspect_container(&name).await? {
            engine.stop(&stray.id, settings.container.stop_timeout).await?;
            engine.remove(&stray).await?;
        }
    }
    Ok(())
}

/// Stops the container, with its grace, and the DCGM exporter; an engine that hangs does not keep
/// the agent.
async fn stop_containers(settings: &Settings) -> Result<(), String> {
    const MORE_THAN_GRACE: Duration = Duration::from_secs(10);
    let (name, grace) = (&settings.container.name, settings.container.stop_timeout);
    let exporter = exporter::name_of(settings);
    let stop = async {
        let engine = Client::connect(&settings.docker.socket).await?;
        let (node, exporter) = tokio::join!(
            stop_container(&engine, name, grace),
            stop_container(&engine, &exporter, exporter::GRACE)
        );
        if let Err(error) = exporter {
            tracing::warn!("the DCGM exporter could not be stopped: {error}");
        }
        node
    };
    match tokio::time::timeout(grace + MORE_THAN_GRACE, stop).await {
        // Without an engine there is, as far as can be told, no container.
        Ok(Err(error @ EngineError::Unreachable { .. })) => {
            tracing::warn!("{error}");
            Ok(())
        }
        Ok(stopped) => stopped.map_err(|error| error.to_string()),
        Err(_) => {
            Err(format!("Docker gave no answer within {} s", (grace + MORE_THAN_GRACE).as_secs()))
        }
    }
}

/// Stops a container of ours, where it runs.
async fn stop_container(engine: &Client, name: &str, grace: Duration) -> Result<(), EngineError> {
    match engine.inspect_container(name).await? {
        Some(container) if container.running && container.spec_hash().is_some() => {
            tracing::info!("stopping the container {name}");
            engine.stop(&container.id, grace).await
        }
        _ => Ok(()),
    }
}

/// How a node's agent ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shutdown {
    /// With its container.
    Stop,
    /// Alone.
    HandOver,
}

/// What a signal asks for.
enum SignalEvent {
    /// SIGTERM (systemctl stop) or SIGINT (a terminal).
    Stop(&'static str),
    /// SIGHUP (systemctl reload).
    Reload,
    /// SIGUSR1 (an upgrade of the package).
    HandOver,
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

    async fn next(&mut self) -> SignalEvent {
        tokio::select! {
            _ = self.term.recv() => SignalEvent::Stop("SIGTERM"),
            _ = self.interrupt.recv() => SignalEvent::Stop("SIGINT"),
            _ = self.hangup.recv() => SignalEvent::Reload,
            _ = self.leave.recv() => SignalEvent::HandOver,
        }
    }

    async fn end(&mut self) -> &'static str {
        loop {
            if let SignalEvent::Stop(name) = self.next().await {
                return name;
            }
        }
    }
}
