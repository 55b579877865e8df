//! Helpers shared by the targets.

/// Checks a displayed text: one line without control characters.
///
/// # Panics
/// If it is not.
pub fn assert_shown(text: &str) {
    assert!(!text.contains(char::is_control), "{text:?} has a control character");
}
