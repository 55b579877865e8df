//! The agent's own metrics: what is known of the node -> a page in Prometheus' text format. Pure;
//! [`serve`] puts it on the network.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant, SystemTime};

use crate::gpu::monitor_child::Reading;
use crate::gpu::verdict::{GpuDevice, Verdict};

/// What the GPU's watcher said longer ago than this is not known any more; it speaks every five
/// seconds.
const READING_HOLDS: Duration = Duration::from_secs(30);
/// More kinds of XIDs than the GPUs of a machine have: beyond them none is remembered.
const MAX_XIDS: usize = 1024;

/// What the page tells.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Values {
    /// Whether the container runs.
    pub up: bool,
    /// Whether Flower is connected to the SuperLink.
    pub connected: bool,
    /// When that changed last.
    pub connection_changed: Option<SystemTime>,
    /// `cuda` or `cpu`, and the code of the reason for a CPU that was not asked for, else empty.
    pub device: Option<(&'static str, &'static str)>,
    /// When the container was started.
    pub container_started: Option<SystemTime>,
    /// How often it was started again.
    pub restarts: u64,
    /// When last.
    pub restarted: Option<SystemTime>,
    /// The GPUs in use.
    pub gpus: Vec<Gpu>,
    /// XIDs of these and of earlier ones.
    pub xids: BTreeMap<XidOfGpu, Xids>,
}

/// A GPU in use.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gpu {
    /// `GPU-…` or `MIG-…`.
    pub uuid: String,
    /// The product's name; empty where it is not known.
    pub name: String,
    /// What NVML said last, and when.
    pub reading: Option<(Reading, Instant)>,
}

/// An XID of one GPU.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct XidOfGpu {
    /// The GPU's UUID.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// The number.
    pub xid: u64,
}

/// How often an XID came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Xids {
    /// How often.
    pub times: u64,
    /// When last.
    pub last: SystemTime,
}

impl Values {
    /// What the node runs on. What was read of a GPU that it goes on with stays.
    pub fn decided(&mut self, verdict: &Verdict) {
        self.device =
            Some((verdict.device(), verdict.finding().map_or("", |finding| finding.reason.code())));
        self.gpus = verdict.devices().iter().map(|device| self.gpu(device)).collect();
    }

    fn gpu(&self, device: &GpuDevice) -> Gpu {
        let known = self.gpus.iter().find(|gpu| gpu.uuid == device.uuid);
        Gpu {
            uuid: device.uuid.clone(),
            name: device.name.clone().unwrap_or_default(),
            reading: known.and_then(|gpu| gpu.reading),
        }
    }

    /// Whether Flower is connected.
    pub fn connected(&mut self, connected: bool) {
        if self.connected != connected {
            (self.connected, self.connection_changed) = (connected, Some(SystemTime::now()));
        }
    }

    /// The container runs, since this moment: another than before is a restart.
    pub fn runs(&mut self, started: Option<SystemTime>) {
        self.up = true;
        if self.container_started.is_some() && self.container_started != started {
            (self.restarts, self.restarted) = (self.restarts + 1, started);
        }
        self.container_started = started;
    }

    /// NVML told of a GPU in use.
    pub fn read(&mut self, uuid: &str, reading: Reading) {
        if let Some(gpu) = self.gpus.iter_mut().find(|gpu| gpu.uuid == uuid) {
            gpu.reading = Some((reading, Instant::now()));
        }
    }

    /// The driver told of an XID of a GPU, so many times.
    pub fn count_xid(&mut self, uuid: &str, xid: u64, times: u64) {
        let name = self
            .gpus
            .iter()
            .find(|gpu| gpu.uuid == uuid)
            .map_or_else(String::new, |gpu| gpu.name.clone());
        let kind = XidOfGpu { uuid: uuid.into(), name, xid };
        if self.xids.len() < MAX_XIDS || self.xids.contains_key(&kind) {
            let xids = self.xids.entry(kind).or_insert(Xids { times: 0, last: SystemTime::now() });
            *xids = Xids { times: xids.times.saturating_add(times), last: SystemTime::now() };
        }
    }
}

/// Takes the values of a metric's labels, in their order, and its value.
type Add<'a> = dyn FnMut(&[&str], f64) + 'a;

/// A metric, and how its samples come from the values.
#[derive(Debug)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// `gauge` or `counter`.
    pub kind: &'static str,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// What it is, in a sentence.
    pub help: &'static str,
    samples: fn(&Values, Instant, &mut Add<'_>),
}

const OF_NODE: &[&str] = &[];
const OF_GPU: &[&str] = &["uuid", "name"];
const OF_XID: &[&str] = &["uuid", "name", "xid"];

/// All metrics; packaging/grafana/metrics.txt has the same. Names as Prometheus asks for them: base
/// units, `_total` for counters, `_info` for a constant 1, and the moment of an event instead of
/// the time since (prometheus.io/docs/practices/{naming,instrumenting}).
pub const METRICS: &[Metric] = &[
    Metric {
        name: "supernode_agent_info",
        kind: "gauge",
        labels: &["version"],
        help: "The agent's version.",
        samples: |_, _, add| add(&[env!("CARGO_PKG_VERSION")], 1.0),
    },
    Metric {
        name: "supernode_up",
        kind: "gauge",
        labels: OF_NODE,
        help: "1 while the container runs, else 0.",
        samples: |values, _, add| add(&[], values.up.into()),
    },
    Metric {
        name: "supernode_connected",
        kind: "gauge",
        labels: OF_NODE,
        help: "1 while Flower is connected to the SuperLink, else 0.",
        samples: |values, _, add| add(&[], values.connected.into()),
    },
    Metric {
        name: "supernode_connection_last_change_timestamp_seconds",
        kind: "gauge",
        labels: OF_NODE,
        help: "When the connection to the SuperLink came or went last, in seconds since 1970.",
        samples: |values, _, add| at(values.connection_changed, &[], add),
    },
    Metric {
        name: "supernode_device_info",
        kind: "gauge",
        labels: &["device", "reason"],
        help: "The device (cuda or cpu) that the node runs on, and the code of the reason for a CPU that was not asked for, else empty.",
        samples: |values, _, add| {
            if let Some((device, reason)) = values.device {
                add(&[device, reason], 1.0);
            }
        },
    },
    Metric {
        name: "supernode_container_start_time_seconds",
        kind: "gauge",
        labels: OF_NODE,
        help: "When the container was started, in seconds since 1970.",
        samples: |values, _, add| at(values.container_started.filter(|_| values.up), &[], add),
    },
    Metric {
        name: "supernode_container_restarts_total",
        kind: "counter",
        labels: OF_NODE,
        help: "How often the container was started again since the agent started.",
        samples: |values, _, add| add(&[], values.restarts as f64),
    },
    Metric {
        name: "supernode_container_last_restart_timestamp_seconds",
        kind: "gauge",
        labels: OF_NODE,
        help: "When the container was started again last, in seconds since 1970.",
        samples: |values, _, add| at(values.restarted, &[], add),
    },
    Metric {
        name: "supernode_gpu_utilization_ratio",
        kind: "gauge",
        labels: OF_GPU,
        help: "The share of the last sample period in which the GPU worked, 0 to 1.",
        samples: |values, now, add| {
            of_gpus(values, now, add, |reading| {
                reading.utilization_percent.map(|percent| f64::from(percent) / 100.0)
            });
        },
    },
    Metric {
        name: "supernode_gpu_memory_used_bytes",
        kind: "gauge",
        labels: OF_GPU,
        help: "The GPU's memory in use.",
        samples: |values, now, add| {
            of_gpus(values, now, add, |reading| reading.memory_used_bytes.map(|it| it as f64))
        },
    },
    Metric {
        name: "supernode_gpu_memory_total_bytes",
        kind: "gauge",
        labels: OF_GPU,
        help: "The GPU's memory.",
        samples: |values, now, add| {
            of_gpus(values, now, add, |reading| reading.memory_total_bytes.map(|it| it as f64))
        },
    },
    Metric {
        name: "supernode_gpu_temperature_celsius",
        kind: "gauge",
        labels: OF_GPU,
        help: "The GPU's temperature.",
        samples: |values, now, add| {
            of_gpus(values, now, add, |reading| reading.temperature_celsius.map(f64::from))
        },
    },
    Metric {
        name: "supernode_gpu_power_watts",
        kind: "gauge",
        labels: OF_GPU,
        help: "The GPU's power draw.",
        samples: |values, now, add| {
            of_gpus(values, now, add, |reading| {
                reading.power_milliwatts.map(|power| f64::from(power) / 1000.0)
            });
        },
    },
    Metric {
        name: "supernode_gpu_xid_errors_total",
        kind: "counter",
        labels: OF_XID,
        help: "XIDs that the driver reported since the agent started.",
        samples: |values, _, add| of_xids(values, |labels, xids| add(labels, xids.times as f64)),
    },
    Metric {
        name: "supernode_gpu_last_xid_timestamp_seconds",
        kind: "gauge",
        labels: OF_XID,
        help: "When the driver reported this XID last, in seconds since 1970.",
        samples: |values, _, add| of_xids(values, |labels, xids| at(Some(xids.last), labels, add)),
    },
];

fn at(moment: Option<SystemTime>, labels: &[&str], add: &mut Add<'_>) {
    if let Some(since) =
        moment.and_then(|moment| moment.duration_since(SystemTime::UNIX_EPOCH).ok())
    {
        add(labels, since.as_millis() as f64 / 1000.0);
    }
}

fn of_gpus(values: &Values, now: Instant, add: &mut Add<'_>, value: fn(&Reading) -> Option<f64>) {
    for Gpu { uuid, name, reading } in &values.gpus {
        let fresh =
            reading.filter(|(_, read_at)| now.saturating_duration_since(*read_at) < READING_HOLDS);
        if let Some(value) = fresh.and_then(|(reading, _)| value(&reading)) {
            add(&[uuid, name], value);
        }
    }
}

fn of_xids(values: &Values, mut add: impl FnMut(&[&str], Xids)) {
    for (XidOfGpu { uuid, name, xid }, xids) in &values.xids {
        add(&[uuid, name, &xid.to_string()], *xids);
    }
}

/// The page, in Prometheus' text format 0.0.4
/// (prometheus.io/docs/instrumenting/exposition_formats). A metric that is not known now has no
/// line. `now` tells which readings hold.
pub fn page(values: &Values, now: Instant) -> String {
    let mut page = String::new();
    for Metric { name, kind, labels, help, samples } in METRICS {
        let mut lines = String::new();
        samples(values, now, &mut |values, value| {
            let pairs = labels
                .iter()
                .zip(values)
                .map(|(label, value)| format!("{label}=\"{}\"", escaped(value)));
            let pairs = pairs.collect::<Vec<_>>().join(",");
            let labels = if pairs.is_empty() { pairs } else { format!("{{{pairs}}}") };
            // A text grows without fail.
            let _ = writeln!(lines, "{name}{labels} {value}");
        });
        if !lines.is_empty() {
            let _ = write!(page, "# HELP {name} {help}\n# TYPE {name} {kind}\n{lines}");
        }
    }
    page
}

/// A label's value as the format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::reason::{Finding, Reason};

    const UUID: &str = "GPU-aaaa";

    fn on_gpu() -> Verdict {
        let device = GpuDevice {
            index: 0,
            uuid: UUID.into(),
            name: Some("An \"odd\\\nname\"".into()),
            pci_address: "0000:01:00.0".into(),
            memory_mib: None,
            minor: None,
        };
        Verdict::Gpu { devices: vec![device], missing: Vec::new() }
    }

    fn second(number: u64) -> Option<SystemTime> {
        Some(SystemTime::UNIX_EPOCH + Duration::from_secs(number))
    }

    fn lines(values: &Values) -> Vec<String> {
        let page = page(values, Instant::now());
        assert!(page.ends_with('\n'));
        page.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    }

    #[test]
    fn the_table_of_the_packaging_is_that_of_the_code() {
        let table = include_str!("../../../packaging/grafana/metrics.txt");
        // In columns there, with one blank between two words here.
        let told = table.lines().filter(|line| !line.starts_with('#'));
        let told: Vec<String> =
            told.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        let line = |metric: &Metric| {
            let labels =
                if metric.labels.is_empty() { "-".to_owned() } else { metric.labels.join(",") };
            format!("{} {} {labels} {}", metric.name, metric.kind, metric.help)
        };
        assert_eq!(told, METRICS.iter().map(line).collect::<Vec<_>>());
    }

    #[test]
    fn names_are_as_prometheus_asks_for_them() {
        for metric in METRICS {
            assert!(metric.name.starts_with("supernode_"), "{}", metric.name);
            assert_eq!(
                metric.kind == "counter",
                metric.name.ends_with("_total"),
                "{}",
                metric.name
            );
            assert!(!metric.help.contains(['\n', '\\']), "{}", metric.name);
        }
    }

    #[test]
    fn a_node_of_which_nothing_is_known_yet_says_no_more_than_that_it_is_not_up() {
        assert_eq!(
            lines(&Values::default()),
            [
                &format!("supernode_agent_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")),
                "supernode_up 0",
                "supernode_connected 0",
                "supernode_container_restarts_total 0"
            ]
        );
    }

    #[test]
    fn what_is_known_is_told_with_help_and_type_and_labels_are_escaped() {
        let mut values = Values::default();
        values.decided(&on_gpu());
        values.runs(second(1000));
        values.runs(second(1000));
        values.runs(second(2000));
        values.read(
            UUID,
            Reading {
                power_milliwatts: Some(70_500),
                utilization_percent: Some(7),
                ..Reading::default()
            },
        );
        values.read("GPU-other", Reading { power_milliwatts: Some(1), ..Reading::default() });
        values.count_xid(UUID, 31, 2);
        values.count_xid(UUID, 31, 3);
        let page = page(&values, Instant::now());
        for part in [
            "# HELP supernode_up 1 while the container runs, else 0.\n# TYPE supernode_up gauge\nsupernode_up 1\n",
            "\nsupernode_device_info{device=\"cuda\",reason=\"\"} 1\n",
            "\nsupernode_container_start_time_seconds 2000\n",
            "\nsupernode_container_restarts_total 1\n",
            "\nsupernode_container_last_restart_timestamp_seconds 2000\n",
            "\nsupernode_gpu_utilization_ratio{uuid=\"GPU-aaaa\",name=\"An \\\"odd\\\\\\nname\\\"\"} 0.07\n",
            "\nsupernode_gpu_power_watts{uuid=\"GPU-aaaa\",name=\"An \\\"odd\\\\\\nname\\\"\"} 70.5\n",
            "# TYPE supernode_gpu_xid_errors_total counter\n",
            "name\\\"\",xid=\"31\"} 5\n",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert!(!page.contains("temperature") && !page.contains("GPU-other"), "{page}");
    }

    #[test]
    fn a_reading_holds_for_half_a_minute_and_ends_with_the_gpu_but_its_xids_stay() {
        let mut values = Values::default();
        values.decided(&on_gpu());
        values.read(UUID, Reading { temperature_celsius: Some(40), ..Reading::default() });
        values.count_xid(UUID, 79, 1);
        values.decided(&on_gpu());
        assert!(page(&values, Instant::now()).contains("supernode_gpu_temperature_celsius{"));
        assert!(!page(&values, Instant::now() + READING_HOLDS).contains("temperature"));
        values.decided(&Verdict::cpu(Finding::new(Reason::GpuFailed, "x")));
        let page = page(&values, Instant::now());
        assert!(
            page.contains("supernode_device_info{device=\"cpu\",reason=\"gpu-failed\"} 1\n"),
            "{page}"
        );
        assert!(page.contains("xid=\"79\"} 1\n") && !page.contains("temperature"), "{page}");
    }

    #[test]
    fn kinds_of_xids_are_remembered_up_to_a_bound() {
        let mut values = Values::default();
        (0..10_000).for_each(|xid| values.count_xid(UUID, xid, 1));
        values.count_xid(UUID, 0, u64::MAX);
        assert_eq!(values.xids.len(), MAX_XIDS);
    }

    #[test]
    fn the_moment_of_a_change_of_the_connection_is_kept() {
        let mut values = Values::default();
        values.connected(false);
        assert_eq!(values.connection_changed, None);
        values.connected(true);
        let since = values.connection_changed;
        assert!(since.is_some());
        values.connected(true);
        assert_eq!(values.connection_changed, since);
    }
}
