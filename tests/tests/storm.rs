//! Services whose nodes all boot at once, against one OneGate.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by a panic")]

mod common;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use common::say;
use supernode_tests::{Agent, Case, OneGateStandIn, Sandbox, agent_binary, run};

const AGENTS: u32 = 500;
/// A cloud has several.
const SERVICES: u32 = 20;
/// More than all of them need on a busy machine, with a debug build.
const PATIENCE: Duration = Duration::from_secs(240);

#[test]
fn five_hundred_nodes_that_start_together_all_find_their_superlink() {
    let onegate = OneGateStandIn::start();
    onegate.change(|state| {
        for service in 0..SERVICES {
            state.join(service, "superlink", 1 + service).attribute("FL_ENDPOINT", "10.9.8.7:9092");
        }
        for id in 0..AGENTS {
            state.join(id % SERVICES, "supernode", 1000 + id);
        }
    });
    // All of them stand behind one gate, and start when it opens.
    let gate = Sandbox::new("storm");
    let fifo = gate.join("gate");
    run(Command::new("mkfifo").arg(&fifo), PATIENCE).expect_success();
    let script = format!("#!/bin/sh\nread -r _ < {}\nexec {} \"$@\"\n", fifo.display(), agent_binary().display());
    let behind_gate = gate.write("agent", script);
    fs::set_permissions(&behind_gate, fs::Permissions::from_mode(0o755)).unwrap();
    let nodes: Vec<(Case, Agent)> = (0..AGENTS)
        .map(|id| {
            let mut case = Case::new();
            // Docker is not there: the SuperLink is looked for meanwhile.
            case.set("docker.ready_timeout_seconds", PATIENCE.as_secs());
            case.context(&[]).onegate(&onegate, 1000 + id).agent(&behind_gate);
            let agent = case.start();
            (case, agent)
        })
        .collect();
    let began = Instant::now();
    // The first writer lets every reader go that waits, and each that comes after.
    let opened = fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    (&opened).write_all(&[b'\n'; AGENTS as usize]).unwrap();
    let mut attempts = [0; 3];
    for (_, agent) in &nodes {
        let line = agent.wait_for_line("found the SuperLink at 10.9.8.7:9092", PATIENCE);
        let attempt = (1..3).find(|attempt| line.contains(&format!("attempt {attempt})"))).unwrap_or(0);
        attempts[attempt] += 1;
    }
    let requests = onegate.requests();
    let discovery = requests.iter().filter(|request| request.method == "GET").count();
    say(&format!(
        "MEASURED {AGENTS} agents that started together all found their SuperLink within {:.1} s ({} at the first attempt): \
         {discovery} requests of discovery, {} in all, {} a second at the peak",
        began.elapsed().as_secs_f64(),
        attempts[1],
        requests.len(),
        onegate.peak_requests_per_second(),
    ));
    // Two each, and more only where the machine is too busy to answer in time.
    assert!(discovery >= 2 * AGENTS as usize, "{discovery}");
}
