//! The `gpu` command, and the GPU section of `plan`: facts and verdict.

use std::io::{self, Write};

use serde_json::{Value as Json, json};

use crate::gpu::Detection;
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::system::os_release::Distribution;

pub(super) fn gpu_json(detection: &Detection, distribution: Distribution) -> Json {
    json!({
        "verdict": detection.verdict.to_json(distribution),
        "facts": {
            "pci": detection.facts.gpus().collect::<Vec<_>>(),
            "module_version": detection.facts.module_version,
            "module_pending": detection.facts.module_pending,
            "kernel": detection.facts.kernel,
            "unreadable": detection.facts.unreadable,
            "probe": detection.outcome.as_ref().map(|outcome| outcome.summary()),
        },
    })
}

pub(super) fn write_gpu(
    out: &mut dyn Write,
    detection: &Detection,
    distribution: Distribution,
) -> io::Result<()> {
    write_facts(out, detection)?;
    writeln!(out, "Verdict")?;
    match &detection.verdict {
        Verdict::Gpu { devices, missing } => {
            for device in devices {
                let name = device.name.as_deref().unwrap_or("GPU");
                let memory = device.memory_mib.map_or("unknown".into(), |mib| format!("{mib} MiB"));
                let address =
                    device.pci_address.map_or(String::new(), |address| format!(", {address}"));
                let GpuDevice { index, uuid, .. } = device;
                writeln!(out, "  cuda     {index}: {name}, {memory}, {uuid}{address}")?;
            }
            for missing in missing {
                writeln!(out, "  missing  {missing}")?;
            }
        }
        Verdict::Cpu { finding: None } => writeln!(out, "  cpu      FL_GPU_ENABLED is not YES")?,
        Verdict::Cpu { finding: Some(finding) } => {
            writeln!(out, "  cpu      {}: {}", finding.reason, finding.summary)?;
            writeln!(out, "  fix      {}", finding.reason.fix(distribution))?;
        }
    }
    Ok(())
}

fn write_facts(out: &mut dyn Write, detection: &Detection) -> io::Result<()> {
    let facts = &detection.facts;
    writeln!(out, "Facts")?;
    if facts.gpus().next().is_none() {
        writeln!(out, "  PCI      no NVIDIA GPU (vendor 10de, class 03xx)")?;
    }
    for gpu in facts.gpus() {
        let driver = gpu.driver.as_deref().unwrap_or("no driver");
        writeln!(out, "  PCI      {} ({}), {driver}", gpu.address, gpu.ids())?;
    }
    let module = facts.module_version.as_deref().unwrap_or("not loaded");
    writeln!(out, "  module   nvidia {module}")?;
    for failure in &facts.unreadable {
        writeln!(out, "  failed   {failure}")?;
    }
    match &detection.outcome {
        Some(outcome) => writeln!(out, "  NVML     {}", outcome.summary()),
        None => writeln!(out, "  NVML     not queried"),
    }
}
