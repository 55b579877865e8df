//! Log messages and status updates for the notifications of the state machine.

use std::time::Duration;

use crate::logging;
use crate::report::{NodeStatus, fallback};
use crate::values::GpuUuid;

use super::state_machine::{Notification, RestartReason};
use super::{LaunchError, NodeSpec, Supervisor, short_id};

impl Supervisor<'_> {
    pub(super) fn notify(&mut self, notification: Notification) {
        let NodeSpec { config, settings, distribution, reporter, .. } = &self.node;
        let name = &settings.container.name;
        match notification {
            Notification::Adopted => {
                if let Some(container) = &self.container {
                    tracing::info!(
                        container = %name,
                        "adopted the running container {name} ({})",
                        short_id(&container.id)
                    );
                    if container.paused {
                        self.log_paused(true);
                    }
                }
            }
            Notification::Replacing(finding) => tracing::warn!(
                container = %name,
                gpu_uuid = finding.gpu_uuid.as_ref().map(GpuUuid::as_str),
                pci_address = finding.pci_address.map(tracing::field::display),
                "replacing the running container {name}: {}",
                finding.summary
            ),
            Notification::CpuFallback(finding) => {
                fallback::warn_cpu_fallback(config, &finding, *distribution);
            }
            Notification::GpuRequired(finding) => {
                fallback::error_gpu_required(&finding, *distribution);
            }
            Notification::RequiredGpuFailed(finding) => {
                fallback::error_required_gpu_failed(&finding, *distribution)
            }
            Notification::MovingToCpu => {
                self.status_note = None;
                self.gpu_monitor.reset();
                reporter.set_step("The GPU failed, moving to the CPU");
            }
            Notification::LaunchFailed => {
                let error = logging::error_chain(
                    &self.launch_error.take().unwrap_or(LaunchError::UnexpectedEvent),
                );
                tracing::error!(container = %name, "cannot start container {name}: {error}");
            }
            Notification::RestartScheduled(reason, delay) => self.notify_restart(reason, delay),
            Notification::EngineUnavailable => {
                let socket = settings.docker.socket.display();
                tracing::warn!("Docker engine at {socket} does not answer; waiting for it");
                reporter.set_step("Waiting for the Docker engine");
            }
            Notification::EngineAvailable => tracing::info!("Docker engine is responding again"),
            Notification::GpuFailureIgnored(finding) => {
                fallback::warn_gpu_failure_ignored(&finding, *distribution);
                self.status_note =
                    Some(format!("GPU failure ignored (gpu.on_failure): {}", finding.summary));
            }
            Notification::GpuRetry(finding) => {
                self.status_note = None;
                fallback::warn_gpu_retry(&finding, *distribution);
                reporter.update(NodeStatus::set_container_stopped);
                reporter.update(|status| status.gpus_released = true);
                reporter.set_step(&format!("The GPU failed, retrying it: {}", finding.summary));
            }
            Notification::GpuProbeScheduled(delay) => {
                tracing::info!(container = %name, "probing the failed GPU in {} s", delay.as_secs())
            }
            Notification::GpuAvailable => {
                tracing::info!(
                    container = %name,
                    "GPU is usable now; restart flower-supernode to use it"
                );
                self.status_note = Some(
                    "the GPU is usable now: systemctl restart flower-supernode to use it".into(),
                );
            }
            Notification::GpuReclaimed => tracing::warn!(
                container = %name,
                "GPU is usable now and gpu.on_available is restart; replacing container {name}"
            ),
        }
    }

    fn notify_restart(&self, reason: RestartReason, delay: Duration) {
        let NodeSpec { settings, reporter, .. } = &self.node;
        let name = &settings.container.name;
        let what = match reason {
            RestartReason::Exited(Some(code)) => format!("exited with code {code}"),
            RestartReason::Exited(None) => "is gone".into(),
            RestartReason::LaunchFailed => "did not start".into(),
        };
        let seconds = delay.as_secs();
        tracing::warn!(container = %name, "container {name} {what}; restarting it in {seconds} s");
        reporter.update(|status| {
            status.set_container_stopped();
            status.set_step(&format!("The container {what}, restarting it in {seconds} s"));
        });
    }
}
