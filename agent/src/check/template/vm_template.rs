use super::parse::{Attribute, SingleAttribute, VectorAttribute};
use crate::check::Check;
use crate::values::parse_yes_no;

/// A parsed VM template.
pub(super) struct VmTemplate(pub(super) Vec<Attribute>);

impl VmTemplate {
    pub(super) fn vectors(&self, name: &'static str) -> impl Iterator<Item = &VectorAttribute> {
        self.0.iter().filter_map(move |attribute| match attribute {
            Attribute::Vector(vector) if vector.name == name => Some(vector),
            _ => None,
        })
    }

    pub(super) fn vector(&self, name: &'static str) -> Option<&VectorAttribute> {
        self.vectors(name).next()
    }

    pub(super) fn single(&self, name: &str) -> Option<&SingleAttribute> {
        self.0.iter().find_map(|attribute| match attribute {
            Attribute::Single(entry) if entry.name == name && !entry.value.trim().is_empty() => {
                Some(entry)
            }
            _ => None,
        })
    }

    /// Returns the entry `key` of the vector attribute `name`, if it has a value.
    pub(super) fn entry(&self, name: &'static str, key: &str) -> Option<&SingleAttribute> {
        self.vector(name)?.entry(key).filter(|entry| !entry.value.trim().is_empty())
    }

    /// Returns the line where an entry of the vector attribute belongs; the first line if there is
    /// none.
    pub(super) fn line_of(&self, name: &'static str) -> usize {
        self.vector(name).map_or(1, |vector| vector.position.line)
    }

    /// Returns the PCI attributes, NICs excluded.
    pub(super) fn pci_devices(&self) -> impl Iterator<Item = &VectorAttribute> {
        self.vectors("PCI").filter(|pci| !is_nic(pci))
    }

    /// Returns whether the VM is meant to use a GPU: it has a PCI attribute, or its node enables
    /// the GPU.
    pub(super) fn needs_gpu(&self) -> bool {
        self.is_gpu_enabled() || self.pci_devices().next().is_some()
    }

    /// Returns whether CONTEXT has FL_GPU_ENABLED=YES, or a reference, which can become YES.
    pub(super) fn is_gpu_enabled(&self) -> bool {
        self.gpu_enabled_entries()
            .any(|value| parse_yes_no(value) == Ok(true) || is_reference(value))
    }

    /// Returns whether CONTEXT has FL_GPU_ENABLED=NO.
    pub(super) fn is_gpu_disabled(&self) -> bool {
        self.gpu_enabled_entries().any(|value| parse_yes_no(value) == Ok(false))
    }

    fn gpu_enabled_entries(&self) -> impl Iterator<Item = &str> {
        ["FL_GPU_ENABLED", "ONEAPP_FL_GPU_ENABLED"]
            .into_iter()
            .filter_map(|name| self.entry("CONTEXT", name))
            .map(|entry| entry.value.trim())
    }

    /// Reports repeated names in a vector attribute, of which OpenNebula keeps the first.
    pub(super) fn check_duplicates(&self) -> Vec<Check> {
        let vectors = self.0.iter().filter_map(|attribute| match attribute {
            Attribute::Vector(vector) => Some(vector),
            Attribute::Single(_) => None,
        });
        vectors.flat_map(check_duplicate_entries).collect()
    }
}

fn check_duplicate_entries(vector: &VectorAttribute) -> Vec<Check> {
    let is_duplicate = |index: usize, entry: &SingleAttribute| {
        vector.entries[..index].iter().any(|before| before.name == entry.name)
    };
    vector
        .entries
        .iter()
        .enumerate()
        .filter(|(index, entry)| is_duplicate(*index, entry))
        .map(|(_, entry)| {
            let finding = format!(
                "{} is in {} a second time: OpenNebula keeps the first",
                entry.name, vector.name
            );
            Check::warning("syntax", finding, "delete one of the two").at(entry.position.line)
        })
        .collect()
}

/// Returns whether a PCI attribute is a network card: TYPE="NIC" (Virtual Machine Template
/// Reference).
fn is_nic(pci: &VectorAttribute) -> bool {
    pci.value("TYPE").is_some_and(|kind| kind.eq_ignore_ascii_case("NIC"))
}

/// Returns whether the value contains a reference such as `$NAME` or `$NIC[…]`, which OpenNebula
/// resolves when it creates the VM.
pub(super) fn is_reference(value: &str) -> bool {
    value.contains('$')
}

/// Returns the name in `$NAME` or `${NAME}`.
pub(super) fn referenced_name(value: &str) -> Option<&str> {
    let name = value.strip_prefix('$')?;
    let name = name.strip_prefix('{').and_then(|name| name.strip_suffix('}')).unwrap_or(name);
    let is_name =
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    is_name.then_some(name)
}
