//! Docker: our words over its API, and the nvidia runtime in its configuration.

pub mod daemon_json;
pub mod engine;
pub mod log;
pub mod ping;
pub mod pull;
pub mod runtime;
