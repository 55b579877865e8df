//! Liveness probe for Flower: the gRPC health check and the failure threshold.
//!
//! The health service answers even without a connection to the SuperLink, and stops answering when
//! the process hangs: it indicates liveness, not readiness.

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

/// Time limit of one check. A busy machine answers late.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Time between checks while the node is connected to its SuperLink.
const INTERVAL: Duration = Duration::from_secs(60);
/// Time between checks otherwise: a hang begins with the loss of the connection.
const INTERVAL_DISCONNECTED: Duration = Duration::from_secs(15);
/// Time between checks while the container starts, and after a counted failure.
const INTERVAL_FAILING: Duration = Duration::from_secs(5);
/// Consecutive failures after which Flower is unresponsive.
const FAILURE_THRESHOLD: u32 = 3;
/// Time after the start of the container within which the health service must be up.
const START_PERIOD: Duration = Duration::from_secs(120);

/// An empty HealthCheckRequest in gRPC framing: uncompressed, length 0.
const REQUEST: &[u8] = &[0, 0, 0, 0, 0];
/// A framed HealthCheckResponse with the status SERVING (grpc/grpc, `doc/health-checking.md`).
const SERVING: &[u8] = &[0, 0, 0, 0, 2, 8, 1];
/// Size limit of a response; a valid one has seven bytes.
const MAX_BYTES: usize = 4096;

/// Why a check failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HealthError {
    /// No process listens on the port.
    #[error("connection to {address} refused")]
    Refused { address: SocketAddr },
    /// The connection failed for another reason.
    #[error("cannot connect to {address}")]
    Unreachable { address: SocketAddr, source: io::Error },
    /// No response in time.
    #[error("no response from {address} within {} s", .timeout.as_secs())]
    TimedOut { address: SocketAddr, timeout: Duration },
    /// The peer does not use gRPC, or closed the connection.
    #[error("invalid response from {address}")]
    Protocol { address: SocketAddr, source: Box<dyn std::error::Error + Send + Sync> },
    /// The response is not SERVING.
    #[error("{address} is unhealthy: {response}")]
    NotServing { address: SocketAddr, response: String },
}

/// Queries the overall status of the gRPC server at `address` (`grpc.health.v1.Health/Check`
/// without a service name).
///
/// # Errors
/// If it does not answer SERVING within `timeout`.
async fn check(address: SocketAddr, timeout: Duration) -> Result<(), HealthError> {
    let result = tokio::time::timeout(timeout, call(address)).await;
    result.unwrap_or(Err(HealthError::TimedOut { address, timeout }))
}

async fn call(address: SocketAddr) -> Result<(), HealthError> {
    let stream = TcpStream::connect(address).await.map_err(|source| match source.kind() {
        io::ErrorKind::ConnectionRefused => HealthError::Refused { address },
        _ => HealthError::Unreachable { address, source },
    })?;
    // Disables Nagle's algorithm for the small request. A failure costs a few milliseconds at most.
    let _ = stream.set_nodelay(true);
    let protocol_error = |source| HealthError::Protocol { address, source };
    let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .body(Full::new(Bytes::from_static(REQUEST)))
        .map_err(|error| protocol_error(error.into()))?;
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| protocol_error(error.into()))?;
    let exchange = async {
        let response =
            sender.send_request(request).await.map_err(|error| protocol_error(error.into()))?;
        match describe_failure(response).await.map_err(protocol_error)? {
            None => Ok(()),
            Some(response) => Err(HealthError::NotServing { address, response }),
        }
    };
    let mut exchange = pin!(exchange);
    // The connection is dropped with this future, so a cancelled call leaves no task behind.
    tokio::select! {
        result = &mut exchange => result,
        _ = connection => exchange.await,
    }
}

/// Returns a description of a response that is not SERVING; `None` if it is SERVING.
async fn describe_failure(
    response: Response<Incoming>,
) -> Result<Option<String>, Box<dyn std::error::Error + Send + Sync>> {
    if !response.status().is_success() {
        return Ok(Some(format!("HTTP {}", response.status())));
    }
    let (head, body) = response.into_parts();
    let body = Limited::new(body, MAX_BYTES).collect().await?;
    // A call that fails immediately carries its status in the headers.
    let status = body.trailers().and_then(|trailers| trailers.get("grpc-status"));
    let status = status
        .or_else(|| head.headers.get("grpc-status"))
        .map(|status| status.as_bytes().escape_ascii());
    let status = match status {
        Some(status) => status.to_string(),
        None => return Ok(Some("no grpc-status".into())),
    };
    let message = body.to_bytes();
    Ok(match (status.as_str(), &message[..]) {
        ("0", SERVING) => None,
        ("0", other) => Some(format!("message {:02x?}", &other[..other.len().min(16)])),
        (status, _) => Some(format!("grpc-status {status}")),
    })
}

/// Flower is unresponsive: the failure threshold was reached.
#[derive(Debug, thiserror::Error)]
#[error("{FAILURE_THRESHOLD} consecutive health checks failed: {}", error_chain(.last))]
pub(crate) struct LivenessFailure {
    pub last: HealthError,
}

/// State of the liveness probe across runs of the container.
///
/// A failure counts only after a successful check in the same run of the container. Before that,
/// only a refused connection counts, and only after the start period: the container may already
/// have hung when the agent adopted it. An unreachable address does not count. An image without a
/// health service cannot be distinguished from a hang; it is reported as unresponsive once, and
/// then not again until a check has succeeded.
#[derive(Default)]
pub(crate) struct Liveness {
    /// ID and start time of the container.
    run: (String, String),
    /// Whether a check has succeeded in this run.
    was_healthy: bool,
    /// Consecutive counted failures.
    failures: u32,
    /// When the last check ended, so that the interval is kept across calls.
    last_check: Option<Instant>,
    /// The check in progress, which the next call continues.
    check: Option<LocalBoxFuture<'static, Result<(), HealthError>>>,
    /// Whether a container that had never been healthy was reported, and no check has succeeded
    /// since.
    suspect: bool,
}

impl Liveness {
    /// Checks `container` until the failure threshold is reached. `connected` is whether it is
    /// connected to its SuperLink. Pending forever if the container has no address. Cancel safe:
    /// the next call continues the check in progress.
    pub(crate) async fn wait_until_unresponsive(
        &mut self,
        container: &Container,
        connected: bool,
    ) -> LivenessFailure {
        let Some(ip_address) = container.ip_address else {
            return std::future::pending().await;
        };
        let address = SocketAddr::new(ip_address, HEALTH_PORT);
        self.wait_with(move || check(address, TIMEOUT), container, connected).await
    }

    async fn wait_with<C>(
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
            (self.was_healthy, self.failures, self.last_check, self.check) = (false, 0, None, None);
        }
        let start_deadline = Instant::now() + START_PERIOD.saturating_sub(container.running_for());
        loop {
            if self.check.is_none()
                && let Some(last_check) = self.last_check
            {
                let is_starting = !self.was_healthy && Instant::now() < start_deadline;
                let interval = match (self.failures, connected) {
                    (1.., _) => INTERVAL_FAILING,
                    // Failures count only after the first success, so find that one early.
                    _ if is_starting => INTERVAL_FAILING,
                    (0, true) => INTERVAL,
                    (0, false) => INTERVAL_DISCONNECTED,
                };
                tokio::time::sleep_until(last_check + interval).await;
            }
            let result = self.check.get_or_insert_with(|| check().boxed_local()).await;
            (self.last_check, self.check) = (Some(Instant::now()), None);
            let Err(error) = result else {
                (self.was_healthy, self.failures, self.suspect) = (true, 0, false);
                continue;
            };
            tracing::debug!("Flower health check failed: {}", error_chain(&error));
            let refused = matches!(error, HealthError::Refused { .. });
            if self.was_healthy || (refused && !self.suspect && Instant::now() >= start_deadline) {
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

    const LONG_TIMEOUT: Duration = Duration::from_secs(5);

    /// Serves one call with this HTTP status, message and trailer.
    async fn server(
        status: u16,
        message: &'static [u8],
        grpc_status: Option<&'static str>,
    ) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let respond = service_fn(move |request: Request<Incoming>| async move {
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
                .serve_connection(TokioIo::new(stream), respond)
                .await;
        });
        address
    }

    #[tokio::test]
    async fn only_serving_is_healthy() {
        assert!(check(server(200, SERVING, Some("0")).await, LONG_TIMEOUT).await.is_ok());
        for (status, message, grpc_status, expected) in [
            (200, &[0, 0, 0, 0, 2, 8, 2][..], Some("0"), "message [00, 00, 00, 00, 02, 08, 02]"),
            (200, &[], Some("0"), "message []"),
            (200, &[], Some("12"), "grpc-status 12"),
            (200, SERVING, Some("14"), "grpc-status 14"),
            (200, SERVING, None, "no grpc-status"),
            (404, &[], None, "HTTP 404"),
        ] {
            let error =
                check(server(status, message, grpc_status).await, LONG_TIMEOUT).await.unwrap_err();
            assert!(
                matches!(&error, HealthError::NotServing { response, .. }
                    if response.contains(expected)),
                "{error:?}"
            );
        }
        let error = check(server(200, &[b'x'; MAX_BYTES + 1], Some("0")).await, LONG_TIMEOUT)
            .await
            .unwrap_err();
        assert!(matches!(error, HealthError::Protocol { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn classifies_refused_timeout_and_protocol_errors() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // The kernel accepts the connection and no process answers, as with a hung process.
        let error = check(address, Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(error, HealthError::TimedOut { .. }), "{error:?}");
        // The call has closed its connection.
        let (mut stream, _) = listener.accept().await.unwrap();
        let closed = tokio::time::timeout(LONG_TIMEOUT, stream.read_to_end(&mut Vec::new())).await;
        assert!(closed.is_ok(), "the connection is still open");
        drop((listener, stream));
        let error = check(address, LONG_TIMEOUT).await.unwrap_err();
        assert!(matches!(error, HealthError::Refused { .. }), "{error:?}");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            stream.writable().await.unwrap();
            stream.try_write(b"SSH-2.0-none\r\n").unwrap();
        });
        let error = check(address, LONG_TIMEOUT).await.unwrap_err();
        assert!(matches!(error, HealthError::Protocol { .. }), "{error:?}");
    }

    const ADDRESS: SocketAddr =
        SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), HEALTH_PORT);

    fn refused() -> Result<(), HealthError> {
        Err(HealthError::Refused { address: ADDRESS })
    }

    fn timed_out() -> Result<(), HealthError> {
        Err(HealthError::TimedOut { address: ADDRESS, timeout: TIMEOUT })
    }

    fn started(started_at: &str) -> Container {
        Container { started_at: started_at.into(), ..Container::default() }
    }

    const LONG_AGO: &str = "2024-01-01T00:00:00.5Z";
    const JUST_NOW: &str = "9999-01-01T00:00:00Z";

    /// Returns after how many seconds the container is reported as unresponsive, or `None` if that
    /// takes more than an hour. `results` are those of the first checks; the last one repeats.
    async fn seconds_to_failure(
        liveness: &mut Liveness,
        container: &Container,
        results: &[fn() -> Result<(), HealthError>],
    ) -> Option<u64> {
        let checks = Cell::new(0);
        let check = || {
            let result = results.get(checks.get()).or(results.last()).unwrap();
            checks.set(checks.get() + 1);
            std::future::ready(result())
        };
        let since = Instant::now();
        let failure = pin!(liveness.wait_with(check, container, false));
        tokio::time::timeout(Duration::from_secs(3600), failure)
            .await
            .ok()
            .map(|_| since.elapsed().as_secs())
    }

    const HEALTHY: fn() -> Result<(), HealthError> = || Ok(());

    #[tokio::test(start_paused = true)]
    async fn three_failures_after_a_success_are_unresponsive() {
        let just_now = started(JUST_NOW);
        for (results, seconds) in [
            (&[HEALTHY][..], None),
            // A check after 15 s fails, then two more at 5 s intervals.
            (&[HEALTHY, timed_out], Some(25)),
            (&[HEALTHY, refused, timed_out], Some(25)),
            (&[HEALTHY, refused, refused, HEALTHY, refused], Some(50)),
            (&[refused, refused, refused, HEALTHY], None),
            (&[timed_out], None),
        ] {
            let found = seconds_to_failure(&mut Liveness::default(), &just_now, results).await;
            assert_eq!(found, seconds, "{} results", results.len());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn refusal_after_start_period_is_unresponsive() {
        let liveness = &mut Liveness::default();
        assert_eq!(seconds_to_failure(liveness, &started(JUST_NOW), &[refused]).await, Some(130));
        let liveness = &mut Liveness::default();
        assert_eq!(seconds_to_failure(liveness, &started(LONG_AGO), &[refused]).await, Some(10));
        // A container that cannot be reached may be healthy.
        assert_eq!(
            seconds_to_failure(&mut Liveness::default(), &started(LONG_AGO), &[timed_out]).await,
            None
        );
    }

    #[tokio::test(start_paused = true)]
    async fn image_without_health_service_is_reported_once() {
        let liveness = &mut Liveness::default();
        assert_eq!(seconds_to_failure(liveness, &started(LONG_AGO), &[refused]).await, Some(10));
        assert_eq!(seconds_to_failure(liveness, &started(JUST_NOW), &[refused]).await, None);
        // A container with a health service resets the suspicion.
        assert_eq!(
            seconds_to_failure(liveness, &started("9998-01-01T00:00:00Z"), &[HEALTHY, refused])
                .await,
            Some(25)
        );
        assert_eq!(seconds_to_failure(liveness, &started(LONG_AGO), &[refused]).await, Some(10));
    }

    #[tokio::test(start_paused = true)]
    async fn cancelled_waits_keep_the_interval() {
        let (liveness, container, checks) =
            (&mut Liveness::default(), started(JUST_NOW), Cell::new(0));
        // A failing check takes the whole timeout, longer than each call here.
        let check = || {
            checks.set(checks.get() + 1);
            let (is_first, timeout) = (checks.get() == 1, TIMEOUT);
            async move {
                if is_first {
                    return Ok(());
                }
                tokio::time::sleep(timeout).await;
                timed_out()
            }
        };
        let since = Instant::now();
        while tokio::time::timeout(
            Duration::from_millis(100),
            liveness.wait_with(check, &container, false),
        )
        .await
        .is_err()
        {}
        assert_eq!((checks.get(), since.elapsed().as_secs()), (4, 15 + 10 + 5 + 10 + 5 + 10));
    }

    #[tokio::test(start_paused = true)]
    async fn connected_node_is_checked_less_often() {
        let (liveness, container, checks) =
            (&mut Liveness::default(), started(JUST_NOW), Cell::new(0));
        let check = || {
            checks.set(checks.get() + 1);
            std::future::ready(if checks.get() <= 3 { Ok(()) } else { refused() })
        };
        let since = Instant::now();
        let connected = liveness.wait_with(check, &container, true);
        assert!(tokio::time::timeout(Duration::from_secs(150), connected).await.is_err());
        assert_eq!(checks.get(), 3);
        // The connection is lost: the next check is due at once.
        liveness.wait_with(check, &container, false).await;
        assert_eq!((checks.get(), since.elapsed().as_secs()), (6, 160));
    }

    #[tokio::test(start_paused = true)]
    async fn new_run_of_the_container_resets_the_state() {
        let liveness = &mut Liveness::default();
        let (first, second) = (started(JUST_NOW), started("9998-01-01T00:00:00Z"));
        assert_eq!(seconds_to_failure(liveness, &first, &[HEALTHY]).await, None);
        assert_eq!(seconds_to_failure(liveness, &second, &[timed_out]).await, None);
    }
}
