//! Parser for Flower's log lines about the connection to the SuperLink.

/// A log line of Flower about the connection to the SuperLink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogEvent {
    /// The node has connected and has this SuperNode ID. Flower logs it once per process.
    Registered(u64),
    /// A retry succeeded.
    Reconnected,
    /// An attempt failed; Flower retries.
    Retrying,
    /// Flower gives up or terminates: on a signal, or because a restarted SuperLink no longer knows
    /// the node. 1.31.0 may hang after this line, and its health service then does not answer.
    Ended,
}

/// Parses a line of the container's log; returns `None` for most lines.
///
/// A line of Flower is a coloured level, `:`, whitespace and a message (`common/logger.py`; with
/// `FLWR_LOG_LEVEL=DEBUG` the time follows the level): `\x1b[92mINFO \x1b[0m:      SuperNode
/// ID: 7`. Output of a ClientApp has no level. The SuperExec and the apps write to the same log;
/// their [`LogEvent::Reconnected`] and [`LogEvent::Retrying`] are about the connection to the node.
pub fn parse_log_line(line: &str) -> Option<LogEvent> {
    let line = strip_colour(line);
    let rest = ["INFO", "WARNING", "ERROR"].iter().find_map(|level| line.strip_prefix(level))?;
    let (time, message) = rest.split_once(": ")?;
    if !time.bytes().all(|b| b.is_ascii_digit() || b" -:,\x1b[;m".contains(&b)) {
        return None;
    }
    let message = message.trim_start();
    if let Some(id) = message.strip_prefix("SuperNode ID: ") {
        return id.trim_end().parse().ok().map(LogEvent::Registered);
    }
    MESSAGES.iter().find(|(prefix, _)| message.starts_with(prefix)).map(|(_, event)| *event)
}

/// Prefixes of messages. Sources: `common/retry_invoker.py`, from 1.32.0 `supercore/retry/`;
/// `supernode/start_client_internal.py`.
const MESSAGES: &[(&str, LogEvent)] = &[
    ("Connection attempt failed, retrying", LogEvent::Retrying),
    ("Connection successful after", LogEvent::Reconnected),
    ("Giving up reconnection after", LogEvent::Ended),
    ("SuperNode terminated gracefully", LogEvent::Ended),
];

/// Removes a leading escape sequence for a colour.
fn strip_colour(text: &str) -> &str {
    let parts = text.strip_prefix("\x1b[").and_then(|codes| codes.split_once('m'));
    match parts {
        Some((codes, rest)) if codes.bytes().all(|b| b.is_ascii_digit() || b == b';') => rest,
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses all lines.
    fn events(lines: &str) -> Vec<LogEvent> {
        lines.lines().filter_map(parse_log_line).collect()
    }

    use LogEvent::{Ended, Reconnected, Registered, Retrying};

    /// Recorded with a SuperLink that was stopped after 11 s and restarted at once. Both releases
    /// exit with code 0. 1.31.0 takes 5 s to do so, and was seen to hang instead in a container.
    #[test]
    fn quick_superlink_restart_terminates_supernode() {
        let v1_31 = "\
\x1b[92mINFO \x1b[0m:      Starting Flower SuperNode
\x1b[93mWARNING \x1b[0m:   Option `--insecure` was set. Starting insecure HTTP channel to h:9.
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
            events(v1_31),
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
        let expected = [Retrying, Reconnected, Registered(13465357509533870726), Retrying, Ended];
        assert_eq!(events(v1_41), expected);
    }

    /// Recorded with a SuperLink that was killed and restarted after 30 s, and no longer knows the
    /// node.
    #[test]
    fn superlink_restart_after_30_s_terminates_supernode() {
        let v1_31 = "\
\x1b[92mINFO \x1b[0m:      SuperNode ID: 16204095064827034974
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 17.16 seconds
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.18 seconds
\x1b[92mINFO \x1b[0m:      SuperNode terminated gracefully.
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.34 seconds
\x1b[92mINFO \x1b[0m:      SuperExec terminated gracefully.
";
        assert_eq!(
            events(v1_31),
            [Registered(16204095064827034974), Retrying, Retrying, Ended, Retrying]
        );
        let v1_41 = "\
\x1b[92mINFO \x1b[0m:      SuperNode ID: 18375337094250742509
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 17.15 seconds
Exception in thread Thread-3 (_run):
\x1b[92mINFO \x1b[0m:      SuperNode terminated gracefully.
httpx.HTTPStatusError: Client error '401 Unauthorized' for url 'http://127.0.0.1:8000/v1/fleet/send-node-heartbeat'
";
        assert_eq!(events(v1_41), [Registered(18375337094250742509), Retrying, Ended]);
    }

    #[test]
    fn colours_and_debug_timestamps_are_ignored() {
        for line in [
            "INFO :      SuperNode ID: 7",
            "INFO:     SuperNode ID: 7\r",
            "\x1b[92mINFO 2026-11-26 16:11:13,123\x1b[0m:      SuperNode ID: 7",
            "INFO 2026-11-26 16:11:13,123:      SuperNode ID: 7",
            "\x1b[1;92mINFO\x1b[0m:      SuperNode ID: 7",
        ] {
            assert_eq!(parse_log_line(line), Some(Registered(7)), "{line}");
        }
    }

    #[test]
    fn only_complete_flower_lines_are_parsed() {
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
            assert_eq!(parse_log_line(line), None, "{line}");
        }
    }
}
