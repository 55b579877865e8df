//! Atomic file replacement: a reader sees either the old or the new content, even after a crash.

use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// New content in a temporary file next to its target.
#[derive(Debug)]
pub(crate) struct PendingFile {
    file: PathBuf,
    target: PathBuf,
    durable: bool,
}

/// Writes `bytes` to a temporary file next to `target`, with the mode and owner of `target`, or
/// with mode 0644 if `target` does not exist.
///
/// # Errors
/// If the directory or the file cannot be written. No temporary file is left behind.
pub(crate) fn prepare(target: &Path, bytes: &[u8]) -> io::Result<PendingFile> {
    prepare_with(target, bytes, true)
}

fn prepare_with(target: &Path, bytes: &[u8], durable: bool) -> io::Result<PendingFile> {
    let directory = directory_of(target);
    std::fs::create_dir_all(directory)?;
    let mut name = OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(".supernode-agent");
    // A fixed name, so that the next run removes what a killed one left behind.
    let pending = PendingFile { file: directory.join(name), target: target.into(), durable };
    match std::fs::remove_file(&pending.file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&pending.file)?;
    match fill(&mut file, target, bytes, durable) {
        Ok(()) => Ok(pending),
        Err(error) => {
            pending.discard();
            Err(error)
        }
    }
}

fn fill(file: &mut File, target: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
    file.write_all(bytes)?;
    let old = match target.metadata() {
        Ok(old) => Some(old),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    // The mode before the owner: changing the mode of another user's file requires CAP_FOWNER,
    // which the units do not have.
    let mode = old.as_ref().map_or(0o644, |old| old.mode() & 0o7777);
    file.set_permissions(Permissions::from_mode(mode))?;
    if let Some(old) = old {
        std::os::unix::fs::fchown(&*file, Some(old.uid()), Some(old.gid()))?;
    }
    if durable { file.sync_all() } else { Ok(()) }
}

impl PendingFile {
    /// Replaces the target with the temporary file.
    ///
    /// # Errors
    /// If the target cannot be replaced. It is unchanged then.
    pub(crate) fn commit(self) -> io::Result<()> {
        if let Err(error) = std::fs::rename(&self.file, &self.target) {
            self.discard();
            return Err(error);
        }
        if self.durable { File::open(directory_of(&self.target))?.sync_all() } else { Ok(()) }
    }

    /// Removes the temporary file.
    pub(crate) fn discard(self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Replaces `target` with `bytes`, unless that is its content already.
///
/// # Errors
/// If the file cannot be written. It is unchanged then.
pub(crate) fn replace(target: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_with(target, bytes, true)
}

/// Like [`replace`], but does not wait for the disk: for a file that is rewritten after a reboot.
/// The wait takes milliseconds if the directory is not in memory.
///
/// # Errors
/// If the file cannot be written. It is unchanged then.
pub(crate) fn replace_volatile(target: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_with(target, bytes, false)
}

fn replace_with(target: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
    if std::fs::read(target).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    prepare_with(target, bytes, durable)?.commit()
}

fn directory_of(target: &Path) -> &Path {
    match target.parent() {
        Some(directory) if directory != Path::new("") => directory,
        _ => Path::new("."),
    }
}
