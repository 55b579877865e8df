//! The command line: what is asked, and which exit code answers.

mod check;
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
use crate::daemon::{self, BootError, EXIT_CONFIG, EXIT_RETRY};
use crate::docker::nvidia_runtime::configure_daemon_json;
use crate::gpu::{detect_gpus, monitor_child, probe_child};
use crate::logging::error_chain;
use crate::system::os_release::Distribution;
use crate::system::programs::find_program;
use plan::{Plan, gpu_json, write_gpu};
use status::{Status, Terminal};
use variables::Format;

/// Turns an OpenNebula VM into a Flower SuperNode, on its GPU or, with a warning, on the CPU.
#[derive(Debug, Parser)]
#[command(name = "supernode-agent", version, arg_required_else_help = true)]
pub struct Cli {
    /// Settings of this machine, instead of /etc/supernode-agent/agent.toml
    #[arg(long, global = true, value_name = "FILE")]
    settings: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node: the daemon that systemd starts
    Run,
    /// Show what would be done: configuration, facts, verdict, container; touches nothing
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
    /// Find out what is wrong and how to mend it: each check is OK, WARNING or ERROR, with a fix
    Check {
        #[command(subcommand)]
        subject: check::Subject,
    },
    /// Show what runs, on which device, since when and why
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Exit 0 only while the container runs, and print nothing then
        #[arg(long, conflicts_with_all = ["json", "watch"])]
        ready: bool,
        /// Show it until Ctrl-C: on a terminal in place, elsewhere each change
        #[arg(long)]
        watch: bool,
    },
    /// Put the nvidia runtime into Docker's daemon.json, and nothing else
    ConfigureRuntime,
    /// Show the context variables
    Variables {
        /// Print JSON
        #[arg(long, conflicts_with = "format")]
        json: bool,
        /// How the table looks
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Print a shell's completion script; packaging/build-deb.sh puts it into the package
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Ask NVML and print its answer: the child process of the agent
    #[command(name = crate::gpu::probe::SUBCOMMAND, hide = true)]
    NvmlProbe {
        /// The library
        library: String,
    },
    /// Watch GPUs and print what happens to them: the other child process of the agent
    #[command(name = crate::supervisor::gpu_monitor::SUBCOMMAND, hide = true)]
    NvmlWatch {
        /// Tell their figures as well
        #[arg(long)]
        readings: bool,
        /// The library
        library: String,
        /// The UUIDs of GPUs and MIG instances
        #[arg(required = true)]
        devices: Vec<String>,
    },
}

/// Why a command did not do its work: the exit code and the lines for stderr.
struct Failure {
    code: u8,
    lines: Vec<String>,
}

impl Failure {
    fn new(code: u8, line: impl ToString) -> Self {
        Self { code, lines: vec![line.to_string()] }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            // Who listened has heard enough.
            return Self { code: 0, lines: Vec::new() };
        }
        Self::new(EXIT_RETRY, format!("cannot write the answer: {error}"))
    }
}

impl From<BootError> for Failure {
    fn from(error: BootError) -> Self {
        let lines = match &error {
            BootError::Config(errors) => errors.0.clone(),
            error => vec![error_chain(error)],
        };
        Self { code: error.exit_code(), lines }
    }
}

/// The command line as people see it, for the shell completions: without what the agent calls
/// itself for.
pub fn visible_command() -> clap::Command {
    let whole = Cli::command();
    let visible: Vec<_> =
        whole.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect();
    clap::Command::new("supernode-agent").args(whole.get_arguments().cloned()).subcommands(visible)
}

/// Does what the command line says and answers with the exit code.
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
    match &cli.command {
        Command::NvmlProbe { library } => {
            probe_child::run_probe(library)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::NvmlWatch { readings, library, devices } => {
            monitor_child::run_monitor(library, devices, *readings)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Variables { json, format } => {
            if *json {
                writeln!(out, "{:#}", variables::as_json())?;
            } else {
                write!(out, "{}", variables::as_text(*format))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut visible_command(), "supernode-agent", &mut {
                out
            });
            return Ok(ExitCode::SUCCESS);
        }
        Command::Check { subject } => return check::check(subject, cli.settings.as_deref(), out),
        _ => {}
    }
    let settings = Settings::load(cli.settings.as_deref())
        .map_err(|error| Failure::new(EXIT_CONFIG, error_chain(&error)))?;
    let runtime = async_runtime()?;
    let code = match cli.command {
        Command::Run => runtime.block_on(daemon::run(settings, cli.settings.as_deref())),
        Command::Status { json, watch: true, .. } => {
            runtime.block_on(status::watch(&settings, json, out))?;
            ExitCode::SUCCESS
        }
        Command::Status { json, ready, .. } => {
            let status = runtime.block_on(Status::look(&settings));
            match (ready, json) {
                (true, _) if status.is_ready() => {}
                (true, _) => return Err(Failure::new(EXIT_RETRY, status.headline())),
                (false, true) => writeln!(out, "{:#}", status.to_json())?,
                (false, false) => {
                    write!(out, "{}", status.to_text(Terminal::of_stdout().as_ref()))?
                }
            }
            ExitCode::SUCCESS
        }
        Command::ConfigureRuntime => configure_runtime(&settings, out)?,
        Command::Gpu { json } => {
            let (config, remarks) = configured(&settings)?;
            let detection = runtime.block_on(detect_gpus(&config, &settings, Duration::ZERO));
            let distribution = Distribution::read(&settings.machine.root);
            let document = json!({"gpu": gpu_json(&detection, distribution), "warnings": remarks.warnings().collect::<Vec<_>>()});
            if json {
                writeln!(out, "{document:#}")?
            } else {
                write_gpu(out, &detection, distribution)?
            }
            ExitCode::SUCCESS
        }
        Command::Plan { json } => {
            let context = read_context(&settings.context.dir).map_err(BootError::from)?;
            let (config, remarks) =
                daemon::configure(&context, &settings).map_err(BootError::from)?;
            let plan = runtime.block_on(Plan::make(config, remarks, &context, &settings));
            if json {
                writeln!(out, "{:#}", plan.to_json())?
            } else {
                plan.write(out)?
            }
            ExitCode::SUCCESS
        }
        Command::Check { .. }
        | Command::Completions { .. }
        | Command::NvmlProbe { .. }
        | Command::NvmlWatch { .. }
        | Command::Variables { .. } => ExitCode::SUCCESS,
    };
    // A probe that hangs in the driver must not keep the agent from ending.
    runtime.shutdown_background();
    Ok(code)
}

fn async_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(EXIT_RETRY, format!("cannot start: {error}")))
}

fn configured(settings: &Settings) -> Result<(Config, Diagnostics), BootError> {
    let context: Context = read_context(&settings.context.dir)?;
    Ok(daemon::configure(&context, settings)?)
}

fn configure_runtime(settings: &Settings, out: &mut dyn Write) -> Result<ExitCode, Failure> {
    let (config, _) = configured(settings)?;
    if !config.gpu_enabled {
        writeln!(out, "FL_GPU_ENABLED is not YES: nothing to do")?;
        return Ok(ExitCode::SUCCESS);
    }
    let docker = &settings.docker;
    let written = configure_daemon_json(&docker.daemon_json, &docker.runtime_path)
        .map_err(|error| Failure::new(EXIT_RETRY, error))?;
    let file = docker.daemon_json.display();
    if written {
        writeln!(
            out,
            "{file}: the nvidia runtime was added; Docker takes it up at its next start or reload"
        )?;
    } else {
        writeln!(out, "{file}: the nvidia runtime is there, nothing was changed")?;
    }
    if find_program(&docker.runtime_path).is_none() {
        writeln!(
            out,
            "{} is not installed: Docker will not be able to use it",
            docker.runtime_path
        )?;
    }
    Ok(ExitCode::SUCCESS)
}
