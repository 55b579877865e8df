//! The agent's metrics endpoint, and NVIDIA's DCGM exporter next to the node.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Command;

use common::{
    GPU_A, TIMEOUT, engine_with, gpu_context, inspect, json_of, one_gpu, start_ready, sysfs_of_one,
    warnings,
};
use serde_json::{Value, json};
use supernode_tests::{Agent, Engine, Sandbox, TestVm, eventually, run};

/// Default of `dcgm.image`.
const EXPORTER: &str = "nvcr.io/nvidia/k8s/dcgm-exporter:4.5.3-4.8.2-distroless";
/// Test image of the exporter: listens on its port.
const SERVES: &str = r#"ENTRYPOINT ["/bin/busybox", "httpd", "-f", "-p", "9400", "-h", "/"]"#;

/// An address on which no process listens.
fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Sends a request and returns head and body of the response; empty if the connection is refused.
fn answer(address: &str, request: &str) -> String {
    let exchange = || {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.write_all(format!("{request} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    };
    exchange().unwrap_or_default()
}

#[track_caller]
fn wait_for_page(address: &str, parts: &[&str]) -> String {
    let mut page = String::new();
    let has_all = eventually(TIMEOUT, || {
        page = answer(address, "GET /metrics");
        parts.iter().all(|part| page.contains(part))
    });
    assert!(has_all, "{parts:?}: {page}");
    page
}

fn reload(vm: &TestVm, agent: &Agent) {
    let _ = vm.settings_file();
    agent.reload();
}

/// One GPU with sensors, an event file for each XID, and a log of NVML calls.
fn measured_gpu(directory: &Sandbox, xids: &[u64]) -> Value {
    let mut script = one_gpu();
    let gpu = &mut script["gpus"][0];
    (gpu["utilization"], gpu["power_mw"], gpu["memory_used_mib"]) =
        (json!(25), json!(70_500), json!(1024));
    let event = |xid: &u64| {
        json!({"type": "xid", "data": xid,
            "when_file": directory.join(format!("xid-{xid}"))})
    };
    script["events"] = xids.iter().map(event).collect();
    script["log"] = json!(directory.join("calls"));
    script
}

#[test]
fn metrics_follow_node_and_gpu_state() {
    let directory = Sandbox::new("metrics");
    let script = measured_gpu(&directory, &[31, 79]);
    let Some((engine, mut vm)) = engine_with(&script) else { return };
    let address = free_address();
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[])).set("metrics.listen", address.clone());
    let agent = start_ready(&vm);
    let gpu = format!("{{uuid=\"{GPU_A}\",name=\"NVIDIA A100\"}}");
    let page = wait_for_page(
        &address,
        &[
            "HTTP/1.1 200 OK\r\n",
            "\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n",
            "\nsupernode_up 1\n",
            "\nsupernode_connected 1\n",
            "\nsupernode_connection_last_change_timestamp_seconds 1",
            "\nsupernode_device_info{device=\"cuda\",reason=\"\"} 1\n",
            "\nsupernode_container_start_time_seconds 1",
            "\nsupernode_container_restarts_total 0\n",
            &format!("\nsupernode_gpu_utilization_ratio{gpu} 0.25\n"),
            &format!("\nsupernode_gpu_memory_used_bytes{gpu} 1073741824\n"),
            &format!("\nsupernode_gpu_memory_total_bytes{gpu} 42949672960\n"),
            &format!("\nsupernode_gpu_power_watts{gpu} 70.5\n"),
        ],
    );
    // The GPU has no such sensor.
    assert!(!page.contains("temperature"), "{page}");
    assert!(answer(&address, "GET /").starts_with("HTTP/1.1 404 "));
    assert!(answer(&address, "DELETE /metrics").starts_with("HTTP/1.1 405 "));
    let xid = |number: u64| format!("{{uuid=\"{GPU_A}\",name=\"NVIDIA A100\",xid=\"{number}\"}}");
    directory.write("xid-31", "");
    wait_for_page(
        &address,
        &[
            &format!("\nsupernode_gpu_xid_errors_total{} 1\n", xid(31)),
            &format!("\nsupernode_gpu_last_xid_timestamp_seconds{} 1", xid(31)),
        ],
    );
    engine.docker(&["kill", "flower-supernode"]).expect_success();
    wait_for_page(&address, &["\nsupernode_container_restarts_total 1\n", "\nsupernode_up 1\n"]);
    directory.write("xid-79", "");
    let page = wait_for_page(
        &address,
        &[
            "\nsupernode_device_info{device=\"cpu\",reason=\"gpu-failed\"} 1\n",
            "\nsupernode_container_restarts_total 2\n",
            "\nsupernode_container_last_restart_timestamp_seconds 1",
            &format!("\nsupernode_gpu_xid_errors_total{} 1\n", xid(79)),
        ],
    );
    assert!(
        !page.contains("supernode_gpu_power_watts"),
        "the lost GPU must not be sampled: {page}"
    );
    drop(agent);
}

#[test]
fn gpu_is_not_sampled_without_metrics_endpoint() {
    let directory = Sandbox::new("metrics");
    let Some((_engine, mut vm)) = engine_with(&measured_gpu(&directory, &[])) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[]));
    let _agent = start_ready(&vm);
    let calls = || fs::read_to_string(directory.join("calls")).unwrap_or_default();
    assert!(eventually(TIMEOUT, || calls().contains("nvmlEventSetWait_v2")), "{}", calls());
    assert!(!calls().contains("nvmlDeviceGetPowerUsage"), "{}", calls());
}

#[test]
fn occupied_address_warns_and_reload_changes_it() {
    let Some((_engine, mut vm)) = engine_with(&one_gpu()) else { return };
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]).set("metrics.listen", address.clone());
    let agent = start_ready(&vm);
    let warnings = warnings(&agent);
    assert!(
        warnings.len() == 1
            && warnings[0].contains(&format!("cannot bind metrics endpoint {address}: ")),
        "{warnings:?}"
    );
    // A reload sets another address.
    let free = free_address();
    vm.set("metrics.listen", free.clone());
    reload(&vm, &agent);
    wait_for_page(
        &free,
        &["\nsupernode_up 1\n", "\nsupernode_device_info{device=\"cpu\",reason=\"\"} 1\n"],
    );
    vm.set("metrics.listen", "localhost:1");
    let output = vm.run_command("plan", &[]);
    assert_eq!(output.code, Some(78));
    assert!(
        output.stderr.contains("metrics.listen = \"localhost:1\": must be an IP address"),
        "{output:?}"
    );
}

/// A node with the exporter, whose test image exists.
fn with_exporter(script: &Value, more: &[(&str, &str)]) -> Option<(Engine, TestVm)> {
    let (engine, mut vm) = engine_with(script)?;
    engine.import_image_with(&[EXPORTER], &[SERVES]);
    let more = [&[("FL_DCGM_ENABLED", "YES")], more].concat();
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&more));
    Some((engine, vm))
}

fn exporter(engine: &Engine, template: &str) -> String {
    engine
        .docker(&["inspect", "--format", template, "flower-supernode-dcgm"])
        .stdout
        .trim()
        .to_owned()
}

#[track_caller]
fn wait_for_exporter(engine: &Engine, agent: &Agent, template: &str, expected: &str) {
    let is_so = eventually(TIMEOUT, || exporter(engine, template) == expected);
    assert!(is_so, "{}: {:#?}", exporter(engine, template), agent.lines());
}

/// Fetches from this address in the engine's network namespace.
fn fetch(engine: &Engine, address: &str) -> String {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{}", engine.network_namespace()));
    command.args(["busybox", "wget", "-q", "-O", "-", &format!("http://{address}/etc/passwd")]);
    run(&mut command, TIMEOUT).stdout
}

const RUNS: &str = "{{.State.Running}}";

#[test]
fn exporter_is_adopted_replaced_stopped_and_removed() {
    let Some((engine, mut vm)) = with_exporter(&one_gpu(), &[]) else { return };
    let planned = &json_of(&vm.run_command("plan", &["--json"]))["dcgm"];
    assert_eq!(
        (&planned["container"]["image"], &planned["reason"]),
        (&json!(EXPORTER), &Value::Null)
    );
    let mut agent = start_ready(&vm);
    agent.wait_for_line("started the DCGM exporter", TIMEOUT);
    assert_eq!(
        exporter(&engine, "{{.HostConfig.Runtime}} {{.HostConfig.CapDrop}}"),
        "nvidia [ALL]"
    );
    assert_eq!(engine.records().last().unwrap().gpus, [GPU_A]);
    assert!(eventually(TIMEOUT, || fetch(&engine, "127.0.0.1:9400").contains("49999")));
    let status = vm.run_command("status", &[]).stdout;
    assert!(status.contains(&format!("DCGM       {EXPORTER} at 127.0.0.1:9400\n")), "{status}");
    // A killed agent leaves both containers, and the next one adopts both.
    let before = [inspect(&engine, "{{.Id}}"), exporter(&engine, "{{.Id}}")];
    agent.kill();
    let mut agent = start_ready(&vm);
    agent.wait_for_line("adopted the running DCGM exporter", TIMEOUT);
    assert_eq!([inspect(&engine, "{{.Id}}"), exporter(&engine, "{{.Id}}")], before);
    // Another address replaces the exporter but not the node.
    vm.set("dcgm.listen", "127.0.0.1:9555");
    reload(&vm, &agent);
    assert!(
        eventually(TIMEOUT, || fetch(&engine, "127.0.0.1:9555").contains("49999")),
        "{:#?}",
        agent.lines()
    );
    assert_ne!(exporter(&engine, "{{.Id}}"), before[1]);
    assert_eq!(inspect(&engine, "{{.Id}}"), before[0]);
    assert_eq!(agent.terminate(), 0);
    assert_eq!(exporter(&engine, RUNS), "false");
    assert_eq!(warnings(&agent), Vec::<String>::new());
    // The exporter is disabled.
    vm.context(&gpu_context(&[]));
    let planned = &json_of(&vm.run_command("plan", &["--json"]))["dcgm"];
    assert_eq!(planned, &json!({"container": null, "reason": "FL_DCGM_ENABLED is not YES"}));
    let agent = start_ready(&vm);
    agent.wait_for_line("removing the DCGM exporter: FL_DCGM_ENABLED is not YES", TIMEOUT);
    wait_for_exporter(&engine, &agent, RUNS, "");
}

#[test]
fn foreign_container_is_kept_when_exporter_is_disabled() {
    let Some((engine, mut vm)) = with_exporter(&one_gpu(), &[]) else { return };
    engine.docker(&["run", "-d", "--name", "flower-supernode-dcgm", EXPORTER]).expect_success();
    vm.context(&gpu_context(&[]));
    let mut agent = start_ready(&vm);
    assert_eq!(agent.terminate(), 0);
    assert_eq!(exporter(&engine, RUNS), "true");
}

#[test]
fn missing_exporter_image_warns_once_and_node_runs() {
    let Some((engine, mut vm)) = with_exporter(&one_gpu(), &[]) else { return };
    vm.set("dcgm.image", "127.0.0.1:9/exporter:1");
    let agent = start_ready(&vm);
    let line = agent.wait_for_line("DCGM exporter flower-supernode-dcgm does not run", TIMEOUT);
    assert!(line.contains(" WARNING ") && line.contains("the node continues without it"), "{line}");
    let status = json_of(&vm.run_command("status", &["--json"]));
    assert!(status["dcgm"].as_str().unwrap().starts_with("does not run: "), "{status}");
    assert_eq!(inspect(&engine, RUNS), "true");
    // It is retried.
    engine.docker(&["tag", EXPORTER, "127.0.0.1:9/exporter:1"]).expect_success();
    agent.wait_for_line("started the DCGM exporter", TIMEOUT);
    assert_eq!(warnings(&agent).len(), 1, "{:#?}", agent.lines());
}

#[test]
fn exited_exporter_is_restarted_with_one_warning() {
    let Some((engine, vm)) = with_exporter(&one_gpu(), &[]) else { return };
    let agent = start_ready(&vm);
    let node = inspect(&engine, "{{.Id}} {{.State.Pid}}");
    for round in 1..=2 {
        let started = || {
            agent.lines().iter().filter(|line| line.contains("started the DCGM exporter")).count()
        };
        assert!(eventually(TIMEOUT, || started() == round), "{:#?}", agent.lines());
        engine.docker(&["kill", "flower-supernode-dcgm"]).expect_success();
    }
    wait_for_exporter(&engine, &agent, RUNS, "true");
    let warnings = warnings(&agent);
    assert!(
        warnings.len() == 1 && warnings[0].contains("the container exited with code 137"),
        "{warnings:?}"
    );
    assert_eq!(inspect(&engine, "{{.Id}} {{.State.Pid}}"), node);
}

#[test]
fn exporter_restarts_silently_after_engine_crash() {
    let Some((mut engine, vm)) = with_exporter(&one_gpu(), &[]) else { return };
    let agent = start_ready(&vm);
    let started =
        || agent.lines().iter().filter(|line| line.contains("started the DCGM exporter")).count();
    assert!(eventually(TIMEOUT, || started() == 1), "{:#?}", agent.lines());
    engine.kill();
    engine.restart();
    assert!(eventually(TIMEOUT, || started() == 2), "{:#?}", agent.lines());
    wait_for_exporter(&engine, &agent, RUNS, "true");
    let warnings = warnings(&agent);
    assert!(!warnings.iter().any(|line| line.contains("DCGM")), "{warnings:#?}");
}

#[test]
fn exporter_releases_failed_gpu_and_stops() {
    let directory = Sandbox::new("metrics");
    let Some((engine, mut vm)) = with_exporter(&measured_gpu(&directory, &[48, 79]), &[]) else {
        return;
    };
    vm.set("gpu.on_failure", "restart");
    let agent = start_ready(&vm);
    agent.wait_for_line("started the DCGM exporter", TIMEOUT);
    let first = exporter(&engine, "{{.Id}}");
    directory.write("xid-48", "");
    agent.wait_for_line("removing the DCGM exporter: no GPU is in use", TIMEOUT);
    agent.wait_for_line("probe finds the GPU usable", TIMEOUT);
    wait_for_exporter(&engine, &agent, RUNS, "true");
    assert_ne!(exporter(&engine, "{{.Id}}"), first);
    vm.set("gpu.on_failure", "cpu");
    reload(&vm, &agent);
    agent.wait_for_line("adopted the running DCGM exporter", TIMEOUT);
    directory.write("xid-79", "");
    wait_for_exporter(&engine, &agent, RUNS, "");
    assert_eq!(inspect(&engine, "{{.HostConfig.Runtime}} {{.State.Running}}"), "runc true");
}
