use super::error::ValidationError;

/// Largest count: the maximum of a signed 32-bit integer, 68 years in seconds.
pub const MAX_COUNT: u64 = i32::MAX as u64;

/// Parses `YES` or `NO` in any spelling that OpenNebula and its users use.
///
/// # Errors
/// When the text is none of these spellings.
pub fn parse_yes_no(text: &str) -> Result<bool, ValidationError> {
    match text.to_ascii_uppercase().as_str() {
        "YES" | "TRUE" | "ON" | "1" => Ok(true),
        "NO" | "FALSE" | "OFF" | "0" => Ok(false),
        _ => Err(ValidationError::new("must be YES or NO (or TRUE/FALSE, ON/OFF, 1/0)")),
    }
}

/// Parses a whole number from `min` to [`MAX_COUNT`].
///
/// # Errors
/// When the text is not plain digits, or the number is out of range.
pub fn parse_count(text: &str, min: u64) -> Result<u64, ValidationError> {
    let is_digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse::<u64>() {
        Ok(number) if is_digits && (min..=MAX_COUNT).contains(&number) => Ok(number),
        _ => Err(ValidationError::new(format!("must be a whole number from {min} to {MAX_COUNT}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::values::error::tests::assert_rejects;

    #[test]
    fn yes_and_no_are_case_insensitive() {
        for (text, expected) in [
            ("YES", true),
            ("on", true),
            ("True", true),
            ("1", true),
            ("no", false),
            ("oFF", false),
        ] {
            assert_eq!(parse_yes_no(text), Ok(expected));
        }
        assert_rejects(parse_yes_no, &["Y", "JA", "2", "YES NO"]);
    }

    #[test]
    fn count_is_plain_digits_in_range() {
        assert_eq!(parse_count("0", 0), Ok(0));
        assert_eq!(parse_count("2147483647", 1), Ok(2_147_483_647));
        assert_rejects(
            |text| parse_count(text, 1),
            &["0", "-1", "+1", "1.0", "1e3", "0x10", "2147483648", "99999999999999999999"],
        );
    }
}
