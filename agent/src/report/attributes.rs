//! Sink for OneGate: the attributes that the node publishes.

use crate::config::Framework;
use crate::gpu::verdict::Verdict;
use crate::opennebula::partition;
use crate::opennebula::publisher::{Attributes, VmIdentity};
use crate::report::node_status::NodeStatus;
use crate::values::Version;

/// Renders the attributes. All of them are sent each time, so that those of an earlier boot are
/// overwritten; an empty value erases the attribute.
///
/// OneFlow opens the gate of a role on the text `READY=YES` in any update (EventManager.rb), so
/// that text appears only while the node is connected.
pub(crate) fn attributes(status: &NodeStatus, vm: &VmIdentity) -> Attributes {
    let yes_no = |yes: bool| if yes { "YES" } else { "NO" }.to_owned();
    let verdict = status.verdict.as_ref();
    let (gpu_status, fallback_reason) = match verdict {
        None => ("", ""),
        Some(Verdict::Gpu { .. }) => ("gpu", ""),
        Some(Verdict::Cpu { finding: Some(finding) }) => ("cpu-fallback", finding.reason.code()),
        Some(Verdict::Cpu { finding: None }) => ("cpu", ""),
    };
    let devices = status.devices();
    let names: Vec<&str> = devices.iter().filter_map(|device| device.name.as_deref()).collect();
    let count = verdict.map_or_else(String::new, |_| devices.len().to_string());
    let mut attributes = vec![
        ("FL_NODE_READY", yes_no(status.connected)),
        (partition::OWNER_ATTRIBUTE, vm.id.to_string()),
        ("FL_VERSION", status.flower_version.as_ref().map_or_else(String::new, Version::to_string)),
        ("FL_FRAMEWORK", status.framework.as_ref().map_or_else(String::new, Framework::to_string)),
        ("FL_GPU_AVAILABLE", yes_no(gpu_status == "gpu")),
        ("FL_GPU_STATUS", gpu_status.into()),
        ("FL_GPU_FALLBACK_REASON", fallback_reason.into()),
        ("FL_GPU_COUNT", count),
        ("FL_GPU_NAME", names.join("; ")),
    ];
    if let Some(partition) = status.partition {
        attributes.push((partition::ATTRIBUTE, partition.id.to_string()));
    }
    if vm.report_ready {
        attributes.push(("READY", yes_no(status.connected)));
    }
    attributes
}

/// Renders the attributes of a node that has stopped: not ready, and no device.
pub(crate) fn offline_attributes(status: &NodeStatus, vm: &VmIdentity) -> Attributes {
    attributes(&NodeStatus { connected: false, verdict: None, ..status.clone() }, vm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::reason::{Finding, Reason};
    use crate::gpu::verdict::GpuDevice;
    use crate::opennebula::partition::Partition;
    use crate::system::os_release::Distribution;
    use crate::values::{GpuUuid, PciAddress};

    fn vm(report_ready: bool) -> VmIdentity {
        VmIdentity { id: 101, report_ready }
    }

    fn text(attributes: &Attributes) -> String {
        let lines: Vec<String> =
            attributes.iter().map(|(name, value)| format!("{name}={value}")).collect();
        lines.join("\n")
    }

    fn on_gpu() -> NodeStatus {
        let device = GpuDevice {
            index: 0,
            uuid: GpuUuid::parse("GPU-1").unwrap(),
            name: Some("NVIDIA A100".into()),
            pci_address: PciAddress::parse("0000:01:00.0"),
            memory_mib: None,
            minor: None,
        };
        let mut status = NodeStatus::default();
        let verdict = Verdict::Gpu { devices: vec![device], missing: Vec::new() };
        status.set_verdict(&verdict, Distribution::Debian);
        status.partition = Some(Partition { id: 2, count: 3 });
        status
    }

    #[test]
    fn ready_is_published_only_while_connected_and_wanted() {
        let mut status = on_gpu();
        assert!(!text(&attributes(&status, &vm(true))).contains("READY=YES"));
        status.set_connected(true);
        let all = text(&attributes(&status, &vm(true)));
        assert!(all.contains("FL_NODE_READY=YES") && all.ends_with("\nREADY=YES"), "{all}");
        assert!(!text(&attributes(&status, &vm(false))).contains("\nREADY="));
    }

    #[test]
    fn attributes_of_an_earlier_boot_are_overwritten() {
        let before = text(&attributes(&NodeStatus::default(), &vm(false)));
        for line in [
            "FL_GPU_AVAILABLE=NO",
            "FL_GPU_STATUS=",
            "FL_GPU_FALLBACK_REASON=",
            "FL_GPU_COUNT=",
            "FL_GPU_NAME=",
        ] {
            assert!(before.lines().any(|found| found == line), "{line}: {before}");
        }
    }

    #[test]
    fn fallback_is_published_with_its_reason() {
        let mut status = NodeStatus::default();
        let verdict = Verdict::cpu(Finding::new(Reason::GpuNotPresent, "none"));
        status.set_verdict(&verdict, Distribution::Debian);
        let text = text(&attributes(&status, &vm(false)));
        assert!(
            text.contains(
                "FL_GPU_AVAILABLE=NO\nFL_GPU_STATUS=cpu-fallback\n\
                 FL_GPU_FALLBACK_REASON=gpu-not-present\nFL_GPU_COUNT=0"
            ),
            "{text}"
        );
    }

    #[test]
    fn stopped_node_has_no_device_and_keeps_its_partition() {
        let mut status = on_gpu();
        status.set_connected(true);
        let text = text(&offline_attributes(&status, &vm(true)));
        for line in ["FL_NODE_READY=NO", "READY=NO", "FL_GPU_COUNT=", "FL_PARTITION_ID=2"] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
    }
}
