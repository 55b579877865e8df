//! The root folder that is checked: `/`, or a folder that is laid out like one. Links in it lead to
//! places in it, as they do for who has it as `/`; nothing outside is looked at.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use crate::system::programs;

/// More than any file that is read here has.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A root folder.
#[derive(Debug, Clone)]
pub struct Root(PathBuf);

impl Root {
    /// `folder` as the root.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self(folder.into())
    }

    /// Whether it is this machine's own.
    pub fn is_own(&self) -> bool {
        self.0 == Path::new("/")
    }

    /// As the operator named it.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where `path`, an absolute path below this root, lies on this machine. Links are followed
    /// within the root; what is not there stays as it is written.
    ///
    /// # Errors
    /// When the links have no end.
    pub fn resolve(&self, path: impl AsRef<Path>) -> io::Result<PathBuf> {
        // As many as Linux follows (path_resolution(7)).
        const MAX_LINKS: usize = 40;
        if self.is_own() {
            return Ok(Path::new("/").join(path));
        }
        let mut links = 0;
        let mut inside = PathBuf::new();
        let mut parts: Vec<PathBuf> = components(path.as_ref());
        while let Some(part) = parts.pop() {
            match part.components().next() {
                Some(Component::ParentDir) => {
                    inside.pop();
                }
                Some(Component::Normal(name)) => {
                    match self.0.join(&inside).join(name).read_link() {
                        // Left as it is it would be followed by the kernel, out of the root.
                        Ok(_) if links == MAX_LINKS => {
                            return Err(io::Error::other("its links lead in a circle"));
                        }
                        Ok(target) => {
                            links += 1;
                            if target.is_absolute() {
                                inside = PathBuf::new();
                            }
                            parts.extend(components(&target));
                        }
                        Err(_) => inside.push(name),
                    }
                }
                _ => {}
            }
        }
        Ok(self.0.join(inside))
    }

    /// The same, where links without an end lead to a path that no file has.
    pub fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.resolve(path).unwrap_or_else(|_| self.0.join("\0"))
    }

    /// The first entry of a folder that is a link out of this root. Whoever follows links by the
    /// kernel asks this first.
    pub fn escape(&self, folder: &Path) -> Option<PathBuf> {
        if self.is_own() {
            return None;
        }
        let root = self.0.canonicalize().ok()?;
        let entries = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
        entries
            .into_iter()
            .find(|path| path.canonicalize().is_ok_and(|real| !real.starts_with(&root)))
    }

    /// The text of a file; `None` where there is none.
    ///
    /// # Errors
    /// Path and cause, where it is there and cannot be read.
    pub fn read(&self, path: &str) -> Result<Option<String>, String> {
        let read = || {
            let file = self.resolve(path)?;
            let facts = file.metadata()?;
            // To open a FIFO is to wait for somebody who writes.
            if !facts.is_file() {
                return Err(io::Error::other("it is not a regular file"));
            }
            if facts.len() > MAX_FILE_BYTES {
                return Err(io::Error::other("it is larger than 4 MiB"));
            }
            std::fs::read(file)
        };
        match read() {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(format!("{path}: {error}")),
        }
    }

    /// The names in a folder, sorted; none where there is no such folder.
    ///
    /// # Errors
    /// Path and cause, where it is there and cannot be read.
    pub fn list(&self, path: &str) -> Result<Vec<String>, String> {
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
            Err(error) => Err(format!("{path}: {error}")),
        }
    }

    /// Whether something is at this path.
    pub fn has(&self, path: &str) -> bool {
        self.at(path).exists()
    }

    /// The program that `name` leads to, a path or a name; as it is called in this root.
    pub fn find_program(&self, name: &str) -> Option<PathBuf> {
        if self.is_own() {
            return programs::find_program(name);
        }
        let is_program = |path: &Path| {
            self.at(path)
                .metadata()
                .is_ok_and(|metadata| metadata.is_file() && metadata.mode() & 0o111 != 0)
        };
        if name.starts_with('/') {
            return Some(PathBuf::from(name)).filter(|path| is_program(path));
        }
        programs::SERVICE_DIRS
            .map(|folder| Path::new(folder).join(name))
            .into_iter()
            .find(|path| is_program(path))
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The parts of a path, the first one last.
fn components(path: &Path) -> Vec<PathBuf> {
    path.components().rev().map(|part| PathBuf::from(part.as_os_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_lead_nowhere_outside_of_the_root() {
        let folder =
            std::env::temp_dir().join(format!("supernode-agent-root-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("run/deep")).unwrap();
        std::fs::create_dir_all(folder.join("var")).unwrap();
        symlink("/run", folder.join("var/run")).unwrap();
        symlink("../../../../../etc/hostname", folder.join("run/up")).unwrap();
        symlink("circle", folder.join("run/circle")).unwrap();
        let root = Root::new(&folder);
        assert_eq!(root.at("/var/run/deep/x"), folder.join("run/deep/x"));
        assert_eq!(root.at("/run/up"), folder.join("etc/hostname"));
        assert_eq!(root.at("/../../x"), folder.join("x"));
        assert!(root.read("/run/circle").unwrap_err().contains("in a circle"));
        symlink("/proc", folder.join("proc")).unwrap();
        assert!(root.read("/proc/cpuinfo").unwrap_err().contains("in a circle"));
        assert!(!root.has("/proc/cpuinfo") && root.find_program("/proc/self/exe").is_none());
        assert_eq!(root.escape(&folder.join("var")), Some(folder.join("var/run")));
        assert_eq!(root.read("/run/up"), Ok(None));
        assert!(root.read("/run").unwrap_err().contains("not a regular file"));
        assert_eq!(root.list("/var"), Ok(vec!["run".into()]));
        std::fs::remove_dir_all(folder).unwrap();
        assert_eq!(Root::new("/").at("/proc/cpuinfo"), Path::new("/proc/cpuinfo"));
    }
}
