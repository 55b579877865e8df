//! `supernode-agent`: turns an OpenNebula VM into a Flower SuperNode.
//!
//! # Data flow
//!
//! Data flows from left to right. Everything up to the container specification is pure; input and
//! output happen at the edges.
//!
//! ```text
//! context files ──> Context ──> Config ─┐
//! agent.toml ─────────────> Settings ───┤
//! sysfs ──────────────────> PciFacts ───┼─> Verdict ──┐
//! probe of NVML ──────> ProbeOutcome ───┘             ├─> ContainerSpec ──> Docker
//! FL_SUPERLINK_ADDRESS or OneGate ──────> SuperLink ──┘
//! ```
//!
//! Once the container runs, the supervisor reacts to events. The state machine turns them into
//! commands, and the node's status is rendered by several sinks:
//!
//! ```text
//! Docker events ────────┐
//! GPU monitor (NVML) ───┤
//! container log ────────┼─> supervisor <──> state machine
//! liveness probe ───────┤       │
//! discovery (OneGate) ──┘       └─> NodeStatus ──> systemd, status file, OneGate, metrics
//! ```
//!
//! The DCGM exporter and the metrics endpoint run next to the supervisor. Their failures never stop
//! the node.
//!
//! # Module guide
//!
//! | topic | module |
//! | --- | --- |
//! | Decision between GPU and CPU | [`gpu::decide`] |
//! | Steps of `run`, including reload | [`daemon`] |
//! | Arguments of the container | [`container::plan`] |
//! | Discovery of the SuperLink and trust in it | [`opennebula::superlink`] |
//! | A container that exits, hangs or loses its GPU | [`supervisor`] |
//! | Context variables | [`config::variables`] |

pub mod backoff;
pub mod check;
pub mod cli;
pub mod config;
pub(crate) mod container;
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
