//! Small and read-only file systems, over a directory of a machine.

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

/// A file system that is mounted over a directory, for as long as this lives. What lay there comes
/// back then, unchanged.
#[derive(Debug)]
pub struct FaultyMount {
    directory: PathBuf,
}

impl FaultyMount {
    /// A file system with a copy of what is in the directory, and then room for this many pages of
    /// 4096 bytes.
    ///
    /// # Panics
    /// Where it cannot be mounted or filled.
    #[must_use]
    #[track_caller]
    pub fn full_but_for(pages: usize, directory: &Path) -> Self {
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

    /// The same directory, read-only.
    ///
    /// # Panics
    /// Where it cannot be mounted.
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
