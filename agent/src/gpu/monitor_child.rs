//! Child side of the GPU monitor: waits for NVML events of the GPUs in use, checks their health
//! periodically, and prints each result as one line of JSON. A periodic heartbeat shows that no
//! NVML call hangs. The parent side is `supervisor::gpu_monitor`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::thread;
use std::time::{Duration, Instant};

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::event::EventData;
use nvml_wrapper::{EventSet, Nvml};
use serde::{Deserialize, Serialize};

use super::nvml_error::Fault;
use super::nvml_library::LibraryFile;
use super::probe_child;
use crate::values::GpuUuid;

/// Interval of the health check and the heartbeat.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Failed checks in a row before a fault is reported: a failed call may be transient.
const FAILURE_THRESHOLD: u32 = 2;
/// Checks in a row without the library file before its loss is reported: an upgrade replaces it.
const LIBRARY_LOSS_THRESHOLD: u32 = 3;
/// Interval in which repeated events are reported as a count.
const REPEAT_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of distinct events that are counted; more than all GPUs of a machine can report.
const MAX_EVENT_KINDS: usize = 1024;

/// A message of the child: one line of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MonitorMessage {
    /// Monitoring has started.
    Started {
        /// UUIDs of devices without NVML events, whose health alone is checked.
        unsupported: Vec<GpuUuid>,
    },
    /// The child is responsive.
    Heartbeat,
    /// Metrics of a device.
    Reading {
        /// UUID of the device.
        uuid: GpuUuid,
        /// The metrics.
        reading: Reading,
    },
    /// An NVML event.
    Event {
        /// UUID of the device.
        uuid: GpuUuid,
        /// The XID; `None` for a double-bit ECC error without one.
        xid: Option<u64>,
        /// Number of occurrences since the last report.
        count: u64,
    },
    /// A failed call that makes the device unusable.
    Fault {
        /// UUID of the device.
        uuid: GpuUuid,
        /// The failed call.
        fault: Fault,
    },
    /// Hardware faults of a device.
    Unhealthy {
        /// UUID of the device.
        uuid: GpuUuid,
        /// The faults.
        health_issues: Vec<String>,
    },
    /// The library file was removed.
    LibraryRemoved {
        /// Its former path.
        path: String,
    },
    /// NVML cannot be loaded or initialised; the child exits.
    Failed {
        /// The failed call.
        fault: Fault,
    },
}

/// Metrics of a device. Not every device has all of them: a MIG instance has memory only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// GPU utilization in the last sample period, in percent.
    pub utilization_percent: Option<u32>,
    /// Used memory.
    pub memory_used_bytes: Option<u64>,
    /// Total memory.
    pub memory_total_bytes: Option<u64>,
    /// GPU temperature.
    pub temperature_celsius: Option<u32>,
    /// Power draw.
    pub power_milliwatts: Option<u32>,
}

impl Reading {
    /// Reads the metrics. Failures are ignored here; the health check reports faults.
    fn read(nvml: &Nvml, uuid: &GpuUuid) -> Self {
        let Ok(device) = nvml.device_by_uuid(uuid.as_str()) else {
            return Self::default();
        };
        let memory = device.memory_info().ok();
        Self {
            utilization_percent: device.utilization_rates().ok().map(|rates| rates.gpu),
            memory_used_bytes: memory.as_ref().map(|memory| memory.used),
            memory_total_bytes: memory.map(|memory| memory.total),
            temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok(),
            power_milliwatts: device.power_usage().ok(),
        }
    }
}

/// Runs the child process until it is killed: monitors the devices and prints messages to the
/// standard output, with `readings` also their metrics.
///
/// # Errors
/// Returns the error of setting up the process or writing a message, such as a closed pipe.
pub fn run_monitor(library: &str, uuids: &[GpuUuid], readings: bool) -> io::Result<()> {
    let mut out = probe_child::init_child()?;
    let file = LibraryFile::inspect(library).path;
    match probe_child::open(library) {
        Ok(nvml) => {
            MonitorLoop::new(&nvml, uuids, readings).run(library, file.as_deref(), &mut out)
        }
        Err(fault) => send(&mut out, &MonitorMessage::Failed { fault }),
    }
}

fn send(out: &mut File, message: &MonitorMessage) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    out.write_all(&line)
}

/// A device in use.
struct MonitoredGpu {
    uuid: GpuUuid,
    /// UUID of the GPU, which events carry even for a MIG instance.
    gpu_uuid: Option<GpuUuid>,
    failed_checks: u32,
    is_reported: bool,
}

struct MonitorLoop<'n> {
    nvml: &'n Nvml,
    gpus: Vec<MonitoredGpu>,
    /// Whether metrics are sent.
    readings: bool,
    /// Intervals in a row in which waiting for events failed. This is not attributed to any device.
    failed_waits: u32,
    wait_fault: Option<Fault>,
    /// Checks in a row without the library file.
    library_absent: u32,
}

impl<'n> MonitorLoop<'n> {
    fn new(nvml: &'n Nvml, uuids: &[GpuUuid], readings: bool) -> Self {
        let gpus = uuids.iter().map(|uuid| MonitoredGpu {
            uuid: uuid.clone(),
            gpu_uuid: probe_child::physical_gpu(nvml, uuid)
                .and_then(|gpu| probe_child::uuid_of(&gpu))
                .ok(),
            failed_checks: 0,
            is_reported: false,
        });
        Self {
            nvml,
            gpus: gpus.collect(),
            readings,
            failed_waits: 0,
            wait_fault: None,
            library_absent: 0,
        }
    }

    fn run(mut self, library: &str, file: Option<&str>, out: &mut File) -> io::Result<()> {
        let (set, unsupported) = self.subscribe();
        send(out, &MonitorMessage::Started { unsupported })?;
        let mut counter = EventCounter::default();
        let mut next_check = Instant::now();
        loop {
            let remaining = time_until(next_check);
            if remaining.is_zero() {
                self.send_check_results(library, file, &mut counter, out)?;
                next_check = Instant::now() + CHECK_INTERVAL;
                continue;
            }
            let Some(set) = &set else {
                thread::sleep(remaining);
                continue;
            };
            match set.wait(u32::try_from(remaining.as_millis()).unwrap_or(u32::MAX).max(1)) {
                Ok(event) => {
                    let Some(xid) = xid_of(&event) else { continue };
                    let kind = (self.gpu_of(&event), xid);
                    if let Some(count) = counter.count(kind, Instant::now()) {
                        send(out, &self.event_message(kind, count))?;
                    }
                }
                // The library may return early; this keeps it from spinning.
                Err(NvmlError::Timeout) => {
                    thread::sleep(time_until(next_check).min(Duration::from_millis(100)))
                }
                Err(error) => {
                    self.wait_fault = Some(Fault::new("nvmlEventSetWait_v2", error));
                    thread::sleep(time_until(next_check));
                }
            }
        }
    }

    fn send_check_results(
        &mut self,
        library: &str,
        file: Option<&str>,
        counter: &mut EventCounter,
        out: &mut File,
    ) -> io::Result<()> {
        for message in self.check_all() {
            send(out, &message)?;
        }
        if let Some(path) = file.filter(|_| self.is_library_removed(library)) {
            send(out, &MonitorMessage::LibraryRemoved { path: path.into() })?;
        }
        for (kind, count) in counter.due(Instant::now()) {
            send(out, &self.event_message(kind, count))?;
        }
        for MonitoredGpu { uuid, .. } in self.gpus.iter().filter(|_| self.readings) {
            let reading = Reading::read(self.nvml, uuid);
            send(out, &MonitorMessage::Reading { uuid: uuid.clone(), reading })?;
        }
        send(out, &MonitorMessage::Heartbeat)
    }

    fn event_message(&self, (gpu, xid): EventKind, count: u64) -> MonitorMessage {
        MonitorMessage::Event { uuid: self.gpus[gpu].uuid.clone(), xid, count }
    }

    /// Subscribes to the events of every GPU that supports them. Also returns the devices whose GPU
    /// does not.
    fn subscribe(&self) -> (Option<EventSet<'n>>, Vec<GpuUuid>) {
        let mut gpu_uuids: Vec<&GpuUuid> = Vec::new();
        let mut unsupported = Vec::new();
        for gpu in &self.gpus {
            match gpu.gpu_uuid.as_ref() {
                Some(uuid) if gpu_uuids.contains(&uuid) => {}
                // A failed registration consumes the event set, so each GPU is tried with its own.
                Some(uuid) if self.create_event_set(&[uuid]).is_some() => gpu_uuids.push(uuid),
                _ => unsupported.push(gpu.uuid.clone()),
            }
        }
        let set = self.create_event_set(&gpu_uuids).filter(|_| !gpu_uuids.is_empty());
        if set.is_none() {
            unsupported = self.gpus.iter().map(|gpu| gpu.uuid.clone()).collect();
        }
        (set, unsupported)
    }

    fn create_event_set(&self, gpu_uuids: &[&GpuUuid]) -> Option<EventSet<'n>> {
        let wanted = EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR;
        let mut set = self.nvml.create_event_set().ok()?;
        for uuid in gpu_uuids {
            let device = self.nvml.device_by_uuid(uuid.as_str()).ok()?;
            let types = device.supported_event_types().ok()? & wanted;
            if !types.contains(EventTypes::CRITICAL_XID_ERROR) {
                return None;
            }
            set = device.register_events(types, set).ok()?;
        }
        Some(set)
    }

    /// Returns the device that an event belongs to. A lost GPU may not report its UUID; then the
    /// event belongs to the first device that fails its health check.
    fn gpu_of(&self, event: &EventData<'_>) -> usize {
        if self.gpus.len() == 1 {
            return 0;
        }
        let by_uuid = event.device.uuid().ok().and_then(|uuid| {
            self.gpus
                .iter()
                .position(|gpu| gpu.gpu_uuid.as_ref().is_some_and(|known| known.as_str() == uuid))
        });
        let failing = || {
            self.gpus
                .iter()
                .position(|gpu| probe_child::check_health(self.nvml, &gpu.uuid).is_err())
        };
        by_uuid.or_else(failing).unwrap_or(0)
    }

    /// Checks the health of every device. A problem is reported once, until the device has been
    /// healthy again.
    fn check_all(&mut self) -> Vec<MonitorMessage> {
        let mut messages = Vec::new();
        for gpu in &mut self.gpus {
            let uuid = gpu.uuid.clone();
            let message = match probe_child::check_health(self.nvml, &uuid) {
                Ok(health_issues) if health_issues.is_empty() => {
                    (gpu.failed_checks, gpu.is_reported) = (0, false);
                    continue;
                }
                Ok(health_issues) => MonitorMessage::Unhealthy { uuid, health_issues },
                Err(fault) => {
                    gpu.failed_checks += 1;
                    if gpu.failed_checks < FAILURE_THRESHOLD {
                        continue;
                    }
                    MonitorMessage::Fault { uuid, fault }
                }
            };
            if !gpu.is_reported {
                gpu.is_reported = true;
                messages.push(message);
            }
        }
        match self.wait_fault.take() {
            Some(fault) if fault.is_gpu_fault() => {
                self.failed_waits += 1;
                if self.failed_waits == FAILURE_THRESHOLD
                    && let Some(gpu) = self.gpus.iter_mut().find(|gpu| !gpu.is_reported)
                {
                    gpu.is_reported = true;
                    messages.push(MonitorMessage::Fault { uuid: gpu.uuid.clone(), fault });
                }
            }
            _ => self.failed_waits = 0,
        }
        messages
    }

    /// Returns `true` once, when the library file has been absent for long enough.
    fn is_library_removed(&mut self, library: &str) -> bool {
        let is_absent = LibraryFile::inspect(library).path.is_none();
        self.library_absent = if is_absent { self.library_absent + 1 } else { 0 };
        self.library_absent == LIBRARY_LOSS_THRESHOLD
    }
}

fn time_until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Returns the XID of an event, `Some(None)` for a double-bit ECC error without one, and `None` for
/// other events.
fn xid_of(event: &EventData<'_>) -> Option<Option<u64>> {
    /// The XID behind nvml-wrapper's `XidError::Unknown`.
    const UNKNOWN: u64 = 999;
    match event.event_data {
        Some(XidError::Value(xid)) => Some(Some(xid)),
        Some(XidError::Unknown) => Some(Some(UNKNOWN)),
        None => event.event_type.contains(EventTypes::DOUBLE_BIT_ECC_ERROR).then_some(None),
    }
}

/// The index of a device and an XID.
type EventKind = (usize, Option<u64>);

/// Rate limit for repeated events: the first is reported at once, the others as a count per
/// interval.
#[derive(Default)]
struct EventCounter(BTreeMap<EventKind, Repeats>);

struct Repeats {
    unreported: u64,
    reported_at: Instant,
}

impl EventCounter {
    /// Counts an event and returns the count to report now, if any.
    fn count(&mut self, kind: EventKind, now: Instant) -> Option<u64> {
        if let Some(repeats) = self.0.get_mut(&kind) {
            repeats.unreported += 1;
            return repeats.due(now);
        }
        if self.0.len() == MAX_EVENT_KINDS {
            return None;
        }
        self.0.insert(kind, Repeats { unreported: 0, reported_at: now });
        Some(1)
    }

    /// Returns the counts of events that have stopped and are not reported yet.
    fn due(&mut self, now: Instant) -> Vec<(EventKind, u64)> {
        self.0.iter_mut().filter_map(|(kind, repeats)| Some((*kind, repeats.due(now)?))).collect()
    }
}

impl Repeats {
    fn due(&mut self, now: Instant) -> Option<u64> {
        if self.unreported == 0 || now.duration_since(self.reported_at) < REPEAT_INTERVAL {
            return None;
        }
        self.reported_at = now;
        Some(std::mem::take(&mut self.unreported))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_events_are_reported_as_count_per_interval() {
        let start = Instant::now();
        let mut counter = EventCounter::default();
        let kind = (0, Some(13));
        assert_eq!(counter.count(kind, start), Some(1));
        for millisecond in 1..50_000 {
            assert_eq!(counter.count(kind, start + Duration::from_millis(millisecond)), None);
        }
        assert_eq!(counter.due(start + Duration::from_secs(59)), []);
        assert_eq!(counter.due(start + REPEAT_INTERVAL), [(kind, 49_999)]);
        assert_eq!(counter.due(start + REPEAT_INTERVAL * 3), [], "no further events");
        assert_eq!(counter.count(kind, start + REPEAT_INTERVAL * 3), Some(1));
    }

    #[test]
    fn each_device_and_xid_is_counted_up_to_a_bound() {
        let now = Instant::now();
        let mut counter = EventCounter::default();
        for kind in [(0, Some(13)), (1, Some(13)), (0, Some(31)), (0, None)] {
            assert_eq!(counter.count(kind, now), Some(1));
        }
        for xid in 1000..100_000 {
            counter.count((0, Some(xid)), now);
        }
        assert_eq!(counter.0.len(), MAX_EVENT_KINDS);
    }
}
