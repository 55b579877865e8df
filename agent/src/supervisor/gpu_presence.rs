//! Whether a running container still has its GPU, while the machine has it: the device nodes, and
//! the rules of its device cgroup. Looked at from outside; nothing is needed in the image.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::docker::client::Container;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::GpuDevice;

/// How often the device nodes are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// At every so many looks systemd is asked, too: that costs a process.
const LOOKS_A_QUESTION: u32 = 3;
const SYSTEMCTL_LIMIT: Duration = Duration::from_secs(5);

/// Looks whether the device nodes of `devices` are in the container; `None` where all are there.
///
/// # Errors
/// When it cannot be told: the process has ended, or must not be looked at.
pub(crate) fn find_missing_devices(
    container: &Container,
    devices: &[GpuDevice],
) -> io::Result<Option<Finding>> {
    if devices.is_empty() || container.pid == 0 {
        return Ok(None);
    }
    let dev = format!("/proc/{}/root/dev", container.pid);
    let nodes = gpu_nodes(Path::new(&dev))
        .map_err(|error| io::Error::new(error.kind(), format!("{dev}: {error}")))?;
    let is_missing = |device: &&GpuDevice| match device.minor {
        Some(minor) => !nodes.contains(&format!("/dev/nvidia{minor}")),
        None => nodes.is_empty(),
    };
    let missing: Vec<&GpuDevice> = devices.iter().filter(is_missing).collect();
    let Some(first) = missing.first() else {
        return Ok(None);
    };
    let there = if nodes.is_empty() { "no /dev/nvidia<n>".into() } else { nodes.join(", ") };
    let titles: Vec<String> = missing.iter().map(ToString::to_string).collect();
    Ok(Some(not_visible(
        first,
        format!("the container runs, and {} is not in it (it has {there})", titles.join(", ")),
    )))
}

fn not_visible(device: &GpuDevice, summary: String) -> Finding {
    Finding {
        gpu_uuid: Some(device.uuid.clone()),
        pci_address: Some(device.pci_address.clone()),
        ..Finding::new(Reason::GpuNotVisible, summary)
    }
}

/// The `/dev/nvidia<n>` among the character devices of a /dev. The driver gives a GPU the number of
/// its minor.
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

/// Waits until the container has lost one of `devices`, at least one. `by_hook`: they came through
/// NVIDIA's runtime, whose hook changes the device cgroup behind systemd's back.
pub(crate) async fn until_lost(
    container: &Container,
    devices: &[GpuDevice],
    by_hook: bool,
) -> Finding {
    let mut systemd = Systemd::default();
    loop {
        for _ in 0..LOOKS_A_QUESTION {
            tokio::time::sleep(LOOK).await;
            match find_missing_devices(container, devices) {
                Ok(None) => {}
                Ok(Some(finding)) => return finding,
                Err(error) => {
                    tracing::debug!("cannot see whether the GPU is in the container: {error}")
                }
            }
        }
        if by_hook
            && let Some(first) = devices.first()
            && systemd.has_taken_gpu_from(&container.id).await
        {
            return not_visible(
                first,
                "systemctl daemon-reload took the GPU from the container: systemd applied its own device rules again, in \
                 which NVIDIA's runtime hook has no part (nvidia-container-toolkit, issue 48); with CDI that does not happen"
                    .into(),
            );
        }
    }
}

/// What systemd was heard to say last.
#[derive(Default)]
struct Systemd {
    manager: String,
}

impl Systemd {
    /// Where Docker leaves cgroups to itself there is no such scope; without systemd there is
    /// nobody to ask.
    async fn has_taken_gpu_from(&mut self, container: &str) -> bool {
        let Some(manager) = systemctl_show("UnitsLoadTimestampMonotonic", None).await else {
            return false;
        };
        // It has loaded nothing since: the answer is that of before.
        if manager == self.manager {
            return false;
        }
        let scope = format!("docker-{container}.scope");
        let properties = "LoadState,ActiveEnterTimestampMonotonic,DevicePolicy,DeviceAllow";
        let Some(scope) = systemctl_show(properties, Some(&scope)).await else {
            return false;
        };
        self.manager = manager;
        gpu_is_taken(&self.manager, &scope)
    }
}

async fn systemctl_show(properties: &str, unit: Option<&str>) -> Option<String> {
    let shown = Command::new("systemctl")
        .args(["show", "--property", properties])
        .args(unit.map(|unit| ["--", unit]).into_iter().flatten())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(SYSTEMCTL_LIMIT, shown).await.ok()?.ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether systemd, which has loaded its units again after the container's start, has applied
/// device rules to the container's scope that leave out NVIDIA's devices: from what `systemctl
/// show` says of the manager and of the scope (org.freedesktop.systemd1(5); how runc writes the
/// rules: opencontainers/cgroups, devices/systemd.go).
fn gpu_is_taken(manager: &str, scope: &str) -> bool {
    let values = |text: &str, name: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        lines.map(str::to_owned).collect()
    };
    let moment = |text: &str, name: &str| {
        values(text, name).first()?.parse::<u64>().ok().filter(|moment| *moment > 0)
    };
    let (Some(loaded), Some(started)) = (
        moment(manager, "UnitsLoadTimestampMonotonic"),
        moment(scope, "ActiveEnterTimestampMonotonic"),
    ) else {
        return false;
    };
    let is_loaded = values(scope, "LoadState") == ["loaded"];
    // With `auto` and an empty list everything is allowed.
    let is_closed = values(scope, "DevicePolicy").iter().any(|policy| policy != "auto");
    // Every container may make nodes of any device (`char-* m`), which opens none of them.
    let opens_gpu = |rule: &String| {
        let (devices, access) = rule.split_once(' ').unwrap_or((rule, "rwm"));
        let names_gpu = ["/dev/char/195:", "/dev/nvidia", "char-195", "char-nvidia", "char-*"];
        access.contains(['r', 'w']) && names_gpu.iter().any(|begin| devices.starts_with(begin))
    };
    is_loaded
        && is_closed
        && loaded > started
        && !values(scope, "DeviceAllow").iter().any(opens_gpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RELOADED: &str = "UnitsLoadTimestampMonotonic=900000000\n";
    /// As systemd 257 shows the scope of a container of Docker 26.
    const HOOK: &str = "DevicePolicy=strict\nDeviceAllow=char-pts rwm\nDeviceAllow=/dev/char/1:3 rwm\n\
                        DeviceAllow=char-* m\nDeviceAllow=block-* m\nLoadState=loaded\n\
                        ActiveEnterTimestampMonotonic=500000000\n";

    #[test]
    fn a_reload_after_the_start_takes_the_gpu_from_a_scope_whose_rules_have_none() {
        assert!(gpu_is_taken(RELOADED, HOOK));
    }

    #[test]
    fn nothing_is_taken_where_one_thing_is_otherwise() {
        assert!(
            !gpu_is_taken("UnitsLoadTimestampMonotonic=400000000\n", HOOK),
            "the reload came before"
        );
        assert!(!gpu_is_taken("UnitsLoadTimestampMonotonic=0\n", HOOK), "no reload since the boot");
        assert!(
            !gpu_is_taken("UnitsLoadTimestampMonotonic=\n", HOOK),
            "a systemd that does not tell"
        );
        assert!(!gpu_is_taken("", HOOK));
        assert!(!gpu_is_taken(RELOADED, ""));
        for rule in [
            "/dev/char/195:0 rwm",
            "/dev/nvidia0 rw",
            "char-nvidia-frontend rwm",
            "char-195 rw",
            "char-* rwm",
        ] {
            assert!(!gpu_is_taken(RELOADED, &format!("{HOOK}DeviceAllow={rule}\n")), "{rule}");
        }
        for (this, that) in [
            ("LoadState=loaded", "LoadState=not-found"),
            ("DevicePolicy=strict", "DevicePolicy=auto"),
            ("=500000000", "=0"),
            ("=500000000", "=950000000"),
        ] {
            assert!(!gpu_is_taken(RELOADED, &HOOK.replace(this, that)), "{that}");
        }
    }
}
