//! Diagnosis as a list of small checks: each has a stable id, a level, what was found, and a fix.
//! Facts are read at the edge (`read`), what they mean is judged by pure functions (`judge`).

pub mod host;
pub mod template;
pub mod vm;

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde_json::{Value as Json, json};

use crate::gpu::kernel::KernelFacts;
use crate::gpu::pci::{self, PciFacts};
use crate::system::facts::Root;
use crate::values::sanitize_line;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Level {
    /// As it should be.
    Ok,
    /// The node works, or may work, with less than it could have; or it could not be learned.
    Warning,
    /// The GPU or the node does not work like this.
    Error,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Error => "ERROR",
        }
    }

    /// A word in its colour on a terminal (ECMA-48).
    pub(crate) fn coloured(self, word: &str) -> String {
        let colour = match self {
            Self::Ok => 32,
            Self::Warning => 33,
            Self::Error => 31,
        };
        format!("\x1b[{colour}m{word}\x1b[0m")
    }
}

/// One check and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its stable id. Where there are several things of a kind (GPUs, attributes), there is a check
    /// for each, with one id.
    pub id: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found, with the particulars.
    pub finding: String,
    /// A command or a template attribute that mends it.
    pub fix: Option<String>,
    /// The line of the checked file, where it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
}

impl Check {
    /// All is well.
    pub fn ok(id: &'static str, finding: impl Into<String>) -> Self {
        Self {
            id,
            level: Level::Ok,
            finding: sanitize_line(&finding.into()),
            fix: None,
            line: None,
        }
    }

    /// Something is wrong, and this mends it.
    pub fn bad(
        id: &'static str,
        level: Level,
        finding: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            id,
            level,
            finding: sanitize_line(&finding.into()),
            fix: Some(fix.into()),
            line: None,
        }
    }

    /// Something that an operator should know.
    pub fn warning(id: &'static str, finding: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::bad(id, Level::Warning, finding, fix)
    }

    /// Something that must be mended.
    pub fn error(id: &'static str, finding: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::bad(id, Level::Error, finding, fix)
    }

    /// What could not be learned, and why: nothing is guessed in its place.
    pub fn unknown(id: &'static str, why: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::warning(id, format!("not known: {}", why.into()), fix)
    }

    /// The same, about this line.
    #[must_use]
    pub fn at(self, line: usize) -> Self {
        Self { line: Some(line), ..self }
    }
}

/// All checks of one subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnosis {
    /// What was checked: `vm`, `host`, `template`.
    pub subject: &'static str,
    /// Where: the root folder, or the file.
    pub place: String,
    /// The checks, in the order in which one is best mended.
    pub checks: Vec<Check>,
}

impl Diagnosis {
    fn count(&self, level: Level) -> usize {
        self.checks.iter().filter(|check| check.level == level).count()
    }

    /// Whether an ERROR was found.
    pub fn has_error(&self) -> bool {
        self.count(Level::Error) > 0
    }

    /// The form of `--json`.
    pub fn to_json(&self) -> Json {
        json!({
            "subject": self.subject,
            "place": self.place,
            "errors": self.count(Level::Error),
            "warnings": self.count(Level::Warning),
            "checks": self.checks,
        })
    }

    /// The table for a person.
    ///
    /// # Errors
    /// When `out` cannot be written.
    pub fn write(&self, out: &mut dyn Write, coloured: bool) -> io::Result<()> {
        let width = self.checks.iter().map(|check| check.id.len()).max().unwrap_or(0);
        for Check { id, level, finding, fix, line } in &self.checks {
            let word = format!("{:<7}", level.word());
            let word = if coloured { level.coloured(&word) } else { word };
            let place = line.map_or(String::new(), |line| format!("line {line}: "));
            writeln!(out, "{word}  {id:<width$}  {place}{finding}")?;
            if let Some(fix) = fix {
                writeln!(out, "         {:width$}  fix: {fix}", "")?;
            }
        }
        let number = |level, word: &str| match self.count(level) {
            1 => format!("1 {word}"),
            count => format!("{count} {word}s"),
        };
        writeln!(
            out,
            "{} {}: {}, {}",
            self.subject,
            self.place,
            number(Level::Error, "error"),
            number(Level::Warning, "warning")
        )
    }
}

/// The PCI facts of the machine at `root`, whose sysfs is `sysfs`.
fn read_pci(root: &Root, sysfs: &str) -> PciFacts {
    let unreadable = |why: String| PciFacts { unreadable: vec![why], ..PciFacts::default() };
    let folder = match root.resolve(sysfs) {
        Ok(folder) => folder,
        Err(error) => return unreadable(format!("{sysfs}: {error}")),
    };
    match root.escape(&folder.join("bus/pci/devices")) {
        Some(link) => {
            unreadable(format!("{}: it leads out of {}", link.display(), root.path().display()))
        }
        None => pci::read_facts(&folder, || {
            KernelFacts::read(Path::new(sysfs), |path| root.at(Path::new("/").join(path)))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_the_word_the_id_the_line_and_the_fix() {
        let checks =
            vec![Check::ok("a", "fine"), Check::error("bcd", "not\nfine", "mend it").at(7)];
        let diagnosis = Diagnosis { subject: "template", place: "file".into(), checks };
        let mut text = Vec::new();
        diagnosis.write(&mut text, false).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "OK       a    fine\nERROR    bcd  line 7: not fine\n              fix: mend it\n\
             template file: 1 error, 0 warnings\n"
        );
        assert!(diagnosis.has_error());
        let mut text = Vec::new();
        diagnosis.write(&mut text, true).unwrap();
        assert!(String::from_utf8(text).unwrap().contains("\x1b[31mERROR  \x1b[0m"));
        assert_eq!(diagnosis.to_json()["checks"][1]["level"], "ERROR");
        assert_eq!(diagnosis.to_json()["checks"][0].get("line"), None);
    }

    #[test]
    fn the_kernel_of_a_root_is_not_that_of_this_machine() {
        let folder = std::env::temp_dir()
            .join(format!("supernode-agent-kernel-of-root-{}", std::process::id()));
        let gpu = folder.join("sys/bus/pci/devices/0000:01:00.0");
        std::fs::create_dir_all(&gpu).unwrap();
        for (name, value) in [("vendor", "0x10de"), ("class", "0x030200"), ("device", "0x20f1")] {
            std::fs::write(gpu.join(name), value).unwrap();
        }
        std::os::unix::fs::symlink("/proc", folder.join("proc")).unwrap();
        let facts = read_pci(&Root::new(&folder), "/sys");
        std::fs::remove_dir_all(folder).unwrap();
        assert_eq!(
            (facts.gpus().count(), facts.kernel),
            (1, KernelFacts::default()),
            "{:?}",
            facts.unreadable
        );
    }
}
