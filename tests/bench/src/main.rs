//! `make bench`: what the agent costs, beside what a user would pick instead, in one run and one
//! table. The contenders take turns, so that whatever else the machine does falls on all of them;
//! figures are medians. README.md beside this tells what each row means and what was decided by it.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark that cannot be taken is a failure of the whole, and its table goes to standard output"
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

/// How much is measured.
#[derive(Debug, Clone, Copy)]
struct Extent {
    /// Launches by each contender.
    launches: usize,
    /// Seconds for which a node at rest is watched, minutes after its start.
    rest_seconds: Option<u64>,
    /// Agents that start together.
    together: &'static [u32],
    /// Nodes that are simulated.
    simulated: &'static [u32],
}

const WHOLE: Extent = Extent {
    launches: 20,
    rest_seconds: Some(60),
    together: &[1, 10, 100, 500],
    simulated: &[10_000, 100_000],
};
/// What CI runs: from fewer runs, and without the wake-ups, which the federation's test counts with
/// a real Flower.
const SHORT: Extent =
    Extent { launches: 5, rest_seconds: None, together: &[1, 10, 100], simulated: &[10_000] };

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (mut extent, mut package) = (WHOLE, None);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--short" => extent = SHORT,
            "--package" => package = arguments.next().map(PathBuf::from),
            other => panic!("{other}: what is known is --short and --package FILE.deb"),
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
