//! `check template`: an OpenNebula VM template against what a SuperNode on a passed-through GPU
//! needs; for a service template of OneFlow see service.rs. Pure: text in, checks out. What
//! OpenNebula takes is in its manual (Virtual Machine Template Reference; PCI Passthrough) and, for
//! 6.10 and 7.x, in src/vm and src/parsers of OpenNebula/one.

mod parse;
mod service;

pub use parse::{Attribute, Pair, Place, SyntaxError, Vector, parse};

use super::{Check, Level};
use crate::config::Kind;
use crate::config::variables;
use crate::opennebula::templates::READY_SCRIPT;
use crate::values::PciAddress;
use crate::values::{escape, parse_yes_no};

/// What OVMF_UEFIS of OpenNebula 6.10 has by default.
const UEFI_PATH: &str = "/usr/share/OVMF/OVMF_CODE.fd";
/// The types of user inputs (src/cli/one_helper.rb of OpenNebula/one).
const INPUT_TYPES: &[&str] = &[
    "text",
    "text64",
    "password",
    "number",
    "number-float",
    "range",
    "range-float",
    "list",
    "list-multiple",
    "boolean",
    "fixed",
];

/// Checks the text of a VM template, or of a service template of OneFlow, which is JSON.
pub fn judge(text: &str) -> Vec<Check> {
    if text.trim_start().starts_with('{') {
        return service::judge(text);
    }
    let attributes = match parse(text) {
        Ok(attributes) => attributes,
        Err(error) => {
            let fix = "mend that place: KEY=\"value\", KEY=[A=\"x\",B=\"y\"], a quote inside of quotes as \\\"";
            return vec![
                Check::error(
                    "syntax",
                    format!("column {}: {}", error.place.column, error.message),
                    fix,
                )
                .at(error.place.line),
            ];
        }
    };
    let template = Template(attributes);
    let count = template.0.len();
    let mut checks = vec![Check::ok("syntax", format!("{count} attributes"))];
    checks.extend(template.twice());
    let bad = if template.wants_gpu() { Level::Error } else { Level::Warning };
    checks.extend(template.machine(bad));
    checks.push(template.firmware(bad));
    checks.push(template.secure_boot());
    checks.push(template.cpu_model());
    checks.extend(template.pci());
    checks.extend(template.topology());
    checks.push(template.large_bars());
    checks.extend(template.context());
    checks.extend(template.variables());
    checks.extend(template.user_inputs());
    checks
}

struct Template(Vec<Attribute>);

impl Template {
    fn vectors(&self, name: &'static str) -> impl Iterator<Item = &Vector> {
        self.0.iter().filter_map(move |attribute| match attribute {
            Attribute::Vector(vector) if vector.name == name => Some(vector),
            _ => None,
        })
    }

    fn vector(&self, name: &'static str) -> Option<&Vector> {
        self.vectors(name).next()
    }

    fn single(&self, name: &str) -> Option<&Pair> {
        self.0.iter().find_map(|attribute| match attribute {
            Attribute::Single(pair) if pair.name == name && !pair.value.trim().is_empty() => {
                Some(pair)
            }
            _ => None,
        })
    }

    /// The pair `key` of the vector `name`, where it has a value.
    fn pair(&self, name: &'static str, key: &str) -> Option<&Pair> {
        self.vector(name)?.pair(key).filter(|pair| !pair.value.trim().is_empty())
    }

    /// The line of the vector, or the first: where something is to be added.
    fn line_of(&self, name: &'static str) -> usize {
        self.vector(name).map_or(1, |vector| vector.place.line)
    }

    /// Whether this VM is to use a GPU: it asks for one, or its node does.
    fn wants_gpu(&self) -> bool {
        self.gpu_is(true) || self.pci_count() > 0
    }

    /// Whether CONTEXT switches the GPU on, or off; a reference counts as on.
    fn gpu_is(&self, on: bool) -> bool {
        ["FL_GPU_ENABLED", "ONEAPP_FL_GPU_ENABLED"]
            .iter()
            .filter_map(|name| self.pair("CONTEXT", name))
            .any(|pair| {
                parse_yes_no(pair.value.trim()) == Ok(on) || (on && is_reference(&pair.value))
            })
    }

    /// Of two keys of one name in brackets OpenNebula keeps the first.
    fn twice(&self) -> Vec<Check> {
        let vectors = self.0.iter().filter_map(|attribute| match attribute {
            Attribute::Vector(vector) => Some(vector),
            Attribute::Single(_) => None,
        });
        vectors
            .flat_map(|vector| {
                let again = |(at, pair): (usize, &Pair)| {
                    vector.pairs[..at].iter().any(|before| before.name == pair.name)
                };
                vector.pairs.iter().enumerate().filter(move |(at, pair)| again((*at, pair))).map(
                    move |(_, pair)| {
                        let (vector, key) = (&vector.name, &pair.name);
                        let finding = format!(
                            "{key} is in {vector} a second time: OpenNebula keeps the first"
                        );
                        Check::warning("syntax", finding, "delete one of the two")
                            .at(pair.place.line)
                    },
                )
            })
            .collect()
    }

    fn machine(&self, bad: Level) -> Vec<Check> {
        const FIX: &str = "OS=[MACHINE=\"q35\"]";
        let mut checks = Vec::new();
        if let Some(misplaced) = self.pair("FEATURES", "MACHINE") {
            let finding = "MACHINE is in FEATURES, where OpenNebula never reads it";
            checks.push(
                Check::error("machine", finding, format!("move it into OS: {FIX}"))
                    .at(misplaced.place.line),
            );
        }
        checks.push(match self.pair("OS", "MACHINE") {
            Some(pair) if is_q35(pair.value.trim()) => {
                Check::ok("machine", format!("MACHINE=\"{}\"", pair.value.trim())).at(pair.place.line)
            }
            Some(pair) => {
                let finding =
                    format!("MACHINE=\"{}\" is not q35: the GPU gets no PCI Express slot", escape(pair.value.trim()));
                Check::problem("machine", bad, finding, FIX).at(pair.place.line)
            }
            None => {
                let finding = "OS has no MACHINE: the VM becomes an i440fx, where the GPU gets no PCI Express slot";
                Check::problem("machine", bad, finding, FIX).at(self.line_of("OS"))
            }
        });
        checks
    }

    fn firmware(&self, bad: Level) -> Check {
        let fix = format!(
            "OpenNebula 7: OS=[FIRMWARE=\"UEFI\"]; OpenNebula 6.10: OS=[FIRMWARE=\"{UEFI_PATH}\"]"
        );
        let Some(pair) = self.pair("OS", "FIRMWARE") else {
            let finding = "OS has no FIRMWARE: the VM boots by BIOS, which cannot map the memory of large GPUs, nor boot our image";
            return Check::problem("firmware", bad, finding, fix).at(self.line_of("OS"));
        };
        let value = pair.value.trim();
        let check = match value {
            "UEFI" => Check::ok(
                "firmware",
                format!(
                    "FIRMWARE=\"UEFI\": for OpenNebula 7; 6.10 refuses it and wants a path, \"{UEFI_PATH}\""
                ),
            ),
            path if path.starts_with('/') => Check::ok(
                "firmware",
                format!(
                    "FIRMWARE=\"{}\": a path of OVMF_UEFIS in vmm_exec_kvm.conf, as OpenNebula 6.10 wants it",
                    escape(path)
                ),
            ),
            other if other.eq_ignore_ascii_case("uefi") => Check::error(
                "firmware",
                format!("FIRMWARE=\"{}\" must be written in capitals", escape(other)),
                fix,
            ),
            other => Check::problem(
                "firmware",
                bad,
                format!("FIRMWARE=\"{}\" is not UEFI", escape(other)),
                fix,
            ),
        };
        check.at(pair.place.line)
    }

    fn secure_boot(&self) -> Check {
        const FIX: &str =
            "OS=[FIRMWARE_SECURE=\"NO\"], or sign NVIDIA's module in the image (mokutil --import)";
        match self.pair("OS", "FIRMWARE_SECURE") {
            None => Check::ok("secure-boot", "no FIRMWARE_SECURE: Secure Boot is off"),
            Some(pair) => match parse_yes_no(pair.value.trim()) {
                Ok(false) => Check::ok("secure-boot", "FIRMWARE_SECURE is NO").at(pair.place.line),
                Ok(true) => {
                    let finding = "FIRMWARE_SECURE is YES: the kernel loads no NVIDIA module that is not signed";
                    Check::warning("secure-boot", finding, FIX).at(pair.place.line)
                }
                Err(accepted) => {
                    let finding =
                        format!("FIRMWARE_SECURE=\"{}\": {accepted}", escape(&pair.value));
                    Check::error("secure-boot", finding, FIX).at(pair.place.line)
                }
            },
        }
    }

    fn cpu_model(&self) -> Check {
        const FIX: &str = "CPU_MODEL=[MODEL=\"host-passthrough\"]";
        match self.pair("CPU_MODEL", "MODEL") {
            Some(pair) if pair.value.trim() == "host-passthrough" => {
                Check::ok("cpu-model", "MODEL=\"host-passthrough\"").at(pair.place.line)
            }
            Some(pair) => {
                let finding = format!(
                    "MODEL=\"{}\" hides instructions of the host's CPU from the frameworks",
                    escape(&pair.value)
                );
                Check::warning("cpu-model", finding, FIX).at(pair.place.line)
            }
            None => {
                let finding = "there is no CPU_MODEL: the VM gets QEMU's own CPU, without AVX, on which TensorFlow does not start";
                Check::warning("cpu-model", finding, FIX).at(self.line_of("CPU_MODEL"))
            }
        }
    }

    fn pci(&self) -> Vec<Check> {
        const FIX: &str = "PCI=[VENDOR=\"10de\",CLASS=\"0302\"] (CLASS=\"0300\" for GeForce cards; onehost show HOST lists the devices)";
        let devices: Vec<&Vector> = self.vectors("PCI").filter(|pci| !is_nic(pci)).collect();
        if let Some(misplaced) = self.single("PCI") {
            let finding = "PCI is not a vector: OpenNebula passes nothing through";
            return vec![Check::error("pci", finding, FIX).at(misplaced.place.line)];
        }
        if devices.is_empty() && self.gpu_is(false) {
            return vec![Check::ok(
                "pci",
                "no PCI attribute, and FL_GPU_ENABLED is NO: a node on the CPU",
            )];
        }
        if devices.is_empty() {
            let finding = "there is no PCI attribute: this VM gets no GPU";
            let level = if self.wants_gpu() { Level::Error } else { Level::Warning };
            return vec![Check::problem("pci", level, finding, FIX)];
        }
        devices.into_iter().map(|pci| judge_pci(pci, FIX).at(pci.place.line)).collect()
    }

    fn topology(&self) -> Vec<Check> {
        const PINNED_HOSTS: &str = "it can only run on hosts with PIN_POLICY=PINNED (onehost update HOST), and an unpinned VM cannot run there";
        const POLICIES: &[&str] = &["NONE", "THREAD", "SHARED", "CORE", "NODE_AFFINITY"];
        let Some(topology) = self.vector("TOPOLOGY") else {
            return vec![Check::ok(
                "topology",
                "no TOPOLOGY: the VM is not pinned, and cannot run on hosts with PIN_POLICY=PINNED",
            )];
        };
        let line = topology.place.line;
        let mut checks = Vec::new();
        let mut number = |key: &str| match topology.pair(key) {
            None => Some(None),
            Some(pair) => match pair.value.trim().parse::<u64>() {
                Ok(number @ 1..) => Some(Some(number)),
                _ => {
                    let finding =
                        format!("{key}=\"{}\" must be a whole number > 0", escape(&pair.value));
                    checks.push(
                        Check::error("topology", finding, format!("TOPOLOGY=[{key}=\"1\"]"))
                            .at(pair.place.line),
                    );
                    None
                }
            },
        };
        let counts = ["SOCKETS", "CORES", "THREADS"].map(&mut number);
        let policy = topology.value("PIN_POLICY").map(str::to_ascii_uppercase);
        let policy = policy.as_deref().unwrap_or("NONE");
        if !POLICIES.contains(&policy) {
            let finding =
                format!("PIN_POLICY=\"{}\" must be one of {}", escape(policy), POLICIES.join(", "));
            checks.push(
                Check::error("topology", finding, "TOPOLOGY=[PIN_POLICY=\"CORE\",SOCKETS=\"1\"]")
                    .at(line),
            );
            return checks;
        }
        if policy != "NONE" {
            checks.push(
                Check::ok("topology", format!("PIN_POLICY={policy}: {PINNED_HOSTS}")).at(line),
            );
            return checks;
        }
        let [Some(sockets), Some(cores), Some(threads)] = counts else { return checks };
        if let (None, None, None) = (sockets, cores, threads) {
            checks.push(Check::ok("topology", "the VM is not pinned").at(line));
            return checks;
        }
        let vcpu =
            self.single("VCPU").map_or(Some(1), |pair| pair.value.trim().parse::<u64>().ok());
        let product = [sockets, cores, threads]
            .into_iter()
            .try_fold(1_u64, |product, count| product.checked_mul(count.unwrap_or(1)));
        checks.push(
            match (vcpu, product) {
                (Some(vcpu), Some(product)) if vcpu == product => {
                    Check::ok("topology", format!("SOCKETS, CORES and THREADS make the {vcpu} of VCPU"))
                }
                (vcpu, product) => {
                    let finding = format!(
                        "without a PIN_POLICY SOCKETS × CORES × THREADS ({}) must be VCPU ({})",
                        product.map_or("too many".into(), |product| product.to_string()),
                        vcpu.map_or("not a number".into(), |vcpu| vcpu.to_string()),
                    );
                    let cores = vcpu.unwrap_or(4);
                    let fix = format!("TOPOLOGY=[SOCKETS=\"1\",CORES=\"{cores}\",THREADS=\"1\"] with VCPU=\"{cores}\"");
                    Check::error("topology", finding, fix)
                }
            }
            .at(line),
        );
        checks
    }

    fn large_bars(&self) -> Check {
        match self.pair("FEATURES", "PCIHOLE64") {
            None => Check::ok(
                "pci-hole64",
                "no PCIHOLE64; a GPU with a very large BAR (H100, H200, B200) may need FEATURES=[PCIHOLE64=\"1073741824\"] (in KiB, OpenNebula 7.2 and later)",
            ),
            Some(pair) => {
                let line = pair.place.line;
                match pair.value.trim().parse::<u64>() {
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
                            escape(&pair.value)
                        );
                        Check::error("pci-hole64", finding, "FEATURES=[PCIHOLE64=\"1073741824\"]")
                            .at(line)
                    }
                }
            }
        }
    }

    fn context(&self) -> Vec<Check> {
        let Some(context) = self.vector("CONTEXT") else {
            let fix = format!(
                "CONTEXT=[TOKEN=\"YES\",REPORT_READY=\"YES\",READY_SCRIPT_PATH=\"{READY_SCRIPT}\",NETWORK=\"YES\",FL_GPU_ENABLED=\"YES\"]"
            );
            return vec![Check::error(
                "context",
                "there is no CONTEXT: the VM gets neither network nor variables",
                fix,
            )];
        };
        let line = context.place.line;
        let is_yes =
            |key: &str| context.value(key).is_some_and(|value| value.eq_ignore_ascii_case("YES"));
        let mut checks = Vec::new();
        let has_address = ["FL_SUPERLINK_ADDRESS", "ONEAPP_FL_SUPERLINK_ADDRESS"]
            .iter()
            .any(|name| context.value(name).is_some());
        checks.push(if is_yes("TOKEN") {
            Check::ok("context-token", "TOKEN=\"YES\"").at(line)
        } else {
            let finding = "CONTEXT has no TOKEN=\"YES\": OneGate refuses this VM, so the SuperLink is not discovered and nothing is published";
            let level = if has_address { Level::Warning } else { Level::Error };
            Check::problem("context-token", level, finding, "CONTEXT=[TOKEN=\"YES\"]").at(line)
        });
        let ready = context.pair("READY_SCRIPT_PATH").filter(|pair| !pair.value.trim().is_empty());
        checks.push(match (is_yes("REPORT_READY"), ready) {
            (true, Some(pair)) if pair.value.trim() == READY_SCRIPT => {
                Check::ok("context-ready", format!("READY is reported once {READY_SCRIPT} says so")).at(pair.place.line)
            }
            (true, Some(pair)) => {
                let finding = format!("READY_SCRIPT_PATH=\"{}\" is not the script of the package", escape(&pair.value));
                let fix = format!("READY_SCRIPT_PATH=\"{READY_SCRIPT}\"");
                Check::warning("context-ready", finding, fix).at(pair.place.line)
            }
            (true, None) => {
                let finding = "REPORT_READY without READY_SCRIPT_PATH: OpenNebula is told READY even where the node did not start";
                let fix = format!("CONTEXT=[READY_SCRIPT_PATH=\"{READY_SCRIPT}\"]");
                Check::warning("context-ready", finding, fix).at(line)
            }
            (false, _) => {
                let finding = "CONTEXT has no REPORT_READY=\"YES\": OneFlow does not wait for this node";
                let fix = format!("CONTEXT=[REPORT_READY=\"YES\",READY_SCRIPT_PATH=\"{READY_SCRIPT}\"]");
                Check::warning("context-ready", finding, fix).at(line)
            }
        });
        if !is_yes("NETWORK") {
            let finding = "CONTEXT has no NETWORK=\"YES\": the VM's network cards get no address";
            checks.push(
                Check::warning("context-network", finding, "CONTEXT=[NETWORK=\"YES\"]").at(line),
            );
        }
        if self.pci_count() > 0 && !self.gpu_is(true) {
            let finding = "the VM gets a PCI device, and FL_GPU_ENABLED is not YES: the node would train on the CPU";
            checks.push(
                Check::warning("context-gpu", finding, "CONTEXT=[FL_GPU_ENABLED=\"YES\"]").at(line),
            );
        }
        checks
    }

    fn pci_count(&self) -> usize {
        self.vectors("PCI").filter(|pci| !is_nic(pci)).count()
    }

    /// The agent's variables in CONTEXT, by the table that the agent itself reads them by.
    fn variables(&self) -> Vec<Check> {
        let pairs = self.vector("CONTEXT").map_or(&[][..], |context| &context.pairs);
        let ours = pairs
            .iter()
            .filter(|pair| variables::find(&pair.name).is_some() || looks_like_ours(&pair.name));
        let mut checks = Vec::new();
        let mut fine = 0;
        for pair in ours {
            let before = checks.len();
            checks.extend(unknown_name(&pair.name, pair.place.line));
            let value = pair.value.trim();
            if let Some(name) = referred(value) {
                let is_input =
                    self.pair("USER_INPUTS", name).is_some() || self.single(name).is_some();
                if !is_input {
                    let finding = format!(
                        "{}=\"{}\" refers to a user input that is not there",
                        pair.name,
                        escape(value)
                    );
                    let fix = format!(
                        "add {name} to USER_INPUTS (supernode-agent variables --format user-inputs), or write the value here"
                    );
                    checks.push(Check::warning("variable", finding, fix).at(pair.place.line));
                }
            } else if !is_reference(value) {
                checks
                    .extend(wrong_value(&pair.name, value).map(|check| check.at(pair.place.line)));
            }
            fine += usize::from(checks.len() == before);
        }
        checks.insert(
            0,
            Check::ok("variable", format!("{fine} variables of the agent in CONTEXT are right")),
        );
        checks
    }

    fn user_inputs(&self) -> Vec<Check> {
        let Some(inputs) = self.vector("USER_INPUTS") else { return Vec::new() };
        let mut checks = Vec::new();
        let mut fine = 0;
        for pair in &inputs.pairs {
            let before = checks.len();
            checks.extend(judge_input(pair).map(|check| check.at(pair.place.line)));
            checks.extend(unknown_name(&pair.name, pair.place.line));
            let is_ours = variables::find(&pair.name).is_some();
            let is_used = self.vector("CONTEXT").is_some_and(|context| {
                context
                    .pairs
                    .iter()
                    .any(|used| referred(used.value.trim()) == Some(pair.name.as_str()))
            });
            if is_ours && !is_used {
                let name = &pair.name;
                let finding = format!(
                    "the user input {name} does not reach the VM: CONTEXT does not refer to it"
                );
                checks.push(
                    Check::warning("user-input", finding, format!("CONTEXT=[{name}=\"${name}\"]"))
                        .at(pair.place.line),
                );
            }
            fine += usize::from(checks.len() == before);
        }
        if let Some(order) = self.single("INPUTS_ORDER") {
            for name in order.value.split(',').map(str::trim).filter(|name| !name.is_empty()) {
                if inputs.pair(&name.to_ascii_uppercase()).is_none() {
                    let finding =
                        format!("INPUTS_ORDER names {}, which is not in USER_INPUTS", escape(name));
                    checks.push(
                        Check::warning("user-input", finding, "delete it there")
                            .at(order.place.line),
                    );
                }
            }
        }
        checks.insert(
            0,
            Check::ok(
                "user-input",
                format!("{fine} of {} user inputs are right", inputs.pairs.len()),
            ),
        );
        checks
    }
}

/// A PCI attribute for a network card has TYPE="NIC" (Virtual Machine Template Reference).
fn is_nic(pci: &Vector) -> bool {
    pci.value("TYPE").is_some_and(|kind| kind.eq_ignore_ascii_case("NIC"))
}

fn is_q35(machine: &str) -> bool {
    machine == "q35" || machine.starts_with("pc-q35-")
}

fn judge_pci(pci: &Vector, fix: &str) -> Check {
    const ID: &str = "pci";
    let selectors = ["VENDOR", "DEVICE", "CLASS"];
    let [vendor, device, class] = selectors.map(|key| pci.value(key));
    if let Some(address) = pci.value("SHORT_ADDRESS") {
        if [vendor, device, class].iter().any(Option::is_some) {
            let finding = "SHORT_ADDRESS and VENDOR, DEVICE or CLASS exclude each other: OpenNebula refuses the template";
            return Check::error(
                ID,
                finding,
                format!("PCI=[SHORT_ADDRESS=\"{}\"], or {fix}", escape(address)),
            );
        }
        // OpenNebula's own form has no domain (`onehost show`).
        let is_short = address.split(':').count() == 2 && PciAddress::parse(address).is_some();
        if !is_short {
            let finding = format!(
                "SHORT_ADDRESS=\"{}\" must be bus:device.function, like e1:00.0",
                escape(address)
            );
            return Check::error(
                ID,
                finding,
                "PCI=[SHORT_ADDRESS=\"e1:00.0\"] with the ADDR that onehost show HOST lists, without the domain",
            );
        }
        return Check::ok(
            ID,
            format!(
                "the device {address} of the host; to be imported by oneadmin (PCI is a restricted attribute)"
            ),
        );
    }
    for (key, value) in selectors.into_iter().zip([vendor, device, class]) {
        if let Some(value) =
            value.filter(|value| u16::from_str_radix(value, 16).is_err() || value.len() > 4)
        {
            let finding = format!("{key}=\"{}\" must be four hexadecimal digits", escape(value));
            return Check::error(ID, finding, fix);
        }
    }
    let number = |text: Option<&str>| text.and_then(|text| u16::from_str_radix(text, 16).ok());
    match (number(vendor), number(device), number(class)) {
        (None, None, None) => {
            Check::error(ID, "PCI names neither VENDOR, DEVICE, CLASS nor SHORT_ADDRESS", fix)
        }
        (Some(vendor), ..) if vendor != 0x10de => Check::warning(
            ID,
            format!(
                "VENDOR=\"{vendor:04x}\" is not NVIDIA (10de): this device is no GPU for the node"
            ),
            fix,
        ),
        (_, _, Some(class @ (0x0300 | 0x0302))) => {
            let what = if class == 0x0300 {
                "VGA controller, GeForce"
            } else {
                "3D controller, data-centre cards"
            };
            let vendor = if vendor.is_some() { "NVIDIA" } else { "any vendor's" };
            Check::ok(
                ID,
                format!(
                    "a GPU of {vendor} (class {class:04x}: {what}); to be imported by oneadmin (PCI is a restricted attribute)"
                ),
            )
        }
        (_, _, Some(class)) => Check::error(
            ID,
            format!("CLASS=\"{class:04x}\" is no class of a GPU (0302 3D controller, 0300 VGA)"),
            fix,
        ),
        (_, Some(device), None) => {
            Check::ok(ID, format!("the device 10de:{device:04x}; to be imported by oneadmin"))
        }
        (_, None, None) => {
            let finding = "VENDOR alone also means the sound and USB functions of the cards: the VM may get one of those";
            Check::warning(ID, finding, fix)
        }
    }
}

/// `$NAME`, `$NIC[…]`, or text with such a thing in it: what it becomes is known when the VM is
/// made.
fn is_reference(value: &str) -> bool {
    value.contains('$')
}

/// The name in `$NAME` or `${NAME}`.
fn referred(value: &str) -> Option<&str> {
    let name = value.strip_prefix('$')?;
    let name = name.strip_prefix('{').and_then(|name| name.strip_suffix('}')).unwrap_or(name);
    let is_name =
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    is_name.then_some(name)
}

fn looks_like_ours(name: &str) -> bool {
    name.starts_with("FL_") || name.starts_with("ONEAPP_FL_")
}

fn unknown_name(name: &str, line: usize) -> Option<Check> {
    if !looks_like_ours(name) || variables::find(name).is_some() {
        return None;
    }
    let finding = format!("{} is not a known variable and has no effect", escape(name));
    let fix = match variables::nearest(name) {
        Some(known) => format!("did you mean {known}?"),
        None => "delete it; supernode-agent variables lists what there is".into(),
    };
    Some(Check::warning("variable", finding, fix).at(line))
}

fn wrong_value(name: &str, value: &str) -> Option<Check> {
    let kind = variables::find(name)?.kind;
    if value.is_empty() {
        return None;
    }
    let accepted = kind.parse(value).err()?;
    let fix = format!("{name}=\"{}\"", example(kind));
    Some(Check::error("variable", format!("{name}={}: {accepted}", kind.quote(value)), fix))
}

/// A value that is accepted.
fn example(kind: Kind) -> String {
    match kind {
        Kind::YesNo => "YES".into(),
        Kind::Choice(words) => words.first().copied().unwrap_or_default().into(),
        Kind::Count(least) => least.max(1).to_string(),
        Kind::Fraction => "0.5".into(),
        Kind::Version => "1.31.0".into(),
        Kind::Image => "flwr/supernode:1.31.0".into(),
        Kind::HostPort => "superlink.example:9092".into(),
        Kind::Devices => "all".into(),
        Kind::NodeConfig => "partition-id=0 num-partitions=2".into(),
        Kind::CaBundle => "…, the output of base64 -w0 ca.crt".into(),
    }
}

/// `M|type|description`, or with parameters and default: three fields or five.
fn judge_input(pair: &Pair) -> Option<Check> {
    let name = &pair.name;
    let fix = "NAME=\"O|text|what it is\", or with parameters and default NAME=\"O|list|what it is|a,b|a\"";
    let wrong = |what: String| Some(Check::error("user-input", format!("{name}: {what}"), fix));
    let fields: Vec<&str> = pair.value.split('|').map(str::trim).collect();
    let (need, kind) = (fields[0], fields.get(1).copied().unwrap_or_default());
    if !matches!(fields.len(), 3 | 5) {
        return wrong(format!(
            "it has {} fields, divided by |, and must have 3 or 5",
            fields.len()
        ));
    }
    if !matches!(need, "M" | "O") {
        return wrong(format!(
            "its first field is '{}' and must be M (mandatory) or O (optional)",
            escape(need)
        ));
    }
    if !INPUT_TYPES.contains(&kind) {
        return wrong(format!(
            "'{}' is no type of a user input ({})",
            escape(kind),
            INPUT_TYPES.join(", ")
        ));
    }
    // There is no default then that an empty answer could stand for (parse_user_inputs of
    // src/cli/one_helper.rb).
    if fields.len() == 3 && need == "O" && (kind.starts_with("number") || kind == "text64") {
        let fate = if kind == "text64" { "dies of it" } else { "asks again for ever" };
        let finding = format!(
            "{name}: left empty, onetemplate instantiate {fate}, for a {kind} needs five fields"
        );
        let fix = format!("{name}=\"O|{kind}|{}| |\"", escape(fields[2]));
        return Some(Check::warning("user-input", finding, fix));
    }
    let (parameters, default) =
        (fields.get(3).copied().unwrap_or_default(), fields.get(4).copied().unwrap_or_default());
    if kind == "boolean" && parse_yes_no(default).is_err() {
        let fix = format!("{name}=\"{need}|boolean|{}| |NO\"", escape(fields[2]));
        return Some(Check::error(
            "user-input",
            format!("{name}: a boolean needs a default, YES or NO"),
            fix,
        ));
    }
    if kind.starts_with("list") && parameters.is_empty() {
        return wrong("a list needs its options, divided by commas, in the fourth field".into());
    }
    if kind.starts_with("range") && !parameters.contains("..") {
        return wrong("a range needs its limits, min..max, in the fourth field".into());
    }
    if kind.starts_with("number") && !default.is_empty() && default.parse::<f64>().is_err() {
        return wrong(format!("the default '{}' is not a number", escape(default)));
    }
    wrong_value(name, default).map(|check| Check { id: "user-input", ..check })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::opennebula::templates::{NodeKind, vm_template};

    const GOOD: &str = r#"# A SuperNode on one GPU
NAME="supernode"
CPU="8"
VCPU="8"
MEMORY="32768"
OS=[ MACHINE="q35", FIRMWARE="UEFI", FIRMWARE_SECURE="NO" ]
CPU_MODEL=[ MODEL="host-passthrough" ]
PCI=[ VENDOR="10de", CLASS="0302" ]
TOPOLOGY=[ PIN_POLICY="CORE", SOCKETS="1" ]
CONTEXT=[
  NETWORK="YES",
  TOKEN="YES",
  REPORT_READY="YES",
  READY_SCRIPT_PATH="/opt/flower/scripts/health-check.sh",
  FL_GPU_ENABLED="$FL_GPU_ENABLED",
  FL_GPU_MEMORY_FRACTION="0.8" ]
USER_INPUTS=[ FL_GPU_ENABLED="O|boolean|Use the GPU| |YES" ]
INPUTS_ORDER="FL_GPU_ENABLED"
"#;

    fn bad(text: &str) -> Vec<(Level, &'static str, Option<usize>, String)> {
        let checks = judge(text).into_iter().filter(|check| check.level != Level::Ok);
        checks
            .inspect(|check| {
                assert!(check.fix.as_ref().is_some_and(|fix| !fix.is_empty()), "{check:?}")
            })
            .map(|check| (check.level, check.id, check.line, check.finding))
            .collect()
    }

    /// The good template with `old` replaced has exactly one finding, of this kind, at this line.
    #[track_caller]
    fn one(old: &str, new: &str, level: Level, id: &str, line: usize, words: &str) {
        assert!(GOOD.contains(old), "{old}");
        let found = bad(&GOOD.replace(old, new));
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!((found[0].0, found[0].1, found[0].2), (level, id, Some(line)), "{found:#?}");
        assert!(found[0].3.contains(words), "{found:#?}");
    }

    #[test]
    fn a_good_template_has_no_finding() {
        assert_eq!(bad(GOOD), []);
        assert_eq!(bad(&GOOD.replace("\"UEFI\"", "\"/usr/share/OVMF/OVMF_CODE.fd\"")), []);
        assert_eq!(
            bad(&GOOD.replace("VENDOR=\"10de\", CLASS=\"0302\"", "SHORT_ADDRESS=\"e1:00.0\"")),
            []
        );
        assert_eq!(bad(&GOOD.replace("\"0302\"", "\"0300\"")), []);
    }

    #[test]
    fn what_gpu_passthrough_needs_is_named_with_its_line() {
        use Level::{Error, Warning};
        one("MACHINE=\"q35\", ", "", Error, "machine", 6, "i440fx");
        one("\"q35\"", "\"pc\"", Error, "machine", 6, "is not q35");
        one(
            "TOPOLOGY",
            "FEATURES=[MACHINE=\"q35\"]\nTOPOLOGY",
            Error,
            "machine",
            9,
            "never reads it",
        );
        one("FIRMWARE=\"UEFI\", ", "", Error, "firmware", 6, "BIOS");
        one("\"UEFI\"", "\"BIOS\"", Error, "firmware", 6, "is not UEFI");
        one("\"UEFI\"", "\"uefi\"", Error, "firmware", 6, "capitals");
        one(
            "FIRMWARE_SECURE=\"NO\"",
            "FIRMWARE_SECURE=\"YES\"",
            Warning,
            "secure-boot",
            6,
            "signed",
        );
        one("host-passthrough", "qemu64", Warning, "cpu-model", 7, "qemu64");
        one(
            "CPU_MODEL=[ MODEL=\"host-passthrough\" ]\n",
            "\n",
            Warning,
            "cpu-model",
            1,
            "no CPU_MODEL",
        );
        one(
            "CLASS=\"0302\" ]",
            "CLASS=\"0302\", SHORT_ADDRESS=\"e1:00.0\" ]",
            Error,
            "pci",
            8,
            "exclude each other",
        );
        one(
            "VENDOR=\"10de\", CLASS=\"0302\"",
            "SHORT_ADDRESS=\"0000:e1:00.0\"",
            Error,
            "pci",
            8,
            "bus:device.function",
        );
        one(", CLASS=\"0302\"", "", Warning, "pci", 8, "VENDOR alone");
        one("\"0302\"", "\"0403\"", Error, "pci", 8, "no class of a GPU");
        one("\"10de\"", "\"nvidia\"", Error, "pci", 8, "hexadecimal");
        one("\"10de\"", "\"1002\"", Warning, "pci", 8, "not NVIDIA");
        one(
            "PCI=[ VENDOR=\"10de\", CLASS=\"0302\" ]",
            "PCI=\"10de\"",
            Error,
            "pci",
            8,
            "not a vector",
        );
        one("TOPOLOGY", "FEATURES=[PCIHOLE64=\"1T\"]\nTOPOLOGY", Error, "pci-hole64", 9, "KiB");
        one("\"CORE\", SOCKETS=\"1\"", "\"HARD\"", Error, "topology", 9, "must be one of");
        one(
            "PIN_POLICY=\"CORE\", SOCKETS=\"1\"",
            "SOCKETS=\"2\",CORES=\"2\"",
            Error,
            "topology",
            9,
            "(4) must be VCPU (8)",
        );
        one("SOCKETS=\"1\"", "SOCKETS=\"x\"", Error, "topology", 9, "whole number");
        for (counts, product) in
            [("SOCKETS=\"2\",CORES=\"2\"", "(4)"), ("SOCKETS=\"2\",CORES=\"8\"", "(16)")]
        {
            one("PIN_POLICY=\"CORE\", SOCKETS=\"1\"", counts, Error, "topology", 9, product);
        }
        assert_eq!(
            bad(&GOOD.replace("PIN_POLICY=\"CORE\", SOCKETS=\"1\"", "SOCKETS=\"2\",CORES=\"4\"")),
            []
        );
    }

    #[test]
    fn the_context_is_checked_by_the_table_of_variables() {
        use Level::{Error, Warning};
        one("TOKEN=\"YES\"", "TOKEN=\"NO\"", Error, "context-token", 10, "OneGate");
        one(
            "  TOKEN=\"YES\"",
            "  FL_SUPERLINK_ADDRESS=\"h:1\"",
            Warning,
            "context-token",
            10,
            "OneGate",
        );
        one("health-check.sh", "other.sh", Warning, "context-ready", 14, "not the script");
        one(
            "REPORT_READY=\"YES\"",
            "REPORT_READY=\"NO\"",
            Warning,
            "context-ready",
            10,
            "OneFlow does not wait",
        );
        one("NETWORK=\"YES\"", "NETWORK=\"NO\"", Warning, "context-network", 10, "no address");
        one("\"0.8\"", "\"1.5\"", Error, "variable", 16, "FL_GPU_MEMORY_FRACTION='1.5': must be");
        one(
            "FL_GPU_MEMORY_FRACTION=",
            "FL_GPU_MEMORY_FRACTON=",
            Warning,
            "variable",
            16,
            "not a known variable",
        );
        one(
            "\"0.8\"",
            "\"$FL_FRACTION\"",
            Warning,
            "variable",
            16,
            "refers to a user input that is not there",
        );
        let hint = judge(&GOOD.replace("FL_GPU_MEMORY_FRACTION=", "FL_GPU_MEMORY_FRACTON="));
        assert!(
            hint.iter()
                .any(|check| check.fix.as_deref() == Some("did you mean FL_GPU_MEMORY_FRACTION?"))
        );
        let secret = judge(
            &GOOD.replace("FL_GPU_MEMORY_FRACTION=\"0.8\"", "FL_SSL_CA_CERTFILE=\"hunter2\""),
        );
        assert!(!format!("{secret:?}").contains("hunter2"));
        let off = bad(&GOOD.replace("FL_GPU_ENABLED=\"$FL_GPU_ENABLED\"", "FL_GPU_ENABLED=\"NO\""));
        assert!(
            off.iter().any(|(level, id, ..)| (*level, *id) == (Warning, "context-gpu")),
            "{off:?}"
        );
    }

    #[test]
    fn user_inputs_have_three_fields_or_five_and_a_boolean_has_a_default() {
        use Level::{Error, Warning};
        const INPUT: &str = "O|boolean|Use the GPU| |YES";
        one(INPUT, "O|boolean|Use the GPU", Error, "user-input", 17, "a boolean needs a default");
        one(INPUT, "O|boolean|Use the GPU| ", Error, "user-input", 17, "it has 4 fields");
        one(INPUT, "X|boolean|Use the GPU| |YES", Error, "user-input", 17, "must be M");
        let number = "O|number|Use the GPU";
        one(
            INPUT,
            number,
            Warning,
            "user-input",
            17,
            "left empty, onetemplate instantiate asks again for ever",
        );
        one(INPUT, "O|text64|Use the GPU", Warning, "user-input", 17, "dies of it");
        one(INPUT, "O|bool|Use the GPU| |YES", Error, "user-input", 17, "no type");
        one(INPUT, "O|list|Use the GPU||", Error, "user-input", 17, "options");
        one(INPUT, "O|text|Use the GPU| |maybe", Error, "user-input", 17, "FL_GPU_ENABLED='maybe'");
        one("INPUTS_ORDER=\"", "INPUTS_ORDER=\"OTHER,", Warning, "user-input", 18, "OTHER");
        one(
            "|YES\" ]",
            "|YES\",\n  FL_LOG_LEVEL=\"O|text|Level\" ]",
            Warning,
            "user-input",
            18,
            "does not reach the VM",
        );
    }

    #[test]
    fn what_the_agent_prints_for_a_template_is_right() {
        for kind in [NodeKind::Gpu, NodeKind::Cpu] {
            let found = bad(&vm_template(kind));
            let wrong = found
                .iter()
                .filter(|(_, id, ..)| !matches!(*id, "machine" | "firmware" | "cpu-model" | "pci"));
            assert_eq!(
                wrong.collect::<Vec<_>>(),
                Vec::<&(Level, &str, Option<usize>, String)>::new()
            );
        }
    }

    #[test]
    fn a_template_for_the_cpu_is_warned_about_and_one_that_wants_a_gpu_fails_without() {
        let cpu = "CONTEXT=[TOKEN=\"YES\"]\n";
        assert!(bad(cpu).iter().all(|(level, ..)| *level == Level::Warning), "{:#?}", bad(cpu));
        let gpu = "CONTEXT=[TOKEN=\"YES\",FL_GPU_ENABLED=\"YES\"]\n";
        assert!(bad(gpu).iter().any(|(level, id, ..)| (*level, *id) == (Level::Error, "pci")));
    }

    #[test]
    fn bad_syntax_is_the_only_finding_and_has_its_place() {
        let found = bad("OS=[MACHINE=\"q35\"\n  FIRMWARE=\"UEFI\"]\n");
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].1, found[0].2), ("syntax", Some(2)));
        assert!(found[0].3.starts_with("column 3: "), "{found:?}");
    }

    proptest! {
        #[test]
        fn no_template_makes_it_panic(
            text in "((OS|PCI|CONTEXT|TOPOLOGY|USER_INPUTS|FEATURES|VCPU|FL_GPU)(=|=\\[)[A-Z]{0,3}=?\"?[a-z0-9|$,\u{e9}]{0,9}\"?\\]?\n?){0,8}"
        ) {
            judge(&text);
        }
    }

    /// All that is found of this kind: the level, and the words.
    fn found(text: &str, id: &str) -> Vec<(Level, String)> {
        judge(text)
            .into_iter()
            .filter(|check| check.id == id)
            .map(|check| (check.level, check.finding))
            .collect()
    }

    #[test]
    fn what_is_right_is_told_as_well() {
        let told: Vec<(Option<usize>, String)> = judge(GOOD)
            .into_iter()
            .map(|check| (check.line, format!("{}: {}", check.id, check.finding)))
            .collect();
        let expected = [
            (None, "syntax: 11 attributes"),
            (Some(6), "machine: MACHINE=\"q35\""),
            (
                Some(6),
                "firmware: FIRMWARE=\"UEFI\": for OpenNebula 7; 6.10 refuses it and wants a path, \"/usr/share/OVMF/OVMF_CODE.fd\"",
            ),
            (Some(6), "secure-boot: FIRMWARE_SECURE is NO"),
            (Some(7), "cpu-model: MODEL=\"host-passthrough\""),
            (
                Some(8),
                "pci: a GPU of NVIDIA (class 0302: 3D controller, data-centre cards); to be imported by oneadmin (PCI is a restricted attribute)",
            ),
            (
                Some(9),
                "topology: PIN_POLICY=CORE: it can only run on hosts with PIN_POLICY=PINNED (onehost update HOST), and an unpinned VM cannot run there",
            ),
            (
                None,
                "pci-hole64: no PCIHOLE64; a GPU with a very large BAR (H100, H200, B200) may need FEATURES=[PCIHOLE64=\"1073741824\"] (in KiB, OpenNebula 7.2 and later)",
            ),
            (Some(10), "context-token: TOKEN=\"YES\""),
            (
                Some(14),
                "context-ready: READY is reported once /opt/flower/scripts/health-check.sh says so",
            ),
            (None, "variable: 2 variables of the agent in CONTEXT are right"),
            (None, "user-input: 1 of 1 user inputs are right"),
        ];
        assert_eq!(told, expected.map(|(line, text)| (line, text.to_owned())));
        let with = |old: &str, new: &str, id| {
            let found = found(&GOOD.replace(old, new), id);
            let [(Level::Ok, told)] = &found[..] else { panic!("{found:#?}") };
            told.clone()
        };
        assert_eq!(with("\"q35\"", "\"pc-q35-7.2\"", "machine"), "MACHINE=\"pc-q35-7.2\"");
        assert!(
            with("\"UEFI\"", "\"/path\"", "firmware")
                .starts_with("FIRMWARE=\"/path\": a path of OVMF_UEFIS")
        );
        assert!(
            with("\"0302\"", "\"0300\"", "pci")
                .contains("NVIDIA (class 0300: VGA controller, GeForce)")
        );
        assert!(with("VENDOR=\"10de\", ", "", "pci").contains("a GPU of any vendor's (class 0302"));
        assert!(
            with("CLASS=\"0302\"", "DEVICE=\"20b5\"", "pci").starts_with("the device 10de:20b5;")
        );
        let bars = with("TOPOLOGY", "FEATURES=[PCIHOLE64=\"1073741824\"]\nTOPOLOGY", "pci-hole64");
        assert_eq!(bars, "PCIHOLE64 is 1024 GiB (read by OpenNebula 7.2 and later)");
        assert_eq!(
            with("PIN_POLICY=\"CORE\", SOCKETS=\"1\"", "PIN_POLICY=\"\"", "topology"),
            "the VM is not pinned"
        );
        assert_eq!(
            with("PIN_POLICY=\"CORE\", SOCKETS=\"1\"", "SOCKETS=\"2\",THREADS=\"4\"", "topology"),
            "SOCKETS, CORES and THREADS make the 8 of VCPU"
        );
        // OpenNebula gives a VM one of them where nothing is said.
        let one = GOOD.replace("VCPU=\"8\"\n", "").replace("PIN_POLICY=\"CORE\", ", "");
        assert_eq!(found(&one, "topology")[0].1, "SOCKETS, CORES and THREADS make the 1 of VCPU");
    }

    #[test]
    fn how_a_gpu_is_named_is_checked_to_its_last_digit() {
        let pci =
            |pairs: &str| found(&GOOD.replace("VENDOR=\"10de\", CLASS=\"0302\"", pairs), "pci");
        for (pairs, level, words) in [
            (
                "VENDOR=\"010de\", CLASS=\"0302\"",
                Level::Error,
                "VENDOR=\"010de\" must be four hexadecimal digits",
            ),
            ("DEVICE=\"xyz\"", Level::Error, "DEVICE=\"xyz\" must be four"),
            ("NAME=\"gpu\"", Level::Error, "names neither VENDOR, DEVICE, CLASS nor SHORT_ADDRESS"),
            ("SHORT_ADDRESS=\"e1:00\"", Level::Error, "must be bus:device.function"),
            ("SHORT_ADDRESS=\"e1:00.0\", DEVICE=\"20b5\"", Level::Error, "exclude each other"),
            ("SHORT_ADDRESS=\"e1:00.0\"", Level::Ok, "the device e1:00.0 of the host"),
            ("DEVICE=\"20b5\"", Level::Ok, "the device 10de:20b5"),
        ] {
            let found = pci(pairs);
            assert!(
                found.len() == 1 && found[0].0 == level && found[0].1.contains(words),
                "{pairs}: {found:#?}"
            );
        }
        // A network card is passed through by the same attribute, and is no GPU.
        let nic = pci("TYPE=\"nic\", VENDOR=\"15b3\"");
        assert_eq!(nic, [(Level::Error, "there is no PCI attribute: this VM gets no GPU".into())]);
        let two = found(
            &GOOD.replace("PCI=[", "PCI=[ TYPE=\"NIC\", SHORT_ADDRESS=\"05:00.0\" ]\nPCI=["),
            "pci",
        );
        assert_eq!(two.len(), 1, "{two:#?}");
    }

    #[test]
    fn whether_a_gpu_is_wanted_is_told_by_the_context_or_by_a_device() {
        let level = |text: &str, id| found(text, id)[0].0;
        let context = |variable: &str| format!("CONTEXT=[TOKEN=\"YES\"{variable}]\n");
        for (text, machine, pci) in [
            (context(""), Level::Warning, Level::Warning),
            (context(",FL_GPU_ENABLED=\"NO\""), Level::Warning, Level::Ok),
            (context(",FL_GPU_ENABLED=\"$GPU\""), Level::Error, Level::Error),
            (context(",ONEAPP_FL_GPU_ENABLED=\"on\""), Level::Error, Level::Error),
            (context("") + "PCI=[CLASS=\"0302\"]\n", Level::Error, Level::Ok),
        ] {
            assert_eq!((level(&text, "machine"), level(&text, "pci")), (machine, pci), "{text}");
        }
        let idle = |text: &str| found(text, "context-gpu").len();
        assert_eq!(idle(&(context("") + "PCI=[CLASS=\"0302\"]\n")), 1, "it would train on the CPU");
        assert_eq!(idle(&(context(",FL_GPU_ENABLED=\"YES\"") + "PCI=[CLASS=\"0302\"]\n")), 0);
        assert_eq!(idle(&context("")), 0);
        assert_eq!(idle(&(context("") + "PCI=[TYPE=\"NIC\",CLASS=\"0200\"]\n")), 0);
    }

    #[test]
    fn a_key_that_is_there_twice_or_empty_is_not_taken_for_another() {
        one(
            "MACHINE=\"q35\"",
            "MACHINE=\"q35\", MACHINE=\"pc\"",
            Level::Warning,
            "syntax",
            6,
            "MACHINE is in OS a second",
        );
        one("MACHINE=\"q35\"", "MACHINE=\" \"", Level::Error, "machine", 6, "OS has no MACHINE");
        one(
            "\"/opt/flower/scripts/health-check.sh\"",
            "\"\"",
            Level::Warning,
            "context-ready",
            10,
            "without READY_SCRIPT_PATH",
        );
        assert_eq!(
            bad(&GOOD.replace("INPUTS_ORDER=\"FL_GPU_ENABLED\"", "INPUTS_ORDER=\" , \"")),
            []
        );
        let lone = found(
            &GOOD.replace("VCPU=\"8\"", "VCPU=\" \"").replace("PIN_POLICY=\"CORE\", ", ""),
            "topology",
        );
        assert_eq!(lone[0].0, Level::Ok, "an empty VCPU is one: {lone:#?}");
    }

    #[test]
    fn a_value_that_refers_to_an_input_is_judged_when_the_vm_is_made() {
        let fraction = |value: &str| bad(&GOOD.replace("\"0.8\"", &format!("\"{value}\"")));
        for fine in ["$GPU-SHARE", "0$X", "$", "${FL_GPU_ENABLED}", "$NAME", ""] {
            assert_eq!(fraction(fine), [], "{fine}");
        }
        for missing in ["$FL_SHARE", "${FL_SHARE}", "$A1"] {
            let found = fraction(missing);
            assert!(
                found.len() == 1 && found[0].3.contains("refers to a user input that is not there"),
                "{found:#?}"
            );
        }
        let count = |text: &str, id| found(text, id).remove(0).1;
        let wrong = GOOD.replace("\"0.8\"", "\"8\"");
        assert_eq!(count(&wrong, "variable"), "1 variables of the agent in CONTEXT are right");
        let more = GOOD.replace("\"0.8\"", "\"0.8\", ML_FRAMEWORK=\"base\", OTHER=\"1\"");
        assert_eq!(count(&more, "variable"), "3 variables of the agent in CONTEXT are right");
    }

    #[test]
    fn a_name_that_begins_like_ours_and_is_none_is_told_with_what_to_do() {
        let fix = |name: &str| {
            let checks = judge(&GOOD.replace("FL_GPU_MEMORY_FRACTION=", &format!("{name}=")));
            checks
                .into_iter()
                .find(|check| check.level == Level::Warning)
                .and_then(|check| check.fix)
        };
        assert_eq!(
            fix("ONEAPP_FL_GPU_MEM").as_deref(),
            Some("did you mean ONEAPP_FL_GPU_MEMORY_FRACTION?")
        );
        let delete = "delete it; supernode-agent variables lists what there is";
        assert_eq!(fix("FL_SOMETHING_ELSE").as_deref(), Some(delete));
        assert_eq!(fix("OTHER_FL_GPU"), None);
    }

    #[test]
    fn a_fix_shows_a_value_that_is_accepted() {
        for variable in
            variables::VARIABLES.iter().filter(|variable| variable.kind != Kind::CaBundle)
        {
            assert!(variable.kind.parse(&example(variable.kind)).is_ok(), "{}", variable.name);
        }
        let checks = judge(&GOOD.replace("\"0.8\"", "\"8\""));
        let wrong = checks.into_iter().find(|check| check.level == Level::Error).unwrap();
        assert_eq!(wrong.fix.as_deref(), Some("FL_GPU_MEMORY_FRACTION=\"0.5\""));
    }

    #[test]
    fn every_type_of_a_user_input_has_what_it_needs() {
        let judged = |value: &str| {
            let place = Place { line: 1, column: 1 };
            judge_input(&Pair { name: "X".into(), value: value.into(), place })
                .map(|check| check.finding)
        };
        for fine in [
            "O|text|what",
            "M|number|what",
            "M|text64|what",
            "O|number|what| |",
            "O|number|what| |5",
            "O|number-float|what| |0.5",
            "O|range|what|1..5|3",
            "O|list|what|a,b|a",
            "O|list-multiple|what|a,b|",
            "O|boolean|what| |NO",
            "O|fixed|what| |x",
        ] {
            assert_eq!(judged(fine), None, "{fine}");
        }
        for (value, words) in [
            ("O|number-float|what", "X: left empty, onetemplate instantiate asks again for ever"),
            ("O|number|what| |five", "X: the default 'five' is not a number"),
            ("O|range|what|1-5|3", "X: a range needs its limits"),
            ("O|range-float|what||3", "X: a range needs its limits"),
            ("O|list-multiple|what||a", "X: a list needs its options"),
            ("O", "X: it has 1 fields"),
        ] {
            assert!(
                judged(value).is_some_and(|finding| finding.starts_with(words)),
                "{value}: {:?}",
                judged(value)
            );
        }
        let two = GOOD
            .replace("|YES\" ]", "|YES\", OTHER=\"O|text|what\", FL_LOG_LEVEL=\"O|text|what\" ]");
        assert_eq!(
            found(&two, "user-input")[0].1,
            "2 of 3 user inputs are right",
            "one does not reach the VM"
        );
    }
}
