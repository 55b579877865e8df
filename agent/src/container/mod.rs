//! The framework container: its image, its specification, and the site hook mounted into it.

pub mod image;
pub mod plan;
pub mod site_hook;
