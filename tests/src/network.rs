//! The network between the engines of a test: the network that their machines are in.

use std::{
    ffi::OsStr,
    net::{IpAddr, Ipv4Addr},
    process::Command,
    time::Duration,
};

use crate::{
    engine::{Engine, path},
    process::run,
    sandbox::unique_name,
};

const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// A network namespace with a bridge, 10.77.0.1/24, to which engines are connected. What runs in it
/// (a SuperLink, the simulator of OneGate) is reached from an engine's namespace and from its
/// containers. All names are within namespaces, so that networks of several tests do not meet. It
/// ends with this value, and the cables with it.
#[derive(Debug)]
pub struct TestNetwork {
    namespace: String,
    /// The namespaces of the engines; the place of each gives its address and the name of its port.
    engines: Vec<String>,
}

impl TestNetwork {
    /// A network without an engine. It needs what an [`Engine`] needs: start that first.
    ///
    /// # Panics
    /// Where it cannot be made.
    #[must_use]
    #[track_caller]
    pub fn new() -> Self {
        let network = Self { namespace: unique_name("network"), engines: Vec::new() };
        add_namespace(&network.namespace).unwrap_or_else(|reason| panic!("{reason}"));
        network.ip("link add br0 type bridge");
        network.ip(&format!("address add {}/24 dev br0", network.address()));
        network.ip("link set br0 up");
        network
    }

    /// The name of its network namespace.
    #[must_use]
    pub fn network_namespace(&self) -> &str {
        &self.namespace
    }

    /// The address of what runs in it.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        address(1)
    }

    /// Connects an engine, which reaches by way of the network whatever is not its own; gives the
    /// engine's address.
    ///
    /// # Panics
    /// Where the engine is connected to a network already.
    #[track_caller]
    pub fn connect(&mut self, engine: &Engine) -> IpAddr {
        let theirs = engine.network_namespace();
        self.engines.push(theirs.to_owned());
        let port = self.port(engine);
        let address =
            address(u8::try_from(self.engines.len() + 1).expect("fewer engines than addresses"));
        self.ip(&format!("link add {port} type veth peer name net0 netns {theirs}"));
        self.ip(&format!("link set {port} master br0"));
        self.link(engine);
        for command in [
            &format!("address add {address}/24 dev net0"),
            "link set net0 up",
            &format!("route add default via {}", self.address()),
        ] {
            expect_ip(theirs, command);
        }
        address
    }

    /// Pulls an engine's cable: nothing arrives, and nobody is told.
    #[track_caller]
    pub fn unlink(&self, engine: &Engine) {
        self.ip(&format!("link set {} down", self.port(engine)));
    }

    /// Puts the cable back.
    #[track_caller]
    pub fn link(&self, engine: &Engine) {
        self.ip(&format!("link set {} up", self.port(engine)));
    }

    #[track_caller]
    fn port(&self, engine: &Engine) -> String {
        let place = self.engines.iter().position(|name| name == engine.network_namespace());
        format!("engine{}", place.expect("an engine that is connected"))
    }

    #[track_caller]
    fn ip(&self, command: &str) {
        expect_ip(&self.namespace, command);
    }
}

impl Default for TestNetwork {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TestNetwork {
    fn drop(&mut self) {
        // The namespace lasts as long as anybody runs in it; the cables do not.
        for place in 0..self.engines.len() {
            let _ = ip(&["-n", &self.namespace, "link", "del", &format!("engine{place}")]);
        }
        remove_namespace(&self.namespace);
    }
}

/// Makes a network namespace, in which there is the loopback.
pub(crate) fn add_namespace(name: &str) -> Result<(), String> {
    ip(&["netns", "add", name])?;
    ip(&["-n", name, "link", "set", "lo", "up"])
}

/// Takes a namespace's name away; it is gone when nobody runs in it.
pub(crate) fn remove_namespace(name: &str) {
    let _ = ip(&["netns", "del", name]);
}

/// The beginning of a command that runs in a network namespace (a name in /run/netns), in which it
/// becomes the program that follows.
#[must_use]
pub fn in_namespace(namespace: &str, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{namespace}")).arg("--").arg(program);
    command
}

#[track_caller]
fn expect_ip(namespace: &str, command: &str) {
    let words: Vec<&str> = ["-n", namespace].into_iter().chain(command.split(' ')).collect();
    ip(&words).unwrap_or_else(|reason| panic!("{reason}"));
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = run(Command::new("ip").args(arguments).env("PATH", path(&[])), COMMAND_TIMEOUT);
    match output.code {
        Some(0) => Ok(()),
        _ => Err(format!("ip {}: {}", arguments.join(" "), output.stderr.trim())),
    }
}

fn address(host: u8) -> IpAddr {
    Ipv4Addr::new(10, 77, 0, host).into()
}
