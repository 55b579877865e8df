//! Facts about the kernel that explain why NVIDIA's kernel module is not loaded: installed modules,
//! DKMS sources, headers, Secure Boot. Unreadable facts are `None`; nothing is guessed.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// The UEFI variable with the state of Secure Boot (UEFI specification, 3.3 Globally Defined
/// Variables).
const SECURE_BOOT_VARIABLE: &str =
    "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// Facts about the running kernel; `None`: unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct KernelFacts {
    /// Kernel release, as `uname -r` prints it.
    pub release: Option<String>,
    /// Whether a module of NVIDIA's driver is installed for this kernel.
    pub has_module: Option<bool>,
    /// The DKMS source of the driver, with its version.
    pub dkms: Option<String>,
    /// Whether the kernel headers are installed, which DKMS needs.
    pub has_headers: Option<bool>,
    /// Whether Secure Boot is on: the kernel then loads only modules signed with a trusted key.
    pub secure_boot: Option<bool>,
}

impl KernelFacts {
    /// Reads the facts. `at` maps a path, relative to the root directory or an absolute one below
    /// `sysfs`, to the file to read.
    pub fn read(sysfs: &Path, at: impl Fn(&Path) -> PathBuf) -> Self {
        let secure_boot = read_secure_boot(&at(&sysfs.join(SECURE_BOOT_VARIABLE)));
        let at = |path: String| at(Path::new(&path));
        let mut facts = Self { secure_boot, ..Self::default() };
        let release = fs::read_to_string(at("proc/sys/kernel/osrelease".into())).ok();
        let Some(release) =
            release.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
        else {
            return facts;
        };
        // The unit's sandbox hides /lib/modules (ProtectKernelModules=); /var/lib/dkms and /usr/src
        // stay visible.
        let modules_dep = fs::read_to_string(at(format!("lib/modules/{release}/modules.dep"))).ok();
        let (dkms, is_built) = read_dkms(&at, &release);
        facts.has_module =
            modules_dep.as_deref().map(lists_nvidia).or(dkms.is_some().then_some(is_built));
        facts.dkms = dkms;
        let headers = [
            format!("usr/src/linux-headers-{release}"),
            format!("usr/src/kernels/{release}"),
            format!("lib/modules/{release}/build"),
        ];
        // Debian and Ubuntu install headers below /usr/src; elsewhere only /lib/modules shows that
        // they are absent.
        let is_certain = modules_dep.is_some() || at("etc/debian_version".into()).exists();
        facts.has_headers = if headers.into_iter().any(|dir| at(dir).exists()) {
            Some(true)
        } else {
            is_certain.then_some(false)
        };
        facts.release = Some(release);
        facts
    }

    /// Returns what may prevent the module from being loaded, each as a clause that continues
    /// `the nvidia module is not loaded`.
    pub fn obstacles(&self) -> Vec<String> {
        let release = self.release.as_deref().unwrap_or_default();
        let mut obstacles = Vec::new();
        match (self.has_module, &self.dkms) {
            (Some(true), _) => {
                obstacles.push(format!("a module is installed for kernel {release}"));
            }
            (Some(false), Some(source)) => obstacles.push(format!(
                "DKMS has the source {source} but no module built for kernel {release}"
            )),
            (Some(false), None) => {
                obstacles.push(format!("no module is installed for kernel {release}"));
            }
            (None, _) => {}
        }
        if self.has_module != Some(true) && self.has_headers == Some(false) {
            obstacles.push(format!(
                "the headers of kernel {release}, which DKMS needs, are not installed"
            ));
        }
        if self.secure_boot == Some(true) {
            obstacles.push(
                "Secure Boot is on: the kernel loads only modules signed with a trusted key".into(),
            );
        }
        obstacles
    }
}

/// Returns whether this is a module name of NVIDIA's driver: NVIDIA's own, Debian's, or the open
/// modules. Excludes nvidiafb, nvidia-fs, nvidia-wmi-ec-backlight and the like.
fn is_driver(name: &str) -> bool {
    matches!(name, "nvidia" | "nvidia-open" | "nvidia-current" | "nvidia-current-open")
        || name.starts_with("nvidia-tesla")
}

/// Returns whether modules.dep(5) lists NVIDIA's driver, compressed or not.
fn lists_nvidia(modules_dep: &str) -> bool {
    modules_dep.lines().any(|line| {
        let path = line.split(':').next().unwrap_or_default();
        let file = path.rsplit('/').next().unwrap_or_default();
        file.split_once(".ko").is_some_and(|(name, _)| is_driver(name))
    })
}

/// Returns the DKMS source of NVIDIA's driver and whether it is built for this kernel, from the
/// directories `<name>/<version>/<kernel>` (dkms(8)).
fn read_dkms(at: &dyn Fn(String) -> PathBuf, release: &str) -> (Option<String>, bool) {
    const DIR: &str = "var/lib/dkms";
    let names_in = |dir: String| {
        let entries = fs::read_dir(at(dir)).into_iter().flatten().flatten();
        let mut names: Vec<_> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    };
    let (mut source, mut is_built) = (None, false);
    for name in names_in(DIR.into()).into_iter().filter(|name| is_driver(name)) {
        let versions = names_in(format!("{DIR}/{name}"));
        for version in
            versions.into_iter().filter(|version| version.starts_with(|c: char| c.is_ascii_digit()))
        {
            is_built |= at(format!("{DIR}/{name}/{version}/{release}")).is_dir();
            source = Some(format!("{name} {version}"));
        }
    }
    (source, is_built)
}

/// Reads the variable: four bytes of attributes, then the value (Linux,
/// Documentation/filesystems/efivarfs.rst).
fn read_secure_boot(variable: &Path) -> Option<bool> {
    let bytes = fs::read(variable).ok()?;
    bytes.get(4).map(|value| *value == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_dep_driver_is_found_by_name() {
        for (line, expected) in [
            ("updates/dkms/nvidia-current.ko.xz: kernel/drivers/video/x.ko", true),
            ("kernel/nvidia-570-server/nvidia.ko:", true),
            ("extra/nvidia.ko.zst:", true),
            ("updates/dkms/nvidia-tesla-470.ko:", true),
            ("updates/dkms/nvidia-fs.ko:", false),
            ("kernel/drivers/video/fbdev/nvidia/nvidiafb.ko.xz: kernel/x.ko", false),
            ("kernel/drivers/platform/x86/nvidia-wmi-ec-backlight.ko:", false),
            ("kernel/drivers/usb/typec/altmodes/typec_nvidia.ko:", false),
            ("kernel/a.ko: updates/dkms/nvidia.ko", false),
            ("", false),
        ] {
            assert_eq!(lists_nvidia(line), expected, "{line}");
        }
    }

    /// The unit's sandbox hides /lib/modules.
    #[test]
    fn dkms_is_reported_if_modules_are_hidden() {
        let root =
            std::env::temp_dir().join(format!("supernode-agent-kernel-{}", std::process::id()));
        let create_dir = |path: &str| fs::create_dir_all(root.join(path)).unwrap();
        for path in [
            "proc/sys/kernel",
            "etc",
            "var/lib/dkms/nvidia-current/535.261.03/6.1.0-9-amd64",
            "var/lib/dkms/zfs/2.1",
        ] {
            create_dir(path);
        }
        fs::write(root.join("etc/debian_version"), "12.11\n").unwrap();
        let obstacles = |release: &str| {
            fs::write(root.join("proc/sys/kernel/osrelease"), format!("{release}\n")).unwrap();
            KernelFacts::read(Path::new("/nowhere"), |path| root.join(path)).obstacles()
        };
        let built = obstacles("6.1.0-9-amd64");
        let not_built = obstacles("6.1.0-10-amd64");
        create_dir("usr/src/linux-headers-6.1.0-10-amd64");
        let with_headers = obstacles("6.1.0-10-amd64");
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(built, ["a module is installed for kernel 6.1.0-9-amd64"]);
        let none = "DKMS has the source nvidia-current 535.261.03 \
                    but no module built for kernel 6.1.0-10-amd64";
        let headers = "the headers of kernel 6.1.0-10-amd64, which DKMS needs, are not installed";
        assert_eq!(not_built, [none, headers]);
        assert_eq!(with_headers, [none]);
    }

    #[test]
    fn unreadable_facts_are_unknown() {
        let nowhere = Path::new("/nowhere");
        assert_eq!(KernelFacts::read(nowhere, |path| nowhere.join(path)), KernelFacts::default());
        assert_eq!(KernelFacts::default().obstacles(), Vec::<String>::new());
    }
}
