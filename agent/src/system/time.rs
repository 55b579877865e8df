//! Time formats of logs, status and error messages.

use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime as _;

/// Returns the current time in RFC 3339 (UTC, microseconds), as in the log:
/// `2026-11-24T14:40:02.937353Z`.
pub fn now() -> String {
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = tracing_subscriber::fmt::time::SystemTime.format_time(&mut Writer::new(&mut text));
    text
}

/// Cuts the fraction of a second off an RFC 3339 time.
pub fn to_seconds(time: &str) -> String {
    match time.split_once('.') {
        Some((seconds, _)) => format!("{seconds}Z"),
        None => time.into(),
    }
}
