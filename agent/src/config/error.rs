use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::values::ValidationError;

/// All errors in the configuration, reported together.
#[derive(Debug, thiserror::Error)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl ConfigErrors {
    /// Returns one line for each error.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(ConfigError::to_string)
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines().collect::<Vec<_>>().join("\n"))
    }
}

/// One error in the configuration.
///
/// A `value` is quoted for display, or hidden if it may be secret.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The value of a variable is not accepted.
    #[error("{name}={value}: {reason}")]
    Invalid {
        /// The variable as the operator wrote it.
        name: String,
        /// Its value.
        value: String,
        /// What is accepted.
        reason: ValidationError,
    },
    /// The value of a variable is not text.
    #[error("{name}={value}: must be UTF-8 text: {accepted}")]
    NotUtf8 {
        /// The variable as the operator wrote it.
        name: String,
        /// Its value.
        value: String,
        /// What is accepted.
        accepted: String,
    },
    /// A variable is set under two names with different values.
    #[error(
        "{}={} and {}={}: both are set and differ; set one of them",
        first.0, first.1, second.0, second.1
    )]
    Conflict {
        /// Name and value.
        first: (String, String),
        /// Name and value.
        second: (String, String),
    },
    /// The keepalive timeout is not less than the interval between pings.
    #[error("{timeout}: must be less than {time}")]
    KeepaliveTimeout {
        /// Name and value of the timeout.
        timeout: String,
        /// Name and value of the interval.
        time: String,
    },
    /// A file of the image build cannot be read.
    #[error("{}: {error}", path.display())]
    UnreadableFile {
        /// The file.
        path: PathBuf,
        /// The cause; part of the message, because each error is one line.
        error: io::Error,
    },
    /// The content of a file of the image build is not accepted.
    #[error("{}: {value} {reason}", path.display())]
    InvalidFile {
        /// The file.
        path: PathBuf,
        /// Its content.
        value: String,
        /// What is accepted.
        reason: ValidationError,
    },
}
