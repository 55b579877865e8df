//! Reads the facts of a VM: sysfs, procfs, the NVML probe, Docker, the context. Facts that cannot
//! be read hold the error.

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
use crate::gpu::pci::{PciDevice, PciFacts};
use crate::gpu::probe::{self, ProbeOutcome};
use crate::logging::error_chain;
use crate::system::root::{ReadError, Root};
use crate::values::PciAddress;

/// Why there is no valid configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unconfigured {
    /// There is no readable context.
    NoContext(String),
    /// The errors of the variables, one line each.
    Invalid(Vec<String>),
}

/// Facts about a VM.
#[derive(Debug)]
pub struct VmFacts {
    /// Error of the settings; the defaults are used.
    pub settings_error: Option<String>,
    /// Injection method of the settings.
    pub injection: Injection,
    /// The nvidia runtime program as named in the settings, and its path if it is installed.
    pub runtime: (String, Option<String>),
    /// The configuration with its diagnostics.
    pub config: Result<(Config, Diagnostics), Unconfigured>,
    /// The PCI bus and the kernel module.
    pub pci: PciFacts,
    /// Result of the probe, or why NVML was not probed.
    pub nvml: Result<ProbeOutcome, String>,
    /// Whether the VM booted with UEFI.
    pub is_uefi: Result<bool, String>,
    /// DMI's product_name and product_version, as far as they exist.
    pub dmi_names: Result<Vec<String>, String>,
    /// Content of /proc/cpuinfo.
    pub cpuinfo: Result<Option<String>, String>,
    /// NUMA nodes, each with its CPUs.
    pub numa: Result<Vec<(String, String)>, String>,
    /// NUMA node of each GPU from sysfs: -1 if unknown.
    pub gpu_nodes: Vec<(PciAddress, String)>,
    /// Information from the Docker engine.
    pub(crate) engine: Result<EngineInfo, String>,
    /// Content of daemon.json.
    pub daemon_json: Result<Option<String>, String>,
    /// Paths of NVIDIA's CDI specifications.
    pub cdi_specs: Result<Vec<String>, String>,
    /// The wanted image, then the prebaked one: name and whether it is available locally.
    pub images: Vec<(String, Result<bool, String>)>,
    /// Docker's data directory and the free bytes in it.
    pub disk: (String, Result<u64, String>),
    /// Memory in MiB.
    pub memory_mib: Result<u64, String>,
}

/// Reads the facts of the VM at `root`.
pub(crate) async fn read(root: &Root, settings: Result<Settings, String>) -> VmFacts {
    let (mut settings, settings_error) = match settings {
        Ok(settings) => (settings, None),
        Err(why) => (Settings::default(), Some(why)),
    };
    let pci = read_pci(root, &settings.gpu.sysfs.to_string_lossy());
    if !root.is_running_system() {
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
        .find_map(|dir| root.find_escaping_link(dir));
    let config = match escape {
        Some(link) => {
            Err(Unconfigured::NoContext(format!("{}: a link out of the root", link.display())))
        }
        None => match read_context(&settings.context.dir) {
            Ok(context) => Config::read(&context, &settings.container.prebaked_dir)
                .map_err(|errors| Unconfigured::Invalid(errors.lines().collect())),
            Err(error) => Err(Unconfigured::NoContext(error_chain(&error))),
        },
    };
    let sysfs = settings.gpu.sysfs.clone();
    let nvml = probe_nvml(root, &settings, &pci).await;
    let (engine, images) =
        read_docker(&settings, config.as_ref().ok().map(|(config, _)| config)).await;
    let daemon_json = root.read(&settings.docker.daemon_json.to_string_lossy());
    let data_root = engine.as_ref().ok().and_then(|info| info.data_root.clone()).or_else(|| {
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
            // Without sysfs the firmware is unknown.
            Ok(false) if !sysfs.is_dir() => Err("no /sys".into()),
            answer => answer.map_err(|error| format!("/sys/firmware/efi: {error}")),
        },
        dmi_names: ["product_name", "product_version"]
            .iter()
            .filter_map(|name| root.read(&format!("/sys/class/dmi/id/{name}")).transpose())
            .map(|text| text.map(|text| text.trim().to_owned()).map_err(unknown))
            .collect(),
        cpuinfo: root.read("/proc/cpuinfo").map_err(unknown),
        numa: numa_nodes(root),
        cdi_specs: cdi_specs(root),
        disk: (data_root.clone(), free_bytes(root, &data_root)),
        memory_mib: read_memory_mib(root),
        engine,
        daemon_json: daemon_json.map_err(unknown),
        images,
    }
}

/// Probes NVML only if a GPU is bound to NVIDIA's driver: called as root it creates device nodes.
async fn probe_nvml(
    root: &Root,
    settings: &Settings,
    pci: &PciFacts,
) -> Result<ProbeOutcome, String> {
    if !pci.gpus().any(PciDevice::is_bound_to_nvidia) {
        return Err("no GPU is bound to the nvidia driver".into());
    }
    let name = &settings.gpu.nvml_library;
    let library = if root.is_running_system() {
        name.clone()
    } else {
        // The loader would search this machine, not the root.
        let candidates = match name.starts_with('/') {
            true => vec![root.at(name)],
            false => nvml_library::LIBRARY_DIRS
                .iter()
                .map(|dir| root.at(Path::new(dir).join(name)))
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

async fn read_docker(
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
    let query = async {
        let engine = Client::connect(&settings.docker.socket).await?;
        let info = engine.info().await?;
        let mut images: Images = Vec::new();
        for name in &names {
            let found = engine.find_image(name).await;
            images.push((
                name.clone(),
                found.map(|image| image.is_some()).map_err(|error| error.to_string()),
            ));
        }
        Ok::<_, EngineError>((info, images))
    };
    let why = match tokio::time::timeout(TIMEOUT, query).await {
        Ok(Ok((info, images))) => return (Ok(info), images),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the Docker engine did not respond within {} s", TIMEOUT.as_secs()),
    };
    let images = names.into_iter().map(|name| (name, Err(why.clone()))).collect();
    (Err(why), images)
}

/// Returns why a fact is unknown, as it is reported.
fn unknown(error: ReadError) -> String {
    error.to_string()
}

fn numa_nodes(root: &Root) -> Result<Vec<(String, String)>, String> {
    const DIR: &str = "/sys/devices/system/node";
    let is_node = |name: &String| {
        name.strip_prefix("node").is_some_and(|number| number.parse::<u32>().is_ok())
    };
    let nodes = root.list(DIR).map_err(unknown)?.into_iter().filter(is_node);
    nodes
        .map(|node| {
            let cpus =
                root.read(&format!("{DIR}/{node}/cpulist")).map_err(unknown)?.unwrap_or_default();
            Ok((node, cpus.trim().to_owned()))
        })
        .collect()
}

fn cdi_specs(root: &Root) -> Result<Vec<String>, String> {
    let mut specs = Vec::new();
    for dir in ["/etc/cdi", "/var/run/cdi"] {
        for name in root.list(dir).map_err(unknown)? {
            let path = format!("{dir}/{name}");
            let is_spec = [".yaml", ".yml", ".json"].iter().any(|ending| name.ends_with(ending));
            if is_spec
                && root
                    .read(&path)
                    .map_err(unknown)?
                    .is_some_and(|text| text.contains("nvidia.com/gpu"))
            {
                specs.push(path);
            }
        }
    }
    Ok(specs)
}

/// Returns the free bytes of the directory, or of its nearest existing ancestor.
fn free_bytes(root: &Root, dir: &str) -> Result<u64, String> {
    let path = root.at(dir);
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(root.path());
    let stat = rustix::fs::statvfs(existing).map_err(|error| format!("{dir}: {error}"))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn read_memory_mib(root: &Root) -> Result<u64, String> {
    let text = root.read("/proc/meminfo").map_err(unknown)?.ok_or("no /proc/meminfo")?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = kib.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map(|kib| kib / 1024).ok_or_else(|| "/proc/meminfo has no MemTotal".into())
}
