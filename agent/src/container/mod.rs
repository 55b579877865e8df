//! The framework container: its image, its specification, and the site hook mounted into it.

pub(crate) mod image;
pub(crate) mod plan;
pub(crate) mod site_hook;
