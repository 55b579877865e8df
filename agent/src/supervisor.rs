//! The container's life: adopted or replaced, watched, started again, stopped. The agent is its one owner.
//!
//! ```text
//!           same specification, running, with its GPU
//!          ┌──────────────── adopt ───────────────┐
//! look ────┤                                      ├──> running ──ended──> pause ──> look
//!          └─ (stop, remove) create, start, check ┘       │
//!                   │ refused with the GPU             SIGTERM
//!                   └──> WARNING, once, then on the CPU    └──> stop
//! ```

use std::convert::Infallible;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use crate::atomic;
use crate::config::Config;
use crate::config::values::ImageRef;
use crate::distribution::Distribution;
use crate::docker::engine::{Container, Engine, EngineError};
use crate::docker::runtime::GpuAccess;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::journal;
use crate::plan::{self, ContainerSpec, Machine};
use crate::report::Reporter;
use crate::settings::Settings;
use crate::site;
use crate::superlink::SuperLink;

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
    /// The distribution that fixes are for.
    pub distribution: Distribution,
    /// How the GPU gets in.
    pub access: GpuAccess,
    /// What the node runs on.
    pub verdict: Verdict,
    /// Who is told.
    pub reporter: Rc<Reporter>,
    /// The hash of the GPU specification that did not come up, once there is one.
    pub refused_hash: Option<String>,
    /// The reason of the WARNING that holds: it is not given again for every try.
    pub announced: Option<Reason>,
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
    /// The container did not come up on the GPU, and Docker does not let go of it.
    #[error(
        "{summary}; and Docker does not let go of that container: end what hangs (ps -C nvidia-container-runtime), or restart Docker"
    )]
    Stuck {
        /// What was found about the GPU.
        summary: String,
        /// What Docker said to the removal.
        source: EngineError,
    },
    /// What the container mounts cannot be made.
    #[error("cannot write {path}")]
    Mounts {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
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

    /// Tells that the node runs, and on what.
    pub fn report_running(&self) {
        self.reporter.decided(self.verdict.to_json(self.distribution), &self.superlink.address.to_string());
        self.reporter.ready(&self.status());
    }

    /// The line for `systemctl status`.
    fn status(&self) -> String {
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
    fn fall_back(&mut self, finding: Finding) -> Result<(), LaunchError> {
        if self.announced != Some(finding.reason) {
            announce(&self.config, &finding, self.distribution)?;
            self.announced = Some(finding.reason);
        }
        self.verdict = Verdict::cpu(finding);
        Ok(())
    }

    /// Adopts the running container of this very specification, or replaces whatever has its name.
    ///
    /// # Errors
    /// When the engine does not do its part, what is mounted cannot be made, or there must be a GPU and the container does
    /// not come up on it.
    pub async fn bring_up(&mut self, engine: &Engine) -> Result<Container, LaunchError> {
        let (verdict, refused_hash) = (self.verdict.clone(), self.refused_hash.clone());
        let brought_up = self.adopt_or_replace(engine).await;
        if brought_up.is_err() {
            // It does not come up on the CPU either, so it was not the GPU: the next try begins with it again.
            (self.verdict, self.refused_hash) = (verdict, refused_hash);
        }
        brought_up
    }

    async fn adopt_or_replace(&mut self, engine: &Engine) -> Result<Container, LaunchError> {
        self.prepare_mounts()?;
        loop {
            let spec = self.spec();
            let found = engine.find_container(&spec.name).await?;
            if let Some(container) = found.as_ref().filter(|container| container.running) {
                if container.spec_hash() == Some(&spec.hash()) {
                    let Some(finding) = devices_missing_in(container, self.verdict.devices()) else {
                        tracing::info!("adopted the running container {} ({})", spec.name, short(&container.id));
                        if container.paused {
                            tracing::warn!("the container {} is paused: docker unpause {0}", spec.name);
                        }
                        return Ok(container.clone());
                    };
                    // The GPU itself is there: a container that is made anew may have it.
                    tracing::warn!("replacing the running container: {}", finding.summary);
                } else if let Some(finding) = stands_in_for(container, &spec) {
                    self.refused_hash = Some(spec.hash());
                    self.fall_back(finding)?;
                    continue;
                }
            }
            match self.launch(engine, &spec, found).await? {
                Launched::Running(container) => {
                    if !self.verdict.devices().is_empty() {
                        self.announced = None;
                    }
                    return Ok(container);
                }
                Launched::NotOnGpu(finding) => {
                    let removed = async {
                        match engine.find_container(&spec.name).await? {
                            Some(dead) => engine.remove(&dead).await,
                            None => Ok(()),
                        }
                    };
                    // Docker 20.10 holds on to a container for as long as its runtime hangs.
                    if let Err(source) = removed.await {
                        return Err(LaunchError::Stuck { summary: finding.summary, source });
                    }
                    self.refused_hash = Some(spec.hash());
                    self.fall_back(finding)?;
                }
            }
        }
    }

    /// Makes what the container's mounts need. Looked after at every start: a folder may have gone in between.
    fn prepare_mounts(&self) -> Result<(), LaunchError> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| LaunchError::Mounts { path, source }
        };
        let data = &self.settings.container.data_dir;
        std::fs::create_dir_all(data).map_err(failed(data))?;
        if let Some(ca) = &self.superlink.ca {
            let file = self.settings.container.certs_dir.join(plan::CA_FILE);
            atomic::replace(&file, ca.pem().as_bytes()).map_err(failed(&file))?;
        }
        let state = &self.settings.state.dir;
        site::write(state).map_err(failed(state))
    }

    async fn launch(
        &self,
        engine: &Engine,
        spec: &ContainerSpec,
        found: Option<Container>,
    ) -> Result<Launched, LaunchError> {
        let on_gpu = matches!(self.verdict, Verdict::Gpu { .. });
        // One that has ended goes on, with its log, where it is what would be made now.
        let image = engine.find_image(&spec.image).await?;
        let same = found.as_ref().filter(|old| {
            !old.running && old.is_made_from(spec) && image.as_ref().is_some_and(|image| image.id == old.image_id)
        });
        let mut started = match same {
            Some(same) => engine.start(&same.id).await,
            None => self.make_and_start(engine, spec, found.as_ref()).await,
        };
        if same.is_some() && matches!(started, Err(EngineError::Refused { .. })) {
            // What it was made with may have gone since: only one that is made now is judged.
            started = self.make_and_start(engine, spec, found.as_ref()).await;
        }
        if let Err(error) = started {
            return match error.may_be_of_the_gpu().filter(|_| on_gpu) {
                Some(why) => Ok(Launched::NotOnGpu(Finding::new(
                    Reason::RuntimeStartFailed,
                    format!("Docker did not start the container with the GPU: {why}"),
                ))),
                None => Err(error.into()),
            };
        }
        let Some(container) = engine.find_container(&spec.name).await? else {
            let message = "it was removed right after its start".into();
            return Err(EngineError::Failed { doing: "start the container", message }.into());
        };
        if let Some(finding) = devices_missing_in(&container, self.verdict.devices()) {
            return Ok(Launched::NotOnGpu(finding));
        }
        tracing::info!(
            "started the container {} ({}) from {} on {}",
            spec.name,
            short(&container.id),
            spec.image,
            match &self.verdict {
                Verdict::Gpu { devices, .. } => devices.iter().map(title).collect::<Vec<_>>().join(", "),
                Verdict::Cpu { .. } => "the CPU".into(),
            }
        );
        Ok(Launched::Running(container))
    }

    async fn make_and_start(
        &self,
        engine: &Engine,
        spec: &ContainerSpec,
        old: Option<&Container>,
    ) -> Result<(), EngineError> {
        if let Some(old) = old {
            tracing::info!("replacing the container {} ({})", spec.name, short(&old.id));
            engine.stop(&old.id, self.settings.container.stop_timeout).await?;
            engine.remove(old).await?;
        }
        let id = engine.create(spec).await?;
        engine.start(&id).await
    }

    /// Watches the container and starts it again whenever it ends. Never returns: a signal ends it from outside.
    ///
    /// # Errors
    /// When there must be a GPU and the container does not come up on it again.
    pub async fn supervise(&mut self, mut engine: Engine, mut container: Container) -> Result<Infallible, LaunchError> {
        let mut pause = FIRST_PAUSE;
        loop {
            let watched_since = Instant::now();
            let end = engine.wait(&container.id).await;
            let engine_went = engine.facts().await.is_err();
            if engine_went {
                engine = self.engine_again().await;
            }
            // The connection may have gone and the container not.
            if end.is_none()
                && let Ok(Some(found)) = engine.find_container(&container.id).await
                && found.running
            {
                tokio::time::sleep(FIRST_PAUSE).await;
                continue;
            }
            // A container that went down with the engine is not to blame.
            if engine_went || watched_since.elapsed() >= HEALTHY_AFTER {
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
                self.reporter.doing(&format!("The container {what}, starting it again in {seconds} s"));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                match self.bring_up(&engine).await {
                    Ok(container) => break container,
                    Err(LaunchError::GpuRequired) => return Err(LaunchError::GpuRequired),
                    Err(error) => tracing::error!("the container does not come up: {}", journal::error_chain(&error)),
                }
                if engine.facts().await.is_err() {
                    engine = self.engine_again().await;
                }
            };
            self.report_running();
        }
    }

    /// The engine, once it answers again.
    async fn engine_again(&self) -> Engine {
        let socket = &self.settings.docker.socket;
        tracing::warn!("the Docker engine at {} does not answer; waiting for it", socket.display());
        self.reporter.doing("Waiting for the Docker engine");
        loop {
            tokio::time::sleep(ENGINE_PAUSE).await;
            if let Ok(engine) = Engine::connect(socket).await {
                tracing::info!("the Docker engine answers again");
                return engine;
            }
        }
    }
}

/// Says why there is no GPU, and what helps on this distribution: the WARNING of the fallback, or the error where a GPU is
/// required.
///
/// # Errors
/// When there must be a GPU.
pub fn announce(config: &Config, finding: &Finding, distribution: Distribution) -> Result<(), LaunchError> {
    if config.gpu_required {
        journal::error_required(finding, distribution);
        return Err(LaunchError::GpuRequired);
    }
    journal::warn_fallback(finding, distribution);
    if let Some(fraction) = &config.memory_fraction {
        tracing::info!("FL_GPU_MEMORY_FRACTION={fraction} is idle: this node runs on the CPU");
    }
    Ok(())
}

enum Launched {
    Running(Container),
    NotOnGpu(Finding),
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
