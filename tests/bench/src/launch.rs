//! From the start of a program to the container running: the agent, the floor below any program
//! (the same calls, raw), and the shell way (`shell-way.sh`).

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

/// The name of the container.
const NAME: &str = "flower-supernode";
const UUID: &str = "GPU-aaaa1111-0000-0000-0000-000000000001";
/// NVML takes its time to come up: some tenths of a second on a machine without the persistence
/// daemon.
const NVML_INIT_MS: u32 = 100;
const TIMEOUT: Duration = Duration::from_secs(60);

/// A machine with its own engine, on which each contender launches the same container.
pub(crate) struct Ground {
    pub(crate) engine: Engine,
    pub(crate) vm: TestVm,
    /// What the contenders reach the engine by.
    recorder: Recorder,
}

/// A started agent; killed with this value.
pub(crate) struct Started {
    child: Child,
    /// From its start to `READY=1`.
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

impl Ground {
    pub(crate) fn new(with_gpu: bool) -> Self {
        let machine = json!({
            "gpus": [
                {"uuid": UUID, "name": "NVIDIA A100", "memory_mib": 40960, "pci_address": "0000:01:00.0", "minor": 0}
            ],
            "delay_ms": {"nvmlInit_v2": NVML_INIT_MS},
        });
        // The runtime is registered: what an image has that was built for GPUs, and any node from
        // its second boot on.
        let daemon_json = json!({"runtimes": {"nvidia": {"path": "nvidia-container-runtime", "runtimeArgs": []}}});
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
            // What the shell asks.
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

    /// A machine on which nothing was launched yet.
    pub(crate) fn clear(&self) {
        let there = self.engine.get(&format!("/containers/{NAME}/json")).is_ok();
        if there {
            self.engine.call("DELETE", &format!("/containers/{NAME}?force=1&v=1"), "").unwrap();
        }
        let state = self.vm.path("state");
        fs::remove_dir_all(&state).unwrap();
        fs::create_dir(&state).unwrap();
    }

    /// A command with what systemd would give it, and nothing else.
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

    /// Starts a command that becomes the agent, and waits until it is ready.
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
            systemd.recv(&mut buffer).expect("the agent is ready in time");
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
            .arg("tests/bench/shell-way.sh")
            .arg(self.vm.path("context/context.sh.online"))
            .arg(self.recorder.socket())
            .arg(self.engine.daemon_json())
            .arg(self.vm.path("data"));
        command
    }

    fn shell_takes(&self) -> Duration {
        let since = Instant::now();
        let status = self.shell().status().unwrap();
        assert!(status.success(), "{status}");
        since.elapsed()
    }

    /// What the agent asks Docker to create.
    fn wanted(&self) -> String {
        self.recorder.take();
        drop(self.agent());
        let created =
            self.recorder.take().into_iter().find(|call| call.is("POST", "/containers/create"));
        self.clear();
        created.expect("it was created").body()
    }

    /// What a launch took beyond the calls that it cannot do without.
    fn beyond(&self, took: Duration) -> Duration {
        took.saturating_sub(needed(&self.recorder.take()))
    }

    /// The same container by raw calls.
    fn floor(&self, body: &str) -> Duration {
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

    /// How long the child process takes that asks NVML.
    fn probe_takes(&self) -> Duration {
        let mut command = self.command(agent_binary());
        command.args(["nvml-probe", "--"]).arg(nvml_library());
        let since = Instant::now();
        assert!(command.status().unwrap().success());
        since.elapsed()
    }

    /// The programs that were started, by the kernel's own account, until `launch` is over.
    fn programs(&self, launch: impl FnOnce(Command)) -> usize {
        let trace = self.vm.path("trace");
        let mut command = self.command("strace");
        // -D: the tracer is beside the program and not between us and it.
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

/// The command that `strace` is to run.
fn traced(mut strace: Command, command: &Command) -> Command {
    strace.arg(command.get_program()).args(command.get_args());
    strace
}

pub(crate) fn measure(report: &mut Report, launches: usize) {
    for with_gpu in [false, true] {
        let ground = Ground::new(with_gpu);
        let words = if with_gpu { "with a GPU (simulators)" } else { "without a GPU" };
        report.part(&format!(
            "a launch {words}: start of the program to the container running, median of {launches}"
        ));
        let body = ground.wanted();
        let (mut taken, mut probe) = ([Vec::new(), Vec::new(), Vec::new()], Vec::new());
        // The first round is for the caches. Each is the first, the second and the third in its
        // turn.
        for round in 0..=launches {
            for turn in 0..taken.len() {
                ground.clear();
                ground.recorder.take();
                let contender = (round + turn) % taken.len();
                let took = match contender {
                    0 => ground.floor(&body),
                    1 => ground.beyond(ground.agent().took),
                    _ => ground.beyond(ground.shell_takes()),
                };
                if round > 0 {
                    taken[contender].push(milliseconds(took));
                }
            }
            if with_gpu && round > 0 {
                probe.push(milliseconds(ground.probe_takes()));
            }
        }
        ground.clear();
        let [floor, agent, shell] = taken;
        report.row("the floor: create, start, inspect, raw", &with_quartiles(&floor), "");
        let nvml = if with_gpu { median(&probe) } else { 0.0 };
        if with_gpu {
            report.row(
                "one NVML initialisation, in a process of its own",
                &with_quartiles(&probe),
                "",
            );
        }
        report.row(
            "the agent, over the floor",
            &with_quartiles(&agent),
            &format!("at most {:.1}", 8.0 + nvml),
        );
        report.row("the shell way, over the floor", &with_quartiles(&shell), "");
        // Both wait for NVML.
        let times = format!("{:.1}", (median(&shell) - nvml) / (median(&agent) - nvml));
        let what = if with_gpu {
            "the same without NVML's, by the agent's"
        } else {
            "the shell way's overhead by the agent's"
        };
        report.row(what, &times, "at least 15");
        let key = |what: &str| format!("launch {words}, {what}, ms");
        for (what, figures) in
            [("floor", &floor), ("agent", &agent), ("shell", &shell), ("probe", &probe)]
        {
            report.keep(&key(what), rounded(figures));
        }
        let children = ground
            .programs(|strace| drop(ground.start(traced(strace, &ground.command(agent_binary())))));
        ground.clear();
        let shell_programs = ground.programs(|strace| {
            assert!(traced(strace, &ground.shell()).status().unwrap().success())
        });
        ground.clear();
        // The program itself is not its own child.
        let aim = if with_gpu { "1" } else { "0" };
        report.row(
            "programs that the agent starts until it is ready",
            &(children - 1).to_string(),
            aim,
        );
        report.row("programs that the shell way starts", &(shell_programs - 1).to_string(), "");
        report.keep(&key("programs"), json!({"agent": children - 1, "shell": shell_programs - 1}));
    }
}
