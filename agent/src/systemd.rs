//! What the service manager hears: READY, STATUS, STOPPING, and that something takes longer. Nothing where there is none.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::JoinHandle;

/// The node runs. Every `status` is one line: a line break in foreign text would begin another assignment.
pub fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// One line for `systemctl status`.
pub fn status(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

/// The agent is on its way out.
pub fn stopping(status: &str) {
    notify(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Feeds the watchdog, where there is one, from the one thread on which everything runs: once that stands still, so does
/// this.
pub fn feed_watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return;
    };
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(limit / 2);
        loop {
            ticks.tick().await;
            notify(&[NotifyState::Watchdog]);
        }
    });
}

fn notify(states: &[NotifyState<'_>]) {
    // A service manager that does not listen changes nothing for the node.
    let _ = sd_notify::notify(states);
}

/// As long as this lives, the service manager's time limit for start and stop is moved on.
#[derive(Debug)]
pub struct LongStep(JoinHandle<()>);

impl LongStep {
    /// Begins to ask for more time.
    pub fn begin() -> Self {
        const STEP: Duration = Duration::from_secs(10);
        const MORE: Duration = Duration::from_secs(60);
        Self(tokio::spawn(async {
            let mut ticks = tokio::time::interval(STEP);
            loop {
                ticks.tick().await;
                notify(&[NotifyState::ExtendTimeoutUsec(MORE.as_micros() as u32)]);
            }
        }))
    }
}

impl Drop for LongStep {
    fn drop(&mut self) {
        self.0.abort();
    }
}
