//! Site hook: a Python module mounted into the container that makes the frameworks respect
//! `FL_GPU_MEMORY_FRACTION`.

use std::io;
use std::path::{Path, PathBuf};

use crate::system::atomic_file;

/// Directory of the hook in the container, first in PYTHONPATH.
pub(crate) const TARGET: &str = "/opt/supernode-agent/site";

/// Environment variable with the memory limit of each GPU in MiB, in CUDA's device order.
pub(crate) const LIMITS_VARIABLE: &str = "FL_GPU_MEMORY_LIMITS_MIB";

const HOOK: &str = include_str!("../../../packaging/site/sitecustomize.py");

/// Returns the directory of the hook on the VM.
pub(crate) fn source_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("site")
}

/// Writes the hook into [`source_dir`].
///
/// # Errors
/// If the directory or the file cannot be written.
pub(crate) fn write(state_dir: &Path) -> io::Result<()> {
    let dir = source_dir(state_dir);
    std::fs::create_dir_all(&dir)?;
    atomic_file::replace_volatile(&dir.join("sitecustomize.py"), HOOK.as_bytes())
}
