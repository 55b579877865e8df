//! agent.toml: where things are on this machine. What the operator of a VM wants is in the context
//! variables instead.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::values::ImageRef;

/// Where the settings are when nobody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/supernode-agent/agent.toml";

/// The largest `/dev/shm`: what a signed number of bytes, which is Docker's, holds.
const MAX_SHM_MIB: u64 = i64::MAX as u64 >> 20;

/// All settings; a key that is missing has its default, one that is not known is an error.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each field is the section of agent.toml of its name")]
pub struct Settings {
    pub context: ContextSettings,
    pub gpu: GpuSettings,
    pub docker: DockerSettings,
    pub container: ContainerSettings,
    pub machine: MachineSettings,
    pub onegate: OneGateSettings,
    pub metrics: MetricsSettings,
    pub dcgm: DcgmSettings,
    pub state: StateSettings,
}

/// `[context]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContextSettings {
    /// Folder in which one-context leaves the context files.
    pub dir: PathBuf,
}

/// `[gpu]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GpuSettings {
    /// Root of sysfs.
    pub sysfs: PathBuf,
    /// NVML, by a name for the loader or by a path.
    pub nvml_library: String,
    /// How long one probe may take.
    #[serde(rename = "probe_timeout_seconds", deserialize_with = "seconds")]
    pub probe_timeout: Duration,
    /// How long a driver that is still coming is waited for.
    #[serde(rename = "wait_seconds", deserialize_with = "seconds")]
    pub wait: Duration,
    /// How the container gets the GPU.
    pub injection: Injection,
    /// What happens after a fatal fault while the node runs.
    pub on_failure: OnFailure,
    /// What happens when the GPU becomes usable after the wait.
    pub on_late: OnLate,
}

/// `gpu.injection`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Injection {
    /// CDI where Docker reports a resolvable device, else the runtime.
    Auto,
    /// `Runtime=nvidia` and `NVIDIA_VISIBLE_DEVICES`.
    Runtime,
    /// A CDI device request.
    Cdi,
}

/// `gpu.on_failure`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the words are explained where they are acted upon")]
pub enum OnFailure {
    Cpu,
    Restart,
    Ignore,
}

/// `gpu.on_late`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the words are explained where they are acted upon")]
pub enum OnLate {
    Announce,
    Restart,
}

/// `[docker]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DockerSettings {
    /// The engine's API socket.
    pub socket: PathBuf,
    /// The engine's configuration.
    pub daemon_json: PathBuf,
    /// NVIDIA's OCI runtime, by a name in PATH or by a path: what is written into `daemon_json`.
    pub runtime_path: String,
    /// The command that makes the engine read its configuration again; no shell is involved.
    pub reload_command: Vec<String>,
    /// How long an engine that is still starting is waited for.
    #[serde(rename = "ready_timeout_seconds", deserialize_with = "seconds")]
    pub ready_timeout: Duration,
}

/// `[container]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContainerSettings {
    /// The container's name.
    pub name: String,
    /// Training data, mounted read-only at `/app/data`.
    pub data_dir: PathBuf,
    /// Folder for the CA file.
    pub certs_dir: PathBuf,
    /// Where the image build left `PREBAKED_VERSION` and `PREBAKED_FRAMEWORK`.
    pub prebaked_dir: PathBuf,
    /// Grace between SIGTERM and SIGKILL.
    #[serde(rename = "stop_timeout_seconds", deserialize_with = "seconds")]
    pub stop_timeout: Duration,
    /// Docker's log driver; `auto` is journald where the journal is, else json-file with rotation.
    pub log_driver: String,
    /// Size of `/dev/shm` in MiB; 0 is half of the machine's memory.
    pub shm_size_mib: u64,
    /// Whether Flower is asked for its health, and a container that hangs is started again.
    pub health_check: bool,
}

/// `[machine]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MachineSettings {
    /// Root of the file system in which `etc/os-release`, `lib/modules`, DKMS and the like tell
    /// what this VM is.
    pub root: PathBuf,
}

/// `[onegate]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OneGateSettings {
    /// CA of a OneGate behind https; empty: the machine's own.
    pub ca_file: String,
    /// How long one request may take.
    #[serde(rename = "timeout_seconds", deserialize_with = "seconds")]
    pub timeout: Duration,
}

/// `[metrics]`
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsSettings {
    /// Address and port of the Prometheus page; empty: none.
    pub listen: String,
}

impl MetricsSettings {
    /// Where the page is, where there is one.
    pub fn address(&self) -> Option<SocketAddr> {
        address(&self.listen)
    }
}

/// `[dcgm]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DcgmSettings {
    /// The image of NVIDIA's DCGM exporter.
    pub image: String,
    /// Address and port at which the exporter is reached.
    pub listen: String,
}

impl DcgmSettings {
    /// Where the exporter is; settings that were read have one.
    pub fn address(&self) -> Option<SocketAddr> {
        address(&self.listen)
    }
}

/// `127.0.0.1:9400`, `[::1]:9400`: an address and no name, for what a name stands for may change,
/// and a port that is known.
fn address(text: &str) -> Option<SocketAddr> {
    text.parse().ok().filter(|address: &SocketAddr| address.port() != 0)
}

/// `[state]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StateSettings {
    /// Folder for what the agent keeps while the machine is up.
    pub dir: PathBuf,
    /// Folder for what it keeps over reboots.
    pub lasting_dir: PathBuf,
}

impl Default for ContextSettings {
    fn default() -> Self {
        Self { dir: "/run/one-context".into() }
    }
}

impl Default for GpuSettings {
    fn default() -> Self {
        Self {
            sysfs: "/sys".into(),
            nvml_library: "libnvidia-ml.so.1".into(),
            probe_timeout: Duration::from_secs(20),
            wait: Duration::from_secs(30),
            injection: Injection::Auto,
            on_failure: OnFailure::Cpu,
            on_late: OnLate::Announce,
        }
    }
}

impl Default for DockerSettings {
    fn default() -> Self {
        Self {
            socket: "/var/run/docker.sock".into(),
            daemon_json: "/etc/docker/daemon.json".into(),
            runtime_path: "nvidia-container-runtime".into(),
            reload_command: ["systemctl", "reload", "docker.service"].map(String::from).into(),
            ready_timeout: Duration::from_secs(60),
        }
    }
}

impl Default for ContainerSettings {
    fn default() -> Self {
        Self {
            name: "flower-supernode".into(),
            data_dir: "/opt/flower/data".into(),
            certs_dir: "/opt/flower/certs".into(),
            prebaked_dir: "/opt/flower".into(),
            stop_timeout: Duration::from_secs(30),
            log_driver: "auto".into(),
            shm_size_mib: 0,
            health_check: true,
        }
    }
}

impl Default for MachineSettings {
    fn default() -> Self {
        Self { root: "/".into() }
    }
}

impl Default for OneGateSettings {
    fn default() -> Self {
        Self { ca_file: String::new(), timeout: Duration::from_secs(10) }
    }
}

impl Default for DcgmSettings {
    fn default() -> Self {
        Self {
            // What NVIDIA's own README and Helm chart name (NVIDIA/dcgm-exporter, README.md,
            // deployment/values.yaml).
            image: "nvcr.io/nvidia/k8s/dcgm-exporter:4.5.3-4.8.2-distroless".into(),
            listen: "127.0.0.1:9400".into(),
        }
    }
}

impl Default for StateSettings {
    fn default() -> Self {
        Self { dir: "/run/supernode-agent".into(), lasting_dir: "/var/lib/supernode-agent".into() }
    }
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("cannot read the settings {path}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("the settings {path} are wrong: {message}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, where, and what is accepted.
        message: String,
    },
}

impl Settings {
    /// Reads `path`, or the default path where that file exists, or takes the defaults.
    ///
    /// # Errors
    /// When the file cannot be read, is not TOML, or has a key or a value that is not accepted.
    pub fn load(path: Option<&Path>) -> Result<Self, SettingsError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(file) {
            Ok(text) => Self::parse(&text)
                .map_err(|message| SettingsError::Invalid { path: file.into(), message }),
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(SettingsError::Unreadable { path: file.into(), source }),
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let settings: Self =
            toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        let refusals = settings.refusals();
        if refusals.is_empty() { Ok(settings) } else { Err(refusals.join("; ")) }
    }

    /// What TOML accepts and this machine could not do anything with: each with the key, the value,
    /// and what is accepted.
    fn refusals(&self) -> Vec<String> {
        let Self { context, gpu, docker, container, machine, onegate, metrics, dcgm, state } = self;
        let path = |key, path: &Path| {
            (key, path.is_absolute(), format!("{path:?}"), "must be an absolute path")
        };
        // A relative path would depend on the folder that somebody started the agent in.
        let is_program =
            |name: &str| !name.trim().is_empty() && (name.starts_with('/') || !name.contains('/'));
        let program = |key, name: &str| {
            (key, is_program(name), format!("{name:?}"), "must be a name or an absolute path")
        };
        let reload = &docker.reload_command;
        let probe_seconds = gpu.probe_timeout.as_secs();
        let shm_mib = container.shm_size_mib;
        let log_driver = container.log_driver.trim();
        // The names that Docker accepts (moby, daemon/names).
        let name = &container.name;
        let valid_name = name.len() >= 2
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        [
            path("context.dir", &context.dir),
            path("gpu.sysfs", &gpu.sysfs),
            program("gpu.nvml_library", &gpu.nvml_library),
            ("gpu.probe_timeout_seconds", probe_seconds > 0, probe_seconds.to_string(), "must be at least 1"),
            path("docker.socket", &docker.socket),
            path("docker.daemon_json", &docker.daemon_json),
            program("docker.runtime_path", &docker.runtime_path),
            (
                "docker.reload_command",
                reload.first().is_some_and(|program| is_program(program)),
                format!("{reload:?}"),
                "must begin with a program, by its name or its absolute path",
            ),
            (
                "container.name",
                valid_name,
                format!("{name:?}"),
                "must be letters, digits, '_', '.' and '-', two or more, the first a letter or a digit",
            ),
            path("container.data_dir", &container.data_dir),
            path("container.certs_dir", &container.certs_dir),
            path("container.prebaked_dir", &container.prebaked_dir),
            (
                "container.log_driver",
                !log_driver.is_empty(),
                format!("{log_driver:?}"),
                "must be auto or a log driver of Docker",
            ),
            (
                "container.shm_size_mib",
                shm_mib <= MAX_SHM_MIB,
                shm_mib.to_string(),
                "must be at most 8796093022207: Docker counts in bytes, up to 2^63 - 1",
            ),
            path("machine.root", &machine.root),
            (
                "onegate.ca_file",
                onegate.ca_file.is_empty() || onegate.ca_file.starts_with('/'),
                format!("{:?}", onegate.ca_file),
                "must be an absolute path, or empty",
            ),
            (
                "onegate.timeout_seconds",
                !onegate.timeout.is_zero(),
                onegate.timeout.as_secs().to_string(),
                "must be at least 1",
            ),
            (
                "metrics.listen",
                metrics.listen.is_empty() || metrics.address().is_some(),
                format!("{:?}", metrics.listen),
                "must be an IP address and a port from 1 to 65535, as 127.0.0.1:9401 or [::1]:9401, or empty",
            ),
            (
                "dcgm.image",
                ImageRef::parse(&dcgm.image).is_ok(),
                format!("{:?}", dcgm.image),
                "must be an image reference [host[:port]/]name[:tag][@sha256:digest]",
            ),
            (
                "dcgm.listen",
                dcgm.address().is_some(),
                format!("{:?}", dcgm.listen),
                "must be an IP address and a port from 1 to 65535, as 127.0.0.1:9400 or [::1]:9400",
            ),
            path("state.dir", &state.dir),
            path("state.lasting_dir", &state.lasting_dir),
        ]
        .into_iter()
        .filter(|(_, right, ..)| !right)
        .map(|(key, _, value, accepted)| format!("{key} = {value}: {accepted}"))
        .collect()
    }
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    u32::deserialize(deserializer).map(|seconds| Duration::from_secs(seconds.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_file_there_are_the_defaults_and_the_example_shows_them_all() {
        let example = include_str!("../../../packaging/examples/agent.toml");
        assert_eq!(Settings::parse(example), Ok(Settings::default()));
        assert_eq!(Settings::parse(""), Ok(Settings::default()));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (text, words) in [
            ("[gpu]\nwait_second = 3\n", "wait_second"),
            ("[gpus]\n", "gpus"),
            ("[gpu]\nwait_seconds = -1\n", "line 2"),
            ("[gpu]\nwait_seconds = \"3\"\n", "line 2"),
            ("[gpu]\ninjection = \"magic\"\n", "auto"),
            ("[gpu\n", "line 1"),
        ] {
            let message = Settings::parse(text).unwrap_err();
            assert!(message.contains(words), "{text}: {message}");
        }
    }

    #[test]
    fn what_no_machine_can_do_is_refused_with_key_value_and_what_is_accepted() {
        let absolute = "must be an absolute path";
        let program = "must be a name or an absolute path";
        for (section, setting, accepted) in [
            ("context", "dir = \"run/one-context\"", absolute),
            ("gpu", "sysfs = \"\"", absolute),
            ("gpu", "nvml_library = \"\"", program),
            ("gpu", "nvml_library = \"lib/libnvidia-ml.so.1\"", program),
            ("gpu", "probe_timeout_seconds = 0", "must be at least 1"),
            ("docker", "socket = \"unix:///var/run/docker.sock\"", absolute),
            ("docker", "daemon_json = \"\"", absolute),
            ("docker", "daemon_json = \"daemon.json\"", absolute),
            ("docker", "runtime_path = \"\"", program),
            ("docker", "runtime_path = \"./nvidia-container-runtime\"", program),
            ("docker", "reload_command = []", "must begin with a program"),
            ("docker", "reload_command = [\" \", \"reload\"]", "must begin with a program"),
            ("container", "name = \"a b\"", "must be letters"),
            ("container", "name = \"a\"", "must be letters"),
            ("container", "data_dir = \"data\"", absolute),
            ("container", "certs_dir = \"certs\"", absolute),
            ("container", "prebaked_dir = \"\"", absolute),
            ("container", "log_driver = \"\"", "must be auto or"),
            ("container", "shm_size_mib = 8796093022208", "must be at most 8796093022207"),
            ("machine", "root = \"\"", absolute),
            ("onegate", "ca_file = \"ca.crt\"", "must be an absolute path, or empty"),
            ("onegate", "timeout_seconds = 0", "must be at least 1"),
            ("metrics", "listen = \"localhost:9401\"", "must be an IP address and a port"),
            ("metrics", "listen = \":9401\"", "must be an IP address and a port"),
            ("metrics", "listen = \"127.0.0.1\"", "must be an IP address and a port"),
            ("metrics", "listen = \"127.0.0.1:0\"", "must be an IP address and a port"),
            ("dcgm", "image = \"\"", "must be an image reference"),
            ("dcgm", "listen = \"\"", "must be an IP address and a port"),
            ("state", "dir = \"state\"", absolute),
            ("state", "lasting_dir = \"\"", absolute),
        ] {
            let message = Settings::parse(&format!("[{section}]\n{setting}\n")).expect_err(setting);
            assert!(
                message.starts_with(&format!("{section}.{setting}: {accepted}")),
                "{setting}: {message}"
            );
        }
        let most = "[container]\nshm_size_mib = 8796093022207\n[gpu]\nnvml_library = \"/opt/libnvidia-ml.so.1\"\n";
        assert_eq!(
            Settings::parse(most).map(|settings| settings.container.shm_size_mib),
            Ok((1 << 43) - 1)
        );
        let page = Settings::parse("[metrics]\nlisten = \"[::1]:9401\"\n")
            .map(|settings| settings.metrics.address());
        assert_eq!(page, Ok("[::1]:9401".parse().ok()));
    }

    #[test]
    fn all_wrong_settings_are_told_together() {
        let message =
            Settings::parse("[state]\ndir = \"\"\n[gpu]\nprobe_timeout_seconds = 0\n").unwrap_err();
        assert_eq!(
            message,
            "gpu.probe_timeout_seconds = 0: must be at least 1; state.dir = \"\": must be an absolute path"
        );
    }
}
