//! Publishes attributes of the node to OneGate. Best effort: a node trains whether or not OneGate
//! accepts them.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::backoff::Backoff;
use crate::logging::error_chain;
use crate::opennebula::onegate::OneGateAccess;
use crate::values::sanitize_line;

/// The part of the attributes that depends on the VM, not on the node's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmIdentity {
    pub id: u64,
    /// Whether OneFlow waits for `READY=YES`.
    pub report_ready: bool,
}

/// Names and values of one update.
pub(crate) type Attributes = Vec<(&'static str, String)>;

/// Publishes attributes in the background.
#[derive(Debug)]
pub(crate) struct Publisher {
    onegate: OneGateAccess,
    vm: VmIdentity,
    latest: watch::Sender<Attributes>,
    task: JoinHandle<()>,
}

impl Publisher {
    pub(crate) fn new(onegate: OneGateAccess) -> Self {
        let (latest, receiver) = watch::channel(Attributes::new());
        let vm = VmIdentity { id: onegate.vm_id(), report_ready: onegate.report_ready() };
        let task = tokio::spawn(publish_changes(onegate.clone(), receiver));
        Self { onegate, vm, latest, task }
    }

    /// Whether it publishes through `onegate`.
    pub(crate) fn uses(&self, onegate: &OneGateAccess) -> bool {
        self.onegate == *onegate
    }

    pub(crate) fn vm(&self) -> &VmIdentity {
        &self.vm
    }

    /// Publishes `attributes` if they differ from the latest ones.
    pub(crate) fn publish(&self, attributes: Attributes) {
        self.latest.send_if_modified(|latest| {
            let changed = *latest != attributes;
            *latest = attributes;
            changed
        });
    }

    /// Makes one attempt to publish `attributes`, then stops publishing.
    pub(crate) async fn publish_last(self, attributes: Attributes) {
        self.task.abort();
        if let Err(error) = self.onegate.client().publish(&attributes).await {
            tracing::info!(
                "cannot publish the last status to OneGate: {}",
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

/// Sends one PUT for each change. A change during a PUT, or after a failed one, is part of the next
/// PUT.
async fn publish_changes(onegate: OneGateAccess, mut latest: watch::Receiver<Attributes>) {
    const INITIAL_DELAY: Duration = Duration::from_secs(10);
    const MAX_DELAY: Duration = Duration::from_secs(300);
    /// Spreads the updates of nodes that start together or lose the same SuperLink.
    const SPREAD: Duration = Duration::from_secs(2);
    while latest.changed().await.is_ok() {
        tokio::time::sleep(SPREAD.mul_f64(fastrand::f64())).await;
        let mut backoff = Backoff::new(INITIAL_DELAY, MAX_DELAY).with_jitter(0.5);
        loop {
            let attributes = latest.borrow_and_update().clone();
            let Err(error) = onegate.client().publish(&attributes).await else {
                if backoff.attempts() > 0 {
                    tracing::info!("publishing to OneGate works again");
                }
                break;
            };
            if backoff.attempts() == 0 {
                tracing::warn!(
                    "cannot publish to OneGate: {}; retrying in the background",
                    sanitize_line(&error_chain(&error))
                );
            }
            // A change does not wait for the end of the delay.
            tokio::select! {
                () = tokio::time::sleep(backoff.next_delay(fastrand::f64())) => {}
                changed = latest.changed() => if changed.is_err() { return },
            }
        }
    }
}
