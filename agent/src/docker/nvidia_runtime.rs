//! GPU injection: registers the nvidia runtime with Docker, or selects CDI devices.
//!
//! Registration writes the runtime into daemon.json, reloads Docker and verifies the result through
//! the API.

use std::fs::{File, TryLockError};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::Instant;

use crate::config::settings::{DockerSettings, Injection};
use crate::docker::client::{Client, EngineError, EngineInfo};
use crate::docker::daemon_json::{self, InvalidDaemonJson, Merged, RUNTIME_NAME};
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::GpuDevice;
use crate::logging::error_chain;
use crate::system::atomic_file;
use crate::system::blocking::run_blocking;
use crate::system::programs::find_program;

/// Size limit of daemon.json.
const MAX_DAEMON_JSON_BYTES: u64 = 16 << 20;
/// Time limit of the reload command.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Time after the reload within which Docker must list the runtime.
const REGISTRATION_TIMEOUT: Duration = Duration::from_secs(10);
const REGISTRATION_POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Time to wait for the lock on the directory of daemon.json.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Maximum number of symbolic links to follow, as in Linux (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// How the container receives its GPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum GpuInjection {
    /// `HostConfig.Runtime=nvidia`.
    Runtime,
    /// CDI devices with these names.
    Cdi(Vec<String>),
}

/// Why the runtime cannot be added to daemon.json.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonJsonError {
    /// The file cannot be read or written.
    #[error("cannot {operation} {path}")]
    Io { path: PathBuf, operation: &'static str, source: io::Error },
    /// The content is not one valid JSON object.
    #[error("{path} is invalid")]
    Invalid { path: PathBuf, source: InvalidDaemonJson },
    /// The file changed while the agent edited it.
    #[error("{path} was changed by another process at the same time")]
    Changed { path: PathBuf },
}

/// Adds the nvidia runtime to daemon.json unless it is already there. Returns whether the file was
/// written.
///
/// # Errors
/// If the file cannot be read, is not one JSON object, or cannot be written. The file is then
/// unchanged.
pub(crate) fn configure_daemon_json(
    path: &Path,
    runtime_path: &str,
) -> Result<bool, DaemonJsonError> {
    let failed =
        |operation| move |source| DaemonJsonError::Io { path: path.into(), operation, source };
    let invalid = |source| DaemonJsonError::Invalid { path: path.into(), source };
    let target = resolve_links(path).map_err(failed("resolve the symbolic link"))?;
    let _lock = lock_dir(&target).map_err(failed("write"))?;
    let old = read(&target).map_err(failed("read"))?;
    let new = match &old {
        None => daemon_json::fresh(runtime_path),
        Some(bytes) => {
            let text = decode(bytes).map_err(invalid)?;
            match daemon_json::merge(text, runtime_path).map_err(invalid)? {
                Merged::Unchanged => return Ok(false),
                Merged::Changed(new) => new,
            }
        }
    };
    if new.len() as u64 > MAX_DAEMON_JSON_BYTES {
        // The next run could not read it.
        return Err(failed("write")(io::Error::other(
            "with the nvidia runtime it would be larger than 16 MiB",
        )));
    }
    let pending = atomic_file::prepare(&target, new.as_bytes()).map_err(failed("write"))?;
    if read(&target).map_err(failed("read"))? != old {
        pending.discard();
        return Err(DaemonJsonError::Changed { path: path.into() });
    }
    pending.commit().map_err(failed("write"))?;
    Ok(true)
}

/// Follows symbolic links from `path` to the file, which need not exist. The links are kept.
fn resolve_links(path: &Path) -> io::Result<PathBuf> {
    let mut target = path.to_owned();
    for _ in 0..=MAX_LINKS {
        target = match target.read_link() {
            Ok(next) => target.parent().unwrap_or(Path::new("/")).join(next),
            // Not a link, or absent.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::NotFound
                ) =>
            {
                return Ok(target);
            }
            Err(error) => return Err(error),
        };
    }
    Err(io::Error::other(format!("more than {MAX_LINKS} symbolic links, or a loop")))
}

/// Serialises `run` and `configure-runtime`, which would otherwise remove each other's temporary
/// file. The lock is on the directory, so that no lock file remains, and is held until the returned
/// file is dropped. `None` if the lock is unavailable; the caller continues without it. Blocks for
/// up to [`LOCK_TIMEOUT`].
fn lock_dir(target: &Path) -> io::Result<Option<File>> {
    let dir = target.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(dir)?;
    let dir = File::open(dir)?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match dir.try_lock() {
            Ok(()) => return Ok(Some(dir)),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_POLL_INTERVAL);
            }
            // An agent holds the lock for milliseconds only. Any user who can open the directory
            // can lock it, and must not block the agent.
            Err(TryLockError::WouldBlock) => return Ok(None),
            // The file system does not support locks.
            Err(TryLockError::Error(_)) => return Ok(None),
        }
    }
}

/// Returns the content of `path`, or `None` if it does not exist.
fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match path.metadata() {
        // Opening a FIFO would block until another process writes to it.
        Ok(metadata) if !metadata.is_file() => return Err(io::Error::other("not a regular file")),
        Ok(_) => File::open(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(MAX_DAEMON_JSON_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_DAEMON_JSON_BYTES {
        return Err(io::Error::other("larger than 16 MiB"));
    }
    Ok(Some(bytes))
}

fn decode(bytes: &[u8]) -> Result<&str, InvalidDaemonJson> {
    std::str::from_utf8(bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        InvalidDaemonJson {
            line: before.iter().filter(|byte| **byte == b'\n').count() + 1,
            column: String::from_utf8_lossy(&before[line_start..]).chars().count() + 1,
            message: "not UTF-8".into(),
        }
    })
}

/// Returns the injection method for these GPUs: the configured one, or with `auto` CDI if Docker
/// reports a CDI device for each of them.
pub(crate) fn choose_injection(
    injection: Injection,
    devices: &[GpuDevice],
    engine: Option<&EngineInfo>,
) -> GpuInjection {
    const KIND: &str = "nvidia.com/gpu=";
    let is_reported = |name: &str| {
        engine.is_some_and(|info| info.cdi_devices.iter().any(|device| device == name))
    };
    let by_uuid = |device: &GpuDevice| format!("{KIND}{}", device.uuid);
    let resolved: Option<Vec<String>> = devices
        .iter()
        .map(|device| {
            // nvidia-ctk names GPUs by index, by UUID, or by both.
            let by_index = format!("{KIND}{}", device.index);
            let is_whole_gpu = !device.uuid.is_mig();
            Some(by_uuid(device))
                .filter(|name| is_reported(name))
                .or_else(|| Some(by_index).filter(|name| is_whole_gpu && is_reported(name)))
        })
        .collect();
    match (injection, resolved) {
        (Injection::Runtime, _) | (Injection::Auto, None) => GpuInjection::Runtime,
        (Injection::Auto | Injection::Cdi, Some(names)) => GpuInjection::Cdi(names),
        (Injection::Cdi, None) => GpuInjection::Cdi(devices.iter().map(by_uuid).collect()),
    }
}

/// Ensures that Docker has registered the nvidia runtime: adds it to daemon.json, reloads Docker
/// and waits until the engine lists it.
///
/// # Errors
/// The finding for the fallback to the CPU.
pub(crate) async fn ensure_runtime(
    engine: &Client,
    info: &EngineInfo,
    settings: &DockerSettings,
) -> Result<(), Finding> {
    if let Some(path) = info.runtimes.get(RUNTIME_NAME) {
        return check_installed(path, settings);
    }
    if find_program(&settings.runtime_path).is_none() {
        return Err(Finding::new(
            Reason::RuntimeMissing,
            format!(
                "{} is not installed; Docker's runtimes are: {}",
                settings.runtime_path,
                info.runtimes.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
            ),
        ));
    }
    let not_configured = |summary: String| Finding::new(Reason::RuntimeNotConfigured, summary);
    let (path, runtime_path) = (settings.daemon_json.clone(), settings.runtime_path.clone());
    let written = run_blocking(move || configure_daemon_json(&path, &runtime_path))
        .await
        .map_err(|error| not_configured(error_chain(&error)))?;
    let file = settings.daemon_json.display();
    if written {
        tracing::info!("added the nvidia runtime to {file}");
    }
    reload(&settings.reload_command).await.map_err(|error| {
        not_configured(format!(
            "cannot reload Docker to register the nvidia runtime in {file}: {}",
            error_chain(&error)
        ))
    })?;
    let deadline = Instant::now() + REGISTRATION_TIMEOUT;
    loop {
        let result = engine.info().await;
        if let Some(path) = result.as_ref().ok().and_then(|info| info.runtimes.get(RUNTIME_NAME)) {
            return check_installed(path, settings);
        }
        if Instant::now() >= deadline {
            let cause =
                result.err().map_or(String::new(), |error: EngineError| format!(" ({error})"));
            return Err(not_configured(format!(
                "{file} has the nvidia runtime, but Docker did not register it after the \
                 reload{cause}"
            )));
        }
        tokio::time::sleep(REGISTRATION_POLL_INTERVAL).await;
    }
}

/// Checks that the program of the registered runtime exists.
fn check_installed(path: &str, settings: &DockerSettings) -> Result<(), Finding> {
    // An entry without a path is a containerd shim. A bare name is resolved in dockerd's PATH,
    // which can differ from the agent's.
    let exists = path.is_empty()
        || find_program(path).is_some()
        || (!path.contains('/') && find_program(&settings.runtime_path).is_some());
    if exists {
        return Ok(());
    }
    let summary = format!("Docker's nvidia runtime is {path}, which does not exist");
    Err(Finding::new(Reason::RuntimeMissing, summary))
}

#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error("docker.reload_command is empty")]
    NoCommand,
    #[error("cannot run {command}")]
    Start { command: String, source: io::Error },
    #[error("{command} failed: {status}{stderr}")]
    Failed { command: String, status: ExitStatus, stderr: String },
    #[error("{command} did not exit within {} s", RELOAD_TIMEOUT.as_secs())]
    TimedOut { command: String },
}

async fn reload(command: &[String]) -> Result<(), ReloadError> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(ReloadError::NoCommand);
    };
    let command = command.join(" ");
    let running = Command::new(program)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(RELOAD_TIMEOUT, running).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let stderr = match stderr.trim() {
                "" => String::new(),
                text => format!(": {text}"),
            };
            Err(ReloadError::Failed { command, status: output.status, stderr })
        }
        Ok(Err(source)) => Err(ReloadError::Start { command, source }),
        Err(_) => Err(ReloadError::TimedOut { command }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::values::GpuUuid;

    /// A temporary directory, removed when it is dropped.
    struct TempDir(PathBuf);

    impl TempDir {
        fn new(name: &str) -> Self {
            let dir =
                std::env::temp_dir().join(format!("supernode-agent-{name}-{}", std::process::id()));
            fs::create_dir(&dir).unwrap();
            Self(dir)
        }

        fn configure(&self, name: &str) -> Result<bool, String> {
            configure_daemon_json(&self.0.join(name), "r").map_err(|error| error_chain(&error))
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn symbolic_links_are_followed_and_kept() {
        let dir = TempDir::new("links");
        for inner in ["a", "b", "c"] {
            fs::create_dir(dir.0.join(inner)).unwrap();
        }
        symlink("a/link", dir.0.join("daemon.json")).unwrap();
        symlink("../b/link", dir.0.join("a/link")).unwrap();
        symlink(dir.0.join("c/real.json"), dir.0.join("b/link")).unwrap();
        // The file does not exist at first, then it does.
        assert_eq!(dir.configure("daemon.json"), Ok(true));
        assert_eq!(dir.configure("daemon.json"), Ok(false));
        assert!(dir.0.join("c/real.json").symlink_metadata().unwrap().is_file());
        for link in ["daemon.json", "a/link", "b/link"] {
            assert!(
                dir.0.join(link).symlink_metadata().unwrap().is_symlink(),
                "{link} was replaced"
            );
        }
        symlink("there", dir.0.join("here")).unwrap();
        symlink("here", dir.0.join("there")).unwrap();
        let error = dir.configure("here").unwrap_err();
        assert!(
            error.contains("resolve the symbolic link") && error.contains("or a loop"),
            "{error}"
        );
    }

    #[test]
    fn special_files_are_errors_and_never_block() {
        let dir = TempDir::new("no-files");
        fs::create_dir(dir.0.join("directory")).unwrap();
        assert!(
            std::process::Command::new("mkfifo")
                .arg(dir.0.join("fifo"))
                .status()
                .unwrap()
                .success()
        );
        symlink("/dev/zero", dir.0.join("device")).unwrap();
        for name in ["directory", "fifo", "device"] {
            let error = dir.configure(name).unwrap_err();
            assert!(error.contains("not a regular file"), "{name}: {error}");
        }
    }

    #[test]
    fn lock_held_by_another_process_does_not_block() {
        let dir = TempDir::new("locked");
        let held = File::open(&dir.0).unwrap();
        held.lock().unwrap();
        assert_eq!(dir.configure("daemon.json"), Ok(true));
    }

    #[test]
    fn file_that_would_exceed_the_limit_is_not_written() {
        let dir = TempDir::new("limit");
        let largest = usize::try_from(MAX_DAEMON_JSON_BYTES).unwrap();
        let file = dir.0.join("daemon.json");
        let text = format!("{{\"a\": \"{}\"}}", "x".repeat(largest - 9));
        assert_eq!(text.len(), largest);
        fs::write(&file, &text).unwrap();
        let error = dir.configure("daemon.json").unwrap_err();
        assert!(error.contains("larger than 16 MiB"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap().len(), largest);
        fs::write(&file, text.replacen("xxxxxxxxxx", "", 10)).unwrap();
        assert_eq!(dir.configure("daemon.json"), Ok(true));
        assert_eq!(dir.configure("daemon.json"), Ok(false), "the second run cannot read it");
    }

    fn device(index: u32, uuid: &str) -> GpuDevice {
        GpuDevice {
            index,
            uuid: GpuUuid::parse(uuid).unwrap(),
            name: None,
            pci_address: None,
            memory_mib: None,
            minor: None,
        }
    }

    fn engine(cdi_devices: &[&str]) -> EngineInfo {
        EngineInfo {
            cdi_devices: cdi_devices.iter().map(|name| (*name).into()).collect(),
            ..EngineInfo::default()
        }
    }

    #[test]
    fn auto_selects_cdi_if_docker_reports_every_device() {
        let devices = [device(0, "GPU-a"), device(1, "GPU-b")];
        let choose =
            |injection, info: &EngineInfo| choose_injection(injection, &devices, Some(info));
        let all = engine(&["nvidia.com/gpu=GPU-a", "nvidia.com/gpu=1", "nvidia.com/gpu=all"]);
        let named =
            GpuInjection::Cdi(vec!["nvidia.com/gpu=GPU-a".into(), "nvidia.com/gpu=1".into()]);
        assert_eq!(choose(Injection::Auto, &all), named);
        assert_eq!(choose(Injection::Runtime, &all), GpuInjection::Runtime);
        let some = engine(&["nvidia.com/gpu=GPU-a"]);
        assert_eq!(choose(Injection::Auto, &some), GpuInjection::Runtime);
        assert_eq!(choose_injection(Injection::Auto, &devices, None), GpuInjection::Runtime);
        let by_uuid =
            GpuInjection::Cdi(vec!["nvidia.com/gpu=GPU-a".into(), "nvidia.com/gpu=GPU-b".into()]);
        assert_eq!(choose(Injection::Cdi, &some), by_uuid);
    }

    #[test]
    fn mig_instance_is_not_named_by_gpu_index() {
        let instance = [device(0, "MIG-a")];
        assert_eq!(
            choose_injection(Injection::Auto, &instance, Some(&engine(&["nvidia.com/gpu=0"]))),
            GpuInjection::Runtime
        );
    }
}
