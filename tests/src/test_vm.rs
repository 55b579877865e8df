//! One VM in a directory: context, settings, state, and the agent that runs with them.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs,
    os::unix::{
        fs::PermissionsExt,
        net::UnixDatagram,
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};

use crate::{
    engine::Engine,
    network::in_namespace,
    onegate::OneGateSimulator,
    process::{Lines, Output, run, signal, start_tied, tied, wait},
    sandbox::{Sandbox, agent_binary, nvml_library, write},
    sysfs::Sysfs,
};

/// The VM. Its settings are the product's defaults, except that every path is in the VM's
/// directory, there is no Docker engine, sysfs is empty, and timeouts are short.
#[derive(Debug)]
pub struct TestVm {
    sandbox: Sandbox,
    settings: BTreeMap<String, BTreeMap<String, Value>>,
    env: BTreeMap<OsString, OsString>,
    path_first: Vec<PathBuf>,
    agent: Option<PathBuf>,
    /// Context variables set by the test.
    variables: BTreeMap<String, String>,
    /// Context variables added by OpenNebula.
    onegate: Option<OneGate>,
    /// Network namespace of the agent; `None`: that of the test process.
    namespace: Option<String>,
    /// Kept alive for the agent.
    sysfs: Option<Sysfs>,
}

/// OneGate access of a VM with `TOKEN=YES`.
#[derive(Debug)]
struct OneGate {
    endpoint: String,
    vm_id: String,
    token: String,
}

impl TestVm {
    /// Creates a VM without a GPU, without Docker and with an empty context.
    #[must_use]
    pub fn new() -> Self {
        let sandbox = Sandbox::new("vm");
        for directory in ["context", "state", "data", "certs", "prebaked", "sys", "bin", "root"] {
            fs::create_dir_all(sandbox.join(directory))
                .expect("cannot create a directory of the VM");
        }
        let bin = sandbox.join("bin");
        let mut vm = Self {
            sandbox,
            settings: BTreeMap::new(),
            env: BTreeMap::new(),
            path_first: vec![bin],
            agent: None,
            variables: BTreeMap::new(),
            onegate: None,
            namespace: None,
            sysfs: None,
        };
        for (key, directory) in [
            ("context.dir", "context"),
            ("gpu.sysfs", "sys"),
            ("docker.socket", "docker.sock"),
            ("docker.daemon_json", "daemon.json"),
            ("container.data_dir", "data"),
            ("container.certs_dir", "certs"),
            ("container.prebaked_dir", "prebaked"),
            ("system.root", "root"),
            ("state.dir", "state"),
            ("state.persistent_dir", "persistent"),
        ] {
            let path = vm.path(directory);
            vm.set(key, path.to_string_lossy().into_owned());
        }
        vm.set("gpu.nvml_library", "libnvidia-ml.so.1-is-not-here")
            .set("gpu.probe_timeout_seconds", 5)
            .set("gpu.wait_seconds", 1)
            .set("docker.reload_command", json!(["false"]))
            .set("docker.ready_timeout_seconds", 10)
            .set("container.stop_timeout_seconds", 5);
        vm.os_release("ID=debian\nVERSION_ID=\"12\"\n");
        vm.context(&[]);
        vm
    }

    /// Returns the path in the VM's directory: `context/…`, `state/…`, `daemon.json`,
    /// `prebaked/PREBAKED_VERSION`.
    #[must_use]
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.sandbox.join(relative)
    }

    /// Writes a file of the VM.
    pub fn write(&self, relative: impl AsRef<Path>, text: impl AsRef<[u8]>) -> PathBuf {
        self.sandbox.write(relative, text)
    }

    /// Sets one setting, such as `gpu.wait_seconds`. Unknown settings are allowed: the agent
    /// validates them.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        let (section, name) = key.split_once('.').unwrap_or_else(|| panic!("{key} has no section"));
        self.settings.entry(section.to_owned()).or_default().insert(name.to_owned(), value.into());
        self
    }

    /// Removes a setting, so that the product's default applies.
    pub fn unset(&mut self, key: &str) -> &mut Self {
        if let Some((section, name)) = key.split_once('.')
            && let Some(section) = self.settings.get_mut(section)
        {
            section.remove(name);
        }
        self
    }

    /// Sets an environment variable of the agent, which gets only these and PATH.
    pub fn env(&mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.env.insert(name.as_ref().to_owned(), value.as_ref().to_owned());
        self
    }

    /// Replaces the agent ([`agent_binary`]) by that of a package or by a script.
    pub fn agent(&mut self, program: impl Into<PathBuf>) -> &mut Self {
        self.agent = Some(program.into());
        self
    }

    /// Prepends a directory to the agent's PATH, which already contains the VM's `bin`.
    pub fn path_first(&mut self, directory: impl Into<PathBuf>) -> &mut Self {
        self.path_first.insert(0, directory.into());
        self
    }

    /// Sets the context variables and writes the files of all stages in OpenNebula's format.
    pub fn context(&mut self, variables: &[(&str, &str)]) -> &mut Self {
        self.variables = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        self.write_context()
    }

    /// Makes this a VM of the given OneGate: adds the context variables of OpenNebula and writes
    /// the token to `one_env`. Variables set by [`TestVm::context`] take precedence.
    ///
    /// # Panics
    /// If OneGate knows no such VM.
    #[track_caller]
    pub fn onegate(&mut self, onegate: &OneGateSimulator, vm_id: u32) -> &mut Self {
        let token = onegate.change(|state| state.vms.get(&vm_id).map(|vm| vm.token.clone()));
        let token = token.unwrap_or_else(|| panic!("OneGate knows no VM {vm_id}"));
        self.onegate =
            Some(OneGate { endpoint: onegate.endpoint(), vm_id: vm_id.to_string(), token });
        self.write_context()
    }

    fn write_context(&mut self) -> &mut Self {
        let mut all: BTreeMap<&str, &str> = BTreeMap::new();
        if let Some(OneGate { endpoint, vm_id, .. }) = &self.onegate {
            all.extend([("TOKEN", "YES"), ("ONEGATE_ENDPOINT", endpoint), ("VMID", vm_id)]);
        }
        all.extend(self.variables.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let variables: Vec<_> = all.into_iter().collect();
        let text = context_text(&variables);
        let one_env = self.onegate.as_ref().map(|onegate| onegate.one_env(&variables));
        for stage in ["local", "online", "network"] {
            self.context_file(&format!("context.sh.{stage}"), &text);
        }
        if let Some(one_env) = one_env {
            self.context_file("one_env", one_env);
        }
        self
    }

    /// Writes one file of the context directory verbatim: `one_env`, or a truncated
    /// `context.sh.online`. Only root can read it, as in a real VM.
    pub fn context_file(&mut self, name: &str, text: impl AsRef<[u8]>) -> &mut Self {
        let path = self.path("context").join(name);
        write(&path, text);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400))
            .expect("the mode of a context file");
        self
    }

    /// Writes the prebaked version and framework, as the image build does.
    pub fn prebaked(&mut self, version: &str, framework: &str) -> &mut Self {
        self.write("prebaked/PREBAKED_VERSION", format!("{version}\n"));
        self.write("prebaked/PREBAKED_FRAMEWORK", format!("{framework}\n"));
        self
    }

    /// Sets the PCI devices.
    pub fn sysfs(&mut self, sysfs: &Sysfs) -> &mut Self {
        self.sysfs = Some(sysfs.clone());
        self.set("gpu.sysfs", sysfs.root().to_string_lossy().into_owned())
    }

    /// Sets os-release(5); the default is Debian.
    pub fn os_release(&mut self, text: &str) -> &mut Self {
        self.write("root/etc/os-release", text);
        self
    }

    /// Sets the kernel release and adds kernel files by their path from the root.
    pub fn kernel(&mut self, release: &str, files: &[(&str, &str)]) -> &mut Self {
        self.write("root/proc/sys/kernel/osrelease", format!("{release}\n"));
        for (file, text) in files {
            self.write(Path::new("root").join(file), text);
        }
        self
    }

    /// Installs the NVML simulator with this script. A further call changes the GPUs for the next
    /// probe.
    pub fn nvml(&mut self, script: &Value) -> &mut Self {
        // Renamed into place: a concurrent probe reads either the old or the new script.
        let next = self.write("nvml.json.next", script.to_string());
        let path = self.path("nvml.json");
        fs::rename(next, &path).expect("the script of the NVML simulator");
        self.env("NVML_SIMULATOR", path);
        self.set("gpu.nvml_library", nvml_library().to_string_lossy().into_owned())
    }

    /// Connects the VM to this Docker engine and adds the engine's programs to PATH.
    pub fn engine(&mut self, engine: &Engine) -> &mut Self {
        self.path_first(engine.bin_dir());
        self.set("docker.socket", engine.socket().to_string_lossy().into_owned())
            .set("docker.daemon_json", engine.daemon_json().to_string_lossy().into_owned())
            .set("docker.reload_command", engine.reload_command())
    }

    /// Runs the agent in the engine's network namespace. In production the agent and Docker share a
    /// network, and the agent reaches containers by their bridge addresses. A OneGate on 127.0.0.1
    /// is unreachable from there; see [`OneGateSimulator::start_in`].
    pub fn in_namespace_of(&mut self, engine: &Engine) -> &mut Self {
        self.namespace = Some(engine.network_namespace().to_owned());
        self
    }

    /// Writes the current settings to a file and returns its path.
    #[must_use]
    pub fn settings_file(&self) -> PathBuf {
        let mut text = String::new();
        for (section, keys) in &self.settings {
            text += &format!("[{section}]\n");
            for (name, value) in keys {
                // Strings, numbers, booleans and arrays of them have the same syntax in JSON and
                // TOML.
                text += &format!("{name} = {value}\n");
            }
        }
        self.write("agent.toml", text)
    }

    /// Runs `supernode-agent SUBCOMMAND --settings FILE ARGUMENTS` to its end, for at most a
    /// minute.
    #[track_caller]
    pub fn run_command(&self, subcommand: &str, arguments: &[&str]) -> Output {
        self.run_command_within(subcommand, arguments, Duration::from_secs(60))
    }

    /// Runs a command with another timeout.
    #[track_caller]
    pub fn run_command_within(
        &self,
        subcommand: &str,
        arguments: &[&str],
        timeout: Duration,
    ) -> Output {
        let mut command = self.prepare(self.agent_command(), subcommand);
        run(command.args(arguments), timeout)
    }

    /// Returns a command of the agent that ends with the test.
    #[must_use]
    pub fn command(&self, subcommand: &str) -> Command {
        self.prepare(tied(&self.agent_command()), subcommand)
    }

    /// Starts `supernode-agent run` with a notification socket.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    #[track_caller]
    pub fn start(&self) -> Agent {
        let socket = self.path("notify.sock");
        let _ = fs::remove_file(&socket);
        let notified = Lines::default();
        listen(&socket, notified.clone());
        let mut command = self.command("run");
        // Its own process group, so that the agent's children are killed with it in any state.
        command.env("NOTIFY_SOCKET", &socket).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let shown = format!("{command:?}");
        let mut child = start_tied(command).unwrap_or_else(|error| panic!("{shown}: {error}"));
        let lines = Lines::default();
        let stdout = Lines::default();
        lines.follow(child.stderr.take().expect("a pipe"));
        stdout.follow(child.stdout.take().expect("a pipe"));
        Agent { child, lines, stdout, notified, socket }
    }

    /// Returns a command for the agent's program.
    fn agent_command(&self) -> Command {
        let program = self.agent.clone().unwrap_or_else(agent_binary);
        assert!(program.is_file(), "no agent at {}", program.display());
        match &self.namespace {
            Some(namespace) => in_namespace(namespace, program),
            None => Command::new(program),
        }
    }

    /// Adds the subcommand, the settings and the agent's environment to a command.
    fn prepare(&self, mut command: Command, subcommand: &str) -> Command {
        let own = std::env::var_os("PATH").unwrap_or_default();
        let directories = self.path_first.iter().cloned().chain(std::env::split_paths(&own));
        command
            .arg(subcommand)
            .arg("--settings")
            .arg(self.settings_file())
            .env_clear()
            .env("PATH", std::env::join_paths(directories).expect("no colon in a directory's name"))
            .envs(&self.env)
            .current_dir(self.sandbox.path());
        command
    }
}

impl OneGate {
    /// Returns `one_env` as the context scripts write it: the three lines of OneGate, then every
    /// variable without escaping.
    fn one_env(&self, variables: &[(&str, &str)]) -> String {
        let Self { endpoint, vm_id, token } = self;
        let first = [("TOKENTXT", token.as_str()), ("VMID", vm_id), ("ONEGATE_ENDPOINT", endpoint)];
        let lines = first.iter().chain(variables);
        lines.map(|(name, value)| format!("export {name}=\"{value}\"\n")).collect()
    }
}

impl Default for TestVm {
    fn default() -> Self {
        Self::new()
    }
}

/// Renders a context file as OpenNebula does: a comment, then the keys in byte order, `'` as
/// `'\''`.
pub(crate) fn context_text(variables: &[(&str, &str)]) -> String {
    let sorted: BTreeMap<_, _> = variables.iter().copied().collect();
    let mut text = "# Context variables generated by OpenNebula\n".to_owned();
    for (name, value) in sorted {
        text += &format!("{name}='{}'\n", value.replace('\'', r"'\''"));
    }
    text
}

/// Collects the agent's notifications to systemd, one entry per message.
fn listen(path: &Path, messages: Lines) {
    let socket =
        UnixDatagram::bind(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        // An empty message is sent by the harness when the agent has ended.
        while let Ok(length @ 1..) = socket.recv(&mut buffer) {
            messages.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
    });
}

/// A running `supernode-agent run`. Dropping it kills the agent and its children.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    lines: Lines,
    stdout: Lines,
    notified: Lines,
    socket: PathBuf,
}

impl Agent {
    /// Returns the PID of the agent.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lines on standard error so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.lines.all()
    }

    /// Lines on standard output so far.
    #[must_use]
    pub fn stdout_lines(&self) -> Vec<String> {
        self.stdout.all()
    }

    /// Notifications to systemd so far; a message may have several lines.
    #[must_use]
    pub fn notifications(&self) -> Vec<String> {
        self.notified.all()
    }

    /// Waits for a line on standard error that contains the text and returns the first one.
    ///
    /// # Panics
    /// On timeout. The message contains all lines.
    #[track_caller]
    pub fn wait_for_line(&self, text: &str, timeout: Duration) -> String {
        self.lines
            .wait_for(text, timeout)
            .unwrap_or_else(|| panic!("no line with {text:?}; {}", self.transcript()))
    }

    /// Waits for a notification to systemd that contains the text (`READY=1`).
    ///
    /// # Panics
    /// On timeout. The message contains all lines and notifications.
    #[track_caller]
    pub fn wait_for_notify(&self, text: &str, timeout: Duration) -> String {
        self.notified
            .wait_for(text, timeout)
            .unwrap_or_else(|| panic!("no message with {text:?}; {}", self.transcript()))
    }

    /// Waits for the end; returns the exit code, or the negative number of the signal.
    ///
    /// # Panics
    /// On timeout. The message contains all lines.
    #[track_caller]
    pub fn wait_exit(&mut self, timeout: Duration) -> i32 {
        let Some(status) = wait(&mut self.child, timeout) else {
            panic!("still running after {timeout:?}; {}", self.transcript());
        };
        status.code().unwrap_or_else(|| -status.signal().unwrap_or_default())
    }

    /// Returns the exit code or the negative number of the signal; `None` while the agent runs.
    ///
    /// # Panics
    /// If the agent is not a child of this process.
    pub fn ended(&mut self) -> Option<i32> {
        let status = self.child.try_wait().expect("cannot wait for the agent")?;
        Some(status.code().unwrap_or_else(|| -status.signal().unwrap_or_default()))
    }

    /// Sends SIGTERM, as `systemctl stop` does, and returns the exit code.
    #[track_caller]
    pub fn terminate(&mut self) -> i32 {
        self.signal(Signal::TERM);
        self.wait_exit(Duration::from_secs(30))
    }

    /// Sends SIGUSR1, as a package upgrade does, and returns the exit code.
    #[track_caller]
    pub fn hand_over(&mut self) -> i32 {
        self.signal(Signal::USR1);
        self.wait_exit(Duration::from_secs(30))
    }

    /// Sends SIGINT, as Ctrl-C on a terminal does.
    pub fn interrupt(&self) {
        self.signal(Signal::INT);
    }

    /// Sends SIGHUP, as `systemctl reload` does.
    pub fn reload(&self) {
        self.signal(Signal::HUP);
    }

    /// Sends SIGKILL to the agent only and waits for its end.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }

    fn signal(&self, which: Signal) {
        signal(self.child.id(), which);
    }

    fn transcript(&self) -> String {
        format!("standard error: {:#?}, notifications: {:#?}", self.lines(), self.notifications())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
        if let Ok(socket) = UnixDatagram::unbound() {
            let _ = socket.send_to(&[], &self.socket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_text_matches_opennebula() {
        let text =
            context_text(&[("VMID", "7"), ("FL_NODE_CONFIG", "name='it''s'"), ("EMPTY", "")]);
        let expected = "# Context variables generated by OpenNebula\nEMPTY=''\n\
                        FL_NODE_CONFIG='name='\\''it'\\'''\\''s'\\'''\nVMID='7'\n";
        assert_eq!(text, expected);
    }
}
