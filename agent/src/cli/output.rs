//! Parts of the text output that commands share.

use std::io::{self, Write};

/// Writes a titled list, or nothing if it is empty.
pub(super) fn write_list<'a>(
    out: &mut dyn Write,
    title: &str,
    lines: impl IntoIterator<Item = &'a String>,
) -> io::Result<()> {
    let mut lines = lines.into_iter().peekable();
    if lines.peek().is_some() {
        writeln!(out, "{title}")?;
    }
    lines.try_for_each(|line| writeln!(out, "  {line}"))
}
