//! Docker: our words over its API, and the nvidia runtime in its configuration.

pub mod client;
pub mod daemon_json;
pub mod log;
pub mod nvidia_runtime;
pub mod ping;
pub mod pull_progress;
pub mod spec;
