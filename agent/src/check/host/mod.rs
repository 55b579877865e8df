//! `check host`: diagnoses whether this KVM host can pass its NVIDIA GPUs through to VMs, and
//! whether OpenNebula offers them. Sources: Linux, Documentation/driver-api/vfio.rst; OpenNebula's
//! manual, PCI Passthrough.

use std::collections::BTreeMap;

use crate::check::{Check, Level};
use crate::gpu::pci::{PciDevice, PciFacts};
use crate::system::os_release::Distribution;
use crate::system::root::Root;
use crate::values::PciAddress;

/// Filter that OpenNebula's monitoring probe reads on the host.
const HOST_FILTER: &str = "/var/tmp/one/etc/im/kvm-probes.d/pci.conf";
/// The same file on the front-end, which `onehost sync` copies to the hosts.
const FRONT_END_FILTER: &str = "/var/lib/one/remotes/etc/im/kvm-probes.d/pci.conf";
/// Directories of udev rules (udev(7)).
const RULE_DIRS: [&str; 4] = [
    "/etc/udev/rules.d",
    "/run/udev/rules.d",
    "/usr/local/lib/udev/rules.d",
    "/usr/lib/udev/rules.d",
];
const RUN_AS_ROOT: &str = "run it as root, on the host itself";
/// PCI classes of host and PCI bridges, which VFIO leaves to their drivers.
const BRIDGE_CLASSES: [u32; 2] = [0x0600, 0x0604];

/// Facts about a host.
#[derive(Debug, Clone, Default)]
pub struct HostFacts {
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// `vendor_id` in /proc/cpuinfo.
    pub cpu_vendor: Option<String>,
    /// The PCI bus.
    pub pci: PciFacts,
    /// IOMMU group of each device in a group.
    pub groups: BTreeMap<PciAddress, String>,
    /// Whether the vfio-pci driver is loaded.
    pub has_vfio_pci: bool,
    /// Overrides of driverctl: device and driver.
    pub overrides: BTreeMap<String, String>,
    /// The udev rule for VFIO group devices: file and rule.
    pub udev_rule: Option<String>,
    /// Content of pci.conf on the host.
    pub host_filter: Option<String>,
    /// Content of pci.conf on the front-end.
    pub front_end_filter: Option<String>,
    /// Errors of failed reads, with the id of the check that needs the fact.
    pub unreadable: Vec<(&'static str, String)>,
}

/// Reads the facts of the host at `root`.
pub(crate) fn read(root: &Root) -> HostFacts {
    let mut facts = HostFacts { pci: crate::check::read_pci(root, "/sys"), ..HostFacts::default() };
    let mut unreadable = Vec::new();
    let mut text = |id, path: &str| {
        root.read(path).unwrap_or_else(|why| {
            unreadable.push((id, why.to_string()));
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
            unreadable.push((id, why.to_string()));
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
        root.exists("/sys/bus/pci/drivers/vfio-pci") || root.exists("/sys/module/vfio_pci");
    for name in list("driver-override", "/etc/driverctl.d") {
        match root.read(&format!("/etc/driverctl.d/{name}")) {
            Ok(driver) => {
                facts.overrides.insert(name, driver.unwrap_or_default().trim().to_owned());
            }
            Err(why) => unreadable.push(("driver-override", why.to_string())),
        }
    }
    for dir in RULE_DIRS {
        let names = match root.list(dir) {
            Ok(names) => names,
            Err(why) => {
                unreadable.push(("vfio-udev", why.to_string()));
                continue;
            }
        };
        for path in
            names.iter().filter(|name| name.ends_with(".rules")).map(|name| format!("{dir}/{name}"))
        {
            match root.read(&path) {
                Ok(text) => {
                    let rule = text
                        .as_deref()
                        .and_then(find_vfio_rule)
                        .map(|rule| format!("{path}: {rule}"));
                    facts.udev_rule = facts.udev_rule.take().or(rule);
                }
                Err(why) => unreadable.push(("vfio-udev", why.to_string())),
            }
        }
    }
    facts.unreadable = unreadable;
    facts
}

/// Returns the rule that sets group or mode of the VFIO group devices (SUBSYSTEM vfio).
fn find_vfio_rule(text: &str) -> Option<&str> {
    text.lines().map(str::trim).find(|line| {
        let compact: String = line.chars().filter(|c| !c.is_whitespace()).collect();
        // The rule of systemd matches only /dev/vfio/vfio (50-udev-default.rules:
        // KERNEL=="vfio/vfio").
        compact.contains("SUBSYSTEM==\"vfio\"")
            && (compact.contains("GROUP=") || compact.contains("MODE="))
            && !compact.starts_with('#')
    })
}

/// Evaluates the facts.
pub fn judge(facts: &HostFacts, distribution: Distribution) -> Vec<Check> {
    let mut checks = Vec::new();
    for why in &facts.pci.unreadable {
        checks.push(Check::unknown("pci", why, RUN_AS_ROOT));
    }
    for (id, why) in &facts.unreadable {
        checks.push(Check::unknown(id, why, RUN_AS_ROOT));
    }
    let mut judged = vec![iommu_kernel(facts, distribution), iommu_groups(facts), vfio_pci(facts)];
    judged.extend(gpu_functions(facts, distribution));
    judged.extend(group_isolation(facts));
    judged.extend(driver_overrides(facts));
    judged.push(udev_rule(facts));
    judged.extend(pci_filter(facts));
    // A fact that could not be read is reported as unknown above and is no problem in itself.
    let is_known = |check: &Check| {
        let is_unreadable = facts.unreadable.iter().any(|(id, _)| *id == check.id);
        check.level == Level::Ok
            || !(is_unreadable || (check.id == "gpu-present" && !facts.pci.unreadable.is_empty()))
    };
    checks.extend(judged.into_iter().filter(is_known));
    checks
}

fn vfio_pci(facts: &HostFacts) -> Check {
    const FIX: &str = "modprobe vfio-pci; echo vfio-pci > /etc/modules-load.d/vfio-pci.conf";
    match facts.has_vfio_pci {
        true => Check::ok("vfio-pci", "the vfio-pci driver is loaded"),
        false => Check::error("vfio-pci", "the vfio-pci driver is not loaded", FIX),
    }
}

/// Returns how to add an argument to the kernel command line.
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
            "{argument}: {GRUB} (RHEL, AlmaLinux: grubby --update-kernel=ALL \
             --args=\"{argument}\"), then reboot the host"
        ),
    }
}

fn iommu_kernel(facts: &HostFacts, distribution: Distribution) -> Check {
    const ID: &str = "iommu-kernel";
    let Some(cmdline) = &facts.cmdline else {
        return Check::unknown(ID, "/proc/cmdline is absent", RUN_AS_ROOT);
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
            format!("the kernel command line has {off}"),
            "remove it from the kernel command line and reboot the host",
        ),
        (Some("GenuineIntel"), None) if has("intel_iommu=on") => {
            let pt = if has("iommu=pt") {
                " iommu=pt"
            } else {
                "; iommu=pt would avoid the translation for the host's own devices"
            };
            Check::ok(ID, format!("intel_iommu=on{pt}"))
        }
        // Kernels with CONFIG_INTEL_IOMMU_DEFAULT_ON enable it; the groups prove that.
        (Some("GenuineIntel"), None) if !facts.groups.is_empty() => Check::ok(
            ID,
            "the kernel command line has no intel_iommu=on, but this kernel enables the IOMMU by \
             default",
        ),
        (Some("GenuineIntel"), None) => {
            let fix = kernel_argument(distribution, "intel_iommu=on iommu=pt");
            Check::error(
                ID,
                "the CPU is from Intel, and the kernel command line has no intel_iommu=on",
                fix,
            )
        }
        (Some("AuthenticAMD"), None) => Check::ok(ID, "AMD CPU: the IOMMU is enabled by default"),
        (Some(vendor), None) => Check::ok(
            ID,
            format!("{vendor} CPU: the kernel command line does not disable the IOMMU"),
        ),
        (None, None) => Check::unknown(
            ID,
            "/proc/cpuinfo has no CPU vendor",
            "see iommu-groups: if there are groups, the IOMMU is enabled",
        ),
    }
}

fn iommu_groups(facts: &HostFacts) -> Check {
    const ID: &str = "iommu-groups";
    const FIX: &str = "enable VT-d or AMD-Vi (IOMMU) in the firmware of the host, then reboot; \
                       dmesg | grep -e DMAR -e AMD-Vi shows errors";
    if facts.groups.is_empty() {
        return Check::error(
            ID,
            "/sys/kernel/iommu_groups is empty: no device can be passed through to a VM",
            FIX,
        );
    }
    let groups = facts.groups.values().collect::<std::collections::BTreeSet<_>>().len();
    let devices = facts.groups.len();
    match facts.pci.gpus().find(|gpu| !facts.groups.contains_key(&gpu.address)) {
        Some(gpu) => Check::error(ID, format!("GPU {} is in no IOMMU group", gpu.address), FIX),
        None => Check::ok(ID, format!("{groups} groups with {devices} devices")),
    }
}

/// Returns all functions of the cards with a GPU: display, audio, USB, UCSI.
fn card_functions(facts: &PciFacts) -> impl Iterator<Item = &PciDevice> {
    let is_gpu_function =
        |device: &&PciDevice| facts.gpus().any(|gpu| gpu.address.is_same_card(device.address));
    facts.devices.iter().filter(is_gpu_function)
}

fn class_name(device: &PciDevice) -> &'static str {
    match device.class >> 8 {
        0x0300 | 0x0302 | 0x0380 => "GPU",
        0x0403 => "audio",
        0x0c03 => "USB",
        0x0c80 => "serial bus (USB-C)",
        0x0600 | 0x0604 => "bridge",
        _ => "device",
    }
}

fn gpu_functions(facts: &HostFacts, distribution: Distribution) -> Vec<Check> {
    const ID: &str = "vfio-binding";
    let install = distribution.install_command("driverctl", "driverctl");
    if facts.pci.gpus().next().is_none() {
        let finding = "no NVIDIA GPU on the PCI bus of this host (vendor 10de, class 03xx)";
        return vec![Check::error(
            "gpu-present",
            finding,
            "check lspci -d 10de:, the seating and power of the card, and the slot settings in the \
             firmware",
        )];
    }
    let gpus: Vec<String> =
        facts.pci.gpus().map(|gpu| format!("{} ({})", gpu.address, gpu.ids())).collect();
    let mut checks = vec![Check::ok("gpu-present", gpus.join(", "))];
    for function in card_functions(&facts.pci) {
        let (address, ids, what) = (function.address, function.ids(), class_name(function));
        checks.push(match function.driver.as_deref() {
            Some("vfio-pci") => {
                Check::ok(ID, format!("{address} ({what}, {ids}) is bound to vfio-pci"))
            }
            driver => {
                let driver =
                    driver.map_or("no driver".into(), |driver| format!("the driver {driver}"));
                let finding =
                    format!("{address} ({what}, {ids}) is bound to {driver}, not to vfio-pci");
                let vgpu = if function.driver.as_deref() == Some("nvidia") {
                    "; a card that is shared as vGPUs (PCI=[…,PROFILE=…]) stays bound to nvidia"
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

/// Checks the IOMMU group of each GPU. Every other device in the group is passed through with the
/// GPU, or prevents the passthrough.
fn group_isolation(facts: &HostFacts) -> Vec<Check> {
    const ID: &str = "iommu-group-isolation";
    const FIX: &str =
        "move one of the two cards to another slot, or enable ACS in the firmware of the host";
    let mut checks = Vec::new();
    for gpu in facts.pci.gpus() {
        let Some(group) = facts.groups.get(&gpu.address) else { continue };
        let others = facts
            .groups
            .iter()
            .filter(|(address, other)| *other == group && !address.is_same_card(gpu.address));
        let mut others_in_group = 0;
        for (address, _) in others {
            let Some(device) = facts.pci.at(*address) else { continue };
            if BRIDGE_CLASSES.contains(&(device.class >> 8)) {
                continue;
            }
            others_in_group += 1;
            let (ids, what) = (device.ids(), class_name(device));
            let driver = device.driver.as_deref().unwrap_or("no driver");
            let finding = format!(
                "IOMMU group {group} of GPU {} also has {address} ({what}, {ids}), bound to \
                 {driver}",
                gpu.address
            );
            checks.push(if device.driver.as_deref() == Some("vfio-pci") {
                Check::warning(
                    ID,
                    format!("{finding}: both can only be passed through to the same VM"),
                    FIX,
                )
            } else {
                Check::error(
                    ID,
                    format!("{finding}: the GPU cannot be passed through to a VM"),
                    FIX,
                )
            });
        }
        if others_in_group == 0 {
            checks.push(Check::ok(
                ID,
                format!("IOMMU group {group} of GPU {} has only the card and bridges", gpu.address),
            ));
        }
    }
    checks
}

/// Checks the overrides of driverctl. Without an override the first matching driver binds the card
/// at the next boot.
fn driver_overrides(facts: &HostFacts) -> Option<Check> {
    const ID: &str = "driver-override";
    facts.pci.gpus().next()?;
    let is_set_by_kernel =
        facts.cmdline.as_ref().is_some_and(|cmdline| cmdline.contains("vfio-pci.ids="));
    let missing: Vec<String> = card_functions(&facts.pci)
        .map(|function| function.address.to_string())
        // driverctl names the file after the address, with or without the bus
        // (`pci-0000:e1:00.0`).
        .filter(|address| {
            let set =
                facts.overrides.iter().find(|(name, _)| name.trim_start_matches("pci-") == address);
            set.is_none_or(|(_, driver)| driver != "vfio-pci")
        })
        .collect();
    if missing.is_empty() || is_set_by_kernel {
        let source =
            if is_set_by_kernel { "vfio-pci.ids on the kernel command line" } else { "driverctl" };
        return Some(Check::ok(ID, format!("{source} binds the cards to vfio-pci at every boot")));
    }
    let fix: Vec<String> = missing
        .iter()
        .map(|address| format!("driverctl set-override {address} vfio-pci"))
        .collect();
    let finding = format!(
        "driverctl has no override to vfio-pci for {}: after a reboot they may be unavailable to \
         VMs",
        missing.join(", ")
    );
    Some(Check::warning(ID, finding, fix.join("; ")))
}

fn udev_rule(facts: &HostFacts) -> Check {
    const ID: &str = "vfio-udev";
    const FIX: &str = "echo 'SUBSYSTEM==\"vfio\", GROUP=\"kvm\", MODE=\"0666\"' > \
                       /etc/udev/rules.d/99-vfio.rules; udevadm control --reload; \
                       udevadm trigger --subsystem-match=vfio";
    match &facts.udev_rule {
        Some(rule) => Check::ok(ID, rule),
        None => Check::error(
            ID,
            "no udev rule for SUBSYSTEM vfio: QEMU, which runs as oneadmin, cannot open \
             /dev/vfio/*",
            FIX,
        ),
    }
}

fn pci_filter(facts: &HostFacts) -> Vec<Check> {
    const ID: &str = "pci-filter";
    const SYNC: &str =
        "on the front-end as oneadmin: onehost sync -f, then onehost forceupdate HOST";
    let fix = format!(
        ":filter: '10de:*' in {FRONT_END_FILTER} on the front-end, then as oneadmin \
         onehost sync -f and onehost forceupdate HOST"
    );
    let gpus: Vec<&PciDevice> = facts.pci.gpus().collect();
    let judge_filter = |path: &str, text: &str, level: Level| {
        let config = PciConf::parse(text);
        let hidden: Vec<String> = gpus
            .iter()
            .filter(|gpu| !config.includes(gpu))
            .map(|gpu| gpu.address.to_string())
            .collect();
        let filter = config.filter.join(", ");
        if gpus.is_empty() || hidden.is_empty() {
            let coverage = if gpus.is_empty() {
                "there is no GPU to match"
            } else {
                "it matches every GPU of this host"
            };
            let finding = format!("{path}: :filter: {filter}: {coverage}");
            if let [_, ..] = config.device_name.as_slice() {
                let names = config.device_name.join(", ");
                let fix = "onehost show HOST lists the devices that OpenNebula sees; :device_name: \
                           [] hides nothing";
                return Check::warning(
                    ID,
                    format!("{finding}; unknown whether :device_name: {names} hides one"),
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
        Check::problem(
            ID,
            level,
            format!("{path} has {by}: OpenNebula does not see {}", hidden.join(", ")),
            &fix,
        )
    };
    match (&facts.host_filter, &facts.front_end_filter) {
        (None, None) => {
            let finding =
                format!("{HOST_FILTER} is absent: OpenNebula has never monitored this host");
            vec![Check::error(ID, finding, SYNC)]
        }
        (Some(host), None) => vec![judge_filter(HOST_FILTER, host, Level::Error)],
        (None, Some(front_end)) => vec![judge_filter(FRONT_END_FILTER, front_end, Level::Error)],
        (Some(host), Some(front_end)) => {
            // The file on the host is in effect now, the one on the front-end after the next sync.
            vec![
                judge_filter(HOST_FILTER, host, Level::Error),
                judge_filter(FRONT_END_FILTER, front_end, Level::Warning),
            ]
        }
    }
}

/// The settings in pci.conf that decide whether a GPU is reported
/// (src/im_mad/remotes/node-probes.d/pci.rb of OpenNebula/one).
#[derive(Debug, Default, PartialEq, Eq)]
struct PciConf {
    filter: Vec<String>,
    short_address: Vec<String>,
    /// Patterns for the names in pci.ids, which are not evaluated here.
    device_name: Vec<String>,
}

impl PciConf {
    /// Parses the YAML of pci.conf: `:key: value`, `:key: [a, b]`, or a list of `- value` lines.
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
                // `filter:` without the leading colon is a different key in Ruby.
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

    fn includes(&self, gpu: &PciDevice) -> bool {
        // The probe compares strings, and lspci writes no domain.
        let address = gpu.address.to_string();
        let short = address.strip_prefix("0000:").unwrap_or(&address);
        let by_address = self.short_address.is_empty()
            || self.short_address.iter().any(|listed| listed == short);
        by_address && self.filter.iter().any(|filter| matches(filter, gpu))
    }
}

/// Returns whether an lspci(8) filter, `vendor:device:class`, matches; an empty part and `*` match
/// anything.
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
    use crate::check::test_support::{Problem, assert_only, problems};

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

    fn healthy_host() -> HostFacts {
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
            unreadable: Vec::new(),
        }
    }

    fn problems_after(change: impl FnOnce(&mut HostFacts)) -> Vec<Problem> {
        let mut facts = healthy_host();
        change(&mut facts);
        problems(judge(&facts, Distribution::Debian))
    }

    #[track_caller]
    fn one(change: impl FnOnce(&mut HostFacts), level: Level, id: &str, finding: &str, fix: &str) {
        assert_only(&problems_after(change), level, id, finding, fix);
    }

    #[test]
    fn healthy_host_has_no_problem() {
        assert_eq!(problems_after(|_| ()), []);
        let amd = problems_after(|facts| {
            facts.cpu_vendor = Some("AuthenticAMD".into());
            facts.cmdline = Some("quiet".into());
        });
        assert_eq!(amd, []);
    }

    #[test]
    fn each_host_fault_has_its_fix() {
        use Level::{Error, Warning};
        let no_groups = problems_after(|facts| {
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
        let only_pt = problems_after(|facts| {
            facts.cmdline = Some("quiet iommu=pt intel_iommu=sm_on".into());
            facts.groups.clear();
        });
        assert_eq!(only_pt[0].1, "iommu-kernel", "{only_pt:?}");
        let by_default = problems_after(|facts| facts.cmdline = Some("quiet".into()));
        assert_eq!(by_default, [], "groups prove that the IOMMU is enabled");
        one(|facts| facts.cmdline = None, Warning, "iommu-kernel", "unknown", "host");
        one(|facts| facts.has_vfio_pci = false, Error, "vfio-pci", "not loaded", "modprobe");
        one(
            |facts| facts.pci.devices[2].driver = Some("snd_hda_intel".into()),
            Error,
            "vfio-binding",
            "0000:e1:00.1 (audio, 10de:20f1, class 0403) is bound to the driver snd_hda_intel",
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
        one(in_group, Error, "iommu-group-isolation", "0000:f1:00.0", "slot");
        one(
            |facts| {
                in_group(facts);
                facts.pci.devices[3].driver = Some("vfio-pci".into());
            },
            Warning,
            "iommu-group-isolation",
            "the same VM",
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
        let unreadable = |facts: &mut HostFacts| {
            facts.udev_rule = None;
            facts.unreadable = vec![("vfio-udev", "x: denied".into())];
        };
        one(unreadable, Warning, "vfio-udev", "unknown: x: denied", "root");
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
        let none = problems_after(|facts| facts.pci.devices.truncate(1));
        assert!(
            none.iter().any(|(level, id, ..)| (*level, *id) == (Error, "gpu-present")),
            "{none:?}"
        );
    }

    #[test]
    fn pci_conf_is_parsed_in_each_notation() {
        let gpu = device("e1:00.0", 0x10de, 0x030200, "");
        for (text, is_included) in [
            (":filter: '10de:*'", true),
            (":filter: \"10DE:20f1\"  # the A100", true),
            ("# x\n:filter:\n  - '8086::0c03'\n  - '10de::0302'\n\n:short_address: []\n", true),
            (
                ":filter: [ '8086:*', '*:*' ]\n:short_address:\n- 'e1:00.0'\n:device_name:\n  - \
                 'x'",
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
            assert_eq!(PciConf::parse(text).includes(&gpu), is_included, "{text}");
        }
    }

    #[test]
    fn comments_and_other_rules_are_not_the_udev_rule() {
        assert!(
            find_vfio_rule("# x\nSUBSYSTEM == \"vfio\", GROUP=\"kvm\", MODE=\"0666\"\n").is_some()
        );
        assert!(
            find_vfio_rule(
                "# SUBSYSTEM==\"vfio\", GROUP=\"kvm\"\nSUBSYSTEM==\"block\", GROUP=\"disk\"\n"
            )
            .is_none()
        );
        assert!(find_vfio_rule("SUBSYSTEM==\"vfio\"\n").is_none());
    }
}
