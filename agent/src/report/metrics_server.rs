//! The page on the network: HTTP/1, `GET /metrics` and nothing else. Whatever goes wrong here is
//! never the node's end.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};

/// More than scrapers and a curious operator need at a time; the others wait.
const MAX_CONNECTIONS: usize = 8;
/// How long a connection may take for its request's head, and as a whole: it has one request.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// The smallest buffer that hyper allows; a scraper's head has some hundred bytes.
const BUFFER_BYTES: usize = 8192;
/// The pause after an address could not be had, and after a connection could not be taken.
const PAUSE: Duration = Duration::from_secs(30);
const PAUSE_AFTER_ACCEPT: Duration = Duration::from_secs(1);

/// Serves what `page` gives at `address`, for as long as this is polled. An address that cannot be
/// had gets one WARNING, and is tried again.
pub(crate) async fn serve(address: SocketAddr, page: impl Fn() -> String) -> Infallible {
    let mut told = false;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) if told => tracing::debug!("metrics.listen = \"{address}\": {error}"),
            Err(error) => {
                tracing::warn!(
                    "there is no page with the metrics, metrics.listen = \"{address}\" cannot be had: {error}; trying again every {} s",
                    PAUSE.as_secs()
                );
                told = true;
            }
        }
        tokio::time::sleep(PAUSE).await;
    };
    tracing::info!("the metrics are at http://{address}/metrics");
    answer_all(&listener, &page).await
}

async fn answer_all(listener: &TcpListener, page: &impl Fn() -> String) -> Infallible {
    let mut connections = FuturesUnordered::new();
    loop {
        tokio::select! {
            accepted = accept(listener), if connections.len() < MAX_CONNECTIONS => {
                connections.push(answer(accepted, page));
            }
            Some(()) = connections.next() => {}
        }
    }
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::debug!("cannot take a connection to the metrics: {error}");
                tokio::time::sleep(PAUSE_AFTER_ACCEPT).await;
            }
        }
    }
}

async fn answer(stream: TcpStream, page: &impl Fn() -> String) {
    let service = service_fn(|request| std::future::ready(response_to(&request, page)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(BUFFER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_LIMIT, connection).await.map_err(io::Error::from) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("a connection to the metrics broke off: {error}"),
        Err(error) => tracing::debug!("a connection to the metrics was ended: {error}"),
    }
}

fn response_to(
    request: &Request<Incoming>,
    page: impl Fn() -> String,
) -> hyper::http::Result<Response<Full<Bytes>>> {
    let plain =
        |status, text: &'static str| Response::builder().status(status).body(Full::from(text));
    match (request.uri().path(), request.method()) {
        ("/metrics", &Method::GET) => Response::builder()
            .header(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")
            .body(Full::from(page())),
        ("/metrics", _) => Response::builder()
            .status(StatusCode::METHOD_NOT_ALLOWED)
            .header(header::ALLOW, "GET")
            .body(Full::from("only GET\n")),
        _ => plain(StatusCode::NOT_FOUND, "the metrics are at /metrics\n"),
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// What the server says to these bytes, until it closes.
    async fn said_to(address: SocketAddr, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        // It may close before it has read everything.
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    /// Runs `story` beside the server.
    async fn beside<T>(story: impl AsyncFnOnce(SocketAddr) -> T) -> T {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let page = || "up 1\n".to_owned();
        let server = pin!(answer_all(&listener, &page));
        tokio::select! {
            told = story(address) => told,
            never = server => match never {},
        }
    }

    #[tokio::test]
    async fn the_page_is_at_its_path_by_get_and_nothing_else_is_there() {
        beside(async |address| {
            let ok = said_to(address, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n").await;
            assert!(
                ok.starts_with("HTTP/1.1 200 OK\r\n") && ok.ends_with("\r\n\r\nup 1\n"),
                "{ok}"
            );
            assert!(
                ok.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"),
                "{ok}"
            );
            for (request, status) in [
                ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "404 Not Found"),
                ("GET /metrics/x HTTP/1.1\r\nHost: a\r\n\r\n", "404 Not Found"),
                (
                    "POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
                    "405 Method Not Allowed",
                ),
                ("what?\r\n\r\n", "400 Bad Request"),
            ] {
                let answer = said_to(address, request.as_bytes()).await;
                assert!(
                    answer.starts_with(&format!("HTTP/1.1 {status}\r\n")),
                    "{request}: {answer}"
                );
            }
        })
        .await;
    }

    #[tokio::test]
    async fn a_head_without_end_is_refused() {
        beside(async |address| {
            let endless =
                [b"GET /metrics HTTP/1.1\r\nX: ", "x".repeat(1 << 16).as_bytes()].concat();
            let answer = said_to(address, &endless).await;
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
        })
        .await;
    }

    #[tokio::test]
    async fn who_connects_and_says_nothing_is_sent_away_and_the_next_is_answered() {
        beside(async |address| {
            let mut idle = Vec::new();
            for _ in 0..MAX_CONNECTIONS * 2 {
                idle.push(TcpStream::connect(address).await.unwrap());
            }
            let ok = said_to(address, b"GET /metrics HTTP/1.0\r\n\r\n").await;
            assert!(ok.starts_with("HTTP/1.0 200 OK\r\n"), "{ok}");
        })
        .await;
    }
}
