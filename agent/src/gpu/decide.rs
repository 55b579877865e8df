//! Decides, before the launch, whether the node runs on the GPU or falls back to the CPU.
//!
//! [`decide_gpu_or_cpu`] is the only place that decides before the launch; `run`, `plan`, `gpu` and
//! `check vm` call it. It is a pure function of the request, the framework, the facts from sysfs
//! and the probe. The reasons come from `gpu::diagnose`, the device selection from
//! `gpu::select`.
//!
//! Later, a GPU verdict becomes a CPU verdict if:
//! - Docker cannot be configured for the GPU (`runtime-missing`, `runtime-not-configured`): the
//!   preflight in `daemon`, with `docker::nvidia_runtime`;
//! - the container does not start with the GPU, or starts without it (`runtime-start-failed`,
//!   `gpu-not-visible`): `Event::GpuStartFailed` of `supervisor::state_machine`;
//! - the GPU fails while the container runs (`gpu-failed`): `ContainerEvent::GpuFailed` of the same
//!   state machine, reported by `supervisor::gpu_monitor`;
//! - a previous agent already fell back with the same container spec: `Existing::CpuFallback`.
//!
//! The state machine also decides the return to the GPU. `report::fallback` logs every
//! fallback.

use super::diagnose::{diagnose_pci, diagnose_probe, list_present_gpus};
use super::pci::PciFacts;
use super::probe::ProbeOutcome;
use super::reason::{Finding, Reason};
use super::select::{Selection, select_devices};
use super::verdict::Verdict;
use crate::config::{Framework, GpuRequest};
use crate::values::DeviceSelection;

/// Decides whether the node runs on the GPU or the CPU.
pub fn decide_gpu_or_cpu(
    request: &GpuRequest,
    framework: Framework,
    facts: &PciFacts,
    probe: &ProbeOutcome,
) -> Verdict {
    if let Some(verdict) = decide_without_probe(request, framework, facts) {
        return verdict;
    }
    let selection =
        diagnose_probe(probe, facts).and_then(|report| select_devices(request, facts, report));
    match selection {
        Ok(Selection { devices, missing }) => Verdict::Gpu { devices, missing },
        Err(finding) => cpu(finding, facts),
    }
}

/// Decides from the configuration and sysfs alone; `None` if the driver must be probed. This is the
/// first part of [`decide_gpu_or_cpu`]. It is separate because NVML creates device nodes when
/// called as root, so it must not be called without need.
pub fn decide_without_probe(
    request: &GpuRequest,
    framework: Framework,
    facts: &PciFacts,
) -> Option<Verdict> {
    if !request.enabled {
        return Some(Verdict::gpu_not_enabled());
    }
    let finding = if framework == Framework::Sklearn {
        Some(Finding::new(
            Reason::FrameworkWithoutGpu,
            "scikit-learn (ML_FRAMEWORK=sklearn) has no GPU support",
        ))
    } else if request.selection == DeviceSelection::None {
        Some(Finding::new(
            Reason::DeviceSelectionEmpty,
            format!("FL_CUDA_VISIBLE_DEVICES='none' selects no GPU; {}", list_present_gpus(facts)),
        ))
    } else {
        diagnose_pci(request, facts)
    };
    finding.map(|finding| cpu(finding, facts))
}

/// Returns the CPU verdict. A verdict that is based on a failed read names the file.
fn cpu(mut finding: Finding, facts: &PciFacts) -> Verdict {
    if !facts.unreadable.is_empty() {
        finding.summary =
            format!("{} (could not be read: {})", finding.summary, facts.unreadable.join("; "));
    }
    Verdict::cpu(finding)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::Duration;

    use super::*;
    use crate::config::Config;
    use crate::gpu::nvml_error::{Fault, FaultKind};
    use crate::gpu::nvml_library::LibraryFile;
    use crate::gpu::probe_child::ProbedGpu;
    use crate::gpu::reason::CATALOGUE;
    use crate::gpu::test_fixtures::{
        A, config, decide_on, decide_on_sysfs, device, expect_finding, facts, failed, gpu_at,
        probed, report, two_gpus,
    };
    use crate::values::{GpuUuid, PciAddress};

    #[test]
    fn every_reason_before_the_launch_is_reached() {
        let on_nvidia = facts(&[gpu_at(A, Some("nvidia"))]);
        let faulty = |change: fn(&mut ProbedGpu)| {
            let mut gpu = probed(0, "GPU-1", A);
            change(&mut gpu);
            report(vec![gpu])
        };
        let code = |code| failed(FaultKind::Code(code), "text");
        let none = facts(&[]);
        let not_probed = ProbeOutcome::Failed("must not be probed".into());
        let assigned = [("PCI0_ADDRESS", "01:00.0")];
        let cases: Vec<(&str, Config, PciFacts, ProbeOutcome)> = vec![
            ("gpu-not-present", config(&[]), none.clone(), not_probed.clone()),
            ("gpu-not-passed-through", config(&assigned), none.clone(), not_probed.clone()),
            (
                "gpu-not-passed-through",
                config(&assigned),
                facts(&[device(A, 0x8086, 0x02_00_00, Some("igb"))]),
                not_probed.clone(),
            ),
            ("driver-not-loaded", config(&[]), facts(&[gpu_at(A, None)]), not_probed.clone()),
            ("driver-not-loaded", config(&[]), on_nvidia.clone(), code(9)),
            ("wrong-driver", config(&[]), facts(&[gpu_at(A, Some("nouveau"))]), not_probed.clone()),
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
                    stderr: String::new(),
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
                faulty(|gpu| gpu.health_issues.push("2 uncorrectable ECC errors".into())),
            ),
            (
                "gpu-lost",
                config(&[]),
                on_nvidia.clone(),
                faulty(|gpu| {
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
                not_probed.clone(),
            ),
            (
                "framework-without-gpu",
                config(&[("ML_FRAMEWORK", "sklearn")]),
                on_nvidia.clone(),
                not_probed,
            ),
        ];
        let mut reached = HashSet::new();
        for (expected, config, facts, outcome) in cases {
            let finding = expect_finding(decide_on(&config, &facts, &outcome));
            assert_eq!(finding.reason.code(), expected, "{}", finding.summary);
            assert!(!finding.summary.is_empty() && !finding.summary.contains("must not be probed"));
            reached.insert(finding.reason);
        }
        let later = [
            Reason::RuntimeMissing,
            Reason::RuntimeNotConfigured,
            Reason::RuntimeStartFailed,
            Reason::GpuNotVisible,
            Reason::GpuFailed,
        ];
        for entry in CATALOGUE {
            assert!(
                reached.contains(&entry.reason) != later.contains(&entry.reason),
                "{}",
                entry.code
            );
        }
    }

    #[test]
    fn disabled_gpu_has_no_finding() {
        let config = config(&[]);
        let gpu = GpuRequest { enabled: false, ..config.gpu };
        let disabled = Config { gpu, ..config };
        assert_eq!(decide_on_sysfs(&disabled, &two_gpus().0), Some(Verdict::Cpu { finding: None }));
    }

    #[test]
    fn verdict_on_failed_read_names_the_read() {
        let facts = PciFacts {
            unreadable: vec!["/sys/bus/pci/devices: Permission denied".into()],
            ..facts(&[])
        };
        let finding = expect_finding(decide_on_sysfs(&config(&[]), &facts).unwrap());
        assert!(
            finding.summary.contains("could not be read: /sys/bus/pci/devices: Permission denied")
        );
    }

    #[test]
    fn selection_none_lists_the_present_gpus() {
        let none = config(&[("FL_CUDA_VISIBLE_DEVICES", "none")]);
        let summary = |facts| expect_finding(decide_on_sysfs(&none, &facts).unwrap()).summary;
        assert_eq!(
            summary(two_gpus().0),
            "FL_CUDA_VISIBLE_DEVICES='none' selects no GPU; this VM has \
             0000:01:00.0 (10de:20b5, class 0302, driver nvidia), \
             0000:21:00.0 (10de:20b5, class 0302, driver nvidia)"
        );
        assert_eq!(
            summary(facts(&[])),
            "FL_CUDA_VISIBLE_DEVICES='none' selects no GPU; this VM has no NVIDIA GPU"
        );
    }

    #[test]
    fn finding_names_its_device() {
        let assigned = config(&[("PCI0_ADDRESS", "01:00.0"), ("PCI1_ADDRESS", "21:00.0")]);
        let device_of = |config: &Config, facts: &PciFacts, outcome: &ProbeOutcome| {
            let finding = expect_finding(decide_on(config, facts, outcome));
            (finding.pci_address, finding.gpu_uuid)
        };
        let a = PciAddress::parse(A);
        let timeout = ProbeOutcome::TimedOut {
            limit: Duration::from_secs(20),
            library: LibraryFile::default(),
        };
        assert_eq!(
            device_of(&assigned, &facts(&[]), &timeout),
            (a, None),
            "the first assigned device"
        );
        assert_eq!(
            device_of(&config(&[]), &two_gpus().0, &timeout),
            (a, None),
            "the first present GPU"
        );
        let mut faulty = probed(0, "GPU-1", A);
        faulty.health_issues.push("a fault".into());
        let on_nvidia = facts(&[gpu_at(A, Some("nvidia"))]);
        assert_eq!(
            device_of(&config(&[]), &on_nvidia, &report(vec![faulty])),
            (a, GpuUuid::parse("GPU-1").ok())
        );
    }
}
