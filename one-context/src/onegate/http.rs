//! One HTTP/1.1 request over its own connection, limited in time and size, without proxy and
//! redirects.

use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::fs::OFlags;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::endpoint::Endpoint;
use crate::source::read_regular;

/// Size limit: far above that of any reply, far below the memory of a small VM.
const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;
/// Size limit: far above that of any CA file.
const MAX_CA_FILE_BYTES: u64 = 1024 * 1024;

/// Error of a request without a complete reply.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The name does not resolve, or the connection failed.
    #[error("cannot connect; check that OneGate runs and that the VM's network reaches it")]
    Unreachable(#[source] io::Error),
    /// The TLS handshake failed: the certificate is not trusted, or the server does not speak TLS.
    #[error(
        "TLS handshake failed; check that a trusted CA issued the server's certificate for this \
         host"
    )]
    Tls(#[source] io::Error),
    /// The reply is not HTTP, is incomplete, or its head is too large.
    #[error("the reply is not HTTP or incomplete")]
    InvalidHttp(#[from] hyper::Error),
    /// The body is too large.
    #[error("the reply is larger than {} MiB", MAX_BODY_BYTES / 1024 / 1024)]
    TooLarge,
    /// The request took longer than the timeout.
    #[error("timed out after {timeout:?}")]
    TimedOut {
        /// Timeout of the request.
        timeout: Duration,
    },
}

/// Returns a configuration that trusts only the CAs in `ca_file` (PEM) or, without a file, those of
/// the machine.
pub(super) fn tls(ca_file: Option<&Path>) -> io::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let pem = read_regular(path, OFlags::empty(), MAX_CA_FILE_BYTES + 1)?;
            if pem.len() as u64 > MAX_CA_FILE_BYTES {
                return Err(io::Error::other("the file is too large"));
            }
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                roots.add(certificate.map_err(io::Error::other)?).map_err(io::Error::other)?;
            }
        }
        // A certificate of the machine that cannot be parsed is not trusted; the others are.
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err(io::Error::other("no certificate found"));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Sends `request` to `endpoint` and reads the reply within `timeout`.
pub(super) async fn exchange(
    endpoint: &Endpoint,
    tls: Option<&Arc<ClientConfig>>,
    request: Request<Full<Bytes>>,
    timeout: Duration,
) -> Result<(StatusCode, Vec<u8>), RequestError> {
    let exchange = async {
        let address = (&*endpoint.host.to_str(), endpoint.port);
        let stream = TcpStream::connect(address).await.map_err(RequestError::Unreachable)?;
        let Some(config) = tls else {
            return exchange_over(stream, request).await;
        };
        let connecting =
            TlsConnector::from(Arc::clone(config)).connect(endpoint.host.clone(), stream);
        exchange_over(connecting.await.map_err(RequestError::Tls)?, request).await
    };
    tokio::time::timeout(timeout, exchange).await.unwrap_or(Err(RequestError::TimedOut { timeout }))
}

async fn exchange_over(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Vec<u8>), RequestError> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let mut exchange = pin!(async {
        let reply = sender.send_request(request).await?;
        Ok((reply.status(), read_body(reply.into_body()).await?))
    });
    // The connection transfers the bytes. Its errors also reach the exchange, after any bytes
    // received before them.
    tokio::select! {
        outcome = &mut exchange => outcome,
        _ = connection => exchange.await,
    }
}

/// Reads a body. The limit applies to the bytes received, whatever length the head announces.
async fn read_body(mut body: Incoming) -> Result<Vec<u8>, RequestError> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            if bytes.len() + data.len() > MAX_BODY_BYTES {
                return Err(RequestError::TooLarge);
            }
            bytes.extend_from_slice(&data);
        }
    }
    Ok(bytes)
}
