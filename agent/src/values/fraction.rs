use std::fmt;

use super::error::ValidationError;

/// Fraction of the GPU memory that a framework may use: greater than 0, at most 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Fraction(f64);

impl Fraction {
    /// Parses a decimal number such as `0.8`.
    ///
    /// # Errors
    /// When the text is not a number greater than 0 and at most 1.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        match text.parse::<f64>() {
            Ok(value) if value > 0.0 && value <= 1.0 => Ok(Self(value)),
            Ok(_) => Err(ValidationError::new("must be greater than 0 and at most 1")),
            Err(_) if text.contains(',') => Err(ValidationError::new(
                "must be greater than 0 and at most 1, with a decimal point, not a comma",
            )),
            Err(_) => Err(ValidationError::new("must be a number greater than 0 and at most 1")),
        }
    }

    /// Returns the number.
    pub fn value(&self) -> f64 {
        self.0
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::values::error::tests::assert_rejects;

    #[test]
    fn fraction_is_greater_than_0_and_at_most_1() {
        for text in ["1", "1.0", "0.8", ".5", "1e-3"] {
            assert!(Fraction::parse(text).is_ok(), "{text}");
        }
        assert_rejects(
            Fraction::parse,
            &["0", "0.0", "-0.1", "1.0001", "1.5", "NaN", "inf", "80%", "0,8", "half"],
        );
        assert_eq!(
            Fraction::parse("1.5").unwrap_err().to_string(),
            "must be greater than 0 and at most 1"
        );
        assert!(
            Fraction::parse("0,8")
                .unwrap_err()
                .to_string()
                .ends_with("a decimal point, not a comma")
        );
        assert_eq!(
            Fraction::parse("half").unwrap_err().to_string(),
            "must be a number greater than 0 and at most 1"
        );
    }
}
