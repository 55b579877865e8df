//! What one boot of a node asks of OneGate.

use std::time::Duration;

use serde_json::json;
use supernode_tests::{OneGateSimulator, eventually};

use crate::launch::Ground;
use crate::report::Report;

const TIMEOUT: Duration = Duration::from_secs(60);
const NODE: u32 = 101;

pub(crate) fn measure(report: &mut Report) {
    report.part("a boot of a node that finds its SuperLink through OneGate, to FL_NODE_READY=YES");
    let onegate = OneGateSimulator::start();
    onegate.change(|state| {
        state.join(7, "superlink", 100).attribute("FL_ENDPOINT", "10.9.8.7:9092");
        state.join(7, "supernode", NODE);
    });
    let mut ground = Ground::new(false);
    ground.vm.context(&[]).onegate(&onegate, NODE);
    let agent = ground.agent();
    let is_ready =
        || onegate.change(|state| state.vms[&NODE].user_template.get("FL_NODE_READY").cloned());
    assert!(eventually(TIMEOUT, || is_ready().as_deref() == Some("YES")), "not ready in time");
    drop(agent);
    let requests = onegate.requests();
    let asked = requests.iter().filter(|request| request.method == "GET").count();
    let told = requests.len() - asked;
    report.row("requests to OneGate: asked, and told", &format!("{asked} + {told}"), "");
    report.keep("requests to OneGate in a boot", json!({"asked": asked, "told": told}));
}
