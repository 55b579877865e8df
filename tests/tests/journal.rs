//! Journal entries: a fallback with its fields, received by the native journal protocol.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and print what they skip"
)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use common::gpu_context;
use supernode_tests::{TestVm, agent_binary, run};

/// Runs the agent (`$2`, settings `$3`) with the directory `$1` as `/run/systemd/journal` and
/// stderr connected to the journal according to JOURNAL_STREAM. Runs in a mount namespace, so that
/// this machine's /run is unchanged.
const ON_A_JOURNAL: &str = r#"
mount -t tmpfs run /run
mkdir -p /run/systemd/journal
mount --bind "$1" /run/systemd/journal
JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec "$2" run --settings "$3"
"#;

#[test]
fn fallback_is_one_journal_entry_with_message_id_and_fields() {
    let mut vm = TestVm::new();
    vm.context(&gpu_context(&[])).set("docker.ready_timeout_seconds", 0);
    let directory = vm.path("journal");
    fs::create_dir(&directory).unwrap();
    let journal = UnixDatagram::bind(directory.join("socket")).unwrap();
    journal.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-ec", ON_A_JOURNAL, "sh"])
        .arg(&directory)
        .arg(agent_binary())
        .arg(vm.settings_file());
    let output = run(&mut command, Duration::from_secs(60));
    if output.stderr.contains("unshare failed") || output.stderr.contains("permission denied") {
        println!("SKIPPED: cannot create a mount namespace: {}", output.stderr.trim());
        return;
    }
    assert_eq!(
        (output.code, output.stderr.as_str()),
        (Some(1), ""),
        "journal entries must not be printed on stderr too"
    );
    let mut entries = Vec::new();
    let mut buffer = [0; 65536];
    // The agent has exited: all its messages have arrived.
    while let Ok(length) = journal.recv(&mut buffer) {
        entries.push(fields_of(&buffer[..length]));
    }
    let warnings: Vec<_> =
        entries.iter().filter(|entry| entry.get("PRIORITY").is_some_and(|p| p == "4")).collect();
    assert_eq!(warnings.len(), 1, "{entries:#?}");
    let warning = warnings[0];
    assert_eq!(warning["FL_GPU_REASON"], "gpu-not-passed-through");
    assert_eq!(warning["MESSAGE_ID"], "1066eaea8fabf0f00ff7b11691329178");
    assert_eq!(warning["PCI_ADDRESS"], "0000:01:00.0");
    assert_eq!(warning["SYSLOG_IDENTIFIER"], "supernode-agent");
    assert!(warning["FL_GPU_FIX"].contains("vfio-pci"));
    assert!(warning["MESSAGE"].contains("this node runs on the CPU"));
}

/// Fields of an entry: `NAME=value`, or the name, a line break, the value's length in eight bytes,
/// and the value (systemd, Native Journal Protocol).
fn fields_of(mut entry: &[u8]) -> BTreeMap<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut fields = BTreeMap::new();
    while let Some(end) = entry.iter().position(|byte| *byte == b'\n') {
        let (line, rest) = (&entry[..end], &entry[end + 1..]);
        if let Some(equals) = line.iter().position(|byte| *byte == b'=') {
            fields.insert(text(&line[..equals]), text(&line[equals + 1..]));
            entry = rest;
        } else {
            let (length, rest) = rest.split_first_chunk().expect("a length of eight bytes");
            let (value, rest) = rest.split_at(u64::from_le_bytes(*length) as usize);
            fields.insert(text(line), text(value));
            entry = rest.strip_prefix(b"\n").expect("a line break after the value");
        }
    }
    fields
}
