//! The verdict: whether the node runs on the GPU or the CPU. See [`super::decide`] for how it is
//! reached.

use std::fmt;

use serde::Serialize;
use serde_json::{Value as Json, json};

use super::reason::Finding;
use crate::system::os_release::Distribution;
use crate::values::{GpuUuid, PciAddress, sanitize_line};

/// The device that the node trains on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// At least one usable GPU.
    Gpu {
        /// The devices for the container, at least one.
        devices: Vec<GpuDevice>,
        /// Selected or assigned devices that are unusable; each is logged as a WARNING.
        missing: Vec<String>,
    },
    /// The CPU.
    Cpu {
        /// The reason for the fallback; `None` if the GPU is not enabled.
        finding: Option<Finding>,
    },
}

/// A GPU or MIG instance for the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GpuDevice {
    /// NVML index of the GPU.
    pub index: u32,
    /// UUID of the GPU (`GPU-…`) or the MIG instance (`MIG-…`).
    pub uuid: GpuUuid,
    /// Product name.
    pub name: Option<String>,
    /// PCI address of the GPU; `None` if NVML reports no valid one.
    pub pci_address: Option<PciAddress>,
    /// Memory of the GPU or the MIG instance, in MiB.
    pub memory_mib: Option<u64>,
    /// The `n` of the GPU's device node `/dev/nvidia<n>`.
    #[serde(skip)]
    pub minor: Option<u32>,
}

impl fmt::Display for GpuDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The probe child runs NVIDIA's code, so its strings are foreign text.
        let name = self.name.as_deref().unwrap_or("GPU");
        let address = self.pci_address.map_or(String::new(), |address| format!(", {address}"));
        f.write_str(&sanitize_line(&format!("{name} ({}{address})", self.uuid)))
    }
}

impl Verdict {
    /// Returns the CPU verdict of a node whose GPU is not enabled: no warning.
    pub fn gpu_not_enabled() -> Self {
        Self::Cpu { finding: None }
    }

    /// Returns a CPU fallback.
    pub fn cpu(finding: Finding) -> Self {
        Self::Cpu { finding: Some(finding) }
    }

    /// Returns the devices of a GPU verdict; empty on the CPU.
    pub fn devices(&self) -> &[GpuDevice] {
        match self {
            Self::Gpu { devices, .. } => devices,
            Self::Cpu { .. } => &[],
        }
    }

    /// Returns the reason for a CPU fallback.
    pub fn finding(&self) -> Option<&Finding> {
        match self {
            Self::Gpu { .. } => None,
            Self::Cpu { finding } => finding.as_ref(),
        }
    }

    /// Returns the PyTorch device type: `cuda` or `cpu`.
    pub fn device(&self) -> &'static str {
        match self {
            Self::Gpu { .. } => "cuda",
            Self::Cpu { .. } => "cpu",
        }
    }

    /// Returns the JSON of `plan --json` and `gpu --json`, with the fix for this distribution.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::reason::Reason;
    use crate::gpu::test_fixtures::{A, config, decide_on, two_gpus};

    #[test]
    fn device_display_is_sanitized() {
        let device = GpuDevice {
            index: 0,
            uuid: GpuUuid::parse("GPU-5d").unwrap(),
            name: Some("A100\n\x1b[31m".into()),
            pci_address: PciAddress::parse("0000:01:00.0"),
            memory_mib: None,
            minor: None,
        };
        assert_eq!(device.to_string(), "A100 [31m (GPU-5d, 0000:01:00.0)");
    }

    #[test]
    fn json_has_devices_or_reason_and_fix() {
        let (facts, outcome) = two_gpus();
        let request = config(&[("FL_CUDA_VISIBLE_DEVICES", "0,7")]);
        let on_one = decide_on(&request, &facts, &outcome);
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
            Verdict::gpu_not_enabled().to_json(Distribution::Debian),
            json!({"device": "cpu", "reason": null, "summary": null, "fix": null})
        );
        let lost = Finding {
            gpu_uuid: GpuUuid::parse("GPU-1").ok(),
            ..Finding::new(Reason::GpuLost, "why")
        };
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
}
