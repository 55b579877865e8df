//! Operating a running node: status, reload, and notifications to the service manager.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

mod common;

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use common::{
    GPU_A, TIMEOUT, engine_with, gpu_context, inspect, json_of, one_gpu, start_ready, sysfs_of_one,
    warnings,
};
use serde_json::{Value, json};
use supernode_tests::{Engine, Registry, Sysfs, TestVm, eventually, run};

fn status(vm: &TestVm) -> Value {
    json_of(&vm.run_command("status", &["--json"]))
}

fn ready(vm: &TestVm) -> Option<i32> {
    vm.run_command("status", &["--ready"]).code
}

#[test]
fn node_is_ready_only_while_container_runs() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    assert_eq!(ready(&vm), Some(1), "before the first start");
    let mut agent = start_ready(&vm);
    assert_eq!(ready(&vm), Some(0));
    // The agent has been killed; the container still runs.
    agent.kill();
    assert_eq!(ready(&vm), Some(0));
    assert_eq!(status(&vm)["agent"]["running"], false);
    engine.docker(&["pause", "flower-supernode"]).expect_success();
    assert_eq!(ready(&vm), Some(1), "a paused container is not ready");
    engine.docker(&["unpause", "flower-supernode"]).expect_success();
    let mut agent = start_ready(&vm);
    assert_eq!(agent.terminate(), 0);
    let refused = vm.run_command("status", &["--ready"]);
    assert_eq!(refused.code, Some(1));
    assert!(
        refused.stderr.contains("flower-supernode is not running: exited with code 0"),
        "{refused:?}"
    );
    assert_eq!(status(&vm)["agent"]["status"], "Stopped");
    engine.docker(&["rm", "flower-supernode"]).expect_success();
    engine
        .docker(&["run", "-d", "--name", "flower-supernode", supernode_tests::image::PYTORCH])
        .expect_success();
    assert_eq!(ready(&vm), Some(1), "a foreign container is not the node");
    engine.docker(&["rm", "-f", "flower-supernode"]);
}

#[test]
fn status_without_engine_reports_unknown_facts() {
    let vm = TestVm::new();
    assert_eq!(ready(&vm), Some(1));
    let status = status(&vm);
    assert!(status["notes"][0].as_str().unwrap().contains("does not answer"), "{status}");
    assert_eq!(status["ready"], false);
}

#[test]
fn status_shows_container_device_since_and_reason() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[]));
    let mut agent = start_ready(&vm);
    let document = status(&vm);
    assert_eq!(document["gpu"]["verdict"]["devices"][0]["uuid"], GPU_A);
    assert_eq!(document["superlink"], "10.9.8.7:9092");
    assert_eq!(document["agent"]["running"], true);
    assert_eq!(document["agent"]["pid"], agent.pid());
    assert_eq!(
        document["container"]["started_at"].as_str(),
        Some(inspect(&engine, "{{.State.StartedAt}}").as_str())
    );
    assert_eq!(agent.terminate(), 0);

    vm.sysfs(&Sysfs::new().gpu("0000:01:00.0").driver("nouveau"));
    let _agent = start_ready(&vm);
    let text = vm.run_command("status", &[]).stdout;
    for words in [
        "Container  flower-supernode is running since 20",
        "Device     cpu: wrong-driver: ",
        "Fix        ",
        "Running on the CPU",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn pull_progress_is_reported_in_percent() {
    let Some(engine) = Engine::start() else { return };
    let registry = Registry::start(&engine);
    let mut vm = TestVm::new();
    vm.engine(&engine)
        .context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_SUPERNODE_IMAGE", Registry::IMAGE)]);
    let agent = vm.start();
    let messages = agent.wait_for_notify(" % of ", TIMEOUT);
    assert!(messages.starts_with(&format!("STATUS=Pulling {}: ", Registry::IMAGE)), "{messages}");
    assert!(eventually(TIMEOUT, || {
        let text = status(&vm)["agent"]["status"].to_string();
        text.contains("Pulling 127.0.0.1:5000/node:1: ") && text.contains(" % of ")
    }));
    assert!(
        vm.run_command("status", &[]).stdout.contains("Agent      Pulling 127.0.0.1:5000/node:1: ")
    );
    registry.release_layer();
    agent.wait_for_notify("READY=1", TIMEOUT);
    assert_eq!(status(&vm)["container"]["image"], Registry::IMAGE);
}

#[test]
fn status_watch_prints_changes_once_until_interrupted() {
    let vm = TestVm::new();
    let report = |words: &str| {
        let report = json!({"version": "0.1.0", "pid": 1, "status": words, "since": "",
            "verdict": null, "superlink": null});
        std::fs::write(vm.path("state/status.json"), report.to_string()).unwrap();
    };
    let watch = |arguments: &[&str]| {
        let mut watcher =
            vm.command("status").args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(watcher.stdout.take().unwrap()).lines().map(Result::unwrap);
        (watcher, lines)
    };
    let ends = |watcher: &mut Child| {
        let mut code = None;
        eventually(TIMEOUT, || {
            code = watcher.try_wait().unwrap();
            code.is_some()
        });
        code.and_then(|code| code.code())
    };
    report("Pulling it: 1 %");
    let (mut watcher, mut lines) = watch(&["--watch", "--json"]);
    let mut next = || {
        serde_json::from_str::<Value>(&lines.next().unwrap()).unwrap()["agent"]["status"].clone()
    };
    assert_eq!(next(), "Pulling it: 1 %");
    report("Pulling it: 2 %");
    assert_eq!(next(), "Pulling it: 2 %");
    drop(lines);
    assert_eq!(ends(&mut watcher), Some(0), "the reader has closed the pipe and nothing changes");

    let (mut watcher, mut lines) = watch(&["--watch"]);
    assert!(lines.next().unwrap().starts_with("Container  "));
    assert!(
        lines
            .next()
            .unwrap()
            .starts_with("Agent      not running; last status at : Pulling it: 2 %")
    );
    report("Stopped");
    assert_eq!(lines.next().unwrap(), "", "one block per change");
    assert!(lines.next().unwrap().starts_with("Container  "));
    let interrupt = format!("kill -INT {}", watcher.id());
    run(Command::new("sh").args(["-c", &interrupt]), TIMEOUT).expect_success();
    assert_eq!(ends(&mut watcher), Some(0));
}

#[test]
fn reload_replaces_container_only_on_change() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("ETH0_DNS", "1.1.1.1")]);
    let mut agent = start_ready(&vm);
    let id = || inspect(&engine, "{{.Id}}");
    let first = id();
    // A variable that the agent does not use.
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("ETH0_DNS", "9.9.9.9")]);
    agent.reload();
    agent.wait_for_line("the configuration is unchanged", TIMEOUT);
    // An invalid context is logged, and the node continues.
    vm.context(&[("FL_SUPERLINK_ADDRESS", "nowhere"), ("FL_LOG_LEVEL", "loud")]);
    agent.reload();
    agent.wait_for_line("FL_SUPERLINK_ADDRESS='nowhere': must be", TIMEOUT);
    agent.wait_for_line("FL_LOG_LEVEL='loud': must be", TIMEOUT);
    agent.wait_for_line("the node keeps the previous one", TIMEOUT);
    assert_eq!(id(), first);
    // A variable that the agent uses.
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:2")]);
    agent.reload();
    assert!(eventually(TIMEOUT, || engine
        .docker(&["inspect", "flower-supernode"])
        .stdout
        .contains("h:2")));
    agent.wait_for_line("the configuration has changed", TIMEOUT);
    assert!(eventually(TIMEOUT, || status(&vm)["superlink"] == "h:2" && ready(&vm) == Some(0)));
    assert_ne!(id(), first);
    let second = id();
    agent.reload();
    assert!(eventually(TIMEOUT, || {
        agent.lines().iter().filter(|line| line.contains("the configuration is unchanged")).count()
            == 2
    }));
    assert_eq!(id(), second);
    assert_eq!(agent.terminate(), 0);
    assert_eq!(inspect(&engine, "{{.State.Running}}"), "false");
}

#[test]
fn reload_start_and_end_are_notified_to_systemd() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_NODE_CONFIG", "test-never-connects=true")]);
    let agent = start_ready(&vm);
    let run = || inspect(&engine, "{{.Id}} {{.State.StartedAt}}");
    let first = run();
    // From RELOADING=1 on, without the status messages in between.
    let reload = |until: &str| {
        let before = agent.notifications().len();
        agent.reload();
        assert!(eventually(TIMEOUT, || agent.notifications()[before..]
            .iter()
            .any(|message| message.contains(until))));
        let messages: Vec<String> = agent.notifications().split_off(before);
        assert!(messages[0].starts_with("RELOADING=1\nMONOTONIC_USEC="), "{messages:#?}");
        messages
            .into_iter()
            .skip(1)
            .filter(|message| !message.contains("EXTEND_TIMEOUT_USEC="))
            .collect::<Vec<_>>()
    };
    let as_before =
        ["READY=1\nSTATUS=Running on the CPU (FL_GPU_ENABLED is not YES); not connected to h:1\n"];
    assert_eq!(reload("READY=1"), as_before, "nothing has changed");
    vm.context(&[("FL_SUPERLINK_ADDRESS", "nowhere")]);
    assert_eq!(reload("READY=1"), as_before, "the current context is invalid");
    agent.wait_for_line("FL_SUPERLINK_ADDRESS='nowhere': must be", TIMEOUT);
    assert_eq!(run(), first);
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:2"), ("FL_NODE_CONFIG", "test-never-connects=true")]);
    let messages = reload("READY=1");
    assert!(messages.len() > 1 && !messages[0].contains("READY=1"), "{messages:#?}");
    assert!(messages.last().unwrap().contains("not connected to h:2"), "{messages:#?}");
    assert_ne!(run(), first);
    let started = agent.lines().iter().filter(|line| line.contains("started container")).count();
    assert_eq!(started, 2, "{:#?}", agent.lines());
}

#[test]
fn reload_disabling_gpu_access_warns_of_fallback() {
    let Some((engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[]));
    let agent = start_ready(&vm);
    vm.context(&gpu_context(&[("FL_CUDA_VISIBLE_DEVICES", "7")]));
    agent.reload();
    agent.wait_for_line("device-selection-empty", TIMEOUT);
    assert!(eventually(TIMEOUT, || {
        engine
            .docker(&["inspect", "--format", "{{.HostConfig.Runtime}}", "flower-supernode"])
            .stdout
            .trim()
            == "runc"
    }));
    assert_eq!(warnings(&agent).len(), 1);
}

#[test]
fn watchdog_is_notified_when_enabled() {
    let mut vm = TestVm::new();
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]).env("WATCHDOG_USEC", "200000");
    let agent = vm.start();
    assert!(eventually(TIMEOUT, || {
        agent.notifications().iter().filter(|message| message.contains("WATCHDOG=1")).count() >= 3
    }));
}
