//! Merges the `nvidia` runtime into the text of Docker's daemon.json. Pure.
//!
//! The entry is inserted into the text; the file is not serialised again. Every other byte (order
//! of keys, digits of numbers, indentation) stays as the operator wrote it.

use std::fmt;

use serde::de::{Deserializer as _, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Name of the runtime in daemon.json and in a container's `HostConfig.Runtime`.
pub const RUNTIME_NAME: &str = "nvidia";

/// Result of a merge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Merged {
    /// The text already has a working entry.
    Unchanged,
    /// The new text.
    Changed(String),
}

/// Why a daemon.json cannot be merged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct InvalidDaemonJson {
    /// Line of the error, from 1.
    pub line: usize,
    /// Column of the error, in characters, from 1.
    pub column: usize,
    /// Description of the error.
    pub message: String,
}

/// Adds the runtime `nvidia` with `runtime_path` to `text`, the content of a daemon.json. An
/// existing entry is kept; if it has neither a path nor a type, the path is added.
///
/// # Errors
/// If `text` is not exactly one JSON object, or Docker would reject its `runtimes`.
pub fn merge(text: &str, runtime_path: &str) -> Result<Merged, InvalidDaemonJson> {
    let document = Object::parse(text, text)?;
    let Some(runtimes) = document.member("runtimes", text)? else {
        return Ok(Merged::Changed(document.with_member(
            text,
            "runtimes",
            &runtimes_json(runtime_path),
        )));
    };
    // Docker 20.10 crashes on a null here when it reloads.
    if runtimes.get() == "null" {
        return Ok(Merged::Changed(replace(
            text,
            runtimes,
            &runtimes_json(runtime_path).render(&document.style(text)),
        )));
    }
    let runtimes = Object::parse(runtimes.get(), text)?;
    let Some(entry) = runtimes.member(RUNTIME_NAME, text)? else {
        return Ok(Merged::Changed(runtimes.with_member(
            text,
            RUNTIME_NAME,
            &entry_json(runtime_path),
        )));
    };
    if entry.get() == "null" {
        return Ok(Merged::Changed(replace(
            text,
            entry,
            &entry_json(runtime_path).render(&runtimes.style(text)),
        )));
    }
    let fields = Object::parse(entry.get(), text)?;
    // Docker ignores the case of these keys: `Path` is a path as well.
    let (shim, path) = (fields.field("runtimeType", text)?, fields.field("path", text)?);
    // An entry for a containerd shim (Docker 23 and later) has a type and no path.
    if is_set(shim, "runtimeType", text)? || is_set(path, "path", text)? {
        return Ok(Merged::Unchanged);
    }
    Ok(Merged::Changed(match path {
        Some(path) => replace(text, path, &quoted(runtime_path)),
        None => fields.with_member(text, "path", &Insert::Text(quoted(runtime_path))),
    }))
}

/// Whether a string member is set. Docker treats null and an empty string as unset.
fn is_set(value: Option<&RawValue>, key: &str, text: &str) -> Result<bool, InvalidDaemonJson> {
    let Some(value) = value else { return Ok(false) };
    match serde_json::from_str::<Option<String>>(value.get()) {
        Ok(name) => Ok(name.is_some_and(|name| !name.is_empty())),
        Err(_) => Err(error_at(
            text,
            value.get(),
            &format!("the {key} of the nvidia runtime must be a string"),
        )),
    }
}

/// Returns a daemon.json that contains only the entry.
pub fn fresh(runtime_path: &str) -> String {
    let mut text =
        Insert::Object("runtimes", Box::new(runtimes_json(runtime_path))).render(&Style::default());
    text.push('\n');
    text
}

fn runtimes_json(runtime_path: &str) -> Insert {
    Insert::Object(RUNTIME_NAME, Box::new(entry_json(runtime_path)))
}

fn entry_json(runtime_path: &str) -> Insert {
    Insert::Object("path", Box::new(Insert::Text(quoted(runtime_path))))
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// JSON to insert: a string, or an object with one member.
enum Insert {
    Text(String),
    Object(&'static str, Box<Insert>),
}

/// Layout of the text around an insertion.
struct Style {
    /// Whether each member is on its own line.
    multiline: bool,
    /// Indentation of the members next to the insertion.
    indent: String,
    /// Additional indentation of each nested level.
    step: String,
    newline: &'static str,
}

impl Default for Style {
    fn default() -> Self {
        Self { multiline: true, indent: String::new(), step: "    ".into(), newline: "\n" }
    }
}

impl Insert {
    /// Returns the JSON text for an insertion at `style.indent`.
    fn render(&self, style: &Style) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Object(key, value) if style.multiline => {
                let inner = Style {
                    indent: format!("{}{}", style.indent, style.step),
                    step: style.step.clone(),
                    ..*style
                };
                let (newline, outer) = (style.newline, &style.indent);
                format!(
                    "{{{newline}{}{}: {}{newline}{outer}}}",
                    inner.indent,
                    quoted(key),
                    value.render(&inner)
                )
            }
            Self::Object(key, value) => format!("{{{}: {}}}", quoted(key), value.render(style)),
        }
    }
}

/// A JSON object as a slice of the text, with its members as slices, including duplicates.
struct Object<'t> {
    raw: &'t str,
    members: Vec<(String, &'t RawValue)>,
}

impl<'t> Object<'t> {
    /// Parses `raw`, a slice of `text`. Positions in errors refer to `text`.
    fn parse(raw: &'t str, text: &str) -> Result<Self, InvalidDaemonJson> {
        if !raw.trim_start_matches(JSON_WHITESPACE).starts_with('{') {
            let found = if raw.trim_matches(JSON_WHITESPACE).is_empty() {
                "nothing"
            } else {
                "another value"
            };
            let position = raw.trim_start_matches(JSON_WHITESPACE);
            return Err(error_at(
                text,
                position,
                &format!("expected one JSON object, found {found}"),
            ));
        }
        let mut json = serde_json::Deserializer::from_str(raw);
        let members =
            json.deserialize_map(MemberList).and_then(|members| json.end().map(|()| members));
        members.map(|members| Self { raw, members }).map_err(|error| {
            let message = error.to_string();
            let message =
                message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
            error_at(text, &raw[offset_of(&error, raw)..], message)
        })
    }

    fn member(&self, key: &str, text: &str) -> Result<Option<&'t RawValue>, InvalidDaemonJson> {
        self.unique(key, |name| name == key, text)
    }

    fn field(&self, key: &str, text: &str) -> Result<Option<&'t RawValue>, InvalidDaemonJson> {
        self.unique(key, |name| name.eq_ignore_ascii_case(key), text)
    }

    fn unique(
        &self,
        key: &str,
        matches: impl Fn(&str) -> bool,
        text: &str,
    ) -> Result<Option<&'t RawValue>, InvalidDaemonJson> {
        let mut values =
            self.members.iter().filter(|(name, _)| matches(name)).map(|(_, value)| *value);
        let first = values.next();
        match values.next() {
            Some(second) => Err(error_at(text, second.get(), &format!("duplicate key {key:?}"))),
            None => Ok(first),
        }
    }

    /// Returns `text` with a member appended to this object.
    fn with_member(&self, text: &str, key: &str, value: &Insert) -> String {
        let style = self.style(text);
        let member = format!("{}: {}", quoted(key), value.render(&style));
        let at = match self.members.last() {
            Some((_, last)) => offset_in(text, last.get()) + last.get().len(),
            None => offset_in(text, self.raw) + self.raw.find('{').map_or(0, |brace| brace + 1),
        };
        let (before, after) = text.split_at(at);
        match (self.members.is_empty(), style.multiline) {
            (false, true) => format!("{before},{}{}{member}{after}", style.newline, style.indent),
            (false, false) => format!("{before}, {member}{after}"),
            (true, true) => {
                // The member on its own line replaces the whitespace between the braces.
                let outer = style.indent.strip_suffix(style.step.as_str()).unwrap_or_default();
                let rest = after.trim_start_matches(JSON_WHITESPACE);
                format!(
                    "{before}{}{}{member}{}{outer}{rest}",
                    style.newline, style.indent, style.newline
                )
            }
            (true, false) => format!("{before}{member}{after}"),
        }
    }

    /// Returns the layout of this object's members.
    fn style(&self, text: &str) -> Style {
        let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
        let start = offset_in(text, self.raw) + self.raw.find('{').unwrap_or(0);
        let outer = indent_of_line(text, start);
        let multiline = self.raw.trim_matches(JSON_WHITESPACE).contains('\n');
        if self.members.is_empty() {
            // An empty object has no layout; use that of the surrounding text.
            let whole_document =
                text.trim_matches(JSON_WHITESPACE) == self.raw.trim_matches(JSON_WHITESPACE);
            let step = if whole_document { "    ".to_owned() } else { step_of(text) };
            return Style {
                multiline: whole_document || text.trim_matches(JSON_WHITESPACE).contains('\n'),
                indent: format!("{outer}{step}"),
                step,
                newline,
            };
        }
        let first_key = offset_in(text, self.raw) + self.raw.find('"').unwrap_or(0);
        let indent = indent_of_line(text, first_key);
        let step = indent
            .strip_prefix(outer)
            .filter(|step| !step.is_empty())
            .map_or_else(|| step_of(text), String::from);
        Style { multiline, indent: indent.into(), step, newline }
    }
}

const JSON_WHITESPACE: [char; 4] = [' ', '\t', '\n', '\r'];

/// Returns the first indentation in the text, which is used for every level.
fn step_of(text: &str) -> String {
    text.lines()
        .map(|line| &line[..line.len() - line.trim_start_matches([' ', '\t']).len()])
        .find(|indent| !indent.is_empty())
        .unwrap_or("    ")
        .into()
}

/// Returns the indentation of the line that contains `offset`.
fn indent_of_line(text: &str, offset: usize) -> &str {
    let line = &text[text[..offset].rfind('\n').map_or(0, |at| at + 1)..];
    &line[..line.len() - line.trim_start_matches([' ', '\t']).len()]
}

/// Returns the offset of `slice` in `text`. `slice` must be a part of `text`.
fn offset_in(text: &str, slice: &str) -> usize {
    slice.as_ptr().addr() - text.as_ptr().addr()
}

fn replace(text: &str, old: &RawValue, new: &str) -> String {
    let at = offset_in(text, old.get());
    format!("{}{new}{}", &text[..at], &text[at + old.get().len()..])
}

/// Returns the byte offset of the error in `text`. serde_json counts columns in bytes and reports
/// the character at which it stopped, or the one before.
fn offset_of(error: &serde_json::Error, text: &str) -> usize {
    if error.is_eof() {
        return text.len();
    }
    let line_start = text
        .split_inclusive('\n')
        .take(error.line().saturating_sub(1))
        .map(str::len)
        .sum::<usize>();
    // Column 0 is the preceding line break.
    let mut offset = (line_start + error.column()).saturating_sub(1).min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    if error.to_string().starts_with("control character") {
        offset += text[offset..].find(|c: char| c < ' ').unwrap_or(0);
    }
    offset
}

fn error_at(text: &str, slice: &str, message: &str) -> InvalidDaemonJson {
    let (line, column) = position_of(text, offset_in(text, slice));
    InvalidDaemonJson { line, column, message: message.into() }
}

fn position_of(text: &str, offset: usize) -> (usize, usize) {
    let before = &text[..offset];
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

struct MemberList;

impl<'de> Visitor<'de> for MemberList {
    type Value = Vec<(String, &'de RawValue)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("one JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let value: &'de RawValue = map.next_value()?;
            members.push((key, value));
        }
        Ok(members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    const PATH: &str = "runtime";

    fn merged(text: &str) -> String {
        match merge(text, PATH).unwrap_or_else(|error| panic!("{text}: {error}")) {
            Merged::Changed(new) => {
                assert_eq!(merge(&new, PATH), Ok(Merged::Unchanged), "second merge changed {new}");
                new
            }
            Merged::Unchanged => text.into(),
        }
    }

    #[test]
    fn entry_is_added_and_every_other_byte_is_kept() {
        let entry = r#""nvidia": {"path": "runtime"}"#;
        let runtimes = format!(r#""runtimes": {{{entry}}}"#);
        let lines = "\"runtimes\": {\n        \"nvidia\": {\n            \"path\": \
                     \"runtime\"\n        }\n    }";
        for (old, new) in [
            ("{}", format!("{{\n    {lines}\n}}")),
            (" \n{ \n }\n\n", format!(" \n{{\n    {lines}\n}}\n\n")),
            (r#"{"debug":true}"#, format!(r#"{{"debug":true, {runtimes}}}"#)),
            (
                "{\n    \"b\": 1,\n    \"a\": 2\n}\n",
                format!("{{\n    \"b\": 1,\n    \"a\": 2,\n    {lines}\n}}\n"),
            ),
            // Numbers are not rounded, notation and escapes are kept, and duplicate keys are
            // accepted.
            (
                r#"{"n":1234567890123456789012,"f":1.50E+3,"s":"\u00e9\/","n":1}"#,
                format!(
                    r#"{{"n":1234567890123456789012,"f":1.50E+3,"s":"\u00e9\/","n":1, {runtimes}}}"#
                ),
            ),
            (r#"{"runtimes":null,"z":[]}"#, format!(r#"{{"runtimes":{{{entry}}},"z":[]}}"#)),
            (r#"{"runtimes":{},"z":0}"#, format!(r#"{{"runtimes":{{{entry}}},"z":0}}"#)),
            (
                r#"{"runtimes":{"kata":{"path":"k"}}}"#,
                format!(r#"{{"runtimes":{{"kata":{{"path":"k"}}, {entry}}}}}"#),
            ),
            (
                r#"{"runtimes":{"nvidia":null}}"#,
                r#"{"runtimes":{"nvidia":{"path": "runtime"}}}"#.into(),
            ),
            (
                r#"{"runtimes":{"nvidia":{}}}"#,
                r#"{"runtimes":{"nvidia":{"path": "runtime"}}}"#.into(),
            ),
            (
                r#"{"runtimes":{"nvidia":{"runtimeArgs":["a"]}}}"#,
                r#"{"runtimes":{"nvidia":{"runtimeArgs":["a"], "path": "runtime"}}}"#.into(),
            ),
            (
                r#"{"runtimes":{"nvidia":{"path":"","runtimeArgs":["a"]}}}"#,
                r#"{"runtimes":{"nvidia":{"path":"runtime","runtimeArgs":["a"]}}}"#.into(),
            ),
            (
                r#"{"runtimes":{"nvidia":{"path": null,"runtimeType":""}}}"#,
                r#"{"runtimes":{"nvidia":{"path": "runtime","runtimeType":""}}}"#.into(),
            ),
            (
                r#"{"runtimes":{"nvidia":{"runtimeType":null}}}"#,
                r#"{"runtimes":{"nvidia":{"runtimeType":null, "path": "runtime"}}}"#.into(),
            ),
            (
                r#"{"runtimes":{"nvidia":{"Path":""}}}"#,
                r#"{"runtimes":{"nvidia":{"Path":"runtime"}}}"#.into(),
            ),
        ] {
            assert_eq!(merged(old), new);
        }
    }

    #[test]
    fn layout_of_the_text_is_kept() {
        assert_eq!(
            merged("{\r\n\t\"a\": 1\r\n}\r\n"),
            "{\r\n\t\"a\": 1,\r\n\t\"runtimes\": {\r\n\t\t\"nvidia\": {\
             \r\n\t\t\t\"path\": \"runtime\"\r\n\t\t}\r\n\t}\r\n}\r\n"
        );
        assert_eq!(
            merged("{\n  \"runtimes\": {\n    \"kata\": {}\n  }\n}"),
            "{\n  \"runtimes\": {\n    \"kata\": {},\n    \"nvidia\": {\
             \n      \"path\": \"runtime\"\n    }\n  }\n}"
        );
        // The indentation step of the object differs from that of the text.
        assert_eq!(
            merged("{\n  \"runtimes\": {\n      \"kata\": {}\n  }\n}"),
            "{\n  \"runtimes\": {\n      \"kata\": {},\n      \"nvidia\": {\
             \n          \"path\": \"runtime\"\n      }\n  }\n}"
        );
        assert_eq!(
            merged("{\n  \"runtimes\": {}\n}"),
            "{\n  \"runtimes\": {\n    \"nvidia\": {\n      \"path\": \"runtime\"\n    }\n  }\n}"
        );
    }

    #[test]
    fn operators_entry_is_kept() {
        for text in [
            r#"{"runtimes":{"nvidia":{"path":"/usr/bin/there","runtimeArgs":["--debug"]}}}"#,
            r#"{"runtimes":{"nvidia":{"path":"runtime"}},"default-runtime":"nvidia"}"#,
            r#"{"runtimes":{"nvidia":{"runtimeType":"io.containerd.v2","options":{"Root":"x"}}}}"#,
            r#"{"runtimes":{"nvidia":{"runtimeType":"io.containerd.runc.v2","path":null}}}"#,
            r#"{"runtimes":{"nvidia":{"runtimeType":null,"path":"/usr/bin/there"}}}"#,
            r#"{"runtimes":{"nvidia":{"Path":"/usr/bin/there","runtimeArgs":["--debug"]}}}"#,
            r#"{"runtimes":{"nvidia":{"RUNTIMETYPE":"io.containerd.runc.v2"}}}"#,
        ] {
            assert_eq!(merge(text, PATH), Ok(Merged::Unchanged));
        }
    }

    #[test]
    fn invalid_text_is_rejected_with_line_and_column() {
        for (text, line, column) in [
            ("", 1, 1),
            (" \n ", 2, 2),
            ("null", 1, 1),
            ("\n  []", 2, 3),
            ("42", 1, 1),
            ("\u{feff}{}", 1, 1),
            ("// Docker\n{}", 1, 1),
            ("{\n  \"a\": 1,\n}", 3, 1),
            ("{\"a\": tru}", 1, 10),
            ("{\"a\": 1", 1, 8),
            ("{\"a\": \"half", 1, 12),
            ("{\"a\": [tru", 1, 11),
            ("{\"a\": 1,\n", 2, 1),
            ("{", 1, 2),
            // Columns are characters.
            ("{\"ü\": tru}", 1, 10),
            ("{\n  \"ü\": ü}", 2, 8),
            ("{\"a\": \"\\u12ü\"}", 1, 12),
            ("{'a': 1}", 1, 2),
            ("{} {}", 1, 4),
            ("{}\nx", 2, 1),
            ("{\"a\": 01}", 1, 8),
            ("{\"a\": \"\t\"}", 1, 8),
            ("{\"a\": \" \t\"}", 1, 9),
            ("{\"a\tb\": 1}", 1, 4),
            ("{\"a\": \"b\nc\"}", 1, 9),
            ("{\"a\nb\": 1}", 1, 4),
            ("{\n  \"runtimes\": []\n}", 2, 15),
            ("{\"runtimes\": \"nvidia\"}", 1, 14),
            ("{\"runtimes\": {\"nvidia\": \"x\"}}", 1, 25),
            ("{\"runtimes\": {\"nvidia\": {\"path\": 1}}}", 1, 34),
            ("{\"runtimes\": {\"nvidia\": {\"path\": [null]}}}", 1, 34),
            ("{\"runtimes\": {\"nvidia\": {\"runtimeType\": 1, \"path\": \"a\"}}}", 1, 41),
            ("{\"runtimes\":\n{\"nvidia\": {\"\\ud800\": 1}}}", 2, 20),
            ("{\"runtimes\": {}, \"runtimes\": {}}", 1, 30),
            ("{\"runtimes\": {\"nvidia\": {\"path\": \"a\", \"Path\": \"b\"}}}", 1, 47),
            ("{\"ü\": 1,\n \"runtimes\": {\"nvidia\": {}, \"nvidia\": {}}}", 2, 39),
        ] {
            let error = merge(text, PATH).expect_err(text);
            assert_eq!((error.line, error.column), (line, column), "{text:?}: {error}");
            assert!(!error.message.contains("line"), "position is duplicated: {error}");
        }
    }

    #[test]
    fn fresh_file_equals_merge_into_empty_object() {
        assert_eq!(fresh(PATH), format!("{}\n", merged("{}")));
    }

    #[test]
    fn path_with_quotes_and_backslashes_is_escaped() {
        let Ok(Merged::Changed(new)) = merge("{}", r#"/a"b\c"#) else { panic!("unchanged") };
        let value: Value = serde_json::from_str(&new).unwrap();
        assert_eq!(value["runtimes"]["nvidia"]["path"], r#"/a"b\c"#);
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "\\PC{0,6}".prop_map(Value::from),
        ];
        let key = prop_oneof![
            "\\PC{0,6}",
            Just("runtimes".into()),
            Just("nvidia".into()),
            Just("path".into()),
            Just("runtimeType".into())
        ];
        leaf.prop_recursive(4, 24, 4, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::vec((key.clone(), inner), 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn merge_adds_only_the_entry(value in json(), pretty in any::<bool>()) {
            let text = if pretty { format!("{value:#}") } else { value.to_string() };
            match merge(&text, PATH) {
                Ok(Merged::Changed(new)) => {
                    prop_assert_eq!(merge(&new, PATH), Ok(Merged::Unchanged));
                    let mut without: Value = serde_json::from_str(&new).unwrap();
                    let mut expected = value.clone();
                    // Without the entry, both must be equal, in the same order.
                    for document in [&mut without, &mut expected] {
                        let object = document.as_object_mut().unwrap();
                        let runtimes = object.get_mut("runtimes").and_then(Value::as_object_mut);
                        if let Some(runtimes) = runtimes {
                            runtimes.shift_remove("nvidia");
                        }
                        object.retain(|key, value| {
                            let is_empty = value.as_object().is_none_or(|object| object.is_empty());
                            key != "runtimes" || !is_empty
                        });
                    }
                    prop_assert_eq!(without.to_string(), expected.to_string());
                }
                Ok(Merged::Unchanged) => prop_assert!(value["runtimes"]["nvidia"].is_object()),
                Err(_) => prop_assert!(!value.is_object() || !value["runtimes"].is_null()),
            }
        }

        #[test]
        fn merge_never_panics(text in "[{}\\[\\]\":,a0 \n\\\\é]{0,30}") {
            let _ = merge(&text, PATH);
        }
    }
}
