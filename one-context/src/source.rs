//! Which file of one-context to read, and when it is whole. It blocks. Nothing is ever given to a
//! shell: values come from `context.sh.*`, and only the token from `one_env`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::context::{Context, Secret};
use crate::parse::ParseError;

/// What each stage of one-context copies from the context CD; the last stage first.
const CONTEXT_FILES: [&str; 3] = ["context.sh.network", "context.sh.online", "context.sh.local"];
/// Far more than fits in a context, far less than harms a small VM.
const CONTEXT_LIMIT_BYTES: u64 = 16 * 1024 * 1024;
/// How often a file that may be half-written is read, and how long one-context has in between to
/// complete it.
const TRIES: usize = 10;
const PAUSE: Duration = Duration::from_millis(100);

const ENV_FILE: &str = "one_env";
/// The lines that one-context writes before those of the operator's variables, which can forge any
/// line after them.
const ENV_OWN_LINES: usize = 3;
/// More than those lines take.
const ENV_HEAD_BYTES: u64 = 64 * 1024;

/// Reads the context from the newest `context.sh.*` in `dir` (`/run/one-context`).
///
/// one-context copies these files in place, so a reader can see half of one. A file that has no
/// variable, ends too early or lacks its last line break is read again for up to a second, during
/// which this call blocks. What can be read by then is taken, but for an empty file.
///
/// # Errors
/// [`SourceError`]; see [`SourceError::is_invalid`] for whether a later call can succeed with the
/// same content.
pub fn read_context(dir: &Path) -> Result<Context, SourceError> {
    for _ in 1..TRIES {
        if let Reading::Whole(context) = read_newest(dir)? {
            return Ok(context);
        }
        thread::sleep(PAUSE);
    }
    match read_newest(dir)? {
        Reading::Whole(context) => Ok(context),
        Reading::MaybeHalf(outcome) => outcome,
    }
}

enum Reading {
    Whole(Context),
    /// What to answer if it stays like this.
    MaybeHalf(Result<Context, SourceError>),
}

fn read_newest(dir: &Path) -> Result<Reading, SourceError> {
    let path = newest(dir)?;
    let text = read_head(&path, CONTEXT_LIMIT_BYTES + 1)?;
    if text.len() as u64 > CONTEXT_LIMIT_BYTES {
        return Err(SourceError::TooLarge { path });
    }
    match Context::parse(&text) {
        Ok(_) if text.trim_ascii().is_empty() => {
            Ok(Reading::MaybeHalf(Err(SourceError::Empty { path })))
        }
        Ok(context) if text.ends_with(b"\n") && !context.is_empty() => Ok(Reading::Whole(context)),
        Ok(context) => Ok(Reading::MaybeHalf(Ok(context))),
        Err(source) if source.is_cut_off() => {
            Ok(Reading::MaybeHalf(Err(SourceError::Invalid { path, source })))
        }
        Err(source) => Err(SourceError::Invalid { path, source }),
    }
}

/// The context file that was written last; of files written at the same time, that of the later
/// stage.
///
/// Not simply the file of the last stage: `onevm updateconf` runs the stages again, and while
/// `.local` is new already, `.network` still holds the context from before.
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

/// Reads the OneGate token from `one_env` in `dir` (`/run/one-context`), as data: one-context
/// writes the operator's values into that file without escaping, so a shell that sources it runs
/// them.
///
/// `None` where there is no such file, or no token in it: TOKEN is not YES in the VM's context, or
/// what stands there is nothing that OpenNebula writes. Only the lines before the operator's are
/// looked at, and the first that sets TOKENTXT decides.
///
/// # Errors
/// [`SourceError::Unreadable`] where the file is there and cannot be read.
pub fn read_token(dir: &Path) -> Result<Option<Secret>, SourceError> {
    let head = match read_head(&dir.join(ENV_FILE), ENV_HEAD_BYTES) {
        Err(SourceError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        head => head?,
    };
    Ok(token_in(&head))
}

/// The token in the beginning of a `one_env`, as in [`read_token`]. Pure.
pub fn token_in(head: &[u8]) -> Option<Secret> {
    let token = head
        .split(|&byte| byte == b'\n')
        .take(ENV_OWN_LINES)
        .find_map(|line| line.strip_prefix(b"export TOKENTXT="))
        .and_then(|value| value.strip_prefix(b"\"")?.strip_suffix(b"\""))
        .filter(|token| !token.is_empty() && token.iter().copied().all(is_token_byte));
    token.map(|token| Secret::new(String::from_utf8_lossy(token)))
}

/// Base64, in its usual and its URL alphabet.
fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=' | b'_' | b'-')
}

/// A file of one-context, which it writes as a file: a link in its place is somebody else's.
fn read_head(path: &Path, limit: u64) -> Result<Vec<u8>, SourceError> {
    let head =
        read_regular(path, OFlags::NOFOLLOW, limit).map_err(|error| match error.raw_os_error() {
            Some(code) if code == Errno::LOOP.raw_os_error() => {
                io::Error::other("it is a link, which one-context never makes")
            }
            _ => error,
        });
    head.map_err(|source| SourceError::Unreadable { path: path.to_owned(), source })
}

/// The first `limit` bytes of a regular file; the limit holds for the reading itself, as a file can
/// grow.
pub(crate) fn read_regular(path: &Path, flags: OFlags, limit: u64) -> io::Result<Vec<u8>> {
    // To open a FIFO is to wait for somebody who writes, unless it is said not to.
    let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut head = Vec::new();
    file.take(limit).read_to_end(&mut head)?;
    Ok(head)
}

/// Why there is no context, or no token.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No stage of one-context has left a file.
    #[error("no context in {}: neither {} is there; is one-context installed, and has it run?", .dir.display(), CONTEXT_FILES.join(" nor "))]
    Missing {
        /// Where they were looked for.
        dir: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot read {}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// A file without anything in it: it was not filled in time.
    #[error("{} is empty; it may still be written", .path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// More than any context.
    #[error("{} is larger than {} MiB, which no context is", .path.display(), CONTEXT_LIMIT_BYTES / 1024 / 1024)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A text that OpenNebula does not write.
    #[error("{} is not as OpenNebula writes it", .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong in it, and where.
        source: ParseError,
    },
}

impl SourceError {
    /// Whether the content is wrong, so that only another context cures it; else a later try may.
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

    /// A folder of one-context for one test.
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

        /// Writes a file as if that many seconds ago.
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
    fn the_file_written_last_is_read() {
        let dir = Dir::new();
        dir.write("context.sh.network", b"VMID='1'\n", 30);
        dir.write("context.sh.online", b"VMID='2'\n", 20);
        dir.write("context.sh.local", b"VMID='3'\n", 10);
        assert_eq!(dir.vmid(), "3");
        dir.write("context.sh.online", b"VMID='4'\n", 5);
        assert_eq!(dir.vmid(), "4");
    }

    #[test]
    fn of_files_written_at_the_same_time_that_of_the_later_stage_is_read() {
        let dir = Dir::new();
        dir.write("context.sh.local", b"VMID='1'\n", 0);
        assert_eq!(dir.vmid(), "1");
        dir.write("context.sh.online", b"VMID='2'\n", 0);
        assert_eq!(dir.vmid(), "2");
        dir.write("context.sh.network", b"VMID='3'\n", 0);
        assert_eq!(dir.vmid(), "3");
    }

    #[test]
    fn no_file_is_an_error_that_names_all_three() {
        let dir = Dir::new();
        dir.write("context.sh", b"VMID='1'\n", 0);
        let error = read_context(&dir.0).unwrap_err();
        for file in CONTEXT_FILES {
            assert!(error.to_string().contains(file), "{error}");
        }
        assert!(matches!(error, SourceError::Missing { .. }) && !error.is_invalid());
    }

    #[test]
    fn an_unreadable_file_is_an_error_even_beside_an_older_one() {
        let dir = Dir::new();
        dir.write("context.sh.network", b"VMID='1'\n", 0);
        fs::create_dir(dir.0.join("context.sh.local")).unwrap();
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_001);
        File::open(dir.0.join("context.sh.local")).unwrap().set_modified(far).unwrap();
        let error = read_context(&dir.0).unwrap_err();
        assert!(
            matches!(&error, SourceError::Unreadable { path, .. } if path.ends_with("context.sh.local")),
            "{error:?}"
        );
        assert!(!error.is_invalid());
    }

    #[test]
    fn a_folder_that_cannot_be_looked_into_is_not_one_without_files() {
        let dir = Dir::new();
        dir.write("not-a-folder", b"", 0);
        let error = read_context(&dir.0.join("not-a-folder")).unwrap_err();
        assert!(matches!(error, SourceError::Unreadable { .. }), "{error:?}");
    }

    #[test]
    fn an_invalid_file_is_an_error_at_once_with_path_and_place_said_once() {
        let dir = Dir::new();
        dir.write("context.sh.local", b"VMID='1'\nPASSWORD=hunter2\n", 0);
        let error = read_context(&dir.0).unwrap_err();
        assert!(error.is_invalid());
        assert!(
            error.to_string().ends_with("context.sh.local is not as OpenNebula writes it"),
            "{error}"
        );
        let cause = error.source().unwrap();
        assert!(cause.to_string().starts_with("line 2, column 10: "), "{cause}");
        assert!(cause.source().is_none());
        assert!(!format!("{error:?}").contains("hunter2"));
    }

    #[test]
    fn a_file_that_is_being_written_is_read_when_it_is_whole() {
        let whole: &[u8] = b"FL_NODE_CONFIG='site='\\''a'\\'''\nVMID='7'\n";
        for (start, half) in [
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
            dir.write("context.sh.local", half, 0);
            thread::scope(|scope| {
                scope.spawn(|| {
                    thread::sleep(PAUSE * 2 + PAUSE / 2);
                    dir.write("context.sh.local", whole, 0);
                });
                let context = read_context(&dir.0).unwrap();
                assert_eq!(context, Context::parse(whole).unwrap(), "{start}");
            });
        }
    }

    #[test]
    fn a_newer_file_is_looked_for_at_every_try() {
        let dir = Dir::new();
        dir.write("context.sh.local", b"VMID='", 10);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(PAUSE * 2);
                dir.write("context.sh.online", b"VMID='2'\n", 0);
            });
            assert_eq!(dir.vmid(), "2");
        });
    }

    #[test]
    fn a_file_that_stays_cut_off_is_invalid_after_all_tries() {
        let dir = Dir::new();
        dir.write("context.sh.local", b"VMID='7", 0);
        let start = Instant::now();
        let error = read_context(&dir.0).unwrap_err();
        assert!(start.elapsed() >= PAUSE * 9);
        assert!(
            matches!(&error, SourceError::Invalid { source, .. } if source.is_cut_off())
                && error.is_invalid()
        );
    }

    #[test]
    fn a_last_line_that_stays_without_its_break_is_accepted_after_all_tries() {
        let dir = Dir::new();
        dir.write("context.sh.local", b"VMID='7'", 0);
        let start = Instant::now();
        assert_eq!(dir.vmid(), "7");
        assert!(start.elapsed() >= PAUSE * 9);
    }

    #[test]
    fn a_file_that_stays_empty_is_an_error_that_time_may_cure() {
        let dir = Dir::new();
        dir.write("context.sh.local", b"", 0);
        let error = read_context(&dir.0).unwrap_err();
        assert!(matches!(error, SourceError::Empty { .. }) && !error.is_invalid());
    }

    #[test]
    fn a_file_over_the_limit_is_refused_and_one_at_the_limit_is_not() {
        let dir = Dir::new();
        let padding = "#".repeat(usize::try_from(CONTEXT_LIMIT_BYTES).unwrap() - 10);
        dir.write("context.sh.local", format!("{padding}\nVMID='7'\n").as_bytes(), 0);
        assert_eq!(dir.vmid(), "7");
        dir.write("context.sh.local", format!("#{padding}\nVMID='7'\n").as_bytes(), 0);
        let error = read_context(&dir.0).unwrap_err();
        assert!(matches!(error, SourceError::TooLarge { .. }) && error.is_invalid());
        assert!(error.to_string().contains("16 MiB"), "{error}");
    }

    #[test]
    fn the_token_is_read_from_one_env() {
        let dir = Dir::new();
        let one_env = b"export TOKENTXT=\"aZ09+/_-==\"\nexport VMID=\"7\"\nexport ONEGATE_ENDPOINT=\"http://169.254.16.9:5030\"\n";
        assert_eq!(dir.token(one_env).as_deref(), Some("aZ09+/_-=="));
        assert_eq!(
            dir.token(b"export VMID=\"7\"\nexport ONEGATE_ENDPOINT=\"\"\nexport TOKENTXT=\"a\"")
                .as_deref(),
            Some("a")
        );
    }

    #[test]
    fn no_file_or_no_token_is_no_token() {
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
    fn a_token_that_is_not_one_is_not_taken() {
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
    fn a_token_forged_by_a_later_line_is_not_taken() {
        let dir = Dir::new();
        let forged =
            "export FL_X=\"a\nexport TOKENTXT=\"forged\"\n\"\nexport TOKENTXT=\"forged\"\n";
        let head = |token| {
            format!(
                "export TOKENTXT=\"{token}\"\nexport VMID=\"7\"\nexport ONEGATE_ENDPOINT=\"\"\n{forged}"
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
    fn a_token_forged_through_the_vmid_does_not_replace_an_empty_one() {
        let dir = Dir::new();
        assert_eq!(
            dir.token(b"export TOKENTXT=\"\"\nexport VMID=\"7\"\nexport TOKENTXT=\"forged\"\n"),
            None
        );
    }

    #[test]
    fn a_one_env_that_cannot_be_read_is_an_error() {
        let dir = Dir::new();
        fs::create_dir(dir.0.join(ENV_FILE)).unwrap();
        assert!(matches!(read_token(&dir.0), Err(SourceError::Unreadable { .. })));
    }

    #[test]
    fn what_is_not_a_regular_file_is_an_error_and_never_waited_for() {
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
    fn a_link_in_the_place_of_a_file_is_not_followed() {
        let is_link =
            |error: &SourceError| error.source().unwrap().to_string().starts_with("it is a link");
        let dir = Dir::new();
        dir.write("elsewhere", b"VMID='1'\nexport TOKENTXT=\"a\"\n", 0);
        for name in ["context.sh.local", ENV_FILE] {
            std::os::unix::fs::symlink(dir.0.join("elsewhere"), dir.0.join(name)).unwrap();
        }
        assert!(is_link(&read_context(&dir.0).unwrap_err()));
        assert!(is_link(&read_token(&dir.0).unwrap_err()));
    }
}
