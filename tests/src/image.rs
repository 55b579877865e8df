//! Test image in place of the framework images: busybox, a user 49999, and a script in place of
//! `flower-supernode`.
//!
//! The script prints each argument as `arg VALUE`, its environment as `env K=V` and NVIDIA's device
//! nodes as `device PATH`. It then prints `INFO : SuperNode ID: 1` with colours on standard error,
//! as Flower does once connected, and waits for SIGTERM, on which it exits with 0. Values in
//! `--node-config` change this: `test-exit=3` exits with 3 after half a second,
//! `test-ignore-term=true` ignores SIGTERM, `test-never-connects=true` omits the connection line,
//! `test-floods=64` writes that many MiB without a line break before it, and `test-flaps=0.5` loses
//! and restores the connection, each after this many seconds, until the container stops. On SIGUSR1
//! it allocates up to half a GiB of memory.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use crate::{process::run, sandbox::Sandbox};

/// The reference that the agent uses by default.
pub const PYTORCH: &str = "flower-supernode-pytorch:1.31.0";

const SCRIPT: &str = r#"#!/bin/sh
# Simulates flower-supernode.
set -u
exit_code=
connects=yes
flaps=
trap 'exit 0' TERM INT
trap 'x=x; while [ ${#x} -lt 300000000 ]; do x=$x$x; done' USR1
for argument in "$@"; do
    echo "arg $argument"
    for word in $argument; do
        case $word in
            test-exit=*) exit_code=${word#test-exit=} ;;
            test-ignore-term=true) trap '' TERM ;;
            test-never-connects=true) connects= ;;
            test-flaps=*) flaps=${word#test-flaps=} ;;
            test-floods=*) busybox head -c "${word#test-floods=}m" /dev/zero | busybox tr '\0' x ;;
        esac
    done
done
env | sort | sed 's/^/env /'
for node in /dev/nvidia*; do
    [ -e "$node" ] && echo "device $node"
done
[ -n "$connects" ] && printf '\033[92mINFO \033[0m:      SuperNode ID: 1\n' >&2
if [ -n "$exit_code" ]; then
    sleep 0.5
    exit "$exit_code"
fi
while [ -n "$flaps" ]; do
    sleep "$flaps" &
    wait $!
    echo 'WARNING :   Connection attempt failed, retrying in 0.50 seconds' >&2
    sleep "$flaps" &
    wait $!
    echo 'INFO :      SuperNode ID: 1' >&2
done
while :; do
    sleep 3600 &
    wait $!
done
"#;

const APPLETS: &[&str] =
    &["cat", "env", "id", "ls", "nc", "sed", "sh", "sleep", "sort", "touch", "true"];

/// Dockerfile instructions that turn the file system into an image, in the form of `docker import
/// --change`.
pub(crate) const INSTRUCTIONS: &[&str] = &[
    r#"ENTRYPOINT ["/usr/bin/flower-supernode"]"#,
    "ENV PATH=/usr/bin:/bin",
    "WORKDIR /app",
    "USER 49999:49999",
];

/// Returns the image's file system as a tar for `docker import`; built once per test process.
///
/// # Panics
/// If busybox (Debian: busybox-static) or tar is missing.
pub fn test_image() -> PathBuf {
    static TAR: OnceLock<PathBuf> = OnceLock::new();
    TAR.get_or_init(build).clone()
}

fn build() -> PathBuf {
    let root = Sandbox::new("image");
    let busybox =
        ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).is_file());
    let busybox =
        std::fs::read(busybox.expect("busybox-static is needed for images")).expect("busybox");
    root.write("bin/busybox", busybox);
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).expect("a link to busybox");
    }
    root.write("usr/bin/flower-supernode", SCRIPT);
    root.write("etc/passwd", "root:x:0:0::/root:/bin/sh\napp:x:49999:49999::/app:/bin/sh\n");
    root.write("etc/group", "root:x:0:\napp:x:49999:\n");
    for directory in ["app", "tmp", "proc", "sys", "dev"] {
        std::fs::create_dir_all(root.join(directory))
            .expect("cannot create a directory of the image");
    }
    // Shared by all test processes in cargo's output directory. Renamed into place, so that no
    // reader sees a partial file.
    let directory = std::env::current_exe().expect("the path of this test").with_file_name("");
    let tar = directory.join("supernode-tests-image.tar");
    let script = "chmod 755 bin/busybox usr/bin/flower-supernode; chmod 1777 tmp; \
                  chown -R 49999:49999 app; \
                  tar -cf \"$0.$$\" . && mv \"$0.$$\" \"$0\"";
    let mut command = Command::new("sh");
    command.arg("-ec").arg(script).arg(&tar).current_dir(root.path());
    run(&mut command, Duration::from_secs(30)).expect_success();
    tar
}

/// Syntax check with the shell that runs the script in the container.
#[test]
fn entrypoint_script_is_valid_shell() {
    let sandbox = Sandbox::new("script");
    let path = sandbox.write("flower-supernode", SCRIPT);
    run(Command::new("busybox").args(["sh", "-n"]).arg(path), Duration::from_secs(5))
        .expect_success();
}
