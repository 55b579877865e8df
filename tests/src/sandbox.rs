//! Temporary folders, and where cargo put what the tests start.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicUsize, Ordering},
};

/// A folder that is deleted with this value, unless `SUPERNODE_TESTS_KEEP` is set.
#[derive(Debug)]
pub struct Sandbox {
    path: PathBuf,
}

impl Sandbox {
    /// A new folder. Its path is short: a unix socket in it must fit in 107 bytes.
    #[must_use]
    pub fn new(label: &str) -> Self {
        let base = env::temp_dir();
        let base = if base.as_os_str().len() > 40 { PathBuf::from("/tmp") } else { base };
        let path = base.join(unique_name(label));
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path }
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in the folder.
    #[must_use]
    pub fn join(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.path.join(relative)
    }

    /// Writes a file in the folder, and the folders above it; gives its path.
    pub fn write(&self, relative: impl AsRef<Path>, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path.join(relative);
        write(&path, text);
        path
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if env::var_os("SUPERNODE_TESTS_KEEP").is_none() {
            // Best effort: a file that stays does no harm to the next test.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// `sn-<label>-<pid>-<n>`: unique on this machine, and telling whose it is.
pub(crate) fn unique_name(label: &str) -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("sn-{label}-{}-{number}", process::id())
}

/// Writes a file and the folders above it.
pub(crate) fn write(path: &Path, text: impl AsRef<[u8]>) {
    let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(path, text));
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// The agent: `SUPERNODE_AGENT`, else the one that cargo built beside this test.
#[must_use]
pub fn agent_binary() -> PathBuf {
    let built = built("supernode-agent", "cargo build -p supernode-agent");
    env::var_os("SUPERNODE_AGENT").map_or_else(built, PathBuf::from)
}

/// The stand-in for `libnvidia-ml.so.1`.
#[must_use]
pub fn nvml_library() -> PathBuf {
    built("libnvml_standin.so", "cargo build -p nvml-standin")()
}

/// The stand-in for nvidia-container-runtime.
#[must_use]
pub fn runtime_binary() -> PathBuf {
    built("nvidia-container-runtime", "cargo build -p supernode-tests --bins")()
}

/// A file in cargo's folder for this profile, or in its `deps`, where a library is newest: cargo rebuilds it there, and
/// copies it up only when it was asked for by name.
fn built(name: &'static str, command: &'static str) -> impl FnOnce() -> PathBuf {
    move || {
        let test = env::current_exe().expect("the path of this test");
        let deps = test.parent().expect("the folder of this test");
        let profile = deps.parent().expect("the folder of this profile");
        [deps, profile]
            .into_iter()
            .map(|folder| folder.join(name))
            .find(|path| path.is_file())
            .unwrap_or_else(|| panic!("{name} is not built; `{command}` builds it"))
    }
}
