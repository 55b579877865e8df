//! OpenNebula: access to OneGate, SuperLink discovery, partitions, publishing and templates.

pub mod onegate;
pub mod partition;
pub mod publisher;
pub mod superlink;
pub mod templates;
