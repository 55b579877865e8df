//! A real federation: Flower's SuperLink, of the release and from the very root file system that
//! the nodes' image has, and the app in `tests/federation` that the nodes train.
//!
//! The SuperLink is a process in the network namespace that it is told, not a container: it ends in
//! a moment, with all that it started, and no engine is needed for it.

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

/// Long enough for the packages of a release to be fetched, where the cache has none.
const BUILD_TIMEOUT: Duration = Duration::from_secs(600);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// A CA and what it says of the SuperLink at the address `$1`, in this directory; `flower-superexec`,
/// which the SuperLink starts, comes by way of the loopback.
const CERTIFICATES: &str = r#"
key='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc'
openssl req -x509 $key -days 3 -subj '/CN=CA of a test' -keyout ca.key -out ca.crt
openssl req $key -subj /CN=superlink -keyout superlink.key -out superlink.csr
echo "subjectAltName=IP:$1,IP:127.0.0.1" >names
openssl x509 -req -in superlink.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3 -extfile names -out superlink.crt
"#;

/// Becomes a command in the root file system `$0`, with what a program needs to find there. Nothing
/// of this machine's environment goes in.
const INSIDE: &str = r#"mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
exec chroot "$0" /usr/bin/env -i PATH=/opt/flower/bin:/usr/bin:/bin HOME=/root FLWR_HOME=/root/.flwr \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 "$@""#;

/// A release of Flower on this machine: the root file system of its image.
#[derive(Debug)]
pub struct Flower {
    version: String,
    tar: PathBuf,
}

impl Flower {
    /// The release; its root file system is built where the cache has none, which takes two
    /// minutes. `None`: skip the test, the reason is printed.
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

    /// Its number.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Puts the image into an engine, under the name that a node of the framework `base` asks for.
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

    /// Whether all of the SuperLink is behind one port, by HTTP; before it was a port for each of
    /// its APIs, by gRPC.
    fn has_one_port(&self) -> bool {
        self.version
            .split('.')
            .nth(1)
            .and_then(|minor| minor.parse().ok())
            .is_some_and(|minor: u32| minor >= 40)
    }
}

/// What a SuperLink keeps its nodes and runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Flower's default: a SuperLink that is started again knows nobody.
    Memory,
    /// A file (`--database`), which outlasts it.
    Database,
}

/// A round of the app, as its server told it.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    /// 1 is the first.
    pub number: u32,
    /// The shares of the data that were trained on, one a node.
    pub partitions: Vec<u32>,
    /// The share of right answers on data that no node has.
    pub accuracy: f64,
    /// When it was over.
    pub at: SystemTime,
}

/// A running SuperLink with TLS. It ends with this value, and everything that it started with it.
#[derive(Debug)]
pub struct SuperLink {
    // Ends before the directory goes.
    process: Option<Inside>,
    sandbox: Sandbox,
    namespace: String,
    address: SocketAddr,
    arguments: Vec<&'static str>,
    ready: &'static str,
}

impl SuperLink {
    /// Starts one in a network namespace that has the address.
    ///
    /// # Panics
    /// Where it does not come up; with its log.
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
            "[superlink]\ndefault = \"test\"\n[superlink.test]\naddress = \"{}\"\nroot-certificates = \"/tls/ca.crt\"\n",
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

    /// What nodes connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificate of its CA, in PEM.
    ///
    /// # Panics
    /// Never, as long as nobody takes the file away.
    #[must_use]
    pub fn ca(&self) -> String {
        fs::read_to_string(self.sandbox.join("root/tls/ca.crt")).expect("the CA")
    }

    /// The number of the process `flower-superlink`.
    ///
    /// # Panics
    /// Where it does not run.
    #[must_use]
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.process.as_ref().and_then(Inside::pid).expect("the SuperLink does not run")
    }

    /// What it wrote so far, in all its lives.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(self.log_file()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Kills it, and starts it again after the outage; comes back when it listens.
    ///
    /// # Panics
    /// Where it does not come up; with its log.
    #[track_caller]
    pub fn restart(&mut self, outage: Duration) {
        self.process = None;
        thread::sleep(outage);
        self.launch();
    }

    /// Has the two nodes train: `flwr run`, to its end. Gives the rounds.
    ///
    /// # Errors
    /// What it said, where it failed or was not over in time; it is killed then, and the SuperLink
    /// goes on with the run.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn run_app(&self, rounds: u32, within: Duration) -> Result<Vec<Round>, String> {
        let rounds_wanted = format!("rounds={rounds}");
        let command =
            ["flwr", "run", "/app/federation", "--stream", "--run-config", &rounds_wanted];
        let file = self.sandbox.join("run.log");
        let mut process =
            self.inside(&command, fs::File::create(&file).expect("a file of the SuperLink's"));
        let status = wait(&mut process.outside, within);
        drop(process);
        let said = fs::read_to_string(file).unwrap_or_default();
        let told: Vec<Round> = said.lines().filter_map(round).collect();
        match status {
            Some(status) if status.success() && told.len() == rounds as usize => Ok(told),
            Some(status) => Err(format!("{status}: {said}")),
            None => Err(format!("not over after {within:?}: {said}")),
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

    /// Starts a command of the release, in its root file system and in the network namespace.
    #[track_caller]
    fn inside(&self, words: &[&str], output: fs::File) -> Inside {
        let errors = output.try_clone().expect("a file twice");
        let mut command = Command::new("setpriv");
        // unshare(1) does not listen to SIGTERM.
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

/// A command in process and mount namespaces of its own: with it everything ends that it started.
#[derive(Debug)]
struct Inside {
    /// unshare(1), which waits for the command.
    outside: Child,
}

impl Inside {
    /// The number of the command's process, on this machine.
    fn pid(&self) -> Option<u32> {
        let outside = self.outside.id();
        let children =
            fs::read_to_string(format!("/proc/{outside}/task/{outside}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }
}

impl Drop for Inside {
    /// The kernel lets the first process of a namespace go when all others are gone: then nobody
    /// listens any more.
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

/// A file in `packaging`.
fn packaging(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging").join(file)
}

/// What a line of the app's server tells: `FEDERATION round=1 partitions=0,1 accuracy=0.9700
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
    let told =
        round("x FEDERATION round=2 partitions=0,1 accuracy=0.9705 at=1795709197.500").unwrap();
    assert_eq!((told.number, told.partitions.as_slice(), told.accuracy), (2, &[0, 1][..], 0.9705));
    assert_eq!(
        told.at.duration_since(SystemTime::UNIX_EPOCH).unwrap(),
        Duration::from_millis(1_795_709_197_500)
    );
    assert_eq!(round("FEDERATION round=2"), None);
}
