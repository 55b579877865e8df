//! Faults of the node's dependencies. Each has its expected result, and after each the invariants
//! must hold: the operator's data is intact, there is one container, it does not run on the CPU
//! without a WARNING, READY is truthful, no secret is printed.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

mod common;
mod faulty_node;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use common::{TIMEOUT, base64, gpu_context, report, sysfs_of_one};
use faulty_node::{FaultyNode, Table, VM};
use supernode_tests::{Fault, FaultyMount, Sysfs, agent_binary, eventually, image};

const READY_AFTER_RESTART: &str = "ready, at the latest after a restart";

/// A boot is complete if it makes no call for this long.
const QUIET: Duration = Duration::from_secs(2);

/// A call during a boot: its index, its name, and the preparation of that boot.
type Call = (usize, String, fn(&mut FaultyNode));

/// Returns every Docker call of a boot. The calls up to the last `GET /info`, with which Docker
/// confirms the runtime, are recorded on a Docker without the runtime. Later calls are recorded on
/// a Docker that has it and need not be restarted each time.
fn docker_calls_of_a_boot(node: &mut FaultyNode) -> Vec<Call> {
    let befores: [fn(&mut FaultyNode); 2] = [FaultyNode::reset, FaultyNode::clear];
    let [(early, _), (_, late)] = befores.map(|before| {
        before(node);
        node.start_until_ready();
        node.wait_connected();
        assert_eq!(node.run_count(), 1, "the event history must contain the run");
        let calls = (0..).zip(node.proxy.calls()).map(|(number, call)| (number, call, before));
        let last_info = calls
            .clone()
            .filter(|(_, call, _)| call == "GET /info")
            .map(|(number, _, _)| number)
            .max();
        calls.partition::<Vec<Call>, _>(|(number, _, _)| Some(*number) <= last_info)
    });
    [early, late].concat()
}

#[test]
fn every_docker_call_refused_or_truncated() {
    let Some(mut node) = FaultyNode::new() else { return };
    let mut table = Table::default();
    for (number, call, before) in docker_calls_of_a_boot(&mut node) {
        for (fault, what) in
            [(Fault::Refuse, "HTTP 500 for"), (Fault::Truncate, "truncated answer to")]
        {
            table.fault(
                &mut node,
                &format!("{what} call {number}, {call}"),
                READY_AFTER_RESTART,
                |node| {
                    before(node);
                    node.proxy.fault_at(number, fault);
                    let since = Instant::now();
                    node.start_with_one_restart();
                    node.wait_connected();
                    since
                },
            );
        }
    }
    table.finish();
}

#[test]
fn every_docker_call_delayed_with_sigterm() {
    let Some(mut node) = FaultyNode::new() else { return };
    let mut table = Table::default();
    for (number, call, before) in docker_calls_of_a_boot(&mut node) {
        // The number of calls after the start depends on when Flower connects: a boot may have
        // fewer.
        let hang = |node: &mut FaultyNode| {
            for _ in 0..3 {
                before(node);
                node.proxy.fault_at(number, Fault::Hang);
                node.start();
                let mut connected = None;
                let is_settled = || {
                    if connected.is_none()
                        && node.output().iter().any(|line| line.contains("as SuperNode 1"))
                    {
                        connected = Some(Instant::now());
                    }
                    node.proxy.hanging() == 1
                        || connected.is_some_and(|since| since.elapsed() > QUIET)
                };
                assert!(eventually(TIMEOUT, is_settled), "{:#?}", node.output());
                if node.proxy.hanging() == 1 {
                    return;
                }
            }
            report(&format!(
                "SKIPPED: no call {number}, {call}, in three boots (FAULT delayed, SIGTERM)"
            ));
        };
        table.fault(
            &mut node,
            &format!("delayed answer to call {number}, {call}"),
            "ready once it is answered",
            |node| {
                hang(node);
                let since = Instant::now();
                node.proxy.clear_faults();
                node.agent().wait_for_notify("READY=1", TIMEOUT);
                node.wait_connected();
                since
            },
        );
        table.fault(
            &mut node,
            &format!("SIGTERM during call {number}, {call}"),
            "agent exits, container stopped",
            |node| {
                hang(node);
                let since = Instant::now();
                node.terminate();
                since
            },
        );
    }
    table.finish();
}

#[test]
fn docker_call_never_answered() {
    type Recovery = fn(&mut FaultyNode);
    let starts_again: Recovery = FaultyNode::start_with_one_restart;
    let falls_back_to_cpu: Recovery = |node| {
        node.start();
        node.agent().wait_for_line("the container did not start within 120 s", 3 * TIMEOUT);
        node.proxy.clear_faults();
        node.agent().wait_for_notify("READY=1", TIMEOUT);
    };
    let gives_up = "timeout after 60 s, ready after a restart";
    // Run in parallel, because each waits for one or two minutes.
    let threads = [
        ("GET /info", gives_up, starts_again),
        ("GET /images/*/json", gives_up, starts_again),
        ("GET /containers/*/json", gives_up, starts_again),
        ("POST /containers/create", gives_up, starts_again),
        (
            "POST /containers/*/start",
            "timeout after 120 s, CPU fallback with WARNING",
            falls_back_to_cpu,
        ),
    ]
    .map(|(call, expected, recovery)| {
        thread::spawn(move || {
            let Some(mut node) = FaultyNode::new() else { return };
            let mut table = Table::default();
            table.fault(&mut node, &format!("no answer to {call}"), expected, |node| {
                node.proxy.fault_of(call, Fault::Hang);
                let since = Instant::now();
                recovery(node);
                since
            });
            table.finish();
        })
    });
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn docker_daemon_faults() {
    let Some(mut node) = FaultyNode::new() else { return };
    let mut table = Table::default();
    table.fault(&mut node, "Docker starts after the agent", "agent waits for Docker", |node| {
        node.engine.stop();
        node.start();
        node.agent().wait_for_notify("EXTEND_TIMEOUT_USEC=", TIMEOUT);
        node.engine.restart();
        let since = Instant::now();
        node.agent().wait_for_notify("READY=1", TIMEOUT);
        since
    });
    table.fault(
        &mut node,
        "Docker starts after the agent's timeout",
        READY_AFTER_RESTART,
        |node| {
            node.clear();
            node.engine.stop();
            node.vm.set("docker.ready_timeout_seconds", 1);
            assert!(!node.start_once());
            node.engine.restart();
            node.vm.set("docker.ready_timeout_seconds", 10);
            let since = Instant::now();
            node.start_until_ready();
            since
        },
    );
    table.fault(&mut node, "Docker answers each call 500 ms late", "ready", |node| {
        node.reset();
        node.proxy.fault_always(Fault::Delay(Duration::from_millis(500)));
        let since = Instant::now();
        node.start_until_ready();
        node.wait_connected();
        since
    });
    table.fault(
        &mut node,
        "dockerd is killed (SIGKILL) and restarted",
        "container restarted",
        |node| {
            node.reset();
            node.start_until_ready();
            let before = node.run();
            node.engine.kill();
            node.engine.restart();
            let since = Instant::now();
            node.wait_new_run(&before);
            node.wait_status_running();
            since
        },
    );
    table.fault(&mut node, "Docker is restarted", "container restarted", |node| {
        node.reset();
        node.start_until_ready();
        let before = node.run();
        node.engine.restart();
        let since = Instant::now();
        node.wait_new_run(&before);
        node.wait_status_running();
        since
    });
    table.fault(&mut node, "Docker's socket is recreated", "still monitored", |node| {
        node.reset();
        node.start_until_ready();
        let since = Instant::now();
        node.proxy.recreate_socket();
        assert_still_monitored(node);
        since
    });
    table.fault(&mut node, "all connections to Docker are cut", "still monitored", |node| {
        node.reset();
        node.start_until_ready();
        node.wait_connected();
        let since = Instant::now();
        node.proxy.cut();
        assert_still_monitored(node);
        since
    });
    table.fault(
        &mut node,
        "Docker refuses the container log for 2 s",
        "connection detected",
        |node| {
            node.reset();
            node.proxy.fault_of("GET /containers/*/logs", Fault::Refuse);
            node.start_until_ready();
            thread::sleep(Duration::from_secs(2));
            let since = Instant::now();
            node.proxy.clear_faults();
            node.wait_connected();
            since
        },
    );
    table.finish();
}

/// Asserts that the container kept running and that the agent notices its exit now.
#[track_caller]
fn assert_still_monitored(node: &mut FaultyNode) {
    thread::sleep(Duration::from_secs(3));
    let before = node.run();
    assert!(before.ends_with(" true"), "{before}");
    assert_eq!(node.output().iter().filter(|line| line.contains("started container")).count(), 1);
    node.wait_status_running();
    node.engine.docker(&["kill", "flower-supernode"]).expect_success();
    node.wait_new_run(&before);
}

#[test]
fn docker_daemon_faults_with_live_restore() {
    let Some(mut node) = FaultyNode::with_live_restore() else { return };
    let mut table = Table::default();
    for (what, kill) in [("restarted", false), ("killed (SIGKILL)", true)] {
        let name = format!("Docker with live-restore is {what}");
        table.fault(&mut node, &name, "same run, still monitored", |node| {
            node.reset();
            node.start_until_ready();
            let before = node.run();
            if kill {
                node.engine.kill();
            }
            node.engine.restart();
            let since = Instant::now();
            node.agent().wait_for_line("Docker engine is responding again", TIMEOUT);
            assert_eq!(node.run(), before);
            assert_still_monitored(node);
            since
        });
    }
    let expected = "unit status: running";
    table.fault(&mut node, "same, before Flower has connected", expected, |node| {
        node.reset();
        node.context("test-never-connects=true");
        node.start_until_ready();
        node.engine.restart();
        let since = Instant::now();
        node.agent().wait_for_line("Docker engine is responding again", TIMEOUT);
        node.wait_status_running();
        since
    });
    table.finish();
}

#[test]
fn container_faults() {
    let Some(mut node) = FaultyNode::new() else { return };
    let mut table = Table::default();
    let docker = |node: &FaultyNode, arguments: &[&str]| {
        node.engine.docker(arguments).expect_success();
    };
    let restarted = "restarted, readiness published";
    for (name, end) in [
        ("the container is killed", &[&["kill", "flower-supernode"][..]][..]),
        (
            "the container is OOM-killed",
            &[
                &["update", "--memory", "16m", "--memory-swap", "16m", "flower-supernode"],
                &["kill", "--signal", "USR1", "flower-supernode"],
            ],
        ),
        ("the container is removed manually", &[&["rm", "-f", "flower-supernode"]]),
        (
            "a foreign container replaces it under its name",
            &[
                &["rm", "-f", "flower-supernode"],
                &["run", "-d", "--name", "flower-supernode", image::PYTORCH],
            ],
        ),
    ] {
        table.fault(&mut node, name, restarted, |node| {
            node.clear();
            node.engine.import_image(&[image::PYTORCH]);
            node.start_until_ready();
            node.wait_connected();
            node.wait_published("FL_NODE_READY", "YES");
            let before = node.run();
            let since = Instant::now();
            end.iter().for_each(|arguments| docker(node, arguments));
            node.wait_new_own_run(&before);
            node.wait_status_running();
            since
        });
    }
    table.fault(&mut node, "the image is untagged and the container killed", restarted, |node| {
        node.clear();
        node.start_until_ready();
        let before = node.run();
        docker(node, &["rmi", "-f", image::PYTORCH]);
        docker(node, &["kill", "flower-supernode"]);
        let since = Instant::now();
        node.agent().wait_for_line("exited with code 137", TIMEOUT);
        assert!(eventually(TIMEOUT / 6, || node.run().ends_with(" true") && node.run() != before));
        since
    });
    table.fault(
        &mut node,
        "image and container are removed, the image is reloaded",
        restarted,
        |node| {
            node.clear();
            node.engine.import_image(&[image::PYTORCH]);
            node.start_until_ready();
            let before = node.run();
            docker(node, &["rmi", "-f", image::PYTORCH]);
            docker(node, &["rm", "-f", "flower-supernode"]);
            node.agent().wait_for_line("did not start", TIMEOUT);
            node.engine.import_image(&[image::PYTORCH]);
            let since = Instant::now();
            node.wait_new_own_run(&before);
            node.wait_status_running();
            since
        },
    );
    for code in [0, 1, 137] {
        table.fault(
            &mut node,
            &format!("the container keeps exiting with {code}"),
            "increasing backoff",
            |node| {
                node.clear();
                node.context(&format!("test-exit={code}"));
                node.start_until_ready();
                let since = Instant::now();
                for delay in [1, 2] {
                    let line = format!("exited with code {code}; restarting it in {delay} s");
                    node.agent().wait_for_line(&line, TIMEOUT);
                }
                node.context("");
                since
            },
        );
    }
    table.fault(
        &mut node,
        "the container is renamed and the agent killed",
        "one container",
        |node| {
            node.clear();
            node.start_until_ready();
            docker(node, &["rename", "flower-supernode", "renamed"]);
            let since = Instant::now();
            node.start_until_ready();
            since
        },
    );
    table.fault(
        &mut node,
        "container.name changes and the agent is reloaded",
        "one container",
        |node| {
            node.clear();
            node.vm.set("container.name", "another-name");
            node.start();
            node.wait_connected();
            node.vm.set("container.name", "flower-supernode");
            let _ = node.vm.settings_file();
            let since = Instant::now();
            node.agent().reload();
            node.wait_new_run("");
            node.wait_status_running();
            since
        },
    );
    let expected = "published as not ready";
    table.fault(&mut node, "the container is paused: published readiness", expected, |node| {
        node.clear();
        node.start_until_ready();
        node.wait_published("FL_NODE_READY", "YES");
        docker(node, &["pause", "flower-supernode"]);
        let since = Instant::now();
        let is_not_ready =
            || node.published().get("FL_NODE_READY").is_some_and(|ready| ready == "NO");
        assert!(eventually(TIMEOUT / 4, is_not_ready));
        since
    });
    table.fault(
        &mut node,
        "the container is paused: local readiness",
        "not ready while paused, same run after",
        |node| {
            node.clear();
            node.start_until_ready();
            let before = node.run();
            docker(node, &["pause", "flower-supernode"]);
            assert_eq!(node.vm.run_command("status", &["--ready"]).code, Some(1));
            docker(node, &["unpause", "flower-supernode"]);
            let since = Instant::now();
            assert_eq!(node.vm.run_command("status", &["--ready"]).code, Some(0));
            assert_eq!(node.run(), before);
            since
        },
    );
    table.finish();
}

/// A self-signed certificate in base64, as in `FL_SSL_CA_CERTFILE`.
fn certificate() -> String {
    let sandbox = supernode_tests::Sandbox::new("ca");
    let (key, pem) = (sandbox.join("key"), sandbox.join("pem"));
    let mut openssl = std::process::Command::new("openssl");
    openssl.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "30",
    ]);
    openssl.args(["-subj", "/CN=ca", "-keyout"]).arg(&key).arg("-out").arg(&pem);
    supernode_tests::run(&mut openssl, TIMEOUT).expect_success();
    base64(&fs::read_to_string(pem).unwrap())
}

#[test]
fn disk_faults() {
    let Some(mut node) = FaultyNode::new() else { return };
    let mut table = Table::default();
    // Each directory with the variables that make the agent write there.
    let certificate = certificate();
    let tls =
        [("FL_TLS_ENABLED", "YES"), ("FL_SSL_CA_CERTFILE", &certificate), ("REPORT_READY", "YES")];
    node.onegate.change(|state| {
        state.join(7, "supernode", VM);
    });
    let directories = [
        ("state", &[][..], 4),
        ("certs", &tls, 0),
        ("persistent", &[("FL_LOG_LEVEL", "DEBUG")], 2),
    ];
    for (directory, variables, max_pages) in directories {
        for pages in 0..=max_pages {
            let name = format!("disk of {directory} full except {pages} pages");
            table.fault(&mut node, &name, READY_AFTER_RESTART, |node| {
                node.clear();
                node.vm.context(&gpu_context(variables));
                let _ = fs::remove_dir_all(node.vm.path(directory));
                fs::create_dir_all(node.vm.path(directory)).unwrap();
                let disk = FaultyMount::with_free_pages(pages, &node.vm.path(directory));
                let is_up = node.start_once();
                drop(disk);
                let since = Instant::now();
                if !is_up {
                    assert!(
                        node.output().iter().any(|line| line.contains("cannot write")),
                        "{:#?}",
                        node.output()
                    );
                    node.start_until_ready();
                }
                since
            });
        }
    }
    node.context("");
    table.fault(&mut node, "the data directory cannot be created", READY_AFTER_RESTART, |node| {
        node.clear();
        let directory = node.vm.path("read-only");
        fs::create_dir_all(&directory).unwrap();
        node.vm.set("container.data_dir", directory.join("data").to_string_lossy().into_owned());
        let disk = FaultyMount::read_only(&directory);
        assert!(!node.start_once());
        drop(disk);
        let since = Instant::now();
        node.start_until_ready();
        since
    });
    // A separate directory for the file that Docker reads and the agent reads and writes.
    let etc = node.vm.path("etc");
    fs::create_dir_all(&etc).unwrap();
    let daemon_json = etc.join("daemon.json");
    fs::copy(node.engine.daemon_json(), &daemon_json).unwrap();
    fs::remove_file(node.engine.daemon_json()).unwrap();
    symlink(&daemon_json, node.engine.daemon_json()).unwrap();
    node.vm.set("docker.daemon_json", daemon_json.to_string_lossy().into_owned());
    type Mount = fn(&Path) -> FaultyMount;
    let full: Mount = |directory| FaultyMount::with_free_pages(0, directory);
    let mounts: [(&str, Mount); 2] =
        [("disk of /etc full", full), ("/etc is read-only", FaultyMount::read_only)];
    for (name, mount) in mounts {
        table.fault(&mut node, name, "CPU fallback with WARNING; then the GPU", |node| {
            node.reset();
            let disk = mount(&etc);
            node.start_until_ready();
            node.agent().wait_for_line("runtime-not-configured", TIMEOUT);
            node.terminate();
            drop(disk);
            let since = Instant::now();
            node.start_until_ready();
            assert_eq!(common::inspect(&node.engine, "{{.HostConfig.Runtime}}"), "nvidia");
            since
        });
    }
    table.finish();
}

/// Starts the agent through a script of the VM, which ends with `exec "$agent" "$@"`.
fn start_through(node: &mut FaultyNode, script: &str) {
    let agent = agent_binary();
    let text = format!(
        "#!/bin/sh\nset -eu\nagent='{}'\n{script}\nexec \"$agent\" \"$@\"\n",
        agent.display()
    );
    let path = node.vm.write("bin/started-by", text);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    node.vm.agent(path);
}

#[test]
fn system_faults() {
    let Some(mut node) = FaultyNode::new() else { return };
    let mut table = Table::default();
    if Path::new("/run/systemd/journal/socket").exists() {
        report("SKIPPED: this machine has a journal (FAULT JOURNAL_STREAM without a journal)");
    } else {
        table.fault(
            &mut node,
            "JOURNAL_STREAM is set but there is no journal",
            "logs to stderr",
            |node| {
                start_through(node, "export JOURNAL_STREAM=$(stat -L -c %d:%i /dev/stderr)");
                let since = Instant::now();
                node.start_until_ready();
                assert!(
                    node.output().iter().any(|line| line.contains("started container")),
                    "{:#?}",
                    node.output()
                );
                since
            },
        );
    }
    for (what, script) in [
        ("is not set", "unset NOTIFY_SOCKET"),
        ("does not exist", "export NOTIFY_SOCKET=/nowhere/notify"),
    ] {
        table.fault(&mut node, &format!("the notify socket {what}"), "ready", |node| {
            node.clear();
            start_through(node, script);
            let since = Instant::now();
            node.start();
            node.wait_connected();
            assert_eq!(node.running().as_deref(), Some("true"));
            since
        });
    }
    node.vm.agent(agent_binary());
    let lose_context = |node: &FaultyNode| {
        fs::remove_dir_all(node.vm.path("context")).unwrap();
        fs::create_dir(node.vm.path("context")).unwrap();
    };
    table.fault(&mut node, "no context at startup", READY_AFTER_RESTART, |node| {
        node.clear();
        lose_context(node);
        assert!(!node.start_once());
        let since = Instant::now();
        node.context("");
        node.start_until_ready();
        since
    });
    table.fault(
        &mut node,
        "the context is incomplete at startup",
        "agent waits for the rest",
        |node| {
            node.clear();
            let file = node.vm.path("context/context.sh.network");
            let whole = fs::read(&file).unwrap();
            fs::write(&file, &whole[..whole.len() / 2]).unwrap();
            node.start();
            thread::sleep(Duration::from_millis(200));
            let since = Instant::now();
            fs::write(&file, whole).unwrap();
            node.agent().wait_for_notify("READY=1", TIMEOUT);
            since
        },
    );
    table.fault(&mut node, "the context disappears while the node runs", "same run", |node| {
        let before = node.run();
        lose_context(node);
        let since = Instant::now();
        node.agent().reload();
        node.agent().wait_for_line("the node keeps the previous one", TIMEOUT);
        assert_eq!(node.run(), before);
        since
    });
    table.fault(
        &mut node,
        "the context changes while the node runs",
        "container replaced once",
        |node| {
            node.context("");
            node.start_until_ready();
            let before = node.run();
            node.context("changed=1");
            let since = Instant::now();
            node.agent().reload();
            node.wait_new_run(&before);
            node.wait_status_running();
            since
        },
    );
    match faketime() {
        None => report("SKIPPED: no libfaketime (Debian: faketime) (FAULT clock set back)"),
        Some(library) => {
            let clock = node.vm.write("clock", "+0\n");
            node.vm.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", &clock);
            node.vm.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            table.fault(
                &mut node,
                "the clock is set back by a day",
                "still monitored, then adopted",
                |node| {
                    node.clear();
                    node.start_until_ready();
                    fs::write(&clock, "-1d\n").unwrap();
                    let since = Instant::now();
                    assert_still_monitored(node);
                    let before = node.run();
                    node.start_until_ready();
                    assert_eq!(node.run(), before);
                    node.wait_connected();
                    since
                },
            );
        }
    }
    table.finish();
}

fn faketime() -> Option<PathBuf> {
    let directories = fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path());
    directories
        .map(|directory| directory.join("faketime/libfaketime.so.1"))
        .find(|library| library.is_file())
}

#[test]
fn fifty_kills_during_boot() {
    let Some(mut node) = FaultyNode::new() else { return };
    let mut table = Table::default();
    let given = std::env::var("SUPERNODE_TESTS_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = given.unwrap_or_else(|| std::process::id().into());
    report(&format!("MEASURED kill times are derived from SUPERNODE_TESTS_SEED={seed}"));
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    node.reset();
    let since = Instant::now();
    node.start_until_ready();
    let whole = since.elapsed();
    // While Docker is creating the container for the killed agent, the name is taken and cannot be
    // inspected.
    table.fault(
        &mut node,
        "the agent is killed at 50 random times of a boot",
        READY_AFTER_RESTART,
        |node| {
            let mut longest = Duration::ZERO;
            for kill in 0..50 {
                // Every tenth kill is on a Docker without the runtime.
                if kill % 10 == 0 {
                    node.reset();
                } else if kill % 2 == 0 {
                    node.clear();
                }
                // xorshift64.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                node.start();
                thread::sleep(whole.mul_f64(1.2 * (random >> 11) as f64 / (1u64 << 53) as f64));
                let since = Instant::now();
                node.start_with_one_restart();
                longest = longest.max(since.elapsed());
                node.assert_invariants();
            }
            Instant::now() - longest
        },
    );
    table.finish();
}

#[test]
fn sigterm_in_every_phase() {
    let Some(mut node) = FaultyNode::new() else { return };
    let mut table = Table::default();
    let stopped = "agent exits, container stopped";
    table.fault(&mut node, "SIGTERM while waiting for Docker", stopped, |node| {
        node.engine.stop();
        node.start();
        node.agent().wait_for_notify("EXTEND_TIMEOUT_USEC=", TIMEOUT);
        let since = Instant::now();
        node.terminate();
        node.engine.restart();
        since
    });
    table.fault(&mut node, "SIGTERM while waiting for the driver", stopped, |node| {
        node.vm.sysfs(&Sysfs::new().gpu("0000:01:00.0")).set("gpu.wait_seconds", 30);
        node.start();
        node.agent().wait_for_notify("Looking for the GPU", TIMEOUT);
        thread::sleep(Duration::from_millis(500));
        let since = Instant::now();
        node.terminate();
        since
    });
    node.vm.sysfs(&sysfs_of_one()).set("gpu.wait_seconds", 1);
    table.fault(&mut node, "SIGTERM while pulling the image", stopped, |node| {
        node.engine.docker(&["rmi", image::PYTORCH]).expect_success();
        node.proxy.fault_of("POST /images/create", Fault::Hang);
        node.start();
        node.agent().wait_for_notify("STATUS=Pulling", TIMEOUT);
        let since = Instant::now();
        node.terminate();
        node.proxy.clear_faults();
        node.engine.import_image(&[image::PYTORCH]);
        since
    });
    table.fault(&mut node, "SIGTERM while Docker starts the container", stopped, |node| {
        let runtime = node.engine.runtime_path();
        let real = fs::read_link(&runtime).unwrap();
        fs::remove_file(&runtime).unwrap();
        let slow = "#!/bin/sh\ncase \" $* \" in *\" create \"*) sleep 2 ;; esac\n";
        fs::write(&runtime, format!("{slow}exec '{}' \"$@\"\n", real.display())).unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).unwrap();
        node.start();
        let starts = || node.proxy.calls().iter().any(|call| call.ends_with("/start"));
        assert!(eventually(TIMEOUT, starts), "{:#?}", node.output());
        let since = Instant::now();
        node.terminate();
        thread::sleep(Duration::from_secs(3));
        assert_eq!(node.running().as_deref(), Some("false"), "{:#?}", node.output());
        node.engine.install_nvidia_runtime();
        since
    });
    table.fault(&mut node, "SIGTERM while the node runs", stopped, |node| {
        node.start_until_ready();
        let since = Instant::now();
        node.terminate();
        node.wait_published("FL_NODE_READY", "NO");
        since
    });
    table.fault(&mut node, "SIGTERM during the restart delay", stopped, |node| {
        node.context("test-exit=1");
        node.start_until_ready();
        node.agent().wait_for_line("restarting it in 2 s", TIMEOUT);
        let since = Instant::now();
        node.terminate();
        node.context("");
        since
    });
    table.fault(&mut node, "a second agent is started", "it exits with an error", |node| {
        node.start_until_ready();
        let before = node.run();
        let since = Instant::now();
        let second = node.vm.run_command("run", &[]);
        assert_eq!(second.code, Some(1), "{second:?}");
        assert!(second.stderr.contains("another supernode-agent is already running"), "{second:?}");
        assert_eq!(node.run(), before);
        since
    });
    table.finish();
}

/// Creates a cgroup with this memory limit; `None` if this machine does not permit it.
fn cgroup(limit_mib: u64) -> Option<PathBuf> {
    let (root, limit) =
        [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
            .into_iter()
            .find(|(root, _)| Path::new(root).join("cgroup.procs").exists())?;
    let group = Path::new(root).join(format!("sn-faults-{}", std::process::id()));
    fs::create_dir(&group).ok()?;
    let limited = fs::write(group.join(limit), (limit_mib << 20).to_string());
    if limited.is_err() {
        let _ = fs::remove_dir(&group);
    }
    limited.ok().map(|()| group)
}

#[test]
fn low_memory_with_verbose_container() {
    let Some(mut node) = FaultyNode::new() else { return };
    let mut table = Table::default();
    let Some(group) = cgroup(32) else {
        report("SKIPPED: cannot create a cgroup (FAULT 32 MiB memory limit)");
        return;
    };
    let name = "32 MiB memory limit, 64 MiB of log without a line break";
    table.fault(&mut node, name, "ready, connection detected", |node| {
        start_through(node, &format!("echo $$ >'{}/cgroup.procs'", group.display()));
        node.context("test-floods=64");
        let since = Instant::now();
        node.start_until_ready();
        node.wait_connected();
        since
    });
    let peak = ["memory.max_usage_in_bytes", "memory.peak"]
        .iter()
        .find_map(|file| fs::read_to_string(group.join(file)).ok());
    let peak = peak.and_then(|peak| peak.trim().parse::<u64>().ok()).unwrap_or(0) >> 20;
    report(&format!(
        "MEASURED peak memory of the agent's cgroup, including page cache: {peak} of 32 MiB"
    ));
    drop(node);
    assert!(eventually(TIMEOUT, || fs::remove_dir(&group).is_ok()));
    table.finish();
}
