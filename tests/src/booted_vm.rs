//! A VM that is really booted: systemd as PID 1, Docker, the package as dpkg installed it, and a
//! simulator of one-context with the units, ordering and files of the original.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    image,
    process::{Output, eventually, run, signal, skip_or_fail},
    sandbox::{Sandbox, nvml_library, runtime_binary, write},
    sysfs::Sysfs,
};

/// Upper bound for one boot and shutdown on a loaded machine with an emulated processor.
const BOOT_LIMIT: Duration = Duration::from_secs(600);

/// A powered-off VM. Files that it writes while running persist to its next boot.
#[derive(Debug)]
pub struct BootedVm {
    sandbox: Sandbox,
    lower: String,
}

/// The result of one boot.
#[derive(Debug)]
pub struct Boot {
    /// Output of the script, with a trace line for each command.
    pub output: String,
    /// Journal entries, oldest first.
    pub journal: Vec<Value>,
}

impl BootedVm {
    /// Creates a VM with the package that `SUPERNODE_DEB` names (`make deb` builds it). Returns
    /// `None` and prints the reason if the test must be skipped.
    ///
    /// # Panics
    /// If no VM can be created and `SUPERNODE_TESTS_REQUIRE_DOCKER=1` is set.
    #[must_use]
    #[track_caller]
    pub fn new() -> Option<Self> {
        static LAYERS: OnceLock<Result<String, String>> = OnceLock::new();
        match LAYERS.get_or_init(layers) {
            Ok(lower) => {
                Some(Self { sandbox: Sandbox::in_memory("machine"), lower: lower.clone() })
            }
            Err(reason) => {
                skip_or_fail("VM", reason);
                None
            }
        }
    }

    /// Writes the context, as the file on the context CD.
    pub fn context(&self, variables: &[(&str, &str)]) -> &Self {
        self.file("context/context.sh", crate::test_vm::context_text(variables))
    }

    /// Writes a file of the VM.
    pub fn file(&self, path: &str, content: impl AsRef<[u8]>) -> &Self {
        write(&self.path(path), content);
        self
    }

    /// Writes the agent's settings.
    pub fn settings(&self, text: &str) -> &Self {
        self.file("etc/supernode-agent/agent.toml", text)
    }

    /// Copies a file or directory of this machine into the VM; symlinks are preserved.
    pub fn copy(&self, from: &Path, to: &str) -> &Self {
        let to = self.path(to);
        fs::create_dir_all(to.parent().expect("a directory"))
            .expect("cannot create a directory of the VM");
        run(Command::new("cp").arg("--archive").arg(from).arg(&to), BOOT_LIMIT).expect_success();
        self
    }

    /// Adds a GPU: a simulated sysfs, the NVML simulator with this script, and the
    /// nvidia-container-runtime simulator.
    pub fn gpu(&self, sysfs: &Sysfs, nvml: &Value) -> &Self {
        self.copy(sysfs.root(), "simulator/sys")
            .copy(&nvml_library(), "simulator/libnvidia-ml.so.1")
            .copy(&runtime_binary(), "usr/bin/nvidia-container-runtime")
            .file("simulator/nvml.json", nvml.to_string())
            .file(
                "simulator/runtime.json",
                json!({"mode": "ok", "nvml": "/simulator/nvml.json"}).to_string(),
            )
            .settings(
                "[gpu]\nsysfs = \"/simulator/sys\"\n\
                 nvml_library = \"/simulator/libnvidia-ml.so.1\"\n",
            )
            .file(
                "etc/systemd/system/flower-supernode.service.d/simulator.conf",
                "[Service]\nEnvironment=NVML_SIMULATOR=/simulator/nvml.json\n",
            )
            .file(
                "etc/systemd/system/containerd.service.d/simulator.conf",
                "[Service]\nEnvironment=NVIDIA_RUNTIME_SIMULATOR=/simulator/runtime.json\n",
            )
    }

    /// Returns the path on this machine of a file of the VM.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        self.sandbox.join("upper").join(path.trim_start_matches('/'))
    }

    /// Boots the VM under nspawn, runs `script` once the boot is complete, and powers the VM off.
    /// The script is bash with `set -e`; `wait_for COMMAND` polls.
    ///
    /// # Panics
    /// If the VM does not boot or the script fails. The message contains the output.
    #[track_caller]
    pub fn boot(&self, script: &str) -> Boot {
        self.boot_by("nspawn.sh", script)
    }

    /// Boots the VM under QEMU with an emulated processor: with a kernel, a disk, the context on a
    /// CD and a network. The disk is new at each boot.
    ///
    /// # Panics
    /// If the VM does not boot or the script fails. The message contains the output.
    #[track_caller]
    pub fn boot_in_qemu(&self, script: &str) -> Boot {
        self.boot_by("qemu.sh", script)
    }

    #[track_caller]
    fn boot_by(&self, starter: &str, script: &str) -> Boot {
        for left in ["harness/output", "harness/code", "harness/journal"] {
            let _ = fs::remove_file(self.path(left));
        }
        self.file("harness/script", script);
        let console = run(&mut self.start_by(starter), BOOT_LIMIT);
        let read = |name: &str| {
            String::from_utf8_lossy(&fs::read(self.path(name)).unwrap_or_default()).into_owned()
        };
        let (output, code) = (read("harness/output"), read("harness/code"));
        let journal: Vec<Value> = read("harness/journal")
            .lines()
            .map(|line| serde_json::from_str(line).expect("a JSON journal entry"))
            .collect();
        assert!(
            code.trim() == "0",
            "exit code {code:?}: {output}\nconsole: {console:#?}\n{}",
            text_of(&journal)
        );
        Boot { output, journal }
    }

    /// Boots the VM and cuts its power as soon as `condition` holds.
    ///
    /// # Panics
    /// If the condition does not hold within the time limit.
    #[track_caller]
    pub fn cut_power_when(&self, condition: impl FnMut() -> bool) {
        self.file("harness/script", "sleep infinity");
        let mut on = self
            .start_by("nspawn.sh")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("cannot start the VM");
        let held = eventually(BOOT_LIMIT, condition);
        let id = on.id();
        let children =
            fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        let first_process: u32 = children.trim().parse().expect("PID 1 of the VM");
        // The kernel reports the end of PID 1 only after all other processes of the VM have ended
        // and released their locks.
        signal(first_process, Signal::KILL);
        let _ = on.wait();
        assert!(held, "the condition never held");
    }

    fn start_by(&self, starter: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(directory().join(starter));
        command.arg(&self.lower).arg(self.sandbox.path());
        command
    }
}

impl Boot {
    /// Returns the journal entries of a unit's processes, each as priority and message: `4 no
    /// usable GPU…`.
    #[must_use]
    pub fn messages_of(&self, unit: &str) -> Vec<String> {
        let of_unit = |entry: &&Value| entry["_SYSTEMD_UNIT"] == unit;
        self.journal.iter().filter(of_unit).map(line_of).collect()
    }

    /// Returns the entries that `journalctl -u UNIT -p warning` shows, including systemd's own
    /// messages about the unit.
    #[must_use]
    pub fn warnings_of(&self, unit: &str) -> Vec<&Value> {
        let of_unit = |entry: &Value| entry["_SYSTEMD_UNIT"] == unit || entry["UNIT"] == unit;
        let is_warning =
            |entry: &Value| entry["PRIORITY"].as_str().is_some_and(|priority| priority <= "4");
        self.journal.iter().filter(|entry| of_unit(entry) && is_warning(entry)).collect()
    }

    /// Returns script output and journal, for the message of a failed assertion.
    #[must_use]
    pub fn transcript(&self) -> String {
        format!("{}\n{}", self.output, text_of(&self.journal))
    }
}

fn text_of(journal: &[Value]) -> String {
    journal.iter().map(line_of).collect::<Vec<_>>().join("\n")
}

fn line_of(entry: &Value) -> String {
    let text = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
    format!("{} {}", text("PRIORITY"), text("MESSAGE"))
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("machines")
}

/// Returns the read-only layers that all VMs share, as overlayfs lists them. Builds missing layers.
fn layers() -> Result<String, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("booting a VM needs root".into());
    }
    let package = env::var_os("SUPERNODE_DEB")
        .ok_or("SUPERNODE_DEB is not set (make deb builds the package)")?;
    let package = fs::canonicalize(package).map_err(|error| format!("SUPERNODE_DEB: {error}"))?;
    let root = expect(run(
        &mut Command::new(directory().join("build-root.sh")),
        Duration::from_secs(900),
    ))?;
    let key = expect(run(
        Command::new("sh")
            .args([
                "-ec",
                "find \"$1\" -type f -print0 | sort -z | xargs -0 cat -- \"$0\" | \
                 sha256sum | cut -c1-16",
            ])
            .arg(&package)
            .arg(directory()),
        Duration::from_secs(60),
    ))?;
    let layer = env::current_exe()
        .map_err(|error| error.to_string())?
        .with_file_name(format!("machine-{key}"));
    if !layer.exists() {
        let mut install = Command::new(directory().join("install-layer.sh"));
        expect(run(install.arg(&root).arg(&package).arg(&layer), Duration::from_secs(300)))?;
        let copied = fs::copy(image::test_image(), layer.join("harness/image.tar"));
        copied.map_err(|error| format!("the image: {error}"))?;
        write(&layer.join("harness/image-changes"), image::INSTRUCTIONS.join("\n") + "\n");
    }
    Ok(format!("{}:{root}", layer.display()))
}

fn expect(output: Output) -> Result<String, String> {
    match output.code {
        Some(0) => Ok(output.stdout.trim().to_owned()),
        _ => Err(format!("{output:?}")),
    }
}
