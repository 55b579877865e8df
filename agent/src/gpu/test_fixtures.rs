//! Machines and probe results for the tests of the decision.

use one_context::Context;

use super::decide::{decide_gpu_or_cpu, decide_without_probe};
use super::nvml_error::{Fault, FaultKind};
use super::nvml_library::LibraryFile;
use super::pci::{PciDevice, PciFacts};
use super::probe::ProbeOutcome;
use super::probe_child::{DriverReport, ProbeAnswer, ProbedGpu};
use super::reason::Finding;
use super::verdict::Verdict;
use crate::config::{Config, Prebaked};
use crate::values::{GpuUuid, PciAddress};

pub(super) const A: &str = "0000:01:00.0";
pub(super) const B: &str = "0000:21:00.0";

/// A configuration with `FL_GPU_ENABLED=YES` and these variables.
pub(super) fn config(pairs: &[(&str, &str)]) -> Config {
    let mut text = String::from("FL_GPU_ENABLED='YES'\n");
    for (name, value) in pairs {
        text.push_str(&format!("{name}='{value}'\n"));
    }
    Config::from_context(&Context::parse(text.as_bytes()).unwrap(), &Prebaked::default()).unwrap().0
}

pub(super) fn device(address: &str, vendor: u32, class: u32, driver: Option<&str>) -> PciDevice {
    PciDevice {
        address: PciAddress::parse(address).unwrap(),
        vendor,
        device: Some(0x20b5),
        class,
        driver: driver.map(String::from),
    }
}

pub(super) fn gpu_at(address: &str, driver: Option<&str>) -> PciDevice {
    device(address, 0x10de, 0x03_02_00, driver)
}

pub(super) fn facts(devices: &[PciDevice]) -> PciFacts {
    PciFacts {
        devices: devices.to_vec(),
        module_version: Some("550.54.15".into()),
        ..PciFacts::default()
    }
}

pub(super) fn probed(index: u32, uuid: &str, address: &str) -> ProbedGpu {
    ProbedGpu {
        index,
        uuid: Some(GpuUuid::parse(uuid).unwrap()),
        name: Some("NVIDIA A100".into()),
        pci_address: PciAddress::parse(address),
        memory_mib: Some(40_960),
        minor: Some(index),
        ..ProbedGpu::default()
    }
}

pub(super) fn report(gpus: Vec<ProbedGpu>) -> ProbeOutcome {
    ProbeOutcome::Answered(ProbeAnswer::Driver(DriverReport {
        driver_version: Some("550.54.15".into()),
        gpus,
    }))
}

/// A probe whose `nvmlInit_v2` failed.
pub(super) fn failed(kind: FaultKind, text: &str) -> ProbeOutcome {
    let fault = Fault { call: "nvmlInit_v2".into(), kind, text: text.into() };
    let library = LibraryFile { version: Some("560.35.03".into()), ..LibraryFile::default() };
    ProbeOutcome::Answered(ProbeAnswer::Failed { fault, library })
}

pub(super) fn decide_on(config: &Config, facts: &PciFacts, outcome: &ProbeOutcome) -> Verdict {
    decide_gpu_or_cpu(&config.gpu, config.framework, facts, outcome)
}

pub(super) fn decide_on_sysfs(config: &Config, facts: &PciFacts) -> Option<Verdict> {
    decide_without_probe(&config.gpu, config.framework, facts)
}

/// Two healthy GPUs, `A` and `B`.
pub(super) fn two_gpus() -> (PciFacts, ProbeOutcome) {
    let outcome = report(vec![probed(0, "GPU-aaaa-1", A), probed(1, "GPU-aabb-2", B)]);
    (facts(&[gpu_at(A, Some("nvidia")), gpu_at(B, Some("nvidia"))]), outcome)
}

pub(super) fn expect_finding(verdict: Verdict) -> Finding {
    match verdict {
        Verdict::Cpu { finding: Some(finding) } => finding,
        other => panic!("{other:?}"),
    }
}

pub(super) fn uuids(verdict: &Verdict) -> Vec<&str> {
    verdict.devices().iter().map(|device| device.uuid.as_str()).collect()
}
