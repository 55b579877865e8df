//! Configuration: the context variables become a [`Config`], `agent.toml` becomes [`settings`].
//!
//! All variables are validated before anything is done, and all errors are reported together.

mod choices;
mod error;
mod fields;
mod kind;
mod parse;
mod prebaked;
pub mod settings;
pub mod variables;

pub use choices::{EdgeBackoff, Framework, Isolation, LogFormat, LogLevel};
pub use error::{ConfigError, ConfigErrors};
pub use fields::{AssignedDevice, Config, GpuRequest};
pub use kind::{Kind, Value};
pub use parse::{Diagnostics, log_settings};
pub use prebaked::Prebaked;
