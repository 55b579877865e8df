//! What the VM is to the cloud: how OneGate is reached from here, and what is published there about
//! the node.
//!
//! Publishing is best effort: a node trains whether or not somebody hears of it. OneFlow opens the
//! gate of a role on the text `READY=YES` in any update (EventManager.rb), so that text leaves only
//! while the node is connected.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use one_context::onegate::OneGate;
use one_context::{Context, Secret, read_token};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::backoff::Backoff;
use crate::config::settings::Settings;
use crate::logging::error_chain;
use crate::opennebula::onegate::OneGateUnavailable;
use crate::values::parse_yes_no;
use crate::values::sanitize_line;

/// The way to OneGate, as the context has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Access {
    endpoint: String,
    vm_id: String,
    token: Secret,
    /// Whether the cloud waits for `READY=YES` (`REPORT_READY`).
    report_ready: bool,
}

impl Access {
    /// Reads it from the context and, for the token, from one_env in `dir`.
    fn read(context: &Context, dir: &Path) -> Result<Self, OneGateUnavailable> {
        let text = |name: &'static str| {
            let value = context.text(name).ok().flatten().map(str::to_owned);
            value.ok_or(OneGateUnavailable::MissingVariable(name))
        };
        let (endpoint, vm_id) = (text("ONEGATE_ENDPOINT")?, text("VMID")?);
        let token = match read_token(dir) {
            Ok(Some(token)) => token,
            Ok(None) => return Err(OneGateUnavailable::MissingToken(dir.join("one_env"))),
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

/// OneGate as this VM reaches it.
#[derive(Debug, Clone)]
pub struct OneGateAccess {
    access: Access,
    gate: Arc<OneGate>,
}

/// Two are equal where they were made from the same.
impl PartialEq for OneGateAccess {
    fn eq(&self, other: &Self) -> bool {
        self.access == other.access
    }
}

impl OneGateAccess {
    /// Reads the way from the context.
    ///
    /// # Errors
    /// What is missing, or what is wrong with the endpoint, the VM's number, the token or the CA
    /// file.
    pub fn of(context: &Context, settings: &Settings) -> Result<Self, OneGateUnavailable> {
        let access = Access::read(context, &settings.context.dir)?;
        let gate = OneGate::new(
            &access.endpoint,
            &access.vm_id,
            access.token.clone(),
            settings.onegate.ca_file.as_deref(),
            settings.onegate.timeout,
        )
        .map_err(|error| OneGateUnavailable::Client(Arc::new(error)))?;
        Ok(Self { access, gate: Arc::new(gate) })
    }

    /// The client.
    pub fn gate(&self) -> &OneGate {
        &self.gate
    }

    /// This VM's number; 0 where it is none, which the client has refused.
    pub fn vm_id(&self) -> u64 {
        self.access.vm_id.parse().unwrap_or(0)
    }
}

/// What the attributes say about this VM beside the node's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmIdentity {
    pub id: u64,
    /// Whether OneFlow waits for `READY=YES` (`REPORT_READY`).
    pub report_ready: bool,
}

/// Names and values of one update.
pub(crate) type Attributes = Vec<(&'static str, String)>;

/// Publishes attributes in the background.
#[derive(Debug)]
pub(crate) struct Publisher {
    onegate: OneGateAccess,
    vm: VmIdentity,
    wanted: watch::Sender<Attributes>,
    task: JoinHandle<()>,
}

impl Publisher {
    pub(crate) fn new(onegate: OneGateAccess) -> Self {
        let (wanted, receiver) = watch::channel(Attributes::new());
        let vm = VmIdentity { id: onegate.vm_id(), report_ready: onegate.access.report_ready };
        let task = tokio::spawn(publish_changes(onegate.clone(), receiver));
        Self { onegate, vm, wanted, task }
    }

    /// Whether it publishes through `onegate`.
    pub(crate) fn uses(&self, onegate: &OneGateAccess) -> bool {
        self.onegate == *onegate
    }

    pub(crate) fn vm(&self) -> &VmIdentity {
        &self.vm
    }

    /// Publishes `attributes` if they differ from the last ones.
    pub(crate) fn publish(&self, attributes: Attributes) {
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != attributes;
            *wanted = attributes;
            changed
        });
    }

    /// Publishes `attributes` in one attempt and ends.
    pub(crate) async fn publish_last(self, attributes: Attributes) {
        self.task.abort();
        if let Err(error) = self.onegate.gate.publish(&attributes).await {
            tracing::info!(
                "cannot publish the end of the node to OneGate: {}",
                sanitize_line(&error_chain(&error))
            );
        }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Sends one PUT for each change. Changes during a PUT or after a failed one go with the next.
async fn publish_changes(onegate: OneGateAccess, mut wanted: watch::Receiver<Attributes>) {
    const INITIAL_DELAY: Duration = Duration::from_secs(10);
    const MAX_DELAY: Duration = Duration::from_secs(300);
    /// Spreads the updates of nodes that start together or lose the same SuperLink.
    const SPREAD: Duration = Duration::from_secs(2);
    while wanted.changed().await.is_ok() {
        tokio::time::sleep(SPREAD.mul_f64(fastrand::f64())).await;
        let mut backoff = Backoff::new(INITIAL_DELAY, MAX_DELAY).with_jitter(0.5);
        loop {
            let attributes = wanted.borrow_and_update().clone();
            let Err(error) = onegate.gate.publish(&attributes).await else {
                if backoff.attempts() > 0 {
                    tracing::info!("published to OneGate again");
                }
                break;
            };
            if backoff.attempts() == 0 {
                tracing::warn!(
                    "cannot publish to OneGate: {}; retrying in the background",
                    sanitize_line(&error_chain(&error))
                );
            }
            // A change is worth an attempt before the delay is over.
            tokio::select! {
                () = tokio::time::sleep(backoff.next_delay(fastrand::f64())) => {}
                changed = wanted.changed() => if changed.is_err() { return },
            }
        }
    }
}
