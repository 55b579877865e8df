//! Simulator of nvidia-container-runtime: the program that dockerd starts for `--runtime=nvidia`,
//! without a driver and without a GPU.
//!
//! On `create` it reads the bundle's config.json, records the container in `record.jsonl` next to
//! the control file, adds the device nodes that `NVIDIA_VISIBLE_DEVICES` requests, and executes
//! runc. Every other command is passed to runc unchanged. `NVIDIA_RUNTIME_SIMULATOR` in dockerd's
//! environment names the control file, so that each engine has its own.

use std::{
    env,
    ffi::OsString,
    fs::{self, OpenOptions},
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;
use serde_json::{Map, Value, json};

/// Major number of NVIDIA's devices, and minor number of the control device.
const NVIDIA: u32 = 195;
const NVIDIA_CTL: u32 = 255;
/// Major number of /dev/nvidia-uvm. The kernel assigns it dynamically; this is a typical value.
const NVIDIA_UVM: u32 = 510;
const NO_DRIVER: &str = "initialization error: nvml error: driver not loaded";

/// The control file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Control {
    mode: Mode,
    /// Script of the NVML simulator, which lists the GPUs.
    nvml: Option<PathBuf>,
    /// Message of nvidia-container-cli in mode `fail`; the default reports a missing driver.
    message: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    /// Like the original on a working VM.
    Ok,
    /// Like the original with its hook: the device nodes exist, but systemd does not know the
    /// device cgroup rules.
    Hook,
    /// Like the original when nvidia-container-cli fails.
    Fail,
    /// Starts the container without devices.
    NoDevice,
}

/// The part of the NVML simulator's script that the runtime needs.
#[derive(Debug, Default, Deserialize)]
struct DriverScript {
    #[serde(default)]
    gpus: Vec<Gpu>,
}

#[derive(Debug, Deserialize)]
struct Gpu {
    uuid: String,
    minor: Option<u32>,
    #[serde(default)]
    mig: Vec<Mig>,
}

#[derive(Debug, Deserialize)]
struct Mig {
    uuid: String,
}

/// A selected device: its UUID in the container and the minor number of its node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Selected {
    uuid: String,
    minor: u32,
}

fn main() -> ExitCode {
    let args: Vec<OsString> = env::args_os().skip(1).collect();
    let request = Request::read(&args);
    if let Some(bundle) = &request.create
        && let Err(message) = prepare(bundle, &request.id)
    {
        refuse(request.log.as_deref(), &message);
        return ExitCode::FAILURE;
    }
    let error = Command::new("runc").args(&args).exec();
    refuse(request.log.as_deref(), &format!("cannot start runc: {error}"));
    ExitCode::FAILURE
}

/// The relevant parts of runc's command line.
#[derive(Debug, Default)]
struct Request {
    /// `--log`: where containerd reads the reason of a failure.
    log: Option<PathBuf>,
    /// The bundle, if the command is `create` or `run`.
    create: Option<PathBuf>,
    id: String,
}

impl Request {
    /// Options of runc that take a value.
    const VALUED: &[&str] = &[
        "--root",
        "--log",
        "--log-format",
        "--criu",
        "--rootless",
        "--bundle",
        "-b",
        "--pid-file",
        "--console-socket",
        "--preserve-fds",
    ];

    fn read(args: &[OsString]) -> Self {
        let mut request = Self::default();
        let mut command = None;
        let mut bundle = PathBuf::from(".");
        let mut args = args.iter().map(|arg| arg.to_string_lossy().into_owned());
        while let Some(arg) = args.next() {
            let (name, value) = match arg.split_once('=') {
                Some((name, value)) if arg.starts_with('-') => (name.to_owned(), value.to_owned()),
                _ if Self::VALUED.contains(&arg.as_str()) => (arg, args.next().unwrap_or_default()),
                _ => (arg, String::new()),
            };
            match name.as_str() {
                "--log" => request.log = Some(value.into()),
                "--bundle" | "-b" => bundle = value.into(),
                _ if name.starts_with('-') => {}
                _ if command.is_none() => command = Some(name),
                _ => request.id = name,
            }
        }
        if matches!(command.as_deref(), Some("create" | "run")) {
            request.create = Some(bundle);
        }
        request
    }
}

/// Fails as runc does: writes a JSON line to the log, which containerd passes to Docker, and the
/// text to stderr.
fn refuse(log: Option<&Path>, message: &str) {
    let _ = writeln!(std::io::stderr(), "{message}");
    if let Some(path) = log {
        let line = json!({"level": "error", "msg": message, "time": "1970-01-01T00:00:00Z"});
        // If the log cannot be written, the message is still on stderr.
        let _ = append(path, &line);
    }
}

fn append(path: &Path, line: &Value) -> Result<(), String> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()))
        .map_err(|error| format!("{}: {error}", path.display()))
}

fn read_json(path: &Path) -> Result<Value, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))
}

/// Records the container and edits its config.json. The error is the reason for refusing the
/// container.
fn prepare(bundle: &Path, id: &str) -> Result<(), String> {
    let control_path =
        env::var_os("NVIDIA_RUNTIME_SIMULATOR").ok_or("NVIDIA_RUNTIME_SIMULATOR is not set")?;
    let control_path = Path::new(&control_path);
    let control: Control = serde_json::from_value(read_json(control_path)?)
        .map_err(|error| format!("{}: {error}", control_path.display()))?;
    let machine = match &control.nvml {
        Some(path) => serde_json::from_value(read_json(path)?)
            .map_err(|error| format!("{}: {error}", path.display()))?,
        None => DriverScript::default(),
    };

    let config_path = bundle.join("config.json");
    let mut config = read_json(&config_path)?;
    let env = container_env(&config);
    let outcome = decide(&control, &machine, &env);

    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let gpus = outcome.as_deref().unwrap_or_default();
    let record = json!({
        "time_ms": now.as_millis() as u64,
        "id": id,
        "env": env,
        "gpus": gpus.iter().map(|gpu| &gpu.uuid).collect::<Vec<_>>(),
        "refused": outcome.as_ref().err(),
    });
    append(&control_path.with_file_name("record.jsonl"), &record)?;

    let selected = outcome?;
    if selected.is_empty() {
        return Ok(());
    }
    add_devices(&mut config, &selected, control.mode == Mode::Ok)
        .ok_or_else(|| format!("{}: no linux section", config_path.display()))?;
    fs::write(&config_path, config.to_string())
        .map_err(|error| format!("{}: {error}", config_path.display()))
}

/// Returns `process.env` as a map. If a variable is set twice, the last value applies.
fn container_env(config: &Value) -> Map<String, Value> {
    let list = config.pointer("/process/env").and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .filter_map(|entry| entry.as_str()?.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect()
}

/// Selects the container's devices, or returns the message with which NVIDIA's hook fails.
fn decide(
    control: &Control,
    machine: &DriverScript,
    env: &Map<String, Value>,
) -> Result<Vec<Selected>, String> {
    let wanted = match env.get("NVIDIA_VISIBLE_DEVICES").and_then(Value::as_str) {
        Some("" | "void") => return Ok(Vec::new()),
        Some(wanted) => wanted,
        // Legacy images without that variable get all GPUs.
        None if env.contains_key("CUDA_VERSION") => "all",
        None => return Ok(Vec::new()),
    };
    match control.mode {
        Mode::Fail => Err(hook_failed(control.message.as_deref().unwrap_or(NO_DRIVER))),
        Mode::NoDevice => Ok(Vec::new()),
        Mode::Ok | Mode::Hook => select(machine, wanted)
            .map_err(|unknown| hook_failed(&format!("device error: {unknown}: unknown device"))),
    }
}

/// Resolves a value of `NVIDIA_VISIBLE_DEVICES`. The error is the first unknown name.
fn select(machine: &DriverScript, wanted: &str) -> Result<Vec<Selected>, String> {
    let gpus = || machine.gpus.iter().enumerate();
    let node = |index: usize, gpu: &Gpu| gpu.minor.unwrap_or(index as u32);
    match wanted {
        "none" => Ok(Vec::new()),
        "all" => {
            let all = gpus()
                .map(|(index, gpu)| Selected { uuid: gpu.uuid.clone(), minor: node(index, gpu) });
            Ok(all.collect())
        }
        list => list
            .split(',')
            .map(|name| {
                let found = gpus().find_map(|(index, gpu)| {
                    let uuid = if gpu.uuid == name || index.to_string() == name {
                        &gpu.uuid
                    } else {
                        &gpu.mig.iter().find(|mig| mig.uuid == name)?.uuid
                    };
                    Some(Selected { uuid: uuid.clone(), minor: node(index, gpu) })
                });
                found.ok_or_else(|| name.to_owned())
            })
            .collect(),
    }
}

/// Formats the failure of NVIDIA's prestart hook as runc reports it.
fn hook_failed(message: &str) -> String {
    format!(
        "runc create failed: unable to start container process: error during container init: \
         error running hook #0: \
         error running hook: exit status 1, stdout: , stderr: Auto-detected mode as 'legacy'\n\
         nvidia-container-cli: {message}"
    )
}

/// Adds the device nodes and, with `allow`, the device cgroup rules to use them.
fn add_devices(config: &mut Value, selected: &[Selected], allow: bool) -> Option<()> {
    let mut nodes = vec![
        ("/dev/nvidiactl".to_owned(), NVIDIA, NVIDIA_CTL),
        ("/dev/nvidia-uvm".to_owned(), NVIDIA_UVM, 0),
    ];
    for gpu in selected {
        let node = (format!("/dev/nvidia{}", gpu.minor), NVIDIA, gpu.minor);
        if !nodes.contains(&node) {
            nodes.push(node);
        }
    }
    let linux = config.get_mut("linux")?.as_object_mut()?;
    for (path, major, minor) in &nodes {
        let device = json!({
            "path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666,
            "uid": 0, "gid": 0,
        });
        list(linux, "devices")?.push(device);
        if !allow {
            continue;
        }
        let resources = linux.entry("resources").or_insert_with(|| json!({})).as_object_mut()?;
        let rule =
            json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"});
        list(resources, "devices")?.push(rule);
    }
    Some(())
}

/// Returns an array member; `null` or a missing member is an empty array.
fn list<'section>(
    section: &'section mut Map<String, Value>,
    name: &str,
) -> Option<&'section mut Vec<Value>> {
    let member = section.entry(name).or_insert(Value::Null);
    if member.is_null() {
        *member = json!([]);
    }
    member.as_array_mut()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> DriverScript {
        let mig = vec![Mig { uuid: "MIG-b1".to_owned() }];
        DriverScript {
            gpus: vec![
                Gpu { uuid: "GPU-a".to_owned(), minor: Some(3), mig: Vec::new() },
                Gpu { uuid: "GPU-b".to_owned(), minor: None, mig },
            ],
        }
    }

    fn uuids(wanted: &str) -> Result<Vec<String>, String> {
        Ok(select(&machine(), wanted)?.into_iter().map(|gpu| gpu.uuid).collect())
    }

    #[test]
    fn selects_all_or_a_list_of_indices_and_uuids() {
        assert_eq!(uuids("all"), Ok(vec!["GPU-a".to_owned(), "GPU-b".to_owned()]));
        assert_eq!(uuids("1"), Ok(vec!["GPU-b".to_owned()]));
        assert_eq!(uuids("MIG-b1,GPU-a"), Ok(vec!["MIG-b1".to_owned(), "GPU-a".to_owned()]));
        assert_eq!(uuids("none"), Ok(Vec::new()));
        assert_eq!(uuids("GPU-a,7"), Err("7".to_owned()));
    }

    #[test]
    fn finds_the_command_after_the_options() {
        let args = [
            "--root",
            "create",
            "--log",
            "/l",
            "--log-format=json",
            "create",
            "--bundle",
            "/b",
            "some-id",
        ];
        let request = Request::read(&args.map(OsString::from));
        assert_eq!(request.log.as_deref(), Some(Path::new("/l")));
        assert_eq!(request.create.as_deref(), Some(Path::new("/b")));
        assert_eq!(request.id, "some-id");
        assert!(
            Request::read(&["--root", "create", "delete", "some-id"].map(OsString::from))
                .create
                .is_none()
        );
    }
}
