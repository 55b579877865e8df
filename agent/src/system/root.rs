//! Root directory that `check` examines: `/`, or a directory that contains the root of another
//! system. Symbolic links are resolved within it, as for a process that has it as `/`; nothing
//! outside of it is read.

use std::io;
use std::path::{Component, Path, PathBuf};

use crate::system::programs::{self, is_executable};

/// Maximum file size, above that of any file that is read here.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A file or directory below the root that exists and cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub(crate) struct ReadError {
    path: String,
    source: io::Error,
}

impl ReadError {
    fn new(path: &str, source: io::Error) -> Self {
        Self { path: path.to_owned(), source }
    }
}

/// A root directory.
#[derive(Debug, Clone)]
pub(crate) struct Root(PathBuf);

impl Root {
    pub(crate) fn new(directory: impl Into<PathBuf>) -> Self {
        Self(directory.into())
    }

    /// Returns whether this is the root of the running system.
    pub(crate) fn is_running_system(&self) -> bool {
        self.0 == Path::new("/")
    }

    /// Returns the directory as the operator named it.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Returns the location of `path`, an absolute path below this root, in the running system.
    /// Symbolic links are followed within the root. A part that does not exist is kept as it is.
    ///
    /// # Errors
    /// If the links form a loop.
    pub(crate) fn resolve(&self, path: impl AsRef<Path>) -> io::Result<PathBuf> {
        // As many as Linux follows (path_resolution(7)).
        const MAX_LINKS: usize = 40;
        if self.is_running_system() {
            return Ok(Path::new("/").join(path));
        }
        let mut links = 0;
        let mut inside = PathBuf::new();
        let mut parts: Vec<PathBuf> = components_reversed(path.as_ref());
        while let Some(part) = parts.pop() {
            match part.components().next() {
                Some(Component::ParentDir) => {
                    inside.pop();
                }
                Some(Component::Normal(name)) => {
                    match self.0.join(&inside).join(name).read_link() {
                        // An unresolved link would be followed by the kernel, out of the root.
                        Ok(_) if links == MAX_LINKS => {
                            return Err(io::Error::other("too many levels of symbolic links"));
                        }
                        Ok(target) => {
                            links += 1;
                            if target.is_absolute() {
                                inside = PathBuf::new();
                            }
                            parts.extend(components_reversed(&target));
                        }
                        Err(_) => inside.push(name),
                    }
                }
                _ => {}
            }
        }
        Ok(self.0.join(inside))
    }

    /// Like [`resolve`](Self::resolve), but returns a path that cannot exist if the links form a
    /// loop.
    pub(crate) fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.resolve(path).unwrap_or_else(|_| self.0.join("\0"))
    }

    /// Returns the first entry of a directory that is a link out of this root. Must be called
    /// before code that lets the kernel follow links.
    pub(crate) fn find_escaping_link(&self, directory: &Path) -> Option<PathBuf> {
        if self.is_running_system() {
            return None;
        }
        let root = self.0.canonicalize().ok()?;
        let entries = std::fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path());
        entries
            .into_iter()
            .find(|path| path.canonicalize().is_ok_and(|real| !real.starts_with(&root)))
    }

    /// Returns the text of a file, or `None` if it does not exist.
    ///
    /// # Errors
    /// If the file exists and cannot be read.
    pub(crate) fn read(&self, path: &str) -> Result<Option<String>, ReadError> {
        let read = || {
            let file = self.resolve(path)?;
            let metadata = file.metadata()?;
            // Opening a FIFO blocks until a process writes to it.
            if !metadata.is_file() {
                return Err(io::Error::other("not a regular file"));
            }
            if metadata.len() > MAX_FILE_BYTES {
                return Err(io::Error::other("larger than 4 MiB"));
            }
            std::fs::read(file)
        };
        match read() {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(ReadError::new(path, error)),
        }
    }

    /// Returns the sorted names in a directory, or none if it does not exist.
    ///
    /// # Errors
    /// If the directory exists and cannot be read.
    pub(crate) fn list(&self, path: &str) -> Result<Vec<String>, ReadError> {
        match self.resolve(path).and_then(std::fs::read_dir) {
            Ok(entries) => {
                let mut names: Vec<String> = entries
                    .flatten()
                    .map(|entry| entry.file_name().to_string_lossy().into_owned())
                    .collect();
                names.sort();
                Ok(names)
            }
            Err(error) if is_absent(&error) => Ok(Vec::new()),
            Err(error) => Err(ReadError::new(path, error)),
        }
    }

    /// Returns whether a path exists.
    pub(crate) fn exists(&self, path: &str) -> bool {
        self.at(path).exists()
    }

    /// Returns the path within this root of an executable, given by absolute path or file name.
    pub(crate) fn find_program(&self, name: &str) -> Option<PathBuf> {
        if self.is_running_system() {
            return programs::find_program(name);
        }
        let is_program = |path: &Path| is_executable(&self.at(path));
        if name.starts_with('/') {
            return Some(PathBuf::from(name)).filter(|path| is_program(path));
        }
        programs::SERVICE_DIRS
            .map(|directory| Path::new(directory).join(name))
            .into_iter()
            .find(|path| is_program(path))
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Returns the components of a path, the last one first.
fn components_reversed(path: &Path) -> Vec<PathBuf> {
    path.components().rev().map(|part| PathBuf::from(part.as_os_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_do_not_lead_out_of_the_root() {
        let directory =
            std::env::temp_dir().join(format!("supernode-agent-root-{}", std::process::id()));
        std::fs::create_dir_all(directory.join("run/deep")).unwrap();
        std::fs::create_dir_all(directory.join("var")).unwrap();
        symlink("/run", directory.join("var/run")).unwrap();
        symlink("../../../../../etc/hostname", directory.join("run/up")).unwrap();
        symlink("loop", directory.join("run/loop")).unwrap();
        let root = Root::new(&directory);
        assert_eq!(root.at("/var/run/deep/x"), directory.join("run/deep/x"));
        assert_eq!(root.at("/run/up"), directory.join("etc/hostname"));
        assert_eq!(root.at("/../../x"), directory.join("x"));
        let error = |path| root.read(path).unwrap_err().to_string();
        assert!(error("/run/loop").contains("symbolic links"));
        symlink("/proc", directory.join("proc")).unwrap();
        assert!(error("/proc/cpuinfo").contains("symbolic links"));
        assert!(!root.exists("/proc/cpuinfo") && root.find_program("/proc/self/exe").is_none());
        assert_eq!(
            root.find_escaping_link(&directory.join("var")),
            Some(directory.join("var/run"))
        );
        assert_eq!(root.read("/run/up").unwrap(), None);
        assert!(error("/run").contains("not a regular file"));
        assert_eq!(root.list("/var").unwrap(), ["run"]);
        std::fs::remove_dir_all(directory).unwrap();
        assert_eq!(Root::new("/").at("/proc/cpuinfo"), Path::new("/proc/cpuinfo"));
    }
}
