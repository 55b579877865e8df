//! `supernode-agent`: turns an OpenNebula VM into a Flower SuperNode.
//!
//! The way of the data, left to right; the middle is pure, input and output happen at the edges:
//!
//! ```text
//! context files -> Context -> Config ┐
//! sysfs -> PciFacts ─────────────────┼-> Verdict ┐
//! child -> ProbeOutcome ─────────────┘           ├-> ContainerSpec -> Engine -> Supervisor -> Reporter -> systemd, OneGate
//! address, or OneGate -> SuperLink ──────────────┘                                 │
//! child -> Notice -> Watch -> Finding ─────────────────────────────────────────────┤
//! the container's log -> Connection, its health -> Liveness ───────────────────────┘
//! ```
//!
//! Beside the Supervisor, and never the node's end: the Exporter, a container of its own, and the
//! page of the metrics, which tells what the Reporter has heard.

pub mod atomic;
pub mod backoff;
pub mod boot;
pub mod check;
pub mod cli;
pub mod cloud;
pub mod config;
pub mod connection;
pub mod dcgm;
pub mod distribution;
pub mod docker;
pub mod flower;
pub mod gpu;
pub mod health;
pub mod journal;
pub mod lock;
pub mod metrics;
pub mod partition;
pub mod plan;
pub mod report;
pub mod settings;
pub mod site;
pub mod superlink;
pub mod supervisor;
pub mod systemd;
