//! Resource usage of an idle node's agent.

use std::fs;
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::launch::BenchVm;
use crate::report::Report;

/// After this time the liveness probe runs at its regular interval (`liveness.rs`).
const SETTLED: Duration = Duration::from_secs(130);

/// Measures nodes with and without a GPU in parallel; counts wake-ups for `wake_ups` seconds.
pub(crate) fn measure(report: &mut Report, wake_ups: Option<u64>) {
    report.part("idle node");
    let nodes: Vec<_> = [false, true]
        .map(BenchVm::new)
        .into_iter()
        .map(|bench_vm| (bench_vm.agent(), bench_vm))
        .collect();
    let slept = || nodes.iter().map(|(agent, _)| context_switches(agent.pid())).collect::<Vec<_>>();
    let a_minute = wake_ups.map(|seconds| {
        thread::sleep(SETTLED);
        let before = slept();
        thread::sleep(Duration::from_secs(seconds));
        let pairs = slept().into_iter().zip(before);
        pairs
            .map(|(after, before)| (after - before) as f64 * 60.0 / seconds as f64)
            .collect::<Vec<_>>()
    });
    for (number, (agent, _)) in nodes.iter().enumerate() {
        let with_gpu = number == 1;
        let children = children(agent.pid());
        let (own, theirs) =
            (pss_kib(agent.pid()), children.iter().map(|pid| pss_kib(*pid)).sum::<u64>());
        let mib = format!("{:.1} MiB", (own + theirs) as f64 / 1024.0);
        let who = if with_gpu { "with a GPU" } else { "without a GPU" };
        if with_gpu {
            report.row("memory (PSS), agent with GPU monitor", &mib, "at most 6");
        } else {
            report.row("memory (PSS), agent without a GPU", &mib, "at most 3.5");
        }
        let a_minute = a_minute.as_ref().map(|figures| figures[number]);
        if let Some(a_minute) = a_minute {
            report.row(
                &format!("wake-ups per minute, agent {who}"),
                &format!("{a_minute:.0}"),
                "less than 10",
            );
        }
        let raw = json!({
            "pss_kib": own,
            "pss_of_children_kib": theirs,
            "children": children.len(),
            "wake_ups_per_minute": a_minute,
        });
        report.keep(&format!("idle, {who}"), raw);
    }
}

/// Returns the voluntary context switches of all threads so far.
fn context_switches(pid: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
    let status =
        |thread: fs::DirEntry| fs::read_to_string(thread.path().join("status")).unwrap_or_default();
    threads.flatten().map(|thread| number_after(&status(thread), "voluntary_ctxt_switches:")).sum()
}

fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("a process");
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// Returns the proportional set size: shared pages are counted proportionally.
fn pss_kib(pid: u32) -> u64 {
    number_after(
        &fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("a process"),
        "Pss:",
    )
}

fn number_after(text: &str, name: &str) -> u64 {
    let rest = text
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap_or_else(|| panic!("no {name} in {text}"));
    rest.trim().trim_end_matches(" kB").parse().expect("a number")
}
