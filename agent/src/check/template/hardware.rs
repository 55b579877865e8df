use super::parse::VectorAttribute;
use super::vm_template::VmTemplate;
use crate::check::{Check, Level};
use crate::values::{PciAddress, escape, parse_yes_no};

const ID_TOPOLOGY: &str = "topology";
/// Default of OVMF_UEFIS in OpenNebula 6.10.
const UEFI_PATH: &str = "/usr/share/OVMF/OVMF_CODE.fd";
const PIN_POLICIES: &[&str] = &["NONE", "THREAD", "SHARED", "CORE", "NODE_AFFINITY"];

impl VmTemplate {
    /// Checks the virtual hardware against the requirements of GPU passthrough and the frameworks.
    pub(super) fn check_hardware(&self) -> Vec<Check> {
        let level = if self.needs_gpu() { Level::Error } else { Level::Warning };
        let mut checks = self.check_machine(level);
        checks.push(self.check_firmware(level));
        checks.push(self.check_secure_boot());
        checks.push(self.check_cpu_model());
        checks.extend(self.check_pci());
        checks.extend(self.check_topology());
        checks.push(self.check_pci_hole());
        checks
    }

    fn check_machine(&self, level: Level) -> Vec<Check> {
        const FIX: &str = "OS=[MACHINE=\"q35\"]";
        let mut checks = Vec::new();
        if let Some(misplaced) = self.entry("FEATURES", "MACHINE") {
            let finding = "MACHINE is in FEATURES, where OpenNebula ignores it";
            checks.push(
                Check::error("machine", finding, format!("move it into OS: {FIX}"))
                    .at(misplaced.position.line),
            );
        }
        checks.push(match self.entry("OS", "MACHINE") {
            Some(entry) if is_q35(entry.value.trim()) => {
                Check::ok("machine", format!("MACHINE=\"{}\"", entry.value.trim()))
                    .at(entry.position.line)
            }
            Some(entry) => {
                let finding = format!(
                    "MACHINE=\"{}\" is not q35: the GPU gets no PCI Express slot",
                    escape(entry.value.trim())
                );
                Check::problem("machine", level, finding, FIX).at(entry.position.line)
            }
            None => {
                let finding = "OS has no MACHINE: the default is i440fx, where the GPU gets no PCI \
                               Express slot";
                Check::problem("machine", level, finding, FIX).at(self.line_of("OS"))
            }
        });
        checks
    }

    fn check_firmware(&self, level: Level) -> Check {
        let fix = format!(
            "OpenNebula 7: OS=[FIRMWARE=\"UEFI\"]; OpenNebula 6.10: OS=[FIRMWARE=\"{UEFI_PATH}\"]"
        );
        let Some(entry) = self.entry("OS", "FIRMWARE") else {
            let finding = "OS has no FIRMWARE: the VM boots with BIOS, which can neither \
                           map the memory of large GPUs nor boot the appliance image";
            return Check::problem("firmware", level, finding, fix).at(self.line_of("OS"));
        };
        let value = entry.value.trim();
        let check = match value {
            "UEFI" => Check::ok(
                "firmware",
                format!(
                    "FIRMWARE=\"UEFI\": for OpenNebula 7; 6.10 requires a path instead, \
                     \"{UEFI_PATH}\""
                ),
            ),
            path if path.starts_with('/') => Check::ok(
                "firmware",
                format!(
                    "FIRMWARE=\"{}\": a path of OVMF_UEFIS in vmm_exec_kvm.conf, as OpenNebula \
                     6.10 requires",
                    escape(path)
                ),
            ),
            other if other.eq_ignore_ascii_case("uefi") => Check::error(
                "firmware",
                format!("FIRMWARE=\"{}\" must be in upper case", escape(other)),
                fix,
            ),
            other => Check::problem(
                "firmware",
                level,
                format!("FIRMWARE=\"{}\" is not UEFI", escape(other)),
                fix,
            ),
        };
        check.at(entry.position.line)
    }

    fn check_secure_boot(&self) -> Check {
        const FIX: &str =
            "OS=[FIRMWARE_SECURE=\"NO\"], or sign NVIDIA's module in the image (mokutil --import)";
        match self.entry("OS", "FIRMWARE_SECURE") {
            None => Check::ok("secure-boot", "no FIRMWARE_SECURE: Secure Boot is off"),
            Some(entry) => match parse_yes_no(entry.value.trim()) {
                Ok(false) => {
                    Check::ok("secure-boot", "FIRMWARE_SECURE is NO").at(entry.position.line)
                }
                Ok(true) => {
                    let finding = "FIRMWARE_SECURE is YES: the kernel does not load an unsigned \
                                   NVIDIA module";
                    Check::warning("secure-boot", finding, FIX).at(entry.position.line)
                }
                Err(error) => {
                    let finding = format!("FIRMWARE_SECURE=\"{}\": {error}", escape(&entry.value));
                    Check::error("secure-boot", finding, FIX).at(entry.position.line)
                }
            },
        }
    }

    fn check_cpu_model(&self) -> Check {
        const FIX: &str = "CPU_MODEL=[MODEL=\"host-passthrough\"]";
        match self.entry("CPU_MODEL", "MODEL") {
            Some(entry) if entry.value.trim() == "host-passthrough" => {
                Check::ok("cpu-model", "MODEL=\"host-passthrough\"").at(entry.position.line)
            }
            Some(entry) => {
                let finding = format!(
                    "MODEL=\"{}\" hides CPU instructions of the host from the frameworks",
                    escape(&entry.value)
                );
                Check::warning("cpu-model", finding, FIX).at(entry.position.line)
            }
            None => {
                let finding = "there is no CPU_MODEL: the default is a QEMU CPU without AVX, \
                               on which TensorFlow does not start";
                Check::warning("cpu-model", finding, FIX).at(self.line_of("CPU_MODEL"))
            }
        }
    }

    fn check_pci(&self) -> Vec<Check> {
        const FIX: &str = "PCI=[VENDOR=\"10de\",CLASS=\"0302\"] (CLASS=\"0300\" for GeForce cards; \
                           onehost show HOST lists the devices)";
        let devices: Vec<&VectorAttribute> = self.pci_devices().collect();
        if let Some(misplaced) = self.single("PCI") {
            let finding = "PCI is not a vector attribute: OpenNebula assigns no device";
            return vec![Check::error("pci", finding, FIX).at(misplaced.position.line)];
        }
        if devices.is_empty() && self.is_gpu_disabled() {
            return vec![Check::ok(
                "pci",
                "no PCI attribute, and FL_GPU_ENABLED is NO: the node trains on the CPU",
            )];
        }
        if devices.is_empty() {
            let finding = "there is no PCI attribute: this VM gets no GPU";
            let level = if self.needs_gpu() { Level::Error } else { Level::Warning };
            return vec![Check::problem("pci", level, finding, FIX)];
        }
        devices.into_iter().map(|pci| check_pci_attribute(pci, FIX).at(pci.position.line)).collect()
    }

    fn check_topology(&self) -> Vec<Check> {
        let Some(topology) = self.vector("TOPOLOGY") else {
            return vec![Check::ok(
                ID_TOPOLOGY,
                "no TOPOLOGY: the VM is not pinned and cannot run on hosts with PIN_POLICY=PINNED",
            )];
        };
        let line = topology.position.line;
        let [sockets, cores, threads] =
            ["SOCKETS", "CORES", "THREADS"].map(|key| topology_count(topology, key));
        let mut checks: Vec<Check> =
            [&sockets, &cores, &threads].into_iter().filter_map(|it| it.clone().err()).collect();
        let policy = topology.value("PIN_POLICY").map(str::to_ascii_uppercase);
        let policy = policy.as_deref().unwrap_or("NONE");
        if !PIN_POLICIES.contains(&policy) {
            let finding = format!(
                "PIN_POLICY=\"{}\" must be one of {}",
                escape(policy),
                PIN_POLICIES.join(", ")
            );
            let fix = "TOPOLOGY=[PIN_POLICY=\"CORE\",SOCKETS=\"1\"]";
            checks.push(Check::error(ID_TOPOLOGY, finding, fix).at(line));
        } else if policy != "NONE" {
            let finding = format!(
                "PIN_POLICY={policy}: the VM can only run on hosts with PIN_POLICY=PINNED (onehost \
                 update HOST), where unpinned VMs cannot run"
            );
            checks.push(Check::ok(ID_TOPOLOGY, finding).at(line));
        } else if let (Ok(sockets), Ok(cores), Ok(threads)) = (sockets, cores, threads) {
            checks.push(self.check_unpinned_topology([sockets, cores, threads]).at(line));
        }
        checks
    }

    /// Checks the topology of a VM without pinning: OpenNebula requires that the product of its
    /// counts is VCPU.
    fn check_unpinned_topology(&self, counts: [Option<u64>; 3]) -> Check {
        if counts.iter().all(Option::is_none) {
            return Check::ok(ID_TOPOLOGY, "the VM is not pinned");
        }
        let vcpu =
            self.single("VCPU").map_or(Some(1), |entry| entry.value.trim().parse::<u64>().ok());
        let product = counts
            .into_iter()
            .try_fold(1_u64, |product, count| product.checked_mul(count.unwrap_or(1)));
        if let (Some(vcpu), Some(product)) = (vcpu, product)
            && vcpu == product
        {
            let finding = format!("SOCKETS × CORES × THREADS is VCPU ({vcpu})");
            return Check::ok(ID_TOPOLOGY, finding);
        }
        let finding = format!(
            "without a PIN_POLICY SOCKETS × CORES × THREADS ({}) must be VCPU ({})",
            product.map_or("too many".into(), |product| product.to_string()),
            vcpu.map_or("not a number".into(), |vcpu| vcpu.to_string()),
        );
        let cores = vcpu.unwrap_or(4);
        let fix = format!(
            "TOPOLOGY=[SOCKETS=\"1\",CORES=\"{cores}\",THREADS=\"1\"] with VCPU=\"{cores}\""
        );
        Check::error(ID_TOPOLOGY, finding, fix)
    }

    fn check_pci_hole(&self) -> Check {
        match self.entry("FEATURES", "PCIHOLE64") {
            None => Check::ok(
                "pci-hole64",
                "no PCIHOLE64; a GPU with a very large BAR (H100, H200, B200) may need \
                 FEATURES=[PCIHOLE64=\"1073741824\"] (in KiB, OpenNebula 7.2 and later)",
            ),
            Some(entry) => {
                let line = entry.position.line;
                match entry.value.trim().parse::<u64>() {
                    Ok(kib @ 1..) => {
                        let gib = kib >> 20;
                        Check::ok(
                            "pci-hole64",
                            format!("PCIHOLE64 is {gib} GiB (read by OpenNebula 7.2 and later)"),
                        )
                        .at(line)
                    }
                    _ => {
                        let finding = format!(
                            "PCIHOLE64=\"{}\" must be a number of KiB",
                            escape(&entry.value)
                        );
                        Check::error("pci-hole64", finding, "FEATURES=[PCIHOLE64=\"1073741824\"]")
                            .at(line)
                    }
                }
            }
        }
    }
}

/// Parses a count of TOPOLOGY; `None` if it is missing.
fn topology_count(topology: &VectorAttribute, key: &str) -> Result<Option<u64>, Check> {
    let Some(entry) = topology.entry(key) else { return Ok(None) };
    match entry.value.trim().parse::<u64>() {
        Ok(number @ 1..) => Ok(Some(number)),
        _ => {
            let finding = format!("{key}=\"{}\" must be a whole number > 0", escape(&entry.value));
            let fix = format!("TOPOLOGY=[{key}=\"1\"]");
            Err(Check::error(ID_TOPOLOGY, finding, fix).at(entry.position.line))
        }
    }
}

fn is_q35(machine: &str) -> bool {
    machine == "q35" || machine.starts_with("pc-q35-")
}

/// Keys of a PCI attribute that select a device by its identifiers.
const PCI_SELECTORS: [&str; 3] = ["VENDOR", "DEVICE", "CLASS"];
const PCI_ID: &str = "pci";

fn check_pci_attribute(pci: &VectorAttribute, fix: &str) -> Check {
    let selectors = PCI_SELECTORS.map(|key| pci.value(key));
    match pci.value("SHORT_ADDRESS") {
        Some(address) => check_pci_address(address, selectors, fix),
        None => check_pci_selectors(selectors, fix),
    }
}

fn check_pci_address(address: &str, selectors: [Option<&str>; 3], fix: &str) -> Check {
    if selectors.iter().any(Option::is_some) {
        let finding = "SHORT_ADDRESS and VENDOR, DEVICE or CLASS exclude each other: OpenNebula \
                       rejects the template";
        return Check::error(
            PCI_ID,
            finding,
            format!("PCI=[SHORT_ADDRESS=\"{}\"], or {fix}", escape(address)),
        );
    }
    // OpenNebula's notation has no domain (`onehost show`).
    let is_short = address.split(':').count() == 2 && PciAddress::parse(address).is_some();
    if !is_short {
        let finding = format!(
            "SHORT_ADDRESS=\"{}\" must be bus:device.function, such as e1:00.0",
            escape(address)
        );
        return Check::error(
            PCI_ID,
            finding,
            "PCI=[SHORT_ADDRESS=\"e1:00.0\"] with the ADDR in onehost show HOST, without the \
             domain",
        );
    }
    Check::ok(
        PCI_ID,
        format!(
            "the device {address} of the host; only oneadmin can create this template (PCI is a \
             restricted attribute)"
        ),
    )
}

fn check_pci_selectors(selectors: [Option<&str>; 3], fix: &str) -> Check {
    for (key, value) in PCI_SELECTORS.into_iter().zip(selectors) {
        if let Some(value) =
            value.filter(|value| u16::from_str_radix(value, 16).is_err() || value.len() > 4)
        {
            let finding = format!("{key}=\"{}\" must be four hexadecimal digits", escape(value));
            return Check::error(PCI_ID, finding, fix);
        }
    }
    let [vendor, device, class] =
        selectors.map(|text| text.and_then(|text| u16::from_str_radix(text, 16).ok()));
    match (vendor, device, class) {
        (None, None, None) => {
            Check::error(PCI_ID, "PCI names neither VENDOR, DEVICE, CLASS nor SHORT_ADDRESS", fix)
        }
        (Some(vendor), ..) if vendor != 0x10de => Check::warning(
            PCI_ID,
            format!(
                "VENDOR=\"{vendor:04x}\" is not NVIDIA (10de): the node cannot use this device"
            ),
            fix,
        ),
        (_, _, Some(class @ (0x0300 | 0x0302))) => {
            let what = if class == 0x0300 {
                "VGA controller, GeForce"
            } else {
                "3D controller, data-centre cards"
            };
            let vendor = if vendor.is_some() { "NVIDIA" } else { "any vendor" };
            Check::ok(
                PCI_ID,
                format!(
                    "a GPU of {vendor} (class {class:04x}: {what}); only oneadmin can create this \
                     template (PCI is a restricted attribute)"
                ),
            )
        }
        (_, _, Some(class)) => Check::error(
            PCI_ID,
            format!("CLASS=\"{class:04x}\" is not a GPU class (0302 3D controller, 0300 VGA)"),
            fix,
        ),
        (_, Some(device), None) => Check::ok(
            PCI_ID,
            format!("the device 10de:{device:04x}; only oneadmin can create this template"),
        ),
        (_, None, None) => {
            let finding = "VENDOR alone also matches the audio and USB functions of the cards: \
                           the VM may get one of those";
            Check::warning(PCI_ID, finding, fix)
        }
    }
}
