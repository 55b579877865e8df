//! Flower: release table, log parser, connection state and liveness probe.

pub(crate) mod connection;
pub(crate) mod liveness;
pub mod log;
pub(crate) mod release;
