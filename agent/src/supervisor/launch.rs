//! Launch of the container: inspects the existing one, then adopts, replaces, starts or creates it.

use crate::docker::client::{Container, EngineError};
use crate::docker::spec::{ContainerSpec, REASON_LABEL, REFUSED_HASH_LABEL, SUMMARY_LABEL};
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::report::NodeStatus;

use super::gpu_presence::find_missing_devices;
use super::state_machine::{Event, Existing};
use super::{LaunchError, Supervisor, short_id};

impl Supervisor<'_> {
    /// Returns the container spec for the current target. After a fallback to the CPU, a label
    /// contains the hash of the GPU spec, so that the next agent recognises the fallback.
    fn container_spec(&self) -> ContainerSpec {
        let mut spec = self.node.container_spec(self.state_machine.verdict());
        if let Some(gpu) = self.state_machine.fallback_from() {
            spec.labels.insert(REFUSED_HASH_LABEL.into(), self.node.container_spec(gpu).hash());
        }
        spec
    }

    pub(super) async fn inspect(&mut self) -> Result<Event, LaunchError> {
        self.node.reporter.update(NodeStatus::set_container_stopped);
        self.node.prepare_mounts()?;
        let spec = self.container_spec();
        self.container = self.engine.inspect_container(&spec.name).await?;
        let Some(container) = &self.container else {
            return Ok(Event::Inspected(Existing::Absent));
        };
        let existing = match (container.running, container.spec_hash() == Some(&spec.hash())) {
            (true, true) => {
                match missing_devices(container, self.state_machine.verdict().devices()) {
                    None => Existing::UpToDate,
                    Some(finding) => Existing::WithoutGpu(finding),
                }
            }
            (true, false) => previous_fallback(container, &spec)
                .map_or(Existing::Outdated, Existing::CpuFallback),
            // An exited container that matches the spec is restarted, which keeps its log.
            (false, _) if container.was_created_from(&spec) => {
                let image = self.engine.find_image(&spec.image).await?;
                // If the name no longer refers to an image, a new container cannot be created.
                let same = image.is_none_or(|image| image.id == container.image_id);
                if same { Existing::Exited } else { Existing::Outdated }
            }
            (false, _) => Existing::Outdated,
        };
        Ok(Event::Inspected(existing))
    }

    pub(super) async fn remove_existing(&self) -> Result<Event, LaunchError> {
        if let Some(container) = &self.container {
            let name = &self.node.settings.container.name;
            tracing::info!(
                container = %name,
                "replacing container {name} ({})",
                short_id(&container.id)
            );
            self.stop_and_remove_container(container).await?;
        }
        Ok(Event::Done)
    }

    pub(super) async fn create_and_start(&mut self) -> Result<Event, LaunchError> {
        let spec = self.container_spec();
        let started = async {
            let id = self.engine.create(&spec).await?;
            self.engine.start(&id).await
        };
        let started = started.await;
        self.after_start(&spec, started).await
    }

    pub(super) async fn start_existing(&mut self) -> Result<Event, LaunchError> {
        let id = self.container.as_ref().map(|container| container.id.as_str()).unwrap_or_default();
        let started = self.engine.start(id).await;
        if matches!(started, Err(EngineError::Refused { .. })) {
            // The old container may depend on something that no longer exists. Only the refusal of
            // a new container counts.
            return Ok(Event::Refused);
        }
        self.after_start(&self.container_spec(), started).await
    }

    /// Classifies the result of a start: success, failure because of the GPU, or another failure.
    async fn after_start(
        &mut self,
        spec: &ContainerSpec,
        started: Result<(), EngineError>,
    ) -> Result<Event, LaunchError> {
        let verdict = self.state_machine.verdict();
        if let Err(error) = started {
            let is_on_gpu = matches!(verdict, Verdict::Gpu { .. });
            return match error.gpu_start_failure().filter(|_| is_on_gpu) {
                Some(why) => Ok(Event::GpuStartFailed(Finding::new(
                    Reason::RuntimeStartFailed,
                    format!("Docker did not start the container with the GPU: {why}"),
                ))),
                None => Err(error.into()),
            };
        }
        let Some(container) = self.engine.inspect_container(&spec.name).await? else {
            let message = "it was removed right after its start".into();
            return Err(EngineError::Failed { operation: "start the container", message }.into());
        };
        if let Some(finding) = missing_devices(&container, verdict.devices()) {
            return Ok(Event::GpuStartFailed(finding));
        }
        tracing::info!(
            container = %spec.name,
            image = %spec.image,
            "started container {} ({}) from {} on {}",
            spec.name,
            short_id(&container.id),
            spec.image,
            match verdict {
                Verdict::Gpu { devices, .. } => list_devices(devices),
                Verdict::Cpu { .. } => "the CPU".into(),
            }
        );
        self.container = Some(container);
        Ok(Event::Done)
    }

    /// Removes the container that did not start with the GPU. Fails while the container's runtime
    /// hangs: Docker 20.10 does not remove such a container.
    pub(super) async fn remove_failed(&self, finding: Finding) -> Result<Event, LaunchError> {
        let removed = async {
            match self.engine.inspect_container(&self.node.settings.container.name).await? {
                Some(container) => self.engine.remove(&container).await,
                None => Ok(()),
            }
        };
        let not_removed = |source| LaunchError::NotRemoved { summary: finding.summary, source };
        removed.await.map_err(not_removed)?;
        Ok(Event::Done)
    }
}

fn list_devices(devices: &[GpuDevice]) -> String {
    devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Returns the finding in the container's labels if the container is a CPU fallback from `wanted`;
/// otherwise `None`.
fn previous_fallback(container: &Container, wanted: &ContainerSpec) -> Option<Finding> {
    let label = |name: &str| container.labels.get(name).map(String::as_str);
    if label(REFUSED_HASH_LABEL) != Some(wanted.hash().as_str()) {
        return None;
    }
    let reason = Reason::from_code(label(REASON_LABEL)?)?;
    Some(Finding::new(reason, label(SUMMARY_LABEL)?))
}

/// Returns a finding that names the devices that are missing in the container; `None` also if the
/// check fails.
fn missing_devices(container: &Container, devices: &[GpuDevice]) -> Option<Finding> {
    find_missing_devices(container, devices).unwrap_or_else(|error| {
        tracing::info!("cannot check whether the container has its GPU: {error}");
        None
    })
}
