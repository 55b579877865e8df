//! The container on a real Docker engine with the simulated GPU: launch, adoption, replacement,
//! restart, stop. Reasons for a CPU fallback are in causes.rs.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use common::{
    GPU_A, GPU_B, TIMEOUT, engine_with, gpu_context, inspect, json_of, one_gpu, start_ready,
    sysfs_of_one, sysfs_of_two, two_gpus, warnings,
};
use serde_json::{Value, json};
use supernode_tests::{RuntimeMode, Sysfs, TestVm, eventually, image, run};

#[test]
fn healthy_gpu_is_in_container_without_warning() {
    let Some((engine, mut vm)) = engine_with(&two_gpus()) else { return };
    fs::write(engine.daemon_json(), "{\n  \"log-level\": \"info\"\n}\n").unwrap();
    vm.sysfs(&sysfs_of_two()).context(&gpu_context(&[("FL_CUDA_VISIBLE_DEVICES", "GPU-bbbb")]));
    let mut agent = start_ready(&vm);
    assert_eq!(warnings(&agent), Vec::<String>::new());
    assert_eq!(engine.records().last().unwrap().gpus, [GPU_B]);
    assert_eq!(inspect(&engine, "{{.HostConfig.Runtime}}"), "nvidia");
    let env = inspect(&engine, "{{range .Config.Env}}{{println .}}{{end}}");
    assert!(
        env.contains(&format!("NVIDIA_VISIBLE_DEVICES={GPU_B}\n"))
            && !env.contains("CUDA_VISIBLE_DEVICES"),
        "{env}"
    );
    assert!(engine.docker(&["logs", "flower-supernode"]).stdout.contains("device /dev/nvidia1"));
    let written = fs::read_to_string(engine.daemon_json()).unwrap();
    assert!(written.starts_with("{\n  \"log-level\": \"info\",\n  \"runtimes\": {"), "{written}");
    assert_eq!(agent.terminate(), 0);
    assert_eq!(inspect(&engine, "{{.State.Running}} {{.State.ExitCode}}"), "false 0");
}

#[test]
fn container_survives_killed_agent_and_is_adopted() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    for context in [gpu_context(&[]), vec![("FL_SUPERLINK_ADDRESS", "h:1")]] {
        vm.sysfs(&sysfs_of_one()).context(&context);
        let mut agent = start_ready(&vm);
        let facts = "{{.State.Pid}} {{.Id}}";
        let before = inspect(&engine, facts);
        agent.kill();
        assert_eq!(inspect(&engine, facts), before);
        let agent = start_ready(&vm);
        agent.wait_for_line("adopted the running container", TIMEOUT);
        assert_eq!(inspect(&engine, facts), before);
    }
}

#[test]
fn handover_signal_leaves_container_for_next_agent() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[]));
    let mut agent = start_ready(&vm);
    let facts = "{{.State.Pid}} {{.Id}}";
    let before = inspect(&engine, facts);
    assert_eq!(agent.hand_over(), 75);
    assert_eq!(inspect(&engine, facts), before);
    let agent = start_ready(&vm);
    agent.wait_for_line("adopted the running container", TIMEOUT);
    assert_eq!(inspect(&engine, facts), before);
}

#[test]
fn running_container_without_its_gpu_is_recreated() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[]));
    start_ready(&vm).kill();
    let before = inspect(&engine, "{{.Id}}");
    fs::remove_file(format!("/proc/{}/root/dev/nvidia0", inspect(&engine, "{{.State.Pid}}")))
        .unwrap();
    let agent = start_ready(&vm);
    assert_ne!(inspect(&engine, "{{.Id}}"), before);
    assert_eq!(inspect(&engine, "{{.HostConfig.Runtime}}"), "nvidia");
    assert!(
        warnings(&agent)[0].contains("replacing the running container"),
        "{:#?}",
        agent.lines()
    );
}

#[test]
fn unrelated_start_failure_is_not_blamed_on_gpu() {
    let Some((_engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[]));
    vm.set("container.log_driver", "no-such-driver");
    let mut agent = vm.start();
    assert_eq!(agent.wait_exit(TIMEOUT), 1);
    assert_eq!(warnings(&agent), Vec::<String>::new());
    agent.wait_for_line("no-such-driver", TIMEOUT);
}

#[test]
fn gpu_is_retried_when_cpu_launch_is_refused_too() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[]));
    let broken = vm.path("runc-is-broken");
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *\" create \"*) [ -e {} ] && exit 1 ;; esac\n\
         PATH=$(echo \"$PATH\" | cut -d: -f2-) exec runc \"$@\"\n",
        broken.display()
    );
    let runc = engine.bin_dir().join("runc");
    fs::write(&runc, script).unwrap();
    fs::set_permissions(&runc, fs::Permissions::from_mode(0o755)).unwrap();
    let agent = start_ready(&vm);
    fs::write(&broken, "").unwrap();
    engine.docker(&["kill", "flower-supernode"]).expect_success();
    // Two rounds: the WARNING is not repeated for each attempt.
    agent.wait_for_line("did not start", TIMEOUT);
    assert!(eventually(TIMEOUT, || {
        agent.lines().iter().filter(|line| line.contains("did not start")).count() >= 2
    }));
    let fallbacks =
        warnings(&agent).into_iter().filter(|line| line.contains("runtime-start-failed")).count();
    assert_eq!(fallbacks, 1, "{:#?}", agent.lines());
    fs::remove_file(&broken).unwrap();
    assert!(eventually(TIMEOUT, || {
        let format = "{{.State.Running}} {{.HostConfig.Runtime}}";
        engine.docker(&["inspect", "--format", format, "flower-supernode"]).stdout.trim()
            == "true nvidia"
    }));
}

#[test]
fn unstartable_container_is_recreated_before_gpu_verdict() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[]));
    let mut agent = start_ready(&vm);
    let before = inspect(&engine, "{{.Id}}");
    assert_eq!(agent.terminate(), 0);
    // Its layer is corrupted.
    let layer = inspect(&engine, "{{.GraphDriver.Data.UpperDir}}");
    assert!(layer.ends_with("/diff"), "{layer}");
    fs::remove_dir_all(&layer).unwrap();
    let agent = start_ready(&vm);
    assert_eq!(warnings(&agent), Vec::<String>::new());
    assert_ne!(inspect(&engine, "{{.Id}}"), before);
    assert_eq!(inspect(&engine, "{{.HostConfig.Runtime}}"), "nvidia");
}

#[test]
fn retagged_image_is_used_only_at_next_start() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    let mut agent = start_ready(&vm);
    let facts = "{{.Id}} {{.Image}}";
    let before = inspect(&engine, facts);
    engine.import_image_with(&[image::PYTORCH], &["ENV RELEASE=2"]);
    agent.kill();
    let mut agent = start_ready(&vm);
    assert_eq!(inspect(&engine, facts), before);
    assert_eq!(agent.terminate(), 0);
    let _agent = start_ready(&vm);
    assert_ne!(inspect(&engine, facts), before);
    assert!(inspect(&engine, "{{.Config.Env}}").contains("RELEASE=2"));
}

#[test]
fn running_container_with_untagged_image_is_adopted() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    start_ready(&vm).kill();
    let before = inspect(&engine, "{{.Id}}");
    engine.docker(&["rmi", "-f", image::PYTORCH]).expect_success();
    start_ready(&vm);
    assert_eq!(inspect(&engine, "{{.Id}}"), before);
}

#[test]
fn paused_container_is_adopted_with_warning_and_fix() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    start_ready(&vm).kill();
    engine.docker(&["pause", "flower-supernode"]).expect_success();
    let agent = start_ready(&vm);
    assert!(
        warnings(&agent)[0].contains("docker unpause flower-supernode"),
        "{:#?}",
        agent.lines()
    );
    engine.docker(&["unpause", "flower-supernode"]).expect_success();
}

#[test]
fn foreign_container_is_replaced_and_its_volumes_kept() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    engine
        .docker(&["run", "-d", "--name", "flower-supernode", "-v", "/data", image::PYTORCH])
        .expect_success();
    let volumes = || engine.docker(&["volume", "ls", "-q"]).expect_success().to_owned();
    let before = volumes();
    assert!(!before.is_empty());
    let _agent = start_ready(&vm);
    assert!(!inspect(&engine, "{{index .Config.Labels \"supernode-agent.spec-hash\"}}").is_empty());
    assert_eq!(volumes(), before);
}

#[test]
fn second_agent_does_not_take_over_container() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    let first = start_ready(&vm);
    let before = inspect(&engine, "{{.Id}}");
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:2")]);
    let second = vm.run_command("run", &[]);
    assert_eq!(second.code, Some(1));
    assert!(second.stderr.contains("another supernode-agent is already running"), "{second:?}");
    assert_eq!(inspect(&engine, "{{.Id}}"), before);
    drop(first);
}

#[test]
fn hung_engine_does_not_block_shutdown() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]).set("container.stop_timeout_seconds", 1);
    let mut agent = start_ready(&vm);
    let freeze = |signal: &str| {
        run(Command::new("kill").args([signal, &engine.pid().to_string()]), TIMEOUT)
            .expect_success();
    };
    freeze("-STOP");
    assert_eq!(agent.terminate(), 1);
    agent.wait_for_line(
        "cannot stop container flower-supernode: no response from Docker within 11 s",
        TIMEOUT,
    );
    freeze("-CONT");
    let mut agent = start_ready(&vm);
    freeze("-STOP");
    agent.interrupt();
    agent.wait_for_line("received SIGINT", TIMEOUT);
    assert_eq!(agent.terminate(), 1);
    agent.wait_for_line("interrupted by another SIGTERM", TIMEOUT);
    freeze("-CONT");
}

#[test]
fn engine_restart_does_not_increase_restart_delay() {
    let Some((mut engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    let agent = start_ready(&vm);
    for round in 1..=3 {
        engine.restart();
        assert!(eventually(TIMEOUT, || {
            agent.lines().iter().filter(|line| line.contains("started container")).count()
                == round + 1
        }));
    }
    let delays: Vec<_> =
        agent.lines().into_iter().filter(|line| line.contains("restarting it in")).collect();
    assert!(delays.iter().all(|line| line.ends_with("in 1 s")), "{delays:#?}");
}

#[test]
fn changed_spec_replaces_container_once() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    start_ready(&vm).kill();
    let before = inspect(&engine, "{{.Id}}");
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:2")]);
    let mut agent = start_ready(&vm);
    assert_ne!(inspect(&engine, "{{.Id}}"), before);
    assert!(inspect(&engine, "{{.Args}}").contains("h:2"));
    assert_eq!(engine.docker(&["ps", "-aq"]).stdout.lines().count(), 1);
    assert_eq!(agent.terminate(), 0);
}

#[test]
fn any_exit_code_restarts_with_increasing_delay() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    for code in [0, 3] {
        let node_config = format!("test-exit={code}");
        vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_NODE_CONFIG", &node_config)]);
        let mut agent = start_ready(&vm);
        for delay in [1, 2, 4] {
            agent.wait_for_line(
                &format!("exited with code {code}; restarting it in {delay} s"),
                TIMEOUT,
            );
        }
        assert_eq!(agent.terminate(), 0);
        engine.docker(&["rm", "-f", "flower-supernode"]);
    }
}

#[test]
fn manually_removed_container_is_recreated() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    let _agent = start_ready(&vm);
    engine.docker(&["rm", "-f", "flower-supernode"]).expect_success();
    assert!(eventually(TIMEOUT, || {
        engine
            .docker(&["inspect", "--format", "{{.State.Running}}", "flower-supernode"])
            .stdout
            .trim()
            == "true"
    }));
}

#[test]
fn sigterm_during_startup_stops_agent() {
    let mut vm = TestVm::new();
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    let mut agent = vm.start();
    agent.wait_for_notify("EXTEND_TIMEOUT_USEC=", TIMEOUT);
    assert_eq!(agent.terminate(), 0);
    assert!(agent.notifications().iter().any(|message| message.contains("STOPPING=1")));
}

#[test]
fn container_ignoring_sigterm_is_killed_after_timeout() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_NODE_CONFIG", "test-ignore-term=true")]);
    vm.set("container.stop_timeout_seconds", 1);
    let mut agent = start_ready(&vm);
    agent.wait_for_line("started container", TIMEOUT);
    assert!(eventually(TIMEOUT, || engine
        .docker(&["logs", "flower-supernode"])
        .stderr
        .contains("SuperNode ID")));
    assert_eq!(agent.terminate(), 0);
    assert_eq!(inspect(&engine, "{{.State.Running}} {{.State.ExitCode}}"), "false 137");
}

#[test]
fn waits_for_late_engine_and_reconnects() {
    let Some((mut engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    engine.stop();
    let agent = vm.start();
    agent.wait_for_notify("EXTEND_TIMEOUT_USEC=", TIMEOUT);
    engine.restart();
    agent.wait_for_notify("READY=1", TIMEOUT);
    engine.restart();
    assert!(eventually(TIMEOUT, || {
        engine
            .docker(&["inspect", "--format", "{{.State.Running}}", "flower-supernode"])
            .stdout
            .trim()
            == "true"
    }));
}

#[test]
fn missing_engine_is_a_retryable_error() {
    let mut vm = TestVm::new();
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]).set("docker.ready_timeout_seconds", 1);
    let mut agent = vm.start();
    assert_eq!(agent.wait_exit(TIMEOUT), 1);
    agent.wait_for_line("docker.sock does not answer", TIMEOUT);
}

#[test]
fn prebaked_image_replaces_unavailable_one() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[
        ("FL_SUPERLINK_ADDRESS", "h:1"),
        ("FLOWER_VERSION", "9.9.9"),
        ("ML_FRAMEWORK", "pytorch"),
    ]);
    let mut agent = start_ready(&vm);
    let warning = &warnings(&agent)[0];
    assert!(
        warning.contains("flower-supernode-pytorch:9.9.9") && warning.contains("prebaked"),
        "{warning}"
    );
    assert_eq!(inspect(&engine, "{{.Config.Image}}"), image::PYTORCH);
    assert_eq!(agent.terminate(), 0);
    // Neither image is available: both are named.
    vm.prebaked("9.9.8", "tensorflow");
    let mut agent = vm.start();
    assert_eq!(agent.wait_exit(TIMEOUT), 1);
    let line = agent.wait_for_line(" ERROR ", TIMEOUT);
    assert!(
        line.contains("flower-supernode-pytorch:9.9.9")
            && line.contains("flower-supernode-tensorflow:9.9.8"),
        "{line}"
    );
}

#[test]
fn hostile_values_are_passed_verbatim_not_executed() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    let hostile = "x='\"; touch /pwned; \"' y=\"$(touch /pwned) `touch /pwned` \\\\ ü\"";
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_NODE_CONFIG", hostile)]);
    let _agent = start_ready(&vm);
    let args: Vec<String> = serde_json::from_str(&inspect(&engine, "{{json .Args}}")).unwrap();
    assert!(args.iter().any(|argument| argument == hostile), "{args:?}");
    assert!(eventually(TIMEOUT, || {
        let log = engine.docker(&["logs", "flower-supernode"]).stdout;
        log.lines().any(|line| line == format!("arg {hostile}"))
    }));
    assert!(!std::path::Path::new("/pwned").exists());
    assert!(engine.docker(&["exec", "flower-supernode", "ls", "/pwned"]).code != Some(0));
}

#[test]
fn container_has_contract_restrictions() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    let pem = include_str!("../../agent/tests/ca.crt");
    vm.context(&[
        ("FL_SUPERLINK_ADDRESS", "h:1"),
        ("FL_TLS_ENABLED", "YES"),
        ("FL_SSL_CA_CERTFILE", pem),
    ]);
    let mut agent = start_ready(&vm);
    let host: Value = serde_json::from_str(&inspect(&engine, "{{json .HostConfig}}")).unwrap();
    assert_eq!(host["CapDrop"], json!(["ALL"]));
    assert_eq!(host["SecurityOpt"], json!(["no-new-privileges"]));
    assert_eq!(host["Init"], true);
    assert!(
        host["PidsLimit"].as_i64().unwrap() > 0 && host["ShmSize"].as_u64().unwrap() > 64 << 20
    );
    assert_eq!(host["RestartPolicy"]["Name"], "no");
    assert_eq!(host["LogConfig"]["Config"]["max-size"], "10m");
    assert_eq!(inspect(&engine, "{{.Config.User}}"), "49999:49999");
    let probe =
        "touch /app/.flwr/x && ! touch /app/data/x && ! touch /app/ca.crt && cat /app/ca.crt";
    let inside = engine.docker(&["exec", "flower-supernode", "sh", "-c", probe]);
    assert_eq!(inside.stdout.trim(), pem.trim(), "{inside:?}");
    let args = inspect(&engine, "{{.Args}}");
    assert!(
        args.contains("--root-certificates /app/ca.crt") && !args.contains("--insecure"),
        "{args}"
    );
    assert_eq!(agent.terminate(), 0);
}

#[test]
fn changed_ca_replaces_container() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    let pem = include_str!("../../agent/tests/ca.crt");
    let two = format!("{pem}{}", include_str!("../../agent/tests/certificates/hospital-ca.crt"));
    let ids: Vec<String> = [pem.to_owned(), pem.replace('\n', "\r\n"), two]
        .iter()
        .map(|pem| {
            vm.context(&[
                ("FL_SUPERLINK_ADDRESS", "h:1"),
                ("FL_TLS_ENABLED", "YES"),
                ("FL_SSL_CA_CERTFILE", pem),
            ]);
            start_ready(&vm).kill();
            inspect(&engine, "{{.Id}}")
        })
        .collect();
    assert_eq!(ids[0], ids[1], "the same certificate in another encoding");
    assert_ne!(ids[1], ids[2]);
    let inside = engine.docker(&["exec", "flower-supernode", "cat", "/app/ca.crt"]).stdout;
    assert_eq!(inside.matches("BEGIN CERTIFICATE").count(), 2);
}

#[test]
fn driver_appearing_within_wait_is_used() {
    let Some((_engine, mut vm)) = engine_with(&one_gpu()) else { return };
    let sysfs = Sysfs::new().gpu("0000:01:00.0");
    let ready = vm.path("driver-is-ready");
    let mut script = one_gpu();
    script["ready_file"] = json!(ready);
    vm.sysfs(&sysfs).nvml(&script).context(&gpu_context(&[])).set("gpu.wait_seconds", 60);
    let agent = vm.start();
    agent.wait_for_notify("Looking for the GPU", TIMEOUT);
    let _bound = sysfs.driver("nvidia").module("550.54.15");
    fs::write(ready, "").unwrap();
    let ready = agent.wait_for_notify("READY=1", Duration::from_secs(30));
    assert!(ready.contains(GPU_A), "{ready}");
    assert_eq!(warnings(&agent), Vec::<String>::new());
}

#[test]
fn mig_instance_gets_device_nodes_of_parent_gpu() {
    const MIG_A: &str = "MIG-aaaa1111-0000-0000-0000-00000000000a";
    const MIG_B: &str = "MIG-bbbb2222-0000-0000-0000-00000000000b";
    let Some((engine, mut vm)) = engine_with(&two_gpus()) else { return };
    // The second GPU has the node /dev/nvidia3 and is partitioned.
    let mut script = two_gpus();
    script["gpus"][1]["minor"] = json!(3);
    script["gpus"][1]["mig"] = json!([
        {"uuid": MIG_A, "name": "NVIDIA A100 MIG 1g.5gb", "memory_mib": 4864},
        {"uuid": MIG_B, "name": "NVIDIA A100 MIG 2g.10gb", "memory_mib": 9856},
    ]);
    engine.nvidia_runtime(RuntimeMode::Ok, &script);
    vm.sysfs(&sysfs_of_two()).nvml(&script);
    let nodes_inside = || {
        let listed = engine.docker(&["exec", "flower-supernode", "ls", "/dev"]).stdout;
        listed
            .lines()
            .filter(|name| {
                name.starts_with("nvidia") && *name != "nvidiactl" && *name != "nvidia-uvm"
            })
            .fold(String::new(), |names, name| names + name + " ")
    };
    for (selection, expected, nodes, limits) in [
        ("all", vec![GPU_A, MIG_A, MIG_B], "nvidia0 nvidia3 ", "20480,2432,4928"),
        ("1", vec![MIG_A, MIG_B], "nvidia3 ", "2432,4928"),
        (MIG_B, vec![MIG_B], "nvidia3 ", "4928"),
        ("MIG-aaaa", vec![MIG_A], "nvidia3 ", "2432"),
    ] {
        vm.context(&gpu_context(&[
            ("FL_CUDA_VISIBLE_DEVICES", selection),
            ("FL_GPU_MEMORY_FRACTION", "0.5"),
        ]));
        let mut agent = start_ready(&vm);
        assert_eq!(warnings(&agent), Vec::<String>::new());
        assert_eq!(engine.records().last().unwrap().gpus, expected, "{selection}");
        let env = inspect(&engine, "{{range .Config.Env}}{{println .}}{{end}}");
        for line in [
            format!("NVIDIA_VISIBLE_DEVICES={}\n", expected.join(",")),
            format!("FL_GPU_MEMORY_LIMITS_MIB={limits}\n"),
            "FL_DEVICE=cuda\n".into(),
        ] {
            assert!(env.contains(&line), "{selection}: {line}: {env}");
        }
        assert_eq!(nodes_inside(), nodes, "{selection}");
        assert_eq!(inspect(&engine, "{{.HostConfig.Runtime}}"), "nvidia");
        let ready =
            agent.notifications().into_iter().rfind(|message| message.contains("READY=1")).unwrap();
        assert!(expected.iter().all(|uuid| ready.contains(uuid)), "{ready}");
        assert_eq!(agent.terminate(), 0);
    }
    // An instance is missing if its parent GPU's node is not in the container, even if another
    // GPU's is.
    let mut wrong = script.clone();
    wrong["gpus"][1]["minor"] = json!(0);
    engine.nvidia_runtime(RuntimeMode::Ok, &wrong);
    engine.docker(&["rm", "-f", "flower-supernode"]);
    vm.context(&gpu_context(&[("FL_CUDA_VISIBLE_DEVICES", MIG_B)]));
    let agent = start_ready(&vm);
    let warnings = warnings(&agent);
    assert_eq!(warnings.len(), 1, "{:#?}", agent.lines());
    for words in ["gpu-not-visible", MIG_B, "it has /dev/nvidia0"] {
        assert!(warnings[0].contains(words), "{words}: {warnings:?}");
    }
    assert_eq!(inspect(&engine, "{{.HostConfig.Runtime}}"), "runc");
}

#[test]
fn mig_container_uses_instance_memory_and_is_adopted() {
    const MIG_A: &str = "MIG-aaaa1111-0000-0000-0000-00000000000a";
    let mut script = one_gpu();
    script["gpus"][0]["mig"] = json!([{"uuid": MIG_A, "memory_mib": 4864}]);
    let Some((engine, mut vm)) = engine_with(&script) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[]));
    let plan = json_of(&vm.run_command("plan", &["--json"]));
    let devices = plan["gpu"]["verdict"]["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 1);
    assert_eq!((&devices[0]["uuid"], &devices[0]["memory_mib"]), (&json!(MIG_A), &json!(4864)));
    start_ready(&vm).kill();
    let before = inspect(&engine, "{{.Id}}");
    let agent = start_ready(&vm);
    assert_eq!((inspect(&engine, "{{.Id}}"), warnings(&agent)), (before, Vec::new()));
}
