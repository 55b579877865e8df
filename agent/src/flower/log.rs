//! What Flower's own log lines say.

/// What a line of Flower's log says of the connection to the SuperLink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogEvent {
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
/// Flower too and write to the same log, say [`LogEvent::Reconnected`] and [`LogEvent::Retrying`] of their
/// connection to the node.
pub fn parse_log_line(line: &str) -> Option<LogEvent> {
    let line = after_colour(line);
    let rest = ["INFO", "WARNING", "ERROR"].iter().find_map(|level| line.strip_prefix(level))?;
    let (time, sentence) = rest.split_once(": ")?;
    if !time.bytes().all(|b| b.is_ascii_digit() || b" -:,\x1b[;m".contains(&b)) {
        return None;
    }
    let sentence = sentence.trim_start();
    if let Some(id) = sentence.strip_prefix("SuperNode ID: ") {
        return id.trim_end().parse().ok().map(LogEvent::Registered);
    }
    SENTENCES.iter().find(|(beginning, _)| sentence.starts_with(beginning)).map(|(_, said)| *said)
}

/// The beginnings of sentences: `common/retry_invoker.py`, from 1.32.0 `supercore/retry/`;
/// `supernode/start_client_internal.py`.
const SENTENCES: &[(&str, LogEvent)] = &[
    ("Connection attempt failed, retrying", LogEvent::Retrying),
    ("Connection successful after", LogEvent::Reconnected),
    ("Giving up reconnection after", LogEvent::Ended),
    ("SuperNode terminated gracefully", LogEvent::Ended),
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

    /// What the lines say that say something.
    fn all_said(lines: &str) -> Vec<LogEvent> {
        lines.lines().filter_map(parse_log_line).collect()
    }

    use LogEvent::{Ended, Reconnected, Registered, Retrying};

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
            assert_eq!(parse_log_line(line), Some(Registered(7)), "{line}");
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
            assert_eq!(parse_log_line(line), None, "{line}");
        }
    }
}
