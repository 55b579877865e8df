//! Whether the node is connected to its SuperLink, as Flower's own log tells.
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

use crate::docker::client::Container;
use crate::docker::log::Log;
use crate::flower::log::{LogEvent, parse_log_line};

/// The connection of a node to its SuperLink.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Connection {
    /// Flower has said nothing of it in this run. It stays so where its log level, or its release,
    /// leaves the line out.
    #[default]
    Unknown,
    /// The node is connected.
    Connected {
        /// Its id for the SuperLink.
        node_id: u64,
        /// Since when, as seen from here.
        since: SystemTime,
    },
    /// The node is not connected, and tries to be, or is about to end.
    Lost {
        /// Its id in the connection that it tries to go on with.
        node_id: Option<u64>,
        /// Since when, as seen from here.
        since: SystemTime,
    },
}

impl Connection {
    /// The connection after Flower has said this, at the time `now`. What changes nothing keeps its
    /// time.
    #[must_use]
    pub fn after(self, said: LogEvent, now: SystemTime) -> Self {
        match (self, said) {
            (Self::Connected { node_id: old, .. }, LogEvent::Registered(node_id))
                if node_id == old =>
            {
                self
            }
            (_, LogEvent::Registered(node_id)) => Self::Connected { node_id, since: now },
            // Only what was connected before is so again: an app says this sentence, too, of its
            // connection to the node.
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

    /// The node's id, where it is connected.
    pub fn node_id(&self) -> Option<u64> {
        match self {
            Self::Connected { node_id, .. } => Some(*node_id),
            Self::Unknown | Self::Lost { .. } => None,
        }
    }

    /// Whether somebody who was told of `self` is to be told of `other`.
    fn differs_from(&self, other: &Self) -> bool {
        discriminant(self) != discriminant(other) || self.node_id() != other.node_id()
    }
}

/// The connection of one run of the container.
#[derive(Debug)]
pub struct ConnectionMonitor {
    /// Until it ends.
    log: Option<Log>,
    connection: Connection,
    /// When the log is read again where Flower has said nothing by then, and the pause until the
    /// time after that.
    again: (Instant, Duration),
}

/// A log that is written faster than Docker 20.10 rotates it may lose what it is followed for:
/// Flower has said its word, and nobody heard it. So a log that tells nothing is read again from
/// the first.
const FIRST_SILENCE: Duration = Duration::from_secs(20);
const MAX_SILENCE: Duration = Duration::from_secs(3600);

impl ConnectionMonitor {
    /// Listens to a run of the container, from its beginning.
    pub fn new(log: Log) -> Self {
        let again = (Instant::now() + FIRST_SILENCE, FIRST_SILENCE);
        Self { log: Some(log), connection: Connection::Unknown, again }
    }

    /// The connection as far as it was heard.
    pub fn connection(&self) -> Connection {
        self.connection
    }

    /// The connection, once the node has come to it or has lost it, or has another id. Never, once
    /// the log has ended. A call that is given up loses nothing.
    pub async fn next_change(&mut self) -> Connection {
        while let Some(log) = &mut self.log {
            let line = tokio::select! {
                line = log.next_line() => line,
                () = tokio::time::sleep_until(self.again.0), if matches!(self.connection, Connection::Unknown) => {
                    log.reopen();
                    let pause = (self.again.1 * 2).min(MAX_SILENCE);
                    self.again = (Instant::now() + pause, pause);
                    continue;
                }
            };
            let Some(line) = line else {
                self.log = None;
                break;
            };
            let Some(said) = parse_log_line(&line) else { continue };
            let before = self.connection;
            self.connection = before.after(said, SystemTime::now());
            if self.connection.differs_from(&before) {
                return self.connection;
            }
        }
        std::future::pending().await
    }
}

/// Waits until a process of the container has a TCP connection to this port, or (`wanted` is false)
/// has none any more. For a log that leaves Flower's word out: its level is above INFO, or its
/// release too old.
pub async fn until_reached(container: &Container, port: u16, wanted: bool) {
    // One that is there is seldom lost.
    let pause = Duration::from_secs(if wanted { 10 } else { 30 });
    while has_connection_to(container.pid, port) != wanted {
        tokio::time::sleep(pause).await;
    }
}

/// Whether the network of this process has an established connection to a port, by proc(5).
fn has_connection_to(pid: u32, port: u16) -> bool {
    ["tcp", "tcp6"].iter().any(|table| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        text.lines().any(|line| is_established_to(line, port))
    })
}

/// `sl local_address rem_address st …`, numbers in hexadecimal; 01 is ESTABLISHED.
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

    /// The connection after all this, one a second.
    fn after(said: &[LogEvent]) -> Connection {
        (1..).zip(said).fold(Connection::Unknown, |connection, (second, said)| {
            connection.after(*said, at(second))
        })
    }

    #[test]
    fn the_node_is_connected_from_its_id_until_an_attempt_fails() {
        use LogEvent::{Ended, Reconnected, Registered, Retrying};
        let connected = |second| Connection::Connected { node_id: 7, since: at(second) };
        let lost = |node_id, second| Connection::Lost { node_id, since: at(second) };
        for (said, expected) in [
            (&[][..], Connection::Unknown),
            (&[Registered(7)], connected(1)),
            (&[Registered(7), Registered(7)], connected(1)),
            (&[Registered(7), Retrying, Retrying], lost(Some(7), 2)),
            (&[Registered(7), Retrying, Reconnected], connected(3)),
            (&[Registered(7), Retrying, Ended, Retrying], lost(None, 2)),
            // An app in the container says this of its connection to the node.
            (&[Registered(7), Ended, Reconnected], lost(None, 2)),
            (&[Registered(7), Reconnected], connected(1)),
            (&[Reconnected], Connection::Unknown),
            (&[Retrying, Reconnected], lost(None, 1)),
            (&[Retrying, Reconnected, Registered(7)], connected(3)),
            (&[Registered(8), Registered(7)], connected(2)),
            (&[Ended], lost(None, 1)),
        ] {
            assert_eq!(after(said), expected, "{said:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_log_that_tells_nothing_is_read_again_less_and_less_often() {
        let opened = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&opened);
        // What Docker has lost of the word comes at the third reading.
        let frames = move || match count.fetch_add(1, Ordering::Relaxed) {
            2 => {
                let message = "INFO :      SuperNode ID: 7\n".into();
                stream::iter([Ok(LogOutput::StdErr { message })]).chain(stream::pending()).boxed()
            }
            _ => stream::pending().boxed(),
        };
        let mut listener = ConnectionMonitor::new(Log::new(frames));
        let since = Instant::now();
        assert_eq!(listener.next_change().await.node_id(), Some(7));
        assert_eq!(since.elapsed().as_secs(), 20 + 40);
        // Once it has told, it is only listened to.
        let more = tokio::time::timeout(Duration::from_secs(86_400), listener.next_change()).await;
        assert!(more.is_err() && opened.load(Ordering::Relaxed) == 3, "{more:?}");
    }

    #[tokio::test]
    async fn each_change_is_told_once_and_the_end_of_the_log_is_silence() {
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
        let mut listener = ConnectionMonitor::new(Log::new(frames));
        assert!(matches!(listener.next_change().await, Connection::Lost { node_id: None, .. }));
        assert_eq!(listener.next_change().await.node_id(), Some(7));
        assert!(matches!(listener.next_change().await, Connection::Lost { node_id: Some(7), .. }));
        for _ in 0..2 {
            assert_eq!(listener.next_change().now_or_never(), None);
        }
        assert!(matches!(listener.connection(), Connection::Lost { node_id: None, .. }));
    }
}
