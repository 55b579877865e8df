//! The catalogue of reasons for a CPU fallback, one table. The journal catalog, the manual and the
//! documentation are generated from it.
//!
//! To add a reason: add a variant to [`Reason`] and a row to [`CATALOGUE`] (with a new MESSAGE_ID
//! from `systemd-id128 new`), return it where the cause is diagnosed (`gpu::diagnose`,
//! `gpu::nvml_error`), and regenerate the documents: `UPDATE_DOCUMENTS=1 cargo test -p
//! supernode-agent --test documents`.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::system::os_release::Distribution;
use crate::values::{GpuUuid, PciAddress, sanitize_line};

/// The reason for a CPU fallback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each variant is documented by its row in the catalogue")]
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

/// A row of the catalogue.
#[derive(Debug)]
pub struct Entry {
    /// The reason.
    pub reason: Reason,
    /// Stable code.
    pub code: &'static str,
    /// MESSAGE_ID of the journal entry: 128 bits in hexadecimal, unique.
    pub message_id: &'static str,
    /// Meaning, in one sentence.
    pub meaning: &'static str,
    /// How the operator fixes it.
    pub fix: Fix,
}

/// How the operator fixes a [`Reason`]: commands, or an attribute of the VM template.
#[derive(Debug)]
pub enum Fix {
    /// The same on every distribution.
    Everywhere(&'static str),
    /// Differs by distribution. The packages are those of Debian 12 and 13, Ubuntu 22.04 and 24.04,
    /// and NVIDIA's repositories.
    #[expect(missing_docs, reason = "each field is named after its distribution")]
    Each { debian: &'static str, ubuntu: &'static str, elsewhere: &'static str },
}

impl Fix {
    /// Returns the fix for this distribution.
    pub fn on(&self, distribution: Distribution) -> &'static str {
        match (self, distribution) {
            (Self::Everywhere(fix), _) => fix,
            (Self::Each { debian, .. }, Distribution::Debian) => debian,
            (Self::Each { ubuntu, .. }, Distribution::Ubuntu) => ubuntu,
            (Self::Each { elsewhere, .. }, Distribution::RedHat | Distribution::Other) => elsewhere,
        }
    }

    /// Returns the fix for every distribution, each with a heading.
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

/// nvidia-container-toolkit is in no release of Debian or Ubuntu; NVIDIA's installation guide adds
/// its repository.
const APT_TOOLKIT: &str = "curl -fsSL https://nvidia.github.io/libnvidia-container/gpgkey -o \
     /etc/apt/keyrings/nvidia-container-toolkit.asc && echo 'deb \
     [signed-by=/etc/apt/keyrings/nvidia-container-toolkit.asc] \
     https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH) /' > \
     /etc/apt/sources.list.d/nvidia-container-toolkit.list && apt update && apt install \
     nvidia-container-toolkit, or correct runtime_path under [docker] in \
     /etc/supernode-agent/agent.toml; then systemctl restart flower-supernode";

/// All reasons, in the order of the manual.
pub const CATALOGUE: &[Entry] = &[
    Entry {
        reason: Reason::GpuNotPresent,
        code: "gpu-not-present",
        message_id: "869c911fe2436c713e5625d9c8cf4c9e",
        meaning: "No NVIDIA GPU is present in this VM, and OpenNebula assigned none.",
        fix: Fix::Everywhere(
            "add PCI=[VENDOR=\"10de\",CLASS=\"0302\"] (CLASS=\"0300\" for GeForce GPUs) to the VM \
             template and instantiate a new VM, or set FL_GPU_ENABLED=NO",
        ),
    },
    Entry {
        reason: Reason::GpuNotPassedThrough,
        code: "gpu-not-passed-through",
        message_id: "1066eaea8fabf0f00ff7b11691329178",
        meaning: "OpenNebula assigned a PCI device that is absent from this VM or is not an NVIDIA \
                  GPU.",
        fix: Fix::Everywhere(
            "on the host, bind every function of the GPU to vfio-pci (driverctl set-override \
             ADDRESS vfio-pci), check the PCI attribute of the VM template, then run onevm \
             poweroff VMID and onevm resume VMID",
        ),
    },
    Entry {
        reason: Reason::DriverNotLoaded,
        code: "driver-not-loaded",
        message_id: "5f1fd82962f550c642c9e6b8df7f1387",
        meaning: "The GPU is present, but NVIDIA's driver is not bound to it.",
        fix: Fix::Each {
            debian: "apt update && apt install linux-headers-$(uname -r) nvidia-driver (needs the \
                     components contrib, non-free and non-free-firmware in /etc/apt), then \
                     modprobe nvidia && systemctl restart flower-supernode; if modprobe fails, \
                     dmesg shows why; with Secure Boot, enroll the key of the module (mokutil \
                     --import /var/lib/dkms/mok.pub, then reboot) or set \
                     OS=[FIRMWARE_SECURE=\"NO\"] in the VM template",
            ubuntu: "apt update && apt install ubuntu-drivers-common && ubuntu-drivers install \
                     --gpgpu, then modprobe nvidia && systemctl restart flower-supernode; if \
                     modprobe fails, dmesg shows why; with Secure Boot, enroll the key of a module \
                     built by DKMS (mokutil --import /var/lib/shim-signed/mok/MOK.der, then \
                     reboot) or set OS=[FIRMWARE_SECURE=\"NO\"] in the VM template",
            elsewhere: "install the headers of the running kernel (uname -r) and NVIDIA's driver \
                        (https://docs.nvidia.com/datacenter/tesla/driver-installation-guide), then \
                        modprobe nvidia && systemctl restart flower-supernode; if modprobe fails, \
                        dmesg shows why; with Secure Boot, sign the module or set \
                        OS=[FIRMWARE_SECURE=\"NO\"] in the VM template",
        },
    },
    Entry {
        reason: Reason::WrongDriver,
        code: "wrong-driver",
        message_id: "4a21c34a34c4463b4a26f0f47fa4f3fc",
        meaning: "The GPU is bound to a driver other than NVIDIA's.",
        fix: Fix::Each {
            debian: "keep the other driver from binding the GPU (nouveau: echo blacklist nouveau > \
                     /etc/modprobe.d/blacklist-nouveau.conf && update-initramfs -u; vfio-pci: \
                     driverctl unset-override ADDRESS), apt update && apt install \
                     linux-headers-$(uname -r) nvidia-driver (needs the components contrib, \
                     non-free and non-free-firmware in /etc/apt), then reboot the VM",
            ubuntu: "keep the other driver from binding the GPU (nouveau: echo blacklist nouveau > \
                     /etc/modprobe.d/blacklist-nouveau.conf && update-initramfs -u; vfio-pci: \
                     driverctl unset-override ADDRESS), apt update && apt install \
                     ubuntu-drivers-common && ubuntu-drivers install --gpgpu, then reboot the VM",
            elsewhere: "keep the other driver from binding the GPU (nouveau: echo blacklist \
                        nouveau > /etc/modprobe.d/blacklist-nouveau.conf && dracut --force; \
                        vfio-pci: driverctl unset-override ADDRESS), install NVIDIA's driver \
                        (https://docs.nvidia.com/datacenter/tesla/driver-installation-guide), then \
                        reboot the VM",
        },
    },
    Entry {
        reason: Reason::DriverLibraryMissing,
        code: "driver-library-missing",
        message_id: "3d9e6a70c29c26b0ad619e7c3452f819",
        meaning: "NVIDIA's management library, libnvidia-ml, cannot be loaded.",
        fix: Fix::Each {
            debian: "apt install --reinstall libnvidia-ml1 (component non-free), or correct \
                     nvml_library under [gpu] in /etc/supernode-agent/agent.toml; then systemctl \
                     restart flower-supernode",
            ubuntu: "apt reinstall '?and(?installed,?name(^libnvidia-compute))' (if none is \
                     installed: ubuntu-drivers install --gpgpu), or correct nvml_library under \
                     [gpu] in /etc/supernode-agent/agent.toml; then systemctl restart \
                     flower-supernode",
            elsewhere: "reinstall NVIDIA's driver so that ldconfig -p lists libnvidia-ml.so.1, or \
                        correct nvml_library under [gpu] in /etc/supernode-agent/agent.toml; then \
                        systemctl restart flower-supernode",
        },
    },
    Entry {
        reason: Reason::DriverLibraryMismatch,
        code: "driver-library-mismatch",
        message_id: "6074d8d4b5903c4b79186a849e15b008",
        meaning: "NVIDIA's library and kernel module have different versions: the driver was \
                  upgraded, but the old module is still loaded.",
        fix: Fix::Everywhere(
            "reboot the VM, or stop flower-supernode and run modprobe -r nvidia_uvm nvidia_drm \
             nvidia_modeset nvidia && modprobe nvidia",
        ),
    },
    Entry {
        reason: Reason::DriverTooOld,
        code: "driver-too-old",
        message_id: "920648ef6b2ccdb3a941d40f17c3e454",
        meaning: "NVIDIA's library lacks a function that the agent needs: the driver is too old.",
        fix: Fix::Each {
            debian: "apt update && apt install nvidia-driver (510 or later; Debian 12 has 535, \
                     Debian 13 has 550), then reboot the VM",
            ubuntu: "apt update && apt install ubuntu-drivers-common && ubuntu-drivers install \
                     --gpgpu (510 or later), then reboot the VM",
            elsewhere: "upgrade NVIDIA's driver to 510 or later and reboot the VM",
        },
    },
    Entry {
        reason: Reason::DriverNotReady,
        code: "driver-not-ready",
        message_id: "76f2f36361cf9117eb3e9bf4c625c8f1",
        meaning: "The driver was still initialising when wait_seconds expired.",
        fix: Fix::Everywhere(
            "keep the driver initialised (systemctl enable --now nvidia-persistenced) or raise \
             wait_seconds under [gpu] in /etc/supernode-agent/agent.toml, then systemctl restart \
             flower-supernode",
        ),
    },
    Entry {
        reason: Reason::DriverTimeout,
        code: "driver-timeout",
        message_id: "632522984070cc6524a56426a352b948",
        meaning: "The driver did not respond in time, and the probe was killed.",
        fix: Fix::Everywhere(
            "look for the cause with dmesg | grep -E 'NVRM|Xid', then run onevm poweroff VMID and \
             onevm resume VMID; on a slow machine raise probe_timeout_seconds under [gpu] in \
             /etc/supernode-agent/agent.toml",
        ),
    },
    Entry {
        reason: Reason::DriverCrash,
        code: "driver-crash",
        message_id: "c7b45707d896819569dfb772f309bad4",
        meaning: "NVIDIA's library crashed during the probe.",
        fix: Fix::Each {
            debian: "apt install --reinstall libnvidia-ml1 nvidia-kernel-dkms, so that library and \
                     kernel module are intact and of the same version, then reboot the VM",
            ubuntu: "apt reinstall '?and(?installed,?name(nvidia))', so that library and kernel \
                     module are intact and of the same version, then reboot the VM",
            elsewhere: "reinstall NVIDIA's driver, so that library and kernel module are intact \
                        and of the same version, then reboot the VM",
        },
    },
    Entry {
        reason: Reason::DriverError,
        code: "driver-error",
        message_id: "9a7e3235982d23dc830c8cf451b4e4ae",
        meaning: "NVIDIA's library returned an error.",
        fix: Fix::Everywhere(
            "look for the cause with dmesg | grep -E 'NVRM|Xid' and nvidia-smi; reboot the VM if \
             the error persists",
        ),
    },
    Entry {
        reason: Reason::PermissionDenied,
        code: "permission-denied",
        message_id: "47e30f688916bd6a5265fa5f9b3ff4be",
        meaning: "The agent has no permission to access the GPU.",
        fix: Fix::Everywhere(
            "run the agent as root, check that the mode of /dev/nvidia* is crw-rw-rw-, and allow \
             the devices in the unit (systemctl edit flower-supernode: [Service] \
             DeviceAllow=char-nvidia rw)",
        ),
    },
    Entry {
        reason: Reason::GpuCountZero,
        code: "gpu-count-zero",
        message_id: "cdf0a052644d95a2ca1c47e9e6f6e254",
        meaning: "The driver is loaded but reports no GPU.",
        fix: Fix::Everywhere(
            "look for the reason with dmesg | grep NVRM (unsupported GPU, BARs too small, missing \
             vGPU licence), install a driver branch that supports the GPU, and verify with \
             nvidia-smi -L",
        ),
    },
    Entry {
        reason: Reason::GpuLost,
        code: "gpu-lost",
        message_id: "242b4cbfa36c8e84a8b0c84dbe4ce8b2",
        meaning: "The GPU has fallen off the bus.",
        fix: Fix::Everywhere(
            "run onevm poweroff VMID and onevm resume VMID; if the GPU is still lost, power-cycle \
             the host",
        ),
    },
    Entry {
        reason: Reason::GpuResetRequired,
        code: "gpu-reset-required",
        message_id: "1c190f27419460b56b8b76a01484e1b7",
        meaning: "The GPU requires a reset.",
        fix: Fix::Everywhere(
            "run nvidia-smi -r while no process uses the GPU, or onevm poweroff VMID and onevm \
             resume VMID",
        ),
    },
    Entry {
        reason: Reason::GpuUnhealthy,
        code: "gpu-unhealthy",
        message_id: "6c671ecda1c186e72cd246afe26c6835",
        meaning: "The GPU reports a hardware fault.",
        fix: Fix::Everywhere(
            "nvidia-smi -q shows the fault; reset the GPU with nvidia-smi -r, or with onevm \
             poweroff VMID and onevm resume VMID; if the fault returns, replace the GPU, its power \
             cable or its slot",
        ),
    },
    Entry {
        reason: Reason::DeviceSelectionEmpty,
        code: "device-selection-empty",
        message_id: "107ccbb7d992cd1d8145c3926255cb55",
        meaning: "FL_CUDA_VISIBLE_DEVICES selects no usable GPU of this VM.",
        fix: Fix::Everywhere(
            "set FL_CUDA_VISIBLE_DEVICES to all or to a GPU that supernode-agent gpu lists, or set \
             FL_GPU_ENABLED=NO; for a GPU in MIG mode without instances, create one (nvidia-smi \
             mig -cgi PROFILE -C) or disable MIG (nvidia-smi -mig 0)",
        ),
    },
    Entry {
        reason: Reason::RuntimeMissing,
        code: "runtime-missing",
        message_id: "9717a5010ebb71160385380f3acd0c34",
        meaning: "The driver works, but nvidia-container-runtime, which makes the GPU available to \
                  containers, is not installed.",
        fix: Fix::Each {
            debian: APT_TOOLKIT,
            ubuntu: APT_TOOLKIT,
            elsewhere: "curl -fsSL \
                        https://nvidia.github.io/libnvidia-container/stable/rpm/nvidia-container-toolkit.repo \
                        -o /etc/yum.repos.d/nvidia-container-toolkit.repo && dnf install \
                        nvidia-container-toolkit, or correct runtime_path under [docker] in \
                        /etc/supernode-agent/agent.toml; then systemctl restart flower-supernode",
        },
    },
    Entry {
        reason: Reason::RuntimeNotConfigured,
        code: "runtime-not-configured",
        message_id: "84f63351174b9bf685aa4aaf8164c23a",
        meaning: "The nvidia runtime is not registered with Docker, and the agent could not \
                  register it.",
        fix: Fix::Everywhere(
            "correct daemon.json so that it is one JSON object (an empty one is {}), then run \
             supernode-agent configure-runtime and systemctl reload docker; journalctl -u docker \
             shows what Docker rejects",
        ),
    },
    Entry {
        reason: Reason::RuntimeStartFailed,
        code: "runtime-start-failed",
        message_id: "03fe86fa94199f10a149a588cd19bd0a",
        meaning: "Docker could not start the container with the GPU.",
        fix: Fix::Everywhere(
            "test the GPU in another container (docker run --rm --runtime=nvidia -e \
             NVIDIA_VISIBLE_DEVICES=all IMAGE nvidia-smi); if that fails too, reinstall \
             nvidia-container-toolkit; then systemctl restart flower-supernode",
        ),
    },
    Entry {
        reason: Reason::GpuNotVisible,
        code: "gpu-not-visible",
        message_id: "91c7fbd4d4b9839bf139d6263045e9d7",
        meaning: "The container started with the GPU, but the GPU is not visible in it.",
        fix: Fix::Everywhere(
            "check that the nvidia runtime in daemon.json is NVIDIA's and that no mode in \
             /etc/nvidia-container-runtime/config.toml skips the devices, then systemctl restart \
             flower-supernode",
        ),
    },
    Entry {
        reason: Reason::GpuFailed,
        code: "gpu-failed",
        message_id: "642dd8c826e27e90105ed2d5d392ac67",
        meaning: "The GPU failed while the node was running.",
        fix: Fix::Everywhere(
            "look up the XID in dmesg, reset the GPU (nvidia-smi -r) or power-cycle the VM (onevm \
             poweroff VMID and onevm resume VMID), then systemctl restart flower-supernode",
        ),
    },
    Entry {
        reason: Reason::FrameworkWithoutGpu,
        code: "framework-without-gpu",
        message_id: "e8aa94a4f59ab3df3719d167f6cc7216",
        meaning: "The framework has no GPU support.",
        fix: Fix::Everywhere("set ML_FRAMEWORK to pytorch or tensorflow, or set FL_GPU_ENABLED=NO"),
    },
];

impl Reason {
    /// Returns the row of the catalogue.
    pub fn entry(self) -> &'static Entry {
        // A test ensures that the table has the order of the enum.
        &CATALOGUE[self as usize]
    }

    /// Returns the stable code, such as `driver-not-loaded`.
    pub fn code(self) -> &'static str {
        self.entry().code
    }

    /// Returns the fix for this distribution.
    pub fn fix(self, distribution: Distribution) -> &'static str {
        self.entry().fix.on(distribution)
    }

    /// Returns the reason with this code.
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

/// A reason with the details of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The reason.
    pub reason: Reason,
    /// Details in one line: the device, the driver, the error text of NVML or Docker.
    pub summary: String,
    /// PCI address of the affected GPU, if known.
    pub pci_address: Option<PciAddress>,
    /// UUID of the affected GPU or MIG instance, if known.
    pub gpu_uuid: Option<GpuUuid>,
}

impl Finding {
    /// Returns a finding that concerns no particular GPU.
    pub fn new(reason: Reason, summary: impl Into<String>) -> Self {
        Self { reason, summary: sanitize_line(&summary.into()), pci_address: None, gpu_uuid: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn table_has_order_of_enum_and_complete_rows() {
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
            "a row is missing"
        );
    }

    #[test]
    fn fix_names_packages_of_its_distribution() {
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
    fn summary_is_one_bounded_line() {
        let finding =
            Finding::new(Reason::RuntimeStartFailed, format!("a\n b\x1b[31m{}", "x".repeat(5000)));
        assert!(
            finding.summary.starts_with("a b[31mxxx") && finding.summary.chars().count() <= 1001
        );
    }

    #[test]
    fn reason_is_written_as_its_code() {
        assert_eq!(Reason::GpuLost.to_string(), "gpu-lost");
        assert_eq!(serde_json::to_string(&Reason::GpuLost).unwrap(), "\"gpu-lost\"");
        assert_eq!(Reason::from_code("no-such-code"), None);
    }

    #[test]
    fn fix_is_selected_by_distribution() {
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
