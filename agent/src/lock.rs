//! One agent a machine: two would replace each other's container for ever.

use std::fs::{File, TryLockError};
use std::io;
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
    /// Takes the lock in `state_dir`. Who only looks whether it is taken ([`is_held`]) has it for a moment: that is waited
    /// for.
    ///
    /// # Errors
    /// When another agent runs, or the file cannot be locked.
    pub fn take(state_dir: &Path) -> Result<Self, LockError> {
        const TRIES: usize = 5;
        const PAUSE: Duration = Duration::from_millis(50);
        let path = path_in(state_dir);
        let failed = |source| LockError::Failed { path: path.clone(), source };
        std::fs::create_dir_all(state_dir).map_err(failed)?;
        let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
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
    File::open(path_in(state_dir)).is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

fn path_in(state_dir: &Path) -> PathBuf {
    state_dir.join("lock")
}
