//! Sink for Prometheus: renders the status in the text format. [`super::metrics_server`] serves it.

use std::fmt::Write as _;
use std::time::{Duration, Instant, SystemTime};

use crate::gpu::monitor_child::Reading;
use crate::report::node_status::{GpuXid, NodeStatus, XidCount};

/// Age from which a reading is stale. The GPU monitor sends one every five seconds.
const READING_TIMEOUT: Duration = Duration::from_secs(30);

/// Adds a sample: label values in the order of the metric's labels, and the value of the sample.
type AddSample<'a> = dyn FnMut(&[&str], f64) + 'a;

struct Metric {
    name: &'static str,
    kind: Kind,
    labels: &'static [&'static str],
    help: &'static str,
    samples: fn(&NodeStatus, Instant, &mut AddSample<'_>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Gauge,
    Counter,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Gauge => "gauge",
            Self::Counter => "counter",
        }
    }
}

const NODE_LABELS: &[&str] = &[];
const GPU_LABELS: &[&str] = &["uuid", "name"];
const XID_LABELS: &[&str] = &["uuid", "name", "xid"];

/// All metrics, the same as in packaging/grafana/metrics.txt. Names follow Prometheus: base units,
/// `_total` for counters, `_info` for a constant 1, and the time of an event instead of the time
/// since (prometheus.io/docs/practices/{naming,instrumenting}).
const METRICS: &[Metric] = &[
    Metric {
        name: "supernode_agent_info",
        kind: Kind::Gauge,
        labels: &["version"],
        help: "Version of the agent.",
        samples: |_, _, add| add(&[env!("CARGO_PKG_VERSION")], 1.0),
    },
    Metric {
        name: "supernode_up",
        kind: Kind::Gauge,
        labels: NODE_LABELS,
        help: "1 while the container runs, else 0.",
        samples: |status, _, add| add(&[], status.container.running.into()),
    },
    Metric {
        name: "supernode_connected",
        kind: Kind::Gauge,
        labels: NODE_LABELS,
        help: "1 while Flower is connected to the SuperLink, else 0.",
        samples: |status, _, add| add(&[], status.connected.into()),
    },
    Metric {
        name: "supernode_connection_last_change_timestamp_seconds",
        kind: Kind::Gauge,
        labels: NODE_LABELS,
        help: "Unix time of the last change of the connection to the SuperLink.",
        samples: |status, _, add| add_time(status.connection_changed_at, &[], add),
    },
    Metric {
        name: "supernode_device_info",
        kind: Kind::Gauge,
        labels: &["device", "reason"],
        help: "Device of the node (cuda or cpu), with the reason code of a CPU fallback.",
        samples: |status, _, add| {
            if let Some(verdict) = &status.verdict {
                let reason = verdict.finding().map_or("", |finding| finding.reason.code());
                add(&[verdict.device(), reason], 1.0);
            }
        },
    },
    Metric {
        name: "supernode_container_start_time_seconds",
        kind: Kind::Gauge,
        labels: NODE_LABELS,
        help: "Unix time of the container's start, while it runs.",
        samples: |status, _, add| {
            let container = &status.container;
            add_time(container.started_at.filter(|_| container.running), &[], add);
        },
    },
    Metric {
        name: "supernode_container_restarts_total",
        kind: Kind::Counter,
        labels: NODE_LABELS,
        help: "Total container restarts since the agent started.",
        samples: |status, _, add| add(&[], status.container.restarts as f64),
    },
    Metric {
        name: "supernode_container_last_restart_timestamp_seconds",
        kind: Kind::Gauge,
        labels: NODE_LABELS,
        help: "Unix time of the last container restart.",
        samples: |status, _, add| add_time(status.container.last_restart, &[], add),
    },
    Metric {
        name: "supernode_gpu_utilization_ratio",
        kind: Kind::Gauge,
        labels: GPU_LABELS,
        help: "Share of the last sample period in which the GPU was busy, 0 to 1.",
        samples: |status, now, add| {
            add_readings(status, now, add, |reading| {
                reading.utilization_percent.map(|percent| f64::from(percent) / 100.0)
            });
        },
    },
    Metric {
        name: "supernode_gpu_memory_used_bytes",
        kind: Kind::Gauge,
        labels: GPU_LABELS,
        help: "GPU memory in use.",
        samples: |status, now, add| {
            add_readings(status, now, add, |reading| {
                reading.memory_used_bytes.map(|bytes| bytes as f64)
            })
        },
    },
    Metric {
        name: "supernode_gpu_memory_total_bytes",
        kind: Kind::Gauge,
        labels: GPU_LABELS,
        help: "Total GPU memory.",
        samples: |status, now, add| {
            add_readings(status, now, add, |reading| {
                reading.memory_total_bytes.map(|bytes| bytes as f64)
            })
        },
    },
    Metric {
        name: "supernode_gpu_temperature_celsius",
        kind: Kind::Gauge,
        labels: GPU_LABELS,
        help: "GPU temperature.",
        samples: |status, now, add| {
            add_readings(status, now, add, |reading| reading.temperature_celsius.map(f64::from))
        },
    },
    Metric {
        name: "supernode_gpu_power_watts",
        kind: Kind::Gauge,
        labels: GPU_LABELS,
        help: "GPU power draw.",
        samples: |status, now, add| {
            add_readings(status, now, add, |reading| {
                reading.power_milliwatts.map(|power| f64::from(power) / 1000.0)
            });
        },
    },
    Metric {
        name: "supernode_gpu_xid_errors_total",
        kind: Kind::Counter,
        labels: XID_LABELS,
        help: "Total XID errors that the driver reported since the agent started.",
        samples: |status, _, add| {
            for_each_xid(status, |labels, count| add(labels, count.total as f64));
        },
    },
    Metric {
        name: "supernode_gpu_last_xid_timestamp_seconds",
        kind: Kind::Gauge,
        labels: XID_LABELS,
        help: "Unix time of the driver's last report of this XID.",
        samples: |status, _, add| {
            for_each_xid(status, |labels, count| add_time(Some(count.last), labels, add));
        },
    },
];

fn add_time(time: Option<SystemTime>, labels: &[&str], add: &mut AddSample<'_>) {
    if let Some(since) = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok()) {
        add(labels, since.as_millis() as f64 / 1000.0);
    }
}

fn add_readings(
    status: &NodeStatus,
    now: Instant,
    add: &mut AddSample<'_>,
    value: fn(&Reading) -> Option<f64>,
) {
    for device in status.devices() {
        let fresh = status
            .gpu_readings
            .get(&device.uuid)
            .filter(|(_, read_at)| now.saturating_duration_since(*read_at) < READING_TIMEOUT);
        if let Some(value) = fresh.and_then(|(reading, _)| value(reading)) {
            add(&[device.uuid.as_str(), device.name.as_deref().unwrap_or_default()], value);
        }
    }
}

fn for_each_xid(status: &NodeStatus, mut add: impl FnMut(&[&str], XidCount)) {
    for (GpuXid { uuid, name, xid }, count) in &status.xids {
        add(&[uuid.as_str(), name, &xid.to_string()], *count);
    }
}

/// Renders all metrics in Prometheus' text format 0.0.4
/// (prometheus.io/docs/instrumenting/exposition_formats). A metric without a known value is left
/// out; `now` decides which readings are stale.
pub(crate) fn render(status: &NodeStatus, now: Instant) -> String {
    let mut page = String::new();
    for Metric { name, kind, labels, help, samples } in METRICS {
        let mut lines = String::new();
        samples(status, now, &mut |values, value| {
            let pairs = labels
                .iter()
                .zip(values)
                .map(|(label, value)| format!("{label}=\"{}\"", escape(value)));
            let pairs = pairs.collect::<Vec<_>>().join(",");
            let labels = if pairs.is_empty() { pairs } else { format!("{{{pairs}}}") };
            // Writing to a String does not fail.
            let _ = writeln!(lines, "{name}{labels} {value}");
        });
        if !lines.is_empty() {
            let kind = kind.name();
            let _ = write!(page, "# HELP {name} {help}\n# TYPE {name} {kind}\n{lines}");
        }
    }
    page
}

/// Escapes a label's value for the text format.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::reason::{Finding, Reason};
    use crate::gpu::verdict::{GpuDevice, Verdict};
    use crate::system::os_release::Distribution;
    use crate::values::{GpuUuid, PciAddress};

    fn uuid() -> GpuUuid {
        GpuUuid::parse("GPU-aaaa").unwrap()
    }

    fn on_gpu() -> Verdict {
        let device = GpuDevice {
            index: 0,
            uuid: uuid(),
            name: Some("An \"odd\\\nname\"".into()),
            pci_address: PciAddress::parse("0000:01:00.0"),
            memory_mib: None,
            minor: None,
        };
        Verdict::Gpu { devices: vec![device], missing: Vec::new() }
    }

    fn seconds(number: u64) -> Option<SystemTime> {
        Some(SystemTime::UNIX_EPOCH + Duration::from_secs(number))
    }

    #[test]
    fn packaged_table_matches_the_code() {
        let table = include_str!("../../../packaging/grafana/metrics.txt");
        // The table is aligned in columns.
        let rows: Vec<String> = table
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        let row = |metric: &Metric| {
            let labels =
                if metric.labels.is_empty() { "-".to_owned() } else { metric.labels.join(",") };
            format!("{} {} {labels} {}", metric.name, metric.kind.name(), metric.help)
        };
        assert_eq!(rows, METRICS.iter().map(row).collect::<Vec<_>>());
    }

    #[test]
    fn names_follow_prometheus_conventions() {
        for metric in METRICS {
            let name = metric.name;
            assert!(name.starts_with("supernode_"), "{name}");
            assert_eq!(metric.kind == Kind::Counter, name.ends_with("_total"), "{name}");
            assert!(!metric.help.contains(['\n', '\\']), "{name}");
        }
    }

    #[test]
    fn unknown_values_are_left_out() {
        let page = render(&NodeStatus::default(), Instant::now());
        assert!(page.ends_with('\n'));
        assert_eq!(
            page.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>(),
            [
                &format!("supernode_agent_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")),
                "supernode_up 0",
                "supernode_connected 0",
                "supernode_container_restarts_total 0"
            ]
        );
    }

    #[test]
    fn page_has_help_type_and_escaped_labels() {
        let mut status = NodeStatus::default();
        status.set_verdict(&on_gpu(), Distribution::Debian);
        for start in [1000, 1000, 2000] {
            status.set_container_running(seconds(start), false);
        }
        status.record_reading(
            &uuid(),
            Reading {
                power_milliwatts: Some(70_500),
                utilization_percent: Some(7),
                ..Reading::default()
            },
        );
        status.count_xid(&uuid(), 31, 2);
        status.count_xid(&uuid(), 31, 3);
        let page = render(&status, Instant::now());
        for part in [
            "# HELP supernode_up 1 while the container runs, else 0.\n\
             # TYPE supernode_up gauge\nsupernode_up 1\n",
            "\nsupernode_device_info{device=\"cuda\",reason=\"\"} 1\n",
            "\nsupernode_container_start_time_seconds 2000\n",
            "\nsupernode_container_restarts_total 1\n",
            "\nsupernode_container_last_restart_timestamp_seconds 2000\n",
            "\nsupernode_gpu_utilization_ratio\
             {uuid=\"GPU-aaaa\",name=\"An \\\"odd\\\\\\nname\\\"\"} 0.07\n",
            "\nsupernode_gpu_power_watts\
             {uuid=\"GPU-aaaa\",name=\"An \\\"odd\\\\\\nname\\\"\"} 70.5\n",
            "# TYPE supernode_gpu_xid_errors_total counter\n",
            "name\\\"\",xid=\"31\"} 5\n",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert!(!page.contains("temperature"), "{page}");
    }

    #[test]
    fn readings_expire_and_xids_stay() {
        let mut status = NodeStatus::default();
        status.set_verdict(&on_gpu(), Distribution::Debian);
        status.record_reading(
            &uuid(),
            Reading { temperature_celsius: Some(40), ..Reading::default() },
        );
        status.count_xid(&uuid(), 79, 1);
        status.set_verdict(&on_gpu(), Distribution::Debian);
        assert!(render(&status, Instant::now()).contains("supernode_gpu_temperature_celsius{"));
        let later = Instant::now() + READING_TIMEOUT;
        assert!(!render(&status, later).contains("temperature"));
        let fallback = Verdict::cpu(Finding::new(Reason::GpuFailed, "x"));
        status.set_verdict(&fallback, Distribution::Debian);
        let page = render(&status, Instant::now());
        assert!(
            page.contains("supernode_device_info{device=\"cpu\",reason=\"gpu-failed\"} 1\n"),
            "{page}"
        );
        assert!(page.contains("xid=\"79\"} 1\n") && !page.contains("temperature"), "{page}");
    }

    #[test]
    fn stopped_container_has_no_start_time() {
        let mut status = NodeStatus::default();
        status.set_container_running(seconds(1000), false);
        status.set_container_stopped();
        let page = render(&status, Instant::now());
        assert!(page.contains("\nsupernode_up 0\n"), "{page}");
        assert!(!page.contains("supernode_container_start_time_seconds"), "{page}");
    }
}
