use std::fmt;

use super::error::ValidationError;
use super::pci_address::PciAddress;
use super::text::escape;

/// The GPUs that the operator selected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeviceSelection {
    /// Every usable GPU.
    #[default]
    All,
    /// No GPU.
    None,
    /// These GPUs, in the operator's order.
    Named(Vec<DeviceName>),
}

/// One entry of a [`DeviceSelection`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceName {
    /// The index in NVML and nvidia-smi.
    Index(u32),
    /// A `GPU-…` UUID or a prefix of one.
    GpuUuid(String),
    /// A `MIG-…` UUID or a prefix of one.
    MigUuid(String),
    /// The PCI address inside the VM.
    Pci(PciAddress),
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(index) => write!(f, "{index}"),
            Self::GpuUuid(uuid) | Self::MigUuid(uuid) => f.write_str(uuid),
            Self::Pci(address) => write!(f, "{address}"),
        }
    }
}

impl fmt::Display for DeviceSelection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::None => f.write_str("none"),
            Self::Named(names) => {
                for (position, name) in names.iter().enumerate() {
                    let comma = if position == 0 { "" } else { "," };
                    write!(f, "{comma}{name}")?;
                }
                Ok(())
            }
        }
    }
}

impl DeviceSelection {
    /// Parses `all`, `none` or a comma-separated list of indices, UUIDs and PCI addresses.
    ///
    /// # Errors
    /// When an entry is none of these; the first such entry is named.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        match text.to_ascii_lowercase().as_str() {
            "all" => return Ok(Self::All),
            "none" => return Ok(Self::None),
            _ => {}
        }
        let mut names = Vec::new();
        for part in text.split(',').map(str::trim) {
            let name = DeviceName::parse(part).ok_or_else(|| {
                ValidationError::with_detail(
                    "must be all, none, or a comma-separated list of indices, GPU or MIG \
                     UUIDs and PCI addresses",
                    format!("'{}' is none of these", escape(part)),
                )
            })?;
            if !names.contains(&name) {
                names.push(name);
            }
        }
        Ok(Self::Named(names))
    }
}

impl DeviceName {
    fn parse(text: &str) -> Option<Self> {
        if (1..=4).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit()) {
            return Some(Self::Index(text.parse().ok()?));
        }
        if let Some(address) = PciAddress::parse(text) {
            return Some(Self::Pci(address));
        }
        let (prefix, rest) = text.split_at_checked(4)?;
        let uuid_like = |extra: fn(u8) -> bool| {
            !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-' || extra(b))
        };
        if prefix.eq_ignore_ascii_case("GPU-") && uuid_like(|_| false) {
            Some(Self::GpuUuid(format!("GPU-{}", rest.to_ascii_lowercase())))
        } else if prefix.eq_ignore_ascii_case("MIG-")
            // Before driver 470 a MIG device is MIG-GPU-<uuid>/<instance>/<compute instance>.
            && uuid_like(|b| matches!(b.to_ascii_uppercase(), b'G' | b'P' | b'U' | b'/'))
        {
            Some(Self::MigUuid(format!("MIG-{rest}")))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::values::error::tests::assert_rejects;

    #[test]
    fn gpu_is_selected_by_index_uuid_or_pci_address() {
        assert_eq!(DeviceSelection::parse("ALL"), Ok(DeviceSelection::All));
        assert_eq!(DeviceSelection::parse("None"), Ok(DeviceSelection::None));
        let selection =
            DeviceSelection::parse("1, gpu-ABC , MIG-1f, 01:00.0,0000:01:00.0, 1").unwrap();
        assert_eq!(selection.to_string(), "1,GPU-abc,MIG-1f,0000:01:00.0");
        assert_rejects(
            DeviceSelection::parse,
            &[
                "-1", "all,1", "0,,1", "GPU-", "GPU-xyz", "0;1", "0 1", "01:00", "01:20.0",
                "01:00.8", "cuda:0", "12345", "$(id)",
            ],
        );
    }

    #[test]
    fn rejected_entry_is_escaped_and_bounded() {
        let text = format!("0,\x1b{}", "x".repeat(9000));
        let error = DeviceSelection::parse(&text).unwrap_err().to_string();
        assert!(error.len() < 500 && !error.contains('\x1b'), "{error}");
        assert!(error.contains("\\u{1b}xxx"), "{error}");
    }
}
