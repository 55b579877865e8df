//! The node on a real Docker engine: on the stand-in GPU, and on the CPU for every cause that shows at the launch.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by a panic")]

mod common;

use std::fs;
use std::time::Duration;

use common::{
    GPU_A, GPU_B, PATIENCE, engine_with, inspect, one_gpu, sysfs_of_one, sysfs_of_two, two_gpus, wanted, warnings,
};
use serde_json::{Value, json};
use supernode_tests::{Agent, Case, Engine, RuntimeMode, Sysfs, eventually, image};

/// A node that is up.
#[track_caller]
fn up(case: &Case) -> Agent {
    let agent = case.start();
    agent.wait_for_notify("READY=1", PATIENCE);
    agent
}

/// The node runs on the CPU, for `reason`, after exactly one WARNING, which came before the container's start.
#[track_caller]
fn assert_cpu_for(reason: &str, agent: &Agent, engine: &Engine) {
    agent.wait_for_line("started the container", PATIENCE);
    let warnings = warnings(agent);
    assert_eq!(warnings.len(), 1, "{:#?}", agent.lines());
    assert!(warnings[0].contains(reason) && warnings[0].contains("Fix: "), "{warnings:?}");
    let lines = agent.lines();
    let place = |text: &str| lines.iter().position(|line| line.contains(text)).unwrap();
    assert!(place(" WARNING ") < place("started the container"), "{lines:#?}");
    assert_eq!(inspect(engine, "{{.State.Running}} {{.HostConfig.Runtime}}"), "true runc");
    assert_eq!(inspect(engine, "{{index .Config.Labels \"supernode-agent.reason\"}}"), reason);
    let env = inspect(engine, "{{range .Config.Env}}{{println .}}{{end}}");
    assert!(env.contains("NVIDIA_VISIBLE_DEVICES=void") && env.contains("FL_DEVICE=cpu"), "{env}");
    let status = agent.notifications().into_iter().rfind(|told| told.contains("READY=1")).unwrap();
    assert!(status.contains(reason), "{status}");
}

#[test]
fn a_good_gpu_is_in_the_container_and_nothing_is_warned_of() {
    let Some((engine, mut case)) = engine_with(&two_gpus()) else { return };
    fs::write(engine.daemon_json(), "{\n  \"log-level\": \"info\"\n}\n").unwrap();
    case.sysfs(&sysfs_of_two()).context(&wanted(&[("FL_CUDA_VISIBLE_DEVICES", "GPU-bbbb")]));
    let mut agent = up(&case);
    assert_eq!(warnings(&agent), Vec::<String>::new());
    assert_eq!(engine.records().last().unwrap().gpus, [GPU_B]);
    assert_eq!(inspect(&engine, "{{.HostConfig.Runtime}}"), "nvidia");
    let env = inspect(&engine, "{{range .Config.Env}}{{println .}}{{end}}");
    assert!(
        env.contains(&format!("NVIDIA_VISIBLE_DEVICES={GPU_B}\n")) && !env.contains("CUDA_VISIBLE_DEVICES"),
        "{env}"
    );
    assert!(engine.docker(&["logs", "flower-supernode"]).stdout.contains("device /dev/nvidia1"));
    let written = fs::read_to_string(engine.daemon_json()).unwrap();
    assert!(written.starts_with("{\n  \"log-level\": \"info\",\n  \"runtimes\": {"), "{written}");
    assert_eq!(agent.terminate(), 0);
    assert_eq!(inspect(&engine, "{{.State.Running}} {{.State.ExitCode}}"), "false 0");
}

#[test]
fn every_cause_before_the_launch_ends_as_a_cpu_node_with_one_warning() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    let on = sysfs_of_one();
    let fail = |code: u32| json!({"fail": {"nvmlInit_v2": code}});
    let mut sick = one_gpu();
    sick["gpus"][0]["ecc_uncorrected"] = json!(1);
    let promised: &[(&str, &str)] = &[];
    let cases = [
        ("gpu-not-present", Sysfs::new(), json!({}), &[("PCI0_ADDRESS", "")][..]),
        ("gpu-not-passed-through", Sysfs::new(), json!({}), promised),
        ("driver-not-loaded", Sysfs::new().gpu("0000:01:00.0"), json!({}), promised),
        ("wrong-driver", Sysfs::new().gpu("0000:01:00.0").driver("nouveau"), json!({}), promised),
        ("driver-library-missing", on.clone(), fail(12), promised),
        ("driver-library-mismatch", on.clone(), fail(18), promised),
        ("driver-too-old", on.clone(), fail(13), promised),
        ("driver-not-ready", on.clone(), fail(27), promised),
        ("driver-timeout", on.clone(), json!({"hang": ["nvmlInit_v2"]}), promised),
        ("driver-crash", on.clone(), json!({"crash": ["nvmlInit_v2"]}), promised),
        ("driver-error", on.clone(), fail(999), promised),
        ("permission-denied", on.clone(), fail(4), promised),
        ("gpu-count-zero", on.clone(), json!({"gpus": []}), promised),
        ("gpu-lost", on.clone(), fail(15), promised),
        ("gpu-reset-required", on.clone(), fail(16), promised),
        ("gpu-unhealthy", on.clone(), sick, promised),
        ("device-selection-empty", on.clone(), one_gpu(), &[("FL_CUDA_VISIBLE_DEVICES", "3")][..]),
        ("device-selection-empty", on.clone(), one_gpu(), &[("FL_CUDA_VISIBLE_DEVICES", "none")][..]),
        ("framework-without-gpu", on.clone(), one_gpu(), &[("ML_FRAMEWORK", "sklearn")][..]),
        // A level above WARNING does not hide it.
        ("wrong-driver", Sysfs::new().gpu("0000:01:00.0").driver("vfio-pci"), json!({}), promised),
    ];
    engine.import_image(&["flower-supernode-sklearn:1.31.0"]);
    case.set("gpu.probe_timeout_seconds", 1);
    for (reason, sysfs, machine, more) in cases {
        case.sysfs(&sysfs).nvml(&machine).context(&wanted(more));
        let mut agent = up(&case);
        assert_cpu_for(reason, &agent, &engine);
        assert_eq!(agent.terminate(), 0);
        engine.docker(&["rm", "-f", "flower-supernode"]);
    }
    // A machine without a GPU has no business in daemon.json.
    assert_eq!(fs::read_to_string(engine.daemon_json()).unwrap().trim(), "{}");
}

#[test]
fn the_warning_comes_at_any_log_level_and_in_json_with_its_fields() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    case.sysfs(&Sysfs::new()).context(&wanted(&[("FL_LOG_LEVEL", "ERROR"), ("FL_LOG_FORMAT", "json")]));
    let agent = up(&case);
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
fn a_runtime_that_is_not_installed_is_named() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    case.sysfs(&sysfs_of_one())
        .context(&wanted(&[]))
        .set("docker.runtime_path", "nvidia-container-runtime-is-not-here");
    assert_cpu_for("runtime-missing", &up(&case), &engine);
    assert_eq!(fs::read_to_string(engine.daemon_json()).unwrap().trim(), "{}");
}

#[test]
fn a_runtime_that_cannot_be_configured_is_named() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    case.sysfs(&sysfs_of_one()).context(&wanted(&[]));
    for (text, reload, words) in [
        ("{\n  \"debug\": yes\n}", vec!["true"], "line 2, column 12"),
        ("{}", vec!["false"], "could not be reloaded"),
        ("{}", vec!["true"], "did not register"),
    ] {
        fs::write(engine.daemon_json(), text).unwrap();
        case.set("docker.reload_command", reload);
        let mut agent = up(&case);
        assert_cpu_for("runtime-not-configured", &agent, &engine);
        assert!(warnings(&agent)[0].contains(words), "{:?}", warnings(&agent));
        assert_eq!(agent.terminate(), 0);
        engine.docker(&["rm", "-f", "flower-supernode"]);
    }
}

#[test]
fn a_launch_that_docker_refuses_ends_on_the_cpu_and_is_adopted_as_such() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    case.sysfs(&sysfs_of_one()).context(&wanted(&[]));
    engine.nvidia_runtime(RuntimeMode::Fail, &one_gpu());
    let mut agent = up(&case);
    assert_cpu_for("runtime-start-failed", &agent, &engine);
    assert!(warnings(&agent)[0].contains("nvidia-container-cli"), "Docker's own text: {:?}", warnings(&agent));
    let containers = engine.docker(&["ps", "-aq"]).stdout;
    assert_eq!(containers.lines().count(), 1, "the dead container is still there");
    // The agent dies; the next one finds the node that stands in for the GPU node, says so again, and lets it be.
    let pid = inspect(&engine, "{{.State.Pid}}");
    agent.kill9();
    let agent = up(&case);
    assert_eq!(inspect(&engine, "{{.State.Pid}}"), pid);
    assert_eq!(warnings(&agent).len(), 1);
    assert!(warnings(&agent)[0].contains("runtime-start-failed"));
    drop(agent);
    // Mended and started anew, the node is on the GPU.
    engine.nvidia_runtime(RuntimeMode::Ok, &one_gpu());
    engine.docker(&["stop", "flower-supernode"]);
    let agent = up(&case);
    assert_eq!(warnings(&agent), Vec::<String>::new());
    assert_eq!(inspect(&engine, "{{.HostConfig.Runtime}}"), "nvidia");
}

#[test]
fn a_start_without_the_device_is_noticed() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    case.sysfs(&sysfs_of_one()).context(&wanted(&[]));
    engine.nvidia_runtime(RuntimeMode::NoDevice, &one_gpu());
    let agent = up(&case);
    let warnings = warnings(&agent);
    assert_eq!(warnings.len(), 1, "{:#?}", agent.lines());
    assert!(warnings[0].contains("gpu-not-visible") && warnings[0].contains(GPU_A), "{warnings:?}");
    assert_eq!(inspect(&engine, "{{.HostConfig.Runtime}}"), "runc");
}

#[test]
fn a_required_gpu_is_an_error_and_nothing_is_left_running() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    let required = wanted(&[("FL_GPU_REQUIRED", "YES")]);
    for (sysfs, mode, reason) in [
        (Sysfs::new(), RuntimeMode::Ok, "gpu-not-passed-through"),
        (sysfs_of_one(), RuntimeMode::Fail, "runtime-start-failed"),
        (sysfs_of_one(), RuntimeMode::NoDevice, "gpu-not-visible"),
    ] {
        engine.nvidia_runtime(mode, &one_gpu());
        case.sysfs(&sysfs).context(&required);
        let mut agent = case.start();
        assert_eq!(agent.wait_exit(PATIENCE), 1);
        let line = agent.wait_for_line(" ERROR No usable GPU", PATIENCE);
        assert!(line.contains(reason) && line.contains("Fix: "), "{line}");
        assert!(!agent.notifications().iter().any(|told| told.contains("READY=1")));
        assert_eq!(engine.docker(&["ps", "-q"]).stdout, "", "a container runs");
    }
}

#[test]
fn a_killed_agent_leaves_the_container_and_the_next_adopts_it() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    for context in [wanted(&[]), vec![("FL_SUPERLINK_ADDRESS", "h:1")]] {
        case.sysfs(&sysfs_of_one()).context(&context);
        let mut agent = up(&case);
        let facts = "{{.State.Pid}} {{.Id}}";
        let before = inspect(&engine, facts);
        agent.kill9();
        assert_eq!(inspect(&engine, facts), before);
        let agent = up(&case);
        agent.wait_for_line("adopted the running container", PATIENCE);
        assert_eq!(inspect(&engine, facts), before);
    }
}

#[test]
fn another_specification_replaces_the_container_once() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    case.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    up(&case).kill9();
    let before = inspect(&engine, "{{.Id}}");
    case.context(&[("FL_SUPERLINK_ADDRESS", "h:2")]);
    let mut agent = up(&case);
    assert_ne!(inspect(&engine, "{{.Id}}"), before);
    assert!(inspect(&engine, "{{.Args}}").contains("h:2"));
    assert_eq!(engine.docker(&["ps", "-aq"]).stdout.lines().count(), 1);
    assert_eq!(agent.terminate(), 0);
}

#[test]
fn whatever_the_exit_code_the_container_is_started_again_with_a_growing_pause() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    for code in [0, 3] {
        let node_config = format!("test-exit={code}");
        case.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_NODE_CONFIG", &node_config)]);
        let mut agent = up(&case);
        for pause in [1, 2, 4] {
            agent.wait_for_line(&format!("ended with exit code {code}; starting it again in {pause} s"), PATIENCE);
        }
        assert_eq!(agent.terminate(), 0);
        engine.docker(&["rm", "-f", "flower-supernode"]);
    }
}

#[test]
fn a_container_that_was_removed_by_hand_is_made_again() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    case.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    let _agent = up(&case);
    engine.docker(&["rm", "-f", "flower-supernode"]).expect_success();
    assert!(eventually(PATIENCE, || {
        engine.docker(&["inspect", "--format", "{{.State.Running}}", "flower-supernode"]).stdout.trim() == "true"
    }));
}

#[test]
fn sigterm_in_the_middle_of_the_start_ends_the_agent() {
    let mut case = Case::new();
    case.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    let mut agent = case.start();
    agent.wait_for_notify("EXTEND_TIMEOUT_USEC=", PATIENCE);
    assert_eq!(agent.terminate(), 0);
    assert!(agent.notifications().iter().any(|told| told.contains("STOPPING=1")));
}

#[test]
fn a_container_that_does_not_listen_to_sigterm_is_killed_after_its_grace() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    case.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_NODE_CONFIG", "test-ignore-term=true")]);
    case.set("container.stop_timeout_seconds", 1);
    let mut agent = up(&case);
    agent.wait_for_line("started the container", PATIENCE);
    assert!(eventually(PATIENCE, || engine.docker(&["logs", "flower-supernode"]).stdout.contains("SuperNode ID")));
    assert_eq!(agent.terminate(), 0);
    assert_eq!(inspect(&engine, "{{.State.Running}} {{.State.ExitCode}}"), "false 137");
}

#[test]
fn an_engine_that_comes_late_is_waited_for_and_one_that_goes_is_found_again() {
    let Some((mut engine, mut case)) = engine_with(&one_gpu()) else { return };
    case.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    engine.stop();
    let agent = case.start();
    agent.wait_for_notify("EXTEND_TIMEOUT_USEC=", PATIENCE);
    engine.restart();
    agent.wait_for_notify("READY=1", PATIENCE);
    engine.restart();
    assert!(eventually(PATIENCE, || {
        engine.docker(&["inspect", "--format", "{{.State.Running}}", "flower-supernode"]).stdout.trim() == "true"
    }));
}

#[test]
fn an_engine_that_never_comes_is_an_error_that_a_retry_may_cure() {
    let mut case = Case::new();
    case.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]).set("docker.ready_timeout_seconds", 1);
    let mut agent = case.start();
    assert_eq!(agent.wait_exit(PATIENCE), 1);
    agent.wait_for_line("docker.sock does not answer", PATIENCE);
}

#[test]
fn the_prebaked_image_stands_in_for_one_that_is_not_to_be_had() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    case.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FLOWER_VERSION", "9.9.9"), ("ML_FRAMEWORK", "pytorch")]);
    let mut agent = up(&case);
    let warning = &warnings(&agent)[0];
    assert!(warning.contains("flower-supernode-pytorch:9.9.9") && warning.contains("prebaked"), "{warning}");
    assert_eq!(inspect(&engine, "{{.Config.Image}}"), image::PYTORCH);
    assert_eq!(agent.terminate(), 0);
    // None at all: both are named.
    case.prebaked("9.9.8", "tensorflow");
    let mut agent = case.start();
    assert_eq!(agent.wait_exit(PATIENCE), 1);
    let line = agent.wait_for_line(" ERROR ", PATIENCE);
    assert!(
        line.contains("flower-supernode-pytorch:9.9.9") && line.contains("flower-supernode-tensorflow:9.9.8"),
        "{line}"
    );
}

#[test]
fn hostile_values_arrive_byte_for_byte_and_nothing_is_executed() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    let hostile = "x='\"; touch /pwned; \"' y=\"$(touch /pwned) `touch /pwned` \\\\ ü\"";
    case.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_NODE_CONFIG", hostile)]);
    let _agent = up(&case);
    let args: Vec<String> = serde_json::from_str(&inspect(&engine, "{{json .Args}}")).unwrap();
    assert!(args.iter().any(|argument| argument == hostile), "{args:?}");
    assert!(eventually(PATIENCE, || {
        let log = engine.docker(&["logs", "flower-supernode"]).stdout;
        log.lines().any(|line| line == format!("arg {hostile}"))
    }));
    assert!(!std::path::Path::new("/pwned").exists());
    assert!(engine.docker(&["exec", "flower-supernode", "ls", "/pwned"]).code != Some(0));
}

#[test]
fn the_container_is_confined_as_the_contract_says() {
    let Some((engine, mut case)) = engine_with(&one_gpu()) else { return };
    let pem = include_str!("../../agent/tests/ca.crt");
    case.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_TLS_ENABLED", "YES"), ("FL_SSL_CA_CERTFILE", pem)]);
    let mut agent = up(&case);
    let host: Value = serde_json::from_str(&inspect(&engine, "{{json .HostConfig}}")).unwrap();
    assert_eq!(host["CapDrop"], json!(["ALL"]));
    assert_eq!(host["SecurityOpt"], json!(["no-new-privileges"]));
    assert_eq!(host["Init"], true);
    assert!(host["PidsLimit"].as_i64().unwrap() > 0 && host["ShmSize"].as_u64().unwrap() > 64 << 20);
    assert_eq!(host["RestartPolicy"]["Name"], "no");
    assert_eq!(host["LogConfig"]["Config"]["max-size"], "10m");
    assert_eq!(inspect(&engine, "{{.Config.User}}"), "49999:49999");
    let probe = "touch /app/.flwr/x && ! touch /app/data/x && ! touch /app/ca.crt && cat /app/ca.crt";
    let inside = engine.docker(&["exec", "flower-supernode", "sh", "-c", probe]);
    assert_eq!(inside.stdout.trim(), pem.trim(), "{inside:?}");
    let args = inspect(&engine, "{{.Args}}");
    assert!(args.contains("--root-certificates /app/ca.crt") && !args.contains("--insecure"), "{args}");
    assert_eq!(agent.terminate(), 0);
}

#[test]
fn a_driver_that_comes_within_the_wait_is_used() {
    let Some((_engine, mut case)) = engine_with(&one_gpu()) else { return };
    let sysfs = Sysfs::new().gpu("0000:01:00.0");
    let ready = case.path("driver-is-ready");
    let mut machine = one_gpu();
    machine["ready_file"] = json!(ready);
    case.sysfs(&sysfs).nvml(&machine).context(&wanted(&[])).set("gpu.wait_seconds", 60);
    let agent = case.start();
    agent.wait_for_notify("Looking for the GPU", PATIENCE);
    let _bound = sysfs.driver("nvidia").module("550.54.15");
    fs::write(ready, "").unwrap();
    let told = agent.wait_for_notify("READY=1", Duration::from_secs(30));
    assert!(told.contains(GPU_A), "{told}");
    assert_eq!(warnings(&agent), Vec::<String>::new());
}
