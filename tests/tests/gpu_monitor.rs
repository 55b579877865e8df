//! The running node: a GPU that fails, a container that loses its GPU, a driver that appears late.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use common::{
    GPU_A, GPU_B, TIMEOUT, engine_with, gpu_context, inspect, json_of, one_gpu, report_cause,
    start_ready, sysfs_of_one, sysfs_of_two, two_gpus, warnings,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use supernode_tests::{
    Agent, Engine, RuntimeMode, Sandbox, Sysfs, TestVm, eventually, nvml_library,
};

/// Time limit of the contract for reporting a lost GPU and replacing the container.
const LOSS_LIMIT: Duration = Duration::from_secs(30);

/// A node on a GPU with a running GPU monitor.
struct MonitoredNode {
    engine: Engine,
    vm: TestVm,
    /// Trigger files of events, and the log of NVML calls.
    directory: Sandbox,
    script: Value,
    agent: Agent,
}

impl MonitoredNode {
    /// Starts a node with these XIDs, each of which occurs when it is fired; `settings` go to
    /// agent.toml.
    fn with(
        script: Value,
        xids: &[u64],
        settings: &[(&str, &str)],
        context: &[(&str, &str)],
    ) -> Option<Self> {
        let directory = Sandbox::new("monitor");
        let events: Vec<Value> = xids
            .iter()
            .map(|xid| {
                json!({"type": "xid", "data": xid,
                    "when_file": directory.join(format!("xid-{xid}"))})
            })
            .collect();
        Self::with_events(script, directory, &json!(events), settings, context)
    }

    fn with_events(
        mut script: Value,
        directory: Sandbox,
        events: &Value,
        settings: &[(&str, &str)],
        context: &[(&str, &str)],
    ) -> Option<Self> {
        script["events"] = events.clone();
        script["log"] = json!(directory.join("calls"));
        let (engine, mut vm) = engine_with(&script)?;
        let sysfs = if script["gpus"].as_array().unwrap().len() == 2 {
            sysfs_of_two()
        } else {
            sysfs_of_one()
        };
        vm.sysfs(&sysfs).context(&gpu_context(context));
        for (key, value) in settings {
            vm.set(key, *value);
        }
        let agent = start_ready(&vm);
        let node = Self { engine, vm, directory, script, agent };
        node.wait_for_monitor();
        Some(node)
    }

    /// Waits until a monitor waits for events.
    fn wait_for_monitor(&self) {
        assert!(
            eventually(TIMEOUT, || self.calls().contains("nvmlEventSetWait_v2")),
            "{:#?}",
            self.agent.lines()
        );
    }

    fn calls(&self) -> String {
        fs::read_to_string(self.directory.join("calls")).unwrap_or_default()
    }

    fn trigger(&self, xid: u64) {
        self.directory.write(format!("xid-{xid}"), "");
    }

    /// Changes what NVML returns from its next call on.
    fn now(&mut self, key: &str, value: Value) {
        self.script[key] = value;
        self.vm.nvml(&self.script);
    }

    /// Waits until a container runs with this runtime.
    #[track_caller]
    fn wait_for_runtime(&self, runtime: &str) {
        let format = "{{.State.Running}} {{.HostConfig.Runtime}}";
        let shown =
            || self.engine.docker(&["inspect", "--format", format, "flower-supernode"]).stdout;
        let is_there = eventually(TIMEOUT, || shown().trim() == format!("true {runtime}"));
        assert!(is_there, "{}: {:#?}", shown(), self.agent.lines());
    }

    #[track_caller]
    fn wait_for_status(&self, words: &str) {
        let found = eventually(TIMEOUT, || {
            let status = json_of(&self.vm.run_command("status", &["--json"]));
            status["agent"]["status"].as_str().is_some_and(|status| status.contains(words))
        });
        assert!(found, "{words}: {:#?}", self.agent.notifications());
    }

    fn id(&self) -> String {
        inspect(&self.engine, "{{.Id}} {{.State.Pid}}")
    }

    /// Returns the PID of the GPU monitor.
    fn monitor_pid(&self) -> Option<u32> {
        monitor_of(self.agent.pid())
    }

    /// Waits for the WARNING of a failure that was just triggered and adds it to the table; `how`
    /// names the trigger.
    #[track_caller]
    fn wait_for_failure(&self, since: Instant, how: &str) {
        self.agent.wait_for_line("gpu-failed", LOSS_LIMIT);
        report_cause("gpu-failed", since.elapsed().as_secs_f64(), how);
        assert!(since.elapsed() < LOSS_LIMIT);
    }

    /// Asserts that there is exactly one WARNING with these texts and that the node then runs on
    /// the CPU.
    #[track_caller]
    fn assert_fell_back(&self, words: &[&str]) {
        self.wait_for_runtime("runc");
        self.wait_for_status("Running on the CPU: gpu-failed");
        let warnings = warnings(&self.agent);
        assert_eq!(warnings.len(), 1, "{:#?}", self.agent.lines());
        for words in [&["gpu-failed", GPU_A, "0000:01:00.0", "; fix: "], words].concat() {
            assert!(warnings[0].contains(words), "{words}: {warnings:?}");
        }
        let lines = self.agent.lines();
        let warned = lines.iter().position(|line| line.contains(" WARNING ")).unwrap();
        let replaced = lines.iter().rposition(|line| line.contains("replacing container")).unwrap();
        assert!(warned < replaced, "{lines:#?}");
        let verdict = &json_of(&self.vm.run_command("status", &["--json"]))["gpu"]["verdict"];
        assert_eq!(verdict["reason"], "gpu-failed", "{verdict}");
        assert_eq!(
            inspect(&self.engine, "{{index .Config.Labels \"supernode-agent.reason\"}}"),
            "gpu-failed"
        );
        assert!(
            eventually(TIMEOUT, || self.monitor_pid().is_none()),
            "there must be no monitor on the CPU"
        );
    }
}

fn monitor_of(agent: u32) -> Option<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(|pid: &u32| {
        let read =
            |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        read("cmdline").contains("nvml-watch")
            && read("status").contains(&format!("\nPPid:\t{agent}\n"))
    })
}

fn kill(pid: u32) {
    signal(pid, Signal::KILL);
}

fn stop(pid: u32) {
    signal(pid, Signal::STOP);
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal).unwrap();
}

/// Returns the peak memory of a process in KiB.
fn peak_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn fatal_xid_warns_with_meaning_and_falls_back_to_cpu() {
    let Some(mut node) = MonitoredNode::with(one_gpu(), &[79], &[], &[]) else { return };
    let start = Instant::now();
    node.trigger(79);
    node.wait_for_failure(start, "while running: XID 79");
    node.assert_fell_back(&["XID 79: GPU has fallen off the bus", "NVIDIA A100"]);
    // After the agent is killed, the next one leaves the node as it is and gives the reason.
    let before = node.id();
    node.agent.kill();
    let agent = start_ready(&node.vm);
    assert_eq!(node.id(), before);
    assert!(
        warnings(&agent).iter().any(|line| line.contains("gpu-failed")),
        "{:#?}",
        agent.lines()
    );
}

#[test]
fn container_killed_by_gpu_fault_restarts_without_that_gpu() {
    let Some(node) = MonitoredNode::with(one_gpu(), &[79], &[], &[]) else { return };
    // The driver reports the fault after the container has exited.
    node.engine.docker(&["kill", "flower-supernode"]).expect_success();
    node.agent.wait_for_line("exited with code 137", TIMEOUT);
    node.trigger(79);
    node.wait_for_runtime("runc");
    let line = node.agent.wait_for_line("gpu-failed", TIMEOUT);
    assert!(line.contains("XID 79: "), "{line}");
    let launches =
        node.agent.lines().iter().filter(|line| line.contains("started container")).count();
    assert_eq!(launches, 2, "{:#?}", node.agent.lines());
}

#[test]
fn failed_gpu_is_retried_when_configured_then_given_up() {
    let settings = &[("gpu.on_failure", "restart")];
    let Some(mut node) = MonitoredNode::with(one_gpu(), &[48, 119], settings, &[]) else { return };
    let first = node.id();
    node.trigger(48);
    node.agent.wait_for_line("probe finds the GPU usable", TIMEOUT);
    assert!(eventually(TIMEOUT, || {
        node.agent.lines().iter().filter(|line| line.contains("started container")).count() == 2
    }));
    node.wait_for_runtime("nvidia");
    node.wait_for_status("Running on NVIDIA A100");
    assert_ne!(node.id(), first);
    let warned = warnings(&node.agent);
    assert_eq!(warned.len(), 1, "{warned:?}");
    assert!(
        warned[0].contains("GPU failed; retrying it") && warned[0].contains("XID 48: "),
        "{warned:?}"
    );
    // The GPU becomes unhealthy again.
    assert!(
        eventually(TIMEOUT, || node.calls().matches("nvmlEventSetCreate").count() >= 4),
        "{}",
        node.calls()
    );
    assert!(
        eventually(TIMEOUT, || node.calls().trim_end().ends_with("nvmlEventSetWait_v2")),
        "{}",
        node.calls()
    );
    node.trigger(119);
    node.agent.wait_for_line("XID 119: ", TIMEOUT);
    node.now("fail", json!({"nvmlInit_v2": 999}));
    node.agent.wait_for_line("no usable GPU; this node runs on the CPU: gpu-failed", TIMEOUT);
    node.wait_for_runtime("runc");
    let attempts =
        node.agent.lines().iter().filter(|line| line.contains("probing the failed GPU in")).count();
    assert_eq!(attempts, 3, "{:#?}", node.agent.lines());
    assert_eq!(warnings(&node.agent).len(), 3, "{:#?}", node.agent.lines());
}

#[test]
fn ignored_gpu_failure_only_warns() {
    let Some(node) =
        MonitoredNode::with(one_gpu(), &[79, 48], &[("gpu.on_failure", "ignore")], &[])
    else {
        return;
    };
    let before = node.id();
    for xid in [79, 48] {
        node.trigger(xid);
        node.agent.wait_for_line(&format!("XID {xid}: "), TIMEOUT);
    }
    node.wait_for_status("GPU failure ignored");
    assert_eq!(node.id(), before);
    let warnings = warnings(&node.agent);
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(
        warnings[0].contains("gpu-failed")
            && warnings[0].contains("GPU failed; continuing with it"),
        "{warnings:?}"
    );
}

#[test]
fn application_xid_is_logged_once_without_action() {
    let directory = Sandbox::new("monitor");
    let event = |xid: u64, gpu: u32| {
        let file = directory.join(format!("xid-{xid}"));
        json!({"type": "xid", "data": xid, "gpu": gpu, "when_file": file, "per_second": 50})
    };
    let events = json!([event(13, 0), event(31, 1), event(45, 0)]);
    let Some(node) = MonitoredNode::with_events(two_gpus(), directory, &events, &[], &[]) else {
        return;
    };
    let before = node.id();
    for (xid, uuid) in [(13, GPU_A), (31, GPU_B), (45, GPU_A)] {
        node.trigger(xid);
        let line = node.agent.wait_for_line(&format!("XID {xid}: "), TIMEOUT);
        assert!(line.contains(uuid), "{line}");
    }
    let count = node.agent.lines().iter().filter(|line| line.contains("XID ")).count();
    assert_eq!(count, 3, "{:#?}", node.agent.lines());
    assert_eq!(warnings(&node.agent).len(), 2, "the last XID is informational");
    assert_eq!(node.id(), before);
}

#[test]
fn parent_gpu_of_mig_instance_is_monitored() {
    let mut script = one_gpu();
    script["gpus"][0]["mig"] = json!([{"uuid": "MIG-aaaa"}, {"uuid": "MIG-bbbb"}]);
    let context = &[("FL_CUDA_VISIBLE_DEVICES", "MIG-bbbb")];
    let Some(node) = MonitoredNode::with(script, &[79], &[], context) else { return };
    node.trigger(79);
    let line = node.agent.wait_for_line("gpu-failed", TIMEOUT);
    assert!(line.contains("MIG-bbbb") && line.contains("0000:01:00.0"), "{line}");
    node.wait_for_runtime("runc");
}

#[test]
fn unresponsive_gpu_is_lost_within_30_seconds() {
    let Some(mut node) = MonitoredNode::with(one_gpu(), &[], &[], &[]) else { return };
    let start = Instant::now();
    node.now("fail", json!({"nvmlDeviceGetHandleByUUID": 15, "nvmlEventSetWait_v2": 15}));
    node.wait_for_failure(start, "while running: NVML returns 15");
    node.assert_fell_back(&["NVML error 15"]);
}

#[test]
fn missing_nvml_library_means_lost_gpu() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    let directory = Sandbox::new("monitor");
    let library = vm.path("libnvidia-ml.so.1");
    symlink(nvml_library(), &library).unwrap();
    let mut script = one_gpu();
    script["log"] = json!(directory.join("calls"));
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[])).nvml(&script);
    vm.set("gpu.nvml_library", library.to_string_lossy().into_owned());
    let agent = start_ready(&vm);
    let node = MonitoredNode { engine, vm, directory, script, agent };
    node.wait_for_monitor();
    let start = Instant::now();
    fs::remove_file(&library).unwrap();
    node.wait_for_failure(start, "while running: the library is removed");
    node.assert_fell_back(&["libnvidia-ml was removed"]);
}

#[test]
fn hung_monitor_means_lost_gpu() {
    let Some(mut node) = MonitoredNode::with(one_gpu(), &[], &[], &[]) else { return };
    let monitor = node.monitor_pid().unwrap();
    let start = Instant::now();
    node.now("hang", json!(["nvmlEventSetWait_v2"]));
    node.wait_for_failure(start, "while running: the driver hangs");
    node.assert_fell_back(&["driver does not answer", "was killed"]);
    assert!(!Path::new(&format!("/proc/{monitor}")).exists());
}

#[test]
fn killed_monitor_is_respawned_without_effect() {
    let Some(mut node) = MonitoredNode::with(one_gpu(), &[79], &[], &[]) else { return };
    let (before, first) = (node.id(), node.monitor_pid().unwrap());
    kill(first);
    node.agent.wait_for_line("GPU monitor was killed by signal 9", TIMEOUT);
    assert!(eventually(TIMEOUT, || node.monitor_pid().is_some_and(|pid| pid != first)));
    assert_eq!(node.id(), before);
    assert_eq!(warnings(&node.agent), Vec::<String>::new());
    // It ends with the agent, however the agent ends.
    let second = node.monitor_pid().unwrap();
    node.agent.kill();
    assert!(eventually(TIMEOUT, || !Path::new(&format!("/proc/{second}")).exists()));
    assert_eq!(node.id(), before);
}

#[test]
fn monitor_that_cannot_restart_means_lost_gpu() {
    let Some(mut node) = MonitoredNode::with(one_gpu(), &[], &[], &[]) else { return };
    node.now("fail", json!({"nvmlInit_v2": 9}));
    let start = Instant::now();
    kill(node.monitor_pid().unwrap());
    node.wait_for_failure(start, "while running: monitor exits and the driver is gone");
    node.assert_fell_back(&["was killed by signal 9 (SIGKILL)", "driver-not-loaded"]);
}

#[test]
fn event_flood_is_bounded_in_journal_and_memory() {
    let directory = Sandbox::new("monitor");
    let event = |xid: u64, per_second: u32| {
        let file = directory.join(format!("xid-{xid}"));
        json!({"type": "xid", "data": xid, "when_file": file, "per_second": per_second})
    };
    let events = json!([event(79, 1), event(13, 10_000)]);
    let debug = &[("FL_LOG_LEVEL", "DEBUG")];
    let Some(node) = MonitoredNode::with_events(one_gpu(), directory, &events, &[], debug) else {
        return;
    };
    let monitor = node.monitor_pid().unwrap();
    let (agent_before, monitor_before) = (peak_kib(node.agent.pid()), peak_kib(monitor));
    node.trigger(13);
    node.agent.wait_for_line("XID 13: ", TIMEOUT);
    let is_flood = || node.calls().matches("nvmlEventSetWait_v2").count() > 40_000;
    assert!(eventually(TIMEOUT, is_flood), "no flood");
    let lines = node.agent.lines().iter().filter(|line| line.contains("XID 13")).count();
    assert!(lines <= 3, "{lines}: {:#?}", node.agent.lines());
    for (what, pid, before) in
        [("agent", node.agent.pid(), agent_before), ("monitor", monitor, monitor_before)]
    {
        let grown = peak_kib(pid).saturating_sub(before);
        assert!(grown < 2048, "the {what} has grown by {grown} KiB");
    }
    // The fatal event is not lost in the flood.
    node.trigger(79);
    node.agent.wait_for_line("XID 79: ", TIMEOUT);
    node.wait_for_runtime("runc");
}

#[test]
fn failed_required_gpu_stops_container_with_error() {
    let Some(mut node) = MonitoredNode::with(one_gpu(), &[79], &[], &[("FL_GPU_REQUIRED", "YES")])
    else {
        return;
    };
    node.trigger(79);
    assert_eq!(node.agent.wait_exit(TIMEOUT), 78);
    let line = node.agent.wait_for_line(" ERROR GPU failed and FL_GPU_REQUIRED is YES", TIMEOUT);
    assert!(line.contains("gpu-failed") && line.contains("XID 79: "), "{line}");
    assert_eq!(inspect(&node.engine, "{{.State.Running}}"), "false");
}

#[test]
fn container_without_device_nodes_is_recreated_once() {
    let Some(node) = MonitoredNode::with(one_gpu(), &[], &[], &[]) else { return };
    let before = node.id();
    let pid = inspect(&node.engine, "{{.State.Pid}}");
    fs::remove_file(format!("/proc/{pid}/root/dev/nvidia0")).unwrap();
    let line = node.agent.wait_for_line("lost its GPU; recreating it", TIMEOUT);
    assert!(line.contains(" WARNING ") && line.contains(GPU_A), "{line}");
    assert!(eventually(TIMEOUT, || {
        let pid = node
            .engine
            .docker(&["inspect", "--format", "{{.State.Pid}}", "flower-supernode"])
            .stdout;
        pid.trim() != "0" && Path::new(&format!("/proc/{}/root/dev/nvidia0", pid.trim())).exists()
    }));
    node.wait_for_status("Running on NVIDIA A100");
    assert_ne!(node.id(), before);
    assert_eq!(inspect(&node.engine, "{{.HostConfig.Runtime}}"), "nvidia");
    assert_eq!(warnings(&node.agent).len(), 1, "{:#?}", node.agent.lines());
}

/// Starts a node that loses and regains its SuperLink connection once a second.
fn flapping_node() -> Option<MonitoredNode> {
    let node = MonitoredNode::with(one_gpu(), &[], &[], FLAPPING)?;
    node.agent.wait_for_line("not connected to the SuperLink", TIMEOUT);
    Some(node)
}

/// Node configuration with which the test image loses and regains the connection once a second.
const FLAPPING: &[(&str, &str)] = &[("FL_NODE_CONFIG", "test-flaps=0.5")];

/// Asserts that the connection flapped until the end: one event every half second.
#[track_caller]
fn assert_flapped(agent: &Agent, since: Instant) {
    let events = agent.lines().iter().filter(|line| line.contains("connected to the")).count();
    let expected = since.elapsed().as_secs_f64();
    assert!(events as f64 > expected, "{events} events in {expected} s: {:#?}", agent.lines());
}

#[test]
fn flapping_connection_does_not_hide_lost_device() {
    let Some(node) = flapping_node() else { return };
    let pid = inspect(&node.engine, "{{.State.Pid}}");
    let start = Instant::now();
    fs::remove_file(format!("/proc/{pid}/root/dev/nvidia0")).unwrap();
    node.agent.wait_for_line("lost its GPU", TIMEOUT);
    assert_flapped(&node.agent, start);
    report_cause(
        "gpu-not-visible",
        start.elapsed().as_secs_f64(),
        "flapping: the device node is removed",
    );
    assert!(start.elapsed() < LOSS_LIMIT);
}

#[test]
fn flapping_connection_does_not_hide_frozen_monitor() {
    let Some(node) = flapping_node() else { return };
    let start = Instant::now();
    stop(node.monitor_pid().unwrap());
    node.agent.wait_for_line("gpu-failed", TIMEOUT);
    assert_flapped(&node.agent, start);
    report_cause(
        "gpu-failed",
        start.elapsed().as_secs_f64(),
        "flapping: the GPU monitor is frozen",
    );
    assert!(start.elapsed() < LOSS_LIMIT);
}

#[test]
fn flapping_connection_does_not_skip_monitor_backoff() {
    let Some(node) = flapping_node() else { return };
    let start = Instant::now();
    let mut killed = Vec::new();
    while start.elapsed() < Duration::from_secs(12) {
        match node.monitor_pid().filter(|pid| !killed.contains(pid)) {
            Some(pid) => {
                kill(pid);
                killed.push(pid);
            }
            None => thread::sleep(Duration::from_millis(20)),
        }
    }
    assert_flapped(&node.agent, start);
    // At 0, 1, 3 and 7 s, plus the duration of the probe.
    assert!((3..=4).contains(&killed.len()), "{}: {:#?}", killed.len(), node.agent.lines());
    let probed = node.agent.lines().iter().filter(|line| line.contains("SIGKILL")).count();
    assert!(probed >= 3, "{:#?}", node.agent.lines());
}

#[test]
fn flapping_connection_does_not_hide_late_driver() {
    let Some((_engine, mut vm)) = engine_with(&one_gpu()) else { return };
    let sysfs = Sysfs::new().gpu("0000:01:00.0");
    vm.sysfs(&sysfs).context(&gpu_context(FLAPPING));
    let agent = start_ready(&vm);
    agent.wait_for_line("not connected to the SuperLink", TIMEOUT);
    let start = Instant::now();
    let _sysfs = sysfs.driver("nvidia").module("550.54.15");
    agent.wait_for_line("GPU is usable now; restart flower-supernode to use it", TIMEOUT);
    assert_flapped(&agent, start);
    report_cause(
        "driver-not-loaded",
        start.elapsed().as_secs_f64(),
        "flapping: the driver comes late",
    );
    assert!(start.elapsed() < LOSS_LIMIT);
}

#[test]
fn container_losing_gpu_to_daemon_reload_is_recreated_once() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    let directory = Sandbox::new("monitor");
    // The engine of a test does not use systemd scopes, so this systemctl simulates one. A later
    // container's scope has a later start time.
    let systemctl = format!(
        r#"#!/bin/sh
case "$*" in
*UnitsLoadTimestampMonotonic*) echo "UnitsLoadTimestampMonotonic=$(cat {0}/reloaded)" ;;
*docker-"$(cat {0}/first)".scope)
    printf '%s\n' LoadState=loaded ActiveEnterTimestampMonotonic=5000 DevicePolicy=strict \
        "DeviceAllow=/dev/char/1:3 rwm"
    ;;
*) printf '%s\n' LoadState=loaded ActiveEnterTimestampMonotonic=9500 DevicePolicy=strict ;;
esac
"#,
        directory.path().display()
    );
    directory.write("reloaded", "1000");
    let program = vm.write("bin/systemctl", systemctl);
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut script = one_gpu();
    script["log"] = json!(directory.join("calls"));
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[])).nvml(&script);
    let agent = start_ready(&vm);
    let node = MonitoredNode { engine, vm, directory, script, agent };
    let before = node.id();
    node.directory.write("first", inspect(&node.engine, "{{.Id}}"));
    node.directory.write("reloaded", "9000");
    let line = node.agent.wait_for_line("lost its GPU; recreating it", TIMEOUT);
    assert!(line.contains(" WARNING ") && line.contains("daemon-reload"), "{line}");
    assert!(eventually(TIMEOUT, || {
        node.agent.lines().iter().filter(|line| line.contains("started container")).count() == 2
    }));
    node.wait_for_runtime("nvidia");
    node.wait_for_status("Running on NVIDIA A100");
    assert_ne!(node.id(), before);
    assert_eq!(warnings(&node.agent).len(), 1, "{:#?}", node.agent.lines());
}

#[test]
fn late_driver_is_logged_without_restart() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    let sysfs = Sysfs::new().gpu("0000:01:00.0");
    vm.sysfs(&sysfs).context(&gpu_context(&[]));
    let agent = start_ready(&vm);
    let before = inspect(&engine, "{{.Id}} {{.State.Pid}}");
    let _sysfs = sysfs.driver("nvidia").module("550.54.15");
    let line =
        agent.wait_for_line("GPU is usable now; restart flower-supernode to use it", TIMEOUT);
    assert!(line.contains(" INFO "), "{line}");
    assert!(eventually(TIMEOUT, || {
        let status = json_of(&vm.run_command("status", &["--json"]));
        let text = status["agent"]["status"].as_str().unwrap_or_default();
        text.contains("driver-not-loaded") && text.contains("the GPU is usable now")
    }));
    assert_eq!(inspect(&engine, "{{.Id}} {{.State.Pid}}"), before);
    assert_eq!(warnings(&agent).len(), 1, "{:#?}", agent.lines());
}

#[test]
fn late_driver_is_used_when_configured() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    let sysfs = Sysfs::new().gpu("0000:01:00.0");
    vm.sysfs(&sysfs).context(&gpu_context(&[])).set("gpu.on_available", "restart");
    let agent = start_ready(&vm);
    engine.nvidia_runtime(RuntimeMode::Ok, &one_gpu());
    let _sysfs = sysfs.driver("nvidia").module("550.54.15");
    let line = agent.wait_for_line("GPU is usable now", TIMEOUT);
    assert!(line.contains(" WARNING ") && line.contains("replacing"), "{line}");
    assert!(eventually(TIMEOUT, || {
        let format = "{{.State.Running}} {{.HostConfig.Runtime}}";
        engine.docker(&["inspect", "--format", format, "flower-supernode"]).stdout.trim()
            == "true nvidia"
    }));
    assert!(eventually(TIMEOUT, || {
        json_of(&vm.run_command("status", &["--json"]))["gpu"]["verdict"]["device"] == "cuda"
    }));
    assert_eq!(warnings(&agent).len(), 2, "{:#?}", agent.lines());
}
