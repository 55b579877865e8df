use std::time::Duration;

use super::choices::{EdgeBackoff, Framework, Isolation, LogFormat, LogLevel};
use super::prebaked::Prebaked;
use crate::values::ca_bundle::CaBundle;
use crate::values::{
    DeviceSelection, Fraction, HostPort, ImageRef, NodeConfig, PciAddress, Version,
};

/// The operator's configuration from the context variables, validated.
///
/// Each field is filled by the row of the table in `variables.rs` that names it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Config {
    /// Input of the verdict.
    pub gpu: GpuRequest,
    /// Limit of the GPU memory that the framework may use.
    pub memory_fraction: Option<Fraction>,
    /// Whether to run the DCGM exporter.
    pub dcgm_enabled: bool,
    /// Flower release.
    pub version: Version,
    /// Machine-learning framework.
    pub framework: Framework,
    /// The operator's own image instead of the one for `framework` and `version`.
    pub image: Option<ImageRef>,
    /// Static address; without one the SuperLink is discovered through OneGate.
    pub superlink_address: Option<HostPort>,
    /// `--node-config`.
    pub node_config: Option<NodeConfig>,
    /// `--max-retries`; 0 is unlimited.
    pub max_retries: u64,
    /// `--max-wait-time` in seconds; 0 is unlimited.
    pub max_wait_time: u64,
    /// `--isolation`.
    pub isolation: Isolation,
    /// Log level of the agent and of Flower.
    pub log_level: LogLevel,
    /// Log format of the agent outside the journal.
    pub log_format: LogFormat,
    /// TLS to the SuperLink; `None` leaves it to the SuperLink.
    pub tls: Option<bool>,
    /// CA certificates that the SuperLink's certificate is verified against.
    pub ca_certificate: Option<CaBundle>,
    /// Seconds between gRPC keepalive pings.
    pub keepalive_time: u64,
    /// Seconds to wait for the acknowledgement of a ping.
    pub keepalive_timeout: u64,
    /// How the delay between discovery attempts grows.
    pub edge_backoff: EdgeBackoff,
    /// Maximum delay between discovery attempts.
    pub edge_max_backoff: Duration,
    /// The image on this machine, used when the requested one is unavailable.
    pub prebaked: Prebaked,
}

/// The operator's choices about the GPU, and the devices that OpenNebula assigned to this VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GpuRequest {
    /// Whether to use a GPU at all.
    pub enabled: bool,
    /// Whether the node must not start without a usable GPU.
    pub required: bool,
    /// The selected GPUs.
    pub selection: DeviceSelection,
    /// Assigned PCI devices, NICs excluded.
    pub assigned: Vec<AssignedDevice>,
}

/// A PCI device that OpenNebula assigned to this VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssignedDevice {
    /// Name of the context variable, `PCI<n>_ADDRESS`; escaped.
    pub variable: String,
    /// Value of the variable; escaped, because it is foreign text that findings quote.
    pub written: String,
    /// The address; `None` if the value is not a PCI address.
    pub address: Option<PciAddress>,
}
