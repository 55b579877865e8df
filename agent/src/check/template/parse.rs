//! Parser for the text form of OpenNebula templates. Pure. The grammar is that of
//! src/parsers/template_parser.l and template_syntax.y of OpenNebula/one.

/// Position in the text, counted from 1; columns are characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) line: usize,
    pub(super) column: usize,
}

/// An attribute of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Attribute {
    Single(SingleAttribute),
    Vector(VectorAttribute),
}

/// `NAME="value"` or `NAME=value`, at the top level or in a vector attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SingleAttribute {
    /// In upper case, as OpenNebula stores it.
    pub(super) name: String,
    /// Without quotes and escapes.
    pub(super) value: String,
    /// Position of the name.
    pub(super) position: Position,
}

/// `NAME=[A="x",B="y"]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct VectorAttribute {
    /// In upper case.
    pub(super) name: String,
    /// Position of the name.
    pub(super) position: Position,
    pub(super) entries: Vec<SingleAttribute>,
}

impl VectorAttribute {
    pub(super) fn entry(&self, name: &str) -> Option<&SingleAttribute> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// Returns the trimmed value of `name`; `None` if it is missing or empty.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        self.entry(name).map(|entry| entry.value.trim()).filter(|value| !value.is_empty())
    }
}

/// Syntax error in a template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {}, column {}: {message}", position.line, position.column)]
pub(super) struct SyntaxError {
    pub(super) position: Position,
    /// What was found, and what is expected.
    pub(super) message: String,
}

/// Parses a template.
///
/// # Errors
/// On the first syntax error.
pub(super) fn parse(text: &str) -> Result<Vec<Attribute>, SyntaxError> {
    let mut parser = Parser {
        rest: text.strip_prefix('\u{feff}').unwrap_or(text),
        at: Position { line: 1, column: 1 },
    };
    let mut attributes = Vec::new();
    loop {
        parser.skip_whitespace_and_comments();
        let position = parser.at;
        match parser.peek() {
            None => return Ok(attributes),
            Some('<') => {
                return Err(syntax_error(
                    position,
                    "this is XML; the text form is expected: KEY=\"value\", KEY=[A=\"x\",B=\"y\"]",
                ));
            }
            Some(_) => {}
        }
        let name = parser.parse_name()?;
        parser.skip_whitespace();
        if parser.peek() == Some('[') {
            attributes.push(Attribute::Vector(VectorAttribute {
                entries: parser.parse_entries(&name)?,
                name,
                position,
            }));
        } else {
            // `KEY=` at the end of a line is an empty value.
            let is_empty = matches!(parser.peek(), None | Some('\n'));
            let value = if is_empty { String::new() } else { parser.parse_value(&name)? };
            attributes.push(Attribute::Single(SingleAttribute { name, value, position }));
        }
    }
}

fn syntax_error(position: Position, message: impl Into<String>) -> SyntaxError {
    SyntaxError { position, message: message.into() }
}

struct Parser<'a> {
    rest: &'a str,
    at: Position,
}

impl Parser<'_> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let c = chars.next()?;
        self.rest = chars.as_str();
        match c {
            '\n' => self.at = Position { line: self.at.line + 1, column: 1 },
            _ => self.at.column += 1,
        }
        Some(c)
    }

    fn take_while(&mut self, accept: impl Fn(char) -> bool) -> String {
        let mut text = String::new();
        while let Some(c) = self.peek().filter(|c| accept(*c)) {
            self.next();
            text.push(c);
        }
        text
    }

    fn skip_whitespace(&mut self) {
        self.take_while(|c| c.is_whitespace() && c != '\n');
    }

    fn skip_whitespace_and_comments(&mut self) {
        loop {
            self.take_while(char::is_whitespace);
            if self.peek() != Some('#') {
                return;
            }
            self.take_while(|c| c != '\n');
        }
    }

    /// Parses a name and the `=` after it.
    fn parse_name(&mut self) -> Result<String, SyntaxError> {
        let position = self.at;
        let name = self.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
        if name.is_empty() {
            return Err(syntax_error(
                position,
                format!(
                    "found {} where the name of an attribute is expected",
                    describe(self.peek())
                ),
            ));
        }
        self.skip_whitespace();
        if self.peek() != Some('=') {
            let found = describe(self.peek());
            return Err(syntax_error(
                self.at,
                format!("found {found} after {name}, where = is expected"),
            ));
        }
        self.next();
        Ok(name.to_ascii_uppercase())
    }

    /// Parses a value, with or without quotes.
    fn parse_value(&mut self, name: &str) -> Result<String, SyntaxError> {
        if self.peek() == Some('"') {
            return self.parse_quoted();
        }
        let position = self.at;
        let value = self.take_while(|c| !c.is_whitespace() && !"=#,[]".contains(c));
        if value.is_empty() {
            return Err(syntax_error(
                position,
                format!("found {} where the value of {name} is expected", describe(self.peek())),
            ));
        }
        Ok(value)
    }

    fn parse_quoted(&mut self) -> Result<String, SyntaxError> {
        let begin = self.at;
        self.next();
        let mut value = String::new();
        loop {
            match self.next() {
                None => {
                    return Err(syntax_error(begin, "the quote that starts here is not closed"));
                }
                Some('"') => return Ok(value),
                // \" is the only escape; any other backslash is literal.
                Some('\\') if self.peek() == Some('"') => value.extend(self.next()),
                Some(c) => value.push(c),
            }
        }
    }

    /// Parses a vector attribute from `[` to `]`.
    fn parse_entries(&mut self, name: &str) -> Result<Vec<SingleAttribute>, SyntaxError> {
        let begin = self.at;
        self.next();
        let not_closed =
            || syntax_error(begin, format!("the bracket of {name} that starts here is not closed"));
        let mut entries = Vec::new();
        loop {
            self.skip_whitespace_and_comments();
            if self.peek().is_none() {
                return Err(not_closed());
            }
            let position = self.at;
            if self.peek() == Some(']') && entries.is_empty() {
                self.next();
                return Ok(entries);
            }
            if self.peek() == Some(']') {
                return Err(syntax_error(
                    position,
                    "] follows a comma, where another KEY=\"value\" is expected",
                ));
            }
            let key = self.parse_name()?;
            self.skip_whitespace();
            let value = self.parse_value(&key)?;
            entries.push(SingleAttribute { name: key, value, position });
            self.skip_whitespace_and_comments();
            match self.peek() {
                Some(',') => {
                    self.next();
                }
                Some(']') => {
                    self.next();
                    return Ok(entries);
                }
                None => return Err(not_closed()),
                found => {
                    return Err(syntax_error(
                        self.at,
                        format!("found {} where , or ] is expected", describe(found)),
                    ));
                }
            }
        }
    }
}

fn describe(c: Option<char>) -> String {
    match c {
        None => "the end of the file".into(),
        Some('\n') => "the end of the line".into(),
        Some(c) => format!("'{}'", c.escape_debug()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn listing_of(text: &str) -> Vec<String> {
        parse(text)
            .unwrap()
            .iter()
            .map(|attribute| match attribute {
                Attribute::Single(SingleAttribute { name, value, position }) => {
                    format!("{}:{} {name}={value}", position.line, position.column)
                }
                Attribute::Vector(VectorAttribute { name, position, entries }) => {
                    let inside: Vec<String> = entries
                        .iter()
                        .map(|entry| {
                            format!("{}@{}={}", entry.name, entry.position.line, entry.value)
                        })
                        .collect();
                    format!("{}:{} {name}=[{}]", position.line, position.column, inside.join("|"))
                }
            })
            .collect()
    }

    #[test]
    fn parses_single_and_vector_attributes() {
        let text = "# a comment\nname = \"a \\\"b\\\" \\n\"\n  CPU=4\nMEMORY = 8192 \n\n\
                    OS = [ # inside\n  machine=\"q35\",\nFIRMWARE = UEFI ]\n\
                    PCI=[VENDOR=\"10de\",CLASS=\"0302\"]\nEMPTY=\nNONE=[ ]\nLINES=\"a\nb\"\n";
        assert_eq!(
            listing_of(text),
            [
                "2:1 NAME=a \"b\" \\n",
                "3:3 CPU=4",
                "4:1 MEMORY=8192",
                "6:1 OS=[MACHINE@7=q35|FIRMWARE@8=UEFI]",
                "9:1 PCI=[VENDOR@9=10de|CLASS@9=0302]",
                "10:1 EMPTY=",
                "11:1 NONE=[]",
                "12:1 LINES=a\nb",
            ]
        );
        assert!(listing_of("").is_empty() && listing_of("\n# only this").is_empty());
    }

    #[test]
    fn syntax_error_has_line_and_column() {
        for (text, expected) in [
            (
                "A=\"x\"\nB",
                "line 2, column 2: found the end of the file after B, where = is expected",
            ),
            ("A=\"x", "line 1, column 3: the quote that starts here is not closed"),
            ("A=\"x\" ]", "line 1, column 7: found ']' where the name"),
            (
                "OS=[MACHINE=\"q35\"\nCPU=\"1\"\n",
                "line 2, column 1: found 'C' where , or ] is expected",
            ),
            ("OS=[MACHINE=\"q35\",", "line 1, column 4: the bracket of OS"),
            ("OS=[MACHINE=\"q35\",]", "line 1, column 19: ] follows a comma"),
            ("OS=[MACHINE=]", "line 1, column 13: found ']' where the value of MACHINE"),
            ("NAME=my vm\nCPU=1", "line 1, column 11: found the end of the line after vm"),
            ("OS=[MACHINE]", "line 1, column 12: found ']' after MACHINE"),
            ("OS=[A=[B=\"1\"]]", "line 1, column 7: found '[' where the value of A"),
            ("<TEMPLATE/>", "line 1, column 1: this is XML"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "[A-Z=\\[\\]\",# \\\\\n\u{e9}a]{0,60}") {
            let _ = parse(&text);
        }

        #[test]
        fn quoted_value_is_parsed_unchanged(value in "[^\\x00\\\\]{0,40}") {
            let quoted = value.replace('"', "\\\"");
            let attributes = parse(&format!("A=[B=\"{quoted}\"]")).unwrap();
            let Attribute::Vector(vector) = &attributes[0] else { panic!("{attributes:?}") };
            prop_assert_eq!(&vector.entries[0].value, &value);
        }
    }
}
