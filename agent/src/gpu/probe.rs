//! The probe, from outside: a child process of the same binary that asks NVML, with a time limit.
//! Whatever the library does (hang, crash, babble), the agent gets an outcome.

use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _};
use tokio::process::{Child, Command};

use super::nvml::ProbeAnswer;

/// The hidden subcommand that the child runs.
pub const SUBCOMMAND: &str = "nvml-probe";

/// More than a machine full of MIG instances can fill.
const LONGEST_ANSWER_BYTES: u64 = 1 << 20;

/// What came of asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// An answer.
    Answered(ProbeAnswer),
    /// None in this time; the child was killed.
    TimedOut(Duration),
    /// The child died by this signal.
    Crashed(i32),
    /// The child could not be run, or said something else.
    Failed(String),
}

impl ProbeOutcome {
    /// The outcome in a few words.
    pub fn summary(&self) -> String {
        match self {
            Self::Answered(ProbeAnswer::Driver(report)) => {
                let driver = report.driver_version.as_deref().unwrap_or("of an unknown version");
                format!("driver {driver}, {} GPU(s)", report.gpus.len())
            }
            Self::Answered(ProbeAnswer::Failed { fault, .. }) => format!("{} failed: {}", fault.call, fault.text),
            Self::TimedOut(limit) => format!("no answer within {} s", limit.as_secs_f64()),
            Self::Crashed(signal) => format!("died by signal {signal}"),
            Self::Failed(why) => why.clone(),
        }
    }
}

/// Asks `library` through a child process and waits at most `limit` for the answer.
pub async fn probe(library: &str, limit: Duration) -> ProbeOutcome {
    // By this path the child is the very binary that runs, even after an upgrade has replaced the file.
    let spawned = Command::new("/proc/self/exe")
        .arg(SUBCOMMAND)
        .arg("--")
        .arg(library)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return ProbeOutcome::Failed(format!("the probe could not be started: {error}")),
    };
    match tokio::time::timeout(limit, answer_of(&mut child)).await {
        Ok(outcome) => outcome,
        Err(_) => {
            // A process that hangs inside the driver may not even die of SIGKILL: it is not waited for.
            let _ = child.start_kill();
            ProbeOutcome::TimedOut(limit)
        }
    }
}

async fn answer_of(child: &mut Child) -> ProbeOutcome {
    if let Some(out) = child.stdout.take() {
        let mut lines = tokio::io::BufReader::new(out.take(LONGEST_ANSWER_BYTES));
        // One line is the answer: what a library prints beside it is passed over, and one that crashes in its own
        // clean-up afterwards has answered all the same.
        let mut line = Vec::new();
        loop {
            line.clear();
            match lines.read_until(b'\n', &mut line).await {
                Ok(0) => break,
                Ok(_) => {
                    if let Ok(answer) = serde_json::from_slice(&line) {
                        return ProbeOutcome::Answered(answer);
                    }
                }
                Err(error) => return ProbeOutcome::Failed(format!("the probe's answer could not be read: {error}")),
            }
        }
    }
    match child.wait().await {
        Ok(status) => match status.signal() {
            Some(signal) => ProbeOutcome::Crashed(signal),
            None => ProbeOutcome::Failed(format!("the probe ended without an answer ({status})")),
        },
        Err(error) => ProbeOutcome::Failed(format!("the probe could not be waited for: {error}")),
    }
}
