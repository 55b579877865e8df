//! `check vm | host | template FILE`: prints the checks as a table or as JSON.

use std::io::{IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::failure::{Failure, block_on};
use crate::check::{Check, Diagnosis, host, template, vm};
use crate::config::settings::{DEFAULT_PATH, Settings};
use crate::logging::error_chain;
use crate::system::os_release::Distribution;
use crate::system::root::Root;

/// Usage error, as in clap.
const EXIT_USAGE: u8 = 2;

#[derive(Debug, Subcommand)]
pub(super) enum Subject {
    /// Diagnose this VM: GPU, driver, Docker, image, template
    Vm(TargetArgs),
    /// Diagnose this KVM host: IOMMU, VFIO, the GPUs that OpenNebula sees
    Host(TargetArgs),
    /// Diagnose a template: what GPU passthrough and the node require
    Template {
        /// VM template in OpenNebula's text format, or service template in JSON
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub(super) struct TargetArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Check the machine whose root directory is DIR; nothing outside of it is read
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

impl TargetArgs {
    fn root(&self) -> Result<Root, Failure> {
        let root = &self.root;
        // The absolute path, so that nothing depends on the working directory.
        let real = root.canonicalize().ok().filter(|real| real.is_dir());
        real.map(Root::new).ok_or_else(|| {
            Failure::new(EXIT_USAGE, format!("--root {}: no such directory", root.display()))
        })
    }
}

/// Runs the checks and returns the exit code: 1 if a check has the level ERROR.
pub(super) fn check(
    subject: &Subject,
    settings: Option<&Path>,
    out: &mut dyn Write,
) -> Result<ExitCode, Failure> {
    let (diagnosis, json) = match subject {
        Subject::Vm(target) => (check_vm(&target.root()?, settings)?, target.json),
        Subject::Host(target) => {
            let root = target.root()?;
            let checks = host::judge(&host::read(&root), distribution(&root));
            (
                Diagnosis { subject: "host", target: root.path().display().to_string(), checks },
                target.json,
            )
        }
        Subject::Template { file, json } => (check_template(file), *json),
    };
    if json {
        writeln!(out, "{:#}", diagnosis.to_json())?;
    } else {
        let coloured = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        diagnosis.write(out, coloured)?;
    }
    Ok(ExitCode::from(u8::from(diagnosis.has_error())))
}

fn distribution(root: &Root) -> Distribution {
    Distribution::read_with(|file| root.read(&format!("/{file}")).ok().flatten())
}

fn check_vm(root: &Root, settings: Option<&Path>) -> Result<Diagnosis, Failure> {
    let root_file =
        Some(root.at(DEFAULT_PATH)).filter(|path| !root.is_running_system() && path.exists());
    let file = settings.or(root_file.as_deref());
    let settings = match file {
        // The default path refers to this machine, not to the root.
        None if !root.is_running_system() => Ok(Settings::default()),
        file => Settings::load(file).map_err(|error| error_chain(&error)),
    };
    let facts = block_on(vm::read(root, settings))?;
    let checks = vm::judge(&facts, distribution(root));
    Ok(Diagnosis { subject: "vm", target: root.path().display().to_string(), checks })
}

fn check_template(file: &Path) -> Diagnosis {
    let checks = match std::fs::read(file) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => template::judge(&text),
            Err(error) => vec![Check::error("file", error.to_string(), "save it as UTF-8")],
        },
        Err(error) => {
            let fix = "name a readable file; onetemplate show ID prints a template below \
                       TEMPLATE CONTENTS";
            vec![Check::error("file", format!("cannot read the file: {error}"), fix)]
        }
    };
    Diagnosis { subject: "template", target: file.display().to_string(), checks }
}
