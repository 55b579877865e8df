//! Startup: everything between the configuration and the container specification.
//!
//! ```text
//! sysfs, NVML ──> verdict ─┬─> injection ──> image ─┬─> ContainerInputs ──> ContainerSpec
//! Docker engine ───────────┘                        │
//! FL_SUPERLINK_ADDRESS or OneGate ──> SuperLink ────┘
//! ```
//!
//! `run` and `plan` share [`preflight`]. They differ in [`StartupOps`]: [`LiveOps`] waits, changes
//! Docker's configuration and pulls; the dry run of `plan` only reads.

use std::pin::pin;
use std::time::Duration;

use super::desired_state::DesiredState;
use super::discovery::discover_superlink;
use super::error::DaemonError;
use super::image::resolve_image;
use crate::config::Config;
use crate::config::settings::Settings;
use crate::container::image::{FrameworkImage, flower_version};
use crate::container::plan::ContainerInputs;
use crate::docker::client::{Client, EngineError, EngineInfo};
use crate::docker::nvidia_runtime::{GpuInjection, choose_injection, ensure_runtime};
use crate::flower::release;
use crate::gpu::reason::Finding;
use crate::gpu::verdict::Verdict;
use crate::gpu::{Detection, detect_gpus};
use crate::opennebula::superlink::SuperLink;
use crate::report::{NodeStatus, Reporter, fallback};
use crate::supervisor::LaunchError;
use crate::system::info::SystemInfo;
use crate::system::os_release::Distribution;

/// The steps of startup in which `run` and `plan` differ.
pub(crate) trait StartupOps {
    /// The connection to the Docker engine.
    type Docker;

    /// How long to wait for a driver that is still loading.
    fn gpu_wait(&self) -> Duration;

    /// Connects to the Docker engine.
    async fn connect_docker(&self) -> Result<Self::Docker, DaemonError>;

    /// Returns the engine's runtimes and CDI devices, if they are known.
    fn take_engine_info(
        &self,
        docker: &mut Self::Docker,
    ) -> Result<Option<EngineInfo>, DaemonError>;

    /// Reports that the node falls back to the CPU. Fails if a GPU is required.
    fn report_fallback(
        &self,
        finding: &Finding,
        distribution: Distribution,
    ) -> Result<(), DaemonError>;

    /// Reports selected GPUs that the node does not use.
    fn report_unused_gpus(&self, unused: &[String]);

    /// Makes the nvidia runtime available in Docker.
    async fn ensure_runtime(
        &self,
        docker: &Self::Docker,
        info: Option<&EngineInfo>,
    ) -> Result<(), Finding>;

    /// Resolves the framework image.
    async fn resolve_image(&self, docker: &Self::Docker) -> Result<FrameworkImage, DaemonError>;
}

/// Result of [`preflight`]: everything the container depends on, except the SuperLink.
#[derive(Debug)]
pub(crate) struct Preflight<D> {
    pub docker: D,
    pub detection: Detection,
    pub distribution: Distribution,
    pub injection: GpuInjection,
    pub image: FrameworkImage,
    pub system: SystemInfo,
}

impl<D> Preflight<D> {
    /// Completes the inputs of the container specification.
    pub(crate) fn container_inputs<'a>(
        &'a self,
        config: &'a Config,
        settings: &'a Settings,
        superlink: Option<&'a SuperLink>,
    ) -> ContainerInputs<'a> {
        ContainerInputs {
            config,
            settings,
            verdict: &self.detection.verdict,
            injection: &self.injection,
            superlink,
            image: &self.image,
            system: &self.system,
        }
    }
}

/// Detects the GPU, prepares its injection into containers, and resolves the image.
pub(crate) async fn preflight<O: StartupOps>(
    config: &Config,
    settings: &Settings,
    ops: &O,
) -> Result<Preflight<O::Docker>, DaemonError> {
    let (docker, mut detection) =
        tokio::join!(ops.connect_docker(), detect_gpus(config, settings, ops.gpu_wait()));
    let distribution = Distribution::read(&settings.system.root);
    // Before Docker's errors: if a GPU is required and missing, an unreachable engine must not hide
    // that.
    if let Some(finding) = detection.verdict.finding() {
        ops.report_fallback(finding, distribution)?;
    }
    let mut docker = docker?;
    let mut injection = GpuInjection::Runtime;
    if let Verdict::Gpu { devices, missing } = &detection.verdict {
        let info = ops.take_engine_info(&mut docker)?;
        injection = choose_injection(settings.gpu.injection, devices, info.as_ref());
        let prepared = match injection {
            GpuInjection::Runtime => ops.ensure_runtime(&docker, info.as_ref()).await,
            GpuInjection::Cdi(_) => Ok(()),
        };
        match prepared {
            Ok(()) => ops.report_unused_gpus(missing),
            Err(finding) => {
                ops.report_fallback(&finding, distribution)?;
                detection.verdict = Verdict::cpu(finding);
            }
        }
    }
    let image = ops.resolve_image(&docker).await?;
    let system = SystemInfo::read();
    Ok(Preflight { docker, detection, distribution, injection, image, system })
}

/// Runs [`preflight`] and discovery at the same time. Discovery can take hours and must not delay
/// the boot: once preflight has finished, the service manager considers the unit started.
pub(super) async fn preflight_and_discovery(
    desired: &DesiredState,
    reporter: &Reporter,
) -> Result<(Preflight<DockerConnection>, SuperLink), DaemonError> {
    let DesiredState { config, settings, .. } = desired;
    let ops = LiveOps { config, settings, reporter };
    let mut preflight = pin!(preflight(config, settings, &ops));
    let mut discovery = pin!(discover_superlink(desired, reporter));
    let mut superlink = None;
    let preflight = loop {
        tokio::select! {
            result = &mut preflight => break result?,
            result = &mut discovery, if superlink.is_none() => superlink = Some(result?),
        }
    };
    let superlink = match superlink {
        Some(superlink) => superlink,
        None => {
            reporter.update(NodeStatus::mark_prepared);
            discovery.await?
        }
    };
    reporter.update(|status| {
        status.end_superlink_wait();
        status.set_step("Starting the container");
    });
    warn_unsupported_version(config, &preflight.image, &superlink);
    Ok((preflight, superlink))
}

/// Warns about a Flower release that the agent does not support or that does not match the
/// SuperLink's. The release in an operator's own image is unknown.
fn warn_unsupported_version(config: &Config, image: &FrameworkImage, superlink: &SuperLink) {
    if config.image.is_some() {
        return;
    }
    let version = flower_version(config, &image.reference);
    let mismatch =
        superlink.version.as_ref().and_then(|other| release::mismatch_warning(version, other));
    for warning in release::unsupported_warning(version).into_iter().chain(mismatch) {
        tracing::warn!("{warning}");
    }
}

/// Startup of `run`.
struct LiveOps<'a> {
    config: &'a Config,
    settings: &'a Settings,
    reporter: &'a Reporter,
}

/// A connected Docker engine.
#[derive(Debug)]
pub(super) struct DockerConnection {
    pub client: Client,
    /// Queried while the probe of NVML runs, if a GPU is wanted.
    info: Option<Result<EngineInfo, EngineError>>,
}

impl StartupOps for LiveOps<'_> {
    type Docker = DockerConnection;

    fn gpu_wait(&self) -> Duration {
        self.settings.gpu.wait
    }

    async fn connect_docker(&self) -> Result<DockerConnection, DaemonError> {
        let docker = &self.settings.docker;
        let client = Client::wait_until_ready(&docker.socket, docker.ready_timeout).await?;
        let info = if self.config.gpu.enabled { Some(client.info().await) } else { None };
        Ok(DockerConnection { client, info })
    }

    fn take_engine_info(
        &self,
        docker: &mut DockerConnection,
    ) -> Result<Option<EngineInfo>, DaemonError> {
        Ok(docker.info.take().transpose()?)
    }

    fn report_fallback(
        &self,
        finding: &Finding,
        distribution: Distribution,
    ) -> Result<(), DaemonError> {
        Ok(fallback::report(self.config, finding, distribution).map_err(LaunchError::from)?)
    }

    fn report_unused_gpus(&self, unused: &[String]) {
        if !unused.is_empty() {
            tracing::warn!("selected GPUs are unusable and not used: {}", unused.join("; "));
        }
    }

    async fn ensure_runtime(
        &self,
        docker: &DockerConnection,
        info: Option<&EngineInfo>,
    ) -> Result<(), Finding> {
        match info {
            Some(info) => ensure_runtime(&docker.client, info, &self.settings.docker).await,
            None => Ok(()),
        }
    }

    async fn resolve_image(
        &self,
        docker: &DockerConnection,
    ) -> Result<FrameworkImage, DaemonError> {
        let name = &self.settings.container.name;
        Ok(resolve_image(self.config, &docker.client, name, self.reporter).await?)
    }
}
