//! Requests to OneGate during one boot of a node.

use std::time::Duration;

use serde_json::json;
use supernode_tests::{OneGateSimulator, eventually};

use crate::launch::BenchVm;
use crate::report::Report;

const TIMEOUT: Duration = Duration::from_secs(60);
const NODE: u32 = 101;

pub(crate) fn measure(report: &mut Report) {
    report.part("boot of a node with discovery through OneGate, until FL_NODE_READY=YES");
    let onegate = OneGateSimulator::start();
    onegate.change(|state| {
        state.join(7, "superlink", 100).attribute("FL_ENDPOINT", "10.9.8.7:9092");
        state.join(7, "supernode", NODE);
    });
    let mut bench_vm = BenchVm::new(false);
    bench_vm.vm.context(&[]).onegate(&onegate, NODE);
    let agent = bench_vm.agent();
    let is_ready =
        || onegate.change(|state| state.vms[&NODE].user_template.get("FL_NODE_READY").cloned());
    assert!(eventually(TIMEOUT, || is_ready().as_deref() == Some("YES")), "not ready in time");
    drop(agent);
    let requests = onegate.requests();
    let reads = requests.iter().filter(|request| request.method == "GET").count();
    let updates = requests.len() - reads;
    report.row("requests to OneGate: reads + updates", &format!("{reads} + {updates}"), "");
    report.keep("requests to OneGate per boot", json!({"reads": reads, "updates": updates}));
}
