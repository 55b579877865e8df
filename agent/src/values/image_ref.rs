use std::fmt;

use super::error::ValidationError;
use super::host_port::split_host_port;
use super::version::Version;

/// Container image reference: `[host[:port]/]path[:tag][@digest]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRef(String);

impl ImageRef {
    /// Parses a reference with the grammar of Docker (distribution/reference, `reference.go`).
    ///
    /// # Errors
    /// When the text is not in this grammar, or is an image ID.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        if Self::is_valid(text) {
            Ok(Self(text.into()))
        } else {
            Err(ValidationError::new(
                "must be an image reference [host[:port]/]name[:tag][@sha256:digest], \
                 name and digest in lower case, not an image ID",
            ))
        }
    }

    fn is_valid(text: &str) -> bool {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        if let Some(digest) = digest {
            let hex = digest.strip_prefix("sha256:").unwrap_or_default();
            if !is_sha256(hex) {
                return false;
            }
        }
        // Docker reads 64 hexadecimal digits as an image ID, which cannot be pulled.
        if is_sha256(text) {
            return false;
        }
        // Only a colon after the last slash separates a tag. The part may include the slash.
        let last_part_at = rest.rfind('/').unwrap_or(0);
        let (name, tag) = match rest[last_part_at..].split_once(':') {
            Some((last, tag)) => (&rest[..last_part_at + last.len()], Some(tag)),
            None => (rest, None),
        };
        if let Some(tag) = tag {
            let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
            let valid = tag.len() <= 128
                && tag.bytes().next().is_some_and(is_word)
                && tag.bytes().all(|b| is_word(b) || b == b'.' || b == b'-');
            if !valid {
                return false;
            }
        }
        let mut path = name;
        if let Some((first, others)) = name.split_once('/')
            && (first.contains(['.', ':']) || first == "localhost")
        {
            // A first component with a dot or a port is the registry host.
            if split_host_port(first, Some(5000)).is_none() {
                return false;
            }
            path = others;
        }
        name.len() <= 255 && path.split('/').all(is_path_component)
    }

    /// Builds `name:version`.
    pub fn from_name_and_version(name: &str, version: &Version) -> Self {
        Self(format!("{name}:{version}"))
    }

    /// Returns the reference as written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns whether `text` is 64 hexadecimal digits; Docker requires lower case.
fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Returns whether `part` is lower-case letters and digits, separated by `.`, `_`, `__` or dashes,
/// with no separator at either end.
fn is_path_component(part: &str) -> bool {
    let is_alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    is_alphanumeric(first)
        && is_alphanumeric(last)
        && part
            .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            .filter(|separator| !separator.is_empty())
            .all(|separator| {
                matches!(separator, "." | "_" | "__") || separator.bytes().all(|b| b == b'-')
            })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::values::error::tests::assert_rejects;

    #[test]
    fn grammar_is_that_of_docker() {
        let digest = format!("flwr/supernode@sha256:{}", "a".repeat(64));
        let like_an_id = format!("{}:1", "a".repeat(64));
        for text in [
            &like_an_id,
            "busybox",
            "flwr/supernode:1.31.0",
            "host.example:5000/a/b:tag",
            "localhost/a",
            "a__b/c-d.e:T_1",
            &digest,
        ] {
            assert!(ImageRef::parse(text).is_ok(), "{text}");
        }
        assert_rejects(
            ImageRef::parse,
            &[
                "UPPER/case",
                "a:",
                "a:b c",
                "/a",
                "a/",
                "a//b",
                "a___b",
                "-a",
                "a@sha256:00",
                &format!("a@sha256:{}", "A".repeat(64)),
                &"a1".repeat(32),
                "a:-tag",
                "a b",
                "--privileged",
                "a;b",
                "é",
            ],
        );
    }

    #[test]
    fn ipv6_registry_host_takes_an_optional_port() {
        for text in ["[fd00::1]/a", "[fd00::1]:5000/a"] {
            assert!(ImageRef::parse(text).is_ok(), "{text}");
        }
        assert_rejects(
            ImageRef::parse,
            &["[fd00::1]registry/a", "[fd00::1]\0/a", "[fd00::1]5000/a", "[fd00::1]:/a"],
        );
    }
}
