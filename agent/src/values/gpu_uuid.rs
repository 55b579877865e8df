use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, de};

/// UUID of a GPU (`GPU-…`) or of a MIG instance (`MIG-…`) as NVML reports it.
///
/// Only the characters are checked, because the format differs between driver releases: printable
/// ASCII without a comma, so that UUIDs can be joined in `NVIDIA_VISIBLE_DEVICES`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct GpuUuid(String);

/// Error for a text that cannot be a [`GpuUuid`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the UUID is {0:?}")]
pub struct InvalidGpuUuid(String);

impl GpuUuid {
    /// Parses a UUID that NVML reported.
    ///
    /// # Errors
    /// When the text is empty, or has a comma or a character that is not printable ASCII.
    pub fn parse(text: impl Into<String>) -> Result<Self, InvalidGpuUuid> {
        let text = text.into();
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',') {
            return Err(InvalidGpuUuid(text));
        }
        Ok(Self(text))
    }

    /// Returns the UUID as NVML wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns whether this is a MIG instance, not a whole GPU.
    pub fn is_mig(&self) -> bool {
        self.0.starts_with("MIG-")
    }

    /// Returns whether the UUID starts with `prefix`, ignoring case.
    pub fn has_prefix(&self, prefix: &str) -> bool {
        self.0.get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix))
    }
}

impl fmt::Display for GpuUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for GpuUuid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuid_is_printable_ascii_without_comma() {
        for text in ["GPU-aaaa-1", "MIG-1f", "MIG-GPU-aa/1/0"] {
            assert_eq!(GpuUuid::parse(text).map(|uuid| uuid.to_string()).as_deref(), Ok(text));
        }
        for text in ["", "GPU-1,GPU-2", "GPU 1", "GPU-\n", "GPU-é"] {
            assert!(GpuUuid::parse(text).is_err(), "{text:?}");
        }
        assert_eq!(
            GpuUuid::parse("a,b").map_err(|error| error.to_string()),
            Err("the UUID is \"a,b\"".into())
        );
    }

    #[test]
    fn prefix_is_matched_in_any_case() {
        let uuid = GpuUuid::parse("GPU-aabb-2").unwrap();
        assert!(uuid.has_prefix("gpu-AA") && uuid.has_prefix("GPU-aabb-2") && !uuid.is_mig());
        assert!(!uuid.has_prefix("GPU-b") && !uuid.has_prefix("GPU-aabb-22"));
        assert!(GpuUuid::parse("MIG-1").unwrap().is_mig());
    }

    #[test]
    fn json_is_the_text_and_is_checked() {
        let uuid: GpuUuid = serde_json::from_str("\"GPU-1\"").unwrap();
        assert_eq!(serde_json::to_string(&uuid).unwrap(), "\"GPU-1\"");
        assert!(serde_json::from_str::<GpuUuid>("\"GPU-1,GPU-2\"").is_err());
    }
}
