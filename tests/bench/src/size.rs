//! Size of the binary, the package and the dependency tree.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use supernode_tests::agent_binary;

use crate::report::Report;

pub(crate) fn measure(report: &mut Report, package: Option<&Path>) {
    report.part("size");
    let bytes = |path: &Path| {
        fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).len()
    };
    let mib = |bytes: u64| format!("{:.2} MiB", bytes as f64 / (1 << 20) as f64);
    report.row("binary", &mib(bytes(&agent_binary())), "at most 3");
    report.keep("binary, bytes", bytes(&agent_binary()));
    if let Some(package) = package {
        report.row("package", &mib(bytes(package)), "at most 1.2");
        report.keep("package, bytes", bytes(package));
    }
    let names = |depth: &[&str]| {
        let mut cargo = Command::new("cargo");
        cargo
            .args([
                "tree",
                "--locked",
                "-p",
                "supernode-agent",
                "--edges",
                "normal",
                "--prefix",
                "none",
            ])
            .args(depth);
        let output = cargo.output().expect("cargo tree");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        // "name v1.2.3" and cargo's annotations; each release of a crate counts once.
        text.lines().map(|line| line.split(' ').take(2).collect()).collect::<BTreeSet<String>>()
    };
    // The agent is not its own dependency.
    let (all, direct) = (names(&[]).len() - 1, names(&["--depth", "1"]).len() - 1);
    report.row("crates in the dependency tree", &all.to_string(), "less than 140");
    report.row("direct dependencies of the agent", &direct.to_string(), "");
    report.keep("crates", json!({"all": all, "direct": direct}));
}
