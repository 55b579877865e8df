//! Replacing a file so that a reader, or a kill at any moment, finds the old content or the new,
//! and nothing else.

use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// New content that lies beside its target and is not yet in its place.
#[derive(Debug)]
pub struct PendingFile {
    file: PathBuf,
    target: PathBuf,
    durable: bool,
}

/// Writes `bytes` beside `target`, on the disk, with the mode and the owner of the file that is
/// there now, else with mode 0644.
///
/// # Errors
/// When the folder or the file cannot be written. Nothing is left behind then.
pub fn prepare(target: &Path, bytes: &[u8]) -> io::Result<PendingFile> {
    prepare_for(target, bytes, true)
}

fn prepare_for(target: &Path, bytes: &[u8], durable: bool) -> io::Result<PendingFile> {
    let folder = folder_of(target);
    std::fs::create_dir_all(folder)?;
    let mut name = OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(".supernode-agent");
    // One fixed name: what a killed run left behind is taken away by the next.
    let prepared = PendingFile { file: folder.join(name), target: target.into(), durable };
    match std::fs::remove_file(&prepared.file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&prepared.file)?;
    match fill(&mut file, target, bytes, durable) {
        Ok(()) => Ok(prepared),
        Err(error) => {
            prepared.discard();
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
    // The mode first: that of a file which is somebody else's is changed by CAP_FOWNER alone, which
    // the units do not have.
    let mode = old.as_ref().map_or(0o644, |old| old.mode() & 0o7777);
    file.set_permissions(Permissions::from_mode(mode))?;
    if let Some(old) = old {
        std::os::unix::fs::fchown(&*file, Some(old.uid()), Some(old.gid()))?;
    }
    if durable { file.sync_all() } else { Ok(()) }
}

impl PendingFile {
    /// Puts the content in its place.
    ///
    /// # Errors
    /// When the target cannot be replaced; it is what it was then.
    pub fn commit(self) -> io::Result<()> {
        if let Err(error) = std::fs::rename(&self.file, &self.target) {
            self.discard();
            return Err(error);
        }
        if self.durable { File::open(folder_of(&self.target))?.sync_all() } else { Ok(()) }
    }

    /// Takes the content away again.
    pub fn discard(self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Replaces `target` by `bytes`, unless that is its content already.
///
/// # Errors
/// When it cannot be written; it is what it was then.
pub fn replace(target: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_for(target, bytes, true)
}

/// The same for a file that is written anew after a reboot: it does not wait for the disk, which
/// takes milliseconds where the folder is not in memory.
///
/// # Errors
/// When it cannot be written; it is what it was then.
pub fn replace_volatile(target: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_for(target, bytes, false)
}

fn replace_for(target: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
    if std::fs::read(target).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    prepare_for(target, bytes, durable)?.commit()
}

fn folder_of(target: &Path) -> &Path {
    match target.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}
