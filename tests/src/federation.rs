//! A real federation: Flower's SuperLink, run from the same root file system as the nodes' image,
//! and the app in `tests/federation` that the nodes train.
//!
//! The SuperLink is a process in a given network namespace, not a container: it stops at once with
//! all its children and needs no engine.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, SystemTime},
};

use rustix::process::Signal;

use crate::{
    engine::Engine,
    process::{eventually, run, signal, skip_or_fail, start_tied, wait},
    sandbox::Sandbox,
};

/// Allows for downloading the packages of a release that is not in the cache.
const BUILD_TIMEOUT: Duration = Duration::from_secs(600);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// Creates a CA in this directory and a certificate for the SuperLink at address `$1`. The
/// certificate also names the loopback address, which `flower-superexec` connects to.
const CERTIFICATES: &str = r#"
key='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc'
openssl req -x509 $key -days 3 -subj '/CN=CA of a test' -keyout ca.key -out ca.crt
openssl req $key -subj /CN=superlink -keyout superlink.key -out superlink.csr
echo "subjectAltName=IP:$1,IP:127.0.0.1" >names
openssl x509 -req -in superlink.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3 \
    -extfile names -out superlink.crt
"#;

/// Runs a command in the root file system `$0`, with the mounts that a program needs and without
/// this machine's environment.
const INSIDE: &str = r#"mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
exec chroot "$0" /usr/bin/env -i PATH=/opt/flower/bin:/usr/bin:/bin HOME=/root \
    FLWR_HOME=/root/.flwr FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 "$@""#;

/// A Flower release on this machine: the root file system of its image.
#[derive(Debug)]
pub struct Flower {
    version: String,
    tar: PathBuf,
}

impl Flower {
    /// Returns the release. Builds its root file system if it is not cached, which takes two
    /// minutes. Returns `None` and prints the reason if the test must be skipped.
    #[must_use]
    #[track_caller]
    pub fn release(version: &str) -> Option<Self> {
        let built = run(Command::new(packaging("images/base-tar.sh")).arg(version), BUILD_TIMEOUT);
        if built.code != Some(0) {
            skip_or_fail(
                &format!("Flower {version}"),
                built.stderr.lines().last().unwrap_or("base-tar.sh failed"),
            );
            return None;
        }
        Some(Self { version: version.to_owned(), tar: built.stdout.trim().into() })
    }

    /// Returns the version number.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Imports the image into an engine under the name that a node with the framework `base` uses.
    #[track_caller]
    pub fn import(&self, engine: &Engine) {
        let changes =
            run(Command::new(packaging("images/build-base.sh")).arg("--changes"), COMMAND_TIMEOUT);
        let mut arguments = vec!["import"];
        for change in changes.expect_success().lines() {
            arguments.extend(["--change", change]);
        }
        let (tar, reference) =
            (self.tar.to_string_lossy(), format!("flwr/supernode:{}", self.version));
        arguments.extend([&*tar, &reference]);
        engine.docker(&arguments).expect_success();
    }

    /// Returns whether all APIs of the SuperLink share one HTTP port. Earlier releases have a gRPC
    /// port for each API.
    fn has_one_port(&self) -> bool {
        self.version
            .split('.')
            .nth(1)
            .and_then(|minor| minor.parse().ok())
            .is_some_and(|minor: u32| minor >= 40)
    }
}

/// Where a SuperLink stores its nodes and runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Flower's default: a restarted SuperLink knows no nodes.
    Memory,
    /// A file (`--database`) that survives a restart.
    Database,
}

/// One round, as logged by the app's server.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    /// Starts at 1.
    pub number: u32,
    /// Partitions that were trained on, one per node.
    pub partitions: Vec<u32>,
    /// Accuracy on test data that no node has.
    pub accuracy: f64,
    /// End of the round.
    pub at: SystemTime,
}

/// A running SuperLink with TLS. Dropping it kills the SuperLink and all its children.
#[derive(Debug)]
pub struct SuperLink {
    // Declared before the directory, so that the process ends before the directory is removed.
    process: Option<Inside>,
    sandbox: Sandbox,
    namespace: String,
    address: SocketAddr,
    arguments: Vec<&'static str>,
    ready: &'static str,
}

impl SuperLink {
    /// Starts a SuperLink in a network namespace that has the address.
    ///
    /// # Panics
    /// If it does not start. The message contains its log.
    #[must_use]
    #[track_caller]
    pub fn start(flower: &Flower, namespace: &str, address: IpAddr, state: State) -> Self {
        let sandbox = Sandbox::in_memory("superlink");
        let root = sandbox.join("root");
        fs::create_dir_all(root.join("tls")).expect("a directory of the SuperLink");
        let mut unpack = Command::new("tar");
        unpack.arg("--extract").arg("--file").arg(&flower.tar).arg("--directory").arg(&root);
        run(&mut unpack, COMMAND_TIMEOUT).expect_success();
        let mut certify = Command::new("sh");
        certify
            .args(["-ec", CERTIFICATES, "sh", &address.to_string()])
            .current_dir(root.join("tls"));
        run(&mut certify, COMMAND_TIMEOUT).expect_success();
        let mut copy = Command::new("cp");
        copy.arg("--recursive")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("federation"))
            .arg(root.join("app"));
        run(&mut copy, COMMAND_TIMEOUT).expect_success();

        let mut arguments = vec![
            "--ssl-ca-certfile=/tls/ca.crt",
            "--ssl-certfile=/tls/superlink.crt",
            "--ssl-keyfile=/tls/superlink.key",
        ];
        if state == State::Database {
            arguments.push("--database=/root/state.db");
        }
        let (fleet, control, ready) = if flower.has_one_port() {
            arguments.push("--host=0.0.0.0");
            (8000, 8000, "Uvicorn running on")
        } else {
            (9092, 9093, "Starting Fleet API")
        };
        let connection = format!(
            "[superlink]\ndefault = \"test\"\n[superlink.test]\n\
             address = \"{}\"\nroot-certificates = \"/tls/ca.crt\"\n",
            SocketAddr::new(address, control)
        );
        sandbox.write("root/root/.flwr/config.toml", connection);
        let address = SocketAddr::new(address, fleet);
        let mut superlink = Self {
            process: None,
            sandbox,
            namespace: namespace.to_owned(),
            address,
            arguments,
            ready,
        };
        superlink.launch();
        superlink
    }

    /// Address that nodes connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the certificate of its CA, in PEM.
    ///
    /// # Panics
    /// If the file has been removed.
    #[must_use]
    pub fn ca(&self) -> String {
        fs::read_to_string(self.sandbox.join("root/tls/ca.crt")).expect("the CA")
    }

    /// Returns the PID of `flower-superlink`.
    ///
    /// # Panics
    /// If it is not running.
    #[must_use]
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.process.as_ref().and_then(Inside::pid).expect("the SuperLink is not running")
    }

    /// Returns the log of all its starts.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(self.log_file()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Kills the SuperLink, waits for the outage and starts it again. Returns when it listens.
    ///
    /// # Panics
    /// If it does not start. The message contains its log.
    #[track_caller]
    pub fn restart(&mut self, outage: Duration) {
        self.process = None;
        thread::sleep(outage);
        self.launch();
    }

    /// Runs `flwr run` on the two nodes to its end and returns the rounds.
    ///
    /// # Errors
    /// The output, if the command failed or timed out. On timeout the command is killed and the
    /// SuperLink continues the run.
    ///
    /// # Panics
    /// If the command cannot be started.
    pub fn run_app(&self, rounds: u32, within: Duration) -> Result<Vec<Round>, String> {
        let rounds_wanted = format!("rounds={rounds}");
        let command =
            ["flwr", "run", "/app/federation", "--stream", "--run-config", &rounds_wanted];
        let file = self.sandbox.join("run.log");
        let mut process =
            self.inside(&command, fs::File::create(&file).expect("cannot create the output file"));
        let status = wait(&mut process.outside, within);
        drop(process);
        let output = fs::read_to_string(file).unwrap_or_default();
        let rounds_run: Vec<Round> = output.lines().filter_map(round).collect();
        match status {
            Some(status) if status.success() && rounds_run.len() == rounds as usize => {
                Ok(rounds_run)
            }
            Some(status) => Err(format!("{status}: {output}")),
            None => Err(format!("timed out after {within:?}: {output}")),
        }
    }

    fn log_file(&self) -> PathBuf {
        self.sandbox.join("superlink.log")
    }

    #[track_caller]
    fn launch(&mut self) {
        let before = self.log().len();
        let log = fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.log_file())
            .expect("the SuperLink's log");
        let mut command = vec!["flower-superlink"];
        command.extend(&self.arguments);
        self.process = Some(self.inside(&command, log));
        let listens = eventually(COMMAND_TIMEOUT, || self.log()[before..].contains(self.ready));
        assert!(listens, "the SuperLink does not listen: {}", &self.log()[before..]);
    }

    /// Starts a command of the release in its root file system and in the network namespace.
    #[track_caller]
    fn inside(&self, words: &[&str], output: fs::File) -> Inside {
        let errors = output.try_clone().expect("cannot clone the file handle");
        let mut command = Command::new("setpriv");
        // unshare(1) ignores SIGTERM.
        command
            .args([
                "--pdeathsig",
                "KILL",
                "--",
                "nsenter",
                &format!("--net=/run/netns/{}", self.namespace),
            ])
            .args(["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", INSIDE])
            .arg(self.sandbox.join("root"))
            .args(words)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        Inside { outside: start_tied(command).unwrap_or_else(|error| panic!("setpriv: {error}")) }
    }
}

/// A command in its own process and mount namespaces. Dropping it kills all its children too.
#[derive(Debug)]
struct Inside {
    /// unshare(1), which waits for the command.
    outside: Child,
}

impl Inside {
    /// Returns the PID of the command in the host's PID namespace.
    fn pid(&self) -> Option<u32> {
        let outside = self.outside.id();
        let children =
            fs::read_to_string(format!("/proc/{outside}/task/{outside}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }
}

impl Drop for Inside {
    /// The kernel reports the end of a namespace's first process only after all others have ended:
    /// then the port is free.
    fn drop(&mut self) {
        if let Ok(Some(_)) = self.outside.try_wait() {
            return;
        }
        match self.pid() {
            Some(pid) => signal(pid, Signal::KILL),
            None => drop(self.outside.kill()),
        }
        let _ = self.outside.wait();
    }
}

/// Path of a file in `packaging`.
fn packaging(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging").join(file)
}

/// Parses a log line of the app's server: `FEDERATION round=1 partitions=0,1 accuracy=0.9700
/// at=1795709193.500`.
fn round(line: &str) -> Option<Round> {
    let (_, words) = line.split_once("FEDERATION ")?;
    let value = |name: &str| {
        words.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    };
    let partitions: Result<_, _> = value("partitions")?.split(',').map(str::parse).collect();
    Some(Round {
        number: value("round")?.parse().ok()?,
        partitions: partitions.ok()?,
        accuracy: value("accuracy")?.parse().ok()?,
        at: SystemTime::UNIX_EPOCH
            + Duration::try_from_secs_f64(value("at")?.parse().ok()?).ok()?,
    })
}

#[test]
fn parses_a_round_from_its_log_line() {
    let rounds_run =
        round("x FEDERATION round=2 partitions=0,1 accuracy=0.9705 at=1795709197.500").unwrap();
    assert_eq!(
        (rounds_run.number, rounds_run.partitions.as_slice(), rounds_run.accuracy),
        (2, &[0, 1][..], 0.9705)
    );
    assert_eq!(
        rounds_run.at.duration_since(SystemTime::UNIX_EPOCH).unwrap(),
        Duration::from_millis(1_795_709_197_500)
    );
    assert_eq!(round("FEDERATION round=2"), None);
}
