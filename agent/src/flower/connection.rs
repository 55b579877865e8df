//! Readiness: whether the node is connected to its SuperLink, according to Flower's log.
//!
//! ```text
//!              SuperNode ID                retrying, ended
//!   Unknown ─────────────────> Connected ──────────────────> Lost
//!      │                           ^                           │
//!      │ retrying, ended           │ SuperNode ID; successful, │
//!      └──────────> Lost           │ unless it had ended       │
//!                                  └───────────────────────────┘
//! ```

use std::mem::discriminant;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::docker::client::Container;
use crate::docker::log::Log;
use crate::flower::log::{LogEvent, parse_log_line};

/// The connection of a node to its SuperLink.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Connection {
    /// Flower has not logged anything about it in this run. This is final if the log level or the
    /// release omits the line.
    #[default]
    Unknown,
    /// The node is connected.
    Connected {
        /// SuperNode ID.
        node_id: u64,
        /// When the agent read the line.
        since: SystemTime,
    },
    /// The node is not connected; Flower retries or is about to exit.
    Lost {
        /// SuperNode ID of the connection that Flower is restoring.
        node_id: Option<u64>,
        /// When the agent read the line.
        since: SystemTime,
    },
}

impl Connection {
    /// Returns the state after `event`, read at `now`. An event that does not change the state
    /// keeps its time.
    #[must_use]
    pub(crate) fn after(self, event: LogEvent, now: SystemTime) -> Self {
        match (self, event) {
            (Self::Connected { node_id: old, .. }, LogEvent::Registered(node_id))
                if node_id == old =>
            {
                self
            }
            (_, LogEvent::Registered(node_id)) => Self::Connected { node_id, since: now },
            // Only a restored connection counts: an app logs the same line about its connection to
            // the node.
            (Self::Lost { node_id: Some(node_id), .. }, LogEvent::Reconnected) => {
                Self::Connected { node_id, since: now }
            }
            (_, LogEvent::Reconnected) => self,
            (Self::Connected { node_id, .. }, LogEvent::Retrying) => {
                Self::Lost { node_id: Some(node_id), since: now }
            }
            (Self::Unknown, LogEvent::Retrying | LogEvent::Ended)
            | (Self::Connected { .. }, LogEvent::Ended) => Self::Lost { node_id: None, since: now },
            (Self::Lost { .. }, LogEvent::Retrying) => self,
            (Self::Lost { since, .. }, LogEvent::Ended) => Self::Lost { node_id: None, since },
        }
    }

    /// Returns the SuperNode ID while the node is connected.
    pub(crate) fn node_id(&self) -> Option<u64> {
        match self {
            Self::Connected { node_id, .. } => Some(*node_id),
            Self::Unknown | Self::Lost { .. } => None,
        }
    }

    /// Whether a change from `self` to `other` is reported.
    fn differs_from(&self, other: &Self) -> bool {
        discriminant(self) != discriminant(other) || self.node_id() != other.node_id()
    }
}

/// Delays before the log is read again while the connection is unknown. Docker 20.10 can drop lines
/// of a log that is written faster than it rotates, among them those about the connection.
const INITIAL_REREAD_DELAY: Duration = Duration::from_secs(20);
const MAX_REREAD_DELAY: Duration = Duration::from_secs(3600);

/// Follows the connection during one run of the container.
#[derive(Debug)]
pub(crate) struct ConnectionMonitor {
    /// `None` after the end of the log.
    log: Option<Log>,
    connection: Connection,
    /// When the log is read again if the connection is still unknown.
    reread_at: Instant,
    backoff: Backoff,
}

impl ConnectionMonitor {
    /// Follows `log`, which starts at the beginning of the run.
    pub(crate) fn new(log: Log) -> Self {
        let mut backoff = Backoff::new(INITIAL_REREAD_DELAY, MAX_REREAD_DELAY);
        let reread_at = Instant::now() + backoff.next_delay(0.0);
        Self { log: Some(log), connection: Connection::Unknown, reread_at, backoff }
    }

    /// Waits until the node has connected, lost its connection or changed its ID, and returns the
    /// new state. Pending forever after the end of the log. Cancel safe.
    pub(crate) async fn next_change(&mut self) -> Connection {
        while let Some(log) = &mut self.log {
            let line = tokio::select! {
                line = log.next_line() => line,
                () = tokio::time::sleep_until(self.reread_at),
                    if matches!(self.connection, Connection::Unknown) =>
                {
                    log.reopen();
                    self.reread_at = Instant::now() + self.backoff.next_delay(0.0);
                    continue;
                }
            };
            let Some(line) = line else {
                self.log = None;
                break;
            };
            let Some(event) = parse_log_line(&line) else { continue };
            let before = self.connection;
            self.connection = before.after(event, SystemTime::now());
            if self.connection.differs_from(&before) {
                return self.connection;
            }
        }
        std::future::pending().await
    }
}

/// Waits until a process of the container has a TCP connection to `port`, or, if `wanted` is false,
/// no longer has one. Used instead of the log if its level is above INFO or the release does not
/// log the node ID.
pub(crate) async fn wait_for_tcp_connection(container: &Container, port: u16, wanted: bool) {
    // An established connection is checked less often, because it is rarely lost.
    let interval = Duration::from_secs(if wanted { 10 } else { 30 });
    while has_connection_to(container.pid, port) != wanted {
        tokio::time::sleep(interval).await;
    }
}

/// Whether the network namespace of the process has an established connection to `port`, see
/// proc(5).
fn has_connection_to(pid: u32, port: u16) -> bool {
    ["tcp", "tcp6"].iter().any(|table| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        text.lines().any(|line| is_established_to(line, port))
    })
}

/// Matches a line `sl local_address rem_address st …` with hexadecimal numbers; 01 is ESTABLISHED.
fn is_established_to(line: &str, port: u16) -> bool {
    let mut fields = line.split_ascii_whitespace().skip(2);
    let remote = fields.next().and_then(|address| address.rsplit_once(':'));
    let remote_port = remote.and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
    remote_port == Some(port) && fields.next() == Some("01")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use bollard::container::LogOutput;
    use futures_util::{FutureExt as _, StreamExt as _, stream};

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// Returns the state after these events, one per second.
    fn after(events: &[LogEvent]) -> Connection {
        (1..).zip(events).fold(Connection::Unknown, |connection, (second, event)| {
            connection.after(*event, at(second))
        })
    }

    #[test]
    fn connected_from_node_id_until_failed_attempt() {
        use LogEvent::{Ended, Reconnected, Registered, Retrying};
        let connected = |second| Connection::Connected { node_id: 7, since: at(second) };
        let lost = |node_id, second| Connection::Lost { node_id, since: at(second) };
        for (events, expected) in [
            (&[][..], Connection::Unknown),
            (&[Registered(7)], connected(1)),
            (&[Registered(7), Registered(7)], connected(1)),
            (&[Registered(7), Retrying, Retrying], lost(Some(7), 2)),
            (&[Registered(7), Retrying, Reconnected], connected(3)),
            (&[Registered(7), Retrying, Ended, Retrying], lost(None, 2)),
            // Logged by an app in the container about its connection to the node.
            (&[Registered(7), Ended, Reconnected], lost(None, 2)),
            (&[Registered(7), Reconnected], connected(1)),
            (&[Reconnected], Connection::Unknown),
            (&[Retrying, Reconnected], lost(None, 1)),
            (&[Retrying, Reconnected, Registered(7)], connected(3)),
            (&[Registered(8), Registered(7)], connected(2)),
            (&[Ended], lost(None, 1)),
        ] {
            assert_eq!(after(events), expected, "{events:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silent_log_is_reread_with_backoff() {
        let opened = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&opened);
        // Docker dropped the line; it is in the log when it is read for the third time.
        let frames = move || match count.fetch_add(1, Ordering::Relaxed) {
            2 => {
                let message = "INFO :      SuperNode ID: 7\n".into();
                stream::iter([Ok(LogOutput::StdErr { message })]).chain(stream::pending()).boxed()
            }
            _ => stream::pending().boxed(),
        };
        let mut monitor = ConnectionMonitor::new(Log::new(frames));
        let since = Instant::now();
        assert_eq!(monitor.next_change().await.node_id(), Some(7));
        assert_eq!(since.elapsed().as_secs(), 20 + 40);
        // Once the connection is known, the log is only followed.
        let more = tokio::time::timeout(Duration::from_secs(86_400), monitor.next_change()).await;
        assert!(more.is_err() && opened.load(Ordering::Relaxed) == 3, "{more:?}");
    }

    #[tokio::test]
    async fn changes_are_reported_once_and_never_after_the_end() {
        let log = "\
INFO :      Starting Flower SuperNode
WARNING :   Connection attempt failed, retrying in 0.73 seconds
WARNING :   Connection attempt failed, retrying in 1.73 seconds
INFO :      Connection successful after 2.77 seconds and 3 tries.
INFO :      SuperNode ID: 7
INFO :      Starting Flower SuperExec
WARNING :   Connection attempt failed, retrying in 0.62 seconds
INFO :      SuperNode terminated gracefully.
WARNING :   Connection attempt failed, retrying in 0.62 seconds
";
        let frames = || {
            stream::iter(log.as_bytes().chunks(7))
                .map(|part| Ok(LogOutput::StdErr { message: part.into() }))
        };
        let mut monitor = ConnectionMonitor::new(Log::new(frames));
        assert!(matches!(monitor.next_change().await, Connection::Lost { node_id: None, .. }));
        assert_eq!(monitor.next_change().await.node_id(), Some(7));
        assert!(matches!(monitor.next_change().await, Connection::Lost { node_id: Some(7), .. }));
        for _ in 0..2 {
            assert_eq!(monitor.next_change().now_or_never(), None);
        }
        assert!(matches!(monitor.connection, Connection::Lost { node_id: None, .. }));
    }
}
