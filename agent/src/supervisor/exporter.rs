//! NVIDIA's DCGM exporter (`FL_DCGM_ENABLED`): a second container on the GPUs that the node uses.
//! Runs next to the supervisor; its failure never stops the node.
//!
//! ```text
//! no GPU in use ──> remove the container
//! GPUs in use ────> adopt or replace ──> running ──exited, or lost its GPU──┐
//!                      ^     └──refused, no image──> WARNING, once <────────┘
//!                      └──────────── exponential backoff ──┘
//! ```

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::config::Config;
use crate::config::settings::Settings;
use crate::container::plan;
use crate::docker::client::{Client, Container, EngineError};
use crate::docker::nvidia_runtime::GpuInjection;
use crate::docker::spec::{ContainerSpec, PortSpec, SPEC_HASH_LABEL};
use crate::gpu::verdict::GpuDevice;
use crate::logging::error_chain;
use crate::report::Reporter;
use crate::supervisor::gpu_presence;
use crate::system::info::SystemInfo;
use crate::values::{ImageRef, ValidationError, sanitize_line};

/// The port on which the exporter listens by default (NVIDIA/dcgm-exporter, pkg/cmd/app.go).
const PORT: u16 = 9400;
const PIDS_LIMIT: i64 = 512;
const SHM_SIZE_MIB: u64 = 64;
/// Time between SIGTERM and SIGKILL: the exporter has nothing to finish.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Initial and maximum retry delay.
const INITIAL_DELAY: Duration = Duration::from_secs(5);
const MAX_DELAY: Duration = Duration::from_secs(600);
/// A run of this length resets the delay, and the next failure is a WARNING again.
const HEALTHY_AFTER: Duration = Duration::from_secs(600);

/// Returns the name of the exporter's container.
pub(crate) fn container_name(settings: &Settings) -> String {
    format!("{}-dcgm", settings.container.name)
}

/// Why the node has no DCGM exporter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotWanted {
    #[error("FL_DCGM_ENABLED is not YES")]
    DcgmNotEnabled,
    #[error("FL_GPU_ENABLED is not YES")]
    GpuNotEnabled,
    #[error("no GPU is in use")]
    NoGpuInUse,
}

/// Returns the spec of the exporter's container.
///
/// # Errors
/// If the node has no exporter.
pub(crate) fn plan_exporter(
    config: &Config,
    devices: &[GpuDevice],
    injection: &GpuInjection,
    settings: &Settings,
    system: &SystemInfo,
) -> Result<ContainerSpec, NotWanted> {
    if !config.dcgm_enabled {
        return Err(NotWanted::DcgmNotEnabled);
    }
    if !config.gpu.enabled {
        return Err(NotWanted::GpuNotEnabled);
    }
    if devices.is_empty() {
        return Err(NotWanted::NoGpuInUse);
    }
    let (runtime, cdi_devices) = plan::runtime_and_devices(devices, injection);
    let (log_driver, log_options) = plan::log_driver(settings, system);
    let listen = format!(":{PORT}");
    let env = [
        ("DCGM_EXPORTER_LISTEN", listen.as_str()),
        ("NVIDIA_DRIVER_CAPABILITIES", plan::DRIVER_CAPABILITIES),
        ("NVIDIA_VISIBLE_DEVICES", &plan::visible_devices(devices, injection)),
    ];
    let mut spec = ContainerSpec {
        name: container_name(settings),
        image: settings.dcgm.image.clone(),
        // The image's default arguments select the default counters.
        args: Vec::new(),
        env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        runtime: runtime.into(),
        cdi_devices,
        labels: BTreeMap::new(),
        mounts: Vec::new(),
        ca_digest: None,
        tmpfs: BTreeMap::new(),
        // Neither root nor SYS_ADMIN: only DCGM_FI_PROF_* need them (NVIDIA/dcgm-exporter,
        // docker/Dockerfile and deployment/values.yaml), and SYS_ADMIN defeats the isolation.
        user: plan::USER.into(),
        pids_limit: PIDS_LIMIT,
        shm_size_mib: SHM_SIZE_MIB,
        shm_follows_memory: false,
        ports: settings
            .dcgm
            .address()
            .into_iter()
            .map(|listen| PortSpec { listen, port: PORT })
            .collect(),
        log_driver,
        log_options,
    };
    spec.labels.insert(SPEC_HASH_LABEL.into(), spec.hash());
    Ok(spec)
}

/// Runs the exporter of a node.
#[derive(Debug)]
pub(crate) struct Exporter {
    pub(crate) config: Config,
    pub(crate) settings: Settings,
    pub(crate) injection: GpuInjection,
    pub(crate) system: SystemInfo,
    /// Announces the GPUs in use, and receives the exporter's status.
    pub(crate) reporter: Rc<Reporter>,
}

impl Exporter {
    /// Keeps the exporter's container in the desired state. Dropping the future stops the
    /// supervision; the container keeps running.
    pub(crate) async fn run(self) -> Infallible {
        let mut in_use = self.reporter.gpus_in_use();
        loop {
            let Some(devices) = in_use.borrow_and_update().clone() else {
                let _ = in_use.changed().await;
                continue;
            };
            let wanted = plan_exporter(
                &self.config,
                &devices,
                &self.injection,
                &self.settings,
                &self.system,
            );
            let reconcile = async {
                match wanted {
                    Ok(spec) => self.supervise(&spec, &devices).await,
                    Err(why) => self.ensure_absent(why).await,
                }
            };
            tokio::select! {
                never = reconcile => match never {},
                // Never closed: the reporter is the sender.
                _ = in_use.changed() => {}
            }
        }
    }

    fn report(&self, state: Option<String>) {
        self.reporter.update(|status| status.exporter = state.map(|text| sanitize_line(&text)));
    }

    /// Runs the container and restarts it with backoff whenever it fails.
    async fn supervise(&self, spec: &ContainerSpec, devices: &[GpuDevice]) -> Infallible {
        let name = &spec.name;
        let (mut backoff, mut warned) = (Backoff::new(INITIAL_DELAY, MAX_DELAY), false);
        loop {
            let mut running_since = None;
            let Err(error) = self.run_once(spec, devices, &mut running_since).await;
            if running_since.is_some_and(|since: Instant| since.elapsed() >= HEALTHY_AFTER) {
                backoff.reset();
                warned = false;
            }
            let why = error_chain(&error);
            self.report(Some(format!("does not run: {why}")));
            let delay = backoff.next_delay(0.0);
            match error {
                // The node's supervisor logs an engine that does not answer; a container that the
                // operator removed is created again.
                ExporterError::Engine(EngineError::Unreachable { .. })
                | ExporterError::Exited(None) => {}
                _ if warned => {
                    tracing::debug!(container = %name, "DCGM exporter {name} does not run: {why}")
                }
                _ => {
                    tracing::warn!(
                        container = %name,
                        image = %spec.image,
                        "DCGM exporter {name} does not run: {why}; the node continues without it, \
                         retrying in {} s, then with backoff",
                        delay.as_secs()
                    );
                    warned = true;
                }
            }
            tokio::time::sleep(delay).await;
        }
    }

    /// Launches the container and waits until it no longer runs.
    async fn run_once(
        &self,
        spec: &ContainerSpec,
        devices: &[GpuDevice],
        running_since: &mut Option<Instant>,
    ) -> Result<Infallible, ExporterError> {
        let engine = Client::connect(&self.settings.docker.socket).await?;
        let container = launch(&engine, spec, devices).await?;
        *running_since = Some(Instant::now());
        self.report(Some(format!("{} at {}", spec.image, self.settings.dcgm.listen)));
        let injected_by_hook = self.injection == GpuInjection::Runtime;
        tokio::select! {
            code = engine.wait_for_exit(&container.id) => Err(ExporterError::Exited(code)),
            finding = gpu_presence::wait_until_lost(&container, devices, injected_by_hook) => {
                engine.remove(&container).await?;
                Err(ExporterError::GpuLost(finding.summary))
            }
        }
    }

    /// Removes the container if there is one.
    async fn ensure_absent(&self, why: NotWanted) -> Infallible {
        self.report(None);
        let mut backoff = Backoff::new(INITIAL_DELAY, MAX_DELAY);
        while let Err(error) = self.remove(why).await {
            tracing::debug!("cannot remove the DCGM exporter: {}", error_chain(&error));
            tokio::time::sleep(backoff.next_delay(0.0)).await;
        }
        std::future::pending().await
    }

    async fn remove(&self, why: NotWanted) -> Result<(), EngineError> {
        let name = container_name(&self.settings);
        let engine = Client::connect(&self.settings.docker.socket).await?;
        let found = engine.inspect_container(&name).await?;
        let Some(ours) = found.filter(|container| container.spec_hash().is_some()) else {
            if self.config.dcgm_enabled && self.config.gpu.enabled {
                tracing::info!("FL_DCGM_ENABLED has no effect: {why}");
            }
            return Ok(());
        };
        tracing::info!(container = %name, "removing the DCGM exporter: {why}");
        engine.stop(&ours.id, STOP_TIMEOUT).await?;
        engine.remove(&ours).await
    }
}

/// Adopts the running container if it matches the spec, or replaces the container with its name.
async fn launch(
    engine: &Client,
    spec: &ContainerSpec,
    devices: &[GpuDevice],
) -> Result<Container, ExporterError> {
    let name = &spec.name;
    let existing = engine.inspect_container(name).await?;
    let has_gpus = |container: &Container| {
        !matches!(gpu_presence::find_missing_devices(container, devices), Ok(Some(_)))
    };
    if let Some(running) = &existing
        && running.running
        && running.spec_hash() == Some(&spec.hash())
        && has_gpus(running)
    {
        tracing::info!(container = %name, "adopted the running DCGM exporter {name}");
        return Ok(running.clone());
    }
    if engine.find_image(&spec.image).await?.is_none() {
        let image = ImageRef::parse(&spec.image).map_err(ExporterError::Image)?;
        tracing::info!(image = %image, "pulling {image}");
        engine.pull(&image, |_| {}).await?;
    }
    if let Some(existing) = existing {
        engine.stop(&existing.id, STOP_TIMEOUT).await?;
        engine.remove(&existing).await?;
    }
    let id = engine.create(spec).await?;
    engine.start(&id).await?;
    let started = engine.inspect_container(&id).await?.ok_or(ExporterError::Exited(None))?;
    tracing::info!(
        container = %name,
        image = %spec.image,
        "started the DCGM exporter {name} from {}",
        spec.image
    );
    Ok(started)
}

/// Why the exporter does not run.
#[derive(Debug, thiserror::Error)]
enum ExporterError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("invalid setting dcgm.image")]
    Image(#[source] ValidationError),
    #[error(
        "the container {}",
        .0.map_or_else(|| "is gone".into(), |code| format!("exited with code {code}"))
    )]
    Exited(Option<i64>),
    #[error("the container lost its GPU: {0}")]
    GpuLost(String),
}

#[cfg(test)]
mod tests {
    use one_context::Context;

    use super::*;
    use crate::config::Prebaked;
    use crate::values::GpuUuid;

    fn plan(
        context: &str,
        gpus: usize,
        injection: &GpuInjection,
    ) -> Result<ContainerSpec, NotWanted> {
        let context = Context::parse(context.as_bytes()).unwrap();
        let (config, _) = Config::from_context(&context, &Prebaked::default()).unwrap();
        let device = |index: usize| GpuDevice {
            index: 0,
            uuid: GpuUuid::parse(format!("GPU-{index}")).unwrap(),
            name: None,
            pci_address: None,
            memory_mib: None,
            minor: None,
        };
        let devices: Vec<_> = (0..gpus).map(device).collect();
        plan_exporter(&config, &devices, injection, &Settings::default(), &SystemInfo::default())
    }

    #[test]
    fn exporter_is_planned_only_if_enabled_with_gpu_in_use() {
        let runtime = &GpuInjection::Runtime;
        assert_eq!(plan("FL_GPU_ENABLED='YES'\n", 1, runtime), Err(NotWanted::DcgmNotEnabled));
        assert_eq!(plan("FL_DCGM_ENABLED='YES'\n", 1, runtime), Err(NotWanted::GpuNotEnabled));
        assert_eq!(
            plan("FL_DCGM_ENABLED='YES'\nFL_GPU_ENABLED='YES'\n", 0, runtime),
            Err(NotWanted::NoGpuInUse)
        );
        assert!(plan("FL_DCGM_ENABLED='YES'\nFL_GPU_ENABLED='YES'\n", 1, runtime).is_ok());
    }

    #[test]
    fn exporter_gets_gpus_by_the_nodes_injection() {
        let context = "FL_DCGM_ENABLED='YES'\nFL_GPU_ENABLED='YES'\n";
        let by_runtime = plan(context, 2, &GpuInjection::Runtime).unwrap();
        assert_eq!(
            (by_runtime.name.as_str(), by_runtime.runtime.as_str()),
            ("flower-supernode-dcgm", "nvidia")
        );
        assert_eq!(by_runtime.env["NVIDIA_VISIBLE_DEVICES"], "GPU-0,GPU-1");
        assert_eq!(by_runtime.labels[SPEC_HASH_LABEL], by_runtime.hash());
        let by_cdi =
            plan(context, 1, &GpuInjection::Cdi(vec!["nvidia.com/gpu=GPU-0".into()])).unwrap();
        assert_eq!((by_cdi.runtime.as_str(), by_cdi.cdi_devices.len()), ("runc", 1));
        assert_eq!(by_cdi.env["NVIDIA_VISIBLE_DEVICES"], "void");
    }
}
