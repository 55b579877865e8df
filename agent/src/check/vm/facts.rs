//! The facts of a VM, read at the edge: sysfs, procfs, NVML through its probe, Docker, the context.
//! What cannot be read is told.

use std::path::Path;
use std::time::Duration;

use one_context::source::read_context;
use serde_json::Value as Json;

use crate::check::read_pci;
use crate::config::settings::{Injection, Settings};
use crate::config::{Config, Diagnostics};
use crate::container::image;
use crate::docker::client::{Client, EngineError, EngineInfo};
use crate::gpu::nvml_library;
use crate::gpu::pci::PciFacts;
use crate::gpu::probe::{self, ProbeOutcome};
use crate::logging::error_chain;
use crate::system::facts::Root;
use crate::values::PciAddress;

/// Why there is no configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unconfigured {
    /// There is no context, or it cannot be read.
    NoContext(String),
    /// What is wrong with the variables, one line each.
    Invalid(Vec<String>),
}

/// What was read.
#[derive(Debug)]
pub struct VmFacts {
    /// Why the settings could not be used, where they could not.
    pub settings_error: Option<String>,
    /// Which way the GPU is to go into the container.
    pub injection: Injection,
    /// The program of the nvidia runtime as the settings name it, and where it is.
    pub runtime: (String, Option<String>),
    /// The configuration and its remarks, or what is wrong.
    pub config: Result<(Config, Diagnostics), Unconfigured>,
    /// The PCI bus and the kernel module.
    pub pci: PciFacts,
    /// What NVML said, or why it was not asked.
    pub nvml: Result<ProbeOutcome, String>,
    /// Whether the firmware is UEFI.
    pub is_uefi: Result<bool, String>,
    /// DMI's product_name and product_version, where there are any.
    pub machine: Result<Vec<String>, String>,
    /// /proc/cpuinfo.
    pub cpuinfo: Result<Option<String>, String>,
    /// The NUMA nodes, each with its CPUs.
    pub numa: Result<Vec<(String, String)>, String>,
    /// The NUMA node of each GPU, as sysfs has it: -1 where it is not known.
    pub gpu_nodes: Vec<(PciAddress, String)>,
    /// What the engine says of itself.
    pub engine: Result<EngineInfo, String>,
    /// daemon.json, where there is one.
    pub daemon_json: Result<Option<String>, String>,
    /// CDI specifications that are NVIDIA's.
    pub cdi_specs: Result<Vec<String>, String>,
    /// The images: name and whether the engine has it. The wanted one, then the one that the VM was
    /// built with.
    pub images: Vec<(String, Result<bool, String>)>,
    /// Where Docker keeps images, and the bytes free there.
    pub disk: (String, Result<u64, String>),
    /// Memory in MiB.
    pub memory_mib: Result<u64, String>,
}

/// Reads the facts of the VM at `root`.
pub async fn read(root: &Root, settings: Result<Settings, String>) -> VmFacts {
    let (mut settings, settings_error) = match settings {
        Ok(settings) => (settings, None),
        Err(why) => (Settings::default(), Some(why)),
    };
    let pci = read_pci(root, &settings.gpu.sysfs.to_string_lossy());
    if !root.is_own() {
        for path in [
            &mut settings.context.dir,
            &mut settings.gpu.sysfs,
            &mut settings.docker.socket,
            &mut settings.container.prebaked_dir,
        ] {
            *path = root.at(&*path);
        }
    }
    let escape = [&settings.context.dir, &settings.container.prebaked_dir]
        .into_iter()
        .find_map(|dir| root.escape(dir));
    let config = match escape {
        Some(link) => {
            Err(Unconfigured::NoContext(format!("{}: it leads out of the root", link.display())))
        }
        None => match read_context(&settings.context.dir) {
            Ok(context) => Config::read(&context, &settings.container.prebaked_dir)
                .map_err(|errors| Unconfigured::Invalid(errors.lines().collect())),
            Err(error) => Err(Unconfigured::NoContext(error_chain(&error))),
        },
    };
    let sysfs = settings.gpu.sysfs.clone();
    let nvml = ask_nvml(root, &settings, &pci).await;
    let (engine, images) =
        look_at_docker(&settings, config.as_ref().ok().map(|(config, _)| config)).await;
    let daemon_json = root.read(&settings.docker.daemon_json.to_string_lossy());
    let data_root = engine.as_ref().ok().and_then(|facts| facts.data_root.clone()).or_else(|| {
        let daemon: Json = serde_json::from_str(daemon_json.as_ref().ok()?.as_deref()?).ok()?;
        Some(daemon.get("data-root")?.as_str()?.to_owned())
    });
    let data_root = data_root.unwrap_or_else(|| "/var/lib/docker".into());
    let runtime = &settings.docker.runtime_path;
    VmFacts {
        settings_error,
        injection: settings.gpu.injection,
        runtime: (
            runtime.clone(),
            root.find_program(runtime).map(|path| path.display().to_string()),
        ),
        gpu_nodes: pci
            .gpus()
            .map(|gpu| {
                let file =
                    sysfs.join("bus/pci/devices").join(gpu.address.to_string()).join("numa_node");
                (gpu.address, std::fs::read_to_string(file).unwrap_or_default().trim().to_owned())
            })
            .collect(),
        config,
        pci,
        nvml,
        is_uefi: match sysfs.join("firmware/efi").try_exists() {
            // A folder that has no firmware at all says nothing of the firmware.
            Ok(false) if !sysfs.is_dir() => Err("there is no /sys".into()),
            answer => answer.map_err(|error| format!("/sys/firmware/efi: {error}")),
        },
        machine: ["product_name", "product_version"]
            .iter()
            .filter_map(|name| root.read(&format!("/sys/class/dmi/id/{name}")).transpose())
            .map(|text| text.map(|text| text.trim().to_owned()))
            .collect(),
        cpuinfo: root.read("/proc/cpuinfo"),
        numa: numa_nodes(root),
        cdi_specs: cdi_specs(root),
        disk: (data_root.clone(), free_bytes(root, &data_root)),
        memory_mib: memory(root),
        engine,
        daemon_json,
        images,
    }
}

/// NVML is asked only where NVIDIA's driver drives a GPU: as root it creates device nodes.
async fn ask_nvml(
    root: &Root,
    settings: &Settings,
    pci: &PciFacts,
) -> Result<ProbeOutcome, String> {
    if !pci.gpus().any(|gpu| gpu.driver.as_deref() == Some("nvidia")) {
        return Err("no GPU is bound to the nvidia driver".into());
    }
    let name = &settings.gpu.nvml_library;
    let library = if root.is_own() {
        name.clone()
    } else {
        // The loader would look on this machine.
        let candidates = match name.starts_with('/') {
            true => vec![root.at(name)],
            false => nvml_library::LIBRARY_DIRS
                .iter()
                .map(|folder| root.at(Path::new(folder).join(name)))
                .collect(),
        };
        let first = candidates.first().map(|path| path.display().to_string()).unwrap_or_default();
        candidates
            .iter()
            .find(|path| path.exists())
            .map_or(first, |path| path.display().to_string())
    };
    Ok(probe::probe(&library, settings.gpu.probe_timeout).await)
}

type Images = Vec<(String, Result<bool, String>)>;

async fn look_at_docker(
    settings: &Settings,
    config: Option<&Config>,
) -> (Result<EngineInfo, String>, Images) {
    const TIMEOUT: Duration = Duration::from_secs(10);
    let mut names: Vec<String> = Vec::new();
    if let Some(config) = config {
        names.push(image::wanted_image(config).to_string());
        names.extend(
            image::prebaked_image(config)
                .map(|image| image.to_string())
                .filter(|image| *image != names[0]),
        );
    }
    let look = async {
        let engine = Client::connect(&settings.docker.socket).await?;
        let facts = engine.info().await?;
        let mut images: Images = Vec::new();
        for name in &names {
            let found = engine.find_image(name).await;
            images.push((
                name.clone(),
                found.map(|image| image.is_some()).map_err(|error| error.to_string()),
            ));
        }
        Ok::<_, EngineError>((facts, images))
    };
    let why = match tokio::time::timeout(TIMEOUT, look).await {
        Ok(Ok((facts, images))) => return (Ok(facts), images),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the Docker engine gave no answer within {} s", TIMEOUT.as_secs()),
    };
    let images = names.into_iter().map(|name| (name, Err(why.clone()))).collect();
    (Err(why), images)
}

fn numa_nodes(root: &Root) -> Result<Vec<(String, String)>, String> {
    const FOLDER: &str = "/sys/devices/system/node";
    let is_node = |name: &String| {
        name.strip_prefix("node").is_some_and(|number| number.parse::<u32>().is_ok())
    };
    let nodes = root.list(FOLDER)?.into_iter().filter(is_node);
    nodes
        .map(|node| {
            let cpus = root.read(&format!("{FOLDER}/{node}/cpulist"))?.unwrap_or_default();
            Ok((node, cpus.trim().to_owned()))
        })
        .collect()
}

fn cdi_specs(root: &Root) -> Result<Vec<String>, String> {
    let mut specs = Vec::new();
    for folder in ["/etc/cdi", "/var/run/cdi"] {
        for name in root.list(folder)? {
            let path = format!("{folder}/{name}");
            let is_spec = [".yaml", ".yml", ".json"].iter().any(|ending| name.ends_with(ending));
            if is_spec && root.read(&path)?.is_some_and(|text| text.contains("nvidia.com/gpu")) {
                specs.push(path);
            }
        }
    }
    Ok(specs)
}

/// What is free for the folder, or for the nearest one above it that is there.
fn free_bytes(root: &Root, folder: &str) -> Result<u64, String> {
    let path = root.at(folder);
    let there = path.ancestors().find(|path| path.exists()).unwrap_or(root.path());
    let facts = rustix::fs::statvfs(there).map_err(|error| format!("{folder}: {error}"))?;
    Ok(facts.f_bavail.saturating_mul(facts.f_frsize))
}

fn memory(root: &Root) -> Result<u64, String> {
    let text = root.read("/proc/meminfo")?.ok_or("there is no /proc/meminfo")?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = kib.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map(|kib| kib / 1024).ok_or_else(|| "/proc/meminfo has no MemTotal".into())
}
