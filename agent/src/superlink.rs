//! Which SuperLink the node connects to, and why it is trusted.

use crate::config::Config;
use crate::config::values::{Certificate, HostPort};

/// A SuperLink and the way to speak with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuperLink {
    /// Where it listens.
    pub address: HostPort,
    /// The CA that its certificate must come from; without one the connection is in the clear.
    pub ca: Option<Certificate>,
}

/// Why there is no SuperLink to connect to. The operator's settings cause all of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SuperLinkError {
    /// Nobody said where it is.
    #[error(
        "FL_SUPERLINK_ADDRESS is not set, and this release does not discover the SuperLink through OneGate: set it to host:port"
    )]
    NoAddress,
    /// TLS is wanted and there is nothing to check the certificate against.
    #[error(
        "FL_TLS_ENABLED is YES and FL_SSL_CA_CERTFILE is not set: set it to the base64 of the CA's PEM certificate (base64 -w0 ca.crt)"
    )]
    NoCertificate,
}

/// The SuperLink that the operator named.
///
/// # Errors
/// When the address is missing, or TLS is wanted without a CA: the connection is never downgraded in silence.
pub fn static_superlink(config: &Config) -> Result<SuperLink, SuperLinkError> {
    let address = config.superlink_address.clone().ok_or(SuperLinkError::NoAddress)?;
    let ca = match (config.tls.unwrap_or(false), &config.ca_certificate) {
        (false, _) => None,
        (true, Some(ca)) => Some(ca.clone()),
        (true, None) => return Err(SuperLinkError::NoCertificate),
    };
    Ok(SuperLink { address, ca })
}
