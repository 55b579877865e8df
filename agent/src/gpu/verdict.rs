//! The verdict: a pure function of the configuration, the facts of the machine and the answer of
//! the probe.

use std::fmt;

use serde::Serialize;
use serde_json::{Value as Json, json};

use super::pci::{PciAddress, PciDevice, PciFacts};
use super::probe::ProbeOutcome;
use super::reason::{Finding, Reason, sanitize_line};
use crate::config::{Config, Framework};
use crate::gpu::nvml_library::LibraryFile;
use crate::gpu::probe_child::{DriverReport, Fault, FaultKind, ProbeAnswer, ProbedGpu};
use crate::system::os_release::Distribution;
use crate::values::{DeviceName, DeviceSelection};

/// What the node runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// These GPUs.
    Gpu {
        /// The devices for the container, at least one.
        devices: Vec<GpuDevice>,
        /// Selected or assigned devices that are not among them, each a WARNING.
        missing: Vec<String>,
    },
    /// The CPU.
    Cpu {
        /// Why, where a GPU was wanted.
        finding: Option<Finding>,
    },
}

/// A GPU, or a MIG instance of one, that the container gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GpuDevice {
    /// NVML's index of the card.
    pub index: u32,
    /// `GPU-…` or `MIG-…`.
    pub uuid: String,
    /// The product's name.
    pub name: Option<String>,
    /// Where the card is, in sysfs' spelling.
    pub pci_address: String,
    /// Memory of the card or of the instance, in MiB.
    pub memory_mib: Option<u64>,
    /// `n` of the card's `/dev/nvidia<n>`.
    #[serde(skip)]
    pub minor: Option<u32>,
}

impl fmt::Display for GpuDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // All of it comes from the child that runs NVIDIA's code.
        let name = self.name.as_deref().unwrap_or("GPU");
        f.write_str(&sanitize_line(&format!("{name} ({}, {})", self.uuid, self.pci_address)))
    }
}

impl Verdict {
    /// The CPU, because nobody wanted a GPU: no warning.
    pub fn not_wanted() -> Self {
        Self::Cpu { finding: None }
    }

    /// The CPU, for this reason.
    pub fn cpu(finding: Finding) -> Self {
        Self::Cpu { finding: Some(finding) }
    }

    /// The devices of a GPU verdict; none on the CPU.
    pub fn devices(&self) -> &[GpuDevice] {
        match self {
            Self::Gpu { devices, .. } => devices,
            Self::Cpu { .. } => &[],
        }
    }

    /// Why the node is on the CPU although a GPU was wanted.
    pub fn finding(&self) -> Option<&Finding> {
        match self {
            Self::Gpu { .. } => None,
            Self::Cpu { finding } => finding.as_ref(),
        }
    }

    /// `cuda` or `cpu`, as PyTorch names them.
    pub fn device(&self) -> &'static str {
        match self {
            Self::Gpu { .. } => "cuda",
            Self::Cpu { .. } => "cpu",
        }
    }

    /// The form of `plan --json` and `gpu --json`; the fix is that of the distribution.
    pub fn to_json(&self, distribution: Distribution) -> Json {
        match self {
            Self::Gpu { devices, missing } => {
                json!({"device": "cuda", "devices": devices, "missing": missing})
            }
            Self::Cpu { finding: None } => {
                json!({"device": "cpu", "reason": null, "summary": null, "fix": null})
            }
            Self::Cpu { finding: Some(finding) } => json!({
                "device": "cpu",
                "reason": finding.reason,
                "summary": finding.summary,
                "fix": finding.reason.fix(distribution),
                "pci_address": finding.pci_address,
                "gpu_uuid": finding.gpu_uuid,
            }),
        }
    }
}

/// What can be said without the driver. `None`: ask it.
pub fn before_the_probe(config: &Config, facts: &PciFacts) -> Option<Verdict> {
    if !config.gpu_enabled {
        return Some(Verdict::not_wanted());
    }
    let finding = if config.framework == Framework::Sklearn {
        Some(Finding::new(
            Reason::FrameworkWithoutGpu,
            "scikit-learn (ML_FRAMEWORK=sklearn) has no GPU build",
        ))
    } else if config.devices == DeviceSelection::None {
        Some(Finding::new(
            Reason::DeviceSelectionEmpty,
            format!("FL_CUDA_VISIBLE_DEVICES='none' selects no GPU; {}", present_gpus(facts)),
        ))
    } else {
        without_driver(config, facts)
    };
    finding.map(|finding| Verdict::cpu(with_unreadable(finding, facts)))
}

fn present_gpus(facts: &PciFacts) -> String {
    let present: Vec<String> =
        facts.gpus().map(|gpu| format!("{} ({})", gpu.address, gpu.described())).collect();
    if present.is_empty() {
        "this VM has no NVIDIA GPU".into()
    } else {
        format!("this VM has {}", present.join(", "))
    }
}

/// A verdict that rests on a failed read says so.
fn with_unreadable(mut finding: Finding, facts: &PciFacts) -> Finding {
    if !facts.unreadable.is_empty() {
        finding.summary =
            format!("{} (could not be read: {})", finding.summary, facts.unreadable.join("; "));
    }
    finding
}

/// A assigned device that is not in the VM as a GPU.
struct BrokenPromise {
    place: String,
    /// Something else is there: the sound function of a card, a NIC, a disk.
    is_foreign: bool,
    sentence: String,
}

fn broken_promises(config: &Config, facts: &PciFacts) -> Vec<BrokenPromise> {
    config
        .assigned
        .iter()
        .filter_map(|assigned| {
            let place = assigned
                .address
                .map_or_else(|| assigned.written.clone(), |address| address.to_string());
            let promise = format!(
                "OpenNebula passed {place} to this VM ({}='{}')",
                assigned.variable, assigned.written
            );
            let (is_foreign, what) = match assigned.address {
                None => (false, "and that is not a PCI address".to_owned()),
                Some(address) => match facts.at(address) {
                    None => (false, "and there is no device at that address".to_owned()),
                    Some(device) if device.is_nvidia_display() => return None,
                    Some(device) => (
                        true,
                        format!(
                            "and the device there is not an NVIDIA GPU ({})",
                            device.described()
                        ),
                    ),
                },
            };
            Some(BrokenPromise { place, is_foreign, sentence: format!("{promise}, {what}") })
        })
        .collect()
}

fn without_driver(config: &Config, facts: &PciFacts) -> Option<Finding> {
    if facts.gpus().next().is_none() {
        let broken = broken_promises(config, facts);
        let Some(first) = broken.first() else {
            let what = format!(
                "OpenNebula passed no GPU to this VM (the context has no PCI<n>_ADDRESS of one), and there is no NVIDIA GPU (vendor 10de, class 03xx) among its {}",
                other_devices(facts)
            );
            return Some(Finding::new(Reason::GpuNotPresent, what));
        };
        let place = Some(first.place.clone());
        let sentences: Vec<&str> = broken.iter().map(|promise| promise.sentence.as_str()).collect();
        return Some(Finding {
            pci_address: place,
            ..Finding::new(Reason::GpuNotPassedThrough, sentences.join("; "))
        });
    }
    if facts.gpus().any(|gpu| gpu.driver.as_deref() == Some("nvidia")) {
        return None;
    }
    let (bound, unbound): (Vec<_>, Vec<_>) = facts.gpus().partition(|gpu| gpu.driver.is_some());
    let mut findings = bound.into_iter().chain(unbound).map(|gpu| not_driven(gpu, facts));
    let first = findings.next()?;
    let summaries: Vec<String> =
        std::iter::once(first.summary).chain(findings.map(|other| other.summary)).collect();
    Some(Finding { summary: summaries.join("; "), ..first })
}

/// The PCI devices of a VM without an NVIDIA GPU: their number, and those that one may have taken
/// for it.
fn other_devices(facts: &PciFacts) -> String {
    let similar: Vec<String> = facts
        .devices
        .iter()
        .filter(|device| device.is_similar_to_gpu())
        .map(|device| format!("{} ({})", device.address, device.described()))
        .collect();
    let count = facts.devices.len();
    let devices = if count == 1 { "1 PCI device".into() } else { format!("{count} PCI devices") };
    if similar.is_empty() {
        devices
    } else {
        format!("{devices}; those nearest to one are {}", similar.join(", "))
    }
}

/// Why NVIDIA's driver does not drive this GPU.
fn not_driven(gpu: &PciDevice, facts: &PciFacts) -> Finding {
    let (address, ids) = (gpu.address, gpu.ids());
    let (reason, what) = match gpu.driver.as_deref() {
        Some("nvidia") => (
            Reason::GpuCountZero,
            format!(
                "the GPU {address} ({ids}) is bound to the nvidia driver, which does not list it"
            ),
        ),
        Some(driver) => (
            Reason::WrongDriver,
            format!("the GPU {address} ({ids}) is bound to the driver {driver}, not to nvidia"),
        ),
        None => {
            let module = match (&facts.module_version, &facts.module_pending) {
                (_, Some(state)) => format!("the nvidia module is still {state}"),
                (Some(version), None) => {
                    format!("the nvidia module {version} is loaded and has not taken it")
                }
                (None, None) => not_loaded(facts),
            };
            (
                Reason::DriverNotLoaded,
                format!("no driver is bound to the GPU {address} ({ids}): {module}"),
            )
        }
    };
    Finding { pci_address: Some(address.to_string()), ..Finding::new(reason, what) }
}

/// That the module is not loaded, and what is seen of the causes.
fn not_loaded(facts: &PciFacts) -> String {
    let parts: Vec<String> = std::iter::once("the nvidia module is not loaded".into())
        .chain(facts.kernel.obstacles())
        .collect();
    parts.join("; ")
}

/// What follows from the driver's answer, once [`before_the_probe`] had nothing to say.
pub fn after_the_probe(config: &Config, facts: &PciFacts, outcome: &ProbeOutcome) -> Verdict {
    let finding = match outcome {
        ProbeOutcome::Answered(ProbeAnswer::Driver(report)) => {
            match select(config, facts, report) {
                Ok(verdict) => return verdict,
                Err(finding) => finding,
            }
        }
        ProbeOutcome::Answered(ProbeAnswer::Failed { fault, library }) => {
            driver_failure(fault, library, facts)
        }
        ProbeOutcome::TimedOut { limit, library } => about_the_gpus(
            Reason::DriverTimeout,
            format!(
                "NVML gave no answer within {} s, and the probe was killed{}",
                limit.as_secs_f64(),
                library_in_words(library)
            ),
            facts,
        ),
        ProbeOutcome::Crashed { signal, said, library } => {
            let said = if said.is_empty() {
                String::new()
            } else {
                format!(", with the last words: {said}")
            };
            let name = signal_name(*signal);
            let what = format!(
                "the probe died by signal {signal}{name} while it asked NVIDIA's library{said}{}",
                library_in_words(library)
            );
            about_the_gpus(Reason::DriverCrash, what, facts)
        }
        ProbeOutcome::Failed(why) => about_the_gpus(Reason::DriverError, why.clone(), facts),
    };
    Verdict::cpu(with_unreadable(finding, facts))
}

/// A finding about the driver as a whole, with the GPUs that it should drive.
fn about_the_gpus(reason: Reason, what: String, facts: &PciFacts) -> Finding {
    let module = facts
        .module_version
        .as_deref()
        .map_or(String::new(), |version| format!(", nvidia module {version}"));
    Finding {
        pci_address: facts.gpus().next().map(|gpu| gpu.address.to_string()),
        ..Finding::new(reason, format!("{what}; {}{module}", present_gpus(facts)))
    }
}

pub(crate) fn signal_name(signal: i32) -> &'static str {
    match signal {
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        8 => " (SIGFPE)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        _ => "",
    }
}

/// NVML's return codes (nvml.h, `nvmlReturn_t`) that have a reason of their own; every other one is
/// `driver-error`.
const REASONS_BY_CODE: &[(u32, Reason)] = &[
    (4, Reason::PermissionDenied),
    (8, Reason::GpuUnhealthy),
    (9, Reason::DriverNotLoaded),
    (11, Reason::GpuUnhealthy),
    (12, Reason::DriverLibraryMissing),
    (13, Reason::DriverTooOld),
    (14, Reason::GpuUnhealthy),
    (15, Reason::GpuLost),
    (16, Reason::GpuResetRequired),
    (17, Reason::PermissionDenied),
    (18, Reason::DriverLibraryMismatch),
    (27, Reason::DriverNotReady),
    (28, Reason::GpuCountZero),
];

/// What NVML's newer codes say; nvml-wrapper knows none of them by name.
const NEWER_TEXTS: &[(u32, &str)] = &[
    (23, "not enough resources"),
    (24, "the frequency is not supported"),
    (25, "the version of an argument is not supported"),
    (26, "the function is deprecated"),
    (27, "the driver is not ready"),
    (28, "no supported GPU was found"),
    (29, "the state is not valid"),
    (30, "the reset type is not supported"),
];

fn reason_of(fault: &Fault) -> Reason {
    match fault.kind {
        FaultKind::Library => Reason::DriverLibraryMissing,
        FaultKind::Symbol => Reason::DriverTooOld,
        FaultKind::InvalidResponse => Reason::DriverError,
        FaultKind::Code(code) => REASONS_BY_CODE
            .iter()
            .find(|(known, _)| *known == code)
            .map_or(Reason::DriverError, |(_, reason)| *reason),
    }
}

pub(crate) fn describe_fault(fault: &Fault) -> String {
    let Fault { call, kind, text } = fault;
    match kind {
        FaultKind::Library => text.clone(),
        FaultKind::Symbol => format!("{call} is not to be had: {text}"),
        FaultKind::InvalidResponse => format!("what {call} answered makes no sense: {text}"),
        FaultKind::Code(code) => {
            let text = NEWER_TEXTS
                .iter()
                .find(|(known, _)| known == code)
                .map_or(text.as_str(), |(_, text)| text);
            format!("{call} answered NVML error {code}: {text}")
        }
    }
}

fn driver_failure(fault: &Fault, library: &LibraryFile, facts: &PciFacts) -> Finding {
    let reason = reason_of(fault);
    let what = describe_fault(fault);
    let summary = match reason {
        Reason::DriverLibraryMissing => {
            let why = match library {
                LibraryFile { path: Some(path), damage: Some(damage), .. } => {
                    format!(": {path}: {damage}")
                }
                LibraryFile { path: None, .. } if fault.kind == FaultKind::Library => {
                    ": it is not installed".into()
                }
                _ => String::new(),
            };
            format!("libnvidia-ml cannot be loaded{why} ({what})")
        }
        Reason::DriverLibraryMismatch => format!(
            "the library is {}, the loaded kernel module is {} ({what})",
            library.version.as_deref().unwrap_or("of an unknown version"),
            facts.module_version.as_deref().unwrap_or("of an unknown version"),
        ),
        Reason::DriverNotLoaded if facts.module_version.is_none() => {
            format!("{what}{}; {}", library_in_words(library), not_loaded(facts))
        }
        _ => format!("{what}{}", library_in_words(library)),
    };
    about_the_gpus(reason, summary, facts)
}

/// Which library answered, as the end of a sentence; nothing where it is not known.
fn library_in_words(library: &LibraryFile) -> String {
    match library {
        LibraryFile { path: Some(path), version: Some(version), .. } => {
            format!("; the library is {path}, version {version}")
        }
        LibraryFile { path: Some(path), .. } => format!("; the library is {path}"),
        LibraryFile { path: None, .. } => String::new(),
    }
}

/// Why a GPU that the driver lists cannot be used.
fn illness(gpu: &ProbedGpu) -> Option<Finding> {
    let (reason, what) = match (&gpu.fault, gpu.ailments.as_slice()) {
        (Some(fault), _) => (reason_of(fault), describe_fault(fault)),
        (None, []) => return None,
        (None, ailments) => (Reason::GpuUnhealthy, ailments.join("; ")),
    };
    Some(Finding {
        pci_address: gpu.pci_address.clone(),
        gpu_uuid: gpu.uuid.clone(),
        ..Finding::new(reason, format!("{}: {what}", title(gpu)))
    })
}

fn title(gpu: &ProbedGpu) -> String {
    let mut title = format!("GPU {}", gpu.index);
    for part in [&gpu.name, &gpu.uuid, &gpu.pci_address].into_iter().flatten() {
        title = format!("{title}, {part}");
    }
    title
}

fn select(config: &Config, facts: &PciFacts, report: &DriverReport) -> Result<Verdict, Finding> {
    if report.gpus.is_empty() {
        let driver = report.driver_version.as_deref().unwrap_or("of an unknown version");
        let what = format!("the driver {driver} is loaded and sees no GPU");
        return Err(about_the_gpus(Reason::GpuCountZero, what, facts));
    }
    // With a card come functions that are no GPU, and not every passed-through device need be one.
    let broken = broken_promises(config, facts).into_iter().filter(|promise| !promise.is_foreign);
    let mut missing: Vec<String> = broken.map(|promise| promise.sentence).collect();
    let meant: Vec<Found<'_>> = match &config.devices {
        DeviceSelection::Named(names) => {
            names.iter().map(|name| find(name, facts, report)).collect()
        }
        DeviceSelection::All | DeviceSelection::None => {
            let listed = report.gpus.iter().map(|gpu| Found::Gpu(gpu, None));
            listed.chain(unlisted_gpus(facts, report).map(Found::NotDriven)).collect()
        }
    };
    let mut devices: Vec<GpuDevice> = Vec::new();
    // Why cards that are meant cannot be used, and which names mean none.
    let (mut causes, mut misses) = (Vec::new(), Vec::new());
    for found in meant {
        match found {
            Found::Gpu(gpu, instance) => match illness(gpu) {
                Some(illness) => causes.push(illness),
                None => {
                    for device in usable_parts(gpu, instance) {
                        if !devices.contains(&device) {
                            devices.push(device);
                        }
                    }
                }
            },
            Found::NotDriven(gpu) => causes.push(not_driven(gpu, facts)),
            Found::Nothing(why) => misses.push(why),
        }
    }
    if !devices.is_empty() {
        missing.extend(causes.iter().map(|cause| format!("{} ({})", cause.summary, cause.reason)));
        if !misses.is_empty() {
            missing.push(format!("{}; this VM has: {}", misses.join("; "), listing(facts, report)));
        }
        return Ok(Verdict::Gpu { devices, missing });
    }
    if let Some(cause) =
        causes.into_iter().next().or_else(|| nameless_illness(&config.devices, report))
    {
        return Err(cause);
    }
    let why = if misses.is_empty() { String::new() } else { format!(" ({})", misses.join("; ")) };
    Err(Finding::new(
        Reason::DeviceSelectionEmpty,
        format!(
            "FL_CUDA_VISIBLE_DEVICES='{}' selects no usable GPU of this VM{why}, which has: {}",
            config.devices,
            listing(facts, report)
        ),
    ))
}

/// The illness of a card that could not even tell the UUID or the address by which it is named.
fn nameless_illness(selection: &DeviceSelection, report: &DriverReport) -> Option<Finding> {
    let DeviceSelection::Named(names) = selection else {
        return None;
    };
    let may_be_meant = |gpu: &ProbedGpu| {
        names.iter().any(|name| match name {
            DeviceName::Index(_) => false,
            DeviceName::Pci(_) => gpu.pci_address.is_none(),
            DeviceName::GpuUuid(_) | DeviceName::MigUuid(_) => gpu.uuid.is_none(),
        })
    };
    report.gpus.iter().filter(|gpu| may_be_meant(gpu)).find_map(illness)
}

/// The card, or its MIG instances where it is in MIG mode; only `instance`, where one is named.
fn usable_parts(gpu: &ProbedGpu, instance: Option<&str>) -> Vec<GpuDevice> {
    let part = |uuid: &str, name: &Option<String>, memory_mib: Option<u64>| GpuDevice {
        index: gpu.index,
        uuid: uuid.into(),
        name: name.clone().or_else(|| gpu.name.clone()),
        pci_address: gpu.pci_address.clone().unwrap_or_default(),
        memory_mib,
        minor: gpu.minor,
    };
    match &gpu.mig {
        Some(instances) => instances
            .iter()
            .filter(|candidate| instance.is_none_or(|uuid| uuid == candidate.uuid))
            .map(|instance| part(&instance.uuid, &instance.name, instance.memory_mib))
            .collect(),
        None => gpu.uuid.iter().map(|uuid| part(uuid, &gpu.name, gpu.memory_mib)).collect(),
    }
}

/// What a name of `FL_CUDA_VISIBLE_DEVICES` means.
enum Found<'r> {
    /// This card, and this MIG instance of it where the name is an instance's.
    Gpu(&'r ProbedGpu, Option<&'r str>),
    /// A GPU on the bus that the driver does not list.
    NotDriven(&'r PciDevice),
    /// No card, or no single one: why.
    Nothing(String),
}

fn find<'r>(name: &DeviceName, facts: &'r PciFacts, report: &'r DriverReport) -> Found<'r> {
    let candidates: Vec<(&ProbedGpu, Option<&str>)> = match name {
        DeviceName::Index(index) => {
            report.gpus.iter().filter(|gpu| gpu.index == *index).map(|gpu| (gpu, None)).collect()
        }
        DeviceName::Pci(address) => report
            .gpus
            .iter()
            .filter(|gpu| address_of(gpu) == Some(*address))
            .map(|gpu| (gpu, None))
            .collect(),
        DeviceName::GpuUuid(beginning) => report
            .gpus
            .iter()
            .filter(|gpu| gpu.uuid.as_deref().is_some_and(|uuid| begins_with(uuid, beginning)))
            .map(|gpu| (gpu, None))
            .collect(),
        DeviceName::MigUuid(beginning) => report
            .gpus
            .iter()
            .flat_map(|gpu| {
                gpu.mig.iter().flatten().map(move |instance| (gpu, instance.uuid.as_str()))
            })
            .filter(|(_, uuid)| begins_with(uuid, beginning))
            .map(|(gpu, uuid)| (gpu, Some(uuid)))
            .collect(),
    };
    let on_the_bus = match name {
        DeviceName::Pci(address) => {
            unlisted_gpus(facts, report).find(|gpu| gpu.address == *address)
        }
        _ => None,
    };
    match (candidates.as_slice(), on_the_bus) {
        ([(gpu, instance)], _) => Found::Gpu(gpu, *instance),
        ([], Some(gpu)) => Found::NotDriven(gpu),
        ([], None) => Found::Nothing(format!(
            "FL_CUDA_VISIBLE_DEVICES names '{name}', which is not in this VM"
        )),
        _ => Found::Nothing(format!(
            "FL_CUDA_VISIBLE_DEVICES names '{name}', with which several UUIDs begin"
        )),
    }
}

fn address_of(gpu: &ProbedGpu) -> Option<PciAddress> {
    gpu.pci_address.as_deref().and_then(PciAddress::parse)
}

fn begins_with(uuid: &str, beginning: &str) -> bool {
    uuid.get(..beginning.len()).is_some_and(|head| head.eq_ignore_ascii_case(beginning))
}

fn listing(facts: &PciFacts, report: &DriverReport) -> String {
    let listed = report.gpus.iter().map(|gpu| match &gpu.mig {
        None => title(gpu),
        Some(instances) if instances.is_empty() => {
            format!("{} (in MIG mode, without an instance)", title(gpu))
        }
        Some(instances) => {
            let uuids: Vec<&str> =
                instances.iter().map(|instance| instance.uuid.as_str()).collect();
            format!("{} (MIG: {})", title(gpu), uuids.join(", "))
        }
    });
    let unlisted = unlisted_gpus(facts, report).map(|gpu| not_driven(gpu, facts).summary);
    listed.chain(unlisted).collect::<Vec<_>>().join("; ")
}

/// GPUs on the bus that the driver does not list: on another driver, on none, or refused by it.
fn unlisted_gpus<'r>(
    facts: &'r PciFacts,
    report: &'r DriverReport,
) -> impl Iterator<Item = &'r PciDevice> {
    // A card that could not tell its address may be any of them.
    let all_tell = report.gpus.iter().all(|gpu| address_of(gpu).is_some());
    facts.gpus().filter(move |gpu| {
        all_tell && !report.gpus.iter().any(|other| address_of(other) == Some(gpu.address))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::Duration;

    use one_context::Context;

    use super::super::kernel::KernelFacts;
    use super::super::probe_child::ProbedMig;
    use super::*;
    use crate::config::Prebaked;

    const A: &str = "0000:01:00.0";
    const B: &str = "0000:21:00.0";

    fn config(pairs: &[(&str, &str)]) -> Config {
        let mut text = String::from("FL_GPU_ENABLED='YES'\n");
        for (name, value) in pairs {
            text.push_str(&format!("{name}='{value}'\n"));
        }
        Config::from_context(&Context::parse(text.as_bytes()).unwrap(), &Prebaked::default())
            .unwrap()
            .0
    }

    fn device(address: &str, vendor: u32, class: u32, driver: Option<&str>) -> PciDevice {
        PciDevice {
            address: PciAddress::parse(address).unwrap(),
            vendor,
            device: Some(0x20b5),
            class,
            driver: driver.map(String::from),
        }
    }

    fn gpu_at(address: &str, driver: Option<&str>) -> PciDevice {
        device(address, 0x10de, 0x03_02_00, driver)
    }

    fn facts(devices: &[PciDevice]) -> PciFacts {
        PciFacts {
            devices: devices.to_vec(),
            module_version: Some("550.54.15".into()),
            ..PciFacts::default()
        }
    }

    fn probed(index: u32, uuid: &str, address: &str) -> ProbedGpu {
        ProbedGpu {
            index,
            uuid: Some(uuid.into()),
            name: Some("NVIDIA A100".into()),
            pci_address: Some(address.into()),
            memory_mib: Some(40_960),
            minor: Some(index),
            ..ProbedGpu::default()
        }
    }

    fn report(gpus: Vec<ProbedGpu>) -> ProbeOutcome {
        ProbeOutcome::Answered(ProbeAnswer::Driver(DriverReport {
            driver_version: Some("550.54.15".into()),
            gpus,
        }))
    }

    fn failed(kind: FaultKind, text: &str) -> ProbeOutcome {
        let fault = Fault { call: "nvmlInit_v2".into(), kind, text: text.into() };
        let library = LibraryFile { version: Some("560.35.03".into()), ..LibraryFile::default() };
        ProbeOutcome::Answered(ProbeAnswer::Failed { fault, library })
    }

    fn decide(config: &Config, facts: &PciFacts, outcome: &ProbeOutcome) -> Verdict {
        before_the_probe(config, facts).unwrap_or_else(|| after_the_probe(config, facts, outcome))
    }

    fn finding(verdict: Verdict) -> Finding {
        match verdict {
            Verdict::Cpu { finding: Some(finding) } => finding,
            other => panic!("{other:?}"),
        }
    }

    fn uuids(verdict: &Verdict) -> Vec<&str> {
        verdict.devices().iter().map(|device| device.uuid.as_str()).collect()
    }

    fn two() -> (PciFacts, ProbeOutcome) {
        let outcome = report(vec![probed(0, "GPU-aaaa-1", A), probed(1, "GPU-aabb-2", B)]);
        (facts(&[gpu_at(A, Some("nvidia")), gpu_at(B, Some("nvidia"))]), outcome)
    }

    #[test]
    fn what_a_device_is_called_is_one_line_in_which_nothing_acts_upon_a_terminal() {
        let device = GpuDevice {
            index: 0,
            uuid: "G\x7fU-5d".into(),
            name: Some("A100\n\x1b[31m".into()),
            pci_address: "0000:01:00.0".into(),
            memory_mib: None,
            minor: None,
        };
        assert_eq!(device.to_string(), "A100 [31m (GU-5d, 0000:01:00.0)");
    }

    #[test]
    fn every_reason_that_is_decided_before_the_launch_is_reached() {
        let on_nvidia = facts(&[gpu_at(A, Some("nvidia"))]);
        let sick = |change: fn(&mut ProbedGpu)| {
            let mut gpu = probed(0, "GPU-1", A);
            change(&mut gpu);
            report(vec![gpu])
        };
        let code = |code| failed(FaultKind::Code(code), "text");
        let none = facts(&[]);
        let unasked = ProbeOutcome::Failed("must not be asked".into());
        let assigned = [("PCI0_ADDRESS", "01:00.0")];
        let cases: Vec<(&str, Config, PciFacts, ProbeOutcome)> = vec![
            ("gpu-not-present", config(&[]), none.clone(), unasked.clone()),
            ("gpu-not-passed-through", config(&assigned), none.clone(), unasked.clone()),
            (
                "gpu-not-passed-through",
                config(&assigned),
                facts(&[device(A, 0x8086, 0x02_00_00, Some("igb"))]),
                unasked.clone(),
            ),
            ("driver-not-loaded", config(&[]), facts(&[gpu_at(A, None)]), unasked.clone()),
            ("driver-not-loaded", config(&[]), on_nvidia.clone(), code(9)),
            ("wrong-driver", config(&[]), facts(&[gpu_at(A, Some("nouveau"))]), unasked.clone()),
            (
                "driver-library-missing",
                config(&[]),
                on_nvidia.clone(),
                failed(FaultKind::Library, "No such file"),
            ),
            ("driver-library-missing", config(&[]), on_nvidia.clone(), code(12)),
            ("driver-library-mismatch", config(&[]), on_nvidia.clone(), code(18)),
            (
                "driver-too-old",
                config(&[]),
                on_nvidia.clone(),
                failed(FaultKind::Symbol, "undefined symbol"),
            ),
            ("driver-too-old", config(&[]), on_nvidia.clone(), code(13)),
            ("driver-not-ready", config(&[]), on_nvidia.clone(), code(27)),
            (
                "driver-timeout",
                config(&[]),
                on_nvidia.clone(),
                ProbeOutcome::TimedOut {
                    limit: Duration::from_secs(20),
                    library: LibraryFile::default(),
                },
            ),
            (
                "driver-crash",
                config(&[]),
                on_nvidia.clone(),
                ProbeOutcome::Crashed {
                    signal: 11,
                    said: String::new(),
                    library: LibraryFile::default(),
                },
            ),
            ("driver-error", config(&[]), on_nvidia.clone(), code(999)),
            ("driver-error", config(&[]), on_nvidia.clone(), code(20)),
            ("permission-denied", config(&[]), on_nvidia.clone(), code(4)),
            ("permission-denied", config(&[]), on_nvidia.clone(), code(17)),
            ("gpu-count-zero", config(&[]), on_nvidia.clone(), report(vec![])),
            ("gpu-count-zero", config(&[]), on_nvidia.clone(), code(28)),
            ("gpu-lost", config(&[]), on_nvidia.clone(), code(15)),
            ("gpu-reset-required", config(&[]), on_nvidia.clone(), code(16)),
            ("gpu-unhealthy", config(&[]), on_nvidia.clone(), code(14)),
            (
                "gpu-unhealthy",
                config(&[]),
                on_nvidia.clone(),
                sick(|gpu| gpu.ailments.push("2 uncorrectable ECC errors".into())),
            ),
            (
                "gpu-lost",
                config(&[]),
                on_nvidia.clone(),
                sick(|gpu| {
                    gpu.fault = Some(Fault {
                        call: "c".into(),
                        kind: FaultKind::Code(15),
                        text: "t".into(),
                    });
                }),
            ),
            (
                "device-selection-empty",
                config(&[("FL_CUDA_VISIBLE_DEVICES", "7")]),
                on_nvidia.clone(),
                report(vec![probed(0, "GPU-1", A)]),
            ),
            (
                "device-selection-empty",
                config(&[("FL_CUDA_VISIBLE_DEVICES", "none")]),
                on_nvidia.clone(),
                unasked.clone(),
            ),
            (
                "framework-without-gpu",
                config(&[("ML_FRAMEWORK", "sklearn")]),
                on_nvidia.clone(),
                unasked,
            ),
        ];
        let mut reached = HashSet::new();
        for (expected, config, facts, outcome) in cases {
            let finding = finding(decide(&config, &facts, &outcome));
            assert_eq!(finding.reason.code(), expected, "{}", finding.summary);
            assert!(!finding.summary.is_empty() && !finding.summary.contains("must not be asked"));
            reached.insert(finding.reason);
        }
        let at_the_launch = [
            Reason::RuntimeMissing,
            Reason::RuntimeNotConfigured,
            Reason::RuntimeStartFailed,
            Reason::GpuNotVisible,
            Reason::GpuFailed,
        ];
        for entry in super::super::reason::CATALOGUE {
            assert!(
                reached.contains(&entry.reason) != at_the_launch.contains(&entry.reason),
                "{}",
                entry.code
            );
        }
    }

    #[test]
    fn every_nvml_code_leads_to_a_reason_and_is_told_with_its_number() {
        for code in (1..=30).chain([999]) {
            let finding = finding(decide(
                &config(&[]),
                &facts(&[gpu_at(A, Some("nvidia"))]),
                &failed(FaultKind::Code(code), "text"),
            ));
            assert!(
                finding.summary.contains(&format!("error {code}:")) || code == 12,
                "{}",
                finding.summary
            );
        }
    }

    #[test]
    fn a_gpu_that_is_not_wanted_is_no_finding() {
        let config = config(&[]);
        let unwanted = Config { gpu_enabled: false, ..config };
        assert_eq!(before_the_probe(&unwanted, &two().0), Some(Verdict::Cpu { finding: None }));
    }

    #[test]
    fn the_summary_says_what_was_promised_and_what_is_there() {
        let assigned = config(&[("PCI0_ADDRESS", "01:00.0")]);
        let finding_of = |facts| finding(before_the_probe(&assigned, &facts).unwrap());
        assert_eq!(
            finding_of(facts(&[])).summary,
            "OpenNebula passed 0000:01:00.0 to this VM (PCI0_ADDRESS='01:00.0'), and there is no device at that address"
        );
        assert_eq!(
            finding_of(facts(&[device(A, 0x8086, 0x02_00_00, Some("igb"))])).summary,
            "OpenNebula passed 0000:01:00.0 to this VM (PCI0_ADDRESS='01:00.0'), and the device there is not an NVIDIA GPU (8086:20b5, class 0200, driver igb)"
        );
        assert_eq!(
            finding_of(facts(&[gpu_at(A, Some("nouveau"))])).summary,
            "the GPU 0000:01:00.0 (10de:20b5, class 0302) is bound to the driver nouveau, not to nvidia"
        );
        let both = finding(decide(&assigned, &two().0, &failed(FaultKind::Code(18), "mismatch")));
        assert!(
            both.summary.contains("560.35.03") && both.summary.contains("550.54.15"),
            "{}",
            both.summary
        );
    }

    #[test]
    fn what_keeps_the_module_from_being_loaded_is_told_where_it_is_seen() {
        let bare = PciFacts { module_version: None, ..facts(&[gpu_at(A, None)]) };
        let summary = |kernel| {
            let facts = PciFacts { kernel, ..bare.clone() };
            finding(before_the_probe(&config(&[]), &facts).unwrap()).summary
        };
        let start = "no driver is bound to the GPU 0000:01:00.0 (10de:20b5, class 0302): the nvidia module is not loaded";
        assert_eq!(summary(KernelFacts::default()), start);
        let kernel = |has_module, has_headers, secure_boot| KernelFacts {
            release: Some("6.1.0-9-amd64".into()),
            has_module: Some(has_module),
            dkms: None,
            has_headers: Some(has_headers),
            secure_boot: Some(secure_boot),
        };
        assert_eq!(
            summary(kernel(false, false, false)),
            format!(
                "{start}; none is installed for the kernel 6.1.0-9-amd64; the headers of the kernel 6.1.0-9-amd64, without which DKMS builds none, are not installed"
            )
        );
        assert_eq!(
            summary(kernel(true, false, true)),
            format!(
                "{start}; one is installed for the kernel 6.1.0-9-amd64; Secure Boot is on, so the kernel refuses a module without a signature that it knows"
            )
        );
        // Where a driver is bound, NVML alone says that none is loaded.
        let facts = PciFacts {
            module_version: None,
            kernel: kernel(false, true, false),
            ..facts(&[gpu_at(A, Some("nvidia"))])
        };
        let by_nvml =
            finding(decide(&config(&[]), &facts, &failed(FaultKind::Code(9), "no driver"))).summary;
        assert!(
            by_nvml
                .contains("error 9: no driver; the nvidia module is not loaded; none is installed"),
            "{by_nvml}"
        );
    }

    #[test]
    fn a_vm_without_a_gpu_is_told_with_what_it_has_instead() {
        let screen = device("0000:00:02.0", 0x1234, 0x03_00_00, Some("bochs-drm"));
        let facts =
            facts(&[screen, device("0000:00:03.0", 0x1af4, 0x02_00_00, Some("virtio-pci"))]);
        assert_eq!(
            finding(before_the_probe(&config(&[]), &facts).unwrap()).summary,
            "OpenNebula passed no GPU to this VM (the context has no PCI<n>_ADDRESS of one), and there is no NVIDIA GPU (vendor 10de, class 03xx) among its 2 PCI devices; those nearest to one are 0000:00:02.0 (1234:20b5, class 0300, driver bochs-drm)"
        );
    }

    #[test]
    fn every_gpu_that_is_not_driven_is_told() {
        let facts = facts(&[gpu_at(A, None), gpu_at(B, Some("nouveau"))]);
        let finding = finding(before_the_probe(&config(&[]), &facts).unwrap());
        assert_eq!(
            (finding.reason, finding.pci_address.as_deref()),
            (Reason::WrongDriver, Some(B))
        );
        assert!(finding.summary.contains(A) && finding.summary.contains(B), "{}", finding.summary);
    }

    #[test]
    fn a_verdict_on_a_failed_read_says_so() {
        let facts = PciFacts {
            unreadable: vec!["/sys/bus/pci/devices: Permission denied".into()],
            ..facts(&[])
        };
        let finding = finding(before_the_probe(&config(&[]), &facts).unwrap());
        assert!(
            finding.summary.contains("could not be read: /sys/bus/pci/devices: Permission denied")
        );
    }

    #[test]
    fn a_broken_promise_beside_a_good_gpu_is_a_warning() {
        let config = config(&[("PCI0_ADDRESS", "01:00.0"), ("PCI1_ADDRESS", "21:00.0")]);
        let facts = facts(&[gpu_at(A, Some("nvidia"))]);
        let verdict = decide(&config, &facts, &report(vec![probed(0, "GPU-1", A)]));
        let Verdict::Gpu { devices, missing } = verdict else { panic!("{verdict:?}") };
        assert_eq!((devices.len(), missing.len()), (1, 1));
        assert!(missing[0].contains("0000:21:00.0"), "{missing:?}");
    }

    #[test]
    fn one_gpu_is_selected_by_index_uuid_prefix_or_pci_address() {
        let (facts, outcome) = two();
        for (selection, expected) in [
            ("all", vec!["GPU-aaaa-1", "GPU-aabb-2"]),
            ("1", vec!["GPU-aabb-2"]),
            ("gpu-AAB", vec!["GPU-aabb-2"]),
            ("01:00.0", vec!["GPU-aaaa-1"]),
            ("00000000:21:00.0", vec!["GPU-aabb-2"]),
            ("1,0", vec!["GPU-aabb-2", "GPU-aaaa-1"]),
            ("1,GPU-aabb,21:00.0", vec!["GPU-aabb-2"]),
        ] {
            let verdict =
                decide(&config(&[("FL_CUDA_VISIBLE_DEVICES", selection)]), &facts, &outcome);
            assert_eq!(uuids(&verdict), expected, "{selection}");
        }
    }

    #[test]
    fn what_is_selected_and_not_there_is_told_with_what_is() {
        let (facts, outcome) = two();
        let verdict = decide(&config(&[("FL_CUDA_VISIBLE_DEVICES", "1,5")]), &facts, &outcome);
        let Verdict::Gpu { missing, .. } = &verdict else { panic!("{verdict:?}") };
        assert!(missing[0].contains("'5'") && missing[0].contains("GPU-aaaa-1"), "{missing:?}");
        for selection in ["5", "GPU-aa", "GPU-c", "99:00.0"] {
            let verdict =
                decide(&config(&[("FL_CUDA_VISIBLE_DEVICES", selection)]), &facts, &outcome);
            let finding = finding(verdict);
            assert_eq!(finding.reason, Reason::DeviceSelectionEmpty);
            assert!(finding.summary.contains("GPU-aabb-2"), "{}", finding.summary);
        }
    }

    #[test]
    fn a_beginning_that_several_uuids_have_is_called_that() {
        let (facts, outcome) = two();
        let ambiguous =
            finding(decide(&config(&[("FL_CUDA_VISIBLE_DEVICES", "GPU-aa")]), &facts, &outcome));
        assert!(
            ambiguous.summary.contains("'GPU-aa', with which several UUIDs begin"),
            "{}",
            ambiguous.summary
        );
    }

    #[test]
    fn a_named_gpu_that_the_driver_does_not_drive_is_told_with_its_own_cause() {
        let outcome = report(vec![probed(0, "GPU-1", A)]);
        for (driver, reason) in [
            (Some("nouveau"), Reason::WrongDriver),
            (None, Reason::DriverNotLoaded),
            (Some("nvidia"), Reason::GpuCountZero),
        ] {
            let facts = facts(&[gpu_at(A, Some("nvidia")), gpu_at(B, driver)]);
            let by_address = finding(decide(
                &config(&[("FL_CUDA_VISIBLE_DEVICES", "21:00.0")]),
                &facts,
                &outcome,
            ));
            assert_eq!((by_address.reason, by_address.pci_address.as_deref()), (reason, Some(B)));
            // By a name that the driver alone gives, it is among what there is.
            let by_index =
                finding(decide(&config(&[("FL_CUDA_VISIBLE_DEVICES", "1")]), &facts, &outcome));
            assert_eq!(by_index.reason, Reason::DeviceSelectionEmpty);
            assert!(by_index.summary.contains(B), "{}", by_index.summary);
            // Without a selection it is a WARNING beside the good one.
            let Verdict::Gpu { missing, .. } = decide(&config(&[]), &facts, &outcome) else {
                panic!("not on the GPU")
            };
            assert!(missing.len() == 1 && missing[0].contains(B), "{missing:?}");
        }
    }

    #[test]
    fn a_card_that_cannot_tell_its_uuid_may_be_the_one_that_is_named_by_it() {
        let mut mute = probed(0, "", A);
        mute.uuid = None;
        mute.fault = Some(Fault {
            call: "nvmlDeviceGetUUID".into(),
            kind: FaultKind::Code(15),
            text: "lost".into(),
        });
        let facts = facts(&[gpu_at(A, Some("nvidia"))]);
        let reason = |selection| {
            let config = config(&[("FL_CUDA_VISIBLE_DEVICES", selection)]);
            finding(decide(&config, &facts, &report(vec![mute.clone()]))).reason
        };
        assert_eq!(reason("GPU-1"), Reason::GpuLost);
        assert_eq!(reason("0"), Reason::GpuLost);
        assert_eq!(reason("1"), Reason::DeviceSelectionEmpty);
        assert_eq!(reason("21:00.0"), Reason::DeviceSelectionEmpty);
    }

    #[test]
    fn an_address_that_is_none_leaves_open_which_gpu_of_the_bus_it_is() {
        let facts = facts(&[gpu_at(A, Some("nvidia"))]);
        let verdict = decide(&config(&[]), &facts, &report(vec![probed(0, "GPU-1", "garbage")]));
        let Verdict::Gpu { missing, .. } = verdict else { panic!("{verdict:?}") };
        assert_eq!(missing, Vec::<String>::new());
    }

    #[test]
    fn a_promised_device_that_is_no_gpu_beside_a_good_one_is_no_warning() {
        let config = config(&[("PCI0_ADDRESS", "01:00.0"), ("PCI1_ADDRESS", "01:00.1")]);
        let sound = device("0000:01:00.1", 0x10de, 0x04_03_00, Some("snd_hda_intel"));
        let facts = facts(&[gpu_at(A, Some("nvidia")), sound]);
        let verdict = decide(&config, &facts, &report(vec![probed(0, "GPU-1", A)]));
        let Verdict::Gpu { missing, .. } = verdict else { panic!("{verdict:?}") };
        assert_eq!(missing, Vec::<String>::new());
    }

    #[test]
    fn a_sick_gpu_beside_a_good_one_is_left_out_with_a_warning() {
        let (facts, _) = two();
        let mut lost = probed(0, "GPU-aaaa-1", A);
        lost.fault = Some(Fault {
            call: "nvmlDeviceGetName".into(),
            kind: FaultKind::Code(15),
            text: "lost".into(),
        });
        let outcome = report(vec![lost, probed(1, "GPU-aabb-2", B)]);
        let verdict = decide(&config(&[]), &facts, &outcome);
        assert_eq!(uuids(&verdict), ["GPU-aabb-2"]);
        let finding =
            finding(decide(&config(&[("FL_CUDA_VISIBLE_DEVICES", "0")]), &facts, &outcome));
        assert_eq!(
            (finding.reason, finding.gpu_uuid.as_deref()),
            (Reason::GpuLost, Some("GPU-aaaa-1"))
        );
    }

    #[test]
    fn a_card_in_mig_mode_shows_its_instances() {
        let facts = facts(&[gpu_at(A, Some("nvidia"))]);
        let instance =
            |uuid: &str| ProbedMig { uuid: uuid.into(), name: None, memory_mib: Some(4864) };
        let mut card = probed(0, "GPU-1", A);
        card.mig = Some(vec![instance("MIG-aa"), instance("MIG-bb")]);
        let outcome = report(vec![card.clone()]);
        let select = |selection| {
            decide(&config(&[("FL_CUDA_VISIBLE_DEVICES", selection)]), &facts, &outcome)
        };
        assert_eq!(uuids(&select("all")), ["MIG-aa", "MIG-bb"]);
        assert_eq!(uuids(&select("MIG-b")), ["MIG-bb"]);
        assert_eq!(select("MIG-b").devices()[0].memory_mib, Some(4864));
        card.mig = Some(vec![]);
        assert_eq!(
            finding(decide(&config(&[]), &facts, &report(vec![card]))).reason,
            Reason::DeviceSelectionEmpty
        );
    }

    #[test]
    fn the_json_names_the_devices_or_the_reason_with_its_fix() {
        let (facts, outcome) = two();
        let on_one = decide(&config(&[("FL_CUDA_VISIBLE_DEVICES", "0,7")]), &facts, &outcome);
        let Verdict::Gpu { missing, .. } = &on_one else { panic!("{on_one:?}") };
        let device = json!({
            "index": 0,
            "uuid": "GPU-aaaa-1",
            "name": "NVIDIA A100",
            "pci_address": A,
            "memory_mib": 40_960,
        });
        assert_eq!(
            on_one.to_json(Distribution::Debian),
            json!({"device": "cuda", "devices": [device], "missing": missing})
        );
        assert_eq!(
            Verdict::not_wanted().to_json(Distribution::Debian),
            json!({"device": "cpu", "reason": null, "summary": null, "fix": null})
        );
        let lost =
            Finding { gpu_uuid: Some("GPU-1".into()), ..Finding::new(Reason::GpuLost, "why") };
        assert_eq!(
            Verdict::cpu(lost).to_json(Distribution::Ubuntu),
            json!({
                "device": "cpu",
                "reason": "gpu-lost",
                "summary": "why",
                "fix": Reason::GpuLost.fix(Distribution::Ubuntu),
                "pci_address": null,
                "gpu_uuid": "GPU-1",
            })
        );
    }

    #[test]
    fn a_selection_of_none_says_which_gpus_it_leaves_out() {
        let none = config(&[("FL_CUDA_VISIBLE_DEVICES", "none")]);
        let summary = |facts| finding(before_the_probe(&none, &facts).unwrap()).summary;
        assert_eq!(
            summary(two().0),
            "FL_CUDA_VISIBLE_DEVICES='none' selects no GPU; this VM has 0000:01:00.0 (10de:20b5, class 0302, driver nvidia), 0000:21:00.0 (10de:20b5, class 0302, driver nvidia)"
        );
        assert_eq!(
            summary(facts(&[])),
            "FL_CUDA_VISIBLE_DEVICES='none' selects no GPU; this VM has no NVIDIA GPU"
        );
    }

    #[test]
    fn a_finding_names_the_device_that_it_is_about() {
        let assigned = config(&[("PCI0_ADDRESS", "01:00.0"), ("PCI1_ADDRESS", "21:00.0")]);
        let place = |config: &Config, facts: &PciFacts, outcome: &ProbeOutcome| {
            let finding = finding(decide(config, facts, outcome));
            (finding.pci_address, finding.gpu_uuid)
        };
        let a = Some(A.to_owned());
        let timeout = ProbeOutcome::TimedOut {
            limit: Duration::from_secs(20),
            library: LibraryFile::default(),
        };
        assert_eq!(
            place(&assigned, &facts(&[]), &timeout),
            (a.clone(), None),
            "the first that was assigned"
        );
        assert_eq!(
            place(&config(&[]), &two().0, &timeout),
            (a.clone(), None),
            "the first that is there"
        );
        let mut sick = probed(0, "GPU-1", A);
        sick.ailments.push("an ailment".into());
        let on_nvidia = facts(&[gpu_at(A, Some("nvidia"))]);
        assert_eq!(place(&config(&[]), &on_nvidia, &report(vec![sick])), (a, Some("GPU-1".into())));
    }

    #[test]
    fn a_probe_that_died_is_told_with_the_name_of_its_signal() {
        let on_nvidia = facts(&[gpu_at(A, Some("nvidia"))]);
        for (signal, told) in [
            (4, "4 (SIGILL)"),
            (6, "6 (SIGABRT)"),
            (7, "7 (SIGBUS)"),
            (8, "8 (SIGFPE)"),
            (9, "9 (SIGKILL)"),
            (11, "11 (SIGSEGV)"),
            (31, "31"),
        ] {
            let outcome = ProbeOutcome::Crashed {
                signal,
                said: String::new(),
                library: LibraryFile::default(),
            };
            let summary = finding(decide(&config(&[]), &on_nvidia, &outcome)).summary;
            let start = format!(
                "the probe died by signal {told} while it asked NVIDIA's library; this VM has "
            );
            assert!(summary.starts_with(&start), "{summary}");
        }
    }

    #[test]
    fn what_is_known_of_the_library_is_told() {
        let on_nvidia = facts(&[gpu_at(A, Some("nvidia"))]);
        let summary = |kind, path: Option<&str>, version: Option<&str>, damage: Option<&str>| {
            let fault = Fault { call: "nvmlInit_v2".into(), kind, text: "text".into() };
            let (path, version, damage) =
                (path.map(Into::into), version.map(Into::into), damage.map(Into::into));
            let library = LibraryFile { path, version, damage };
            let outcome = ProbeOutcome::Answered(ProbeAnswer::Failed { fault, library });
            let summary = finding(decide(&config(&[]), &on_nvidia, &outcome)).summary;
            summary.split("; this VM has").next().unwrap().to_owned()
        };
        let library = FaultKind::Library;
        assert_eq!(
            summary(library, None, None, None),
            "libnvidia-ml cannot be loaded: it is not installed (text)"
        );
        assert_eq!(
            summary(library, Some("/lib/l.so"), None, Some("it is empty")),
            "libnvidia-ml cannot be loaded: /lib/l.so: it is empty (text)"
        );
        assert_eq!(
            summary(library, Some("/lib/l.so"), None, None),
            "libnvidia-ml cannot be loaded (text)"
        );
        assert_eq!(
            summary(FaultKind::Code(12), None, None, None),
            "libnvidia-ml cannot be loaded (nvmlInit_v2 answered NVML error 12: text)",
            "a library that answers is installed"
        );
        assert_eq!(
            summary(FaultKind::Code(999), Some("/lib/l.so"), Some("550.1"), None),
            "nvmlInit_v2 answered NVML error 999: text; the library is /lib/l.so, version 550.1"
        );
        assert_eq!(
            summary(FaultKind::Symbol, Some("/lib/l.so"), None, None),
            "nvmlInit_v2 is not to be had: text; the library is /lib/l.so"
        );
        assert_eq!(
            summary(FaultKind::InvalidResponse, None, None, None),
            "what nvmlInit_v2 answered makes no sense: text"
        );
        assert_eq!(
            summary(FaultKind::Code(27), None, None, None),
            "nvmlInit_v2 answered NVML error 27: the driver is not ready"
        );
    }

    #[test]
    fn a_module_that_is_loaded_is_not_said_to_be_missing() {
        let on_nvidia = facts(&[gpu_at(A, Some("nvidia"))]);
        let summary =
            finding(decide(&config(&[]), &on_nvidia, &failed(FaultKind::Code(9), "no driver")))
                .summary;
        assert_eq!(
            summary,
            "nvmlInit_v2 answered NVML error 9: no driver; this VM has 0000:01:00.0 (10de:20b5, class 0302, driver nvidia), nvidia module 550.54.15"
        );
    }

    #[test]
    fn a_name_that_no_gpu_has_is_called_that_and_an_instance_is_listed_with_its_card() {
        let (facts, _) = two();
        let instance = |uuid: &str| ProbedMig { uuid: uuid.into(), name: None, memory_mib: None };
        let (mut split, mut whole) = (probed(0, "GPU-1", A), probed(1, "GPU-2", B));
        split.mig = Some(vec![instance("MIG-a"), instance("MIG-b")]);
        whole.mig = Some(Vec::new());
        let outcome = report(vec![split, whole]);
        assert_eq!(
            finding(decide(&config(&[("FL_CUDA_VISIBLE_DEVICES", "7")]), &facts, &outcome)).summary,
            "FL_CUDA_VISIBLE_DEVICES='7' selects no usable GPU of this VM (FL_CUDA_VISIBLE_DEVICES names '7', which is not in this VM), which has: GPU 0, NVIDIA A100, GPU-1, 0000:01:00.0 (MIG: MIG-a, MIG-b); GPU 1, NVIDIA A100, GPU-2, 0000:21:00.0 (in MIG mode, without an instance)"
        );
    }
}
