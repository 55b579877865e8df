//! Notifications to the service manager (sd_notify(3)): readiness, status, reload, stop, watchdog
//! and timeout extensions. Without a service manager they have no effect.

use std::cell::Cell;
use std::pin::pin;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Sends READY=1 with a status. A status must be one line: a line break in foreign text would start
/// another assignment.
pub fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Sends a status, which `systemctl status` shows.
pub fn status(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

/// Sends STOPPING=1 with a status.
pub fn stopping(status: &str) {
    notify(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Sends RELOADING=1; [`ready`] ends the reload. MONOTONIC_USEC is for systemd 253 and later, which
/// requires it from a unit of Type=notify-reload; 252 ignores it.
pub fn reloading() {
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        notify(&[NotifyState::Reloading, now]);
    }
}

/// Keep-alive notifications for the service manager's watchdog, if it is enabled.
///
/// They are sent by the task that does the work, and only while an operation is within its time
/// limit. If the task blocks or waits forever, they stop, and the service manager restarts the
/// agent.
#[derive(Debug)]
pub struct Watchdog {
    /// Time between two notifications, half the watchdog's timeout; `None` if it is disabled.
    interval: Option<Duration>,
    next: Cell<Instant>,
}

impl Watchdog {
    /// Reads the watchdog's timeout from the environment (WATCHDOG_USEC, WATCHDOG_PID).
    pub fn from_env() -> Self {
        Self::with(sd_notify::watchdog_enabled())
    }

    fn with(timeout: Option<Duration>) -> Self {
        Self { interval: timeout.map(|timeout| timeout / 2), next: Cell::new(Instant::now()) }
    }

    /// Awaits `operation` and notifies the watchdog meanwhile, for at most `limit`.
    pub async fn guard<T>(&self, limit: Duration, operation: impl Future<Output = T>) -> T {
        self.guard_with(|| notify(&[NotifyState::Watchdog]), limit, operation).await
    }

    async fn guard_with<T>(
        &self,
        keep_alive: impl Fn(),
        limit: Duration,
        operation: impl Future<Output = T>,
    ) -> T {
        let Some(interval) = self.interval else {
            return operation.await;
        };
        let started = Instant::now();
        let mut operation = pin!(operation);
        loop {
            tokio::select! {
                biased;
                result = &mut operation => return result,
                () = tokio::time::sleep_until(self.next.get()) => {}
            }
            if started.elapsed() >= limit {
                break;
            }
            keep_alive();
            self.next.set(Instant::now() + interval);
        }
        tracing::error!(
            "operation exceeded its limit of {} s; stopping watchdog notifications, after which \
             systemd restarts the agent",
            limit.as_secs()
        );
        operation.await
    }
}

fn notify(states: &[NotifyState<'_>]) {
    // Errors are ignored: the node also runs without a service manager.
    let _ = sd_notify::notify(states);
}

/// Extends the service manager's timeout for start and stop until it is dropped.
#[derive(Debug)]
pub struct TimeoutExtension(JoinHandle<()>);

impl TimeoutExtension {
    /// Sends EXTEND_TIMEOUT_USEC at once and then regularly.
    pub fn begin() -> Self {
        const INTERVAL: Duration = Duration::from_secs(30);
        const EXTENSION: Duration = Duration::from_secs(90);
        Self(tokio::spawn(async {
            let mut ticks = tokio::time::interval(INTERVAL);
            loop {
                ticks.tick().await;
                notify(&[NotifyState::ExtendTimeoutUsec(EXTENSION.as_micros() as u32)]);
            }
        }))
    }
}

impl Drop for TimeoutExtension {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(60);

    /// Counts the notifications within an hour, during an operation with this limit.
    async fn notifications(limit: Duration, operation: impl Future<Output = ()>) -> u32 {
        let (watchdog, count) = (Watchdog::with(Some(TIMEOUT)), Cell::new(0));
        let guarded = watchdog.guard_with(|| count.set(count.get() + 1), limit, operation);
        let _ = tokio::time::timeout(Duration::from_secs(3599), guarded).await;
        count.get()
    }

    #[tokio::test(start_paused = true)]
    async fn notifications_stop_when_an_operation_exceeds_its_limit() {
        assert_eq!(notifications(Duration::MAX, std::future::pending()).await, 120);
        assert_eq!(notifications(Duration::from_secs(615), std::future::pending()).await, 21);
        assert_eq!(notifications(TIMEOUT, async {}).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn short_operations_share_one_notification_interval() {
        let (watchdog, count) = (Watchdog::with(Some(TIMEOUT)), Cell::new(0));
        for _ in 0..590 {
            let operation = tokio::time::sleep(Duration::from_secs(1));
            watchdog.guard_with(|| count.set(count.get() + 1), TIMEOUT, operation).await;
        }
        assert_eq!(count.get(), 20);
    }
}
