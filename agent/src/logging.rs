//! Log output: to the journal with fields, if stderr leads there; else to stderr as text or JSON.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;

use serde_json::{Map, Value as Json};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Target of events that are logged at WARNING and above regardless of the configured level: a
/// fallback to the CPU must not go unnoticed.
pub(crate) const ALWAYS_LOGGED: &str = "supernode_agent::fallback";

/// Sets up logging for the rest of the process.
pub(crate) fn init(level: LevelFilter, as_json: bool) {
    // Events of libraries are dropped.
    let targets = Targets::new()
        .with_target("supernode_agent", level)
        .with_target(ALWAYS_LOGGED, level.max(LevelFilter::WARN));
    let on_journal = stderr_is_the_journal();
    if on_journal && let Ok(journal) = tracing_journald::layer() {
        let journal = journal
            .with_field_prefix(None)
            .with_syslog_identifier("supernode-agent".into())
            .with_priority_mappings(PriorityMappings {
                info: Priority::Informational,
                ..PriorityMappings::new()
            });
        let _ = tracing_subscriber::registry().with(journal.with_filter(targets)).try_init();
        return;
    }
    let format = match (as_json, on_journal) {
        (true, _) => Format::Json,
        (false, true) => Format::Prefixed,
        (false, false) => Format::Text,
    };
    let stderr = tracing_subscriber::fmt::layer().event_format(format).with_writer(std::io::stderr);
    let _ = tracing_subscriber::registry().with(stderr.with_filter(targets)).try_init();
}

/// Returns whether stderr leads to the journal. systemd sets device and inode of the stream in
/// JOURNAL_STREAM (systemd.exec(5)); child processes inherit the variable, so both are compared.
fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    std::fs::metadata("/proc/self/fd/2")
        .is_ok_and(|stderr| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// Formats an error and its causes in one line. A cause that the text already contains is omitted.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}

/// Format of a line on stderr.
enum Format {
    /// Time, level, message.
    Text,
    /// Priority and message, `<4>…`: systemd reads the priority.
    Prefixed,
    /// One object with all fields.
    Json,
}

impl<S, N> FormatEvent<S, N> for Format
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    N: for<'w> FormatFields<'w> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let (name, priority) = match *event.metadata().level() {
            Level::ERROR => ("ERROR", 3),
            Level::WARN => ("WARNING", 4),
            Level::INFO => ("INFO", 6),
            _ => ("DEBUG", 7),
        };
        match self {
            Self::Prefixed => writeln!(out, "<{priority}>{}", fields.message.replace('\n', " ")),
            Self::Text => {
                SystemTime.format_time(&mut out)?;
                writeln!(out, " {name} {}", fields.message)
            }
            Self::Json => {
                let mut object = Map::new();
                let mut time = String::new();
                SystemTime.format_time(&mut Writer::new(&mut time))?;
                object.insert("timestamp".into(), time.into());
                object.insert("level".into(), name.into());
                object.insert("message".into(), fields.message.into());
                object.extend(fields.others);
                writeln!(out, "{}", Json::Object(object))
            }
        }
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Json>,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.into();
        } else {
            self.others.insert(field.name().into(), value.into());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}
