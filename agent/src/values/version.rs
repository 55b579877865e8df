use std::cmp::Ordering;
use std::fmt;

use super::error::ValidationError;

/// Flower release `X.Y.Z`: displayed as written, compared numerically.
#[derive(Debug, Clone)]
pub struct Version {
    text: String,
    numbers: [u32; 3],
}

impl Version {
    /// Builds the release `major.minor.patch`.
    pub fn new(major: u16, minor: u16, patch: u16) -> Self {
        Self {
            text: format!("{major}.{minor}.{patch}"),
            numbers: [major, minor, patch].map(u32::from),
        }
    }

    /// Returns major, minor and patch.
    pub fn numbers(&self) -> [u32; 3] {
        self.numbers
    }

    /// Parses `X.Y.Z`, each a decimal number.
    ///
    /// # Errors
    /// When the text has another form.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        let number = |part: &str| {
            let numeric = (1..=5).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
            numeric.then(|| part.parse().ok()).flatten()
        };
        let numbers: Option<Vec<u32>> = text.split('.').map(number).collect();
        let numbers = numbers.and_then(|numbers| <[u32; 3]>::try_from(numbers).ok());
        let numbers = numbers.ok_or_else(|| {
            ValidationError::new("must be a Flower release X.Y.Z, such as 1.31.0")
        })?;
        Ok(Self { text: text.into(), numbers })
    }
}

/// The release that the appliance in OpenNebula's marketplace ships.
impl Default for Version {
    fn default() -> Self {
        Self::new(1, 31, 0)
    }
}

impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        self.numbers == other.numbers
    }
}

impl Eq for Version {}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        self.numbers.cmp(&other.numbers)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::values::error::tests::assert_rejects;

    #[test]
    fn version_has_three_numbers() {
        assert_eq!(Version::parse("1.31.0").unwrap().to_string(), "1.31.0");
        assert_rejects(
            Version::parse,
            &["123456.0.0", "1.31", "v1.31.0", "1.31.0.1", "1.31.x", "latest", "1..0", "1.31.0 "],
        );
    }

    #[test]
    fn versions_compare_by_number_and_display_as_written() {
        let version = |text: &str| Version::parse(text).unwrap();
        assert!(version("1.9.0") < version("1.31.0") && version("1.31.0") < version("1.31.1"));
        assert!(version("2.0.0") > version("1.99999.9"));
        assert_eq!(version("1.031.0"), Version::new(1, 31, 0));
        assert_ne!(version("1.31.0"), version("1.31.1"));
        assert_eq!(version("1.031.0").to_string(), "1.031.0");
    }
}
