//! `make bench`: measures the agent next to alternatives in one run and prints one table. The
//! contenders take turns, so that other load on the machine affects all of them; figures are
//! medians. README.md in this directory explains the rows.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a failed measurement fails the benchmark, and the table is printed on standard output"
)]

mod boot;
mod docker;
mod growth;
mod launch;
mod parse;
mod report;
mod rest;
mod size;

use std::path::PathBuf;

use report::Report;

/// Scope of the measurements.
#[derive(Debug, Clone, Copy)]
struct Extent {
    /// Launches per contender.
    launches: usize,
    /// Seconds during which an idle node's wake-ups are counted, minutes after its start.
    rest_seconds: Option<u64>,
    /// Numbers of simultaneous agents.
    together: &'static [u32],
    /// Numbers of simulated nodes.
    simulated: &'static [u32],
}

const WHOLE: Extent = Extent {
    launches: 20,
    rest_seconds: Some(60),
    together: &[1, 10, 100, 500],
    simulated: &[10_000, 100_000],
};
/// The scope in CI: fewer runs and no wake-ups, which the federation test counts with real Flower.
const SHORT: Extent =
    Extent { launches: 5, rest_seconds: None, together: &[1, 10, 100], simulated: &[10_000] };

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (mut extent, mut package) = (WHOLE, None);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--short" => extent = SHORT,
            "--package" => package = arguments.next().map(PathBuf::from),
            other => panic!("unknown argument {other}; usage: [--short] [--package FILE.deb]"),
        }
    }
    let mut report = Report::default();
    launch::measure(&mut report, extent.launches);
    rest::measure(&mut report, extent.rest_seconds);
    size::measure(&mut report, package.as_deref());
    parse::measure(&mut report);
    boot::measure(&mut report);
    growth::measure(&mut report, extent.together, extent.simulated);
    report.finish();
}
