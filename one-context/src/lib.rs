//! OpenNebula contextualization and OneGate for programs that run in a VM.
//!
//! OpenNebula passes settings to a VM as a shell file, `context.sh` on the context CD, which
//! one-context copies to `/run/one-context/`. Shell scripts source it; this crate parses it as
//! data. It accepts exactly the format that OpenNebula writes and reports the position of anything
//! else. Values can be secrets: no error and no `Debug` output contains one.
//!
//! - [`parse`]: parser for `context.sh` (pure)
//! - [`context`]: [`Context`], the variables and typed accessors (pure)
//! - [`source`]: reads the current file, and waits until it is complete
//! - [`onegate`]: client for OneGate, through which a VM queries its service and publishes
//!   attributes
//!
//! ```
//! let text = b"# a comment\nSET_HOSTNAME='alice'\\''s node'\nVMID='7'\n";
//! let context = one_context::Context::parse(text)?;
//! assert_eq!(context.text("SET_HOSTNAME"), Ok(Some("alice's node")));
//! # Ok::<(), one_context::ParseError>(())
//! ```

pub mod context;
pub mod onegate;
pub mod parse;
pub mod source;

pub use context::{Context, NotUtf8, Secret};
pub use parse::{ParseError, ParseErrorKind};
pub use source::{SourceError, read_context, read_token};
