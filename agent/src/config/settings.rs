//! Settings: machine-local paths and policies from `agent.toml`. The operator configures the node
//! itself by context variables.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::values::ImageRef;

/// Default path of the settings file.
pub const DEFAULT_PATH: &str = "/etc/supernode-agent/agent.toml";

/// Maximum size of `/dev/shm`: Docker takes it as a signed 64-bit number of bytes.
const MAX_SHM_MIB: u64 = i64::MAX as u64 >> 20;

/// All settings. A missing key has its default; an unknown key is an error.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each field is the section of its name")]
pub struct Settings {
    pub context: ContextSettings,
    pub gpu: GpuSettings,
    pub docker: DockerSettings,
    pub container: ContainerSettings,
    pub system: SystemSettings,
    pub onegate: OneGateSettings,
    pub metrics: MetricsSettings,
    pub dcgm: DcgmSettings,
    pub state: StateSettings,
}

/// `[context]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContextSettings {
    /// Directory where one-context writes the context files.
    pub dir: PathBuf,
}

/// `[gpu]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GpuSettings {
    /// Root of sysfs.
    pub sysfs: PathBuf,
    /// NVML: a name for the dynamic loader, or a path.
    pub nvml_library: String,
    /// Time limit for one NVML probe.
    #[serde(rename = "probe_timeout_seconds", deserialize_with = "seconds")]
    pub probe_timeout: Duration,
    /// How long to wait for a driver that is still initializing.
    #[serde(rename = "wait_seconds", deserialize_with = "seconds")]
    pub wait: Duration,
    /// How Docker injects the GPU into the container.
    pub injection: Injection,
    /// Action after a fatal GPU fault while the node runs.
    pub on_failure: OnFailure,
    /// Action when the GPU becomes usable after the wait.
    pub on_available: OnAvailable,
}

/// `gpu.injection`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Injection {
    /// CDI if Docker reports a resolvable device, else the runtime.
    Auto,
    /// `Runtime=nvidia` and `NVIDIA_VISIBLE_DEVICES`.
    Runtime,
    /// A CDI device request.
    Cdi,
}

/// `gpu.on_failure`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "agent.toml(5) explains the words")]
pub enum OnFailure {
    Cpu,
    Restart,
    Ignore,
}

/// `gpu.on_available`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "agent.toml(5) explains the words")]
pub enum OnAvailable {
    Announce,
    Restart,
}

/// `[docker]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DockerSettings {
    /// Docker's API socket.
    pub socket: PathBuf,
    /// Docker's configuration file.
    pub daemon_json: PathBuf,
    /// NVIDIA's OCI runtime, a name in PATH or a path, as written to `daemon_json`.
    pub runtime_path: String,
    /// Command that makes Docker reload its configuration; executed without a shell.
    pub reload_command: Vec<String>,
    /// How long to wait for a Docker engine that is still starting.
    #[serde(rename = "ready_timeout_seconds", deserialize_with = "seconds")]
    pub ready_timeout: Duration,
}

/// `[container]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContainerSettings {
    /// Name of the container.
    pub name: String,
    /// Training data, mounted read-only at `/app/data`.
    pub data_dir: PathBuf,
    /// Directory for the CA file.
    pub certs_dir: PathBuf,
    /// Directory of `PREBAKED_VERSION` and `PREBAKED_FRAMEWORK`.
    pub prebaked_dir: PathBuf,
    /// Grace period between SIGTERM and SIGKILL.
    #[serde(rename = "stop_timeout_seconds", deserialize_with = "seconds")]
    pub stop_timeout: Duration,
    /// Docker's log driver; `auto` is journald if the journal runs, else json-file with rotation.
    pub log_driver: String,
    /// Size of `/dev/shm` in MiB; 0 is half of the machine's memory.
    pub shm_size_mib: u64,
    /// Whether to check the liveness of Flower and to restart an unresponsive container.
    pub health_check: bool,
}

/// `[system]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SystemSettings {
    /// Root directory for `etc/os-release`, `lib/modules`, DKMS and similar files that describe
    /// this VM.
    pub root: PathBuf,
}

/// `[onegate]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OneGateSettings {
    /// CA file for a OneGate endpoint with https; without one, the system's CAs.
    #[serde(deserialize_with = "path_unless_empty")]
    pub ca_file: Option<PathBuf>,
    /// Time limit for one request.
    #[serde(rename = "timeout_seconds", deserialize_with = "seconds")]
    pub timeout: Duration,
}

/// `[metrics]`
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsSettings {
    /// Address and port of the Prometheus endpoint; empty: none.
    pub listen: String,
}

impl MetricsSettings {
    /// Returns the address, unless `listen` is empty.
    pub fn address(&self) -> Option<SocketAddr> {
        address(&self.listen)
    }
}

/// `[dcgm]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DcgmSettings {
    /// Image of NVIDIA's DCGM exporter.
    pub image: String,
    /// Address and port of the exporter.
    pub listen: String,
}

impl DcgmSettings {
    /// Returns the address; always present in validated settings.
    pub fn address(&self) -> Option<SocketAddr> {
        address(&self.listen)
    }
}

/// Parses an IP address and a fixed port, such as `127.0.0.1:9400` or `[::1]:9400`. A host name is
/// not accepted, because its address may change.
fn address(text: &str) -> Option<SocketAddr> {
    text.parse().ok().filter(|address: &SocketAddr| address.port() != 0)
}

/// `[state]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StateSettings {
    /// Runtime state, lost at reboot.
    pub dir: PathBuf,
    /// Persistent state.
    pub persistent_dir: PathBuf,
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
            on_available: OnAvailable::Announce,
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

impl Default for SystemSettings {
    fn default() -> Self {
        Self { root: "/".into() }
    }
}

impl Default for OneGateSettings {
    fn default() -> Self {
        Self { ca_file: None, timeout: Duration::from_secs(10) }
    }
}

impl Default for DcgmSettings {
    fn default() -> Self {
        Self {
            // The image in NVIDIA's README and Helm chart (NVIDIA/dcgm-exporter, README.md,
            // deployment/values.yaml).
            image: "nvcr.io/nvidia/k8s/dcgm-exporter:4.5.3-4.8.2-distroless".into(),
            listen: "127.0.0.1:9400".into(),
        }
    }
}

impl Default for StateSettings {
    fn default() -> Self {
        Self {
            dir: "/run/supernode-agent".into(),
            persistent_dir: "/var/lib/supernode-agent".into(),
        }
    }
}

/// Error for settings that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("cannot read the settings {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The content of the file is invalid.
    #[error("invalid settings {}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: InvalidSettings,
    },
}

/// Error for the content of a settings file.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum InvalidSettings {
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{}", .0.to_string().trim_end())]
    Toml(Box<toml::de::Error>),
    /// Values that are not accepted.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Values(Vec<InvalidSetting>),
}

/// A value that is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {value}: {accepted}")]
pub struct InvalidSetting {
    key: &'static str,
    value: String,
    accepted: &'static str,
}

impl Settings {
    /// Reads `path`. Without a path, reads the default file, or returns the defaults if it does not
    /// exist.
    ///
    /// # Errors
    /// When the file cannot be read, is not TOML, or has an unknown key or a value that is not
    /// accepted.
    pub fn load(path: Option<&Path>) -> Result<Self, SettingsError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(file) {
            Ok(text) => Self::parse(&text)
                .map_err(|source| SettingsError::Invalid { path: file.into(), source }),
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(SettingsError::Unreadable { path: file.into(), source }),
        }
    }

    fn parse(text: &str) -> Result<Self, InvalidSettings> {
        let settings: Self =
            toml::from_str(text).map_err(|error| InvalidSettings::Toml(Box::new(error)))?;
        let invalid = settings.invalid_values();
        if invalid.is_empty() { Ok(settings) } else { Err(InvalidSettings::Values(invalid)) }
    }

    /// Returns the values that have the right type but are not accepted.
    fn invalid_values(&self) -> Vec<InvalidSetting> {
        let checks = [self.invalid_gpu_and_docker(), self.invalid_container(), self.invalid_rest()];
        checks.into_iter().flatten().collect()
    }

    fn invalid_gpu_and_docker(&self) -> Vec<InvalidSetting> {
        let Self { context, gpu, docker, .. } = self;
        let probe_seconds = gpu.probe_timeout.as_secs();
        let reload = &docker.reload_command;
        [
            absolute_path("context.dir", &context.dir),
            absolute_path("gpu.sysfs", &gpu.sysfs),
            program("gpu.nvml_library", &gpu.nvml_library),
            unless(probe_seconds > 0, "gpu.probe_timeout_seconds", probe_seconds, AT_LEAST_1),
            absolute_path("docker.socket", &docker.socket),
            absolute_path("docker.daemon_json", &docker.daemon_json),
            program("docker.runtime_path", &docker.runtime_path),
            unless(
                reload.first().is_some_and(|program| is_program(program)),
                "docker.reload_command",
                format_args!("{reload:?}"),
                "must begin with a program, by its name or its absolute path",
            ),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn invalid_container(&self) -> Vec<InvalidSetting> {
        let ContainerSettings {
            name,
            data_dir,
            certs_dir,
            prebaked_dir,
            log_driver,
            shm_size_mib,
            ..
        } = &self.container;
        let log_driver = log_driver.trim();
        // The names that Docker accepts (moby, daemon/names).
        let is_name = name.len() >= 2
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        [
            unless(
                is_name,
                "container.name",
                format_args!("{name:?}"),
                "must be letters, digits, '_', '.' and '-', two or more, the first a letter or a \
                 digit",
            ),
            absolute_path("container.data_dir", data_dir),
            absolute_path("container.certs_dir", certs_dir),
            absolute_path("container.prebaked_dir", prebaked_dir),
            unless(
                !log_driver.is_empty(),
                "container.log_driver",
                format_args!("{log_driver:?}"),
                "must be auto or a Docker log driver",
            ),
            unless(
                *shm_size_mib <= MAX_SHM_MIB,
                "container.shm_size_mib",
                shm_size_mib,
                "must be at most 8796093022207: Docker counts in bytes, up to 2^63 - 1",
            ),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn invalid_rest(&self) -> Vec<InvalidSetting> {
        let Self { system, onegate, metrics, dcgm, state, .. } = self;
        [
            absolute_path("system.root", &system.root),
            unless(
                onegate.ca_file.as_ref().is_none_or(|file| file.is_absolute()),
                "onegate.ca_file",
                format_args!("{:?}", onegate.ca_file.as_deref().unwrap_or(Path::new(""))),
                "must be an absolute path, or empty",
            ),
            unless(
                !onegate.timeout.is_zero(),
                "onegate.timeout_seconds",
                onegate.timeout.as_secs(),
                AT_LEAST_1,
            ),
            unless(
                metrics.listen.is_empty() || metrics.address().is_some(),
                "metrics.listen",
                format_args!("{:?}", metrics.listen),
                "must be an IP address and a port from 1 to 65535, such as 127.0.0.1:9401 or \
                 [::1]:9401, or empty",
            ),
            unless(
                ImageRef::parse(&dcgm.image).is_ok(),
                "dcgm.image",
                format_args!("{:?}", dcgm.image),
                "must be an image reference [host[:port]/]name[:tag][@sha256:digest]",
            ),
            unless(
                dcgm.address().is_some(),
                "dcgm.listen",
                format_args!("{:?}", dcgm.listen),
                "must be an IP address and a port from 1 to 65535, such as 127.0.0.1:9400 or \
                 [::1]:9400",
            ),
            absolute_path("state.dir", &state.dir),
            absolute_path("state.persistent_dir", &state.persistent_dir),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

const AT_LEAST_1: &str = "must be at least 1";

fn unless(
    is_valid: bool,
    key: &'static str,
    value: impl fmt::Display,
    accepted: &'static str,
) -> Option<InvalidSetting> {
    (!is_valid).then(|| InvalidSetting { key, value: value.to_string(), accepted })
}

fn absolute_path(key: &'static str, path: &Path) -> Option<InvalidSetting> {
    unless(path.is_absolute(), key, format_args!("{path:?}"), "must be an absolute path")
}

fn program(key: &'static str, name: &str) -> Option<InvalidSetting> {
    unless(is_program(name), key, format_args!("{name:?}"), "must be a name or an absolute path")
}

/// Returns whether `name` is a file name or an absolute path. A relative path would depend on the
/// working directory of the agent.
fn is_program(name: &str) -> bool {
    !name.trim().is_empty() && (name.starts_with('/') || !name.contains('/'))
}

fn path_unless_empty<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<PathBuf>, D::Error> {
    PathBuf::deserialize(deserializer).map(|path| Some(path).filter(|path| path != Path::new("")))
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    u32::deserialize(deserializer).map(|seconds| Duration::from_secs(seconds.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn example_file_shows_all_defaults() {
        let example = include_str!("../../../packaging/examples/agent.toml");
        assert_eq!(Settings::parse(example), Ok(Settings::default()));
        assert_eq!(Settings::parse(""), Ok(Settings::default()));
    }

    #[test]
    fn error_names_the_key_or_the_line() {
        for (text, words) in [
            ("[gpu]\nwait_second = 3\n", "wait_second"),
            ("[gpu]\non_late = \"restart\"\n", "on_available"),
            ("[state]\nlasting_dir = \"/x\"\n", "persistent_dir"),
            ("[machine]\nroot = \"/\"\n", "system"),
            ("[gpus]\n", "gpus"),
            ("[gpu]\nwait_seconds = -1\n", "line 2"),
            ("[gpu]\nwait_seconds = \"3\"\n", "line 2"),
            ("[gpu]\ninjection = \"magic\"\n", "auto"),
            ("[gpu\n", "line 1"),
        ] {
            let message = Settings::parse(text).unwrap_err().to_string();
            assert!(message.contains(words), "{text}: {message}");
        }
    }

    #[test]
    fn invalid_value_is_reported_with_what_is_accepted() {
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
            ("system", "root = \"\"", absolute),
            ("onegate", "ca_file = \"ca.crt\"", "must be an absolute path, or empty"),
            ("onegate", "timeout_seconds = 0", "must be at least 1"),
            ("metrics", "listen = \"localhost:9401\"", "must be an IP address and a port"),
            ("metrics", "listen = \":9401\"", "must be an IP address and a port"),
            ("metrics", "listen = \"127.0.0.1\"", "must be an IP address and a port"),
            ("metrics", "listen = \"127.0.0.1:0\"", "must be an IP address and a port"),
            ("dcgm", "image = \"\"", "must be an image reference"),
            ("dcgm", "listen = \"\"", "must be an IP address and a port"),
            ("state", "dir = \"state\"", absolute),
            ("state", "persistent_dir = \"\"", absolute),
        ] {
            let text = format!("[{section}]\n{setting}\n");
            let message = Settings::parse(&text).expect_err(setting).to_string();
            assert!(
                message.starts_with(&format!("{section}.{setting}: {accepted}")),
                "{setting}: {message}"
            );
        }
        let maximum = "[container]\nshm_size_mib = 8796093022207\n[gpu]\nnvml_library = \
                       \"/opt/libnvidia-ml.so.1\"\n";
        assert_eq!(
            Settings::parse(maximum).map(|settings| settings.container.shm_size_mib),
            Ok((1 << 43) - 1)
        );
        let address = Settings::parse("[metrics]\nlisten = \"[::1]:9401\"\n")
            .map(|settings| settings.metrics.address());
        assert_eq!(address, Ok("[::1]:9401".parse().ok()));
    }

    #[test]
    fn all_invalid_values_are_reported_together() {
        let error =
            Settings::parse("[state]\ndir = \"\"\n[gpu]\nprobe_timeout_seconds = 0\n").unwrap_err();
        assert_eq!(
            error.to_string(),
            "gpu.probe_timeout_seconds = 0: must be at least 1; state.dir = \"\": must be an \
             absolute path"
        );
    }
}
