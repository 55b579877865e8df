//! The node under fault injection, its invariants, and the table of faults.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use supernode_tests::{
    Agent, DockerProxy, Engine, OneGateSimulator, RuntimeMode, TestVm, agent_binary, eventually,
    image,
};

use crate::common::{TIMEOUT, gpu_context, one_gpu, report, sysfs_of_one};

/// An operator's daemon.json.
const OPERATOR_CONFIG: &str = "{\n  \"log-level\": \"info\",\n  \"max-concurrent-downloads\": \
 7,\n  \"labels\": [\"rack=12\"]\n}\n";
/// Its end once the runtime is registered; every other byte is unchanged.
const RUNTIME_ENTRY: &str = ",\n  \"runtimes\": {\n    \"nvidia\": {\n      \"path\": \
 \"nvidia-container-runtime\"\n    }\n  }\n}\n";

/// A secret that, like OneGate's token, must not appear in any output.
const PASSWORD: &str = "kxq7-zulu-9134";
pub(crate) const VM: u32 = 101;
/// Maximum time after a container's exit in which the node may still be published as ready.
const MAX_PUBLISH_DELAY_SECONDS: f64 = 1.0;

/// Peak memory of any agent of this process, in KiB.
static PEAK_KIB: AtomicU64 = AtomicU64::new(0);

/// A VM that wants its GPU, behind an engine with fault injection, and all output of its agents.
pub(crate) struct FaultyNode {
    pub(crate) engine: Engine,
    pub(crate) proxy: DockerProxy,
    pub(crate) vm: TestVm,
    pub(crate) onegate: OneGateSimulator,
    agent: Option<Agent>,
    /// Output of earlier agents since the last [`FaultyNode::reset`].
    earlier_output: Vec<String>,
    /// Time of the last reset, in seconds since the Unix epoch.
    since: f64,
    /// The operator's daemon.json.
    daemon_json: String,
}

impl FaultyNode {
    pub(crate) fn new() -> Option<Self> {
        Self::with(OPERATOR_CONFIG)
    }

    /// Uses a Docker with live-restore, which keeps containers running across its restart.
    pub(crate) fn with_live_restore() -> Option<Self> {
        Self::with(&OPERATOR_CONFIG.replace("\n}\n", ",\n  \"live-restore\": true\n}\n"))
    }

    fn with(daemon_json: &str) -> Option<Self> {
        let engine = Engine::builder().daemon_json(daemon_json).with_nvidia_runtime().start()?;
        engine.import_image(&[image::PYTORCH]);
        engine.nvidia_runtime(RuntimeMode::Ok, &one_gpu());
        let proxy = DockerProxy::start(&engine.socket());
        let onegate = OneGateSimulator::start();
        onegate.change(|state| {
            state.vm(VM);
        });
        let mut vm = TestVm::new();
        vm.engine(&engine).nvml(&one_gpu()).sysfs(&sysfs_of_one()).onegate(&onegate, VM);
        vm.set("docker.socket", proxy.socket().to_string_lossy().into_owned());
        let mut node = Self {
            engine,
            proxy,
            vm,
            onegate,
            agent: None,
            earlier_output: Vec::new(),
            since: seconds_now(),
            daemon_json: daemon_json.to_owned(),
        };
        node.context("");
        Some(node)
    }

    /// Sets its context, with this node configuration for the test image.
    pub(crate) fn context(&mut self, node_config: &str) {
        let config = format!("db-password=\"{PASSWORD}\" {node_config}");
        self.vm.context(&gpu_context(&[
            ("FL_NODE_CONFIG", config.trim()),
            ("FL_LOG_LEVEL", "DEBUG"),
            ("REPORT_READY", "YES"),
        ]));
    }

    /// Resets the VM to one on which no agent has run, with a Docker that has no runtime
    /// registered. A killed engine loses its event history, so earlier output is discarded too.
    pub(crate) fn reset(&mut self) {
        self.agent = None;
        self.proxy.clear_faults();
        self.engine.docker(&["rm", "-f", "flower-supernode"]);
        self.engine.kill();
        fs::write(self.engine.daemon_json(), &self.daemon_json).unwrap();
        self.engine.restart();
        self.forget();
    }

    /// Resets the VM but keeps the engine: the runtime stays registered.
    pub(crate) fn clear(&mut self) {
        self.agent = None;
        self.proxy.clear_faults();
        self.engine.docker(&["rm", "-f", "flower-supernode"]);
        self.forget();
    }

    fn forget(&mut self) {
        self.earlier_output.clear();
        self.since = seconds_now();
    }

    pub(crate) fn agent(&mut self) -> &mut Agent {
        self.agent.as_mut().expect("an agent was started")
    }

    /// Starts an agent; kills one that runs.
    pub(crate) fn start(&mut self) {
        self.end();
        let agent = self.vm.start();
        record_peak_memory(agent.pid());
        self.agent = Some(agent);
    }

    /// Collects the agent's output, and kills it if it runs.
    fn end(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill();
            assert_ready_was_true(&agent);
            self.earlier_output.extend(messages_of(&agent));
        }
    }

    /// Starts an agent and waits until the node is ready.
    #[track_caller]
    pub(crate) fn start_until_ready(&mut self) {
        self.start();
        self.agent().wait_for_notify("READY=1", TIMEOUT);
        assert_eq!(self.running().as_deref(), Some("true"), "READY, and {:#?}", self.output());
    }

    /// Starts an agent and waits until the node is ready or the agent has exited with a retryable
    /// error. Returns whether it is ready.
    #[track_caller]
    pub(crate) fn start_once(&mut self) -> bool {
        self.start();
        let mut end = None;
        let agent = self.agent();
        let settled = eventually(3 * TIMEOUT, || {
            end = agent.ended();
            end.is_some() || agent.notifications().iter().any(|message| message.contains("READY=1"))
        });
        assert!(settled, "neither ready nor exited: {:#?}", self.output());
        match end {
            None => {
                assert_eq!(
                    self.running().as_deref(),
                    Some("true"),
                    "READY, and {:#?}",
                    self.output()
                )
            }
            Some(code) => assert_eq!(code, 1, "{:#?}", self.output()),
        }
        end.is_none()
    }

    /// Starts an agent, and once more if it exits, as systemd does.
    #[track_caller]
    pub(crate) fn start_with_one_restart(&mut self) {
        if !self.start_once() {
            self.proxy.clear_faults();
            self.start_until_ready();
        }
    }

    /// Sends SIGTERM and waits until the agent has exited and the container is stopped.
    #[track_caller]
    pub(crate) fn terminate(&mut self) {
        let code = self.agent().terminate();
        assert_eq!(code, 0, "{:#?}", self.output());
        assert!(
            self.agent().notifications().iter().any(|message| message.contains("STOPPING=1")),
            "{:#?}",
            self.output()
        );
        assert_ne!(self.running().as_deref(), Some("true"), "{:#?}", self.output());
    }

    /// Waits until this agent logs that Flower is connected, the last step of a start.
    #[track_caller]
    pub(crate) fn wait_connected(&mut self) {
        self.agent().wait_for_line("as SuperNode 1", TIMEOUT);
    }

    /// Returns `.State.Running` of the container with that name; `None` without a container or an
    /// engine.
    pub(crate) fn running(&self) -> Option<String> {
        let shown =
            self.engine.docker(&["inspect", "--format", "{{.State.Running}}", "flower-supernode"]);
        (shown.code == Some(0)).then(|| shown.stdout.trim().to_owned())
    }

    /// Identifies the container's run: its ID and start time.
    pub(crate) fn run(&self) -> String {
        let format = "{{.Id}} {{.State.StartedAt}} {{.State.Running}}";
        self.engine
            .docker(&["inspect", "--format", format, "flower-supernode"])
            .stdout
            .trim()
            .to_owned()
    }

    /// Waits until a run other than this one is in progress.
    #[track_caller]
    pub(crate) fn wait_new_run(&self, before: &str) {
        let again = eventually(TIMEOUT, || {
            let now = self.run();
            now.ends_with(" true") && now != before
        });
        assert!(again, "{}: {:#?}", self.run(), self.output());
    }

    /// Waits until a run other than this one is in progress, in a container that the agent created.
    #[track_caller]
    pub(crate) fn wait_new_own_run(&self, before: &str) {
        let format = "{{index .Config.Labels \"supernode-agent.spec-hash\"}}";
        let ours = || {
            !self
                .engine
                .docker(&["inspect", "--format", format, "flower-supernode"])
                .stdout
                .trim()
                .is_empty()
        };
        assert!(eventually(TIMEOUT, ours), "{:#?}", self.output());
        self.wait_new_run(before);
    }

    /// Waits until the agent reports that the node runs on its GPU.
    #[track_caller]
    pub(crate) fn wait_status_running(&self) {
        let status = || self.vm.run_command("status", &["--json"]).stdout;
        let reported = eventually(TIMEOUT / 2, || status().contains("\"status\": \"Running on "));
        assert!(reported, "{}: {:#?}", status(), self.output());
    }

    /// Waits until OneGate has this attribute of the node.
    #[track_caller]
    pub(crate) fn wait_published(&self, name: &str, value: &str) {
        let there = || self.published().get(name).is_some_and(|found| found == value);
        assert!(eventually(TIMEOUT, there), "{:?}: {:#?}", self.published(), self.output());
    }

    /// Returns all output of agents since the last reset: log, standard output, notifications to
    /// systemd.
    pub(crate) fn output(&self) -> Vec<String> {
        let now = self.agent.iter().flat_map(messages_of);
        self.earlier_output.iter().cloned().chain(now).collect()
    }

    /// Asserts the invariants that hold after any fault; [`FaultyNode::assert_no_secret`] checks
    /// the remaining one.
    #[track_caller]
    pub(crate) fn assert_invariants(&self) {
        let daemon_json = fs::read_to_string(self.engine.daemon_json()).unwrap();
        let with_runtime = self.daemon_json.replace("\n}\n", RUNTIME_ENTRY);
        assert!([&self.daemon_json, &with_runtime].contains(&&daemon_json), "{daemon_json}");
        if let Some(agent) = &self.agent {
            assert_ready_was_true(agent);
        }
        let ours =
            self.engine.docker(&["ps", "-aq", "--filter", "label=supernode-agent.spec-hash"]);
        let ours = ours.expect_success().lines().count();
        assert!(ours <= 1, "{ours} containers: {:#?}", self.output());
        let runs = self.runs();
        self.assert_one_at_a_time(&runs);
        self.assert_warned_before(&runs);
        self.assert_published_readiness(&runs);
    }

    /// Returns the number of runs of its container in the engine's event history since the last
    /// reset.
    pub(crate) fn run_count(&self) -> usize {
        self.runs().len()
    }

    /// Runs of the agent's containers in the engine's event history.
    fn runs(&self) -> Vec<Run> {
        let format = "{{.TimeNano}} {{.Action}} {{.Actor.ID}} {{index .Actor.Attributes \
         \"supernode-agent.verdict\"}}";
        let events = self.engine.docker(&[
            "events",
            "--since",
            "0",
            "--until",
            &format!("{:.3}", seconds_now()),
            "--filter",
            "type=container",
            "--filter",
            "event=start",
            "--filter",
            "event=die",
            "--format",
            format,
        ]);
        let mut runs: Vec<Run> = Vec::new();
        for line in events.expect_success().lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [time, action, id, verdict] = words[..] else { panic!("{line}") };
            let time = time.parse::<u64>().unwrap() as f64 / 1e9;
            match action {
                "start" if verdict != "<no" && !verdict.is_empty() => {
                    runs.push(Run {
                        id: id.into(),
                        on_cpu: verdict == "cpu",
                        from: time,
                        to: f64::INFINITY,
                    });
                }
                "die" => {
                    let last = runs.iter_mut().rev().find(|run| run.id == id);
                    last.into_iter().for_each(|run| run.to = time);
                }
                _ => {}
            }
        }
        runs.retain(|run| run.from >= self.since);
        runs
    }

    fn assert_one_at_a_time(&self, runs: &[Run]) {
        for (at, run) in runs.iter().enumerate() {
            let other = runs[..at].iter().find(|other| other.to > run.from);
            assert!(other.is_none(), "two containers ran at once: {runs:#?}, {:#?}", self.output());
        }
    }

    fn assert_warned_before(&self, runs: &[Run]) {
        let output = self.output();
        let warnings = output
            .iter()
            .filter(|line| line.contains(" WARNING ") && line.contains("runs on the CPU"));
        let first = warnings.filter_map(|line| seconds_of(line)).fold(f64::INFINITY, f64::min);
        for run in runs.iter().filter(|run| run.on_cpu) {
            assert!(first < run.from, "no WARNING before {run:?}: {output:#?}");
        }
    }

    fn assert_published_readiness(&self, runs: &[Run]) {
        let first = runs.first().map_or(f64::INFINITY, |run| run.from);
        for request in self.onegate.requests() {
            let at = seconds_now() - request.at.elapsed().as_secs_f64();
            let update = request.update().unwrap_or_default();
            // Nothing is known about the time before the first run in the event history.
            if at < self.since.max(first) || !update.contains("READY=YES") {
                continue;
            }
            let ran =
                runs.iter().any(|run| run.from <= at && at <= run.to + MAX_PUBLISH_DELAY_SECONDS);
            assert!(ran, "{update:?} at {at}: {runs:#?}, {:#?}", self.output());
        }
    }

    fn assert_no_secret(&self) {
        let token = self.onegate.change(|state| state.vms[&VM].token.clone());
        let mut all = self.output();
        all.push(fs::read_to_string(self.vm.path("state/status.json")).unwrap_or_default());
        for command in ["status", "plan"] {
            for arguments in [&[][..], &["--json"]] {
                let output = self.vm.run_command(command, arguments);
                all.extend([output.stdout, output.stderr]);
            }
        }
        for text in all {
            assert!(!text.contains(PASSWORD) && !text.contains(&token), "a secret is in {text}");
        }
    }

    /// Attributes of the node in OneGate.
    pub(crate) fn published(&self) -> BTreeMap<String, String> {
        self.onegate.change(|state| state.vms[&VM].user_template.clone())
    }
}

/// A run of a container, in seconds since the Unix epoch.
#[derive(Debug)]
struct Run {
    id: String,
    on_cpu: bool,
    from: f64,
    to: f64,
}

fn messages_of(agent: &Agent) -> Vec<String> {
    [agent.lines(), agent.stdout_lines(), agent.notifications()].concat()
}

/// Asserts that an agent that sent READY=1 to systemd has a container.
#[track_caller]
fn assert_ready_was_true(agent: &Agent) {
    if agent.notifications().iter().any(|message| message.contains("READY=1")) {
        let lines = agent.lines();
        let has_line = |text: &str| lines.iter().any(|line| line.contains(text));
        assert!(
            has_line("started container") || has_line("adopted the running container"),
            "{lines:#?}"
        );
    }
}

fn seconds_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

/// Returns the timestamp of a log line, in seconds since the Unix epoch.
fn seconds_of(line: &str) -> Option<f64> {
    let (date, time) = line.split(' ').next()?.strip_suffix('Z')?.split_once('T')?;
    let date: Vec<i64> = date.split('-').map_while(|part| part.parse().ok()).collect();
    let time: Vec<f64> = time.split(':').map_while(|part| part.parse().ok()).collect();
    let (&[year, month, day], &[hours, minutes, seconds]) = (date.as_slice(), time.as_slice())
    else {
        return None;
    };
    // Howard Hinnant's days_from_civil, for years after 1970.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days =
        365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    Some(days as f64 * 86_400.0 + hours * 3600.0 + minutes * 60.0 + seconds)
}

/// Records the peak memory of this process while it runs.
fn record_peak_memory(pid: u32) {
    thread::spawn(move || {
        while let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) {
            let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            // A zombie has no memory.
            let Some(kib) = peak.and_then(|peak| peak.trim().trim_end_matches(" kB").parse().ok())
            else {
                return;
            };
            PEAK_KIB.fetch_max(kib, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(50));
        }
    });
}

/// The table that `make test` prints: one line per fault.
#[derive(Debug, Default)]
pub(crate) struct Table {
    failed: Vec<String>,
}

impl Table {
    /// Runs one fault: its name, what must hold, and the scenario. The scenario returns when the
    /// node has recovered and gives the time of the fault.
    pub(crate) fn fault(
        &mut self,
        node: &mut FaultyNode,
        name: &str,
        expected: &str,
        scenario: impl FnOnce(&mut FaultyNode) -> Instant,
    ) {
        match run_scenario(node, scenario) {
            Ok(seconds) => report(&format!(
                "FAULT {name:<64} passed  recovered in {seconds:>5.1} s  {expected}"
            )),
            Err(why) => {
                report(&format!("FAULT {name:<64} FAILED  {expected}\n{why}"));
                self.failed.push(name.to_owned());
            }
        }
    }

    /// Ends the table; fails if any fault failed.
    #[track_caller]
    pub(crate) fn finish(self) {
        let build = agent_binary();
        let build = build
            .parent()
            .and_then(|directory| directory.file_name())
            .unwrap_or_default()
            .to_string_lossy();
        let peak = PEAK_KIB.load(Ordering::Relaxed) as f64 / 1024.0;
        report(&format!(
            "MEASURED peak memory of the agent during the faults so far: {peak:.1} MiB ({build} \
             build)"
        ));
        assert!(self.failed.is_empty(), "{:#?}", self.failed);
    }
}

/// Runs the scenario and asserts the invariants. Returns the seconds from the fault to the
/// recovery.
fn run_scenario(
    node: &mut FaultyNode,
    scenario: impl FnOnce(&mut FaultyNode) -> Instant,
) -> Result<f64, String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let seconds = scenario(node).elapsed().as_secs_f64();
        node.assert_invariants();
        node.assert_no_secret();
        seconds
    }));
    outcome.map_err(|why| why.downcast_ref::<String>().cloned().unwrap_or_default())
}
