//! Whether this VM can query OneGate.

use std::path::PathBuf;
use std::sync::Arc;

use one_context::onegate::{OneGate, OneGateError};
use one_context::source::SourceError;

use crate::logging::error_chain;

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

/// Equal if an operator would read the same text: the causes are not comparable.
impl PartialEq for OneGateUnavailable {
    fn eq(&self, other: &Self) -> bool {
        error_chain(self) == error_chain(other)
    }
}

impl Eq for OneGateUnavailable {}
