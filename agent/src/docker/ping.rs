//! Ping of the engine and negotiation of the API version.

use std::io;
use std::path::Path;
use std::pin::pin;

use bollard::{API_DEFAULT_VERSION, ClientVersion};
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{HeaderMap, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// Why a ping failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PingError {
    /// Cannot connect to the socket.
    #[error(transparent)]
    Unreachable(#[from] io::Error),
    /// The response is not HTTP.
    #[error(transparent)]
    Protocol(#[from] hyper::Error),
    /// The request is invalid.
    #[error(transparent)]
    Request(#[from] hyper::http::Error),
    /// The engine answered with an error.
    #[error("ping failed with HTTP {0}")]
    Status(StatusCode),
}

/// Pings the engine at `socket` and returns the API version to use: the lower of the engine's and
/// the client's. A ping returns the version in a header at no cost; `/version`, which bollard would
/// call, takes Docker 20.10 about 10 ms.
///
/// # Errors
/// If the engine does not answer, or answers with an error.
pub(crate) async fn api_version(socket: &Path) -> Result<ClientVersion, PingError> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request =
        Request::get("/_ping").header(header::HOST, "docker").body(Empty::<Bytes>::new())?;
    let mut response = pin!(sender.send_request(request));
    let response = tokio::select! {
        response = &mut response => response,
        _ = connection => response.await,
    }?;
    match response.status() {
        status if status.is_success() => Ok(negotiate(response.headers())),
        status => Err(PingError::Status(status)),
    }
}

/// Returns the lower version; the client's if the engine does not report one.
fn negotiate(headers: &HeaderMap) -> ClientVersion {
    let ours = ClientVersion { ..*API_DEFAULT_VERSION };
    let reported =
        headers.get("Api-Version").and_then(|version| version.to_str().ok()?.split_once('.'));
    match reported.map(|(major, minor)| (major.parse::<usize>(), minor.parse::<usize>())) {
        Some((Ok(major), Ok(minor)))
            if (major, minor) < (ours.major_version, ours.minor_version) =>
        {
            ClientVersion { major_version: major, minor_version: minor }
        }
        _ => ours,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_version_wins_and_client_version_is_default() {
        let ours =
            format!("{}.{}", API_DEFAULT_VERSION.major_version, API_DEFAULT_VERSION.minor_version);
        for (reported, expected) in [
            (Some("1.41"), "1.41"),
            (Some("1.9"), "1.9"),
            (Some("0.99"), "0.99"),
            (Some("1.999"), &ours),
            (Some("2.0"), &ours),
            (Some("1.41.2"), &ours),
            (Some(""), &ours),
            (None, &ours),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(reported) = reported {
                headers.insert("api-version", reported.parse().unwrap());
            }
            let version = negotiate(&headers);
            assert_eq!(
                format!("{}.{}", version.major_version, version.minor_version),
                expected,
                "{reported:?}"
            );
        }
    }
}
