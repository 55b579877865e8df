//! Parsed values: each type is validated once, when it is parsed. A parser returns a
//! [`ValidationError`] that states what is accepted.

pub mod ca_bundle;
mod device_selection;
mod error;
mod fraction;
mod gpu_uuid;
mod host_port;
mod image_ref;
mod node_config;
mod pci_address;
mod scalar;
mod text;
mod version;

pub use device_selection::{DeviceName, DeviceSelection};
pub use error::ValidationError;
pub use fraction::Fraction;
pub use gpu_uuid::{GpuUuid, InvalidGpuUuid};
pub use host_port::HostPort;
pub use image_ref::ImageRef;
pub use node_config::NodeConfig;
pub use pci_address::PciAddress;
pub use scalar::{MAX_COUNT, parse_count, parse_yes_no};
pub use text::{escape, sanitize_line};
pub use version::Version;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parsers_never_panic(text in "\\PC{0,40}") {
            let _ = (parse_count(&text, 0), Fraction::parse(&text), Version::parse(&text));
            let _ = (ImageRef::parse(&text), HostPort::parse(&text), GpuUuid::parse(&*text));
            let _ = (DeviceSelection::parse(&text), NodeConfig::parse(&text));
        }
    }
}
