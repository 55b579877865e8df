//! Client for OneGate, the HTTP service of OpenNebula through which a VM queries itself and its
//! service and publishes attributes.
//!
//! - `endpoint`: parser for `ONEGATE_ENDPOINT` (pure)
//! - `attributes`: encoding of an update (pure)
//! - [`reply`]: parser for replies (pure)
//! - `http`: one request; all I/O

mod attributes;
mod endpoint;
mod http;
pub mod reply;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use tokio_rustls::rustls::ClientConfig;

pub use self::attributes::update_text;
pub use self::http::RequestError;
pub use self::reply::ReplyError;

use self::endpoint::Endpoint;
use crate::context::Secret;

/// Maximum length of the excerpt of a reply in an error.
const MAX_EXCERPT_CHARACTERS: usize = 200;

/// Client for the VM that it runs in. Each call is one request over its own connection and needs a
/// Tokio runtime with I/O and time.
///
/// Each request carries the token, so it goes to the endpoint only: redirects are not followed, and
/// no proxy is used. OneGate's usual address is link-local, which a proxy cannot reach.
#[derive(Debug)]
pub struct OneGate {
    endpoint: Endpoint,
    tls: Option<Arc<ClientConfig>>,
    vm_id: u64,
    token: Secret,
    timeout: Duration,
}

/// A OneFlow service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Service ID.
    pub id: u64,
    /// Name; empty if the reply has none.
    pub name: String,
    /// Roles in OneFlow's order.
    pub roles: Vec<Role>,
}

/// A role of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    /// Name.
    pub name: String,
    /// Desired number of VMs.
    pub cardinality: Option<u64>,
    /// VMs that exist.
    pub vms: Vec<RoleVm>,
}

/// A VM of a role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoleVm {
    /// VM ID.
    pub vm_id: u64,
    /// Name, if the reply has one.
    pub name: Option<String>,
    /// Attributes as in [`Vm::attributes`]; empty unless the service was requested with attributes.
    /// Untrusted.
    pub attributes: BTreeMap<String, String>,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    /// VM ID.
    pub id: u64,
    /// Name; empty if the reply has none.
    pub name: String,
    /// Whether the VM is active and running (STATE 3, LCM_STATE 3); `None` if the reply has no
    /// state.
    pub is_running: Option<bool>,
    /// Text attributes of USER_TEMPLATE, which include the published ones. OpenNebula stores names
    /// in upper case. Empty attributes are omitted, so empty means unset. Untrusted: any VM of a
    /// service can write the attributes of any other.
    pub attributes: BTreeMap<String, String>,
    /// Addresses of the NICs in order, IPv4 before IPv6 for each NIC, aliases last. Without
    /// link-local IPv6 addresses. Untrusted.
    pub addresses: Vec<IpAddr>,
}

/// Error of a OneGate request. No error contains the token.
#[derive(Debug, thiserror::Error)]
pub enum OneGateError {
    /// The endpoint is invalid. The error does not contain it, because it may include a password.
    #[error(
        "invalid ONEGATE_ENDPOINT: {problem}; expected http://HOST or https://HOST, optionally \
         with :PORT and /PATH"
    )]
    InvalidEndpoint {
        /// Cause.
        problem: &'static str,
    },
    /// The VM ID is invalid.
    #[error("invalid VMID; expected decimal digits")]
    InvalidVmId,
    /// The token is invalid.
    #[error(
        "the OneGate token is empty or has invalid characters; check that the VM's context has \
         TOKEN=YES"
    )]
    InvalidToken,
    /// The endpoint is https, and no CA certificate can be loaded.
    #[error("cannot load CA certificates for OneGate from {origin}")]
    NoCaCertificates {
        /// Path of the CA file, or `this machine`.
        origin: String,
        /// Cause.
        source: io::Error,
    },
    /// A name that OpenNebula does not accept for an attribute.
    #[error("invalid attribute name {name:?}; allowed characters are A-Z, 0-9 and _")]
    InvalidAttribute {
        /// Name, truncated if long.
        name: String,
    },
    /// The VM is not part of a service.
    #[error("the VM is not part of a service: OneGate finds no valid SERVICE_ID in its attributes")]
    NotInService,
    /// OneGate rejected the request, or failed.
    #[error("{request}: HTTP {status}: {}; OneGate replied: {text}", meaning(*status, text))]
    Rejected {
        /// Method and URL.
        request: String,
        /// HTTP status.
        status: u16,
        /// Excerpt of the reply, on one line.
        text: String,
    },
    /// OneGate replied with a redirect.
    #[error(
        "{request}: HTTP {status}: redirects are not followed, because they would disclose the \
         token; check ONEGATE_ENDPOINT"
    )]
    Redirected {
        /// Method and URL.
        request: String,
        /// HTTP status.
        status: u16,
    },
    /// There is no complete reply.
    #[error("{request} failed")]
    RequestFailed {
        /// Method and URL.
        request: String,
        /// Cause.
        source: RequestError,
    },
    /// The reply has another format: from an unknown version of OneGate, or from another server.
    #[error("{request}: unexpected reply: {excerpt}")]
    UnexpectedReply {
        /// Method and URL.
        request: String,
        /// Excerpt of the reply, on one line.
        excerpt: String,
        /// Error of the parser.
        source: ReplyError,
    },
}

impl OneGateError {
    /// Returns whether a retry is pointless, because the VM's configuration or the request itself
    /// must change. Any other error can be temporary: OneGate replies 401 also while it cannot
    /// reach oned, and 404 while OneFlow is down.
    pub fn is_final(&self) -> bool {
        match self {
            Self::InvalidEndpoint { .. }
            | Self::InvalidVmId
            | Self::InvalidToken
            | Self::NoCaCertificates { .. }
            | Self::InvalidAttribute { .. }
            | Self::NotInService => true,
            Self::Rejected { .. }
            | Self::Redirected { .. }
            | Self::RequestFailed { .. }
            | Self::UnexpectedReply { .. } => false,
        }
    }
}

/// Returns the probable cause of a rejection (OpenNebula, `src/onegate/onegate-server.rb`).
fn meaning(status: u16, text: &str) -> &'static str {
    match status {
        400 if text.contains("does not contain VM") => {
            "OneFlow has not registered this VM yet, or it belongs to another service"
        }
        400 if text.contains("is empty") => {
            "OneFlow has not registered the VMs of this service yet"
        }
        400 => "OneGate does not accept this request",
        401 => "the token is invalid for this VM, or OneGate cannot reach oned",
        403 => "OneGate's configuration does not allow it",
        404 if text.contains("Service") => "the service does not exist, or OneFlow is down",
        404 => "the VM does not exist, or this server is not OneGate",
        500 => "OpenNebula rejected the request, or OneGate failed",
        502..=504 => "the proxy cannot reach OneGate",
        _ => "a status that OneGate does not use",
    }
}

impl OneGate {
    /// Creates a client from the VM's context: endpoint (`ONEGATE_ENDPOINT`), VM ID (`VMID`) and
    /// token. `timeout` applies to each request as a whole, from connecting to the last byte of the
    /// reply.
    ///
    /// For an https endpoint the server's certificate must be issued by a CA in `ca_file` (PEM) or,
    /// without a file, by a CA that the machine trusts (or in `SSL_CERT_FILE`, `SSL_CERT_DIR`).
    /// Reading them blocks.
    ///
    /// # Errors
    /// Returns a final [`OneGateError`] if an argument is invalid or no CA can be loaded.
    pub fn new(
        endpoint: &str,
        vm_id: &str,
        token: Secret,
        ca_file: Option<&Path>,
        timeout: Duration,
    ) -> Result<Self, OneGateError> {
        let endpoint = Endpoint::parse(endpoint)
            .map_err(|problem| OneGateError::InvalidEndpoint { problem })?;
        let vm_id = reply::decimal(vm_id).ok_or(OneGateError::InvalidVmId)?;
        let token_text = token.expose();
        if token_text.is_empty() || !token_text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(OneGateError::InvalidToken);
        }
        let tls = endpoint.is_https.then(|| http::tls(ca_file)).transpose().map_err(|source| {
            let origin = ca_file
                .map_or_else(|| "this machine".to_owned(), |path| path.display().to_string());
            OneGateError::NoCaCertificates { origin, source }
        })?;
        Ok(Self { endpoint, tls, vm_id, token, timeout })
    }

    /// Returns the ID of the VM.
    pub fn vm_id(&self) -> u64 {
        self.vm_id
    }

    /// Queries the service of this VM, without the attributes of its VMs.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn service(&self) -> Result<Service, OneGateError> {
        self.get("/service", reply::service).await
    }

    /// Queries the service of this VM with the attributes of its VMs. OneGate makes one request to
    /// oned for each VM.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn service_with_attributes(&self) -> Result<Service, OneGateError> {
        self.get("/service?extended=true", reply::service).await
    }

    /// Queries this VM.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn vm(&self) -> Result<Vm, OneGateError> {
        self.get("/vm", reply::vm).await
    }

    /// Queries another VM of the service.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn vm_of_service(&self, id: u64) -> Result<Vm, OneGateError> {
        self.get(&format!("/vms/{id}"), reply::vm).await
    }

    /// Sets attributes of this VM in one request, encoded as in [`update_text`]. Other attributes
    /// keep their values.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn publish(&self, attributes: &[(&str, String)]) -> Result<(), OneGateError> {
        let form = attributes::form(&update_text(attributes)?);
        self.request(Method::PUT, "/vm", form).await.map(|_| ())
    }

    async fn get<T>(
        &self,
        route: &str,
        parse: fn(&[u8]) -> Result<T, ReplyError>,
    ) -> Result<T, OneGateError> {
        let body = self.request(Method::GET, route, String::new()).await?;
        parse(&body).map_err(|source| OneGateError::UnexpectedReply {
            request: self.describe(&Method::GET, route),
            excerpt: self.excerpt(&body),
            source,
        })
    }

    /// Sends a request, with a form unless that is empty, and returns the body of a successful
    /// reply.
    async fn request(
        &self,
        method: Method,
        route: &str,
        form: String,
    ) -> Result<Vec<u8>, OneGateError> {
        let request = self.describe(&method, route);
        let mut message = Request::builder()
            .method(method)
            .uri(format!("{}{route}", self.endpoint.prefix))
            .header(HOST, &self.endpoint.authority)
            .header("X-ONEGATE-TOKEN", self.token.expose())
            .header("X-ONEGATE-VMID", self.vm_id)
            .header(CONNECTION, "close");
        if !form.is_empty() {
            message = message.header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        }
        // A body of known length is sent with Content-Length; OneGate does not read a chunked body.
        let message = message
            .body(Full::from(form))
            .map_err(|_| OneGateError::InvalidEndpoint { problem: "its path is too long" })?;
        match http::exchange(&self.endpoint, self.tls.as_ref(), message, self.timeout).await {
            Ok((status, body)) if status.is_success() => Ok(body),
            Ok((status, _)) if status.is_redirection() => {
                Err(OneGateError::Redirected { request, status: status.as_u16() })
            }
            Ok((status, body)) => Err(self.rejected(request, status, &body)),
            Err(source) => Err(OneGateError::RequestFailed { request, source }),
        }
    }

    fn rejected(&self, request: String, status: StatusCode, body: &[u8]) -> OneGateError {
        let text = self.excerpt(body);
        if status == StatusCode::BAD_REQUEST && text.contains("Empty or invalid SERVICE_ID") {
            return OneGateError::NotInService;
        }
        OneGateError::Rejected { request, status: status.as_u16(), text }
    }

    /// Returns method and URL for errors.
    fn describe(&self, method: &Method, route: &str) -> String {
        format!("{method} {}{route}", self.endpoint)
    }

    /// Returns the start of a body on one line, with control characters escaped and without the
    /// token, which a server may echo.
    fn excerpt(&self, body: &[u8]) -> String {
        let text = String::from_utf8_lossy(body);
        let text = text.replace(self.token.expose(), "(token)");
        let mut excerpt = String::new();
        for character in text.trim().chars() {
            if excerpt.chars().count() >= MAX_EXCERPT_CHARACTERS {
                excerpt.push('…');
                break;
            }
            match character {
                '"' | '\'' => excerpt.push(character),
                _ => excerpt.extend(character.escape_debug()),
            }
        }
        if excerpt.is_empty() { "(empty)".to_owned() } else { excerpt }
    }
}

#[cfg(test)]
mod tests;
