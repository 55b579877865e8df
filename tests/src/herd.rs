//! Nodes of several services that boot at the same time against one OneGate.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    onegate::OneGateSimulator,
    process::run,
    sandbox::{Sandbox, agent_binary},
    test_vm::{Agent, TestVm},
};

/// Number of services that share the OneGate.
const SERVICES: u32 = 20;
/// Upper bound for all agents on a loaded machine with a debug build.
const TIMEOUT: Duration = Duration::from_secs(240);

/// Measurements of agents that started together.
#[derive(Debug, Clone, Copy)]
pub struct Herd {
    /// From the first start until the last agent has found its SuperLink.
    pub took: Duration,
    /// Number of agents that found it at the first attempt.
    pub at_first_attempt: u32,
    /// Discovery requests.
    pub discovery: usize,
    /// All requests, including publications.
    pub requests: usize,
    /// Highest number of requests within one second.
    pub peak_requests_per_second: usize,
}

/// Starts this many agents at the same time and waits until all have found their SuperLink.
///
/// # Panics
/// If one does not find it.
#[must_use]
#[track_caller]
pub fn start_together(agents: u32) -> Herd {
    let onegate = OneGateSimulator::start();
    onegate.change(|state| {
        for service in 0..SERVICES {
            state.join(service, "superlink", 1 + service).attribute("FL_ENDPOINT", "10.9.8.7:9092");
        }
        for id in 0..agents {
            state.join(id % SERVICES, "supernode", 1000 + id);
        }
    });
    // All agents block on one FIFO and start when it is opened.
    let gate = Sandbox::new("herd");
    let fifo = gate.join("gate");
    run(Command::new("mkfifo").arg(&fifo), TIMEOUT).expect_success();
    let script = format!(
        "#!/bin/sh\nread -r _ < {}\nexec {} \"$@\"\n",
        fifo.display(),
        agent_binary().display()
    );
    let behind_gate = gate.write("agent", script);
    fs::set_permissions(&behind_gate, fs::Permissions::from_mode(0o755))
        .expect("the mode of a script");
    let nodes: Vec<(TestVm, Agent)> = (0..agents)
        .map(|id| {
            let mut vm = TestVm::new();
            // There is no Docker; discovery runs meanwhile.
            vm.set("docker.ready_timeout_seconds", TIMEOUT.as_secs());
            vm.context(&[]).onegate(&onegate, 1000 + id).agent(&behind_gate);
            let agent = vm.start();
            (vm, agent)
        })
        .collect();
    let start = Instant::now();
    // Opening the FIFO for writing releases all waiting readers and all later ones.
    let opened = fs::OpenOptions::new().read(true).write(true).open(&fifo).expect("the gate");
    (&opened).write_all(&vec![b'\n'; agents as usize]).expect("the gate");
    let found = |(_, agent): &(TestVm, Agent)| {
        agent.wait_for_line("found the SuperLink at 10.9.8.7:9092", TIMEOUT)
    };
    let at_first_attempt =
        nodes.iter().map(found).filter(|line| line.contains("attempt 1)")).count();
    let took = start.elapsed();
    let requests = onegate.requests();
    Herd {
        took,
        at_first_attempt: u32::try_from(at_first_attempt).unwrap_or(agents),
        discovery: requests.iter().filter(|request| request.method == "GET").count(),
        requests: requests.len(),
        peak_requests_per_second: onegate.peak_requests_per_second(),
    }
}
