//! Parent side of the probe: runs one NVML query in a child process of the same binary, with a
//! timeout. Whatever the library does (hang, crash, write without end), the agent gets an outcome.
//! The child side is [`crate::gpu::probe_child`].

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::nvml_error::{Fault, FaultKind};
use super::nvml_library::LibraryFile;
use super::probe_child::ProbeAnswer;
use crate::values::sanitize_line;

/// Hidden subcommand that the child runs.
pub const SUBCOMMAND: &str = "nvml-probe";

/// Larger than the answer of a machine full of MIG instances.
const MAX_ANSWER_BYTES: u64 = 1 << 20;
/// How long the pipes of an exited child are still read.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(200);

/// Result of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// The child answered.
    Answered(ProbeAnswer),
    /// The child did not answer in time and was killed.
    TimedOut {
        /// The timeout.
        limit: Duration,
        /// Facts about the library file.
        library: LibraryFile,
    },
    /// The child was killed by a signal.
    Crashed {
        /// Signal number.
        signal: i32,
        /// End of its standard error.
        stderr: String,
        /// Facts about the library file.
        library: LibraryFile,
    },
    /// The child could not be run or gave no valid answer.
    Failed(String),
}

impl ProbeOutcome {
    /// Returns a short description.
    pub fn summary(&self) -> String {
        match self {
            Self::Answered(ProbeAnswer::Driver(report)) => {
                format!("{}, {} GPU(s)", report.driver(), report.gpus.len())
            }
            Self::Answered(ProbeAnswer::Failed { fault, .. }) => {
                format!("{} failed: {}", fault.call, fault.text)
            }
            Self::TimedOut { limit, .. } => format!("no response within {} s", limit.as_secs_f64()),
            Self::Crashed { signal, .. } => format!("killed by signal {signal}"),
            Self::Failed(error) => error.clone(),
        }
    }
}

/// Probes NVML through `library` in a child process, within `limit`.
pub async fn probe(library: &str, limit: Duration) -> ProbeOutcome {
    // This path is the running binary even after an upgrade has replaced the file.
    let spawned = Command::new("/proc/self/exe")
        .arg(SUBCOMMAND)
        .arg("--")
        .arg(library)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Its own process group, so that processes started by the library are killed with it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            return ProbeOutcome::Failed(format!("cannot start the probe: {error}"));
        }
    };
    let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    let outcome = tokio::time::timeout(limit, read_answer(&mut child))
        .await
        .unwrap_or(ProbeOutcome::TimedOut { limit, library: LibraryFile::default() });
    // A process that hangs inside the driver may survive SIGKILL, so it is not waited for.
    if let Some(group) = group {
        let _ = kill_process_group(group, Signal::KILL);
    }
    with_library_file(outcome, library)
}

/// Adds the facts about the library file, which a killed child could not report. SIGBUS means that
/// the file is truncated: reading the missing end of a mapped file raises it.
fn with_library_file(outcome: ProbeOutcome, library: &str) -> ProbeOutcome {
    const SIGBUS: i32 = 7;
    match outcome {
        ProbeOutcome::TimedOut { limit, .. } => {
            ProbeOutcome::TimedOut { limit, library: LibraryFile::inspect(library) }
        }
        ProbeOutcome::Crashed { signal, stderr, .. } => {
            let library = LibraryFile::inspect(library);
            if signal != SIGBUS || library.damage.is_none() {
                return ProbeOutcome::Crashed { signal, stderr, library };
            }
            let text = "the loader was killed by SIGBUS".into();
            let fault = Fault { call: "dlopen".into(), kind: FaultKind::Library, text };
            ProbeOutcome::Answered(ProbeAnswer::Failed { fault, library })
        }
        other => other,
    }
}

async fn read_answer(child: &mut Child) -> ProbeOutcome {
    let (Some(stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return ProbeOutcome::Failed("the probe has no standard output".into());
    };
    let mut stdout = BufReader::new(stdout.take(MAX_ANSWER_BYTES));
    let (mut line, mut stderr_tail) = (Vec::new(), Tail::default());
    let mut chunk = [0; 1024];
    let (mut stdout_is_open, mut stderr_is_open) = (true, true);
    // After the exit the pipes are drained, but not until they close: a process that the library
    // started may hold them open.
    let mut exit: Option<io::Result<ExitStatus>> = None;
    let mut deadline = Instant::now();
    while exit.is_none() || stdout_is_open || stderr_is_open {
        tokio::select! {
            read = stdout.read_until(b'\n', &mut line), if stdout_is_open => {
                // The answer is one line. Other output of the library is ignored, and so is a crash
                // after the answer.
                if let Ok(answer) = serde_json::from_slice(&line) {
                    return ProbeOutcome::Answered(answer);
                }
                stdout_is_open = matches!(read, Ok(1..));
                if stdout.get_ref().limit() == 0 {
                    return ProbeOutcome::Failed(format!(
                        "the probe wrote {MAX_ANSWER_BYTES} bytes without an answer"
                    ));
                }
                line.clear();
            }
            read = stderr.read(&mut chunk), if stderr_is_open => match read {
                Ok(length @ 1..) => stderr_tail.push(&chunk[..length]),
                _ => stderr_is_open = false,
            },
            status = child.wait(), if exit.is_none() => {
                exit = Some(status);
                deadline = Instant::now() + DRAIN_TIMEOUT;
            }
            () = tokio::time::sleep_until(deadline), if exit.is_some() => break,
        }
    }
    match exit {
        Some(Ok(status)) => match status.signal() {
            Some(signal) => ProbeOutcome::Crashed {
                signal,
                stderr: stderr_tail.text(),
                library: LibraryFile::default(),
            },
            None => match stderr_tail.text().as_str() {
                "" => {
                    ProbeOutcome::Failed(format!("the probe exited without an answer ({status})"))
                }
                text => ProbeOutcome::Failed(format!(
                    "the probe exited without an answer ({status}): {text}"
                )),
            },
        },
        Some(Err(error)) => ProbeOutcome::Failed(format!("cannot wait for the probe: {error}")),
        None => ProbeOutcome::Failed("the probe did not exit".into()),
    }
}

/// The last bytes of a stream.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        const MAX_BYTES: usize = 400;
        self.0.extend_from_slice(bytes);
        self.0.drain(..self.0.len().saturating_sub(MAX_BYTES));
    }

    fn text(&self) -> String {
        sanitize_line(&String::from_utf8_lossy(&self.0))
    }
}
