//! What `plan` and `gpu` say: everything up to the launch, and what could not be learned on the
//! way.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use one_context::Context;
use one_context::onegate::OneGateError;
use serde_json::{Value as Json, json};

use crate::config::settings::Settings;
use crate::config::{Config, Diagnostics};
use crate::container::image::{FrameworkImage, wanted_image};
use crate::container::plan::{self, ContainerInputs};
use crate::docker::client::{Client, EngineError, EngineInfo};
use crate::docker::daemon_json::RUNTIME_NAME;
use crate::docker::nvidia_runtime::{GpuInjection, choose_access};
use crate::docker::spec::ContainerSpec;
use crate::gpu::verdict::Verdict;
use crate::gpu::{Detection, detect_gpus};
use crate::logging::error_chain;
use crate::opennebula::partition::{self, PartitionStore};
use crate::opennebula::publisher::OneGateAccess;
use crate::opennebula::superlink::{Discovery, SuperLink, find_superlink};
use crate::supervisor::exporter::plan_exporter;
use crate::system::info::SystemInfo;
use crate::system::os_release::Distribution;
use crate::system::programs::find_program;
use crate::values::ImageRef;
use crate::values::sanitize_line;

/// Everything up to the launch, and what could not be learned on the way.
pub(super) struct Plan {
    config: Config,
    remarks: Diagnostics,
    detection: Detection,
    superlink: Option<SuperLink>,
    container: ContainerSpec,
    /// The DCGM exporter, or why there is none.
    exporter: Result<ContainerSpec, &'static str>,
    distribution: Distribution,
    /// What is taken although it is not written as it should be; what `run` would stop at, or do
    /// otherwise, as far as can be told.
    notes: Vec<String>,
}

impl Plan {
    pub(super) async fn make(
        config: Config,
        remarks: Diagnostics,
        context: &Context,
        settings: &Settings,
    ) -> Self {
        let mut notes = remarks.notes.clone();
        let (detection, engine, superlink) = tokio::join!(
            detect_gpus(&config, settings, Duration::ZERO),
            look_at_engine(&settings.docker.socket),
            look_for_superlink(&config, context, settings, &mut notes),
        );
        let wanted = wanted_image(&config);
        let system = SystemInfo::read();
        let mut python_path = None;
        let mut facts = None;
        match engine {
            Ok((engine, engine_facts)) => {
                python_path = python_path_in(&engine, &wanted, &mut notes).await;
                facts = Some(engine_facts);
            }
            Err(why) => notes.push(format!(
                "{why}: it is not known whether it has the image {wanted}, the nvidia runtime and CDI devices"
            )),
        }
        let access =
            choose_access(settings.gpu.injection, detection.verdict.devices(), facts.as_ref());
        let needs_runtime =
            matches!(detection.verdict, Verdict::Gpu { .. }) && access == GpuInjection::Runtime;
        let registered =
            facts.as_ref().is_some_and(|facts| facts.runtimes.contains_key(RUNTIME_NAME));
        if needs_runtime && !registered && find_program(&settings.docker.runtime_path).is_none() {
            notes.push(format!(
                "{} is not installed: the node would fall back to the CPU (runtime-missing)",
                settings.docker.runtime_path
            ));
        }
        let exporter =
            plan_exporter(&config, detection.verdict.devices(), &access, settings, &system);
        let container = plan::plan_container(&ContainerInputs {
            config: &config,
            settings,
            verdict: &detection.verdict,
            injection: &access,
            superlink: superlink.as_ref(),
            image: &FrameworkImage { reference: wanted, python_path },
            system: &system,
        });
        let container = container.redacted(config.node_config.as_ref());
        let distribution = Distribution::read(&settings.machine.root);
        Self { config, remarks, detection, superlink, container, exporter, distribution, notes }
    }

    pub(super) fn to_json(&self) -> Json {
        json!({
            "config": self.config.resolved(),
            "warnings": self.remarks.warnings().collect::<Vec<_>>(),
            "idle": self.remarks.idle,
            "gpu": gpu_json(&self.detection, self.distribution),
            "superlink": self.superlink.as_ref().map(superlink_json),
            "container": self.container,
            "dcgm": {"container": self.exporter.as_ref().ok(), "reason": self.exporter.as_ref().err()},
            "notes": self.notes,
        })
    }

    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "Configuration")?;
        for (name, value) in self.config.resolved() {
            match value {
                Json::Null => continue,
                Json::String(text) => writeln!(out, "  {name:<27} {text}")?,
                Json::Bool(switch) => {
                    writeln!(out, "  {name:<27} {}", if switch { "YES" } else { "NO" })?
                }
                other => writeln!(out, "  {name:<27} {other}")?,
            }
        }
        write_list(out, "Warnings", self.remarks.warnings())?;
        write_list(out, "Idle settings", &self.remarks.idle)?;
        write_gpu(out, &self.detection, self.distribution)?;
        if let Some(superlink) = &self.superlink {
            let vm =
                superlink.vm_id.map_or(String::new(), |id| format!(", VM {id} of the service"));
            let way = if superlink.ca.is_some() { "TLS" } else { "no TLS" };
            writeln!(out, "SuperLink")?;
            writeln!(out, "  address  {} ({way}{vm})", superlink.address)?;
        }
        let container = &self.container;
        writeln!(out, "Container")?;
        writeln!(out, "  name     {}", container.name)?;
        writeln!(out, "  image    {}", container.image)?;
        writeln!(out, "  runtime  {}", container.runtime)?;
        for device in &container.cdi_devices {
            writeln!(out, "  device   {device}")?;
        }
        // One with blanks in it is still one.
        let args =
            container.args.iter().map(|argument| match argument.contains(char::is_whitespace) {
                true => format!("{argument:?}"),
                false => argument.clone(),
            });
        writeln!(out, "  args     {}", args.collect::<Vec<_>>().join(" "))?;
        for (name, value) in &container.env {
            writeln!(out, "  env      {name}={value}")?;
        }
        for mount in &container.mounts {
            writeln!(out, "  mount    {} at {} (read-only)", mount.source, mount.target)?;
        }
        if let Ok(exporter) = &self.exporter {
            writeln!(out, "DCGM exporter")?;
            writeln!(out, "  name     {}", exporter.name)?;
            writeln!(out, "  image    {}", exporter.image)?;
            for port in &exporter.ports {
                writeln!(out, "  listens  {}", port.listen)?;
            }
        }
        write_list(out, "Notes", &self.notes)
    }
}

/// One look, which publishes nothing and keeps nothing.
async fn look_for_superlink(
    config: &Config,
    context: &Context,
    settings: &Settings,
    notes: &mut Vec<String>,
) -> Option<SuperLink> {
    let cloud = OneGateAccess::of(context, settings);
    let gate = cloud.as_ref().map(OneGateAccess::gate);
    let Discovery { mut superlink, service, warnings } =
        match find_superlink(gate, config, SystemTime::now()).await {
            Ok(found) => found,
            Err(error) => {
                let outcome = if error.is_final() {
                    "the node would not start"
                } else {
                    "the node would wait"
                };
                notes.push(format!("{outcome}: {}", sanitize_line(&error_chain(&error))));
                return None;
            }
        };
    notes.extend(warnings);
    if let (None, Ok(cloud)) = (&config.node_config, &cloud) {
        let store = PartitionStore::of(settings, cloud.vm_id());
        let service = match service {
            Some(service) => Ok(service),
            None => cloud.gate().service().await,
        };
        superlink.partition =
            store.of_this_boot().or_else(|| partition::known(service.as_ref().ok()?, &store));
        match service {
            Ok(_) if superlink.partition.is_none() => {
                notes.push(
                    "the node would take a partition that no other node of the service has".into(),
                );
            }
            Ok(_) | Err(OneGateError::NotInService) => {}
            Err(error) => notes.push(format!(
                "the partition is not known: {}",
                sanitize_line(&error_chain(&error))
            )),
        }
    }
    Some(superlink)
}

async fn look_at_engine(socket: &Path) -> Result<(Client, EngineInfo), String> {
    const TIMEOUT: Duration = Duration::from_secs(3);
    let look = async {
        let engine = Client::connect(socket).await?;
        let facts = engine.info().await?;
        Ok::<_, EngineError>((engine, facts))
    };
    match tokio::time::timeout(TIMEOUT, look).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => {
            Err(format!("the Docker engine at {} gave no answer within 3 s", socket.display()))
        }
    }
}

async fn python_path_in(
    engine: &Client,
    image: &ImageRef,
    notes: &mut Vec<String>,
) -> Option<String> {
    match engine.find_image(image.as_str()).await {
        Ok(Some(found)) => return found.variable("PYTHONPATH"),
        Ok(None) => {
            notes.push(format!("the image {image} is not on this machine: it would be pulled"));
        }
        Err(error) => notes.push(error.to_string()),
    }
    None
}

fn superlink_json(superlink: &SuperLink) -> Json {
    json!({
        "address": superlink.address.to_string(),
        "tls": superlink.ca.is_some(),
        "vm_id": superlink.vm_id,
        "version": superlink.version.as_ref().map(ToString::to_string),
        "partition": superlink.partition,
    })
}

pub(super) fn gpu_json(detection: &Detection, distribution: Distribution) -> Json {
    json!({
        "verdict": detection.verdict.to_json(distribution),
        "facts": {
            "pci": detection.facts.gpus().collect::<Vec<_>>(),
            "module_version": detection.facts.module_version,
            "module_pending": detection.facts.module_pending,
            "kernel": detection.facts.kernel,
            "unreadable": detection.facts.unreadable,
            "probe": detection.outcome.as_ref().map(|outcome| outcome.summary()),
        },
    })
}

pub(super) fn write_gpu(
    out: &mut dyn Write,
    detection: &Detection,
    distribution: Distribution,
) -> io::Result<()> {
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
            writeln!(out, "  fix      {}", finding.reason.fix(distribution))?;
        }
    }
    Ok(())
}

fn write_list<'a>(
    out: &mut dyn Write,
    title: &str,
    lines: impl IntoIterator<Item = &'a String>,
) -> io::Result<()> {
    let mut lines = lines.into_iter().peekable();
    if lines.peek().is_some() {
        writeln!(out, "{title}")?;
    }
    lines.try_for_each(|line| writeln!(out, "  {line}"))
}
