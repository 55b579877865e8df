//! Flower: its releases, and what its log, its connection and its health check report.

pub mod connection;
pub mod liveness;
pub mod log;
pub mod release;
