//! HTTP/1 metrics endpoint. It serves only `GET /metrics`. A failure of the endpoint never affects
//! the node.

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

/// Limit of concurrent connections; further ones wait.
const MAX_CONNECTIONS: usize = 8;
/// Time limit for the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for a connection, which carries one request.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// The smallest buffer that hyper allows; the head of a scraper's request has a few hundred bytes.
const BUFFER_BYTES: usize = 8192;
/// Delay between attempts to bind the address.
const BIND_RETRY_DELAY: Duration = Duration::from_secs(30);
/// Delay after a failed accept.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Serves the output of `page` at `address` while the future is polled. If the address cannot be
/// bound, logs one WARNING and retries.
pub(crate) async fn serve(address: SocketAddr, page: impl Fn() -> String) -> Infallible {
    let mut warned = false;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) if warned => {
                tracing::debug!("cannot bind metrics endpoint {address}: {error}");
            }
            Err(error) => {
                tracing::warn!(
                    "cannot bind metrics endpoint {address}: {error}; retrying every {} s",
                    BIND_RETRY_DELAY.as_secs()
                );
                warned = true;
            }
        }
        tokio::time::sleep(BIND_RETRY_DELAY).await;
    };
    tracing::info!("serving metrics at http://{address}/metrics");
    serve_connections(&listener, &page).await
}

async fn serve_connections(listener: &TcpListener, page: &impl Fn() -> String) -> Infallible {
    let mut connections = FuturesUnordered::new();
    loop {
        tokio::select! {
            accepted = accept(listener), if connections.len() < MAX_CONNECTIONS => {
                connections.push(serve_connection(accepted, page));
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
                tracing::debug!("cannot accept a connection to the metrics endpoint: {error}");
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, page: &impl Fn() -> String) {
    let service = service_fn(|request| std::future::ready(respond(&request, page)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_TIMEOUT, connection).await.map_err(io::Error::from) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("connection to the metrics endpoint failed: {error}"),
        Err(error) => tracing::debug!("connection to the metrics endpoint closed: {error}"),
    }
}

fn respond(
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
            .body(Full::from("method not allowed, use GET\n")),
        _ => plain(StatusCode::NOT_FOUND, "not found, the metrics are at /metrics\n"),
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Sends `bytes` and returns the response until the server closes the connection.
    async fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut response = Vec::new();
        // The server may close before it has read everything.
        let _ = stream.read_to_end(&mut response).await;
        String::from_utf8(response).unwrap()
    }

    /// Runs `test` against a server.
    async fn with_server<T>(test: impl AsyncFnOnce(SocketAddr) -> T) -> T {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let page = || "up 1\n".to_owned();
        let server = pin!(serve_connections(&listener, &page));
        tokio::select! {
            result = test(address) => result,
            never = server => match never {},
        }
    }

    #[tokio::test]
    async fn serves_only_get_metrics() {
        with_server(async |address| {
            let ok = exchange(address, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n").await;
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
                let response = exchange(address, request.as_bytes()).await;
                assert!(
                    response.starts_with(&format!("HTTP/1.1 {status}\r\n")),
                    "{request}: {response}"
                );
            }
        })
        .await;
    }

    #[tokio::test]
    async fn endless_request_head_is_refused() {
        with_server(async |address| {
            let endless =
                [b"GET /metrics HTTP/1.1\r\nX: ", "x".repeat(1 << 16).as_bytes()].concat();
            let response = exchange(address, &endless).await;
            assert!(response.is_empty() || response.starts_with("HTTP/1.1 431 "), "{response}");
        })
        .await;
    }

    #[tokio::test]
    async fn idle_connections_do_not_block_others() {
        with_server(async |address| {
            let mut idle = Vec::new();
            for _ in 0..MAX_CONNECTIONS * 2 {
                idle.push(TcpStream::connect(address).await.unwrap());
            }
            let ok = exchange(address, b"GET /metrics HTTP/1.0\r\n\r\n").await;
            assert!(ok.starts_with("HTTP/1.0 200 OK\r\n"), "{ok}");
        })
        .await;
    }
}
