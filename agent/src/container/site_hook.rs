//! The site hook: a Python module of ours that makes frameworks keep to `FL_GPU_MEMORY_FRACTION`.

use std::io;
use std::path::{Path, PathBuf};

use crate::system::atomic_file;

/// The hook's folder in the container, first on its PYTHONPATH.
pub const TARGET: &str = "/opt/supernode-agent/site";

/// The variable with each GPU's limit in MiB, in CUDA's order.
pub const LIMITS_VARIABLE: &str = "FL_GPU_MEMORY_LIMITS_MIB";

const HOOK: &str = include_str!("../../../packaging/site/sitecustomize.py");

/// The hook's folder on the host.
pub fn folder(state_dir: &Path) -> PathBuf {
    state_dir.join("site")
}

/// Writes the hook where the container's mount finds it.
///
/// # Errors
/// When the folder or the file cannot be written.
pub fn write(state_dir: &Path) -> io::Result<()> {
    let folder = folder(state_dir);
    std::fs::create_dir_all(&folder)?;
    atomic_file::replace_volatile(&folder.join("sitecustomize.py"), HOOK.as_bytes())
}
