//! A Docker engine for one test: its own dockerd in its own network namespace, with its own
//! directories and socket.
//!
//! The namespace is entered with `nsenter`. `ip netns exec` would mount another /sys in which
//! dockerd finds no cgroups.

use std::{
    env,
    ffi::OsString,
    fs,
    io::{Read, Write},
    os::unix::{fs::symlink, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    image,
    network::{add_namespace, in_namespace, remove_namespace},
    process::{Output, eventually, run, running, signal, skip_or_fail, start_tied, tied, wait},
    sandbox::{Sandbox, runtime_binary, unique_name, write},
};

const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
const START_TIMEOUT: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Runs dockerd in its own mount namespace, where writes to /etc go to the engine's directory,
/// `$0`. Docker 20.10 keeps a key in /etc/docker regardless of its configuration.
const OWN_ETC: &str = r#"
mount -t overlay etc -o lowerdir=/etc,upperdir="$0/etc",workdir="$0/etc-work" /etc
exec dockerd "$@""#;

/// Options of an engine; created by [`Engine::builder`].
#[derive(Debug)]
pub struct EngineBuilder {
    daemon_json: String,
    env: Vec<(String, OsString)>,
    path_first: Vec<PathBuf>,
    runtime: bool,
}

impl EngineBuilder {
    /// Sets the initial text of daemon.json; the default is `{}`.
    #[must_use]
    pub fn daemon_json(mut self, text: impl Into<String>) -> Self {
        self.daemon_json = text.into();
        self
    }

    /// Sets an environment variable of dockerd.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Prepends a directory to dockerd's PATH.
    #[must_use]
    pub fn path_first(mut self, directory: impl Into<PathBuf>) -> Self {
        self.path_first.push(directory.into());
        self
    }

    /// Installs nvidia-container-runtime in mode [`RuntimeMode::Ok`] and without a GPU. Docker uses
    /// it only if daemon.json registers it.
    #[must_use]
    pub fn with_nvidia_runtime(mut self) -> Self {
        self.runtime = true;
        self
    }

    /// Starts the engine. Prints `SKIPPED` with the reason and returns `None` if this machine
    /// cannot run an engine.
    ///
    /// # Panics
    /// If the engine cannot start and `SUPERNODE_TESTS_REQUIRE_DOCKER=1` is set.
    #[must_use]
    #[track_caller]
    pub fn start(self) -> Option<Engine> {
        match self.try_start() {
            Ok(engine) => Some(engine),
            Err(reason) => {
                skip_or_fail("Docker engine", &reason);
                None
            }
        }
    }

    /// Starts the engine; for tests that expect a failure.
    ///
    /// # Errors
    /// A missing requirement of this machine, or the end of dockerd's log.
    pub fn try_start(self) -> Result<Engine, String> {
        check_requirements()?;
        let sandbox = Sandbox::in_memory("docker");
        for directory in ["bin", "nvidia"] {
            fs::create_dir_all(sandbox.join(directory))
                .map_err(|error| format!("{directory}: {error}"))?;
        }
        let mut first = vec![sandbox.join("bin")];
        first.extend(self.path_first);
        let mut engine = Engine {
            sandbox,
            namespace: unique_name("net"),
            env: self.env,
            path: path(&first),
            dockerd: None,
        };
        add_namespace(&engine.namespace)?;
        write(&engine.daemon_json(), self.daemon_json);
        if self.runtime {
            engine.install_nvidia_runtime();
            engine.nvidia_runtime(RuntimeMode::Ok, &json!({}));
        }
        engine.launch()?;
        Ok(engine)
    }
}

/// What nvidia-container-runtime does with a container that requests a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuntimeMode {
    /// Injects the GPUs.
    Ok,
    /// Refuses the container, as the original does without a driver.
    Fail,
    /// Refuses the container with this nvidia-container-cli message.
    FailWith(String),
    /// Starts the container without a GPU.
    NoDevice,
}

/// One container that nvidia-container-runtime was asked to create.
#[derive(Debug, Clone, Deserialize)]
pub struct Record {
    /// Milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Container ID.
    pub id: String,
    /// Environment of the container's process.
    pub env: Map<String, Value>,
    /// UUIDs of the injected devices.
    pub gpus: Vec<String>,
    /// Reason for the refusal, if the container was refused.
    pub refused: Option<String>,
}

/// A running Docker engine. Dropping it stops the engine and its containers.
#[derive(Debug)]
pub struct Engine {
    sandbox: Sandbox,
    namespace: String,
    env: Vec<(String, OsString)>,
    path: OsString,
    dockerd: Option<Child>,
}

impl Engine {
    /// Returns a builder for an engine with other options.
    #[must_use]
    pub fn builder() -> EngineBuilder {
        EngineBuilder {
            daemon_json: "{}\n".to_owned(),
            env: Vec::new(),
            path_first: Vec::new(),
            runtime: false,
        }
    }

    /// Starts an engine with an empty daemon.json and nvidia-container-runtime in its PATH. Returns
    /// `None` and prints the reason if the test must be skipped.
    #[must_use]
    #[track_caller]
    pub fn start() -> Option<Self> {
        Self::builder().with_nvidia_runtime().start()
    }

    /// Returns the path of the API's Unix socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.sandbox.join("docker.sock")
    }

    /// Returns the path of daemon.json.
    #[must_use]
    pub fn daemon_json(&self) -> PathBuf {
        self.sandbox.join("daemon.json")
    }

    /// Returns the first directory of the engine's PATH.
    #[must_use]
    pub fn bin_dir(&self) -> PathBuf {
        self.sandbox.join("bin")
    }

    /// Returns the name of the engine's network namespace, for `nsenter --net=/run/netns/NAME` and
    /// veth pairs.
    #[must_use]
    pub fn network_namespace(&self) -> &str {
        &self.namespace
    }

    /// dockerd's log so far.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(self.sandbox.join("dockerd.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Returns the PID of dockerd.
    ///
    /// # Panics
    /// If dockerd is not running.
    #[must_use]
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.dockerd.as_ref().expect("dockerd is not running").id()
    }

    /// Returns the value for `docker.reload_command`: sends the SIGHUP that `systemctl reload
    /// docker` sends. Remains valid across restarts.
    #[must_use]
    pub fn reload_command(&self) -> Vec<String> {
        let script = format!("kill -HUP \"$(cat '{}')\"", self.pid_file().display());
        ["sh", "-c", &script].map(str::to_owned).to_vec()
    }

    /// Runs the docker CLI against this engine.
    ///
    /// # Panics
    /// If the command takes more than a minute.
    #[track_caller]
    pub fn docker(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("docker");
        command
            .args(arguments)
            .env("PATH", &self.path)
            .env("DOCKER_HOST", format!("unix://{}", self.socket().display()))
            .env("DOCKER_CONFIG", self.sandbox.join("docker-config"))
            .env_remove("DOCKER_CONTEXT");
        run(&mut command, COMMAND_TIMEOUT)
    }

    /// Sends a GET request (`/info`, `/containers/NAME/json`) directly to the API socket.
    ///
    /// # Errors
    /// If the engine is unreachable or the response is not a success.
    pub fn get(&self, path: &str) -> Result<Value, String> {
        let body = get(&self.socket(), path)?;
        serde_json::from_str(&body).map_err(|error| format!("{path}: {error}: {body}"))
    }

    /// Sends a request with a body directly to the API socket; any 2xx status is a success.
    ///
    /// # Errors
    /// As [`Engine::get`].
    pub fn call(&self, method: &str, path: &str, body: &str) -> Result<String, String> {
        exchange(&self.socket(), method, path, body, |status| status.starts_with('2'))
    }

    /// Loads images written by `docker save`.
    #[track_caller]
    pub fn load_image(&self, tar: &Path) {
        self.docker(&["load", "--input", &tar.to_string_lossy()]).expect_success();
    }

    /// Imports the image of [`crate::image`] under each of these references.
    #[track_caller]
    pub fn import_image(&self, references: &[&str]) {
        self.import_image_with(references, &[]);
    }

    /// Imports the image with additional Dockerfile instructions (`ENV CUDA_VERSION=12.1`).
    #[track_caller]
    pub fn import_image_with(&self, references: &[&str], instructions: &[&str]) {
        let Some((first, more)) = references.split_first() else {
            return;
        };
        let tar = image::test_image();
        let tar = tar.to_string_lossy();
        let mut arguments = vec!["import"];
        for instruction in image::INSTRUCTIONS.iter().chain(instructions) {
            arguments.extend(["--change", instruction]);
        }
        arguments.extend([&*tar, first]);
        self.docker(&arguments).expect_success();
        for reference in more {
            self.docker(&["tag", first, reference]).expect_success();
        }
    }

    /// Installs nvidia-container-runtime into [`Engine::bin_dir`], as the package
    /// nvidia-container-toolkit would.
    pub fn install_nvidia_runtime(&self) {
        let link = self.runtime_path();
        let _ = fs::remove_file(&link);
        symlink(runtime_binary(), &link).expect("a link to the runtime");
    }

    /// Returns the path at which [`Engine::install_nvidia_runtime`] installs the runtime.
    #[must_use]
    pub fn runtime_path(&self) -> PathBuf {
        self.bin_dir().join("nvidia-container-runtime")
    }

    /// Sets the behaviour of nvidia-container-runtime from now on. `machine` is a script of the
    /// NVML simulator, from which the runtime takes the GPUs.
    pub fn nvidia_runtime(&self, mode: RuntimeMode, machine: &Value) {
        let nvml = self.sandbox.write("nvidia/nvml.json", machine.to_string());
        let (mode, message) = match mode {
            RuntimeMode::Ok => ("ok", None),
            RuntimeMode::Fail => ("fail", None),
            RuntimeMode::FailWith(message) => ("fail", Some(message)),
            RuntimeMode::NoDevice => ("no-device", None),
        };
        let control = json!({"mode": mode, "nvml": nvml, "message": message});
        write(&self.control_file(), control.to_string());
    }

    /// Containers that nvidia-container-runtime was asked to create, in order.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        let text = fs::read_to_string(self.sandbox.join("nvidia/record.jsonl")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).expect("a line of the record")).collect()
    }

    /// Kills dockerd, as a crash would. The kernel then kills its containerd; shims, containers and
    /// the socket file remain.
    pub fn kill(&mut self) {
        self.end(Signal::KILL);
        let pid_file = self.sandbox.join("exec/containerd/containerd.pid");
        let pid = fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse().ok());
        if pid.is_some_and(|pid| eventually(STOP_TIMEOUT, || !running(pid))) {
            // Without an init that reaps orphans, dockerd would take the zombie for a running
            // containerd.
            let _ = fs::remove_file(pid_file);
        }
    }

    /// Stops dockerd with SIGTERM, as systemd does; this stops the containers.
    pub fn stop(&mut self) {
        self.end(Signal::TERM);
    }

    /// Restarts dockerd.
    ///
    /// # Panics
    /// If dockerd does not start. The message contains its log.
    #[track_caller]
    pub fn restart(&mut self) {
        self.stop();
        if let Err(reason) = self.launch() {
            panic!("dockerd did not restart: {reason}");
        }
    }

    fn pid_file(&self) -> PathBuf {
        self.sandbox.join("dockerd.pid")
    }

    fn control_file(&self) -> PathBuf {
        self.sandbox.join("nvidia/control.json")
    }

    fn launch(&mut self) -> Result<(), String> {
        for directory in ["etc", "etc-work"] {
            fs::create_dir_all(self.sandbox.join(directory))
                .map_err(|error| format!("{directory}: {error}"))?;
        }
        let log =
            fs::OpenOptions::new().append(true).create(true).open(self.sandbox.join("dockerd.log"));
        let log = log.map_err(|error| format!("dockerd.log: {error}"))?;
        let errors = log.try_clone().map_err(|error| format!("dockerd.log: {error}"))?;
        let mut command = tied(&in_namespace(&self.namespace, "unshare"));
        command
            .args(["--mount", "sh", "-ec", OWN_ETC])
            .arg(self.sandbox.path())
            .arg("--config-file")
            .arg(self.daemon_json())
            .arg("--data-root")
            .arg(self.sandbox.join("data"))
            .arg("--exec-root")
            .arg(self.sandbox.join("exec"))
            .arg("--pidfile")
            .arg(self.pid_file())
            .arg("--host")
            .arg(format!("unix://{}", self.socket().display()))
            .args(["--containerd-namespace", &self.namespace])
            .args(["--containerd-plugins-namespace", &format!("{}-plugins", self.namespace)])
            .env("PATH", &self.path)
            .env("NVIDIA_RUNTIME_SIMULATOR", self.control_file())
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        let mut dockerd = start_tied(command).map_err(|error| format!("setpriv: {error}"))?;
        let mut status = None;
        let answers = eventually(START_TIMEOUT, || {
            status = dockerd.try_wait().ok().flatten();
            status.is_some() || get(&self.socket(), "/_ping").is_ok()
        });
        self.dockerd = Some(dockerd);
        if answers && status.is_none() {
            return Ok(());
        }
        let log = self.log();
        let last: Vec<&str> = log.lines().rev().take(5).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        let ended = status.map_or_else(|| "no answer".to_owned(), |status| status.to_string());
        Err(format!("dockerd does not work here: {ended}: {}", last.join(" | ")))
    }

    fn end(&mut self, with: Signal) {
        let Some(mut dockerd) = self.dockerd.take() else {
            return;
        };
        signal(dockerd.id(), with);
        if wait(&mut dockerd, STOP_TIMEOUT).is_none() {
            let _ = dockerd.kill();
            let _ = dockerd.wait();
        }
    }

    /// Kills what dockerd left behind: containerd, shims and container processes. Each has this
    /// engine's directory in its command line or the ID of one of its containers in its cgroup.
    fn kill_leftovers(&self) {
        let containers = names(&self.sandbox.join("data/containers"));
        let directory = self.sandbox.path().to_string_lossy().into_owned();
        let ours = |pid: &u32| {
            let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let cgroup = String::from_utf8_lossy(&read("cgroup")).into_owned();
            *pid != std::process::id()
                && (String::from_utf8_lossy(&read("cmdline")).contains(&format!("{directory}/"))
                    || containers.iter().any(|id| cgroup.contains(id)))
        };
        // Repeats until none is left: a shim whose container ended may be about to start runc.
        eventually(STOP_TIMEOUT, || {
            let all = names(Path::new("/proc"));
            let left: Vec<u32> =
                all.iter().filter_map(|name| name.parse().ok()).filter(ours).collect();
            for pid in &left {
                signal(*pid, Signal::KILL);
            }
            left.iter().all(|pid| !running(*pid))
        });
        let root = Path::new("/sys/fs/cgroup");
        // cgroup v1 has one hierarchy per controller, cgroup v2 a single one.
        let hierarchies = names(root).into_iter().chain([".".to_owned()]);
        for hierarchy in hierarchies {
            for id in &containers {
                let _ = fs::remove_dir(root.join(&hierarchy).join("docker").join(id));
            }
        }
    }

    fn unmount_leftovers(&self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4).map(Path::new));
        let ours: Vec<&Path> = points
            .filter(|point| point.starts_with(self.sandbox.path()) && *point != self.sandbox.path())
            .collect();
        for point in ours.iter().rev() {
            run(Command::new("umount").arg("--lazy").arg(point), COMMAND_TIMEOUT);
        }
    }
}

impl Drop for Engine {
    /// Kills everything instead of stopping it in order, which would take another second: all that
    /// dockerd created is removed anyway.
    fn drop(&mut self) {
        self.kill();
        self.kill_leftovers();
        self.unmount_leftovers();
        remove_namespace(&self.namespace);
    }
}

/// Checks that this machine can run an engine.
fn check_requirements() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("starting a Docker engine needs root".to_owned());
    }
    let path = path(&[]);
    for program in ["dockerd", "docker", "containerd", "runc", "ip", "nsenter", "setpriv", "umount"]
    {
        if !env::split_paths(&path).any(|directory| directory.join(program).is_file()) {
            return Err(format!("{program} is not installed"));
        }
    }
    Ok(())
}

/// Returns this process's PATH with `first` before it and the system directories after it.
pub(crate) fn path(first: &[PathBuf]) -> OsString {
    let own = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    let directories = first.iter().cloned().chain(env::split_paths(&own)).chain(system);
    env::join_paths(directories).expect("no colon in a directory's name")
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn get(socket: &Path, path: &str) -> Result<String, String> {
    exchange(socket, "GET", path, "", |status| status == "200")
}

/// Uses HTTP/1.0: the server closes the connection after the response and does not use chunked
/// encoding.
fn exchange(
    socket: &Path,
    method: &str,
    path: &str,
    body: &str,
    is_success: impl Fn(&str) -> bool,
) -> Result<String, String> {
    let exchange = || {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(COMMAND_TIMEOUT))?;
        let head = format!(
            "{method} {path} HTTP/1.0\r\nHost: docker\r\nContent-Type: application/json\r\n"
        );
        stream
            .write_all(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    };
    let answer =
        exchange().map_err(|error: std::io::Error| format!("{}: {error}", socket.display()))?;
    let (head, body) =
        answer.split_once("\r\n\r\n").ok_or_else(|| format!("not HTTP: {answer}"))?;
    match head.split_whitespace().nth(1) {
        Some(status) if is_success(status) => Ok(body.to_owned()),
        _ => Err(format!("{path}: {}: {body}", head.lines().next().unwrap_or_default())),
    }
}
