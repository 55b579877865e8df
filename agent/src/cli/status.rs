//! What `status` says: what the container engine shows, and what the agent reports of itself.

use std::io::{self, Write};
use std::time::Duration;

use serde_json::{Value as Json, json};

use crate::distribution::Distribution;
use crate::docker::engine::{Container, Engine, EngineError};
use crate::gpu::reason::Reason;
use crate::lock;
use crate::partition::Partition;
use crate::plan::{REASON_LABEL, SUMMARY_LABEL, VERDICT_LABEL};
use crate::report::Report;
use crate::settings::Settings;

/// The node at this moment.
pub(super) struct Status {
    name: String,
    /// The container, or why it is not known whether there is one.
    container: Result<Option<Container>, String>,
    agent_runs: bool,
    report: Option<Report>,
    distribution: Distribution,
}

impl Status {
    pub(super) async fn look(settings: &Settings) -> Self {
        const PATIENCE: Duration = Duration::from_secs(10);
        let name = settings.container.name.clone();
        let look = async { Engine::connect(&settings.docker.socket).await?.find_container(&name).await };
        let container = match tokio::time::timeout(PATIENCE, look).await {
            Ok(answer) => answer.map_err(|error: EngineError| error.to_string()),
            Err(_) => Err(format!("the Docker engine gave no answer within {} s", PATIENCE.as_secs())),
        };
        let state_dir = &settings.state.dir;
        Self {
            name,
            container,
            agent_runs: lock::is_held(state_dir),
            report: Report::read(state_dir),
            distribution: Distribution::read(&settings.machine.root),
        }
    }

    /// Whether the node's container runs: ours, and not paused.
    pub(super) fn is_ready(&self) -> bool {
        matches!(&self.container, Ok(Some(found)) if found.running && !found.paused && found.spec_hash().is_some())
    }

    /// The state of the container in one line.
    pub(super) fn headline(&self) -> String {
        let name = &self.name;
        match &self.container {
            Err(why) => format!("it is not known whether {name} runs: {why}"),
            Ok(None) => format!("{name} does not run: there is no such container"),
            Ok(Some(found)) if found.spec_hash().is_none() => format!("{name} is a container of somebody else"),
            Ok(Some(found)) if found.paused => format!("{name} is paused: docker unpause {name}"),
            Ok(Some(found)) if found.running => format!("{name} runs since {}", to_seconds(&found.started_at)),
            Ok(Some(found)) => format!("{name} does not run: it ended with exit code {}", found.exit_code),
        }
    }

    /// The verdict as the agent has it now, else as the container was launched with.
    fn verdict(&self) -> Json {
        let of_report = self.report.as_ref().map(|report| &report.verdict).filter(|verdict| !verdict.is_null());
        if let Some(verdict) = of_report {
            return verdict.clone();
        }
        let Ok(Some(found)) = &self.container else {
            return Json::Null;
        };
        let label = |name: &str| found.labels.get(name);
        match label(VERDICT_LABEL) {
            Some(device) => {
                let reason = label(REASON_LABEL);
                let fix = reason.and_then(|code| Reason::from_code(code)).map(|reason| reason.fix(self.distribution));
                json!({"device": device, "reason": reason, "summary": label(SUMMARY_LABEL), "fix": fix})
            }
            None => Json::Null,
        }
    }

    /// How the DCGM exporter is doing, as far as an agent looks after it.
    fn exporter(&self) -> Option<&str> {
        self.report.as_ref().filter(|_| self.agent_runs)?.exporter.as_deref()
    }

    pub(super) fn to_json(&self) -> Json {
        let container = self.container.as_ref().ok().and_then(Option::as_ref).map(|found| {
            json!({
                "name": self.name,
                "id": found.id,
                "image": found.image,
                "running": found.running,
                "paused": found.paused,
                "started_at": found.started_at,
                "exit_code": found.exit_code,
            })
        });
        let report = self.report.as_ref();
        json!({
            "ready": self.is_ready(),
            "container": container,
            "gpu": {"verdict": self.verdict()},
            "superlink": report.and_then(|report| report.superlink.as_ref()),
            "connected": self.is_ready() && self.agent_runs && report.is_some_and(|report| report.connected),
            "partition": report.and_then(|report| report.partition),
            "dcgm": self.exporter(),
            "agent": {
                "running": self.agent_runs,
                "pid": report.filter(|_| self.agent_runs).map(|report| report.pid),
                "version": report.map(|report| &report.version),
                "status": report.map(|report| &report.status),
                "since": report.map(|report| &report.since),
            },
            "notes": self.container.as_ref().err().into_iter().collect::<Vec<_>>(),
        })
    }

    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "Container  {}", self.headline())?;
        if let Ok(Some(found)) = &self.container {
            writeln!(out, "Image      {}", found.image)?;
        }
        let verdict = self.verdict();
        let text = |key: &str| verdict[key].as_str();
        for device in verdict["devices"].as_array().into_iter().flatten() {
            let name = device["name"].as_str().unwrap_or("GPU");
            let [uuid, address] = ["uuid", "pci_address"].map(|key| device[key].as_str().unwrap_or_default());
            writeln!(out, "Device     {name} ({uuid}, {address})")?;
        }
        match (text("device"), text("reason")) {
            (Some("cpu"), Some(reason)) => {
                writeln!(out, "Device     cpu: {reason}: {}", text("summary").unwrap_or_default())?;
            }
            (Some("cpu"), None) => writeln!(out, "Device     cpu (FL_GPU_ENABLED is not YES)")?,
            _ => {}
        }
        if let Some(fix) = text("fix") {
            writeln!(out, "Fix        {fix}")?;
        }
        let Some(report) = &self.report else {
            return writeln!(out, "Agent      not running");
        };
        if let Some(superlink) = &report.superlink {
            let connected = match (self.agent_runs, report.connected) {
                (true, true) => "connected",
                (true, false) => "not connected",
                (false, _) => "it is not known whether it is connected",
            };
            let share = report
                .partition
                .map_or(String::new(), |Partition { id, count }| format!("; partition {id} of {count}"));
            writeln!(out, "SuperLink  {superlink}, {connected}{share}")?;
        }
        if let Some(exporter) = self.exporter() {
            writeln!(out, "DCGM       {exporter}")?;
        }
        let since = to_seconds(&report.since);
        if self.agent_runs {
            writeln!(out, "Agent      {} (since {since}, process {})", report.status, report.pid)
        } else {
            writeln!(out, "Agent      not running; its last words, {since}: {}", report.status)
        }
    }
}

/// `2026-11-24T14:40:02.937353Z` without the fraction.
fn to_seconds(time: &str) -> String {
    match time.split_once('.') {
        Some((seconds, _)) => format!("{seconds}Z"),
        None => time.into(),
    }
}
