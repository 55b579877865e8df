//! The desired state: the operator's configuration. A reload compares the current with the new one.

use std::path::Path;
use std::time::SystemTime;

use one_context::Context;
use one_context::source::{SourceError, read_context};

use super::error::DaemonError;
use crate::config::settings::Settings;
use crate::config::{Config, Diagnostics};
use crate::opennebula::onegate::{OneGateAccess, OneGateAvailability, OneGateUnavailable};
use crate::opennebula::superlink;
use crate::system::blocking::run_blocking;

/// The configuration of the node: context variables, settings and access to OneGate.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DesiredState {
    pub config: Config,
    pub settings: Settings,
    pub onegate: Result<OneGateAccess, OneGateUnavailable>,
}

impl DesiredState {
    /// Validates the context and logs its diagnostics.
    pub(super) fn new(context: &Context, settings: Settings) -> Result<Self, DaemonError> {
        let (config, diagnostics) = Config::read(context, &settings.container.prebaked_dir)?;
        log_diagnostics(&diagnostics);
        let onegate = OneGateAccess::new(context, &settings);
        superlink::check_config(availability(&onegate), &config, SystemTime::now())?;
        Ok(Self { config, settings, onegate })
    }

    /// Reads agent.toml and the context again. Returns the new state, or `None` if nothing changed
    /// or the new configuration is invalid, which is logged.
    pub(super) async fn reload(&self, settings_file: Option<&Path>) -> Option<Self> {
        match Self::read(settings_file).await {
            Ok(new) if new == *self => {
                tracing::info!("reload: the configuration is unchanged");
                None
            }
            Ok(new) => {
                tracing::info!("reload: the configuration has changed; applying it");
                Some(new)
            }
            Err(error) => {
                error.log();
                tracing::error!(
                    "reload: the new configuration is invalid; the node keeps the previous one"
                );
                None
            }
        }
    }

    async fn read(settings_file: Option<&Path>) -> Result<Self, DaemonError> {
        let settings = Settings::load(settings_file)?;
        let context = read_context_file(&settings).await?;
        Self::new(&context, settings)
    }
}

/// Reads the context. Takes up to a second if one-context is still writing it.
pub(super) async fn read_context_file(settings: &Settings) -> Result<Context, SourceError> {
    let dir = settings.context.dir.clone();
    run_blocking(move || read_context(&dir)).await
}

/// Returns the OneGate client of an access, or why there is none.
pub(super) fn availability(
    onegate: &Result<OneGateAccess, OneGateUnavailable>,
) -> OneGateAvailability<'_> {
    onegate.as_ref().map(OneGateAccess::client)
}

fn log_diagnostics(diagnostics: &Diagnostics) {
    for line in diagnostics.warnings() {
        tracing::warn!("{line}");
    }
    for line in diagnostics.ineffective.iter().chain(&diagnostics.notes) {
        tracing::info!("{line}");
    }
}
