//! Temporary directories, and paths of the binaries that cargo built.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process,
    process::Command,
    sync::{
        Once,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::process::{run, running};

const TIMEOUT: Duration = Duration::from_secs(10);
/// Environment variable that keeps the tests' directories for inspection.
const KEEP: &str = "SUPERNODE_TESTS_KEEP";
/// Minimum available memory for directories in memory; below it they are on disk.
const ENOUGH_MEMORY_KIB: u64 = 6 << 20;

/// A directory that is removed on drop unless `SUPERNODE_TESTS_KEEP` is set.
#[derive(Debug)]
pub struct Sandbox {
    path: PathBuf,
}

impl Sandbox {
    /// Creates a directory. Its path is short because a Unix socket path is limited to 107 bytes.
    #[must_use]
    pub fn new(label: &str) -> Self {
        let base = env::temp_dir();
        let base = if base.as_os_str().len() > 40 { PathBuf::from("/tmp") } else { base };
        let path = base.join(unique_name(label));
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path }
    }

    /// Creates a directory in memory, if enough is available, for large and short-lived data. On a
    /// disk mounted with `discard`, removing an engine with images takes a minute.
    #[must_use]
    pub fn in_memory(label: &str) -> Self {
        static LEFT: Once = Once::new();
        LEFT.call_once(unmount_leftovers);
        let sandbox = Self::new(label);
        if env::var_os(KEEP).is_none() && available_memory_kib() >= ENOUGH_MEMORY_KIB {
            // Mounting needs root; an engine or a VM needs root anyway and reports it.
            run(
                Command::new("mount")
                    .args(["-t", "tmpfs", "-o", "mode=755", TMPFS])
                    .arg(&sandbox.path),
                TIMEOUT,
            );
        }
        sandbox
    }

    /// Returns the path of the directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of a file in the directory.
    #[must_use]
    pub fn join(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.path.join(relative)
    }

    /// Writes a file in the directory, creating parent directories, and returns its path.
    pub fn write(&self, relative: impl AsRef<Path>, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path.join(relative);
        write(&path, text);
        path
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if env::var_os(KEEP).is_none() {
            // Best effort: a leftover file does not affect the next test.
            if fs::remove_dir_all(&self.path).is_err() && mounted().contains(&self.path) {
                unmount(&self.path);
            }
        }
    }
}

/// Device name of the mounts of [`Sandbox::in_memory`] in /proc/self/mounts.
const TMPFS: &str = "supernode-tests";

/// Directories mounted by [`Sandbox::in_memory`] in any process.
fn mounted() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let ours = mounts
        .lines()
        .filter_map(|line| line.strip_prefix(TMPFS)?.split(' ').nth(1).map(PathBuf::from));
    ours.collect()
}

fn unmount(directory: &Path) {
    run(Command::new("umount").arg("--lazy").arg(directory), TIMEOUT);
    let _ = fs::remove_dir(directory);
}

/// Unmounts directories of test processes that were killed.
fn unmount_leftovers() {
    for directory in mounted() {
        let pid = directory.to_str().and_then(|path| path.rsplit('-').nth(1)?.parse().ok());
        if pid.is_some_and(|pid| !running(pid)) {
            unmount(&directory);
        }
    }
}

fn available_memory_kib() -> u64 {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = memory.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    available.and_then(|kib| kib.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

/// Returns `sn-<label>-<pid>-<n>`: unique on this machine and traceable to its process.
pub(crate) fn unique_name(label: &str) -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("sn-{label}-{}-{number}", process::id())
}

/// Writes a file, creating parent directories.
pub(crate) fn write(path: &Path, text: impl AsRef<[u8]>) {
    let written =
        path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(path, text));
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Returns the path of the agent: `SUPERNODE_AGENT`, or the binary that cargo built.
#[must_use]
pub fn agent_binary() -> PathBuf {
    let built = built("supernode-agent", "cargo build -p supernode-agent");
    env::var_os("SUPERNODE_AGENT").map_or_else(built, PathBuf::from)
}

/// Returns the path of the simulated `libnvidia-ml.so.1`.
#[must_use]
pub fn nvml_library() -> PathBuf {
    built("libnvml_simulator.so", "cargo build -p nvml-simulator")()
}

/// Returns the path of the simulated nvidia-container-runtime.
#[must_use]
pub fn runtime_binary() -> PathBuf {
    built("nvidia-container-runtime", "cargo build -p supernode-tests --bins")()
}

/// Finds a file in cargo's `deps` directory or its parent. The one in `deps` is newer for
/// libraries: cargo copies a library to the parent directory only if it was requested by name.
fn built(name: &'static str, command: &'static str) -> impl FnOnce() -> PathBuf {
    move || {
        let test = env::current_exe().expect("the path of this test");
        let deps = test.parent().expect("the directory of this test");
        let profile = deps.parent().expect("the directory of this profile");
        [deps, profile]
            .into_iter()
            .map(|directory| directory.join(name))
            .find(|path| path.is_file())
            .unwrap_or_else(|| panic!("{name} is not built; `{command}` builds it"))
    }
}
