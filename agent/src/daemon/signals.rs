//! Signals of the service manager.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::DaemonError;

/// The action that a signal requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SignalEvent {
    /// SIGTERM (`systemctl stop`) or SIGINT (Ctrl-C), with its name.
    Stop(&'static str),
    /// SIGHUP (`systemctl reload`).
    Reload,
    /// SIGUSR1 (upgrade of the package).
    HandOver,
}

/// Receives the signals of the daemon.
pub(super) struct Signals {
    sigterm: Signal,
    sigint: Signal,
    sighup: Signal,
    sigusr1: Signal,
}

impl Signals {
    pub(super) fn listen() -> Result<Self, DaemonError> {
        let listen = |kind| signal(kind).map_err(DaemonError::Signals);
        Ok(Self {
            sigterm: listen(SignalKind::terminate())?,
            sigint: listen(SignalKind::interrupt())?,
            sighup: listen(SignalKind::hangup())?,
            sigusr1: listen(SignalKind::user_defined1())?,
        })
    }

    pub(super) async fn next(&mut self) -> SignalEvent {
        tokio::select! {
            _ = self.sigterm.recv() => SignalEvent::Stop("SIGTERM"),
            _ = self.sigint.recv() => SignalEvent::Stop("SIGINT"),
            _ = self.sighup.recv() => SignalEvent::Reload,
            _ = self.sigusr1.recv() => SignalEvent::HandOver,
        }
    }

    /// Waits for SIGTERM or SIGINT, ignores the others, and returns the signal's name.
    pub(super) async fn next_stop(&mut self) -> &'static str {
        loop {
            if let SignalEvent::Stop(name) = self.next().await {
                return name;
            }
        }
    }
}
