//! Flower, release by release: what the agent needs to know of it, as one table, and what Flower's
//! own log lines say.
//!
//! Read in the packages `flwr` 1.8.0 to 1.41.0 of PyPI, and seen in 1.31.0 and 1.41.0 while they
//! ran.

use crate::config::values::Version;

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
    tells_node_id: bool,
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
    tells_node_id: false,
};
/// `supercore/grpc_health/health_server.py`, used in `supernode/start_client_internal.py`.
const V1_21: Release = Release { since: [1, 21, 0], serves_health: true, ..V1_11 };
/// `SuperNode ID: <n>` in `supernode/start_client_internal.py`.
const V1_24: Release = Release { since: [1, 24, 0], tells_node_id: true, ..V1_21 };
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

    /// Whether the log tells, at the level INFO, when the node has connected: [`Said::Registered`].
    pub fn tells_node_id(&self) -> bool {
        self.tells_node_id
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

/// What a line of Flower's log says of the connection to the SuperLink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// The node has connected, and has this id for its SuperLink. Flower says it once in a process.
    Registered(u64),
    /// An attempt after one that failed came through.
    Reconnected,
    /// An attempt failed; Flower goes on trying.
    Retrying,
    /// Flower gives up, or ends: when it is told to, and when the SuperLink was started again and
    /// so does not know the node any more. 1.31.0 may hang after these words, with its health
    /// service gone.
    Ended,
}

/// What this line of a container's log says; `None` for most lines.
///
/// A line of Flower is a level, coloured, `:`, blanks and a sentence (`common/logger.py`; with
/// `FLWR_LOG_LEVEL=DEBUG` the time stands behind the level): `\x1b[92mINFO \x1b[0m:      SuperNode
/// ID: 7`. What a ClientApp prints has no level before it. The SuperExec and the apps, which are
/// Flower too and write to the same log, say [`Said::Reconnected`] and [`Said::Retrying`] of their
/// connection to the node.
pub fn said(line: &str) -> Option<Said> {
    let line = after_colour(line);
    let rest = ["INFO", "WARNING", "ERROR"].iter().find_map(|level| line.strip_prefix(level))?;
    let (time, sentence) = rest.split_once(": ")?;
    if !time.bytes().all(|b| b.is_ascii_digit() || b" -:,\x1b[;m".contains(&b)) {
        return None;
    }
    let sentence = sentence.trim_start();
    if let Some(id) = sentence.strip_prefix("SuperNode ID: ") {
        return id.trim_end().parse().ok().map(Said::Registered);
    }
    SENTENCES.iter().find(|(beginning, _)| sentence.starts_with(beginning)).map(|(_, said)| *said)
}

/// The beginnings of sentences: `common/retry_invoker.py`, from 1.32.0 `supercore/retry/`;
/// `supernode/start_client_internal.py`.
const SENTENCES: &[(&str, Said)] = &[
    ("Connection attempt failed, retrying", Said::Retrying),
    ("Connection successful after", Said::Reconnected),
    ("Giving up reconnection after", Said::Ended),
    ("SuperNode terminated gracefully", Said::Ended),
];

/// What stands behind an escape sequence for a colour, where the text begins with one.
fn after_colour(text: &str) -> &str {
    let behind = text.strip_prefix("\x1b[").and_then(|codes| codes.split_once('m'));
    match behind {
        Some((codes, rest)) if codes.bytes().all(|b| b.is_ascii_digit() || b == b';') => rest,
        _ => text,
    }
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
                release.tells_node_id(),
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

    /// What the lines say that say something.
    fn all_said(lines: &str) -> Vec<Said> {
        lines.lines().filter_map(said).collect()
    }

    use Said::{Ended, Reconnected, Registered, Retrying};

    /// Recorded with the SuperLink stopped after 11 s and started again at once: both processes end
    /// with exit code 0. That of 1.31.0 takes 5 s to it, and in a container it has been seen to
    /// hang instead.
    #[test]
    fn a_superlink_that_is_started_again_at_once_ends_the_node() {
        let v1_31 = "\
\x1b[92mINFO \x1b[0m:      Starting Flower SuperNode
\x1b[93mWARNING \x1b[0m:   Option `--insecure` was set. Starting insecure HTTP channel to 127.0.0.1:9092.
\x1b[92mINFO \x1b[0m:      Flower Deployment Runtime: Starting ClientAppIo API on 0.0.0.0:9094
\x1b[92mINFO \x1b[0m:      Starting gRPC health server on 0.0.0.0:9099
\x1b[92mINFO \x1b[0m:      SuperNode ID: 7848334859123487554
\x1b[92mINFO \x1b[0m:      Starting Flower SuperExec
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.27 seconds
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 3.81 seconds
\x1b[92mINFO \x1b[0m:      SuperNode terminated gracefully.
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.62 seconds
";
        assert_eq!(
            all_said(v1_31),
            [Registered(7848334859123487554), Retrying, Retrying, Ended, Retrying]
        );
        let v1_41 = "\
\x1b[92mINFO \x1b[0m:      Starting Flower SuperNode
\x1b[93mWARNING \x1b[0m:   Option `--insecure` was set. Starting insecure channel to 127.0.0.1:8000.
INFO:     Started server process [22781]
\x1b[92mINFO \x1b[0m:      FastAPI lifespan: startup
INFO:     Uvicorn running on http://127.0.0.1:9094 (Press CTRL+C to quit)
\x1b[92mINFO \x1b[0m:      Starting gRPC health server on 0.0.0.0:9099
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.73 seconds
\x1b[92mINFO \x1b[0m:      Connection successful after 0.77 seconds and 2 tries.
\x1b[92mINFO \x1b[0m:      SuperNode ID: 13465357509533870726
\x1b[92mINFO \x1b[0m:      Starting Flower SuperExec
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.62 seconds
\x1b[92mINFO \x1b[0m:      SuperNode terminated gracefully.
INFO:     Shutting down
\x1b[92mINFO \x1b[0m:      SuperExec terminated gracefully.
";
        let said = [Retrying, Reconnected, Registered(13465357509533870726), Retrying, Ended];
        assert_eq!(all_said(v1_41), said);
    }

    /// Recorded with the SuperLink killed, and started again after 30 s: it does not know the node
    /// any more.
    #[test]
    fn a_superlink_that_is_back_after_30_s_ends_the_node_as_well() {
        let v1_31 = "\
\x1b[92mINFO \x1b[0m:      SuperNode ID: 16204095064827034974
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 17.16 seconds
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.18 seconds
\x1b[92mINFO \x1b[0m:      SuperNode terminated gracefully.
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.34 seconds
\x1b[92mINFO \x1b[0m:      SuperExec terminated gracefully.
";
        assert_eq!(
            all_said(v1_31),
            [Registered(16204095064827034974), Retrying, Retrying, Ended, Retrying]
        );
        let v1_41 = "\
\x1b[92mINFO \x1b[0m:      SuperNode ID: 18375337094250742509
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 17.15 seconds
Exception in thread Thread-3 (_run):
\x1b[92mINFO \x1b[0m:      SuperNode terminated gracefully.
httpx.HTTPStatusError: Client error '401 Unauthorized' for url 'http://127.0.0.1:8000/v1/fleet/send-node-heartbeat'
";
        assert_eq!(all_said(v1_41), [Registered(18375337094250742509), Retrying, Ended]);
    }

    #[test]
    fn colours_and_the_time_of_a_debug_log_do_not_matter() {
        for line in [
            "INFO :      SuperNode ID: 7",
            "INFO:     SuperNode ID: 7\r",
            "\x1b[92mINFO 2026-11-26 16:11:13,123\x1b[0m:      SuperNode ID: 7",
            "INFO 2026-11-26 16:11:13,123:      SuperNode ID: 7",
            "\x1b[1;92mINFO\x1b[0m:      SuperNode ID: 7",
        ] {
            assert_eq!(said(line), Some(Registered(7)), "{line}");
        }
    }

    #[test]
    fn only_a_whole_line_of_flower_counts() {
        for line in [
            "",
            "INFO",
            "INFO :",
            "\x1b[",
            "\x1b[92m",
            "\x1b[9xmINFO :      SuperNode ID: 7",
            "SuperNode ID: 7",
            "SuperNode terminated gracefully.",
            "my app: INFO :      SuperNode ID: 7",
            "INFO SuperNode ID: 7",
            "INFORMATION: SuperNode ID: 7",
            "INFO :      SuperNode ID: 7 of 9",
            "INFO :      SuperNode ID: -7",
            "INFO :      the app said: SuperNode ID: 7",
            "INFO :      SuperExec terminated gracefully.",
        ] {
            assert_eq!(said(line), None, "{line}");
        }
    }
}
