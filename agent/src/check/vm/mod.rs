//! `check vm`: diagnoses whether this VM has a usable GPU, whether Docker can pass it to the node,
//! and what the VM template could improve. [`read`] reads the facts; [`judge`] is pure.

mod configuration;
mod docker;
mod facts;
mod gpu;
mod hardware;
mod subject;

use super::Check;
use crate::system::os_release::Distribution;
use subject::Vm;

pub(crate) use facts::read;
pub use facts::{Unconfigured, VmFacts};

/// Evaluates the facts.
pub fn judge(facts: &VmFacts, distribution: Distribution) -> Vec<Check> {
    let vm = Vm { facts, distribution };
    let mut checks = vec![vm.settings()];
    checks.extend(vm.configuration());
    checks.push(vm.gpu_enabled());
    checks.extend(vm.assigned());
    checks.extend(vm.gpu_present());
    checks.push(vm.kernel_module());
    checks.extend(vm.nvml());
    checks.extend(vm.gpu_selection());
    checks.extend([vm.firmware(), vm.machine_type(), vm.cpu_model(), vm.numa()]);
    checks.extend([vm.docker(), vm.nvidia_runtime(), vm.runtime_program(), vm.cdi()]);
    checks.extend([vm.image(), vm.disk(), vm.memory()]);
    checks
}

#[cfg(test)]
mod tests {
    use crate::check::test_support::{Problem, assert_only, problems};
    use std::time::Duration;

    use one_context::Context;

    use super::subject::GIB;
    use super::*;
    use crate::check::Level;
    use crate::config::Diagnostics;
    use crate::config::settings::Injection;
    use crate::config::{Config, Prebaked};
    use crate::docker::client::EngineInfo;
    use crate::gpu::nvml_error::{Fault, FaultKind};
    use crate::gpu::nvml_library::LibraryFile;
    use crate::gpu::pci::{PciDevice, PciFacts};
    use crate::gpu::probe::ProbeOutcome;
    use crate::gpu::probe_child::{DriverReport, ProbeAnswer, ProbedGpu};
    use crate::gpu::reason::Reason;
    use crate::values::{GpuUuid, PciAddress};

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

    fn healthy_vm() -> VmFacts {
        let gpu = ProbedGpu {
            uuid: GpuUuid::parse("GPU-1").ok(),
            name: Some("NVIDIA A100".into()),
            pci_address: PciAddress::parse("00000000:01:00.0"),
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
            dmi_names: Ok(vec!["Standard PC (Q35 + ICH9, 2009)".into(), "pc-q35-8.2".into()]),
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

    fn problems_after(change: impl FnOnce(&mut VmFacts)) -> Vec<Problem> {
        let mut facts = healthy_vm();
        change(&mut facts);
        problems(judge(&facts, Distribution::Ubuntu))
    }

    #[track_caller]
    fn one(change: impl FnOnce(&mut VmFacts), level: Level, id: &str, finding: &str, fix: &str) {
        assert_only(&problems_after(change), level, id, finding, fix);
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
    fn healthy_vm_has_no_problem() {
        assert_eq!(problems_after(|_| ()), []);
    }

    #[test]
    fn gpu_fault_has_fix_for_this_distribution() {
        use Level::{Error, Warning};
        let absent = problems_after(|facts| {
            facts.pci = PciFacts::default();
            facts.nvml = Err("no GPU".into());
        });
        let ids: Vec<_> = absent.iter().map(|(level, id, ..)| (*level, *id)).collect();
        assert_eq!(ids, [(Error, "gpu-assigned"), (Error, "gpu-present")]);
        assert!(absent[0].2.contains("PCI0_ADDRESS='01:00.0'"), "{absent:?}");
        let nouveau = problems_after(|facts| {
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
            "gpu-enabled",
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
        let plaintext = format!(
            "FL_GPU_ENABLED='YES'\nFL_SUPERLINK_ADDRESS='h:1'\nFL_SSL_CA_CERTFILE='{ca}'\n"
        );
        one(
            |facts| facts.config = config(&plaintext),
            Warning,
            "configuration",
            "NOT encrypted; set FL_TLS_ENABLED=YES",
            "CONTEXT",
        );
    }

    #[test]
    fn unreadable_bus_is_not_an_absent_gpu() {
        let problems = problems_after(|facts| {
            facts.pci =
                PciFacts { unreadable: vec!["/sys/bus: denied".into()], ..PciFacts::default() };
            facts.nvml = Err("no GPU".into());
            facts.dmi_names = Ok(vec!["pc-q35-8.2".into()]);
        });
        let ids: Vec<_> = problems.iter().map(|(level, id, ..)| (*level, *id)).collect();
        assert_eq!(ids, [(Level::Warning, "gpu-assigned"), (Level::Warning, "gpu-present")]);
        let denied =
            problems_after(|facts| facts.engine = Err("… Permission denied (os error 13)".into()));
        assert_eq!((denied[0].0, denied[0].1), (Level::Warning, "docker"));
    }

    #[test]
    fn absent_gpu_is_no_problem_if_not_enabled() {
        let problems = problems_after(|facts| {
            facts.pci =
                PciFacts { devices: facts.pci.devices[..1].to_vec(), ..PciFacts::default() };
            facts.nvml = Err("no GPU".into());
            facts.config = config("ML_FRAMEWORK='sklearn'\n");
            facts.runtime.1 = None;
            facts.engine = Ok(EngineInfo::default());
        });
        assert_eq!(problems, []);
    }

    #[test]
    fn missing_template_attribute_is_a_warning() {
        use Level::Warning;
        one(|facts| facts.is_uefi = Ok(false), Warning, "firmware", "BIOS", "FIRMWARE=\"UEFI\"");
        let i440fx = |facts: &mut VmFacts| {
            facts.dmi_names = Ok(vec!["Standard PC (i440FX + PIIX, 1996)".into()]);
            facts.pci.devices[0].device = Some(0x1237);
        };
        one(i440fx, Warning, "machine-type", "i440fx", "MACHINE=\"q35\"");
        one(
            |facts| {
                facts.dmi_names = Err("/sys/class/dmi/id/product_name: denied".into());
                facts.pci.devices.remove(0);
            },
            Warning,
            "machine-type",
            "denied",
            "root",
        );
        assert_eq!(
            problems_after(|facts| facts.dmi_names = Ok(Vec::new())),
            [],
            "the host bridge shows it as well"
        );
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
        one(|facts| facts.cpuinfo = Ok(None), Warning, "cpu-model", "unknown", "root");
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
    fn missing_docker_parts_are_named() {
        use Level::{Error, Warning};
        let none = problems_after(|facts| {
            facts.engine = Err("the Docker engine at /x does not respond".into());
            facts.images[0].1 = Err("it does not respond".into());
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
        let with_cdi = problems_after(|facts| {
            facts.runtime.1 = None;
            let engine = facts.engine.as_mut().unwrap();
            engine.runtimes.clear();
            engine.cdi_devices = vec!["nvidia.com/gpu=0".into()];
        });
        assert_eq!(with_cdi, []);
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
            "prebaked flwr/supernode:1.31.0 is used",
            "docker pull",
        );
        one(|facts| facts.disk.1 = Ok(1000), Error, "disk", "0.0 GiB", "disk-resize");
        assert_eq!(
            problems_after(|facts| facts.disk.1 = Ok(2 * GIB)),
            [],
            "the image is available"
        );
        let small = problems_after(|facts| {
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
            (Err("denied".into()), "unknown: denied", Warning),
            (Ok(Some("{".into())), "daemon.json: EOF", Error),
            (Ok(Some("[]".into())), "not one JSON object", Error),
            (
                Ok(Some(r#"{"runtimes":{"nvidia":{}}}"#.into())),
                "daemon.json has the runtime nvidia",
                Warning,
            ),
        ] {
            let problems = problems_after(|facts| {
                facts.engine = Err("no response".into());
                facts.daemon_json = text;
            });
            let runtime = problems.iter().find(|(_, id, ..)| *id == "nvidia-runtime").unwrap();
            assert!(runtime.0 == level && runtime.2.contains(words), "{runtime:?}");
        }
    }
}
