//! `check vm`: whether this VM has a usable GPU and whether Docker can hand it to the node; and
//! what the host could give this VM that it has not. Facts are read by [`read`]; [`judge`] is pure.

mod facts;

use one_context::Context;
use serde_json::Value as Json;

use super::{Check, Level};
use crate::config::settings::Injection;
use crate::config::{Config, Framework, GpuRequest, Prebaked};
use crate::docker::daemon_json::RUNTIME_NAME;
use crate::gpu::decide::decide_gpu_or_cpu;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::Verdict;
use crate::system::os_release::Distribution;
use crate::values::PciAddress;

pub use facts::{Unconfigured, VmFacts, read};

const GIB: u64 = 1 << 30;
/// The template attribute for UEFI, by release of OpenNebula.
const UEFI_FIX: &str = "in the VM template OS=[FIRMWARE=\"UEFI\"] (OpenNebula 7) or OS=[FIRMWARE=\"/usr/share/OVMF/OVMF_CODE.fd\"] (6.10), with an image that boots by UEFI";
const MACHINE_FIX: &str = "OS=[MACHINE=\"q35\"] in the VM template, then instantiate the VM anew";
const CPU_FIX: &str = "CPU_MODEL=[MODEL=\"host-passthrough\"] in the VM template, then power the VM off and on (onevm poweroff, onevm resume)";
const AS_ROOT: &str = "run it as root, on the VM itself";

/// What the facts mean.
pub fn judge(facts: &VmFacts, distribution: Distribution) -> Vec<Check> {
    let vm = Vm { facts, distribution };
    let mut checks = Vec::new();
    checks.push(vm.settings());
    checks.extend(vm.configuration());
    checks.push(vm.wanted());
    checks.extend(vm.assigned());
    checks.extend(vm.devices());
    checks.push(vm.module());
    checks.extend(vm.nvml());
    checks.extend(vm.selection());
    checks.push(vm.firmware());
    checks.push(vm.machine());
    checks.push(vm.cpu());
    checks.push(vm.numa());
    checks.push(vm.docker());
    checks.push(vm.runtime());
    checks.push(vm.runtime_program());
    checks.push(vm.cdi());
    checks.push(vm.image());
    checks.push(vm.disk());
    checks.push(vm.memory());
    checks
}

struct Vm<'a> {
    facts: &'a VmFacts,
    distribution: Distribution,
}

impl Vm<'_> {
    fn config(&self) -> Option<&Config> {
        self.facts.config.as_ref().ok().map(|(config, _)| config)
    }

    /// Whether the operator wants the GPU; where that is not known, the GPU is what the check is
    /// about.
    fn is_wanted(&self) -> bool {
        self.config().is_none_or(|config| config.gpu.enabled)
    }

    /// What keeps a wanted GPU from being used is an ERROR.
    fn bad(&self) -> Level {
        if self.is_wanted() { Level::Error } else { Level::Warning }
    }

    fn fix(&self, reason: Reason) -> &'static str {
        reason.fix(self.distribution)
    }

    fn of_finding(&self, id: &'static str, finding: &Finding) -> Check {
        Check::bad(
            id,
            self.bad(),
            format!("{}: {}", finding.reason, finding.summary),
            self.fix(finding.reason),
        )
    }

    fn settings(&self) -> Check {
        match &self.facts.settings_error {
            None => Check::ok("settings", "the settings can be read"),
            Some(why) => Check::error(
                "settings",
                why,
                "correct agent.toml (man agent.toml); what follows is for the defaults",
            ),
        }
    }

    fn configuration(&self) -> Vec<Check> {
        const ID: &str = "configuration";
        match &self.facts.config {
            Err(Unconfigured::NoContext(why)) => {
                let fix = "run it as root; where the VM has no context, install OpenNebula's one-context package, give the VM a CONTEXT in its template, and reboot; systemctl status one-context-local tells more";
                vec![Check::error(ID, why, fix)]
            }
            Err(Unconfigured::Invalid(errors)) => {
                let fix = "correct the CONTEXT of the VM (onevm updateconf VM); supernode-agent variables shows what is accepted";
                errors.iter().map(|error| Check::error(ID, error, fix)).collect()
            }
            Ok((_, remarks)) if remarks.warnings().next().is_none() => {
                vec![Check::ok(ID, "the context can be read, and its variables are valid")]
            }
            Ok((_, remarks)) => remarks
                .warnings()
                .map(|remark| {
                    Check::warning(
                        ID,
                        remark,
                        "correct the CONTEXT of the VM (onevm updateconf VM)",
                    )
                })
                .collect(),
        }
    }

    fn wanted(&self) -> Check {
        const ID: &str = "gpu-wanted";
        const FIX: &str =
            "CONTEXT=[FL_GPU_ENABLED=\"YES\"] in the VM template, or onevm updateconf VM";
        let is_there = self.facts.pci.gpus().next().is_some();
        match self.config() {
            None => {
                Check::unknown(ID, "the configuration is not valid", "mend configuration first")
            }
            Some(config) if config.gpu.enabled => Check::ok(ID, "FL_GPU_ENABLED is YES"),
            Some(_) if is_there => Check::warning(
                ID,
                "this VM has a GPU, and FL_GPU_ENABLED is not YES: the node runs on the CPU",
                FIX,
            ),
            Some(_) => {
                Check::ok(ID, "FL_GPU_ENABLED is not YES: the node runs on the CPU, as it should")
            }
        }
    }

    fn assigned(&self) -> Vec<Check> {
        const ID: &str = "gpu-assigned";
        let assigned =
            self.config().map(|config| config.gpu.assigned.as_slice()).unwrap_or_default();
        assigned
            .iter()
            .map(|assigned| {
                let promise = format!("{}='{}'", assigned.variable, assigned.written);
                let fix = self.fix(Reason::GpuNotPassedThrough);
                if !self.facts.pci.unreadable.is_empty() {
                    return Check::unknown(
                        ID,
                        format!("{promise}: the PCI bus could not be read"),
                        AS_ROOT,
                    );
                }
                let Some(address) = assigned.address else {
                    return Check::bad(
                        ID,
                        self.bad(),
                        format!("{promise} is not a PCI address"),
                        fix,
                    );
                };
                match self.facts.pci.at(address) {
                    Some(device) if device.is_nvidia_display() => {
                        Check::ok(ID, format!("{promise}: the GPU is there ({})", device.ids()))
                    }
                    // With a card come functions that are no GPU, and not every passed-through
                    // device need be one.
                    Some(device) if self.facts.pci.gpus().next().is_some() => Check::ok(
                        ID,
                        format!("{promise}: the device is there, and is no GPU ({})", device.ids()),
                    ),
                    Some(device) => {
                        let finding = format!(
                            "{promise}: the device there is not an NVIDIA GPU ({})",
                            device.ids()
                        );
                        Check::bad(ID, self.bad(), finding, fix)
                    }
                    None => Check::bad(
                        ID,
                        self.bad(),
                        format!("{promise}: there is no device at that address"),
                        fix,
                    ),
                }
            })
            .collect()
    }

    fn devices(&self) -> Vec<Check> {
        let pci = &self.facts.pci;
        let mut checks: Vec<Check> =
            pci.unreadable.iter().map(|why| Check::unknown("gpu-present", why, AS_ROOT)).collect();
        if pci.gpus().next().is_none() && pci.unreadable.is_empty() {
            let finding = "there is no NVIDIA GPU on the PCI bus (vendor 10de, class 03xx)";
            let is_promised = self.config().is_some_and(|config| !config.gpu.assigned.is_empty());
            let reason =
                if is_promised { Reason::GpuNotPassedThrough } else { Reason::GpuNotPresent };
            checks.push(if self.is_wanted() {
                Check::error("gpu-present", finding, self.fix(reason))
            } else {
                Check::ok("gpu-present", format!("{finding}, and none is wanted"))
            });
        }
        for gpu in pci.gpus() {
            let (address, ids) = (gpu.address, gpu.ids());
            checks.push(Check::ok("gpu-present", format!("{address} ({ids})")));
            checks.push(match gpu.driver.as_deref() {
                Some("nvidia") => {
                    Check::ok("gpu-driver", format!("{address} is bound to the nvidia driver"))
                }
                Some(other) => {
                    let finding =
                        format!("{address} is bound to the driver {other}, not to nvidia");
                    Check::bad("gpu-driver", self.bad(), finding, self.fix(Reason::WrongDriver))
                }
                None => {
                    let finding = format!("no driver is bound to {address}");
                    Check::bad("gpu-driver", self.bad(), finding, self.fix(Reason::DriverNotLoaded))
                }
            });
        }
        checks
    }

    fn module(&self) -> Check {
        const ID: &str = "kernel-module";
        let pci = &self.facts.pci;
        let is_there = pci.gpus().next().is_some();
        match (&pci.module_version, &pci.module_pending) {
            (_, Some(state)) => {
                let finding = format!("the nvidia module is {state}, not yet live");
                Check::bad(ID, self.bad(), finding, self.fix(Reason::DriverNotReady))
            }
            (Some(version), None) => Check::ok(ID, format!("nvidia {version}")),
            (None, None) if is_there => {
                let is_secure = pci.kernel.secure_boot == Some(true);
                let signed = if is_secure { "; Secure Boot is on: it must be signed" } else { "" };
                let finding =
                    format!("the nvidia module is not loaded (/sys/module/nvidia){signed}");
                Check::bad(ID, self.bad(), finding, self.fix(Reason::DriverNotLoaded))
            }
            (None, None) => Check::ok(ID, "not loaded, and there is no GPU to drive"),
        }
    }

    /// A configuration that wants every GPU, whatever the operator's wants: what the driver says of
    /// each.
    fn asking_for_all(&self) -> Option<Config> {
        let config = match self.config() {
            Some(config) => config.clone(),
            // The rest of it does not matter here.
            None => Config::from_context(&Context::parse(b"").ok()?, &Prebaked::default()).ok()?.0,
        };
        Some(Config {
            gpu: GpuRequest { enabled: true, ..GpuRequest::default() },
            framework: Framework::PyTorch,
            ..config
        })
    }

    fn nvml(&self) -> Vec<Check> {
        const ID: &str = "nvml";
        let outcome = match &self.facts.nvml {
            Ok(outcome) => outcome,
            Err(_) if self.facts.pci.gpus().next().is_none() => {
                return vec![Check::ok(ID, "not asked: there is no GPU")];
            }
            Err(why) => {
                return vec![Check::unknown(
                    ID,
                    format!("NVML was not asked: {why}"),
                    "mend gpu-driver first",
                )];
            }
        };
        let Some(config) = self.asking_for_all() else {
            return vec![Check::unknown(
                ID,
                "there is no configuration to judge its answer by",
                "mend configuration first",
            )];
        };
        match decide_gpu_or_cpu(&config, &self.facts.pci, outcome) {
            Verdict::Gpu { devices, missing } => {
                let mut checks = vec![Check::ok(ID, outcome.summary())];
                checks.extend(devices.iter().map(|device| {
                    let name = device.name.as_deref().unwrap_or("GPU");
                    let memory = device
                        .memory_mib
                        .map_or("memory not known".into(), |mib| format!("{mib} MiB"));
                    Check::ok(
                        "gpu",
                        format!(
                            "{}: {name}, {memory}, {}, {}",
                            device.index, device.uuid, device.pci_address
                        ),
                    )
                }));
                checks.extend(missing.iter().map(|what| {
                    let fix =
                        "nvidia-smi -q and dmesg tell more; power the VM off and on (onevm poweroff, onevm resume)";
                    Check::bad("gpu", self.bad(), what, fix)
                }));
                checks
            }
            Verdict::Cpu { finding: Some(finding) } => vec![self.of_finding(ID, &finding)],
            Verdict::Cpu { finding: None } => vec![Check::ok(ID, outcome.summary())],
        }
    }

    /// What the operator's variables make of the GPUs that work.
    fn selection(&self) -> Option<Check> {
        const ID: &str = "gpu-selection";
        let config = self.config().filter(|config| config.gpu.enabled)?;
        let outcome = self.facts.nvml.as_ref().ok()?;
        let all = decide_gpu_or_cpu(&self.asking_for_all()?, &self.facts.pci, outcome);
        if all.devices().is_empty() {
            return None;
        }
        let verdict = decide_gpu_or_cpu(config, &self.facts.pci, outcome);
        Some(match (verdict.finding(), verdict.devices().len()) {
            (Some(finding), _) => self.of_finding(ID, finding),
            (None, count) => Check::ok(
                ID,
                format!("FL_CUDA_VISIBLE_DEVICES={}: {count} for the node", config.gpu.selection),
            ),
        })
    }

    fn firmware(&self) -> Check {
        match &self.facts.is_uefi {
            Ok(true) => return Check::ok("firmware", "UEFI"),
            Ok(false) => {}
            Err(why) => return Check::unknown("firmware", why, AS_ROOT),
        }
        let finding = "this VM booted by BIOS (there is no /sys/firmware/efi): the memory of large GPUs cannot be mapped";
        Check::warning("firmware", finding, UEFI_FIX)
    }

    fn machine(&self) -> Check {
        const ID: &str = "machine-type";
        /// The host bridges of QEMU's two PC machines (hw/pci-host/q35.c and i440fx.c): vendor and
        /// device.
        const ICH9: (u32, Option<u32>) = (0x8086, Some(0x29c0));
        const I440FX: (u32, Option<u32>) = (0x8086, Some(0x1237));
        let bridge = PciAddress::parse("00:00.0").and_then(|address| self.facts.pci.at(address));
        let bridge = bridge.map(|bridge| (bridge.vendor, bridge.device));
        let names = match &self.facts.machine {
            Ok(names) => names.join(", "),
            Err(why) if bridge.is_none() => return Check::unknown(ID, why, AS_ROOT),
            Err(_) => String::new(),
        };
        let told = |word: &str| names.to_ascii_lowercase().contains(word);
        let said = if names.is_empty() { "by its host bridge".into() } else { names.clone() };
        if told("q35") || bridge == Some(ICH9) {
            return Check::ok(ID, format!("q35 ({said})"));
        }
        if told("i440fx") || told("pc-i440") || bridge == Some(I440FX) {
            let finding = format!("this VM is an i440fx ({said}): the GPU has no PCI Express slot");
            return Check::warning(ID, finding, MACHINE_FIX);
        }
        let said = if names.is_empty() {
            "there is neither DMI nor a host bridge at 00:00.0".into()
        } else {
            names
        };
        Check::unknown(ID, format!("no machine type of QEMU is told ({said})"), MACHINE_FIX)
    }

    fn cpu(&self) -> Check {
        const ID: &str = "cpu-model";
        const GENERIC: [&str; 3] =
            ["QEMU Virtual CPU", "Common KVM processor", "Common 32-bit KVM processor"];
        let text = match &self.facts.cpuinfo {
            Ok(Some(text)) => text,
            Ok(None) => return Check::unknown(ID, "there is no /proc/cpuinfo", AS_ROOT),
            Err(why) => return Check::unknown(ID, why, AS_ROOT),
        };
        let field = |name: &str| {
            let line = text
                .lines()
                .find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
            line.split_once(':').map(|(_, value)| value.trim())
        };
        let Some(model) = field("model name") else {
            return Check::ok(
                ID,
                "/proc/cpuinfo gives no model name (another architecture than x86-64)",
            );
        };
        if GENERIC.iter().any(|generic| model.starts_with(generic)) {
            let finding = format!(
                "the CPU is QEMU's own ({model}): frameworks run slowly on it, or not at all"
            );
            return Check::warning(ID, finding, CPU_FIX);
        }
        let flags: Vec<&str> = field("flags").unwrap_or_default().split_whitespace().collect();
        let missing: Vec<&str> =
            ["avx", "avx2"].into_iter().filter(|flag| !flags.contains(flag)).collect();
        match (field("flags"), missing.as_slice()) {
            (None, _) => {
                Check::unknown(ID, format!("{model}: /proc/cpuinfo gives no flags"), AS_ROOT)
            }
            (Some(_), []) => Check::ok(ID, model),
            (Some(_), missing) => {
                let finding = format!(
                    "{model} has no {} in this VM: TensorFlow needs AVX, PyTorch is slow without AVX2",
                    missing.join(" and ")
                );
                Check::warning(ID, finding, CPU_FIX)
            }
        }
    }

    fn numa(&self) -> Check {
        const ID: &str = "numa";
        const HIDDEN: &str =
            "whether the host has pinned its CPUs cannot be seen from here (onevm show: TOPOLOGY)";
        let nodes = match &self.facts.numa {
            Ok(nodes) => nodes,
            Err(why) => return Check::unknown(ID, why, AS_ROOT),
        };
        match nodes.as_slice() {
            [] => Check::ok(ID, format!("the kernel shows no NUMA nodes; {HIDDEN}")),
            [(_, cpus)] => Check::ok(ID, format!("one node with the CPUs {cpus}; {HIDDEN}")),
            nodes => {
                let told: Vec<String> =
                    nodes.iter().map(|(node, cpus)| format!("{node}: {cpus}")).collect();
                let told = told.join("; ");
                let lost: Vec<String> = self
                    .facts
                    .gpu_nodes
                    .iter()
                    .filter(|(_, node)| node.is_empty() || node == "-1")
                    .map(|(address, _)| address.to_string())
                    .collect();
                if lost.is_empty() {
                    return Check::ok(ID, format!("{} nodes ({told}); {HIDDEN}", nodes.len()));
                }
                let finding = format!(
                    "{} nodes ({told}), and the node of {} is not known to the VM",
                    nodes.len(),
                    lost.join(", ")
                );
                let fix = "TOPOLOGY=[PIN_POLICY=\"CORE\",SOCKETS=\"1\"] in the VM template, on a host with PIN_POLICY=PINNED, keeps CPUs and GPU together";
                Check::warning(ID, finding, fix)
            }
        }
    }

    fn docker(&self) -> Check {
        const ID: &str = "docker";
        match &self.facts.engine {
            Ok(facts) => Check::ok(ID, format!("Docker {} answers", facts.version)),
            Err(why) if why.to_lowercase().contains("permission denied") => {
                Check::unknown(ID, why, AS_ROOT)
            }
            Err(why) => {
                let install = self.distribution.install("docker.io", "docker-ce");
                Check::error(
                    ID,
                    why,
                    format!("systemctl enable --now docker; where it is not installed: {install}"),
                )
            }
        }
    }

    fn reported_cdi(&self) -> Vec<&str> {
        let devices = self
            .facts
            .engine
            .as_ref()
            .map(|facts| facts.cdi_devices.as_slice())
            .unwrap_or_default();
        devices
            .iter()
            .map(String::as_str)
            .filter(|device| device.starts_with("nvidia.com/gpu="))
            .collect()
    }

    /// Whether the container can get the GPU without the nvidia runtime.
    fn goes_by_cdi(&self) -> bool {
        match self.facts.injection {
            Injection::Cdi => true,
            Injection::Auto => !self.reported_cdi().is_empty(),
            Injection::Runtime => false,
        }
    }

    fn runtime(&self) -> Check {
        const ID: &str = "nvidia-runtime";
        const FIX: &str = "supernode-agent configure-runtime && systemctl reload docker (flower-supernode does it at its start, where the GPU is wanted)";
        if let Ok(facts) = &self.facts.engine {
            return match facts.runtimes.get(RUNTIME_NAME) {
                Some(path) => {
                    Check::ok(ID, format!("Docker has the runtime {RUNTIME_NAME} ({path})"))
                }
                None if self.goes_by_cdi() => {
                    Check::ok(ID, "not registered, and not needed: the GPU goes by CDI")
                }
                None if !self.is_wanted() => {
                    Check::ok(ID, "Docker has no runtime nvidia, and no GPU is wanted")
                }
                None => Check::warning(ID, "Docker has no runtime nvidia", FIX),
            };
        }
        let text = match &self.facts.daemon_json {
            Ok(text) => text.as_deref().unwrap_or("{}"),
            Err(why) => return Check::unknown(ID, why, AS_ROOT),
        };
        match serde_json::from_str::<Json>(text) {
            Ok(Json::Object(daemon)) => {
                let entry = daemon.get("runtimes").and_then(|runtimes| runtimes.get(RUNTIME_NAME));
                match entry {
                    Some(_) => Check::unknown(
                        ID,
                        "daemon.json has the runtime nvidia, and Docker does not answer",
                        "mend docker first",
                    ),
                    None => Check::unknown(
                        ID,
                        "daemon.json has no runtime nvidia, and Docker does not answer",
                        FIX,
                    ),
                }
            }
            Ok(_) => Check::bad(
                ID,
                self.bad(),
                "daemon.json is not one JSON object",
                self.fix(Reason::RuntimeNotConfigured),
            ),
            Err(error) => Check::bad(
                ID,
                self.bad(),
                format!("daemon.json: {error}"),
                self.fix(Reason::RuntimeNotConfigured),
            ),
        }
    }

    fn runtime_program(&self) -> Check {
        const ID: &str = "nvidia-runtime-program";
        let (name, found) = &self.facts.runtime;
        match found {
            Some(path) => Check::ok(ID, path),
            None if self.goes_by_cdi() => Check::ok(
                ID,
                format!("{name} is not installed, and not needed: the GPU goes by CDI"),
            ),
            None if !self.is_wanted() => {
                Check::ok(ID, format!("{name} is not installed, and no GPU is wanted"))
            }
            None => Check::error(
                ID,
                format!("{name} is not installed: Docker cannot hand over the GPU"),
                self.fix(Reason::RuntimeMissing),
            ),
        }
    }

    fn cdi(&self) -> Check {
        const ID: &str = "cdi";
        const FIX: &str = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml; Docker before 28.2 also needs \"features\": {\"cdi\": true} in daemon.json and a restart";
        let reported = self.reported_cdi();
        if !reported.is_empty() {
            return Check::ok(ID, format!("Docker reports {}", reported.join(", ")));
        }
        match (&self.facts.cdi_specs, self.facts.injection) {
            (Err(why), _) => Check::unknown(ID, why, AS_ROOT),
            (Ok(specs), Injection::Cdi) if specs.is_empty() => Check::bad(
                ID,
                self.bad(),
                "injection is cdi in agent.toml, and there is no CDI specification for nvidia.com/gpu",
                FIX,
            ),
            (Ok(specs), _) if specs.is_empty() => {
                Check::ok(ID, "no CDI specification for nvidia.com/gpu: the nvidia runtime is used")
            }
            (Ok(specs), _) => {
                Check::ok(ID, format!("{}; Docker does not report its devices", specs.join(", ")))
            }
        }
    }

    fn image(&self) -> Check {
        const ID: &str = "image";
        let Some((wanted, has)) = self.facts.images.first() else {
            return Check::unknown(
                ID,
                "the configuration does not say which image is wanted",
                "mend configuration first",
            );
        };
        let prebaked = self.facts.images.get(1);
        match (has, prebaked) {
            (Ok(true), _) => Check::ok(ID, format!("{wanted} is on this machine")),
            (Err(why), _) => Check::unknown(
                ID,
                format!("whether {wanted} is on this machine: {why}"),
                "mend docker first",
            ),
            (Ok(false), Some((prebaked, Ok(true)))) => {
                let finding = format!(
                    "{wanted} is not on this machine; it will be pulled, and where it is not to be had {prebaked} is used"
                );
                Check::warning(
                    ID,
                    finding,
                    format!(
                        "docker pull {wanted}, or take FLOWER_VERSION and ML_FRAMEWORK out of the CONTEXT"
                    ),
                )
            }
            (Ok(false), _) => {
                let finding =
                    format!("{wanted} is not on this machine: the first start must pull it");
                Check::warning(
                    ID,
                    finding,
                    format!(
                        "docker pull {wanted} (or docker load), or FL_SUPERNODE_IMAGE with an image that can be had"
                    ),
                )
            }
        }
    }

    /// What unpacking the image of the framework takes: the layers twice for a moment. Rounded up
    /// from the sizes of the CUDA builds of 2025 (PyTorch about 4 GiB packed, 8 GiB unpacked).
    fn needed_gib(&self) -> (u64, &'static str) {
        match self.config().map_or(Framework::PyTorch, |config| config.framework) {
            Framework::PyTorch => (14, "pytorch"),
            Framework::TensorFlow => (10, "tensorflow"),
            Framework::Sklearn => (3, "sklearn"),
            Framework::Base => (2, "base"),
        }
    }

    fn disk(&self) -> Check {
        const ID: &str = "disk";
        /// Without this much Docker cannot even start containers.
        const LEAST_BYTES: u64 = GIB / 2;
        const FIX: &str = "docker image prune; or a larger disk: onevm disk-resize VM 0 SIZE, and growpart and resize2fs in the VM";
        let (folder, free) = &self.facts.disk;
        let free = match free {
            Ok(free) => *free,
            Err(why) => return Check::unknown(ID, why, AS_ROOT),
        };
        let told = format!("{:.1} GiB are free in {folder}", free as f64 / GIB as f64);
        let has_image = matches!(self.facts.images.first(), Some((_, Ok(true))));
        let (needed, framework) = self.needed_gib();
        if free < LEAST_BYTES {
            Check::error(ID, told, FIX)
        } else if !has_image && free < needed * GIB {
            Check::warning(
                ID,
                format!(
                    "{told}, and the image of {framework} needs about {needed} GiB while it is unpacked"
                ),
                FIX,
            )
        } else {
            Check::ok(ID, told)
        }
    }

    fn memory(&self) -> Check {
        const ID: &str = "memory";
        /// A framework with CUDA and one data loader; half of the memory is what /dev/shm may take.
        const COMFORTABLE_MIB: u64 = 8 << 10;
        let mib = match &self.facts.memory_mib {
            Ok(mib) => *mib,
            Err(why) => return Check::unknown(ID, why, AS_ROOT),
        };
        let uses_gpu = self
            .config()
            .is_none_or(|config| config.gpu.enabled && config.framework != Framework::Base);
        // A VM has a little less than its template says.
        if uses_gpu && mib < COMFORTABLE_MIB / 10 * 9 {
            let finding =
                format!("{mib} MiB: little for a framework on a GPU and its data loaders");
            return Check::warning(
                ID,
                finding,
                "MEMORY=\"16384\" in the VM template, or onevm resize VM --memory 16384",
            );
        }
        Check::ok(ID, format!("{mib} MiB"))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Diagnostics;
    use crate::docker::client::EngineInfo;
    use crate::gpu::nvml_error::{Fault, FaultKind};
    use crate::gpu::nvml_library::LibraryFile;
    use crate::gpu::pci::{PciDevice, PciFacts};
    use crate::gpu::probe::ProbeOutcome;
    use crate::gpu::probe_child::{DriverReport, ProbeAnswer, ProbedGpu};

    fn config(context: &str) -> Result<(Config, Diagnostics), Unconfigured> {
        let context = Context::parse(context.as_bytes()).unwrap();
        Config::from_context(&context, &Prebaked::default())
            .map_err(|errors| Unconfigured::Invalid(errors.lines().collect()))
    }

    fn device(address: &str, ids: (u32, u32), class: u32, driver: &str) -> PciDevice {
        let driver = Some(driver.to_owned()).filter(|driver| !driver.is_empty());
        PciDevice {
            address: PciAddress::parse(address).unwrap(),
            vendor: ids.0,
            device: Some(ids.1),
            class,
            driver,
        }
    }

    fn good() -> VmFacts {
        let gpu = ProbedGpu {
            uuid: Some("GPU-1".into()),
            name: Some("NVIDIA A100".into()),
            pci_address: Some("00000000:01:00.0".into()),
            memory_mib: Some(40960),
            ..ProbedGpu::default()
        };
        let report = DriverReport { driver_version: Some("550.1".into()), gpus: vec![gpu] };
        let image = "flower-supernode-pytorch:1.31.0".to_owned();
        VmFacts {
            settings_error: None,
            injection: Injection::Auto,
            runtime: (
                "nvidia-container-runtime".into(),
                Some("/usr/bin/nvidia-container-runtime".into()),
            ),
            config: config("FL_GPU_ENABLED='YES'\nPCI0_ADDRESS='01:00.0'\n"),
            pci: PciFacts {
                devices: vec![
                    device("00:00.0", (0x8086, 0x29c0), 0x060000, ""),
                    device("01:00.0", (0x10de, 0x20f1), 0x030200, "nvidia"),
                ],
                module_version: Some("550.1".into()),
                ..PciFacts::default()
            },
            nvml: Ok(ProbeOutcome::Answered(ProbeAnswer::Driver(report))),
            is_uefi: Ok(true),
            machine: Ok(vec!["Standard PC (Q35 + ICH9, 2009)".into(), "pc-q35-8.2".into()]),
            cpuinfo: Ok(Some(
                "processor\t: 0\nmodel name\t: AMD EPYC 7543\nflags\t\t: fpu avx avx2 hypervisor\n"
                    .into(),
            )),
            numa: Ok(vec![("node0".into(), "0-7".into())]),
            gpu_nodes: vec![(PciAddress::parse("01:00.0").unwrap(), "-1".into())],
            engine: Ok(EngineInfo {
                version: "26.1.5".into(),
                runtimes: [("nvidia".into(), "nvidia-container-runtime".into())].into(),
                ..EngineInfo::default()
            }),
            daemon_json: Ok(None),
            cdi_specs: Ok(Vec::new()),
            images: vec![(image, Ok(true))],
            disk: ("/var/lib/docker".into(), Ok(40 * GIB)),
            memory_mib: Ok(32_000),
        }
    }

    type Bad = Vec<(Level, &'static str, String, String)>;

    fn bad(change: impl FnOnce(&mut VmFacts)) -> Bad {
        let mut facts = good();
        change(&mut facts);
        let checks = judge(&facts, Distribution::Ubuntu)
            .into_iter()
            .filter(|check| check.level != Level::Ok);
        checks
            .map(|check| (check.level, check.id, check.finding, check.fix.unwrap_or_default()))
            .collect()
    }

    #[track_caller]
    fn one(change: impl FnOnce(&mut VmFacts), level: Level, id: &str, finding: &str, fix: &str) {
        let found = bad(change);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!((found[0].0, found[0].1), (level, id), "{found:#?}");
        assert!(found[0].2.contains(finding) && found[0].3.contains(fix), "{found:#?}");
    }

    fn failed(code: u32) -> ProbeOutcome {
        let fault = Fault {
            call: "nvmlInit_v2".into(),
            kind: FaultKind::Code(code),
            text: "its text".into(),
        };
        ProbeOutcome::Answered(ProbeAnswer::Failed { fault, library: LibraryFile::default() })
    }

    #[test]
    fn a_good_vm_has_no_finding() {
        assert_eq!(bad(|_| ()), []);
    }

    #[test]
    fn each_fault_of_the_gpu_is_named_with_the_fix_of_this_distribution() {
        use Level::{Error, Warning};
        let absent = bad(|facts| {
            facts.pci = PciFacts::default();
            facts.nvml = Err("no GPU".into());
        });
        let ids: Vec<_> = absent.iter().map(|(level, id, ..)| (*level, *id)).collect();
        assert_eq!(ids, [(Error, "gpu-assigned"), (Error, "gpu-present")]);
        assert!(absent[0].2.contains("PCI0_ADDRESS='01:00.0'"), "{absent:?}");
        let nouveau = bad(|facts| {
            facts.pci.devices[1].driver = Some("nouveau".into());
            facts.pci.module_version = None;
            facts.pci.kernel.secure_boot = Some(true);
            facts.nvml = Err("no GPU is bound to the nvidia driver".into());
        });
        let ids: Vec<_> = nouveau.iter().map(|(level, id, ..)| (*level, *id)).collect();
        assert_eq!(ids, [(Error, "gpu-driver"), (Error, "kernel-module"), (Warning, "nvml")]);
        assert!(nouveau[1].2.contains("Secure Boot is on"), "{nouveau:?}");
        assert_eq!(nouveau[0].3, Reason::WrongDriver.fix(Distribution::Ubuntu));
        assert_ne!(nouveau[0].3, Reason::WrongDriver.fix(Distribution::Debian));
        one(
            |facts| facts.pci.module_pending = Some("coming".into()),
            Error,
            "kernel-module",
            "coming",
            "wait_seconds",
        );
        one(
            |facts| facts.nvml = Ok(failed(18)),
            Error,
            "nvml",
            "driver-library-mismatch",
            "reboot",
        );
        one(
            |facts| {
                facts.nvml = Ok(ProbeOutcome::TimedOut {
                    limit: Duration::from_secs(20),
                    library: LibraryFile::default(),
                })
            },
            Error,
            "nvml",
            "driver-timeout",
            "dmesg",
        );
        one(
            |facts| facts.config = config("FL_GPU_ENABLED='YES'\nFL_CUDA_VISIBLE_DEVICES='5'\n"),
            Error,
            "gpu-selection",
            "device-selection-empty",
            "FL_CUDA_VISIBLE_DEVICES",
        );
        one(
            |facts| facts.config = config(""),
            Warning,
            "gpu-wanted",
            "runs on the CPU",
            "FL_GPU_ENABLED=\"YES\"",
        );
        one(
            |facts| facts.config = config("FL_GPU_ENABLED='YES'\nFL_GPU_ENABLE='1'\n"),
            Warning,
            "configuration",
            "did you mean",
            "CONTEXT",
        );
        let ca = include_str!("../../../tests/ca.crt");
        let in_the_clear = format!(
            "FL_GPU_ENABLED='YES'\nFL_SUPERLINK_ADDRESS='h:1'\nFL_SSL_CA_CERTFILE='{ca}'\n"
        );
        one(
            |facts| facts.config = config(&in_the_clear),
            Warning,
            "configuration",
            "NOT encrypted; set FL_TLS_ENABLED=YES",
            "CONTEXT",
        );
    }

    #[test]
    fn a_bus_that_cannot_be_read_is_no_bus_without_a_gpu() {
        let found = bad(|facts| {
            facts.pci =
                PciFacts { unreadable: vec!["/sys/bus: denied".into()], ..PciFacts::default() };
            facts.nvml = Err("no GPU".into());
            facts.machine = Ok(vec!["pc-q35-8.2".into()]);
        });
        let ids: Vec<_> = found.iter().map(|(level, id, ..)| (*level, *id)).collect();
        assert_eq!(ids, [(Level::Warning, "gpu-assigned"), (Level::Warning, "gpu-present")]);
        let denied = bad(|facts| facts.engine = Err("… Permission denied (os error 13)".into()));
        assert_eq!((denied[0].0, denied[0].1), (Level::Warning, "docker"));
    }

    #[test]
    fn where_no_gpu_is_wanted_and_none_is_there_nothing_is_wrong() {
        let found = bad(|facts| {
            facts.pci =
                PciFacts { devices: facts.pci.devices[..1].to_vec(), ..PciFacts::default() };
            facts.nvml = Err("no GPU".into());
            facts.config = config("ML_FRAMEWORK='sklearn'\n");
            facts.runtime.1 = None;
            facts.engine = Ok(EngineInfo::default());
        });
        assert_eq!(found, []);
    }

    #[test]
    fn what_the_template_could_give_is_a_warning_with_its_attribute() {
        use Level::Warning;
        one(|facts| facts.is_uefi = Ok(false), Warning, "firmware", "BIOS", "FIRMWARE=\"UEFI\"");
        let i440fx = |facts: &mut VmFacts| {
            facts.machine = Ok(vec!["Standard PC (i440FX + PIIX, 1996)".into()]);
            facts.pci.devices[0].device = Some(0x1237);
        };
        one(i440fx, Warning, "machine-type", "i440fx", "MACHINE=\"q35\"");
        one(
            |facts| {
                facts.machine = Err("/sys/class/dmi/id/product_name: denied".into());
                facts.pci.devices.remove(0);
            },
            Warning,
            "machine-type",
            "denied",
            "root",
        );
        assert_eq!(bad(|facts| facts.machine = Ok(Vec::new())), [], "the bridge says it as well");
        let model =
            |model: &str, flags: &str| Ok(Some(format!("model name : {model}\nflags : {flags}\n")));
        for name in ["QEMU Virtual CPU version 2.5+", "Common KVM processor"] {
            one(
                |facts| facts.cpuinfo = model(name, "avx avx2"),
                Warning,
                "cpu-model",
                name,
                "host-passthrough",
            );
        }
        one(
            |facts| facts.cpuinfo = model("Intel Xeon", "avx"),
            Warning,
            "cpu-model",
            "no avx2",
            "host-passthrough",
        );
        one(|facts| facts.cpuinfo = Ok(None), Warning, "cpu-model", "not known", "root");
        one(
            |facts| {
                facts.numa =
                    Ok(vec![("node0".into(), "0-3".into()), ("node1".into(), "4-7".into())])
            },
            Warning,
            "numa",
            "node1: 4-7",
            "PIN_POLICY",
        );
    }

    #[test]
    fn what_docker_lacks_is_named_and_without_docker_the_rest_is_said_to_be_unknown() {
        use Level::{Error, Warning};
        let none = bad(|facts| {
            facts.engine = Err("the Docker engine at /x does not answer".into());
            facts.images[0].1 = Err("it does not answer".into());
        });
        let ids: Vec<_> = none.iter().map(|(level, id, ..)| (*level, *id)).collect();
        assert_eq!(ids, [(Error, "docker"), (Warning, "nvidia-runtime"), (Warning, "image")]);
        one(
            |facts| facts.engine.as_mut().unwrap().runtimes.clear(),
            Warning,
            "nvidia-runtime",
            "no runtime",
            "configure-runtime",
        );
        one(
            |facts| facts.runtime.1 = None,
            Error,
            "nvidia-runtime-program",
            "not installed",
            "nvidia-container-toolkit",
        );
        let by_cdi = bad(|facts| {
            facts.runtime.1 = None;
            let engine = facts.engine.as_mut().unwrap();
            engine.runtimes.clear();
            engine.cdi_devices = vec!["nvidia.com/gpu=0".into()];
        });
        assert_eq!(by_cdi, []);
        one(
            |facts| facts.injection = Injection::Cdi,
            Error,
            "cdi",
            "injection is cdi",
            "nvidia-ctk cdi generate",
        );
        one(
            |facts| facts.images[0].1 = Ok(false),
            Warning,
            "image",
            "must pull",
            "docker pull flower-supernode-pytorch",
        );
        one(
            |facts| {
                facts.images[0].1 = Ok(false);
                facts.images.push(("flwr/supernode:1.31.0".into(), Ok(true)));
            },
            Warning,
            "image",
            "flwr/supernode:1.31.0 is used",
            "docker pull",
        );
        one(|facts| facts.disk.1 = Ok(1000), Error, "disk", "0.0 GiB", "disk-resize");
        assert_eq!(bad(|facts| facts.disk.1 = Ok(2 * GIB)), [], "the image is there");
        let small = bad(|facts| {
            facts.images[0].1 = Ok(false);
            facts.disk.1 = Ok(2 * GIB);
        });
        assert!(
            small.iter().any(|(level, id, ..)| (*level, *id) == (Warning, "disk")),
            "{small:?}"
        );
        one(|facts| facts.memory_mib = Ok(2000), Warning, "memory", "2000 MiB", "MEMORY=");
        one(
            |facts| facts.settings_error = Some("wrong".into()),
            Error,
            "settings",
            "wrong",
            "agent.toml",
        );
        for (text, words, level) in [
            (Err("denied".into()), "not known: denied", Warning),
            (Ok(Some("{".into())), "daemon.json: EOF", Error),
            (Ok(Some("[]".into())), "not one JSON object", Error),
            (
                Ok(Some(r#"{"runtimes":{"nvidia":{}}}"#.into())),
                "daemon.json has the runtime nvidia",
                Warning,
            ),
        ] {
            let found = bad(|facts| {
                facts.engine = Err("no answer".into());
                facts.daemon_json = text;
            });
            let runtime = found.iter().find(|(_, id, ..)| *id == "nvidia-runtime").unwrap();
            assert!(runtime.0 == level && runtime.2.contains(words), "{runtime:?}");
        }
    }
}
