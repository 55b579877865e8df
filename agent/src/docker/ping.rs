//! Whether an engine answers, and which version of its API it speaks.

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
pub enum PingError {
    /// Nobody is at the socket.
    #[error(transparent)]
    Unreachable(#[from] io::Error),
    /// What is there does not speak HTTP.
    #[error(transparent)]
    Broken(#[from] hyper::Error),
    /// The request cannot be made.
    #[error(transparent)]
    Request(#[from] hyper::http::Error),
    /// It has trouble of its own.
    #[error("it answers a ping with HTTP {0}")]
    Unwell(StatusCode),
}

/// Asks the engine at `socket` for the version to speak with it: its own, and at most the client's.
/// A ping has it in its head and costs the engine nothing; `/version`, which bollard would ask for,
/// takes Docker 20.10 some 10 ms.
///
/// # Errors
/// When it does not answer, or not that it is well.
pub async fn api_version(socket: &Path) -> Result<ClientVersion, PingError> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request =
        Request::get("/_ping").header(header::HOST, "docker").body(Empty::<Bytes>::new())?;
    let mut answer = pin!(sender.send_request(request));
    let answer = tokio::select! {
        answer = &mut answer => answer,
        _ = connection => answer.await,
    }?;
    match answer.status() {
        status if status.is_success() => Ok(version_in(answer.headers())),
        status => Err(PingError::Unwell(status)),
    }
}

/// The version that both know; the client's, where the engine does not say.
fn version_in(headers: &HeaderMap) -> ClientVersion {
    let ours = ClientVersion { ..*API_DEFAULT_VERSION };
    let said =
        headers.get("Api-Version").and_then(|version| version.to_str().ok()?.split_once('.'));
    match said.map(|(major, minor)| (major.parse::<usize>(), minor.parse::<usize>())) {
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
    fn the_lower_version_is_spoken_and_ours_where_the_engine_does_not_say() {
        let ours =
            format!("{}.{}", API_DEFAULT_VERSION.major_version, API_DEFAULT_VERSION.minor_version);
        for (said, spoken) in [
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
            if let Some(said) = said {
                headers.insert("api-version", said.parse().unwrap());
            }
            let version = version_in(&headers);
            assert_eq!(
                format!("{}.{}", version.major_version, version.minor_version),
                spoken,
                "{said:?}"
            );
        }
    }
}
