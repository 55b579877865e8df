//! The command line: parses the arguments, runs the subcommand, maps errors to exit codes.

mod check;
mod failure;
mod gpu;
mod output;
mod plan;
mod status;
pub mod variables;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use one_context::Context;
use one_context::source::read_context;
use serde_json::json;

use crate::config::settings::Settings;
use crate::config::{Config, Diagnostics};
use crate::daemon::{self, DaemonError, EXIT_CONFIG, EXIT_RETRY};
use crate::docker::nvidia_runtime::configure_daemon_json;
use crate::gpu::{detect_gpus, monitor_child, probe_child};
use crate::logging::error_chain;
use crate::system::os_release::Distribution;
use crate::system::programs::find_program;
use crate::values::GpuUuid;
use failure::{Failure, block_on};
use gpu::{gpu_json, write_gpu};
use plan::Plan;
use status::{Status, Terminal};
use variables::Format;

const EXIT_CODES: &str = "\
Exit codes:
   0  success
   1  a failure that a retry may fix, or an ERROR of check
   2  invalid arguments
  75  handed over: the agent has exited, the container keeps running
  78  invalid configuration, or FL_GPU_REQUIRED=YES and no usable GPU";

/// Turns an OpenNebula VM into a Flower SuperNode, on its GPU or, with a WARNING, on the CPU.
#[derive(Debug, Parser)]
#[command(
    name = "supernode-agent",
    version,
    arg_required_else_help = true,
    after_help = EXIT_CODES
)]
pub struct Cli {
    /// Settings file of this VM, instead of /etc/supernode-agent/agent.toml
    #[arg(long, global = true, value_name = "FILE")]
    settings: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon (started by systemd)
    Run,
    /// Show what `run` would do, without changing anything
    Plan {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the GPU facts and the verdict
    Gpu {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Diagnose a VM, a KVM host or a template: OK, WARNING or ERROR for each check, with a fix
    Check {
        #[command(subcommand)]
        subject: check::Subject,
    },
    /// Show the state of the container, its device and the agent
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Exit with 0 if the container runs and print nothing, else exit with 1
        #[arg(long, conflicts_with_all = ["json", "watch"])]
        ready: bool,
        /// Refresh until interrupted; if the output is not a terminal, print each change
        #[arg(long)]
        watch: bool,
    },
    /// Add the nvidia runtime to Docker's daemon.json
    ConfigureRuntime,
    /// List the context variables
    Variables {
        /// Print JSON
        #[arg(long, conflicts_with = "format")]
        json: bool,
        /// Format of the table
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Print the completion script of a shell (for packaging/build-deb.sh)
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Query NVML once and print the answer (child process of the agent)
    #[command(name = crate::gpu::probe::SUBCOMMAND, hide = true)]
    NvmlProbe {
        /// The NVML library
        library: String,
    },
    /// Monitor GPUs and print their events (child process of the agent)
    #[command(name = crate::supervisor::gpu_monitor::SUBCOMMAND, hide = true)]
    NvmlWatch {
        /// Print readings as well
        #[arg(long)]
        readings: bool,
        /// The NVML library
        library: String,
        /// UUIDs of GPUs and MIG instances
        #[arg(required = true, value_parser = |text: &str| GpuUuid::parse(text))]
        devices: Vec<GpuUuid>,
    },
}

/// Returns the command line without hidden subcommands, for shell completions.
pub fn visible_command() -> clap::Command {
    let whole = Cli::command();
    let visible: Vec<_> =
        whole.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect();
    clap::Command::new("supernode-agent").args(whole.get_arguments().cloned()).subcommands(visible)
}

/// Runs the command line and returns the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let wants_json =
        matches!(cli.command, Command::Plan { json: true } | Command::Gpu { json: true });
    let mut out = io::stdout().lock();
    match dispatch(cli, &mut out) {
        Ok(code) => code,
        Err(failure) => {
            if wants_json {
                let _ = writeln!(out, "{:#}", json!({ "errors": failure.lines }));
            }
            let mut err = io::stderr().lock();
            for line in &failure.lines {
                let _ = writeln!(err, "supernode-agent: {line}");
            }
            ExitCode::from(failure.code)
        }
    }
}

fn dispatch(cli: Cli, out: &mut dyn Write) -> Result<ExitCode, Failure> {
    let Cli { settings: settings_file, command } = cli;
    let load_settings = || {
        Settings::load(settings_file.as_deref())
            .map_err(|error| Failure::new(EXIT_CONFIG, error_chain(&error)))
    };
    match command {
        Command::Run => {
            return block_on(daemon::run(load_settings()?, settings_file.as_deref()));
        }
        Command::Check { subject } => {
            return check::check(&subject, settings_file.as_deref(), out);
        }
        Command::ConfigureRuntime => configure_runtime(&load_settings()?, out)?,
        Command::Gpu { json } => show_gpu(&load_settings()?, json, out)?,
        Command::Plan { json } => show_plan(&load_settings()?, json, out)?,
        Command::Status { json, watch: true, .. } => {
            block_on(status::watch(&load_settings()?, json, out))??;
        }
        Command::Status { json, ready, .. } => show_status(&load_settings()?, json, ready, out)?,
        Command::Variables { json: true, .. } => writeln!(out, "{:#}", variables::as_json())?,
        Command::Variables { format, .. } => write!(out, "{}", variables::as_text(format))?,
        Command::Completions { shell } => {
            let mut out = out;
            clap_complete::generate(shell, &mut visible_command(), "supernode-agent", &mut out);
        }
        Command::NvmlProbe { library } => probe_child::run_probe(&library)?,
        Command::NvmlWatch { readings, library, devices } => {
            monitor_child::run_monitor(&library, &devices, readings)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show_status(
    settings: &Settings,
    json: bool,
    ready: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let status = block_on(Status::read(settings))?;
    match (ready, json) {
        (true, _) if status.is_ready() => {}
        (true, _) => return Err(Failure::new(EXIT_RETRY, status.headline())),
        (false, true) => writeln!(out, "{:#}", status.to_json())?,
        (false, false) => write!(out, "{}", status.to_text(Terminal::of_stdout().as_ref()))?,
    }
    Ok(())
}

fn show_gpu(settings: &Settings, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let (_, config, diagnostics) = load_config(settings)?;
    let detection = block_on(detect_gpus(&config, settings, Duration::ZERO))?;
    let distribution = Distribution::read(&settings.system.root);
    if json {
        let document = json!({
            "gpu": gpu_json(&detection, distribution),
            "warnings": diagnostics.warnings().collect::<Vec<_>>(),
        });
        writeln!(out, "{document:#}")?;
    } else {
        write_gpu(out, &detection, distribution)?;
    }
    Ok(())
}

fn show_plan(settings: &Settings, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let (context, config, diagnostics) = load_config(settings)?;
    let plan = block_on(Plan::new(config, diagnostics, &context, settings))??;
    if json {
        writeln!(out, "{:#}", plan.to_json())?;
    } else {
        plan.write(out)?;
    }
    Ok(())
}

fn load_config(settings: &Settings) -> Result<(Context, Config, Diagnostics), DaemonError> {
    let context = read_context(&settings.context.dir)?;
    let (config, diagnostics) = Config::read(&context, &settings.container.prebaked_dir)?;
    Ok((context, config, diagnostics))
}

fn configure_runtime(settings: &Settings, out: &mut dyn Write) -> Result<(), Failure> {
    let (_, config, _) = load_config(settings)?;
    if !config.gpu.enabled {
        writeln!(out, "FL_GPU_ENABLED is not YES: nothing to do")?;
        return Ok(());
    }
    let docker = &settings.docker;
    let written = configure_daemon_json(&docker.daemon_json, &docker.runtime_path)
        .map_err(|error| Failure::new(EXIT_RETRY, error_chain(&error)))?;
    let file = docker.daemon_json.display();
    if written {
        writeln!(
            out,
            "{file}: added the nvidia runtime; Docker uses it after its next start or reload"
        )?;
    } else {
        writeln!(out, "{file}: unchanged, the nvidia runtime exists")?;
    }
    if find_program(&docker.runtime_path).is_none() {
        writeln!(out, "{} is not installed: Docker cannot use the runtime", docker.runtime_path)?;
    }
    Ok(())
}
