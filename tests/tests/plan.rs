//! `plan` and `gpu`: the real binary with the real probe in its child process, without Docker.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and print what they skip"
)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{GPU_A, GPU_B, gpu_context, json_of, one_gpu, sysfs_of_one, sysfs_of_two, two_gpus};
use serde_json::{Value, json};
use supernode_tests::{Sysfs, TestVm, eventually};

/// A VM with this NVML script and sysfs, whose operator wants the GPU.
fn vm(sysfs: &Sysfs, script: &Value, more: &[(&str, &str)]) -> TestVm {
    let mut vm = TestVm::new();
    vm.sysfs(sysfs).nvml(script).context(&gpu_context(more));
    vm
}

#[track_caller]
fn verdict(vm: &TestVm) -> Value {
    let output = vm.run_command("gpu", &["--json"]);
    output.expect_success();
    json_of(&output)["gpu"]["verdict"].clone()
}

#[track_caller]
fn reason(vm: &TestVm) -> String {
    let verdict = verdict(vm);
    assert_eq!(verdict["device"], "cpu", "{verdict}");
    assert!(
        !verdict["summary"].as_str().unwrap().is_empty()
            && !verdict["fix"].as_str().unwrap().is_empty()
    );
    verdict["reason"].as_str().unwrap().to_owned()
}

#[test]
fn plan_matches_the_contract_format() {
    let vm = vm(
        &sysfs_of_two(),
        &two_gpus(),
        &[("FL_GPU_MEMORY_FRACTION", "0.5"), ("FL_MAX_RETRIES", "0")],
    );
    let plan = json_of(&vm.run_command("plan", &["--json"]));
    assert_eq!(plan["config"]["FL_GPU_ENABLED"], true);
    assert_eq!(
        plan["gpu"]["verdict"]["devices"][1],
        json!({"index": 1, "uuid": GPU_B, "name": "NVIDIA L4", "pci_address": "0000:21:00.0",
            "memory_mib": 23034})
    );
    let container = &plan["container"];
    assert_eq!(container["name"], "flower-supernode");
    assert_eq!(container["image"], "flower-supernode-pytorch:1.31.0");
    assert_eq!(container["runtime"], "nvidia");
    let health = ["--health-server-address", "0.0.0.0:9099"];
    let args = [
        "--superlink",
        "10.9.8.7:9092",
        "--insecure",
        "--isolation",
        "subprocess",
        health[0],
        health[1],
    ];
    assert_eq!(container["args"], json!(args));
    let env = &container["env"];
    assert_eq!(env["NVIDIA_VISIBLE_DEVICES"], format!("{GPU_A},{GPU_B}"));
    assert_eq!(env["FL_DEVICE"], "cuda");
    assert_eq!(env["XLA_PYTHON_CLIENT_MEM_FRACTION"], "0.5");
    assert_eq!(env["FL_GPU_MEMORY_LIMITS_MIB"], "20480,11517");
    assert_eq!(env.get("CUDA_VISIBLE_DEVICES"), None);
    let targets: Vec<_> =
        container["mounts"].as_array().unwrap().iter().map(|mount| &mount["target"]).collect();
    assert_eq!(targets, ["/app/data", "/opt/supernode-agent/site"]);
    assert!(container["labels"]["supernode-agent.spec-hash"].as_str().unwrap().len() == 16);
}

#[test]
fn cpu_plan_uses_runc_and_void() {
    let mut vm = TestVm::new();
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    let plan = json_of(&vm.run_command("plan", &["--json"]));
    assert_eq!(
        plan["gpu"]["verdict"],
        json!({"device": "cpu", "reason": null, "summary": null, "fix": null})
    );
    assert_eq!(plan["container"]["runtime"], "runc");
    assert_eq!(plan["container"]["env"]["NVIDIA_VISIBLE_DEVICES"], "void");
    assert_eq!(plan["container"]["env"]["FL_DEVICE"], "cpu");
}

/// Path, size, mode, owner and modification time of everything below `directory`.
fn state_of(directory: &Path) -> BTreeMap<PathBuf, (u64, u32, u32, i64, i64)> {
    let mut state = BTreeMap::new();
    let mut directories = vec![directory.to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let facts = fs::symlink_metadata(&path).unwrap();
            state.insert(
                path.clone(),
                (facts.len(), facts.mode(), facts.uid(), facts.mtime(), facts.mtime_nsec()),
            );
            if facts.is_dir() {
                directories.push(path);
            }
        }
    }
    state
}

#[test]
fn plan_changes_nothing() {
    let vm = vm(&sysfs_of_two(), &two_gpus(), &[("FL_GPU_MEMORY_FRACTION", "0.5")]);
    // The harness writes the settings file.
    vm.run_command("plan", &[]).expect_success();
    let mut before = state_of(&vm.path(""));
    let mut after = {
        vm.run_command("plan", &[]).expect_success();
        state_of(&vm.path(""))
    };
    for state in [&mut before, &mut after] {
        state.remove(&vm.path("agent.toml"));
    }
    assert_eq!(before, after);
}

#[test]
fn every_command_reports_all_invalid_variables_at_once() {
    let mut vm = TestVm::new();
    vm.context(&[
        ("FL_GPU_MEMORY_FRACTION", "1.5"),
        ("ONEAPP_FL_LOG_LEVEL", "loud"),
        ("FL_SUPERLINK_ADDRESS", "nowhere"),
        ("FL_CUDA_VISIBLE_DEVICES", "first"),
    ]);
    for command in ["run", "plan", "gpu", "configure-runtime"] {
        let output = vm.run_command(command, &[]);
        assert_eq!(output.code, Some(78), "{command}: {output:?}");
        for start in [
            "FL_GPU_MEMORY_FRACTION='1.5': must be greater than 0 and at most 1",
            "ONEAPP_FL_LOG_LEVEL='loud': must be ",
            "FL_SUPERLINK_ADDRESS='nowhere': must be ",
            "FL_CUDA_VISIBLE_DEVICES='first': must be ",
        ] {
            assert_eq!(
                output.stderr.matches(start).count(),
                1,
                "{command}: {start}: {}",
                output.stderr
            );
        }
    }
    assert_eq!(
        json_of(&vm.run_command("plan", &["--json"]))["errors"].as_array().unwrap().len(),
        4
    );
}

#[test]
fn invalid_input_exits_with_code_and_position() {
    let mut vm = TestVm::new();
    vm.context_file("context.sh.network", "FL_GPU_ENABLED=$(id)\n");
    let output = vm.run_command("plan", &[]);
    assert_eq!(output.code, Some(78));
    assert!(
        output.stderr.contains("context.sh.network") && output.stderr.contains("line 1, column 16"),
        "{output:?}"
    );

    let mut vm = TestVm::new();
    vm.set("gpu.wait_second", 3);
    let output = vm.run_command("plan", &[]);
    assert_eq!(output.code, Some(78));
    assert!(
        output.stderr.contains("agent.toml") && output.stderr.contains("wait_second"),
        "{output:?}"
    );

    let mut vm = TestVm::new();
    vm.set("context.dir", "/nowhere/at/all");
    assert_eq!(vm.run_command("run", &[]).code, Some(1), "the context may still appear");
    assert_eq!(vm.run_command("no-such-command", &[]).code, Some(2));
}

#[test]
fn gpu_failure_names_the_nvml_call() {
    let mut vm = vm(&sysfs_of_one(), &json!({}), &[]);
    for (call, code, expected) in [
        ("nvmlDeviceGetHandleByIndex_v2", 15, "gpu-lost"),
        ("nvmlDeviceGetUUID", 16, "gpu-reset-required"),
        ("nvmlDeviceGetMemoryInfo_v2", 999, "driver-error"),
    ] {
        let mut script = one_gpu();
        script["gpus"][0]["fail"] = json!({call: code});
        if call == "nvmlDeviceGetHandleByIndex_v2" {
            script = one_gpu();
            script["fail"] = json!({call: code});
        }
        vm.nvml(&script);
        let verdict = verdict(&vm);
        assert_eq!(verdict["reason"], expected, "{verdict}");
        assert!(verdict["summary"].as_str().unwrap().contains(call), "{verdict}");
    }
    // Optional values may be missing.
    let mut script = one_gpu();
    for code in [1, 2, 3, 6, 7, 10, 13, 20, 21, 25, 30] {
        script["gpus"][0]["fail"] =
            json!({"nvmlDeviceGetMemoryInfo_v2": code, "nvmlDeviceGetName": code});
        vm.nvml(&script);
        assert_eq!(verdict(&vm)["device"], "cuda", "{code}");
    }
}

#[test]
fn ecc_errors_and_failed_row_remap_are_unhealthy() {
    let mut vm = vm(&sysfs_of_one(), &json!({}), &[]);
    for (key, value) in [("ecc_uncorrected", json!(3)), ("remap_failed", json!(true))] {
        let mut script = one_gpu();
        script["gpus"][0][key] = value;
        vm.nvml(&script);
        assert_eq!(reason(&vm), "gpu-unhealthy", "{key}");
    }
}

#[test]
fn hung_library_is_killed_and_crash_is_contained() {
    let mut vm = vm(&sysfs_of_one(), &json!({"hang": ["nvmlInit_v2"]}), &[]);
    vm.set("gpu.probe_timeout_seconds", 1);
    assert_eq!(reason(&vm), "driver-timeout");
    vm.nvml(&json!({"crash": ["nvmlDeviceGetCount_v2"]}));
    let verdict = verdict(&vm);
    assert_eq!(verdict["reason"], "driver-crash");
    assert!(verdict["summary"].as_str().unwrap().contains("SIGSEGV"), "{verdict}");
    // A library that hangs at shutdown has already answered.
    let mut script = one_gpu();
    script["hang"] = json!(["nvmlShutdown"]);
    vm.nvml(&script);
    assert_eq!(self::verdict(&vm)["device"], "cuda");
}

#[test]
fn library_raising_a_signal_is_a_crash() {
    let mut script = one_gpu();
    script["raise"] = json!(["nvmlInit_v2"]);
    assert_eq!(reason(&vm(&sysfs_of_one(), &script, &[])), "driver-crash");
}

#[test]
fn probe_answer_survives_library_output_on_stdout() {
    for trouble in ["flood_stdout", "close_stdout"] {
        let mut script = one_gpu();
        script[trouble] = json!(["nvmlInit_v2"]);
        assert_eq!(verdict(&vm(&sysfs_of_one(), &script, &[]))["device"], "cuda", "{trouble}");
    }
}

#[test]
fn gpu_with_invalid_uuid_is_not_used() {
    for uuid in ["", "GPU-a,GPU-b", "GPU a"] {
        let mut script = one_gpu();
        script["gpus"][0]["uuid"] = json!(uuid);
        let verdict = verdict(&vm(&sysfs_of_one(), &script, &[]));
        assert_eq!(verdict["reason"], "driver-error", "{verdict}");
        assert!(verdict["summary"].as_str().unwrap().contains("nvmlDeviceGetUUID"), "{verdict}");
    }
}

#[test]
fn failure_is_not_masked_by_library_shutdown() {
    for trouble in ["hang", "crash"] {
        let script = json!({"fail": {"nvmlDeviceGetCount_v2": 15}, trouble: ["nvmlShutdown"]});
        assert_eq!(reason(&vm(&sysfs_of_one(), &script, &[])), "gpu-lost", "{trouble}");
    }
}

#[test]
fn leftover_library_process_is_killed_with_the_probe() {
    let mut vm = vm(&sysfs_of_one(), &json!({}), &[]);
    vm.set("gpu.probe_timeout_seconds", 60);
    let mut healthy = one_gpu();
    healthy["leave_process"] = json!(["nvmlInit_v2"]);
    for (script, expected) in [
        (
            json!({"leave_process": ["nvmlInit_v2"], "crash": ["nvmlInit_v2"]}),
            json!("driver-crash"),
        ),
        (healthy, Value::Null),
    ] {
        vm.nvml(&script);
        assert_eq!(verdict(&vm)["reason"], expected);
        let script = format!("NVML_SIMULATOR={}", vm.path("nvml.json").display());
        let left = || {
            let environments =
                fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path().join("environ"));
            environments.filter_map(|path| fs::read(path).ok()).any(|text| {
                text.split(|byte| *byte == 0).any(|variable| variable == script.as_bytes())
            })
        };
        assert!(
            eventually(Duration::from_secs(10), || !left()),
            "a process of the library still runs"
        );
    }
}

#[test]
fn implausible_gpu_count_is_rejected() {
    let verdict = verdict(&vm(&sysfs_of_one(), &json!({"count": 4_000_000_000_u32}), &[]));
    assert_eq!(verdict["reason"], "driver-error");
    assert!(
        verdict["summary"].as_str().unwrap().contains("invalid response: 4000000000 GPUs"),
        "{verdict}"
    );
}

#[test]
fn nvml_is_not_called_without_a_device() {
    let mut vm = vm(&Sysfs::new(), &json!({}), &[]);
    let log = vm.path("calls.log");
    let mut script = one_gpu();
    script["log"] = json!(log);
    vm.nvml(&script);
    assert_eq!(reason(&vm), "gpu-not-passed-through");
    assert!(!log.exists(), "NVML was called");
    vm.sysfs(&sysfs_of_one());
    assert_eq!(verdict(&vm)["device"], "cuda");
    assert!(log.exists(), "the log must show calls when there is a device");
}

#[test]
fn selected_gpu_is_passed_by_uuid() {
    let mut vm = vm(&sysfs_of_two(), &two_gpus(), &[]);
    for (selection, expected) in [
        ("1", GPU_B),
        ("GPU-aaaa", GPU_A),
        ("gpu-BBBB2222", GPU_B),
        ("01:00.0", GPU_A),
        ("0000:21:00.0", GPU_B),
    ] {
        vm.context(&gpu_context(&[("FL_CUDA_VISIBLE_DEVICES", selection)]));
        let plan = json_of(&vm.run_command("plan", &["--json"]));
        let env = &plan["container"]["env"];
        assert_eq!(env["NVIDIA_VISIBLE_DEVICES"], expected, "{selection}");
        assert_eq!(env.get("CUDA_VISIBLE_DEVICES"), None);
        assert_eq!(plan["gpu"]["verdict"]["devices"].as_array().unwrap().len(), 1);
    }
}

#[test]
fn hostile_values_are_inert_and_secrets_hidden() {
    let mut vm = TestVm::new();
    let pwned = vm.path("pwned");
    let hostile = format!("x\"; touch {}; \"$(touch {0})`touch {0}`", pwned.display());
    let names: Vec<String> = json_of(&vm.run_command("variables", &["--json"]))
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|variable| variable["names"].as_array().unwrap().clone())
        .map(|name| name.as_str().unwrap().to_owned())
        .collect();
    for name in names.iter().map(String::as_str).chain([
        "START_SCRIPT",
        "SET_HOSTNAME",
        "PCI0_ADDRESS",
        "FL_UNKNOWN",
    ]) {
        vm.context(&[(name, &hostile), ("PASSWORD", "hunter2")]);
        vm.context_file(
            "one_env",
            format!("export TOKENTXT=\"{hostile}\"\nexport {name}=\"{hostile}\"\n"),
        );
        for command in ["plan", "run"] {
            let output = vm.run_command(command, &[]);
            assert!(!pwned.exists(), "{name} was executed");
            assert!(!output.stdout.contains("hunter2") && !output.stderr.contains("hunter2"));
        }
    }
}

#[test]
fn plan_without_engine_lists_unknowns() {
    let mut vm = TestVm::new();
    vm.context(&[("FL_GPU_ENABLED", "NO")]);
    let notes = json_of(&vm.run_command("plan", &["--json"]))["notes"].to_string();
    assert!(
        notes.contains("does not answer") && notes.contains("FL_SUPERLINK_ADDRESS is not set"),
        "{notes}"
    );
}

#[test]
fn tls_without_ca_is_an_error_not_a_downgrade() {
    let mut vm = TestVm::new();
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_TLS_ENABLED", "YES")]);
    let output = vm.run_command("run", &[]);
    assert_eq!(output.code, Some(78));
    assert!(output.stderr.contains("FL_SSL_CA_CERTFILE"), "{output:?}");
    vm.context(&[("FL_TLS_ENABLED", "NO")]);
    let output = vm.run_command("run", &[]);
    assert_eq!(output.code, Some(78));
    assert!(output.stderr.contains("FL_SUPERLINK_ADDRESS is not set"), "{output:?}");
}
