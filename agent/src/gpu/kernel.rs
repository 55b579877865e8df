//! What the kernel of this VM has for NVIDIA's driver: why a module that should be loaded may not be. Read where it is cheap
//! and certain; what cannot be told is left open.

use std::fs;
use std::path::Path;

use serde::Serialize;

/// The variable of UEFI that tells whether Secure Boot is on (UEFI specification, 3.3 Globally Defined Variables).
const SECURE_BOOT: &str = "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// The kernel, and what it has; `None`: not to be told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct KernelFacts {
    /// Its release, as `uname -r` gives it.
    pub release: Option<String>,
    /// Whether a module of NVIDIA's driver is installed for it.
    pub has_module: Option<bool>,
    /// Whether its headers are installed, without which DKMS builds none.
    pub has_headers: Option<bool>,
    /// Whether Secure Boot is on: the kernel then loads only modules that are signed with a key it knows.
    pub secure_boot: Option<bool>,
}

impl KernelFacts {
    /// Looks below `root` (normally `/`) for the kernel and its modules, and below `sysfs` for Secure Boot.
    pub fn read(sysfs: &Path, root: &Path) -> Self {
        let release = fs::read_to_string(root.join("proc/sys/kernel/osrelease")).ok();
        let release = release.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
        let modules = release.as_ref().map(|release| root.join("lib/modules").join(release));
        // Where the list of modules is hidden from the agent, by a sandbox or by a container, the rest is so, too.
        let list = modules.as_ref().and_then(|folder| fs::read_to_string(folder.join("modules.dep")).ok());
        Self {
            has_module: list.as_deref().map(lists_nvidia),
            has_headers: list.and(modules).map(|folder| folder.join("build").exists()),
            secure_boot: secure_boot(sysfs),
            release,
        }
    }

    /// What may keep the module from being loaded, each in words that continue `the nvidia module is not loaded`.
    pub fn obstacles(&self) -> Vec<String> {
        let release = self.release.as_deref().unwrap_or_default();
        let mut obstacles = Vec::new();
        match (self.has_module, self.has_headers) {
            (Some(true), _) => obstacles.push(format!("one is installed for the kernel {release}")),
            (Some(false), Some(false)) => obstacles.push(format!(
                "none is installed for the kernel {release}, nor are this kernel's headers, without which DKMS builds none"
            )),
            (Some(false), _) => obstacles.push(format!("none is installed for the kernel {release}, though its headers are")),
            (None, _) => {}
        }
        if self.secure_boot == Some(true) {
            obstacles
                .push("Secure Boot is on, so the kernel refuses a module without a signature that it knows".into());
        }
        obstacles
    }
}

/// Whether modules.dep(5) lists NVIDIA's driver: `nvidia.ko`, or under Debian's names `nvidia-current.ko` and
/// `nvidia-tesla-<branch>.ko`; compressed or not. The kernel's own drivers for parts of NVIDIA's cards have other names.
fn lists_nvidia(modules_dep: &str) -> bool {
    modules_dep.lines().any(|line| {
        let path = line.split(':').next().unwrap_or_default();
        let file = path.rsplit('/').next().unwrap_or_default();
        let Some((name, _)) = file.split_once(".ko") else {
            return false;
        };
        name == "nvidia" || name == "nvidia-current" || name == "nvidia-open" || name.starts_with("nvidia-tesla")
    })
}

/// Four bytes of attributes, then the value (Linux, Documentation/filesystems/efivarfs.rst).
fn secure_boot(sysfs: &Path) -> Option<bool> {
    let bytes = fs::read(sysfs.join(SECURE_BOOT)).ok()?;
    bytes.get(4).map(|value| *value == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nvidias_driver_is_found_among_the_modules_by_its_name_alone() {
        for (line, expected) in [
            ("updates/dkms/nvidia-current.ko.xz: kernel/drivers/video/x.ko", true),
            ("kernel/nvidia-570-server/nvidia.ko:", true),
            ("extra/nvidia.ko.zst:", true),
            ("updates/dkms/nvidia-tesla-470.ko:", true),
            ("kernel/drivers/video/fbdev/nvidia/nvidiafb.ko.xz: kernel/x.ko", false),
            ("kernel/drivers/platform/x86/nvidia-wmi-ec-backlight.ko:", false),
            ("kernel/drivers/usb/typec/altmodes/typec_nvidia.ko:", false),
            ("kernel/a.ko: updates/dkms/nvidia.ko", false),
            ("", false),
        ] {
            assert_eq!(lists_nvidia(line), expected, "{line}");
        }
    }

    #[test]
    fn what_cannot_be_told_is_left_open() {
        let nowhere = Path::new("/nowhere");
        assert_eq!(KernelFacts::read(nowhere, nowhere), KernelFacts::default());
        assert_eq!(KernelFacts::default().obstacles(), Vec::<String>::new());
    }
}
