//! Time from the start of a program to the running container: the agent, the baseline (the same
//! calls without a program), and the shell script (`shell-launch.sh`).

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use supernode_tests::{
    Engine, RuntimeMode, Sysfs, TestVm, agent_binary, eventually, image, nvml_library,
};

use crate::docker::{Recorder, needed};
use crate::report::{Report, median, milliseconds, rounded, with_quartiles};

/// Name of the container.
const NAME: &str = "flower-supernode";
const UUID: &str = "GPU-aaaa1111-0000-0000-0000-000000000001";
/// Duration of NVML's initialisation: some tenths of a second without the persistence daemon.
const NVML_INIT_MS: u32 = 100;
const TIMEOUT: Duration = Duration::from_secs(60);

/// A VM with its own engine on which every contender launches the same container.
pub(crate) struct BenchVm {
    pub(crate) engine: Engine,
    pub(crate) vm: TestVm,
    /// Recording proxy through which the contenders reach the engine.
    recorder: Recorder,
}

/// A started agent; killed on drop.
pub(crate) struct Started {
    child: Child,
    /// Time from its start to `READY=1`.
    pub(crate) took: Duration,
}

impl Started {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl BenchVm {
    pub(crate) fn new(with_gpu: bool) -> Self {
        let machine = json!({
            "gpus": [
                {
                    "uuid": UUID, "name": "NVIDIA A100", "memory_mib": 40960,
                    "pci_address": "0000:01:00.0", "minor": 0,
                }
            ],
            "delay_ms": {"nvmlInit_v2": NVML_INIT_MS},
        });
        // The runtime is registered, as in a GPU image and on any node from its second boot on.
        let runtime = json!({"path": "nvidia-container-runtime", "runtimeArgs": []});
        let daemon_json = json!({"runtimes": {"nvidia": runtime}});
        let engine =
            Engine::builder().with_nvidia_runtime().daemon_json(format!("{daemon_json}\n")).start();
        let engine = engine.expect("a Docker engine");
        engine.import_image(&[image::PYTORCH]);
        engine.nvidia_runtime(RuntimeMode::Ok, &machine);
        let mut vm = TestVm::new();
        vm.engine(&engine);
        let mut variables = vec![("FL_SUPERLINK_ADDRESS", "10.9.8.7:9092")];
        if with_gpu {
            vm.nvml(&machine)
                .sysfs(&Sysfs::new().gpu("0000:01:00.0").driver("nvidia").module("550.54.15"));
            variables.extend([("FL_GPU_ENABLED", "YES"), ("PCI0_ADDRESS", "01:00.0")]);
            // Output and duration of nvidia-smi.
            let (csv, seconds) =
                (format!("0, {UUID}, NVIDIA A100, 40960"), f64::from(NVML_INIT_MS) / 1e3);
            let program =
                vm.write("bin/nvidia-smi", format!("#!/bin/sh\nsleep {seconds}\necho '{csv}'\n"));
            fs::set_permissions(program, std::os::unix::fs::PermissionsExt::from_mode(0o755))
                .unwrap();
        }
        vm.context(&variables);
        let recorder = Recorder::start(vm.path("recorder.sock"), &engine.socket());
        vm.set("docker.socket", recorder.socket().to_string_lossy().into_owned());
        Self { engine, vm, recorder }
    }

    /// Removes what was launched.
    pub(crate) fn clear(&self) {
        let there = self.engine.get(&format!("/containers/{NAME}/json")).is_ok();
        if there {
            self.engine.call("DELETE", &format!("/containers/{NAME}?force=1&v=1"), "").unwrap();
        }
        let state = self.vm.path("state");
        fs::remove_dir_all(&state).unwrap();
        fs::create_dir(&state).unwrap();
    }

    /// Returns a command with only the environment that systemd provides.
    fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        let path = format!(
            "{}:{}:/usr/sbin:/usr/bin:/sbin:/bin",
            self.vm.path("bin").display(),
            self.engine.bin_dir().display()
        );
        command.env_clear().env("PATH", path).env("NVML_SIMULATOR", self.vm.path("nvml.json"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Starts a command that becomes the agent and waits until it is ready.
    fn start(&self, mut command: Command) -> Started {
        let socket = self.vm.path("bench.sock");
        let _ = fs::remove_file(&socket);
        let systemd = UnixDatagram::bind(&socket).unwrap();
        systemd.set_read_timeout(Some(TIMEOUT)).unwrap();
        command
            .arg("run")
            .arg("--settings")
            .arg(self.vm.settings_file())
            .env("NOTIFY_SOCKET", &socket);
        let since = Instant::now();
        let child = command.spawn().unwrap();
        let mut started = Started { child, took: Duration::ZERO };
        let mut buffer = [0; 4096];
        while !String::from_utf8_lossy(&buffer).contains("READY=1") {
            buffer.fill(0);
            systemd.recv(&mut buffer).expect("the agent did not become ready in time");
        }
        started.took = since.elapsed();
        started
    }

    pub(crate) fn agent(&self) -> Started {
        self.start(self.command(agent_binary()))
    }

    fn shell(&self) -> Command {
        let mut command = self.command("bash");
        command
            .arg("tests/bench/shell-launch.sh")
            .arg(self.vm.path("context/context.sh.online"))
            .arg(self.recorder.socket())
            .arg(self.engine.daemon_json())
            .arg(self.vm.path("data"));
        command
    }

    fn shell_duration(&self) -> Duration {
        let since = Instant::now();
        let status = self.shell().status().unwrap();
        assert!(status.success(), "{status}");
        since.elapsed()
    }

    /// Returns the body of the agent's create call.
    fn create_body(&self) -> String {
        self.recorder.take();
        drop(self.agent());
        let created =
            self.recorder.take().into_iter().find(|call| call.is("POST", "/containers/create"));
        self.clear();
        created.expect("it was created").body()
    }

    /// Returns the duration of a launch minus the engine time of the calls that every launch needs.
    fn above_baseline(&self, took: Duration) -> Duration {
        took.saturating_sub(needed(&self.recorder.take()))
    }

    /// Launches the same container with raw API calls.
    fn baseline(&self, body: &str) -> Duration {
        let since = Instant::now();
        let created =
            self.engine.call("POST", &format!("/containers/create?name={NAME}"), body).unwrap();
        let created: Value = serde_json::from_str(&created).unwrap();
        let id = created["Id"].as_str().expect("an id");
        self.engine.call("POST", &format!("/containers/{id}/start"), "").unwrap();
        let found = self.engine.get(&format!("/containers/{id}/json")).unwrap();
        assert_eq!(found["State"]["Running"], true, "{found}");
        since.elapsed()
    }

    /// Measures the child process that queries NVML.
    fn probe_duration(&self) -> Duration {
        let mut command = self.command(agent_binary());
        command.args(["nvml-probe", "--"]).arg(nvml_library());
        let since = Instant::now();
        assert!(command.status().unwrap().success());
        since.elapsed()
    }

    /// Counts the programs that are started during `launch`, with strace.
    fn programs(&self, launch: impl FnOnce(Command)) -> usize {
        let trace = self.vm.path("trace");
        let mut command = self.command("strace");
        // -D: strace runs as a grandchild, so that the program remains a direct child.
        command.args(["-D", "-f", "-e", "trace=execve", "-o"]).arg(&trace);
        launch(command);
        let text = || fs::read_to_string(&trace).unwrap_or_default();
        let program = text().split(' ').next().unwrap_or_default().to_owned();
        let is_over =
            || text().lines().any(|line| line.starts_with(&program) && line.contains("+++"));
        assert!(eventually(TIMEOUT, is_over), "{}", text());
        let trace = text();
        trace.lines().filter(|line| line.contains("execve(") && line.ends_with("= 0")).count()
    }
}

/// Returns the strace command that runs `command`.
fn traced(mut strace: Command, command: &Command) -> Command {
    strace.arg(command.get_program()).args(command.get_args());
    strace
}

pub(crate) fn measure(report: &mut Report, launches: usize) {
    for with_gpu in [false, true] {
        let bench_vm = BenchVm::new(with_gpu);
        let words = if with_gpu { "with a simulated GPU" } else { "without a GPU" };
        report.part(&format!(
            "launch {words}: program start to running container, median of {launches}"
        ));
        let body = bench_vm.create_body();
        let (mut taken, mut probe) = ([Vec::new(), Vec::new(), Vec::new()], Vec::new());
        // The first round only warms the caches. The order of the contenders rotates.
        for round in 0..=launches {
            for turn in 0..taken.len() {
                bench_vm.clear();
                bench_vm.recorder.take();
                let contender = (round + turn) % taken.len();
                let took = match contender {
                    0 => bench_vm.baseline(&body),
                    1 => bench_vm.above_baseline(bench_vm.agent().took),
                    _ => bench_vm.above_baseline(bench_vm.shell_duration()),
                };
                if round > 0 {
                    taken[contender].push(milliseconds(took));
                }
            }
            if with_gpu && round > 0 {
                probe.push(milliseconds(bench_vm.probe_duration()));
            }
        }
        bench_vm.clear();
        let [baseline, agent, shell] = taken;
        report.row("baseline: raw create, start, inspect", &with_quartiles(&baseline), "");
        let nvml = if with_gpu { median(&probe) } else { 0.0 };
        if with_gpu {
            report.row("one NVML initialisation in a child process", &with_quartiles(&probe), "");
        }
        report.row(
            "agent, above the baseline",
            &with_quartiles(&agent),
            &format!("at most {:.1}", 8.0 + nvml),
        );
        report.row("shell script, above the baseline", &with_quartiles(&shell), "");
        // Both include one NVML initialisation.
        let times = format!("{:.1}", (median(&shell) - nvml) / (median(&agent) - nvml));
        let what =
            if with_gpu { "ratio of both, minus NVML initialisation" } else { "ratio of both" };
        report.row(what, &times, "at least 15");
        let key = |what: &str| format!("launch {words}, {what}, ms");
        for (what, figures) in
            [("baseline", &baseline), ("agent", &agent), ("shell", &shell), ("probe", &probe)]
        {
            report.keep(&key(what), rounded(figures));
        }
        let children = bench_vm.programs(|strace| {
            drop(bench_vm.start(traced(strace, &bench_vm.command(agent_binary()))))
        });
        bench_vm.clear();
        let shell_programs = bench_vm.programs(|strace| {
            assert!(traced(strace, &bench_vm.shell()).status().unwrap().success())
        });
        bench_vm.clear();
        // The program itself is not counted.
        let aim = if with_gpu { "1" } else { "0" };
        report.row("programs started by the agent until ready", &(children - 1).to_string(), aim);
        report.row("programs started by the shell script", &(shell_programs - 1).to_string(), "");
        report.keep(&key("programs"), json!({"agent": children - 1, "shell": shell_programs - 1}));
    }
}
