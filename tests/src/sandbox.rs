//! Temporary directories, and where cargo put what the tests start.

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
/// Set, it keeps what tests have made, for a look at it.
const KEEP: &str = "SUPERNODE_TESTS_KEEP";
/// Below this much memory that is to be had, directories are on the disk.
const ENOUGH_MEMORY_KIB: u64 = 6 << 20;

/// A directory that is deleted with this value, unless `SUPERNODE_TESTS_KEEP` is set.
#[derive(Debug)]
pub struct Sandbox {
    path: PathBuf,
}

impl Sandbox {
    /// A new directory. Its path is short: a unix socket in it must fit in 107 bytes.
    #[must_use]
    pub fn new(label: &str) -> Self {
        let base = env::temp_dir();
        let base = if base.as_os_str().len() > 40 { PathBuf::from("/tmp") } else { base };
        let path = base.join(unique_name(label));
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path }
    }

    /// The same in memory where there is enough of it, for what is large and short-lived: on a disk
    /// that is told of each block that gets free (mount option discard), the end of an engine with
    /// images takes a minute.
    #[must_use]
    pub fn in_memory(label: &str) -> Self {
        static LEFT: Once = Once::new();
        LEFT.call_once(unmount_what_was_left);
        let sandbox = Self::new(label);
        if env::var_os(KEEP).is_none() && available_memory_kib() >= ENOUGH_MEMORY_KIB {
            // Only root can; an engine or a machine needs root anyway, and says so.
            run(
                Command::new("mount")
                    .args(["-t", "tmpfs", "-o", "mode=755", TMPFS])
                    .arg(&sandbox.path),
                TIMEOUT,
            );
        }
        sandbox
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in the directory.
    #[must_use]
    pub fn join(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.path.join(relative)
    }

    /// Writes a file in the directory, and the directories above it; gives its path.
    pub fn write(&self, relative: impl AsRef<Path>, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path.join(relative);
        write(&path, text);
        path
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if env::var_os(KEEP).is_none() {
            // Best effort: a file that stays does no harm to the next test.
            if fs::remove_dir_all(&self.path).is_err() && mounted().contains(&self.path) {
                unmount(&self.path);
            }
        }
    }
}

/// The name under which the kernel lists what [`Sandbox::in_memory`] mounts.
const TMPFS: &str = "supernode-tests";

/// The directories that [`Sandbox::in_memory`] has mounted, in any process.
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

/// What tests have left behind that were killed.
fn unmount_what_was_left() {
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

/// `sn-<label>-<pid>-<n>`: unique on this machine, and telling whose it is.
pub(crate) fn unique_name(label: &str) -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("sn-{label}-{}-{number}", process::id())
}

/// Writes a file and the directories above it.
pub(crate) fn write(path: &Path, text: impl AsRef<[u8]>) {
    let written =
        path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(path, text));
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// The agent: `SUPERNODE_AGENT`, else the one that cargo built beside this test.
#[must_use]
pub fn agent_binary() -> PathBuf {
    let built = built("supernode-agent", "cargo build -p supernode-agent");
    env::var_os("SUPERNODE_AGENT").map_or_else(built, PathBuf::from)
}

/// The simulator for `libnvidia-ml.so.1`.
#[must_use]
pub fn nvml_library() -> PathBuf {
    built("libnvml_simulator.so", "cargo build -p nvml-simulator")()
}

/// The simulator of nvidia-container-runtime.
#[must_use]
pub fn runtime_binary() -> PathBuf {
    built("nvidia-container-runtime", "cargo build -p supernode-tests --bins")()
}

/// A file in cargo's directory for this profile, or in its `deps`, where a library is newest: cargo
/// rebuilds it there, and copies it up only when it was asked for by name.
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
