//! Checks of the GPU and its driver.

use super::subject::{FIX_CONFIGURATION, RUN_AS_ROOT, Vm};
use crate::check::Check;
use crate::config::{Framework, GpuRequest};
use crate::gpu::decide::decide_gpu_or_cpu;
use crate::gpu::probe::ProbeOutcome;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::{GpuDevice, Verdict};

impl Vm<'_> {
    pub(super) fn gpu_enabled(&self) -> Check {
        const ID: &str = "gpu-enabled";
        const FIX: &str =
            "CONTEXT=[FL_GPU_ENABLED=\"YES\"] in the VM template, or onevm updateconf VM";
        let is_present = self.facts.pci.gpus().next().is_some();
        match self.config() {
            None => Check::unknown(ID, "the configuration is invalid", FIX_CONFIGURATION),
            Some(config) if config.gpu.enabled => Check::ok(ID, "FL_GPU_ENABLED is YES"),
            Some(_) if is_present => Check::warning(
                ID,
                "this VM has a GPU, but FL_GPU_ENABLED is not YES: the node runs on the CPU",
                FIX,
            ),
            Some(_) => Check::ok(ID, "FL_GPU_ENABLED is not YES: the node runs on the CPU"),
        }
    }

    pub(super) fn assigned(&self) -> Vec<Check> {
        const ID: &str = "gpu-assigned";
        let assigned =
            self.config().map(|config| config.gpu.assigned.as_slice()).unwrap_or_default();
        assigned
            .iter()
            .map(|assigned| {
                let variable = format!("{}='{}'", assigned.variable, assigned.written);
                let fix = self.fix(Reason::GpuNotPassedThrough);
                if !self.facts.pci.unreadable.is_empty() {
                    return Check::unknown(
                        ID,
                        format!("{variable}: cannot read the PCI bus"),
                        RUN_AS_ROOT,
                    );
                }
                let Some(address) = assigned.address else {
                    return Check::problem(
                        ID,
                        self.gpu_problem_level(),
                        format!("{variable} is not a PCI address"),
                        fix,
                    );
                };
                match self.facts.pci.at(address) {
                    Some(device) if device.is_nvidia_display() => {
                        Check::ok(ID, format!("{variable}: the GPU is present ({})", device.ids()))
                    }
                    // Other functions of a GPU are assigned with it, and not every assigned device
                    // is a GPU.
                    Some(device) if self.facts.pci.gpus().next().is_some() => Check::ok(
                        ID,
                        format!(
                            "{variable}: the device is present and is not a GPU ({})",
                            device.ids()
                        ),
                    ),
                    Some(device) => {
                        let finding = format!(
                            "{variable}: the device there is not an NVIDIA GPU ({})",
                            device.ids()
                        );
                        Check::problem(ID, self.gpu_problem_level(), finding, fix)
                    }
                    None => Check::problem(
                        ID,
                        self.gpu_problem_level(),
                        format!("{variable}: there is no device at that address"),
                        fix,
                    ),
                }
            })
            .collect()
    }

    pub(super) fn gpu_present(&self) -> Vec<Check> {
        let pci = &self.facts.pci;
        let mut checks: Vec<Check> = pci
            .unreadable
            .iter()
            .map(|why| Check::unknown("gpu-present", why, RUN_AS_ROOT))
            .collect();
        if pci.gpus().next().is_none() && pci.unreadable.is_empty() {
            let finding = "no NVIDIA GPU on the PCI bus (vendor 10de, class 03xx)";
            let is_assigned = self.config().is_some_and(|config| !config.gpu.assigned.is_empty());
            let reason =
                if is_assigned { Reason::GpuNotPassedThrough } else { Reason::GpuNotPresent };
            checks.push(if self.is_gpu_enabled() {
                Check::error("gpu-present", finding, self.fix(reason))
            } else {
                Check::ok("gpu-present", format!("{finding}, and none is enabled"))
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
                    Check::problem(
                        "gpu-driver",
                        self.gpu_problem_level(),
                        finding,
                        self.fix(Reason::WrongDriver),
                    )
                }
                None => {
                    let finding = format!("no driver is bound to {address}");
                    Check::problem(
                        "gpu-driver",
                        self.gpu_problem_level(),
                        finding,
                        self.fix(Reason::DriverNotLoaded),
                    )
                }
            });
        }
        checks
    }

    pub(super) fn kernel_module(&self) -> Check {
        const ID: &str = "kernel-module";
        let pci = &self.facts.pci;
        let has_gpu = pci.gpus().next().is_some();
        match (&pci.module_version, &pci.module_pending) {
            (_, Some(state)) => {
                let finding = format!("the nvidia module is still {state}");
                Check::problem(
                    ID,
                    self.gpu_problem_level(),
                    finding,
                    self.fix(Reason::DriverNotReady),
                )
            }
            (Some(version), None) => Check::ok(ID, format!("nvidia {version}")),
            (None, None) if has_gpu => {
                let is_secure = pci.kernel.secure_boot == Some(true);
                let signed =
                    if is_secure { "; Secure Boot is on: the module must be signed" } else { "" };
                let finding =
                    format!("the nvidia module is not loaded (/sys/module/nvidia){signed}");
                Check::problem(
                    ID,
                    self.gpu_problem_level(),
                    finding,
                    self.fix(Reason::DriverNotLoaded),
                )
            }
            (None, None) => Check::ok(ID, "not loaded; this VM has no GPU"),
        }
    }

    pub(super) fn nvml(&self) -> Vec<Check> {
        const ID: &str = "nvml";
        let outcome = match &self.facts.nvml {
            Ok(outcome) => outcome,
            Err(_) if self.facts.pci.gpus().next().is_none() => {
                return vec![Check::ok(ID, "not probed: no GPU is present")];
            }
            Err(why) => {
                return vec![Check::unknown(
                    ID,
                    format!("NVML was not probed: {why}"),
                    "fix gpu-driver first",
                )];
            }
        };
        match self.decide_for_all_gpus(outcome) {
            Verdict::Gpu { devices, missing } => {
                let mut checks = vec![Check::ok(ID, outcome.summary())];
                checks.extend(devices.iter().map(|device| {
                    let name = device.name.as_deref().unwrap_or("GPU");
                    let memory = device
                        .memory_mib
                        .map_or("unknown memory".into(), |mib| format!("{mib} MiB"));
                    let address =
                        device.pci_address.map_or(String::new(), |address| format!(", {address}"));
                    let GpuDevice { index, uuid, .. } = device;
                    Check::ok("gpu", format!("{index}: {name}, {memory}, {uuid}{address}"))
                }));
                checks.extend(missing.iter().map(|description| {
                    let fix = "nvidia-smi -q and dmesg show details; power-cycle the VM \
                               (onevm poweroff, onevm resume)";
                    Check::problem("gpu", self.gpu_problem_level(), description, fix)
                }));
                checks
            }
            Verdict::Cpu { finding: Some(finding) } => vec![self.check_from_finding(ID, &finding)],
            Verdict::Cpu { finding: None } => vec![Check::ok(ID, outcome.summary())],
        }
    }

    /// Applies the configured selection if a GPU is usable.
    pub(super) fn gpu_selection(&self) -> Option<Check> {
        const ID: &str = "gpu-selection";
        let config = self.config().filter(|config| config.gpu.enabled)?;
        let outcome = self.facts.nvml.as_ref().ok()?;
        if self.decide_for_all_gpus(outcome).devices().is_empty() {
            return None;
        }
        let verdict = decide_gpu_or_cpu(&config.gpu, config.framework, &self.facts.pci, outcome);
        Some(match (verdict.finding(), verdict.devices().len()) {
            (Some(finding), _) => self.check_from_finding(ID, finding),
            (None, count) => Check::ok(
                ID,
                format!("FL_CUDA_VISIBLE_DEVICES={}: {count} for the node", config.gpu.selection),
            ),
        })
    }

    /// Decides for a request of every GPU, to report the state of each.
    fn decide_for_all_gpus(&self, outcome: &ProbeOutcome) -> Verdict {
        let request = GpuRequest { enabled: true, ..GpuRequest::default() };
        decide_gpu_or_cpu(&request, Framework::PyTorch, &self.facts.pci, outcome)
    }

    fn check_from_finding(&self, id: &'static str, finding: &Finding) -> Check {
        Check::problem(
            id,
            self.gpu_problem_level(),
            format!("{}: {}", finding.reason, finding.summary),
            self.fix(finding.reason),
        )
    }
}
