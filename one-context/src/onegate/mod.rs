//! OneGate, the cloud's door for its VMs: what a VM may ask about itself and its service, and what
//! it may publish.
//!
//! - `endpoint`: where it listens (pure)
//! - `attributes`: attributes to the body of an update (pure)
//! - [`shape`]: the JSON of its replies to services and VMs (pure)
//! - `http`: one request (all input and output)

mod attributes;
mod endpoint;
mod http;
pub mod shape;

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
pub use self::http::NoAnswer;
pub use self::shape::ShapeError;

use self::endpoint::Endpoint;
use crate::context::Secret;

/// How much of what OneGate says an error repeats.
const EXCERPT_CHARACTERS: usize = 200;

/// A client for the VM that it runs in. Each call is one request over its own connection, and needs
/// a Tokio runtime with I/O and time.
///
/// It goes to the endpoint and nowhere else, as the token goes with each request: no redirect is
/// followed, and no proxy is used, since hyper reads no environment. OneGate's usual address is
/// link-local, where no proxy gets.
#[derive(Debug)]
pub struct OneGate {
    endpoint: Endpoint,
    tls: Option<Arc<ClientConfig>>,
    vm_id: u64,
    token: Secret,
    limit: Duration,
}

/// A OneFlow service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its number.
    pub id: u64,
    /// Its name; empty where OneGate does not say.
    pub name: String,
    /// Its roles, as OneFlow orders them.
    pub roles: Vec<Role>,
}

/// A role of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    /// Its name.
    pub name: String,
    /// How many VMs it is to have.
    pub cardinality: Option<u64>,
    /// The VMs that it has.
    pub nodes: Vec<Node>,
}

/// A VM of a role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The VM's number.
    pub vm_id: u64,
    /// The VM's name, where OneGate knows it.
    pub name: Option<String>,
    /// Its attributes as in [`Vm::attributes`], where the service was asked for with them.
    /// Untrusted.
    pub attributes: BTreeMap<String, String>,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    /// Its number.
    pub id: u64,
    /// Its name; empty where OneGate does not say.
    pub name: String,
    /// Whether it is active and running (STATE 3, LCM_STATE 3); `None` where OneGate does not say.
    pub is_running: Option<bool>,
    /// The texts of its USER_TEMPLATE: what was published for it. Names are in capitals, as
    /// OpenNebula keeps them; an empty attribute is left out, so empty means unset. Untrusted: any
    /// VM of a service may write those of any other.
    pub attributes: BTreeMap<String, String>,
    /// The addresses of its NICs in their order, IPv4 before IPv6 on each; aliases last, link-local
    /// IPv6 left out. Untrusted.
    pub addresses: Vec<IpAddr>,
}

/// Why OneGate has no answer. No error shows the token.
#[derive(Debug, thiserror::Error)]
pub enum OneGateError {
    /// The endpoint cannot be used. It is not shown, as it may hold a password.
    #[error(
        "ONEGATE_ENDPOINT is not as OpenNebula writes it: {problem}; accepted is http://HOST or https://HOST, with :PORT and /PATH where needed"
    )]
    BadEndpoint {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The VM's number is none.
    #[error("VMID is not the number of a VM; accepted are decimal digits")]
    BadVmId,
    /// The token cannot be sent.
    #[error(
        "the token for OneGate is empty or has characters that no token has; is TOKEN=YES in the VM's context?"
    )]
    BadToken,
    /// OneGate speaks https, and there is nothing to check its certificate by.
    #[error("no CA certificates for OneGate from {origin}")]
    NoCertificates {
        /// Where they were looked for.
        origin: String,
        /// What is wrong there.
        source: io::Error,
    },
    /// A name that OpenNebula does not take for an attribute.
    #[error("{name:?} is not the name of an attribute; accepted are A-Z, 0-9 and _")]
    BadAttribute {
        /// The name; only the beginning of a long one.
        name: String,
    },
    /// The VM is in no service.
    #[error("the VM is in no service: OneGate finds no valid SERVICE_ID in its attributes")]
    NotInService,
    /// OneGate refused the request, or failed.
    #[error("{request}: {status}, {}; OneGate says: {text}", meaning(*status, text))]
    Refused {
        /// Method and address.
        request: String,
        /// The status of HTTP.
        status: u16,
        /// OneGate's words, on one line.
        text: String,
    },
    /// A redirect.
    #[error(
        "{request}: {status}, a redirect, which is not followed as the token must not go elsewhere; is ONEGATE_ENDPOINT right?"
    )]
    Redirected {
        /// Method and address.
        request: String,
        /// The status of HTTP.
        status: u16,
    },
    /// No whole reply.
    #[error("{request}: OneGate does not answer")]
    NoAnswer {
        /// Method and address.
        request: String,
        /// What happened.
        source: NoAnswer,
    },
    /// A reply that is not what was asked for: from an unknown version of OneGate, or not from
    /// OneGate at all.
    #[error("{request}: the reply is not one of OneGate: {excerpt}")]
    Unexpected {
        /// Method and address.
        request: String,
        /// Its beginning, on one line.
        excerpt: String,
        /// What is wrong with it.
        source: ShapeError,
    },
}

impl OneGateError {
    /// Whether the same request will fail for ever: only where something of this VM, its
    /// configuration or the request itself, must change. All else may heal: OneGate answers 401
    /// also while it does not reach oned, and 404 while OneFlow is down.
    pub fn is_final(&self) -> bool {
        match self {
            Self::BadEndpoint { .. }
            | Self::BadVmId
            | Self::BadToken
            | Self::NoCertificates { .. }
            | Self::BadAttribute { .. }
            | Self::NotInService => true,
            Self::Refused { .. }
            | Self::Redirected { .. }
            | Self::NoAnswer { .. }
            | Self::Unexpected { .. } => false,
        }
    }
}

/// What a refusal probably means (OpenNebula, `src/onegate/onegate-server.rb`).
fn meaning(status: u16, text: &str) -> &'static str {
    match status {
        400 if text.contains("does not contain VM") => {
            "OneFlow has not registered this VM yet, or it is of another service"
        }
        400 if text.contains("is empty") => {
            "OneFlow has not registered the VMs of this service yet"
        }
        400 => "OneGate does not take this request",
        401 => "the token is not valid for this VM, or OneGate does not reach oned",
        403 => "OneGate's configuration does not allow it",
        404 if text.contains("Service") => "there is no such service, or OneFlow is down",
        404 => "OpenNebula has no such VM, or this is not OneGate",
        500 => "OpenNebula rejects it, or OneGate is broken",
        502..=504 => "the proxy before OneGate does not reach it",
        _ => "which OneGate never answers",
    }
}

impl OneGate {
    /// A client with what the VM's context says: the endpoint (`ONEGATE_ENDPOINT`), the VM's number
    /// (`VMID`), and the token. `timeout` is for each request as a whole, from connecting to the
    /// last byte of the reply.
    ///
    /// Where the endpoint is https, the server's certificate must come from one of the CAs in
    /// `ca_file` (PEM) and no other; without a file, from one that the machine trusts (or that
    /// `SSL_CERT_FILE` and `SSL_CERT_DIR` name). They are read here, which blocks.
    ///
    /// # Errors
    /// [`OneGateError`] where one of them cannot be used; it is final.
    pub fn new(
        endpoint: &str,
        vm_id: &str,
        token: Secret,
        ca_file: Option<&Path>,
        timeout: Duration,
    ) -> Result<Self, OneGateError> {
        let endpoint =
            Endpoint::parse(endpoint).map_err(|problem| OneGateError::BadEndpoint { problem })?;
        let vm_id = shape::decimal(vm_id).ok_or(OneGateError::BadVmId)?;
        let token_text = token.expose();
        if token_text.is_empty() || !token_text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(OneGateError::BadToken);
        }
        let tls = endpoint.is_https.then(|| http::tls(ca_file)).transpose().map_err(|source| {
            let origin = ca_file
                .map_or_else(|| "this machine".to_owned(), |path| path.display().to_string());
            OneGateError::NoCertificates { origin, source }
        })?;
        Ok(Self { endpoint, tls, vm_id, token, limit: timeout })
    }

    /// The service of this VM, without its VMs' attributes.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn service(&self) -> Result<Service, OneGateError> {
        self.get("/service", shape::service).await
    }

    /// The service of this VM, with its VMs' attributes: OneGate asks for each VM.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn service_with_attributes(&self) -> Result<Service, OneGateError> {
        self.get("/service?extended=true", shape::service).await
    }

    /// This VM.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn vm(&self) -> Result<Vm, OneGateError> {
        self.get("/vm", shape::vm).await
    }

    /// Another VM of the service.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn vm_of_service(&self, id: u64) -> Result<Vm, OneGateError> {
        self.get(&format!("/vms/{id}"), shape::vm).await
    }

    /// Sets attributes of this VM, all in one request; see [`update_text`] for how they are
    /// written. Others keep their values.
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
        read: fn(&[u8]) -> Result<T, ShapeError>,
    ) -> Result<T, OneGateError> {
        let body = self.request(Method::GET, route, String::new()).await?;
        read(&body).map_err(|source| OneGateError::Unexpected {
            request: self.named(&Method::GET, route),
            excerpt: self.excerpt(&body),
            source,
        })
    }

    /// The body of the reply to a request that OneGate takes; with a form where that is not empty.
    async fn request(
        &self,
        method: Method,
        route: &str,
        form: String,
    ) -> Result<Vec<u8>, OneGateError> {
        let request = self.named(&method, route);
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
        // The length of the form is known, so it goes as Content-Length: OneGate does not read a
        // chunked body.
        let message = message
            .body(Full::from(form))
            .map_err(|_| OneGateError::BadEndpoint { problem: "its path is too long" })?;
        match http::exchange(&self.endpoint, self.tls.as_ref(), message, self.limit).await {
            Ok((status, body)) if status.is_success() => Ok(body),
            Ok((status, _)) if status.is_redirection() => {
                Err(OneGateError::Redirected { request, status: status.as_u16() })
            }
            Ok((status, body)) => Err(self.refused(request, status, &body)),
            Err(source) => Err(OneGateError::NoAnswer { request, source }),
        }
    }

    fn refused(&self, request: String, status: StatusCode, body: &[u8]) -> OneGateError {
        let text = self.excerpt(body);
        if status == StatusCode::BAD_REQUEST && text.contains("Empty or invalid SERVICE_ID") {
            return OneGateError::NotInService;
        }
        OneGateError::Refused { request, status: status.as_u16(), text }
    }

    /// A request as errors name it.
    fn named(&self, method: &Method, route: &str) -> String {
        format!("{method} {}{route}", self.endpoint)
    }

    /// The beginning of a body, on one line and without control characters. Who repeats our request
    /// in it does not make us show the token.
    fn excerpt(&self, body: &[u8]) -> String {
        let text = String::from_utf8_lossy(body);
        let text = text.replace(self.token.expose(), "(the token)");
        let mut excerpt = String::new();
        for character in text.trim().chars() {
            if excerpt.chars().count() >= EXCERPT_CHARACTERS {
                excerpt.push('…');
                break;
            }
            match character {
                '"' | '\'' => excerpt.push(character),
                _ => excerpt.extend(character.escape_debug()),
            }
        }
        if excerpt.is_empty() { "(nothing)".to_owned() } else { excerpt }
    }
}

#[cfg(test)]
mod tests;
