//! What the kernel of this VM has for NVIDIA's driver: why a module that should be loaded may not
//! be. Read where it is cheap and certain; what cannot be told is left open.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// The variable of UEFI that tells whether Secure Boot is on (UEFI specification, 3.3 Globally
/// Defined Variables).
const SECURE_BOOT: &str = "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// The kernel, and what it has; `None`: not to be told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct KernelFacts {
    /// Its release, as `uname -r` gives it.
    pub release: Option<String>,
    /// Whether a module of NVIDIA's driver is installed for it.
    pub has_module: Option<bool>,
    /// What DKMS has to build one from, with its version.
    pub dkms: Option<String>,
    /// Whether its headers are installed, without which DKMS builds none.
    pub has_headers: Option<bool>,
    /// Whether Secure Boot is on: the kernel then loads only modules that are signed with a key it
    /// knows.
    pub secure_boot: Option<bool>,
}

impl KernelFacts {
    /// Looks for the kernel and its modules, and below `sysfs` for Secure Boot. `at` tells where a
    /// path lies, which is one below the root folder, or the absolute one of sysfs.
    pub fn read(sysfs: &Path, at: impl Fn(&Path) -> PathBuf) -> Self {
        let secure_boot = secure_boot(&at(&sysfs.join(SECURE_BOOT)));
        let at = |path: String| at(Path::new(&path));
        let mut facts = Self { secure_boot, ..Self::default() };
        let release = fs::read_to_string(at("proc/sys/kernel/osrelease".into())).ok();
        let Some(release) =
            release.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
        else {
            return facts;
        };
        // The unit's sandbox hides the folder of modules (ProtectKernelModules=); what DKMS has and
        // /usr/src stay visible.
        let list = fs::read_to_string(at(format!("lib/modules/{release}/modules.dep"))).ok();
        let (dkms, is_built) = dkms(&at, &release);
        facts.has_module = list.as_deref().map(lists_nvidia).or(dkms.is_some().then_some(is_built));
        facts.dkms = dkms;
        let headers = [
            format!("usr/src/linux-headers-{release}"),
            format!("usr/src/kernels/{release}"),
            format!("lib/modules/{release}/build"),
        ];
        let is_told = list.is_some() || at("etc/debian_version".into()).exists();
        facts.has_headers = if headers.into_iter().any(|folder| at(folder).exists()) {
            Some(true)
        } else {
            is_told.then_some(false)
        };
        facts.release = Some(release);
        facts
    }

    /// What may keep the module from being loaded, each in words that continue `the nvidia module
    /// is not loaded`.
    pub fn obstacles(&self) -> Vec<String> {
        let release = self.release.as_deref().unwrap_or_default();
        let mut obstacles = Vec::new();
        match (self.has_module, &self.dkms) {
            (Some(true), _) => obstacles.push(format!("one is installed for the kernel {release}")),
            (Some(false), Some(source)) => {
                obstacles
                    .push(format!("DKMS has {source} and has built none for the kernel {release}"));
            }
            (Some(false), None) => {
                obstacles.push(format!("none is installed for the kernel {release}"))
            }
            (None, _) => {}
        }
        if self.has_module != Some(true) && self.has_headers == Some(false) {
            obstacles.push(format!(
                "the headers of the kernel {release}, without which DKMS builds none, are not installed"
            ));
        }
        if self.secure_boot == Some(true) {
            obstacles
                .push("Secure Boot is on, so the kernel refuses a module without a signature that it knows".into());
        }
        obstacles
    }
}

/// The names of NVIDIA's driver: its own, Debian's, and those of the open modules. The kernel's
/// drivers for parts of NVIDIA's cards, and NVIDIA's other modules (nvidia-fs,
/// nvidia-wmi-ec-backlight), have others.
fn is_driver(name: &str) -> bool {
    matches!(name, "nvidia" | "nvidia-open" | "nvidia-current" | "nvidia-current-open")
        || name.starts_with("nvidia-tesla")
}

/// Whether modules.dep(5) lists NVIDIA's driver, compressed or not.
fn lists_nvidia(modules_dep: &str) -> bool {
    modules_dep.lines().any(|line| {
        let path = line.split(':').next().unwrap_or_default();
        let file = path.rsplit('/').next().unwrap_or_default();
        file.split_once(".ko").is_some_and(|(name, _)| is_driver(name))
    })
}

/// What DKMS has of NVIDIA's driver, and whether that is built for this kernel:
/// `<name>/<version>/<kernel>` (dkms(8)).
fn dkms(at: &dyn Fn(String) -> PathBuf, release: &str) -> (Option<String>, bool) {
    const FOLDER: &str = "var/lib/dkms";
    let names_in = |folder: String| {
        let entries = fs::read_dir(at(folder)).into_iter().flatten().flatten();
        let mut names: Vec<_> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    };
    let (mut source, mut is_built) = (None, false);
    for name in names_in(FOLDER.into()).into_iter().filter(|name| is_driver(name)) {
        let versions = names_in(format!("{FOLDER}/{name}"));
        for version in
            versions.into_iter().filter(|version| version.starts_with(|c: char| c.is_ascii_digit()))
        {
            is_built |= at(format!("{FOLDER}/{name}/{version}/{release}")).is_dir();
            source = Some(format!("{name} {version}"));
        }
    }
    (source, is_built)
}

/// Four bytes of attributes, then the value (Linux, Documentation/filesystems/efivarfs.rst).
fn secure_boot(variable: &Path) -> Option<bool> {
    let bytes = fs::read(variable).ok()?;
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

    /// A machine whose modules are hidden from the agent.
    #[test]
    fn what_dkms_has_is_told_where_the_modules_are_hidden() {
        let root =
            std::env::temp_dir().join(format!("supernode-agent-kernel-{}", std::process::id()));
        let folder = |path: &str| fs::create_dir_all(root.join(path)).unwrap();
        for path in [
            "proc/sys/kernel",
            "etc",
            "var/lib/dkms/nvidia-current/535.261.03/6.1.0-9-amd64",
            "var/lib/dkms/zfs/2.1",
        ] {
            folder(path);
        }
        fs::write(root.join("etc/debian_version"), "12.11\n").unwrap();
        let obstacles = |release: &str| {
            fs::write(root.join("proc/sys/kernel/osrelease"), format!("{release}\n")).unwrap();
            KernelFacts::read(Path::new("/nowhere"), |path| root.join(path)).obstacles()
        };
        let built = obstacles("6.1.0-9-amd64");
        let not_built = obstacles("6.1.0-10-amd64");
        folder("usr/src/linux-headers-6.1.0-10-amd64");
        let with_headers = obstacles("6.1.0-10-amd64");
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(built, ["one is installed for the kernel 6.1.0-9-amd64"]);
        let none =
            "DKMS has nvidia-current 535.261.03 and has built none for the kernel 6.1.0-10-amd64";
        let headers = "the headers of the kernel 6.1.0-10-amd64, without which DKMS builds none, are not installed";
        assert_eq!(not_built, [none, headers]);
        assert_eq!(with_headers, [none]);
    }

    #[test]
    fn what_cannot_be_told_is_left_open() {
        let nowhere = Path::new("/nowhere");
        assert_eq!(KernelFacts::read(nowhere, |path| nowhere.join(path)), KernelFacts::default());
        assert_eq!(KernelFacts::default().obstacles(), Vec::<String>::new());
    }
}
