//! VMs that are really booted: their state after a boot, a reboot, a power loss and an upgrade.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

mod common;

use common::{GPU_A, gpu_context, nvidia_library, one_gpu, report, sysfs_of_one};
use serde_json::Value;
use supernode_tests::{Boot, BootedVm};

const UNIT: &str = "flower-supernode.service";
const FALLBACK: &str = "no usable GPU; this node runs on the CPU:";
const CONTAINER: &str = "docker inspect flower-supernode \
    --format 'runs {{.State.Running}} on {{.HostConfig.Runtime}}'\n";

/// Returns the journal entries of a boot that contain this text.
fn entries<'b>(boot: &'b Boot, text: &str) -> Vec<&'b Value> {
    boot.journal
        .iter()
        .filter(|entry| entry["MESSAGE"].as_str().is_some_and(|message| message.contains(text)))
        .collect()
}

/// Asserts that the output contains these texts.
#[track_caller]
fn assert_output(boot: &Boot, texts: &[&str]) {
    for text in texts {
        assert!(boot.output.contains(text), "{text}: {}", boot.transcript());
    }
}

#[test]
fn boot_without_gpu_logs_one_warning_and_runs_on_cpu() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[
        ("REPORT_READY", "YES"),
        ("READY_SCRIPT_PATH", "/opt/flower/scripts/health-check.sh"),
    ]));
    let boot = vm.boot(&format!(
        "systemctl is-active flower-supernode docker
         systemctl status flower-supernode
         {CONTAINER}
         journalctl -u flower-supernode -p warning -x
         supernode-agent plan
         supernode-agent check vm || true
         journalctl --no-pager --output cat MESSAGE_ID=1066eaea8fabf0f00ff7b11691329178
         wait_for sh -c 'journalctl --no-pager --all CONTAINER_NAME=flower-supernode | grep \
         \"SuperNode ID: 1\"'
         cat /run/onegate-updated
         wait_for sh -c 'supernode-agent status | grep \"10.9.8.7:9092, connected\"'
         supernode-agent status
         journalctl CONTAINER_NAME=flower-supernode
         docker logs flower-supernode
         systemctl list-units --failed --plain --no-legend"
    ));
    let warnings = boot.warnings_of(UNIT);
    assert_eq!(warnings.len(), 1, "{}", boot.transcript());
    for (field, value) in [
        ("PRIORITY", "4"),
        ("FL_GPU_REASON", "gpu-not-passed-through"),
        ("PCI_ADDRESS", "0000:01:00.0"),
        ("MESSAGE_ID", "1066eaea8fabf0f00ff7b11691329178"),
    ] {
        assert_eq!(warnings[0][field], value, "{}", boot.transcript());
    }
    assert_output(
        &boot,
        &[
            "Status: \"Running on the CPU: gpu-not-passed-through: OpenNebula assigned \
             0000:01:00.0",
            "runs true on runc",
            "Subject: GPU problem: gpu-not-passed-through",
            "Found on this machine: OpenNebula assigned 0000:01:00.0",
            "READY=YES",
            "Device     cpu: gpu-not-passed-through",
        ],
    );
    assert!(
        boot.output.trim_end().ends_with("--no-legend"),
        "a unit has failed: {}",
        boot.transcript()
    );
    assert!(entries(&boot, "ordering cycle").is_empty(), "{}", boot.transcript());
}

#[test]
fn installed_units_are_valid_sandboxed_and_documented() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&[("FL_SUPERLINK_ADDRESS", "h:1")]);
    // `security` prints tenths; `verify` exits with 0 whatever it finds.
    let boot = vm.boot(
        "test -z \"$(systemd-analyze verify --man=yes flower-supernode.service \
         flower-supernode-runtime.service default.target 2>&1)\"
         systemd-analyze security --no-pager --threshold=28 flower-supernode.service | tail -n 1
         man --where supernode-agent agent.toml flower-supernode.service
         bash -n /usr/share/bash-completion/completions/supernode-agent",
    );
    assert_output(&boot, &["Overall exposure level for flower-supernode.service: 2."]);
    assert_eq!(boot.warnings_of(UNIT), Vec::<&Value>::new(), "{}", boot.transcript());
}

#[test]
fn boot_with_gpu_does_not_restart_or_reload_docker() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[])).gpu(&sysfs_of_one(), &one_gpu());
    let boot = vm.boot(&format!(
        "{CONTAINER} systemctl status flower-supernode\n cat /etc/docker/daemon.json"
    ));
    assert_eq!(boot.warnings_of(UNIT), Vec::<&Value>::new(), "{}", boot.transcript());
    assert_output(
        &boot,
        &[
            "runs true on nvidia",
            &format!("Status: \"Running on NVIDIA A100 ({GPU_A}, 0000:01:00.0)"),
        ],
    );
    assert_eq!(entries(&boot, "Starting docker.service").len(), 1);
    assert!(entries(&boot, "Reloading docker.service").is_empty(), "{}", boot.transcript());
    assert!(
        boot.messages_of(UNIT).iter().all(|line| !line.contains("daemon.json")),
        "{}",
        boot.transcript()
    );
}

#[test]
fn daemon_reload_removes_gpu_injected_only_by_hook() {
    let lost = "lost its GPU; recreating it";
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[])).gpu(&sysfs_of_one(), &one_gpu());
    // The unit detects the loss from inside its sandbox, from systemd's unit properties.
    vm.file("simulator/runtime.json", r#"{"mode": "hook", "nvml": "/simulator/nvml.json"}"#);
    let boot = vm.boot(&format!(
        "systemctl daemon-reload
         wait_for sh -c 'journalctl --no-pager --unit flower-supernode | grep \"{lost}\"'
         wait_for sh -c 'test \"$(journalctl --no-pager --unit flower-supernode | grep -c \
         \"started container\")\" = 2'
         {CONTAINER} systemctl status flower-supernode"
    ));
    let warnings = boot.warnings_of(UNIT);
    assert_eq!(warnings.len(), 1, "{}", boot.transcript());
    assert_eq!(warnings[0]["GPU_UUID"], GPU_A, "{}", boot.transcript());
    assert!(
        warnings[0]["MESSAGE"].as_str().is_some_and(|message| message.contains("daemon-reload")),
        "{}",
        boot.transcript()
    );
    assert_output(&boot, &["runs true on nvidia", "Status: \"Running on NVIDIA A100"]);
}

#[test]
fn missing_required_gpu_fails_the_unit_without_ready() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[
        ("FL_GPU_REQUIRED", "YES"),
        ("REPORT_READY", "YES"),
        ("READY_SCRIPT_PATH", "/opt/flower/scripts/health-check.sh"),
    ]));
    let boot = vm.boot(
        "systemctl show --property ActiveState,NRestarts flower-supernode
         systemctl status flower-supernode || true
         test ! -e /run/onegate-updated
         ! docker inspect flower-supernode",
    );
    assert_output(
        &boot,
        &["ActiveState=failed", "NRestarts=0", "FL_GPU_REQUIRED is YES and no GPU is usable"],
    );
    assert_eq!(
        entries(&boot, "this node does not start: gpu-not-passed-through").len(),
        1,
        "{}",
        boot.transcript()
    );
}

#[test]
fn invalid_context_logs_each_error_once_without_restart() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&[
        ("FL_SUPERLINK_ADDRESS", "nowhere"),
        ("FL_GPU_ENABLED", "maybe"),
        ("FL_LOG_LEVEL", "loud"),
    ]);
    let boot = vm.boot(
        "systemctl show --property ActiveState,NRestarts,StatusText flower-supernode
         systemctl is-active docker",
    );
    assert_output(
        &boot,
        &["ActiveState=failed", "NRestarts=0", "StatusText=Invalid configuration: "],
    );
    for error in
        ["FL_SUPERLINK_ADDRESS='nowhere': ", "FL_GPU_ENABLED='maybe': ", "FL_LOG_LEVEL='loud': "]
    {
        let found = entries(&boot, error);
        assert!(found.len() == 1 && found[0]["PRIORITY"] == "3", "{error}: {}", boot.transcript());
    }
}

#[test]
fn hostile_context_values_are_passed_verbatim_not_executed() {
    let Some(vm) = BootedVm::new() else { return };
    let hostile = "a='x\"; touch /pwned; \"' b=\"$(touch /pwned)`touch /pwned`\"";
    vm.context(&gpu_context(&[
        ("FL_NODE_CONFIG", hostile),
        ("ETH0_DNS", "x\"; touch /pwned; \""),
        ("MOTD", "x\"\nexport FL_GPU_ENABLED=\"NO\"\nexport TOKENTXT=\"$(touch /pwned)\nx"),
    ]));
    vm.file("context/token.txt", "token-5e1f");
    let boot = vm.boot(
        "grep -q '; touch /pwned;' /run/one-context/one_env
         test ! -e /pwned
         docker inspect --format '{{json .Args}}' flower-supernode
         ! journalctl --no-pager --boot | grep token-5e1f",
    );
    let args = boot.output.lines().find(|line| line.starts_with('[')).unwrap_or_default();
    let args: Vec<String> =
        serde_json::from_str(args).unwrap_or_else(|error| panic!("{error}: {}", boot.transcript()));
    assert!(args.iter().any(|argument| argument == hostile), "{args:?}");
    assert_eq!(entries(&boot, FALLBACK).len(), 1, "{}", boot.transcript());
}

#[test]
fn broken_daemon_json_is_logged_and_left_unchanged() {
    let Some(vm) = BootedVm::new() else { return };
    let broken = "{\"debug\": true,\n";
    vm.context(&gpu_context(&[])).file("etc/docker/daemon.json", broken);
    vm.settings("[docker]\nready_timeout_seconds = 2\n");
    let boot = vm.boot(
        "wait_for systemctl is-failed docker\n journalctl -u docker\n \
         cat /etc/docker/daemon.json\n ls -A /etc/docker",
    );
    assert_eq!(std::fs::read_to_string(vm.path("etc/docker/daemon.json")).unwrap(), broken);
    assert!(!entries(&boot, "docker.sock does not answer").is_empty(), "{}", boot.transcript());
    // As many attempts as without the agent: systemd's start limit of docker.service.
    assert!(entries(&boot, "Starting docker.service").len() <= 5, "{}", boot.transcript());
}

#[test]
fn node_starts_after_reboot_with_one_warning() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[]));
    for boot in ["first", "second"] {
        let boot_of =
            vm.boot(&format!("{CONTAINER} docker ps --all --format '{{{{.Names}}}}' | wc -l"));
        assert_output(&boot_of, &["runs true on runc"]);
        assert_eq!(
            boot_of.output.trim_end().lines().last(),
            Some("1"),
            "{boot}: {}",
            boot_of.transcript()
        );
        assert_eq!(boot_of.warnings_of(UNIT).len(), 1, "{boot}: {}", boot_of.transcript());
    }
}

#[test]
fn vm_boots_after_power_loss_during_first_boot() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[])).gpu(&sysfs_of_one(), &one_gpu());
    let daemon_json = vm.path("etc/docker/daemon.json");
    vm.cut_power_when(|| daemon_json.exists());
    let containers = vm.path("../docker/containers");
    vm.cut_power_when(|| {
        std::fs::read_dir(&containers).is_ok_and(|mut found| found.next().is_some())
    });
    let boot = vm.boot(&format!("{CONTAINER} docker ps --all --format '{{{{.Names}}}}' | wc -l"));
    assert_output(&boot, &["runs true on nvidia"]);
    assert_eq!(boot.output.trim_end().lines().last(), Some("1"), "{}", boot.transcript());
    let written = std::fs::read(&daemon_json).unwrap();
    serde_json::from_slice::<Value>(&written).expect("daemon.json is whole");
}

#[test]
fn context_update_replaces_container_only_on_change() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[("ETH0_DNS", "1.1.1.1")]));
    let boot = vm.boot(
        "id() { docker inspect --format '{{.Id}}' flower-supernode; }
         logged() { journalctl --no-pager --unit flower-supernode --grep \"$1\"; }
         change() {
             sed -i \"$1\" /context/context.sh
             rm /run/one-context/context.sh.*
             for stage in local online network; do one-contextd $stage; done
             systemctl reload flower-supernode
         }
         first=$(id)
         change 's/1.1.1.1/9.9.9.9/'
         wait_for logged 'the configuration is unchanged'
         test \"$(id)\" = \"$first\"
         change 's/10.9.8.7:9092/10.9.8.7:9999/'
         wait_for sh -c 'docker inspect flower-supernode | grep 10.9.8.7:9999'
         test \"$(id)\" != \"$first\"
         wait_for /opt/flower/scripts/health-check.sh
         systemctl is-active flower-supernode",
    );
    assert_eq!(entries(&boot, "started container").len(), 2, "{}", boot.transcript());
}

#[test]
fn systemctl_reload_returns_after_the_reload() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[]));
    let boot = vm.boot(
        "change() {
             sed -i \"$1\" /run/one-context/context.sh.*
             systemctl reload flower-supernode
             wait_for sh -c 'test \"$(systemctl show --property ActiveState,SubState --value \
             flower-supernode | xargs)\" = \"active running\"'
         }
         facts() { docker inspect --format '{{.Id}} {{.State.StartedAt}}' flower-supernode; }
         first=$(facts)
         change 's/10.9.8.7:9092/nowhere/'
         journalctl --no-pager --unit flower-supernode --grep 'the node keeps the previous one'
         test \"$(facts)\" = \"$first\"
         change 's/nowhere/10.9.8.7:9092/'
         test \"$(facts)\" = \"$first\"
         change 's/10.9.8.7:9092/10.9.8.7:9999/'
         docker inspect flower-supernode | grep 10.9.8.7:9999
         systemctl show --property NRestarts flower-supernode",
    );
    assert_output(&boot, &["NRestarts=0"]);
    assert_eq!(entries(&boot, "started container").len(), 2, "{}", boot.transcript());
}

#[test]
fn watchdog_restarts_frozen_agent_which_adopts_container() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[])).settings("[gpu]\nwait_seconds = 1\n").file(
        "etc/systemd/system/flower-supernode.service.d/watchdog.conf",
        "[Service]\nWatchdogSec=10\nRestartSec=1\n",
    );
    let boot = vm.boot(
        "facts() { docker inspect --format '{{.Id}} {{.State.Pid}} {{.State.StartedAt}}' \
         flower-supernode; }
         agent() { systemctl show --property MainPID --value flower-supernode; }
         container=$(facts) old=$(agent)
         # With notifications, it keeps running.
         sleep 25
         test \"$(agent)\" = \"$old\"
         kill -STOP \"$old\"
         adopted() { journalctl --no-pager --unit flower-supernode --grep 'adopted the running \
         container'; }
         wait_for adopted
         wait_for systemctl is-active flower-supernode
         test \"$(agent)\" != \"$old\"
         test \"$(facts)\" = \"$container\"
         systemctl show --property NRestarts flower-supernode",
    );
    assert_output(&boot, &["NRestarts=1"]);
    assert_eq!(entries(&boot, "Watchdog timeout").len(), 1, "{}", boot.transcript());
    assert_eq!(entries(&boot, "started container").len(), 1, "{}", boot.transcript());
}

#[test]
fn upgrade_keeps_container_and_purge_removes_everything() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[])).settings("[gpu]\nwait_seconds = 1\n");
    let boot = vm.boot(
        "pid() { docker inspect --format '{{.State.Pid}}' flower-supernode; }
         agent() { systemctl show --property MainPID --value flower-supernode; }
         dpkg-deb --raw-extract /harness/package.deb /tmp/next
         sed -i 's/^Version: .*/Version: 99.0.0-1/' /tmp/next/DEBIAN/control
         dpkg-deb --build /tmp/next /tmp/next.deb
         container=$(pid) old=$(agent)
         dpkg --install /tmp/next.deb
         adopted() { journalctl --no-pager --unit flower-supernode --grep 'adopted the running \
         container'; }
         wait_for adopted
         wait_for systemctl is-active flower-supernode
         test \"$(agent)\" != \"$old\"
         test \"$(pid)\" = \"$container\"
         systemctl --quiet is-enabled flower-supernode flower-supernode-runtime
         dpkg --remove supernode-agent
         ! systemctl --quiet is-active flower-supernode
         ! kill -0 \"$container\"
         ! docker inspect flower-supernode
         dpkg --purge supernode-agent
         rm -rf /tmp/next /tmp/next.deb
         find / -xdev \\( -name '*supernode*' -o -path '/opt/flower*' \\) -not -path '/harness/*' \
         -not -path '/proc/*' \
             -not -path '/usr/share/doc/*' -not -path '/var/log/*' -printf 'left %p\\n'",
    );
    let left: Vec<&str> = boot.output.lines().filter(|line| line.starts_with("left ")).collect();
    assert_eq!(left, Vec::<&str>::new(), "{}", boot.transcript());
}

#[test]
fn drop_in_orders_start_script_before_the_node() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[("START_SCRIPT", "cut -d' ' -f1 /proc/uptime >/run/start-script")]));
    let drop_in = include_str!("../../systemd/start-script-first.conf");
    vm.boot("test -e /run/start-script");
    vm.file("etc/systemd/system/flower-supernode.service.d/start-script-first.conf", drop_in);
    vm.boot("systemctl disable flower-supernode\n systemctl enable flower-supernode");
    let boot = vm.boot(&format!(
        "wait_for systemctl is-active flower-supernode
         systemctl restart flower-supernode
         {CONTAINER}"
    ));
    assert_output(&boot, &["runs true on runc"]);
    let position = |text: &str| {
        boot.journal.iter().position(|entry| {
            entry["MESSAGE"].as_str().is_some_and(|message| message.starts_with(text))
        })
    };
    let (script, node) =
        (position("Finished one-context.service"), position("Starting flower-supernode.service"));
    assert!(script.is_some() && script < node, "{script:?}, {node:?}: {}", boot.transcript());
}

/// Microseconds from power-on until the entry arrived in the journal.
fn microseconds(entry: &Value) -> u64 {
    entry["__MONOTONIC_TIMESTAMP"].as_str().and_then(|text| text.parse().ok()).expect("a time")
}

/// Writes the boot timeline of packaging/docs/boot.md from the journal.
fn record_timeline(boot: &Boot) {
    // systemd's sd-messages.h: SD_MESSAGE_UNIT_STARTING, SD_MESSAGE_UNIT_STARTED.
    const STARTING: &str = "7d4958e842da4a758f6c1cdc7b36dcc5";
    const STARTED: &str = "39f53479d3a045ac8e11786248231fbf";
    const MARK: &str = "<!-- recorded: UPDATE_BOOT_TIMELINE=1";
    let seconds_of = |what: &str, matches: &dyn Fn(&Value) -> bool| {
        let entry = boot.journal.iter().find(|entry| matches(entry)).expect(what);
        microseconds(entry) as f64 / 1e6
    };
    let unit = |unit: &'static str| {
        let at = |id: &str| {
            seconds_of(unit, &|entry| entry["UNIT"] == unit && entry["MESSAGE_ID"] == id)
        };
        (at(STARTED), format!("| {unit} | {:.2} | {:.2} |\n", at(STARTING), at(STARTED)))
    };
    let event = |what: &str, text: &str| {
        let at = seconds_of(text, &|entry| {
            entry["_SYSTEMD_UNIT"] == UNIT
                && entry["MESSAGE"].as_str().is_some_and(|message| message.contains(text))
        });
        (at, format!("| {what} | | {at:.2} |\n"))
    };
    let mut rows = vec![
        unit("one-context-local.service"),
        unit("flower-supernode-runtime.service"),
        unit("one-context-online.service"),
        unit("docker.service"),
        // Loads the image, in place of a pull.
        unit("harness-image.service"),
        unit(UNIT),
        unit("one-context.service"),
        event("WARNING of the CPU fallback", FALLBACK),
        event("container started", "started container"),
    ];
    rows.sort_by(|a, b| a.0.total_cmp(&b.0));
    let rows: String = rows.into_iter().map(|(_, row)| row).collect();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/docs/boot.md");
    let page = std::fs::read_to_string(file).expect(file);
    let (before, rest) = page.split_once(MARK).expect(MARK);
    let (mark, rest) = rest.split_once('\n').expect("a line after the mark");
    let (_, after) = rest.split_once("<!-- end -->").expect("an end mark");
    let page = format!(
        "{before}{MARK}{mark}\n| event | starts | done |\n| --- | --- | --- |\n\
         {rows}<!-- end -->{after}"
    );
    std::fs::write(file, page).expect(file);
}

#[test]
fn emulated_vm_boots_and_agent_takes_one_percent_of_it() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[
        ("ETH0_IP", "10.0.2.15"),
        ("ETH0_GATEWAY", "10.0.2.2"),
        ("FL_LOG_LEVEL", "DEBUG"),
        ("REPORT_READY", "YES"),
        ("READY_SCRIPT_PATH", "/opt/flower/scripts/health-check.sh"),
    ]));
    let boot = vm.boot_in_qemu(&format!("{CONTAINER} ip route\n cat /run/onegate-updated"));
    assert_output(&boot, &["runs true on runc", "default via 10.0.2.2", "READY=YES"]);
    assert_eq!(boot.warnings_of(UNIT).len(), 1, "{}", boot.transcript());
    assert!(entries(&boot, "ordering cycle").is_empty(), "{}", boot.transcript());
    if std::env::var_os("UPDATE_BOOT_TIMELINE").is_some() {
        record_timeline(&boot);
    }
    let of_agent = |entry: &&&Value| {
        entry["SYSLOG_IDENTIFIER"] == "supernode-agent" && entry["_SYSTEMD_UNIT"] == UNIT
    };
    let all: Vec<&Value> = boot.journal.iter().collect();
    let first = microseconds(all.iter().find(of_agent).expect("the agent's first entry"));
    let started =
        microseconds(entries(&boot, "started container").first().expect("the container's start"));
    let docker: u64 = entries(&boot, "Docker took ")
        .iter()
        .filter(|entry| microseconds(entry) <= started)
        .filter_map(|entry| entry["MESSAGE"].as_str()?.split(' ').nth(2)?.parse::<u64>().ok())
        .sum();
    let own = (started - first).saturating_sub(docker);
    let share = own as f64 * 100.0 / started as f64;
    report(&format!(
        "MEASURED power-on to running container: {:.1} s; from the agent's first log line: \
         {:.3} s, of which Docker calls {:.3} s and the agent {:.3} s ({share:.2} % of the boot)",
        started as f64 / 1e6,
        (started - first) as f64 / 1e6,
        docker as f64 / 1e6,
        own as f64 / 1e6,
    ));
    assert!(share < 1.0, "{}", boot.transcript());
}

/// What must be logged in a step of the VM below, and what must not. A step is named after the
/// capability that is removed.
type Step = (&'static str, &'static [&'static str], &'static [&'static str]);

const WITHOUT: [Step; 10] = [
    (
        "NONE",
        &[
            "started container",
            "runs true on nvidia",
            "daemon.json 1000:1000 600",
            "/srv/theirs/data",
        ],
        &["no usable GPU"],
    ),
    (
        "CHOWN",
        &[
            "no usable GPU; this node runs on the CPU: runtime-not-configured",
            "cannot write /etc/docker/daemon.json: Operation not permitted",
            "runs true on runc",
            "daemon.json 1000:1000 600",
        ],
        &[],
    ),
    (
        "DAC_OVERRIDE",
        &[
            "no usable GPU; this node runs on the CPU: runtime-not-configured",
            "cannot read /etc/docker/daemon.json: Permission denied",
            "cannot write /srv/theirs/data: Permission denied",
        ],
        &["started container"],
    ),
    // The unit that runs before Docker logs nothing.
    ("NONE-EARLY", &["exit code 0", "daemon.json 1000:1000 600"], &[]),
    ("CHOWN-EARLY", &["exit code 1", "daemon.json 1000:1000 600"], &[]),
    ("DAC_OVERRIDE-EARLY", &["exit code 1"], &[]),
    // NVIDIA's runtime does not inject the GPU.
    (
        "NONE-LEFT-OUT",
        &["no usable GPU; this node runs on the CPU: gpu-not-visible", "runs true on runc"],
        &["cannot see"],
    ),
    (
        "SYS_PTRACE",
        &[
            "cannot check whether the container has its GPU: /proc/",
            "/root/dev: Permission denied",
            "runs true on nvidia",
        ],
        &["no usable GPU"],
    ),
    // NVIDIA's own library without device nodes. There is no driver here in either case.
    ("MKNOD", &["driver-not-loaded"], &["/dev/nvidiactl"]),
    ("NONE-NVIDIAS", &["driver-not-loaded", "/dev/nvidiactl"], &[]),
];

#[test]
fn every_unit_capability_is_needed_and_its_loss_is_logged() {
    let Some(vm) = BootedVm::new() else { return };
    vm.context(&gpu_context(&[])).gpu(&sysfs_of_one(), &one_gpu()).settings(
        "[gpu]\nsysfs = \"/simulator/sys\"\n\
         nvml_library = \"/simulator/libnvidia-ml.so.1\"\nwait_seconds = 1\n\
         probe_timeout_seconds = 20\n[container]\ndata_dir = \"/srv/theirs/data\"\n",
    );
    let original_library = nvidia_library();
    if let Some(library) = &original_library {
        vm.copy(&library.canonicalize().unwrap(), "simulator/nvidias.so");
    }
    let boot = vm.boot(
        r#"without() {
             for unit in flower-supernode flower-supernode-runtime; do
                 mkdir -p /run/systemd/system/$unit.service.d
                 echo "[Service]" >/run/systemd/system/$unit.service.d/without.conf
                 [ "$1" = NONE ] || echo "CapabilityBoundingSet=~CAP_$1" \
                     >>/run/systemd/system/$unit.service.d/without.conf
             done
             systemctl daemon-reload
         }
         # An operator's daemon.json without the runtime, and a data directory of another user.
         begin() {
             without "${1%%-*}"
             systemctl stop flower-supernode
             docker rm -f flower-supernode || true
             echo '{"runtimes": {}}' >/etc/docker/daemon.json
             chmod 0600 /etc/docker/daemon.json
             chown 1000:1000 /etc/docker/daemon.json
             systemctl reload docker
             wait_for sh -c '! docker info --format "{{.Runtimes}}" | grep nvidia'
             rm -rf /srv/theirs
             install -d -o 1000 -g 1000 /srv/theirs
             journalctl --sync
             cursor=$(journalctl --quiet --lines 1 --show-cursor | sed -n 's/^-- cursor: //p')
         }
         end() {
             journalctl --sync
             {
                 set +ex
                 journalctl --no-pager --output cat --unit flower-supernode --after-cursor "$cursor"
                 docker inspect flower-supernode \
                     --format 'runs {{.State.Running}} on {{.HostConfig.Runtime}}'
                 stat --format '%n %u:%g %a' /etc/docker/daemon.json
                 find /srv/theirs/data /dev/nvidia* -maxdepth 0
             } 2>&1 | sed "s/^/$1: /"
         }
         step() {
             begin "$1"
             # On a loaded machine systemd may report that the unit's cgroup has disappeared
             # (result "resources"), which is not a failure of the agent.
             systemctl restart flower-supernode ||
                 [ "$(systemctl show --property Result --value flower-supernode)" != resources ] ||
                 systemctl restart flower-supernode || true
             end "$1"
         }
         early() {
             begin "$1"
             systemctl start flower-supernode-runtime
             echo "$1: exit code $(systemctl show flower-supernode-runtime \
                 --property ExecMainStatus --value)"
             end "$1"
         }
         step NONE
         step CHOWN
         step DAC_OVERRIDE
         early NONE-EARLY
         early CHOWN-EARLY
         early DAC_OVERRIDE-EARLY
         sed -i 's/"ok"/"no-device"/' /simulator/runtime.json
         step NONE-LEFT-OUT
         step SYS_PTRACE
         sed -i 's/no-device/ok/' /simulator/runtime.json
         if [ -e /simulator/nvidias.so ]; then
             sed -i 's/libnvidia-ml.so.1/nvidias.so/' /etc/supernode-agent/agent.toml
             step MKNOD
             step NONE-NVIDIAS
         fi"#,
    );
    for (step, wanted, unwanted) in WITHOUT {
        if original_library.is_none() && ["MKNOD", "NONE-NVIDIAS"].contains(&step) {
            continue;
        }
        let prefix = format!("{step}: ");
        let lines: Vec<&str> =
            boot.output.lines().filter_map(|line| line.strip_prefix(&prefix)).collect();
        let has = |words: &str| lines.iter().any(|line| line.contains(words));
        for words in wanted {
            assert!(has(words), "{step} must log {words:?}: {lines:#?}\n{}", boot.transcript());
        }
        for words in unwanted {
            assert!(!has(words), "{step} must not log {words:?}: {lines:#?}");
        }
    }
}
