//! The probe, from outside: a child process of the same binary that asks NVML, with a time limit.
//! Whatever the library does (hang, crash, babble), the agent gets an outcome.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::reason::sanitize_line;
use crate::gpu::nvml_library::LibraryFile;
use crate::gpu::probe_child::{Fault, FaultKind, ProbeAnswer};

/// The hidden subcommand that the child runs.
pub const SUBCOMMAND: &str = "nvml-probe";

/// More than a machine full of MIG instances can fill.
const MAX_ANSWER_BYTES: u64 = 1 << 20;
/// How long the pipes of a child that has ended are still read.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What came of asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// An answer.
    Answered(ProbeAnswer),
    /// None in this time; the child was killed.
    TimedOut {
        /// The time.
        limit: Duration,
        /// What the library's file tells.
        library: LibraryFile,
    },
    /// The child died by a signal.
    Crashed {
        /// Its number.
        signal: i32,
        /// The end of what it wrote to its standard error.
        said: String,
        /// What the library's file tells.
        library: LibraryFile,
    },
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
            Self::Answered(ProbeAnswer::Failed { fault, .. }) => {
                format!("{} failed: {}", fault.call, fault.text)
            }
            Self::TimedOut { limit, .. } => format!("no answer within {} s", limit.as_secs_f64()),
            Self::Crashed { signal, .. } => format!("died by signal {signal}"),
            Self::Failed(why) => why.clone(),
        }
    }
}

/// Asks `library` through a child process and waits at most `limit` for the answer.
pub async fn probe(library: &str, limit: Duration) -> ProbeOutcome {
    // By this path the child is the very binary that runs, even after an upgrade has replaced the
    // file.
    let spawned = Command::new("/proc/self/exe")
        .arg(SUBCOMMAND)
        .arg("--")
        .arg(library)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A group of its own: what the library starts is killed with the child.
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            return ProbeOutcome::Failed(format!("the probe could not be started: {error}"));
        }
    };
    let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    let outcome = tokio::time::timeout(limit, answer_of(&mut child))
        .await
        .unwrap_or(ProbeOutcome::TimedOut { limit, library: LibraryFile::default() });
    // A process that hangs inside the driver may not even die of SIGKILL: it is not waited for.
    if let Some(group) = group {
        let _ = kill_process_group(group, Signal::KILL);
    }
    explained(outcome, library)
}

/// With the library's file, about which a child that has hung or died says nothing. Mapping one
/// that is cut off ends by SIGBUS once its missing end is touched: that is the file's fault.
fn explained(outcome: ProbeOutcome, library: &str) -> ProbeOutcome {
    const SIGBUS: i32 = 7;
    match outcome {
        ProbeOutcome::TimedOut { limit, .. } => {
            ProbeOutcome::TimedOut { limit, library: LibraryFile::look(library) }
        }
        ProbeOutcome::Crashed { signal, said, .. } => {
            let library = LibraryFile::look(library);
            if signal != SIGBUS || library.damage.is_none() {
                return ProbeOutcome::Crashed { signal, said, library };
            }
            let text = "the loader died by SIGBUS".into();
            let fault = Fault { call: "dlopen".into(), kind: FaultKind::Library, text };
            ProbeOutcome::Answered(ProbeAnswer::Failed { fault, library })
        }
        other => other,
    }
}

async fn answer_of(child: &mut Child) -> ProbeOutcome {
    let (Some(out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) else {
        return ProbeOutcome::Failed("the probe has no standard output".into());
    };
    let mut out = BufReader::new(out.take(MAX_ANSWER_BYTES));
    let (mut line, mut said) = (Vec::new(), Tail::default());
    let mut chunk = [0; 1024];
    let (mut out_is_open, mut err_is_open) = (true, true);
    // Its end is no reason to stop reading at once: what it said last may still be in the pipe,
    // whose other end a process that the library started may hold open for ever.
    let mut ended: Option<io::Result<ExitStatus>> = None;
    let mut deadline = Instant::now();
    while ended.is_none() || out_is_open || err_is_open {
        tokio::select! {
            read = out.read_until(b'\n', &mut line), if out_is_open => {
                // One line is the answer: what a library prints beside it is passed over, and one
                // that crashes in its own clean-up afterwards has answered all the same.
                if let Ok(answer) = serde_json::from_slice(&line) {
                    return ProbeOutcome::Answered(answer);
                }
                out_is_open = matches!(read, Ok(1..));
                if out.get_ref().limit() == 0 {
                    return ProbeOutcome::Failed("the probe talks without end and gives no answer".into());
                }
                line.clear();
            }
            read = err.read(&mut chunk), if err_is_open => match read {
                Ok(length @ 1..) => said.push(&chunk[..length]),
                _ => err_is_open = false,
            },
            status = child.wait(), if ended.is_none() => {
                ended = Some(status);
                deadline = Instant::now() + LAST_WORDS;
            }
            () = tokio::time::sleep_until(deadline), if ended.is_some() => break,
        }
    }
    match ended {
        Some(Ok(status)) => match status.signal() {
            Some(signal) => {
                ProbeOutcome::Crashed { signal, said: said.text(), library: LibraryFile::default() }
            }
            None => ProbeOutcome::Failed(format!(
                "the probe ended without an answer ({status}){}",
                said.quoted()
            )),
        },
        Some(Err(error)) => {
            ProbeOutcome::Failed(format!("the probe could not be waited for: {error}"))
        }
        None => ProbeOutcome::Failed("the probe's end was not seen".into()),
    }
}

/// The end of what the child wrote to its standard error.
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

    fn quoted(&self) -> String {
        let text = self.text();
        if text.is_empty() { text } else { format!(", its last words: {text}") }
    }
}
