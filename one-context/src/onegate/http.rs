//! One HTTP/1.1 request over a connection of its own: bounded in time and size, without a proxy,
//! without redirects.

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

/// Far more than the services of OpenNebula take, far less than harms a small VM.
const BODY_LIMIT_BYTES: usize = 4 * 1024 * 1024;
/// Far more than the certificates of any CA take.
const CA_FILE_LIMIT_BYTES: u64 = 1024 * 1024;

/// Why no whole reply came.
#[derive(Debug, thiserror::Error)]
pub enum NoAnswer {
    /// No connection; the host may not be known by its name.
    #[error("cannot connect; does the VM reach its cloud's network, and does OneGate run?")]
    Unreachable(#[source] io::Error),
    /// A connection without trust, or with something that does not speak TLS.
    #[error(
        "no TLS connection; is this server's certificate from a CA that is trusted here, and for this host?"
    )]
    NoTls(#[source] io::Error),
    /// Not HTTP, not to its end, or with a head that is too large.
    #[error("the reply is not HTTP, or was cut off")]
    NotWhole(#[from] hyper::Error),
    /// A body that does not end in time.
    #[error("the reply is larger than {} MiB, which no reply of OneGate is", BODY_LIMIT_BYTES / 1024 / 1024)]
    TooLarge,
    /// Connecting, sending and receiving took longer than the limit for all of it.
    #[error("there is no whole reply after {limit:?}")]
    TimedOut {
        /// The limit.
        limit: Duration,
    },
}

/// Trusts the certificates in `ca_file` (PEM) and no other; without a file, those that the machine
/// trusts.
pub(super) fn tls(ca_file: Option<&Path>) -> io::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let pem = read_regular(path, OFlags::empty(), CA_FILE_LIMIT_BYTES + 1)?;
            if pem.len() as u64 > CA_FILE_LIMIT_BYTES {
                return Err(io::Error::other("it is too large"));
            }
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                roots.add(certificate.map_err(io::Error::other)?).map_err(io::Error::other)?;
            }
        }
        // Of the many that a machine has, one that cannot be read is one that is not trusted.
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err(io::Error::other("there is no certificate"));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Sends `request` to `endpoint` and reads the reply, all of it within `limit`.
pub(super) async fn exchange(
    endpoint: &Endpoint,
    tls: Option<&Arc<ClientConfig>>,
    request: Request<Full<Bytes>>,
    limit: Duration,
) -> Result<(StatusCode, Vec<u8>), NoAnswer> {
    let exchange = async {
        let address = (&*endpoint.host.to_str(), endpoint.port);
        let stream = TcpStream::connect(address).await.map_err(NoAnswer::Unreachable)?;
        let Some(config) = tls else {
            return exchange_over(stream, request).await;
        };
        let connecting =
            TlsConnector::from(Arc::clone(config)).connect(endpoint.host.clone(), stream);
        exchange_over(connecting.await.map_err(NoAnswer::NoTls)?, request).await
    };
    tokio::time::timeout(limit, exchange).await.unwrap_or(Err(NoAnswer::TimedOut { limit }))
}

async fn exchange_over(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Vec<u8>), NoAnswer> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let mut exchange = pin!(async {
        let reply = sender.send_request(request).await?;
        Ok((reply.status(), read_body(reply.into_body()).await?))
    });
    // The connection moves the bytes. Its errors come out of the exchange too, after what has
    // arrived before them.
    tokio::select! {
        outcome = &mut exchange => outcome,
        _ = connection => exchange.await,
    }
}

/// The limit holds for what arrives, whatever the head has promised.
async fn read_body(mut body: Incoming) -> Result<Vec<u8>, NoAnswer> {
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            if whole.len() + data.len() > BODY_LIMIT_BYTES {
                return Err(NoAnswer::TooLarge);
            }
            whole.extend_from_slice(&data);
        }
    }
    Ok(whole)
}
