//! The container's life: adopted or replaced, watched, started again, stopped. The agent is its one owner.
//!
//! ```text
//!              same specification, running
//!          ┌──────────────── adopt ───────────────┐
//! look ────┤                                      ├──> running ──ended──> pause ──> look
//!          └─ (stop, remove) create, start, check ┘       │
//!                   │ refused with the GPU             SIGTERM
//!                   └──> WARNING, once, then on the CPU    └──> stop
//! ```

use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::Config;
use crate::config::values::ImageRef;
use crate::docker::engine::{Container, Engine, EngineError};
use crate::docker::runtime::GpuAccess;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::journal;
use crate::plan::{self, ContainerSpec, Machine};
use crate::settings::Settings;
use crate::superlink::SuperLink;
use crate::systemd;

/// The pause before a container that has ended is started again: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A run of this length makes the next pause the first again.
const HEALTHY_AFTER: Duration = Duration::from_secs(600);
/// While the engine is away it is looked for this often.
const ENGINE_PAUSE: Duration = Duration::from_secs(2);

/// The node: everything its container is made from.
#[derive(Debug)]
pub struct Node {
    /// What the operator wants.
    pub config: Config,
    /// Where things are.
    pub settings: Settings,
    /// What the node connects to.
    pub superlink: SuperLink,
    /// The image that was found.
    pub image: ImageRef,
    /// What the machine has.
    pub machine: Machine,
    /// How the GPU gets in.
    pub access: GpuAccess,
    /// What the node runs on.
    pub verdict: Verdict,
    /// The hash of the GPU specification that did not come up, once there is one.
    pub refused_hash: Option<String>,
}

/// Why the container does not run.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// There must be a GPU, and there is none.
    #[error("FL_GPU_REQUIRED is YES and no GPU is usable")]
    GpuRequired,
}

impl Node {
    fn spec(&self) -> ContainerSpec {
        let superlink = Some(&self.superlink);
        let mut spec = plan::plan_container(
            &self.config,
            &self.verdict,
            &self.access,
            superlink,
            &self.image,
            &self.machine,
            &self.settings,
        );
        if let Some(hash) = &self.refused_hash {
            spec.labels.insert(plan::REFUSED_HASH_LABEL.into(), hash.clone());
        }
        spec
    }

    /// The line for `systemctl status`.
    pub fn status(&self) -> String {
        match &self.verdict {
            Verdict::Gpu { devices, .. } => {
                let names: Vec<String> = devices.iter().map(title).collect();
                format!("Running on {}", names.join(", "))
            }
            Verdict::Cpu { finding: None } => "Running on the CPU (FL_GPU_ENABLED is not YES)".into(),
            Verdict::Cpu { finding: Some(finding) } => {
                format!("Running on the CPU: {}: {}", finding.reason, finding.summary)
            }
        }
    }

    /// Leaves the GPU: says so, once, before anything runs on the CPU.
    ///
    /// # Errors
    /// When there must be a GPU.
    pub fn fall_back(&mut self, finding: Finding) -> Result<(), LaunchError> {
        announce(&self.config, &finding)?;
        self.verdict = Verdict::cpu(finding);
        Ok(())
    }

    /// Adopts the running container of this very specification, or replaces whatever has its name.
    ///
    /// # Errors
    /// When the engine does not do its part, or there must be a GPU and it does not come up.
    pub async fn bring_up(&mut self, engine: &Engine) -> Result<Container, LaunchError> {
        loop {
            let spec = self.spec();
            let found = engine.find_container(&spec.name).await?;
            if let Some(container) = found.as_ref().filter(|container| container.running) {
                if container.spec_hash() == Some(&spec.hash()) {
                    tracing::info!("adopted the running container {} ({})", spec.name, short(&container.id));
                    return Ok(container.clone());
                }
                if let Some(finding) = stands_in_for(container, &spec) {
                    self.refused_hash = Some(spec.hash());
                    self.fall_back(finding)?;
                    continue;
                }
            }
            match self.launch(engine, &spec, found).await? {
                Launched::Running(container) => return Ok(container),
                Launched::NotOnGpu { id, finding } => {
                    engine.remove(&id).await?;
                    self.refused_hash = Some(spec.hash());
                    self.fall_back(finding)?;
                }
            }
        }
    }

    async fn launch(
        &self,
        engine: &Engine,
        spec: &ContainerSpec,
        found: Option<Container>,
    ) -> Result<Launched, LaunchError> {
        let on_gpu = matches!(self.verdict, Verdict::Gpu { .. });
        let id = match found {
            // It has ended: the same container goes on, with its log.
            Some(container) if container.spec_hash() == Some(&spec.hash()) => container.id,
            other => {
                if let Some(old) = other {
                    tracing::info!("replacing the container {} ({})", spec.name, short(&old.id));
                    engine.stop(&old.id, self.settings.container.stop_timeout).await?;
                    engine.remove(&old.id).await?;
                }
                match engine.create(spec).await {
                    Err(EngineError::Refused { status: 400 | 500, message, .. }) if on_gpu => {
                        return Ok(Launched::NotOnGpu { id: spec.name.clone(), finding: start_failed(&message) });
                    }
                    created => created?,
                }
            }
        };
        match engine.start(&id).await {
            Err(EngineError::Refused { message, .. }) if on_gpu => {
                return Ok(Launched::NotOnGpu { id, finding: start_failed(&message) });
            }
            started => started?,
        }
        let Some(container) = engine.find_container(&id).await? else {
            let message = "it was removed right after its start".into();
            return Err(EngineError::Failed { doing: "start the container", message }.into());
        };
        if let Some(finding) = devices_missing_in(&container, self.verdict.devices()) {
            return Ok(Launched::NotOnGpu { id, finding });
        }
        tracing::info!(
            "started the container {} ({}) from {} on {}",
            spec.name,
            short(&id),
            spec.image,
            match &self.verdict {
                Verdict::Gpu { devices, .. } => devices.iter().map(title).collect::<Vec<_>>().join(", "),
                Verdict::Cpu { .. } => "the CPU".into(),
            }
        );
        Ok(Launched::Running(container))
    }

    /// Watches the container and starts it again whenever it ends. Never returns: a signal ends it from outside.
    ///
    /// # Errors
    /// When there must be a GPU and the container does not come up on it again.
    pub async fn supervise(&mut self, mut engine: Engine, mut container: Container) -> Result<(), LaunchError> {
        let mut pause = FIRST_PAUSE;
        loop {
            let watched_since = Instant::now();
            let end = engine.wait(&container.id).await;
            engine = self.engine_again(engine).await;
            // The connection may have gone and the container not.
            if end.is_none()
                && let Ok(Some(found)) = engine.find_container(&container.id).await
                && found.running
            {
                tokio::time::sleep(FIRST_PAUSE).await;
                continue;
            }
            if watched_since.elapsed() >= HEALTHY_AFTER {
                pause = FIRST_PAUSE;
            }
            let what = match end {
                Some(code) => format!("ended with exit code {code}"),
                None => "is gone".into(),
            };
            container = loop {
                let seconds = pause.as_secs();
                tracing::warn!(
                    "the container {} {what}; starting it again in {seconds} s",
                    self.settings.container.name
                );
                systemd::status(&format!("The container {what}, starting it again in {seconds} s"));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                match self.bring_up(&engine).await {
                    Ok(container) => break container,
                    Err(LaunchError::GpuRequired) => return Err(LaunchError::GpuRequired),
                    Err(LaunchError::Engine(error)) => tracing::error!("the container does not come up: {error}"),
                }
                engine = self.engine_again(engine).await;
            };
            systemd::status(&self.status());
        }
    }

    /// The engine, once it answers again.
    async fn engine_again(&self, engine: Engine) -> Engine {
        if engine.facts().await.is_ok() {
            return engine;
        }
        let socket = &self.settings.docker.socket;
        tracing::warn!("the Docker engine at {} does not answer; waiting for it", socket.display());
        systemd::status("Waiting for the Docker engine");
        loop {
            tokio::time::sleep(ENGINE_PAUSE).await;
            if let Ok(engine) = Engine::connect(socket).await {
                tracing::info!("the Docker engine answers again");
                return engine;
            }
        }
    }
}

/// Says why there is no GPU: the WARNING of the fallback, or the error where a GPU is required.
///
/// # Errors
/// When there must be a GPU.
pub fn announce(config: &Config, finding: &Finding) -> Result<(), LaunchError> {
    if config.gpu_required {
        journal::error_required(finding);
        return Err(LaunchError::GpuRequired);
    }
    journal::warn_fallback(finding);
    if let Some(fraction) = &config.memory_fraction {
        tracing::info!("FL_GPU_MEMORY_FRACTION={fraction} is idle: this node runs on the CPU");
    }
    Ok(())
}

enum Launched {
    Running(Container),
    NotOnGpu { id: String, finding: Finding },
}

fn start_failed(message: &str) -> Finding {
    Finding::new(Reason::RuntimeStartFailed, format!("Docker did not start the container with the GPU: {message}"))
}

/// Whether `container` runs on the CPU because `wanted`, on the GPU, did not come up: why, as its labels tell.
fn stands_in_for(container: &Container, wanted: &ContainerSpec) -> Option<Finding> {
    let label = |name: &str| container.labels.get(name).map(String::as_str);
    if label(plan::REFUSED_HASH_LABEL) != Some(wanted.hash().as_str()) {
        return None;
    }
    let reason = Reason::from_code(label(plan::REASON_LABEL)?)?;
    Some(Finding::new(reason, label(plan::SUMMARY_LABEL)?))
}

/// Looks, from outside, whether the device nodes of `devices` are in the container: nothing is needed in the image.
/// `None` where all are there, and where it cannot be told.
fn devices_missing_in(container: &Container, devices: &[GpuDevice]) -> Option<Finding> {
    if devices.is_empty() || container.pid == 0 {
        return None;
    }
    let dev = format!("/proc/{}/root/dev", container.pid);
    let nodes = match gpu_nodes(Path::new(&dev)) {
        Ok(nodes) => nodes,
        Err(error) => {
            tracing::info!("cannot see whether the GPU is in the container: {dev}: {error}");
            return None;
        }
    };
    let missing: Vec<String> = devices
        .iter()
        .filter(|device| match device.minor {
            Some(minor) => !nodes.contains(&format!("/dev/nvidia{minor}")),
            None => nodes.is_empty(),
        })
        .map(title)
        .collect();
    if missing.is_empty() {
        return None;
    }
    let there = if nodes.is_empty() { "no /dev/nvidia<n>".into() } else { nodes.join(", ") };
    Some(Finding {
        gpu_uuid: devices.first().map(|device| device.uuid.clone()),
        pci_address: devices.first().map(|device| device.pci_address.clone()),
        ..Finding::new(
            Reason::GpuNotVisible,
            format!("the container runs, and {} is not in it (it has {there})", missing.join(", ")),
        )
    })
}

/// The `/dev/nvidia<n>` among the character devices of a /dev. The driver gives a GPU the number of its minor.
fn gpu_nodes(dev: &Path) -> std::io::Result<Vec<String>> {
    let mut nodes = Vec::new();
    for entry in std::fs::read_dir(dev)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let numbered = name
            .strip_prefix("nvidia")
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()));
        if numbered && entry.file_type()?.is_char_device() {
            nodes.push(format!("/dev/{name}"));
        }
    }
    nodes.sort();
    Ok(nodes)
}

fn title(device: &GpuDevice) -> String {
    let name = device.name.as_deref().unwrap_or("GPU");
    format!("{name} ({}, {})", device.uuid, device.pci_address)
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}
