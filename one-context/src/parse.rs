//! Parser for `context.sh`. It accepts the format that OpenNebula writes, not the whole shell
//! syntax. Pure, one pass. No error contains a value.

use std::collections::HashMap;

/// Parses the text of a `context.sh` and returns its assignments in the order of the file.
///
/// A line is empty (spaces and tabs), a comment (`#` in the first column), or `NAME='value'`. A
/// name matches `[A-Z0-9_]+`. A value can span lines, and its only escape is `'\''` for a quote
/// (OpenNebula, `src/vm/VirtualMachineContext.cc`). All other bytes are kept: `$`, backticks,
/// backslashes, line breaks, invalid UTF-8. The last line break is optional.
///
/// # Errors
/// Returns [`ParseError`] with the position of the first byte that does not match.
pub fn parse(text: &[u8]) -> Result<Vec<(String, Vec<u8>)>, ParseError> {
    let mut assignments = Vec::new();
    let mut seen = HashMap::new();
    let mut at = 0;
    while at < text.len() {
        let line = first_line(&text[at..]);
        if line.starts_with(b"#") || line.iter().all(|byte| matches!(byte, b' ' | b'\t')) {
            at += line.len() + 1;
            continue;
        }
        let name_bytes = name(text, at, line)?;
        let name = String::from_utf8_lossy(name_bytes).into_owned();
        if let Some(first) = seen.insert(name_bytes, at) {
            let (name, first_line) = (truncate(&name), position(text, first).0);
            return Err(ParseError::at(
                text,
                at,
                ParseErrorKind::DuplicateName { name, first_line },
            ));
        }
        let (value, next) = value(text, at + name_bytes.len() + 1, &name)?;
        assignments.push((name, value));
        at = next;
    }
    Ok(assignments)
}

/// Returns the name before the `=` of the line at offset `at`.
fn name<'a>(text: &[u8], at: usize, line: &'a [u8]) -> Result<&'a [u8], ParseError> {
    let length =
        line.iter().take_while(|byte| matches!(byte, b'A'..=b'Z' | b'0'..=b'9' | b'_')).count();
    let kind = match line.get(length) {
        Some(b'=') if length > 0 => return Ok(&line[..length]),
        Some(_) => ParseErrorKind::InvalidName,
        None if at + length == text.len() => ParseErrorKind::TruncatedName,
        None => ParseErrorKind::MissingEquals,
    };
    Err(ParseError::at(text, at + length, kind))
}

/// Returns the value whose opening quote is at offset `open`, and the offset of the next line.
fn value(text: &[u8], open: usize, name: &str) -> Result<(Vec<u8>, usize), ParseError> {
    let name = || truncate(name);
    match text.get(open) {
        Some(b'\'') => {}
        Some(_) => {
            return Err(ParseError::at(text, open, ParseErrorKind::NotQuoted { name: name() }));
        }
        None => {
            return Err(ParseError::at(
                text,
                open,
                ParseErrorKind::TruncatedValue { name: name() },
            ));
        }
    }
    let mut value = Vec::new();
    let mut from = open + 1;
    while let Some(length) = text[from..].iter().position(|&byte| byte == b'\'') {
        value.extend_from_slice(&text[from..from + length]);
        let after = from + length + 1;
        match &text[after..] {
            [] | [b'\n', ..] => return Ok((value, after + 1)),
            [b'\\', b'\'', b'\'', ..] => {
                value.push(b'\'');
                from = after + 3;
            }
            [b'\\'] | [b'\\', b'\''] => break,
            _ => {
                return Err(ParseError::at(
                    text,
                    after,
                    ParseErrorKind::AfterQuote { name: name() },
                ));
            }
        }
    }
    Err(ParseError::at(text, open, ParseErrorKind::TruncatedValue { name: name() }))
}

/// Truncates a long name for an error. Names need no escaping: they are A-Z, 0-9 and _ only.
fn truncate(name: &str) -> String {
    const MAX_CHARACTERS: usize = 100;
    match name.get(..MAX_CHARACTERS) {
        Some(start) if start.len() < name.len() => format!("{start}…"),
        _ => name.to_owned(),
    }
}

fn first_line(text: &[u8]) -> &[u8] {
    let length = text.iter().position(|&byte| byte == b'\n').unwrap_or(text.len());
    &text[..length]
}

/// Returns line and column of an offset. Computed for errors only, so that parsing stays one pass.
fn position(text: &[u8], offset: usize) -> (usize, usize) {
    let before = &text[..offset];
    let line_start =
        before.iter().rposition(|&byte| byte == b'\n').map_or(0, |line_break| line_break + 1);
    let line = before[..line_start].iter().filter(|&&byte| byte == b'\n').count() + 1;
    let on_line = &before[line_start..];
    let column = str::from_utf8(on_line).map_or(on_line.len(), |text| text.chars().count()) + 1;
    (line, column)
}

/// Error of the parser, with its position. It contains names of variables, but no values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {kind}")]
pub struct ParseError {
    /// Line, starting at 1.
    pub line: usize,
    /// Column, starting at 1, in characters, or in bytes if the line is not UTF-8 up to there.
    pub column: usize,
    /// Cause.
    pub kind: ParseErrorKind,
}

impl ParseError {
    fn at(text: &[u8], offset: usize, kind: ParseErrorKind) -> Self {
        let (line, column) = position(text, offset);
        Self { line, column, kind }
    }

    /// Returns whether the text is valid but ends too early, as in a file that is being written.
    pub fn is_truncated(&self) -> bool {
        matches!(self.kind, ParseErrorKind::TruncatedName | ParseErrorKind::TruncatedValue { .. })
    }
}

/// Cause of a [`ParseError`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseErrorKind {
    /// A line that does not start with a name, or a name with an invalid character. The position is
    /// that of the character.
    #[error(
        "invalid variable name; expected NAME='value' with a NAME of A-Z, 0-9 and _, a comment \
         with # in column 1, or an empty line"
    )]
    InvalidName,
    /// A line that ends after the name. The position is its end.
    #[error("missing `=`; expected NAME='value'")]
    MissingEquals,
    /// A character other than a single quote after the `=`, at that position.
    #[error("the value of {name} is not in single quotes; expected NAME='value'")]
    NotQuoted {
        /// Name of the variable, truncated if long.
        name: String,
    },
    /// A character between the closing quote and the end of the line, including a space or a
    /// carriage return, at that position.
    #[error(
        "unexpected character after the closing quote of {name}; the line must end there (a quote \
         in a value is written '\\'')"
    )]
    AfterQuote {
        /// Name of the variable, truncated if long.
        name: String,
    },
    /// A second assignment of a variable, at its position.
    #[error("{name} is set twice, first on line {first_line}")]
    DuplicateName {
        /// Name of the variable, truncated if long.
        name: String,
        /// Line of the first assignment, starting at 1.
        first_line: usize,
    },
    /// The text ends within a name. The position is the end.
    #[error("the text ends within a name; expected NAME='value'")]
    TruncatedName,
    /// The text ends before the closing quote. The position is that of the opening quote, or the
    /// end if that is missing as well.
    #[error("the text ends before the closing quote of {name}")]
    TruncatedValue {
        /// Name of the variable, truncated if long.
        name: String,
    },
}

#[cfg(test)]
mod tests {

    use super::*;
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;
    use std::time::{Duration, Instant};

    fn parsed(text: &[u8]) -> Vec<(String, Vec<u8>)> {
        parse(text).unwrap()
    }

    fn one(name: &str, value: &[u8]) -> Vec<(String, Vec<u8>)> {
        vec![(name.to_owned(), value.to_vec())]
    }

    #[track_caller]
    fn assert_rejected(text: &[u8], line: usize, column: usize, kind: ParseErrorKind) {
        assert_eq!(
            parse(text),
            Err(ParseError { line, column, kind }),
            "{:?}",
            text.escape_ascii().to_string()
        );
    }

    fn not_quoted(name: &str) -> ParseErrorKind {
        ParseErrorKind::NotQuoted { name: name.to_owned() }
    }

    fn after_quote(name: &str) -> ParseErrorKind {
        ParseErrorKind::AfterQuote { name: name.to_owned() }
    }

    fn truncated_value(name: &str) -> ParseErrorKind {
        ParseErrorKind::TruncatedValue { name: name.to_owned() }
    }

    #[test]
    fn assignments_keep_file_order() {
        let names: Vec<_> =
            parsed(b"B='1'\nA='2'\n_0='3'\n").into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["B", "A", "_0"]);
    }

    #[test]
    fn empty_lines_and_comments_are_ignored() {
        assert_eq!(parsed(b""), []);
        assert_eq!(parsed(b"# it's a comment\r\n\n \t\nA='1'\n#B='2'\n\n"), one("A", b"1"));
        assert_eq!(parsed(b"A='1'\n# no line break"), one("A", b"1"));
        assert_eq!(parsed(b"A='1'\n  "), one("A", b"1"));
    }

    #[test]
    fn long_name_is_truncated_in_errors_only() {
        let (name, truncated) = ("N".repeat(101), format!("{}…", "N".repeat(100)));
        assert_eq!(parsed(format!("{name}='1'\n").as_bytes()), one(&name, b"1"));
        assert_rejected(format!("{name}=1\n").as_bytes(), 1, 103, not_quoted(&truncated));
        assert_rejected(format!("{name}='1").as_bytes(), 1, 103, truncated_value(&truncated));
        let twice = ParseErrorKind::DuplicateName { name: truncated, first_line: 1 };
        assert_rejected(format!("{name}=''\n{name}=''\n").as_bytes(), 2, 1, twice);
        assert_rejected(format!("{}=1\n", &name[1..]).as_bytes(), 1, 102, not_quoted(&name[1..]));
    }

    #[test]
    fn last_line_break_is_optional() {
        assert_eq!(parsed(b"A='1'"), one("A", b"1"));
    }

    #[test]
    fn value_is_kept_except_escaped_quote() {
        assert_eq!(parsed(b"A=''\n"), one("A", b""));
        assert_eq!(
            parsed(b"A=' $(id) `id` \\n \\ \"q\" '\n"),
            one("A", b" $(id) `id` \\n \\ \"q\" ")
        );
        assert_eq!(parsed(br"A=''\'''"), one("A", b"'"));
        assert_eq!(parsed(br"A='it'\''s '\'''\'''"), one("A", b"it's ''"));
        assert_eq!(parsed(b"A='end\\'\n"), one("A", b"end\\"));
    }

    #[test]
    fn value_spans_lines() {
        assert_eq!(parsed(b"A='1\n# 2\nB=3\r\n\n'\n"), one("A", b"1\n# 2\nB=3\r\n\n"));
    }

    #[test]
    fn value_can_be_invalid_utf8() {
        assert_eq!(parsed(b"A='\xff\0\xc3'\n"), one("A", b"\xff\0\xc3"));
    }

    #[test]
    fn unquoted_value_is_rejected_with_position() {
        for value in ["$(id)", "1", "\"x\"", "", " 'x'", "\\'x'", "$'x'"] {
            assert_rejected(format!("A='1'\nBC={value}\n").as_bytes(), 2, 4, not_quoted("BC"));
        }
    }

    #[test]
    fn invalid_name_is_rejected_at_its_character() {
        for (line, column) in [
            ("a='1'", 1),
            ("FL_gpu='1'", 4),
            ("A B='1'", 2),
            ("A-B='1'", 2),
            ("='1'", 1),
            (" A='1'", 1),
            ("Ü='1'", 1),
        ] {
            assert_rejected(
                format!("\n{line}\n").as_bytes(),
                2,
                column,
                ParseErrorKind::InvalidName,
            );
        }
    }

    #[test]
    fn export_and_indented_comment_are_rejected() {
        assert_rejected(b"export A='1'\n", 1, 1, ParseErrorKind::InvalidName);
        assert_rejected(b" # comment\n", 1, 1, ParseErrorKind::InvalidName);
    }

    #[test]
    fn line_without_equals_is_rejected_at_its_end() {
        assert_rejected(b"ABC\nB='1'\n", 1, 4, ParseErrorKind::MissingEquals);
    }

    #[test]
    fn text_after_closing_quote_is_rejected() {
        for junk in [" ", "\t", ";", "; id", "\r", "# c", "b", "''", "\\", "\\'", "\\'x'", "\\n"] {
            assert_rejected(format!("A='xyz'{junk}\n").as_bytes(), 1, 8, after_quote("A"));
        }
        assert_rejected(b"A='1\n2\n3';\n", 3, 3, after_quote("A"));
    }

    #[test]
    fn windows_line_endings_are_rejected() {
        assert_rejected(b"A='1'\r\nB='2'\r\n", 1, 6, after_quote("A"));
        assert_rejected(b"\r\nB='2'\r\n", 1, 1, ParseErrorKind::InvalidName);
    }

    #[test]
    fn duplicate_name_reports_both_lines() {
        let kind = ParseErrorKind::DuplicateName { name: "A".to_owned(), first_line: 2 };
        assert_rejected(b"# c\nA='1\n2'\nAA='1'\nA='1'\n", 5, 1, kind);
    }

    #[test]
    fn unclosed_value_is_rejected_at_its_opening() {
        for rest in ["", "x", "x\ny\n", "x'\\", "x'\\'", "x'\\''", "x'\\''y"] {
            assert_rejected(format!("A='1'\nBC='{rest}").as_bytes(), 2, 4, truncated_value("BC"));
        }
    }

    #[test]
    fn column_counts_characters_or_bytes() {
        assert_rejected("A='żółw';\n".as_bytes(), 1, 9, after_quote("A"));
        assert_rejected(b"A='\xff\xff';\n", 1, 7, after_quote("A"));
        assert_rejected("A='\u{fc}\n\u{fc}';\n".as_bytes(), 2, 3, after_quote("A"));
    }

    #[test]
    fn only_incomplete_text_is_truncated() {
        for text in ["A", "A=", "A='", "A='x\n", r"A='x'\", r"A='x'\'", r"A='x'\''"] {
            assert!(parse(text.as_bytes()).unwrap_err().is_truncated(), "{text}");
        }
        for text in ["a", "A\n", "A=\n", "A='x' ", "A='x';\nB='", "A='1'\nA='2"] {
            assert!(!parse(text.as_bytes()).unwrap_err().is_truncated(), "{text}");
        }
    }

    #[test]
    fn error_has_position_and_no_value() {
        let message = |text: &[u8]| parse(text).unwrap_err().to_string();
        assert_eq!(
            message(b"A='1'\nPASSWORD=hunter2\n"),
            "line 2, column 10: the value of PASSWORD is not in single quotes; expected \
             NAME='value'"
        );
        assert_eq!(
            message(b"PASSWORD='hunter2'hunter2\n"),
            "line 1, column 19: unexpected character after the closing quote of PASSWORD; the line \
             must end there (a quote in a value is written '\\'')"
        );
        assert_eq!(message(b"A='1'\nA='2'\n"), "line 2, column 1: A is set twice, first on line 1");
        for text in [
            "hunter2='x'",
            "A='x'\nhunter2",
            "P=hunter2",
            "P='hunter2",
            "P='hunter2' ",
            "P='1'\nP='hunter2'",
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        }
    }

    #[test]
    fn parsing_takes_linear_time() {
        const MEBIBYTE: usize = 1 << 20;
        let quotes = format!("A='{}'\n", r"'\''".repeat(MEBIBYTE / 4));
        let lines = format!("{}a", "\n".repeat(MEBIBYTE));
        let names: String = (0..MEBIBYTE / 12).map(|n| format!("A{n:06}='x'\n")).collect();
        let start = Instant::now();
        for text in [&quotes, &lines, &names] {
            let _ = parse(text.as_bytes());
        }
        // Quadratic would be minutes.
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    /// Formats assignments as OpenNebula does.
    fn format_context<'a>(
        assignments: impl IntoIterator<Item = (&'a String, &'a Vec<u8>)>,
    ) -> Vec<u8> {
        let mut text = b"# Context variables generated by OpenNebula\n".to_vec();
        for (name, value) in assignments {
            text.extend_from_slice(name.as_bytes());
            text.extend_from_slice(b"='");
            for &byte in value {
                match byte {
                    b'\'' => text.extend_from_slice(br"'\''"),
                    byte => text.push(byte),
                }
            }
            text.extend_from_slice(b"'\n");
        }
        text
    }

    /// Arbitrary bytes, mostly those with a meaning in the format.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        vec(
            prop_oneof![4 => prop::sample::select(b"'\\\n=#A\" $\r".as_slice()), 1 => any::<u8>()],
            0..40,
        )
    }

    proptest! {
        #[test]
        fn formatted_context_round_trips(
            assignments in btree_map("[A-Z0-9_]{1,8}", bytes(), 0..8)
        ) {
            let text = format_context(&assignments);
            prop_assert_eq!(parsed(&text), Vec::from_iter(assignments));
        }

        #[test]
        fn prefix_is_truncated_or_has_first_assignments(
            assignments in btree_map("[A-Z0-9_]{1,8}", bytes(), 1..5)
        ) {
            let text = format_context(&assignments);
            let complete = Vec::from_iter(assignments);
            for end in 0..text.len() {
                match parse(&text[..end]) {
                    Err(error) => prop_assert!(error.is_truncated()),
                    Ok(part) if text[..end].ends_with(b"\n") => {
                        prop_assert!(complete.starts_with(&part));
                    }
                    // Without a line break the last value can continue after an escaped quote;
                    // source.rs reads such a file again.
                    Ok(mut part) => if let Some((name, value)) = part.pop() {
                        prop_assert!(complete.starts_with(&part));
                        let (complete_name, complete_value) = &complete[part.len()];
                        prop_assert_eq!(&name, complete_name);
                        prop_assert!(complete_value.starts_with(&value));
                    },
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(start in "(A='?)?", rest in bytes()) {
            let text = [start.as_bytes(), &rest].concat();
            if let Err(error) = parse(&text) {
                prop_assert!(error.line >= 1 && error.column >= 1);
            }
        }
    }
}
