//! The file of NVIDIA's management library: where it is, its version, what is wrong with it. Read
//! as data, never loaded: the loader's own words do not tell a damaged file from a missing one, and
//! a file that is cut off kills who loads it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What the file tells.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LibraryFile {
    /// Where it is, where it was found.
    pub path: Option<String>,
    /// Its version, as its name gives it.
    pub version: Option<String>,
    /// Why the loader cannot use it.
    pub damage: Option<String>,
}

impl LibraryFile {
    /// Looks at the library that `name`, a path or a name for the loader, leads to.
    pub fn look(name: &str) -> Self {
        let Some(path) = find(name) else {
            return Self::default();
        };
        Self {
            version: version(&path),
            damage: damage(&path)
                .unwrap_or_else(|error| Some(format!("it cannot be read: {error}"))),
            path: Some(path.to_string_lossy().into_owned()),
        }
    }
}

/// Where Debian, Ubuntu, Red Hat and NVIDIA's own installer put it.
pub const FOLDERS: [&str; 5] = [
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
    let first = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    std::env::split_paths(&first)
        .chain(FOLDERS.map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(exists)
}

/// `libnvidia-ml.so.1` is a link to `libnvidia-ml.so.<version>`. NVML itself does not tell it once
/// `nvmlInit` has failed.
fn version(path: &Path) -> Option<String> {
    let file = path.canonicalize().ok()?;
    let (_, version) = file.file_name()?.to_str()?.split_once(".so.")?;
    version.contains('.').then(|| version.to_owned())
}

/// What is wrong with a shared library for this machine (layout: ELF-64 object file format; machine
/// numbers: elf.h).
fn damage(path: &Path) -> std::io::Result<Option<String>> {
    const HEADER_BYTES: usize = 64;
    const LOADED_SEGMENT: u64 = 1;
    /// More than a linker makes.
    const MAX_SEGMENTS: u64 = 256;
    let wanted_machine = match std::env::consts::ARCH {
        "aarch64" => 183,
        _ => 62,
    };
    let file = File::open(path)?;
    let facts = file.metadata()?;
    let length = facts.len();
    if !facts.is_file() {
        return Ok(Some("it is not a regular file".into()));
    }
    let cut_off =
        |needed: u64| Some(format!("it is cut off: {length} of at least {needed} bytes are there"));
    let mut header = [0; HEADER_BYTES];
    if length < HEADER_BYTES as u64 {
        return Ok(cut_off(HEADER_BYTES as u64));
    }
    file.read_exact_at(&mut header, 0)?;
    if !header.starts_with(b"\x7fELF") {
        return Ok(Some("it is no shared library (it has no ELF header)".into()));
    }
    let machine = number(&header, 18, 2);
    if header[4..6] != [2, 1] || machine != wanted_machine {
        let bits = if header[4] == 1 { 32 } else { 64 };
        return Ok(Some(format!(
            "it was built for another machine ({bits} bits, ELF machine {machine})"
        )));
    }
    let (table, size, count) =
        (number(&header, 32, 8), number(&header, 54, 2), number(&header, 56, 2));
    let mut needed = HEADER_BYTES as u64;
    for index in 0..count.min(MAX_SEGMENTS) {
        let mut segment = [0; 56];
        let at = table.saturating_add(index * size);
        if at.saturating_add(segment.len() as u64) > length {
            return Ok(cut_off(at.saturating_add(segment.len() as u64)));
        }
        file.read_exact_at(&mut segment, at)?;
        if number(&segment, 0, 4) == LOADED_SEGMENT {
            needed = needed.max(number(&segment, 8, 8).saturating_add(number(&segment, 32, 8)));
        }
    }
    Ok(if needed > length { cut_off(needed) } else { None })
}

/// The little-endian number of `length` bytes at `at`.
fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of the test's own with these bytes.
    fn damage_of(name: &str, bytes: &[u8]) -> Option<String> {
        let path =
            std::env::temp_dir().join(format!("supernode-agent-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        let damage = damage(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        damage
    }

    #[test]
    fn a_whole_library_has_no_damage_and_a_damaged_one_is_described() {
        // A test binary is an ELF file of this machine, with the same tables as a library.
        let whole = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(damage_of("whole", &whole), None);
        let mut foreign = whole.clone();
        foreign[18] = 40;
        let mut narrow = whole.clone();
        narrow[4] = 1;
        for (name, bytes, words) in [
            ("half", &whole[..4096], "cut off"),
            ("header", &whole[..70], "cut off"),
            ("empty", b"".as_slice(), "cut off: 0 of"),
            ("text", [b'#'; 100].as_slice(), "no ELF header"),
            ("foreign", &foreign, "another machine (64 bits, ELF machine 40)"),
            ("narrow", &narrow, "another machine (32 bits"),
        ] {
            let damage = damage_of(name, bytes).unwrap_or_default();
            assert!(damage.contains(words), "{name}: {damage}");
        }
    }

    #[test]
    fn a_library_that_is_nowhere_has_no_path() {
        assert_eq!(LibraryFile::look("/nowhere/libnvidia-ml.so.1"), LibraryFile::default());
        assert_eq!(LibraryFile::look("libnvidia-ml.so.is-not-here"), LibraryFile::default());
        let folder = LibraryFile::look("/usr/lib/");
        assert_eq!(folder.damage.as_deref(), Some("it is not a regular file"));
    }
}
