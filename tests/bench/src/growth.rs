//! Nodes that boot at the same time: real agents against one OneGate, and larger numbers in a
//! simulation with the agent's backoff code.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use fastrand::Rng;
use serde_json::json;
use supernode_agent::backoff::Backoff;
use supernode_agent::daemon::discovery::{MAX_START_DELAY, exponential_backoff};
use supernode_tests::herd::start_together;

use crate::report::Report;

pub(crate) fn measure(report: &mut Report, together: &[u32], simulated: &[u32]) {
    report.part("simultaneous agents, one OneGate simulator");
    for agents in together {
        let herd = start_together(*agents);
        let figure = format!("{} requests/s", herd.peak_requests_per_second);
        let all_found = format!(
            "all discovered within {:.1} s, {} requests",
            herd.took.as_secs_f64(),
            herd.requests
        );
        report.row(&format!("{agents} agents, peak"), &figure, &all_found);
        let raw = json!({
            "seconds": herd.took.as_secs_f64(), "at_first_attempt": herd.at_first_attempt,
            "discovery": herd.discovery, "requests": herd.requests,
            "peak_requests_per_second": herd.peak_requests_per_second,
        });
        report.keep(&format!("{agents} agents together"), raw);
    }
    report.part("simulation with the agent's backoff code, discovery only");
    for scene in SCENES {
        for &nodes in simulated {
            for chance in [true, false] {
                let end = simulate(scene, nodes, chance);
                let jitter = if chance { "with jitter" } else { "without" };
                let what = format!("{nodes} nodes, {}, {jitter}", scene.words);
                let figure = format!("{} requests/s", end.peak);
                let all_found = match end.last {
                    Some(last) => format!("last discovery after {last:.0} s"),
                    None => format!("not all discovered within {:.0} h", TIMEOUT / 3600.0),
                };
                report.row(&what, &figure, &all_found);
                let raw = json!({
                    "peak_requests_per_second": end.peak,
                    "last_seconds": end.last,
                    "requests": end.requests,
                });
                report.keep(&format!("simulation: {what}"), raw);
            }
        }
    }
}

/// Duration of a simulation, in seconds.
const TIMEOUT: f64 = 6.0 * 3600.0;

/// Boot scenario.
#[derive(Debug, Clone, Copy)]
struct Scene {
    words: &'static str,
    /// Nodes boot within this many seconds.
    window: f64,
    /// The SuperLink starts after this many seconds.
    superlink: f64,
    /// Requests per second that OneGate answers; more are queued.
    capacity: f64,
}

/// The first OneGate has unlimited capacity; the others have the capacity of one process.
const SCENES: &[Scene] = &[
    Scene { words: "booting in one minute", window: 60.0, superlink: 0.0, capacity: 1e9 },
    Scene { words: "SuperLink 10 min late", window: 60.0, superlink: 600.0, capacity: 1e9 },
    Scene {
        words: "simultaneous, SuperLink 10 min late",
        window: 0.0,
        superlink: 600.0,
        capacity: 1e9,
    },
    Scene { words: "in one minute, OneGate 300/s", window: 60.0, superlink: 0.0, capacity: 300.0 },
];

/// Result of a scenario.
struct End {
    /// Highest number of requests sent within one second.
    peak: u32,
    /// Time at which the last node found its SuperLink, in seconds; `None` if one had not after
    /// [`TIMEOUT`].
    last: Option<f64>,
    requests: u64,
}

/// Simulates the discovery of these nodes. An attempt is two requests, for the service and for the
/// SuperLink's VM, as in `superlink.rs`. OneGate answers in order of arrival, including requests
/// whose client has timed out. The delays are the agent's.
fn simulate(scene: &Scene, nodes: u32, chance: bool) -> End {
    /// Time limit of one request (`onegate.timeout_seconds`).
    const LIMIT: f64 = 10.0;
    const CAP: Duration = Duration::from_secs(300);
    let mut rng = Rng::with_seed(7);
    let draw = |rng: &mut Rng| if chance { rng.f64() } else { 0.0 };
    let mut backoffs: Vec<Backoff> = (0..nodes).map(|_| exponential_backoff(CAP)).collect();
    // In microseconds, because integers have a total order.
    let micros = |seconds: f64| (seconds * 1e6) as u64;
    let mut coming: BinaryHeap<Reverse<(u64, u32, bool)>> = (0..nodes)
        .map(|node| {
            let boot = scene.window * f64::from(node) / f64::from(nodes);
            Reverse((micros(boot + MAX_START_DELAY.as_secs_f64() * draw(&mut rng)), node, true))
        })
        .collect();
    let mut a_second: Vec<u32> = Vec::new();
    let (mut free, mut last, mut requests) = (0.0_f64, 0.0_f64, 0);
    let last = loop {
        let Some(Reverse((at, node, is_first))) = coming.pop() else { break Some(last) };
        let now = at as f64 / 1e6;
        if now > TIMEOUT {
            break None;
        }
        let second = now as usize;
        a_second.resize(a_second.len().max(second + 1), 0);
        a_second[second] += 1;
        requests += 1;
        free = free.max(now) + 1.0 / scene.capacity;
        let in_time = free - now <= LIMIT;
        if in_time && is_first {
            coming.push(Reverse((micros(free), node, false)));
        } else if in_time && now >= scene.superlink {
            last = last.max(free);
        } else {
            let failed = if in_time { free } else { now + LIMIT };
            let delay = backoffs[node as usize].next_delay(draw(&mut rng));
            coming.push(Reverse((micros(failed + delay.as_secs_f64()), node, true)));
        }
    };
    End { peak: a_second.into_iter().max().unwrap_or(0), last, requests }
}
