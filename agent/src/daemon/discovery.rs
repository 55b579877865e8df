//! Discovery: finds the SuperLink and the partition of this node. `run` retries as specified by
//! `FL_EDGE_BACKOFF`; `plan` makes one attempt and changes nothing.

use std::time::{Duration, SystemTime};

use one_context::onegate::{OneGateError, Service};

use super::desired_state::{DesiredState, availability};
use crate::backoff::Backoff;
use crate::config::EdgeBackoff;
use crate::config::settings::Settings;
use crate::logging::error_chain;
use crate::opennebula::onegate::OneGateAccess;
use crate::opennebula::partition::{self, Partition, PartitionStore};
use crate::opennebula::superlink::{Discovery, SuperLink, SuperLinkError, find_superlink};
use crate::report::Reporter;
use crate::values::sanitize_line;

/// Upper bound of the random delay before the first attempt, so that nodes that boot together do
/// not query OneGate together. The GPU and Docker are prepared in the meantime.
pub const MAX_START_DELAY: Duration = Duration::from_secs(5);
const INITIAL_DELAY: Duration = Duration::from_secs(10);
/// Maximum number of attempts with `FL_EDGE_BACKOFF=fixed`.
const MAX_FIXED_ATTEMPTS: u32 = 30;
/// Maximum jitter, as a fraction of the delay.
const JITTER: f64 = 0.5;

/// Delays of `FL_EDGE_BACKOFF=exponential`, with `max` from `FL_EDGE_MAX_BACKOFF`.
pub fn exponential_backoff(max: Duration) -> Backoff {
    Backoff::new(INITIAL_DELAY, max).with_jitter(JITTER)
}

/// Delays of `FL_EDGE_BACKOFF=fixed`.
fn fixed_backoff() -> Backoff {
    Backoff::new(INITIAL_DELAY, INITIAL_DELAY).with_jitter(JITTER)
}

/// Finds the SuperLink, with retries, and acquires a partition of the service.
///
/// # Errors
/// If a retry is pointless, or the attempts of `FL_EDGE_BACKOFF=fixed` are exhausted.
pub(super) async fn discover_superlink(
    desired: &DesiredState,
    reporter: &Reporter,
) -> Result<SuperLink, SuperLinkError> {
    let DesiredState { config, settings, onegate } = desired;
    let (mut backoff, max_attempts) = match config.edge_backoff {
        EdgeBackoff::Fixed => (fixed_backoff(), MAX_FIXED_ATTEMPTS),
        EdgeBackoff::Exponential => (exponential_backoff(config.edge_max_backoff), u32::MAX),
    };
    if config.superlink_address.is_none() {
        tokio::time::sleep(MAX_START_DELAY.mul_f64(fastrand::f64())).await;
    }
    let mut logged = String::new();
    let Discovery { mut superlink, service, warnings } = loop {
        let error = match find_superlink(availability(onegate), config, SystemTime::now()).await {
            Ok(discovery) => break discovery,
            Err(error) if error.is_final() => return Err(error),
            Err(error) => error,
        };
        let cause = sanitize_line(&error_chain(&error));
        let delay = backoff.next_delay(fastrand::f64());
        if backoff.attempts() >= max_attempts {
            let attempts = backoff.attempts();
            return Err(SuperLinkError::AttemptsExhausted { attempts, last: Box::new(error) });
        }
        let (attempt, seconds) = (backoff.attempts() + 1, delay.as_secs());
        reporter.update(|status| {
            status.set_superlink_wait(format!(
                "waiting for the SuperLink (attempt {attempt}, next in {seconds} s): {cause}"
            ));
        });
        // Consecutive attempts with the same cause are logged once.
        if cause != logged {
            tracing::warn!(
                attempt = backoff.attempts(),
                "cannot find the SuperLink: {cause}; retrying in {seconds} s"
            );
            logged = cause;
        }
        tokio::time::sleep(delay).await;
    };
    log_discovery(&superlink, &warnings, backoff.attempts() + 1);
    if config.node_config.is_none()
        && let Ok(onegate) = onegate
    {
        superlink.partition = acquire_partition(onegate, service, settings).await;
    }
    Ok(superlink)
}

fn log_discovery(superlink: &SuperLink, warnings: &[String], attempt: u32) {
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    if let Some(vm_id) = superlink.vm_id {
        let tls = if superlink.ca.is_some() { "TLS" } else { "no TLS" };
        let address = &superlink.address;
        tracing::info!(
            superlink = %address,
            attempt,
            "found the SuperLink at {address} (VM {vm_id}, {tls}, attempt {attempt})"
        );
    }
}

/// Acquires a partition of the service. Returns `None` outside a service, and after a time limit,
/// because a node without a partition is better than no node.
async fn acquire_partition(
    onegate: &OneGateAccess,
    mut service: Option<Service>,
    settings: &Settings,
) -> Option<Partition> {
    const TIMEOUT: Duration = Duration::from_secs(15);
    const RETRY_DELAY: Duration = Duration::from_secs(2);
    let store = PartitionStore::open(settings, onegate.vm_id());
    if let Some(partition) = store.current_boot_partition() {
        return Some(partition);
    }
    let mut cause = format!("no answer within {} s", TIMEOUT.as_secs());
    let acquire = async {
        loop {
            let attempt = async {
                let service = match service.take() {
                    Some(service) => service,
                    None => onegate.client().service().await?,
                };
                partition::acquire(onegate.client(), &service, &store).await
            };
            match attempt.await {
                Ok(partition) => return partition,
                Err(OneGateError::NotInService) => return None,
                Err(error) => cause = sanitize_line(&error_chain(&error)),
            }
            tokio::time::sleep(RETRY_DELAY).await;
        }
    };
    tokio::time::timeout(TIMEOUT, acquire).await.unwrap_or_else(|_| {
        tracing::warn!(
            "cannot get a partition from OneGate: {cause}; starting without --node-config"
        );
        None
    })
}

/// Result of one discovery attempt that publishes and stores nothing.
#[derive(Debug, Default)]
pub(crate) struct DiscoveryPreview {
    /// The SuperLink, with the partition if it is known already.
    pub superlink: Option<SuperLink>,
    /// Differences from `run`, and information for the operator.
    pub notes: Vec<String>,
}

/// Runs one attempt for `plan`.
pub(crate) async fn preview_superlink(desired: &DesiredState) -> DiscoveryPreview {
    let DesiredState { config, settings, onegate } = desired;
    let Discovery { mut superlink, service, warnings: mut notes } =
        match find_superlink(availability(onegate), config, SystemTime::now()).await {
            Ok(discovery) => discovery,
            Err(error) => {
                let outcome = if error.is_final() {
                    "the node would not start"
                } else {
                    "the node would wait for the SuperLink"
                };
                let note = format!("{outcome}: {}", sanitize_line(&error_chain(&error)));
                return DiscoveryPreview { superlink: None, notes: vec![note] };
            }
        };
    if let (None, Ok(onegate)) = (&config.node_config, onegate) {
        let store = PartitionStore::open(settings, onegate.vm_id());
        let service = match service {
            Some(service) => Ok(service),
            None => onegate.client().service().await,
        };
        superlink.partition = store
            .current_boot_partition()
            .or_else(|| partition::known_partition(service.as_ref().ok()?, &store));
        match service {
            Ok(_) if superlink.partition.is_none() => notes.push(
                "the node would take a partition that no other node of the service has".into(),
            ),
            Ok(_) | Err(OneGateError::NotInService) => {}
            Err(error) => notes.push(format!(
                "cannot determine the partition: {}",
                sanitize_line(&error_chain(&error))
            )),
        }
    }
    DiscoveryPreview { superlink: Some(superlink), notes }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delays(mut backoff: Backoff) -> [u64; 7] {
        std::array::from_fn(|_| backoff.next_delay(0.0).as_secs())
    }

    #[test]
    fn exponential_delays_double_up_to_max() {
        let backoff = exponential_backoff(Duration::from_secs(300));
        assert_eq!(delays(backoff), [10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(delays(exponential_backoff(Duration::from_secs(3))), [3; 7]);
    }

    #[test]
    fn fixed_delays_stay_at_ten_seconds() {
        assert_eq!(delays(fixed_backoff()), [10; 7]);
    }

    #[test]
    fn jitter_adds_up_to_half_a_delay() {
        assert_eq!(fixed_backoff().next_delay(1.0), Duration::from_secs(15));
    }
}
