//! The `nvidia` entry in Docker's daemon.json: a pure edit of the text.
//!
//! The text is never written anew: the entry is put in at its place, and every other byte (the
//! order of keys, the digits of numbers, the indentation) stays what the operator wrote.

use std::fmt;

use serde::de::{Deserializer as _, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The name of the runtime in daemon.json and in a container's `HostConfig.Runtime`.
pub const RUNTIME_NAME: &str = "nvidia";

/// What became of the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Merged {
    /// It has a working entry: nothing to write.
    Unchanged,
    /// The new text.
    Changed(String),
}

/// Why a daemon.json is not touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct Refused {
    /// Line of the trouble, from 1.
    pub line: usize,
    /// Column of the trouble, in characters, from 1.
    pub column: usize,
    /// What is wrong there, and what is accepted.
    pub message: String,
}

/// Puts the runtime `nvidia` with `runtime_path` into `text`, which is the content of a
/// daemon.json. An entry that is there is the operator's and stays; one that names no program at
/// all gets the path.
///
/// # Errors
/// When `text` is not exactly one JSON object, or one whose `runtimes` Docker itself would refuse.
pub fn merge(text: &str, runtime_path: &str) -> Result<Merged, Refused> {
    let document = Object::parse(text, text)?;
    let Some(runtimes) = document.member("runtimes", text)? else {
        return Ok(Merged::Changed(document.with_member(
            text,
            "runtimes",
            &runtimes_of(runtime_path),
        )));
    };
    // Docker 20.10 dies of a null here when it reloads.
    if runtimes.get() == "null" {
        return Ok(Merged::Changed(replaced(
            text,
            runtimes,
            &runtimes_of(runtime_path).render(&document.style(text)),
        )));
    }
    let runtimes = Object::parse(runtimes.get(), text)?;
    let Some(entry) = runtimes.member(RUNTIME_NAME, text)? else {
        return Ok(Merged::Changed(runtimes.with_member(
            text,
            RUNTIME_NAME,
            &entry_of(runtime_path),
        )));
    };
    if entry.get() == "null" {
        return Ok(Merged::Changed(replaced(
            text,
            entry,
            &entry_of(runtime_path).render(&runtimes.style(text)),
        )));
    }
    let fields = Object::parse(entry.get(), text)?;
    // Docker takes these in any case: `Path` is an operator's path as well.
    let (shim, path) = (fields.field("runtimeType", text)?, fields.field("path", text)?);
    // An entry for containerd's shims (Docker 23 and later) has a type and no path.
    if names_something(shim, "runtimeType", text)? || names_something(path, "path", text)? {
        return Ok(Merged::Unchanged);
    }
    Ok(Merged::Changed(match path {
        Some(path) => replaced(text, path, &quoted(runtime_path)),
        None => fields.with_member(text, "path", &Insert::Text(quoted(runtime_path))),
    }))
}

/// Whether a member is there and names something: to Docker, null and an empty string are the same
/// as nothing.
fn names_something(value: Option<&RawValue>, key: &str, text: &str) -> Result<bool, Refused> {
    let Some(value) = value else { return Ok(false) };
    match serde_json::from_str::<Option<String>>(value.get()) {
        Ok(name) => Ok(name.is_some_and(|name| !name.is_empty())),
        Err(_) => Err(refused_at(
            text,
            value.get(),
            &format!("the {key} of the nvidia runtime must be a string"),
        )),
    }
}

/// The text of a daemon.json that has nothing but the entry.
pub fn fresh(runtime_path: &str) -> String {
    let mut text =
        Insert::Object("runtimes", Box::new(runtimes_of(runtime_path))).render(&Style::default());
    text.push('\n');
    text
}

fn runtimes_of(runtime_path: &str) -> Insert {
    Insert::Object(RUNTIME_NAME, Box::new(entry_of(runtime_path)))
}

fn entry_of(runtime_path: &str) -> Insert {
    Insert::Object("path", Box::new(Insert::Text(quoted(runtime_path))))
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// JSON to be put in: objects of one member, down to a text.
enum Insert {
    Text(String),
    Object(&'static str, Box<Insert>),
}

/// How the text around an insertion is laid out.
struct Style {
    /// One member a line, or all in one line.
    lines: bool,
    /// Indentation of the members beside the insertion.
    indent: String,
    /// What a deeper level adds.
    step: String,
    /// The line break.
    newline: &'static str,
}

impl Default for Style {
    fn default() -> Self {
        Self { lines: true, indent: String::new(), step: "    ".into(), newline: "\n" }
    }
}

impl Insert {
    /// The JSON of an insertion that stands at `style.indent`.
    fn render(&self, style: &Style) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Object(key, value) if style.lines => {
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

/// An object in the text: its members, duplicates included, as the slices they are.
struct Object<'t> {
    raw: &'t str,
    members: Vec<(String, &'t RawValue)>,
}

impl<'t> Object<'t> {
    /// Reads `raw`, a slice of `text`; places in errors are places in `text`.
    fn parse(raw: &'t str, text: &str) -> Result<Self, Refused> {
        if !raw.trim_start_matches(JSON_BLANKS).starts_with('{') {
            let what =
                if raw.trim_matches(JSON_BLANKS).is_empty() { "nothing" } else { "something else" };
            let place = raw.trim_start_matches(JSON_BLANKS);
            return Err(refused_at(
                text,
                place,
                &format!("one JSON object is expected here and {what} is found"),
            ));
        }
        let mut json = serde_json::Deserializer::from_str(raw);
        let members =
            json.deserialize_map(MemberList).and_then(|members| json.end().map(|()| members));
        members.map(|members| Self { raw, members }).map_err(|error| {
            let message = error.to_string();
            let message =
                message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
            refused_at(text, &raw[offset_of(&error, raw)..], message)
        })
    }

    fn member(&self, key: &str, text: &str) -> Result<Option<&'t RawValue>, Refused> {
        self.only(key, |name| name == key, text)
    }

    fn field(&self, key: &str, text: &str) -> Result<Option<&'t RawValue>, Refused> {
        self.only(key, |name| name.eq_ignore_ascii_case(key), text)
    }

    fn only(
        &self,
        key: &str,
        is_it: impl Fn(&str) -> bool,
        text: &str,
    ) -> Result<Option<&'t RawValue>, Refused> {
        let mut found =
            self.members.iter().filter(|(name, _)| is_it(name)).map(|(_, value)| *value);
        let first = found.next();
        match found.next() {
            Some(second) => {
                Err(refused_at(text, second.get(), &format!("the key {key:?} is there twice")))
            }
            None => Ok(first),
        }
    }

    /// `text` with one more member at the end of this object.
    fn with_member(&self, text: &str, key: &str, value: &Insert) -> String {
        let style = self.style(text);
        let member = format!("{}: {}", quoted(key), value.render(&style));
        let at = match self.members.last() {
            Some((_, last)) => offset_in(text, last.get()) + last.get().len(),
            None => offset_in(text, self.raw) + self.raw.find('{').map_or(0, |brace| brace + 1),
        };
        let (before, after) = text.split_at(at);
        match (self.members.is_empty(), style.lines) {
            (false, true) => format!("{before},{}{}{member}{after}", style.newline, style.indent),
            (false, false) => format!("{before}, {member}{after}"),
            (true, true) => {
                // Whatever blanks stood between the braces give way to a member on a line of its
                // own.
                let outer = style.indent.strip_suffix(style.step.as_str()).unwrap_or_default();
                let rest = after.trim_start_matches(JSON_BLANKS);
                format!(
                    "{before}{}{}{member}{}{outer}{rest}",
                    style.newline, style.indent, style.newline
                )
            }
            (true, false) => format!("{before}{member}{after}"),
        }
    }

    /// The layout of this object's members.
    fn style(&self, text: &str) -> Style {
        let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
        let start = offset_in(text, self.raw) + self.raw.find('{').unwrap_or(0);
        let outer = indent_of_line(text, start);
        let sanitize_line = !self.raw.trim_matches(JSON_BLANKS).contains('\n');
        if self.members.is_empty() {
            // An empty object says nothing of its own: the text around it does.
            let whole_document =
                text.trim_matches(JSON_BLANKS) == self.raw.trim_matches(JSON_BLANKS);
            let step = if whole_document { "    ".to_owned() } else { step_of(text) };
            return Style {
                lines: whole_document || text.trim_matches(JSON_BLANKS).contains('\n'),
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
        Style { lines: !sanitize_line, indent: indent.into(), step, newline }
    }
}

const JSON_BLANKS: [char; 4] = [' ', '\t', '\n', '\r'];

/// The first indentation in the text, as the step of all.
fn step_of(text: &str) -> String {
    text.lines()
        .map(|line| &line[..line.len() - line.trim_start_matches([' ', '\t']).len()])
        .find(|indent| !indent.is_empty())
        .unwrap_or("    ")
        .into()
}

/// The blanks at the beginning of the line in which `offset` is.
fn indent_of_line(text: &str, offset: usize) -> &str {
    let line = &text[text[..offset].rfind('\n').map_or(0, |at| at + 1)..];
    &line[..line.len() - line.trim_start_matches([' ', '\t']).len()]
}

/// Where `slice`, which is a part of `text`, begins in it.
fn offset_in(text: &str, slice: &str) -> usize {
    slice.as_ptr().addr() - text.as_ptr().addr()
}

fn replaced(text: &str, old: &RawValue, new: &str) -> String {
    let at = offset_in(text, old.get());
    format!("{}{new}{}", &text[..at], &text[at + old.get().len()..])
}

/// The byte of `text` at which it goes wrong. serde_json counts in bytes, and gives the character
/// at which it stopped or the one before.
fn offset_of(error: &serde_json::Error, text: &str) -> usize {
    if error.is_eof() {
        return text.len();
    }
    let line_start = text
        .split_inclusive('\n')
        .take(error.line().saturating_sub(1))
        .map(str::len)
        .sum::<usize>();
    // Column 0 is the line break before.
    let mut offset = (line_start + error.column()).saturating_sub(1).min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    if error.to_string().starts_with("control character") {
        offset += text[offset..].find(|c: char| c < ' ').unwrap_or(0);
    }
    offset
}

fn refused_at(text: &str, slice: &str, message: &str) -> Refused {
    let (line, column) = place_of(text, offset_in(text, slice));
    Refused { line, column, message: message.into() }
}

fn place_of(text: &str, offset: usize) -> (usize, usize) {
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

    const PATH: &str = "nvidia-container-runtime";

    fn merged(text: &str) -> String {
        match merge(text, PATH).unwrap_or_else(|refused| panic!("{text}: {refused}")) {
            Merged::Changed(new) => {
                assert_eq!(
                    merge(&new, PATH),
                    Ok(Merged::Unchanged),
                    "the second run changes {new}"
                );
                new
            }
            Merged::Unchanged => text.into(),
        }
    }

    #[test]
    fn the_entry_is_put_in_and_every_other_byte_stays() {
        let entry = r#""nvidia": {"path": "nvidia-container-runtime"}"#;
        let runtimes = format!(r#""runtimes": {{{entry}}}"#);
        let lines = "\"runtimes\": {\n        \"nvidia\": {\n            \"path\": \"nvidia-container-runtime\"\n        }\n    }";
        for (old, new) in [
            ("{}", format!("{{\n    {lines}\n}}")),
            (" \n{ \n }\n\n", format!(" \n{{\n    {lines}\n}}\n\n")),
            (r#"{"debug":true}"#, format!(r#"{{"debug":true, {runtimes}}}"#)),
            ("{\n    \"b\": 1,\n    \"a\": 2\n}\n", format!("{{\n    \"b\": 1,\n    \"a\": 2,\n    {lines}\n}}\n")),
            // Digits are not rounded, forms of numbers and escapes are not changed, and duplicates
            // are not ours to judge.
            (
                r#"{"n":12345678901234567890123,"f":1.50E+3,"s":"\u00e9\/","n":1}"#,
                format!(r#"{{"n":12345678901234567890123,"f":1.50E+3,"s":"\u00e9\/","n":1, {runtimes}}}"#),
            ),
            (r#"{"runtimes":null,"z":[]}"#, format!(r#"{{"runtimes":{{{entry}}},"z":[]}}"#)),
            (r#"{"runtimes":{},"z":0}"#, format!(r#"{{"runtimes":{{{entry}}},"z":0}}"#)),
            (r#"{"runtimes":{"kata":{"path":"k"}}}"#, format!(r#"{{"runtimes":{{"kata":{{"path":"k"}}, {entry}}}}}"#)),
            (
                r#"{"runtimes":{"nvidia":null}}"#,
                r#"{"runtimes":{"nvidia":{"path": "nvidia-container-runtime"}}}"#.into(),
            ),
            (r#"{"runtimes":{"nvidia":{}}}"#, r#"{"runtimes":{"nvidia":{"path": "nvidia-container-runtime"}}}"#.into()),
            (
                r#"{"runtimes":{"nvidia":{"runtimeArgs":["a"]}}}"#,
                r#"{"runtimes":{"nvidia":{"runtimeArgs":["a"], "path": "nvidia-container-runtime"}}}"#.into(),
            ),
            (
                r#"{"runtimes":{"nvidia":{"path":"","runtimeArgs":["a"]}}}"#,
                r#"{"runtimes":{"nvidia":{"path":"nvidia-container-runtime","runtimeArgs":["a"]}}}"#.into(),
            ),
            (
                r#"{"runtimes":{"nvidia":{"path": null,"runtimeType":""}}}"#,
                r#"{"runtimes":{"nvidia":{"path": "nvidia-container-runtime","runtimeType":""}}}"#.into(),
            ),
            (
                r#"{"runtimes":{"nvidia":{"runtimeType":null}}}"#,
                r#"{"runtimes":{"nvidia":{"runtimeType":null, "path": "nvidia-container-runtime"}}}"#.into(),
            ),
            (
                r#"{"runtimes":{"nvidia":{"Path":""}}}"#,
                r#"{"runtimes":{"nvidia":{"Path":"nvidia-container-runtime"}}}"#.into(),
            ),
        ] {
            assert_eq!(merged(old), new);
        }
    }

    #[test]
    fn the_layout_of_the_text_is_kept() {
        assert_eq!(
            merged("{\r\n\t\"a\": 1\r\n}\r\n"),
            "{\r\n\t\"a\": 1,\r\n\t\"runtimes\": {\r\n\t\t\"nvidia\": {\r\n\t\t\t\"path\": \"nvidia-container-runtime\"\r\n\t\t}\r\n\t}\r\n}\r\n"
        );
        assert_eq!(
            merged("{\n  \"runtimes\": {\n    \"kata\": {}\n  }\n}"),
            "{\n  \"runtimes\": {\n    \"kata\": {},\n    \"nvidia\": {\n      \"path\": \"nvidia-container-runtime\"\n    }\n  }\n}"
        );
        // The step of the object itself, where it is another than that of the text.
        assert_eq!(
            merged("{\n  \"runtimes\": {\n      \"kata\": {}\n  }\n}"),
            "{\n  \"runtimes\": {\n      \"kata\": {},\n      \"nvidia\": {\n          \"path\": \"nvidia-container-runtime\"\n      }\n  }\n}"
        );
        assert_eq!(
            merged("{\n  \"runtimes\": {}\n}"),
            "{\n  \"runtimes\": {\n    \"nvidia\": {\n      \"path\": \"nvidia-container-runtime\"\n    }\n  }\n}"
        );
    }

    #[test]
    fn an_operators_entry_stays() {
        for text in [
            r#"{"runtimes":{"nvidia":{"path":"/usr/bin/there","runtimeArgs":["--debug"]}}}"#,
            r#"{"runtimes":{"nvidia":{"path":"nvidia-container-runtime"}},"default-runtime":"nvidia"}"#,
            r#"{"runtimes":{"nvidia":{"runtimeType":"io.containerd.runc.v2","options":{"BinaryName":"x"}}}}"#,
            r#"{"runtimes":{"nvidia":{"runtimeType":"io.containerd.runc.v2","path":null}}}"#,
            r#"{"runtimes":{"nvidia":{"runtimeType":null,"path":"/usr/bin/there"}}}"#,
            r#"{"runtimes":{"nvidia":{"Path":"/usr/bin/there","runtimeArgs":["--debug"]}}}"#,
            r#"{"runtimes":{"nvidia":{"RUNTIMETYPE":"io.containerd.runc.v2"}}}"#,
        ] {
            assert_eq!(merge(text, PATH), Ok(Merged::Unchanged));
        }
    }

    #[test]
    fn what_is_not_one_json_object_is_refused_with_its_place() {
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
            let refused = merge(text, PATH).expect_err(text);
            assert_eq!((refused.line, refused.column), (line, column), "{text:?}: {refused}");
            assert!(!refused.message.contains("line"), "the place is said twice: {refused}");
        }
    }

    #[test]
    fn a_fresh_file_is_what_a_merge_into_an_empty_object_gives() {
        assert_eq!(fresh(PATH), format!("{}\n", merged("{}")));
    }

    #[test]
    fn a_path_with_quotes_and_backslashes_stays_one_text() {
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
        fn whatever_the_object_only_the_entry_is_added(value in json(), pretty in any::<bool>()) {
            let text = if pretty { format!("{value:#}") } else { value.to_string() };
            match merge(&text, PATH) {
                Ok(Merged::Changed(new)) => {
                    prop_assert_eq!(merge(&new, PATH), Ok(Merged::Unchanged));
                    let mut without: Value = serde_json::from_str(&new).unwrap();
                    let mut expected = value.clone();
                    // Take the entry out of both: the rest, in its order, must be the same.
                    for document in [&mut without, &mut expected] {
                        let object = document.as_object_mut().unwrap();
                        if let Some(runtimes) = object.get_mut("runtimes").and_then(Value::as_object_mut) {
                            runtimes.shift_remove("nvidia");
                        }
                        object.retain(|key, value| key != "runtimes" || value.as_object().is_some_and(|left| !left.is_empty()));
                    }
                    prop_assert_eq!(without.to_string(), expected.to_string());
                }
                Ok(Merged::Unchanged) => prop_assert!(value["runtimes"]["nvidia"].is_object()),
                Err(_) => prop_assert!(!value.is_object() || !value["runtimes"].is_null()),
            }
        }

        #[test]
        fn no_text_makes_the_merge_panic(text in "[{}\\[\\]\":,a0 \n\\\\é]{0,30}") {
            let _ = merge(&text, PATH);
        }
    }
}
