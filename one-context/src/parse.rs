//! The text of `context.sh` to names and values: exactly what OpenNebula writes, and nothing that
//! only a shell would accept. Pure, one pass; no error shows a value.

use std::collections::HashMap;

/// Parses the text of a `context.sh` to its assignments, in the order of the file.
///
/// A line is blank (spaces and tabs), a comment (`#` in the first column), or `NAME='value'`: the
/// name `[A-Z0-9_]+`, the value over as many lines as it needs, with `'\''` for a quote as the only
/// escape (OpenNebula, `src/vm/VirtualMachineContext.cc`). Everything between the quotes is kept as
/// it is: `$`, backticks, backslashes, line breaks, bytes that are not UTF-8. The last line break
/// may be missing.
///
/// # Errors
/// [`ParseError`] at the first byte that does not fit.
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
            let (name, first_line) = (shown(&name), place(text, first).0);
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

/// The name before the `=` of a line that begins at `at`.
fn name<'a>(text: &[u8], at: usize, line: &'a [u8]) -> Result<&'a [u8], ParseError> {
    let length =
        line.iter().take_while(|byte| matches!(byte, b'A'..=b'Z' | b'0'..=b'9' | b'_')).count();
    let kind = match line.get(length) {
        Some(b'=') if length > 0 => return Ok(&line[..length]),
        Some(_) => ParseErrorKind::BadName,
        None if at + length == text.len() => ParseErrorKind::CutOffName,
        None => ParseErrorKind::MissingEquals,
    };
    Err(ParseError::at(text, at + length, kind))
}

/// The value whose opening quote must be at `open`, and where the next line begins.
fn value(text: &[u8], open: usize, name: &str) -> Result<(Vec<u8>, usize), ParseError> {
    let name = || shown(name);
    match text.get(open) {
        Some(b'\'') => {}
        Some(_) => {
            return Err(ParseError::at(text, open, ParseErrorKind::NotQuoted { name: name() }));
        }
        None => {
            return Err(ParseError::at(text, open, ParseErrorKind::CutOffValue { name: name() }));
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
    Err(ParseError::at(text, open, ParseErrorKind::CutOffValue { name: name() }))
}

/// A name as an error shows it: not longer than somebody reads. It is A-Z, 0-9 and _ only.
fn shown(name: &str) -> String {
    const MOST_CHARACTERS: usize = 100;
    match name.get(..MOST_CHARACTERS) {
        Some(start) if start.len() < name.len() => format!("{start}…"),
        _ => name.to_owned(),
    }
}

fn first_line(text: &[u8]) -> &[u8] {
    let length = text.iter().position(|&byte| byte == b'\n').unwrap_or(text.len());
    &text[..length]
}

/// Line and column of an offset. Counted only once something is wrong, so that parsing stays one
/// pass.
fn place(text: &[u8], offset: usize) -> (usize, usize) {
    let before = &text[..offset];
    let line_start =
        before.iter().rposition(|&byte| byte == b'\n').map_or(0, |line_break| line_break + 1);
    let line = before[..line_start].iter().filter(|&&byte| byte == b'\n').count() + 1;
    let on_line = &before[line_start..];
    let column = str::from_utf8(on_line).map_or(on_line.len(), |text| text.chars().count()) + 1;
    (line, column)
}

/// What is wrong in a `context.sh`, and where. It names variables and never shows a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {kind}")]
pub struct ParseError {
    /// The line, from 1.
    pub line: usize,
    /// The column, from 1: in characters where the line is UTF-8 up to that place, else in bytes.
    pub column: usize,
    /// What is wrong.
    pub kind: ParseErrorKind,
}

impl ParseError {
    fn at(text: &[u8], offset: usize, kind: ParseErrorKind) -> Self {
        let (line, column) = place(text, offset);
        Self { line, column, kind }
    }

    /// Whether the text is right as far as it goes and only ends too early: it may be a file that
    /// is still being written.
    pub fn is_cut_off(&self) -> bool {
        matches!(self.kind, ParseErrorKind::CutOffName | ParseErrorKind::CutOffValue { .. })
    }
}

/// What can be wrong in a `context.sh`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseErrorKind {
    /// A line that does not begin with a name, or a name with a character in it that no name has.
    /// At that character.
    #[error(
        "not a variable name: a line is NAME='value' with a NAME of A-Z, 0-9 and _ only, a comment with # in column 1, or blank"
    )]
    BadName,
    /// A line that ends after the name. At its end.
    #[error("`=` is missing: a variable is written NAME='value'")]
    MissingEquals,
    /// Something other than a single quote after the `=`. At that place.
    #[error("the value of {name} is not in single quotes: a variable is written NAME='value'")]
    NotQuoted {
        /// The variable; a long name is cut short.
        name: String,
    },
    /// Something between the closing quote and the end of the line, a blank or a carriage return
    /// included. At that place.
    #[error(
        r"something follows the closing quote of {name}: the line must end there (a quote inside a value is written '\'')"
    )]
    AfterQuote {
        /// The variable; a long name is cut short.
        name: String,
    },
    /// A variable that was set before. At the second one.
    #[error("{name} is set twice, first on line {first_line}: set it once")]
    DuplicateName {
        /// The variable; a long name is cut short.
        name: String,
        /// The line that sets it first, from 1.
        first_line: usize,
    },
    /// The text ends inside a name. At the end.
    #[error("the text ends inside a name: a variable is written NAME='value'")]
    CutOffName,
    /// The text ends before the value does. At the opening quote, or at the end where that is
    /// missing too.
    #[error("the text ends before the closing quote of {name}")]
    CutOffValue {
        /// The variable; a long name is cut short.
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
    fn assert_refused(text: &[u8], line: usize, column: usize, kind: ParseErrorKind) {
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

    fn cut_off_value(name: &str) -> ParseErrorKind {
        ParseErrorKind::CutOffValue { name: name.to_owned() }
    }

    #[test]
    fn assignments_come_in_the_order_of_the_file() {
        let names: Vec<_> =
            parsed(b"B='1'\nA='2'\n_0='3'\n").into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["B", "A", "_0"]);
    }

    #[test]
    fn blank_lines_and_comments_are_passed_over() {
        assert_eq!(parsed(b""), []);
        assert_eq!(parsed(b"# it's a comment\r\n\n \t\nA='1'\n#B='2'\n\n"), one("A", b"1"));
        assert_eq!(parsed(b"A='1'\n# no line break"), one("A", b"1"));
        assert_eq!(parsed(b"A='1'\n  "), one("A", b"1"));
    }

    #[test]
    fn a_long_name_is_read_whole_and_shown_in_part() {
        let (name, shown) = ("N".repeat(101), format!("{}…", "N".repeat(100)));
        assert_eq!(parsed(format!("{name}='1'\n").as_bytes()), one(&name, b"1"));
        assert_refused(format!("{name}=1\n").as_bytes(), 1, 103, not_quoted(&shown));
        assert_refused(format!("{name}='1").as_bytes(), 1, 103, cut_off_value(&shown));
        let twice = ParseErrorKind::DuplicateName { name: shown, first_line: 1 };
        assert_refused(format!("{name}=''\n{name}=''\n").as_bytes(), 2, 1, twice);
        assert_refused(format!("{}=1\n", &name[1..]).as_bytes(), 1, 102, not_quoted(&name[1..]));
    }

    #[test]
    fn the_last_line_break_may_be_missing() {
        assert_eq!(parsed(b"A='1'"), one("A", b"1"));
    }

    #[test]
    fn a_value_is_kept_as_it_is_but_for_the_escaped_quote() {
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
    fn a_value_runs_over_lines_whatever_they_look_like() {
        assert_eq!(parsed(b"A='1\n# 2\nB=3\r\n\n'\n"), one("A", b"1\n# 2\nB=3\r\n\n"));
    }

    #[test]
    fn a_value_need_not_be_utf_8() {
        assert_eq!(parsed(b"A='\xff\0\xc3'\n"), one("A", b"\xff\0\xc3"));
    }

    #[test]
    fn a_value_that_is_not_quoted_is_an_error_with_its_place() {
        for value in ["$(id)", "1", "\"x\"", "", " 'x'", "\\'x'", "$'x'"] {
            assert_refused(format!("A='1'\nBC={value}\n").as_bytes(), 2, 4, not_quoted("BC"));
        }
    }

    #[test]
    fn a_bad_name_is_an_error_at_its_first_wrong_character() {
        for (line, column) in [
            ("a='1'", 1),
            ("FL_gpu='1'", 4),
            ("A B='1'", 2),
            ("A-B='1'", 2),
            ("='1'", 1),
            (" A='1'", 1),
            ("Ü='1'", 1),
        ] {
            assert_refused(format!("\n{line}\n").as_bytes(), 2, column, ParseErrorKind::BadName);
        }
    }

    #[test]
    fn export_and_indented_comments_are_errors() {
        assert_refused(b"export A='1'\n", 1, 1, ParseErrorKind::BadName);
        assert_refused(b" # comment\n", 1, 1, ParseErrorKind::BadName);
    }

    #[test]
    fn a_line_without_equals_is_an_error_at_its_end() {
        assert_refused(b"ABC\nB='1'\n", 1, 4, ParseErrorKind::MissingEquals);
    }

    #[test]
    fn junk_after_the_closing_quote_is_an_error_with_its_place() {
        for junk in [" ", "\t", ";", "; id", "\r", "# c", "b", "''", "\\", "\\'", "\\'x'", "\\n"] {
            assert_refused(format!("A='xyz'{junk}\n").as_bytes(), 1, 8, after_quote("A"));
        }
        assert_refused(b"A='1\n2\n3';\n", 3, 3, after_quote("A"));
    }

    #[test]
    fn windows_line_ends_are_an_error() {
        assert_refused(b"A='1'\r\nB='2'\r\n", 1, 6, after_quote("A"));
        assert_refused(b"\r\nB='2'\r\n", 1, 1, ParseErrorKind::BadName);
    }

    #[test]
    fn a_name_set_twice_is_an_error_that_has_both_lines() {
        let kind = ParseErrorKind::DuplicateName { name: "A".to_owned(), first_line: 2 };
        assert_refused(b"# c\nA='1\n2'\nAA='1'\nA='1'\n", 5, 1, kind);
    }

    #[test]
    fn a_value_that_is_not_closed_is_an_error_where_it_opens() {
        for rest in ["", "x", "x\ny\n", "x'\\", "x'\\'", "x'\\''", "x'\\''y"] {
            assert_refused(format!("A='1'\nBC='{rest}").as_bytes(), 2, 4, cut_off_value("BC"));
        }
    }

    #[test]
    fn columns_are_characters_in_utf_8_and_bytes_elsewhere() {
        assert_refused("A='żółw';\n".as_bytes(), 1, 9, after_quote("A"));
        assert_refused(b"A='\xff\xff';\n", 1, 7, after_quote("A"));
        assert_refused("A='\u{fc}\n\u{fc}';\n".as_bytes(), 2, 3, after_quote("A"));
    }

    #[test]
    fn only_a_text_that_ends_too_early_is_cut_off() {
        for text in ["A", "A=", "A='", "A='x\n", r"A='x'\", r"A='x'\'", r"A='x'\''"] {
            assert!(parse(text.as_bytes()).unwrap_err().is_cut_off(), "{text}");
        }
        for text in ["a", "A\n", "A=\n", "A='x' ", "A='x';\nB='", "A='1'\nA='2"] {
            assert!(!parse(text.as_bytes()).unwrap_err().is_cut_off(), "{text}");
        }
    }

    #[test]
    fn a_message_has_the_place_and_what_is_accepted_and_no_value() {
        let said = |text: &[u8]| parse(text).unwrap_err().to_string();
        assert_eq!(
            said(b"A='1'\nPASSWORD=hunter2\n"),
            "line 2, column 10: the value of PASSWORD is not in single quotes: a variable is written NAME='value'"
        );
        assert_eq!(
            said(b"PASSWORD='hunter2'hunter2\n"),
            r"line 1, column 19: something follows the closing quote of PASSWORD: the line must end there (a quote inside a value is written '\'')"
        );
        assert_eq!(
            said(b"A='1'\nA='2'\n"),
            "line 2, column 1: A is set twice, first on line 1: set it once"
        );
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
    fn a_mebibyte_takes_linear_time() {
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

    /// As OpenNebula writes it.
    fn written<'a>(assignments: impl IntoIterator<Item = (&'a String, &'a Vec<u8>)>) -> Vec<u8> {
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

    /// Any bytes, most often those that mean something.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        vec(
            prop_oneof![4 => prop::sample::select(b"'\\\n=#A\" $\r".as_slice()), 1 => any::<u8>()],
            0..40,
        )
    }

    proptest! {
        #[test]
        fn what_opennebula_writes_comes_back_as_it_was(assignments in btree_map("[A-Z0-9_]{1,8}", bytes(), 0..8)) {
            let text = written(&assignments);
            prop_assert_eq!(parsed(&text), Vec::from_iter(assignments));
        }

        #[test]
        fn a_file_that_is_half_written_is_cut_off_or_has_the_first_assignments(
            assignments in btree_map("[A-Z0-9_]{1,8}", bytes(), 1..5)
        ) {
            let text = written(&assignments);
            let whole = Vec::from_iter(assignments);
            for end in 0..text.len() {
                match parse(&text[..end]) {
                    Err(error) => prop_assert!(error.is_cut_off()),
                    Ok(part) if text[..end].ends_with(b"\n") => prop_assert!(whole.starts_with(&part)),
                    // Without its line break the last value may go on after an escaped quote:
                    // source.rs reads again.
                    Ok(mut part) => if let Some((name, value)) = part.pop() {
                        prop_assert!(whole.starts_with(&part));
                        let (whole_name, whole_value) = &whole[part.len()];
                        prop_assert_eq!(&name, whole_name);
                        prop_assert!(whole_value.starts_with(&value));
                    },
                }
            }
        }

        #[test]
        fn no_bytes_make_it_panic(start in "(A='?)?", rest in bytes()) {
            let text = [start.as_bytes(), &rest].concat();
            if let Err(error) = parse(&text) {
                prop_assert!(error.line >= 1 && error.column >= 1);
            }
        }
    }
}
