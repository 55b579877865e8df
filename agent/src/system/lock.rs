//! One agent a machine: two would replace each other's container for ever.

use std::fs::{File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Held until the process ends, however it ends.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the lock lives as long as the file is open")] File);

/// Why there is no lock.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it.
    #[error("another supernode-agent runs already: it holds the lock {path}")]
    AnotherRuns {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be made or locked.
    #[error("cannot lock {path}")]
    Failed {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Lock {
    /// Takes the lock in `state_dir`. Who only looks whether it is taken ([`is_held`]) has it for a
    /// moment: that is waited for.
    ///
    /// # Errors
    /// When another agent runs, or the file cannot be locked.
    pub fn take(state_dir: &Path) -> Result<Self, LockError> {
        const TRIES: usize = 5;
        const PAUSE: Duration = Duration::from_millis(50);
        let path = path_in(state_dir);
        let failed = |source| LockError::Failed { path: path.clone(), source };
        std::fs::create_dir_all(state_dir).map_err(failed)?;
        // Whoever can open a file can lock it: a user who could would keep the node from starting.
        let mut options = File::options();
        let file = options
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
        for _ in 0..TRIES {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
        }
        Err(LockError::AnotherRuns { path })
    }
}

/// Whether an agent runs.
pub fn is_held(state_dir: &Path) -> bool {
    let path = path_in(state_dir);
    match File::open(&path) {
        Ok(file) => matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => is_listed(&path),
        Err(_) => false,
    }
}

/// Whether somebody has locked this file, as the kernel tells everybody: the sixth word of a line
/// of /proc/locks is device and inode (proc_locks(5)).
fn is_listed(path: &Path) -> bool {
    let (Ok(file), Ok(locks)) = (path.metadata(), std::fs::read_to_string("/proc/locks")) else {
        return false;
    };
    let (major, minor) = (rustix::fs::major(file.dev()), rustix::fs::minor(file.dev()));
    let place = format!("{major:02x}:{minor:02x}:{}", file.ino());
    locks.lines().any(|line| line.split_ascii_whitespace().nth(5) == Some(place.as_str()))
}

fn path_in(state_dir: &Path) -> PathBuf {
    state_dir.join("lock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_else_can_take_the_lock_and_everybody_sees_it() {
        let folder = std::env::temp_dir().join(format!("supernode-lock-{}", std::process::id()));
        let lock = Lock::take(&folder).unwrap();
        let path = path_in(&folder);
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        assert!(is_held(&folder) && is_listed(&path));
        drop(lock);
        assert!(!is_held(&folder) && !is_listed(&path));
        // As an agent of before has left it.
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let _lock = Lock::take(&folder).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
