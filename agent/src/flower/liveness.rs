//! Whether Flower lives: its health service, asked by gRPC, and a watcher that tells when it has
//! died.
//!
//! The service answers also while the SuperLink is away, and not any more once the process hangs:
//! it tells of liveness, not of readiness.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http2;
use hyper::{Request, Response, header};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::docker::client::Container;
use crate::flower::release::HEALTH_PORT;
use crate::logging::error_chain;

/// How long a check may take. A machine that is busy answers late.
const CHECK_LIMIT: Duration = Duration::from_secs(10);
/// The pause between two checks of a node that is connected to its SuperLink, and of one that is
/// not: a hang begins with that.
const INTERVAL: Duration = Duration::from_secs(60);
const INTERVAL_DISCONNECTED: Duration = Duration::from_secs(15);
/// The pause after a failure that counts.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(5);
/// So many failures in a row are a death.
const FAILURE_THRESHOLD: u32 = 3;
/// A container that has run for so long serves its health if it ever does.
const START_PERIOD: Duration = Duration::from_secs(120);

/// An empty HealthCheckRequest as gRPC frames it: not compressed, and its length.
const REQUEST: &[u8] = &[0, 0, 0, 0, 0];
/// A HealthCheckResponse with the status SERVING, framed (grpc/grpc, `doc/health-checking.md`).
const SERVING: &[u8] = &[0, 0, 0, 0, 2, 8, 1];
/// The answer has seven bytes.
const MAX_BYTES: usize = 4096;

/// Why a check failed.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// Nobody listens there.
    #[error("nobody listens at {address}")]
    Refused {
        /// Who was asked.
        address: SocketAddr,
    },
    /// There is no way to it.
    #[error("cannot reach {address}")]
    Unreachable {
        /// Who was asked.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// There was no answer in time.
    #[error("{address} gave no answer within {} s", .limit.as_secs())]
    TimedOut {
        /// Who was asked.
        address: SocketAddr,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The call broke off.
    #[error("{address} does not speak as a health service does")]
    Broken {
        /// Who was asked.
        address: SocketAddr,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It answered, and not that it serves.
    #[error("{address} is not well: {answer}")]
    NotServing {
        /// Who was asked.
        address: SocketAddr,
        /// What it said.
        answer: String,
    },
}

/// Asks the gRPC health service (`grpc.health.v1.Health/Check`) at `address` for the health of the
/// whole process.
///
/// # Errors
/// When it does not answer within `limit` that it serves.
pub async fn check(address: SocketAddr, limit: Duration) -> Result<(), HealthError> {
    let answer = tokio::time::timeout(limit, ask(address)).await;
    answer.unwrap_or(Err(HealthError::TimedOut { address, limit }))
}

async fn ask(address: SocketAddr) -> Result<(), HealthError> {
    let stream = TcpStream::connect(address).await.map_err(|source| match source.kind() {
        io::ErrorKind::ConnectionRefused => HealthError::Refused { address },
        _ => HealthError::Unreachable { address, source },
    })?;
    // The request is small, and nothing follows it that it could wait for. At worst this costs some
    // milliseconds.
    let _ = stream.set_nodelay(true);
    let broken = |source| HealthError::Broken { address, source };
    let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .body(Full::new(Bytes::from_static(REQUEST)))
        .map_err(|error| broken(error.into()))?;
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| broken(error.into()))?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|error| broken(error.into()))?;
        match problem_with(response).await.map_err(broken)? {
            None => Ok(()),
            Some(answer) => Err(HealthError::NotServing { address, answer }),
        }
    };
    let mut exchange = pin!(exchange);
    // The connection ends with this call: nothing of it is left behind, whichever way the call
    // ends.
    tokio::select! {
        answer = &mut exchange => answer,
        _ = connection => exchange.await,
    }
}

/// What the answer says, unless it says that all is well.
async fn problem_with(
    response: Response<Incoming>,
) -> Result<Option<String>, Box<dyn std::error::Error + Send + Sync>> {
    if !response.status().is_success() {
        return Ok(Some(format!("HTTP {}", response.status())));
    }
    let (head, body) = response.into_parts();
    let body = Limited::new(body, MAX_BYTES).collect().await?;
    // A call that fails at once has its status in the head.
    let status = body.trailers().and_then(|trailers| trailers.get("grpc-status"));
    let status = status
        .or_else(|| head.headers.get("grpc-status"))
        .map(|status| status.as_bytes().escape_ascii());
    let said = match status {
        Some(status) => status.to_string(),
        None => return Ok(Some("an answer without grpc-status".into())),
    };
    let message = body.to_bytes();
    Ok(match (said.as_str(), &message[..]) {
        ("0", SERVING) => None,
        ("0", other) => Some(format!("the answer is {:02x?}", &other[..other.len().min(16)])),
        (status, _) => Some(format!("grpc-status {status}")),
    })
}

/// How a container was found dead.
#[derive(Debug, thiserror::Error)]
#[error("Flower's health service failed {FAILURE_THRESHOLD} checks in a row: {}", error_chain(.last))]
pub struct LivenessFailure {
    /// The last failure.
    pub last: HealthError,
}

/// The watch over Flower's life, from one container to the next.
///
/// A failure counts once a check has gone well in this run of the container. Before that only a
/// refused connection counts, and only when the container has had the time to start: it may have
/// been hanging when the agent found it. An address that cannot be reached from here says nothing.
/// An image that serves no health looks the same as one that hangs, so it is taken for dead once:
/// after that, a check has to go well first.
#[derive(Default)]
pub(crate) struct Liveness {
    /// The run of the container: its id, and when it was started.
    run: (String, String),
    was_healthy: bool,
    failures: u32,
    /// When the last check ended: the interval is kept across calls.
    asked: Option<Instant>,
    /// The check that is under way, which the next call goes on with.
    check: Option<LocalBoxFuture<'static, Result<(), HealthError>>>,
    /// Whether a container was taken for dead that had never been well, and none has been well
    /// since.
    suspect: bool,
}

impl Liveness {
    /// Asks for the health of `container`, which is connected to its SuperLink or not, until it is
    /// dead. Never, where it has no address. Cancel safe: the check that is under way goes on with
    /// the next call.
    pub(crate) async fn wait_until_unresponsive(
        &mut self,
        container: &Container,
        connected: bool,
    ) -> LivenessFailure {
        let Some(ip_address) = container.ip_address else {
            return std::future::pending().await;
        };
        let address = SocketAddr::new(ip_address, HEALTH_PORT);
        self.until_dead_by(move || check(address, CHECK_LIMIT), container, connected).await
    }

    async fn until_dead_by<C>(
        &mut self,
        check: impl Fn() -> C,
        container: &Container,
        connected: bool,
    ) -> LivenessFailure
    where
        C: Future<Output = Result<(), HealthError>> + 'static,
    {
        if (&self.run.0, &self.run.1) != (&container.id, &container.started_at) {
            self.run = (container.id.clone(), container.started_at.clone());
            (self.was_healthy, self.failures, self.asked, self.check) = (false, 0, None, None);
        }
        let has_started = Instant::now() + START_PERIOD.saturating_sub(container.running_for());
        loop {
            if self.check.is_none()
                && let Some(asked) = self.asked
            {
                let is_starting = !self.was_healthy && Instant::now() < has_started;
                let pause = match (self.failures, connected) {
                    (1.., _) => PAUSE_AFTER_FAILURE,
                    // A failure counts once it was well: that is to be known soon.
                    _ if is_starting => PAUSE_AFTER_FAILURE,
                    (0, true) => INTERVAL,
                    (0, false) => INTERVAL_DISCONNECTED,
                };
                tokio::time::sleep_until(asked + pause).await;
            }
            let answer = self.check.get_or_insert_with(|| check().boxed_local()).await;
            (self.asked, self.check) = (Some(Instant::now()), None);
            let Err(error) = answer else {
                (self.was_healthy, self.failures, self.suspect) = (true, 0, false);
                continue;
            };
            tracing::debug!("no sign of health: {}", error_chain(&error));
            let refused = matches!(error, HealthError::Refused { .. });
            if self.was_healthy || (refused && !self.suspect && Instant::now() >= has_started) {
                self.failures += 1;
            }
            if self.failures >= FAILURE_THRESHOLD {
                self.failures = 0;
                self.suspect = !self.was_healthy;
                return LivenessFailure { last: error };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;

    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use hyper::server::conn::http2 as server;
    use hyper::service::service_fn;
    use hyper::{HeaderMap, StatusCode};
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    /// Listens for one call and answers with this status, message and trailer.
    async fn server(
        status: u16,
        message: &'static [u8],
        grpc_status: Option<&'static str>,
    ) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = service_fn(move |request: Request<Incoming>| async move {
                assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                assert_eq!(request.headers()["content-type"], "application/grpc");
                assert_eq!(request.collect().await.unwrap().to_bytes(), REQUEST);
                let trailers = grpc_status.map(|code| {
                    HeaderMap::from_iter([("grpc-status".parse().unwrap(), code.parse().unwrap())])
                });
                let frames =
                    [Some(Frame::data(Bytes::from_static(message))), trailers.map(Frame::trailers)];
                let frames = frames.into_iter().flatten().map(Ok::<_, Infallible>);
                let mut response =
                    Response::new(StreamBody::new(futures_util::stream::iter(frames)));
                *response.status_mut() = StatusCode::from_u16(status).unwrap();
                Ok::<_, Infallible>(response)
            });
            let _ = server::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), answer)
                .await;
        });
        address
    }

    #[tokio::test]
    async fn only_the_answer_that_it_serves_is_health() {
        assert!(check(server(200, SERVING, Some("0")).await, LIMIT).await.is_ok());
        for (status, message, grpc_status, words) in [
            (
                200,
                &[0, 0, 0, 0, 2, 8, 2][..],
                Some("0"),
                "the answer is [00, 00, 00, 00, 02, 08, 02]",
            ),
            (200, &[], Some("0"), "the answer is []"),
            (200, &[], Some("12"), "grpc-status 12"),
            (200, SERVING, Some("14"), "grpc-status 14"),
            (200, SERVING, None, "without grpc-status"),
            (404, &[], None, "HTTP 404"),
        ] {
            let error = check(server(status, message, grpc_status).await, LIMIT).await.unwrap_err();
            assert!(
                matches!(&error, HealthError::NotServing { answer, .. } if answer.contains(words)),
                "{error:?}"
            );
        }
        let error =
            check(server(200, &[b'x'; MAX_BYTES + 1], Some("0")).await, LIMIT).await.unwrap_err();
        assert!(matches!(error, HealthError::Broken { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn nobody_silence_and_another_tongue_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // The kernel takes the connection, and nobody answers: so it is with a process that hangs.
        let error = check(address, Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(error, HealthError::TimedOut { .. }), "{error:?}");
        // Nothing of the call is left behind.
        let (mut stream, _) = listener.accept().await.unwrap();
        let left = tokio::time::timeout(LIMIT, stream.read_to_end(&mut Vec::new())).await;
        assert!(left.is_ok(), "the connection is still there");
        drop((listener, stream));
        let error = check(address, LIMIT).await.unwrap_err();
        assert!(matches!(error, HealthError::Refused { .. }), "{error:?}");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            stream.writable().await.unwrap();
            stream.try_write(b"SSH-2.0-none\r\n").unwrap();
        });
        let error = check(address, LIMIT).await.unwrap_err();
        assert!(matches!(error, HealthError::Broken { .. }), "{error:?}");
    }

    const ADDRESS: SocketAddr =
        SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), HEALTH_PORT);

    fn refused() -> Result<(), HealthError> {
        Err(HealthError::Refused { address: ADDRESS })
    }

    fn timed_out() -> Result<(), HealthError> {
        Err(HealthError::TimedOut { address: ADDRESS, limit: CHECK_LIMIT })
    }

    fn started(started_at: &str) -> Container {
        Container { started_at: started_at.into(), ..Container::default() }
    }

    const LONG_AGO: &str = "2024-01-01T00:00:00.5Z";
    const JUST_NOW: &str = "9999-01-01T00:00:00Z";

    /// After how many seconds the container is taken for dead, where `answers` are the first
    /// answers and the last of them goes on for ever; `None` where it is not within an hour.
    async fn seconds_to_death(
        liveness: &mut Liveness,
        container: &Container,
        answers: &[fn() -> Result<(), HealthError>],
    ) -> Option<u64> {
        let asked = Cell::new(0);
        let check = || {
            let answer = answers.get(asked.get()).or(answers.last()).unwrap();
            asked.set(asked.get() + 1);
            std::future::ready(answer())
        };
        let since = Instant::now();
        let dead = pin!(liveness.until_dead_by(check, container, false));
        tokio::time::timeout(Duration::from_secs(3600), dead)
            .await
            .ok()
            .map(|_| since.elapsed().as_secs())
    }

    const WELL: fn() -> Result<(), HealthError> = || Ok(());

    #[tokio::test(start_paused = true)]
    async fn after_a_check_that_went_well_three_failures_in_a_row_are_a_death() {
        let just_now = started(JUST_NOW);
        for (answers, seconds) in [
            (&[WELL][..], None),
            // 15 s of health, then the failures with two pauses between them.
            (&[WELL, timed_out], Some(25)),
            (&[WELL, refused, timed_out], Some(25)),
            (&[WELL, refused, refused, WELL, refused], Some(50)),
            (&[refused, refused, refused, WELL], None),
            (&[timed_out], None),
        ] {
            let found = seconds_to_death(&mut Liveness::default(), &just_now, answers).await;
            assert_eq!(found, seconds, "{} answers", answers.len());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_container_that_was_never_well_is_dead_when_it_refuses_after_two_minutes() {
        let liveness = &mut Liveness::default();
        assert_eq!(seconds_to_death(liveness, &started(JUST_NOW), &[refused]).await, Some(130));
        let liveness = &mut Liveness::default();
        assert_eq!(seconds_to_death(liveness, &started(LONG_AGO), &[refused]).await, Some(10));
        // What cannot be reached from here may be well.
        assert_eq!(
            seconds_to_death(&mut Liveness::default(), &started(LONG_AGO), &[timed_out]).await,
            None
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_image_that_serves_no_health_is_taken_for_dead_once() {
        let liveness = &mut Liveness::default();
        assert_eq!(seconds_to_death(liveness, &started(LONG_AGO), &[refused]).await, Some(10));
        assert_eq!(seconds_to_death(liveness, &started(JUST_NOW), &[refused]).await, None);
        // One that does serve it is trusted again.
        assert_eq!(
            seconds_to_death(liveness, &started("9998-01-01T00:00:00Z"), &[WELL, refused]).await,
            Some(25)
        );
        assert_eq!(seconds_to_death(liveness, &started(LONG_AGO), &[refused]).await, Some(10));
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_is_taken_up_again_and_again_asks_no_more_often() {
        let (liveness, container, asked) =
            (&mut Liveness::default(), started(JUST_NOW), Cell::new(0));
        // A check that fails takes all of its time, longer than any call here.
        let check = || {
            asked.set(asked.get() + 1);
            let (first, limit) = (asked.get() == 1, CHECK_LIMIT);
            async move {
                if first {
                    return Ok(());
                }
                tokio::time::sleep(limit).await;
                timed_out()
            }
        };
        let since = Instant::now();
        while tokio::time::timeout(
            Duration::from_millis(100),
            liveness.until_dead_by(check, &container, false),
        )
        .await
        .is_err()
        {}
        assert_eq!((asked.get(), since.elapsed().as_secs()), (4, 15 + 10 + 5 + 10 + 5 + 10));
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_is_connected_is_asked_rarely_until_it_is_not_any_more() {
        let (liveness, container, asked) =
            (&mut Liveness::default(), started(JUST_NOW), Cell::new(0));
        let check = || {
            asked.set(asked.get() + 1);
            std::future::ready(if asked.get() <= 3 { Ok(()) } else { refused() })
        };
        let since = Instant::now();
        let connected = liveness.until_dead_by(check, &container, true);
        assert!(tokio::time::timeout(Duration::from_secs(150), connected).await.is_err());
        assert_eq!(asked.get(), 3);
        // The SuperLink has gone: the next check is due at once.
        liveness.until_dead_by(check, &container, false).await;
        assert_eq!((asked.get(), since.elapsed().as_secs()), (6, 160));
    }

    #[tokio::test(start_paused = true)]
    async fn another_run_of_the_container_begins_anew() {
        let liveness = &mut Liveness::default();
        let (first, second) = (started(JUST_NOW), started("9998-01-01T00:00:00Z"));
        assert_eq!(seconds_to_death(liveness, &first, &[WELL]).await, None);
        assert_eq!(seconds_to_death(liveness, &second, &[timed_out]).await, None);
    }
}
