//! Full and read-only file systems mounted over a directory of a test VM.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::process::run;

const PAGE: usize = 4096;
const TIMEOUT: Duration = Duration::from_secs(10);

/// A file system mounted over a directory until this value is dropped. The original content then
/// reappears unchanged.
#[derive(Debug)]
pub struct FaultyMount {
    directory: PathBuf,
}

impl FaultyMount {
    /// Mounts a full file system: a copy of the directory's content, and free space for this many
    /// pages of 4096 bytes.
    ///
    /// # Panics
    /// If it cannot be mounted or filled.
    #[must_use]
    #[track_caller]
    pub fn with_free_pages(pages: usize, directory: &Path) -> Self {
        let script = r#"mkdir -p "$1"; next=$(mktemp -d); mount -t tmpfs -o size=256k tmpfs "$next"
            cp -a "$1/." "$next"; mount --move "$next" "$1"; rmdir "$next""#;
        let mounted = Self::by(script, directory);
        let filler = directory.join(".filler");
        let mut file = fs::File::create(&filler).expect("the filler");
        while file.write_all(&[b'x'; PAGE]).is_ok() {}
        let length = file.metadata().expect("the filler").len();
        file.set_len(length - (pages * PAGE) as u64).expect("a shorter filler");
        mounted
    }

    /// Remounts the directory read-only.
    ///
    /// # Panics
    /// If it cannot be mounted.
    #[must_use]
    #[track_caller]
    pub fn read_only(directory: &Path) -> Self {
        Self::by(r#"mount --bind "$1" "$1"; mount -o remount,bind,ro "$1""#, directory)
    }

    #[track_caller]
    fn by(script: &str, directory: &Path) -> Self {
        run(Command::new("sh").args(["-ec", script, "sh"]).arg(directory), TIMEOUT)
            .expect_success();
        Self { directory: directory.to_owned() }
    }
}

impl Drop for FaultyMount {
    fn drop(&mut self) {
        run(Command::new("umount").arg("--lazy").arg(&self.directory), TIMEOUT);
    }
}
