//! Two nodes of a real Flower, each with an agent and an engine of its own, and a real SuperLink: they train over TLS, the
//! SuperLink is started again, they train again.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by a panic")]

mod common;

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use common::{PATIENCE, say, up};
use supernode_tests::{Agent, Case, Engine, Flower, Round, State, SuperLink, eventually, run};

/// More than three rounds take on a busy machine.
const RUN: Duration = Duration::from_secs(120);
/// The same for nodes that will not: they hang, and the time is lost.
const ALONE: Duration = Duration::from_secs(30);

/// Seldom both go on: Flower 1.31 says goodbye and stays, and Docker sees nothing wrong with it.
#[test]
fn nodes_of_flower_1_31_train_and_hang_after_a_quick_restart_of_the_superlink_when_left_alone() {
    let Some(mut federation) = Federation::start("1.31.0", State::Memory) else { return };
    federation.train_three_rounds();
    if federation.restart_and_train(Duration::ZERO, ALONE).is_err() {
        assert!(federation.nodes.iter().any(Node::hangs), "{}{}", federation.nodes[0].log(), federation.nodes[1].log());
    }
}

#[test]
fn nodes_of_flower_1_41_train_and_after_a_quick_restart_of_the_superlink_train_again() {
    let Some(mut federation) = Federation::start("1.41.0", State::Memory) else { return };
    federation.train_three_rounds();
    federation.restart_and_train(Duration::ZERO, RUN).unwrap_or_else(|error| panic!("{error}"));
}

/// Seconds from the kill to the first round that both have trained, on two busy processors:
///
/// | release | state | 20 s away | away for no longer than a start takes |
/// | --- | --- | --- | --- |
/// | 1.31.0 | memory | 50; they exit (130 or 0) | one or both hang |
/// | 1.31.0 | database | 50; they wait, up to 20 s between two tries | 14 |
/// | 1.41.0 | memory | 50; they exit (0) | 12 to 21; they exit (0 or 130) |
/// | 1.41.0 | database | 42; they wait | 9 |
#[test]
#[ignore = "ten minutes of figures: what each release does by itself, for either memory of the SuperLink"]
fn how_long_nodes_that_are_left_alone_take_after_a_restart_of_the_superlink() {
    for (release, state) in
        [("1.31.0", State::Memory), ("1.31.0", State::Database), ("1.41.0", State::Memory), ("1.41.0", State::Database)]
    {
        say(&format!("MEASURED Flower {release}, the SuperLink's state in {state:?}:"));
        let Some(mut federation) = Federation::start(release, state) else { return };
        federation.train_three_rounds();
        for outage in [Duration::from_secs(20), Duration::ZERO] {
            // Where they do not come back, that is the figure.
            let _ = federation.restart_and_train(outage, RUN);
        }
    }
}

/// A SuperLink and its two nodes.
struct Federation {
    release: &'static str,
    nodes: Vec<Node>,
    superlink: SuperLink,
    _cloud: Cloud,
    /// Two processors are enough for one federation.
    _turn: MutexGuard<'static, ()>,
}

/// A node: its agent, its machine and its engine end in this order.
struct Node {
    _agent: Agent,
    _case: Case,
    engine: Engine,
}

impl Federation {
    /// All of it, connected. `None`: skip the test, the reason is printed.
    fn start(release: &'static str, state: State) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let flower = Flower::release(release)?;
        let begun = Instant::now();
        let engines = [Engine::builder().start()?, Engine::builder().start()?];
        let mut cloud = Cloud::new();
        for engine in &engines {
            cloud.connect(engine);
        }
        let superlink = thread::scope(|scope| {
            for engine in &engines {
                scope.spawn(|| flower.import(engine));
            }
            SuperLink::start(&flower, cloud.network_namespace(), cloud.address(), state)
        });
        say(&format!(
            "MEASURED Flower {release}: engines, images and SuperLink in {:.1} s",
            begun.elapsed().as_secs_f64()
        ));

        let begun = Instant::now();
        let nodes: Vec<Node> =
            (0..).zip(engines).map(|(partition, engine)| Node::start(release, &superlink, partition, engine)).collect();
        for node in &nodes {
            assert!(eventually(PATIENCE, || node.log().contains("SuperNode ID:")), "{}", node.log());
        }
        say(&format!("MEASURED Flower {release}: both nodes connected in {:.1} s", begun.elapsed().as_secs_f64()));
        Some(Self { release, nodes, superlink, _cloud: cloud, _turn: turn })
    }

    fn train_three_rounds(&self) {
        let begun = Instant::now();
        let rounds = self.superlink.run_app(3, RUN).unwrap_or_else(|error| panic!("{error}"));
        assert_learned(&rounds);
        let (seconds, accuracy) = (begun.elapsed().as_secs_f64(), rounds[2].accuracy);
        say(&format!("MEASURED Flower {}: three rounds in {seconds:.1} s, accuracy {accuracy}", self.release));
    }

    /// Kills the SuperLink, starts it again after the outage, and gives the nodes this long for three more rounds.
    fn restart_and_train(&mut self, outage: Duration, within: Duration) -> Result<(), String> {
        let what = format!("MEASURED Flower {}: SuperLink restarted after {} s", self.release, outage.as_secs());
        let killed = SystemTime::now();
        self.superlink.restart(outage);
        let rounds = self.superlink.run_app(3, within).inspect_err(|_| {
            say(&format!("{what}: no three rounds within {} s", within.as_secs()));
        })?;
        assert_learned(&rounds);
        let seconds = rounds[0].at.duration_since(killed).unwrap().as_secs_f64();
        say(&format!("{what}: both nodes have trained again {seconds:.1} s after it was killed"));
        Ok(())
    }
}

impl Node {
    fn start(release: &str, superlink: &SuperLink, partition: u32, engine: Engine) -> Self {
        let mut case = Case::new();
        case.engine(&engine).context(&[
            ("FLOWER_VERSION", release),
            ("ML_FRAMEWORK", "base"),
            ("FL_SUPERLINK_ADDRESS", &superlink.address().to_string()),
            ("FL_TLS_ENABLED", "YES"),
            ("FL_SSL_CA_CERTFILE", &superlink.ca()),
            ("FL_NODE_CONFIG", &format!("partition-id={partition} num-partitions=2")),
        ]);
        Self { _agent: up(&case), _case: case, engine }
    }

    /// Whether its last word was goodbye, and its container runs for all that.
    fn hangs(&self) -> bool {
        let log = self.log();
        let at = |text| log.rfind(text);
        at("SuperNode terminated gracefully.") > at("Starting Flower SuperNode") && self.runs()
    }

    fn runs(&self) -> bool {
        let running = self.engine.docker(&["inspect", "--format", "{{.State.Running}}", "flower-supernode"]);
        running.expect_success() == "true"
    }

    /// What its container wrote.
    fn log(&self) -> String {
        let log = self.engine.docker(&["logs", "flower-supernode"]);
        log.stdout + &log.stderr
    }
}

#[track_caller]
fn assert_learned(rounds: &[Round]) {
    for (number, round) in (1..).zip(rounds) {
        assert_eq!((round.number, round.partitions.as_slice()), (number, &[0, 1][..]));
    }
    assert!(rounds.last().is_some_and(|round| round.accuracy > 0.95), "{rounds:?}");
}

/// A network namespace that engines are connected to: the one of the harness takes its place.
struct Cloud {
    namespace: String,
    engines: u8,
}

impl Cloud {
    fn new() -> Self {
        let namespace = format!("sn-federation-{}", std::process::id());
        ip(&["netns", "add", &namespace]);
        let cloud = Self { namespace, engines: 0 };
        for command in
            ["link set lo up", "link add br0 type bridge", "address add 10.77.0.1/24 dev br0", "link set br0 up"]
        {
            cloud.ip(command);
        }
        cloud
    }

    fn network_namespace(&self) -> &str {
        &self.namespace
    }

    fn address(&self) -> IpAddr {
        Ipv4Addr::new(10, 77, 0, 1).into()
    }

    fn connect(&mut self, engine: &Engine) {
        self.engines += 1;
        let (port, theirs) = (format!("engine{}", self.engines), engine.network_namespace());
        self.ip(&format!("link add {port} type veth peer name cloud0 netns {theirs}"));
        self.ip(&format!("link set {port} master br0 up"));
        let address = format!("10.77.0.{}/24", self.engines + 1);
        ip(&["-n", theirs, "address", "add", &address, "dev", "cloud0"]);
        ip(&["-n", theirs, "link", "set", "cloud0", "up"]);
    }

    fn ip(&self, command: &str) {
        let words: Vec<&str> = ["-n", &self.namespace].into_iter().chain(command.split(' ')).collect();
        ip(&words);
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.namespace]);
    }
}

fn ip(arguments: &[&str]) {
    run(Command::new("ip").args(arguments), PATIENCE).expect_success();
}
