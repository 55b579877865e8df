//! Checks of Docker, the nvidia runtime, CDI, the image and the disk.

use serde_json::Value as Json;

use super::subject::{FIX_CONFIGURATION, FIX_DOCKER, GIB, RUN_AS_ROOT, Vm};
use crate::check::Check;
use crate::config::Framework;
use crate::config::settings::Injection;
use crate::docker::daemon_json::RUNTIME_NAME;
use crate::gpu::reason::Reason;

impl Vm<'_> {
    pub(super) fn docker(&self) -> Check {
        const ID: &str = "docker";
        match &self.facts.engine {
            Ok(info) => Check::ok(ID, format!("Docker {} responds", info.version)),
            Err(why) if why.to_lowercase().contains("permission denied") => {
                Check::unknown(ID, why, RUN_AS_ROOT)
            }
            Err(why) => {
                let install = self.distribution.install_command("docker.io", "docker-ce");
                Check::error(
                    ID,
                    why,
                    format!("systemctl enable --now docker; if it is not installed: {install}"),
                )
            }
        }
    }

    pub(super) fn nvidia_runtime(&self) -> Check {
        const ID: &str = "nvidia-runtime";
        const FIX: &str = "supernode-agent configure-runtime && systemctl reload docker \
                           (flower-supernode does this at startup if the GPU is enabled)";
        if let Ok(info) = &self.facts.engine {
            return match info.runtimes.get(RUNTIME_NAME) {
                Some(path) => {
                    Check::ok(ID, format!("Docker has the runtime {RUNTIME_NAME} ({path})"))
                }
                None if self.uses_cdi() => {
                    Check::ok(ID, "not registered, not required: the GPU is injected by CDI")
                }
                None if !self.is_gpu_enabled() => {
                    Check::ok(ID, "Docker has no runtime nvidia; the GPU is not enabled")
                }
                None => Check::warning(ID, "Docker has no runtime nvidia", FIX),
            };
        }
        let text = match &self.facts.daemon_json {
            Ok(text) => text.as_deref().unwrap_or("{}"),
            Err(why) => return Check::unknown(ID, why, RUN_AS_ROOT),
        };
        match serde_json::from_str::<Json>(text) {
            Ok(Json::Object(daemon)) => {
                let entry = daemon.get("runtimes").and_then(|runtimes| runtimes.get(RUNTIME_NAME));
                match entry {
                    Some(_) => Check::unknown(
                        ID,
                        "daemon.json has the runtime nvidia, but Docker does not respond",
                        FIX_DOCKER,
                    ),
                    None => Check::unknown(
                        ID,
                        "daemon.json has no runtime nvidia, and Docker does not respond",
                        FIX,
                    ),
                }
            }
            Ok(_) => Check::problem(
                ID,
                self.gpu_problem_level(),
                "daemon.json is not one JSON object",
                self.fix(Reason::RuntimeNotConfigured),
            ),
            Err(error) => Check::problem(
                ID,
                self.gpu_problem_level(),
                format!("daemon.json: {error}"),
                self.fix(Reason::RuntimeNotConfigured),
            ),
        }
    }

    pub(super) fn runtime_program(&self) -> Check {
        const ID: &str = "nvidia-runtime-program";
        let (name, path) = &self.facts.runtime;
        match path {
            Some(path) => Check::ok(ID, path),
            None if self.uses_cdi() => Check::ok(
                ID,
                format!("{name} is not installed, not required: the GPU is injected by CDI"),
            ),
            None if !self.is_gpu_enabled() => {
                Check::ok(ID, format!("{name} is not installed; the GPU is not enabled"))
            }
            None => Check::error(
                ID,
                format!("{name} is not installed: Docker cannot inject the GPU"),
                self.fix(Reason::RuntimeMissing),
            ),
        }
    }

    pub(super) fn cdi(&self) -> Check {
        const ID: &str = "cdi";
        const FIX: &str = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml; Docker before \
                           28.2 also needs \"features\": {\"cdi\": true} in daemon.json and a \
                           restart";
        let devices = self.cdi_devices();
        if !devices.is_empty() {
            return Check::ok(ID, format!("Docker reports {}", devices.join(", ")));
        }
        match (&self.facts.cdi_specs, self.facts.injection) {
            (Err(why), _) => Check::unknown(ID, why, RUN_AS_ROOT),
            (Ok(specs), Injection::Cdi) if specs.is_empty() => Check::problem(
                ID,
                self.gpu_problem_level(),
                "injection is cdi in agent.toml, but there is no CDI specification for \
                 nvidia.com/gpu",
                FIX,
            ),
            (Ok(specs), _) if specs.is_empty() => {
                Check::ok(ID, "no CDI specification for nvidia.com/gpu: the nvidia runtime is used")
            }
            (Ok(specs), _) => {
                Check::ok(ID, format!("{}; Docker does not report its devices", specs.join(", ")))
            }
        }
    }

    /// Returns the NVIDIA devices that Docker resolves by CDI.
    fn cdi_devices(&self) -> Vec<&str> {
        let devices =
            self.facts.engine.as_ref().map(|info| info.cdi_devices.as_slice()).unwrap_or_default();
        devices
            .iter()
            .map(String::as_str)
            .filter(|device| device.starts_with("nvidia.com/gpu="))
            .collect()
    }

    /// Returns whether the GPU is injected by CDI, without the nvidia runtime.
    fn uses_cdi(&self) -> bool {
        match self.facts.injection {
            Injection::Cdi => true,
            Injection::Auto => !self.cdi_devices().is_empty(),
            Injection::Runtime => false,
        }
    }

    pub(super) fn image(&self) -> Check {
        const ID: &str = "image";
        let Some((wanted, is_local)) = self.facts.images.first() else {
            return Check::unknown(
                ID,
                "the configuration does not determine the image",
                FIX_CONFIGURATION,
            );
        };
        let prebaked = self.facts.images.get(1);
        match (is_local, prebaked) {
            (Ok(true), _) => Check::ok(ID, format!("{wanted} is available locally")),
            (Err(why), _) => {
                Check::unknown(ID, format!("cannot look for {wanted} in Docker: {why}"), FIX_DOCKER)
            }
            (Ok(false), Some((prebaked, Ok(true)))) => {
                let finding = format!(
                    "{wanted} is not available locally and will be pulled; if that fails, the \
                     prebaked {prebaked} is used"
                );
                Check::warning(
                    ID,
                    finding,
                    format!(
                        "docker pull {wanted}, or remove FLOWER_VERSION and ML_FRAMEWORK from the \
                         CONTEXT"
                    ),
                )
            }
            (Ok(false), _) => {
                let finding =
                    format!("{wanted} is not available locally: the first start must pull it");
                Check::warning(
                    ID,
                    finding,
                    format!(
                        "docker pull {wanted} (or docker load), or set FL_SUPERNODE_IMAGE to an \
                         available image"
                    ),
                )
            }
        }
    }

    pub(super) fn disk(&self) -> Check {
        const ID: &str = "disk";
        /// With less, Docker cannot start containers.
        const MIN_BYTES: u64 = GIB / 2;
        const FIX: &str = "docker image prune, or resize the disk: onevm disk-resize VM 0 SIZE, \
                           then growpart and resize2fs in the VM";
        let (dir, free) = &self.facts.disk;
        let free = match free {
            Ok(free) => *free,
            Err(why) => return Check::unknown(ID, why, RUN_AS_ROOT),
        };
        let finding = format!("{:.1} GiB free in {dir}", free as f64 / GIB as f64);
        let has_image = matches!(self.facts.images.first(), Some((_, Ok(true))));
        let (needed, framework) = self.image_gib();
        if free < MIN_BYTES {
            Check::error(ID, finding, FIX)
        } else if !has_image && free < needed * GIB {
            Check::warning(
                ID,
                format!("{finding}; unpacking the {framework} image takes about {needed} GiB"),
                FIX,
            )
        } else {
            Check::ok(ID, finding)
        }
    }

    /// Returns the space for unpacking the framework's image, each layer of which briefly exists
    /// twice. Rounded up from the CUDA builds of 2025 (PyTorch: about 4 GiB packed, 8 GiB
    /// unpacked).
    fn image_gib(&self) -> (u64, &'static str) {
        match self.config().map_or(Framework::PyTorch, |config| config.framework) {
            Framework::PyTorch => (14, "pytorch"),
            Framework::TensorFlow => (10, "tensorflow"),
            Framework::Sklearn => (3, "sklearn"),
            Framework::Base => (2, "base"),
        }
    }
}
