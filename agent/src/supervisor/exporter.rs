//! NVIDIA's DCGM exporter beside the node (`FL_DCGM_ENABLED`): a container of its own on the GPUs
//! that the node uses. It is adopted, replaced and stopped as the node's is, and never the node's
//! affair: what goes wrong is a WARNING, and tried again.
//!
//! ```text
//! no GPU in use ──> remove
//! GPUs in use ────> adopt, or replace ──> runs ──ended, or its GPU lost──┐
//!                     ^      └──refused, no image──> WARNING, once <─────┘
//!                     └─────────── pause, longer each time ──┘
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
use crate::values::{ImageRef, sanitize_line};

/// The port on which the exporter listens by default (NVIDIA/dcgm-exporter, pkg/cmd/app.go).
const PORT: u16 = 9400;
const PIDS_LIMIT: i64 = 512;
const SHM_SIZE_MIB: u64 = 64;
/// Between SIGTERM and SIGKILL: it has nothing to finish.
pub(crate) const GRACE: Duration = Duration::from_secs(5);
/// The pauses before it is tried again: the first, and the longest.
const INITIAL_DELAY: Duration = Duration::from_secs(5);
const MAX_DELAY: Duration = Duration::from_secs(600);
/// A run of this length makes the next pause the first again, and the next failure a WARNING.
const HEALTHY_AFTER: Duration = Duration::from_secs(600);

/// The name of its container.
pub(crate) fn name_of(settings: &Settings) -> String {
    format!("{}-dcgm", settings.container.name)
}

/// What its container will be; or why there is none.
///
/// # Errors
/// What keeps it from being wanted.
pub(crate) fn plan_exporter(
    config: &Config,
    devices: &[GpuDevice],
    access: &GpuInjection,
    settings: &Settings,
    system: &SystemInfo,
) -> Result<ContainerSpec, &'static str> {
    if !config.dcgm_enabled {
        return Err("FL_DCGM_ENABLED is not YES");
    }
    if !config.gpu.enabled {
        return Err("FL_GPU_ENABLED is not YES");
    }
    if devices.is_empty() {
        return Err("no GPU is in use");
    }
    let (runtime, cdi_devices) = plan::runtime_and_devices(devices, access);
    let (log_driver, log_options) = plan::log_driver(settings, system);
    let listen = format!(":{PORT}");
    let env = [
        ("DCGM_EXPORTER_LISTEN", listen.as_str()),
        ("NVIDIA_DRIVER_CAPABILITIES", plan::DRIVER_CAPABILITIES),
        ("NVIDIA_VISIBLE_DEVICES", &plan::visible_devices(devices, access)),
    ];
    let mut spec = ContainerSpec {
        name: name_of(settings),
        image: settings.dcgm.image.clone(),
        // The image's own: the default counters.
        args: Vec::new(),
        env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        runtime: runtime.into(),
        cdi_devices,
        labels: BTreeMap::new(),
        mounts: Vec::new(),
        ca_digest: None,
        tmpfs: BTreeMap::new(),
        // Neither root nor SYS_ADMIN: only DCGM_FI_PROF_* need them (NVIDIA/dcgm-exporter,
        // docker/Dockerfile and deployment/values.yaml), and a container with SYS_ADMIN is no
        // container.
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

/// The exporter of a node that is up.
#[derive(Debug)]
pub(crate) struct Exporter {
    /// What the operator wants.
    pub(crate) config: Config,
    /// Where things are.
    pub(crate) settings: Settings,
    /// How the GPU gets in.
    pub(crate) access: GpuInjection,
    /// Memory and logging of the VM.
    pub(crate) system: SystemInfo,
    /// Who tells which GPUs are in use, and is told.
    pub(crate) reporter: Rc<Reporter>,
}

impl Exporter {
    /// Keeps the exporter as it is wanted, for as long as this is polled.
    pub(crate) async fn keep(self) -> Infallible {
        let mut in_use = self.reporter.gpus_in_use();
        loop {
            let Some(devices) = in_use.borrow_and_update().clone() else {
                let _ = in_use.changed().await;
                continue;
            };
            let wanted =
                plan_exporter(&self.config, &devices, &self.access, &self.settings, &self.system);
            let keep = async {
                match wanted {
                    Ok(spec) => self.keep_up(&spec, &devices).await,
                    Err(why) => self.keep_away(why).await,
                }
            };
            tokio::select! {
                never = keep => match never {},
                // It never closes: the reporter that sends is ours as well.
                _ = in_use.changed() => {}
            }
        }
    }

    fn report(&self, state: Option<String>) {
        self.reporter.update(|status| status.exporter = state.map(|text| sanitize_line(&text)));
    }

    async fn keep_up(&self, spec: &ContainerSpec, devices: &[GpuDevice]) -> Infallible {
        let name = &spec.name;
        let (mut backoff, mut told) = (Backoff::new(INITIAL_DELAY, MAX_DELAY), false);
        loop {
            let mut up_since = None;
            let Err(error) = self.live(spec, devices, &mut up_since).await;
            if up_since.is_some_and(|since: Instant| since.elapsed() >= HEALTHY_AFTER) {
                backoff.reset();
                told = false;
            }
            let delay = backoff.next_delay(0.0);
            let why = error_chain(&error);
            self.report(Some(format!("does not run: {why}")));
            match error {
                // Of an engine that is away the node's supervisor tells, and one that somebody has
                // removed is made anew.
                Trouble::Engine(EngineError::Unreachable { .. }) | Trouble::Ended(None) => {}
                _ if told => tracing::debug!("the DCGM exporter {name} does not run: {why}"),
                _ => {
                    tracing::warn!(
                        "the DCGM exporter {name} does not run, the node goes on without: {why}; trying again in {} s, then more rarely",
                        delay.as_secs()
                    );
                    told = true;
                }
            }
            tokio::time::sleep(delay).await;
        }
    }

    /// Brings it up and stays with it until it does not run any more.
    async fn live(
        &self,
        spec: &ContainerSpec,
        devices: &[GpuDevice],
        up_since: &mut Option<Instant>,
    ) -> Result<Infallible, Trouble> {
        let engine = Client::connect(&self.settings.docker.socket).await?;
        let container = bring_up(&engine, spec, devices).await?;
        *up_since = Some(Instant::now());
        self.report(Some(format!("{} at {}", spec.image, self.settings.dcgm.listen)));
        let by_hook = self.access == GpuInjection::Runtime;
        tokio::select! {
            end = engine.wait(&container.id) => Err(Trouble::Ended(end)),
            finding = gpu_presence::wait_until_lost(&container, devices, by_hook) => {
                engine.remove(&container).await?;
                Err(Trouble::Lost(finding.summary))
            }
        }
    }

    /// Removes the container, where there is one of ours.
    async fn keep_away(&self, why: &str) -> Infallible {
        self.report(None);
        let mut backoff = Backoff::new(INITIAL_DELAY, MAX_DELAY);
        while let Err(error) = self.take_away(why).await {
            tracing::debug!("the DCGM exporter cannot be removed: {}", error_chain(&error));
            tokio::time::sleep(backoff.next_delay(0.0)).await;
        }
        std::future::pending().await
    }

    async fn take_away(&self, why: &str) -> Result<(), EngineError> {
        let engine = Client::connect(&self.settings.docker.socket).await?;
        let found = engine.inspect_container(&name_of(&self.settings)).await?;
        let Some(ours) = found.filter(|container| container.spec_hash().is_some()) else {
            if self.config.dcgm_enabled && self.config.gpu.enabled {
                tracing::info!("FL_DCGM_ENABLED has no effect: {why}");
            }
            return Ok(());
        };
        tracing::info!("removing the DCGM exporter: {why}");
        engine.stop(&ours.id, GRACE).await?;
        engine.remove(&ours).await
    }
}

/// Adopts the running container of this very specification, or replaces whatever has its name.
async fn bring_up(
    engine: &Client,
    spec: &ContainerSpec,
    devices: &[GpuDevice],
) -> Result<Container, Trouble> {
    let name = &spec.name;
    let found = engine.inspect_container(name).await?;
    let has_gpus = |container: &Container| {
        !matches!(gpu_presence::find_missing_devices(container, devices), Ok(Some(_)))
    };
    if let Some(running) = &found
        && running.running
        && running.spec_hash() == Some(&spec.hash())
        && has_gpus(running)
    {
        tracing::info!("adopted the running DCGM exporter {name}");
        return Ok(running.clone());
    }
    if engine.find_image(&spec.image).await?.is_none() {
        let image =
            ImageRef::parse(&spec.image).map_err(|refusal| Trouble::Image(refusal.to_string()))?;
        tracing::info!("pulling {image}");
        engine.pull(&image, |_| {}).await?;
    }
    if let Some(old) = found {
        engine.stop(&old.id, GRACE).await?;
        engine.remove(&old).await?;
    }
    let id = engine.create(spec).await?;
    engine.start(&id).await?;
    let started = engine.inspect_container(&id).await?.ok_or(Trouble::Ended(None))?;
    tracing::info!("started the DCGM exporter {name} from {}", spec.image);
    Ok(started)
}

/// Why the exporter does not run.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("dcgm.image {0}")]
    Image(String),
    #[error("it {}", .0.map_or_else(|| "is gone".into(), |code| format!("ended with exit code {code}")))]
    Ended(Option<i64>),
    #[error("it has lost its GPU: {0}")]
    Lost(String),
}

#[cfg(test)]
mod tests {
    use one_context::Context;

    use super::*;
    use crate::config::Prebaked;

    fn plan(
        context: &str,
        gpus: usize,
        access: &GpuInjection,
    ) -> Result<ContainerSpec, &'static str> {
        let context = Context::parse(context.as_bytes()).unwrap();
        let (config, _) = Config::from_context(&context, &Prebaked::default()).unwrap();
        let device = |index: usize| GpuDevice {
            index: 0,
            uuid: format!("GPU-{index}"),
            name: None,
            pci_address: String::new(),
            memory_mib: None,
            minor: None,
        };
        let devices: Vec<_> = (0..gpus).map(device).collect();
        plan_exporter(&config, &devices, access, &Settings::default(), &SystemInfo::default())
    }

    #[test]
    fn it_is_wanted_only_where_it_is_asked_for_and_a_gpu_is_in_use() {
        let runtime = &GpuInjection::Runtime;
        assert_eq!(plan("FL_GPU_ENABLED='YES'\n", 1, runtime), Err("FL_DCGM_ENABLED is not YES"));
        assert_eq!(plan("FL_DCGM_ENABLED='YES'\n", 1, runtime), Err("FL_GPU_ENABLED is not YES"));
        assert_eq!(
            plan("FL_DCGM_ENABLED='YES'\nFL_GPU_ENABLED='YES'\n", 0, runtime),
            Err("no GPU is in use")
        );
        assert!(plan("FL_DCGM_ENABLED='YES'\nFL_GPU_ENABLED='YES'\n", 1, runtime).is_ok());
    }

    #[test]
    fn it_has_the_nodes_gpus_by_the_nodes_way() {
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
