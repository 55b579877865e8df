//! The command line: what is asked, and how the answers look.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use one_context::Context;
use one_context::source::read_context;
use serde_json::{Value as Json, json};

use crate::boot::{self, BootError, EXIT_CONFIG, EXIT_RETRY};
use crate::config::variables::{Kind, VARIABLES, Variable};
use crate::config::{Config, Remarks};
use crate::docker::engine::{Engine, EngineFacts};
use crate::docker::runtime::{GpuAccess, choose_access, configure_daemon_json, find_program};
use crate::gpu::nvml;
use crate::gpu::pci::PciFacts;
use crate::gpu::verdict::Verdict;
use crate::gpu::{Detection, detect_gpus};
use crate::plan::{self, ContainerSpec, Machine};
use crate::settings::{DEFAULT_PATH, Settings};
use crate::superlink::static_superlink;

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
    /// Ask NVML and print its answer: the child process of the agent
    #[command(name = crate::gpu::probe::SUBCOMMAND, hide = true)]
    NvmlProbe {
        /// The library
        library: String,
    },
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Format {
    /// For a terminal
    #[default]
    Table,
    /// For a document
    Markdown,
    /// The USER_INPUTS of an OpenNebula template
    UserInputs,
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
            error => vec![boot::error_chain(error)],
        };
        Self { code: error.exit_code(), lines }
    }
}

/// Does what the command line says and answers with the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let wants_json = matches!(cli.command, Command::Plan { json: true } | Command::Gpu { json: true });
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
            nvml::answer_on_stdout(library)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Variables { json, format } => {
            if *json {
                writeln!(out, "{:#}", variables_json())?;
            } else {
                write!(out, "{}", variables_text(*format))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let settings = Settings::load(cli.settings.as_deref())
        .map_err(|error| Failure::new(EXIT_CONFIG, boot::error_chain(&error)))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(EXIT_RETRY, format!("cannot start: {error}")))?;
    let code = match cli.command {
        Command::Run => runtime.block_on(boot::run(settings)),
        Command::ConfigureRuntime => configure_runtime(&settings, out)?,
        Command::Gpu { json } => {
            let (config, remarks) = configured(&settings)?;
            let detection = runtime.block_on(detect_gpus(&config, &settings.gpu, Duration::ZERO));
            let document = json!({"gpu": gpu_json(&detection), "warnings": remarks.unknown});
            if json {
                writeln!(out, "{document:#}")?
            } else {
                write_gpu(out, &detection)?
            }
            ExitCode::SUCCESS
        }
        Command::Plan { json } => {
            let (config, remarks) = configured(&settings)?;
            let plan = runtime.block_on(Plan::make(config, remarks, &settings));
            if json {
                writeln!(out, "{:#}", plan.to_json())?
            } else {
                plan.write(out)?
            }
            ExitCode::SUCCESS
        }
        Command::NvmlProbe { .. } | Command::Variables { .. } => ExitCode::SUCCESS,
    };
    // A probe that hangs in the driver must not keep the agent from ending.
    runtime.shutdown_background();
    Ok(code)
}

fn configured(settings: &Settings) -> Result<(Config, Remarks), BootError> {
    let context: Context = read_context(&settings.context.dir)?;
    Ok(boot::configure(&context, settings)?)
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
        writeln!(out, "{file}: the nvidia runtime was added; Docker takes it up at its next start or reload")?;
    } else {
        writeln!(out, "{file}: the nvidia runtime is there, nothing was changed")?;
    }
    if find_program(&docker.runtime_path).is_none() {
        writeln!(out, "{} is not installed: Docker will not be able to use it", docker.runtime_path)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Everything up to the launch, and what could not be learned on the way.
struct Plan {
    config: Config,
    remarks: Remarks,
    detection: Detection,
    container: ContainerSpec,
    /// What `run` would stop at, or do otherwise, as far as can be told.
    notes: Vec<String>,
}

impl Plan {
    async fn make(config: Config, remarks: Remarks, settings: &Settings) -> Self {
        let mut notes = Vec::new();
        let (detection, engine) =
            tokio::join!(detect_gpus(&config, &settings.gpu, Duration::ZERO), look_at_engine(&settings.docker.socket));
        let image = plan::wanted_image(&config);
        let mut machine = boot::this_machine();
        let mut facts = None;
        match engine {
            Ok((engine, engine_facts)) => {
                machine = with_image(&engine, &image, machine, &mut notes).await;
                facts = Some(engine_facts);
            }
            Err(why) => notes.push(format!(
                "{why}: it is not known whether it has the image {image}, the nvidia runtime and CDI devices"
            )),
        }
        let superlink = static_superlink(&config);
        if let Err(error) = &superlink {
            notes.push(format!("the node would not start: {error}"));
        }
        let access = choose_access(settings.gpu.injection, detection.verdict.devices(), facts.as_ref());
        let needs_runtime = matches!(detection.verdict, Verdict::Gpu { .. }) && access == GpuAccess::Runtime;
        let registered = facts.as_ref().is_some_and(|facts| facts.runtimes.contains_key("nvidia"));
        if needs_runtime && !registered && find_program(&settings.docker.runtime_path).is_none() {
            notes.push(format!(
                "{} is not installed: the node would fall back to the CPU (runtime-missing)",
                settings.docker.runtime_path
            ));
        }
        let container = plan::plan_container(
            &config,
            &detection.verdict,
            &access,
            superlink.as_ref().ok(),
            &image,
            &machine,
            settings,
        );
        let container = container.redacted(config.node_config.as_ref());
        Self { config, remarks, detection, container, notes }
    }

    fn to_json(&self) -> Json {
        json!({
            "config": self.config.resolved(),
            "warnings": self.remarks.unknown,
            "idle": self.remarks.idle,
            "gpu": gpu_json(&self.detection),
            "container": self.container,
            "notes": self.notes,
        })
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "Configuration")?;
        for (name, value) in self.config.resolved() {
            match value {
                Json::Null => continue,
                Json::String(text) => writeln!(out, "  {name:<27} {text}")?,
                Json::Bool(switch) => writeln!(out, "  {name:<27} {}", if switch { "YES" } else { "NO" })?,
                other => writeln!(out, "  {name:<27} {other}")?,
            }
        }
        write_list(out, "Warnings", &self.remarks.unknown)?;
        write_list(out, "Idle settings", &self.remarks.idle)?;
        write_gpu(out, &self.detection)?;
        let container = &self.container;
        writeln!(out, "Container")?;
        writeln!(out, "  name     {}", container.name)?;
        writeln!(out, "  image    {}", container.image)?;
        writeln!(out, "  runtime  {}", container.runtime)?;
        for device in &container.cdi_devices {
            writeln!(out, "  device   {device}")?;
        }
        writeln!(out, "  args     {}", container.args.join(" "))?;
        for (name, value) in &container.env {
            writeln!(out, "  env      {name}={value}")?;
        }
        for mount in &container.mounts {
            writeln!(out, "  mount    {} at {} (read-only)", mount.source, mount.target)?;
        }
        write_list(out, "Notes", &self.notes)
    }
}

async fn look_at_engine(socket: &Path) -> Result<(Engine, EngineFacts), String> {
    const PATIENCE: Duration = Duration::from_secs(3);
    let look = async {
        let engine = Engine::connect(socket).await?;
        let facts = engine.facts().await?;
        Ok::<_, crate::docker::engine::EngineError>((engine, facts))
    };
    match tokio::time::timeout(PATIENCE, look).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!("the Docker engine at {} gave no answer within 3 s", socket.display())),
    }
}

async fn with_image(
    engine: &Engine,
    image: &crate::config::values::ImageRef,
    machine: Machine,
    notes: &mut Vec<String>,
) -> Machine {
    match engine.has_image(image).await {
        Ok(true) => {
            Machine { image_python_path: engine.image_variable(image, "PYTHONPATH").await.ok().flatten(), ..machine }
        }
        Ok(false) => {
            notes.push(format!("the image {image} is not on this machine: it would be pulled"));
            machine
        }
        Err(error) => {
            notes.push(error.to_string());
            machine
        }
    }
}

fn gpu_json(detection: &Detection) -> Json {
    let PciFacts { devices: _, module_version, module_pending, unreadable } = &detection.facts;
    json!({
        "verdict": detection.verdict.to_json(),
        "facts": {
            "pci": detection.facts.gpus().collect::<Vec<_>>(),
            "module_version": module_version,
            "module_pending": module_pending,
            "unreadable": unreadable,
            "probe": detection.outcome.as_ref().map(|outcome| outcome.summary()),
        },
    })
}

fn write_gpu(out: &mut dyn Write, detection: &Detection) -> io::Result<()> {
    let facts = &detection.facts;
    writeln!(out, "Facts")?;
    if facts.gpus().next().is_none() {
        writeln!(out, "  PCI      no NVIDIA GPU (vendor 10de, class 03xx)")?;
    }
    for gpu in facts.gpus() {
        let driver = gpu.driver.as_deref().unwrap_or("no driver");
        writeln!(out, "  PCI      {} ({}), {driver}", gpu.address, gpu.ids())?;
    }
    let module = facts.module_version.as_deref().unwrap_or("not loaded");
    writeln!(out, "  module   nvidia {module}")?;
    for failure in &facts.unreadable {
        writeln!(out, "  not read {failure}")?;
    }
    match &detection.outcome {
        Some(outcome) => writeln!(out, "  NVML     {}", outcome.summary())?,
        None => writeln!(out, "  NVML     not asked")?,
    }
    writeln!(out, "Verdict")?;
    match &detection.verdict {
        Verdict::Gpu { devices, missing } => {
            for device in devices {
                let name = device.name.as_deref().unwrap_or("GPU");
                let memory = device.memory_mib.map_or("unknown".into(), |mib| format!("{mib} MiB"));
                writeln!(
                    out,
                    "  cuda     {}: {name}, {memory}, {}, {}",
                    device.index, device.uuid, device.pci_address
                )?;
            }
            for missing in missing {
                writeln!(out, "  missing  {missing}")?;
            }
        }
        Verdict::Cpu { finding: None } => writeln!(out, "  cpu      FL_GPU_ENABLED is not YES")?,
        Verdict::Cpu { finding: Some(finding) } => {
            writeln!(out, "  cpu      {}: {}", finding.reason, finding.summary)?;
            writeln!(out, "  fix      {}", finding.fix())?;
        }
    }
    Ok(())
}

fn write_list(out: &mut dyn Write, title: &str, lines: &[String]) -> io::Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    writeln!(out, "{title}")?;
    lines.iter().try_for_each(|line| writeln!(out, "  {line}"))
}

fn variables_json() -> Json {
    VARIABLES
        .iter()
        .map(|variable| {
            json!({
                "name": variable.name,
                "names": variable.names().collect::<Vec<_>>(),
                "values": variable.kind.values(),
                "unset": variable.unset,
                "goes_to": variable.goes_to,
                "about": variable.about,
            })
        })
        .collect()
}

fn variables_text(format: Format) -> String {
    let rows = VARIABLES.iter();
    match format {
        Format::Table => {
            rows.map(|variable| {
                let Variable { name, about, unset, goes_to, .. } = variable;
                let also = match variable.also {
                    [] => String::new(),
                    others => format!(" (also {})", others.join(", ")),
                };
                format!(
                    "{name}{also}\n    {about}.\n    values: {}\n    unset:  {unset}\n    goes to {goes_to}\n",
                    variable.kind.values()
                )
            })
            .collect::<String>()
                + "Each is also read with ONEAPP_ before its name. DEFAULT SETTINGS: "
                + DEFAULT_PATH
                + "\n"
        }
        Format::Markdown => {
            let mut text = String::from("| variable | values | unset means | goes to |\n| --- | --- | --- | --- |\n");
            for variable in rows {
                let names: Vec<String> = std::iter::once(variable.name)
                    .chain(variable.also.iter().copied())
                    .map(|n| format!("`{n}`"))
                    .collect();
                let cells =
                    [&variable.kind.values(), variable.unset, variable.goes_to].map(|cell| cell.replace('|', "\\|"));
                text.push_str(&format!("| {} | {} |\n", names.join(", "), cells.join(" | ")));
            }
            text
        }
        Format::UserInputs => user_inputs(),
    }
}

/// `VAR="O|type|description|parameters|default"`: three fields or five, as OpenNebula reads them.
fn user_inputs() -> String {
    let input = |variable: &Variable| {
        let about = variable.about;
        match variable.kind {
            Kind::YesNo => {
                let default = if variable.unset == "NO" { "NO" } else { "" };
                // A switch whose unset state means something of its own must be able to stay unset.
                if default.is_empty() {
                    format!("O|list|{about}|,YES,NO|")
                } else {
                    format!("O|boolean|{about}| |{default}")
                }
            }
            Kind::Choice(words) => {
                let default = words.iter().find(|word| **word == variable.unset).unwrap_or(&words[0]);
                format!("O|list|{about}|{}|{default}", words.join(","))
            }
            Kind::Count(_) => {
                let default = variable.unset.split(' ').next().unwrap_or_default();
                format!("O|number|{about}| |{default}")
            }
            Kind::Fraction => format!("O|number-float|{about}"),
            Kind::Certificate => format!("O|text64|{about}"),
            _ => format!("O|text|{about}"),
        }
    };
    let lines: Vec<String> =
        VARIABLES.iter().map(|variable| format!("  {}=\"{}\"", variable.name, input(variable))).collect();
    let order: Vec<&str> = VARIABLES.iter().map(|variable| variable.name).collect();
    format!("USER_INPUTS=[\n{} ]\nINPUTS_ORDER=\"{}\"\n", lines.join(",\n"), order.join(","))
}
