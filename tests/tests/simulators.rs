//! The harness itself: a separate engine, the test image, NVIDIA's runtime in each mode, and the
//! network between engines.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::{
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use supernode_tests::{
    Engine, OneGateSimulator, Output, RuntimeMode, TestNetwork, TestVm, eventually, image,
    in_namespace,
};

const SECONDS: Duration = Duration::from_secs(10);

fn two_gpus() -> Value {
    json!({"gpus": [{"uuid": "GPU-a", "minor": 0}, {"uuid": "GPU-b", "minor": 3,
        "mig": [{"uuid": "MIG-b1"}]}]})
}

/// An engine with NVIDIA's runtime, the test image and two GPUs.
fn engine(mode: RuntimeMode) -> Option<Engine> {
    let daemon_json = json!({"runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}});
    let engine =
        Engine::builder().daemon_json(daemon_json.to_string()).with_nvidia_runtime().start()?;
    engine.import_image(&[image::PYTORCH]);
    engine.nvidia_runtime(mode, &two_gpus());
    Some(engine)
}

/// Runs a container with NVIDIA's runtime and prints the NVIDIA device nodes in it.
fn run(engine: &Engine, visible: &str) -> Output {
    let visible = format!("NVIDIA_VISIBLE_DEVICES={visible}");
    let command = "ls -l /dev | grep nvidia | sed 's/.* root *//; s/, */,/; s/ .* / /'";
    let entry = ["--entrypoint", "sh", image::PYTORCH, "-c", command];
    engine
        .docker(&[&["run", "--rm", "--runtime", "nvidia", "--env", &visible], &entry[..]].concat())
}

#[test]
fn container_gets_the_gpus_it_requests() {
    let Some(engine) = engine(RuntimeMode::Ok) else {
        return;
    };

    let output = run(&engine, "GPU-b");
    assert_eq!(output.expect_success(), "510,0 nvidia-uvm\n195,3 nvidia3\n195,255 nvidiactl");
    let record = engine.records().pop().expect("a record");
    assert_eq!(record.gpus, ["GPU-b"]);
    assert_eq!(record.env["NVIDIA_VISIBLE_DEVICES"], "GPU-b");
    assert_eq!(record.refused, None);

    run(&engine, "all").expect_success();
    run(&engine, "MIG-b1,0").expect_success();
    assert_eq!(run(&engine, "void").expect_success(), "");
    assert_eq!(run(&engine, "").expect_success(), "");
    let got: Vec<_> = engine.records().into_iter().skip(1).map(|record| record.gpus).collect();
    assert_eq!(got, [vec!["GPU-a", "GPU-b"], vec!["MIG-b1", "GPU-a"], vec![], vec![]]);
    assert!(engine.records().is_sorted_by_key(|record| record.time_ms));

    let output = run(&engine, "GPU-c");
    assert!(
        output.stderr.contains("nvidia-container-cli: device error: GPU-c: unknown device"),
        "{output:#?}"
    );
}

#[test]
fn device_cgroup_permits_the_requested_gpu() {
    let Some(engine) = engine(RuntimeMode::Ok) else {
        return;
    };
    // There is no driver for the node: opening it fails with ENXIO unless the cgroup denies it
    // first.
    let open = |node: &str| {
        let script = format!("cat /dev/{node}");
        let visible = "NVIDIA_VISIBLE_DEVICES=GPU-a";
        let output = engine.docker(&[
            "run",
            "--rm",
            "--runtime",
            "nvidia",
            "--env",
            visible,
            "--user",
            "0",
            "--cap-add",
            "MKNOD",
            "--entrypoint",
            "sh",
            image::PYTORCH,
            "-c",
            &format!("busybox mknod /dev/nvidia9 c 195 9; {script}"),
        ]);
        output.stderr
    };
    assert!(open("nvidia0").contains("No such device"), "{}", open("nvidia0"));
    assert!(open("nvidia9").contains("Operation not permitted"), "{}", open("nvidia9"));
}

#[test]
fn docker_reports_why_nvidia_runtime_refused() {
    let Some(engine) = engine(RuntimeMode::Fail) else {
        return;
    };
    let output = run(&engine, "all");
    assert_eq!(output.code, Some(125), "{output:#?}");
    let expected =
        "nvidia-container-cli: initialization error: nvml error: driver not loaded: unknown";
    assert!(output.stderr.contains(expected), "{output:#?}");
    assert!(engine.records().pop().expect("a record").refused.is_some());

    run(&engine, "void").expect_success();

    engine.nvidia_runtime(
        RuntimeMode::FailWith("ldcache error: no ldconfig".to_owned()),
        &two_gpus(),
    );
    let output = run(&engine, "all");
    assert!(
        output.stderr.contains("nvidia-container-cli: ldcache error: no ldconfig"),
        "{output:#?}"
    );
}

#[test]
fn no_device_mode_starts_container_without_gpu() {
    let Some(engine) = engine(RuntimeMode::NoDevice) else {
        return;
    };
    assert_eq!(run(&engine, "all").expect_success(), "");
    assert_eq!(engine.records().pop().expect("a record").gpus, [""; 0]);
}

#[test]
fn runtime_is_registered_after_reload() {
    let Some(mut engine) = Engine::start() else {
        return;
    };
    engine.import_image(&[image::PYTORCH, "flwr/supernode:1.31.0"]);
    let knows = |engine: &Engine| {
        engine.get("/info").expect("an answer").pointer("/Runtimes/nvidia").is_some()
    };
    assert!(!knows(&engine));
    assert!(run(&engine, "all").stderr.contains("Unknown runtime specified nvidia"));

    let daemon_json = json!({"runtimes": {"nvidia": {"path": engine.runtime_path()}}});
    std::fs::write(engine.daemon_json(), daemon_json.to_string()).unwrap();
    let reload = engine.reload_command();
    let status = std::process::Command::new(&reload[0]).args(&reload[1..]).status();
    assert!(status.unwrap().success());
    assert!(eventually(SECONDS, || knows(&engine)), "{}", engine.log());
    run(&engine, "all").expect_success();

    engine.restart();
    assert!(knows(&engine));
    assert!(engine.docker(&["image", "inspect", "flwr/supernode:1.31.0"]).code == Some(0));
}

#[test]
fn test_image_prints_inputs_and_exits_as_requested() {
    let Some(engine) = Engine::start() else {
        return;
    };
    engine.import_image_with(&[image::PYTORCH], &["ENV FROM_IMAGE=yes"]);
    let id = engine.docker(&[
        "run",
        "--detach",
        "--init",
        image::PYTORCH,
        "--insecure",
        "--superlink",
        "a:9092",
    ]);
    let id = id.expect_success();
    let logs = || engine.docker(&["logs", id]).stdout;
    let connected =
        || engine.docker(&["logs", id]).stderr == "\x1b[92mINFO \x1b[0m:      SuperNode ID: 1\n";
    assert!(eventually(SECONDS, || connected() && logs().contains("env PATH=")), "{}", logs());
    let log = logs();
    for line in ["arg --insecure", "arg --superlink", "arg a:9092", "env FROM_IMAGE=yes"] {
        assert!(log.lines().any(|printed| printed == line), "{line}: {log}");
    }
    assert_eq!(engine.docker(&["exec", id, "id", "-u"]).expect_success(), "49999");

    let start = Instant::now();
    engine.docker(&["stop", id]).expect_success();
    assert!(start.elapsed() < Duration::from_secs(5), "deaf to SIGTERM: {:?}", start.elapsed());
    let code = engine.docker(&["inspect", "--format", "{{.State.ExitCode}}", id]);
    assert_eq!(code.expect_success(), "0");

    let output =
        engine.docker(&["run", "--rm", image::PYTORCH, "--node-config", "a=1 test-exit=3"]);
    assert_eq!(output.code, Some(3), "{output:#?}");
    assert!(output.stderr.contains("SuperNode ID: 1"), "{output:#?}");
    let never = "test-exit=3 test-never-connects=true";
    let output = engine.docker(&["run", "--rm", image::PYTORCH, "--node-config", never]);
    assert_eq!((output.code, output.stderr.as_str()), (Some(3), ""), "{output:#?}");
}

#[test]
fn crashed_engine_restarts_and_cleans_up() {
    let Some(mut engine) = Engine::start() else {
        return;
    };
    engine.import_image(&[image::PYTORCH]);
    engine.docker(&["run", "--detach", image::PYTORCH]).expect_success();
    engine.kill();
    assert!(engine.get("/_ping").is_err());
    engine.restart();
    engine.docker(&["run", "--detach", image::PYTORCH]).expect_success();
    engine.kill();
    let directory = engine.socket().with_file_name("");
    let namespace = format!("/run/netns/{}", engine.network_namespace());
    let containers: Vec<_> =
        std::fs::read_dir(directory.join("data/containers")).unwrap().flatten().collect();
    assert_eq!(containers.len(), 2);
    drop(engine);

    let directory_text = directory.to_string_lossy().into_owned();
    assert!(!directory.exists());
    assert!(!Path::new(&namespace).exists());
    assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&*directory_text));
    let processes = command_lines();
    assert!(!processes.contains(&*directory_text), "{processes}");
    for container in containers {
        let cgroup = Path::new("/sys/fs/cgroup/memory/docker").join(container.file_name());
        assert!(!cgroup.exists(), "{}", cgroup.display());
    }
}

/// Command lines of all processes.
fn command_lines() -> String {
    let read =
        |entry: std::fs::DirEntry| std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
    let all: Vec<Vec<u8>> = std::fs::read_dir("/proc").unwrap().flatten().map(read).collect();
    String::from_utf8_lossy(&all.join(&b'\n')).into_owned()
}

#[test]
fn rejected_daemon_json_is_reported() {
    if Engine::start().is_none() {
        return;
    }
    let refused = Engine::builder().daemon_json(r#"{"no-such-key": 1}"#).try_start();
    let reason = refused.expect_err("a refusal");
    assert!(reason.contains("no-such-key"), "{reason}");
}

/// Two engines on a network with a OneGate that knows VM 101.
fn network() -> Option<(TestNetwork, [Engine; 2], OneGateSimulator)> {
    let engines = [Engine::start()?, Engine::start()?];
    let mut network = TestNetwork::new();
    for (engine, address) in engines.iter().zip(["10.77.0.2", "10.77.0.3"]) {
        assert_eq!(network.connect(engine).to_string(), address);
    }
    let onegate = OneGateSimulator::start_in(network.network_namespace(), network.address());
    onegate.change(|state| {
        state.vm(101);
    });
    Some((network, engines, onegate))
}

/// Requests `/vm` without a token from an engine's namespace; returns curl's exit code and the
/// status.
fn curl(engine: &Engine, onegate: &OneGateSimulator) -> (Option<i32>, String) {
    let mut command = in_namespace(engine.network_namespace(), "curl");
    command.args([
        "--silent",
        "--max-time",
        "2",
        "--output",
        "/dev/null",
        "--write-out",
        "%{http_code}",
    ]);
    let output = supernode_tests::run(command.arg(onegate.endpoint() + "/vm"), SECONDS);
    (output.code, output.stdout)
}

#[test]
fn test_network_is_reachable_only_from_its_engines() {
    let Some((network, engines, onegate)) = network() else { return };
    assert_eq!(onegate.endpoint(), format!("http://10.77.0.1:{}", onegate.address().port()));
    // Not busybox's wget: it looks up the port number of http and crashes without a C library.
    let ask = format!(
        r"printf 'GET /vm HTTP/1.1\r\n\r\n' | nc -w 5 10.77.0.1 {}",
        onegate.address().port()
    );
    for engine in &engines {
        assert_eq!(curl(engine, &onegate), (Some(0), "401".to_owned()));
        engine.import_image(&[image::PYTORCH]);
        let output =
            engine.docker(&["run", "--rm", "--entrypoint", "sh", image::PYTORCH, "-c", &ask]);
        assert!(output.stdout.contains("Not authorized"), "{output:#?}");
    }
    assert_eq!(onegate.requests().len(), 4);
    std::net::TcpStream::connect_timeout(&onegate.address(), Duration::from_millis(500))
        .expect_err("another network");

    // OneGate's usual address: not on the network, but behind the default route.
    let mut command = in_namespace(network.network_namespace(), "ip");
    supernode_tests::run(
        command.args(["address", "add", "169.254.16.9/32", "dev", "br0"]),
        SECONDS,
    )
    .expect_success();
    let link_local =
        OneGateSimulator::start_in(network.network_namespace(), [169, 254, 16, 9].into());
    assert_eq!(curl(&engines[0], &link_local), (Some(0), "401".to_owned()));

    // An outage of one engine's link does not affect the other and ends without residue.
    network.link_down(&engines[0]);
    assert_eq!(curl(&engines[0], &onegate).0, Some(28));
    assert_eq!(curl(&engines[1], &onegate).0, Some(0));
    network.link_up(&engines[0]);
    assert!(eventually(SECONDS, || curl(&engines[0], &onegate) == (Some(0), "401".to_owned())));
}

#[test]
fn networks_are_isolated_and_removed() {
    let Some((first, [engine, _], onegate)) = network() else { return };
    let Some((second, [other, _], other_onegate)) = network() else { return };
    assert_eq!(curl(&engine, &onegate).0, Some(0));
    assert_eq!(curl(&other, &other_onegate).0, Some(0));
    assert_eq!((onegate.requests().len(), other_onegate.requests().len()), (1, 1));

    let namespace = format!("/run/netns/{}", first.network_namespace());
    assert!(Path::new(&namespace).exists());
    drop(first);
    assert!(!Path::new(&namespace).exists());
    let links = |engine: &Engine| {
        let mut command = in_namespace(engine.network_namespace(), "ip");
        supernode_tests::run(command.args(["-brief", "link"]), SECONDS).stdout
    };
    assert!(!links(&engine).contains("net0"), "{}", links(&engine));
    assert!(links(&other).contains("net0"), "{}", links(&other));
    drop(second);
}

#[test]
fn agent_in_engine_namespace_keeps_its_pid() {
    let Some((_network, [engine, _], onegate)) = network() else { return };
    engine.import_image(&[image::PYTORCH]);
    let mut vm = TestVm::new();
    let script = r#"#!/bin/sh
trap 'exit 3' TERM
. ./context/context.sh.network
token=$(sed -n 's/^export TOKENTXT="\(.*\)"$/\1/p' context/one_env)
curl --silent -H "X-ONEGATE-VMID: $VMID" -H "X-ONEGATE-TOKEN: $token" "$ONEGATE_ENDPOINT/vm" >&2
echo >&2
echo "$1 $$ $(readlink /proc/self/ns/net)" >&2
while [ "$1" = run ]; do sleep 0.05; done
"#;
    let agent = vm.write("agent.sh", script);
    std::fs::set_permissions(&agent, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    vm.agent(agent).engine(&engine).in_namespace_of(&engine).onegate(&onegate, 101);

    let mut command = in_namespace(engine.network_namespace(), "readlink");
    let namespace =
        supernode_tests::run(command.arg("/proc/self/ns/net"), SECONDS).expect_success().to_owned();
    let mut agent = vm.start();
    agent.wait_for_line(r#""ID":"101""#, SECONDS);
    let line = agent.wait_for_line("run ", SECONDS);
    assert_eq!(line, format!("run {} {namespace}", agent.pid()));
    assert_eq!(agent.terminate(), 3);
    let output = vm.run_command("plan", &[]);
    assert!(output.stderr.contains(&namespace), "{output:#?}");
}
