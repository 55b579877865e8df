//! The `run` command: startup, reload and shutdown of the node.
//!
//! # Startup
//! 1. [`run`] acquires the lock, reads the context and initialises logging.
//! 2. [`DesiredState::new`] validates the context variables.
//! 3. [`preflight_and_discovery`] detects the GPU, prepares its injection, resolves the image and,
//!    at the same time, finds the SuperLink.
//! 4. [`run_node`] removes orphans and starts the supervisor, which adopts or replaces the
//!    container, and the DCGM exporter next to it.
//!
//! # Reload (SIGHUP, `systemctl reload`)
//! 1. [`Signals::next`] returns [`SignalEvent::Reload`] to [`serve_until_signal`]. If the unit
//!    has started, the service manager is notified (`RELOADING=1`).
//! 2. [`DesiredState::reload`] reads agent.toml and the context again and validates both. Meanwhile
//!    the container keeps running, but no watcher event is handled.
//! 3. If nothing has changed, or the new configuration is invalid, the node continues with the old
//!    state. The service manager is notified (`READY=1`) if the node was ready before.
//! 4. Otherwise the old run is stopped: `drop(node)` cancels its supervisor, watchers, discovery,
//!    exporter and metrics endpoint at any point of their execution. A run is stopped in no other
//!    way. The container keeps running.
//! 5. A new run begins with the new state at startup step 3. Its supervisor adopts the container if
//!    the container's specification is unchanged, and replaces it otherwise.
//! 6. The service manager is notified (`READY=1`) once the container runs, or once only the
//!    SuperLink is missing.
//!
//! A node that requests a restart from detection ([`RestartRequested`]) goes through steps 4 to 6
//! with the old state.
//!
//! # Shutdown
//! - SIGTERM, SIGINT: the run is dropped as in step 4, then [`stop_containers`] stops the container
//!   with its grace period. A second signal ends the wait. The last status is published to OneGate.
//! - SIGUSR1 (upgrade of the package): the run is dropped and the container keeps running for the
//!   next agent.
//! - An error: the container keeps running, except if a GPU is required and none is usable.

mod desired_state;
pub mod discovery;
mod error;
mod image;
mod shutdown;
mod signals;
mod startup;

use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use crate::config::settings::Settings;
use crate::config::{self, LogFormat, LogLevel};
use crate::docker::client::{Client, EngineError};
use crate::logging;
use crate::opennebula::onegate::OneGateAccess;
use crate::report::{NodeStatus, Reporter, metrics_server};
use crate::supervisor::exporter::Exporter;
use crate::supervisor::{LaunchError, NodeSpec, RestartRequested};
use crate::system::blocking::run_blocking;
use crate::system::lock::Lock;
use crate::system::systemd::{TimeoutExtension, Watchdog};
pub(crate) use desired_state::DesiredState;
use desired_state::read_context_file;
pub(crate) use discovery::{DiscoveryPreview, preview_superlink};
pub(crate) use error::{DaemonError, EXIT_CONFIG, EXIT_HANDED_OVER, EXIT_RETRY};
use shutdown::{Shutdown, StopError, stop_containers};
use signals::{SignalEvent, Signals};
use startup::preflight_and_discovery;
pub(crate) use startup::{Preflight, StartupOps, preflight};

/// Runs the daemon until a signal or an error ends it. A reload reads `settings_file` again.
pub(crate) async fn run(settings: Settings, settings_file: Option<&Path>) -> ExitCode {
    let state_dir = settings.state.dir.clone();
    let lock = run_blocking(move || Lock::acquire(&state_dir)).await;
    // Only the agent that holds the lock writes the status file.
    let reporter = Rc::new(Reporter::new(lock.is_ok().then_some(settings.state.dir.as_path())));
    let watchdog = Watchdog::from_env();
    let result = match read_context_file(&settings).await {
        Ok(context) => {
            let (level, format) = config::log_settings(&context);
            logging::init(level.into(), format == LogFormat::Json);
            // Before anything can fail, so that the outdated attributes of an earlier boot are
            // overwritten.
            reporter.publish_through(OneGateAccess::new(&context, &settings).ok().as_ref());
            let run = async {
                let desired = DesiredState::new(&context, settings)?;
                let _lock = lock?;
                run_until_shutdown(desired, settings_file, &reporter, &watchdog).await
            };
            run.await
        }
        Err(error) => {
            logging::init(LogLevel::Info.into(), false);
            Err(error.into())
        }
    };
    let error = match result {
        Ok(Shutdown::Stop) => {
            reporter.set_step("Stopped");
            return ExitCode::SUCCESS;
        }
        Ok(Shutdown::HandOver) => {
            reporter.update(|status| {
                status.begin_stop("Handed over; the container keeps running");
            });
            return ExitCode::from(EXIT_HANDED_OVER);
        }
        Err(error) => error,
    };
    error.log();
    reporter.update(|status| status.begin_stop(&error.status_line()));
    reporter.publish_offline().await;
    ExitCode::from(error.exit_code())
}

/// Runs the node until a signal or an error, then stops the container if required.
async fn run_until_shutdown(
    mut desired: DesiredState,
    settings_file: Option<&Path>,
    reporter: &Rc<Reporter>,
    watchdog: &Watchdog,
) -> Result<Shutdown, DaemonError> {
    let mut signals = Signals::listen()?;
    let outcome =
        serve_until_signal(&mut desired, settings_file, &mut signals, reporter, watchdog).await;
    // If a GPU is required and none is usable, a container of an earlier run must not run either.
    let stops_container = matches!(
        outcome,
        Ok(Shutdown::Stop) | Err(DaemonError::Launch(LaunchError::GpuRequired(_)))
    );
    if !stops_container {
        return outcome;
    }
    reporter.update(|status| status.begin_stop("Stopping the container"));
    let _extension = TimeoutExtension::begin();
    let stop = async {
        tokio::select! {
            (stopped, ()) = async {
                tokio::join!(stop_containers(&desired.settings), reporter.publish_offline())
            } => stopped,
            signal = signals.next_stop() => Err(StopError::Interrupted(signal)),
        }
    };
    let stopped = watchdog.guard(Duration::MAX, stop).await;
    let name = desired.settings.container.name;
    match (outcome, stopped) {
        (outcome, Ok(())) => outcome,
        (Ok(_), Err(source)) => Err(DaemonError::Stop { name, source }),
        (Err(error), Err(source)) => {
            tracing::warn!(container = name, "cannot stop container {name}: {source}");
            Err(error)
        }
    }
}

/// Runs the node with the current desired state until a signal ends it; see the module's
/// documentation for the steps of a reload.
async fn serve_until_signal(
    desired: &mut DesiredState,
    settings_file: Option<&Path>,
    signals: &mut Signals,
    reporter: &Rc<Reporter>,
    watchdog: &Watchdog,
) -> Result<Shutdown, DaemonError> {
    loop {
        let mut node = Box::pin(run_with_metrics(desired.clone(), Rc::clone(reporter), watchdog));
        let next = loop {
            tokio::select! {
                outcome = &mut node => {
                    let RestartRequested = outcome?;
                    break ControlFlow::Continue(desired.clone());
                }
                signal = signals.next() => match signal {
                    SignalEvent::Stop(name) => {
                        tracing::info!("received {name}; stopping the container");
                        break ControlFlow::Break(Shutdown::Stop);
                    }
                    SignalEvent::HandOver => {
                        tracing::info!(
                            "received SIGUSR1; exiting without stopping the container"
                        );
                        break ControlFlow::Break(Shutdown::HandOver);
                    }
                    SignalEvent::Reload => {
                        let before = reporter.update(NodeStatus::begin_reload);
                        match (desired.reload(settings_file).await, before) {
                            // The reload ends once the new run is ready.
                            (Some(new), _) => break ControlFlow::Continue(new),
                            (None, Some(before)) => {
                                reporter.update(|status| status.cancel_reload(before));
                            }
                            (None, None) => {}
                        }
                    }
                },
            }
        };
        // Stops the run: dropping the future cancels the supervisor and everything next to it. The
        // container keeps running: the next run adopts or replaces it, or the shutdown stops it.
        drop(node);
        match next {
            ControlFlow::Continue(new) => *desired = new,
            ControlFlow::Break(shutdown) => return Ok(shutdown),
        }
    }
}

/// Runs the node and, if configured, the metrics endpoint.
async fn run_with_metrics(
    desired: DesiredState,
    reporter: Rc<Reporter>,
    watchdog: &Watchdog,
) -> Result<RestartRequested, DaemonError> {
    let Some(address) = desired.settings.metrics.address() else {
        return run_node(desired, reporter, watchdog).await;
    };
    let metrics = Rc::clone(&reporter);
    tokio::select! {
        outcome = run_node(desired, reporter, watchdog) => outcome,
        never = metrics_server::serve(address, || metrics.render_metrics()) => match never {},
    }
}

/// Starts the container and supervises it until the node must restart from detection.
async fn run_node(
    desired: DesiredState,
    reporter: Rc<Reporter>,
    watchdog: &Watchdog,
) -> Result<RestartRequested, DaemonError> {
    let starting = TimeoutExtension::begin();
    reporter.publish_through(desired.onegate.as_ref().ok());
    reporter.update(|status| {
        let DesiredState { config, settings, .. } = &desired;
        status.begin_run(&settings.container.name, &config.version, config.framework);
        status.set_step("Looking for the GPU and the Docker engine");
    });
    // No overall time limit: every step has its own, and discovery may wait for the SuperLink
    // forever.
    let startup = preflight_and_discovery(&desired, &reporter);
    let (preflight, superlink) = watchdog.guard(Duration::MAX, startup).await?;
    let DesiredState { config, settings, onegate } = desired;
    let Preflight { docker, detection, distribution, injection, image, system } = preflight;
    let engine = docker.client;
    remove_orphans(&engine, &settings).await?;
    let exporter = Exporter {
        config: config.clone(),
        settings: settings.clone(),
        injection: injection.clone(),
        system,
        reporter: Rc::clone(&reporter),
    };
    let node = NodeSpec {
        config,
        settings,
        onegate: onegate.ok(),
        superlink,
        image,
        system,
        distribution,
        injection,
        reporter,
    };
    tokio::select! {
        outcome = node.supervise(detection.verdict, engine, starting, watchdog) => Ok(outcome?),
        never = exporter.run() => match never {},
    }
}

/// Removes containers of this node that have another name: a container that was renamed, or that
/// was created before `container.name` changed. An orphan would train next to the node, on the same
/// GPU.
async fn remove_orphans(engine: &Client, settings: &Settings) -> Result<(), EngineError> {
    for name in engine.find_orphans(settings).await? {
        tracing::warn!(
            container = name,
            "found the orphan container {name} of this node; stopping and removing it"
        );
        if let Some(orphan) = engine.inspect_container(&name).await? {
            engine.stop(&orphan.id, settings.container.stop_timeout).await?;
            engine.remove(&orphan).await?;
        }
    }
    Ok(())
}
