//! The framework container: its specification, and the site hook that is mounted into it.

pub mod plan;
pub mod site_hook;
