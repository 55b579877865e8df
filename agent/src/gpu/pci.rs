//! PCI devices and NVIDIA's kernel module, from sysfs; needs no driver. Layout: Linux,
//! Documentation/ABI/testing/sysfs-bus-pci.

use std::io;
use std::path::Path;

use serde::{Serialize, Serializer};

use super::kernel::KernelFacts;
use crate::values::PciAddress;

/// PCI vendor ID of NVIDIA (pci.ids).
const NVIDIA: u32 = 0x10de;
/// PCI base class of display controllers (pci.ids): VGA 0300, 3D 0302, other 0380.
const DISPLAY: u32 = 0x03;

/// A PCI device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PciDevice {
    /// PCI address.
    pub address: PciAddress,
    /// Vendor ID; NVIDIA is `10de`.
    #[serde(serialize_with = "as_hex4")]
    pub vendor: u32,
    /// Device ID, if readable.
    #[serde(serialize_with = "as_optional_hex4")]
    pub device: Option<u32>,
    /// Class code: base class, subclass and programming interface, one byte each.
    #[serde(serialize_with = "as_hex6")]
    pub class: u32,
    /// Kernel driver bound to the device.
    pub driver: Option<String>,
}

fn as_hex4<S: Serializer>(number: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{number:04x}"))
}

fn as_optional_hex4<S: Serializer>(number: &Option<u32>, serializer: S) -> Result<S::Ok, S::Error> {
    match number {
        Some(number) => as_hex4(number, serializer),
        None => serializer.serialize_none(),
    }
}

fn as_hex6<S: Serializer>(number: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{number:06x}"))
}

impl PciDevice {
    /// Returns whether this is an NVIDIA GPU: vendor 10de, class 03xx.
    pub fn is_nvidia_display(&self) -> bool {
        self.vendor == NVIDIA && self.class >> 16 == DISPLAY
    }

    /// Returns whether this is bound to NVIDIA's driver.
    pub(crate) fn is_bound_to_nvidia(&self) -> bool {
        self.driver.as_deref() == Some("nvidia")
    }

    /// Returns whether this could be mistaken for an NVIDIA GPU: a GPU of another vendor, or
    /// another function of an NVIDIA GPU.
    pub(crate) fn is_similar_to_gpu(&self) -> bool {
        self.vendor == NVIDIA || self.class >> 16 == DISPLAY
    }

    /// Returns [`PciDevice::ids`] and the driver.
    pub fn summary(&self) -> String {
        let driver =
            self.driver.as_deref().map_or("no driver".into(), |driver| format!("driver {driver}"));
        format!("{}, {driver}", self.ids())
    }

    /// Returns `vendor:device, class cccc`, as in the output of `lspci -nn`.
    pub fn ids(&self) -> String {
        let device = self.device.map_or("????".into(), |device| format!("{device:04x}"));
        format!("{:04x}:{device}, class {:04x}", self.vendor, self.class >> 8)
    }
}

/// Facts from sysfs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PciFacts {
    /// All PCI devices, sorted by address.
    pub devices: Vec<PciDevice>,
    /// Version of the `nvidia` module; `None` if it is not loaded.
    pub module_version: Option<String>,
    /// State of the module unless it is `live`: `coming` or `going`.
    pub module_pending: Option<String>,
    /// Facts about the kernel; only read if a GPU is present without the driver.
    pub kernel: KernelFacts,
    /// Files that could not be read, with the error. A verdict on such facts names them.
    pub unreadable: Vec<String>,
}

impl PciFacts {
    /// Returns the NVIDIA GPUs.
    pub fn gpus(&self) -> impl Iterator<Item = &PciDevice> {
        self.devices.iter().filter(|device| device.is_nvidia_display())
    }

    /// Returns the device at `address`.
    pub fn at(&self, address: PciAddress) -> Option<&PciDevice> {
        self.devices.iter().find(|device| device.address == address)
    }
}

/// Reads the facts below `sysfs` (normally `/sys`). Calls `read_kernel` only if a GPU is present
/// without the driver. Files that cannot be read are listed in the result; nothing is guessed.
pub fn read_facts(sysfs: &Path, read_kernel: impl FnOnce() -> KernelFacts) -> PciFacts {
    let mut facts = PciFacts::default();
    let bus = sysfs.join("bus/pci/devices");
    match std::fs::read_dir(&bus) {
        Ok(entries) => {
            for entry in entries.flatten() {
                let Some(address) = entry.file_name().to_str().and_then(PciAddress::parse) else {
                    continue;
                };
                match read_device(address, &entry.path()) {
                    Ok(device) => facts.devices.push(device),
                    Err(error) => facts.unreadable.push(error),
                }
            }
            facts.devices.sort_by_key(|device| device.address);
        }
        // A machine without a PCI bus has no such directory; any other error is a failed read.
        Err(error) if error.kind() == io::ErrorKind::NotFound && sysfs.is_dir() => {}
        Err(error) => facts.unreadable.push(format!("{}: {error}", bus.display())),
    }
    let module = sysfs.join("module/nvidia");
    facts.module_version = read_optional(&module.join("version"), &mut facts.unreadable);
    facts.module_pending = read_optional(&module.join("initstate"), &mut facts.unreadable)
        .filter(|state| state != "live");
    if facts.gpus().any(|gpu| gpu.driver.is_none())
        || (facts.module_version.is_none() && facts.gpus().next().is_some())
    {
        facts.kernel = read_kernel();
    }
    facts
}

fn read_device(address: PciAddress, dir: &Path) -> Result<PciDevice, String> {
    let read_id = |name: &str| {
        let path = dir.join(name);
        let text = std::fs::read_to_string(&path)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let digits = text.trim().trim_start_matches("0x");
        u32::from_str_radix(digits, 16)
            .map_err(|_| format!("{}: not a hexadecimal number", path.display()))
    };
    let driver_link = dir.join("driver");
    let driver = match std::fs::read_link(&driver_link) {
        Ok(target) => target.file_name().map(|name| name.to_string_lossy().into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(format!("{}: {error}", driver_link.display())),
    };
    Ok(PciDevice {
        address,
        vendor: read_id("vendor")?,
        device: read_id("device").ok(),
        class: read_id("class")?,
        driver,
    })
}

fn read_optional(path: &Path, unreadable: &mut Vec<String>) -> Option<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Some(text.trim().to_owned()).filter(|text| !text.is_empty()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            unreadable.push(format!("{}: {error}", path.display()));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn file_in_place_of_sysfs_is_unreadable() {
        let facts = read_facts(Path::new("/proc/self/status"), KernelFacts::default);
        assert!(facts.devices.is_empty() && !facts.unreadable.is_empty(), "{facts:?}");
    }

    /// A temporary sysfs with these files and driver links.
    struct Sysfs(PathBuf);

    impl Sysfs {
        fn create(name: &str, files: &[(&str, &str)], drivers: &[(&str, &str)]) -> Self {
            let sysfs =
                Self(std::env::temp_dir().join(format!("sn-pci-{name}-{}", std::process::id())));
            let create_parent = |path: &str| {
                let path = sysfs.0.join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                path
            };
            for (path, text) in files {
                std::fs::write(create_parent(path), text).unwrap();
            }
            for (device, driver) in drivers {
                let link = create_parent(&format!("bus/pci/devices/{device}/driver"));
                std::os::unix::fs::symlink(format!("../../../bus/pci/drivers/{driver}"), link)
                    .unwrap();
            }
            sysfs
        }

        /// Returns the facts and whether the kernel facts were read.
        fn read(&self) -> (PciFacts, bool) {
            let mut kernel_was_read = false;
            let facts = read_facts(&self.0, || {
                kernel_was_read = true;
                KernelFacts::default()
            });
            (facts, kernel_was_read)
        }
    }

    impl Drop for Sysfs {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    const GPU: [(&str, &str); 3] = [
        ("bus/pci/devices/0000:01:00.0/vendor", "0x10de\n"),
        ("bus/pci/devices/0000:01:00.0/device", "0x20b5\n"),
        ("bus/pci/devices/0000:01:00.0/class", "0x030200\n"),
    ];

    #[test]
    fn device_has_ids_and_driver() {
        let nic = [
            ("bus/pci/devices/0000:00:03.0/vendor", "0x1af4"),
            ("bus/pci/devices/0000:00:03.0/class", "0x020000"),
            ("bus/pci/devices/no-address/vendor", "0x10de"),
            ("module/nvidia/version", "550.54.15\n"),
            ("module/nvidia/initstate", "live\n"),
        ];
        let sysfs =
            Sysfs::create("device", &[&GPU[..], &nic].concat(), &[("0000:01:00.0", "nvidia")]);
        let (facts, kernel_was_read) = sysfs.read();
        let [nic, gpu] = &facts.devices[..] else { panic!("{facts:?}") };
        assert_eq!(gpu.summary(), "10de:20b5, class 0302, driver nvidia");
        assert_eq!(nic.summary(), "1af4:????, class 0200, no driver");
        assert_eq!(
            serde_json::to_value(&facts.devices).unwrap(),
            serde_json::json!([
                {
                    "address": "0000:00:03.0",
                    "vendor": "1af4",
                    "device": null,
                    "class": "020000",
                    "driver": null,
                },
                {
                    "address": "0000:01:00.0",
                    "vendor": "10de",
                    "device": "20b5",
                    "class": "030200",
                    "driver": "nvidia",
                },
            ])
        );
        assert_eq!(facts.gpus().collect::<Vec<_>>(), [gpu]);
        assert_eq!(facts.at(nic.address), Some(nic));
        assert_eq!(facts.at(PciAddress::parse("01:00.1").unwrap()), None);
        assert_eq!(
            (facts.module_version.as_deref(), facts.module_pending),
            (Some("550.54.15"), None)
        );
        assert!(
            !kernel_was_read && facts.unreadable.is_empty(),
            "kernel facts are not needed with the driver bound"
        );
    }

    #[test]
    fn kernel_facts_are_read_for_gpu_without_driver() {
        let version = ("module/nvidia/version", "550.54.15");
        let reads_kernel =
            |name, files: &[_], drivers: &[_]| Sysfs::create(name, files, drivers).read().1;
        let bound = [("0000:01:00.0", "nvidia")];
        let loaded = [&GPU[..], &[version]].concat();
        assert!(!reads_kernel("bound", &loaded, &bound));
        assert!(reads_kernel("no-driver", &loaded, &[]));
        assert!(reads_kernel("no-module", &GPU, &bound));
        let nic = [
            ("bus/pci/devices/0000:00:03.0/vendor", "0x1af4"),
            ("bus/pci/devices/0000:00:03.0/class", "0x020000"),
        ];
        assert!(!reads_kernel("no-gpu", &nic, &[]));
    }

    #[test]
    fn pending_module_state_is_reported() {
        let module = [("module/nvidia/version", " \n"), ("module/nvidia/initstate", "coming\n")];
        let (facts, _) = Sysfs::create("coming", &[&GPU[..], &module].concat(), &[]).read();
        assert_eq!((facts.module_version, facts.module_pending.as_deref()), (None, Some("coming")));
    }

    #[test]
    fn unreadable_files_are_listed() {
        let files = [&GPU[..2], &[("bus/pci/devices/0000:01:00.0/class", "VGA")]].concat();
        let (facts, _) = Sysfs::create("class", &files, &[]).read();
        assert!(facts.devices.is_empty() && facts.unreadable.len() == 1, "{facts:?}");
        assert!(
            facts.unreadable[0].ends_with("/0000:01:00.0/class: not a hexadecimal number"),
            "{facts:?}"
        );
        // A driver that is not a link, and a version that is a directory.
        let files = [("bus/pci/devices/0000:01:00.0/driver", ""), ("module/nvidia/version/x", "")];
        let (facts, _) = Sysfs::create("driver", &[&GPU[..], &files].concat(), &[]).read();
        let path = |index: usize| facts.unreadable[index].rsplit_once(": ").unwrap().0;
        assert!(facts.devices.is_empty() && facts.unreadable.len() == 2, "{facts:?}");
        assert!(
            path(0).ends_with("0000:01:00.0/driver") && path(1).ends_with("module/nvidia/version"),
            "{facts:?}"
        );
        let (facts, _) = Sysfs::create("no-bus", &[("kernel/x", "")], &[]).read();
        assert_eq!(facts, PciFacts::default());
        let facts = read_facts(Path::new("/no/such/sysfs"), KernelFacts::default);
        assert_eq!(facts.unreadable.len(), 1, "{facts:?}");
    }

    #[test]
    fn gpu_needs_nvidia_vendor_and_display_class() {
        let device = |vendor, class| PciDevice {
            address: PciAddress::parse("01:00.0").unwrap(),
            vendor,
            device: None,
            class,
            driver: None,
        };
        for (vendor, class, is_gpu, is_similar) in [
            (0x10de, 0x03_02_00, true, true),
            (0x10de, 0x03_00_00, true, true),
            (0x10de, 0x04_03_00, false, true),
            (0x1002, 0x03_00_00, false, true),
            (0x1af4, 0x02_00_00, false, false),
        ] {
            let device = device(vendor, class);
            assert_eq!(
                (device.is_nvidia_display(), device.is_similar_to_gpu()),
                (is_gpu, is_similar),
                "{device:?}"
            );
        }
    }
}
