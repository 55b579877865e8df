//! Child side of the probe: loads libnvidia-ml, queries it and prints the result as one line of
//! JSON. A library that hangs or crashes does so in this process only. The parent side is
//! [`crate::gpu::probe`].

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
use serde::{Deserialize, Serialize};

use super::nvml_error::Fault;
use super::nvml_library::LibraryFile;
use crate::values::{GpuUuid, PciAddress};

/// More GPUs, and more MIG instances per GPU, than any machine has: larger counts are invalid.
const MAX_GPUS: u32 = 1024;
const MAX_INSTANCES: u32 = 64;

/// The child's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeAnswer {
    /// NVML works.
    Driver(DriverReport),
    /// NVML cannot be loaded or initialised.
    Failed {
        /// The failed call.
        fault: Fault,
        /// Facts about the library file.
        library: LibraryFile,
    },
}

/// The driver and the GPUs it lists.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverReport {
    /// Driver version.
    pub driver_version: Option<String>,
    /// The GPUs, in the order of their NVML indices.
    pub gpus: Vec<ProbedGpu>,
}

/// One GPU as reported by NVML.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbedGpu {
    /// NVML index.
    pub index: u32,
    /// `GPU-…`.
    pub uuid: Option<GpuUuid>,
    /// Product name.
    pub name: Option<String>,
    /// PCI address.
    pub pci_address: Option<PciAddress>,
    /// Total memory in MiB.
    pub memory_mib: Option<u64>,
    /// The `n` of its device node `/dev/nvidia<n>`.
    pub minor: Option<u32>,
    /// The MIG instances; `None` unless the GPU is in MIG mode.
    pub mig: Option<Vec<ProbedMig>>,
    /// Failed call that makes the GPU unusable.
    pub fault: Option<Fault>,
    /// Hardware faults reported by successful calls.
    pub health_issues: Vec<String>,
}

/// A MIG instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbedMig {
    /// `MIG-…`.
    pub uuid: GpuUuid,
    /// Name of the profile.
    pub name: Option<String>,
    /// Memory in MiB.
    pub memory_mib: Option<u64>,
}

impl DriverReport {
    /// Returns `driver <version>`.
    pub(super) fn driver(&self) -> String {
        match &self.driver_version {
            Some(version) => format!("driver {version}"),
            None => "the driver (unknown version)".into(),
        }
    }
}

impl ProbedGpu {
    /// Returns index, name, UUID and PCI address, as far as they are known.
    pub(super) fn title(&self) -> String {
        let mut title = format!("GPU {}", self.index);
        if let Some(name) = &self.name {
            title = format!("{title}, {name}");
        }
        if let Some(uuid) = &self.uuid {
            title = format!("{title}, {uuid}");
        }
        if let Some(address) = self.pci_address {
            title = format!("{title}, {address}");
        }
        title
    }
}

/// Runs the child process: queries NVML and prints the answer to the standard output.
///
/// # Errors
/// Returns the error of setting up the process or writing the answer.
pub fn run_probe(library: &str) -> std::io::Result<()> {
    let mut out = init_child()?;
    let mut answer = serde_json::to_vec(&query(library))?;
    answer.push(b'\n');
    out.write_all(&answer)
}

/// Prepares this process for loading the library, and returns a private copy of the standard
/// output, because the library may write to it or close it.
pub(super) fn init_child() -> std::io::Result<File> {
    // A hanging child is killed when the agent exits, even when the agent crashes.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    remove_rust_signal_handlers()?;
    let out = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    rustix::stdio::dup2_stdout(std::io::stderr())?;
    Ok(out)
}

/// Removes Rust's handlers of SIGSEGV and SIGBUS. They ignore the first signal that is sent rather
/// than caused by a fault, and then uninstall themselves, so a library that calls `raise` would
/// survive it. Sending one signal of each kind has that effect before the library is loaded.
fn remove_rust_signal_handlers() -> std::io::Result<()> {
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

fn query(library: &str) -> ProbeAnswer {
    match read_report(library) {
        Ok(report) => ProbeAnswer::Driver(report),
        Err(fault) => ProbeAnswer::Failed { fault, library: LibraryFile::inspect(library) },
    }
}

/// Loads the library and initialises NVML.
pub(super) fn open(library: &str) -> Result<ManuallyDrop<Nvml>, Fault> {
    let nvml = Nvml::builder().lib_path(library.as_ref()).init().map_err(|error| {
        let call =
            if matches!(error, NvmlError::LibloadingError(_)) { "dlopen" } else { "nvmlInit_v2" };
        Fault::new(call, error)
    })?;
    // Dropping it would call nvmlShutdown, which could hang, crash or be missing, and the answer
    // would be lost. The exit of the process releases everything.
    Ok(ManuallyDrop::new(nvml))
}

fn read_report(library: &str) -> Result<DriverReport, Fault> {
    let nvml = open(library)?;
    const CALL: &str = "nvmlDeviceGetCount_v2";
    let count = nvml.device_count().map_err(|error| Fault::new(CALL, error))?;
    if count > MAX_GPUS {
        return Err(Fault::invalid_response(CALL, format!("{count} GPUs")));
    }
    Ok(DriverReport {
        driver_version: nvml.sys_driver_version().ok(),
        gpus: (0..count).map(|index| read_gpu(&nvml, index)).collect(),
    })
}

fn read_gpu(nvml: &Nvml, index: u32) -> ProbedGpu {
    let mut gpu = ProbedGpu { index, ..ProbedGpu::default() };
    if let Err(fault) = read_gpu_fields(nvml, &mut gpu) {
        gpu.fault = Some(fault);
    }
    gpu
}

fn read_gpu_fields(nvml: &Nvml, gpu: &mut ProbedGpu) -> Result<(), Fault> {
    let device = nvml
        .device_by_index(gpu.index)
        .map_err(|error| Fault::new("nvmlDeviceGetHandleByIndex_v2", error))?;
    // Required: without address and UUID the GPU cannot be identified or injected.
    let pci = pci_of(&device)?;
    gpu.pci_address = PciAddress::parse(&pci.bus_id);
    gpu.uuid = Some(uuid_of(&device)?);
    // Optional.
    gpu.name = optional("nvmlDeviceGetName", device.name())?;
    gpu.minor = optional("nvmlDeviceGetMinorNumber", device.minor_number())?;
    gpu.memory_mib = optional("nvmlDeviceGetMemoryInfo_v2", device.memory_info())?
        .map(|memory| memory.total >> 20);
    gpu.mig = mig_instances(&device)?;
    gpu.health_issues = read_health_issues(&device)?;
    Ok(())
}

/// Returns the GPU with this UUID, or the GPU of the MIG instance with this UUID.
pub(super) fn physical_gpu<'n>(nvml: &'n Nvml, uuid: &GpuUuid) -> Result<Device<'n>, Fault> {
    let device = nvml
        .device_by_uuid(uuid.as_str())
        .map_err(|error| Fault::new("nvmlDeviceGetHandleByUUID", error))?;
    if !uuid.is_mig() {
        return Ok(device);
    }
    device
        .mig_parent_device()
        .map_err(|error| Fault::new("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", error))
}

/// Checks a device in use with the calls that the probe makes for every GPU. Returns its hardware
/// faults, or the failed call that makes it unusable.
pub(super) fn check_health(nvml: &Nvml, uuid: &GpuUuid) -> Result<Vec<String>, Fault> {
    let gpu = physical_gpu(nvml, uuid)?;
    pci_of(&gpu)?;
    uuid_of(&gpu)?;
    read_health_issues(&gpu)
}

fn pci_of(device: &Device<'_>) -> Result<PciInfo, Fault> {
    device.pci_info().map_err(|error| Fault::new("nvmlDeviceGetPciInfo_v3", error))
}

pub(super) fn uuid_of(device: &Device<'_>) -> Result<GpuUuid, Fault> {
    const CALL: &str = "nvmlDeviceGetUUID";
    let uuid = device.uuid().map_err(|error| Fault::new(CALL, error))?;
    GpuUuid::parse(uuid).map_err(|error| Fault::invalid_response(CALL, error.to_string()))
}

fn optional<T>(call: &str, answer: Result<T, NvmlError>) -> Result<Option<T>, Fault> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) => {
            let fault = Fault::new(call, error);
            if fault.is_gpu_fault() { Err(fault) } else { Ok(None) }
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
        // An empty slot returns NVML_ERROR_NOT_FOUND.
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

fn read_health_issues(device: &Device<'_>) -> Result<Vec<String>, Fault> {
    let mut health_issues = Vec::new();
    let ecc = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile);
    match optional("nvmlDeviceGetTotalEccErrors", ecc)? {
        None | Some(0) => {}
        Some(count) => {
            health_issues
                .push(format!("{count} uncorrectable ECC errors since the driver was loaded"));
        }
    }
    if has_row_remap_failure(device)? {
        health_issues.push("row remapping failed".into());
    }
    Ok(health_issues)
}

fn has_row_remap_failure(device: &Device<'_>) -> Result<bool, Fault> {
    /// `NVML_FI_DEV_REMAPPED_FAILURE` in nvml.h.
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
    fn answer_with_invalid_uuid_is_rejected() {
        let answer = |gpu: serde_json::Value| {
            let report = serde_json::json!({"driver_version": null, "gpus": [gpu]});
            serde_json::from_value::<DriverReport>(report).map(|mut report| report.gpus.remove(0))
        };
        let mut valid = serde_json::to_value(ProbedGpu {
            uuid: GpuUuid::parse("GPU-1").ok(),
            ..ProbedGpu::default()
        })
        .unwrap();
        valid["mig"] = serde_json::json!([{"uuid": "MIG-1", "name": null, "memory_mib": null}]);
        assert_eq!(answer(valid.clone()).unwrap().uuid.unwrap().as_str(), "GPU-1");
        for invalid in ["", "GPU-1,all", "GPU-1\u{1b}", "GPU 1", "GPU-ü"] {
            for path in ["/uuid", "/mig/0/uuid"] {
                let mut gpu = valid.clone();
                *gpu.pointer_mut(path).unwrap() = invalid.into();
                let error = answer(gpu).unwrap_err().to_string();
                assert!(error.contains("the UUID is"), "{invalid:?} at {path}: {error}");
            }
        }
        valid["uuid"] = serde_json::Value::Null;
        assert_eq!(answer(valid).unwrap().uuid, None, "unknown");
    }
}
