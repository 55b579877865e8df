//! What the targets have in common.

/// Checks a text that people see: one line, in which nothing acts upon a terminal.
///
/// # Panics
/// Where it is not.
pub fn assert_shown(text: &str) {
    assert!(!text.contains(char::is_control), "{text:?} has a control character");
}
