//! Access of this VM to OneGate, from its context.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use one_context::onegate::{OneGate, OneGateError};
use one_context::source::SourceError;
use one_context::{Context, Secret, read_token};

use crate::config::settings::Settings;
use crate::logging::error_chain;
use crate::values::parse_yes_no;

/// The OneGate client, or why there is none.
pub(crate) type OneGateAvailability<'a> = Result<&'a OneGate, &'a OneGateUnavailable>;

/// Why this VM cannot query OneGate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OneGateUnavailable {
    /// The context lacks a variable that OpenNebula adds with the token.
    #[error("the context has no {0} (TOKEN=YES in the VM's CONTEXT adds it)")]
    MissingVariable(&'static str),
    /// The token file is absent or has no token.
    #[error("{} has no token (TOKEN=YES in the VM's CONTEXT adds it)", .0.display())]
    MissingToken(PathBuf),
    /// The token file cannot be read.
    #[error("cannot read the OneGate token")]
    Token(#[source] Arc<SourceError>),
    /// The endpoint, the VM ID, the token or the CA file is invalid.
    #[error("cannot configure the OneGate client")]
    Client(#[source] Arc<OneGateError>),
}

/// Compares the error messages, because the causes are not comparable.
impl PartialEq for OneGateUnavailable {
    fn eq(&self, other: &Self) -> bool {
        error_chain(self) == error_chain(other)
    }
}

impl Eq for OneGateUnavailable {}

/// OneGate configuration in the context.
#[derive(Debug, Clone, PartialEq, Eq)]
struct OneGateContext {
    endpoint: String,
    vm_id: String,
    token: Secret,
    report_ready: bool,
}

impl OneGateContext {
    /// Reads the variables from the context and the token from one_env in `directory`.
    fn read(context: &Context, directory: &Path) -> Result<Self, OneGateUnavailable> {
        let text = |name: &'static str| {
            let value = context.text(name).ok().flatten().map(str::to_owned);
            value.ok_or(OneGateUnavailable::MissingVariable(name))
        };
        let (endpoint, vm_id) = (text("ONEGATE_ENDPOINT")?, text("VMID")?);
        let token = match read_token(directory) {
            Ok(Some(token)) => token,
            Ok(None) => return Err(OneGateUnavailable::MissingToken(directory.join("one_env"))),
            Err(error) => return Err(OneGateUnavailable::Token(Arc::new(error))),
        };
        let report_ready = context
            .text("REPORT_READY")
            .ok()
            .flatten()
            .is_some_and(|text| parse_yes_no(text) == Ok(true));
        Ok(Self { endpoint, vm_id, token, report_ready })
    }
}

/// Client for OneGate, configured from this VM's context.
#[derive(Debug, Clone)]
pub(crate) struct OneGateAccess {
    context: OneGateContext,
    client: Arc<OneGate>,
}

/// Equal if configured from the same values.
impl PartialEq for OneGateAccess {
    fn eq(&self, other: &Self) -> bool {
        self.context == other.context
    }
}

impl OneGateAccess {
    /// Configures the client from the context and the settings.
    ///
    /// # Errors
    /// If a variable or the token is missing, or the endpoint, the VM ID, the token or the CA file
    /// is invalid.
    pub(crate) fn new(context: &Context, settings: &Settings) -> Result<Self, OneGateUnavailable> {
        let context = OneGateContext::read(context, &settings.context.dir)?;
        let client = OneGate::new(
            &context.endpoint,
            &context.vm_id,
            context.token.clone(),
            settings.onegate.ca_file.as_deref(),
            settings.onegate.timeout,
        )
        .map_err(|error| OneGateUnavailable::Client(Arc::new(error)))?;
        Ok(Self { context, client: Arc::new(client) })
    }

    /// The OneGate client.
    pub(crate) fn client(&self) -> &OneGate {
        &self.client
    }

    /// ID of this VM.
    pub(crate) fn vm_id(&self) -> u64 {
        self.client.vm_id()
    }

    /// Whether OneFlow waits for `READY=YES` (`REPORT_READY`).
    pub(crate) fn report_ready(&self) -> bool {
        self.context.report_ready
    }
}
