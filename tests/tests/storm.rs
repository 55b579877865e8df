//! A service whose nodes all boot at once, against one OneGate.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by a panic")]

mod common;

use std::time::{Duration, Instant};

use common::say;
use supernode_tests::{Agent, Case, OneGateStandIn};

const AGENTS: u32 = 500;
/// More than all of them need on a busy machine, with a debug build.
const PATIENCE: Duration = Duration::from_secs(240);

#[test]
fn five_hundred_nodes_that_start_together_all_find_their_superlink() {
    let onegate = OneGateStandIn::start();
    onegate.change(|state| {
        state.join(7, "superlink", 1).attribute("FL_ENDPOINT", "10.9.8.7:9092");
        for id in 0..AGENTS {
            state.join(7, "supernode", 1000 + id);
        }
    });
    let began = Instant::now();
    let nodes: Vec<(Case, Agent)> = (0..AGENTS)
        .map(|id| {
            let mut case = Case::new();
            // Docker is not there: the SuperLink is looked for meanwhile.
            case.set("docker.ready_timeout_seconds", PATIENCE.as_secs());
            case.context(&[]).onegate(&onegate, 1000 + id);
            let agent = case.start();
            (case, agent)
        })
        .collect();
    let started = began.elapsed();
    let mut attempts = [0; 3];
    for (_, agent) in &nodes {
        let line = agent.wait_for_line("found the SuperLink at 10.9.8.7:9092", PATIENCE);
        let attempt = (1..3).find(|attempt| line.contains(&format!("attempt {attempt})"))).unwrap_or(0);
        attempts[attempt] += 1;
    }
    let requests = onegate.requests();
    let discovery = requests.iter().filter(|request| request.method == "GET").count();
    say(&format!(
        "MEASURED {AGENTS} agents started within {:.1} s all found their SuperLink in {:.1} s ({} at the first attempt): \
         {discovery} requests of discovery, {} in all, {} a second at the peak",
        started.as_secs_f64(),
        began.elapsed().as_secs_f64(),
        attempts[1],
        requests.len(),
        onegate.peak_requests_per_second(),
    ));
    assert_eq!(discovery, 2 * AGENTS as usize, "two requests each");
}
