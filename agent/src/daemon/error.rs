//! Errors and exit codes of the daemon.

use one_context::source::SourceError;

use super::image::ImageError;
use super::shutdown::StopError;
use crate::config::ConfigErrors;
use crate::config::settings::SettingsError;
use crate::docker::client::EngineError;
use crate::logging::error_chain;
use crate::opennebula::superlink::SuperLinkError;
use crate::supervisor::LaunchError;
use crate::system::lock::LockError;

/// Exit code: failure that a retry may fix.
pub(crate) const EXIT_RETRY: u8 = 1;
/// Exit code: handed over to the next agent, the container keeps running (sysexits.h, EX_TEMPFAIL).
pub(crate) const EXIT_HANDED_OVER: u8 = 75;
/// Exit code: invalid configuration (sysexits.h, EX_CONFIG). systemd does not restart the unit.
pub(crate) const EXIT_CONFIG: u8 = 78;

/// Why the daemon exits with an error.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    /// The context cannot be read.
    #[error(transparent)]
    Context(#[from] SourceError),
    /// agent.toml is invalid.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// Context variables are invalid.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// There is no SuperLink to connect to.
    #[error(transparent)]
    SuperLink(#[from] SuperLinkError),
    /// The Docker engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The container cannot be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// No framework image is available.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Another agent runs, or the lock cannot be acquired.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The container may still run.
    #[error("cannot stop container {name}")]
    Stop { name: String, source: StopError },
    /// The signal handlers cannot be installed.
    #[error("cannot listen for signals")]
    Signals(#[source] std::io::Error),
}

impl DaemonError {
    /// Returns [`EXIT_CONFIG`] if only the operator can fix the error, else [`EXIT_RETRY`].
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Context(error) if error.is_invalid() => EXIT_CONFIG,
            Self::Settings(_) | Self::Config(_) => EXIT_CONFIG,
            Self::SuperLink(error) if error.is_final() => EXIT_CONFIG,
            Self::Launch(LaunchError::GpuRequired(_)) => EXIT_CONFIG,
            _ => EXIT_RETRY,
        }
    }

    /// Logs the error: one entry for each invalid variable.
    pub(super) fn log(&self) {
        match self {
            Self::Config(errors) => errors.lines().for_each(|line| tracing::error!("{line}")),
            error => tracing::error!("{}", error_chain(error)),
        }
    }

    /// Returns the status line of the failed daemon.
    pub(super) fn status_line(&self) -> String {
        match self {
            Self::Config(errors) => {
                format!("Invalid configuration: {}", errors.lines().collect::<Vec<_>>().join("; "))
            }
            error => format!("Failed: {}", error_chain(error)),
        }
    }
}
