//! The text of an OpenNebula template as attributes with their places. Pure: text in, attributes or
//! the first error out. The grammar is that of src/parsers/template_parser.l and template_syntax.y
//! of OpenNebula/one.

use std::fmt;

/// A place in the text, counted from 1; columns are characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

/// `NAME = value`, at the top or in brackets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The name in capitals, as OpenNebula keeps it.
    pub name: String,
    /// The value, its quotes and escapes taken away.
    pub value: String,
    /// Where the name stands.
    pub place: Place,
}

/// An attribute of the template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attribute {
    /// `KEY="value"` or `KEY=value`.
    Single(Pair),
    /// `KEY=[A="x",B="y"]`.
    Vector(Vector),
}

/// `KEY=[A="x",B="y"]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vector {
    /// The name in capitals.
    pub name: String,
    /// Where the name stands.
    pub place: Place,
    /// What is in the brackets.
    pub pairs: Vec<Pair>,
}

impl Vector {
    /// The pair `name`.
    pub fn pair(&self, name: &str) -> Option<&Pair> {
        self.pairs.iter().find(|pair| pair.name == name)
    }

    /// The value of `name` without blanks around it; `None` where it is not there or empty.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.pair(name).map(|pair| pair.value.trim()).filter(|value| !value.is_empty())
    }
}

/// What is wrong with the text, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct SyntaxError {
    /// Where.
    pub place: Place,
    /// What is wrong, and what is expected.
    pub message: String,
}

impl fmt::Display for SyntaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}: {}", self.place.line, self.place.column, self.message)
    }
}

/// Reads a template.
///
/// # Errors
/// The first thing that is not in the grammar.
pub fn parse(text: &str) -> Result<Vec<Attribute>, SyntaxError> {
    let mut reader = Reader {
        rest: text.strip_prefix('\u{feff}').unwrap_or(text),
        at: Place { line: 1, column: 1 },
    };
    let mut attributes = Vec::new();
    loop {
        reader.skip_blanks_and_comments();
        let place = reader.at;
        match reader.peek() {
            None => return Ok(attributes),
            Some('<') => {
                return Err(wrong(
                    place,
                    "this is XML; the text form is wanted: KEY=\"value\", KEY=[A=\"x\",B=\"y\"]",
                ));
            }
            Some(_) => {}
        }
        let name = reader.name()?;
        reader.skip_blanks();
        if reader.peek() == Some('[') {
            attributes.push(Attribute::Vector(Vector {
                pairs: reader.brackets(&name)?,
                name,
                place,
            }));
        } else {
            // `KEY=` at the end of a line is an empty value.
            let ended = matches!(reader.peek(), None | Some('\n'));
            let value = if ended { String::new() } else { reader.value(&name)? };
            attributes.push(Attribute::Single(Pair { name, value, place }));
        }
    }
}

fn wrong(place: Place, message: impl Into<String>) -> SyntaxError {
    SyntaxError { place, message: message.into() }
}

struct Reader<'a> {
    rest: &'a str,
    at: Place,
}

impl Reader<'_> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let c = chars.next()?;
        self.rest = chars.as_str();
        match c {
            '\n' => self.at = Place { line: self.at.line + 1, column: 1 },
            _ => self.at.column += 1,
        }
        Some(c)
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let mut text = String::new();
        while let Some(c) = self.peek().filter(|c| wanted(*c)) {
            self.next();
            text.push(c);
        }
        text
    }

    fn skip_blanks(&mut self) {
        self.take_while(|c| c.is_whitespace() && c != '\n');
    }

    fn skip_blanks_and_comments(&mut self) {
        loop {
            self.take_while(char::is_whitespace);
            if self.peek() != Some('#') {
                return;
            }
            self.take_while(|c| c != '\n');
        }
    }

    /// A name and the `=` behind it.
    fn name(&mut self) -> Result<String, SyntaxError> {
        let place = self.at;
        let name = self.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
        if name.is_empty() {
            return Err(wrong(
                place,
                format!(
                    "{} stands where the name of an attribute is expected",
                    described(self.peek())
                ),
            ));
        }
        self.skip_blanks();
        if self.peek() != Some('=') {
            let found = described(self.peek());
            return Err(wrong(
                self.at,
                format!("{found} stands behind {name}, where = is expected"),
            ));
        }
        self.next();
        Ok(name.to_ascii_uppercase())
    }

    /// A value in quotes, or one that needs none.
    fn value(&mut self, name: &str) -> Result<String, SyntaxError> {
        if self.peek() == Some('"') {
            return self.quoted();
        }
        let place = self.at;
        let value = self.take_while(|c| !c.is_whitespace() && !"=#,[]".contains(c));
        if value.is_empty() {
            return Err(wrong(
                place,
                format!("{} stands where the value of {name} is expected", described(self.peek())),
            ));
        }
        Ok(value)
    }

    fn quoted(&mut self) -> Result<String, SyntaxError> {
        let begin = self.at;
        self.next();
        let mut value = String::new();
        loop {
            match self.next() {
                None => return Err(wrong(begin, "the quote that begins here is never closed")),
                Some('"') => return Ok(value),
                // \" is the only escape; any other backslash stands for itself.
                Some('\\') if self.peek() == Some('"') => value.extend(self.next()),
                Some(c) => value.push(c),
            }
        }
    }

    /// From `[` to `]`.
    fn brackets(&mut self, name: &str) -> Result<Vec<Pair>, SyntaxError> {
        let begin = self.at;
        self.next();
        let never_closed =
            || wrong(begin, format!("the bracket of {name} that begins here is never closed"));
        let mut pairs = Vec::new();
        loop {
            self.skip_blanks_and_comments();
            if self.peek().is_none() {
                return Err(never_closed());
            }
            let place = self.at;
            if self.peek() == Some(']') && pairs.is_empty() {
                self.next();
                return Ok(pairs);
            }
            if self.peek() == Some(']') {
                return Err(wrong(
                    place,
                    "] follows a comma, where another KEY=\"value\" is expected",
                ));
            }
            let key = self.name()?;
            self.skip_blanks();
            let value = self.value(&key)?;
            pairs.push(Pair { name: key, value, place });
            self.skip_blanks_and_comments();
            match self.peek() {
                Some(',') => {
                    self.next();
                }
                Some(']') => {
                    self.next();
                    return Ok(pairs);
                }
                None => return Err(never_closed()),
                found => {
                    return Err(wrong(
                        self.at,
                        format!("{} stands where , or ] is expected", described(found)),
                    ));
                }
            }
        }
    }
}

fn described(c: Option<char>) -> String {
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
                Attribute::Single(Pair { name, value, place }) => {
                    format!("{}:{} {name}={value}", place.line, place.column)
                }
                Attribute::Vector(Vector { name, place, pairs }) => {
                    let inside: Vec<String> = pairs
                        .iter()
                        .map(|pair| format!("{}@{}={}", pair.name, pair.place.line, pair.value))
                        .collect();
                    format!("{}:{} {name}=[{}]", place.line, place.column, inside.join("|"))
                }
            })
            .collect()
    }

    #[test]
    fn both_forms_are_read_over_many_lines_with_comments_and_escapes() {
        let text = "# a comment\nname = \"a \\\"b\\\" \\n\"\n  CPU=4\nMEMORY = 8192 \n\nOS = [ # inside\n  machine=\"q35\",\n\
                    FIRMWARE = UEFI ]\nPCI=[VENDOR=\"10de\",CLASS=\"0302\"]\nEMPTY=\nNONE=[ ]\nLINES=\"a\nb\"\n";
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
    fn bad_syntax_is_told_with_line_and_column() {
        for (text, expected) in [
            (
                "A=\"x\"\nB",
                "line 2, column 2: the end of the file stands behind B, where = is expected",
            ),
            ("A=\"x", "line 1, column 3: the quote that begins here is never closed"),
            ("A=\"x\" ]", "line 1, column 7: ']' stands where the name"),
            (
                "OS=[MACHINE=\"q35\"\nCPU=\"1\"\n",
                "line 2, column 1: 'C' stands where , or ] is expected",
            ),
            ("OS=[MACHINE=\"q35\",", "line 1, column 4: the bracket of OS"),
            ("OS=[MACHINE=\"q35\",]", "line 1, column 19: ] follows a comma"),
            ("OS=[MACHINE=]", "line 1, column 13: ']' stands where the value of MACHINE"),
            ("NAME=my vm\nCPU=1", "line 1, column 11: the end of the line stands behind vm"),
            ("OS=[MACHINE]", "line 1, column 12: ']' stands behind MACHINE"),
            ("OS=[A=[B=\"1\"]]", "line 1, column 7: '[' stands where the value of A"),
            ("<TEMPLATE/>", "line 1, column 1: this is XML"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[A-Z=\\[\\]\",# \\\\\n\u{e9}a]{0,60}") {
            let _ = parse(&text);
        }

        #[test]
        fn what_is_quoted_comes_back(value in "[^\\x00\\\\]{0,40}") {
            let quoted = value.replace('"', "\\\"");
            let attributes = parse(&format!("A=[B=\"{quoted}\"]")).unwrap();
            let Attribute::Vector(vector) = &attributes[0] else { panic!("{attributes:?}") };
            prop_assert_eq!(&vector.pairs[0].value, &value);
        }
    }
}
