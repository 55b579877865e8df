//! The catalogue of reasons why a node runs on the CPU although a GPU was wanted: one table.
//! The journal catalog, the manual and the tests come from it.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::system::os_release::Distribution;

/// Why a node runs on the CPU although a GPU was wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each variant is documented by its entry in the catalogue")]
pub enum Reason {
    GpuNotPresent,
    GpuNotPassedThrough,
    DriverNotLoaded,
    WrongDriver,
    DriverLibraryMissing,
    DriverLibraryMismatch,
    DriverTooOld,
    DriverNotReady,
    DriverTimeout,
    DriverCrash,
    DriverError,
    PermissionDenied,
    GpuCountZero,
    GpuLost,
    GpuResetRequired,
    GpuUnhealthy,
    DeviceSelectionEmpty,
    RuntimeMissing,
    RuntimeNotConfigured,
    RuntimeStartFailed,
    GpuNotVisible,
    GpuFailed,
    FrameworkWithoutGpu,
}

/// What the catalogue says about a [`Reason`].
#[derive(Debug)]
pub struct Entry {
    /// The reason.
    pub reason: Reason,
    /// Its stable code.
    pub code: &'static str,
    /// The MESSAGE_ID of its journal entry: 128 bits in hexadecimal, unique to it.
    pub message_id: &'static str,
    /// What it means, in one sentence.
    pub meaning: &'static str,
    /// What an operator does about it.
    pub fix: Fix,
}

/// What an operator does about a [`Reason`]: commands, or an attribute of the VM template.
#[derive(Debug)]
pub enum Fix {
    /// The same on every machine.
    Everywhere(&'static str),
    /// Commands that differ. Those for Debian and Ubuntu name packages of Debian 12 and 13, of
    /// Ubuntu 22.04 and 24.04, or of NVIDIA's own repositories.
    #[expect(missing_docs, reason = "each field is the distribution of its name")]
    Each { debian: &'static str, ubuntu: &'static str, elsewhere: &'static str },
}

impl Fix {
    /// The wording for a machine of this distribution.
    pub fn on(&self, distribution: Distribution) -> &'static str {
        match (self, distribution) {
            (Self::Everywhere(fix), _) => fix,
            (Self::Each { debian, .. }, Distribution::Debian) => debian,
            (Self::Each { ubuntu, .. }, Distribution::Ubuntu) => ubuntu,
            (Self::Each { elsewhere, .. }, Distribution::RedHat | Distribution::Other) => elsewhere,
        }
    }

    /// Every wording, with whom it is for: what documents show.
    pub fn all(&self) -> Vec<(&'static str, &'static str)> {
        match self {
            Self::Everywhere(fix) => vec![("Fix", fix)],
            Self::Each { debian, ubuntu, elsewhere } => {
                vec![
                    ("Fix on Debian", debian),
                    ("Fix on Ubuntu", ubuntu),
                    ("Fix elsewhere", elsewhere),
                ]
            }
        }
    }
}

/// nvidia-container-toolkit is in no release of Debian or Ubuntu (source: NVIDIA's installation
/// guide of the toolkit).
const APT_TOOLKIT: &str = "curl -fsSL https://nvidia.github.io/libnvidia-container/gpgkey -o /etc/apt/keyrings/nvidia-container-toolkit.asc && echo 'deb [signed-by=/etc/apt/keyrings/nvidia-container-toolkit.asc] https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH) /' > /etc/apt/sources.list.d/nvidia-container-toolkit.list && apt update && apt install nvidia-container-toolkit, or correct runtime_path under [docker] in /etc/supernode-agent/agent.toml; then systemctl restart flower-supernode";

/// Every reason, in the order of the manual.
pub const CATALOGUE: &[Entry] = &[
    Entry {
        reason: Reason::GpuNotPresent,
        code: "gpu-not-present",
        message_id: "869c911fe2436c713e5625d9c8cf4c9e",
        meaning: "There is no NVIDIA GPU in this VM, and OpenNebula passed none through.",
        fix: Fix::Everywhere(
            "add PCI=[VENDOR=\"10de\",CLASS=\"0302\"] (CLASS=\"0300\" for GeForce cards) to the VM template and instantiate the VM anew, or set FL_GPU_ENABLED=NO",
        ),
    },
    Entry {
        reason: Reason::GpuNotPassedThrough,
        code: "gpu-not-passed-through",
        message_id: "1066eaea8fabf0f00ff7b11691329178",
        meaning: "OpenNebula assigned a PCI device that is not in this VM, or is not a GPU.",
        fix: Fix::Everywhere(
            "on the host, bind every function of the card to vfio-pci (driverctl set-override ADDRESS vfio-pci), check the PCI attribute of the VM template, then onevm poweroff VMID and onevm resume VMID",
        ),
    },
    Entry {
        reason: Reason::DriverNotLoaded,
        code: "driver-not-loaded",
        message_id: "5f1fd82962f550c642c9e6b8df7f1387",
        meaning: "The GPU is in this VM, but no NVIDIA driver drives it.",
        fix: Fix::Each {
            debian: "apt update && apt install linux-headers-$(uname -r) nvidia-driver (with contrib, non-free and non-free-firmware among the Components in /etc/apt), then modprobe nvidia && systemctl restart flower-supernode; if modprobe fails, dmesg tells why; under Secure Boot enrol the module's key (mokutil --import /var/lib/dkms/mok.pub, then reboot) or set OS=[FIRMWARE_SECURE=\"NO\"] in the VM template",
            ubuntu: "apt update && apt install ubuntu-drivers-common && ubuntu-drivers install --gpgpu, then modprobe nvidia && systemctl restart flower-supernode; if modprobe fails, dmesg tells why; under Secure Boot a module that DKMS built needs its key enrolled (mokutil --import /var/lib/shim-signed/mok/MOK.der, then reboot), or OS=[FIRMWARE_SECURE=\"NO\"] in the VM template",
            elsewhere: "install the headers of the kernel that uname -r names and NVIDIA's driver (https://docs.nvidia.com/datacenter/tesla/driver-installation-guide), then modprobe nvidia && systemctl restart flower-supernode; if modprobe fails, dmesg tells why; under Secure Boot sign the module or set OS=[FIRMWARE_SECURE=\"NO\"] in the VM template",
        },
    },
    Entry {
        reason: Reason::WrongDriver,
        code: "wrong-driver",
        message_id: "4a21c34a34c4463b4a26f0f47fa4f3fc",
        meaning: "The GPU is bound to a driver that is not NVIDIA's.",
        fix: Fix::Each {
            debian: "keep the other driver away (nouveau: echo blacklist nouveau > /etc/modprobe.d/blacklist-nouveau.conf && update-initramfs -u; vfio-pci: driverctl unset-override ADDRESS), apt update && apt install linux-headers-$(uname -r) nvidia-driver (with contrib, non-free and non-free-firmware among the Components in /etc/apt), then reboot the VM",
            ubuntu: "keep the other driver away (nouveau: echo blacklist nouveau > /etc/modprobe.d/blacklist-nouveau.conf && update-initramfs -u; vfio-pci: driverctl unset-override ADDRESS), apt update && apt install ubuntu-drivers-common && ubuntu-drivers install --gpgpu, then reboot the VM",
            elsewhere: "keep the other driver away (nouveau: echo blacklist nouveau > /etc/modprobe.d/blacklist-nouveau.conf && dracut --force; vfio-pci: driverctl unset-override ADDRESS), install NVIDIA's driver (https://docs.nvidia.com/datacenter/tesla/driver-installation-guide), then reboot the VM",
        },
    },
    Entry {
        reason: Reason::DriverLibraryMissing,
        code: "driver-library-missing",
        message_id: "3d9e6a70c29c26b0ad619e7c3452f819",
        meaning: "NVIDIA's management library, libnvidia-ml, cannot be loaded.",
        fix: Fix::Each {
            debian: "apt install --reinstall libnvidia-ml1 (component non-free), or correct nvml_library under [gpu] in /etc/supernode-agent/agent.toml; then systemctl restart flower-supernode",
            ubuntu: "apt reinstall '?and(?installed,?name(^libnvidia-compute))' (where none is installed: ubuntu-drivers install --gpgpu), or correct nvml_library under [gpu] in /etc/supernode-agent/agent.toml; then systemctl restart flower-supernode",
            elsewhere: "reinstall NVIDIA's driver, so that ldconfig -p lists libnvidia-ml.so.1, or correct nvml_library under [gpu] in /etc/supernode-agent/agent.toml; then systemctl restart flower-supernode",
        },
    },
    Entry {
        reason: Reason::DriverLibraryMismatch,
        code: "driver-library-mismatch",
        message_id: "6074d8d4b5903c4b79186a849e15b008",
        meaning: "NVIDIA's library and its kernel module are of different versions: the driver was upgraded and the old module is still loaded.",
        fix: Fix::Everywhere(
            "reboot the VM (or, with the node stopped: modprobe -r nvidia_uvm nvidia_drm nvidia_modeset nvidia && modprobe nvidia)",
        ),
    },
    Entry {
        reason: Reason::DriverTooOld,
        code: "driver-too-old",
        message_id: "920648ef6b2ccdb3a941d40f17c3e454",
        meaning: "NVIDIA's library lacks a function that the agent needs.",
        fix: Fix::Each {
            debian: "apt update && apt install nvidia-driver (510 or later; Debian 12 has 535, Debian 13 has 550), then reboot the VM",
            ubuntu: "apt update && apt install ubuntu-drivers-common && ubuntu-drivers install --gpgpu (510 or later), then reboot the VM",
            elsewhere: "upgrade NVIDIA's driver to 510 or later and reboot the VM",
        },
    },
    Entry {
        reason: Reason::DriverNotReady,
        code: "driver-not-ready",
        message_id: "76f2f36361cf9117eb3e9bf4c625c8f1",
        meaning: "The driver was still initialising when the wait for it ended.",
        fix: Fix::Everywhere(
            "raise wait_seconds under [gpu] in /etc/supernode-agent/agent.toml, let the driver stay initialised (systemctl enable --now nvidia-persistenced), then systemctl restart flower-supernode",
        ),
    },
    Entry {
        reason: Reason::DriverTimeout,
        code: "driver-timeout",
        message_id: "632522984070cc6524a56426a352b948",
        meaning: "The driver gave no answer in time, and the probe was killed.",
        fix: Fix::Everywhere(
            "dmesg | grep -E 'NVRM|Xid' tells what the driver met; onevm poweroff VMID and onevm resume VMID; for a slow machine raise probe_timeout_seconds under [gpu] in /etc/supernode-agent/agent.toml",
        ),
    },
    Entry {
        reason: Reason::DriverCrash,
        code: "driver-crash",
        message_id: "c7b45707d896819569dfb772f309bad4",
        meaning: "NVIDIA's library crashed while it was asked.",
        fix: Fix::Each {
            debian: "apt install --reinstall libnvidia-ml1 nvidia-kernel-dkms, so that library and module are whole and of one version, then reboot the VM",
            ubuntu: "apt reinstall '?and(?installed,?name(nvidia))', so that library and module are whole and of one version, then reboot the VM",
            elsewhere: "reinstall NVIDIA's driver, so that library and module are whole and of one version, then reboot the VM",
        },
    },
    Entry {
        reason: Reason::DriverError,
        code: "driver-error",
        message_id: "9a7e3235982d23dc830c8cf451b4e4ae",
        meaning: "NVIDIA's library reported an error.",
        fix: Fix::Everywhere(
            "dmesg | grep -E 'NVRM|Xid' and nvidia-smi tell what the driver met; reboot the VM if the error stays",
        ),
    },
    Entry {
        reason: Reason::PermissionDenied,
        code: "permission-denied",
        message_id: "47e30f688916bd6a5265fa5f9b3ff4be",
        meaning: "The agent was refused access to the GPU.",
        fix: Fix::Everywhere(
            "run the agent as root, check the mode of /dev/nvidia* (crw-rw-rw-), and let the unit have the devices (systemctl edit flower-supernode: [Service] DeviceAllow=char-nvidia rw)",
        ),
    },
    Entry {
        reason: Reason::GpuCountZero,
        code: "gpu-count-zero",
        message_id: "cdf0a052644d95a2ca1c47e9e6f6e254",
        meaning: "The driver is loaded and sees no GPU.",
        fix: Fix::Everywhere(
            "dmesg | grep NVRM tells why the driver refused the card (an unsupported GPU, too small BARs, a vGPU licence); use a driver branch that supports the card, and check with nvidia-smi -L",
        ),
    },
    Entry {
        reason: Reason::GpuLost,
        code: "gpu-lost",
        message_id: "242b4cbfa36c8e84a8b0c84dbe4ce8b2",
        meaning: "The GPU has fallen off the bus.",
        fix: Fix::Everywhere(
            "onevm poweroff VMID and onevm resume VMID; if the GPU stays lost, power-cycle the host",
        ),
    },
    Entry {
        reason: Reason::GpuResetRequired,
        code: "gpu-reset-required",
        message_id: "1c190f27419460b56b8b76a01484e1b7",
        meaning: "The GPU asks for a reset.",
        fix: Fix::Everywhere(
            "nvidia-smi -r while nothing uses the GPU, or onevm poweroff VMID and onevm resume VMID",
        ),
    },
    Entry {
        reason: Reason::GpuUnhealthy,
        code: "gpu-unhealthy",
        message_id: "6c671ecda1c186e72cd246afe26c6835",
        meaning: "The GPU reports a hardware fault.",
        fix: Fix::Everywhere(
            "nvidia-smi -q shows the fault; nvidia-smi -r, or onevm poweroff VMID and onevm resume VMID; if it comes back, replace the card, its power cable or its slot",
        ),
    },
    Entry {
        reason: Reason::DeviceSelectionEmpty,
        code: "device-selection-empty",
        message_id: "107ccbb7d992cd1d8145c3926255cb55",
        meaning: "FL_CUDA_VISIBLE_DEVICES selects no GPU that exists in this VM.",
        fix: Fix::Everywhere(
            "set FL_CUDA_VISIBLE_DEVICES to all or to one of the GPUs that supernode-agent gpu lists (a card in MIG mode without an instance: nvidia-smi mig -cgi PROFILE -C makes one, nvidia-smi -mig 0 ends the mode), or set FL_GPU_ENABLED=NO",
        ),
    },
    Entry {
        reason: Reason::RuntimeMissing,
        code: "runtime-missing",
        message_id: "9717a5010ebb71160385380f3acd0c34",
        meaning: "The GPU works, but nvidia-container-runtime, by which Docker hands it over, is not installed.",
        fix: Fix::Each {
            debian: APT_TOOLKIT,
            ubuntu: APT_TOOLKIT,
            elsewhere: "curl -fsSL https://nvidia.github.io/libnvidia-container/stable/rpm/nvidia-container-toolkit.repo -o /etc/yum.repos.d/nvidia-container-toolkit.repo && dnf install nvidia-container-toolkit, or correct runtime_path under [docker] in /etc/supernode-agent/agent.toml; then systemctl restart flower-supernode",
        },
    },
    Entry {
        reason: Reason::RuntimeNotConfigured,
        code: "runtime-not-configured",
        message_id: "84f63351174b9bf685aa4aaf8164c23a",
        meaning: "Docker does not know the nvidia runtime, and it could not be told.",
        fix: Fix::Everywhere(
            "mend daemon.json so that it is one JSON object (an empty one is {}), run supernode-agent configure-runtime and systemctl reload docker; journalctl -u docker shows what Docker objects to",
        ),
    },
    Entry {
        reason: Reason::RuntimeStartFailed,
        code: "runtime-start-failed",
        message_id: "03fe86fa94199f10a149a588cd19bd0a",
        meaning: "Docker refused to start the container with the GPU.",
        fix: Fix::Everywhere(
            "try the GPU in any container (docker run --rm --runtime=nvidia -e NVIDIA_VISIBLE_DEVICES=all IMAGE nvidia-smi); reinstall nvidia-container-toolkit if that fails as well; then systemctl restart flower-supernode",
        ),
    },
    Entry {
        reason: Reason::GpuNotVisible,
        code: "gpu-not-visible",
        message_id: "91c7fbd4d4b9839bf139d6263045e9d7",
        meaning: "The container started with the GPU, and the GPU is not in it.",
        fix: Fix::Everywhere(
            "check that the nvidia runtime of daemon.json is NVIDIA's own and that /etc/nvidia-container-runtime/config.toml has no mode that skips the devices; then systemctl restart flower-supernode",
        ),
    },
    Entry {
        reason: Reason::GpuFailed,
        code: "gpu-failed",
        message_id: "642dd8c826e27e90105ed2d5d392ac67",
        meaning: "The GPU failed while the node was running.",
        fix: Fix::Everywhere(
            "look up the Xid in dmesg, reset the GPU (nvidia-smi -r) or power the VM off and on, then systemctl restart flower-supernode",
        ),
    },
    Entry {
        reason: Reason::FrameworkWithoutGpu,
        code: "framework-without-gpu",
        message_id: "e8aa94a4f59ab3df3719d167f6cc7216",
        meaning: "The framework has no GPU build.",
        fix: Fix::Everywhere("set ML_FRAMEWORK to pytorch or tensorflow, or set FL_GPU_ENABLED=NO"),
    },
];

impl Reason {
    /// The entry of the catalogue.
    pub fn entry(self) -> &'static Entry {
        // The table has the order of the enum; a test walks it.
        &CATALOGUE[self as usize]
    }

    /// The stable code, such as `driver-not-loaded`.
    pub fn code(self) -> &'static str {
        self.entry().code
    }

    /// What an operator does about it on a machine of this distribution.
    pub fn fix(self, distribution: Distribution) -> &'static str {
        self.entry().fix.on(distribution)
    }

    /// The reason with this code.
    pub fn from_code(code: &str) -> Option<Self> {
        CATALOGUE.iter().find(|entry| entry.code == code).map(|entry| entry.reason)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.code())
    }
}

/// A reason with the particulars of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Why.
    pub reason: Reason,
    /// What exactly was found, in one line: which device, which driver, which text of NVML or
    /// Docker.
    pub summary: String,
    /// The PCI address it is about, where it is about one.
    pub pci_address: Option<String>,
    /// The UUID of the GPU it is about, where it is known.
    pub gpu_uuid: Option<String>,
}

impl Finding {
    /// A finding about no device in particular.
    pub fn new(reason: Reason, summary: impl Into<String>) -> Self {
        Self { reason, summary: sanitize_line(&summary.into()), pci_address: None, gpu_uuid: None }
    }
}

/// Foreign text in one line of bounded length.
pub fn sanitize_line(text: &str) -> String {
    const MAX_CHARACTERS: usize = 1000;
    let mut line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((at, _)) = line.char_indices().nth(MAX_CHARACTERS) {
        line.truncate(at);
        line.push('…');
    }
    line.retain(|c| !c.is_control());
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_table_has_the_order_of_the_enum_and_every_entry_is_whole() {
        let mut seen = HashSet::new();
        for (position, entry) in CATALOGUE.iter().enumerate() {
            assert_eq!(entry.reason as usize, position, "{}", entry.code);
            assert_eq!(Reason::from_code(entry.code), Some(entry.reason));
            assert!(
                entry.message_id.len() == 32
                    && entry.message_id.bytes().all(|b| b.is_ascii_hexdigit())
            );
            assert!(seen.insert(entry.message_id), "{} is not unique", entry.message_id);
            assert!(seen.insert(entry.code), "{} is not unique", entry.code);
            assert!(!entry.meaning.is_empty());
            assert!(
                entry.fix.all().iter().all(|(_, fix)| !fix.is_empty() && !fix.ends_with('.')),
                "{}",
                entry.code
            );
        }
        assert_eq!(
            CATALOGUE.last().unwrap().reason,
            Reason::FrameworkWithoutGpu,
            "an entry is missing"
        );
    }

    #[test]
    fn a_fix_with_a_package_is_that_of_the_machines_own_distribution() {
        for entry in CATALOGUE {
            let [debian, ubuntu, elsewhere] =
                [Distribution::Debian, Distribution::Ubuntu, Distribution::Other]
                    .map(|on| entry.fix.on(on));
            assert!(!debian.contains("ubuntu-drivers") && !debian.contains("dnf "), "{debian}");
            assert!(!ubuntu.contains("nvidia-driver ") && !ubuntu.contains("dnf "), "{ubuntu}");
            assert!(
                !elsewhere.contains("apt ") && !elsewhere.contains("ubuntu-drivers"),
                "{elsewhere}"
            );
            for fix in [debian, ubuntu, elsewhere] {
                assert!(!fix.contains("Debian:") && !fix.contains("Ubuntu:"), "{fix}");
            }
        }
    }

    #[test]
    fn foreign_text_becomes_one_bounded_line() {
        let finding =
            Finding::new(Reason::RuntimeStartFailed, format!("a\n b\x1b[31m{}", "x".repeat(5000)));
        assert!(
            finding.summary.starts_with("a b[31mxxx") && finding.summary.chars().count() <= 1001
        );
    }

    #[test]
    fn a_reason_is_its_code_wherever_it_is_written_and_a_line_ends_at_a_thousand_characters() {
        assert_eq!(Reason::GpuLost.to_string(), "gpu-lost");
        assert_eq!(serde_json::to_string(&Reason::GpuLost).unwrap(), "\"gpu-lost\"");
        assert_eq!(Reason::from_code("no-such-code"), None);
        let longest = "é".repeat(1000);
        assert_eq!(sanitize_line(&format!(" {longest}\n")), longest);
        assert_eq!(sanitize_line(&format!("{longest}é")), format!("{longest}…"));
    }

    #[test]
    fn a_fix_is_told_for_one_machine_and_shown_for_all() {
        let each = Reason::RuntimeMissing.entry();
        let Fix::Each { debian, ubuntu, elsewhere } = each.fix else { panic!("{each:?}") };
        assert_eq!(Reason::RuntimeMissing.fix(Distribution::Debian), debian);
        assert_eq!(Reason::RuntimeMissing.fix(Distribution::Ubuntu), ubuntu);
        assert_eq!(Reason::RuntimeMissing.fix(Distribution::RedHat), elsewhere);
        assert_eq!(Reason::RuntimeMissing.fix(Distribution::Other), elsewhere);
        let shown =
            [("Fix on Debian", debian), ("Fix on Ubuntu", ubuntu), ("Fix elsewhere", elsewhere)];
        assert_eq!(each.fix.all(), shown);
        let everywhere = Reason::GpuFailed.fix(Distribution::Debian);
        assert_eq!(Reason::GpuFailed.entry().fix.all(), [("Fix", everywhere)]);
    }
}
