//! Our words over bollard: what the agent asks of a container engine, and answers instead of status
//! codes.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::Path;
use std::str::FromStr as _;
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
use x509_cert::der::DateTime;

use crate::config::settings::Settings;
use crate::docker::log::Log;
use crate::docker::ping::api_version;
use crate::docker::pull_progress::PullProgress;
use crate::docker::spec::{ContainerSpec, MountSpec, PortSpec, SPEC_HASH_LABEL, STATE_DIR_LABEL};
use crate::logging::error_chain;
use crate::values::ImageRef;
use crate::values::sanitize_line;

/// How long one call may take as a whole, unless it waits for something by its nature.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// A start has more time: the first one with a GPU initialises the driver.
const START_LIMIT: Duration = Duration::from_secs(120);
/// A pull that says nothing for so long has come to a standstill.
const PULL_SILENCE: Duration = Duration::from_secs(300);
/// A container may say nothing for ever.
const LOG_SILENCE: Duration = Duration::from_secs(u32::MAX as u64);
const PAUSE: Duration = Duration::from_millis(250);

/// An engine that has answered.
#[derive(Debug, Clone)]
pub struct Client {
    docker: Docker,
}

/// What went wrong with the engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// It does not answer.
    #[error("the Docker engine at {socket} does not answer: {message}")]
    Unreachable {
        /// Its socket.
        socket: String,
        /// Why.
        message: String,
    },
    /// It refused a call.
    #[error("Docker refused to {operation} (HTTP {status}): {message}")]
    Refused {
        /// What was asked.
        operation: &'static str,
        /// The HTTP status.
        status: u16,
        /// Docker's own text.
        message: String,
    },
    /// The call failed on the way.
    #[error("could not {operation}: {message}")]
    Failed {
        /// What was asked.
        operation: &'static str,
        /// Why.
        message: String,
    },
    /// The call was not answered in time.
    #[error("could not {operation}: Docker gave no answer within {} s", .limit.as_secs())]
    TimedOut {
        /// What was asked.
        operation: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
}

/// What Docker says when it is not the GPU that keeps a container from its start (texts of moby and
/// containerd).
const TROUBLES_OF_ANY_CONTAINER: &[&str] = &[
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

    fn is_status(&self, wanted: u16) -> bool {
        matches!(self, Self::Refused { status, .. } if *status == wanted)
    }

    /// Docker's reason, where this is an answer to a launch with a GPU that it may owe to the GPU;
    /// `None` where any other container would have met with the same.
    pub fn gpu_start_failure(&self) -> Option<String> {
        match self {
            // 404 and 409: the container or its image are gone, or its name is taken.
            Self::Refused { status: 400 | 500, message, .. } => {
                let words = message.to_lowercase();
                let of_any =
                    TROUBLES_OF_ANY_CONTAINER.iter().any(|trouble| words.contains(trouble));
                (!of_any).then(|| message.clone())
            }
            Self::TimedOut { limit, .. } => {
                Some(format!("it had not started within {} s", limit.as_secs()))
            }
            _ => None,
        }
    }
}

/// One call, with a limit for all of it: the client's own limit ends with the head of the answer.
async fn limited<T>(
    operation: &'static str,
    limit: Duration,
    call: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, EngineError> {
    let since = Instant::now();
    let answer = tokio::time::timeout(limit, call).await;
    tracing::debug!("Docker took {} µs to {operation}", since.elapsed().as_micros());
    match answer {
        Ok(answer) => answer.map_err(EngineError::new(operation)),
        Err(_) => Err(EngineError::TimedOut { operation, limit }),
    }
}

/// What the engine says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EngineInfo {
    /// Its release.
    pub version: String,
    /// Its runtimes: name and path, which is empty for a containerd shim.
    pub runtimes: BTreeMap<String, String>,
    /// The CDI devices that it has discovered (Docker 28 and later report them).
    pub cdi_devices: Vec<String>,
    /// Where it keeps its images.
    pub data_root: Option<String>,
}

/// An image that the engine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its id.
    pub id: String,
    env: Vec<String>,
}

impl Image {
    /// What it sets the variable `name` to, where it sets it.
    pub fn variable(&self, name: &str) -> Option<String> {
        let mut variables = self.env.iter().filter_map(|line| line.split_once('='));
        variables.find(|(variable, _)| *variable == name).map(|(_, value)| value.to_owned())
    }
}

/// A container as the engine sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Whether it runs; a paused one does.
    pub running: bool,
    /// Whether somebody has paused it.
    pub paused: bool,
    /// The process id of its first process, on the host; 0 where none runs.
    pub pid: u32,
    /// When it was started last (RFC 3339, UTC).
    pub started_at: String,
    /// The exit code of the last run.
    pub exit_code: i64,
    /// The name of the image that it was made from.
    pub image: String,
    /// The id of that image; the name may mean another one by now.
    pub image_id: String,
    /// Its labels.
    pub labels: HashMap<String, String>,
    /// Its address in a network of Docker; none where it has the host's network, or has ended.
    pub ip_address: Option<IpAddr>,
}

impl Container {
    /// When it was started last.
    pub fn started(&self) -> Option<SystemTime> {
        let (second, rest) = self.started_at.split_at_checked(19)?;
        let second = DateTime::from_str(&format!("{second}Z")).ok()?;
        // The fraction of the second has as many digits as Docker likes.
        let digits: String =
            rest.chars().skip(1).take_while(char::is_ascii_digit).take(9).collect();
        let nanoseconds = format!("{digits:0<9}").parse().ok()?;
        Some(second.to_system_time() + Duration::from_nanos(nanoseconds))
    }

    /// For how long it has been running since it was started last; zero where that cannot be told.
    pub fn running_for(&self) -> Duration {
        let since = self.started().and_then(|started| started.elapsed().ok());
        since.unwrap_or_default()
    }

    /// The hash of the specification that it was made from, where it is ours.
    pub fn spec_hash(&self) -> Option<&str> {
        self.labels.get(SPEC_HASH_LABEL).map(String::as_str)
    }

    /// Whether it was made from this specification, its labels included: an old verdict in them
    /// would not be true any more.
    pub fn is_made_from(&self, spec: &ContainerSpec) -> bool {
        let same = |(name, value): (&String, &String)| self.labels.get(name) == Some(value);
        self.spec_hash() == Some(&spec.hash()) && spec.labels.iter().all(same)
    }
}

impl Client {
    /// Connects once.
    ///
    /// # Errors
    /// When the engine does not answer.
    pub async fn connect(socket: &Path) -> Result<Self, EngineError> {
        let unreachable = |message: String| EngineError::Unreachable {
            socket: socket.display().to_string(),
            message,
        };
        let since = Instant::now();
        let answer = tokio::time::timeout(CALL_LIMIT, api_version(socket)).await;
        tracing::debug!("Docker took {} µs to answer a ping", since.elapsed().as_micros());
        let version = answer
            .map_err(|_| unreachable(format!("no answer within {} s", CALL_LIMIT.as_secs())))?
            .map_err(|error| unreachable(sanitize_line(&error_chain(&error))))?;
        let docker =
            Docker::connect_with_unix(&socket.to_string_lossy(), CALL_LIMIT.as_secs(), &version)
                .map_err(|error| unreachable(sanitize_line(&error_chain(&error))))?;
        Ok(Self { docker })
    }

    /// Waits for an engine that is still starting, for at most `limit`.
    ///
    /// # Errors
    /// The last failure, when the time is over.
    pub async fn wait_until_ready(socket: &Path, limit: Duration) -> Result<Self, EngineError> {
        let deadline = Instant::now() + limit;
        loop {
            let attempt = tokio::time::timeout_at(
                deadline.max(Instant::now() + PAUSE),
                Self::connect(socket),
            )
            .await;
            let error = match attempt {
                Ok(Ok(engine)) => return Ok(engine),
                Ok(Err(error)) => error,
                Err(_) => EngineError::Unreachable {
                    socket: socket.display().to_string(),
                    message: format!("no answer within {} s", limit.as_secs()),
                },
            };
            if Instant::now() + PAUSE >= deadline {
                return Err(error);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// What the engine says of itself.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn info(&self) -> Result<EngineInfo, EngineError> {
        let info = limited("describe itself", CALL_LIMIT, self.docker.info()).await?;
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

    /// The image `name`, where the engine has it. An id is as good as a name.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn find_image(&self, name: &str) -> Result<Option<Image>, EngineError> {
        match limited("look for the image", CALL_LIMIT, self.docker.inspect_image(name)).await {
            Ok(found) => Ok(Some(Image {
                id: found.id.unwrap_or_default(),
                env: found.config.and_then(|config| config.env).unwrap_or_default(),
            })),
            Err(error) if error.is_status(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Pulls `image`; `progress` hears of it, in a few words, as often as the engine has something
    /// to say.
    ///
    /// # Errors
    /// When the image is not to be had.
    pub async fn pull(
        &self,
        image: &ImageRef,
        mut progress: impl FnMut(String),
    ) -> Result<(), EngineError> {
        const DOING: &str = "pull the image";
        let options = CreateImageOptionsBuilder::default().from_image(image.as_str()).build();
        let mut steps = self.docker.create_image(Some(options), None, None);
        let mut pull = PullProgress::default();
        loop {
            let step = tokio::time::timeout(PULL_SILENCE, steps.next()).await;
            let Some(step) =
                step.map_err(|_| EngineError::TimedOut { operation: DOING, limit: PULL_SILENCE })?
            else {
                return Ok(());
            };
            let step = step.map_err(EngineError::new(DOING))?;
            if let Some(error) = step.error_detail.and_then(|detail| detail.message) {
                return Err(EngineError::Failed { operation: DOING, message: error });
            }
            let bytes = step.progress_detail.and_then(|detail| {
                Some((u64::try_from(detail.current?).ok()?, u64::try_from(detail.total?).ok()?))
            });
            pull.take(
                step.id.as_deref().unwrap_or_default(),
                step.status.as_deref().unwrap_or_default(),
                bytes,
            );
            if let Some(words) = pull.progress() {
                progress(words);
            }
        }
    }

    /// The container `name`, where there is one. An id is as good as a name.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn inspect_container(&self, name: &str) -> Result<Option<Container>, EngineError> {
        let call = self.docker.inspect_container(name, None::<InspectContainerOptions>);
        match limited("look at the container", CALL_LIMIT, call).await {
            Ok(found) => {
                let state = found.state.unwrap_or_default();
                let config = found.config.unwrap_or_default();
                Ok(Some(Container {
                    id: found.id.unwrap_or_default(),
                    running: state.running.unwrap_or(false),
                    pid: state.pid.and_then(|pid| pid.try_into().ok()).unwrap_or(0),
                    paused: state.paused.unwrap_or(false),
                    started_at: state.started_at.unwrap_or_default(),
                    exit_code: state.exit_code.unwrap_or(0),
                    image: config.image.unwrap_or_default(),
                    image_id: found.image.unwrap_or_default(),
                    labels: config.labels.unwrap_or_default(),
                    ip_address: found.network_settings.and_then(ip_address_in),
                }))
            }
            Err(error) if error.is_status(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The names of this node's containers that run under another name than the settings give it.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn find_orphans(&self, settings: &Settings) -> Result<Vec<String>, EngineError> {
        let ours = HashMap::from([(
            "label",
            vec![format!("{STATE_DIR_LABEL}={}", settings.state.dir.display())],
        )]);
        let options = ListContainersOptionsBuilder::default().filters(&ours).build();
        let call = self.docker.list_containers(Some(options));
        let found = limited("look for other containers of the node", CALL_LIMIT, call).await?;
        // Docker puts a slash before names.
        let names = found.into_iter().filter_map(|container| container.names?.into_iter().next());
        let names = names.map(|name| name.trim_start_matches('/').to_owned());
        Ok(names.filter(|name| *name != settings.container.name).collect())
    }

    /// Makes the container and answers with its id.
    ///
    /// # Errors
    /// When Docker refuses the specification, or the call fails.
    pub async fn create(&self, spec: &ContainerSpec) -> Result<String, EngineError> {
        let options = CreateContainerOptionsBuilder::default().name(&spec.name).build();
        let call = self.docker.create_container(Some(options), body_of(spec));
        limited("create the container", CALL_LIMIT, call).await.map(|created| created.id)
    }

    /// Starts the container; one that runs already is fine.
    ///
    /// # Errors
    /// When Docker refuses to start it, or the call fails.
    pub async fn start(&self, id: &str) -> Result<(), EngineError> {
        // The client's own limit would come first.
        let patient = self.docker.clone().with_timeout(START_LIMIT * 2);
        let call = patient.start_container(id, None::<StartContainerOptions>);
        match limited("start the container", START_LIMIT, call).await {
            Err(error) if !error.is_status(304) => Err(error),
            _ => Ok(()),
        }
    }

    /// Stops the container, with `grace` between SIGTERM and SIGKILL; one that does not run, or is
    /// gone, is fine.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn stop(&self, id: &str, grace: Duration) -> Result<(), EngineError> {
        let seconds = i32::try_from(grace.as_secs()).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::default().t(seconds).build();
        // The answer comes after the grace: the call has this much more time than others.
        let limit = CALL_LIMIT + grace;
        let patient = self.docker.clone().with_timeout(limit * 2);
        match limited("stop the container", limit, patient.stop_container(id, Some(options))).await
        {
            Err(error) if !error.is_status(304) && !error.is_status(404) => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes the container, running or not; one that is gone is fine. What somebody else's
    /// container kept in volumes without a name stays.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn remove(&self, container: &Container) -> Result<(), EngineError> {
        let ours = container.spec_hash().is_some();
        let options = RemoveContainerOptionsBuilder::default().force(true).v(ours).build();
        let call = self.docker.remove_container(&container.id, Some(options));
        match limited("remove the container", CALL_LIMIT, call).await {
            Err(error) if !error.is_status(404) => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits until somebody has paused the container, or (`wanted` is false) lets it go on. Never,
    /// where it cannot be told.
    pub async fn wait_for_pause(&self, id: &str, wanted: bool) {
        let filters = HashMap::from([("container", vec![id]), ("event", vec!["pause", "unpause"])]);
        // What happens between the look and the listening is among the events since then.
        let since =
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().to_string();
        if matches!(self.inspect_container(id).await, Ok(Some(found)) if found.running && found.paused == wanted)
        {
            return;
        }
        let options = EventsOptionsBuilder::default().since(&since).filters(&filters).build();
        let mut events = self.docker.clone().with_timeout(LOG_SILENCE).events(Some(options));
        while let Some(Ok(event)) = events.next().await {
            if event.action.as_deref() == Some(if wanted { "pause" } else { "unpause" }) {
                return;
            }
        }
        std::future::pending().await
    }

    /// Waits until the container does not run any more and answers with its exit code; `None` when
    /// the engine went away or the container with it.
    pub async fn wait(&self, id: &str) -> Option<i64> {
        match self.docker.wait_container(id, None::<WaitContainerOptions>).next().await {
            Some(Ok(end)) => Some(end.status_code),
            // bollard makes an error of every code but 0.
            Some(Err(ApiError::DockerContainerWaitError { code, .. })) => Some(code),
            Some(Err(_)) | None => None,
        }
    }

    /// Follows what the container writes, from its last start on: what it wrote in an earlier life
    /// is left out. Docker reads its own log back, whichever driver keeps it, as long as that
    /// driver can be read.
    pub fn log(&self, container: &Container) -> Log {
        // Docker counts in seconds here: the last words of a life that ended in this very second
        // would be among them, were it not for the pause before a start.
        let since = container
            .started()
            .and_then(|started| started.duration_since(SystemTime::UNIX_EPOCH).ok());
        let options = LogsOptionsBuilder::default()
            .follow(true)
            .stdout(true)
            .stderr(true)
            .since(since.and_then(|since| since.as_secs().try_into().ok()).unwrap_or(0))
            .build();
        // Engines before 27 begin their answer with the first line, which may be long in coming.
        let patient = self.docker.clone().with_timeout(LOG_SILENCE);
        let id = container.id.clone();
        Log::new(move || patient.logs(&id, Some(options.clone())))
    }
}

fn ip_address_in(settings: NetworkSettings) -> Option<IpAddr> {
    // In the order of their names: the same one every time.
    let networks: BTreeMap<String, _> = settings.networks?.into_iter().collect();
    let addresses = networks
        .into_values()
        .flat_map(|network| [network.ip_address, network.global_ipv6_address]);
    addresses.flatten().find_map(|address| address.parse().ok())
}

fn body_of(spec: &ContainerSpec) -> ContainerCreateBody {
    let mount = |mount: &MountSpec| Mount {
        target: Some(mount.target.clone()),
        source: Some(mount.source.clone()),
        typ: Some(MountType::BIND),
        read_only: Some(mount.read_only),
        ..Mount::default()
    };
    let name_of_port = |port: &PortSpec| format!("{}/tcp", port.port);
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
        exposed_ports: Some(spec.ports.iter().map(name_of_port).collect()),
        // PID 1 of the container is Docker's init: the signal goes through it.
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
                spec.ports
                    .iter()
                    .map(|port| (name_of_port(port), Some(vec![binding(port)])))
                    .collect(),
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
    fn a_container_has_run_since_its_last_start() {
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
        // One that was never started.
        assert_eq!(started("0001-01-01T00:00:00Z"), None);
        assert_eq!(started(""), None);
        assert!(container("2024-01-01T00:00:00Z").running_for() > Duration::from_secs(86_400));
        assert_eq!(container("9999-01-01T00:00:00Z").running_for(), Duration::ZERO);
    }

    #[test]
    fn the_address_is_that_in_the_first_network_that_gives_one() {
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
