//! What `status` says: what the container engine shows, and what the agent reports of itself.

use std::io::{self, IsTerminal as _, Write};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::{Value as Json, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::check::Level;
use crate::config::settings::Settings;
use crate::docker::client::{Client, Container, EngineError};
use crate::docker::spec::{REASON_LABEL, SUMMARY_LABEL, VERDICT_LABEL};
use crate::gpu::reason::Reason;
use crate::opennebula::partition::Partition;
use crate::report::StatusReport;
use crate::system::lock;
use crate::system::os_release::Distribution;
use crate::system::time::to_seconds;

/// The node at this moment.
pub(super) struct Status {
    name: String,
    /// The container, or why it is not known whether there is one.
    container: Result<Option<Container>, String>,
    agent_runs: bool,
    report: Option<StatusReport>,
    distribution: Distribution,
}

impl Status {
    pub(super) async fn look(settings: &Settings) -> Self {
        const TIMEOUT: Duration = Duration::from_secs(10);
        let name = settings.container.name.clone();
        let look = async {
            Client::connect(&settings.docker.socket).await?.inspect_container(&name).await
        };
        let container = match tokio::time::timeout(TIMEOUT, look).await {
            Ok(answer) => answer.map_err(|error: EngineError| error.to_string()),
            Err(_) => {
                Err(format!("the Docker engine gave no answer within {} s", TIMEOUT.as_secs()))
            }
        };
        let state_dir = &settings.state.dir;
        Self {
            name,
            container,
            agent_runs: lock::is_held(state_dir),
            report: StatusReport::read(state_dir),
            distribution: Distribution::read(&settings.system.root),
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
            Ok(Some(found)) if found.spec_hash().is_none() => {
                format!("{name} is a container of somebody else")
            }
            Ok(Some(found)) if found.paused => format!("{name} is paused: docker unpause {name}"),
            Ok(Some(found)) if found.running => {
                format!("{name} runs since {}", to_seconds(&found.started_at))
            }
            Ok(Some(found)) => {
                format!("{name} does not run: it ended with exit code {}", found.exit_code)
            }
        }
    }

    /// The verdict as the agent has it now, else as the container was launched with.
    fn verdict(&self) -> Json {
        let of_report =
            self.report.as_ref().map(|report| &report.verdict).filter(|verdict| !verdict.is_null());
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
                let fix = reason
                    .and_then(|code| Reason::from_code(code))
                    .map(|reason| reason.fix(self.distribution));
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

    /// What a person wants to know, each thing with its label.
    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        let mut row = |level, label, text: String| rows.push(Row { level, label, text });
        let runs = if self.is_ready() { Level::Ok } else { Level::Error };
        row(Some(runs), "Container", self.headline());
        if let Ok(Some(found)) = &self.container {
            row(None, "Image", found.image.clone());
        }
        let verdict = self.verdict();
        let text = |key: &str| verdict[key].as_str();
        for device in devices(verdict["devices"].as_array().map_or(&[], Vec::as_slice)) {
            row(Some(Level::Ok), "Device", device);
        }
        let mut fallback = None;
        match (text("device"), text("reason")) {
            (Some("cpu"), Some(reason)) => {
                let finding = format!("{reason}: {}", text("summary").unwrap_or_default());
                row(Some(Level::Warning), "Device", format!("cpu: {finding}"));
                fallback = Some(format!(": {finding}"));
            }
            (Some("cpu"), None) => row(None, "Device", "cpu (FL_GPU_ENABLED is not YES)".into()),
            _ => {}
        }
        if let Some(fix) = text("fix") {
            row(None, "Fix", fix.into());
        }
        let Some(report) = &self.report else {
            row(Some(Level::Error), "Agent", "not running".into());
            return rows;
        };
        if let Some(superlink) = &report.superlink {
            let (level, connected) = match (self.agent_runs, report.connected) {
                (true, true) => (Level::Ok, "connected"),
                (true, false) => (Level::Warning, "not connected"),
                (false, _) => (Level::Warning, "it is not known whether it is connected"),
            };
            let share = report.partition.map_or(String::new(), |Partition { id, count }| {
                format!("; partition {id} of {count}")
            });
            row(Some(level), "SuperLink", format!("{superlink}, {connected}{share}"));
        }
        if let Some(exporter) = self.exporter() {
            row(None, "DCGM", exporter.into());
        }
        let since = to_seconds(&report.since);
        // The row of the device has the finding.
        let status = fallback
            .map_or(report.status.clone(), |finding| report.status.replacen(&finding, "", 1));
        if self.agent_runs {
            row(None, "Agent", format!("{status} (since {since}, process {})", report.pid));
        } else {
            row(
                Some(Level::Error),
                "Agent",
                format!("not running; its last words, {since}: {status}"),
            );
        }
        rows
    }

    /// The text: on a terminal as wide as that, elsewhere a line for each thing.
    pub(super) fn to_text(&self, terminal: Option<&Terminal>) -> String {
        self.rows().iter().map(|row| row.to_text(terminal)).collect()
    }
}

/// One thing that a person wants to know.
struct Row {
    /// The colour of the label, where it has one.
    level: Option<Level>,
    label: &'static str,
    text: String,
}

impl Row {
    fn to_text(&self, terminal: Option<&Terminal>) -> String {
        const LABEL: usize = 11;
        let label = format!("{:<LABEL$}", self.label);
        let label = match self.level {
            Some(level) if terminal.is_some_and(|terminal| terminal.is_coloured) => {
                level.coloured(&label)
            }
            _ => label,
        };
        let width =
            terminal.map_or(usize::MAX, |terminal| terminal.columns.saturating_sub(LABEL).max(20));
        let mut text = label;
        let mut column = 0;
        for word in self.text.split(' ') {
            let length = word.chars().count();
            if column > 0 && column + 1 + length > width {
                text.push_str(&format!("\n{:LABEL$}", ""));
                column = 0;
            }
            if column > 0 {
                text.push(' ');
                column += 1;
            }
            text.push_str(word);
            column += length;
        }
        text + "\n"
    }
}

/// The GPUs, a row for each; of many, one row.
fn devices(found: &[Json]) -> Vec<String> {
    const MAX_ROWS: usize = 2;
    let text = |device: &Json, key: &str| device[key].as_str().unwrap_or_default().to_owned();
    let name = |device: &Json| device["name"].as_str().unwrap_or("GPU").to_owned();
    if found.len() <= MAX_ROWS {
        let row = |device| {
            format!("{} ({}, {})", name(device), text(device, "uuid"), text(device, "pci_address"))
        };
        return found.iter().map(row).collect();
    }
    let mut names: Vec<String> = found.iter().map(name).collect();
    names.dedup();
    let addresses: Vec<String> = found.iter().map(|device| text(device, "pci_address")).collect();
    vec![format!("{} GPUs: {} ({})", found.len(), names.join(", "), addresses.join(", "))]
}

/// The terminal that a person looks at.
pub(super) struct Terminal {
    columns: usize,
    is_coloured: bool,
}

impl Terminal {
    /// The one behind stdout; `None` where a file or a program reads.
    pub(super) fn of_stdout() -> Option<Self> {
        const USUAL: usize = 80;
        if !io::stdout().is_terminal() {
            return None;
        }
        let columns = rustix::termios::tcgetwinsize(rustix::stdio::stdout())
            .map_or(0, |size| size.ws_col.into());
        let columns = if columns == 0 { USUAL } else { columns };
        Some(Self { columns, is_coloured: std::env::var_os("NO_COLOR").is_none() })
    }
}

/// Shows the node until SIGINT or SIGTERM: on a terminal in place, elsewhere whenever something has
/// changed, for as long as somebody reads.
pub(super) async fn watch(settings: &Settings, json: bool, out: &mut dyn Write) -> io::Result<()> {
    const EACH: Duration = Duration::from_secs(2);
    const TO_THE_TOP_AND_CLEAR: &str = "\x1b[H\x1b[2J";
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut shown = String::new();
    let show = async {
        while !is_deserted() {
            let status = Status::look(settings).await;
            // It is looked for each time: a window changes its size.
            let terminal = Terminal::of_stdout().filter(|_| !json);
            let text = if json {
                format!("{}\n", status.to_json())
            } else {
                status.to_text(terminal.as_ref())
            };
            if text != shown {
                let before = match (&terminal, json || shown.is_empty()) {
                    (Some(_), _) => TO_THE_TOP_AND_CLEAR,
                    (None, true) => "",
                    (None, false) => "\n",
                };
                write!(out, "{before}{text}")?;
                out.flush()?;
                shown = text;
            }
            tokio::time::sleep(EACH).await;
        }
        Ok(())
    };
    tokio::select! {
        ended = show => ended,
        _ = interrupted.recv() => Ok(()),
        _ = terminated.recv() => Ok(()),
    }
}

/// Whether nobody reads our stdout any more. A write would tell, and there may be nothing to write
/// for hours.
fn is_deserted() -> bool {
    let mut stdout = [PollFd::from_borrowed_fd(rustix::stdio::stdout(), PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut stdout, Some(&now)).is_ok()
        && stdout[0].revents().intersects(PollFlags::ERR | PollFlags::HUP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::reason::CATALOGUE;

    const NOW: &str = "2026-11-24T14:40:02.937353Z";
    const TERMINAL: Terminal = Terminal { columns: 80, is_coloured: false };

    fn status(verdict: Json, words: &str) -> Status {
        let labels = [(crate::docker::spec::SPEC_HASH_LABEL.to_owned(), "0".to_owned())];
        let container = Container {
            id: "9c255f65bd31".into(),
            running: true,
            pid: 1,
            paused: false,
            started_at: NOW.into(),
            exit_code: 0,
            image: "flower-supernode-pytorch:1.31.0".into(),
            image_id: String::new(),
            ip_address: None,
            labels: labels.into(),
        };
        let report = StatusReport {
            version: "0.1.0".into(),
            pid: 812,
            status: words.into(),
            since: NOW.into(),
            verdict,
            superlink: Some("10.9.8.7:9092".into()),
            connected: true,
            partition: Some(Partition { id: 3, count: 5 }),
            exporter: None,
        };
        Status {
            name: "flower-supernode".into(),
            container: Ok(Some(container)),
            agent_runs: true,
            report: Some(report),
            distribution: Distribution::Debian,
        }
    }

    fn gpus(count: usize) -> Json {
        let gpu = |n| json!({"name": "NVIDIA A100", "uuid": "GPU-11111111-2222-3333-4444-555555555555", "pci_address": format!("0000:0{n}:00.0")});
        json!({"device": "cuda", "devices": (1..=count).map(gpu).collect::<Vec<_>>()})
    }

    fn fallback(reason: &str, fix: &str) -> Status {
        let summary = "OpenNebula passed 0000:01:00.0 to this VM (PCI0_ADDRESS='01:00.0'), and there is no device at that address";
        let verdict = json!({"device": "cpu", "reason": reason, "summary": summary, "fix": fix});
        status(
            verdict,
            &format!("Running on the CPU: {reason}: {summary}; connected to 10.9.8.7:9092"),
        )
    }

    #[test]
    fn a_fallback_in_a_terminal_is_wrapped_under_its_labels() {
        let fix = "on the host, bind every function of the card to vfio-pci (driverctl set-override ADDRESS vfio-pci), \
                   check the PCI attribute of the VM template, then onevm terminate VMID";
        let text = fallback("gpu-not-passed-through", fix).to_text(Some(&TERMINAL));
        assert_eq!(
            text,
            "\
Container  flower-supernode runs since 2026-11-24T14:40:02Z
Image      flower-supernode-pytorch:1.31.0
Device     cpu: gpu-not-passed-through: OpenNebula passed 0000:01:00.0 to this
           VM (PCI0_ADDRESS='01:00.0'), and there is no device at that address
Fix        on the host, bind every function of the card to vfio-pci (driverctl
           set-override ADDRESS vfio-pci), check the PCI attribute of the VM
           template, then onevm terminate VMID
SuperLink  10.9.8.7:9092, connected; partition 3 of 5
Agent      Running on the CPU; connected to 10.9.8.7:9092 (since
           2026-11-24T14:40:02Z, process 812)
"
        );
    }

    #[test]
    fn a_node_is_told_in_ten_lines_of_eighty_columns_whatever_its_gpus() {
        for count in 1..=16 {
            let text = status(gpus(count), "Running on NVIDIA A100").to_text(Some(&TERMINAL));
            assert!(
                text.lines().count() <= 10 && text.lines().all(|line| line.chars().count() <= 80),
                "{text}"
            );
        }
    }

    #[test]
    fn a_fix_is_whole_however_long_it_is_and_what_is_beside_it_is_seven_lines() {
        for entry in CATALOGUE {
            let fix = entry.fix.on(Distribution::Debian);
            let text = fallback(entry.code, fix).to_text(Some(&TERMINAL));
            let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(words(&text).contains(&words(fix)), "{text}");
            let of_fix = text
                .lines()
                .skip_while(|line| !line.starts_with("Fix"))
                .take_while(|line| !line.starts_with("SuperLink"));
            assert!(text.lines().count() - of_fix.count() <= 7, "{text}");
        }
    }

    #[test]
    fn a_program_gets_a_line_for_each_thing_and_no_colour() {
        let text = fallback("gpu-lost", &"a word ".repeat(100)).to_text(None);
        assert_eq!(text.lines().count(), 6, "{text}");
        assert!(!text.contains('\x1b'));
        let coloured = Terminal { columns: 80, is_coloured: true };
        assert!(fallback("gpu-lost", "x").to_text(Some(&coloured)).contains("\x1b[33mDevice"));
    }
}
