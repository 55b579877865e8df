use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A PCI address: domain, bus, device, function.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// Parses the notations of OpenNebula (`01:00.0`), sysfs (`0000:01:00.0`) and NVML
    /// (`00000000:01:00.0`).
    pub fn parse(text: &str) -> Option<Self> {
        let hex = |digits: &str, lengths: std::ops::RangeInclusive<usize>| {
            (lengths.contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit()))
                .then(|| u32::from_str_radix(digits, 16).ok())
                .flatten()
        };
        let mut parts = text.split(':').collect::<Vec<_>>();
        let (device, function) = parts.pop()?.split_once('.')?;
        let bus = hex(parts.pop()?, 2..=2)?;
        let domain = match parts.pop() {
            Some(digits) => hex(digits, 4..=8)?,
            None => 0,
        };
        let (device, function) = (hex(device, 2..=2)?, hex(function, 1..=1)?);
        (parts.is_empty() && device < 32 && function < 8).then_some(Self {
            domain,
            bus: bus as u8,
            device: device as u8,
            function: function as u8,
        })
    }

    /// Returns whether both are functions of the same card: GPU, audio, USB.
    pub fn is_same_card(self, other: Self) -> bool {
        Self { function: 0, ..self } == Self { function: 0, ..other }
    }
}

impl fmt::Display for PciAddress {
    /// Formats as sysfs and `lspci -D` do.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl fmt::Debug for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'de> Deserialize<'de> for PciAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| de::Error::custom(format!("the PCI address is {text:?}")))
    }
}

impl Serialize for PciAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_opennebula_sysfs_and_nvml_notation() {
        for text in ["01:00.0", "0000:01:00.0", "00000000:01:00.0"] {
            assert_eq!(
                PciAddress::parse(text).map(|address| address.to_string()).as_deref(),
                Some("0000:01:00.0")
            );
        }
        assert_eq!(
            PciAddress::parse("0001:FF:1F.7").map(|address| address.to_string()).as_deref(),
            Some("0001:ff:1f.7")
        );
        for text in [
            "",
            "1:00.0",
            "01:00",
            "01:00.00",
            "01:20.0",
            "01:00.8",
            "01-00.0",
            "0:01:00.0",
            "a:0000:01:00.0",
            "+1:00.0",
        ] {
            assert_eq!(PciAddress::parse(text), None, "{text}");
        }
    }

    #[test]
    fn same_card_differs_only_in_function() {
        let same = |one: &str, other: &str| {
            PciAddress::parse(one).unwrap().is_same_card(PciAddress::parse(other).unwrap())
        };
        assert!(
            same("01:00.0", "01:00.1") && same("01:00.1", "01:00.0") && same("01:00.1", "01:00.1")
        );
        assert!(
            !same("01:00.0", "01:01.0")
                && !same("01:00.0", "02:00.0")
                && !same("01:00.0", "0001:01:00.0")
        );
        assert_eq!(format!("{:?}", PciAddress::parse("01:00.0").unwrap()), "0000:01:00.0");
    }
}
