//! OneGate, the cloud's door for its VMs: what a VM may ask about itself and its service, and what it may publish.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::context::Secret;

/// A client for the VM that it runs in.
#[derive(Debug)]
pub struct OneGate {}

/// A OneFlow service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its number.
    pub id: u64,
    /// Its name.
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
    /// Its attributes, where the service was asked for with them.
    pub attributes: BTreeMap<String, String>,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    /// Its number.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Whether it is active and running (STATE 3, LCM_STATE 3); `None` where OneGate does not say.
    pub is_running: Option<bool>,
    /// The texts of its USER_TEMPLATE: what was published for it. Untrusted.
    pub attributes: BTreeMap<String, String>,
    /// The addresses of its NICs in their order, IPv4 before IPv6 on each; aliases last. Untrusted.
    pub addresses: Vec<std::net::IpAddr>,
}

/// Why OneGate has no answer.
#[derive(Debug, thiserror::Error)]
pub enum OneGateError {
    /// The VM is in no service.
    #[error("the VM is in no service")]
    NotInService,
}

impl OneGateError {
    /// Whether the same request will fail for ever.
    pub fn is_final(&self) -> bool {
        true
    }
}

impl OneGate {
    /// A client.
    ///
    /// # Errors
    /// Of the endpoint and the CA file.
    pub fn new(
        _endpoint: &str,
        _vm_id: &str,
        _token: Secret,
        _ca_file: Option<&Path>,
        _timeout: Duration,
    ) -> Result<Self, OneGateError> {
        Ok(Self {})
    }

    /// The service of this VM, without its VMs' attributes.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn service(&self) -> Result<Service, OneGateError> {
        Err(OneGateError::NotInService)
    }

    /// The service of this VM, with its VMs' attributes: OneGate asks for each VM.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn service_with_attributes(&self) -> Result<Service, OneGateError> {
        Err(OneGateError::NotInService)
    }

    /// This VM.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn vm(&self) -> Result<Vm, OneGateError> {
        Err(OneGateError::NotInService)
    }

    /// Another VM of the service.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn vm_of_service(&self, _id: u64) -> Result<Vm, OneGateError> {
        Err(OneGateError::NotInService)
    }

    /// Sets attributes of this VM, all in one request.
    ///
    /// # Errors
    /// See [`OneGateError`].
    pub async fn publish(&self, _attributes: &[(&str, String)]) -> Result<(), OneGateError> {
        Err(OneGateError::NotInService)
    }
}
