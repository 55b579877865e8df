//! The watcher, from inside: the child process that listens to the driver's events for the GPUs in
//! use, looks after their health, and prints a line of JSON for what it finds. A heartbeat tells
//! that no call hangs. See [`crate::supervisor::gpu_monitor`] for the outside.

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

use crate::gpu::nvml_library::LibraryFile;
use crate::gpu::probe_child::{self, Fault};

/// How often health is looked after; with every look comes a heartbeat.
pub(super) const ROUND: Duration = Duration::from_secs(5);
/// A call that fails may succeed the next time: so many looks in a row make a fault of it.
const ROUNDS_TO_A_FAULT: u32 = 2;
/// The file of a library that is replaced is away for a moment.
const ROUNDS_TO_A_LOSS: u32 = 3;
/// What repeats itself is counted, and told this often.
const COUNT_PERIOD: Duration = Duration::from_secs(60);
/// More kinds of events than all GPUs of a machine have: beyond them nothing is remembered.
const MAX_KINDS: usize = 1024;

/// What the child says, a line each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MonitorMessage {
    /// It has begun.
    Watching {
        /// Devices that give no events: only their health is looked after.
        unsupported: Vec<String>,
    },
    /// It goes on.
    Heartbeat,
    /// How a device is doing.
    Reading {
        /// The device.
        uuid: String,
        /// The figures.
        reading: Reading,
    },
    /// The driver told of an event.
    Event {
        /// The device.
        uuid: String,
        /// The XID; `None` for a double-bit ECC error without one.
        xid: Option<u64>,
        /// How often, since it was told last.
        times: u64,
    },
    /// A call fails in a way that makes the device unusable.
    Fault {
        /// The device.
        uuid: String,
        /// The call.
        fault: Fault,
    },
    /// NVML reports hardware faults.
    Unhealthy {
        /// The device.
        uuid: String,
        /// The faults.
        health_issues: Vec<String>,
    },
    /// The file of the library is not there any more.
    LibraryGone {
        /// Where it was.
        path: String,
    },
    /// NVML could not be opened.
    Failed {
        /// How.
        fault: Fault,
    },
}

/// What NVML measures of a device. Not every one gives every figure: a MIG instance has memory and
/// nothing else.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// The share of the last sample period in which it worked, 0 to 100.
    pub utilization_percent: Option<u32>,
    /// Memory in use.
    pub memory_used_bytes: Option<u64>,
    /// All memory.
    pub memory_total_bytes: Option<u64>,
    /// Temperature of the chip.
    pub temperature_celsius: Option<u32>,
    /// Power draw.
    pub power_milliwatts: Option<u32>,
}

impl Reading {
    /// Asks NVML. What it does not give is left out: whether the device is well is told by others.
    fn of(nvml: &Nvml, uuid: &str) -> Self {
        let Ok(device) = nvml.device_by_uuid(uuid) else {
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

/// Watches the devices and tells of them on the standard output, with `readings` also their
/// figures: all that the child process does, until it is killed.
///
/// # Errors
/// When nobody reads any more.
pub fn run_monitor(library: &str, uuids: &[String], readings: bool) -> io::Result<()> {
    let mut out = probe_child::init_child()?;
    let file = LibraryFile::look(library).path;
    match probe_child::open(library) {
        Ok(nvml) => {
            MonitorLoop::new(&nvml, uuids, readings).go_on(library, file.as_deref(), &mut out)
        }
        Err(fault) => say(&mut out, &MonitorMessage::Failed { fault }),
    }
}

fn say(out: &mut File, notice: &MonitorMessage) -> io::Result<()> {
    let mut line = serde_json::to_vec(notice)?;
    line.push(b'\n');
    out.write_all(&line)
}

/// A device in use.
struct MonitoredGpu {
    uuid: String,
    /// The UUID of its card, by which events name it.
    card: Option<String>,
    failed_looks: u32,
    told: bool,
}

struct MonitorLoop<'n> {
    nvml: &'n Nvml,
    patients: Vec<MonitoredGpu>,
    /// Whether their figures are told.
    readings: bool,
    /// A wait that fails is no fault of one device: so many rounds in a row.
    failed_waits: u32,
    wait_fault: Option<Fault>,
    /// So many rounds the library's file has not been there.
    absent: u32,
}

impl<'n> MonitorLoop<'n> {
    fn new(nvml: &'n Nvml, uuids: &[String], readings: bool) -> Self {
        let patients = uuids.iter().map(|uuid| MonitoredGpu {
            uuid: uuid.clone(),
            card: probe_child::card_of(nvml, uuid)
                .and_then(|card| probe_child::uuid_of(&card))
                .ok(),
            failed_looks: 0,
            told: false,
        });
        Self {
            nvml,
            patients: patients.collect(),
            readings,
            failed_waits: 0,
            wait_fault: None,
            absent: 0,
        }
    }

    fn go_on(mut self, library: &str, file: Option<&str>, out: &mut File) -> io::Result<()> {
        let (set, unsupported) = self.listen();
        say(out, &MonitorMessage::Watching { unsupported })?;
        let mut tally = EventCounter::default();
        let mut next_round = Instant::now();
        loop {
            let left = next_round.saturating_duration_since(Instant::now());
            if left.is_zero() {
                for notice in self.look_after_all() {
                    say(out, &notice)?;
                }
                if let Some(path) = file.filter(|_| self.library_is_lost(library)) {
                    say(out, &MonitorMessage::LibraryGone { path: path.into() })?;
                }
                for ((patient, xid), times) in tally.due(Instant::now()) {
                    say(
                        out,
                        &MonitorMessage::Event {
                            uuid: self.patients[patient].uuid.clone(),
                            xid,
                            times,
                        },
                    )?;
                }
                for MonitoredGpu { uuid, .. } in self.patients.iter().filter(|_| self.readings) {
                    say(
                        out,
                        &MonitorMessage::Reading {
                            uuid: uuid.clone(),
                            reading: Reading::of(self.nvml, uuid),
                        },
                    )?;
                }
                say(out, &MonitorMessage::Heartbeat)?;
                next_round = Instant::now() + ROUND;
                continue;
            }
            let Some(set) = &set else {
                thread::sleep(left);
                continue;
            };
            match set.wait(u32::try_from(left.as_millis()).unwrap_or(u32::MAX).max(1)) {
                Ok(event) => {
                    let Some(xid) = xid_of(&event) else { continue };
                    let patient = self.patient_of(&event);
                    if let Some(times) = tally.count((patient, xid), Instant::now()) {
                        say(
                            out,
                            &MonitorMessage::Event {
                                uuid: self.patients[patient].uuid.clone(),
                                xid,
                                times,
                            },
                        )?;
                    }
                }
                // It may come before its time, and must not come without end.
                Err(NvmlError::Timeout) => {
                    thread::sleep(until(next_round).min(Duration::from_millis(100)))
                }
                Err(error) => {
                    self.wait_fault = Some(Fault::new("nvmlEventSetWait_v2", error));
                    thread::sleep(until(next_round));
                }
            }
        }
    }

    /// Listens to every card that can be listened to; names the devices that cannot.
    fn listen(&self) -> (Option<EventSet<'n>>, Vec<String>) {
        let mut cards: Vec<&str> = Vec::new();
        let mut unsupported = Vec::new();
        for patient in &self.patients {
            match patient.card.as_deref() {
                Some(card) if cards.contains(&card) => {}
                // A set is lost with the first card that refuses: so each is tried with one of its
                // own.
                Some(card) if self.listen_to(&[card]).is_some() => cards.push(card),
                _ => unsupported.push(patient.uuid.clone()),
            }
        }
        let set = self.listen_to(&cards).filter(|_| !cards.is_empty());
        if set.is_none() {
            unsupported = self.patients.iter().map(|patient| patient.uuid.clone()).collect();
        }
        (set, unsupported)
    }

    fn listen_to(&self, cards: &[&str]) -> Option<EventSet<'n>> {
        let wanted = EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR;
        let mut set = self.nvml.create_event_set().ok()?;
        for card in cards {
            let device = self.nvml.device_by_uuid(*card).ok()?;
            let kinds = device.supported_event_types().ok()? & wanted;
            if !kinds.contains(EventTypes::CRITICAL_XID_ERROR) {
                return None;
            }
            set = device.register_events(kinds, set).ok()?;
        }
        Some(set)
    }

    /// Whom an event is about. A card that is lost may not tell its UUID any more: then it is the
    /// one that is ill.
    fn patient_of(&self, event: &EventData<'_>) -> usize {
        if self.patients.len() == 1 {
            return 0;
        }
        let named = event.device.uuid().ok().and_then(|card| {
            self.patients.iter().position(|patient| patient.card.as_deref() == Some(&card))
        });
        let ill = || {
            self.patients
                .iter()
                .position(|patient| probe_child::examine(self.nvml, &patient.uuid).is_err())
        };
        named.or_else(ill).unwrap_or(0)
    }

    fn look_after_all(&mut self) -> Vec<MonitorMessage> {
        let mut notices = Vec::new();
        for patient in &mut self.patients {
            let uuid = patient.uuid.clone();
            let notice = match probe_child::examine(self.nvml, &uuid) {
                Ok(health_issues) if health_issues.is_empty() => {
                    (patient.failed_looks, patient.told) = (0, false);
                    continue;
                }
                Ok(health_issues) => MonitorMessage::Unhealthy { uuid, health_issues },
                Err(fault) => {
                    patient.failed_looks += 1;
                    if patient.failed_looks < ROUNDS_TO_A_FAULT {
                        continue;
                    }
                    MonitorMessage::Fault { uuid, fault }
                }
            };
            if !patient.told {
                patient.told = true;
                notices.push(notice);
            }
        }
        match self.wait_fault.take() {
            Some(fault) if fault.is_of_the_gpu() => {
                self.failed_waits += 1;
                if self.failed_waits == ROUNDS_TO_A_FAULT
                    && let Some(first) = self.patients.iter_mut().find(|patient| !patient.told)
                {
                    first.told = true;
                    notices.push(MonitorMessage::Fault { uuid: first.uuid.clone(), fault });
                }
            }
            _ => self.failed_waits = 0,
        }
        notices
    }

    /// Whether the library's file has been away for long enough, which is said once.
    fn library_is_lost(&mut self, library: &str) -> bool {
        self.absent = if LibraryFile::look(library).path.is_none() { self.absent + 1 } else { 0 };
        self.absent == ROUNDS_TO_A_LOSS
    }
}

fn until(moment: Instant) -> Duration {
    moment.saturating_duration_since(Instant::now())
}

/// The XID, or `None` in it for a double-bit ECC error; nothing for what was not asked for.
fn xid_of(event: &EventData<'_>) -> Option<Option<u64>> {
    /// What the wrapper has for `XidError::Unknown`.
    const UNKNOWN: u64 = 999;
    match event.event_data {
        Some(XidError::Value(xid)) => Some(Some(xid)),
        Some(XidError::Unknown) => Some(Some(UNKNOWN)),
        None => event.event_type.contains(EventTypes::DOUBLE_BIT_ECC_ERROR).then_some(None),
    }
}

/// A device, by its place, and an XID of it.
type Kind = (usize, Option<u64>);

/// Folds what repeats itself: the first is told at once, then at most a count a minute.
#[derive(Default)]
struct EventCounter(BTreeMap<Kind, Repeats>);

struct Repeats {
    untold: u64,
    told_at: Instant,
}

impl EventCounter {
    /// Counts one, and answers how many are to be told now.
    fn count(&mut self, kind: Kind, now: Instant) -> Option<u64> {
        if let Some(repeats) = self.0.get_mut(&kind) {
            repeats.untold += 1;
            return repeats.due(now);
        }
        if self.0.len() == MAX_KINDS {
            return None;
        }
        self.0.insert(kind, Repeats { untold: 0, told_at: now });
        Some(1)
    }

    /// What is to be told although it has stopped.
    fn due(&mut self, now: Instant) -> Vec<(Kind, u64)> {
        self.0.iter_mut().filter_map(|(kind, repeats)| Some((*kind, repeats.due(now)?))).collect()
    }
}

impl Repeats {
    fn due(&mut self, now: Instant) -> Option<u64> {
        if self.untold == 0 || now.duration_since(self.told_at) < COUNT_PERIOD {
            return None;
        }
        self.told_at = now;
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_then_a_count_a_minute() {
        let begin = Instant::now();
        let mut tally = EventCounter::default();
        let kind = (0, Some(13));
        assert_eq!(tally.count(kind, begin), Some(1));
        for millisecond in 1..50_000 {
            assert_eq!(tally.count(kind, begin + Duration::from_millis(millisecond)), None);
        }
        assert_eq!(tally.due(begin + Duration::from_secs(59)), []);
        assert_eq!(tally.due(begin + COUNT_PERIOD), [(kind, 49_999)]);
        assert_eq!(tally.due(begin + COUNT_PERIOD * 3), [], "there was nothing more");
        assert_eq!(tally.count(kind, begin + COUNT_PERIOD * 3), Some(1));
    }

    #[test]
    fn every_device_and_every_xid_is_counted_by_itself_up_to_a_bound() {
        let now = Instant::now();
        let mut tally = EventCounter::default();
        for kind in [(0, Some(13)), (1, Some(13)), (0, Some(31)), (0, None)] {
            assert_eq!(tally.count(kind, now), Some(1));
        }
        for xid in 1000..100_000 {
            tally.count((0, Some(xid)), now);
        }
        assert_eq!(tally.0.len(), MAX_KINDS);
    }
}
