//! `check`: diagnoses a VM, a KVM host or a template. The result is a list of checks, each with a
//! stable id, a level, a finding and a fix. `read` reads the facts; `judge` evaluates them and is
//! pure.
//!
//! To add a check: read its facts in the `facts.rs` or `read` of its subject, add a function that
//! returns a [`Check`], and call it in `judge`. The id is part of the `--json` contract.

pub mod host;
pub mod template;
pub mod vm;

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde_json::{Value as Json, json};

use crate::gpu::kernel::KernelFacts;
use crate::gpu::pci::{self, PciFacts};
use crate::system::root::Root;
use crate::values::sanitize_line;

/// Severity of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Level {
    /// No problem found.
    Ok,
    /// The node may work, but with limitations; or a fact is unknown.
    Warning,
    /// The GPU or the node does not work.
    Error,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Error => "ERROR",
        }
    }

    /// Colours `text` for a terminal (ECMA-48).
    pub(crate) fn coloured(self, text: &str) -> String {
        let colour = match self {
            Self::Ok => 32,
            Self::Warning => 33,
            Self::Error => 31,
        };
        format!("\x1b[{colour}m{text}\x1b[0m")
    }
}

/// Result of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable id. Checks of several objects of one kind (GPUs, attributes) share it.
    pub id: &'static str,
    /// Severity.
    pub level: Level,
    /// What was found, with details.
    pub finding: String,
    /// A command or a template attribute that fixes the problem.
    pub fix: Option<String>,
    /// Line of the checked file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
}

impl Check {
    /// Returns a check without a problem.
    pub fn ok(id: &'static str, finding: impl Into<String>) -> Self {
        Self {
            id,
            level: Level::Ok,
            finding: sanitize_line(&finding.into()),
            fix: None,
            line: None,
        }
    }

    /// Returns a check of this level with a fix.
    pub fn problem(
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

    /// Returns a WARNING.
    pub fn warning(id: &'static str, finding: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::problem(id, Level::Warning, finding, fix)
    }

    /// Returns an ERROR.
    pub fn error(id: &'static str, finding: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::problem(id, Level::Error, finding, fix)
    }

    /// Returns a WARNING for facts that are unknown for this reason.
    pub fn unknown(id: &'static str, why: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::warning(id, format!("unknown: {}", why.into()), fix)
    }

    /// Sets the line.
    #[must_use]
    pub fn at(self, line: usize) -> Self {
        Self { line: Some(line), ..self }
    }
}

/// The checks of one target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnosis {
    /// What was checked: `vm`, `host` or `template`.
    pub subject: &'static str,
    /// The root directory or the file.
    pub target: String,
    /// The checks, in the order in which problems should be fixed.
    pub checks: Vec<Check>,
}

impl Diagnosis {
    fn count(&self, level: Level) -> usize {
        self.checks.iter().filter(|check| check.level == level).count()
    }

    /// Returns whether a check has the level ERROR.
    pub fn has_error(&self) -> bool {
        self.count(Level::Error) > 0
    }

    /// Returns the JSON of `--json`.
    pub fn to_json(&self) -> Json {
        json!({
            "subject": self.subject,
            "target": self.target,
            "errors": self.count(Level::Error),
            "warnings": self.count(Level::Warning),
            "checks": self.checks,
        })
    }

    /// Writes the table.
    ///
    /// # Errors
    /// Returns the error of writing to `out`.
    pub fn write(&self, out: &mut dyn Write, coloured: bool) -> io::Result<()> {
        let width = self.checks.iter().map(|check| check.id.len()).max().unwrap_or(0);
        for Check { id, level, finding, fix, line } in &self.checks {
            let level_column = format!("{:<7}", level.name());
            let level_column = if coloured { level.coloured(&level_column) } else { level_column };
            let line = line.map_or(String::new(), |line| format!("line {line}: "));
            writeln!(out, "{level_column}  {id:<width$}  {line}{finding}")?;
            if let Some(fix) = fix {
                writeln!(out, "         {:width$}  fix: {fix}", "")?;
            }
        }
        let count = |level, noun: &str| match self.count(level) {
            1 => format!("1 {noun}"),
            number => format!("{number} {noun}s"),
        };
        writeln!(
            out,
            "{} {}: {}, {}",
            self.subject,
            self.target,
            count(Level::Error, "error"),
            count(Level::Warning, "warning")
        )
    }
}

/// Reads the PCI facts of the machine at `root`, whose sysfs is at `sysfs`.
fn read_pci(root: &Root, sysfs: &str) -> PciFacts {
    let unreadable = |why: String| PciFacts { unreadable: vec![why], ..PciFacts::default() };
    let dir = match root.resolve(sysfs) {
        Ok(dir) => dir,
        Err(error) => return unreadable(format!("{sysfs}: {error}")),
    };
    match root.find_escaping_link(&dir.join("bus/pci/devices")) {
        Some(link) => {
            unreadable(format!("{}: a link out of {}", link.display(), root.path().display()))
        }
        None => pci::read_facts(&dir, || {
            KernelFacts::read(Path::new(sysfs), |path| root.at(Path::new("/").join(path)))
        }),
    }
}

#[cfg(test)]
pub(crate) mod test_support {
    use super::{Check, Level};

    /// Level, id, finding and fix of a check that is not OK.
    pub(crate) type Problem = (Level, &'static str, String, String);

    pub(crate) fn problems(checks: Vec<Check>) -> Vec<Problem> {
        let problems = checks.into_iter().filter(|check| check.level != Level::Ok);
        problems
            .map(|check| (check.level, check.id, check.finding, check.fix.unwrap_or_default()))
            .collect()
    }

    #[track_caller]
    pub(crate) fn assert_only(problems: &[Problem], level: Level, id: &str, text: &str, fix: &str) {
        assert_eq!(problems.len(), 1, "{problems:#?}");
        assert_eq!((problems[0].0, problems[0].1), (level, id), "{problems:#?}");
        assert!(problems[0].2.contains(text) && problems[0].3.contains(fix), "{problems:#?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_level_id_line_and_fix() {
        let checks = vec![Check::ok("a", "fine"), Check::error("bcd", "not\nfine", "fix it").at(7)];
        let diagnosis = Diagnosis { subject: "template", target: "file".into(), checks };
        let mut text = Vec::new();
        diagnosis.write(&mut text, false).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "OK       a    fine\nERROR    bcd  line 7: not fine\n              fix: fix it\n\
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
    fn kernel_facts_are_read_below_the_root() {
        let dir = std::env::temp_dir()
            .join(format!("supernode-agent-kernel-of-root-{}", std::process::id()));
        let gpu = dir.join("sys/bus/pci/devices/0000:01:00.0");
        std::fs::create_dir_all(&gpu).unwrap();
        for (name, value) in [("vendor", "0x10de"), ("class", "0x030200"), ("device", "0x20f1")] {
            std::fs::write(gpu.join(name), value).unwrap();
        }
        std::os::unix::fs::symlink("/proc", dir.join("proc")).unwrap();
        let facts = read_pci(&Root::new(&dir), "/sys");
        std::fs::remove_dir_all(dir).unwrap();
        assert_eq!(
            (facts.gpus().count(), facts.kernel),
            (1, KernelFacts::default()),
            "{:?}",
            facts.unreadable
        );
    }
}
