//! Thin Docker client on top of bollard: the calls that the agent needs, with time limits, and
//! typed results instead of HTTP status codes.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bollard::Docker;
use bollard::errors::Error as ApiError;
use bollard::models::{
    ContainerCreateBody, DeviceRequest, HostConfig, HostConfigLogConfig, Mount, MountType,
    NetworkSettings, PortBinding, RestartPolicy, RestartPolicyNameEnum,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, CreateImageOptionsBuilder, EventsOptionsBuilder,
    InspectContainerOptions, ListContainersOptionsBuilder, LogsOptionsBuilder,
    RemoveContainerOptionsBuilder, StartContainerOptions, StopContainerOptionsBuilder,
    WaitContainerOptions,
};
use futures_util::StreamExt as _;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::config::settings::Settings;
use crate::docker::log::Log;
use crate::docker::ping::api_version;
use crate::docker::pull_progress::PullProgress;
use crate::docker::spec::{ContainerSpec, MountSpec, PortSpec, SPEC_HASH_LABEL, STATE_DIR_LABEL};
use crate::logging::error_chain;
use crate::system::time::parse_utc;
use crate::values::ImageRef;
use crate::values::sanitize_line;

/// Time limit of one call, unless the call waits for an event.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit of a container start, which initialises the driver if it is the first with a GPU.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// Time without any progress after which a pull has failed.
const PULL_STALL_TIMEOUT: Duration = Duration::from_secs(300);
/// Time limit for streams, which may be silent for as long as the container runs.
const STREAM_TIMEOUT: Duration = Duration::from_secs(u32::MAX as u64);
/// Delay between attempts to connect to an engine that is starting.
const CONNECT_RETRY_DELAY: Duration = Duration::from_millis(250);

/// A connection to an engine that has answered a ping.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    docker: Docker,
}

/// Why a call to the engine failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineError {
    /// No response to a ping.
    #[error("the Docker engine at {socket} does not answer: {message}")]
    Unreachable {
        socket: String,
        /// Why the ping failed, sanitised.
        message: String,
    },
    /// Docker answered with an error status.
    #[error("Docker refused to {operation} (HTTP {status}): {message}")]
    Refused {
        operation: &'static str,
        status: u16,
        /// Docker's message, sanitised.
        message: String,
    },
    /// The call failed without an HTTP status.
    #[error("cannot {operation}: {message}")]
    Failed {
        operation: &'static str,
        /// Why it failed, sanitised.
        message: String,
    },
    /// No response in time.
    #[error("cannot {operation}: no response from Docker within {} s", .timeout.as_secs())]
    TimedOut { operation: &'static str, timeout: Duration },
}

/// Substrings of error messages of moby and containerd for failed starts that the GPU did not
/// cause.
const FAILURES_WITHOUT_GPU: &[&str] = &[
    "already in use",
    "bind source path does not exist",
    "cannot allocate memory",
    "code = unavailable",
    "connection error",
    "connection refused",
    "container process: exec:",
    "invalid mount config",
    "log driver",
    "logging driver",
    "logging plugin",
    "no space left on device",
    "no such container",
    "no such image",
    "process caused: exec:",
    "read-only file system",
    "too many open files",
    "transport is closing",
];

impl EngineError {
    fn new(operation: &'static str) -> impl Fn(ApiError) -> Self {
        move |error| match error {
            ApiError::DockerResponseServerError { status_code, message } => {
                Self::Refused { operation, status: status_code, message: sanitize_line(&message) }
            }
            error => Self::Failed { operation, message: sanitize_line(&error_chain(&error)) },
        }
    }

    fn has_status(&self, expected: u16) -> bool {
        matches!(self, Self::Refused { status, .. } if *status == expected)
    }

    /// Returns Docker's message if the GPU may be the cause of a failed start; `None` if a
    /// container without a GPU would have failed as well.
    pub(crate) fn gpu_start_failure(&self) -> Option<String> {
        match self {
            // 404 and 409: the container or its image is gone, or the name is in use.
            Self::Refused { status: 400 | 500, message, .. } => {
                let text = message.to_lowercase();
                let without_gpu = FAILURES_WITHOUT_GPU.iter().any(|part| text.contains(part));
                (!without_gpu).then(|| message.clone())
            }
            Self::TimedOut { timeout, .. } => {
                Some(format!("the container did not start within {} s", timeout.as_secs()))
            }
            _ => None,
        }
    }
}

/// Runs one call with a time limit that includes the body of the response. bollard's own limit ends
/// with the response headers.
async fn with_timeout<T>(
    operation: &'static str,
    timeout: Duration,
    call: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, EngineError> {
    let start = Instant::now();
    let result = tokio::time::timeout(timeout, call).await;
    tracing::debug!("Docker took {} µs to {operation}", start.elapsed().as_micros());
    match result {
        Ok(result) => result.map_err(EngineError::new(operation)),
        Err(_) => Err(EngineError::TimedOut { operation, timeout }),
    }
}

/// Properties of the engine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct EngineInfo {
    pub version: String,
    /// Path of each runtime by name; empty for a containerd shim.
    pub runtimes: BTreeMap<String, String>,
    /// CDI devices that it has discovered (reported by Docker 28 and later).
    pub cdi_devices: Vec<String>,
    /// Directory of its images.
    pub data_root: Option<String>,
}

/// A local image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    pub id: String,
    env: Vec<String>,
}

impl Image {
    /// Returns the value of an environment variable of the image.
    pub(crate) fn variable(&self, name: &str) -> Option<String> {
        let mut variables = self.env.iter().filter_map(|line| line.split_once('='));
        variables.find(|(variable, _)| *variable == name).map(|(_, value)| value.to_owned())
    }
}

/// State of a container as the engine reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Container {
    pub id: String,
    /// Whether it is running; also true while it is paused.
    pub running: bool,
    pub paused: bool,
    /// Process ID of its init process on the host; 0 if it is not running.
    pub pid: u32,
    /// Time of the last start (RFC 3339, UTC).
    pub started_at: String,
    pub exit_code: i64,
    pub image: String,
    /// ID of its image; the name may refer to another image by now.
    pub image_id: String,
    pub labels: HashMap<String, String>,
    /// Address in a Docker network; `None` with the host's network, or if it is not running.
    pub ip_address: Option<IpAddr>,
}

impl Container {
    /// Returns the time of the last start.
    pub(crate) fn started(&self) -> Option<SystemTime> {
        parse_utc(&self.started_at)
    }

    /// Returns the time since the last start; zero if it is unknown.
    pub(crate) fn running_for(&self) -> Duration {
        let since = self.started().and_then(|started| started.elapsed().ok());
        since.unwrap_or_default()
    }

    /// Returns the hash of the container spec; `None` if the agent did not create the container.
    pub(crate) fn spec_hash(&self) -> Option<&str> {
        self.labels.get(SPEC_HASH_LABEL).map(String::as_str)
    }

    /// Whether the container was created from `spec` and has all its labels. A label with an
    /// outdated verdict would be wrong.
    pub(crate) fn was_created_from(&self, spec: &ContainerSpec) -> bool {
        let same = |(name, value): (&String, &String)| self.labels.get(name) == Some(value);
        self.spec_hash() == Some(&spec.hash()) && spec.labels.iter().all(same)
    }
}

impl Client {
    /// Connects to the engine, without retries.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub(crate) async fn connect(socket: &Path) -> Result<Self, EngineError> {
        let unreachable = |message: String| EngineError::Unreachable {
            socket: socket.display().to_string(),
            message,
        };
        let start = Instant::now();
        let result = tokio::time::timeout(CALL_TIMEOUT, api_version(socket)).await;
        tracing::debug!("Docker took {} µs to answer a ping", start.elapsed().as_micros());
        let version = result
            .map_err(|_| unreachable(format!("no response within {} s", CALL_TIMEOUT.as_secs())))?
            .map_err(|error| unreachable(sanitize_line(&error_chain(&error))))?;
        let docker =
            Docker::connect_with_unix(&socket.to_string_lossy(), CALL_TIMEOUT.as_secs(), &version)
                .map_err(|error| unreachable(sanitize_line(&error_chain(&error))))?;
        Ok(Self { docker })
    }

    /// Waits at most `timeout` for an engine that is still starting.
    ///
    /// # Errors
    /// The last error, after the timeout.
    pub(crate) async fn wait_until_ready(
        socket: &Path,
        timeout: Duration,
    ) -> Result<Self, EngineError> {
        let deadline = Instant::now() + timeout;
        loop {
            let attempt = tokio::time::timeout_at(
                deadline.max(Instant::now() + CONNECT_RETRY_DELAY),
                Self::connect(socket),
            )
            .await;
            let error = match attempt {
                Ok(Ok(client)) => return Ok(client),
                Ok(Err(error)) => error,
                Err(_) => EngineError::Unreachable {
                    socket: socket.display().to_string(),
                    message: format!("no response within {} s", timeout.as_secs()),
                },
            };
            if Instant::now() + CONNECT_RETRY_DELAY >= deadline {
                return Err(error);
            }
            tokio::time::sleep(CONNECT_RETRY_DELAY).await;
        }
    }

    /// Returns the properties of the engine.
    ///
    /// # Errors
    /// If the call fails.
    pub(crate) async fn info(&self) -> Result<EngineInfo, EngineError> {
        let info = with_timeout("report its properties", CALL_TIMEOUT, self.docker.info()).await?;
        Ok(EngineInfo {
            version: info.server_version.unwrap_or_default(),
            data_root: info.docker_root_dir,
            runtimes: info
                .runtimes
                .unwrap_or_default()
                .into_iter()
                .map(|(name, runtime)| (name, runtime.path.unwrap_or_default()))
                .collect(),
            cdi_devices: info
                .discovered_devices
                .unwrap_or_default()
                .into_iter()
                .filter(|device| device.source.as_deref() == Some("cdi"))
                .filter_map(|device| device.id)
                .collect(),
        })
    }

    /// Returns the local image with this name or ID.
    ///
    /// # Errors
    /// If the call fails.
    pub(crate) async fn find_image(&self, name: &str) -> Result<Option<Image>, EngineError> {
        match with_timeout("inspect the image", CALL_TIMEOUT, self.docker.inspect_image(name)).await
        {
            Ok(image) => Ok(Some(Image {
                id: image.id.unwrap_or_default(),
                env: image.config.and_then(|config| config.env).unwrap_or_default(),
            })),
            Err(error) if error.has_status(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Pulls `image` and passes each change of the progress to `on_progress`.
    ///
    /// # Errors
    /// If the image cannot be pulled, or the pull stalls.
    pub(crate) async fn pull(
        &self,
        image: &ImageRef,
        mut on_progress: impl FnMut(String),
    ) -> Result<(), EngineError> {
        const OPERATION: &str = "pull the image";
        let options = CreateImageOptionsBuilder::default().from_image(image.as_str()).build();
        let mut messages = self.docker.create_image(Some(options), None, None);
        let mut progress = PullProgress::default();
        loop {
            let next = tokio::time::timeout(PULL_STALL_TIMEOUT, messages.next()).await;
            let timeout = PULL_STALL_TIMEOUT;
            let next = next.map_err(|_| EngineError::TimedOut { operation: OPERATION, timeout })?;
            let Some(message) = next else {
                return Ok(());
            };
            let message = message.map_err(EngineError::new(OPERATION))?;
            if let Some(error) = message.error_detail.and_then(|detail| detail.message) {
                return Err(EngineError::Failed {
                    operation: OPERATION,
                    message: sanitize_line(&error),
                });
            }
            let bytes = message.progress_detail.and_then(|detail| {
                Some((u64::try_from(detail.current?).ok()?, u64::try_from(detail.total?).ok()?))
            });
            progress.update(
                message.id.as_deref().unwrap_or_default(),
                message.status.as_deref().unwrap_or_default(),
                bytes,
            );
            if let Some(summary) = progress.summary() {
                on_progress(summary);
            }
        }
    }

    /// Returns the container with this name or ID.
    ///
    /// # Errors
    /// If the call fails.
    pub(crate) async fn inspect_container(
        &self,
        name: &str,
    ) -> Result<Option<Container>, EngineError> {
        let call = self.docker.inspect_container(name, None::<InspectContainerOptions>);
        match with_timeout("inspect the container", CALL_TIMEOUT, call).await {
            Ok(container) => {
                let state = container.state.unwrap_or_default();
                let config = container.config.unwrap_or_default();
                Ok(Some(Container {
                    id: container.id.unwrap_or_default(),
                    running: state.running.unwrap_or(false),
                    pid: state.pid.and_then(|pid| pid.try_into().ok()).unwrap_or(0),
                    paused: state.paused.unwrap_or(false),
                    started_at: state.started_at.unwrap_or_default(),
                    exit_code: state.exit_code.unwrap_or(0),
                    image: config.image.unwrap_or_default(),
                    image_id: container.image.unwrap_or_default(),
                    labels: config.labels.unwrap_or_default(),
                    ip_address: container.network_settings.and_then(ip_address_in),
                }))
            }
            Err(error) if error.has_status(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns the names of the running containers of this node that have a name other than
    /// `container.name`.
    ///
    /// # Errors
    /// If the call fails.
    pub(crate) async fn find_orphans(
        &self,
        settings: &Settings,
    ) -> Result<Vec<String>, EngineError> {
        let filters = HashMap::from([(
            "label",
            vec![format!("{STATE_DIR_LABEL}={}", settings.state.dir.display())],
        )]);
        let options = ListContainersOptionsBuilder::default().filters(&filters).build();
        let call = self.docker.list_containers(Some(options));
        let containers =
            with_timeout("list the containers of the node", CALL_TIMEOUT, call).await?;
        // Docker prefixes names with a slash.
        let names =
            containers.into_iter().filter_map(|container| container.names?.into_iter().next());
        let names = names.map(|name| name.trim_start_matches('/').to_owned());
        Ok(names.filter(|name| *name != settings.container.name).collect())
    }

    /// Creates the container and returns its ID.
    ///
    /// # Errors
    /// If Docker rejects the container spec, or the call fails.
    pub(crate) async fn create(&self, spec: &ContainerSpec) -> Result<String, EngineError> {
        let options = CreateContainerOptionsBuilder::default().name(&spec.name).build();
        let call = self.docker.create_container(Some(options), create_body(spec));
        with_timeout("create the container", CALL_TIMEOUT, call).await.map(|created| created.id)
    }

    /// Starts the container, unless it is running already.
    ///
    /// # Errors
    /// If Docker cannot start it, or the call fails.
    pub(crate) async fn start(&self, id: &str) -> Result<(), EngineError> {
        // bollard's own limit must not expire first.
        let docker = self.docker.clone().with_timeout(START_TIMEOUT * 2);
        let call = docker.start_container(id, None::<StartContainerOptions>);
        match with_timeout("start the container", START_TIMEOUT, call).await {
            Err(error) if !error.has_status(304) => Err(error),
            _ => Ok(()),
        }
    }

    /// Stops the container, with `grace` between SIGTERM and SIGKILL. A container that is not
    /// running or does not exist is no error.
    ///
    /// # Errors
    /// If the call fails.
    pub(crate) async fn stop(&self, id: &str, grace: Duration) -> Result<(), EngineError> {
        let seconds = i32::try_from(grace.as_secs()).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::default().t(seconds).build();
        // Docker answers only after the container has exited.
        let timeout = CALL_TIMEOUT + grace;
        let docker = self.docker.clone().with_timeout(timeout * 2);
        match with_timeout("stop the container", timeout, docker.stop_container(id, Some(options)))
            .await
        {
            Err(error) if !error.has_status(304) && !error.has_status(404) => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes the container, running or not. A container that does not exist is no error. The
    /// anonymous volumes of a container that the agent did not create are kept.
    ///
    /// # Errors
    /// If the call fails.
    pub(crate) async fn remove(&self, container: &Container) -> Result<(), EngineError> {
        let is_ours = container.spec_hash().is_some();
        let options = RemoveContainerOptionsBuilder::default().force(true).v(is_ours).build();
        let call = self.docker.remove_container(&container.id, Some(options));
        match with_timeout("remove the container", CALL_TIMEOUT, call).await {
            Err(error) if !error.has_status(404) => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits until the container is paused, or, if `paused` is false, unpaused. If the event stream
    /// ends, subscribes again with backoff.
    pub(crate) async fn wait_for_paused(&self, id: &str, paused: bool) {
        const INITIAL_DELAY: Duration = Duration::from_secs(1);
        const MAX_DELAY: Duration = Duration::from_secs(30);
        let action = if paused { "pause" } else { "unpause" };
        let filters = HashMap::from([("container", vec![id]), ("event", vec!["pause", "unpause"])]);
        let mut backoff = Backoff::new(INITIAL_DELAY, MAX_DELAY);
        loop {
            // Subscribing to the events since now includes those between the inspection and the
            // subscription.
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let container = self.inspect_container(id).await.ok().flatten();
            if container.is_some_and(|container| container.running && container.paused == paused) {
                return;
            }
            let options =
                EventsOptionsBuilder::default().since(&since.to_string()).filters(&filters).build();
            let client = self.docker.clone().with_timeout(STREAM_TIMEOUT);
            let mut events = client.events(Some(options));
            while let Some(Ok(event)) = events.next().await {
                if event.action.as_deref() == Some(action) {
                    return;
                }
            }
            tokio::time::sleep(backoff.next_delay(0.0)).await;
        }
    }

    /// Waits until the container exits and returns its exit code; `None` if the engine or the
    /// container is gone.
    pub(crate) async fn wait_for_exit(&self, id: &str) -> Option<i64> {
        match self.docker.wait_container(id, None::<WaitContainerOptions>).next().await {
            Some(Ok(exit)) => Some(exit.status_code),
            // bollard reports every exit code except 0 as an error.
            Some(Err(ApiError::DockerContainerWaitError { code, .. })) => Some(code),
            Some(Err(_)) | None => None,
        }
    }

    /// Follows the container's log from its last start; output of earlier runs is omitted. Works
    /// with every log driver that Docker can read.
    pub(crate) fn log(&self, container: &Container) -> Log {
        // `since` has a resolution of one second. Output of a run that ended in the same second
        // would be included, but the agent delays every restart.
        let since = container
            .started()
            .and_then(|started| started.duration_since(SystemTime::UNIX_EPOCH).ok());
        let options = LogsOptionsBuilder::default()
            .follow(true)
            .stdout(true)
            .stderr(true)
            .since(since.and_then(|since| since.as_secs().try_into().ok()).unwrap_or(0))
            .build();
        // Docker before 27 sends the response headers only with the first line.
        let docker = self.docker.clone().with_timeout(STREAM_TIMEOUT);
        let id = container.id.clone();
        Log::new(move || docker.logs(&id, Some(options.clone())))
    }
}

fn ip_address_in(settings: NetworkSettings) -> Option<IpAddr> {
    // Sorted by name, so that the result is always the same.
    let networks: BTreeMap<String, _> = settings.networks?.into_iter().collect();
    let addresses = networks
        .into_values()
        .flat_map(|network| [network.ip_address, network.global_ipv6_address]);
    addresses.flatten().find_map(|address| address.parse().ok())
}

fn create_body(spec: &ContainerSpec) -> ContainerCreateBody {
    let mount = |mount: &MountSpec| Mount {
        target: Some(mount.target.clone()),
        source: Some(mount.source.clone()),
        typ: Some(MountType::BIND),
        read_only: Some(mount.read_only),
        ..Mount::default()
    };
    let port_key = |port: &PortSpec| format!("{}/tcp", port.port);
    let binding = |port: &PortSpec| PortBinding {
        host_ip: Some(port.listen.ip().to_string()),
        host_port: Some(port.listen.port().to_string()),
    };
    ContainerCreateBody {
        image: Some(spec.image.clone()),
        cmd: Some(spec.args.clone()),
        env: Some(spec.env.iter().map(|(name, value)| format!("{name}={value}")).collect()),
        labels: Some(spec.labels.clone().into_iter().collect()),
        user: Some(spec.user.clone()),
        exposed_ports: Some(spec.ports.iter().map(port_key).collect()),
        // PID 1 of the container is Docker's init, which forwards the signal.
        stop_signal: Some("SIGTERM".into()),
        host_config: Some(HostConfig {
            runtime: Some(spec.runtime.clone()),
            device_requests: (!spec.cdi_devices.is_empty()).then(|| {
                vec![DeviceRequest {
                    driver: Some("cdi".into()),
                    device_ids: Some(spec.cdi_devices.clone()),
                    ..DeviceRequest::default()
                }]
            }),
            port_bindings: Some(
                spec.ports.iter().map(|port| (port_key(port), Some(vec![binding(port)]))).collect(),
            ),
            mounts: Some(spec.mounts.iter().map(mount).collect()),
            tmpfs: Some(spec.tmpfs.clone().into_iter().collect()),
            cap_drop: Some(vec!["ALL".into()]),
            security_opt: Some(vec!["no-new-privileges".into()]),
            init: Some(true),
            pids_limit: Some(spec.pids_limit),
            shm_size: i64::try_from(spec.shm_size_mib << 20).ok(),
            log_config: Some(HostConfigLogConfig {
                typ: Some(spec.log_driver.clone()),
                config: Some(spec.log_options.clone().into_iter().collect()),
            }),
            restart_policy: Some(RestartPolicy {
                name: Some(RestartPolicyNameEnum::NO),
                maximum_retry_count: None,
            }),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

#[cfg(test)]
mod tests {
    use bollard::models::EndpointSettings;

    use super::*;

    #[test]
    fn parses_start_time_and_running_time() {
        let container =
            |started_at: &str| Container { started_at: started_at.into(), ..Container::default() };
        let started = |text| {
            container(text).started().and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok())
        };
        assert_eq!(
            started("2026-11-26T16:11:13.123456789Z"),
            Some(Duration::new(1_795_709_473, 123_456_789))
        );
        assert_eq!(
            started("2026-11-26T16:11:13.5Z"),
            Some(Duration::new(1_795_709_473, 500_000_000))
        );
        assert_eq!(started("2026-11-26T16:11:13Z"), Some(Duration::from_secs(1_795_709_473)));
        // A container that was never started.
        assert_eq!(started("0001-01-01T00:00:00Z"), None);
        assert_eq!(started(""), None);
        assert!(container("2024-01-01T00:00:00Z").running_for() > Duration::from_secs(86_400));
        assert_eq!(container("9999-01-01T00:00:00Z").running_for(), Duration::ZERO);
    }

    #[test]
    fn address_is_from_first_network_that_has_one() {
        let network = |v4: &str, v6: &str| EndpointSettings {
            ip_address: Some(v4.into()),
            global_ipv6_address: Some(v6.into()),
            ..EndpointSettings::default()
        };
        let address = |networks: Vec<(&str, EndpointSettings)>| {
            let networks =
                networks.into_iter().map(|(name, network)| (name.to_owned(), network)).collect();
            ip_address_in(NetworkSettings {
                networks: Some(networks),
                ..NetworkSettings::default()
            })
            .map(|address| address.to_string())
        };
        assert_eq!(address(vec![("host", network("", ""))]), None);
        assert_eq!(
            address(vec![("bridge", network("172.17.0.2", ""))]).as_deref(),
            Some("172.17.0.2")
        );
        assert_eq!(
            address(vec![("b", network("10.0.0.2", "")), ("a", network("", "fd00::2"))]).as_deref(),
            Some("fd00::2")
        );
    }
}
