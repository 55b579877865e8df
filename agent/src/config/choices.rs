use std::fmt;

use tracing::level_filters::LevelFilter;

use crate::values::ValidationError;

/// Returns the entry of `words` that equals `text`, ignoring case.
pub(super) fn find_word(
    words: &'static [&'static str],
    text: &str,
) -> Result<&'static str, ValidationError> {
    words
        .iter()
        .find(|word| word.eq_ignore_ascii_case(text))
        .copied()
        .ok_or_else(|| unknown_word(words))
}

fn unknown_word(words: &[&str]) -> ValidationError {
    ValidationError::new(format!("must be one of {}", words.join(", ")))
}

/// Declares an enumeration whose variants are the accepted words of a variable.
macro_rules! choice {
    (
        $(#[$attribute:meta])*
        $name:ident { $($(#[$on_variant:meta])* $variant:ident = $word:literal),+ $(,)? }
    ) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[allow(missing_docs, reason = "a variant is the word of its name")]
        pub enum $name {
            $($(#[$on_variant])* $variant),+
        }

        impl $name {
            /// The accepted words, in the order of the documentation.
            pub const WORDS: &[&str] = &[$($word),+];

            /// Returns the word for this variant.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }

            /// Parses one of [`Self::WORDS`], ignoring case.
            ///
            /// # Errors
            /// When the text is none of them.
            pub fn parse(text: &str) -> Result<Self, ValidationError> {
                match find_word(Self::WORDS, text)? {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(unknown_word(Self::WORDS)),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

choice! {
    /// Machine-learning framework of the container image.
    Framework {
        #[default]
        PyTorch = "pytorch",
        TensorFlow = "tensorflow",
        Sklearn = "sklearn",
        /// Flower only: the operator's ClientApp installs what it needs.
        Base = "base",
    }
}

choice! {
    /// Where Flower runs the ClientApp: in a subprocess of the SuperNode, or in a process that is
    /// started separately.
    Isolation {
        #[default]
        Subprocess = "subprocess",
        Process = "process",
    }
}

choice! {
    /// Lowest severity that is logged.
    LogLevel {
        Debug = "DEBUG",
        #[default]
        Info = "INFO",
        Warning = "WARNING",
        Error = "ERROR",
    }
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Info => Self::INFO,
            LogLevel::Warning => Self::WARN,
            LogLevel::Error => Self::ERROR,
        }
    }
}

choice! {
    /// Log format outside the journal.
    LogFormat {
        #[default]
        Text = "text",
        Json = "json",
    }
}

choice! {
    /// How the delay between discovery attempts grows.
    EdgeBackoff {
        #[default]
        Exponential = "exponential",
        Fixed = "fixed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_case_insensitive() {
        assert_eq!(Framework::parse("PyTorch"), Ok(Framework::PyTorch));
        assert_eq!(LogLevel::parse("debug"), Ok(LogLevel::Debug));
        assert_eq!(LogFormat::parse("JSON"), Ok(LogFormat::Json));
        let error = Isolation::parse("container").unwrap_err().to_string();
        assert_eq!(error, "must be one of subprocess, process");
        assert_eq!(Framework::TensorFlow.to_string(), "tensorflow");
    }

    #[test]
    fn every_word_is_parsed_as_itself() {
        for word in Framework::WORDS {
            assert_eq!(Framework::parse(word).map(Framework::name), Ok(*word));
        }
        for word in LogLevel::WORDS {
            assert_eq!(LogLevel::parse(word).map(LogLevel::name), Ok(*word));
        }
        for word in EdgeBackoff::WORDS {
            assert_eq!(EdgeBackoff::parse(word).map(EdgeBackoff::name), Ok(*word));
        }
    }
}
