//! Discovery: finds the SuperLink and the partition of this node, with the retries of
//! `FL_EDGE_BACKOFF`.

use std::time::{Duration, SystemTime};

use one_context::onegate::{OneGateError, Service};

use super::gate_of;
use crate::backoff::Backoff;
use crate::config::Config;
use crate::config::settings::Settings;
use crate::logging;
use crate::opennebula::onegate::OneGateUnavailable;
use crate::opennebula::partition::{self, Partition, PartitionStore};
use crate::opennebula::publisher::OneGateAccess;
use crate::opennebula::superlink::{Discovery, SuperLink, SuperLinkError, find_superlink};
use crate::report::Reporter;
use crate::values::sanitize_line;

/// Upper bound of the random delay before the first attempt, so that nodes that boot together do
/// not query OneGate together. The GPU and Docker are prepared in the meantime.
pub const MAX_START_DELAY: Duration = Duration::from_secs(5);
const INITIAL_DELAY: Duration = Duration::from_secs(10);
/// Attempts of `FL_EDGE_BACKOFF=fixed`.
const MAX_FIXED_ATTEMPTS: u32 = 30;
/// Largest random addition to a delay, as a fraction of it.
const JITTER: f64 = 0.5;

/// Delays of `FL_EDGE_BACKOFF=exponential`, with `max` from `FL_EDGE_MAX_BACKOFF`.
pub fn exponential_backoff(max: Duration) -> Backoff {
    Backoff::new(INITIAL_DELAY, max).with_jitter(JITTER)
}

/// Delays of `FL_EDGE_BACKOFF=fixed`.
fn fixed_backoff() -> Backoff {
    Backoff::new(INITIAL_DELAY, INITIAL_DELAY).with_jitter(JITTER)
}

/// Looks for the SuperLink until it is found, as `FL_EDGE_BACKOFF` wants it.
pub(super) async fn discover_superlink(
    config: &Config,
    settings: &Settings,
    cloud: &Result<OneGateAccess, OneGateUnavailable>,
    reporter: &Reporter,
) -> Result<SuperLink, SuperLinkError> {
    let (mut backoff, max_attempts) = match config.edge_backoff {
        "fixed" => (fixed_backoff(), MAX_FIXED_ATTEMPTS),
        _ => (exponential_backoff(Duration::from_secs(config.edge_max_backoff)), u32::MAX),
    };
    if config.superlink_address.is_none() {
        tokio::time::sleep(MAX_START_DELAY.mul_f64(fastrand::f64())).await;
    }
    let mut told = String::new();
    loop {
        let error = match find_superlink(gate_of(cloud), config, SystemTime::now()).await {
            Ok(found) => {
                return Ok(with_partition(found, config, settings, cloud, backoff.attempts()).await);
            }
            Err(error) if error.is_final() => return Err(error),
            Err(error) => error,
        };
        let why = sanitize_line(&logging::error_chain(&error));
        let delay = backoff.next_delay(fastrand::f64());
        if backoff.attempts() >= max_attempts {
            return Err(SuperLinkError::AttemptsExhausted {
                attempts: backoff.attempts(),
                last: Box::new(error),
            });
        }
        let (attempt, seconds) = (backoff.attempts() + 1, delay.as_secs());
        reporter.waiting(&format!(
            "waiting for the SuperLink (attempt {attempt}, next in {seconds} s): {why}"
        ));
        // A night of this is one line, for as long as it is the same.
        if why != told {
            tracing::warn!("waiting for the SuperLink, asking again in {seconds} s: {why}");
            told = why;
        }
        tokio::time::sleep(delay).await;
    }
}

/// Says what was found, and adds this node's share of the data.
async fn with_partition(
    found: Discovery,
    config: &Config,
    settings: &Settings,
    cloud: &Result<OneGateAccess, OneGateUnavailable>,
    tries: u32,
) -> SuperLink {
    let Discovery { mut superlink, service, warnings } = found;
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    if let Some(vm_id) = superlink.vm_id {
        let way = if superlink.ca.is_some() { "TLS" } else { "no TLS" };
        tracing::info!(
            "found the SuperLink at {} (VM {vm_id}, {way}, attempt {})",
            superlink.address,
            tries + 1
        );
    }
    if config.node_config.is_none()
        && let Ok(cloud) = cloud
    {
        superlink.partition = partition_of(cloud, service, settings).await;
    }
    superlink
}

/// This node's share of the data. It is worth some seconds, and not the node.
async fn partition_of(
    cloud: &OneGateAccess,
    mut service: Option<Service>,
    settings: &Settings,
) -> Option<Partition> {
    const LIMIT: Duration = Duration::from_secs(15);
    const PAUSE: Duration = Duration::from_secs(2);
    let store = PartitionStore::of(settings, cloud.vm_id());
    if let Some(partition) = store.of_this_boot() {
        return Some(partition);
    }
    let mut why = format!("no answer within {} s", LIMIT.as_secs());
    let take = async {
        loop {
            let taken = async {
                let service = match service.take() {
                    Some(service) => service,
                    None => cloud.gate().service().await?,
                };
                partition::acquire(cloud.gate(), &service, &store).await
            };
            match taken.await {
                Ok(partition) => return partition,
                Err(OneGateError::NotInService) => return None,
                Err(error) => why = sanitize_line(&logging::error_chain(&error)),
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::time::timeout(LIMIT, take).await.unwrap_or_else(|_| {
        tracing::warn!(
            "OneGate does not tell which share of the data is this node's, FL_NODE_CONFIG stays empty: {why}"
        );
        None
    })
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
    fn jitter_is_at_most_half_of_a_delay() {
        assert_eq!(fixed_backoff().next_delay(1.0), Duration::from_secs(15));
    }
}
