//! OpenNebula: access to OneGate, SuperLink discovery, partitions, publishing and templates.

pub(crate) mod onegate;
pub(crate) mod partition;
pub(crate) mod publisher;
pub mod superlink;
pub mod templates;
