//! Programs on this machine.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The directories that services have in their PATH.
pub const SERVICE_DIRS: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The program that `name` leads to: a path, or a name in PATH and in the directories that services
/// have in theirs.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let is_program = |path: &Path| {
        path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.mode() & 0o111 != 0)
    };
    if name.starts_with('/') {
        return Some(PathBuf::from(name)).filter(|path| is_program(path));
    }
    if name.is_empty() || name.contains('/') {
        return None;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SERVICE_DIRS.map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|candidate| is_program(candidate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_in_path_or_by_its_path_and_must_be_executable() {
        assert!(find_program("sh").is_some() && find_program("/bin/sh").is_some());
        for name in ["", "/etc/passwd", "/nowhere", "bin/sh", "no-such-program-anywhere", "/bin"] {
            assert_eq!(find_program(name), None, "{name}");
        }
    }
}
