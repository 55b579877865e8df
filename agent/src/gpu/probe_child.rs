//! The probe, from inside: the child process that loads libnvidia-ml, asks it, and prints what it
//! said as JSON. It runs alone so that a library that hangs or crashes takes nobody along; see
//! [`crate::gpu::probe`] for the outside.

use std::fs::File;
use std::io::Write as _;
use std::mem::ManuallyDrop;
use std::os::fd::AsFd as _;

use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError};
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::PciInfo;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::{Device, Nvml};
use rustix::process::{Signal, getpid, kill_process, set_parent_process_death_signal};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::gpu::nvml_library::LibraryFile;
use crate::gpu::pci::PciAddress;

/// More GPUs, or more MIG instances of one, than any machine has: a library that counts more is not
/// believed.
const MAX_GPUS: u32 = 1024;
const MAX_INSTANCES: u32 = 64;

/// What the child answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeAnswer {
    /// NVML answered.
    Driver(DriverReport),
    /// NVML could not be asked.
    Failed {
        /// What failed.
        fault: Fault,
        /// What the library's file tells.
        library: LibraryFile,
    },
}

/// The driver and its GPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverReport {
    /// The kernel driver's version.
    pub driver_version: Option<String>,
    /// The GPUs, by NVML's index.
    pub gpus: Vec<ProbedGpu>,
}

/// One GPU as NVML describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbedGpu {
    /// NVML's index.
    pub index: u32,
    /// `GPU-…`.
    #[serde(deserialize_with = "read_uuid_if_any")]
    pub uuid: Option<String>,
    /// The product's name.
    pub name: Option<String>,
    /// Where it is, in NVML's spelling.
    pub pci_address: Option<String>,
    /// All of its memory, in MiB.
    pub memory_mib: Option<u64>,
    /// `n` of `/dev/nvidia<n>`.
    pub minor: Option<u32>,
    /// Set when the card is in MIG mode: its instances.
    pub mig: Option<Vec<ProbedMig>>,
    /// A call that failed in a way that makes the GPU unusable.
    pub fault: Option<Fault>,
    /// Hardware faults that NVML reports with success.
    pub ailments: Vec<String>,
}

/// A MIG instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbedMig {
    /// `MIG-…`.
    #[serde(deserialize_with = "read_uuid")]
    pub uuid: String,
    /// The instance's name.
    pub name: Option<String>,
    /// The instance's memory, in MiB.
    pub memory_mib: Option<u64>,
}

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// NVML's function, or `dlopen`.
    pub call: String,
    /// How it failed.
    pub kind: FaultKind,
    /// The text of the library or of the loader.
    pub text: String,
}

/// How a call failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// The library cannot be loaded.
    Library,
    /// The library has no such function.
    Symbol,
    /// NVML's return code (nvml.h, `nvmlReturn_t`).
    Code(u32),
    /// The call succeeded, and what it answered makes no sense.
    InvalidResponse,
}

impl Fault {
    pub(super) fn new(call: &str, error: NvmlError) -> Self {
        let text = error.to_string();
        let kind = match error {
            NvmlError::LibloadingError(_) => FaultKind::Library,
            NvmlError::FailedToLoadSymbol(_) => FaultKind::Symbol,
            NvmlError::Utf8Error(_) | NvmlError::NulError(_) | NvmlError::IncorrectBits(_) => {
                FaultKind::InvalidResponse
            }
            error => FaultKind::Code(error.into()),
        };
        Self { call: call.into(), kind, text }
    }

    /// Whether a failure like this of a getter that is only good to have means that the GPU itself
    /// does not answer as it should. Not every card, driver or container gives every value, so any
    /// other failure means "not known".
    pub(super) fn is_of_the_gpu(&self) -> bool {
        const INSUFFICIENT_POWER: u32 = 8;
        const DRIVER_NOT_LOADED: u32 = 9;
        const IRQ_ISSUE: u32 = 11;
        const CORRUPTED_INFOROM: u32 = 14;
        const GPU_IS_LOST: u32 = 15;
        const RESET_REQUIRED: u32 = 16;
        const OPERATING_SYSTEM: u32 = 17;
        const NOT_READY: u32 = 27;
        const UNKNOWN: u32 = 999;
        matches!(
            self.kind,
            FaultKind::Code(
                INSUFFICIENT_POWER
                    | DRIVER_NOT_LOADED
                    | IRQ_ISSUE
                    | CORRUPTED_INFOROM
                    | GPU_IS_LOST
                    | RESET_REQUIRED
                    | OPERATING_SYSTEM
                    | NOT_READY
                    | UNKNOWN
            )
        )
    }
}

/// Asks NVML and prints the answer on the standard output: all that the child process does.
///
/// # Errors
/// When the answer cannot be written.
pub fn run_probe(library: &str) -> std::io::Result<()> {
    let mut out = init_child()?;
    let mut answer = serde_json::to_vec(&ask(library))?;
    answer.push(b'\n');
    out.write_all(&answer)
}

/// Makes this process a child that may load the library, and gives it a way to its parent that is
/// its own.
pub(super) fn init_child() -> std::io::Result<File> {
    // A child that hangs ends with the agent, however that ends.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    die_by_the_first_signal()?;
    // The library may write to the standard output, or close it.
    let out = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    rustix::stdio::dup2_stdout(std::io::stderr())?;
    Ok(out)
}

/// Rust lets the first SIGSEGV and SIGBUS pass that is sent and not caused, and takes its handler
/// away: a library that means to die by `raise` would live on. One of each is sent before it is
/// there.
fn die_by_the_first_signal() -> std::io::Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    for signal in [Signal::SEGV, Signal::BUS] {
        if caught >> (signal.as_raw() - 1) & 1 == 1 {
            kill_process(getpid(), signal)?;
        }
    }
    Ok(())
}

fn ask(library: &str) -> ProbeAnswer {
    match report(library) {
        Ok(report) => ProbeAnswer::Driver(report),
        Err(fault) => ProbeAnswer::Failed { fault, library: LibraryFile::look(library) },
    }
}

/// Loads the library and opens NVML.
pub(super) fn open(library: &str) -> Result<ManuallyDrop<Nvml>, Fault> {
    let nvml = Nvml::builder().lib_path(library.as_ref()).init().map_err(|error| {
        let call =
            if matches!(error, NvmlError::LibloadingError(_)) { "dlopen" } else { "nvmlInit_v2" };
        Fault::new(call, error)
    })?;
    // nvmlShutdown could hang, crash or be missing, and the answer would be lost: the end of the
    // process does its work.
    Ok(ManuallyDrop::new(nvml))
}

fn report(library: &str) -> Result<DriverReport, Fault> {
    let nvml = open(library)?;
    let count = nvml.device_count().map_err(|error| Fault::new("nvmlDeviceGetCount_v2", error))?;
    if count > MAX_GPUS {
        let text = format!("it counts {count} GPUs");
        return Err(Fault {
            call: "nvmlDeviceGetCount_v2".into(),
            kind: FaultKind::InvalidResponse,
            text,
        });
    }
    Ok(DriverReport {
        driver_version: nvml.sys_driver_version().ok(),
        gpus: (0..count).map(|index| describe(&nvml, index)).collect(),
    })
}

fn describe(nvml: &Nvml, index: u32) -> ProbedGpu {
    let mut gpu = ProbedGpu { index, ..ProbedGpu::default() };
    if let Err(fault) = fill_in(nvml, &mut gpu) {
        gpu.fault = Some(fault);
    }
    gpu
}

fn fill_in(nvml: &Nvml, gpu: &mut ProbedGpu) -> Result<(), Fault> {
    let device = nvml
        .device_by_index(gpu.index)
        .map_err(|error| Fault::new("nvmlDeviceGetHandleByIndex_v2", error))?;
    // Without these two the GPU can neither be handed over nor be told from another: they are
    // needed.
    let pci = pci_of(&device)?;
    gpu.pci_address =
        Some(PciAddress::parse(&pci.bus_id).map_or(pci.bus_id, |address| address.to_string()));
    gpu.uuid = Some(uuid_of(&device)?);
    // These are good to have.
    gpu.name = optional("nvmlDeviceGetName", device.name())?;
    gpu.minor = optional("nvmlDeviceGetMinorNumber", device.minor_number())?;
    gpu.memory_mib = optional("nvmlDeviceGetMemoryInfo_v2", device.memory_info())?
        .map(|memory| memory.total >> 20);
    gpu.mig = mig_instances(&device)?;
    gpu.ailments = ailments(&device)?;
    Ok(())
}

/// The card that a device named by its UUID is, or is an instance of.
pub(super) fn card_of<'n>(nvml: &'n Nvml, uuid: &str) -> Result<Device<'n>, Fault> {
    let device = nvml
        .device_by_uuid(uuid)
        .map_err(|error| Fault::new("nvmlDeviceGetHandleByUUID", error))?;
    if !uuid.starts_with("MIG-") {
        return Ok(device);
    }
    device
        .mig_parent_device()
        .map_err(|error| Fault::new("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", error))
}

/// Looks again at a device that was usable: what the probe asks of every GPU.
///
/// # Errors
/// A call that failed in a way that makes the GPU unusable. With success come the hardware faults,
/// normally none.
pub(super) fn examine(nvml: &Nvml, uuid: &str) -> Result<Vec<String>, Fault> {
    let card = card_of(nvml, uuid)?;
    pci_of(&card)?;
    uuid_of(&card)?;
    ailments(&card)
}

fn pci_of(device: &Device<'_>) -> Result<PciInfo, Fault> {
    device.pci_info().map_err(|error| Fault::new("nvmlDeviceGetPciInfo_v3", error))
}

pub(super) fn uuid_of(device: &Device<'_>) -> Result<String, Fault> {
    const CALL: &str = "nvmlDeviceGetUUID";
    let uuid = device.uuid().map_err(|error| Fault::new(CALL, error))?;
    checked_uuid(uuid).map_err(|text| Fault {
        call: CALL.into(),
        kind: FaultKind::InvalidResponse,
        text,
    })
}

/// By its UUID a GPU is handed over, in a list with commas: an empty one would ask the runtime for
/// no GPU at all.
fn checked_uuid(uuid: String) -> Result<String, String> {
    if uuid.is_empty() || !uuid.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',') {
        return Err(format!("the UUID is {uuid:?}"));
    }
    Ok(uuid)
}

/// NVIDIA's code runs in the child and could write the answer in its place: it is checked where it
/// is read as well.
fn read_uuid<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked_uuid(String::deserialize(deserializer)?).map_err(D::Error::custom)
}

fn read_uuid_if_any<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    Option::<String>::deserialize(deserializer)?
        .map(checked_uuid)
        .transpose()
        .map_err(D::Error::custom)
}

fn optional<T>(call: &str, answer: Result<T, NvmlError>) -> Result<Option<T>, Fault> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) => {
            let fault = Fault::new(call, error);
            if fault.is_of_the_gpu() { Err(fault) } else { Ok(None) }
        }
    }
}

fn mig_instances(device: &Device<'_>) -> Result<Option<Vec<ProbedMig>>, Fault> {
    const ENABLED: u32 = 1;
    let mode = optional("nvmlDeviceGetMigMode", device.mig_mode())?;
    if mode.is_none_or(|mode| mode.current != ENABLED) {
        return Ok(None);
    }
    let slots = optional("nvmlDeviceGetMaxMigDeviceCount", device.mig_device_count())?.unwrap_or(0);
    let mut instances = Vec::new();
    for slot in 0..slots.min(MAX_INSTANCES) {
        // A slot without an instance answers NOT_FOUND.
        let Some(instance) =
            optional("nvmlDeviceGetMigDeviceHandleByIndex", device.mig_device_by_index(slot))?
        else {
            continue;
        };
        instances.push(ProbedMig {
            uuid: uuid_of(&instance)?,
            name: optional("nvmlDeviceGetName", instance.name())?,
            memory_mib: optional("nvmlDeviceGetMemoryInfo_v2", instance.memory_info())?
                .map(|memory| memory.total >> 20),
        });
    }
    Ok(Some(instances))
}

fn ailments(device: &Device<'_>) -> Result<Vec<String>, Fault> {
    let mut ailments = Vec::new();
    let ecc = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile);
    match optional("nvmlDeviceGetTotalEccErrors", ecc)? {
        None | Some(0) => {}
        Some(count) => {
            ailments.push(format!("{count} uncorrectable ECC errors since the driver was loaded"))
        }
    }
    if row_remap_failed(device)? {
        ailments.push("a faulty memory row could not be remapped".into());
    }
    Ok(ailments)
}

fn row_remap_failed(device: &Device<'_>) -> Result<bool, Fault> {
    /// NVML_FI_DEV_REMAPPED_FAILURE of nvml.h.
    const REMAPPED_FAILURE: FieldId = FieldId(145);
    const CALL: &str = "nvmlDeviceGetFieldValues";
    let Some(samples) = optional(CALL, device.field_values_for(&[REMAPPED_FAILURE]))? else {
        return Ok(false);
    };
    for sample in samples.into_iter().flatten() {
        if let Some(value) = optional(CALL, sample.value)? {
            return Ok(matches!(
                value,
                SampleValue::U32(1..) | SampleValue::U64(1..) | SampleValue::I64(1..)
            ));
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_whose_uuid_cannot_be_named_to_docker_is_no_answer() {
        let answer = |gpu: serde_json::Value| {
            let report = serde_json::json!({"driver_version": null, "gpus": [gpu]});
            serde_json::from_value::<DriverReport>(report).map(|mut report| report.gpus.remove(0))
        };
        let mut plain =
            serde_json::to_value(ProbedGpu { uuid: Some("GPU-1".into()), ..ProbedGpu::default() })
                .unwrap();
        plain["mig"] = serde_json::json!([{"uuid": "MIG-1", "name": null, "memory_mib": null}]);
        assert_eq!(answer(plain.clone()).unwrap().uuid.unwrap(), "GPU-1");
        for garbled in ["", "GPU-1,all", "GPU-1\u{1b}", "GPU 1", "GPU-ü"] {
            for path in ["/uuid", "/mig/0/uuid"] {
                let mut gpu = plain.clone();
                *gpu.pointer_mut(path).unwrap() = garbled.into();
                let error = answer(gpu).unwrap_err().to_string();
                assert!(error.contains("the UUID is"), "{garbled:?} at {path}: {error}");
            }
        }
        plain["uuid"] = serde_json::Value::Null;
        assert_eq!(answer(plain).unwrap().uuid, None, "one that is not known");
    }
}
