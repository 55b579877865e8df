//! Watchers: the sources of the events that the supervisor waits for while the container runs.
//!
//! [`ContainerWatchers`] belong to one run of the container:
//!
//! - its exit (`docker wait`);
//! - the connection to the SuperLink, from Flower's log or, if the log does not report it, from the
//!   container's TCP connections;
//! - being paused and unpaused (`docker events`);
//! - the GPUs in the container ([`super::gpu_presence`]).
//!
//! The others belong to the supervisor and outlive a run of the container:
//!
//! - failures of the GPUs in use ([`GpuMonitor`](super::gpu_monitor::GpuMonitor));
//! - Flower's health ([`Liveness`](crate::flower::liveness::Liveness));
//! - the SuperLink of the service ([`SuperLinkWatcher`]);
//! - a GPU that becomes available
//!   ([`wait_until_available`](crate::gpu::wait_until_available)).
//!
//! Each watcher keeps its deadlines, its backoff and its call in progress across events: an event
//! of one watcher never restarts another. Otherwise a connection that flaps every second would hide
//! a lost GPU, because no other watcher would ever reach its next deadline.
//!
//! No watcher spawns a task. Dropping a watcher cancels it and its call in progress. The
//! [`ContainerWatchers`] are dropped when the supervisor executes any command except `Monitor`, the
//! others together with the supervisor.

use std::time::{Duration, SystemTime};

use futures_util::future::LocalBoxFuture;
use futures_util::stream::{self, LocalBoxStream, SelectAll};
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use crate::backoff::Backoff;
use crate::config::Config;
use crate::docker::client::{Client, Container};
use crate::flower::connection::{Connection, ConnectionMonitor, wait_for_tcp_connection};
use crate::flower::liveness::LivenessFailure;
use crate::gpu::reason::Finding;
use crate::gpu::verdict::GpuDevice;
use crate::logging::error_chain;
use crate::opennebula::onegate::OneGateAccess;
use crate::opennebula::superlink::{Discovery, SuperLink, find_superlink};
use crate::supervisor::gpu_presence;

/// An event that a watcher reports.
pub(super) enum WatchEvent {
    /// The container exited with this code; `None` if the container is gone or the engine does not
    /// answer.
    Exited(Option<i64>),
    /// A GPU in use failed.
    GpuFailed(Finding),
    /// The container no longer has a GPU that the VM still has.
    GpuLost(Finding),
    /// The node runs on the CPU, and a GPU became available.
    GpuAvailable,
    /// Flower logged a change of its connection to the SuperLink.
    Connection(Connection),
    /// The container opened its first TCP connection to the SuperLink's port, or closed its last.
    TcpConnected(bool),
    /// The container was paused or unpaused.
    Paused(bool),
    /// Flower does not answer its health checks.
    Unresponsive(LivenessFailure),
    /// The service has another SuperLink, or its SuperLink another CA.
    SuperLinkChanged(Box<Discovery>),
}

/// One run of the container: from one start to the next.
pub(super) struct ContainerRun {
    id: String,
    started_at: String,
    pub(super) monitored_since: Instant,
    /// The connection to the SuperLink according to Flower's log.
    pub(super) connection: Connection,
    /// Whether the container has a TCP connection to the SuperLink's port. Used if Flower's log
    /// does not report the connection.
    pub(super) tcp_connected: bool,
    pub(super) paused: bool,
    /// Kept across consecutive `Command::Monitor`s. Any other command drops the watchers.
    pub(super) watchers: Option<ContainerWatchers>,
}

impl ContainerRun {
    pub(super) fn new(container: &Container) -> Self {
        Self {
            id: container.id.clone(),
            started_at: container.started_at.clone(),
            monitored_since: Instant::now(),
            connection: Connection::default(),
            tcp_connected: false,
            paused: container.paused,
            watchers: None,
        }
    }

    pub(super) fn matches_container(&self, container: &Container) -> bool {
        self.id == container.id && self.started_at == container.started_at
    }
}

/// The container to watch, with its current state.
pub(super) struct WatchedContainer<'a> {
    pub(super) container: &'a Container,
    /// Whether the container is paused now.
    pub(super) paused: bool,
    /// The SuperLink's port and whether the container has a connection to it now; `None` if
    /// Flower's log reports the connection.
    pub(super) tcp: Option<(u16, bool)>,
    /// The GPUs that the container uses.
    pub(super) devices: &'a [GpuDevice],
    /// Whether the NVIDIA runtime hook injected the GPUs.
    pub(super) injected_by_hook: bool,
}

/// The watchers of one run of the container. Dropping this value cancels them.
pub(super) struct ContainerWatchers(SelectAll<LocalBoxStream<'static, WatchEvent>>);

impl ContainerWatchers {
    pub(super) fn new(engine: &Client, watched: &WatchedContainer<'_>) -> Self {
        let WatchedContainer { container, tcp, devices, injected_by_hook, .. } = *watched;
        let exit = {
            let (engine, id) = (engine.clone(), container.id.clone());
            stream::once(async move { WatchEvent::Exited(engine.wait_for_exit(&id).await) })
        };
        let connection = {
            let log = ConnectionMonitor::new(engine.log(container));
            stream::unfold(log, async |mut log| {
                Some((WatchEvent::Connection(log.next_change().await), log))
            })
        };
        let paused = {
            let (engine, id) = (engine.clone(), container.id.clone());
            changes(watched.paused, async move |wanted| engine.wait_for_paused(&id, wanted).await)
                .map(WatchEvent::Paused)
        };
        let mut watchers = SelectAll::from_iter([
            exit.boxed_local(),
            connection.boxed_local(),
            paused.boxed_local(),
        ]);
        if let Some((port, connected)) = tcp {
            let container = container.clone();
            let tcp = changes(connected, async move |wanted| {
                wait_for_tcp_connection(&container, port, wanted).await;
            });
            watchers.push(tcp.map(WatchEvent::TcpConnected).boxed_local());
        }
        if !devices.is_empty() {
            let (container, devices) = (container.clone(), devices.to_vec());
            let presence = async move {
                WatchEvent::GpuLost(
                    gpu_presence::wait_until_lost(&container, &devices, injected_by_hook).await,
                )
            };
            watchers.push(stream::once(presence).boxed_local());
        }
        Self(watchers)
    }

    /// Returns the next event. Cancel safe: no watcher loses its progress.
    pub(super) async fn next(&mut self) -> WatchEvent {
        match self.0.next().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}

/// Returns the changes of a flag whose value is `current` now. `wait_for` completes once the flag
/// has the given value.
fn changes(current: bool, wait_for: impl AsyncFn(bool) + 'static) -> impl Stream<Item = bool> {
    stream::unfold((current, wait_for), async |(current, wait_for)| {
        wait_for(!current).await;
        Some((!current, (!current, wait_for)))
    })
}

/// Queries OneGate for another SuperLink of the service while the node is not connected to the
/// known one.
///
/// The schedule of the requests starts when the connection is lost and continues while the
/// connection flaps. A connection that lasts for [`STABLE_AFTER`] resets it.
pub(super) struct SuperLinkWatcher {
    connected: watch::Sender<bool>,
    changed: LocalBoxFuture<'static, Discovery>,
}

/// Minimum delay before a request: Flower itself may reconnect.
const MIN_DELAY: Duration = Duration::from_secs(60);
/// A connection that lasts for this long is stable.
const STABLE_AFTER: Duration = Duration::from_secs(60);

impl SuperLinkWatcher {
    /// Watches for a SuperLink other than `known`. Reports nothing if `known` was not discovered
    /// through OneGate.
    pub(super) fn new(config: &Config, onegate: Option<&OneGateAccess>, known: &SuperLink) -> Self {
        let Some(onegate) = onegate.filter(|_| known.vm_id.is_some()).cloned() else {
            let changed = std::future::pending().boxed_local();
            return Self { connected: watch::Sender::new(false), changed };
        };
        let max_delay = config.edge_max_backoff;
        let (config, known) = (config.clone(), known.clone());
        Self::with(max_delay, async move || {
            match find_superlink(Ok(onegate.client()), &config, SystemTime::now()).await {
                Ok(found) => {
                    let SuperLink { address, ca, .. } = &found.superlink;
                    (*address != known.address || *ca != known.ca).then_some(found)
                }
                Err(error) => {
                    tracing::debug!(
                        "cannot check whether the service has another SuperLink: {}",
                        error_chain(&error)
                    );
                    None
                }
            }
        })
    }

    fn with(
        max_delay: Duration,
        find_changed: impl AsyncFn() -> Option<Discovery> + 'static,
    ) -> Self {
        let (connected, receiver) = watch::channel(false);
        let changed = until_changed(max_delay, find_changed, receiver).fuse().boxed_local();
        Self { connected, changed }
    }

    /// Records whether the node is connected to its SuperLink.
    pub(super) fn set_connected(&self, connected: bool) {
        self.connected.send_if_modified(|current| {
            let changes = *current != connected;
            *current = connected;
            changes
        });
    }

    /// Waits for another SuperLink. Completes only once; the caller then creates a watcher for the
    /// new SuperLink. Cancel safe.
    pub(super) async fn changed(&mut self) -> Discovery {
        (&mut self.changed).await
    }
}

async fn until_changed(
    max_delay: Duration,
    find_changed: impl AsyncFn() -> Option<Discovery>,
    mut connected: watch::Receiver<bool>,
) -> Discovery {
    // At least MIN_DELAY: 60 s four times, then 80 s, 160 s, ….
    let mut backoff = Backoff::new(Duration::from_secs(5), max_delay);
    loop {
        let delay = backoff.next_delay(0.0).max(MIN_DELAY.min(max_delay));
        let due = Instant::now() + delay.mul_f64(1.0 + fastrand::f64() / 2.0);
        if !is_disconnected_from(due, &mut connected).await {
            backoff.reset();
        } else if let Some(discovery) = find_changed().await
            && is_disconnected_from(Instant::now(), &mut connected).await
        {
            return discovery;
        }
    }
}

/// Waits until the node is not connected, at `due` or later, and returns `true`. Returns `false`
/// after a stable connection was lost: the schedule then restarts.
async fn is_disconnected_from(due: Instant, connected: &mut watch::Receiver<bool>) -> bool {
    loop {
        let is_connected = *connected.borrow_and_update();
        if is_connected {
            let lost = connected.wait_for(|connected| !connected);
            if timeout(STABLE_AFTER, lost).await.is_err() {
                // The sender is dropped together with this future.
                let _ = connected.wait_for(|connected| !connected).await;
                return false;
            }
        } else {
            tokio::select! {
                () = sleep_until(due) => return true,
                _ = connected.wait_for(|connected| *connected) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;
    use crate::values::HostPort;

    const SECOND: Duration = Duration::from_secs(1);

    fn discovery() -> Discovery {
        let superlink = SuperLink {
            address: HostPort::parse("10.9.8.8:9092").unwrap(),
            ca: None,
            vm_id: Some(1),
            version: None,
            partition: None,
        };
        Discovery { superlink, service: None, warnings: Vec::new() }
    }

    /// Polls the watcher for this many seconds. `connected_at` gives the state of the connection in
    /// each second. Returns the second in which the watcher reports.
    async fn run(
        watcher: &mut SuperLinkWatcher,
        seconds: u64,
        connected_at: impl Fn(u64) -> bool,
    ) -> Option<u64> {
        for second in 0..seconds {
            watcher.set_connected(connected_at(second));
            if timeout(SECOND, watcher.changed()).await.is_ok() {
                return Some(second);
            }
        }
        None
    }

    /// Returns a watcher whose service has another SuperLink, and the number of its requests.
    fn moved() -> (SuperLinkWatcher, Rc<Cell<u32>>) {
        let requests = Rc::new(Cell::new(0));
        let count = Rc::clone(&requests);
        let watcher = SuperLinkWatcher::with(Duration::from_secs(300), async move || {
            count.set(count.get() + 1);
            tokio::time::sleep(2 * SECOND).await;
            Some(discovery())
        });
        (watcher, requests)
    }

    #[tokio::test(start_paused = true)]
    async fn flapping_does_not_delay_superlink_change() {
        let (mut watcher, requests) = moved();
        let reported = run(&mut watcher, 600, |second| second % 2 == 0).await.unwrap();
        assert!((60..=93).contains(&reported), "{reported}");
        assert_eq!(requests.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn connected_node_does_not_query_onegate() {
        let (mut watcher, requests) = moved();
        assert_eq!(run(&mut watcher, 3600, |_| true).await, None);
        assert_eq!(requests.get(), 0);
        // The first request follows after a minute, in which Flower may reconnect.
        let reported = run(&mut watcher, 600, |_| false).await.unwrap();
        assert!((60..=91).contains(&reported), "{reported}");
    }

    #[tokio::test(start_paused = true)]
    async fn stable_connection_resets_the_schedule() {
        let (mut watcher, requests) = moved();
        let rarely_lost = |second: u64| second % 100 >= 30;
        assert_eq!(run(&mut watcher, 3600, rarely_lost).await, None);
        assert_eq!(requests.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn superlink_change_is_dropped_after_reconnect() {
        let (mut watcher, requests) = moved();
        // The node reconnects while the request is in progress.
        let reconnected = Rc::clone(&requests);
        assert_eq!(run(&mut watcher, 3600, move |_| reconnected.get() > 0).await, None);
        assert_eq!(requests.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn events_of_one_watcher_do_not_restart_another() {
        let starts = Rc::new(Cell::new(0));
        let count = Rc::clone(&starts);
        let slow = stream::once(async move {
            count.set(count.get() + 1);
            tokio::time::sleep(10 * SECOND).await;
            WatchEvent::Exited(Some(3))
        });
        let flapping = changes(false, async |_| tokio::time::sleep(SECOND).await);
        let mut watchers = ContainerWatchers(SelectAll::from_iter([
            slow.boxed_local(),
            flapping.map(WatchEvent::Paused).boxed_local(),
        ]));
        let since = Instant::now();
        let mut flaps = Vec::new();
        loop {
            match watchers.next().await {
                WatchEvent::Paused(paused) => flaps.push(paused),
                WatchEvent::Exited(code) => break assert_eq!(code, Some(3)),
                _ => unreachable!(),
            }
        }
        assert_eq!((starts.get(), since.elapsed()), (1, 10 * SECOND));
        assert!((9..=10).contains(&flaps.len()), "{flaps:?}");
        assert!(flaps.iter().enumerate().all(|(number, flap)| *flap == (number % 2 == 0)));
    }
}
