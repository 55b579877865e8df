//! OpenNebula: discovery of the SuperLink, the partition, publishing, and generated templates.

pub mod partition;
pub mod publisher;
pub mod superlink;
pub mod templates;
