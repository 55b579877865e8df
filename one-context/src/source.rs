//! Reads the files of one-context. Blocking. No value is ever passed to a shell: variables are
//! parsed from `context.sh.*`, and only the token is read from `one_env`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::context::{Context, Secret};
use crate::parse::ParseError;

/// Copies of `context.sh`, one for each stage of one-context; the last stage first.
const CONTEXT_FILES: [&str; 3] = ["context.sh.network", "context.sh.online", "context.sh.local"];
/// Size limit: far above that of any context, far below the memory of a small VM.
const MAX_CONTEXT_BYTES: u64 = 16 * 1024 * 1024;
/// Number of reads of a file that may be incomplete, and the interval between them.
const MAX_ATTEMPTS: usize = 10;
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

const ENV_FILE: &str = "one_env";
/// Lines that one-context writes before the operator's variables, which can forge any later line.
const ENV_TRUSTED_LINES: usize = 3;
/// Upper limit for the size of these lines.
const ENV_HEAD_BYTES: u64 = 64 * 1024;

/// Reads the context from the newest `context.sh.*` in `dir` (`/run/one-context`).
///
/// one-context writes these files in place, so a reader can see an incomplete file. A file that has
/// no variable, ends too early or lacks its last line break is read again for up to one second,
/// during which this call blocks. After that the content is accepted as it is, unless it is empty.
///
/// # Errors
/// Returns [`SourceError`]; [`SourceError::is_invalid`] reports whether the content must change.
pub fn read_context(dir: &Path) -> Result<Context, SourceError> {
    for _ in 1..MAX_ATTEMPTS {
        if let Reading::Complete(context) = read_newest(dir)? {
            return Ok(context);
        }
        thread::sleep(RETRY_INTERVAL);
    }
    match read_newest(dir)? {
        Reading::Complete(context) => Ok(context),
        Reading::Incomplete(outcome) => outcome,
    }
}

enum Reading {
    Complete(Context),
    /// The file may be incomplete. Holds the result to return if it does not change.
    Incomplete(Result<Context, SourceError>),
}

fn read_newest(dir: &Path) -> Result<Reading, SourceError> {
    let path = newest(dir)?;
    let text = read_head(&path, MAX_CONTEXT_BYTES + 1)?;
    if text.len() as u64 > MAX_CONTEXT_BYTES {
        return Err(SourceError::TooLarge { path });
    }
    match Context::parse(&text) {
        Ok(_) if text.trim_ascii().is_empty() => {
            Ok(Reading::Incomplete(Err(SourceError::Empty { path })))
        }
        Ok(context) if text.ends_with(b"\n") && !context.is_empty() => {
            Ok(Reading::Complete(context))
        }
        Ok(context) => Ok(Reading::Incomplete(Ok(context))),
        Err(source) if source.is_truncated() => {
            Ok(Reading::Incomplete(Err(SourceError::Invalid { path, source })))
        }
        Err(source) => Err(SourceError::Invalid { path, source }),
    }
}

/// Returns the context file with the newest modification time; on a tie that of the later stage.
///
/// The file of the last stage is not always the newest: `onevm updateconf` runs the stages again,
/// and while `.local` is already new, `.network` still holds the previous context.
fn newest(dir: &Path) -> Result<PathBuf, SourceError> {
    let mut newest = None;
    for file in CONTEXT_FILES {
        let path = dir.join(file);
        match fs::symlink_metadata(&path).and_then(|metadata| metadata.modified()) {
            Ok(modified) => {
                if newest.as_ref().is_none_or(|(latest, _)| modified > *latest) {
                    newest = Some((modified, path));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(SourceError::Unreadable { path, source }),
        }
    }
    newest.map(|(_, path)| path).ok_or_else(|| SourceError::Missing { dir: dir.to_owned() })
}

/// Reads the OneGate token from `one_env` in `dir` (`/run/one-context`). The file is parsed as
/// data: one-context writes the operator's values into it without escaping, so a shell that sources
/// it executes them.
///
/// Returns `None` if the file is missing or has no valid token, for example because TOKEN is not
/// YES in the VM's context. Only the lines before the operator's variables count, and of these the
/// first that sets TOKENTXT.
///
/// # Errors
/// Returns [`SourceError::Unreadable`] if the file exists and cannot be read.
pub fn read_token(dir: &Path) -> Result<Option<Secret>, SourceError> {
    let head = match read_head(&dir.join(ENV_FILE), ENV_HEAD_BYTES) {
        Err(SourceError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        head => head?,
    };
    Ok(token_in(&head))
}

/// Returns the token in the first lines of a `one_env`; see [`read_token`]. Pure.
pub fn token_in(head: &[u8]) -> Option<Secret> {
    let token = head
        .split(|&byte| byte == b'\n')
        .take(ENV_TRUSTED_LINES)
        .find_map(|line| line.strip_prefix(b"export TOKENTXT="))
        .and_then(|value| value.strip_prefix(b"\"")?.strip_suffix(b"\""))
        .filter(|token| !token.is_empty() && token.iter().copied().all(is_token_byte));
    token.map(|token| Secret::new(String::from_utf8_lossy(token)))
}

/// Accepts the standard and the URL alphabet of base64.
fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=' | b'_' | b'-')
}

/// Reads the start of a file of one-context. A symbolic link is rejected: one-context never creates
/// one.
fn read_head(path: &Path, limit: u64) -> Result<Vec<u8>, SourceError> {
    let head =
        read_regular(path, OFlags::NOFOLLOW, limit).map_err(|error| match error.raw_os_error() {
            Some(code) if code == Errno::LOOP.raw_os_error() => {
                io::Error::other("it is a symbolic link, which one-context never creates")
            }
            _ => error,
        });
    head.map_err(|source| SourceError::Unreadable { path: path.to_owned(), source })
}

/// Reads the first `limit` bytes of a regular file. The limit applies while reading, because a file
/// can grow.
pub(crate) fn read_regular(path: &Path, flags: OFlags, limit: u64) -> io::Result<Vec<u8>> {
    // Without NONBLOCK, opening a FIFO waits for a writer.
    let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut head = Vec::new();
    file.take(limit).read_to_end(&mut head)?;
    Ok(head)
}

/// Error of reading the context or the token.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No stage of one-context has written a file.
    #[error(
        "no context in {}: found none of {}; check that one-context is installed and has run",
        .dir.display(),
        CONTEXT_FILES.join(", ")
    )]
    Missing {
        /// Directory that was searched.
        dir: PathBuf,
    },
    /// The operating system reported an error.
    #[error("cannot read {}", .path.display())]
    Unreadable {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The file stayed empty.
    #[error("{} is empty; one-context may still be writing it", .path.display())]
    Empty {
        /// Path of the file.
        path: PathBuf,
    },
    /// The file is too large.
    #[error("{} is larger than {} MiB", .path.display(), MAX_CONTEXT_BYTES / 1024 / 1024)]
    TooLarge {
        /// Path of the file.
        path: PathBuf,
    },
    /// The file is not in the format that OpenNebula writes.
    #[error("{} is not in the format that OpenNebula writes", .path.display())]
    Invalid {
        /// Path of the file.
        path: PathBuf,
        /// Error of the parser, with its position.
        source: ParseError,
    },
}

impl SourceError {
    /// Returns whether the content is invalid and must change. Any other error may be temporary.
    pub fn is_invalid(&self) -> bool {
        matches!(self, Self::Invalid { .. } | Self::TooLarge { .. })
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use std::error::Error;
    use std::process;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Instant, SystemTime};

    /// A directory of one-context for one test.
    struct Dir(PathBuf);

    impl Dir {
        fn new() -> Self {
            static NEXT: AtomicUsize = AtomicUsize::new(0);
            let name =
                format!("one-context-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        /// Writes a file with a modification time that many seconds ago.
        fn write(&self, name: &str, text: &[u8], seconds_ago: u64) {
            let path = self.0.join(name);
            fs::write(&path, text).unwrap();
            let modified =
                SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000 - seconds_ago);
            File::options().append(true).open(path).unwrap().set_modified(modified).unwrap();
        }

        fn vmid(&self) -> String {
            read_context(&self.0).unwrap().text("VMID").unwrap().unwrap().to_owned()
        }

        fn token(&self, one_env: &[u8]) -> Option<String> {
            self.write(ENV_FILE, one_env, 0);
            read_token(&self.0).unwrap().map(|token| token.expose().to_owned())
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn newest_file_is_read() {
        let dir = Dir::new();
        dir.write("context.sh.network", b"VMID='1'\n", 30);
        dir.write("context.sh.online", b"VMID='2'\n", 20);
        dir.write("context.sh.local", b"VMID='3'\n", 10);
        assert_eq!(dir.vmid(), "3");
        dir.write("context.sh.online", b"VMID='4'\n", 5);
        assert_eq!(dir.vmid(), "4");
    }

    #[test]
    fn later_stage_wins_on_equal_times() {
        let dir = Dir::new();
        dir.write("context.sh.local", b"VMID='1'\n", 0);
        assert_eq!(dir.vmid(), "1");
        dir.write("context.sh.online", b"VMID='2'\n", 0);
        assert_eq!(dir.vmid(), "2");
        dir.write("context.sh.network", b"VMID='3'\n", 0);
        assert_eq!(dir.vmid(), "3");
    }

    #[test]
    fn missing_files_are_named() {
        let dir = Dir::new();
        dir.write("context.sh", b"VMID='1'\n", 0);
        let error = read_context(&dir.0).unwrap_err();
        for file in CONTEXT_FILES {
            assert!(error.to_string().contains(file), "{error}");
        }
        assert!(matches!(error, SourceError::Missing { .. }) && !error.is_invalid());
    }

    #[test]
    fn unreadable_newest_file_is_an_error() {
        let dir = Dir::new();
        dir.write("context.sh.network", b"VMID='1'\n", 0);
        fs::create_dir(dir.0.join("context.sh.local")).unwrap();
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_001);
        File::open(dir.0.join("context.sh.local")).unwrap().set_modified(far).unwrap();
        let error = read_context(&dir.0).unwrap_err();
        assert!(
            matches!(
                &error,
                SourceError::Unreadable { path, .. } if path.ends_with("context.sh.local")
            ),
            "{error:?}"
        );
        assert!(!error.is_invalid());
    }

    #[test]
    fn unreadable_directory_is_not_missing_context() {
        let dir = Dir::new();
        dir.write("not-a-directory", b"", 0);
        let error = read_context(&dir.0.join("not-a-directory")).unwrap_err();
        assert!(matches!(error, SourceError::Unreadable { .. }), "{error:?}");
    }

    #[test]
    fn invalid_file_fails_at_once_with_position() {
        let dir = Dir::new();
        dir.write("context.sh.local", b"VMID='1'\nPASSWORD=hunter2\n", 0);
        let error = read_context(&dir.0).unwrap_err();
        assert!(error.is_invalid());
        assert!(
            error
                .to_string()
                .ends_with("context.sh.local is not in the format that OpenNebula writes"),
            "{error}"
        );
        let cause = error.source().unwrap();
        assert!(cause.to_string().starts_with("line 2, column 10: "), "{cause}");
        assert!(cause.source().is_none());
        assert!(!format!("{error:?}").contains("hunter2"));
    }

    #[test]
    fn incomplete_file_is_read_when_complete() {
        let complete: &[u8] = b"FL_NODE_CONFIG='site='\\''a'\\'''\nVMID='7'\n";
        for (start, incomplete) in [
            b"".as_slice(),
            b"# Context\n",
            b"FL_NO",
            b"FL_NODE_CONFIG='site",
            b"FL_NODE_CONFIG='site='",
        ]
        .into_iter()
        .enumerate()
        {
            let dir = Dir::new();
            dir.write("context.sh.local", incomplete, 0);
            thread::scope(|scope| {
                scope.spawn(|| {
                    thread::sleep(RETRY_INTERVAL * 2 + RETRY_INTERVAL / 2);
                    dir.write("context.sh.local", complete, 0);
                });
                let context = read_context(&dir.0).unwrap();
                assert_eq!(context, Context::parse(complete).unwrap(), "{start}");
            });
        }
    }

    #[test]
    fn every_attempt_looks_for_a_newer_file() {
        let dir = Dir::new();
        dir.write("context.sh.local", b"VMID='", 10);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(RETRY_INTERVAL * 2);
                dir.write("context.sh.online", b"VMID='2'\n", 0);
            });
            assert_eq!(dir.vmid(), "2");
        });
    }

    #[test]
    fn truncated_file_is_invalid_after_all_attempts() {
        let dir = Dir::new();
        dir.write("context.sh.local", b"VMID='7", 0);
        let start = Instant::now();
        let error = read_context(&dir.0).unwrap_err();
        assert!(start.elapsed() >= RETRY_INTERVAL * 9);
        assert!(
            matches!(&error, SourceError::Invalid { source, .. } if source.is_truncated())
                && error.is_invalid()
        );
    }

    #[test]
    fn missing_last_line_break_is_accepted_at_last() {
        let dir = Dir::new();
        dir.write("context.sh.local", b"VMID='7'", 0);
        let start = Instant::now();
        assert_eq!(dir.vmid(), "7");
        assert!(start.elapsed() >= RETRY_INTERVAL * 9);
    }

    #[test]
    fn empty_file_is_a_temporary_error() {
        let dir = Dir::new();
        dir.write("context.sh.local", b"", 0);
        let error = read_context(&dir.0).unwrap_err();
        assert!(matches!(error, SourceError::Empty { .. }) && !error.is_invalid());
    }

    #[test]
    fn size_limit_is_inclusive() {
        let dir = Dir::new();
        let padding = "#".repeat(usize::try_from(MAX_CONTEXT_BYTES).unwrap() - 10);
        dir.write("context.sh.local", format!("{padding}\nVMID='7'\n").as_bytes(), 0);
        assert_eq!(dir.vmid(), "7");
        dir.write("context.sh.local", format!("#{padding}\nVMID='7'\n").as_bytes(), 0);
        let error = read_context(&dir.0).unwrap_err();
        assert!(matches!(error, SourceError::TooLarge { .. }) && error.is_invalid());
        assert!(error.to_string().contains("16 MiB"), "{error}");
    }

    #[test]
    fn token_is_read_from_one_env() {
        let dir = Dir::new();
        let one_env = b"export TOKENTXT=\"aZ09+/_-==\"\nexport VMID=\"7\"\n\
            export ONEGATE_ENDPOINT=\"http://169.254.16.9:5030\"\n";
        assert_eq!(dir.token(one_env).as_deref(), Some("aZ09+/_-=="));
        assert_eq!(
            dir.token(b"export VMID=\"7\"\nexport ONEGATE_ENDPOINT=\"\"\nexport TOKENTXT=\"a\"")
                .as_deref(),
            Some("a")
        );
    }

    #[test]
    fn missing_file_or_token_is_none() {
        let dir = Dir::new();
        assert_eq!(read_token(&dir.0).unwrap(), None);
        for one_env in [
            "",
            "\n",
            "export TOKENTXT=\"\"\nexport VMID=\"7\"\n",
            "export TOKENTXT=\"ab",
            "export TOKENTXT=\"",
        ] {
            assert_eq!(dir.token(one_env.as_bytes()), None, "{one_env}");
        }
    }

    #[test]
    fn invalid_token_is_rejected() {
        let dir = Dir::new();
        for token in
            [r#"x"; touch /pwned; ""#, "$(id)", "`id`", "a b", "a\\", "a'", "ü", "a\r", "a\0"]
        {
            assert_eq!(
                dir.token(format!("export TOKENTXT=\"{token}\"\n").as_bytes()),
                None,
                "{token}"
            );
        }
        for line in [
            "TOKENTXT=\"a\"",
            " export TOKENTXT=\"a\"",
            "export TOKENTXT=a",
            "export TOKENTXT='a'",
            "export TOKENTXT=\"a\" ",
        ] {
            assert_eq!(dir.token(line.as_bytes()), None, "{line}");
        }
        assert_eq!(dir.token(b"export TOKENTXT=\"\xff\"\n"), None);
    }

    #[test]
    fn token_forged_by_later_line_is_ignored() {
        let dir = Dir::new();
        let forged =
            "export FL_X=\"a\nexport TOKENTXT=\"forged\"\n\"\nexport TOKENTXT=\"forged\"\n";
        let head = |token| {
            format!(
                "export TOKENTXT=\"{token}\"\nexport VMID=\"7\"\n\
                 export ONEGATE_ENDPOINT=\"\"\n{forged}"
            )
        };
        assert_eq!(dir.token(head("real").as_bytes()).as_deref(), Some("real"));
        assert_eq!(dir.token(head("").as_bytes()), None);
        assert_eq!(
            dir.token(format!("export VMID=\"7\"\nexport A=\"\"\n\n{forged}").as_bytes()),
            None
        );
    }

    #[test]
    fn token_forged_through_vmid_is_ignored() {
        let dir = Dir::new();
        assert_eq!(
            dir.token(b"export TOKENTXT=\"\"\nexport VMID=\"7\"\nexport TOKENTXT=\"forged\"\n"),
            None
        );
    }

    #[test]
    fn unreadable_one_env_is_an_error() {
        let dir = Dir::new();
        fs::create_dir(dir.0.join(ENV_FILE)).unwrap();
        assert!(matches!(read_token(&dir.0), Err(SourceError::Unreadable { .. })));
    }

    #[test]
    fn irregular_file_is_an_error_without_waiting() {
        let not_a_file =
            |error: &SourceError| error.source().unwrap().to_string() == "it is not a regular file";
        for name in ["context.sh.online", ENV_FILE] {
            let dir = Dir::new();
            assert!(
                process::Command::new("mkfifo").arg(dir.0.join(name)).status().unwrap().success()
            );
            let error = if name == ENV_FILE {
                read_token(&dir.0).unwrap_err()
            } else {
                read_context(&dir.0).unwrap_err()
            };
            assert!(not_a_file(&error) && !error.is_invalid(), "{error:?}");
        }
    }

    #[test]
    fn symbolic_link_is_not_followed() {
        let is_link = |error: &SourceError| {
            error.source().unwrap().to_string().starts_with("it is a symbolic link")
        };
        let dir = Dir::new();
        dir.write("elsewhere", b"VMID='1'\nexport TOKENTXT=\"a\"\n", 0);
        for name in ["context.sh.local", ENV_FILE] {
            std::os::unix::fs::symlink(dir.0.join("elsewhere"), dir.0.join(name)).unwrap();
        }
        assert!(is_link(&read_context(&dir.0).unwrap_err()));
        assert!(is_link(&read_token(&dir.0).unwrap_err()));
    }
}
