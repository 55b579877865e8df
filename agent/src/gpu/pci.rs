//! What sysfs says about NVIDIA display devices and their driver, and nothing that needs the driver
//! itself. Facts of the layout: Linux, Documentation/ABI/testing/sysfs-bus-pci.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use super::kernel::KernelFacts;

/// The PCI vendor number of NVIDIA (pci.ids).
const NVIDIA: u32 = 0x10de;
/// The PCI class of display controllers (pci.ids): VGA 0300, 3D 0302, other 0380.
const DISPLAY: u32 = 0x03;

/// A PCI address: domain, bus, device, function.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// Reads an address as OpenNebula (`01:00.0`), sysfs (`0000:01:00.0`) and NVML
    /// (`00000000:01:00.0`) write it.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = |digits: &str, lengths: std::ops::RangeInclusive<usize>| {
            (lengths.contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit()))
                .then(|| u32::from_str_radix(digits, 16).ok())
                .flatten()
        };
        let mut parts = text.split(':').collect::<Vec<_>>();
        let (device, function) = parts.pop()?.split_once('.')?;
        let bus = hex(parts.pop()?, 2..=2)?;
        let domain = match parts.pop() {
            Some(digits) => hex(digits, 4..=8)?,
            None => 0,
        };
        let (device, function) = (hex(device, 2..=2)?, hex(function, 1..=1)?);
        (parts.is_empty() && device < 32 && function < 8).then_some(Self {
            domain,
            bus: bus as u8,
            device: device as u8,
            function: function as u8,
        })
    }

    /// Whether both are functions of one card: its GPU, its sound, its USB.
    pub fn is_same_card(self, other: Self) -> bool {
        Self { function: 0, ..self } == Self { function: 0, ..other }
    }
}

impl fmt::Display for PciAddress {
    /// As sysfs and lspci -D write it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl fmt::Debug for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for PciAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A device on the PCI bus of this VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PciDevice {
    /// Where it is.
    pub address: PciAddress,
    /// Vendor number, `10de` is NVIDIA.
    #[serde(serialize_with = "as_hex4")]
    pub vendor: u32,
    /// Device number, where sysfs gives one.
    #[serde(serialize_with = "as_optional_hex4")]
    pub device: Option<u32>,
    /// Class, subclass and programming interface, one byte each.
    #[serde(serialize_with = "as_hex6")]
    pub class: u32,
    /// The kernel driver that is bound to it.
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
    /// Whether it is a GPU of NVIDIA: vendor 10de, class 03xx.
    pub fn is_nvidia_display(&self) -> bool {
        self.vendor == NVIDIA && self.class >> 16 == DISPLAY
    }

    /// Whether one may have taken it for a GPU of NVIDIA: another vendor's, or another function of
    /// an NVIDIA card.
    pub fn is_similar_to_gpu(&self) -> bool {
        self.vendor == NVIDIA || self.class >> 16 == DISPLAY
    }

    /// [`PciDevice::ids`] and the driver.
    pub fn described(&self) -> String {
        let driver =
            self.driver.as_deref().map_or("no driver".into(), |driver| format!("driver {driver}"));
        format!("{}, {driver}", self.ids())
    }

    /// `vendor:device, class cccc`, as lspci -nn gives them.
    pub fn ids(&self) -> String {
        let device = self.device.map_or("????".into(), |device| format!("{device:04x}"));
        format!("{:04x}:{device}, class {:04x}", self.vendor, self.class >> 8)
    }
}

/// What sysfs said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PciFacts {
    /// Every PCI device, by address.
    pub devices: Vec<PciDevice>,
    /// The version of the loaded `nvidia` module, where one is loaded.
    pub module_version: Option<String>,
    /// The module's state while it is not yet `live` (`coming`, `going`).
    pub module_pending: Option<String>,
    /// What the kernel has for the driver; looked for where a GPU is there without it.
    pub kernel: KernelFacts,
    /// What could not be read, with the reason: a verdict on such facts says so.
    pub unreadable: Vec<String>,
}

impl PciFacts {
    /// The GPUs of NVIDIA among the devices.
    pub fn gpus(&self) -> impl Iterator<Item = &PciDevice> {
        self.devices.iter().filter(|device| device.is_nvidia_display())
    }

    /// The device at `address`.
    pub fn at(&self, address: PciAddress) -> Option<&PciDevice> {
        self.devices.iter().find(|device| device.address == address)
    }
}

/// Reads the facts below `sysfs` (normally `/sys`), and by `kernel` those of the kernel where they
/// matter. What cannot be read is listed in the answer; nothing is guessed.
pub fn read_facts(sysfs: &Path, kernel: impl FnOnce() -> KernelFacts) -> PciFacts {
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
                    Err(failure) => facts.unreadable.push(failure),
                }
            }
            facts.devices.sort_by_key(|device| device.address);
        }
        // A machine without a PCI bus has no such folder; one that has it and does not show it is
        // another thing.
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
        facts.kernel = kernel();
    }
    facts
}

fn read_device(address: PciAddress, folder: &Path) -> Result<PciDevice, String> {
    let number = |name: &str| {
        let path = folder.join(name);
        let text = std::fs::read_to_string(&path)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let digits = text.trim().trim_start_matches("0x");
        u32::from_str_radix(digits, 16)
            .map_err(|_| format!("{}: not a hexadecimal number", path.display()))
    };
    let driver_link = folder.join("driver");
    let driver = match std::fs::read_link(&driver_link) {
        Ok(target) => last_part(target),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(format!("{}: {error}", driver_link.display())),
    };
    Ok(PciDevice {
        address,
        vendor: number("vendor")?,
        device: number("device").ok(),
        class: number("class")?,
        driver,
    })
}

fn last_part(target: PathBuf) -> Option<String> {
    target.file_name().map(|name| name.to_string_lossy().into_owned())
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
    use super::*;

    #[test]
    fn an_address_is_read_as_opennebula_sysfs_and_nvml_write_it() {
        for text in ["01:00.0", "0000:01:00.0", "00000000:01:00.0"] {
            assert_eq!(
                PciAddress::parse(text).map(|address| address.to_string()).as_deref(),
                Some("0000:01:00.0")
            );
        }
        assert_eq!(
            PciAddress::parse("0001:FF:1F.7").map(|address| address.to_string()).as_deref(),
            Some("0001:ff:1f.7")
        );
        for text in [
            "",
            "1:00.0",
            "01:00",
            "01:00.00",
            "01:20.0",
            "01:00.8",
            "01-00.0",
            "0:01:00.0",
            "a:0000:01:00.0",
            "+1:00.0",
        ] {
            assert_eq!(PciAddress::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_folder_that_is_no_sysfs_is_said_to_be_unreadable() {
        let facts = read_facts(Path::new("/proc/self/status"), KernelFacts::default);
        assert!(facts.devices.is_empty() && !facts.unreadable.is_empty(), "{facts:?}");
    }

    /// A sysfs of these files, and of the links to drivers; taken away at the end.
    struct Sysfs(PathBuf);

    impl Sysfs {
        fn of(name: &str, files: &[(&str, &str)], drivers: &[(&str, &str)]) -> Self {
            let sysfs =
                Self(std::env::temp_dir().join(format!("sn-pci-{name}-{}", std::process::id())));
            let place = |path: &str| {
                let path = sysfs.0.join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                path
            };
            for (path, text) in files {
                std::fs::write(place(path), text).unwrap();
            }
            for (device, driver) in drivers {
                let link = place(&format!("bus/pci/devices/{device}/driver"));
                std::os::unix::fs::symlink(format!("../../../bus/pci/drivers/{driver}"), link)
                    .unwrap();
            }
            sysfs
        }

        /// The facts, and whether the kernel was asked.
        fn read(&self) -> (PciFacts, bool) {
            let mut asked = false;
            let facts = read_facts(&self.0, || {
                asked = true;
                KernelFacts::default()
            });
            (facts, asked)
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
    fn a_device_is_read_with_its_numbers_and_its_driver() {
        let nic = [
            ("bus/pci/devices/0000:00:03.0/vendor", "0x1af4"),
            ("bus/pci/devices/0000:00:03.0/class", "0x020000"),
            ("bus/pci/devices/no-address/vendor", "0x10de"),
            ("module/nvidia/version", "550.54.15\n"),
            ("module/nvidia/initstate", "live\n"),
        ];
        let sysfs = Sysfs::of("device", &[&GPU[..], &nic].concat(), &[("0000:01:00.0", "nvidia")]);
        let (facts, asked) = sysfs.read();
        let [nic, gpu] = &facts.devices[..] else { panic!("{facts:?}") };
        assert_eq!(gpu.described(), "10de:20b5, class 0302, driver nvidia");
        assert_eq!(nic.described(), "1af4:????, class 0200, no driver");
        assert_eq!(
            serde_json::to_value(&facts.devices).unwrap(),
            serde_json::json!([
                {"address": "0000:00:03.0", "vendor": "1af4", "device": null, "class": "020000", "driver": null},
                {"address": "0000:01:00.0", "vendor": "10de", "device": "20b5", "class": "030200", "driver": "nvidia"},
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
            !asked && facts.unreadable.is_empty(),
            "a GPU on its driver is no reason to ask the kernel"
        );
    }

    #[test]
    fn the_kernel_is_asked_where_a_gpu_is_without_a_driver_or_the_module_is_not_loaded() {
        let version = ("module/nvidia/version", "550.54.15");
        let with = |name, files: &[_], drivers: &[_]| Sysfs::of(name, files, drivers).read().1;
        let driven = [("0000:01:00.0", "nvidia")];
        let loaded = [&GPU[..], &[version]].concat();
        assert!(!with("driven", &loaded, &driven));
        assert!(with("no-driver", &loaded, &[]));
        assert!(with("no-module", &GPU, &driven));
        let nic = [
            ("bus/pci/devices/0000:00:03.0/vendor", "0x1af4"),
            ("bus/pci/devices/0000:00:03.0/class", "0x020000"),
        ];
        assert!(!with("no-gpu", &nic, &[]));
    }

    #[test]
    fn a_module_that_is_still_coming_is_told() {
        let module = [("module/nvidia/version", " \n"), ("module/nvidia/initstate", "coming\n")];
        let (facts, _) = Sysfs::of("coming", &[&GPU[..], &module].concat(), &[]).read();
        assert_eq!((facts.module_version, facts.module_pending.as_deref()), (None, Some("coming")));
    }

    #[test]
    fn what_cannot_be_read_is_listed_and_a_machine_without_a_bus_has_no_devices() {
        let files = [&GPU[..2], &[("bus/pci/devices/0000:01:00.0/class", "VGA")]].concat();
        let (facts, _) = Sysfs::of("class", &files, &[]).read();
        assert!(facts.devices.is_empty() && facts.unreadable.len() == 1, "{facts:?}");
        assert!(
            facts.unreadable[0].ends_with("/0000:01:00.0/class: not a hexadecimal number"),
            "{facts:?}"
        );
        // A driver that is no link, and a version that is a folder.
        let files = [("bus/pci/devices/0000:01:00.0/driver", ""), ("module/nvidia/version/x", "")];
        let (facts, _) = Sysfs::of("driver", &[&GPU[..], &files].concat(), &[]).read();
        let of = |at: usize| facts.unreadable[at].rsplit_once(": ").unwrap().0;
        assert!(facts.devices.is_empty() && facts.unreadable.len() == 2, "{facts:?}");
        assert!(
            of(0).ends_with("0000:01:00.0/driver") && of(1).ends_with("module/nvidia/version"),
            "{facts:?}"
        );
        let (facts, _) = Sysfs::of("no-bus", &[("kernel/x", "")], &[]).read();
        assert_eq!(facts, PciFacts::default());
        let facts = read_facts(Path::new("/no/such/sysfs"), KernelFacts::default);
        assert_eq!(facts.unreadable.len(), 1, "{facts:?}");
    }

    #[test]
    fn the_functions_of_one_card_are_known_by_all_but_their_number() {
        let same = |one: &str, other: &str| {
            PciAddress::parse(one).unwrap().is_same_card(PciAddress::parse(other).unwrap())
        };
        assert!(
            same("01:00.0", "01:00.1") && same("01:00.1", "01:00.0") && same("01:00.1", "01:00.1")
        );
        assert!(
            !same("01:00.0", "01:01.0")
                && !same("01:00.0", "02:00.0")
                && !same("01:00.0", "0001:01:00.0")
        );
        assert_eq!(format!("{:?}", PciAddress::parse("01:00.0").unwrap()), "0000:01:00.0");
    }

    #[test]
    fn a_gpu_is_nvidias_and_a_display_and_what_is_one_of_them_resembles_one() {
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
