//! Docker: API client, container log, pull progress and the nvidia runtime in daemon.json.

pub(crate) mod client;
pub mod daemon_json;
pub(crate) mod log;
pub(crate) mod nvidia_runtime;
pub(crate) mod ping;
pub(crate) mod pull_progress;
pub(crate) mod spec;
