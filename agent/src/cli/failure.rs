//! Failures of commands, and the runtime that asynchronous commands run on.

use std::io;

use crate::daemon::{DaemonError, EXIT_RETRY};
use crate::logging::error_chain;

/// A failed command: its exit code and the lines for stderr.
pub(super) struct Failure {
    pub(super) code: u8,
    pub(super) lines: Vec<String>,
}

impl Failure {
    pub(super) fn new(code: u8, line: impl ToString) -> Self {
        Self { code, lines: vec![line.to_string()] }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            // The reader has closed the pipe, which is no failure.
            return Self { code: 0, lines: Vec::new() };
        }
        Self::new(EXIT_RETRY, format!("cannot write the output: {error}"))
    }
}

impl From<DaemonError> for Failure {
    fn from(error: DaemonError) -> Self {
        let lines = match &error {
            DaemonError::Config(errors) => errors.lines().collect(),
            error => vec![error_chain(error)],
        };
        Self { code: error.exit_code(), lines }
    }
}

/// Runs a future on a new runtime. Returns without waiting for a probe that hangs in the driver.
pub(super) fn block_on<T>(future: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
            Failure::new(EXIT_RETRY, format!("cannot start the async runtime: {error}"))
        })?;
    let output = runtime.block_on(future);
    runtime.shutdown_background();
    Ok(output)
}
