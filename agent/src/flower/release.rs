//! Table of Flower releases: the properties that the agent depends on.
//!
//! Sources: the packages `flwr` 1.8.0 to 1.41.0 on PyPI; 1.31.0 and 1.41.0 were also observed at
//! run time.

use crate::values::Version;

/// Port of Flower's health service in the container.
pub(crate) const HEALTH_PORT: u16 = 9099;
/// The flag of flower-supernode that enables the health service; it is off by default.
pub(crate) const HEALTH_FLAG: &str = "--health-server-address";

/// Protocol of the Fleet API between a SuperNode and its SuperLink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// gRPC over HTTP/2.
    Grpc,
    /// HTTP, on one port for all APIs of the SuperLink.
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

/// Properties of the releases from `since` up to the next entry of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Release {
    since: [u32; 3],
    fleet_protocol: Protocol,
    fleet_port: u16,
    serves_health: bool,
    logs_node_id: bool,
}

/// The first release with `--isolation`. This and all later releases have every flag of
/// flower-supernode that the agent uses, except [`HEALTH_FLAG`] (`client/supernode/app.py`, from
/// 1.19.0 `supernode/cli/flower_supernode.py`). Port 9092: `server/app.py`, from 1.12.0
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
/// `supercore/constant.py`, which up to 1.39 is the port of the other APIs only.
const V1_40: Release =
    Release { since: [1, 40, 0], fleet_protocol: Protocol::Http, fleet_port: 8000, ..V1_24 };

/// Oldest first.
static RELEASES: [Release; 4] = [V1_11, V1_21, V1_24, V1_40];

impl Release {
    /// Returns the properties of `version`. Versions older than the table get those of the oldest
    /// entry; [`unsupported_warning`] warns about them.
    pub(crate) fn of(version: &Version) -> &'static Self {
        let known = RELEASES.iter().rev().find(|release| release.since <= version.numbers());
        known.unwrap_or(&RELEASES[0])
    }

    /// Default port of the SuperLink's Fleet API.
    pub(crate) fn fleet_port(&self) -> u16 {
        self.fleet_port
    }

    pub(crate) fn fleet_protocol(&self) -> Protocol {
        self.fleet_protocol
    }

    /// Whether flower-supernode accepts [`HEALTH_FLAG`]. A release that does not accept it exits
    /// immediately with code 2.
    pub(crate) fn serves_health(&self) -> bool {
        self.serves_health
    }

    /// Whether Flower logs at INFO that the node has connected, see
    /// [`LogEvent::Registered`](crate::flower::log::LogEvent::Registered).
    pub(crate) fn logs_node_id(&self) -> bool {
        self.logs_node_id
    }
}

/// Returns the warning about a version older than the table.
pub(crate) fn unsupported_warning(version: &Version) -> Option<String> {
    let [major, minor, patch] = RELEASES[0].since;
    (version.numbers() < RELEASES[0].since).then(|| {
        format!(
            "Flower {version} is older than {major}.{minor}.{patch}, the oldest supported release, \
             and may reject the agent's arguments; set FLOWER_VERSION to a later release"
        )
    })
}

/// Returns the warning about different releases of the node and the SuperLink; `None` if Flower
/// considers them compatible, that is, if major and minor version are equal
/// (`supercore/runtime_version_compatibility.py` of 1.40.0).
pub(crate) fn mismatch_warning(node: &Version, superlink: &Version) -> Option<String> {
    let ([major, minor, _], [their_major, their_minor, _]) = (node.numbers(), superlink.numbers());
    if (major, minor) == (their_major, their_minor) {
        return None;
    }
    let (ours, theirs) =
        (Release::of(node).fleet_protocol(), Release::of(superlink).fleet_protocol());
    if ours != theirs {
        return Some(format!(
            "this node runs Flower {node}, which uses {ours}, and the SuperLink runs Flower \
             {superlink}, which uses {theirs}: they cannot connect; set FLOWER_VERSION={superlink} \
             on this node, or run a release with {ours} on the SuperLink"
        ));
    }
    let order = if node < superlink { "older" } else { "newer" };
    Some(format!(
        "this node runs Flower {node}, {order} than {superlink} on the SuperLink: they may \
         connect, but Flower supports only equal major and minor versions; set \
         FLOWER_VERSION={superlink} on this node"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    #[test]
    fn table_is_sorted_and_looked_up_by_version() {
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
        assert_eq!(unsupported_warning(&version("1.11.0")), None);
        assert!(
            unsupported_warning(&version("1.10.0"))
                .is_some_and(|text| text.contains("older than 1.11.0"))
        );
    }

    #[test]
    fn incompatible_releases_are_reported_with_the_fix() {
        let text =
            |node: &str, superlink: &str| mismatch_warning(&version(node), &version(superlink));
        assert_eq!(text("1.31.0", "1.31.0"), None);
        assert_eq!(text("1.31.0", "1.31.2"), None);
        assert_eq!(
            text("1.31.0", "1.41.0").as_deref(),
            Some(
                "this node runs Flower 1.31.0, which uses gRPC, and the SuperLink runs Flower \
                 1.41.0, which uses HTTP: they cannot connect; set FLOWER_VERSION=1.41.0 on this \
                 node, or run a release with gRPC on the SuperLink"
            )
        );
        assert!(text("1.40.0", "1.39.0").is_some_and(|text| text.contains("they cannot connect")));
        let older = text("1.25.0", "1.31.0").unwrap();
        assert!(
            older.contains("older than 1.31.0 on the SuperLink")
                && older.contains("FLOWER_VERSION=1.31.0"),
            "{older}"
        );
        assert!(text("1.41.0", "1.40.0").is_some_and(|text| text.contains("newer than 1.40.0")));
    }
}
