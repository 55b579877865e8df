//! Applies `FL_CUDA_VISIBLE_DEVICES` to the GPUs that the driver reports. Pure.

use super::diagnose::{diagnose_unlisted, health_finding, unusable_assignments};
use super::pci::{PciDevice, PciFacts};
use super::probe_child::{DriverReport, ProbedGpu};
use super::reason::{Finding, Reason};
use super::verdict::GpuDevice;
use crate::config::GpuRequest;
use crate::values::{DeviceName, DeviceSelection, GpuUuid};

/// The usable devices among the selected ones.
pub(super) struct Selection {
    /// At least one.
    pub(super) devices: Vec<GpuDevice>,
    /// Selected or assigned devices that are unusable.
    pub(super) missing: Vec<String>,
}

/// Returns the selected devices that are usable, or why there is none.
pub(super) fn select_devices(
    request: &GpuRequest,
    facts: &PciFacts,
    report: &DriverReport,
) -> Result<Selection, Finding> {
    let mut devices: Vec<GpuDevice> = Vec::new();
    let (mut unusable, mut not_found) = (Vec::new(), Vec::new());
    for selected in resolve_selection(&request.selection, facts, report) {
        match selected {
            Resolved::Listed(gpu, instance) => match health_finding(gpu) {
                Some(finding) => unusable.push(finding),
                None => {
                    for device in container_devices(gpu, instance) {
                        if !devices.contains(&device) {
                            devices.push(device);
                        }
                    }
                }
            },
            Resolved::Unlisted(gpu) => unusable.push(diagnose_unlisted(gpu, facts)),
            Resolved::NotFound(why) => not_found.push(why),
        }
    }
    if devices.is_empty() {
        return Err(unusable
            .into_iter()
            .next()
            .or_else(|| unidentified_gpu_finding(&request.selection, report))
            .unwrap_or_else(|| nothing_selected(&request.selection, &not_found, facts, report)));
    }
    // Other functions of a GPU are assigned with it, and not every assigned device is a GPU.
    let mut missing: Vec<String> = unusable_assignments(request, facts)
        .into_iter()
        .filter(|assignment| !assignment.is_other_device)
        .map(|assignment| assignment.description)
        .collect();
    missing.extend(unusable.iter().map(|cause| format!("{} ({})", cause.summary, cause.reason)));
    if !not_found.is_empty() {
        missing.push(format!(
            "{}; this VM has: {}",
            not_found.join("; "),
            list_available(facts, report)
        ));
    }
    Ok(Selection { devices, missing })
}

fn nothing_selected(
    selection: &DeviceSelection,
    not_found: &[String],
    facts: &PciFacts,
    report: &DriverReport,
) -> Finding {
    let why =
        if not_found.is_empty() { String::new() } else { format!(" ({})", not_found.join("; ")) };
    Finding::new(
        Reason::DeviceSelectionEmpty,
        format!(
            "FL_CUDA_VISIBLE_DEVICES='{selection}' selects no usable GPU{why}; this VM has: {}",
            list_available(facts, report)
        ),
    )
}

/// Returns the fault of a GPU whose UUID or address is unreadable: it may be the selected one.
fn unidentified_gpu_finding(selection: &DeviceSelection, report: &DriverReport) -> Option<Finding> {
    let DeviceSelection::Named(names) = selection else {
        return None;
    };
    let may_be_selected = |gpu: &ProbedGpu| {
        names.iter().any(|name| match name {
            DeviceName::Index(_) => false,
            DeviceName::Pci(_) => gpu.pci_address.is_none(),
            DeviceName::GpuUuid(_) | DeviceName::MigUuid(_) => gpu.uuid.is_none(),
        })
    };
    report.gpus.iter().filter(|gpu| may_be_selected(gpu)).find_map(health_finding)
}

/// Returns the whole GPU, or its MIG instances in MIG mode; only `instance` if one is named.
fn container_devices(gpu: &ProbedGpu, instance: Option<&GpuUuid>) -> Vec<GpuDevice> {
    let device = |uuid: &GpuUuid, name: &Option<String>, memory_mib: Option<u64>| GpuDevice {
        index: gpu.index,
        uuid: uuid.clone(),
        name: name.clone().or_else(|| gpu.name.clone()),
        pci_address: gpu.pci_address,
        memory_mib,
        minor: gpu.minor,
    };
    match &gpu.mig {
        Some(instances) => instances
            .iter()
            .filter(|candidate| instance.is_none_or(|uuid| *uuid == candidate.uuid))
            .map(|instance| device(&instance.uuid, &instance.name, instance.memory_mib))
            .collect(),
        None => gpu.uuid.iter().map(|uuid| device(uuid, &gpu.name, gpu.memory_mib)).collect(),
    }
}

/// What an element of `FL_CUDA_VISIBLE_DEVICES` refers to.
enum Resolved<'r> {
    /// A GPU that the driver lists, and the MIG instance if the element names one.
    Listed(&'r ProbedGpu, Option<&'r GpuUuid>),
    /// A GPU on the PCI bus that the driver does not list.
    Unlisted(&'r PciDevice),
    /// No GPU, or several: the reason.
    NotFound(String),
}

fn resolve_selection<'r>(
    selection: &DeviceSelection,
    facts: &'r PciFacts,
    report: &'r DriverReport,
) -> Vec<Resolved<'r>> {
    match selection {
        DeviceSelection::Named(names) => {
            names.iter().map(|name| resolve_name(name, facts, report)).collect()
        }
        DeviceSelection::All | DeviceSelection::None => {
            let listed = report.gpus.iter().map(|gpu| Resolved::Listed(gpu, None));
            listed.chain(unlisted_gpus(facts, report).map(Resolved::Unlisted)).collect()
        }
    }
}

fn resolve_name<'r>(
    name: &DeviceName,
    facts: &'r PciFacts,
    report: &'r DriverReport,
) -> Resolved<'r> {
    let candidates: Vec<(&ProbedGpu, Option<&GpuUuid>)> = match name {
        DeviceName::Index(index) => {
            report.gpus.iter().filter(|gpu| gpu.index == *index).map(|gpu| (gpu, None)).collect()
        }
        DeviceName::Pci(address) => report
            .gpus
            .iter()
            .filter(|gpu| gpu.pci_address == Some(*address))
            .map(|gpu| (gpu, None))
            .collect(),
        DeviceName::GpuUuid(prefix) => report
            .gpus
            .iter()
            .filter(|gpu| gpu.uuid.as_ref().is_some_and(|uuid| uuid.has_prefix(prefix)))
            .map(|gpu| (gpu, None))
            .collect(),
        DeviceName::MigUuid(prefix) => report
            .gpus
            .iter()
            .flat_map(|gpu| gpu.mig.iter().flatten().map(move |instance| (gpu, &instance.uuid)))
            .filter(|(_, uuid)| uuid.has_prefix(prefix))
            .map(|(gpu, uuid)| (gpu, Some(uuid)))
            .collect(),
    };
    let unlisted = match name {
        DeviceName::Pci(address) => {
            unlisted_gpus(facts, report).find(|gpu| gpu.address == *address)
        }
        _ => None,
    };
    match (candidates.as_slice(), unlisted) {
        ([(gpu, instance)], _) => Resolved::Listed(gpu, *instance),
        ([], Some(gpu)) => Resolved::Unlisted(gpu),
        ([], None) => Resolved::NotFound(format!(
            "FL_CUDA_VISIBLE_DEVICES names '{name}', which is not in this VM"
        )),
        _ => Resolved::NotFound(format!(
            "FL_CUDA_VISIBLE_DEVICES names '{name}', which is a prefix of several UUIDs"
        )),
    }
}

fn list_available(facts: &PciFacts, report: &DriverReport) -> String {
    let listed = report.gpus.iter().map(|gpu| match &gpu.mig {
        None => gpu.title(),
        Some(instances) if instances.is_empty() => {
            format!("{} (MIG mode, no instances)", gpu.title())
        }
        Some(instances) => {
            let uuids: Vec<&str> =
                instances.iter().map(|instance| instance.uuid.as_str()).collect();
            format!("{} (MIG: {})", gpu.title(), uuids.join(", "))
        }
    });
    let unlisted = unlisted_gpus(facts, report).map(|gpu| diagnose_unlisted(gpu, facts).summary);
    listed.chain(unlisted).collect::<Vec<_>>().join("; ")
}

/// Returns the GPUs on the PCI bus that the driver does not list: bound to another driver, to none,
/// or rejected by NVIDIA's driver.
fn unlisted_gpus<'r>(
    facts: &'r PciFacts,
    report: &'r DriverReport,
) -> impl Iterator<Item = &'r PciDevice> {
    // A listed GPU without a readable address could be any of them.
    let all_have_addresses = report.gpus.iter().all(|gpu| gpu.pci_address.is_some());
    facts.gpus().filter(move |gpu| {
        all_have_addresses
            && !report.gpus.iter().any(|other| other.pci_address == Some(gpu.address))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::nvml_error::{Fault, FaultKind};
    use crate::gpu::probe_child::ProbedMig;
    use crate::gpu::test_fixtures::{
        A, B, config, decide_on, device, expect_finding, facts, gpu_at, probed, report, two_gpus,
        uuids,
    };
    use crate::gpu::verdict::Verdict;

    #[test]
    fn selects_by_index_uuid_prefix_or_pci_address() {
        let (facts, outcome) = two_gpus();
        for (selection, expected) in [
            ("all", vec!["GPU-aaaa-1", "GPU-aabb-2"]),
            ("1", vec!["GPU-aabb-2"]),
            ("gpu-AAB", vec!["GPU-aabb-2"]),
            ("01:00.0", vec!["GPU-aaaa-1"]),
            ("00000000:21:00.0", vec!["GPU-aabb-2"]),
            ("1,0", vec!["GPU-aabb-2", "GPU-aaaa-1"]),
            ("1,GPU-aabb,21:00.0", vec!["GPU-aabb-2"]),
        ] {
            let request = config(&[("FL_CUDA_VISIBLE_DEVICES", selection)]);
            let verdict = decide_on(&request, &facts, &outcome);
            assert_eq!(uuids(&verdict), expected, "{selection}");
        }
    }

    #[test]
    fn missing_selection_is_reported_with_available_gpus() {
        let (facts, outcome) = two_gpus();
        let decide = |selection| {
            let request = config(&[("FL_CUDA_VISIBLE_DEVICES", selection)]);
            decide_on(&request, &facts, &outcome)
        };
        let verdict = decide("1,5");
        let Verdict::Gpu { missing, .. } = &verdict else { panic!("{verdict:?}") };
        assert!(missing[0].contains("'5'") && missing[0].contains("GPU-aaaa-1"), "{missing:?}");
        for selection in ["5", "GPU-aa", "GPU-c", "99:00.0"] {
            let finding = expect_finding(decide(selection));
            assert_eq!(finding.reason, Reason::DeviceSelectionEmpty);
            assert!(finding.summary.contains("GPU-aabb-2"), "{}", finding.summary);
        }
    }

    #[test]
    fn ambiguous_uuid_prefix_is_reported() {
        let (facts, outcome) = two_gpus();
        let request = config(&[("FL_CUDA_VISIBLE_DEVICES", "GPU-aa")]);
        let finding = expect_finding(decide_on(&request, &facts, &outcome));
        assert!(
            finding.summary.contains("'GPU-aa', which is a prefix of several UUIDs"),
            "{}",
            finding.summary
        );
    }

    #[test]
    fn selected_gpu_without_driver_is_diagnosed() {
        let outcome = report(vec![probed(0, "GPU-1", A)]);
        for (driver, reason) in [
            (Some("nouveau"), Reason::WrongDriver),
            (None, Reason::DriverNotLoaded),
            (Some("nvidia"), Reason::GpuCountZero),
        ] {
            let facts = facts(&[gpu_at(A, Some("nvidia")), gpu_at(B, driver)]);
            let decide = |pairs| decide_on(&config(pairs), &facts, &outcome);
            let by_address = expect_finding(decide(&[("FL_CUDA_VISIBLE_DEVICES", "21:00.0")]));
            assert_eq!(
                (
                    by_address.reason,
                    by_address.pci_address.map(|address| address.to_string()).as_deref()
                ),
                (reason, Some(B))
            );
            // The driver assigns indices, so an unlisted GPU has none; it is listed as available.
            let by_index = expect_finding(decide(&[("FL_CUDA_VISIBLE_DEVICES", "1")]));
            assert_eq!(by_index.reason, Reason::DeviceSelectionEmpty);
            assert!(by_index.summary.contains(B), "{}", by_index.summary);
            // Without a selection the other GPU is used and this one is a WARNING.
            let Verdict::Gpu { missing, .. } = decide(&[]) else { panic!("not on the GPU") };
            assert!(missing.len() == 1 && missing[0].contains(B), "{missing:?}");
        }
    }

    #[test]
    fn gpu_without_readable_uuid_may_be_the_selected_one() {
        let mut unidentified = probed(0, "GPU-1", A);
        unidentified.uuid = None;
        unidentified.fault = Some(Fault {
            call: "nvmlDeviceGetUUID".into(),
            kind: FaultKind::Code(15),
            text: "lost".into(),
        });
        let facts = facts(&[gpu_at(A, Some("nvidia"))]);
        let reason = |selection| {
            let request = config(&[("FL_CUDA_VISIBLE_DEVICES", selection)]);
            let outcome = report(vec![unidentified.clone()]);
            expect_finding(decide_on(&request, &facts, &outcome)).reason
        };
        assert_eq!(reason("GPU-1"), Reason::GpuLost);
        assert_eq!(reason("0"), Reason::GpuLost);
        assert_eq!(reason("1"), Reason::DeviceSelectionEmpty);
        assert_eq!(reason("21:00.0"), Reason::DeviceSelectionEmpty);
    }

    #[test]
    fn gpu_with_invalid_address_hides_unlisted_gpus() {
        let facts = facts(&[gpu_at(A, Some("nvidia"))]);
        let outcome = report(vec![probed(0, "GPU-1", "invalid")]);
        let verdict = decide_on(&config(&[]), &facts, &outcome);
        let Verdict::Gpu { missing, .. } = verdict else { panic!("{verdict:?}") };
        assert_eq!(missing, Vec::<String>::new());
    }

    #[test]
    fn absent_assigned_device_is_a_warning_if_a_gpu_is_usable() {
        let request = config(&[("PCI0_ADDRESS", "01:00.0"), ("PCI1_ADDRESS", "21:00.0")]);
        let facts = facts(&[gpu_at(A, Some("nvidia"))]);
        let verdict = decide_on(&request, &facts, &report(vec![probed(0, "GPU-1", A)]));
        let Verdict::Gpu { devices, missing } = verdict else { panic!("{verdict:?}") };
        assert_eq!((devices.len(), missing.len()), (1, 1));
        assert!(missing[0].contains("0000:21:00.0"), "{missing:?}");
    }

    #[test]
    fn assigned_audio_function_causes_no_warning() {
        let request = config(&[("PCI0_ADDRESS", "01:00.0"), ("PCI1_ADDRESS", "01:00.1")]);
        let audio = device("0000:01:00.1", 0x10de, 0x04_03_00, Some("snd_hda_intel"));
        let facts = facts(&[gpu_at(A, Some("nvidia")), audio]);
        let verdict = decide_on(&request, &facts, &report(vec![probed(0, "GPU-1", A)]));
        let Verdict::Gpu { missing, .. } = verdict else { panic!("{verdict:?}") };
        assert_eq!(missing, Vec::<String>::new());
    }

    #[test]
    fn faulty_gpu_is_excluded_if_another_is_usable() {
        let (facts, _) = two_gpus();
        let mut lost = probed(0, "GPU-aaaa-1", A);
        lost.fault = Some(Fault {
            call: "nvmlDeviceGetName".into(),
            kind: FaultKind::Code(15),
            text: "lost".into(),
        });
        let outcome = report(vec![lost, probed(1, "GPU-aabb-2", B)]);
        let verdict = decide_on(&config(&[]), &facts, &outcome);
        assert_eq!(uuids(&verdict), ["GPU-aabb-2"]);
        let request = config(&[("FL_CUDA_VISIBLE_DEVICES", "0")]);
        let finding = expect_finding(decide_on(&request, &facts, &outcome));
        assert_eq!(
            (finding.reason, finding.gpu_uuid.as_ref().map(GpuUuid::as_str)),
            (Reason::GpuLost, Some("GPU-aaaa-1"))
        );
    }

    #[test]
    fn gpu_in_mig_mode_yields_its_instances() {
        let facts = facts(&[gpu_at(A, Some("nvidia"))]);
        let instance = |uuid: &str| ProbedMig {
            uuid: GpuUuid::parse(uuid).unwrap(),
            name: None,
            memory_mib: Some(4864),
        };
        let mut gpu = probed(0, "GPU-1", A);
        gpu.mig = Some(vec![instance("MIG-aa"), instance("MIG-bb")]);
        let outcome = report(vec![gpu.clone()]);
        let select = |selection| {
            let request = config(&[("FL_CUDA_VISIBLE_DEVICES", selection)]);
            decide_on(&request, &facts, &outcome)
        };
        assert_eq!(uuids(&select("all")), ["MIG-aa", "MIG-bb"]);
        assert_eq!(uuids(&select("MIG-b")), ["MIG-bb"]);
        assert_eq!(select("MIG-b").devices()[0].memory_mib, Some(4864));
        gpu.mig = Some(vec![]);
        let verdict = decide_on(&config(&[]), &facts, &report(vec![gpu]));
        assert_eq!(expect_finding(verdict).reason, Reason::DeviceSelectionEmpty);
    }

    #[test]
    fn available_gpus_are_listed_with_their_mig_instances() {
        let (facts, _) = two_gpus();
        let instance = |uuid: &str| ProbedMig {
            uuid: GpuUuid::parse(uuid).unwrap(),
            name: None,
            memory_mib: None,
        };
        let (mut split, mut whole) = (probed(0, "GPU-1", A), probed(1, "GPU-2", B));
        split.mig = Some(vec![instance("MIG-a"), instance("MIG-b")]);
        whole.mig = Some(Vec::new());
        let outcome = report(vec![split, whole]);
        let request = config(&[("FL_CUDA_VISIBLE_DEVICES", "7")]);
        assert_eq!(
            expect_finding(decide_on(&request, &facts, &outcome)).summary,
            "FL_CUDA_VISIBLE_DEVICES='7' selects no usable GPU (FL_CUDA_VISIBLE_DEVICES names '7', \
             which is not in this VM); this VM has: \
             GPU 0, NVIDIA A100, GPU-1, 0000:01:00.0 (MIG: MIG-a, MIG-b); \
             GPU 1, NVIDIA A100, GPU-2, 0000:21:00.0 (MIG mode, no instances)"
        );
    }
}
