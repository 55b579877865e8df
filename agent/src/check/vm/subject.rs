//! The VM that is checked.

use super::facts::VmFacts;
use crate::check::Level;
use crate::config::Config;
use crate::gpu::reason::Reason;
use crate::system::os_release::Distribution;

pub(super) const GIB: u64 = 1 << 30;
pub(super) const RUN_AS_ROOT: &str = "run it as root, in the VM itself";
pub(super) const FIX_CONFIGURATION: &str = "fix configuration first";
pub(super) const FIX_DOCKER: &str = "fix docker first";

pub(super) struct Vm<'a> {
    pub(super) facts: &'a VmFacts,
    pub(super) distribution: Distribution,
}

impl Vm<'_> {
    pub(super) fn config(&self) -> Option<&Config> {
        self.facts.config.as_ref().ok().map(|(config, _)| config)
    }

    /// Returns whether the GPU is enabled; assumed if the configuration is invalid.
    pub(super) fn is_gpu_enabled(&self) -> bool {
        self.config().is_none_or(|config| config.gpu.enabled)
    }

    /// Returns the level of a problem that prevents the use of the GPU.
    pub(super) fn gpu_problem_level(&self) -> Level {
        if self.is_gpu_enabled() { Level::Error } else { Level::Warning }
    }

    pub(super) fn fix(&self, reason: Reason) -> &'static str {
        reason.fix(self.distribution)
    }
}
