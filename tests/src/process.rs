//! Processes with a deadline, and waiting for what takes a moment.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// What a command said and how it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// Everything on standard output.
    pub stdout: String,
    /// Everything on standard error.
    pub stderr: String,
    /// The exit code; `None` where a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

impl Output {
    /// Panics with what the command said, unless it succeeded; gives standard output without blanks
    /// around it.
    #[track_caller]
    pub fn expect_success(&self) -> &str {
        assert!(self.code == Some(0), "the command failed: {self:#?}");
        self.stdout.trim()
    }
}

/// Runs a command to its end.
///
/// # Panics
/// Where it cannot be started, or is not over in time; it is killed then.
#[track_caller]
pub fn run(command: &mut Command, timeout: Duration) -> Output {
    let told = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{told}: {error}"));
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let Some(status) = wait(&mut child, timeout) else {
        let _ = child.kill();
        let _ = child.wait();
        panic!("{told}: not over after {timeout:?}");
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

/// The beginning of a command that does not outlive the test's process, however that ends. More
/// arguments may follow, and [`start_tied`] starts it. Of `command` the program and its arguments
/// are taken.
pub(crate) fn tied(command: &Command) -> Command {
    let mut tied = Command::new("setpriv");
    tied.args(["--pdeathsig", "TERM", "--"]).arg(command.get_program()).args(command.get_args());
    tied
}

/// Starts a command from a thread that lasts as long as the process: the kernel counts the end of
/// the *thread* that started a child as the parent's death, and the thread of a test is over before
/// the process is.
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
            // What came before an error is what there is.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// Waits for the end of a child; `None` where it is still running at the deadline.
pub(crate) fn wait(child: &mut Child, timeout: Duration) -> Option<ExitStatus> {
    let mut status = None;
    eventually(timeout, || {
        status = child.try_wait().expect("a child of ours");
        status.is_some()
    });
    status
}

/// Asks again and again until the answer is yes or the time is over; gives the last answer.
pub fn eventually(timeout: Duration, mut question: impl FnMut() -> bool) -> bool {
    const STEP: Duration = Duration::from_millis(10);
    let begun = Instant::now();
    loop {
        if question() {
            return true;
        }
        if begun.elapsed() >= timeout {
            return false;
        }
        thread::sleep(STEP);
    }
}

/// Sends a signal; a process that is gone already is no error.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether a process of this number runs; a zombie does not.
pub(crate) fn running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state stands behind the name, which is in parentheses and may contain anything.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Lines that arrive while a test runs: what a process writes, or what it tells systemd.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lines {
    shared: Arc<(Mutex<Vec<String>>, Condvar)>,
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, line: String) {
        self.lock().push(line);
        self.shared.1.notify_all();
    }

    pub(crate) fn all(&self) -> Vec<String> {
        self.lock().clone()
    }

    /// Reads lines from a pipe until it is closed.
    pub(crate) fn follow(&self, pipe: impl Read + Send + 'static) {
        let lines = self.clone();
        thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                lines.push(String::from_utf8_lossy(&line).into_owned());
            }
        });
    }

    /// The first line that contains the text, arrived already or within the time.
    pub(crate) fn wait_for(&self, text: &str, timeout: Duration) -> Option<String> {
        let find = |lines: &[String]| lines.iter().find(|line| line.contains(text)).cloned();
        let lines = self.lock();
        let waited =
            self.shared.1.wait_timeout_while(lines, timeout, |lines| find(lines).is_none());
        let (lines, _) = waited.unwrap_or_else(PoisonError::into_inner);
        find(&lines)
    }
}

/// Says that this test is skipped, and why; where everything must be to be had, it fails.
#[track_caller]
pub(crate) fn skip_or_fail(what: &str, reason: &str) {
    if std::env::var_os("SUPERNODE_TESTS_REQUIRE_DOCKER").is_some_and(|value| value == "1") {
        panic!("no {what}, and SUPERNODE_TESTS_REQUIRE_DOCKER=1: {reason}");
    }
    let thread = thread::current();
    // Not by a print macro: the test runner would swallow what a passing test prints.
    let _ =
        writeln!(std::io::stderr(), "SKIPPED: {reason} ({})", thread.name().unwrap_or("a test"));
}
