//! Flower, release by release: what the agent needs to know of it, as one table.
//!
//! Read in the packages `flwr` 1.8.0 to 1.41.0 of PyPI, and seen in 1.31.0 and 1.41.0 while they
//! ran.

use crate::values::Version;

/// The port of Flower's health service in the container.
pub const HEALTH_PORT: u16 = 9099;
/// The flag that makes flower-supernode serve it. Without the flag there is none.
pub const HEALTH_FLAG: &str = "--health-server-address";

/// What the Fleet API, by which a SuperNode and its SuperLink talk, is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// gRPC over HTTP/2.
    Grpc,
    /// HTTP, on the one port that serves all of the SuperLink's APIs.
    Http,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Grpc => "gRPC",
            Self::Http => "HTTP",
        })
    }
}

/// What holds from one release of Flower on, until the next entry of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    since: [u32; 3],
    fleet_protocol: Protocol,
    fleet_port: u16,
    serves_health: bool,
    logs_node_id: bool,
}

/// The first with `--isolation`; it has all flags of flower-supernode that the agent uses but
/// [`HEALTH_FLAG`], and so have all later ones (`client/supernode/app.py`, from 1.19.0
/// `supernode/cli/flower_supernode.py`). Port 9092: `server/app.py`, from 1.12.0
/// `common/constant.py`.
const V1_11: Release = Release {
    since: [1, 11, 0],
    fleet_protocol: Protocol::Grpc,
    fleet_port: 9092,
    serves_health: false,
    logs_node_id: false,
};
/// `supercore/grpc_health/health_server.py`, used in `supernode/start_client_internal.py`.
const V1_21: Release = Release { since: [1, 21, 0], serves_health: true, ..V1_11 };
/// `SuperNode ID: <n>` in `supernode/start_client_internal.py`.
const V1_24: Release = Release { since: [1, 24, 0], logs_node_id: true, ..V1_21 };
/// `supernode/fleet_http_connection.py`; `SUPERLINK_UVICORN_DEFAULT_PORT` in
/// `supercore/constant.py`, which until 1.39 is the port of the other APIs alone.
const V1_40: Release =
    Release { since: [1, 40, 0], fleet_protocol: Protocol::Http, fleet_port: 8000, ..V1_24 };

/// Oldest first.
static RELEASES: [Release; 4] = [V1_11, V1_21, V1_24, V1_40];

impl Release {
    /// What holds for `version`. One that is older than the table is taken for the oldest in it:
    /// [`too_old`] says so.
    pub fn of(version: &Version) -> &'static Self {
        let known = RELEASES.iter().rev().find(|release| release.since <= version.numbers());
        known.unwrap_or(&RELEASES[0])
    }

    /// The port where a SuperLink serves the Fleet API unless it is told otherwise.
    pub fn fleet_port(&self) -> u16 {
        self.fleet_port
    }

    /// What the Fleet API is made of.
    pub fn fleet_protocol(&self) -> Protocol {
        self.fleet_protocol
    }

    /// Whether flower-supernode knows [`HEALTH_FLAG`]: one that does not ends at once with code 2.
    pub fn serves_health(&self) -> bool {
        self.serves_health
    }

    /// Whether the log tells, at the level INFO, when the node has connected: [`LogEvent::Registered`].
    pub fn logs_node_id(&self) -> bool {
        self.logs_node_id
    }
}

/// The text of the WARNING for a release that is older than what is known here.
pub fn too_old(version: &Version) -> Option<String> {
    let [major, minor, patch] = RELEASES[0].since;
    (version.numbers() < RELEASES[0].since).then(|| {
        format!(
            "Flower {version} is older than {major}.{minor}.{patch}, the oldest release that this agent knows: it may refuse \
             its arguments; set FLOWER_VERSION to a later one"
        )
    })
}

/// The text of the WARNING for a node and a SuperLink of different releases; `None` where Flower
/// takes them for compatible. For Flower that is the same major and minor number
/// (`supercore/runtime_version_compatibility.py` of 1.40.0).
pub fn compatibility(node: &Version, superlink: &Version) -> Option<String> {
    let ([major, minor, _], [their_major, their_minor, _]) = (node.numbers(), superlink.numbers());
    if (major, minor) == (their_major, their_minor) {
        return None;
    }
    let (ours, theirs) =
        (Release::of(node).fleet_protocol(), Release::of(superlink).fleet_protocol());
    if ours != theirs {
        return Some(format!(
            "this node has Flower {node}, which speaks {ours} with its SuperLink, and the SuperLink has Flower {superlink}, \
             which speaks {theirs}: they cannot connect; set FLOWER_VERSION={superlink} on this node, or give the SuperLink \
             a release that speaks {ours}"
        ));
    }
    let order = if node < superlink { "older" } else { "newer" };
    Some(format!(
        "this node has Flower {node}, {order} than the {superlink} of its SuperLink: they may connect, but Flower takes only \
         releases of the same major and minor number for compatible; set FLOWER_VERSION={superlink} on this node"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    #[test]
    fn the_table_is_in_order_and_a_release_is_found_in_it_by_its_number() {
        assert!(RELEASES.is_sorted_by(|a, b| a.since < b.since));
        for (text, protocol, port, health, id) in [
            ("1.9.0", Protocol::Grpc, 9092, false, false),
            ("1.20.0", Protocol::Grpc, 9092, false, false),
            ("1.21.0", Protocol::Grpc, 9092, true, false),
            ("1.31.0", Protocol::Grpc, 9092, true, true),
            ("1.39.9", Protocol::Grpc, 9092, true, true),
            ("1.40.0", Protocol::Http, 8000, true, true),
            ("2.0.0", Protocol::Http, 8000, true, true),
        ] {
            let release = Release::of(&version(text));
            let found = (
                release.fleet_protocol(),
                release.fleet_port(),
                release.serves_health(),
                release.logs_node_id(),
            );
            assert_eq!(found, (protocol, port, health, id), "{text}");
        }
        assert_eq!(too_old(&version("1.11.0")), None);
        assert!(too_old(&version("1.10.0")).is_some_and(|text| text.contains("older than 1.11.0")));
    }

    #[test]
    fn releases_that_cannot_connect_are_told_with_what_to_do() {
        let text = |node: &str, superlink: &str| compatibility(&version(node), &version(superlink));
        assert_eq!(text("1.31.0", "1.31.0"), None);
        assert_eq!(text("1.31.0", "1.31.2"), None);
        assert_eq!(
            text("1.31.0", "1.41.0").as_deref(),
            Some(
                "this node has Flower 1.31.0, which speaks gRPC with its SuperLink, and the SuperLink has Flower 1.41.0, which \
                 speaks HTTP: they cannot connect; set FLOWER_VERSION=1.41.0 on this node, or give the SuperLink a release \
                 that speaks gRPC"
            )
        );
        assert!(text("1.40.0", "1.39.0").is_some_and(|text| text.contains("they cannot connect")));
        let older = text("1.25.0", "1.31.0").unwrap();
        assert!(
            older.contains("older than the 1.31.0") && older.contains("FLOWER_VERSION=1.31.0"),
            "{older}"
        );
        assert!(
            text("1.41.0", "1.40.0").is_some_and(|text| text.contains("newer than the 1.40.0"))
        );
    }
}
