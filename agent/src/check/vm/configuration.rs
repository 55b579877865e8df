//! Checks of the settings and the context.

use super::facts::Unconfigured;
use super::subject::Vm;
use crate::check::Check;

impl Vm<'_> {
    pub(super) fn settings(&self) -> Check {
        match &self.facts.settings_error {
            None => Check::ok("settings", "the settings are valid"),
            Some(why) => Check::error(
                "settings",
                why,
                "correct agent.toml (man agent.toml); the other checks use the defaults",
            ),
        }
    }

    pub(super) fn configuration(&self) -> Vec<Check> {
        const ID: &str = "configuration";
        match &self.facts.config {
            Err(Unconfigured::NoContext(why)) => {
                let fix = "run it as root; if the VM has no context, install OpenNebula's \
                           one-context package, add a CONTEXT to the VM template and reboot; \
                           systemctl status one-context-local shows errors";
                vec![Check::error(ID, why, fix)]
            }
            Err(Unconfigured::Invalid(errors)) => {
                let fix = "correct the CONTEXT of the VM (onevm updateconf VM); \
                           supernode-agent variables lists the accepted values";
                errors.iter().map(|error| Check::error(ID, error, fix)).collect()
            }
            Ok((_, diagnostics)) if diagnostics.warnings().next().is_none() => {
                vec![Check::ok(ID, "the context is readable and its variables are valid")]
            }
            Ok((_, diagnostics)) => diagnostics
                .warnings()
                .map(|warning| {
                    Check::warning(
                        ID,
                        warning,
                        "correct the CONTEXT of the VM (onevm updateconf VM)",
                    )
                })
                .collect(),
        }
    }
}
