//! Test VMs shared by several test files.
#![allow(
    clippy::panic,
    dead_code,
    reason = "tests fail by panicking; each test file uses a part of this module"
)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use supernode_tests::{Agent, Engine, Output, RuntimeMode, Sandbox, Sysfs, TestVm, image, run};

/// More than any step takes on a loaded machine.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) const GPU_A: &str = "GPU-aaaa1111-0000-0000-0000-000000000001";
pub(crate) const GPU_B: &str = "GPU-bbbb2222-0000-0000-0000-000000000002";

/// NVML script with one GPU.
pub(crate) fn one_gpu() -> Value {
    json!({"gpus": [{"uuid": GPU_A, "name": "NVIDIA A100", "memory_mib": 40960,
        "pci_address": "0000:01:00.0", "minor": 0}]})
}

/// NVML script with two GPUs.
pub(crate) fn two_gpus() -> Value {
    json!({"gpus": [
        {"uuid": GPU_A, "name": "NVIDIA A100", "memory_mib": 40960,
            "pci_address": "0000:01:00.0", "minor": 0},
        {"uuid": GPU_B, "name": "NVIDIA L4", "memory_mib": 23034, "pci_address": "0000:21:00.0",
            "minor": 1},
    ]})
}

/// sysfs of the same GPUs, both bound to the nvidia driver.
pub(crate) fn sysfs_of_two() -> Sysfs {
    Sysfs::new()
        .gpu("0000:01:00.0")
        .driver("nvidia")
        .gpu("0000:21:00.0")
        .driver("nvidia")
        .module("550.54.15")
}

/// sysfs with one GPU bound to the nvidia driver.
pub(crate) fn sysfs_of_one() -> Sysfs {
    Sysfs::new().gpu("0000:01:00.0").driver("nvidia").module("550.54.15")
}

/// Minimal context of a node that wants the GPU, plus more variables.
pub(crate) fn gpu_context<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    [
        ("FL_GPU_ENABLED", "YES"),
        ("FL_SUPERLINK_ADDRESS", "10.9.8.7:9092"),
        ("PCI0_ADDRESS", "01:00.0"),
    ]
    .into_iter()
    .filter(|(name, _)| !more.iter().any(|(other, _)| other == name))
    .chain(more.iter().copied())
    .collect()
}

/// An engine with the test image, and a VM on it with the GPUs of `script`.
pub(crate) fn engine_with(script: &Value) -> Option<(Engine, TestVm)> {
    let engine = Engine::start()?;
    engine.import_image(&[image::PYTORCH]);
    engine.nvidia_runtime(RuntimeMode::Ok, script);
    let mut vm = TestVm::new();
    vm.engine(&engine).nvml(script);
    Some((engine, vm))
}

/// Starts a node and waits until it is ready.
#[track_caller]
pub(crate) fn start_ready(vm: &TestVm) -> Agent {
    let agent = vm.start();
    agent.wait_for_notify("READY=1", TIMEOUT);
    agent
}

/// Parses the JSON that a command printed.
#[track_caller]
pub(crate) fn json_of(output: &Output) -> Value {
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Encodes a text in base64 on one line, as certificates are given in context variables and OneGate
/// attributes.
pub(crate) fn base64(text: &str) -> String {
    let sandbox = Sandbox::new("base64");
    let file = sandbox.write("text", text);
    run(Command::new("base64").arg("-w0").arg(file), TIMEOUT).expect_success().to_owned()
}

/// WARNING lines of an agent.
pub(crate) fn warnings(agent: &Agent) -> Vec<String> {
    agent.lines().into_iter().filter(|line| line.contains(" WARNING ")).collect()
}

/// Runs `docker inspect` on the node's container with a Go template.
#[track_caller]
pub(crate) fn inspect(engine: &Engine, template: &str) -> String {
    let output = engine.docker(&["inspect", "--format", template, "flower-supernode"]);
    output.expect_success().trim().to_owned()
}

/// Prints a line of the table that `make test` shows: a cause of a CPU fallback, and the time until
/// the WARNING.
pub(crate) fn report_cause(code: &str, seconds: f64, how: &str) {
    report(&format!("CAUSE {code:<24} {seconds:>5.2} s  {how}"));
}

/// Prints a line in one write. Not with a print macro: the test runner captures the output of
/// passing tests.
pub(crate) fn report(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// NVIDIA's own libnvidia-ml, unpacked from Debian's package if the package sources provide it.
pub(crate) fn nvidia_library() -> Option<PathBuf> {
    if Path::new("/proc/driver/nvidia").exists() {
        report("SKIPPED: this machine has a driver, which the library would find");
        return None;
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?
        .join("supernode-agent/libnvidia-ml1");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/fetch-libnvidia-ml.sh");
    let output = run(Command::new(script).arg(&cache), Duration::from_secs(300));
    match output.stdout.lines().next() {
        Some(path) => Some(PathBuf::from(path)),
        None => {
            report(&format!(
                "SKIPPED: NVIDIA's libnvidia-ml1 (Debian non-free) is unavailable: {}",
                output.stderr.trim()
            ));
            None
        }
    }
}
