//! Making Docker able to hand a GPU over: the runtime entry written, the engine reloaded, the
//! result verified.

use std::fs::{File, TryLockError};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;
use tokio::time::Instant;

use crate::config::settings::{DockerSettings, Injection};
use crate::docker::client::{Client, EngineError, EngineInfo};
use crate::docker::daemon_json::{self, Merged, RUNTIME_NAME, Refused};
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::GpuDevice;
use crate::system::atomic_file;
use crate::system::blocking::run_blocking;
use crate::system::programs::find_program;

/// A daemon.json above this size is none.
const MAX_DAEMON_JSON_BYTES: u64 = 16 << 20;
/// How long a reload may take, and then the engine until it lists the runtime.
const RELOAD_LIMIT: Duration = Duration::from_secs(30);
const REGISTRATION_LIMIT: Duration = Duration::from_secs(10);

/// How the container gets its GPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GpuInjection {
    /// `HostConfig.Runtime=nvidia`.
    Runtime,
    /// These CDI devices.
    Cdi(Vec<String>),
}

/// Why daemon.json could not be brought in order.
#[derive(Debug, thiserror::Error)]
pub enum DaemonJsonError {
    /// It cannot be read or written.
    #[error("{path}: cannot {doing}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Its content is not touched.
    #[error("{path}, {source}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong where.
        source: Refused,
    },
    /// Somebody else wrote it at the same time.
    #[error("{path}: it was changed by somebody else meanwhile")]
    Changed {
        /// The file.
        path: PathBuf,
    },
}

/// Puts the runtime into daemon.json, where it is not there yet. Answers whether the file was
/// written.
///
/// # Errors
/// When the file cannot be read, is not one JSON object, or cannot be written. Then it is what it
/// was.
pub fn configure_daemon_json(path: &Path, runtime_path: &str) -> Result<bool, DaemonJsonError> {
    let failed = |doing| move |source| DaemonJsonError::Io { path: path.into(), doing, source };
    let target = target_of(path).map_err(failed("follow the link"))?;
    let _alone = lock_folder(&target).map_err(failed("write it"))?;
    let old = read(&target).map_err(failed("read it"))?;
    let new = match &old {
        None => daemon_json::fresh(runtime_path),
        Some(bytes) => {
            let text = text_of(bytes)
                .map_err(|source| DaemonJsonError::Refused { path: path.into(), source })?;
            let merged = daemon_json::merge(text, runtime_path);
            match merged.map_err(|source| DaemonJsonError::Refused { path: path.into(), source })? {
                Merged::Unchanged => return Ok(false),
                Merged::Changed(new) => new,
            }
        }
    };
    if new.len() as u64 > MAX_DAEMON_JSON_BYTES {
        // The next run would not read it any more.
        return Err(failed("write it")(io::Error::other(
            "with the nvidia runtime it would be larger than 16 MiB",
        )));
    }
    let prepared = atomic_file::prepare(&target, new.as_bytes()).map_err(failed("write it"))?;
    if read(&target).map_err(failed("read it"))? != old {
        prepared.discard();
        return Err(DaemonJsonError::Changed { path: path.into() });
    }
    prepared.commit().map_err(failed("write it"))?;
    Ok(true)
}

/// The file itself, where `path` is a link to it, or to another link: they stay. It need not be
/// there; then it is made where the last link points.
fn target_of(path: &Path) -> io::Result<PathBuf> {
    // As many as Linux follows (path_resolution(7)).
    const MAX_LINKS: usize = 40;
    let mut target = path.to_owned();
    for _ in 0..=MAX_LINKS {
        target = match target.read_link() {
            Ok(next) => target.parent().unwrap_or(Path::new("/")).join(next),
            // No link, or nothing there.
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
    Err(io::Error::other(format!("it leads over more than {MAX_LINKS} links, or in a circle")))
}

/// Makes `run` and `configure-runtime` write one after the other: each would take the other's
/// temporary file away. Held as long as the folder is open, and taken on the folder, so that
/// nothing is left behind.
fn lock_folder(target: &Path) -> io::Result<Option<File>> {
    const LIMIT: Duration = Duration::from_secs(2);
    const PAUSE: Duration = Duration::from_millis(10);
    let folder = target.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder)?;
    let folder = File::open(folder)?;
    let since = Instant::now();
    loop {
        match folder.try_lock() {
            Ok(()) => return Ok(Some(folder)),
            Err(TryLockError::WouldBlock) if since.elapsed() < LIMIT => std::thread::sleep(PAUSE),
            // An agent holds it for milliseconds: this is somebody else, and any user may be it,
            // for whoever can open a folder can lock it.
            Err(TryLockError::WouldBlock) => return Ok(None),
            // A file system without locks.
            Err(TryLockError::Error(_)) => return Ok(None),
        }
    }
}

/// The content of `path`, `None` where nothing is there.
fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match path.metadata() {
        // To open a FIFO is to wait for somebody who writes.
        Ok(facts) if !facts.is_file() => return Err(io::Error::other("it is not a regular file")),
        Ok(_) => File::open(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(MAX_DAEMON_JSON_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_DAEMON_JSON_BYTES {
        return Err(io::Error::other("it is larger than 16 MiB"));
    }
    Ok(Some(bytes))
}

fn text_of(bytes: &[u8]) -> Result<&str, Refused> {
    std::str::from_utf8(bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        Refused {
            line: before.iter().filter(|byte| **byte == b'\n').count() + 1,
            column: String::from_utf8_lossy(&before[line_start..]).chars().count() + 1,
            message: "the text is not UTF-8".into(),
        }
    })
}

/// Which way the GPUs go into the container: what `injection` says, or CDI where Docker reports
/// each of them.
pub fn choose_access(
    injection: Injection,
    devices: &[GpuDevice],
    engine: Option<&EngineInfo>,
) -> GpuInjection {
    const KIND: &str = "nvidia.com/gpu=";
    let reported = |name: &str| {
        engine.is_some_and(|facts| facts.cdi_devices.iter().any(|device| device == name))
    };
    let by_uuid = |device: &GpuDevice| format!("{KIND}{}", device.uuid);
    let resolved: Option<Vec<String>> = devices
        .iter()
        .map(|device| {
            // nvidia-ctk names whole cards by index, by UUID, or by both.
            let by_index = format!("{KIND}{}", device.index);
            let is_card = device.uuid.starts_with("GPU-");
            Some(by_uuid(device))
                .filter(|name| reported(name))
                .or_else(|| Some(by_index).filter(|name| is_card && reported(name)))
        })
        .collect();
    match (injection, resolved) {
        (Injection::Runtime, _) | (Injection::Auto, None) => GpuInjection::Runtime,
        (Injection::Auto | Injection::Cdi, Some(names)) => GpuInjection::Cdi(names),
        (Injection::Cdi, None) => GpuInjection::Cdi(devices.iter().map(by_uuid).collect()),
    }
}

/// Sees to it that Docker has the nvidia runtime: written into daemon.json, taken up by a reload,
/// listed by the engine.
///
/// # Errors
/// The finding with which the node goes to the CPU.
pub async fn ensure_runtime(
    engine: &Client,
    facts: &EngineInfo,
    settings: &DockerSettings,
) -> Result<(), Finding> {
    if let Some(path) = facts.runtimes.get(RUNTIME_NAME) {
        return is_installed(path, settings);
    }
    if find_program(&settings.runtime_path).is_none() {
        return Err(Finding::new(
            Reason::RuntimeMissing,
            format!(
                "{} is not installed on this machine, and Docker's runtimes are: {}",
                settings.runtime_path,
                facts.runtimes.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
            ),
        ));
    }
    let not_configured = |what: String| Finding::new(Reason::RuntimeNotConfigured, what);
    let (path, runtime_path) = (settings.daemon_json.clone(), settings.runtime_path.clone());
    let written = run_blocking(move || configure_daemon_json(&path, &runtime_path))
        .await
        .map_err(|error| not_configured(error.to_string()))?;
    let file = settings.daemon_json.display();
    if written {
        tracing::info!("wrote the nvidia runtime into {file}");
    }
    reload(&settings.reload_command).await.map_err(|why| {
        not_configured(format!(
            "Docker could not be reloaded after {file} got the nvidia runtime: {why}"
        ))
    })?;
    let deadline = Instant::now() + REGISTRATION_LIMIT;
    loop {
        let answer = engine.info().await;
        if let Some(path) = answer.as_ref().ok().and_then(|facts| facts.runtimes.get(RUNTIME_NAME))
        {
            return is_installed(path, settings);
        }
        if Instant::now() >= deadline {
            let why =
                answer.err().map_or(String::new(), |error: EngineError| format!(" ({error})"));
            return Err(not_configured(format!(
                "{file} has the nvidia runtime, and Docker did not register it after the reload{why}"
            )));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Whether the program of the runtime that Docker has registered is there.
fn is_installed(path: &str, settings: &DockerSettings) -> Result<(), Finding> {
    // An entry without a path is one for a containerd shim; a mere name is looked up in dockerd's
    // PATH, which may not be ours.
    let there = path.is_empty()
        || find_program(path).is_some()
        || (!path.contains('/') && find_program(&settings.runtime_path).is_some());
    if there {
        return Ok(());
    }
    let summary = format!("Docker's nvidia runtime is {path}, and there is no such program");
    Err(Finding::new(Reason::RuntimeMissing, summary))
}

async fn reload(command: &[String]) -> Result<(), String> {
    let Some((program, arguments)) = command.split_first() else {
        return Err("docker.reload_command is empty".into());
    };
    let line = command.join(" ");
    let running = Command::new(program)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(RELOAD_LIMIT, running).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("{line}: {}: {said}", output.status)
                .trim_end_matches([':', ' ', '\n'])
                .to_owned())
        }
        Ok(Err(error)) => Err(format!("{line}: {error}")),
        Err(_) => Err(format!("{line} did not end within {} s", RELOAD_LIMIT.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A folder for one test, taken away at its end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let folder =
                std::env::temp_dir().join(format!("supernode-agent-{name}-{}", std::process::id()));
            fs::create_dir(&folder).unwrap();
            Self(folder)
        }

        fn configure(&self, name: &str) -> Result<bool, String> {
            configure_daemon_json(&self.0.join(name), "r").map_err(|error| error.to_string())
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn links_are_followed_to_the_last_one_and_stay() {
        let folder = Folder::new("links");
        for inner in ["a", "b", "c"] {
            fs::create_dir(folder.0.join(inner)).unwrap();
        }
        symlink("a/link", folder.0.join("daemon.json")).unwrap();
        symlink("../b/link", folder.0.join("a/link")).unwrap();
        symlink(folder.0.join("c/real.json"), folder.0.join("b/link")).unwrap();
        // Nothing is there at first, then the file is.
        assert_eq!(folder.configure("daemon.json"), Ok(true));
        assert_eq!(folder.configure("daemon.json"), Ok(false));
        assert!(folder.0.join("c/real.json").symlink_metadata().unwrap().is_file());
        for link in ["daemon.json", "a/link", "b/link"] {
            assert!(
                folder.0.join(link).symlink_metadata().unwrap().is_symlink(),
                "{link} was replaced"
            );
        }
        symlink("there", folder.0.join("here")).unwrap();
        symlink("here", folder.0.join("there")).unwrap();
        let error = folder.configure("here").unwrap_err();
        assert!(error.contains("follow the link") && error.contains("in a circle"), "{error}");
    }

    #[test]
    fn what_is_not_a_regular_file_is_an_error_and_never_waited_for() {
        let folder = Folder::new("no-files");
        fs::create_dir(folder.0.join("folder")).unwrap();
        assert!(
            std::process::Command::new("mkfifo")
                .arg(folder.0.join("fifo"))
                .status()
                .unwrap()
                .success()
        );
        symlink("/dev/zero", folder.0.join("device")).unwrap();
        for name in ["folder", "fifo", "device"] {
            let error = folder.configure(name).unwrap_err();
            assert!(error.contains("it is not a regular file"), "{name}: {error}");
        }
    }

    #[test]
    fn a_lock_that_somebody_holds_for_ever_is_waited_for_and_no_obstacle() {
        let folder = Folder::new("locked");
        let held = File::open(&folder.0).unwrap();
        held.lock().unwrap();
        assert_eq!(folder.configure("daemon.json"), Ok(true));
    }

    #[test]
    fn a_file_that_would_grow_beyond_the_limit_is_not_written() {
        let folder = Folder::new("limit");
        let largest = usize::try_from(MAX_DAEMON_JSON_BYTES).unwrap();
        let file = folder.0.join("daemon.json");
        let text = format!("{{\"a\": \"{}\"}}", "x".repeat(largest - 9));
        assert_eq!(text.len(), largest);
        fs::write(&file, &text).unwrap();
        let error = folder.configure("daemon.json").unwrap_err();
        assert!(error.contains("larger than 16 MiB"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap().len(), largest);
        fs::write(&file, text.replacen("xxxxxxxxxx", "", 10)).unwrap();
        assert_eq!(folder.configure("daemon.json"), Ok(true));
        assert_eq!(folder.configure("daemon.json"), Ok(false), "the second run cannot read it");
    }

    fn device(index: u32, uuid: &str) -> GpuDevice {
        GpuDevice {
            index,
            uuid: uuid.into(),
            name: None,
            pci_address: String::new(),
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
    fn auto_takes_cdi_only_where_docker_reports_every_device() {
        let devices = [device(0, "GPU-a"), device(1, "GPU-b")];
        let choose =
            |injection, facts: &EngineInfo| choose_access(injection, &devices, Some(facts));
        let all = engine(&["nvidia.com/gpu=GPU-a", "nvidia.com/gpu=1", "nvidia.com/gpu=all"]);
        let named =
            GpuInjection::Cdi(vec!["nvidia.com/gpu=GPU-a".into(), "nvidia.com/gpu=1".into()]);
        assert_eq!(choose(Injection::Auto, &all), named);
        assert_eq!(choose(Injection::Runtime, &all), GpuInjection::Runtime);
        let some = engine(&["nvidia.com/gpu=GPU-a"]);
        assert_eq!(choose(Injection::Auto, &some), GpuInjection::Runtime);
        assert_eq!(choose_access(Injection::Auto, &devices, None), GpuInjection::Runtime);
        let by_uuid =
            GpuInjection::Cdi(vec!["nvidia.com/gpu=GPU-a".into(), "nvidia.com/gpu=GPU-b".into()]);
        assert_eq!(choose(Injection::Cdi, &some), by_uuid);
    }

    #[test]
    fn an_instance_is_not_named_by_the_index_of_its_card() {
        let instance = [device(0, "MIG-a")];
        assert_eq!(
            choose_access(Injection::Auto, &instance, Some(&engine(&["nvidia.com/gpu=0"]))),
            GpuInjection::Runtime
        );
    }
}
