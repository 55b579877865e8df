//! Container specification: everything Docker needs to create a container, and the labels by which
//! the agent recognises its own containers.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Serialize;

use crate::values::NodeConfig;

/// Label with the hash of the specification that the container was created from.
pub(crate) const SPEC_HASH_LABEL: &str = "supernode-agent.spec-hash";
/// Label with the agent's `state.dir`, which distinguishes the nodes of one Docker engine.
pub(crate) const STATE_DIR_LABEL: &str = "supernode-agent.state-dir";
/// Label with the verdict: `cuda` or `cpu`.
pub(crate) const VERDICT_LABEL: &str = "supernode-agent.verdict";
/// Label with the size of `/dev/shm` in MiB.
pub(crate) const SHM_SIZE_LABEL: &str = "supernode-agent.shm-size-mib";
/// Label with the reason code of a CPU fallback. Labels describe the launch: an adopted container
/// keeps its labels even if the current agent reached another finding.
pub(crate) const REASON_LABEL: &str = "supernode-agent.reason";
/// Label with the summary of a CPU fallback.
pub(crate) const SUMMARY_LABEL: &str = "supernode-agent.summary";
/// Label with the hash of the GPU specification that this CPU container replaces.
pub(crate) const REFUSED_HASH_LABEL: &str = "supernode-agent.refused-spec-hash";

/// Desired container. Equal specifications create equal containers.
///
/// Field order and names determine [`hash`](Self::hash): a change replaces every node's container
/// at the next upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ContainerSpec {
    pub name: String,
    pub image: String,
    /// Arguments of the image's entry point. A list: no shell parses them.
    pub args: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// OCI runtime. Always explicit, because Docker's default runtime is configurable.
    pub runtime: String,
    /// CDI devices, for injection through CDI.
    pub cdi_devices: Vec<String>,
    /// Labels. Not part of the hash.
    pub labels: BTreeMap<String, String>,
    pub mounts: Vec<MountSpec>,
    /// Digest of the mounted CA file. A bind mount keeps showing a file that was replaced on the
    /// host, so another CA requires another container.
    pub ca_digest: Option<String>,
    /// tmpfs mounts: path and mount options.
    pub tmpfs: BTreeMap<String, String>,
    pub user: String,
    /// Maximum number of processes and threads.
    pub pids_limit: i64,
    /// Size of `/dev/shm` in MiB.
    pub shm_size_mib: u64,
    /// Whether that size is derived from the VM's memory.
    pub shm_follows_memory: bool,
    /// Published ports. Omitted if empty, so that containers without published ports keep their
    /// hash.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortSpec>,
    pub log_driver: String,
    pub log_options: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct MountSpec {
    /// Path on the VM.
    pub source: String,
    /// Path in the container.
    pub target: String,
    pub read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct PortSpec {
    /// Address and port on the VM.
    pub listen: SocketAddr,
    pub port: u16,
}

impl ContainerSpec {
    /// Returns the digest of all fields except the labels. The size of a `/dev/shm` that follows
    /// the memory is excluded, so that memory hot-plug does not interrupt a training.
    pub(crate) fn hash(&self) -> String {
        let mut hashed = Self { labels: BTreeMap::new(), ..self.clone() };
        if hashed.shm_follows_memory {
            hashed.shm_size_mib = 0;
        }
        // Serialising strings and numbers cannot fail.
        digest(&serde_json::to_string(&hashed).unwrap_or_default())
    }

    /// Returns a copy for display, with the secrets of the node configuration hidden.
    pub(crate) fn redacted(&self, node_config: Option<&NodeConfig>) -> Self {
        let mut redacted = self.clone();
        if let Some(node_config) = node_config {
            for argument in
                redacted.args.iter_mut().filter(|argument| *argument == node_config.as_str())
            {
                *argument = node_config.redacted();
            }
        }
        redacted
    }
}

/// Returns the 64-bit FNV-1a hash of `text`. It detects changes and is not cryptographic.
pub(crate) fn digest(text: &str) -> String {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", text.bytes().fold(0xcbf2_9ce4_8422_2325, step))
}
