//! Every reason for a CPU fallback before and at the launch. Each is produced as realistically as a
//! machine without a GPU permits, by `supernode-agent run` on a real Docker engine. `make test`
//! prints the table.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant;

use common::{
    GPU_A, TIMEOUT, engine_with, gpu_context, inspect, json_of, nvidia_library, one_gpu, report,
    report_cause, start_ready, sysfs_of_one, two_gpus, warnings,
};
use serde_json::{Value, json};
use supernode_tests::{Agent, Engine, RuntimeMode, Sysfs, TestVm, nvml_library};

/// Reason codes that only occur while the container runs, and the test file that produces them.
const WHILE_RUNNING: &[(&str, &str)] = &[("gpu-failed", "tests/tests/gpu_monitor.rs")];

type Prepare = dyn Fn(&Engine, &mut TestVm);

/// A cause of a CPU fallback.
struct Cause {
    code: &'static str,
    /// How it is produced; shown in the table.
    how: String,
    /// Particulars that the summary must contain.
    words: Vec<String>,
    /// Introduces the fault into a healthy VM with a GPU and an engine.
    prepare: Box<Prepare>,
}

impl Cause {
    fn new(
        code: &'static str,
        how: impl Into<String>,
        words: &[&str],
        prepare: impl Fn(&Engine, &mut TestVm) + 'static,
    ) -> Self {
        let words = words.iter().map(|words| (*words).to_owned()).collect();
        Self { code, how: how.into(), words, prepare: Box::new(prepare) }
    }

    /// A VM with these PCI devices and this context.
    fn with_sysfs(
        code: &'static str,
        how: &str,
        words: &[&str],
        sysfs: impl Fn() -> Sysfs + 'static,
        more: &'static [(&'static str, &'static str)],
    ) -> Self {
        Self::new(code, how, words, move |_, vm| {
            vm.sysfs(&sysfs()).context(&json_log_context(more));
        })
    }

    /// A library with this script of the NVML simulator.
    fn with_library(
        code: &'static str,
        how: impl Into<String>,
        words: &[&str],
        script: Value,
    ) -> Self {
        Self::new(code, how, words, move |_, vm| {
            vm.nvml(&script);
        })
    }

    /// A file in place of the library; `None`: no file.
    fn with_library_file(
        code: &'static str,
        how: &str,
        words: &[&str],
        bytes: impl Fn(Vec<u8>) -> Option<Vec<u8>> + 'static,
    ) -> Self {
        Self::new(code, how, words, move |_, vm| {
            let path = vm.path("libnvidia-ml.so.1");
            if let Some(bytes) = bytes(fs::read(nvml_library()).unwrap()) {
                fs::write(&path, bytes).unwrap();
            }
            vm.set("gpu.nvml_library", path.to_string_lossy().into_owned());
        })
    }
}

/// Context of a node that wants the GPU and logs JSON.
fn json_log_context<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    gpu_context(&[&[("FL_LOG_FORMAT", "json")], more].concat())
}

const GPU: &str = "0000:01:00.0";

/// Causes visible in sysfs, found before NVML is called.
fn sysfs_causes() -> Vec<Cause> {
    let assigned = "OpenNebula assigned 0000:01:00.0 to this VM";
    let nic = || Sysfs::new().device(GPU, "0x8086", "0x020000", Some("igb"));
    let display = || Sysfs::new().device("0000:00:02.0", "0x1234", "0x030000", Some("bochs-drm"));
    vec![
        Cause::with_sysfs(
            "gpu-not-present",
            "no GPU assigned, none present",
            &[
                "assigned no GPU",
                "2 PCI devices",
                "0000:00:02.0 (1234:20f1, class 0300, driver bochs-drm)",
            ],
            display,
            &[("PCI0_ADDRESS", "")],
        ),
        Cause::with_sysfs(
            "gpu-not-present",
            "only a NIC assigned (PCI0_MAC)",
            &["assigned no GPU"],
            nic,
            &[("PCI0_MAC", "02:00:00:00:00:01")],
        ),
        Cause::with_sysfs(
            "gpu-not-passed-through",
            "assigned, no device at the address",
            &[assigned, "no device at that address"],
            Sysfs::new,
            &[],
        ),
        Cause::with_sysfs(
            "gpu-not-passed-through",
            "assigned, a NIC at the address",
            &[assigned, "not an NVIDIA GPU (8086:20f1, class 0200, driver igb)"],
            nic,
            &[],
        ),
        Cause::with_sysfs(
            "gpu-not-passed-through",
            "two assigned, no device at either address",
            &[assigned, "0000:21:00.0"],
            Sysfs::new,
            &[("PCI1_ADDRESS", "21:00.0")],
        ),
        Cause::with_sysfs(
            "driver-not-loaded",
            "GPU without a driver",
            &[
                "no driver is bound to GPU 0000:01:00.0 (10de:20f1, class 0302)",
                "module is not loaded",
            ],
            || Sysfs::new().gpu(GPU),
            &[],
        ),
        Cause::with_sysfs(
            "driver-not-loaded",
            "GPU not bound by the loaded module",
            &[GPU, "module 550.54.15 is loaded but did not bind it"],
            || Sysfs::new().gpu(GPU).module("550.54.15"),
            &[],
        ),
        Cause::with_sysfs(
            "driver-not-loaded",
            "module still loading after the wait",
            &[GPU, "still coming"],
            || Sysfs::new().gpu(GPU).module_in_state("550.54.15", "coming"),
            &[],
        ),
        Cause::new(
            "driver-not-loaded",
            "no module and no headers for the kernel, Secure Boot on",
            &[
                "no module is installed for kernel 6.1.0-37-amd64",
                "headers of kernel 6.1.0-37-amd64",
                "Secure Boot is on",
            ],
            |_, vm| {
                vm.sysfs(&Sysfs::new().gpu(GPU).secure_boot(true));
                let list = "kernel/drivers/video/fbdev/nvidia/nvidiafb.ko.xz:\n";
                vm.kernel("6.1.0-37-amd64", &[("lib/modules/6.1.0-37-amd64/modules.dep", list)]);
            },
        ),
        Cause::new(
            "driver-not-loaded",
            "DKMS module built only for the previous kernel",
            &["DKMS has the source nvidia-current 535.261.03 \
                 but no module built for kernel 6.1.0-38-amd64; the headers"],
            |_, vm| {
                vm.sysfs(&Sysfs::new().gpu(GPU).secure_boot(false));
                let built = "var/lib/dkms/nvidia-current/535.261.03/6.1.0-37-amd64/x86_64/module/\
                             nvidia-current.ko.xz";
                vm.kernel("6.1.0-38-amd64", &[(built, ""), ("etc/debian_version", "12.11\n")]);
            },
        ),
        Cause::new(
            "driver-not-loaded",
            "module installed but not loaded",
            &["a module is installed for kernel 6.8.0-60-generic"],
            |_, vm| {
                vm.sysfs(&Sysfs::new().gpu(GPU).secure_boot(false));
                let list = "kernel/nvidia-570-server/nvidia.ko:\n";
                vm.kernel(
                    "6.8.0-60-generic",
                    &[("lib/modules/6.8.0-60-generic/modules.dep", list)],
                );
            },
        ),
        Cause::with_sysfs(
            "wrong-driver",
            "GPU bound to nouveau",
            &[GPU, "10de:20f1", "driver nouveau"],
            || Sysfs::new().gpu(GPU).driver("nouveau"),
            &[],
        ),
        Cause::with_sysfs(
            "wrong-driver",
            "GPU bound to vfio-pci, FL_LOG_LEVEL=ERROR",
            &[GPU, "driver vfio-pci"],
            || Sysfs::new().gpu(GPU).driver("vfio-pci"),
            &[("FL_LOG_LEVEL", "ERROR")],
        ),
        Cause::with_sysfs(
            "wrong-driver",
            "two GPUs, one bound to nouveau, one unbound",
            &[GPU, "0000:21:00.0", "driver nouveau"],
            || Sysfs::new().gpu("0000:21:00.0").gpu(GPU).driver("nouveau"),
            &[],
        ),
    ]
}

/// Causes in the operator's configuration.
fn operator_causes() -> Vec<Cause> {
    vec![
        Cause::with_sysfs(
            "device-selection-empty",
            "FL_CUDA_VISIBLE_DEVICES=none",
            &["'none'", GPU],
            sysfs_of_one,
            &[("FL_CUDA_VISIBLE_DEVICES", "none")],
        ),
        Cause::with_sysfs(
            "device-selection-empty",
            "FL_CUDA_VISIBLE_DEVICES with a missing index",
            &["'3'", GPU_A, GPU],
            sysfs_of_one,
            &[("FL_CUDA_VISIBLE_DEVICES", "3")],
        ),
        Cause::new(
            "device-selection-empty",
            "GPU in MIG mode without instances",
            &[GPU_A, "MIG mode, no instances"],
            |_, vm| {
                let mut script = one_gpu();
                script["gpus"][0]["mig"] = json!([]);
                vm.nvml(&script);
            },
        ),
        Cause::with_sysfs(
            "framework-without-gpu",
            "ML_FRAMEWORK=sklearn",
            &["scikit-learn"],
            sysfs_of_one,
            &[("ML_FRAMEWORK", "sklearn")],
        ),
    ]
}

/// Causes in the driver library: files that are not a library, then libraries that fail.
fn library_causes() -> Vec<Cause> {
    let missing = "driver-library-missing";
    let unhealthy = |key: &str, value: Value| {
        let mut script = one_gpu();
        script["gpus"][0][key] = value;
        script
    };
    vec![
        Cause::with_library_file(
            missing,
            "no library",
            &["it is not installed", GPU, "550.54.15"],
            |_| None,
        ),
        Cause::with_library_file(
            missing,
            "library truncated to 10 bytes",
            &["it is truncated: 10 of"],
            |whole| Some(whole[..10].to_vec()),
        ),
        Cause::with_library_file(
            missing,
            "library truncated to 12 KiB (SIGBUS when mapped)",
            &["it is truncated: 12288 of"],
            |whole| Some(whole[..3 * 4096].to_vec()),
        ),
        Cause::with_library_file(missing, "library is empty", &["it is truncated: 0 of"], |_| {
            Some(Vec::new())
        }),
        Cause::with_library_file(missing, "library is a text file", &["no ELF header"], |_| {
            Some(vec![b'#'; 200])
        }),
        // EI_CLASS, and e_machine: ARM.
        Cause::with_library_file(
            missing,
            "32-bit library",
            &["another architecture (32 bits"],
            |whole| Some(with_byte(whole, 4, 1)),
        ),
        Cause::with_library_file(
            missing,
            "ARM library",
            &["another architecture (64 bits, ELF machine 40)"],
            |whole| Some(with_byte(whole, 18, 40)),
        ),
        Cause::new(
            "driver-too-old",
            "library without NVML functions (libm)",
            &["nvmlInit_v2"],
            |_, vm| {
                vm.set("gpu.nvml_library", "libm.so.6");
            },
        ),
        Cause::new(
            "driver-library-mismatch",
            "library 560.35.03 with module 550.54.15",
            &["the library has version 560.35.03", "kernel module 550.54.15"],
            |_, vm| {
                vm.nvml(&json!({"fail": {"nvmlInit_v2": 18}}));
                let file = vm.path("libnvidia-ml.so.560.35.03");
                fs::copy(nvml_library(), &file).unwrap();
                let link = vm.path("libnvidia-ml.so.1");
                symlink("libnvidia-ml.so.560.35.03", &link).unwrap();
                vm.set("gpu.nvml_library", link.to_string_lossy().into_owned());
            },
        ),
        Cause::with_library(
            "driver-timeout",
            "nvmlInit hangs",
            &["within 1 s", GPU, "550.54.15", "libnvml_simulator.so"],
            json!({"hang": ["nvmlInit_v2"]}),
        ),
        Cause::with_library(
            "driver-timeout",
            "nvmlDeviceGetCount hangs",
            &["within 1 s", GPU],
            json!({"hang": ["nvmlDeviceGetCount_v2"]}),
        ),
        Cause::with_library(
            "driver-crash",
            "library crashes with SIGSEGV",
            &["signal 11 (SIGSEGV)", GPU, "550.54.15", "libnvml_simulator.so"],
            json!({"crash": ["nvmlInit_v2"]}),
        ),
        Cause::with_library(
            "driver-crash",
            "library raises SIGSEGV",
            &["signal 11 (SIGSEGV)"],
            json!({"raise": ["nvmlInit_v2"]}),
        ),
        Cause::with_library(
            "gpu-count-zero",
            "driver reports no GPU",
            &["driver 550.54.15 is loaded but reports no GPU", GPU],
            json!({"gpus": []}),
        ),
        Cause::with_library(
            "gpu-unhealthy",
            "uncorrectable ECC error",
            &[GPU_A, GPU, "1 uncorrectable ECC error"],
            unhealthy("ecc_uncorrected", json!(1)),
        ),
        Cause::with_library(
            "gpu-unhealthy",
            "failed row remapping",
            &[GPU_A, GPU, "row remapping failed"],
            unhealthy("remap_failed", json!(true)),
        ),
        Cause::with_library(
            "gpu-lost",
            "GPU lost during nvmlDeviceGetName",
            &[GPU_A, GPU, "nvmlDeviceGetName"],
            unhealthy("fail", json!({"nvmlDeviceGetName": 15})),
        ),
    ]
}

fn with_byte(mut bytes: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
    bytes[at] = value;
    bytes
}

/// Every return code of NVML (nvml.h, `nvmlReturn_t`).
fn nvml_code_causes() -> Vec<Cause> {
    let expected = |code: u32| match code {
        4 | 17 => "permission-denied",
        8 | 11 | 14 => "gpu-unhealthy",
        9 => "driver-not-loaded",
        12 => "driver-library-missing",
        13 => "driver-too-old",
        15 => "gpu-lost",
        16 => "gpu-reset-required",
        18 => "driver-library-mismatch",
        27 => "driver-not-ready",
        28 => "gpu-count-zero",
        _ => "driver-error",
    };
    (1..=30)
        .chain([999])
        .map(|code| {
            let text = format!("NVML error {code}:");
            let script = json!({"fail": {"nvmlInit_v2": code}});
            Cause::with_library(
                expected(code),
                format!("NVML returns {code}"),
                &[&text, GPU],
                script,
            )
        })
        .collect()
}

/// Causes in Docker before the launch; the runtime is registered neither before nor after.
fn docker_causes() -> Vec<Cause> {
    let reload_cause =
        |how: &'static str, text: &'static str, reload: &'static [&'static str], words: &[&str]| {
            Cause::new("runtime-not-configured", how, words, move |engine, vm| {
                fs::write(engine.daemon_json(), text).unwrap();
                vm.set("docker.reload_command", reload);
            })
        };
    vec![
        Cause::new(
            "runtime-missing",
            "nvidia-container-runtime is not installed",
            &[
                "nvidia-container-runtime-is-not-here is not installed",
                "Docker's runtimes are: ",
                "runc",
            ],
            |_, vm| {
                vm.set("docker.runtime_path", "nvidia-container-runtime-is-not-here");
            },
        ),
        reload_cause(
            "daemon.json is not JSON",
            "{\n  \"debug\": yes\n}",
            &["true"],
            &["daemon.json", "line 2, column 12"],
        ),
        reload_cause(
            "Docker cannot be reloaded",
            "{}",
            &["false"],
            &["daemon.json", "cannot reload Docker"],
        ),
        reload_cause(
            "Docker does not register the runtime",
            "{}",
            &["true"],
            &["daemon.json", "did not register"],
        ),
    ]
}

/// Causes at the launch itself, with the runtime registered.
fn launch_causes() -> Vec<Cause> {
    let refuses = |how: &'static str, message: &'static str| {
        Cause::new(
            "runtime-start-failed",
            how,
            &["Docker did not start the container with the GPU", "nvidia-container-cli", message],
            move |engine, _| {
                engine.nvidia_runtime(RuntimeMode::FailWith(message.into()), &one_gpu());
            },
        )
    };
    vec![
        refuses("runtime finds no driver", "initialization error: nvml error: driver not loaded"),
        refuses(
            "runtime finds the driver too old for the image",
            "requirement error: unsatisfied condition: cuda>=12.8, please update your driver to a \
             newer version",
        ),
        refuses("runtime does not find the GPU", "device error: GPU-x: unknown device"),
        Cause::new(
            "runtime-start-failed",
            "runtime is not an executable",
            &["Docker did not start the container with the GPU", "exec format error"],
            |engine, _| {
                let path = engine.runtime_path();
                fs::remove_file(&path).unwrap();
                fs::write(&path, "#").unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            },
        ),
        Cause::new(
            "gpu-not-visible",
            "runtime starts the container without the device",
            &[GPU_A, "the container runs without"],
            |engine, _| {
                engine.nvidia_runtime(RuntimeMode::NoDevice, &one_gpu());
            },
        ),
        Cause::new(
            "runtime-missing",
            "Docker's runtime entry names a missing program",
            &["nvidia-container-runtime", "does not exist"],
            |engine, vm| {
                fs::remove_file(engine.runtime_path()).unwrap();
                vm.set("docker.runtime_path", "nvidia-container-runtime-is-not-here");
            },
        ),
    ]
}

fn every_cause() -> Vec<Cause> {
    [
        sysfs_causes(),
        operator_causes(),
        library_causes(),
        nvml_code_causes(),
        docker_causes(),
        launch_causes(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Returns a healthy VM on the engine with this fault introduced.
fn faulty_vm(cause: &Cause, engine: &Engine) -> TestVm {
    engine.install_nvidia_runtime();
    engine.nvidia_runtime(RuntimeMode::Ok, &one_gpu());
    fs::write(engine.daemon_json(), "{}\n").unwrap();
    let mut vm = TestVm::new();
    vm.engine(engine).nvml(&one_gpu()).sysfs(&sysfs_of_one()).context(&json_log_context(&[]));
    vm.set("gpu.probe_timeout_seconds", 1);
    (cause.prepare)(engine, &mut vm);
    vm
}

/// Log entries of an agent that logs JSON.
fn entries(agent: &Agent) -> Vec<Value> {
    agent
        .lines()
        .iter()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

/// Asserts that the entry names the cause: code, particulars, fix, and the MESSAGE_ID of the
/// explanation that `journalctl -x` prints.
#[track_caller]
fn assert_describes(cause: &Cause, entry: &Value, documented: &Documented) {
    let text = |field: &str| entry[field].as_str().unwrap_or_default();
    assert_eq!(text("fl_gpu_reason"), cause.code, "{}: {entry:#}", cause.how);
    for words in &cause.words {
        assert!(
            text("fl_gpu_summary").contains(words.as_str()),
            "{}: {words}: {entry:#}",
            cause.how
        );
    }
    assert_eq!(text("message_id"), documented.message_id, "{entry:#}");
    assert!(
        documented.fixes.iter().any(|fix| fix == text("fl_gpu_fix")),
        "{documented:#?}: {entry:#}"
    );
    let message = text("message");
    for part in [cause.code, text("fl_gpu_summary"), text("fl_gpu_fix")] {
        assert!(!part.is_empty() && message.contains(part), "{part}: {message}");
    }
}

/// Produces each cause and asserts that the node runs on the CPU after exactly one WARNING, logged
/// before the launch.
fn assert_all_logged(engine: &Engine, causes: &[Cause]) {
    let documented = documented();
    engine.import_image(&["flower-supernode-sklearn:1.31.0"]);
    for cause in causes {
        let vm = faulty_vm(cause, engine);
        let start = Instant::now();
        let mut agent = vm.start();
        agent.wait_for_line("no usable GPU; this node runs on the CPU:", TIMEOUT);
        let seconds = start.elapsed().as_secs_f64();
        agent.wait_for_notify("READY=1", TIMEOUT);
        let context = fs::read_to_string(vm.path("context/context.sh.network")).unwrap();
        let logs_all = !context.contains("FL_LOG_LEVEL='ERROR'");
        if logs_all {
            agent.wait_for_line("started container", TIMEOUT);
        }
        let entries = entries(&agent);
        let position = |wanted: &dyn Fn(&Value) -> bool| entries.iter().position(wanted);
        let warnings: Vec<&Value> =
            entries.iter().filter(|entry| entry["level"] == "WARNING").collect();
        assert_eq!(warnings.len(), 1, "{}: {entries:#?}", cause.how);
        assert_describes(cause, warnings[0], &documented[cause.code]);
        assert_eq!(warnings[0]["fl_gpu_status"], "cpu-fallback");
        let started = |entry: &Value| {
            entry["message"]
                .as_str()
                .is_some_and(|message| message.starts_with("started container"))
        };
        if logs_all {
            let started =
                position(&started).unwrap_or_else(|| panic!("{}: {entries:#?}", cause.how));
            assert!(
                position(&|entry| entry["level"] == "WARNING") < Some(started),
                "{}: {entries:#?}",
                cause.how
            );
        } else {
            // At level ERROR the WARNING is the only entry.
            assert_eq!(entries.len(), 1, "{}: {entries:#?}", cause.how);
        }
        assert_on_cpu_for(cause.code, &agent, engine);
        assert_eq!(agent.terminate(), 0);
        engine.docker(&["rm", "-f", "flower-supernode"]);
        report_cause(cause.code, seconds, &cause.how);
    }
}

/// Asserts that the container runs on the CPU and that the container's labels and the unit's status
/// give the reason.
#[track_caller]
fn assert_on_cpu_for(code: &str, agent: &Agent, engine: &Engine) {
    assert_eq!(inspect(engine, "{{.State.Running}} {{.HostConfig.Runtime}}"), "true runc");
    assert_eq!(inspect(engine, "{{index .Config.Labels \"supernode-agent.reason\"}}"), code);
    let env = inspect(engine, "{{range .Config.Env}}{{println .}}{{end}}");
    assert!(env.contains("NVIDIA_VISIBLE_DEVICES=void") && env.contains("FL_DEVICE=cpu"), "{env}");
    let status =
        agent.notifications().into_iter().rfind(|entry| entry.contains("READY=1")).unwrap();
    assert!(status.contains(code), "{status}");
    let containers = engine.docker(&["ps", "-aq"]).stdout;
    assert_eq!(containers.lines().count(), 1, "an exited container remains");
}

/// A code's entry in the journal catalog.
#[derive(Debug)]
struct Documented {
    message_id: String,
    /// The fixes for Debian, the distribution of a [`TestVm`], or the only fix if it is not
    /// specific to a distribution.
    fixes: Vec<String>,
}

fn in_tree(relative: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(relative);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All codes in the journal catalog, which is generated from the reason catalogue and checked
/// against it (agent/tests/documents.rs).
fn documented() -> BTreeMap<String, Documented> {
    in_tree("systemd/supernode-agent.catalog")
        .split("\n-- ")
        .skip(1)
        .map(|entry| {
            let (message_id, rest) = entry.split_once('\n').unwrap();
            let code =
                rest.lines().find_map(|line| line.strip_prefix("Subject: GPU problem: ")).unwrap();
            let (_, fixes) = rest.split_once("@FL_GPU_SUMMARY@\n\n").unwrap();
            // Each fix starts a line; continuation lines are joined.
            let mut texts: Vec<String> = Vec::new();
            for line in fixes.lines() {
                match texts.last_mut() {
                    Some(text) if !line.starts_with("Fix") => *text = format!("{text} {line}"),
                    _ => texts.push(line.to_owned()),
                }
            }
            let for_debian = ["Fix: ", "Fix on Debian: "];
            let fixes = texts
                .iter()
                .filter_map(|text| for_debian.iter().find_map(|start| text.strip_prefix(start)));
            let fixes = fixes.map(|fix| fix.trim().to_owned()).collect();
            (code.to_owned(), Documented { message_id: message_id.to_owned(), fixes })
        })
        .collect()
}

#[test]
fn sysfs_causes_are_logged() {
    let Some((engine, _)) = engine_with(&one_gpu()) else { return };
    assert_all_logged(&engine, &sysfs_causes());
    // Without a GPU, daemon.json must not be changed.
    assert_eq!(fs::read_to_string(engine.daemon_json()).unwrap().trim(), "{}");
}

#[test]
fn operator_choices_are_logged() {
    let Some((engine, _)) = engine_with(&one_gpu()) else { return };
    assert_all_logged(&engine, &operator_causes());
}

#[test]
fn driver_library_causes_are_logged() {
    let Some((engine, _)) = engine_with(&one_gpu()) else { return };
    assert_all_logged(&engine, &library_causes());
}

#[test]
fn every_nvml_error_code_is_logged() {
    let Some((engine, _)) = engine_with(&one_gpu()) else { return };
    assert_all_logged(&engine, &nvml_code_causes());
}

#[test]
fn docker_causes_are_logged() {
    let Some((engine, _)) = engine_with(&one_gpu()) else { return };
    assert_all_logged(&engine, &docker_causes());
    assert_all_logged(&engine, &launch_causes());
}

#[test]
fn every_reason_code_is_produced_and_documented() {
    let produced: BTreeSet<&str> = every_cause().iter().map(|cause| cause.code).collect();
    let documented = documented();
    let page = in_tree("packaging/docs/troubleshooting.md");
    let manual = in_tree("packaging/man/supernode-agent.8");
    for (code, entry) in &documented {
        let elsewhere = WHILE_RUNNING.iter().find(|(other, _)| other == code);
        assert!(
            produced.contains(code.as_str()) != elsewhere.is_some(),
            "{code} must be produced by exactly one test"
        );
        let id = &entry.message_id;
        assert!(id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{code}: {id}");
        assert!(entry.fixes.len() == 1 && !entry.fixes[0].is_empty(), "{code}: {entry:?}");
        let section = format!("\n### {code}\n");
        assert!(page.contains(&section), "troubleshooting.md has no section for {code}");
        let heading = format!("\n.B {}\n", code.replace('-', "\\-"));
        assert!(
            manual.contains(&heading) && manual.contains(id.as_str()),
            "the manual has no entry for {code}"
        );
    }
    for (code, file) in WHILE_RUNNING {
        if Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file).exists() {
            assert!(
                in_tree(file).contains(&format!("\"{code}\"")),
                "{file} does not produce {code}"
            );
        } else {
            report(&format!("SKIPPED: {code} is not produced without {file}"));
        }
    }
    for code in produced.iter().copied().chain(WHILE_RUNNING.iter().map(|(code, _)| *code)) {
        assert!(documented.contains_key(code), "{code} is not in the catalogue");
    }
}

#[test]
fn required_gpu_turns_every_cause_into_an_error() {
    let Some((engine, _)) = engine_with(&one_gpu()) else { return };
    let documented = documented();
    let mut seen = BTreeSet::new();
    for cause in every_cause().iter().filter(|cause| seen.insert(cause.code)) {
        let vm = faulty_vm(cause, &engine);
        // The prepared context with one more variable.
        let context = fs::read_to_string(vm.path("context/context.sh.network")).unwrap();
        for stage in ["local", "online", "network"] {
            let path = vm.path("context").join(format!("context.sh.{stage}"));
            fs::remove_file(&path).unwrap();
            fs::write(path, format!("{context}FL_GPU_REQUIRED='YES'\n")).unwrap();
        }
        let mut agent = vm.start();
        assert_eq!(
            agent.wait_exit(TIMEOUT),
            78,
            "systemd must not retry forever: {}: {:#?}",
            cause.how,
            agent.lines()
        );
        agent.wait_for_line("no usable GPU and FL_GPU_REQUIRED is YES", TIMEOUT);
        let entries = entries(&agent);
        let entry = entries.iter().find(|entry| entry["fl_gpu_status"] == "required");
        let entry = entry.unwrap_or_else(|| panic!("{}: {entries:#?}", cause.how));
        assert_eq!(entry["level"], "ERROR");
        assert_describes(cause, entry, &documented[cause.code]);
        assert!(
            !entries.iter().any(|entry| entry["level"] == "WARNING"),
            "{}: {entries:#?}",
            cause.how
        );
        assert!(!agent.notifications().iter().any(|entry| entry.contains("READY=1")));
        assert_eq!(engine.docker(&["ps", "-q"]).stdout, "", "{}: a container runs", cause.how);
        engine.docker(&["rm", "-f", "flower-supernode"]);
    }
}

#[test]
fn fix_matches_the_distribution() {
    for (os_release, words, not) in [
        (
            "ID=debian\nVERSION_ID=\"13\"\n",
            "linux-headers-$(uname -r) nvidia-driver",
            "ubuntu-drivers",
        ),
        ("ID=ubuntu\nID_LIKE=debian\n", "ubuntu-drivers install --gpgpu", "nvidia-driver "),
        ("ID=\"almalinux\"\nID_LIKE=\"rhel fedora\"\n", "NVIDIA's driver", "apt "),
    ] {
        let mut vm = TestVm::new();
        vm.sysfs(&Sysfs::new().gpu(GPU)).context(&json_log_context(&[])).os_release(os_release);
        vm.set("docker.ready_timeout_seconds", 0).set("gpu.wait_seconds", 0);
        let assert_own =
            |fix: &str| assert!(fix.contains(words) && !fix.contains(not), "{os_release}: {fix}");
        for command in ["gpu", "plan"] {
            assert_own(
                json_of(&vm.run_command(command, &["--json"]))["gpu"]["verdict"]["fix"]
                    .as_str()
                    .unwrap(),
            );
            let text = vm.run_command(command, &[]).stdout;
            assert_own(text.lines().find(|line| line.starts_with("  fix ")).unwrap());
        }
        let mut agent = vm.start();
        assert_eq!(agent.wait_exit(TIMEOUT), 1);
        agent.wait_for_line("no usable GPU", TIMEOUT);
        let warning =
            entries(&agent).into_iter().find(|entry| entry["level"] == "WARNING").unwrap();
        assert_own(warning["fl_gpu_fix"].as_str().unwrap());
        assert_own(warning["message"].as_str().unwrap());
    }
}

#[test]
fn status_shows_same_fix_with_and_without_agent_report() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&Sysfs::new().gpu(GPU))
        .context(&gpu_context(&[]))
        .os_release("ID=ubuntu\nID_LIKE=debian\n");
    let mut agent = start_ready(&vm);
    agent.kill();
    for _ in ["from the agent's report", "from the container's labels"] {
        let status = json_of(&vm.run_command("status", &["--json"]));
        let fix = status["gpu"]["verdict"]["fix"].as_str().unwrap_or_default();
        assert!(fix.contains("ubuntu-drivers install --gpgpu"), "{status:#}");
        fs::remove_file(vm.path("state/status.json")).unwrap_or_default();
    }
    drop(engine);
}

// Assigned devices and present devices. The fallbacks are causes in the table above, each with its
// code.

#[test]
fn unassigned_present_gpu_is_used_without_warning() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[("PCI0_ADDRESS", "")]));
    let agent = start_ready(&vm);
    assert_eq!(warnings(&agent), Vec::<String>::new());
    assert_eq!(inspect(&engine, "{{.HostConfig.Runtime}}"), "nvidia");
}

#[test]
fn present_assigned_gpu_is_used_and_missing_one_warned() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[("PCI1_ADDRESS", "21:00.0")]));
    let agent = start_ready(&vm);
    let warnings = warnings(&agent);
    assert_eq!(warnings.len(), 1, "{:#?}", agent.lines());
    for words in [
        "selected GPUs are unusable and not used",
        "OpenNebula assigned 0000:21:00.0 to this VM",
        "no device at that address",
    ] {
        assert!(warnings[0].contains(words), "{warnings:?}");
    }
    let lines = agent.lines();
    let position = |text: &str| lines.iter().position(|line| line.contains(text)).unwrap();
    assert!(position(" WARNING ") < position("started container"), "{lines:#?}");
    assert_eq!(inspect(&engine, "{{.HostConfig.Runtime}}"), "nvidia");
    assert_eq!(engine.records().last().unwrap().gpus, [GPU_A]);
}

#[test]
fn gpu_without_driver_is_skipped_with_warning() {
    let Some((engine, mut vm)) = engine_with(&two_gpus()) else { return };
    let sysfs = Sysfs::new()
        .gpu("0000:21:00.0")
        .driver("nouveau")
        .gpu(GPU)
        .driver("nvidia")
        .module("550.54.15");
    vm.sysfs(&sysfs).nvml(&one_gpu()).context(&gpu_context(&[("PCI1_ADDRESS", "21:00.0")]));
    let agent = start_ready(&vm);
    let warnings = warnings(&agent);
    assert_eq!(warnings.len(), 1, "{:#?}", agent.lines());
    assert!(
        warnings[0].contains("0000:21:00.0") && warnings[0].contains("wrong-driver"),
        "{warnings:?}"
    );
    assert_eq!(engine.records().last().unwrap().gpus, [GPU_A]);
}

#[test]
fn assigned_gpu_without_driver_blames_the_driver() {
    for (sysfs, expected) in [
        (Sysfs::new().gpu(GPU), "driver-not-loaded"),
        (Sysfs::new().gpu(GPU).driver("nouveau"), "wrong-driver"),
    ] {
        let mut vm = TestVm::new();
        for address in ["01:00.0", ""] {
            vm.sysfs(&sysfs).context(&gpu_context(&[("PCI0_ADDRESS", address)]));
            assert_eq!(
                json_of(&vm.run_command("gpu", &["--json"]))["gpu"]["verdict"]["reason"],
                expected
            );
        }
    }
}

// Further properties of some causes.

/// Asserts that the node runs on the CPU with `reason`, after exactly one WARNING that was logged
/// before the launch.
#[track_caller]
fn assert_cpu_for(reason: &str, agent: &Agent, engine: &Engine) {
    agent.wait_for_line("started container", TIMEOUT);
    let warnings = warnings(agent);
    assert_eq!(warnings.len(), 1, "{:#?}", agent.lines());
    assert!(warnings[0].contains(reason) && warnings[0].contains("; fix: "), "{warnings:?}");
    let lines = agent.lines();
    let position = |text: &str| lines.iter().position(|line| line.contains(text)).unwrap();
    assert!(position(" WARNING ") < position("started container"), "{lines:#?}");
    assert_on_cpu_for(reason, agent, engine);
}

#[test]
fn fallback_warning_ignores_log_level_and_has_json_fields() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&Sysfs::new())
        .context(&gpu_context(&[("FL_LOG_LEVEL", "ERROR"), ("FL_LOG_FORMAT", "json")]));
    let agent = start_ready(&vm);
    let lines = agent.lines();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    let entry: Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!(entry["level"], "WARNING");
    assert_eq!(entry["fl_gpu_reason"], "gpu-not-passed-through");
    assert_eq!(entry["pci_address"], "0000:01:00.0");
    assert_eq!(entry["message_id"].as_str().unwrap().len(), 32);
    drop(agent);
    drop(engine);
}

#[test]
fn missing_runtime_is_named() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one())
        .context(&gpu_context(&[]))
        .set("docker.runtime_path", "nvidia-container-runtime-is-not-here");
    assert_cpu_for("runtime-missing", &start_ready(&vm), &engine);
    assert_eq!(fs::read_to_string(engine.daemon_json()).unwrap().trim(), "{}");
}

#[test]
fn runtime_entry_with_missing_program_is_named() {
    let Some((mut engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[]));
    let text = r#"{"runtimes": {"nvidia": {"path": "/nowhere/nvidia-container-runtime"}}}"#;
    fs::write(engine.daemon_json(), text).unwrap();
    for _ in ["registered by the reload", "registered at Docker's start"] {
        let mut agent = start_ready(&vm);
        assert_cpu_for("runtime-missing", &agent, &engine);
        assert!(
            warnings(&agent)[0].contains("/nowhere/nvidia-container-runtime"),
            "{:?}",
            warnings(&agent)
        );
        assert_eq!(agent.terminate(), 0);
        engine.docker(&["rm", "-f", "flower-supernode"]);
        engine.restart();
    }
    assert_eq!(fs::read_to_string(engine.daemon_json()).unwrap(), text);
}

#[test]
fn refused_gpu_launch_runs_on_cpu_and_is_adopted() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[]));
    engine.nvidia_runtime(RuntimeMode::Fail, &one_gpu());
    let mut agent = start_ready(&vm);
    assert_cpu_for("runtime-start-failed", &agent, &engine);
    assert!(
        warnings(&agent)[0].contains("nvidia-container-cli"),
        "Docker's message: {:?}",
        warnings(&agent)
    );
    let containers = engine.docker(&["ps", "-aq"]).stdout;
    assert_eq!(containers.lines().count(), 1, "the exited container remains");
    // After the agent is killed, the next one finds the CPU container, repeats the warning and
    // leaves the container alone.
    let pid = inspect(&engine, "{{.State.Pid}}");
    agent.kill();
    let agent = start_ready(&vm);
    assert_eq!(inspect(&engine, "{{.State.Pid}}"), pid);
    assert_eq!(warnings(&agent).len(), 1);
    assert!(warnings(&agent)[0].contains("runtime-start-failed"));
    drop(agent);
    // Repaired and restarted, the node uses the GPU.
    engine.nvidia_runtime(RuntimeMode::Ok, &one_gpu());
    engine.docker(&["stop", "flower-supernode"]);
    let agent = start_ready(&vm);
    assert_eq!(warnings(&agent), Vec::<String>::new());
    assert_eq!(inspect(&engine, "{{.HostConfig.Runtime}}"), "nvidia");
}

#[test]
fn nvidia_library_reports_no_driver_and_needs_a_gpu_to_load() {
    let Some(library) = nvidia_library() else { return };
    let Some((engine, _)) = engine_with(&one_gpu()) else { return };
    let at = library.to_string_lossy().into_owned();
    let device_nodes = || {
        let nodes = fs::read_dir("/dev").unwrap().flatten();
        nodes.filter(|node| node.file_name().to_string_lossy().starts_with("nvidia")).count()
    };
    let before = device_nodes();
    // As root, the library creates /dev/nvidiactl; removed on drop.
    struct RemoveNode(bool);
    impl Drop for RemoveNode {
        fn drop(&mut self) {
            if self.0 {
                let _ = fs::remove_file("/dev/nvidiactl");
            }
        }
    }
    let node = RemoveNode(before == 0);
    let name = library.canonicalize().unwrap();
    let version = name.to_string_lossy().rsplit_once(".so.").unwrap().1.to_owned();
    let how = format!("NVIDIA's own libnvidia-ml {version}, without a driver");
    let (path, on_disk) = (at.clone(), version.clone());
    let words = ["NVML error 9: ", "the nvidia module is not loaded", GPU, on_disk.as_str()];
    let cause = Cause::new("driver-not-loaded", how, &words, move |_, vm| {
        vm.sysfs(&Sysfs::new().gpu(GPU).driver("nvidia"));
        vm.set("gpu.nvml_library", path.as_str()).set("gpu.probe_timeout_seconds", 20);
    });
    assert_all_logged(&engine, &[cause]);
    // The dynamic loader's record of the libraries opened by the agent and the probe.
    let loaded = |sysfs: &Sysfs, expected: &str| {
        let mut vm = TestVm::new();
        vm.sysfs(sysfs).context(&gpu_context(&[])).set("gpu.nvml_library", at.as_str());
        let record = vm.path("loader");
        vm.env("LD_DEBUG", "files").env("LD_DEBUG_OUTPUT", record);
        vm.set("docker.ready_timeout_seconds", 0).set("gpu.wait_seconds", 0);
        let mut agent = vm.start();
        assert_eq!(agent.wait_exit(TIMEOUT), 1);
        let warning = agent.wait_for_line(" WARNING ", TIMEOUT);
        assert!(warning.contains(expected), "{:#?}", agent.lines());
        let records = fs::read_dir(vm.path("")).unwrap().flatten().map(|entry| entry.path());
        let records: Vec<PathBuf> =
            records.filter(|path| path.to_string_lossy().contains("/loader.")).collect();
        assert!(!records.is_empty(), "the loader wrote no record");
        records
            .iter()
            .any(|path| String::from_utf8_lossy(&fs::read(path).unwrap()).contains("libnvidia-ml"))
    };
    assert!(
        loaded(&sysfs_of_one(), "driver-not-loaded"),
        "the record must show the library when a GPU is present"
    );
    drop(node);
    assert!(
        !loaded(&Sysfs::new(), "gpu-not-passed-through"),
        "NVIDIA's library was loaded on a machine without a GPU"
    );
    assert_eq!(device_nodes(), before);
}
