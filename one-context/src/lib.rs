//! OpenNebula's contextualization, read as data.
//!
//! The cloud hands a VM its settings as shell files: `context.sh` on the context CD, copied by
//! one-context to `/run/one-context/`. Shells source them; this crate does not. It knows the one
//! form in which OpenNebula writes them, takes nothing else, and names the place of what it
//! refuses. Values may be secrets: no error and no `Debug` shows one.
//!
//! - [`parse`]: the text of `context.sh` to names and values (pure)
//! - [`context`]: [`Context`], the typed look-ups (pure)
//! - [`source`]: which file to read, and when it is whole
//! - [`onegate`]: what the cloud tells a running VM, and what that publishes
//!
//! ```
//! let context = one_context::Context::parse(b"# a comment\nSET_HOSTNAME='alice'\\''s node'\nVMID='7'\n")?;
//! assert_eq!(context.text("SET_HOSTNAME"), Ok(Some("alice's node")));
//! # Ok::<(), one_context::ParseError>(())
//! ```

pub mod context;
pub mod onegate;
pub mod parse;
pub mod source;

pub use context::{Context, NotText, Secret};
pub use parse::{ParseError, ParseErrorKind};
pub use source::{SourceError, read_context, read_token};
