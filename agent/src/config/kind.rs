use std::time::Duration;

use serde_json::{Value as Json, json};

use super::choices::{EdgeBackoff, Framework, Isolation, LogFormat, LogLevel, find_word};
use crate::values::ca_bundle::CaBundle;
use crate::values::{
    DeviceSelection, Fraction, HostPort, ImageRef, NodeConfig, ValidationError, Version, escape,
    parse_count, parse_yes_no,
};

/// Type of the value that a variable accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// YES or NO.
    YesNo,
    /// One of these words, in any case.
    Choice(&'static [&'static str]),
    /// A whole number with this minimum.
    Count(u64),
    /// A number greater than 0, at most 1.
    Fraction,
    /// A Flower release.
    Version,
    /// An image reference.
    Image,
    /// A host and a port.
    HostPort,
    /// A list of GPUs.
    Devices,
    /// Flower's node configuration.
    NodeConfig,
    /// CA certificates.
    CaBundle,
}

/// A value that was parsed by its [`Kind`].
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "each variant is named after its kind")]
pub enum Value {
    YesNo(bool),
    Choice(&'static str),
    Count(u64),
    Fraction(Fraction),
    Version(Version),
    Image(ImageRef),
    HostPort(HostPort),
    Devices(DeviceSelection),
    NodeConfig(NodeConfig),
    CaBundle(CaBundle),
}

impl Kind {
    /// Parses `text`, which is trimmed and not empty.
    ///
    /// # Errors
    /// When the text is not accepted.
    pub fn parse(self, text: &str) -> Result<Value, ValidationError> {
        match self {
            Self::YesNo => parse_yes_no(text).map(Value::YesNo),
            Self::Choice(words) => find_word(words, text).map(Value::Choice),
            Self::Count(min) => parse_count(text, min).map(Value::Count),
            Self::Fraction => Fraction::parse(text).map(Value::Fraction),
            Self::Version => Version::parse(text).map(Value::Version),
            Self::Image => ImageRef::parse(text).map(Value::Image),
            Self::HostPort => HostPort::parse(text).map(Value::HostPort),
            Self::Devices => DeviceSelection::parse(text).map(Value::Devices),
            Self::NodeConfig => NodeConfig::parse(text).map(Value::NodeConfig),
            Self::CaBundle => CaBundle::parse(text).map(Value::CaBundle),
        }
    }

    /// Quotes a value of this kind for an error message, or hides it if it may be secret.
    pub fn quote(self, text: &str) -> String {
        let may_be_secret = match self {
            Self::CaBundle => true,
            Self::NodeConfig => NodeConfig::may_hold_secret(text),
            // Neither an address nor an image contains credentials. If the operator wrote some,
            // they precede an `@`.
            Self::HostPort => text.contains('@'),
            Self::Image => text.split_once('@').is_some_and(|(_, rest)| rest.contains('/')),
            _ => false,
        };
        if may_be_secret {
            return format!("({} characters, not shown)", text.chars().count());
        }
        format!("'{}'", escape(text))
    }

    /// Returns the accepted values, for documentation.
    pub fn values(self) -> String {
        match self {
            Self::YesNo => "YES, NO (also TRUE/FALSE, ON/OFF, 1/0)".into(),
            Self::Choice(words) => words.join(", "),
            Self::Count(0) => "whole number >= 0".into(),
            Self::Count(_) => "whole number > 0".into(),
            Self::Fraction => "number, 0 < f <= 1".into(),
            Self::Version => "X.Y.Z".into(),
            Self::Image => "image reference".into(),
            Self::HostPort => "host:port, [IPv6]:port".into(),
            Self::Devices => "all; none; comma-separated list of indices, GPU UUIDs (a unique \
                              prefix suffices), MIG UUIDs, PCI addresses"
                .into(),
            Self::NodeConfig => "space-separated key=value, values TOML scalars".into(),
            Self::CaBundle => "base64 of one or more CA certificates in PEM".into(),
        }
    }
}

/// Type of a configuration field that a variable can fill.
pub(super) trait FieldValue: Sized {
    /// Converts a parsed value; `None` if it is of another kind.
    fn from_value(value: &Value) -> Option<Self>;

    /// Returns the field for `plan`, with secrets hidden.
    fn to_json(&self) -> Json;
}

macro_rules! field_value {
    ($type:ty, $variant:ident, $to_json:expr) => {
        impl FieldValue for $type {
            fn from_value(value: &Value) -> Option<Self> {
                match value {
                    Value::$variant(inner) => Some(inner.clone()),
                    _ => None,
                }
            }

            fn to_json(&self) -> Json {
                let to_json: fn(&Self) -> Json = $to_json;
                to_json(self)
            }
        }
    };
}

field_value!(bool, YesNo, |switch| json!(switch));
field_value!(u64, Count, |count| json!(count));
field_value!(Fraction, Fraction, |fraction| json!(fraction.value()));
field_value!(Version, Version, |version| json!(version.to_string()));
field_value!(ImageRef, Image, |image| json!(image.as_str()));
field_value!(HostPort, HostPort, |address| json!(address.to_string()));
field_value!(DeviceSelection, Devices, |selection| json!(selection.to_string()));
field_value!(NodeConfig, NodeConfig, |node_config| json!(node_config.redacted()));
field_value!(CaBundle, CaBundle, |ca| json!(format!("PEM, {} bytes", ca.pem().len())));

macro_rules! choice_field_value {
    ($($type:ty),+) => {
        $(impl FieldValue for $type {
            fn from_value(value: &Value) -> Option<Self> {
                match value {
                    Value::Choice(word) => Self::parse(word).ok(),
                    _ => None,
                }
            }

            fn to_json(&self) -> Json {
                json!(self.name())
            }
        })+
    };
}

choice_field_value!(Framework, Isolation, LogLevel, LogFormat, EdgeBackoff);

/// In seconds.
impl FieldValue for Duration {
    fn from_value(value: &Value) -> Option<Self> {
        u64::from_value(value).map(Self::from_secs)
    }

    fn to_json(&self) -> Json {
        json!(self.as_secs())
    }
}

impl<T: FieldValue> FieldValue for Option<T> {
    fn from_value(value: &Value) -> Option<Self> {
        T::from_value(value).map(Some)
    }

    fn to_json(&self) -> Json {
        self.as_ref().map_or(Json::Null, FieldValue::to_json)
    }
}

#[cfg(test)]
impl Kind {
    /// Returns a valid value that is no variable's default.
    pub(super) fn sample(self) -> &'static str {
        match self {
            Self::YesNo => "YES",
            Self::Choice(words) => words[words.len() - 1],
            Self::Count(_) => "25",
            Self::Fraction => "0.25",
            Self::Version => "1.25.0",
            Self::Image => "own/image:1",
            Self::HostPort => "h:25",
            Self::Devices => "25",
            Self::NodeConfig => "k=25",
            Self::CaBundle => include_str!("../../tests/ca.crt"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn possible_secret_is_not_quoted() {
        for (kind, harmless, secret) in [
            (Kind::NodeConfig, "a=1", "token=1"),
            (Kind::HostPort, "h:1", "u:p@h:1"),
            (Kind::Image, "own/node:1@sha256:0", "u:p@own/node:1"),
        ] {
            assert_eq!(kind.quote(harmless), format!("'{harmless}'"));
            assert_eq!(kind.quote(secret), format!("({} characters, not shown)", secret.len()));
        }
        assert_eq!(Kind::CaBundle.quote("é"), "(1 characters, not shown)");
        assert_eq!(Kind::YesNo.quote("maybe\n"), "'maybe\\n'");
    }

    #[test]
    fn accepted_values_are_documented() {
        for (kind, values) in [
            (Kind::YesNo, "YES, NO (also TRUE/FALSE, ON/OFF, 1/0)"),
            (Kind::Choice(&["a", "b"]), "a, b"),
            (Kind::Count(0), "whole number >= 0"),
            (Kind::Count(1), "whole number > 0"),
            (Kind::HostPort, "host:port, [IPv6]:port"),
        ] {
            assert_eq!(kind.values(), values);
        }
    }
}
