//! Time formats: of logs, status and error messages, and of Docker.

use std::str::FromStr as _;
use std::time::{Duration, SystemTime};

use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime as _;
use x509_cert::der::DateTime;

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

/// Formats a time in RFC 3339 (UTC, seconds): `2026-11-24T14:40:02Z`.
pub fn format_utc(time: SystemTime) -> String {
    DateTime::from_system_time(time)
        .map_or_else(|_| "a year before 1970 or after 9999".into(), |time| time.to_string())
}

/// Parses a time in RFC 3339 (UTC, with or without a fraction of a second).
pub fn parse_utc(text: &str) -> Option<SystemTime> {
    let (second, rest) = text.split_at_checked(19)?;
    let second = DateTime::from_str(&format!("{second}Z")).ok()?;
    // Docker omits trailing zeros of the fraction.
    let digits: String = rest.chars().skip(1).take_while(char::is_ascii_digit).take(9).collect();
    let nanoseconds = format!("{digits:0<9}").parse().ok()?;
    Some(second.to_system_time() + Duration::from_nanos(nanoseconds))
}
