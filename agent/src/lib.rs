//! `supernode-agent`: turns an OpenNebula VM into a Flower SuperNode.
//!
//! The way of the data, left to right; the middle is pure, input and output happen at the edges:
//!
//! ```text
//! context files -> Context -> Config ┐
//! sysfs -> PciFacts ─────────────────┼-> Verdict ┐
//! child -> ProbeOutcome ─────────────┘           ├-> ContainerSpec -> Client -> Supervisor -> Reporter -> systemd, OneGate
//! address, or OneGate -> SuperLink ──────────────┘                                 │
//! child -> MonitorMessage -> Watch -> Finding ─────────────────────────────────────────────┤
//! the container's log -> Connection, its health -> Liveness ───────────────────────┘
//! ```
//!
//! Beside the Supervisor, and never the node's end: the Exporter, a container of its own, and the
//! page of the metrics, which tells what the Reporter has heard.

pub mod backoff;
pub mod check;
pub mod cli;
pub mod config;
pub mod container;
pub mod daemon;
pub mod docker;
pub mod flower;
pub mod gpu;
pub(crate) mod logging;
pub mod opennebula;
pub(crate) mod report;
pub(crate) mod supervisor;
pub mod system;
pub mod values;
