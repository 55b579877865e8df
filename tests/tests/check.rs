//! `check`: the real binary against simulated root directories of VMs and KVM hosts, and against
//! templates.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::thread;

use common::{TIMEOUT, engine_with, gpu_context, json_of, one_gpu, sysfs_of_one};
use serde_json::{Value, json};
use supernode_tests::{Output, Sandbox, Sysfs, agent_binary, nvml_library, run};

const GPU: &str = "0000:01:00.0";
const HOST_GPU: &str = "0000:e1:00.0";
const HOST_SOUND: &str = "0000:e1:00.1";
const PCI_CONF: &str = "var/tmp/one/etc/im/kvm-probes.d/pci.conf";

/// A root directory of a system.
struct Root(Sandbox);

impl Root {
    /// An empty root with a `/sys` that contains these devices.
    fn new(sysfs: &Sysfs) -> Self {
        let root = Self(Sandbox::new("root"));
        let mut copy = Command::new("cp");
        copy.arg("-a").arg(sysfs.root()).arg(root.0.join("sys"));
        run(&mut copy, TIMEOUT).expect_success();
        root
    }

    /// A VM that meets all requirements of a GPU node except a Docker engine.
    fn vm() -> Self {
        Self::vm_with(&Sysfs::new().gpu(GPU).driver("nvidia").module("550.54.15"))
    }

    fn vm_with(sysfs: &Sysfs) -> Self {
        let root = Self::new(sysfs);
        root.write("etc/os-release", "ID=debian\n");
        root.context("FL_GPU_ENABLED='YES'\nFL_SUPERLINK_ADDRESS='h:1'\nPCI0_ADDRESS='01:00.0'\n");
        root.write("sys/class/dmi/id/product_name", "Standard PC (Q35 + ICH9, 2009)\n");
        root.write("sys/class/dmi/id/product_version", "pc-q35-8.2\n");
        root.write("sys/firmware/efi/fw_platform_size", "64\n");
        root.write("sys/devices/system/node/node0/cpulist", "0-7\n");
        root.write(
            "proc/cpuinfo",
            "processor\t: 0\nmodel name\t: AMD EPYC 7543\nflags\t\t: fpu avx avx2\n",
        );
        root.write("proc/meminfo", "MemTotal:       32768000 kB\n");
        root.write("usr/bin/nvidia-container-runtime", "#!/bin/sh\n");
        fs::set_permissions(
            root.0.join("usr/bin/nvidia-container-runtime"),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
        root.write("usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", fs::read(nvml_library()).unwrap());
        root
    }

    /// A KVM host with a GeForce GPU and an Intel CPU.
    fn host() -> Self {
        let card = Sysfs::new()
            .device(HOST_GPU, "0x10de", "0x030000", Some("vfio-pci"))
            .device(HOST_SOUND, "0x10de", "0x040300", Some("vfio-pci"))
            .device("0000:f1:00.0", "0x8086", "0x020000", Some("ixgbe"));
        let root = Self::new(&card);
        root.write("etc/os-release", "ID=ubuntu\nID_LIKE=debian\n");
        root.write("proc/cmdline", "BOOT_IMAGE=/vmlinuz root=/dev/sda1 intel_iommu=on iommu=pt\n");
        root.write("proc/cpuinfo", "vendor_id\t: GenuineIntel\n");
        for (group, address) in
            [("9", "0000:00:1c.0"), ("9", HOST_GPU), ("9", HOST_SOUND), ("10", "0000:f1:00.0")]
        {
            root.in_group(group, address);
        }
        for address in [HOST_GPU, HOST_SOUND] {
            root.write(&format!("etc/driverctl.d/{address}"), "vfio-pci\n");
        }
        root.write(
            "etc/udev/rules.d/99-vfio.rules",
            "SUBSYSTEM==\"vfio\", GROUP=\"kvm\", MODE=\"0666\"\n",
        );
        root.write(PCI_CONF, ":filter:\n  - '10de:*'\n:short_address: []\n:device_name: []\n");
        root
    }

    fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        self.0.write(path, text);
    }

    fn remove(&self, path: &str) {
        let path = self.0.join(path);
        let removed =
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    fn context(&self, text: &str) {
        self.write("run/one-context/context.sh.network", text);
    }

    fn in_group(&self, group: &str, address: &str) {
        let directory = self.0.join(format!("sys/kernel/iommu_groups/{group}/devices"));
        fs::create_dir_all(&directory).unwrap();
        symlink(format!("../../../../devices/{address}"), directory.join(address)).unwrap();
    }

    /// Adds a simulated Docker engine that answers the requests of `check`, with the PyTorch image.
    fn with_docker(self, runtimes: &Value) -> Self {
        fs::create_dir_all(self.0.join("run")).unwrap();
        fs::create_dir_all(self.0.join("var")).unwrap();
        // An absolute symlink, as on every system; it must be resolved inside the root.
        symlink("/run", self.0.join("var/run")).unwrap();
        let listener = UnixListener::bind(self.0.join("run/docker.sock")).unwrap();
        let info = json!({"ServerVersion": "26.1.5", "Runtimes": runtimes,
            "DockerRootDir": "/var/lib/docker"});
        thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let mut request = [0; 4096];
                let Ok(length) = stream.read(&mut request) else { continue };
                let request = String::from_utf8_lossy(&request[..length]).into_owned();
                let path = request.split(' ').nth(1).unwrap_or_default();
                let (status, body) = match path {
                    "/_ping" => ("200 OK", json!("OK")),
                    path if path.ends_with("/info") => ("200 OK", info.clone()),
                    path if path.contains("pytorch") => ("200 OK", json!({"Id": "sha256:1"})),
                    _ => ("404 Not Found", json!({"message": "no such thing"})),
                };
                let body = body.to_string();
                let head = "Content-Type: application/json\r\nApi-Version: 1.45\r\n\
                 Connection: close\r\nContent-Length";
                let _ = write!(stream, "HTTP/1.1 {status}\r\n{head}: {}\r\n\r\n{body}", body.len());
            }
        });
        self
    }

    /// Runs `check SUBJECT --root ROOT` with the GPU of the NVML simulator.
    #[track_caller]
    fn run(&self, subject: &str, more: &[&str]) -> Output {
        let script = self.0.write("nvml.json", one_gpu().to_string());
        let mut command = Command::new(agent_binary());
        command
            .args(["check", subject, "--root"])
            .arg(self.0.path())
            .args(more)
            .env_clear()
            .env("NVML_SIMULATOR", script);
        run(&mut command, TIMEOUT)
    }

    #[track_caller]
    fn checks(&self, subject: &str) -> Vec<Value> {
        let output = self.run(subject, &["--json"]);
        let document = json_of(&output);
        let checks = document["checks"].as_array().unwrap().clone();
        let has_error = checks.iter().any(|check| check["level"] == "ERROR");
        assert_eq!(output.code, Some(i32::from(has_error)), "{output:#?}");
        for check in checks.iter().filter(|check| check["level"] != "OK") {
            assert!(check["fix"].as_str().is_some_and(|fix| !fix.is_empty()), "no fix: {check}");
        }
        checks
    }

    /// Results that are not OK, as `LEVEL id`.
    #[track_caller]
    fn findings(&self, subject: &str) -> Vec<String> {
        let findings = self.checks(subject).into_iter().filter(|check| check["level"] != "OK");
        findings
            .map(|check| {
                format!("{} {}", check["level"].as_str().unwrap(), check["id"].as_str().unwrap())
            })
            .collect()
    }
}

fn runtimes() -> Value {
    json!({"runc": {"path": "runc"}, "nvidia": {"path": "nvidia-container-runtime"}})
}

/// Results that are not OK after this change of the healthy system.
#[track_caller]
fn vm_after(change: impl FnOnce(&Root)) -> Vec<String> {
    let root = Root::vm().with_docker(&runtimes());
    change(&root);
    root.findings("vm")
}

#[track_caller]
fn host_after(change: impl FnOnce(&Root)) -> Vec<String> {
    let root = Root::host();
    change(&root);
    root.findings("host")
}

#[test]
fn healthy_vm_passes_every_check() {
    let root = Root::vm().with_docker(&runtimes());
    let checks = root.checks("vm");
    let ids: Vec<_> = checks.iter().map(|check| check["id"].as_str().unwrap()).collect();
    assert_eq!(
        ids,
        [
            "settings",
            "configuration",
            "gpu-enabled",
            "gpu-assigned",
            "gpu-present",
            "gpu-driver",
            "kernel-module",
            "nvml",
            "gpu",
            "gpu-selection",
            "firmware",
            "machine-type",
            "cpu-model",
            "numa",
            "docker",
            "nvidia-runtime",
            "nvidia-runtime-program",
            "cdi",
            "image",
            "disk",
            "memory",
        ]
    );
    assert!(
        checks.iter().all(|check| check["level"] == "OK" || check["id"] == "disk"),
        "{checks:#?}"
    );
    let finding =
        |id: &str| checks.iter().find(|check| check["id"] == id).unwrap()["finding"].to_string();
    assert!(
        finding("gpu").contains("NVIDIA A100") && finding("kernel-module").contains("550.54.15")
    );
    assert!(finding("docker").contains("26.1.5"));
    assert!(
        finding("nvidia-runtime-program").contains("\"/usr/bin/nvidia-container-runtime\""),
        "not by its place in the root"
    );
}

#[test]
fn every_vm_fault_is_found_by_its_check() {
    for (change, expected) in [
        (&["firmware"][..], &["WARNING firmware"][..]),
        (&["machine"], &["WARNING machine-type"]),
        (&["cpu"], &["WARNING cpu-model"]),
        (&["numa"], &["WARNING numa"]),
        (&["runtime program"], &["ERROR nvidia-runtime-program"]),
        (&["library"], &["ERROR nvml"]),
        (&["memory"], &["WARNING memory"]),
        (&["assigned"], &["ERROR gpu-assigned"]),
        (&["variable"], &["WARNING configuration"]),
        (&["off"], &["WARNING gpu-enabled"]),
        (&["settings"], &["ERROR settings"]),
        (&["module"], &["ERROR kernel-module"]),
    ] {
        let found = vm_after(|root| match change[0] {
            "firmware" => root.remove("sys/firmware/efi"),
            "machine" => {
                root.write("sys/class/dmi/id/product_name", "Standard PC (i440FX + PIIX, 1996)\n");
                root.write("sys/class/dmi/id/product_version", "pc-i440fx-8.2\n");
            }
            "cpu" => root.write(
                "proc/cpuinfo",
                "model name : QEMU Virtual CPU version 2.5+\nflags : sse2\n",
            ),
            "numa" => root.write("sys/devices/system/node/node1/cpulist", "8-15\n"),
            "runtime program" => root.remove("usr/bin/nvidia-container-runtime"),
            "library" => root.write("usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", "cut off"),
            "memory" => root.write("proc/meminfo", "MemTotal: 2000000 kB\n"),
            "assigned" => root
                .context("FL_GPU_ENABLED='YES'\nPCI0_ADDRESS='01:00.0'\nPCI1_ADDRESS='21:00.0'\n"),
            "variable" => root.context("FL_GPU_ENABLED='YES'\nFL_GPU_ENABLE='YES'\n"),
            "off" => root.context("FL_GPU_ENABLED='NO'\n"),
            "settings" => root.write("etc/supernode-agent/agent.toml", "[gpus]\n"),
            "module" => root.write("sys/module/nvidia/initstate", "coming\n"),
            other => panic!("{other}"),
        });
        let found: Vec<_> =
            found.iter().map(String::as_str).filter(|found| *found != "WARNING disk").collect();
        assert_eq!(found, expected, "{change:?}");
    }
}

#[test]
fn absent_gpu_or_wrong_driver_fails_before_nvml() {
    let absent = Root::vm_with(&Sysfs::new()).with_docker(&runtimes());
    assert_eq!(absent.findings("vm")[..2], ["ERROR gpu-assigned", "ERROR gpu-present"]);
    let nouveau = Root::vm_with(&Sysfs::new().gpu(GPU).driver("nouveau")).with_docker(&runtimes());
    assert_eq!(
        nouveau.findings("vm")[..3],
        ["ERROR gpu-driver", "ERROR kernel-module", "WARNING nvml"]
    );
    let fix =
        nouveau.checks("vm").into_iter().find(|check| check["id"] == "gpu-driver").unwrap()["fix"]
            .to_string();
    assert!(
        fix.contains(" nvidia-driver ") && !fix.contains("ubuntu-drivers"),
        "not Debian's: {fix}"
    );
}

#[test]
fn vm_check_without_docker_reports_unknowns() {
    let root = Root::vm();
    let checks = root.checks("vm");
    let levels = |id: &str| checks.iter().find(|check| check["id"] == id).unwrap().clone();
    assert_eq!(levels("docker")["level"], "ERROR");
    assert_eq!(levels("gpu")["level"], "OK");
    for id in ["nvidia-runtime", "image"] {
        assert_eq!(levels(id)["level"], "WARNING");
        assert!(levels(id)["finding"].as_str().unwrap().starts_with("unknown: "), "{}", levels(id));
    }
    let without_runtime = Root::vm().with_docker(&json!({"runc": {"path": "runc"}}));
    let found: Vec<_> = without_runtime
        .findings("vm")
        .into_iter()
        .filter(|found| found != "WARNING disk")
        .collect();
    assert_eq!(found, ["WARNING nvidia-runtime"]);
}

#[test]
fn vm_check_queries_runtimes_and_images_of_engine() {
    let Some((_engine, mut vm)) = engine_with(&one_gpu()) else { return };
    vm.sysfs(&sysfs_of_one()).context(&gpu_context(&[]));
    let document = json_of(&vm.run_command("check", &["vm", "--json"]));
    let checks = document["checks"].as_array().unwrap();
    let of = |id: &str| checks.iter().find(|check| check["id"] == id).unwrap();
    for id in ["docker", "gpu", "gpu-selection", "image", "nvidia-runtime-program"] {
        assert_eq!(of(id)["level"], "OK", "{document:#}");
    }
    // It is not configured yet.
    assert_eq!(of("nvidia-runtime")["level"], "WARNING", "{document:#}");
}

#[test]
fn root_option_isolates_the_check_from_this_system() {
    let root = Root(Sandbox::new("root"));
    fs::create_dir_all(root.0.join("etc")).unwrap();
    symlink("/etc/os-release", root.0.join("etc/os-release")).unwrap();
    symlink("/proc", root.0.join("proc")).unwrap();
    symlink("../../../../../../../../sys", root.0.join("sys")).unwrap();
    let text = root.run("vm", &[]);
    assert_eq!(text.code, Some(1));
    for words in [
        "/proc/cpuinfo: too many levels of symbolic links",
        "no context in ",
        "/sys: too many levels of symbolic links",
    ] {
        assert!(text.stdout.contains(words), "{words}: {}", text.stdout);
    }
    assert!(!text.stdout.contains("MiB"), "{}", text.stdout);
    let found = root.findings("host");
    assert!(
        found.contains(&"WARNING iommu-kernel".into())
            && found.contains(&"WARNING iommu-groups".into()),
        "{found:?}"
    );
}

#[test]
fn healthy_host_passes_every_check() {
    let checks = Root::host().checks("host");
    let ids: Vec<_> = checks.iter().map(|check| check["id"].as_str().unwrap()).collect();
    assert_eq!(
        ids,
        [
            "iommu-kernel",
            "iommu-groups",
            "vfio-pci",
            "gpu-present",
            "vfio-binding",
            "vfio-binding",
            "iommu-group-isolation",
            "driver-override",
            "vfio-udev",
            "pci-filter",
        ]
    );
    assert!(checks.iter().all(|check| check["level"] == "OK"), "{checks:#?}");
}

#[test]
fn every_host_fault_is_found_by_its_check() {
    let amd = |root: &Root| {
        root.write("proc/cpuinfo", "vendor_id : AuthenticAMD\n");
        root.write("proc/cmdline", "quiet\n");
    };
    assert!(host_after(amd).is_empty());
    assert_eq!(
        host_after(|root| root.write("proc/cmdline", "quiet amd_iommu=off\n")),
        ["ERROR iommu-kernel"]
    );
    let off = |root: &Root| {
        root.write("proc/cmdline", "quiet\n");
        root.remove("sys/kernel/iommu_groups");
    };
    assert_eq!(host_after(off), ["ERROR iommu-kernel", "ERROR iommu-groups"]);
    assert_eq!(
        host_after(|root| root.in_group("9", "0000:f1:00.0")),
        ["ERROR iommu-group-isolation"]
    );
    assert_eq!(
        host_after(|root| root.remove(&format!("etc/driverctl.d/{HOST_SOUND}"))),
        ["WARNING driver-override"]
    );
    assert_eq!(
        host_after(|root| root.remove("etc/udev/rules.d/99-vfio.rules")),
        ["ERROR vfio-udev"]
    );
    assert_eq!(host_after(|root| root.write(PCI_CONF, ":filter: '0:0'\n")), ["ERROR pci-filter"]);
    assert_eq!(host_after(|root| root.remove(PCI_CONF)), ["ERROR pci-filter"]);
    // Root can read every file, so an unreadable file is simulated by a directory.
    let unread = |root: &Root| {
        root.remove("proc/cmdline");
        fs::create_dir(root.0.join("proc/cmdline")).unwrap();
    };
    assert_eq!(host_after(unread), ["WARNING iommu-kernel"]);
    let sound = |root: &Root| {
        let device = root.0.join(format!("sys/bus/pci/devices/{HOST_SOUND}/driver"));
        fs::remove_file(&device).unwrap();
        symlink("../../../../bus/pci/drivers/snd_hda_intel", device).unwrap();
    };
    let root = Root::host();
    sound(&root);
    let text = root.run("host", &[]).stdout;
    assert!(
        text.contains(
            "0000:e1:00.1 (audio, 10de:20f1, class 0403) is bound to the driver snd_hda_intel, \
             not to vfio-pci"
        ),
        "{text}"
    );
    assert!(
        text.contains("fix: apt install driverctl; driverctl set-override 0000:e1:00.1 vfio-pci"),
        "{text}"
    );
}

#[track_caller]
fn template(text: &str, more: &[&str]) -> Output {
    let sandbox = Sandbox::new("template");
    let file = sandbox.write("vm.tmpl", text);
    let mut command = Command::new(agent_binary());
    run(command.args(["check", "template"]).arg(file).args(more).env_clear(), TIMEOUT)
}

const TEMPLATE: &str = r#"NAME="supernode"
OS=[ MACHINE="q35", FIRMWARE="UEFI" ]
CPU_MODEL=[ MODEL="host-passthrough" ]
PCI=[ VENDOR="10de", CLASS="0302" ]
CONTEXT=[ NETWORK="YES", TOKEN="YES", REPORT_READY="YES",
  READY_SCRIPT_PATH="/opt/flower/scripts/health-check.sh",
  FL_GPU_ENABLED="YES" ]
"#;

#[test]
fn template_check_reports_faults_by_line() {
    let good = template(TEMPLATE, &["--json"]);
    assert_eq!((good.code, &json_of(&good)["warnings"]), (Some(0), &json!(0)), "{}", good.stdout);
    let wrong = TEMPLATE
        .replace("MACHINE=\"q35\", ", "")
        .replace("FL_GPU_ENABLED", "FL_GPU_ENABLE")
        .replace("\"0302\"", "\"0302\",SHORT_ADDRESS=\"e1:00.0\"");
    let found = template(&wrong, &[]);
    assert_eq!(found.code, Some(1));
    let lines = found.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
    for words in [
        "ERROR machine line 2: OS has no MACHINE",
        "ERROR pci line 4: SHORT_ADDRESS and VENDOR",
        "WARNING variable line 7: FL_GPU_ENABLE is not a known variable",
        "fix: did you mean FL_GPU_ENABLED?",
    ] {
        assert!(lines.contains(words), "{words}: {}", found.stdout);
    }
    assert!(!found.stdout.contains('\x1b'), "colours without a terminal");
    let syntax = template("OS=[ MACHINE=\"q35\"\n", &[]);
    assert!(
        syntax.stdout.contains("ERROR    syntax  line 1: column 4: the bracket of OS"),
        "{}",
        syntax.stdout
    );
}

#[test]
fn usage_error_differs_from_finding() {
    let command = |arguments: &[&str]| {
        run(Command::new(agent_binary()).args(arguments).env_clear(), TIMEOUT).code
    };
    assert_eq!(command(&["check"]), Some(2));
    assert_eq!(command(&["check", "template"]), Some(2));
    assert_eq!(command(&["check", "vm", "--root", "/nowhere/at/all"]), Some(2));
    assert_eq!(command(&["check", "template", "/nowhere/at/all"]), Some(1));
}

#[test]
fn packaged_scripts_call_the_checks() {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/scripts");
    for (script, subject) in [("validate-gpu.sh", "vm"), ("validate-host-gpu.sh", "host")] {
        let text = fs::read_to_string(scripts.join(script)).unwrap();
        assert!(
            text.ends_with(&format!("exec /usr/bin/supernode-agent check {subject} \"$@\"\n")),
            "{text}"
        );
        assert_ne!(fs::metadata(scripts.join(script)).unwrap().permissions().mode() & 0o111, 0);
    }
}
