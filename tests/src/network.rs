//! The network that connects the engines of a test.

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
/// (a SuperLink, the OneGate simulator) is reachable from an engine's namespace and from its
/// containers. All interface names are inside namespaces, so that the networks of concurrent tests
/// do not conflict. Dropping it removes the namespace and the links.
#[derive(Debug)]
pub struct TestNetwork {
    namespace: String,
    /// Network namespaces of the engines. The index determines an engine's address and the name of
    /// its port.
    engines: Vec<String>,
}

impl TestNetwork {
    /// Creates a network without an engine. It has the requirements of an [`Engine`], so start that
    /// first.
    ///
    /// # Panics
    /// If it cannot be created.
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

    /// Returns the name of the network namespace.
    #[must_use]
    pub fn network_namespace(&self) -> &str {
        &self.namespace
    }

    /// Address of what runs in the namespace.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        address(1)
    }

    /// Connects an engine, with this network as its default route, and returns the engine's
    /// address.
    ///
    /// # Panics
    /// If the engine is connected already.
    #[track_caller]
    pub fn connect(&mut self, engine: &Engine) -> IpAddr {
        let theirs = engine.network_namespace();
        self.engines.push(theirs.to_owned());
        let port = self.port(engine);
        let address =
            address(u8::try_from(self.engines.len() + 1).expect("fewer engines than addresses"));
        self.ip(&format!("link add {port} type veth peer name net0 netns {theirs}"));
        self.ip(&format!("link set {port} master br0"));
        self.link_up(engine);
        for command in [
            &format!("address add {address}/24 dev net0"),
            "link set net0 up",
            &format!("route add default via {}", self.address()),
        ] {
            expect_ip(theirs, command);
        }
        address
    }

    /// Takes an engine's link down: packets are dropped without an error.
    #[track_caller]
    pub fn link_down(&self, engine: &Engine) {
        self.ip(&format!("link set {} down", self.port(engine)));
    }

    /// Brings the link up again.
    #[track_caller]
    pub fn link_up(&self, engine: &Engine) {
        self.ip(&format!("link set {} up", self.port(engine)));
    }

    #[track_caller]
    fn port(&self, engine: &Engine) -> String {
        let index = self.engines.iter().position(|name| name == engine.network_namespace());
        format!("engine{}", index.expect("an engine that is connected"))
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
        // The namespace persists while a process runs in it; the links are removed now.
        for index in 0..self.engines.len() {
            let _ = ip(&["-n", &self.namespace, "link", "del", &format!("engine{index}")]);
        }
        remove_namespace(&self.namespace);
    }
}

/// Creates a network namespace with a loopback interface.
pub(crate) fn add_namespace(name: &str) -> Result<(), String> {
    ip(&["netns", "add", name])?;
    ip(&["-n", name, "link", "set", "lo", "up"])
}

/// Removes the name of a namespace. The kernel removes the namespace when no process uses it.
pub(crate) fn remove_namespace(name: &str) {
    let _ = ip(&["netns", "del", name]);
}

/// Returns a command that runs `program` in a network namespace (a name in /run/netns).
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
