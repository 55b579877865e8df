//! Running processes with a deadline, and polling.

use std::{
    io::{Read, Write},
    os::fd::{AsFd, OwnedFd},
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::ioctl_fionread;
use rustix::process::{Pid, Signal, kill_process};

/// Output and exit status of a command.
#[derive(Debug, Clone)]
pub struct Output {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Exit code; `None` if a signal ended the process.
    pub code: Option<i32>,
    /// The signal that ended the process.
    pub signal: Option<i32>,
}

impl Output {
    /// Returns standard output without surrounding whitespace. Panics with the output if the
    /// command failed.
    #[track_caller]
    pub fn expect_success(&self) -> &str {
        assert!(self.code == Some(0), "the command failed: {self:#?}");
        self.stdout.trim()
    }
}

/// Runs a command to its end.
///
/// # Panics
/// If it cannot be started or times out; on timeout it is killed.
#[track_caller]
pub fn run(command: &mut Command, timeout: Duration) -> Output {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{shown}: {error}"));
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let Some(status) = wait(&mut child, timeout) else {
        let _ = child.kill();
        let _ = child.wait();
        panic!("{shown}: timed out after {timeout:?}");
    };
    let text = |thread: thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&thread.join().unwrap_or_default()).into_owned()
    };
    Output {
        stdout: text(stdout),
        stderr: text(stderr),
        code: status.code(),
        signal: status.signal(),
    }
}

/// Wraps a command so that the kernel stops it when the test process ends. Takes only the program
/// and arguments of `command`; more arguments may be appended. Start it with [`start_tied`].
pub(crate) fn tied(command: &Command) -> Command {
    let mut tied = Command::new("setpriv");
    tied.args(["--pdeathsig", "TERM", "--"]).arg(command.get_program()).args(command.get_args());
    tied
}

/// Starts a command from a thread that lasts as long as the process. The parent-death signal is
/// sent at the end of the *thread* that started the child, and a test's thread ends before the
/// process does.
pub(crate) fn start_tied(mut command: Command) -> std::io::Result<Child> {
    let (started, receive) = mpsc::channel();
    thread::spawn(move || {
        let _ = started.send(command.spawn());
        loop {
            thread::park();
        }
    });
    receive.recv().unwrap_or_else(|_| Err(std::io::Error::other("the starting thread ended")))
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // Output read before an error is still returned.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// Waits for a child to end; returns `None` if it still runs at the deadline.
pub(crate) fn wait(child: &mut Child, timeout: Duration) -> Option<ExitStatus> {
    let mut status = None;
    eventually(timeout, || {
        status = child.try_wait().expect("cannot wait for the child");
        status.is_some()
    });
    status
}

/// Polls until `question` returns true or the time is over; returns the last answer.
pub fn eventually(timeout: Duration, mut question: impl FnMut() -> bool) -> bool {
    const STEP: Duration = Duration::from_millis(10);
    let start = Instant::now();
    loop {
        if question() {
            return true;
        }
        if start.elapsed() >= timeout {
            return false;
        }
        thread::sleep(STEP);
    }
}

/// Sends a signal. If the process has already ended, that is not an error.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Returns whether a process with this PID is running; a zombie is not.
pub(crate) fn running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the name, which is in parentheses and may contain any character.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Lines that arrive while a test runs: output of a process, or notifications to systemd.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lines {
    shared: Arc<(Mutex<Vec<String>>, Condvar)>,
    /// The pipe that the lines are read from.
    pipe: Arc<OnceLock<OwnedFd>>,
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, line: String) {
        self.lock().push(line);
        self.shared.1.notify_all();
    }

    /// Returns all lines, including those that the process has written and the reader has not yet
    /// read. A test that has seen a notification thus sees every line logged before it.
    pub(crate) fn all(&self) -> Vec<String> {
        const TIMEOUT: Duration = Duration::from_secs(1);
        let start = Instant::now();
        loop {
            let lines = self.lock();
            let unread = self.pipe.get().map_or(0, |pipe| ioctl_fionread(pipe).unwrap_or(0));
            if unread == 0 || start.elapsed() > TIMEOUT {
                return lines.clone();
            }
            drop(lines);
            thread::yield_now();
        }
    }

    /// Reads lines from a pipe until it is closed.
    pub(crate) fn follow(&self, mut pipe: impl Read + AsFd + Send + 'static) {
        let _ = self.pipe.set(pipe.as_fd().try_clone_to_owned().expect("cannot clone the pipe"));
        let this = self.clone();
        thread::spawn(move || {
            let mut partial = Vec::new();
            let mut buffer = [0; 64 * 1024];
            loop {
                // Waits without the lock, but reads with it: see `all`.
                if poll(&mut [PollFd::new(&pipe, PollFlags::IN)], None).is_err() {
                    continue;
                }
                let mut lines = this.lock();
                let length = pipe.read(&mut buffer).unwrap_or(0);
                partial.extend_from_slice(&buffer[..length]);
                while let Some(end) = partial.iter().position(|&byte| byte == b'\n') {
                    lines.push(String::from_utf8_lossy(&partial[..end]).into_owned());
                    partial.drain(..=end);
                }
                if length == 0 {
                    if !partial.is_empty() {
                        lines.push(String::from_utf8_lossy(&partial).into_owned());
                    }
                    break;
                }
                this.shared.1.notify_all();
            }
            this.shared.1.notify_all();
        });
    }

    /// Returns the first line that contains the text, waiting for it up to `timeout`.
    pub(crate) fn wait_for(&self, text: &str, timeout: Duration) -> Option<String> {
        let find = |lines: &[String]| lines.iter().find(|line| line.contains(text)).cloned();
        let lines = self.lock();
        let waited =
            self.shared.1.wait_timeout_while(lines, timeout, |lines| find(lines).is_none());
        let (lines, _) = waited.unwrap_or_else(PoisonError::into_inner);
        find(&lines)
    }
}

/// Prints that this test is skipped and why, or panics if skipping is not allowed.
#[track_caller]
pub(crate) fn skip_or_fail(what: &str, reason: &str) {
    if std::env::var_os("SUPERNODE_TESTS_REQUIRE_DOCKER").is_some_and(|value| value == "1") {
        panic!("no {what}, and SUPERNODE_TESTS_REQUIRE_DOCKER=1: {reason}");
    }
    let thread = thread::current();
    // Not with a print macro: the test runner captures the output of passing tests.
    let _ =
        writeln!(std::io::stderr(), "SKIPPED: {reason} ({})", thread.name().unwrap_or("a test"));
}
