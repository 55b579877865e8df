//! Checks of the virtual hardware that the VM template defines.

use super::subject::{RUN_AS_ROOT, Vm};
use crate::check::Check;
use crate::config::Framework;
use crate::values::PciAddress;

/// The template attribute for UEFI, by release of OpenNebula.
const UEFI_FIX: &str = "OS=[FIRMWARE=\"UEFI\"] (OpenNebula 7) or \
                        OS=[FIRMWARE=\"/usr/share/OVMF/OVMF_CODE.fd\"] (6.10) in the VM template, \
                        with an image that boots with UEFI";

impl Vm<'_> {
    pub(super) fn firmware(&self) -> Check {
        match &self.facts.is_uefi {
            Ok(true) => return Check::ok("firmware", "UEFI"),
            Ok(false) => {}
            Err(why) => return Check::unknown("firmware", why, RUN_AS_ROOT),
        }
        let finding = "this VM booted with BIOS (no /sys/firmware/efi): the memory of large GPUs \
                       cannot be mapped";
        Check::warning("firmware", finding, UEFI_FIX)
    }

    pub(super) fn machine_type(&self) -> Check {
        const ID: &str = "machine-type";
        const FIX: &str = "OS=[MACHINE=\"q35\"] in the VM template, then instantiate a new VM";
        /// The host bridges of QEMU's two PC machine types (hw/pci-host/q35.c and i440fx.c): vendor
        /// and device.
        const ICH9: (u32, Option<u32>) = (0x8086, Some(0x29c0));
        const I440FX: (u32, Option<u32>) = (0x8086, Some(0x1237));
        let bridge = PciAddress::parse("00:00.0").and_then(|address| self.facts.pci.at(address));
        let bridge = bridge.map(|bridge| (bridge.vendor, bridge.device));
        let names = match &self.facts.dmi_names {
            Ok(names) => names.join(", "),
            Err(why) if bridge.is_none() => return Check::unknown(ID, why, RUN_AS_ROOT),
            Err(_) => String::new(),
        };
        let dmi_has = |word: &str| names.to_ascii_lowercase().contains(word);
        let source = if names.is_empty() { "host bridge".into() } else { names.clone() };
        if dmi_has("q35") || bridge == Some(ICH9) {
            return Check::ok(ID, format!("q35 ({source})"));
        }
        if dmi_has("i440fx") || dmi_has("pc-i440") || bridge == Some(I440FX) {
            let finding =
                format!("machine type i440fx ({source}): the GPU has no PCI Express slot");
            return Check::warning(ID, finding, FIX);
        }
        let found = if names.is_empty() {
            "neither DMI names nor a host bridge at 00:00.0".into()
        } else {
            names
        };
        Check::unknown(ID, format!("no QEMU machine type found ({found})"), FIX)
    }

    pub(super) fn cpu_model(&self) -> Check {
        const ID: &str = "cpu-model";
        const FIX: &str = "CPU_MODEL=[MODEL=\"host-passthrough\"] in the VM template, then \
                           power-cycle the VM (onevm poweroff, onevm resume)";
        const GENERIC: [&str; 3] =
            ["QEMU Virtual CPU", "Common KVM processor", "Common 32-bit KVM processor"];
        let text = match &self.facts.cpuinfo {
            Ok(Some(text)) => text,
            Ok(None) => return Check::unknown(ID, "no /proc/cpuinfo", RUN_AS_ROOT),
            Err(why) => return Check::unknown(ID, why, RUN_AS_ROOT),
        };
        let field = |name: &str| {
            let line = text
                .lines()
                .find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
            line.split_once(':').map(|(_, value)| value.trim())
        };
        let Some(model) = field("model name") else {
            return Check::ok(ID, "/proc/cpuinfo has no model name (not an x86-64 CPU)");
        };
        if GENERIC.iter().any(|generic| model.starts_with(generic)) {
            let finding = format!(
                "the CPU is a generic QEMU model ({model}): frameworks run slowly on it, or not at \
                 all"
            );
            return Check::warning(ID, finding, FIX);
        }
        let flags: Vec<&str> = field("flags").unwrap_or_default().split_whitespace().collect();
        let missing: Vec<&str> =
            ["avx", "avx2"].into_iter().filter(|flag| !flags.contains(flag)).collect();
        match (field("flags"), missing.as_slice()) {
            (None, _) => {
                Check::unknown(ID, format!("{model}: /proc/cpuinfo has no flags"), RUN_AS_ROOT)
            }
            (Some(_), []) => Check::ok(ID, model),
            (Some(_), missing) => {
                let finding = format!(
                    "{model} has no {} in this VM: TensorFlow requires AVX, PyTorch is slow \
                     without AVX2",
                    missing.join(" and ")
                );
                Check::warning(ID, finding, FIX)
            }
        }
    }

    pub(super) fn numa(&self) -> Check {
        const ID: &str = "numa";
        const NO_PINNING: &str =
            "CPU pinning is not visible inside the VM (see TOPOLOGY in onevm show)";
        let nodes = match &self.facts.numa {
            Ok(nodes) => nodes,
            Err(why) => return Check::unknown(ID, why, RUN_AS_ROOT),
        };
        match nodes.as_slice() {
            [] => Check::ok(ID, format!("no NUMA nodes; {NO_PINNING}")),
            [(_, cpus)] => Check::ok(ID, format!("one node with CPUs {cpus}; {NO_PINNING}")),
            nodes => {
                let list: Vec<String> =
                    nodes.iter().map(|(node, cpus)| format!("{node}: {cpus}")).collect();
                let list = list.join("; ");
                let unknown: Vec<String> = self
                    .facts
                    .gpu_nodes
                    .iter()
                    .filter(|(_, node)| node.is_empty() || node == "-1")
                    .map(|(address, _)| address.to_string())
                    .collect();
                if unknown.is_empty() {
                    return Check::ok(ID, format!("{} nodes ({list}); {NO_PINNING}", nodes.len()));
                }
                let finding = format!(
                    "{} nodes ({list}), but the node of {} is unknown in the VM",
                    nodes.len(),
                    unknown.join(", ")
                );
                let fix = "TOPOLOGY=[PIN_POLICY=\"CORE\",SOCKETS=\"1\"] in the VM template, on a \
                           host with PIN_POLICY=PINNED, places CPUs and GPU on one node";
                Check::warning(ID, finding, fix)
            }
        }
    }

    pub(super) fn memory(&self) -> Check {
        const ID: &str = "memory";
        /// Enough for a framework with CUDA and one data loader; /dev/shm may take half of it.
        const RECOMMENDED_MIB: u64 = 8 << 10;
        let mib = match &self.facts.memory_mib {
            Ok(mib) => *mib,
            Err(why) => return Check::unknown(ID, why, RUN_AS_ROOT),
        };
        let uses_gpu = self
            .config()
            .is_none_or(|config| config.gpu.enabled && config.framework != Framework::Base);
        // A VM has slightly less than its template specifies.
        if uses_gpu && mib < RECOMMENDED_MIB / 10 * 9 {
            let finding =
                format!("{mib} MiB is little for a framework on a GPU and its data loaders");
            return Check::warning(
                ID,
                finding,
                "MEMORY=\"16384\" in the VM template, or onevm resize VM --memory 16384",
            );
        }
        Check::ok(ID, format!("{mib} MiB"))
    }
}
