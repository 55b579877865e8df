//! Checks whether a running container still has its GPUs: its device nodes, and the rules of its
//! device cgroup. The checks run outside the container; the image needs no tools.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::docker::client::Container;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::GpuDevice;

/// Interval of the check of device nodes.
const NODE_CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Number of checks of device nodes per check of the device rules, which starts a process.
const NODE_CHECKS_PER_RULE_CHECK: u32 = 3;
const SYSTEMCTL_TIMEOUT: Duration = Duration::from_secs(5);

/// Returns a finding that names those of `devices` whose device node is missing in the container;
/// `None` if none is missing.
///
/// # Errors
/// If the container's process exited or its file system cannot be read.
pub(crate) fn find_missing_devices(
    container: &Container,
    devices: &[GpuDevice],
) -> io::Result<Option<Finding>> {
    if devices.is_empty() || container.pid == 0 {
        return Ok(None);
    }
    let dev_dir = format!("/proc/{}/root/dev", container.pid);
    let nodes = gpu_nodes(Path::new(&dev_dir))
        .map_err(|error| io::Error::new(error.kind(), format!("{dev_dir}: {error}")))?;
    let is_missing = |device: &&GpuDevice| match device.minor {
        Some(minor) => !nodes.contains(&format!("/dev/nvidia{minor}")),
        None => nodes.is_empty(),
    };
    let missing: Vec<&GpuDevice> = devices.iter().filter(is_missing).collect();
    let Some(first) = missing.first() else {
        return Ok(None);
    };
    let present = if nodes.is_empty() { "no /dev/nvidia<n>".into() } else { nodes.join(", ") };
    let names: Vec<String> = missing.iter().map(ToString::to_string).collect();
    Ok(Some(not_visible(
        first,
        format!("the container runs without {} (it has {present})", names.join(", ")),
    )))
}

fn not_visible(device: &GpuDevice, summary: String) -> Finding {
    Finding {
        gpu_uuid: Some(device.uuid.clone()),
        pci_address: device.pci_address,
        ..Finding::new(Reason::GpuNotVisible, summary)
    }
}

/// Returns the `/dev/nvidia<n>` character devices in a `/dev` directory. The number is the GPU's
/// minor number.
fn gpu_nodes(dev: &Path) -> io::Result<Vec<String>> {
    let mut nodes = Vec::new();
    for entry in std::fs::read_dir(dev)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let numbered = name
            .strip_prefix("nvidia")
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()));
        if numbered && entry.file_type()?.is_char_device() {
            nodes.push(format!("/dev/{name}"));
        }
    }
    nodes.sort();
    Ok(nodes)
}

/// Waits until the container loses one of `devices`, which must not be empty. `injected_by_hook` is
/// whether NVIDIA's runtime hook injected them: the hook changes the device cgroup without
/// systemd's knowledge.
pub(crate) async fn wait_until_lost(
    container: &Container,
    devices: &[GpuDevice],
    injected_by_hook: bool,
) -> Finding {
    let mut rules = DeviceRules::default();
    loop {
        for _ in 0..NODE_CHECKS_PER_RULE_CHECK {
            tokio::time::sleep(NODE_CHECK_INTERVAL).await;
            match find_missing_devices(container, devices) {
                Ok(None) => {}
                Ok(Some(finding)) => return finding,
                Err(error) => {
                    tracing::debug!("cannot check whether the container has its GPU: {error}")
                }
            }
        }
        if injected_by_hook
            && let Some(first) = devices.first()
            && rules.exclude_gpu(&container.id).await
        {
            return not_visible(
                first,
                "systemctl daemon-reload removed the GPU from the container: systemd applied its \
                 own device rules, without those of NVIDIA's runtime hook \
                 (nvidia-container-toolkit, issue 48); CDI is not affected"
                    .into(),
            );
        }
    }
}

/// The device rules that systemd applied to the container's scope.
#[derive(Default)]
struct DeviceRules {
    /// Output of `systemctl show` for the manager at the last check.
    manager: String,
}

impl DeviceRules {
    /// Whether systemd excluded the GPUs after the container started. `false` without systemd, and
    /// if Docker does not use systemd for cgroups, so that the scope does not exist.
    async fn exclude_gpu(&mut self, container: &str) -> bool {
        let Some(manager) = systemctl_show("UnitsLoadTimestampMonotonic", None).await else {
            return false;
        };
        // No reload since the last check.
        if manager == self.manager {
            return false;
        }
        let scope = format!("docker-{container}.scope");
        let properties = "LoadState,ActiveEnterTimestampMonotonic,DevicePolicy,DeviceAllow";
        let Some(scope) = systemctl_show(properties, Some(&scope)).await else {
            return false;
        };
        self.manager = manager;
        gpu_is_excluded(&self.manager, &scope)
    }
}

async fn systemctl_show(properties: &str, unit: Option<&str>) -> Option<String> {
    let command = Command::new("systemctl")
        .args(["show", "--property", properties])
        .args(unit.map(|unit| ["--", unit]).into_iter().flatten())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(SYSTEMCTL_TIMEOUT, command).await.ok()?.ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether systemd reloaded its units after the container started, and applied device rules to the
/// container's scope that exclude NVIDIA's devices. Takes the output of `systemctl show` for the
/// manager and for the scope (org.freedesktop.systemd1(5); runc writes the rules as in
/// opencontainers/cgroups, devices/systemd.go).
fn gpu_is_excluded(manager: &str, scope: &str) -> bool {
    let values = |text: &str, name: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        lines.map(str::to_owned).collect()
    };
    let timestamp = |text: &str, name: &str| {
        values(text, name).first()?.parse::<u64>().ok().filter(|timestamp| *timestamp > 0)
    };
    let (Some(loaded), Some(started)) = (
        timestamp(manager, "UnitsLoadTimestampMonotonic"),
        timestamp(scope, "ActiveEnterTimestampMonotonic"),
    ) else {
        return false;
    };
    let is_loaded = values(scope, "LoadState") == ["loaded"];
    // `auto` with an empty list allows every device.
    let is_restricted = values(scope, "DevicePolicy").iter().any(|policy| policy != "auto");
    // Every container may create nodes of any device (`char-* m`), but that does not allow access.
    let allows_gpu = |rule: &String| {
        let (devices, access) = rule.split_once(' ').unwrap_or((rule, "rwm"));
        let gpu_prefixes = ["/dev/char/195:", "/dev/nvidia", "char-195", "char-nvidia", "char-*"];
        access.contains(['r', 'w']) && gpu_prefixes.iter().any(|prefix| devices.starts_with(prefix))
    };
    is_loaded
        && is_restricted
        && loaded > started
        && !values(scope, "DeviceAllow").iter().any(allows_gpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RELOADED: &str = "UnitsLoadTimestampMonotonic=900000000\n";
    /// Scope of a container of Docker 26, as shown by systemd 257.
    const SCOPE: &str = "DevicePolicy=strict\n\
                         DeviceAllow=char-pts rwm\nDeviceAllow=/dev/char/1:3 rwm\n\
                         DeviceAllow=char-* m\nDeviceAllow=block-* m\nLoadState=loaded\n\
                         ActiveEnterTimestampMonotonic=500000000\n";

    #[test]
    fn reload_after_start_excludes_gpu_of_hook() {
        assert!(gpu_is_excluded(RELOADED, SCOPE));
    }

    #[test]
    fn gpu_is_not_excluded_if_one_condition_fails() {
        assert!(
            !gpu_is_excluded("UnitsLoadTimestampMonotonic=400000000\n", SCOPE),
            "reload before the start"
        );
        assert!(
            !gpu_is_excluded("UnitsLoadTimestampMonotonic=0\n", SCOPE),
            "no reload since the boot"
        );
        assert!(
            !gpu_is_excluded("UnitsLoadTimestampMonotonic=\n", SCOPE),
            "unknown time of the reload"
        );
        assert!(!gpu_is_excluded("", SCOPE));
        assert!(!gpu_is_excluded(RELOADED, ""));
        for rule in [
            "/dev/char/195:0 rwm",
            "/dev/nvidia0 rw",
            "char-nvidia-frontend rwm",
            "char-195 rw",
            "char-* rwm",
        ] {
            assert!(!gpu_is_excluded(RELOADED, &format!("{SCOPE}DeviceAllow={rule}\n")), "{rule}");
        }
        for (from, to) in [
            ("LoadState=loaded", "LoadState=not-found"),
            ("DevicePolicy=strict", "DevicePolicy=auto"),
            ("=500000000", "=0"),
            ("=500000000", "=950000000"),
        ] {
            assert!(!gpu_is_excluded(RELOADED, &SCOPE.replace(from, to)), "{to}");
        }
    }
}
