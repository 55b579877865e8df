//! Diagnoses why a GPU is unusable: from sysfs (not passed through, not bound to the driver), from
//! a failed probe, or from what the driver reports about one GPU. Pure functions.

use super::nvml_error::FaultKind;
use super::nvml_library::LibraryFile;
use super::pci::{PciDevice, PciFacts};
use super::probe::ProbeOutcome;
use super::probe_child::{DriverReport, ProbeAnswer, ProbedGpu};
use super::reason::{Finding, Reason};
use crate::config::GpuRequest;
use crate::values::PciAddress;

/// A device that OpenNebula assigned and that is not in this VM as a GPU.
pub(super) struct UnusableAssignment {
    address: Option<PciAddress>,
    /// Whether another kind of device is at the address, such as the audio function of a GPU or a
    /// NIC.
    pub(super) is_other_device: bool,
    pub(super) description: String,
}

/// Returns the assigned devices that are absent or not an NVIDIA GPU.
pub(super) fn unusable_assignments(
    request: &GpuRequest,
    facts: &PciFacts,
) -> Vec<UnusableAssignment> {
    request
        .assigned
        .iter()
        .filter_map(|assigned| {
            let (is_other_device, problem) = match assigned.address {
                None => (false, "but that is not a PCI address".to_owned()),
                Some(address) => match facts.at(address) {
                    None => (false, "but there is no device at that address".to_owned()),
                    Some(device) if device.is_nvidia_display() => return None,
                    Some(device) => (
                        true,
                        format!("but the device there is not an NVIDIA GPU ({})", device.summary()),
                    ),
                },
            };
            let address = assigned
                .address
                .map_or_else(|| assigned.written.clone(), |address| address.to_string());
            Some(UnusableAssignment {
                description: format!(
                    "OpenNebula assigned {address} to this VM ({}='{}'), {problem}",
                    assigned.variable, assigned.written
                ),
                address: assigned.address,
                is_other_device,
            })
        })
        .collect()
}

/// Diagnoses from sysfs alone. Returns `None` if a GPU is bound to NVIDIA's driver: the driver must
/// be probed.
pub(super) fn diagnose_pci(request: &GpuRequest, facts: &PciFacts) -> Option<Finding> {
    if facts.gpus().next().is_none() {
        return Some(diagnose_absent_gpu(request, facts));
    }
    if facts.gpus().any(PciDevice::is_bound_to_nvidia) {
        return None;
    }
    let (bound, unbound): (Vec<_>, Vec<_>) = facts.gpus().partition(|gpu| gpu.driver.is_some());
    let mut findings = bound.into_iter().chain(unbound).map(|gpu| diagnose_unlisted(gpu, facts));
    let first = findings.next()?;
    let summaries: Vec<String> =
        std::iter::once(first.summary).chain(findings.map(|other| other.summary)).collect();
    Some(Finding { summary: summaries.join("; "), ..first })
}

fn diagnose_absent_gpu(request: &GpuRequest, facts: &PciFacts) -> Finding {
    let unusable = unusable_assignments(request, facts);
    let Some(first) = unusable.first() else {
        let summary = format!(
            "OpenNebula assigned no GPU to this VM (the context has no PCI<n>_ADDRESS of a GPU), \
             and there is no NVIDIA GPU (vendor 10de, class 03xx) among its {}",
            list_similar_devices(facts)
        );
        return Finding::new(Reason::GpuNotPresent, summary);
    };
    let descriptions: Vec<&str> =
        unusable.iter().map(|assignment| assignment.description.as_str()).collect();
    Finding {
        pci_address: first.address,
        ..Finding::new(Reason::GpuNotPassedThrough, descriptions.join("; "))
    }
}

/// Counts the PCI devices of a VM without an NVIDIA GPU and lists those that could be mistaken for
/// one.
fn list_similar_devices(facts: &PciFacts) -> String {
    let similar: Vec<String> = facts
        .devices
        .iter()
        .filter(|device| device.is_similar_to_gpu())
        .map(|device| format!("{} ({})", device.address, device.summary()))
        .collect();
    let count = facts.devices.len();
    let devices = if count == 1 { "1 PCI device".into() } else { format!("{count} PCI devices") };
    if similar.is_empty() {
        devices
    } else {
        format!("{devices}; similar devices: {}", similar.join(", "))
    }
}

/// Diagnoses why NVIDIA's driver does not list this GPU.
pub(super) fn diagnose_unlisted(gpu: &PciDevice, facts: &PciFacts) -> Finding {
    let (address, ids) = (gpu.address, gpu.ids());
    let (reason, summary) = match gpu.driver.as_deref() {
        Some("nvidia") => (
            Reason::GpuCountZero,
            format!("GPU {address} ({ids}) is bound to the nvidia driver, which does not list it"),
        ),
        Some(driver) => (
            Reason::WrongDriver,
            format!("GPU {address} ({ids}) is bound to the driver {driver}, not to nvidia"),
        ),
        None => {
            let module = match (&facts.module_version, &facts.module_pending) {
                (_, Some(state)) => format!("the nvidia module is still {state}"),
                (Some(version), None) => {
                    format!("the nvidia module {version} is loaded but did not bind it")
                }
                (None, None) => diagnose_module_not_loaded(facts),
            };
            (
                Reason::DriverNotLoaded,
                format!("no driver is bound to GPU {address} ({ids}): {module}"),
            )
        }
    };
    Finding { pci_address: Some(address), ..Finding::new(reason, summary) }
}

fn diagnose_module_not_loaded(facts: &PciFacts) -> String {
    let parts: Vec<String> = std::iter::once("the nvidia module is not loaded".into())
        .chain(facts.kernel.obstacles())
        .collect();
    parts.join("; ")
}

/// Returns the report of the driver, or diagnoses why the probe did not get one.
pub(super) fn diagnose_probe<'r>(
    outcome: &'r ProbeOutcome,
    facts: &PciFacts,
) -> Result<&'r DriverReport, Finding> {
    match outcome {
        ProbeOutcome::Answered(ProbeAnswer::Driver(report)) if report.gpus.is_empty() => {
            let summary = format!("{} is loaded but reports no GPU", report.driver());
            Err(driver_finding(Reason::GpuCountZero, summary, facts))
        }
        ProbeOutcome::Answered(ProbeAnswer::Driver(report)) => Ok(report),
        ProbeOutcome::Answered(ProbeAnswer::Failed { fault, library }) => {
            let reason = fault.reason();
            let what = fault.describe();
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
                    "the library has version {}, the loaded kernel module {} ({what})",
                    library.version.as_deref().unwrap_or("unknown"),
                    facts.module_version.as_deref().unwrap_or("unknown"),
                ),
                Reason::DriverNotLoaded if facts.module_version.is_none() => {
                    let module = diagnose_module_not_loaded(facts);
                    format!("{what}{}; {module}", library_suffix(library))
                }
                _ => format!("{what}{}", library_suffix(library)),
            };
            Err(driver_finding(reason, summary, facts))
        }
        ProbeOutcome::TimedOut { limit, library } => {
            let summary = format!(
                "NVML did not respond within {} s; the probe was killed{}",
                limit.as_secs_f64(),
                library_suffix(library)
            );
            Err(driver_finding(Reason::DriverTimeout, summary, facts))
        }
        ProbeOutcome::Crashed { signal, stderr, library } => {
            let stderr = match stderr.as_str() {
                "" => String::new(),
                text => format!(": {text}"),
            };
            let summary = format!(
                "the probe was killed by signal {signal}{} while calling NVML{stderr}{}",
                signal_name(*signal),
                library_suffix(library)
            );
            Err(driver_finding(Reason::DriverCrash, summary, facts))
        }
        ProbeOutcome::Failed(error) => {
            Err(driver_finding(Reason::DriverError, error.clone(), facts))
        }
    }
}

/// Returns a finding about the driver, with the GPUs it should drive.
fn driver_finding(reason: Reason, summary: String, facts: &PciFacts) -> Finding {
    let module = facts
        .module_version
        .as_deref()
        .map_or(String::new(), |version| format!(", nvidia module {version}"));
    Finding {
        pci_address: facts.gpus().next().map(|gpu| gpu.address),
        ..Finding::new(reason, format!("{summary}; {}{module}", list_present_gpus(facts)))
    }
}

/// Lists the GPUs that sysfs shows.
pub(super) fn list_present_gpus(facts: &PciFacts) -> String {
    let present: Vec<String> =
        facts.gpus().map(|gpu| format!("{} ({})", gpu.address, gpu.summary())).collect();
    if present.is_empty() {
        "this VM has no NVIDIA GPU".into()
    } else {
        format!("this VM has {}", present.join(", "))
    }
}

/// Names the library that was called, as the end of a sentence; empty if it is unknown.
fn library_suffix(library: &LibraryFile) -> String {
    match library {
        LibraryFile { path: Some(path), version: Some(version), .. } => {
            format!("; the library is {path}, version {version}")
        }
        LibraryFile { path: Some(path), .. } => format!("; the library is {path}"),
        LibraryFile { path: None, .. } => String::new(),
    }
}

/// Returns ` (SIGSEGV)` and the like; empty for other signals.
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

/// Returns why a GPU that the driver lists is unusable; `None` for a healthy one.
pub(super) fn health_finding(gpu: &ProbedGpu) -> Option<Finding> {
    let (reason, what) = match (&gpu.fault, gpu.health_issues.as_slice()) {
        (Some(fault), _) => (fault.reason(), fault.describe()),
        (None, []) => return None,
        (None, health_issues) => (Reason::GpuUnhealthy, health_issues.join("; ")),
    };
    Some(Finding {
        pci_address: gpu.pci_address,
        gpu_uuid: gpu.uuid.clone(),
        ..Finding::new(reason, format!("{}: {what}", gpu.title()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::kernel::KernelFacts;
    use crate::gpu::nvml_error::Fault;
    use crate::gpu::test_fixtures::{
        A, B, config, decide_on, decide_on_sysfs, device, expect_finding, facts, failed, gpu_at,
        two_gpus,
    };

    #[test]
    fn summary_compares_assigned_and_present_device() {
        let assigned = config(&[("PCI0_ADDRESS", "01:00.0")]);
        let finding_of = |facts| expect_finding(decide_on_sysfs(&assigned, &facts).unwrap());
        assert_eq!(
            finding_of(facts(&[])).summary,
            "OpenNebula assigned 0000:01:00.0 to this VM (PCI0_ADDRESS='01:00.0'), \
             but there is no device at that address"
        );
        assert_eq!(
            finding_of(facts(&[device(A, 0x8086, 0x02_00_00, Some("igb"))])).summary,
            "OpenNebula assigned 0000:01:00.0 to this VM (PCI0_ADDRESS='01:00.0'), \
             but the device there is not an NVIDIA GPU (8086:20b5, class 0200, driver igb)"
        );
        assert_eq!(
            finding_of(facts(&[gpu_at(A, Some("nouveau"))])).summary,
            "GPU 0000:01:00.0 (10de:20b5, class 0302) is bound to the driver nouveau, not to nvidia"
        );
        let both = expect_finding(decide_on(
            &assigned,
            &two_gpus().0,
            &failed(FaultKind::Code(18), "mismatch"),
        ));
        assert!(
            both.summary.contains("560.35.03") && both.summary.contains("550.54.15"),
            "{}",
            both.summary
        );
    }

    #[test]
    fn summary_names_obstacles_to_loading_the_module() {
        let bare = PciFacts { module_version: None, ..facts(&[gpu_at(A, None)]) };
        let summary = |kernel| {
            let facts = PciFacts { kernel, ..bare.clone() };
            expect_finding(decide_on_sysfs(&config(&[]), &facts).unwrap()).summary
        };
        let start = "no driver is bound to GPU 0000:01:00.0 (10de:20b5, class 0302): \
                     the nvidia module is not loaded";
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
                "{start}; no module is installed for kernel 6.1.0-9-amd64; \
                 the headers of kernel 6.1.0-9-amd64, which DKMS needs, are not installed"
            )
        );
        assert_eq!(
            summary(kernel(true, false, true)),
            format!(
                "{start}; a module is installed for kernel 6.1.0-9-amd64; \
                 Secure Boot is on: the kernel loads only modules signed with a trusted key"
            )
        );
        // If a driver is bound, only NVML reports that it is not loaded.
        let facts = PciFacts {
            module_version: None,
            kernel: kernel(false, true, false),
            ..facts(&[gpu_at(A, Some("nvidia"))])
        };
        let by_nvml = expect_finding(decide_on(
            &config(&[]),
            &facts,
            &failed(FaultKind::Code(9), "no driver"),
        ))
        .summary;
        assert!(
            by_nvml.contains(
                "error 9: no driver; the nvidia module is not loaded; no module is installed"
            ),
            "{by_nvml}"
        );
    }

    #[test]
    fn absent_gpu_is_reported_with_similar_devices() {
        let display = device("0000:00:02.0", 0x1234, 0x03_00_00, Some("bochs-drm"));
        let facts =
            facts(&[display, device("0000:00:03.0", 0x1af4, 0x02_00_00, Some("virtio-pci"))]);
        assert_eq!(
            expect_finding(decide_on_sysfs(&config(&[]), &facts).unwrap()).summary,
            "OpenNebula assigned no GPU to this VM (the context has no PCI<n>_ADDRESS of a GPU), \
             and there is no NVIDIA GPU (vendor 10de, class 03xx) among its 2 PCI devices; \
             similar devices: 0000:00:02.0 (1234:20b5, class 0300, driver bochs-drm)"
        );
    }

    #[test]
    fn every_gpu_without_nvidia_driver_is_reported() {
        let facts = facts(&[gpu_at(A, None), gpu_at(B, Some("nouveau"))]);
        let finding = expect_finding(decide_on_sysfs(&config(&[]), &facts).unwrap());
        assert_eq!(
            (finding.reason, finding.pci_address.map(|address| address.to_string()).as_deref()),
            (Reason::WrongDriver, Some(B))
        );
        assert!(finding.summary.contains(A) && finding.summary.contains(B), "{}", finding.summary);
    }

    #[test]
    fn crashed_probe_is_reported_with_signal_name() {
        let on_nvidia = facts(&[gpu_at(A, Some("nvidia"))]);
        for (signal, name) in [
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
                stderr: String::new(),
                library: LibraryFile::default(),
            };
            let summary = expect_finding(decide_on(&config(&[]), &on_nvidia, &outcome)).summary;
            let start =
                format!("the probe was killed by signal {name} while calling NVML; this VM has ");
            assert!(summary.starts_with(&start), "{summary}");
        }
    }

    #[test]
    fn failed_probe_is_reported_with_its_library() {
        let on_nvidia = facts(&[gpu_at(A, Some("nvidia"))]);
        let summary = |kind, path: Option<&str>, version: Option<&str>, damage: Option<&str>| {
            let fault = Fault { call: "nvmlInit_v2".into(), kind, text: "text".into() };
            let (path, version, damage) =
                (path.map(Into::into), version.map(Into::into), damage.map(Into::into));
            let library = LibraryFile { path, version, damage };
            let outcome = ProbeOutcome::Answered(ProbeAnswer::Failed { fault, library });
            let summary = expect_finding(decide_on(&config(&[]), &on_nvidia, &outcome)).summary;
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
            "libnvidia-ml cannot be loaded (nvmlInit_v2 returned NVML error 12: text)",
            "a library that responds is installed"
        );
        assert_eq!(
            summary(FaultKind::Code(999), Some("/lib/l.so"), Some("550.1"), None),
            "nvmlInit_v2 returned NVML error 999: text; the library is /lib/l.so, version 550.1"
        );
        assert_eq!(
            summary(FaultKind::Symbol, Some("/lib/l.so"), None, None),
            "nvmlInit_v2 is not available: text; the library is /lib/l.so"
        );
        assert_eq!(
            summary(FaultKind::InvalidResponse, None, None, None),
            "nvmlInit_v2 returned an invalid response: text"
        );
        assert_eq!(
            summary(FaultKind::Code(27), None, None, None),
            "nvmlInit_v2 returned NVML error 27: driver not ready"
        );
    }

    #[test]
    fn loaded_module_is_not_reported_as_missing() {
        let on_nvidia = facts(&[gpu_at(A, Some("nvidia"))]);
        let summary = expect_finding(decide_on(
            &config(&[]),
            &on_nvidia,
            &failed(FaultKind::Code(9), "no driver"),
        ))
        .summary;
        assert_eq!(
            summary,
            "nvmlInit_v2 returned NVML error 9: no driver; this VM has \
             0000:01:00.0 (10de:20b5, class 0302, driver nvidia), nvidia module 550.54.15"
        );
    }
}
