//! Programs installed on this VM.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Directories in the PATH of systemd services.
pub(crate) const SERVICE_DIRS: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Returns the path of an executable. `name` is an absolute path, or a file name that is looked up
/// in PATH and in [`SERVICE_DIRS`].
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    if name.starts_with('/') {
        return Some(PathBuf::from(name)).filter(|path| is_executable(path));
    }
    if name.is_empty() || name.contains('/') {
        return None;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SERVICE_DIRS.map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| is_executable(candidate))
}

/// Returns whether a path is a regular file with an execute bit.
pub(crate) fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_is_found_by_name_or_path() {
        assert!(find_program("sh").is_some() && find_program("/bin/sh").is_some());
    }

    #[test]
    fn relative_paths_and_other_files_are_not_programs() {
        for name in ["", "/etc/passwd", "/nowhere", "bin/sh", "no-such-program-anywhere", "/bin"] {
            assert_eq!(find_program(name), None, "{name}");
        }
    }
}
