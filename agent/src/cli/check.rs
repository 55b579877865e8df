//! `check vm | host | template FILE`: the facts of the machine or the file, judged, as a table or
//! as JSON.

use std::io::{IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::Failure;
use crate::check::{Check, Diagnosis, host, template, vm};
use crate::config::settings::{DEFAULT_PATH, Settings};
use crate::logging::error_chain;
use crate::system::facts::Root;
use crate::system::os_release::Distribution;

/// Wrong usage, as clap has it.
const EXIT_USAGE: u8 = 2;

#[derive(Debug, Subcommand)]
pub(super) enum Subject {
    /// This VM: GPU, driver, Docker, image, and what its template could give it
    Vm(Machine),
    /// This KVM host: IOMMU, vfio, and what OpenNebula is told of its GPUs
    Host(Machine),
    /// An OpenNebula template: what GPU passthrough and the node need
    Template {
        /// The VM template in OpenNebula's text form, or the service template in JSON
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub(super) struct Machine {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Check the machine whose root folder is DIR, and look at nothing outside of it
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

impl Machine {
    fn root(&self) -> Result<Root, Failure> {
        let folder = &self.root;
        // By its real path, so that nothing depends on the folder that somebody started the agent
        // in.
        let real = folder.canonicalize().ok().filter(|real| real.is_dir());
        real.map(Root::new).ok_or_else(|| {
            Failure::new(
                EXIT_USAGE,
                format!("--root {}: there is no such folder", folder.display()),
            )
        })
    }
}

/// Checks the subject and answers with the exit code: 1 where an ERROR was found.
pub(super) fn check(
    subject: &Subject,
    settings: Option<&Path>,
    out: &mut dyn Write,
) -> Result<ExitCode, Failure> {
    let (diagnosis, json) = match subject {
        Subject::Vm(machine) => (check_vm(&machine.root()?, settings)?, machine.json),
        Subject::Host(machine) => {
            let root = machine.root()?;
            let checks = host::judge(&host::read(&root), distribution(&root));
            (
                Diagnosis { subject: "host", place: root.path().display().to_string(), checks },
                machine.json,
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
    Distribution::told_by(|file| root.read(&format!("/{file}")).ok().flatten())
}

fn check_vm(root: &Root, settings: Option<&Path>) -> Result<Diagnosis, Failure> {
    let own = Some(root.at(DEFAULT_PATH)).filter(|path| !root.is_own() && path.exists());
    let file = settings.or(own.as_deref());
    let settings = match file {
        // The default path of this machine is not the root's.
        None if !root.is_own() => Ok(Settings::default()),
        file => Settings::load(file).map_err(|error| error_chain(&error)),
    };
    let runtime = super::async_runtime()?;
    let facts = runtime.block_on(vm::read(root, settings));
    // A probe that hangs in the driver must not keep the agent from ending.
    runtime.shutdown_background();
    let checks = vm::judge(&facts, distribution(root));
    Ok(Diagnosis { subject: "vm", place: root.path().display().to_string(), checks })
}

fn check_template(file: &Path) -> Diagnosis {
    let checks = match std::fs::read(file) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => template::judge(&text),
            Err(error) => vec![Check::error("file", error.to_string(), "save it as UTF-8")],
        },
        Err(error) => {
            let fix = "name a file that can be read; onetemplate show ID prints the template of OpenNebula below TEMPLATE CONTENTS";
            vec![Check::error("file", format!("it cannot be read: {error}"), fix)]
        }
    };
    Diagnosis { subject: "template", place: file.display().to_string(), checks }
}
