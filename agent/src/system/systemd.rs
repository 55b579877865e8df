//! What the service manager hears: READY, STATUS, RELOADING, STOPPING, that the work goes on, and
//! that something takes longer. Nothing where there is none.

use std::cell::Cell;
use std::pin::pin;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// The node runs. Every `status` is one line: a line break in foreign text would begin another
/// assignment.
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

/// The configuration is read again, until [`ready`] is told. With the time, as systemd wants it
/// from 253 on where the unit is Type=notify-reload; 252 leaves it alone.
pub fn reloading() {
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        notify(&[NotifyState::Reloading, now]);
    }
}

/// The service manager's watchdog, where there is one. It is fed by the very loop that works, and
/// only as long as the work that is on its way may take: where the loop stands still, or waits for
/// something that never comes, it is not fed any more.
#[derive(Debug)]
pub struct Watchdog {
    /// How often it is fed: twice in the time that it waits.
    pause: Option<Duration>,
    next: Cell<Instant>,
}

impl Watchdog {
    /// As the service manager wants it.
    pub fn wanted() -> Self {
        Self::with(sd_notify::watchdog_enabled())
    }

    fn with(limit: Option<Duration>) -> Self {
        Self { pause: limit.map(|limit| limit / 2), next: Cell::new(Instant::now()) }
    }

    /// Does `work`, which takes less than `limit`.
    pub async fn guard<T>(&self, limit: Duration, work: impl Future<Output = T>) -> T {
        self.during_by(|| notify(&[NotifyState::Watchdog]), limit, work).await
    }

    async fn during_by<T>(
        &self,
        feed: impl Fn(),
        limit: Duration,
        work: impl Future<Output = T>,
    ) -> T {
        let Some(pause) = self.pause else {
            return work.await;
        };
        let since = Instant::now();
        let mut work = pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = tokio::time::sleep_until(self.next.get()) => {}
            }
            if since.elapsed() >= limit {
                break;
            }
            feed();
            self.next.set(Instant::now() + pause);
        }
        tracing::error!(
            "what takes no more than {} s is not done: the watchdog is not fed any more",
            limit.as_secs()
        );
        work.await
    }
}

fn notify(states: &[NotifyState<'_>]) {
    // A service manager that does not listen changes nothing for the node.
    let _ = sd_notify::notify(states);
}

/// As long as this lives, the service manager's time limit for start and stop is moved on.
#[derive(Debug)]
pub struct TimeoutExtension(JoinHandle<()>);

impl TimeoutExtension {
    /// Begins to ask for more time.
    pub fn begin() -> Self {
        const STEP: Duration = Duration::from_secs(30);
        const MORE: Duration = Duration::from_secs(90);
        Self(tokio::spawn(async {
            let mut ticks = tokio::time::interval(STEP);
            loop {
                ticks.tick().await;
                notify(&[NotifyState::ExtendTimeoutUsec(MORE.as_micros() as u32)]);
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

    const LIMIT: Duration = Duration::from_secs(60);

    /// How often it is fed in an hour, while `work` is done that takes less than `limit`.
    async fn fed_in_an_hour(limit: Duration, work: impl Future<Output = ()>) -> u32 {
        let (watchdog, fed) = (Watchdog::with(Some(LIMIT)), Cell::new(0));
        let work = watchdog.during_by(|| fed.set(fed.get() + 1), limit, work);
        let _ = tokio::time::timeout(Duration::from_secs(3599), work).await;
        fed.get()
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_while_the_work_goes_on_and_only_as_long_as_it_may_take() {
        assert_eq!(fed_in_an_hour(Duration::MAX, std::future::pending()).await, 120);
        assert_eq!(fed_in_an_hour(Duration::from_secs(615), std::future::pending()).await, 21);
        assert_eq!(fed_in_an_hour(LIMIT, async {}).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn many_small_works_feed_it_as_often_as_a_long_one() {
        let (watchdog, fed) = (Watchdog::with(Some(LIMIT)), Cell::new(0));
        for _ in 0..590 {
            let work = tokio::time::sleep(Duration::from_secs(1));
            watchdog.during_by(|| fed.set(fed.get() + 1), LIMIT, work).await;
        }
        assert_eq!(fed.get(), 20);
    }
}
