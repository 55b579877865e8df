//! Lock that allows one agent per VM: two would replace each other's container forever.

use std::fs::{File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The lock. The kernel releases it when the process exits for any reason.
#[derive(Debug)]
pub(crate) struct Lock(
    #[expect(dead_code, reason = "the lock is held as long as the file is open")] File,
);

/// Why the lock cannot be acquired.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// Another process holds it.
    #[error("another supernode-agent is already running: it holds the lock {path}")]
    Held {
        /// The lock file.
        path: PathBuf,
    },
    /// The file cannot be created or locked.
    #[error("cannot lock {path}")]
    Io {
        /// The lock file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl Lock {
    /// Acquires the lock in `state_dir`. Blocks for up to 250 ms while another process tests
    /// whether it is held ([`is_held`]).
    ///
    /// # Errors
    /// If another agent runs, or the file cannot be locked.
    pub(crate) fn acquire(state_dir: &Path) -> Result<Self, LockError> {
        const MAX_ATTEMPTS: usize = 5;
        const RETRY_DELAY: Duration = Duration::from_millis(50);
        let path = path_in(state_dir);
        let failed = |source| LockError::Io { path: path.clone(), source };
        std::fs::create_dir_all(state_dir).map_err(failed)?;
        // Not readable by others: any user who can open the file can lock it, and would keep the
        // node from starting.
        let mut options = File::options();
        let file = options
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
        for _ in 0..MAX_ATTEMPTS {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(TryLockError::WouldBlock) => std::thread::sleep(RETRY_DELAY),
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
        }
        Err(LockError::Held { path })
    }
}

/// Returns whether an agent holds the lock.
pub(crate) fn is_held(state_dir: &Path) -> bool {
    let path = path_in(state_dir);
    match File::open(&path) {
        Ok(file) => matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => is_listed(&path),
        Err(_) => false,
    }
}

/// Returns whether `/proc/locks`, which every user can read, lists a lock on this file. The sixth
/// word of a line is device and inode (proc_locks(5)).
fn is_listed(path: &Path) -> bool {
    let (Ok(file), Ok(locks)) = (path.metadata(), std::fs::read_to_string("/proc/locks")) else {
        return false;
    };
    let (major, minor) = (rustix::fs::major(file.dev()), rustix::fs::minor(file.dev()));
    let id = format!("{major:02x}:{minor:02x}:{}", file.ino());
    locks.lines().any(|line| line.split_ascii_whitespace().nth(5) == Some(id.as_str()))
}

fn path_in(state_dir: &Path) -> PathBuf {
    state_dir.join("lock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_is_exclusive_and_visible() {
        let directory = std::env::temp_dir().join(format!("supernode-lock-{}", std::process::id()));
        let lock = Lock::acquire(&directory).unwrap();
        let path = path_in(&directory);
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        assert!(is_held(&directory) && is_listed(&path));
        assert!(matches!(Lock::acquire(&directory), Err(LockError::Held { .. })));
        drop(lock);
        assert!(!is_held(&directory) && !is_listed(&path));
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn mode_of_an_existing_lock_file_is_restricted() {
        let directory =
            std::env::temp_dir().join(format!("supernode-lock-mode-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = path_in(&directory);
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let _lock = Lock::acquire(&directory).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        std::fs::remove_dir_all(directory).unwrap();
    }
}
