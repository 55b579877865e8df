//! The SuperLink through OneGate: discovery, waiting, trust, address changes; the partition; and
//! what is published. Uses real engines, the OneGate simulator and test images that log a
//! connection as Flower does.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use common::{TIMEOUT, base64, inspect, json_of, start_ready, warnings};
use supernode_tests::onegate::{Reply, Request};
use supernode_tests::{Agent, Engine, OneGateSimulator, TestVm, eventually, image};

/// VM IDs of the node and of the SuperLink.
const NODE: u32 = 101;
const SUPERLINK: u32 = 100;
const SERVICE: u32 = 7;
/// Fast retries: the cap also limits the first delay.
const FAST: (&str, &str) = ("FL_EDGE_MAX_BACKOFF", "1");

/// A service with a SuperLink that has published its endpoint, and one node.
fn service() -> OneGateSimulator {
    let onegate = OneGateSimulator::start();
    onegate.change(|state| {
        state
            .join(SERVICE, "superlink", SUPERLINK)
            .nic("10.0.0.5")
            .attribute("FL_ENDPOINT", "10.9.8.7:9092");
        state.join(SERVICE, "supernode", NODE).nic("10.0.0.6");
    });
    onegate
}

/// A VM of the service without an engine.
fn service_vm(onegate: &OneGateSimulator, variables: &[(&str, &str)]) -> TestVm {
    let mut vm = TestVm::new();
    let all: Vec<_> = std::iter::once(FAST).chain(variables.iter().copied()).collect();
    vm.context(&all).onegate(onegate, NODE);
    vm
}

fn vm_with_engine(
    onegate: &OneGateSimulator,
    variables: &[(&str, &str)],
) -> Option<(Engine, TestVm)> {
    let engine = Engine::start()?;
    engine.import_image(&[image::PYTORCH]);
    let mut vm = service_vm(onegate, variables);
    vm.engine(&engine);
    Some((engine, vm))
}

fn arguments(engine: &Engine) -> String {
    inspect(engine, "{{join .Args \" \"}}")
}

/// Updates of a VM, in order.
fn updates(onegate: &OneGateSimulator) -> Vec<String> {
    onegate.requests().iter().filter_map(Request::update).collect()
}

fn attribute(onegate: &OneGateSimulator, vm: u32, name: &str) -> Option<String> {
    onegate.change(|state| state.vms[&vm].user_template.get(name).cloned())
}

#[track_caller]
fn wait_for_attribute(onegate: &OneGateSimulator, name: &str, value: &str) {
    let arrived = eventually(TIMEOUT, || attribute(onegate, NODE, name).as_deref() == Some(value));
    assert!(arrived, "{name} is {:?}; {:#?}", attribute(onegate, NODE, name), updates(onegate));
}

fn connected(agent: &Agent) {
    agent.wait_for_line("connected to the SuperLink", TIMEOUT);
}

#[test]
fn service_node_discovers_superlink_address() {
    let onegate = service();
    let Some((engine, mut vm)) = vm_with_engine(&onegate, &[]) else { return };
    let plan = json_of(&vm.run_command("plan", &["--json"]));
    assert_eq!(plan["superlink"]["address"], "10.9.8.7:9092");
    assert_eq!(plan["superlink"]["vm_id"], SUPERLINK);
    assert_eq!(updates(&onegate), Vec::<String>::new(), "plan must not publish");
    vm.set("container.stop_timeout_seconds", 5);
    let agent = start_ready(&vm);
    assert_eq!(warnings(&agent), Vec::<String>::new());
    let arguments = arguments(&engine);
    assert!(arguments.contains("--superlink 10.9.8.7:9092 --insecure"), "{arguments}");
    assert!(arguments.contains("--node-config partition-id=0 num-partitions=1"), "{arguments}");
}

#[test]
fn falls_back_to_first_nic_and_release_port() {
    let onegate = service();
    onegate.change(|state| {
        let vm = state.vms.get_mut(&SUPERLINK).unwrap();
        vm.user_template.remove("FL_ENDPOINT");
        vm.attribute("FL_VERSION", "1.41.0");
    });
    let Some((engine, vm)) = vm_with_engine(&onegate, &[]) else { return };
    let agent = start_ready(&vm);
    assert!(arguments(&engine).contains("--superlink 10.0.0.5:8000"), "{}", arguments(&engine));
    let warnings = warnings(&agent);
    assert!(
        warnings.len() == 1 && warnings[0].contains("1.41.0") && warnings[0].contains("1.31.0"),
        "{warnings:#?}"
    );
    let launched =
        agent.lines().iter().position(|line| line.contains("started container")).unwrap();
    let warned = agent.lines().iter().position(|line| line.contains("1.41.0")).unwrap();
    assert!(warned < launched, "the warning must precede the launch: {:#?}", agent.lines());
}

#[test]
fn unit_is_ready_while_waiting_for_superlink() {
    let onegate = service();
    onegate.change(|state| state.vms.get_mut(&SUPERLINK).unwrap().lcm_state = 1);
    let Some((engine, vm)) = vm_with_engine(&onegate, &[]) else { return };
    let agent = vm.start();
    agent.wait_for_notify("READY=1", TIMEOUT);
    agent.wait_for_notify("STATUS=waiting for the SuperLink (attempt 3, next in 1 s)", TIMEOUT);
    assert_eq!(
        engine.docker(&["ps", "-aq"]).expect_success(),
        "",
        "there must be no container before discovery"
    );
    let status = vm.run_command("status", &[]);
    assert!(status.stdout.contains("waiting for the SuperLink (attempt "), "{status:?}");
    assert_eq!(vm.run_command("status", &["--ready"]).code, Some(1));
    onegate.change(|state| state.vms.get_mut(&SUPERLINK).unwrap().lcm_state = 3);
    agent.wait_for_line("started container", TIMEOUT);
    let waiting =
        warnings(&agent).into_iter().filter(|line| line.contains("VM 100 is not running")).count();
    assert_eq!(waiting, 1, "waiting must be logged once: {:#?}", warnings(&agent));
}

#[test]
fn only_operator_errors_stop_the_node() {
    let onegate = service();
    let assert_exits_78 = |vm: &TestVm, text: &str| {
        let output = vm.run_command("run", &[]);
        assert_eq!(output.code, Some(78), "{output:?}");
        assert!(output.stderr.contains(text), "{text}: {output:?}");
        let plan = json_of(&vm.run_command("plan", &["--json"]));
        assert!(plan["notes"].to_string().contains("the node would not start"), "{plan:#}");
    };
    onegate.change(|state| state.services.get_mut(&SERVICE).unwrap().roles[0].0 = "server".into());
    assert_exits_78(&service_vm(&onegate, &[]), "has no role superlink (it has server, supernode)");
    onegate.change(|state| {
        state.services.clear();
        state.vms.get_mut(&NODE).unwrap().user_template.clear();
    });
    assert_exits_78(&service_vm(&onegate, &[]), "not part of a OneFlow service");
    let mut vm = service_vm(&onegate, &[]);
    vm.context_file("one_env", "export TOKENTXT=\"\"\n");
    assert_exits_78(&vm, "has no token (TOKEN=YES");
    let mut vm = TestVm::new();
    vm.context(&[]);
    assert_exits_78(&vm, "the context has no ONEGATE_ENDPOINT");
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_TLS_ENABLED", "YES")]);
    assert_exits_78(&vm, "FL_SSL_CA_CERTFILE is not set");
}

#[test]
fn other_onegate_answers_are_retried() {
    let onegate = service();
    let faults = || {
        vec![
            Reply::Status(401, "Not authorized".into()),
            Reply::Status(404, "Service 7 not found".into()),
            Reply::Status(400, "Service 7 does not contain VM 101".into()),
            Reply::Status(403, "restricted".into()),
            Reply::Status(500, "rejected".into()),
            Reply::Bytes(b"\x00\x01 no HTTP\r\n\r\n".to_vec()),
            Reply::HalfBody,
            Reply::Redirect("http://127.0.0.1:1/service".into()),
            Reply::Close,
        ]
    };
    let Some((engine, mut vm)) = vm_with_engine(&onegate, &[]) else { return };
    vm.set("onegate.timeout_seconds", 2);
    onegate.script("GET /service", faults());
    let agent = vm.start();
    agent.wait_for_line("started container", TIMEOUT);
    let warnings = warnings(&agent);
    for text in [
        "Not authorized",
        "Service 7 not found",
        "does not contain VM 101",
        "restricted",
        "rejected",
        "302",
    ] {
        assert!(
            warnings
                .iter()
                .any(|line| line.contains("cannot find the SuperLink") && line.contains(text)),
            "{text}: {warnings:#?}"
        );
    }
    let requests = onegate.requests().iter().filter(|request| request.path() == "/service").count();
    assert!(requests > faults().len(), "{requests}");
    assert!(arguments(&engine).contains("10.9.8.7:9092"));
    let token = onegate.change(|state| state.vms[&NODE].token.clone());
    assert!(!agent.lines().iter().any(|line| line.contains(&token)), "the token is in the log");
}

#[test]
fn slow_and_endless_answers_time_out() {
    let onegate = service();
    let Some((_engine, mut vm)) = vm_with_engine(&onegate, &[]) else { return };
    vm.set("onegate.timeout_seconds", 1);
    onegate.script("GET /service", [Reply::Hang, Reply::Slow, Reply::Endless]);
    let agent = vm.start();
    agent.wait_for_line("started container", TIMEOUT);
}

#[test]
fn fixed_backoff_gives_up_after_thirty_attempts() {
    // Thirty attempts take five minutes. A unit test covers the count; this one covers the exit.
    let onegate = service();
    onegate.change(|state| state.oneflow_down = true);
    let vm = service_vm(&onegate, &[("FL_EDGE_BACKOFF", "fixed")]);
    let mut agent = vm.start();
    agent.wait_for_line("; retrying in 1", TIMEOUT);
    assert_eq!(agent.wait_exit(TIMEOUT), 1, "Docker is missing too");
}

const CA: &str = include_str!("../../agent/tests/ca.crt");
const LEAF: &str = include_str!("../../agent/tests/certificates/leaf.crt");

#[test]
fn tls_uses_the_published_ca_and_rejects_leaf() {
    let onegate = service();
    onegate.change(|state| {
        state
            .vms
            .get_mut(&SUPERLINK)
            .unwrap()
            .attribute("FL_TLS", "YES")
            .attribute("FL_CA_CERT", &base64(LEAF));
    });
    let Some((engine, vm)) = vm_with_engine(&onegate, &[]) else { return };
    let agent = vm.start();
    agent.wait_for_line("the SuperLink's VM 100 published an invalid FL_CA_CERT=", TIMEOUT);
    onegate
        .change(|state| state.vms.get_mut(&SUPERLINK).unwrap().user_template.remove("FL_CA_CERT"));
    agent.wait_for_line("published no FL_CA_CERT", TIMEOUT);
    assert_eq!(engine.docker(&["ps", "-aq"]).expect_success(), "");
    onegate.change(|state| {
        state.vms.get_mut(&SUPERLINK).unwrap().attribute("FL_CA_CERT", &base64(CA));
    });
    agent.wait_for_line("started container", TIMEOUT);
    assert!(
        arguments(&engine).contains("--root-certificates /app/ca.crt"),
        "{}",
        arguments(&engine)
    );
    let written = vm.path("certs/ca.crt");
    assert!(fs::read_to_string(&written).unwrap().starts_with("-----BEGIN CERTIFICATE-----\n"));
    let metadata = fs::metadata(&written).unwrap();
    assert_eq!((metadata.mode() & 0o7777, metadata.uid()), (0o644, 0));
}

#[test]
fn peer_cannot_downgrade_configured_tls() {
    let onegate = service();
    onegate.change(|state| {
        state.vms.get_mut(&SUPERLINK).unwrap().attribute("FL_TLS", "NO");
    });
    let own = [("FL_TLS_ENABLED", "YES"), ("FL_SSL_CA_CERTFILE", &base64(CA))];
    let Some((engine, vm)) = vm_with_engine(&onegate, &own) else { return };
    let _agent = start_ready(&vm);
    assert!(
        arguments(&engine).contains("--root-certificates /app/ca.crt"),
        "{}",
        arguments(&engine)
    );
}

#[test]
fn ready_is_published_on_connection_and_reset_on_stop() {
    let onegate = service();
    onegate.change(|state| {
        // Left over from an earlier boot.
        state
            .vms
            .get_mut(&NODE)
            .unwrap()
            .attribute("READY", "YES")
            .attribute("FL_GPU_NAME", "NVIDIA A100");
    });
    let variables = [("REPORT_READY", "YES"), ("FL_NODE_CONFIG", "test-never-connects=true")];
    let Some((engine, mut vm)) = vm_with_engine(&onegate, &variables) else { return };
    let agent = start_ready(&vm);
    wait_for_attribute(&onegate, "FL_GPU_STATUS", "cpu");
    for (name, value) in
        [("READY", "NO"), ("FL_NODE_READY", "NO"), ("FL_GPU_NAME", ""), ("FL_NODE_ID", "101")]
    {
        assert_eq!(attribute(&onegate, NODE, name).as_deref(), Some(value), "{name}");
    }
    assert!(vm.run_command("status", &[]).stdout.contains("not connected"));
    assert!(!onegate.requests().iter().any(Request::sets_ready_gate), "{:#?}", updates(&onegate));
    drop(agent);
    engine.docker(&["rm", "-f", "flower-supernode"]).expect_success();

    vm.context(&[FAST, ("REPORT_READY", "YES")]);
    let mut agent = start_ready(&vm);
    connected(&agent);
    wait_for_attribute(&onegate, "READY", "YES");
    let last = updates(&onegate).pop().unwrap();
    for line in [
        "FL_NODE_READY=YES",
        "FL_VERSION=1.31.0",
        "FL_FRAMEWORK=pytorch",
        "FL_GPU_AVAILABLE=NO",
        "FL_GPU_COUNT=0",
    ] {
        assert!(last.lines().any(|found| found == line), "{line}: {last}");
    }
    assert_eq!(json_of(&vm.run_command("status", &["--json"]))["connected"], true);
    agent.wait_for_notify("connected to 10.9.8.7:9092", TIMEOUT);
    assert_eq!(agent.terminate(), 0);
    for (name, value) in [
        ("READY", "NO"),
        ("FL_NODE_READY", "NO"),
        ("FL_GPU_AVAILABLE", "NO"),
        ("FL_GPU_STATUS", ""),
    ] {
        assert_eq!(attribute(&onegate, NODE, name).as_deref(), Some(value), "{name}");
    }
}

#[test]
fn invalid_configuration_is_published_as_not_ready() {
    let onegate = service();
    onegate.change(|state| {
        state
            .vms
            .get_mut(&NODE)
            .unwrap()
            .attribute("READY", "YES")
            .attribute("FL_NODE_READY", "YES");
    });
    let vm = service_vm(&onegate, &[("REPORT_READY", "YES"), ("FL_GPU_MEMORY_FRACTION", "7")]);
    assert_eq!(vm.run_command("run", &[]).code, Some(78));
    assert_eq!(attribute(&onegate, NODE, "READY").as_deref(), Some("NO"));
    assert_eq!(attribute(&onegate, NODE, "FL_NODE_READY").as_deref(), Some("NO"));
}

#[test]
fn unavailable_onegate_logs_one_warning() {
    let onegate = service();
    let Some((engine, vm)) = vm_with_engine(&onegate, &[]) else { return };
    onegate.script("PUT /vm", std::iter::repeat_n(Reply::Status(500, "rejected".into()), 1000));
    let agent = start_ready(&vm);
    connected(&agent);
    assert!(eventually(TIMEOUT, || updates(&onegate).len() > 1), "{:#?}", updates(&onegate));
    onegate.clear_scripts();
    // The next regular attempt is up to 30 s away; a change triggers one at once.
    engine.docker(&["restart", "--time", "0", "flower-supernode"]).expect_success();
    agent.wait_for_line("publishing to OneGate works again", TIMEOUT);
    wait_for_attribute(&onegate, "FL_NODE_READY", "YES");
    // The other update is from the restart.
    let warnings: Vec<_> =
        warnings(&agent).into_iter().filter(|line| line.contains("OneGate")).collect();
    assert!(
        warnings.len() == 1 && warnings[0].contains("cannot publish to OneGate: "),
        "{warnings:#?}"
    );
}

#[test]
fn partition_survives_restarts_and_peer_changes() {
    let onegate = OneGateSimulator::start();
    onegate.change(|state| {
        state.join(SERVICE, "superlink", SUPERLINK).attribute("FL_ENDPOINT", "10.9.8.7:9092");
        state.join(SERVICE, "supernode", 99);
        state.join(SERVICE, "supernode", NODE);
    });
    let Some((engine, vm)) = vm_with_engine(&onegate, &[]) else { return };
    let mut agent = start_ready(&vm);
    assert!(
        arguments(&engine).contains("partition-id=1 num-partitions=2"),
        "{}",
        arguments(&engine)
    );
    wait_for_attribute(&onegate, "FL_PARTITION_ID", "1");
    // 102 replaces 99, so the index of this node in the list is now 0.
    onegate.change(|state| {
        state.vms.remove(&99);
        state.services.get_mut(&SERVICE).unwrap().roles[1].1.retain(|id| *id != 99);
        state.join(SERVICE, "supernode", 102);
    });
    let container = inspect(&engine, "{{.Id}}");
    agent.kill();
    let agent = start_ready(&vm);
    agent.wait_for_line("adopted the running container", TIMEOUT);
    assert_eq!(inspect(&engine, "{{.Id}}"), container, "the container must not be replaced");
    drop(agent);
    // A reboot: /run is empty and the boot ID differs.
    engine.docker(&["stop", "flower-supernode"]).expect_success();
    vm.write("root/proc/sys/kernel/random/boot_id", "another\n");
    let _agent = start_ready(&vm);
    assert!(
        arguments(&engine).contains("partition-id=1 num-partitions=2"),
        "{}",
        arguments(&engine)
    );

    // The replacement of 99 takes the free partition and logs it.
    let mut other = TestVm::new();
    other.context(&[FAST]).onegate(&onegate, 102);
    let Some(engine) = Engine::start() else { return };
    engine.import_image(&[image::PYTORCH]);
    other.engine(&engine);
    let _other = start_ready(&other);
    assert!(
        arguments(&engine).contains("partition-id=0 num-partitions=2"),
        "{}",
        arguments(&engine)
    );
    assert_eq!(attribute(&onegate, 102, "FL_PARTITION_ID").as_deref(), Some("0"));
}

#[test]
fn static_address_uses_onegate_only_for_partition() {
    let onegate = service();
    let address = [("FL_SUPERLINK_ADDRESS", "192.0.2.1:9092")];
    let Some((engine, vm)) = vm_with_engine(&onegate, &address) else { return };
    let agent = start_ready(&vm);
    let first = arguments(&engine);
    assert!(
        first.contains("--superlink 192.0.2.1:9092")
            && first.contains("partition-id=0 num-partitions=1"),
        "{first}"
    );
    drop(agent);
    let _ = fs::remove_dir_all(vm.path("persistent"));
    onegate.change(|state| state.oneflow_down = true);
    let agent = start_ready(&vm);
    assert!(!arguments(&engine).contains("partition-id"), "{}", arguments(&engine));
    assert!(
        warnings(&agent).iter().any(|line| line.contains("starting without --node-config")),
        "{:#?}",
        warnings(&agent)
    );
}

#[test]
fn follows_moved_superlink_while_disconnected() {
    let onegate = service();
    let Some((engine, vm)) =
        vm_with_engine(&onegate, &[("FL_NODE_CONFIG", "test-never-connects=true")])
    else {
        return;
    };
    let agent = start_ready(&vm);
    let before = inspect(&engine, "{{.Id}}");
    onegate.change(|state| {
        state.vms.get_mut(&SUPERLINK).unwrap().attribute("FL_ENDPOINT", "10.9.8.8:9092");
    });
    agent.wait_for_line("the service's SuperLink changed to 10.9.8.8:9092", TIMEOUT);
    assert!(eventually(Duration::from_secs(30), || {
        let found =
            engine.docker(&["inspect", "--format", "{{.Id}} {{.Args}}", "flower-supernode"]).stdout;
        !found.contains(&before) && found.contains("10.9.8.8:9092")
    }));
}

#[test]
fn flapping_connection_does_not_hide_moved_superlink() {
    let onegate = service();
    let Some((_engine, vm)) = vm_with_engine(&onegate, &[("FL_NODE_CONFIG", "test-flaps=0.5")])
    else {
        return;
    };
    let agent = start_ready(&vm);
    agent.wait_for_line("not connected to the SuperLink", TIMEOUT);
    let start = Instant::now();
    onegate.change(|state| {
        state.vms.get_mut(&SUPERLINK).unwrap().attribute("FL_ENDPOINT", "10.9.8.8:9092");
    });
    agent.wait_for_line("the service's SuperLink changed to 10.9.8.8:9092", TIMEOUT);
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}
