//! What the VM is to the cloud: how OneGate is reached from here, and what is published there about
//! the node.
//!
//! Publishing is best effort: a node trains whether or not somebody hears of it. OneFlow opens the
//! gate of a role on the text `READY=YES` in any update (EventManager.rb), so that text leaves only
//! while the node is connected.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use one_context::onegate::{OneGate, OneGateError};
use one_context::{Context, Secret, read_token};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::backoff::Backoff;
use crate::config::settings::Settings;
use crate::logging::error_chain;
use crate::opennebula::onegate::OneGateUnavailable;
use crate::opennebula::partition;
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
        let ca_file =
            Some(settings.onegate.ca_file.as_str()).filter(|file| !file.is_empty()).map(Path::new);
        let gate = OneGate::new(
            &access.endpoint,
            &access.vm_id,
            access.token.clone(),
            ca_file,
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

/// What a node publishes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeAttributes {
    /// Release of Flower.
    pub version: String,
    /// Framework.
    pub framework: String,
    /// Names of the GPUs in use.
    pub gpus: Vec<String>,
    /// `gpu`, `cpu-fallback`, `cpu`; empty until it is decided, and after the end.
    pub gpu_status: &'static str,
    /// The reason's code, on a fallback.
    pub fallback_reason: &'static str,
    /// The share of the data.
    pub partition: Option<u64>,
    /// Whether the node is connected to its SuperLink.
    pub ready: bool,
}

/// Publishes the node's news.
#[derive(Debug)]
pub struct Publisher {
    cloud: OneGateAccess,
    wanted: watch::Sender<Option<NodeAttributes>>,
    task: JoinHandle<()>,
}

impl Publisher {
    /// Publishes by this way from now on.
    pub fn new(cloud: OneGateAccess) -> Self {
        let (wanted, receiver) = watch::channel(None);
        let task = tokio::spawn(publish_changes(cloud.clone(), receiver));
        Self { cloud, wanted, task }
    }

    /// Whether it publishes by this way.
    pub fn is_by(&self, cloud: &OneGateAccess) -> bool {
        self.cloud == *cloud
    }

    /// What is true from now on.
    pub fn publish(&self, news: &NodeAttributes) {
        self.wanted.send_if_modified(|wanted| {
            let changed = wanted.as_ref() != Some(news);
            if changed {
                *wanted = Some(news.clone());
            }
            changed
        });
    }

    /// The last words, as far as OneGate takes them in time: nothing is ready here any more.
    pub async fn finish(self) {
        self.task.abort();
        let last = self.wanted.borrow().clone().unwrap_or_default();
        let news = NodeAttributes {
            gpus: Vec::new(),
            gpu_status: "",
            fallback_reason: "",
            ready: false,
            ..last
        };
        if let Err(error) = send(&self.cloud, &news).await {
            tracing::info!(
                "OneGate was not told of the end: {}",
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

async fn send(cloud: &OneGateAccess, news: &NodeAttributes) -> Result<(), OneGateError> {
    cloud.gate.publish(&attributes(&cloud.access, news)).await
}

/// One PUT for each change; what changes while one is on its way, or failed, goes with the next.
async fn publish_changes(
    cloud: OneGateAccess,
    mut wanted: watch::Receiver<Option<NodeAttributes>>,
) {
    const INITIAL_DELAY: Duration = Duration::from_secs(10);
    const MAX_DELAY: Duration = Duration::from_secs(300);
    /// Nodes that start together, or lose one SuperLink, do not all write at once.
    const SPREAD: Duration = Duration::from_secs(2);
    while wanted.changed().await.is_ok() {
        tokio::time::sleep(SPREAD.mul_f64(fastrand::f64())).await;
        let mut backoff = Backoff::new(INITIAL_DELAY, MAX_DELAY).with_jitter(0.5);
        loop {
            let Some(news) = wanted.borrow_and_update().clone() else {
                break;
            };
            let Err(error) = send(&cloud, &news).await else {
                if backoff.attempts() > 0 {
                    tracing::info!("OneGate takes what the node publishes again");
                }
                break;
            };
            if backoff.attempts() == 0 {
                tracing::warn!(
                    "OneGate does not take what the node publishes, which goes on without; it is tried again in silence: {}",
                    sanitize_line(&error_chain(&error))
                );
            }
            // Something new is worth a try before its time.
            tokio::select! {
                () = tokio::time::sleep(backoff.next_delay(fastrand::f64())) => {}
                changed = wanted.changed() => if changed.is_err() { return },
            }
        }
    }
}

/// The attributes, all of them each time: what an earlier boot left is overwritten. A value that is
/// empty erases.
fn attributes(access: &Access, news: &NodeAttributes) -> Vec<(&'static str, String)> {
    let yes_no = |yes: bool| if yes { "YES" } else { "NO" }.to_owned();
    let on_gpu = news.gpu_status == "gpu";
    let mut attributes = vec![
        ("FL_NODE_READY", yes_no(news.ready)),
        (partition::OWNER_ATTRIBUTE, access.vm_id.clone()),
        ("FL_VERSION", news.version.clone()),
        ("FL_FRAMEWORK", news.framework.clone()),
        ("FL_GPU_AVAILABLE", yes_no(on_gpu)),
        ("FL_GPU_STATUS", news.gpu_status.into()),
        ("FL_GPU_FALLBACK_REASON", news.fallback_reason.into()),
        (
            "FL_GPU_COUNT",
            if news.gpu_status.is_empty() { String::new() } else { news.gpus.len().to_string() },
        ),
        ("FL_GPU_NAME", news.gpus.join("; ")),
    ];
    if let Some(id) = news.partition {
        attributes.push((partition::ATTRIBUTE, id.to_string()));
    }
    if access.report_ready {
        attributes.push(("READY", yes_no(news.ready)));
    }
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(report_ready: bool) -> Access {
        Access {
            endpoint: "http://h".into(),
            vm_id: "101".into(),
            token: Secret::new("t"),
            report_ready,
        }
    }

    fn text(access: &Access, news: &NodeAttributes) -> String {
        let lines: Vec<String> = attributes(access, news)
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        lines.join("\n")
    }

    #[test]
    fn ready_is_told_only_while_it_is_true_and_only_where_the_cloud_waits_for_it() {
        let mut news = NodeAttributes {
            gpu_status: "gpu",
            gpus: vec!["NVIDIA A100".into()],
            ..NodeAttributes::default()
        };
        assert!(!text(&access(true), &news).contains("READY=YES"));
        news.ready = true;
        let all = text(&access(true), &news);
        assert!(all.contains("FL_NODE_READY=YES") && all.ends_with("\nREADY=YES"), "{all}");
        assert!(!text(&access(false), &news).contains("\nREADY="));
    }

    #[test]
    fn what_an_earlier_boot_left_is_overwritten() {
        let before = text(&access(false), &NodeAttributes::default());
        for line in [
            "FL_GPU_AVAILABLE=NO",
            "FL_GPU_STATUS=",
            "FL_GPU_FALLBACK_REASON=",
            "FL_GPU_COUNT=",
            "FL_GPU_NAME=",
        ] {
            assert!(before.lines().any(|found| found == line), "{line}: {before}");
        }
        let news = NodeAttributes {
            gpu_status: "cpu-fallback",
            fallback_reason: "gpu-not-present",
            ..NodeAttributes::default()
        };
        let fallback = text(&access(false), &news);
        assert!(fallback.contains(
            "FL_GPU_AVAILABLE=NO\nFL_GPU_STATUS=cpu-fallback\nFL_GPU_FALLBACK_REASON=gpu-not-present\nFL_GPU_COUNT=0"
        ));
    }
}
