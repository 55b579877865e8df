//! Properties of this VM that the container specification depends on.

use std::path::Path;

/// Memory and logging of this VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SystemInfo {
    /// Total memory in MiB; 0 if unknown.
    pub memory_mib: u64,
    /// Whether systemd-journald accepts logs.
    pub has_journal: bool,
}

impl SystemInfo {
    /// Reads `/proc/meminfo` and looks for the journal's socket.
    pub fn read() -> Self {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self {
            memory_mib: memory_kib(&meminfo).unwrap_or(0) / 1024,
            has_journal: Path::new("/run/systemd/journal/socket").exists(),
        }
    }
}

fn memory_kib(meminfo: &str) -> Option<u64> {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    total.trim().trim_end_matches(" kB").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_from_meminfo() {
        assert_eq!(memory_kib("MemTotal:       16316412 kB\nMemFree: 1 kB\n"), Some(16_316_412));
        assert_eq!(memory_kib("MemFree: 1 kB\n"), None);
    }
}
