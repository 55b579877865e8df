//! Sanitises foreign text for log messages, terminals and JSON: everything that the context, a
//! peer, NVML, Docker or a child process wrote goes through one of these two functions.

/// Escapes a value so that it can be quoted in a message: control and invisible characters become
/// visible, and the text is cut after 200 characters.
pub fn escape(text: &str) -> String {
    const MAX_CHARACTERS: usize = 200;
    let mut escaped = String::new();
    for c in text.chars().take(MAX_CHARACTERS) {
        match c {
            // Harmless, and the operator should see them as written.
            '\'' | '"' | '\\' => escaped.push(c),
            c => escaped.extend(c.escape_debug()),
        }
    }
    if text.chars().nth(MAX_CHARACTERS).is_some() {
        escaped.push('…');
    }
    escaped
}

/// Joins a message to one line: whitespace is collapsed, control characters are removed, and the
/// line is cut after 1000 characters.
pub fn sanitize_line(text: &str) -> String {
    const MAX_CHARACTERS: usize = 1000;
    let mut line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((at, _)) = line.char_indices().nth(MAX_CHARACTERS) {
        line.truncate(at);
        line.push('…');
    }
    line.retain(|c| !c.is_control());
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_keeps_quotes_and_shows_control_characters() {
        assert_eq!(escape("St. Mary's \"ü\" C:\\x"), "St. Mary's \"ü\" C:\\x");
        assert_eq!(escape("a\nb\x1b[31m\u{202e}\u{200b}"), "a\\nb\\u{1b}[31m\\u{202e}\\u{200b}");
        assert_eq!(escape(&"é".repeat(201)), format!("{}…", "é".repeat(200)));
    }

    #[test]
    fn sanitize_line_joins_and_bounds() {
        let longest = "é".repeat(1000);
        assert_eq!(sanitize_line(&format!(" {longest}\n")), longest);
        assert_eq!(sanitize_line(&format!("{longest}é")), format!("{longest}…"));
        assert_eq!(sanitize_line("a\n b\t \x1b[31mc"), "a b [31mc");
    }
}
