//! The marketplace appliance. appliance.sh runs in its own mounts, called by a simulator of the
//! one-apps framework, with simulators of the programs that it calls. Its other files are parsed as
//! their consumers parse them.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and print what they skip"
)]

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::TIMEOUT;
use supernode_tests::{Output, Sandbox, run};

/// Calls appliance.sh (`$2`, stage `$3`) as /etc/one-appliance/service does. Afterwards copies what
/// the appliance wrote to the directory `$1`. Writes nothing else on this machine.
const FRAME: &str = r#"
set -e
umask 0077
for directory in /opt /etc/apt /var/lib/apt; do mount -t tmpfs tmpfs "$directory"; done
mkdir -p /opt/one-appliance /etc/apt/sources.list.d
[ -e "$1/no-package" ] || echo deb >/opt/one-appliance/supernode-agent.deb
printf '%s\n' 'Types: deb' 'Components: main' >/etc/apt/sources.list.d/debian.sources
echo 'deb http://debian trixie main' >/etc/apt/sources.list
msg() {
    printf '%s: %s\n' "$1" "${*:2}"
    [ "$1" != error ]
}
default_service_help() {
    printf '%s\n' "${ONE_SERVICE_PARAMS[@]}"
}
ONE_SERVICE_REPORT=$1/config
PATH=$1/bin:$PATH
. "$2"
trap 'service_cleanup; cp -r /opt /etc/apt "$1"' EXIT
"service_$3" 2>&1
"#;

/// Records its arguments and answers as the program would.
const PROGRAM: &str = r#"#!/bin/bash
of=$(dirname "$(dirname "$0")")
call="${0##*/} $*"
echo "$call" >>"$of/calls"
case $call in
curl*) while [ "$1" != -o ]; do shift; done; echo key >"$2" ;;
'supernode-agent status --ready') [ -e "$of/ready" ] || { echo 'it does not run'; exit 1; } ;;
'supernode-agent status') echo 'Container  flower-supernode runs' ;;
'supernode-agent --version') echo 'supernode-agent 1.2.3' ;;
'systemctl is-active '*) echo active ;;
'systemctl is-failed '*) [ -e "$of/failed" ] ;;
'systemctl reload-or-restart '*) [ ! -e "$of/failed" ] ;;
sleep*) touch "$of/ready" ;;
esac
"#;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../packaging/marketplace/appliances/flower-supernode")
}

struct Appliance(Sandbox);

impl Appliance {
    fn new() -> Self {
        let appliance = Self(Sandbox::new("appliance"));
        let program = appliance.0.write("bin/program", PROGRAM);
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["apt-get", "curl", "docker", "sleep", "supernode-agent", "systemctl"] {
            symlink("program", appliance.0.join("bin").join(name)).unwrap();
        }
        appliance
    }

    /// Adds this file to its directory.
    fn with(self, file: &str) -> Self {
        self.0.write(file, "");
        self
    }

    /// Runs a stage; `None` if this machine permits no mounts.
    #[track_caller]
    fn run(&self, stage: &str, environment: &[(&str, &str)]) -> Option<Output> {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "bash", "-c", FRAME, "frame"])
            .arg(self.0.path())
            .arg(directory().join("appliance.sh"));
        let output = run(command.arg(stage).envs(environment.iter().copied()), TIMEOUT);
        if output.stderr.contains("unshare failed") || output.stderr.contains("permission denied") {
            println!("SKIPPED: cannot create a mount namespace: {}", output.stderr.trim());
            return None;
        }
        Some(output)
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.0.join(file)).unwrap_or_default()
    }

    fn calls(&self) -> Vec<String> {
        self.read("calls").lines().map(str::to_owned).collect()
    }
}

#[test]
fn build_installs_docker_package_and_image_without_starting() {
    let appliance = Appliance::new();
    let Some(output) = appliance.run("install", &[("FLOWER_VERSION", "1.30.0")]) else { return };
    output.expect_success();
    assert_eq!(
        appliance.calls(),
        [
            "apt-get update -q",
            "apt-get install -q -y docker.io ca-certificates curl",
            "systemctl mask --runtime flower-supernode.service",
            "apt-get install -q -y --no-install-recommends /opt/one-appliance/supernode-agent.deb",
            "docker pull flwr/supernode:1.30.0",
            "apt-get clean",
        ]
    );
    assert_eq!(appliance.read("opt/flower/PREBAKED_VERSION"), "1.30.0\n");
    assert_eq!(appliance.read("opt/flower/PREBAKED_FRAMEWORK"), "base\n");
    assert!(!appliance.0.join("opt/one-appliance/supernode-agent.deb").exists());
}

#[test]
fn nvidia_is_installed_on_request() {
    let appliance = Appliance::new();
    let Some(output) = appliance.run("install", &[("NVIDIA", "YES")]) else { return };
    output.expect_success();
    let nvidia = appliance.calls().into_iter().find(|call| call.contains("nvidia-driver")).unwrap();
    assert!(
        nvidia.contains(" nvidia-container-toolkit") && nvidia.contains(" linux-headers-amd64"),
        "{nvidia}"
    );
    let components = "main contrib non-free non-free-firmware\n";
    assert!(
        appliance
            .read("apt/sources.list.d/debian.sources")
            .ends_with(&format!("Components: {components}"))
    );
    assert!(appliance.read("apt/sources.list").ends_with(&format!(" trixie {components}")));
    // The same source as in the agent's fix, which the journal catalog contains.
    let list = appliance.read("apt/sources.list.d/nvidia-container-toolkit.list");
    let catalog =
        fs::read_to_string(directory().join("../../../../systemd/supernode-agent.catalog"))
            .unwrap()
            .replace('\n', " ");
    assert!(list.starts_with("deb ") && catalog.contains(list.trim()), "{list}");
    assert_eq!(appliance.read("apt/keyrings/nvidia-container-toolkit.asc"), "key\n");
}

#[test]
fn build_without_the_package_fails_first() {
    let appliance = Appliance::new().with("no-package");
    let Some(output) = appliance.run("install", &[]) else { return };
    assert_eq!(output.code, Some(1));
    assert!(
        output.stdout.contains("error: no package at /opt/one-appliance/supernode-agent.deb"),
        "{output:?}"
    );
    assert_eq!(appliance.calls(), Vec::<String>::new());
}

#[test]
fn bootstrap_waits_for_the_node_and_writes_the_report() {
    let appliance = Appliance::new();
    let Some(output) = appliance.run("configure", &[]) else { return };
    output.expect_success();
    assert_eq!(appliance.calls()[0], "systemctl reload-or-restart flower-supernode.service");
    fs::remove_file(appliance.0.join("config")).unwrap();
    appliance.run("bootstrap", &[]).unwrap().expect_success();
    let ready =
        appliance.calls().iter().filter(|call| *call == "supernode-agent status --ready").count();
    assert_eq!(ready, 2, "must be asked again after a delay");
    assert_eq!(
        appliance.read("config"),
        "[Flower SuperNode]\nunit = active\nagent = supernode-agent 1.2.3\n\
         Container  flower-supernode runs\n"
    );
    assert_eq!(
        fs::metadata(appliance.0.join("config")).unwrap().permissions().mode() & 0o777,
        0o600
    );
}

#[test]
fn bootstrap_fails_with_reason_when_node_does_not_start() {
    for (file, environment) in [("failed", vec![]), ("slow", vec![("READY_SECONDS", "0")])] {
        let appliance = Appliance::new().with(file);
        let Some(output) = appliance.run("configure", &[]) else { return };
        output.expect_success();
        let output = appliance.run("bootstrap", &environment).unwrap();
        assert_eq!(output.code, Some(1), "{output:?}");
        assert!(
            output.stdout.contains("error: the SuperNode does not run: it does not run"),
            "{output:?}"
        );
        assert!(appliance.read("config").starts_with("[Flower SuperNode]\n"));
    }
}

#[test]
fn help_lists_the_parameters() {
    let Some(output) = Appliance::new().run("help", &[]) else { return };
    let help = output.expect_success();
    assert!(
        help.contains("ONEAPP_FL_GPU_ENABLED\nconfigure\n") && help.contains("GPU's memory"),
        "{help}"
    );
}

#[test]
fn marketplace_files_are_well_formed() {
    const READ: &str = r##"
require "yaml"
directory = ARGV.fetch(0)
yaml = Dir["#{directory}/*.yaml"].to_h { |file| [File.basename(file), YAML.load_file(file)] }
tests = yaml.fetch("tests.yaml")
found = Dir.children("#{directory}/tests").sort
abort "tests.yaml does not list the files of tests/" unless tests.sort == found
tests.each do |test|
  valid = system("ruby", "-c", "#{directory}/tests/#{test}", out: File::NULL)
  abort "#{test}: invalid Ruby" unless valid
end
app = yaml.fetch("metadata.yaml").fetch(:app)
name = File.basename(File.realpath(directory))
abort "name differs from the directory" unless app.fetch(:name) == name
description = yaml.find { |name, _| name =~ /\A\h{8}(-\h{4}){3}-\h{12}\.yaml\z/ }.last
template = description.fetch("opennebula_template")
inputs = template.fetch("user_inputs")
abort "INPUTS_ORDER" unless template["inputs_order"].downcase.split(",") == inputs.keys
abort "five fields" unless inputs.values.all? { |input| input.split("|", -1).size == 5 }
abort "context" unless inputs.keys.all? { |name| template["context"][name] == "$#{name.upcase}" }
params = app[:context][:params].keys.map { |name| "oneapp_#{name}".downcase }
abort "test parameters" unless params.all? { |name| inputs.key?(name) }
abort "logo" unless File.exist?("#{directory}/../../logos/#{description["logo"]}")
"##;
    if Command::new("ruby").arg("--version").output().is_err() {
        println!("SKIPPED: Ruby is not installed (language of the marketplace's tests)");
        return;
    }
    run(Command::new("ruby").args(["-e", READ]).arg(directory()), TIMEOUT).expect_success();
}
