//! Path, version and integrity of NVIDIA's management library, libnvidia-ml. The file is read as
//! data and never loaded: the loader's message does not distinguish a damaged file from a missing
//! one, and loading a truncated file raises SIGBUS.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Facts about the library file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LibraryFile {
    /// Path; `None` if no file was found.
    pub path: Option<String>,
    /// Version, from the file name.
    pub version: Option<String>,
    /// Why the loader cannot use the file; `None` if it looks intact.
    pub damage: Option<String>,
}

impl LibraryFile {
    /// Inspects the library that the loader would use for `name`, a path or a file name.
    pub fn inspect(name: &str) -> Self {
        let Some(path) = find(name) else {
            return Self::default();
        };
        Self {
            version: version(&path),
            damage: find_damage(&path)
                .unwrap_or_else(|error| Some(format!("cannot read it: {error}"))),
            path: Some(path.to_string_lossy().into_owned()),
        }
    }
}

/// Directories where Debian, Ubuntu, Red Hat and NVIDIA's installer put the library.
pub(crate) const LIBRARY_DIRS: [&str; 5] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu/nvidia/current",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
];

fn find(name: &str) -> Option<PathBuf> {
    let exists = |path: &PathBuf| path.exists();
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(exists);
    }
    let library_path = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    std::env::split_paths(&library_path)
        .chain(LIBRARY_DIRS.map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(exists)
}

/// Returns the version. `libnvidia-ml.so.1` is a link to `libnvidia-ml.so.<version>`; NVML does not
/// report its version once `nvmlInit` has failed.
fn version(path: &Path) -> Option<String> {
    let file = path.canonicalize().ok()?;
    let (_, version) = file.file_name()?.to_str()?.split_once(".so.")?;
    version.contains('.').then(|| version.to_owned())
}

/// Returns why the loader would reject this shared library (layout: ELF-64 object file format;
/// machine numbers: elf.h).
fn find_damage(path: &Path) -> std::io::Result<Option<String>> {
    const HEADER_BYTES: usize = 64;
    const PT_LOAD: u64 = 1;
    /// No linker creates more.
    const MAX_SEGMENTS: u64 = 256;
    let expected_machine = match std::env::consts::ARCH {
        "aarch64" => 183,
        _ => 62,
    };
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    let length = metadata.len();
    if !metadata.is_file() {
        return Ok(Some("it is not a regular file".into()));
    }
    let truncated =
        |needed: u64| Some(format!("it is truncated: {length} of at least {needed} bytes"));
    let mut header = [0; HEADER_BYTES];
    if length < HEADER_BYTES as u64 {
        return Ok(truncated(HEADER_BYTES as u64));
    }
    file.read_exact_at(&mut header, 0)?;
    if !header.starts_with(b"\x7fELF") {
        return Ok(Some("it is not a shared library (no ELF header)".into()));
    }
    let machine = read_number(&header, 18, 2);
    if header[4..6] != [2, 1] || machine != expected_machine {
        let bits = if header[4] == 1 { 32 } else { 64 };
        return Ok(Some(format!(
            "it is built for another architecture ({bits} bits, ELF machine {machine})"
        )));
    }
    let (table, size, count) =
        (read_number(&header, 32, 8), read_number(&header, 54, 2), read_number(&header, 56, 2));
    let mut needed = HEADER_BYTES as u64;
    for index in 0..count.min(MAX_SEGMENTS) {
        let mut segment = [0; 56];
        let at = table.saturating_add(index * size);
        if at.saturating_add(segment.len() as u64) > length {
            return Ok(truncated(at.saturating_add(segment.len() as u64)));
        }
        file.read_exact_at(&mut segment, at)?;
        if read_number(&segment, 0, 4) == PT_LOAD {
            needed = needed
                .max(read_number(&segment, 8, 8).saturating_add(read_number(&segment, 32, 8)));
        }
    }
    Ok(if needed > length { truncated(needed) } else { None })
}

/// Reads the little-endian number of `length` bytes at `at`.
fn read_number(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes these bytes to a file and inspects it.
    fn damage_of(name: &str, bytes: &[u8]) -> Option<String> {
        let path =
            std::env::temp_dir().join(format!("supernode-agent-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        let damage = find_damage(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        damage
    }

    #[test]
    fn damaged_library_is_described() {
        // The test binary is an ELF file with the same tables as a library.
        let whole = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(damage_of("whole", &whole), None);
        let mut foreign = whole.clone();
        foreign[18] = 40;
        let mut narrow = whole.clone();
        narrow[4] = 1;
        for (name, bytes, words) in [
            ("half", &whole[..4096], "truncated"),
            ("header", &whole[..70], "truncated"),
            ("empty", b"".as_slice(), "truncated: 0 of"),
            ("text", [b'#'; 100].as_slice(), "no ELF header"),
            ("foreign", &foreign, "another architecture (64 bits, ELF machine 40)"),
            ("narrow", &narrow, "another architecture (32 bits"),
        ] {
            let damage = damage_of(name, bytes).unwrap_or_default();
            assert!(damage.contains(words), "{name}: {damage}");
        }
    }

    #[test]
    fn absent_library_has_no_path() {
        assert_eq!(LibraryFile::inspect("/nowhere/libnvidia-ml.so.1"), LibraryFile::default());
        assert_eq!(LibraryFile::inspect("libnvidia-ml.so.is-not-here"), LibraryFile::default());
        let directory = LibraryFile::inspect("/usr/lib/");
        assert_eq!(directory.damage.as_deref(), Some("it is not a regular file"));
    }
}
