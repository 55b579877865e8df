//! The specification of the framework container. Pure: [`plan_container`] derives a
//! [`ContainerSpec`] from [`ContainerInputs`].

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::Config;
use crate::config::settings::Settings;
use crate::container::image::{FrameworkImage, flower_version};
use crate::container::site_hook;
use crate::docker::nvidia_runtime::GpuInjection;
use crate::docker::spec::{
    ContainerSpec, MountSpec, REASON_LABEL, SHM_SIZE_LABEL, SPEC_HASH_LABEL, STATE_DIR_LABEL,
    SUMMARY_LABEL, VERDICT_LABEL, digest,
};
use crate::flower::release::{HEALTH_FLAG, HEALTH_PORT, Release};
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::opennebula::partition::Partition;
use crate::opennebula::superlink::SuperLink;
use crate::system::info::SystemInfo;

/// User and group of Flower's images.
pub(crate) const USER: &str = "49999:49999";
/// Driver capabilities of a container with a GPU: CUDA and NVML.
pub(crate) const DRIVER_CAPABILITIES: &str = "compute,utility";
/// Name of the CA file in `container.certs_dir`.
pub(crate) const CA_FILE: &str = "ca.crt";
const PIDS_LIMIT: i64 = 4096;
const FLWR_HOME: &str = "/app/.flwr";
const CA_TARGET: &str = "/app/ca.crt";
/// Docker's default size of `/dev/shm`.
const MIN_SHM_SIZE_MIB: u64 = 64;

/// Everything that the framework container depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ContainerInputs<'a> {
    /// The context variables.
    pub config: &'a Config,
    /// The settings in agent.toml.
    pub settings: &'a Settings,
    /// GPU or CPU.
    pub verdict: &'a Verdict,
    /// Injection method for the GPUs of the verdict.
    pub injection: &'a GpuInjection,
    /// The SuperLink; `None` in `plan`, if discovery has not found one.
    pub superlink: Option<&'a SuperLink>,
    /// The framework image.
    pub image: &'a FrameworkImage,
    /// Memory and logging of the VM.
    pub system: &'a SystemInfo,
}

/// Derives the specification of the framework container.
pub(crate) fn plan_container(inputs: &ContainerInputs<'_>) -> ContainerSpec {
    let ContainerInputs { settings, verdict, superlink, .. } = *inputs;
    let (runtime, cdi_devices) = runtime_and_devices(verdict.devices(), inputs.injection);
    let (log_driver, log_options) = log_driver(settings, inputs.system);
    let mut spec = ContainerSpec {
        name: settings.container.name.clone(),
        image: inputs.image.reference.to_string(),
        args: supernode_args(inputs),
        env: environment(inputs),
        runtime: runtime.into(),
        cdi_devices,
        labels: BTreeMap::new(),
        mounts: mounts(inputs),
        ca_digest: superlink.and_then(|superlink| superlink.ca.as_ref()).map(|ca| digest(ca.pem())),
        // Flower installs apps below FLWR_HOME and executes them from there.
        tmpfs: BTreeMap::from([(FLWR_HOME.into(), "uid=49999,gid=49999,mode=0700,exec".into())]),
        user: USER.into(),
        pids_limit: PIDS_LIMIT,
        shm_size_mib: match settings.container.shm_size_mib {
            0 => (inputs.system.memory_mib / 2).max(MIN_SHM_SIZE_MIB),
            size => size,
        },
        shm_follows_memory: settings.container.shm_size_mib == 0,
        ports: Vec::new(),
        log_driver,
        log_options,
    };
    spec.labels = labels(inputs, &spec);
    spec
}

/// Returns the command line of `flower-supernode`.
///
/// | flag | source |
/// | --- | --- |
/// | `--superlink` | `FL_SUPERLINK_ADDRESS`, else discovery through OneGate |
/// | `--root-certificates`, else `--insecure` | whether [`SuperLink::ca`] is set |
/// | `--isolation` | `FL_ISOLATION` |
/// | `--node-config` | `FL_NODE_CONFIG`, else the partition of the service |
/// | `--max-retries`, `--max-wait-time` | `FL_MAX_RETRIES`, `FL_MAX_WAIT_TIME` |
/// | `--health-server-address` | if the Flower release in the image has the flag |
fn supernode_args(inputs: &ContainerInputs<'_>) -> Vec<String> {
    let ContainerInputs { config, superlink, image, .. } = *inputs;
    let mut args = Vec::new();
    let mut add = |words: &[&str]| args.extend(words.iter().map(|word| (*word).to_owned()));
    if let Some(superlink) = superlink {
        add(&["--superlink", &superlink.address.to_string()]);
        match superlink.ca {
            Some(_) => add(&["--root-certificates", CA_TARGET]),
            None => add(&["--insecure"]),
        }
    }
    add(&["--isolation", config.isolation.name()]);
    let partition = superlink.and_then(|superlink| superlink.partition);
    match (&config.node_config, partition) {
        (Some(node_config), _) => add(&["--node-config", node_config.as_str()]),
        (None, Some(Partition { id, count })) => {
            add(&["--node-config", &format!("partition-id={id} num-partitions={count}")]);
        }
        (None, None) => {}
    }
    // Flower reads 0 as "once". Without the flag it retries without limit.
    if config.max_retries > 0 {
        add(&["--max-retries", &config.max_retries.to_string()]);
    }
    if config.max_wait_time > 0 {
        add(&["--max-wait-time", &config.max_wait_time.to_string()]);
    }
    if Release::of(flower_version(config, &image.reference)).serves_health() {
        add(&[HEALTH_FLAG, &format!("0.0.0.0:{HEALTH_PORT}")]);
    }
    args
}

fn environment(inputs: &ContainerInputs<'_>) -> BTreeMap<String, String> {
    let ContainerInputs { config, verdict, injection, image, .. } = *inputs;
    let mut env = BTreeMap::new();
    let mut set = |name: &str, value: &str| env.insert(name.to_owned(), value.to_owned());
    set("FLWR_HOME", FLWR_HOME);
    set("FLWR_LOG_LEVEL", config.log_level.name());
    set("FLWR_TELEMETRY_ENABLED", "0");
    set("FLWR_DISABLE_UPDATE_CHECK", "1");
    set("FL_DEVICE", verdict.device());
    set("FL_GRPC_KEEPALIVE_TIME", &config.keepalive_time.to_string());
    set("FL_GRPC_KEEPALIVE_TIMEOUT", &config.keepalive_timeout.to_string());
    let devices = verdict.devices();
    set("NVIDIA_VISIBLE_DEVICES", &visible_devices(devices, injection));
    if devices.is_empty() {
        return env;
    }
    if *injection == GpuInjection::Runtime {
        set("NVIDIA_DRIVER_CAPABILITIES", DRIVER_CAPABILITIES);
    }
    // PCI_BUS_ID is also the order of nvidia-smi. CUDA_VISIBLE_DEVICES stays unset: the container
    // has the selected GPUs and no others.
    set("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
    set("TF_FORCE_GPU_ALLOW_GROWTH", "true");
    set("XLA_PYTHON_CLIENT_PREALLOCATE", "false");
    if let Some(fraction) = &config.memory_fraction {
        set("FL_GPU_MEMORY_FRACTION", &fraction.to_string());
        set("XLA_PYTHON_CLIENT_MEM_FRACTION", &fraction.to_string());
        set(site_hook::LIMITS_VARIABLE, &memory_limits(devices, fraction.value()));
        let python_path = match image.python_path.as_deref() {
            None | Some("") => site_hook::TARGET.to_owned(),
            Some(image_path) => format!("{}:{image_path}", site_hook::TARGET),
        };
        set("PYTHONPATH", &python_path);
    }
    env
}

/// Returns the memory limit of each device in MiB, in CUDA's device order, and 0 for a device whose
/// memory is unknown.
fn memory_limits(devices: &[GpuDevice], share: f64) -> String {
    let mut in_order: Vec<_> = devices.iter().collect();
    in_order.sort_by_key(|gpu| gpu.pci_address);
    // At least 1, because 0 means unknown.
    let limit = |memory_mib: u64| ((memory_mib as f64 * share).floor() as u64).max(1);
    let limits: Vec<String> =
        in_order.iter().map(|device| device.memory_mib.map_or(0, limit).to_string()).collect();
    limits.join(",")
}

fn mounts(inputs: &ContainerInputs<'_>) -> Vec<MountSpec> {
    let ContainerInputs { config, settings, verdict, superlink, .. } = *inputs;
    let read_only = |source: &Path, target: &str| MountSpec {
        source: source.to_string_lossy().into_owned(),
        target: target.into(),
        read_only: true,
    };
    let mut mounts = vec![read_only(&settings.container.data_dir, "/app/data")];
    if superlink.is_some_and(|superlink| superlink.ca.is_some()) {
        mounts.push(read_only(&settings.container.certs_dir.join(CA_FILE), CA_TARGET));
    }
    if matches!(verdict, Verdict::Gpu { .. }) && config.memory_fraction.is_some() {
        mounts.push(read_only(&site_hook::source_dir(&settings.state.dir), site_hook::TARGET));
    }
    mounts
}

fn labels(inputs: &ContainerInputs<'_>, spec: &ContainerSpec) -> BTreeMap<String, String> {
    let ContainerInputs { settings, verdict, .. } = *inputs;
    let mut labels = BTreeMap::from([
        (SPEC_HASH_LABEL.to_owned(), spec.hash()),
        (STATE_DIR_LABEL.to_owned(), settings.state.dir.to_string_lossy().into_owned()),
        (SHM_SIZE_LABEL.to_owned(), spec.shm_size_mib.to_string()),
        (VERDICT_LABEL.to_owned(), verdict.device().to_owned()),
    ]);
    if let Verdict::Cpu { finding: Some(finding) } = verdict {
        labels.insert(REASON_LABEL.to_owned(), finding.reason.code().to_owned());
        labels.insert(SUMMARY_LABEL.to_owned(), finding.summary.clone());
    }
    labels
}

/// Returns the OCI runtime and the CDI devices that inject `devices`.
pub(crate) fn runtime_and_devices(
    devices: &[GpuDevice],
    injection: &GpuInjection,
) -> (&'static str, Vec<String>) {
    match injection {
        _ if devices.is_empty() => ("runc", Vec::new()),
        GpuInjection::Runtime => ("nvidia", Vec::new()),
        GpuInjection::Cdi(names) => ("runc", names.clone()),
    }
}

/// Returns the value of `NVIDIA_VISIBLE_DEVICES`.
pub(crate) fn visible_devices(devices: &[GpuDevice], injection: &GpuInjection) -> String {
    match injection {
        GpuInjection::Runtime if !devices.is_empty() => {
            let uuids: Vec<&str> = devices.iter().map(|device| device.uuid.as_str()).collect();
            uuids.join(",")
        }
        // With CDI, an nvidia runtime that reads this variable must not add anything.
        _ => "void".into(),
    }
}

/// Returns Docker's log driver and its options.
pub(crate) fn log_driver(
    settings: &Settings,
    system: &SystemInfo,
) -> (String, BTreeMap<String, String>) {
    let driver = match settings.container.log_driver.as_str() {
        "auto" if system.has_journal => "journald",
        "auto" => "json-file",
        named => named,
    };
    let options = match driver {
        // Without limits these files grow until the disk is full.
        "json-file" | "local" => {
            BTreeMap::from([("max-size".into(), "10m".into()), ("max-file".into(), "3".into())])
        }
        _ => BTreeMap::new(),
    };
    (driver.into(), options)
}

#[cfg(test)]
mod tests {
    use one_context::Context;

    use super::*;
    use crate::config::Prebaked;
    use crate::container::image::{prebaked_image, wanted_image};
    use crate::gpu::reason::{Finding, Reason};
    use crate::values::{GpuUuid, PciAddress};
    use crate::values::{ImageRef, NodeConfig, Version};

    fn gpu() -> Verdict {
        let device = |index: u32, pci_address: &str, memory_mib| GpuDevice {
            index,
            uuid: GpuUuid::parse(format!("GPU-{index}")).unwrap(),
            name: None,
            pci_address: PciAddress::parse(pci_address),
            memory_mib,
            minor: Some(index),
        };
        let devices = vec![device(0, "0000:21:00.0", Some(1001)), device(1, "0000:01:00.0", None)];
        Verdict::Gpu { devices, missing: Vec::new() }
    }

    fn parse(context: &str) -> Config {
        let context = Context::parse(context.as_bytes()).unwrap();
        Config::from_context(&context, &Prebaked::default()).unwrap().0
    }

    fn cdi() -> GpuInjection {
        GpuInjection::Cdi(vec!["nvidia.com/gpu=GPU-0".into()])
    }

    fn spec(context: &str, verdict: &Verdict, injection: &GpuInjection) -> ContainerSpec {
        let config = parse(context);
        let system = SystemInfo { memory_mib: 8000, has_journal: true };
        let python_path = Some("/app/lib".into());
        let superlink = config.superlink_address.clone().map(|address| SuperLink {
            address,
            ca: config.ca_certificate.clone().filter(|_| config.tls == Some(true)),
            vm_id: None,
            version: None,
            partition: None,
        });
        plan_container(&ContainerInputs {
            config: &config,
            settings: &Settings::default(),
            verdict,
            injection,
            superlink: superlink.as_ref(),
            image: &FrameworkImage { reference: wanted_image(&config), python_path },
            system: &system,
        })
    }

    fn cpu_spec(context: &str) -> ContainerSpec {
        spec(context, &Verdict::gpu_not_enabled(), &GpuInjection::Runtime)
    }

    /// The container of a VM with this memory and `container.shm_size_mib`.
    fn spec_with_memory(memory_mib: u64, shm_size_mib: u64) -> ContainerSpec {
        let config = parse("");
        let mut settings = Settings::default();
        settings.container.shm_size_mib = shm_size_mib;
        plan_container(&ContainerInputs {
            config: &config,
            settings: &settings,
            verdict: &Verdict::gpu_not_enabled(),
            injection: &GpuInjection::Runtime,
            superlink: None,
            image: &FrameworkImage { reference: wanted_image(&config), python_path: None },
            system: &SystemInfo { memory_mib, has_journal: false },
        })
    }

    #[test]
    fn retry_flags_are_omitted_for_0() {
        assert_eq!(
            cpu_spec("FL_MAX_RETRIES='0'\nFL_MAX_WAIT_TIME='0'\n").args,
            ["--isolation", "subprocess", "--health-server-address", "0.0.0.0:9099"]
        );
        let all = cpu_spec(
            "FL_SUPERLINK_ADDRESS='[::1]:9092'\nFL_MAX_RETRIES='3'\nFL_MAX_WAIT_TIME='60'\n\
             FL_ISOLATION='process'\nFL_NODE_CONFIG='a=1 b=\"x y\"'\n",
        );
        assert_eq!(
            all.args,
            [
                "--superlink",
                "[::1]:9092",
                "--insecure",
                "--isolation",
                "process",
                "--node-config",
                "a=1 b=\"x y\"",
                "--max-retries",
                "3",
                "--max-wait-time",
                "60",
                "--health-server-address",
                "0.0.0.0:9099"
            ]
        );
    }

    #[test]
    fn flag_unknown_to_the_release_is_omitted() {
        let prebaked = Prebaked { version: Version::new(1, 20, 0), ..Prebaked::default() };
        let context = Context::parse(b"FLOWER_VERSION='1.31.0'\n").unwrap();
        let (config, _) = Config::from_context(&context, &prebaked).unwrap();
        let args = |reference: ImageRef| {
            supernode_args(&ContainerInputs {
                config: &config,
                settings: &Settings::default(),
                verdict: &Verdict::gpu_not_enabled(),
                injection: &GpuInjection::Runtime,
                superlink: None,
                image: &FrameworkImage { reference, python_path: None },
                system: &SystemInfo::default(),
            })
        };
        assert!(args(wanted_image(&config)).contains(&HEALTH_FLAG.into()));
        assert_eq!(args(prebaked_image(&config).unwrap()), ["--isolation", "subprocess"]);
    }

    #[test]
    fn gpu_is_injected_by_runtime_or_cdi_never_both() {
        let by_runtime = spec("", &gpu(), &GpuInjection::Runtime);
        assert_eq!((by_runtime.runtime.as_str(), by_runtime.cdi_devices.len()), ("nvidia", 0));
        assert_eq!(by_runtime.env["NVIDIA_VISIBLE_DEVICES"], "GPU-0,GPU-1");
        let by_cdi = spec("", &gpu(), &cdi());
        assert_eq!((by_cdi.runtime.as_str(), by_cdi.cdi_devices.len()), ("runc", 1));
        assert_eq!(by_cdi.env["NVIDIA_VISIBLE_DEVICES"], "void");
        for spec in [by_runtime, by_cdi] {
            assert_eq!(spec.env["FL_DEVICE"], "cuda");
            assert!(!spec.env.contains_key("CUDA_VISIBLE_DEVICES"));
        }
    }

    #[test]
    fn driver_capabilities_are_set_for_the_runtime_only() {
        let capabilities =
            |injection| spec("", &gpu(), &injection).env.get("NVIDIA_DRIVER_CAPABILITIES").cloned();
        assert_eq!(capabilities(GpuInjection::Runtime).as_deref(), Some(DRIVER_CAPABILITIES));
        assert_eq!(capabilities(cdi()), None);
    }

    #[test]
    fn memory_fraction_reaches_every_framework() {
        let limited = spec("FL_GPU_MEMORY_FRACTION='0.5'\n", &gpu(), &GpuInjection::Runtime);
        assert_eq!(limited.env["XLA_PYTHON_CLIENT_MEM_FRACTION"], "0.5");
        // In CUDA's device order, which is the order of the PCI addresses.
        assert_eq!(limited.env[site_hook::LIMITS_VARIABLE], "0,500");
        assert_eq!(limited.env["PYTHONPATH"], "/opt/supernode-agent/site:/app/lib");
        let on_cpu = cpu_spec("FL_GPU_MEMORY_FRACTION='0.5'\n");
        assert!(!on_cpu.env.contains_key("PYTHONPATH") && on_cpu.mounts.len() == 1);
    }

    #[test]
    fn memory_grows_on_demand_without_a_fraction() {
        let unlimited = spec("", &gpu(), &GpuInjection::Runtime);
        assert_eq!(unlimited.env["TF_FORCE_GPU_ALLOW_GROWTH"], "true");
        assert_eq!(unlimited.env["XLA_PYTHON_CLIENT_PREALLOCATE"], "false");
        assert!(!unlimited.env.contains_key("PYTHONPATH") && unlimited.mounts.len() == 1);
    }

    #[test]
    fn hash_excludes_labels_and_is_stable_across_releases() {
        let cpu = cpu_spec("");
        let finding = Finding::new(Reason::GpuLost, "x");
        let fallback = spec("", &Verdict::cpu(finding), &GpuInjection::Runtime);
        assert_eq!(cpu.hash(), fallback.hash());
        assert_eq!(fallback.labels[REASON_LABEL], "gpu-lost");
        assert_ne!(cpu.hash(), cpu_spec("FL_LOG_LEVEL='DEBUG'\n").hash());
        // A different hash for the same inputs makes every node replace its container at the next
        // upgrade: change it only on purpose.
        assert_eq!(cpu.hash(), "e0122d98a7ba84ea");
    }

    #[test]
    fn memory_hot_plug_keeps_the_hash() {
        let hash = |memory_mib, shm_size_mib| spec_with_memory(memory_mib, shm_size_mib).hash();
        assert_eq!(hash(8000, 0), hash(16000, 0));
        // The label differs, so a container that has exited is recreated with the new size.
        let label = |memory_mib| spec_with_memory(memory_mib, 0).labels[SHM_SIZE_LABEL].clone();
        assert_ne!(label(8000), label(16000));
        assert_ne!(hash(8000, 0), hash(8000, 4000));
        assert_ne!(hash(8000, 2000), hash(8000, 4000));
    }

    #[test]
    fn shm_size_is_half_the_memory_unless_configured() {
        let size =
            |memory_mib, shm_size_mib| spec_with_memory(memory_mib, shm_size_mib).shm_size_mib;
        assert_eq!([size(8000, 0), size(100, 0), size(8000, 7)], [4000, MIN_SHM_SIZE_MIB, 7]);
    }

    #[test]
    fn log_goes_to_the_journal_or_to_a_bounded_file() {
        let settings = Settings::default();
        let with = |has_journal| log_driver(&settings, &SystemInfo { memory_mib: 0, has_journal });
        assert_eq!(with(true), ("journald".into(), BTreeMap::new()));
        let (driver, options) = with(false);
        assert_eq!(
            (driver.as_str(), options["max-size"].as_str(), options["max-file"].as_str()),
            ("json-file", "10m", "3")
        );
    }

    #[test]
    fn redacted_spec_hides_node_config_secrets() {
        let spec =
            cpu_spec("FL_SUPERLINK_ADDRESS='h:1'\nFL_NODE_CONFIG='site=1 token=\"hunter2\"'\n");
        let node_config = NodeConfig::parse("site=1 token=\"hunter2\"").unwrap();
        let mut expected = spec.clone();
        let secret =
            expected.args.iter().position(|argument| argument == node_config.as_str()).unwrap();
        expected.args[secret] = "site=1 token='(hidden)'".into();
        assert_eq!(spec.redacted(Some(&node_config)), expected);
        assert_eq!(spec.redacted(None), spec);
    }
}
