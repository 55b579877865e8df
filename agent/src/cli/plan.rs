//! The `plan` command: a dry run of the daemon's startup. It changes nothing, and reports what it
//! could not determine.

use std::cell::RefCell;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use one_context::Context;
use serde_json::{Value as Json, json};

use super::gpu::{gpu_json, write_gpu};
use super::output::write_list;
use crate::config::settings::Settings;
use crate::config::{Config, Diagnostics};
use crate::container::image::{FrameworkImage, wanted_image};
use crate::container::plan::plan_container;
use crate::daemon::{
    DaemonError, DesiredState, DiscoveryPreview, Preflight, StartupOps, preflight,
    preview_superlink,
};
use crate::docker::client::{Client, EngineError, EngineInfo};
use crate::docker::daemon_json::RUNTIME_NAME;
use crate::docker::spec::ContainerSpec;
use crate::gpu::reason::Finding;
use crate::logging::error_chain;
use crate::opennebula::onegate::OneGateAccess;
use crate::opennebula::superlink::SuperLink;
use crate::supervisor::exporter::{NotWanted, plan_exporter};
use crate::system::os_release::Distribution;
use crate::system::programs::find_program;

/// What `run` would do.
pub(super) struct Plan {
    config: Config,
    diagnostics: Diagnostics,
    preflight: Preflight<Option<DockerConnection>>,
    superlink: Option<SuperLink>,
    container: ContainerSpec,
    /// The DCGM exporter, or why there is none.
    exporter: Result<ContainerSpec, NotWanted>,
    /// Non-canonical values, what `run` would do differently, and what is unknown.
    notes: Vec<String>,
}

impl Plan {
    pub(super) async fn new(
        config: Config,
        diagnostics: Diagnostics,
        context: &Context,
        settings: &Settings,
    ) -> Result<Self, DaemonError> {
        let onegate = OneGateAccess::new(context, settings);
        let desired = DesiredState { config, settings: settings.clone(), onegate };
        let config = &desired.config;
        let ops = DryRunOps { config, settings, notes: RefCell::default() };
        let (preflight, discovery) =
            tokio::join!(preflight(config, settings, &ops), preview_superlink(&desired));
        let preflight = preflight?;
        let DiscoveryPreview { superlink, notes: discovery_notes } = discovery;
        let container =
            plan_container(&preflight.container_inputs(config, settings, superlink.as_ref()))
                .redacted(config.node_config.as_ref());
        let exporter = plan_exporter(
            config,
            preflight.detection.verdict.devices(),
            &preflight.injection,
            settings,
            &preflight.system,
        );
        let mut notes = diagnostics.notes.clone();
        notes.extend(discovery_notes);
        notes.extend(ops.notes.into_inner());
        let config = desired.config;
        Ok(Self { config, diagnostics, preflight, superlink, container, exporter, notes })
    }

    pub(super) fn to_json(&self) -> Json {
        let Preflight { detection, distribution, .. } = &self.preflight;
        json!({
            "config": self.config.resolved(),
            "warnings": self.diagnostics.warnings().collect::<Vec<_>>(),
            "ineffective": self.diagnostics.ineffective,
            "gpu": gpu_json(detection, *distribution),
            "superlink": self.superlink.as_ref().map(superlink_json),
            "container": self.container,
            "dcgm": {
                "container": self.exporter.as_ref().ok(),
                "reason": self.exporter.as_ref().err().map(ToString::to_string),
            },
            "notes": self.notes,
        })
    }

    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        self.write_config(out)?;
        write_gpu(out, &self.preflight.detection, self.preflight.distribution)?;
        self.write_superlink(out)?;
        self.write_container(out)?;
        self.write_exporter(out)?;
        write_list(out, "Notes", &self.notes)
    }

    fn write_config(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "Configuration")?;
        for (name, value) in self.config.resolved() {
            match value {
                Json::Null => continue,
                Json::String(text) => writeln!(out, "  {name:<27} {text}")?,
                Json::Bool(yes) => {
                    writeln!(out, "  {name:<27} {}", if yes { "YES" } else { "NO" })?
                }
                other => writeln!(out, "  {name:<27} {other}")?,
            }
        }
        write_list(out, "Warnings", self.diagnostics.warnings())?;
        write_list(out, "Variables without effect", &self.diagnostics.ineffective)
    }

    fn write_superlink(&self, out: &mut dyn Write) -> io::Result<()> {
        let Some(superlink) = &self.superlink else {
            return Ok(());
        };
        let vm = superlink.vm_id.map_or(String::new(), |id| format!(", VM {id} of the service"));
        let tls = if superlink.ca.is_some() { "TLS" } else { "no TLS" };
        writeln!(out, "SuperLink")?;
        writeln!(out, "  address  {} ({tls}{vm})", superlink.address)
    }

    fn write_container(&self, out: &mut dyn Write) -> io::Result<()> {
        let container = &self.container;
        writeln!(out, "Container")?;
        writeln!(out, "  name     {}", container.name)?;
        writeln!(out, "  image    {}", container.image)?;
        writeln!(out, "  runtime  {}", container.runtime)?;
        for device in &container.cdi_devices {
            writeln!(out, "  device   {device}")?;
        }
        // Quotes mark an argument that contains whitespace.
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
        Ok(())
    }

    fn write_exporter(&self, out: &mut dyn Write) -> io::Result<()> {
        let Ok(exporter) = &self.exporter else {
            return Ok(());
        };
        writeln!(out, "DCGM exporter")?;
        writeln!(out, "  name     {}", exporter.name)?;
        writeln!(out, "  image    {}", exporter.image)?;
        for port in &exporter.ports {
            writeln!(out, "  listens  {}", port.listen)?;
        }
        Ok(())
    }
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

/// Startup of `plan`: only reads, and never fails. It adds a note for each action that `run` would
/// take and for each fact that it cannot determine.
struct DryRunOps<'a> {
    config: &'a Config,
    settings: &'a Settings,
    notes: RefCell<Vec<String>>,
}

/// A connected Docker engine.
#[derive(Debug)]
struct DockerConnection {
    client: Client,
    info: EngineInfo,
}

impl DryRunOps<'_> {
    fn note(&self, note: String) {
        self.notes.borrow_mut().push(note);
    }
}

impl StartupOps for DryRunOps<'_> {
    type Docker = Option<DockerConnection>;

    fn gpu_wait(&self) -> Duration {
        Duration::ZERO
    }

    async fn connect_docker(&self) -> Result<Option<DockerConnection>, DaemonError> {
        match connect(&self.settings.docker.socket).await {
            Ok(docker) => Ok(Some(docker)),
            Err(error) => {
                self.note(format!(
                    "{error}; cannot look for the image {}, the nvidia runtime and CDI devices",
                    wanted_image(self.config)
                ));
                Ok(None)
            }
        }
    }

    fn take_engine_info(
        &self,
        docker: &mut Option<DockerConnection>,
    ) -> Result<Option<EngineInfo>, DaemonError> {
        Ok(docker.as_ref().map(|docker| docker.info.clone()))
    }

    /// The verdict and its reason are part of the output.
    fn report_fallback(&self, _: &Finding, _: Distribution) -> Result<(), DaemonError> {
        Ok(())
    }

    /// The unused GPUs are part of the output.
    fn report_unused_gpus(&self, _: &[String]) {}

    async fn ensure_runtime(
        &self,
        _: &Option<DockerConnection>,
        info: Option<&EngineInfo>,
    ) -> Result<(), Finding> {
        let registered = info.is_some_and(|info| info.runtimes.contains_key(RUNTIME_NAME));
        let runtime_path = &self.settings.docker.runtime_path;
        if !registered && find_program(runtime_path).is_none() {
            self.note(format!(
                "{runtime_path} is not installed: the node would fall back to the CPU \
                 (runtime-missing)"
            ));
        }
        Ok(())
    }

    async fn resolve_image(
        &self,
        docker: &Option<DockerConnection>,
    ) -> Result<FrameworkImage, DaemonError> {
        let reference = wanted_image(self.config);
        let mut python_path = None;
        if let Some(docker) = docker {
            match docker.client.find_image(reference.as_str()).await {
                Ok(Some(image)) => python_path = image.variable("PYTHONPATH"),
                Ok(None) => self.note(format!(
                    "Docker does not have the image {reference}: the node would pull it"
                )),
                Err(error) => self.note(error_chain(&error)),
            }
        }
        Ok(FrameworkImage { reference, python_path })
    }
}

/// Connects to the engine and queries it.
async fn connect(socket: &Path) -> Result<DockerConnection, EngineError> {
    const TIMEOUT: Duration = Duration::from_secs(3);
    let connect = async {
        let client = Client::connect(socket).await?;
        let info = client.info().await?;
        Ok(DockerConnection { client, info })
    };
    tokio::time::timeout(TIMEOUT, connect).await.unwrap_or_else(|_| {
        Err(EngineError::Unreachable {
            socket: socket.display().to_string(),
            message: format!("no answer within {} s", TIMEOUT.as_secs()),
        })
    })
}
