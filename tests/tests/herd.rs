//! Services whose nodes all boot at the same time, against one OneGate.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

mod common;

use common::report;
use supernode_tests::herd::{Herd, start_together};

#[test]
fn five_hundred_simultaneous_nodes_discover_superlink() {
    const AGENTS: u32 = 500;
    let Herd { took, at_first_attempt, discovery, requests, peak_requests_per_second } =
        start_together(AGENTS);
    report(&format!(
        "MEASURED {AGENTS} simultaneous agents discovered their SuperLink within {:.1} s, \
         {at_first_attempt} at the first attempt: {discovery} discovery requests, {requests} in \
         total, at most {peak_requests_per_second} per second",
        took.as_secs_f64(),
    ));
    // Two each, and more only if the machine is too loaded to answer in time.
    assert!(discovery >= 2 * AGENTS as usize, "{discovery}");
}
