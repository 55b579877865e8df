//! The story of `run`, from the context to the supervised container.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use one_context::Context;
use one_context::source::{SourceError, read_context};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::values::ImageRef;
use crate::config::{self, Config, ConfigErrors, LogLevel, Prebaked, Remarks};
use crate::docker::engine::{Engine, EngineError, Image};
use crate::docker::runtime::{GpuAccess, choose_access, ensure_runtime};
use crate::gpu::detect_gpus;
use crate::gpu::verdict::Verdict;
use crate::journal;
use crate::plan::{self, Machine};
use crate::settings::Settings;
use crate::superlink::{SuperLink, SuperLinkError, static_superlink};
use crate::supervisor::{LaunchError, Node, announce};
use crate::systemd::{self, LongStep};

/// Exit code: a failure that a retry may cure.
pub const EXIT_RETRY: u8 = 1;
/// Exit code: an invalid configuration (sysexits.h, EX_CONFIG); systemd is told not to retry it.
pub const EXIT_CONFIG: u8 = 78;

/// Why the node does not run.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The context.
    #[error(transparent)]
    Context(#[from] SourceError),
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
    /// The lock by which there is one agent.
    #[error("cannot lock {path}")]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Somebody else has it.
    #[error("another supernode-agent runs already: it holds the lock {path}")]
    AnotherRuns {
        /// The file.
        path: PathBuf,
    },
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
    /// 78 where only the operator can mend it, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Context(error) if error.is_invalid() => EXIT_CONFIG,
            Self::Config(_) | Self::SuperLink(_) => EXIT_CONFIG,
            _ => EXIT_RETRY,
        }
    }
}

/// The daemon, from start to end.
pub async fn run(settings: Settings) -> ExitCode {
    let result = match read_context(&settings.context.dir) {
        Ok(context) => {
            let (level, as_json) = config::log_settings(&context);
            journal::init(level, as_json);
            run_until_signal(&context, settings).await
        }
        Err(error) => {
            journal::init(LogLevel::Info, false);
            Err(error.into())
        }
    };
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    let status = log_error(&error);
    systemd::stopping(&status);
    ExitCode::from(error.exit_code())
}

/// One entry for each thing that is wrong; the first line of it for `systemctl status`.
fn log_error(error: &BootError) -> String {
    if let BootError::Config(errors) = error {
        for line in &errors.0 {
            tracing::error!("{line}");
        }
        return format!("Invalid configuration: {}", errors.0.join("; "));
    }
    let text = journal::error_chain(error);
    tracing::error!("{text}");
    format!("Failed: {text}")
}

async fn run_until_signal(context: &Context, settings: Settings) -> Result<(), BootError> {
    let (config, remarks) = configure(context, &settings)?;
    log_remarks(&config, &remarks);
    let superlink = static_superlink(&config)?;
    let mut end = EndSignal::listen()?;
    let _lock = lock(&settings.state.dir)?;
    let grace = settings.container.stop_timeout;
    let (socket, name) = (settings.docker.socket.clone(), settings.container.name.clone());
    let stopping = tokio::select! {
        result = live(config, superlink, settings) => match result {
            // A node that must have a GPU does not go on without: neither does a container of before.
            Err(error @ BootError::Launch(LaunchError::GpuRequired)) => Some(error),
            result => return result,
        },
        name = end.received() => {
            tracing::info!("received {name}");
            None
        }
    };
    systemd::stopping("Stopping the container");
    let _extension = LongStep::begin();
    let stopped = tokio::select! {
        stopped = stop_container(&socket, &name, grace) => stopped,
        name = end.received() => Err(format!("{name} came again and ended the wait for it")),
    };
    match (stopping, stopped) {
        (Some(error), stopped) => {
            if let Err(why) = stopped {
                tracing::warn!("the container {name} could not be stopped: {why}");
            }
            Err(error)
        }
        (None, stopped) => stopped.map_err(|why| BootError::NotStopped { name, why }),
    }
}

/// Sees to it that there is one agent: two would replace each other's container for ever. Held until the process ends.
fn lock(state_dir: &Path) -> Result<File, BootError> {
    let path = state_dir.join("lock");
    let failed = |source| BootError::Lock { path: path.clone(), source };
    std::fs::create_dir_all(state_dir).map_err(failed)?;
    let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(BootError::AnotherRuns { path }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Brings the node up and keeps it up.
async fn live(config: Config, superlink: SuperLink, settings: Settings) -> Result<(), BootError> {
    let starting = LongStep::begin();
    systemd::status("Looking for the GPU and the Docker engine");
    let (engine, detection) = tokio::join!(
        Engine::wait_until_ready(&settings.docker.socket, settings.docker.ready_timeout),
        detect_gpus(&config, &settings.gpu, settings.gpu.wait),
    );
    let verdict = detection.verdict;
    // The GPU's finding comes first: where a GPU is required, an absent engine must not hide that there is none.
    if let Verdict::Cpu { finding: Some(finding) } = &verdict {
        announce(&config, finding)?;
    }
    let engine = engine?;
    let (verdict, access) = make_docker_able(&config, verdict, &engine, &settings).await?;
    let (image, found) = find_image(&config, &engine, &settings.container.name).await?;
    let machine = Machine { image_python_path: found.variable("PYTHONPATH"), ..this_machine() };
    let announced = verdict.finding().map(|finding| finding.reason);
    let mut node = Node { config, settings, superlink, image, machine, access, verdict, refused_hash: None, announced };
    systemd::status("Starting the container");
    let container = node.bring_up(&engine).await?;
    drop(starting);
    systemd::ready(&node.status());
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
    for line in &remarks.unknown {
        tracing::warn!("{line}");
    }
    for line in &remarks.idle {
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
) -> Result<(Verdict, GpuAccess), BootError> {
    let Verdict::Gpu { devices, missing } = &verdict else {
        return Ok((verdict, GpuAccess::Runtime));
    };
    let facts = engine.facts().await?;
    let access = choose_access(settings.gpu.injection, devices, Some(&facts));
    if access == GpuAccess::Runtime
        && let Err(finding) = ensure_runtime(engine, &facts, &settings.docker).await
    {
        announce(config, &finding)?;
        return Ok((Verdict::cpu(finding), access));
    }
    if !missing.is_empty() {
        tracing::warn!("not every GPU is used: {}", missing.join("; "));
    }
    Ok((verdict, access))
}

/// The image that is wanted, else the one that is on the machine since it was built.
async fn find_image(config: &Config, engine: &Engine, container: &str) -> Result<(ImageRef, Image), BootError> {
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
    systemd::status(&format!("Pulling {wanted}"));
    tracing::info!("pulling {wanted}");
    let pulled = engine.pull(&wanted, |step| systemd::status(&format!("Pulling {wanted}: {step}"))).await;
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
async fn stop_container(socket: &Path, name: &str, grace: Duration) -> Result<(), String> {
    const MORE_THAN_GRACE: Duration = Duration::from_secs(10);
    let stop = async {
        let engine = Engine::connect(socket).await?;
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

/// SIGTERM (systemctl stop) and SIGINT (a terminal).
struct EndSignal {
    term: Signal,
    interrupt: Signal,
}

impl EndSignal {
    fn listen() -> Result<Self, BootError> {
        let listen = |kind| signal(kind).map_err(BootError::Signals);
        Ok(Self { term: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn received(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
