//! `configure-runtime` on real files: what is written, what is preserved, and the state after a
//! kill at any time.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::gpu_context;
use serde_json::Value;
use supernode_tests::{Engine, Output, TestVm};

/// A VM that wants the GPU and has the runtime installed.
fn vm() -> TestVm {
    let mut vm = TestVm::new();
    let runtime = vm.write("bin/nvidia-container-runtime", "#!/bin/sh\n");
    fs::set_permissions(runtime, fs::Permissions::from_mode(0o755)).unwrap();
    vm.context(&gpu_context(&[]));
    vm
}

fn configure(vm: &TestVm) -> Output {
    vm.run_command("configure-runtime", &[])
}

#[test]
fn creates_missing_file_and_second_run_is_a_no_op() {
    let mut vm = vm();
    vm.set("docker.daemon_json", vm.path("etc/docker/daemon.json").to_string_lossy().into_owned());
    let file = vm.path("etc/docker/daemon.json");
    configure(&vm).expect_success();
    let first = fs::read(&file).unwrap();
    let value: Value = serde_json::from_slice(&first).unwrap();
    assert_eq!(value["runtimes"]["nvidia"]["path"], "nvidia-container-runtime");
    let facts = fs::metadata(&file).unwrap();
    assert_eq!(facts.mode() & 0o7777, 0o644);
    configure(&vm).expect_success();
    assert_eq!(fs::read(&file).unwrap(), first);
    assert_eq!(
        fs::metadata(&file).unwrap().ino(),
        facts.ino(),
        "the second run must not write the file"
    );
    assert_eq!(
        fs::read_dir(file.parent().unwrap()).unwrap().count(),
        1,
        "a temporary file remains"
    );
}

#[test]
fn preserves_mode_owner_and_symlink() {
    let vm = vm();
    let real = vm.write("elsewhere/real.json", "{\"debug\": true}");
    fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
    chown(&real, Some(12), Some(34)).unwrap();
    let link = vm.path("daemon.json");
    symlink("elsewhere/real.json", &link).unwrap();
    configure(&vm).expect_success();
    assert_eq!(fs::read_link(&link).unwrap(), Path::new("elsewhere/real.json"));
    let facts = fs::metadata(&real).unwrap();
    assert_eq!((facts.mode() & 0o7777, facts.uid(), facts.gid()), (0o640, 12, 34));
    assert!(fs::read_to_string(&real).unwrap().starts_with("{\"debug\": true, \"runtimes\""));
    // A dangling symlink is followed too.
    fs::remove_file(&real).unwrap();
    configure(&vm).expect_success();
    assert!(real.is_file() && fs::symlink_metadata(&link).unwrap().is_symlink());
}

#[test]
fn rejects_non_object_json_with_position_and_keeps_it() {
    let vm = vm();
    let file = vm.path("daemon.json");
    for (bytes, place) in [
        (&b""[..], "line 1, column 1"),
        (b"{\n  \"a\": 1,\n}", "line 3, column 1"),
        (b"[]", "line 1, column 1"),
        (b"null", "line 1, column 1"),
        (b"{} {}", "line 1, column 4"),
        (b"{\"runtimes\": []}", "line 1, column 14"),
        (b"{\n\"a\": \"\xff\"}", "line 2, column 7"),
        (b"\xff\xfe{\0}\0", "line 1, column 1"),
        (b"{\"a\": \"half", "line 1, column 12"),
    ] {
        fs::write(&file, bytes).unwrap();
        let output = configure(&vm);
        assert_eq!(output.code, Some(1), "{bytes:?}: {output:?}");
        assert!(
            output.stderr.contains("daemon.json") && output.stderr.contains(place),
            "{bytes:?}: {}",
            output.stderr
        );
        assert_eq!(fs::read(&file).unwrap(), bytes);
    }
}

#[test]
fn unwritable_file_is_an_error_and_unchanged() {
    let mut vm = vm();
    // No file can be created in /proc, not even by root.
    vm.set("docker.daemon_json", "/proc/sys/kernel/hostname");
    let before = fs::read("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(configure(&vm).code, Some(1));
    assert_eq!(fs::read("/proc/sys/kernel/hostname").unwrap(), before);
    vm.set("docker.daemon_json", "/proc/no-such-directory/daemon.json");
    let output = configure(&vm);
    assert!(
        output.code == Some(1) && output.stderr.contains("/proc/no-such-directory"),
        "{output:?}"
    );
}

#[test]
fn does_nothing_when_gpu_is_disabled() {
    let mut vm = vm();
    vm.context(&[("FL_GPU_ENABLED", "NO")]);
    configure(&vm).expect_success();
    assert!(!vm.path("daemon.json").exists());
}

#[test]
fn kill_at_any_time_leaves_the_old_or_the_new_file() {
    let vm = vm();
    let file = vm.path("daemon.json");
    let padding: String = (0..4000).map(|n| format!("  \"key-{n}\": \"{n:0>40}\",\n")).collect();
    let old = format!("{{\n{padding}  \"end\": 1\n}}\n");
    fs::write(&file, &old).unwrap();
    configure(&vm).expect_success();
    let new = fs::read_to_string(&file).unwrap();
    let settings = vm.settings_file();
    let (mut old_count, mut new_count) = (0, 0);
    let mut delay = Duration::ZERO;
    // Kill times range from the start of a run to well after its end, however long a run takes on
    // this machine.
    while old_count < 20 || new_count < 20 {
        fs::write(&file, &old).unwrap();
        let mut agent = Command::new(supernode_tests::agent_binary())
            .args(["configure-runtime", "--settings"])
            .arg(&settings)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(delay);
        agent.kill().unwrap();
        agent.wait().unwrap();
        match fs::read_to_string(&file).unwrap() {
            text if text == old => old_count += 1,
            text if text == new => new_count += 1,
            text => panic!(
                "killed after {delay:?}: neither the old nor the new file: {} bytes",
                text.len()
            ),
        }
        delay = if new_count < 20 { delay + Duration::from_micros(100) } else { Duration::ZERO };
        assert!(
            delay < Duration::from_secs(20),
            "no run completed: {old_count} old, {new_count} new"
        );
    }
    // A file left by a killed run does not affect the next run, which removes it.
    fs::write(vm.path(".daemon.json.supernode-agent"), "{ half").unwrap();
    fs::write(&file, &old).unwrap();
    configure(&vm).expect_success();
    assert_eq!(fs::read_to_string(&file).unwrap(), new);
    assert!(!vm.path(".daemon.json.supernode-agent").exists());
}

#[test]
fn concurrent_runs_do_not_interfere() {
    let vm = vm();
    let file = vm.path("daemon.json");
    let old = format!("{{\"padding\": \"{}\"}}", "x".repeat(300_000));
    let settings = vm.settings_file();
    for _ in 0..10 {
        fs::write(&file, &old).unwrap();
        let run = || {
            let mut agent = Command::new(supernode_tests::agent_binary());
            agent
                .args(["configure-runtime", "--settings"])
                .arg(&settings)
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        };
        let agents: Vec<_> = (0..6).map(|_| run()).collect();
        for mut agent in agents {
            assert!(agent.wait().unwrap().success());
        }
        let text = fs::read_to_string(&file).unwrap();
        assert!(
            text.starts_with(old.trim_end_matches('}')) && text.matches("\"nvidia\"").count() == 1
        );
    }
}

#[test]
fn docker_accepts_the_written_file() {
    let Some(mut engine) = Engine::start() else { return };
    let mut vm = TestVm::new();
    vm.engine(&engine).context(&gpu_context(&[]));
    for text in [
        "{}",
        "{\n\t\"log-opts\": {\"max-size\": \"10m\"},\n\t\"runtimes\": {\"other\": {\"path\": \
         \"runc\"}}\n}",
        "{\"max-concurrent-downloads\": 3, \"runtimes\": null}",
        "{\r\n  \"labels\": [\"a=\\u00e9\"],\r\n  \"runtimes\": {}\r\n}",
    ] {
        fs::write(engine.daemon_json(), text).unwrap();
        configure(&vm).expect_success();
        engine.restart();
        let info = engine.get("/info").unwrap();
        assert_eq!(info["Runtimes"]["nvidia"]["path"], "nvidia-container-runtime", "{text}");
    }
}
