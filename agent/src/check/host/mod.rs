//! `check host`: whether this KVM host can hand its NVIDIA GPUs to VMs, and whether OpenNebula
//! offers them. Facts of the field: Linux, Documentation/driver-api/vfio.rst; OpenNebula's manual,
//! PCI Passthrough.

use std::collections::BTreeMap;

use crate::check::{Check, Level};
use crate::gpu::pci::{PciDevice, PciFacts};
use crate::system::facts::Root;
use crate::system::os_release::Distribution;
use crate::values::PciAddress;

/// Where OpenNebula's probe on the host reads which devices it reports.
const HOST_FILTER: &str = "/var/tmp/one/etc/im/kvm-probes.d/pci.conf";
/// Where the front-end keeps it, from where `onehost sync` copies it to the hosts.
const FRONT_END_FILTER: &str = "/var/lib/one/remotes/etc/im/kvm-probes.d/pci.conf";
/// Where udev looks for rules (udev(7)).
const RULE_FOLDERS: [&str; 4] = [
    "/etc/udev/rules.d",
    "/run/udev/rules.d",
    "/usr/local/lib/udev/rules.d",
    "/usr/lib/udev/rules.d",
];
/// PCI classes of bridges to host and PCI: vfio leaves them to their drivers.
const BRIDGES: [u32; 2] = [0x0600, 0x0604];

/// What was read.
#[derive(Debug, Clone, Default)]
pub struct HostFacts {
    /// /proc/cmdline.
    pub cmdline: Option<String>,
    /// `vendor_id` of /proc/cpuinfo.
    pub cpu_vendor: Option<String>,
    /// The PCI bus.
    pub pci: PciFacts,
    /// The IOMMU group of each device that is in one.
    pub groups: BTreeMap<PciAddress, String>,
    /// Whether the driver vfio-pci is there.
    pub has_vfio_pci: bool,
    /// /etc/driverctl.d: device and driver.
    pub overrides: BTreeMap<String, String>,
    /// The udev rule for the vfio group devices: file and line.
    pub udev_rule: Option<String>,
    /// pci.conf on the host.
    pub host_filter: Option<String>,
    /// pci.conf on the front-end.
    pub front_end_filter: Option<String>,
    /// What could not be read, by the id of the check that needs it.
    pub unread: Vec<(&'static str, String)>,
}

/// Reads the facts of the host at `root`.
pub fn read(root: &Root) -> HostFacts {
    let mut facts = HostFacts { pci: crate::check::read_pci(root, "/sys"), ..HostFacts::default() };
    let mut unread = Vec::new();
    let mut text = |id, path: &str| {
        root.read(path).unwrap_or_else(|why| {
            unread.push((id, why));
            None
        })
    };
    facts.cmdline = text("iommu-kernel", "/proc/cmdline").map(|line| line.trim().to_owned());
    facts.cpu_vendor = text("iommu-kernel", "/proc/cpuinfo").and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("vendor_id"))?;
        line.split_once(':').map(|(_, vendor)| vendor.trim().to_owned())
    });
    facts.host_filter = text("pci-filter", HOST_FILTER);
    facts.front_end_filter = text("pci-filter", FRONT_END_FILTER);
    let mut list = |id, path: &str| {
        root.list(path).unwrap_or_else(|why| {
            unread.push((id, why));
            Vec::new()
        })
    };
    for group in list("iommu-groups", "/sys/kernel/iommu_groups") {
        for device in list("iommu-groups", &format!("/sys/kernel/iommu_groups/{group}/devices")) {
            if let Some(address) = PciAddress::parse(&device) {
                facts.groups.insert(address, group.clone());
            }
        }
    }
    facts.has_vfio_pci =
        root.has("/sys/bus/pci/drivers/vfio-pci") || root.has("/sys/module/vfio_pci");
    for name in list("driver-override", "/etc/driverctl.d") {
        match root.read(&format!("/etc/driverctl.d/{name}")) {
            Ok(driver) => {
                facts.overrides.insert(name, driver.unwrap_or_default().trim().to_owned());
            }
            Err(why) => unread.push(("driver-override", why)),
        }
    }
    for folder in RULE_FOLDERS {
        let names = match root.list(folder) {
            Ok(names) => names,
            Err(why) => {
                unread.push(("vfio-udev", why));
                continue;
            }
        };
        for path in names
            .iter()
            .filter(|name| name.ends_with(".rules"))
            .map(|name| format!("{folder}/{name}"))
        {
            match root.read(&path) {
                Ok(text) => {
                    let rule =
                        text.as_deref().and_then(vfio_rule).map(|rule| format!("{path}: {rule}"));
                    facts.udev_rule = facts.udev_rule.take().or(rule);
                }
                Err(why) => unread.push(("vfio-udev", why)),
            }
        }
    }
    facts.unread = unread;
    facts
}

/// The rule that gives the group devices of vfio to somebody: they have SUBSYSTEM vfio.
fn vfio_rule(text: &str) -> Option<&str> {
    text.lines().map(str::trim).find(|line| {
        let dense: String = line.chars().filter(|c| !c.is_whitespace()).collect();
        // The rule that systemd ships is for /dev/vfio/vfio alone (50-udev-default.rules:
        // KERNEL=="vfio/vfio").
        dense.contains("SUBSYSTEM==\"vfio\"")
            && (dense.contains("GROUP=") || dense.contains("MODE="))
            && !dense.starts_with('#')
    })
}

/// What the facts mean.
pub fn judge(facts: &HostFacts, distribution: Distribution) -> Vec<Check> {
    let mut checks = Vec::new();
    for why in &facts.pci.unreadable {
        checks.push(Check::unknown("pci", why, "run it as root"));
    }
    for (id, why) in &facts.unread {
        checks.push(Check::unknown(id, why, "run it as root"));
    }
    let mut judged = vec![iommu_kernel(facts, distribution), iommu_groups(facts), vfio_pci(facts)];
    judged.extend(functions(facts, distribution));
    judged.extend(group_mates(facts));
    judged.extend(driver_overrides(facts));
    judged.push(udev(facts));
    judged.extend(filter(facts));
    // What was not read is no finding: that it is not known has been said.
    let is_known = |check: &Check| {
        let is_unread = facts.unread.iter().any(|(id, _)| *id == check.id);
        check.level == Level::Ok
            || !(is_unread || (check.id == "gpu-present" && !facts.pci.unreadable.is_empty()))
    };
    checks.extend(judged.into_iter().filter(is_known));
    checks
}

fn vfio_pci(facts: &HostFacts) -> Check {
    const FIX: &str = "modprobe vfio-pci; echo vfio-pci > /etc/modules-load.d/vfio-pci.conf";
    match facts.has_vfio_pci {
        true => Check::ok("vfio-pci", "the driver vfio-pci is there"),
        false => Check::error("vfio-pci", "the driver vfio-pci is not loaded", FIX),
    }
}

/// The command that adds to the kernel's command line.
fn kernel_argument(distribution: Distribution, argument: &str) -> String {
    const GRUB: &str = "add it to GRUB_CMDLINE_LINUX in /etc/default/grub and run update-grub";
    match distribution {
        Distribution::RedHat => {
            format!("grubby --update-kernel=ALL --args=\"{argument}\", then reboot the host")
        }
        Distribution::Debian | Distribution::Ubuntu => {
            format!("{argument}: {GRUB}, then reboot the host")
        }
        Distribution::Other => format!(
            "{argument}: {GRUB} (RHEL, AlmaLinux: grubby --update-kernel=ALL --args=\"{argument}\"), then reboot the host"
        ),
    }
}

fn iommu_kernel(facts: &HostFacts, distribution: Distribution) -> Check {
    const ID: &str = "iommu-kernel";
    let Some(cmdline) = &facts.cmdline else {
        return Check::unknown(
            ID,
            "there is no kernel command line in /proc/cmdline",
            "run it on the host itself",
        );
    };
    let arguments: Vec<&str> = cmdline.split_whitespace().collect();
    let has = |wanted: &str| {
        let (key, value) = wanted.split_once('=').unwrap_or((wanted, ""));
        arguments.iter().any(|argument| {
            argument
                .strip_prefix(key)
                .and_then(|rest| rest.strip_prefix('='))
                .is_some_and(|values| values.split(',').any(|given| given == value))
        })
    };
    let off = ["intel_iommu=off", "amd_iommu=off", "iommu=off"].into_iter().find(|off| has(off));
    match (facts.cpu_vendor.as_deref(), off) {
        (_, Some(off)) => Check::error(
            ID,
            format!("the kernel was started with {off}"),
            "take it off the kernel's command line and reboot the host",
        ),
        (Some("GenuineIntel"), None) if has("intel_iommu=on") => {
            let pt = if has("iommu=pt") {
                " iommu=pt"
            } else {
                "; iommu=pt would spare the host's own devices the translation"
            };
            Check::ok(ID, format!("intel_iommu=on{pt}"))
        }
        // CONFIG_INTEL_IOMMU_DEFAULT_ON is a choice of the distribution's kernel: groups prove it.
        (Some("GenuineIntel"), None) if !facts.groups.is_empty() => Check::ok(
            ID,
            "the kernel command line has no intel_iommu=on, and this kernel has the IOMMU on all the same",
        ),
        (Some("GenuineIntel"), None) => {
            let fix = kernel_argument(distribution, "intel_iommu=on iommu=pt");
            Check::error(ID, "an Intel CPU, and the kernel command line has no intel_iommu=on", fix)
        }
        (Some("AuthenticAMD"), None) => Check::ok(ID, "an AMD CPU: its IOMMU is on by default"),
        (Some(vendor), None) => Check::ok(
            ID,
            format!("a CPU of {vendor}: nothing is switched off on the kernel command line"),
        ),
        (None, None) => Check::unknown(
            ID,
            "/proc/cpuinfo names no vendor of the CPU",
            "look at iommu-groups: groups are the proof",
        ),
    }
}

fn iommu_groups(facts: &HostFacts) -> Check {
    const ID: &str = "iommu-groups";
    const FIX: &str = "switch on VT-d or AMD-Vi (IOMMU) in the firmware of the host, then reboot; dmesg | grep -e DMAR -e AMD-Vi tells more";
    if facts.groups.is_empty() {
        return Check::error(
            ID,
            "/sys/kernel/iommu_groups is empty: no device can be given to a VM",
            FIX,
        );
    }
    let number = facts.groups.values().collect::<std::collections::BTreeSet<_>>().len();
    let devices = facts.groups.len();
    match facts.pci.gpus().find(|gpu| !facts.groups.contains_key(&gpu.address)) {
        Some(gpu) => Check::error(ID, format!("the GPU {} is in no IOMMU group", gpu.address), FIX),
        None => Check::ok(ID, format!("{number} groups with {devices} devices")),
    }
}

/// The functions of the cards that have a GPU: display, sound, USB, UCSI.
fn card_functions(facts: &PciFacts) -> impl Iterator<Item = &PciDevice> {
    let is_of_a_card =
        |device: &&PciDevice| facts.gpus().any(|gpu| gpu.address.is_same_card(device.address));
    facts.devices.iter().filter(is_of_a_card)
}

fn class_name(device: &PciDevice) -> &'static str {
    match device.class >> 8 {
        0x0300 | 0x0302 | 0x0380 => "GPU",
        0x0403 => "sound",
        0x0c03 => "USB",
        0x0c80 => "serial bus (USB-C)",
        0x0600 | 0x0604 => "bridge",
        _ => "device",
    }
}

fn functions(facts: &HostFacts, distribution: Distribution) -> Vec<Check> {
    const ID: &str = "vfio-binding";
    let install = distribution.install("driverctl", "driverctl");
    if facts.pci.gpus().next().is_none() {
        let finding =
            "there is no NVIDIA GPU on the PCI bus of this host (vendor 10de, class 03xx)";
        return vec![Check::error(
            "gpu-present",
            finding,
            "look at lspci -d 10de: and at the card's seat, power and slot settings",
        )];
    }
    let gpus: Vec<String> =
        facts.pci.gpus().map(|gpu| format!("{} ({})", gpu.address, gpu.ids())).collect();
    let mut checks = vec![Check::ok("gpu-present", gpus.join(", "))];
    for function in card_functions(&facts.pci) {
        let (address, ids, what) = (function.address, function.ids(), class_name(function));
        checks.push(match function.driver.as_deref() {
            Some("vfio-pci") => Check::ok(ID, format!("{address} ({what}, {ids}) is on vfio-pci")),
            driver => {
                let driver =
                    driver.map_or("no driver".into(), |driver| format!("the driver {driver}"));
                let finding = format!("{address} ({what}, {ids}) is on {driver}, not on vfio-pci");
                let vgpu = if function.driver.as_deref() == Some("nvidia") {
                    "; a card that is shared as vGPUs (PCI=[…,PROFILE=…]) stays on nvidia"
                } else {
                    ""
                };
                Check::error(
                    ID,
                    finding,
                    format!("{install}; driverctl set-override {address} vfio-pci{vgpu}"),
                )
            }
        });
    }
    checks
}

/// What shares an IOMMU group with a GPU goes to the VM with it, or keeps it from going.
fn group_mates(facts: &HostFacts) -> Vec<Check> {
    const ID: &str = "iommu-group-mates";
    const FIX: &str =
        "move one of the two cards to another slot, or switch on ACS in the firmware of the host";
    let mut checks = Vec::new();
    for gpu in facts.pci.gpus() {
        let Some(group) = facts.groups.get(&gpu.address) else { continue };
        let mates = facts
            .groups
            .iter()
            .filter(|(address, other)| *other == group && !address.is_same_card(gpu.address));
        let mut foreign = 0;
        for (address, _) in mates {
            let Some(mate) = facts.pci.at(*address) else { continue };
            if BRIDGES.contains(&(mate.class >> 8)) {
                continue;
            }
            foreign += 1;
            let (ids, what) = (mate.ids(), class_name(mate));
            let driver = mate.driver.as_deref().unwrap_or("no driver");
            let finding = format!(
                "group {group} of the GPU {} also has {address} ({what}, {ids}), which is on {driver}",
                gpu.address
            );
            checks.push(if mate.driver.as_deref() == Some("vfio-pci") {
                Check::warning(ID, format!("{finding}: both can only go to one VM, together"), FIX)
            } else {
                Check::error(ID, format!("{finding}: the GPU cannot be given to a VM"), FIX)
            });
        }
        if foreign == 0 {
            checks.push(Check::ok(
                ID,
                format!(
                    "group {group} of the GPU {} has nothing but the card and bridges",
                    gpu.address
                ),
            ));
        }
    }
    checks
}

/// Without an override the next boot gives the card to whatever driver comes first.
fn driver_overrides(facts: &HostFacts) -> Option<Check> {
    const ID: &str = "driver-override";
    facts.pci.gpus().next()?;
    let is_set_otherwise =
        facts.cmdline.as_ref().is_some_and(|cmdline| cmdline.contains("vfio-pci.ids="));
    let missing: Vec<String> = card_functions(&facts.pci)
        .map(|function| function.address.to_string())
        // driverctl names the file by the address, or by bus and address (`pci-0000:e1:00.0`).
        .filter(|address| {
            let set =
                facts.overrides.iter().find(|(name, _)| name.trim_start_matches("pci-") == address);
            set.is_none_or(|(_, driver)| driver != "vfio-pci")
        })
        .collect();
    if missing.is_empty() || is_set_otherwise {
        let how =
            if is_set_otherwise { "vfio-pci.ids on the kernel command line" } else { "driverctl" };
        return Some(Check::ok(ID, format!("{how} binds the cards to vfio-pci at every boot")));
    }
    let fix: Vec<String> = missing
        .iter()
        .map(|address| format!("driverctl set-override {address} vfio-pci"))
        .collect();
    let finding = format!(
        "driverctl has no override to vfio-pci for {}: unless something else binds them, they are lost to VMs after a reboot",
        missing.join(", ")
    );
    Some(Check::warning(ID, finding, fix.join("; ")))
}

fn udev(facts: &HostFacts) -> Check {
    const ID: &str = "vfio-udev";
    const FIX: &str = "echo 'SUBSYSTEM==\"vfio\", GROUP=\"kvm\", MODE=\"0666\"' > /etc/udev/rules.d/99-vfio.rules; udevadm control --reload; udevadm trigger --subsystem-match=vfio";
    match &facts.udev_rule {
        Some(rule) => Check::ok(ID, rule),
        None => Check::error(
            ID,
            "no udev rule for SUBSYSTEM vfio: QEMU, which runs as oneadmin, may not open /dev/vfio/*",
            FIX,
        ),
    }
}

fn filter(facts: &HostFacts) -> Vec<Check> {
    const ID: &str = "pci-filter";
    const SYNC: &str =
        "on the front-end as oneadmin: onehost sync -f, then onehost forceupdate HOST";
    let mend = format!(
        ":filter: '10de:*' in {FRONT_END_FILTER} on the front-end, then as oneadmin onehost sync -f and onehost forceupdate HOST"
    );
    let gpus: Vec<&PciDevice> = facts.pci.gpus().collect();
    let judged = |path: &str, text: &str, level: Level| {
        let config = PciConf::parse(text);
        let hidden: Vec<String> = gpus
            .iter()
            .filter(|gpu| !config.shows(gpu))
            .map(|gpu| gpu.address.to_string())
            .collect();
        let filter = config.filter.join(", ");
        if gpus.is_empty() || hidden.is_empty() {
            let shown = if gpus.is_empty() {
                "there is no GPU to match"
            } else {
                "it matches every GPU of this host"
            };
            let finding = format!("{path}: :filter: {filter}: {shown}");
            if let [_, ..] = config.device_name.as_slice() {
                let names = config.device_name.join(", ");
                let fix = "onehost show HOST lists what OpenNebula was told; :device_name: [] hides nothing";
                return Check::warning(
                    ID,
                    format!("{finding}; whether :device_name: {names} hides one is not known"),
                    fix,
                );
            }
            return Check::ok(ID, finding);
        }
        let by = if config.filter.iter().any(|filter| gpus.iter().any(|gpu| matches(filter, gpu))) {
            format!(":short_address: {}", config.short_address.join(", "))
        } else if filter.is_empty() {
            "no :filter:".into()
        } else {
            format!(":filter: {filter}")
        };
        Check::bad(
            ID,
            level,
            format!("{path} has {by}: OpenNebula is not told of {}", hidden.join(", ")),
            &mend,
        )
    };
    match (&facts.host_filter, &facts.front_end_filter) {
        (None, None) => {
            let finding =
                format!("there is no {HOST_FILTER}: OpenNebula has never monitored this host");
            vec![Check::error(ID, finding, SYNC)]
        }
        (Some(host), None) => vec![judged(HOST_FILTER, host, Level::Error)],
        (None, Some(front_end)) => vec![judged(FRONT_END_FILTER, front_end, Level::Error)],
        (Some(host), Some(front_end)) => {
            // What the host has is in force; what the front-end has comes with the next sync.
            vec![
                judged(HOST_FILTER, host, Level::Error),
                judged(FRONT_END_FILTER, front_end, Level::Warning),
            ]
        }
    }
}

/// What pci.conf says, as far as it decides whether a GPU is reported
/// (src/im_mad/remotes/node-probes.d/pci.rb of OpenNebula/one).
#[derive(Debug, Default, PartialEq, Eq)]
struct PciConf {
    filter: Vec<String>,
    short_address: Vec<String>,
    /// Patterns for the names of pci.ids, which are not known here.
    device_name: Vec<String>,
}

impl PciConf {
    /// Reads the YAML that pci.conf is: `:key: value`, `:key: [a, b]`, or a list of `- value`
    /// lines.
    fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        let mut key = "";
        for line in text.lines() {
            let line = line.split(" #").next().unwrap_or_default().trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let values = if let Some((name, value)) =
                line.strip_prefix(':').and_then(|rest| rest.split_once(':'))
            {
                key = match name {
                    "filter" => "filter",
                    "short_address" => "short_address",
                    "device_name" => "device_name",
                    _ => "",
                };
                value
            } else if let Some(item) = line.strip_prefix('-') {
                item
            } else {
                // `filter:` without its first colon is another key for Ruby.
                key = "";
                continue;
            };
            let values = values.trim().trim_start_matches('[').trim_end_matches(']').split(',');
            let values = values
                .map(|value| value.trim().trim_matches(['\'', '"']).trim())
                .filter(|value| !value.is_empty());
            match key {
                "filter" => conf.filter.extend(values.map(str::to_owned)),
                "short_address" => conf.short_address.extend(values.map(str::to_owned)),
                "device_name" => conf.device_name.extend(values.map(str::to_owned)),
                _ => {}
            }
        }
        conf
    }

    fn shows(&self, gpu: &PciDevice) -> bool {
        // The probe compares the texts, and lspci writes no domain.
        let address = gpu.address.to_string();
        let short = address.strip_prefix("0000:").unwrap_or(&address);
        let by_address = self.short_address.is_empty()
            || self.short_address.iter().any(|listed| listed == short);
        by_address && self.filter.iter().any(|filter| matches(filter, gpu))
    }
}

/// Whether an lspci(8) filter, `vendor:device:class`, matches; an empty part and `*` mean any.
fn matches(filter: &str, device: &PciDevice) -> bool {
    let mut parts = filter.split(':');
    let facts = [Some(device.vendor), device.device, Some(device.class >> 8)];
    facts.into_iter().all(|fact| match parts.next().map(str::trim) {
        None | Some("" | "*") => true,
        Some(part) => u32::from_str_radix(part, 16).is_ok_and(|number| fact == Some(number)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(address: &str, vendor: u32, class: u32, driver: &str) -> PciDevice {
        let driver = Some(driver.to_owned()).filter(|driver| !driver.is_empty());
        PciDevice {
            address: PciAddress::parse(address).unwrap(),
            vendor,
            device: Some(0x20f1),
            class,
            driver,
        }
    }

    fn good() -> HostFacts {
        let devices = vec![
            device("0000:e0:01.0", 0x8086, 0x060400, "pcieport"),
            device("0000:e1:00.0", 0x10de, 0x030000, "vfio-pci"),
            device("0000:e1:00.1", 0x10de, 0x040300, "vfio-pci"),
            device("0000:f1:00.0", 0x8086, 0x020000, "ixgbe"),
        ];
        let group =
            |address: &str, group: &str| (PciAddress::parse(address).unwrap(), group.to_owned());
        HostFacts {
            cmdline: Some("root=/dev/sda1 intel_iommu=on iommu=pt".into()),
            cpu_vendor: Some("GenuineIntel".into()),
            pci: PciFacts { devices, ..PciFacts::default() },
            groups: [("e0:01.0", "9"), ("e1:00.0", "9"), ("e1:00.1", "9"), ("f1:00.0", "10")]
                .map(|(a, g)| group(a, g))
                .into(),
            has_vfio_pci: true,
            overrides: ["0000:e1:00.0", "0000:e1:00.1"]
                .map(|address| (address.into(), "vfio-pci".into()))
                .into(),
            udev_rule: Some("99-vfio.rules: SUBSYSTEM==\"vfio\"".into()),
            host_filter: Some(":filter: '10de:*'\n".into()),
            front_end_filter: None,
            unread: Vec::new(),
        }
    }

    fn bad(change: impl FnOnce(&mut HostFacts)) -> Vec<(Level, &'static str, String, String)> {
        let mut facts = good();
        change(&mut facts);
        let checks = judge(&facts, Distribution::Debian)
            .into_iter()
            .filter(|check| check.level != Level::Ok);
        checks
            .map(|check| (check.level, check.id, check.finding, check.fix.unwrap_or_default()))
            .collect()
    }

    #[track_caller]
    fn one(change: impl FnOnce(&mut HostFacts), level: Level, id: &str, finding: &str, fix: &str) {
        let found = bad(change);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!((found[0].0, found[0].1), (level, id), "{found:#?}");
        assert!(found[0].2.contains(finding) && found[0].3.contains(fix), "{found:#?}");
    }

    #[test]
    fn a_good_host_has_no_finding_and_neither_has_one_with_an_amd_cpu() {
        assert_eq!(bad(|_| ()), []);
        let amd = bad(|facts| {
            facts.cpu_vendor = Some("AuthenticAMD".into());
            facts.cmdline = Some("quiet".into());
        });
        assert_eq!(amd, []);
    }

    #[test]
    fn each_fault_of_a_host_is_named_with_its_fix() {
        use Level::{Error, Warning};
        let no_groups = bad(|facts| {
            facts.cmdline = Some("quiet".into());
            facts.groups.clear();
        });
        let ids: Vec<_> = no_groups.iter().map(|(level, id, ..)| (*level, *id)).collect();
        assert_eq!(ids, [(Error, "iommu-kernel"), (Error, "iommu-groups")]);
        assert!(no_groups[0].3.contains("update-grub"), "{no_groups:?}");
        one(
            |facts| facts.cmdline = Some("intel_iommu=on,off amd_iommu=off".into()),
            Error,
            "iommu-kernel",
            "off",
            "reboot",
        );
        let only_pt = bad(|facts| {
            facts.cmdline = Some("quiet iommu=pt intel_iommu=sm_on".into());
            facts.groups.clear();
        });
        assert_eq!(only_pt[0].1, "iommu-kernel", "{only_pt:?}");
        let by_default = bad(|facts| facts.cmdline = Some("quiet".into()));
        assert_eq!(by_default, [], "groups are the proof, whatever the command line says");
        one(|facts| facts.cmdline = None, Warning, "iommu-kernel", "not known", "host");
        one(|facts| facts.has_vfio_pci = false, Error, "vfio-pci", "not loaded", "modprobe");
        one(
            |facts| facts.pci.devices[2].driver = Some("snd_hda_intel".into()),
            Error,
            "vfio-binding",
            "0000:e1:00.1 (sound, 10de:20f1, class 0403) is on the driver snd_hda_intel",
            "driverctl set-override 0000:e1:00.1 vfio-pci",
        );
        one(
            |facts| facts.pci.devices[1].driver = None,
            Error,
            "vfio-binding",
            "no driver",
            "set-override 0000:e1:00.0",
        );
        let in_group = |facts: &mut HostFacts| {
            facts.groups.insert(PciAddress::parse("f1:00.0").unwrap(), "9".into());
        };
        one(in_group, Error, "iommu-group-mates", "0000:f1:00.0", "slot");
        one(
            |facts| {
                in_group(facts);
                facts.pci.devices[3].driver = Some("vfio-pci".into());
            },
            Warning,
            "iommu-group-mates",
            "together",
            "slot",
        );
        one(
            |facts| facts.overrides.clear(),
            Warning,
            "driver-override",
            "0000:e1:00.0, 0000:e1:00.1",
            "set-override 0000:e1:00.1",
        );
        one(|facts| facts.udev_rule = None, Error, "vfio-udev", "no udev rule", "GROUP=\"kvm\"");
        let unread = |facts: &mut HostFacts| {
            facts.udev_rule = None;
            facts.unread = vec![("vfio-udev", "x: denied".into())];
        };
        one(unread, Warning, "vfio-udev", "not known: x: denied", "root");
        one(
            |facts| facts.host_filter = None,
            Error,
            "pci-filter",
            "never monitored",
            "onehost sync",
        );
        one(
            |facts| facts.host_filter = Some(":filter: '0:0'".into()),
            Error,
            "pci-filter",
            ":filter: 0:0",
            "10de:*",
        );
        one(
            |facts| facts.front_end_filter = Some(":filter: '0:0'".into()),
            Warning,
            "pci-filter",
            "remotes",
            "10de:*",
        );
        let address = ":filter: '10de:*'\n:short_address:\n  - '07:00.0'\n";
        one(
            |facts| facts.host_filter = Some(address.into()),
            Error,
            "pci-filter",
            ":short_address: 07:00.0",
            "10de:*",
        );
        let names = ":filter: '10de:*'\n:device_name: [ 'L4' ]\n";
        one(
            |facts| facts.host_filter = Some(names.into()),
            Warning,
            "pci-filter",
            "L4 hides",
            "onehost show",
        );
        let none = bad(|facts| facts.pci.devices.truncate(1));
        assert!(
            none.iter().any(|(level, id, ..)| (*level, *id) == (Error, "gpu-present")),
            "{none:?}"
        );
    }

    #[test]
    fn pci_conf_is_read_in_each_of_its_forms() {
        let gpu = device("e1:00.0", 0x10de, 0x030200, "");
        for (text, shows) in [
            (":filter: '10de:*'", true),
            (":filter: \"10DE:20f1\"  # the A100", true),
            ("# x\n:filter:\n  - '8086::0c03'\n  - '10de::0302'\n\n:short_address: []\n", true),
            (
                ":filter: [ '8086:*', '*:*' ]\n:short_address:\n- 'e1:00.0'\n:device_name:\n  - 'x'",
                true,
            ),
            (":filter: '8086:*,10de:*'", true),
            (":filter: '0:0' # no devices", false),
            (":filter: '10de:2235'", false),
            (":filter: '10de::0300'", false),
            (":device_name:\n  - '10de:*'", false),
            ("filter:\n  - '10de:*'", false),
            (":filter: '10de:*'\n:short_address:\n  - '0000:e1:00.0'\n", false),
            ("", false),
        ] {
            assert_eq!(PciConf::parse(text).shows(&gpu), shows, "{text}");
        }
    }

    #[test]
    fn the_udev_rule_is_told_from_a_comment_and_from_another_rule() {
        assert!(vfio_rule("# x\nSUBSYSTEM == \"vfio\", GROUP=\"kvm\", MODE=\"0666\"\n").is_some());
        assert!(
            vfio_rule(
                "# SUBSYSTEM==\"vfio\", GROUP=\"kvm\"\nSUBSYSTEM==\"block\", GROUP=\"disk\"\n"
            )
            .is_none()
        );
        assert!(vfio_rule("SUBSYSTEM==\"vfio\"\n").is_none());
    }
}
