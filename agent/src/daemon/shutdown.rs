//! Shutdown: stops the framework container and the DCGM exporter.

use std::time::Duration;

use crate::config::settings::Settings;
use crate::docker::client::{Client, EngineError};
use crate::supervisor::exporter;

/// How the daemon exits without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shutdown {
    /// The container is stopped (SIGTERM, SIGINT).
    Stop,
    /// The container keeps running; the next agent adopts it (SIGUSR1).
    HandOver,
}

/// Why the container may still run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StopError {
    /// Docker refused a call.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Docker did not answer.
    #[error("no response from Docker within {} s", .0.as_secs())]
    Timeout(Duration),
    /// Another SIGTERM or SIGINT ended the wait.
    #[error("interrupted by another {0}")]
    Interrupted(&'static str),
}

/// Stops the framework container, with its grace period, and the DCGM exporter.
///
/// # Errors
/// If the framework container may still run.
pub(super) async fn stop_containers(settings: &Settings) -> Result<(), StopError> {
    /// Time for the calls around the grace period.
    const CALLS: Duration = Duration::from_secs(10);
    let (name, grace) = (&settings.container.name, settings.container.stop_timeout);
    let exporter = exporter::container_name(settings);
    let stop = async {
        let engine = Client::connect(&settings.docker.socket).await?;
        let (node, exporter) = tokio::join!(
            stop_container(&engine, name, grace),
            stop_container(&engine, &exporter, exporter::STOP_TIMEOUT)
        );
        if let Err(error) = exporter {
            tracing::warn!("cannot stop the DCGM exporter: {error}");
        }
        node
    };
    let limit = grace + CALLS;
    match tokio::time::timeout(limit, stop).await {
        // No container that the agent could stop: the engine is not running.
        Ok(Err(error @ EngineError::Unreachable { .. })) => {
            tracing::warn!("{error}");
            Ok(())
        }
        Ok(result) => Ok(result?),
        Err(_) => Err(StopError::Timeout(limit)),
    }
}

/// Stops a running container that the agent created.
async fn stop_container(engine: &Client, name: &str, grace: Duration) -> Result<(), EngineError> {
    match engine.inspect_container(name).await? {
        Some(container) if container.running && container.spec_hash().is_some() => {
            tracing::info!(container = name, "stopping container {name}");
            engine.stop(&container.id, grace).await
        }
        _ => Ok(()),
    }
}
