//! The `status` command: state of the container from Docker, status of the agent from its status
//! file.

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

/// Current state of the node.
pub(super) struct Status {
    name: String,
    /// The container, or why Docker could not be queried.
    container: Result<Option<Container>, String>,
    agent_runs: bool,
    report: Option<StatusReport>,
    distribution: Distribution,
}

impl Status {
    /// Queries Docker and reads the status file.
    pub(super) async fn read(settings: &Settings) -> Self {
        const TIMEOUT: Duration = Duration::from_secs(10);
        let name = settings.container.name.clone();
        let inspect = async {
            Client::connect(&settings.docker.socket).await?.inspect_container(&name).await
        };
        let container = match tokio::time::timeout(TIMEOUT, inspect).await {
            Ok(answer) => answer.map_err(|error: EngineError| error.to_string()),
            Err(_) => Err(format!("no response from Docker within {} s", TIMEOUT.as_secs())),
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

    /// Whether the agent's container runs and is not paused.
    pub(super) fn is_ready(&self) -> bool {
        self.container.as_ref().ok().and_then(Option::as_ref).is_some_and(|container| {
            container.running && !container.paused && container.spec_hash().is_some()
        })
    }

    /// State of the container in one line.
    pub(super) fn headline(&self) -> String {
        let name = &self.name;
        match &self.container {
            Err(why) => format!("cannot query {name}: {why}"),
            Ok(None) => format!("{name} is not running: no such container"),
            Ok(Some(found)) if found.spec_hash().is_none() => {
                format!("{name} was not created by supernode-agent")
            }
            Ok(Some(found)) if found.paused => format!("{name} is paused: docker unpause {name}"),
            Ok(Some(found)) if found.running => {
                format!("{name} is running since {}", to_seconds(&found.started_at))
            }
            Ok(Some(found)) => {
                format!("{name} is not running: exited with code {}", found.exit_code)
            }
        }
    }

    /// The agent's verdict or, if there is none, the verdict in the container's labels.
    fn verdict(&self) -> Json {
        let reported =
            self.report.as_ref().map(|report| &report.verdict).filter(|verdict| !verdict.is_null());
        if let Some(verdict) = reported {
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
                let summary = label(SUMMARY_LABEL);
                json!({"device": device, "reason": reason, "summary": summary, "fix": fix})
            }
            None => Json::Null,
        }
    }

    /// State of the DCGM exporter; `None` if no agent supervises it.
    fn exporter(&self) -> Option<&str> {
        self.report.as_ref().filter(|_| self.agent_runs)?.exporter.as_deref()
    }

    /// Whether the node is connected, as far as a running agent reports it.
    fn is_connected(&self) -> bool {
        let reported = self.report.as_ref().is_some_and(|report| report.connected);
        self.is_ready() && self.agent_runs && reported
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
            "connected": self.is_connected(),
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

    /// The rows of the text output.
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
        for device in device_rows(verdict["devices"].as_array().map_or(&[], Vec::as_slice)) {
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
                (false, _) => (Level::Warning, "connection unknown"),
            };
            let partition = report.partition.map_or(String::new(), |Partition { id, count }| {
                format!("; partition {id} of {count}")
            });
            row(Some(level), "SuperLink", format!("{superlink}, {connected}{partition}"));
        }
        if let Some(exporter) = self.exporter() {
            row(None, "DCGM", exporter.into());
        }
        let since = to_seconds(&report.since);
        // The device row shows the finding.
        let status = fallback
            .map_or(report.status.clone(), |finding| report.status.replacen(&finding, "", 1));
        if self.agent_runs {
            row(None, "Agent", format!("{status} (since {since}, process {})", report.pid));
        } else {
            row(
                Some(Level::Error),
                "Agent",
                format!("not running; last status at {since}: {status}"),
            );
        }
        rows
    }

    /// Text output: wrapped to the width of a terminal, else one line for each row.
    pub(super) fn to_text(&self, terminal: Option<&Terminal>) -> String {
        self.rows().iter().map(|row| row.to_text(terminal)).collect()
    }
}

/// One row of the text output.
struct Row {
    /// Selects the colour of the label.
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

/// One row for each GPU; more than two share a row.
fn device_rows(devices: &[Json]) -> Vec<String> {
    const MAX_ROWS: usize = 2;
    let text = |device: &Json, key: &str| device[key].as_str().unwrap_or_default().to_owned();
    let name = |device: &Json| device["name"].as_str().unwrap_or("GPU").to_owned();
    if devices.len() <= MAX_ROWS {
        let row = |device| {
            format!("{} ({}, {})", name(device), text(device, "uuid"), text(device, "pci_address"))
        };
        return devices.iter().map(row).collect();
    }
    let mut names: Vec<String> = devices.iter().map(name).collect();
    names.dedup();
    let addresses: Vec<String> = devices.iter().map(|device| text(device, "pci_address")).collect();
    vec![format!("{} GPUs: {} ({})", devices.len(), names.join(", "), addresses.join(", "))]
}

/// The terminal that stdout is connected to.
pub(super) struct Terminal {
    columns: usize,
    is_coloured: bool,
}

impl Terminal {
    /// Returns `None` if stdout is a file or a pipe.
    pub(super) fn of_stdout() -> Option<Self> {
        const DEFAULT_COLUMNS: usize = 80;
        if !io::stdout().is_terminal() {
            return None;
        }
        let columns = rustix::termios::tcgetwinsize(rustix::stdio::stdout())
            .map_or(0, |size| size.ws_col.into());
        let columns = if columns == 0 { DEFAULT_COLUMNS } else { columns };
        Some(Self { columns, is_coloured: std::env::var_os("NO_COLOR").is_none() })
    }
}

/// Refreshes the output until SIGINT, SIGTERM, or the reader of stdout closes it. Output is printed
/// only when it changes; a terminal is cleared first.
pub(super) async fn watch(settings: &Settings, json: bool, out: &mut dyn Write) -> io::Result<()> {
    const INTERVAL: Duration = Duration::from_secs(2);
    const CLEAR_SCREEN: &str = "\x1b[H\x1b[2J";
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut printed = String::new();
    let show = async {
        while !stdout_is_closed() {
            let status = Status::read(settings).await;
            // Read each time, because the window can be resized.
            let terminal = Terminal::of_stdout().filter(|_| !json);
            let text = if json {
                format!("{}\n", status.to_json())
            } else {
                status.to_text(terminal.as_ref())
            };
            if text != printed {
                let before = match (&terminal, json || printed.is_empty()) {
                    (Some(_), _) => CLEAR_SCREEN,
                    (None, true) => "",
                    (None, false) => "\n",
                };
                write!(out, "{before}{text}")?;
                out.flush()?;
                printed = text;
            }
            tokio::time::sleep(INTERVAL).await;
        }
        Ok(())
    };
    tokio::select! {
        ended = show => ended,
        _ = interrupted.recv() => Ok(()),
        _ = terminated.recv() => Ok(()),
    }
}

/// Whether the reader of stdout has closed it. A write would fail as well, but there may be nothing
/// to write for hours.
fn stdout_is_closed() -> bool {
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

    fn status(verdict: Json, line: &str) -> Status {
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
            status: line.into(),
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
        let gpu = |n| {
            json!({
                "name": "NVIDIA A100",
                "uuid": "GPU-11111111-2222-3333-4444-555555555555",
                "pci_address": format!("0000:0{n}:00.0"),
            })
        };
        json!({"device": "cuda", "devices": (1..=count).map(gpu).collect::<Vec<_>>()})
    }

    fn fallback(reason: &str, fix: &str) -> Status {
        let summary = "OpenNebula passed 0000:01:00.0 to this VM (PCI0_ADDRESS='01:00.0'), \
                       and there is no device at that address";
        let verdict = json!({"device": "cpu", "reason": reason, "summary": summary, "fix": fix});
        status(
            verdict,
            &format!("Running on the CPU: {reason}: {summary}; connected to 10.9.8.7:9092"),
        )
    }

    #[test]
    fn fallback_is_wrapped_to_the_terminal() {
        let fix = "on the host, bind every function of the card to vfio-pci \
                   (driverctl set-override ADDRESS vfio-pci), \
                   check the PCI attribute of the VM template, then onevm terminate VMID";
        let text = fallback("gpu-not-passed-through", fix).to_text(Some(&TERMINAL));
        assert_eq!(
            text,
            "\
Container  flower-supernode is running since 2026-11-24T14:40:02Z
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
    fn many_gpus_fit_ten_lines_of_eighty_columns() {
        for count in 1..=16 {
            let text = status(gpus(count), "Running on NVIDIA A100").to_text(Some(&TERMINAL));
            assert!(
                text.lines().count() <= 10 && text.lines().all(|line| line.chars().count() <= 80),
                "{text}"
            );
        }
    }

    #[test]
    fn fix_is_printed_in_full_beside_seven_lines() {
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
    fn pipe_gets_one_line_per_row_without_colour() {
        let text = fallback("gpu-lost", &"a word ".repeat(100)).to_text(None);
        assert_eq!(text.lines().count(), 6, "{text}");
        assert!(!text.contains('\x1b'));
        let coloured = Terminal { columns: 80, is_coloured: true };
        assert!(fallback("gpu-lost", "x").to_text(Some(&coloured)).contains("\x1b[33mDevice"));
    }
}
