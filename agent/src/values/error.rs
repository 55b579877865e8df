/// Error for a rejected value: what is accepted ("must be …"), and why this value is not.
///
/// The caller adds the name of the variable and, unless it is secret, the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{accepted}{}", detail.as_ref().map_or(String::new(), |detail| format!("; {detail}")))]
pub struct ValidationError {
    accepted: String,
    detail: Option<String>,
}

impl ValidationError {
    pub(crate) fn new(accepted: impl Into<String>) -> Self {
        Self { accepted: accepted.into(), detail: None }
    }

    pub(crate) fn with_detail(accepted: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { accepted: accepted.into(), detail: Some(detail.into()) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fmt::Debug;

    use super::*;

    /// Asserts that each of `texts` is rejected with what is accepted instead.
    #[track_caller]
    pub(crate) fn assert_rejects<T: Debug>(
        parse: impl Fn(&str) -> Result<T, ValidationError>,
        texts: &[&str],
    ) {
        for text in texts {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.starts_with("must be "), "{text}: {error}");
        }
    }

    #[test]
    fn detail_follows_what_is_accepted() {
        assert_eq!(ValidationError::new("must be a").to_string(), "must be a");
        assert_eq!(ValidationError::with_detail("must be a", "b").to_string(), "must be a; b");
    }
}
