//! Config + Verdict + SuperLink + Settings -> ContainerSpec: what the container will be. Pure.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Serialize;

use crate::config::settings::Settings;
use crate::config::{Config, Framework};
use crate::container::site_hook;
use crate::docker::nvidia_runtime::GpuInjection;
use crate::flower::release::{HEALTH_FLAG, HEALTH_PORT, Release};
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::opennebula::partition::Partition;
use crate::opennebula::superlink::SuperLink;
use crate::values::{ImageRef, NodeConfig, Version};

/// Label: the hash of the specification that a container was made from.
pub const SPEC_HASH_LABEL: &str = "supernode-agent.spec-hash";
/// Label: the agent's `state.dir`, of which there is one for each node on an engine: whose
/// container it is.
pub const STATE_DIR_LABEL: &str = "supernode-agent.state-dir";
/// Label: `cuda` or `cpu`.
pub const VERDICT_LABEL: &str = "supernode-agent.verdict";
/// Label: size of `/dev/shm` in MiB.
pub const SHM_SIZE_LABEL: &str = "supernode-agent.shm-size-mib";
/// Label: the code of the reason, on a CPU fallback. Like all labels it tells of the launch; a
/// container that is adopted later, by an agent with another finding, keeps it.
pub const REASON_LABEL: &str = "supernode-agent.reason";
/// Label: the reason's particulars, on a CPU fallback.
pub const SUMMARY_LABEL: &str = "supernode-agent.summary";
/// Label: the hash of the GPU specification that this CPU container stands in for.
pub const REFUSED_HASH_LABEL: &str = "supernode-agent.refused-spec-hash";

/// The user that Flower's images run as.
pub const USER: &str = "49999:49999";
/// What of the driver a container with a GPU gets: CUDA, and NVML.
pub const DRIVER_CAPABILITIES: &str = "compute,utility";
const PIDS_LIMIT: i64 = 4096;
const FLWR_HOME: &str = "/app/.flwr";
const CA_TARGET: &str = "/app/ca.crt";
/// The CA file's name in `container.certs_dir`.
pub const CA_FILE: &str = "ca.crt";

/// A container, whole: the same specification makes the same container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ContainerSpec {
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: String,
    /// The arguments of `flower-supernode`: a list, no shell sees them.
    pub args: Vec<String>,
    /// Its environment.
    pub env: BTreeMap<String, String>,
    /// The OCI runtime by its name in Docker, always named: the default one may be anything.
    pub runtime: String,
    /// CDI devices, where the GPU comes that way.
    pub cdi_devices: Vec<String>,
    /// Labels; not part of the hash.
    pub labels: BTreeMap<String, String>,
    /// Bind mounts.
    pub mounts: Vec<MountSpec>,
    /// Digest of the mounted CA file: a file that is mounted stays the old one when it is replaced,
    /// so another CA is another container.
    pub ca_digest: Option<String>,
    /// Folders in memory, with their mount options.
    pub tmpfs: BTreeMap<String, String>,
    /// User and group.
    pub user: String,
    /// Most processes and threads.
    pub pids_limit: i64,
    /// Size of `/dev/shm` in MiB.
    pub shm_size_mib: u64,
    /// Whether that size follows the machine's memory.
    pub shm_follows_memory: bool,
    /// Ports that are reached from outside. Left out where there are none: the hash of a node's
    /// container is an old one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortSpec>,
    /// Docker's log driver.
    pub log_driver: String,
    /// Its options.
    pub log_options: BTreeMap<String, String>,
}

/// A bind mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MountSpec {
    /// On the host.
    pub source: String,
    /// In the container.
    pub target: String,
    /// Whether the container may not write there.
    pub read_only: bool,
}

/// A port of the container, and where it is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PortSpec {
    /// On the host.
    pub listen: SocketAddr,
    /// In the container.
    pub port: u16,
}

/// What the specification needs to know of the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// All memory, in MiB.
    pub memory_mib: u64,
    /// Whether a journal takes logs.
    pub has_journal: bool,
    /// What the image has in PYTHONPATH.
    pub image_python_path: Option<String>,
}

impl ContainerSpec {
    /// The digest of everything but the labels. A size that follows the memory counts as that:
    /// memory that is plugged in is no reason to stop a training.
    pub fn hash(&self) -> String {
        let mut bare = Self { labels: BTreeMap::new(), ..self.clone() };
        if bare.shm_follows_memory {
            bare.shm_size_mib = 0;
        }
        // A structure of texts and numbers always has a JSON.
        digest(&serde_json::to_string(&bare).unwrap_or_default())
    }

    /// The same for people's eyes: secrets in the node configuration are hidden.
    pub fn redacted(&self, node_config: Option<&NodeConfig>) -> Self {
        let mut shown = self.clone();
        if let Some(node_config) = node_config {
            for argument in
                shown.args.iter_mut().filter(|argument| *argument == node_config.as_str())
            {
                *argument = node_config.redacted();
            }
        }
        shown
    }
}

/// FNV-1a, 64 bits: it tells texts apart, it does not protect them.
fn digest(text: &str) -> String {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", text.bytes().fold(0xcbf2_9ce4_8422_2325, step))
}

/// The image that the operator wants.
pub fn wanted_image(config: &Config) -> ImageRef {
    config.image.clone().unwrap_or_else(|| image_of(config.framework, &config.version))
}

/// The image that is on the machine since it was built, for the case that the wanted one is not to
/// be had. An operator's own image has no such stand-in.
pub fn prebaked_image(config: &Config) -> Option<ImageRef> {
    config.image.is_none().then(|| image_of(config.prebaked.framework, &config.prebaked.version))
}

/// The release of Flower in `image`, as far as it is known: for an operator's own image it is what
/// FLOWER_VERSION says, or that of the prebaked one.
pub fn version_in<'a>(config: &'a Config, image: &ImageRef) -> &'a Version {
    if prebaked_image(config).as_ref() == Some(image) {
        &config.prebaked.version
    } else {
        &config.version
    }
}

fn image_of(framework: Framework, version: &Version) -> ImageRef {
    match framework {
        Framework::Base => ImageRef::of("flwr/supernode", version),
        framework => ImageRef::of(&format!("flower-supernode-{framework}"), version),
    }
}

/// What the container will be.
pub fn plan_container(
    config: &Config,
    verdict: &Verdict,
    access: &GpuInjection,
    superlink: Option<&SuperLink>,
    image: &ImageRef,
    machine: &Machine,
    settings: &Settings,
) -> ContainerSpec {
    let (runtime, cdi_devices) = way_in(verdict.devices(), access);
    let (log_driver, log_options) = logging(settings, machine);
    let mut spec = ContainerSpec {
        name: settings.container.name.clone(),
        image: image.to_string(),
        args: arguments(config, superlink, Release::of(version_in(config, image))),
        env: environment(config, verdict, access, machine),
        runtime: runtime.into(),
        cdi_devices,
        labels: BTreeMap::new(),
        mounts: mounts(config, verdict, superlink, settings),
        ca_digest: superlink.and_then(|superlink| superlink.ca.as_ref()).map(|ca| digest(ca.pem())),
        // Apps are installed below FLWR_HOME and run from there.
        tmpfs: BTreeMap::from([(FLWR_HOME.into(), "uid=49999,gid=49999,mode=0700,exec".into())]),
        user: USER.into(),
        pids_limit: PIDS_LIMIT,
        shm_size_mib: match settings.container.shm_size_mib {
            0 => (machine.memory_mib / 2).max(64),
            size => size,
        },
        shm_follows_memory: settings.container.shm_size_mib == 0,
        ports: Vec::new(),
        log_driver,
        log_options,
    };
    spec.labels.insert(SPEC_HASH_LABEL.into(), spec.hash());
    spec.labels.insert(STATE_DIR_LABEL.into(), settings.state.dir.to_string_lossy().into_owned());
    spec.labels.insert(SHM_SIZE_LABEL.into(), spec.shm_size_mib.to_string());
    spec.labels.insert(VERDICT_LABEL.into(), verdict.device().into());
    if let Verdict::Cpu { finding: Some(finding) } = verdict {
        spec.labels.insert(REASON_LABEL.into(), finding.reason.code().into());
        spec.labels.insert(SUMMARY_LABEL.into(), finding.summary.clone());
    }
    spec
}

fn arguments(config: &Config, superlink: Option<&SuperLink>, release: &Release) -> Vec<String> {
    let mut args = Vec::new();
    let mut add = |words: &[&str]| args.extend(words.iter().map(|word| (*word).to_owned()));
    if let Some(superlink) = superlink {
        add(&["--superlink", &superlink.address.to_string()]);
        match superlink.ca {
            Some(_) => add(&["--root-certificates", CA_TARGET]),
            None => add(&["--insecure"]),
        }
    }
    add(&["--isolation", config.isolation]);
    let partition = superlink.and_then(|superlink| superlink.partition);
    match (&config.node_config, partition) {
        (Some(node_config), _) => add(&["--node-config", node_config.as_str()]),
        (None, Some(Partition { id, count })) => {
            add(&["--node-config", &format!("partition-id={id} num-partitions={count}")]);
        }
        (None, None) => {}
    }
    // Flower reads 0 as "once": without the flag it tries for ever.
    if config.max_retries > 0 {
        add(&["--max-retries", &config.max_retries.to_string()]);
    }
    if config.max_wait_time > 0 {
        add(&["--max-wait-time", &config.max_wait_time.to_string()]);
    }
    if release.serves_health() {
        add(&[HEALTH_FLAG, &format!("0.0.0.0:{HEALTH_PORT}")]);
    }
    args
}

/// How a container gets `devices`: the OCI runtime, and the CDI devices.
pub fn way_in(devices: &[GpuDevice], access: &GpuInjection) -> (&'static str, Vec<String>) {
    match access {
        _ if devices.is_empty() => ("runc", Vec::new()),
        GpuInjection::Runtime => ("nvidia", Vec::new()),
        GpuInjection::Cdi(names) => ("runc", names.clone()),
    }
}

/// The value of `NVIDIA_VISIBLE_DEVICES`.
pub fn visible_devices(devices: &[GpuDevice], access: &GpuInjection) -> String {
    match access {
        GpuInjection::Runtime if !devices.is_empty() => {
            let uuids: Vec<&str> = devices.iter().map(|device| device.uuid.as_str()).collect();
            uuids.join(",")
        }
        // Where the devices come by CDI, a runtime that looks at this variable must add nothing.
        _ => "void".into(),
    }
}

fn environment(
    config: &Config,
    verdict: &Verdict,
    access: &GpuInjection,
    machine: &Machine,
) -> BTreeMap<String, String> {
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
    set("NVIDIA_VISIBLE_DEVICES", &visible_devices(devices, access));
    if devices.is_empty() {
        return env;
    }
    if *access == GpuInjection::Runtime {
        set("NVIDIA_DRIVER_CAPABILITIES", DRIVER_CAPABILITIES);
    }
    // CUDA's order is nvidia-smi's. CUDA_VISIBLE_DEVICES is left alone: the container has the
    // selected GPUs and no other.
    set("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
    set("TF_FORCE_GPU_ALLOW_GROWTH", "true");
    set("XLA_PYTHON_CLIENT_PREALLOCATE", "false");
    if let Some(fraction) = &config.memory_fraction {
        set("FL_GPU_MEMORY_FRACTION", &fraction.to_string());
        set("XLA_PYTHON_CLIENT_MEM_FRACTION", &fraction.to_string());
        set(site_hook::LIMITS_VARIABLE, &memory_limits(devices, fraction.share()));
        let python_path = match machine.image_python_path.as_deref() {
            None | Some("") => site_hook::TARGET.to_owned(),
            Some(others) => format!("{}:{others}", site_hook::TARGET),
        };
        set("PYTHONPATH", &python_path);
    }
    env
}

/// The share of each device's memory in MiB, in CUDA's order, 0 where the memory is not known.
fn memory_limits(devices: &[GpuDevice], share: f64) -> String {
    let mut in_order: Vec<_> = devices.iter().collect();
    in_order.sort_by(|a, b| a.pci_address.cmp(&b.pci_address));
    // A limit of 0 would mean that it is not known.
    let limit = |memory_mib: u64| ((memory_mib as f64 * share).floor() as u64).max(1);
    let limits: Vec<String> =
        in_order.iter().map(|device| device.memory_mib.map_or(0, limit).to_string()).collect();
    limits.join(",")
}

fn mounts(
    config: &Config,
    verdict: &Verdict,
    superlink: Option<&SuperLink>,
    settings: &Settings,
) -> Vec<MountSpec> {
    let read_only = |source: &std::path::Path, target: &str| MountSpec {
        source: source.to_string_lossy().into_owned(),
        target: target.into(),
        read_only: true,
    };
    let mut mounts = vec![read_only(&settings.container.data_dir, "/app/data")];
    if superlink.is_some_and(|superlink| superlink.ca.is_some()) {
        mounts.push(read_only(&settings.container.certs_dir.join(CA_FILE), CA_TARGET));
    }
    if matches!(verdict, Verdict::Gpu { .. }) && config.memory_fraction.is_some() {
        mounts.push(read_only(&site_hook::folder(&settings.state.dir), site_hook::TARGET));
    }
    mounts
}

/// Docker's log driver, and its options.
pub fn logging(settings: &Settings, machine: &Machine) -> (String, BTreeMap<String, String>) {
    let driver = match settings.container.log_driver.as_str() {
        "auto" if machine.has_journal => "journald",
        "auto" => "json-file",
        named => named,
    };
    let options = match driver {
        // Without these a json-file grows without end.
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
    use crate::gpu::reason::{Finding, Reason};

    fn gpu() -> Verdict {
        let device = |index: u32, pci_address: &str, memory_mib| GpuDevice {
            index,
            uuid: format!("GPU-{index}"),
            name: None,
            pci_address: pci_address.into(),
            memory_mib,
            minor: Some(index),
        };
        let devices = vec![device(0, "0000:21:00.0", Some(1001)), device(1, "0000:01:00.0", None)];
        Verdict::Gpu { devices, missing: Vec::new() }
    }

    fn spec(context: &str, verdict: &Verdict, access: &GpuInjection) -> ContainerSpec {
        let context = Context::parse(context.as_bytes()).unwrap();
        let (config, _) = Config::from_context(&context, &Prebaked::default()).unwrap();
        let machine = Machine {
            memory_mib: 8000,
            has_journal: true,
            image_python_path: Some("/app/lib".into()),
        };
        let image = wanted_image(&config);
        let superlink = config.superlink_address.clone().map(|address| SuperLink {
            address,
            ca: config.ca_certificate.clone().filter(|_| config.tls == Some(true)),
            vm_id: None,
            version: None,
            partition: None,
        });
        plan_container(
            &config,
            verdict,
            access,
            superlink.as_ref(),
            &image,
            &machine,
            &Settings::default(),
        )
    }

    #[test]
    fn the_image_follows_framework_and_version_and_an_own_image_is_taken_as_it_is() {
        for (context, image) in [
            ("", "flower-supernode-pytorch:1.31.0"),
            (
                "ML_FRAMEWORK='TensorFlow'\nFLOWER_VERSION='1.25.0'\n",
                "flower-supernode-tensorflow:1.25.0",
            ),
            ("FL_FRAMEWORK='base'\n", "flwr/supernode:1.31.0"),
            ("FL_SUPERNODE_IMAGE='host:5000/own@sha256'\n", ""),
            ("FL_SUPERNODE_IMAGE='host:5000/own:2'\n", "host:5000/own:2"),
        ] {
            let context = Context::parse(context.as_bytes()).unwrap();
            match Config::from_context(&context, &Prebaked::default()) {
                Ok((config, _)) => assert_eq!(wanted_image(&config).as_str(), image),
                Err(_) => assert_eq!(image, ""),
            }
        }
    }

    #[test]
    fn retries_of_0_are_left_out_for_flower_reads_0_as_once() {
        let cpu = Verdict::gpu_not_enabled();
        let args = |context: &str| spec(context, &cpu, &GpuInjection::Runtime).args;
        assert_eq!(
            args("FL_MAX_RETRIES='0'\nFL_MAX_WAIT_TIME='0'\n"),
            ["--isolation", "subprocess", "--health-server-address", "0.0.0.0:9099"]
        );
        let all = args(
            "FL_SUPERLINK_ADDRESS='[::1]:9092'\nFL_MAX_RETRIES='3'\nFL_MAX_WAIT_TIME='60'\nFL_ISOLATION='process'\nFL_NODE_CONFIG='a=1 b=\"x y\"'\n",
        );
        assert_eq!(
            all,
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
    fn a_flag_that_the_release_in_the_image_does_not_know_is_left_out() {
        let prebaked = Prebaked { version: Version::of(1, 20, 0), ..Prebaked::default() };
        let context = Context::parse(b"FLOWER_VERSION='1.31.0'\n").unwrap();
        let (config, _) = Config::from_context(&context, &prebaked).unwrap();
        let args =
            |image: &ImageRef| arguments(&config, None, Release::of(version_in(&config, image)));
        assert!(args(&wanted_image(&config)).contains(&HEALTH_FLAG.into()));
        assert_eq!(args(&prebaked_image(&config).unwrap()), ["--isolation", "subprocess"]);
    }

    #[test]
    fn a_gpu_goes_in_by_the_runtime_or_by_cdi_and_never_by_both() {
        let by_runtime = spec("", &gpu(), &GpuInjection::Runtime);
        assert_eq!((by_runtime.runtime.as_str(), by_runtime.cdi_devices.len()), ("nvidia", 0));
        assert_eq!(by_runtime.env["NVIDIA_VISIBLE_DEVICES"], "GPU-0,GPU-1");
        let by_cdi = spec("", &gpu(), &GpuInjection::Cdi(vec!["nvidia.com/gpu=GPU-0".into()]));
        assert_eq!((by_cdi.runtime.as_str(), by_cdi.cdi_devices.len()), ("runc", 1));
        assert_eq!(by_cdi.env["NVIDIA_VISIBLE_DEVICES"], "void");
        for spec in [by_runtime, by_cdi] {
            assert_eq!(spec.env["FL_DEVICE"], "cuda");
            assert!(!spec.env.contains_key("CUDA_VISIBLE_DEVICES"));
        }
    }

    #[test]
    fn a_memory_fraction_reaches_every_framework_and_none_means_growth_on_demand() {
        let limited = spec("FL_GPU_MEMORY_FRACTION='0.5'\n", &gpu(), &GpuInjection::Runtime);
        assert_eq!(limited.env["XLA_PYTHON_CLIENT_MEM_FRACTION"], "0.5");
        // In CUDA's order, which is that of the PCI addresses; 0 where the memory is not known.
        assert_eq!(limited.env[site_hook::LIMITS_VARIABLE], "0,500");
        assert_eq!(limited.env["PYTHONPATH"], "/opt/supernode-agent/site:/app/lib");
        let free = spec("", &gpu(), &GpuInjection::Runtime);
        assert_eq!(free.env["TF_FORCE_GPU_ALLOW_GROWTH"], "true");
        assert_eq!(free.env["XLA_PYTHON_CLIENT_PREALLOCATE"], "false");
        assert!(!free.env.contains_key("PYTHONPATH") && free.mounts.len() == 1);
        let on_cpu = spec(
            "FL_GPU_MEMORY_FRACTION='0.5'\n",
            &Verdict::gpu_not_enabled(),
            &GpuInjection::Runtime,
        );
        assert!(!on_cpu.env.contains_key("PYTHONPATH") && on_cpu.mounts.len() == 1);
    }

    #[test]
    fn the_hash_is_of_everything_but_the_labels_and_the_same_in_every_release() {
        let cpu = spec("", &Verdict::gpu_not_enabled(), &GpuInjection::Runtime);
        let finding = Finding::new(Reason::GpuLost, "x");
        let fallback = spec("", &Verdict::cpu(finding), &GpuInjection::Runtime);
        assert_eq!(cpu.hash(), fallback.hash());
        assert_eq!(fallback.labels[REASON_LABEL], "gpu-lost");
        assert_ne!(
            cpu.hash(),
            spec("FL_LOG_LEVEL='DEBUG'\n", &Verdict::gpu_not_enabled(), &GpuInjection::Runtime)
                .hash()
        );
        // Another hash for the same wish makes every node replace its container at the next
        // upgrade: think twice.
        assert_eq!(cpu.hash(), "e0122d98a7ba84ea");
    }

    #[test]
    fn memory_that_is_plugged_in_changes_no_hash_and_a_size_of_the_operators_does() {
        let with = |memory_mib, shm_size_mib| {
            let context = Context::parse(b"FL_SUPERLINK_ADDRESS='h:1'\n").unwrap();
            let (config, _) = Config::from_context(&context, &Prebaked::default()).unwrap();
            let machine = Machine { memory_mib, ..Machine::default() };
            let mut settings = Settings::default();
            settings.container.shm_size_mib = shm_size_mib;
            let image = wanted_image(&config);
            plan_container(
                &config,
                &Verdict::gpu_not_enabled(),
                &GpuInjection::Runtime,
                None,
                &image,
                &machine,
                &settings,
            )
        };
        assert_eq!(with(8000, 0).hash(), with(16000, 0).hash());
        // A container that has ended is made anew for it.
        assert_ne!(with(8000, 0).labels[SHM_SIZE_LABEL], with(16000, 0).labels[SHM_SIZE_LABEL]);
        assert_ne!(with(8000, 0).hash(), with(8000, 4000).hash());
        assert_ne!(with(8000, 2000).hash(), with(8000, 4000).hash());
    }

    #[test]
    fn a_journal_takes_the_log_and_a_file_is_bounded() {
        let settings = Settings::default();
        let with = |has_journal| logging(&settings, &Machine { has_journal, ..Machine::default() });
        assert_eq!(with(true), ("journald".into(), BTreeMap::new()));
        let (driver, options) = with(false);
        assert_eq!(
            (driver.as_str(), options["max-size"].as_str(), options["max-file"].as_str()),
            ("json-file", "10m", "3")
        );
    }

    #[test]
    fn people_see_the_specification_without_the_secrets_of_the_node_configuration() {
        let context = "FL_SUPERLINK_ADDRESS='h:1'\nFL_NODE_CONFIG='site=1 token=\"hunter2\"'\n";
        let spec = spec(context, &Verdict::gpu_not_enabled(), &GpuInjection::Runtime);
        let node_config = NodeConfig::parse("site=1 token=\"hunter2\"").unwrap();
        let mut expected = spec.clone();
        let secret =
            expected.args.iter().position(|argument| argument == node_config.as_str()).unwrap();
        expected.args[secret] = "site=1 token='(hidden)'".into();
        assert_eq!(spec.redacted(Some(&node_config)), expected);
        assert_eq!(spec.redacted(None), spec);
    }

    #[test]
    fn shared_memory_is_half_of_all_and_no_less_than_docker_gives_unless_the_operator_says() {
        let size = |memory_mib, shm_size_mib| {
            let (config, _) =
                Config::from_context(&Context::parse(b"").unwrap(), &Prebaked::default()).unwrap();
            let machine = Machine { memory_mib, ..Machine::default() };
            let mut settings = Settings::default();
            settings.container.shm_size_mib = shm_size_mib;
            let (verdict, image) = (Verdict::gpu_not_enabled(), wanted_image(&config));
            plan_container(
                &config,
                &verdict,
                &GpuInjection::Runtime,
                None,
                &image,
                &machine,
                &settings,
            )
            .shm_size_mib
        };
        assert_eq!([size(8000, 0), size(100, 0), size(8000, 7)], [4000, 64, 7]);
    }

    #[test]
    fn the_runtime_is_told_what_of_the_driver_to_bring_and_cdi_knows_it() {
        let capabilities =
            |access| spec("", &gpu(), &access).env.get("NVIDIA_DRIVER_CAPABILITIES").cloned();
        assert_eq!(capabilities(GpuInjection::Runtime).as_deref(), Some(DRIVER_CAPABILITIES));
        assert_eq!(capabilities(GpuInjection::Cdi(vec!["nvidia.com/gpu=GPU-0".into()])), None);
    }
}
