//! [`Context`]: the context variables of a VM. Values can be secrets, so nothing here prints one.

use std::collections::BTreeMap;
use std::fmt;

use crate::parse::{ParseError, parse};

/// The context variables of a VM.
///
/// Two contexts are equal if their variables are equal, regardless of the files' layout: removing a
/// NIC, for example, adds an empty line to `context.sh`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Context {
    values: BTreeMap<String, Vec<u8>>,
}

impl Context {
    /// Parses the text of a `context.sh`.
    ///
    /// # Errors
    /// Returns [`ParseError`] if the text is not in the format of [`parse`].
    pub fn parse(text: &[u8]) -> Result<Self, ParseError> {
        Ok(Self { values: parse(text)?.into_iter().collect() })
    }

    /// Returns the value as written, which can be empty. `None` if the variable is not set.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.values.get(name).map(Vec::as_slice)
    }

    /// Returns the value without surrounding ASCII whitespace. `None` if nothing is left:
    /// OpenNebula writes a user input without a value as `''`, so empty means unset.
    ///
    /// # Errors
    /// Returns [`NotUtf8`] if the value is not UTF-8.
    pub fn text(&self, name: &str) -> Result<Option<&str>, NotUtf8> {
        let Some(value) = self.trimmed(name) else {
            return Ok(None);
        };
        str::from_utf8(value).map(Some).map_err(|_| NotUtf8 { name: name.to_owned() })
    }

    /// Returns the value like [`Context::text`], protected against printing. `None` also if the
    /// value is not UTF-8.
    pub fn secret(&self, name: &str) -> Option<Secret> {
        self.text(name).ok().flatten().map(Secret::new)
    }

    /// Returns the PCI devices that OpenNebula assigned to the VM, without NICs: pairs of variable
    /// name (`PCI0_ADDRESS`) and address as written (`01:00.0`), ordered by the number in the name.
    ///
    /// OpenNebula sets `PCI<n>_ADDRESS` for every assigned device, and for a NIC also `PCI<n>_MAC`.
    pub fn assigned_addresses(&self) -> Vec<(String, String)> {
        let mut numbered: Vec<_> = self
            .names()
            .filter_map(|name| {
                let number = name.strip_prefix("PCI")?.strip_suffix("_ADDRESS")?;
                let is_number =
                    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
                let is_nic = self.trimmed(&format!("PCI{number}_MAC")).is_some();
                let address = self.trimmed(name).filter(|_| is_number && !is_nic)?;
                let digits = number.trim_start_matches('0');
                Some((
                    (digits.len(), digits),
                    (name.to_owned(), String::from_utf8_lossy(address).into_owned()),
                ))
            })
            .collect();
        numbered.sort_by_key(|(number, _)| *number);
        numbered.into_iter().map(|(_, assigned)| assigned).collect()
    }

    /// Returns the names of all variables, sorted, including those with an empty value.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// Returns the number of variables, including those with an empty value.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Returns whether the context has no variables.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    fn trimmed(&self, name: &str) -> Option<&[u8]> {
        self.bytes(name).map(<[u8]>::trim_ascii).filter(|value| !value.is_empty())
    }
}

/// Prints the names only.
impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Context ")?;
        f.debug_set().entries(self.names()).finish()
    }
}

/// Error for a value that is not UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}: the value is not UTF-8 text")]
pub struct NotUtf8 {
    /// Name of the variable.
    pub name: String,
}

/// A token, password or key. `Debug` hides it, and there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps `value`.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// Returns the secret, for the code that sends it. Never use it in a message.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    fn context(text: &[u8]) -> Context {
        Context::parse(text).unwrap()
    }

    fn addresses(text: &str) -> Vec<(String, String)> {
        context(text.as_bytes()).assigned_addresses()
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|&(name, address)| (name.to_owned(), address.to_owned())).collect()
    }

    #[test]
    fn bytes_returns_value_as_written() {
        let context = context(b"A=' \xff '\nB=''\n");
        assert_eq!(context.bytes("A"), Some(b" \xff ".as_slice()));
        assert_eq!(context.bytes("B"), Some(b"".as_slice()));
        assert_eq!(context.bytes("C"), None);
    }

    #[test]
    fn text_trims_whitespace() {
        assert_eq!(context(b"A=' \t\n info x\r\n'\n").text("A"), Ok(Some("info x")));
    }

    #[test]
    fn empty_or_whitespace_means_unset() {
        let context = context(b"A=''\nB=' \n'\n");
        for name in ["A", "B", "C"] {
            assert_eq!(context.text(name), Ok(None), "{name}");
            assert_eq!(context.secret(name), None, "{name}");
        }
    }

    #[test]
    fn invalid_utf8_names_the_variable() {
        let error = context(b"FL_X=' \xff'\n").text("FL_X").unwrap_err();
        assert_eq!(error.to_string(), "FL_X: the value is not UTF-8 text");
        assert_eq!(context(b"FL_X='\xff'\n").secret("FL_X"), None);
    }

    #[test]
    fn secret_is_hidden_in_debug() {
        let secret = context(b"PASSWORD=' hunter2\n'\n").secret("PASSWORD").unwrap();
        assert_eq!(secret.expose(), "hunter2");
        assert_eq!(format!("{secret:?}"), "Secret(hidden)");
    }

    #[test]
    fn debug_prints_names_without_values() {
        assert_eq!(
            format!("{:?}", context(b"PASSWORD='hunter2'\nA=''\n")),
            r#"Context {"A", "PASSWORD"}"#
        );
    }

    #[test]
    fn equality_ignores_layout() {
        assert_eq!(context(b"# c\nA='1'\nB='2'\n\n"), context(b"B='2'\nA='1'"));
        assert_ne!(context(b"A='1'\n"), context(b"A='2'\n"));
        assert_ne!(context(b"A=''\n"), context(b""));
    }

    #[test]
    fn names_are_counted_and_sorted() {
        let context = context(b"B=''\nA='1'\n");
        assert_eq!(context.names().collect::<Vec<_>>(), ["A", "B"]);
        assert_eq!((context.len(), context.is_empty()), (2, false));
        assert!(Context::default().is_empty());
    }

    #[test]
    fn assigned_devices_are_ordered_by_number() {
        assert_eq!(
            addresses(
                "PCI10_ADDRESS='31:00.0'\nPCI2_ADDRESS=' 21:00.0 '\nPCI0_ADDRESS='01:00.0'\n"
            ),
            pairs(&[
                ("PCI0_ADDRESS", "01:00.0"),
                ("PCI2_ADDRESS", "21:00.0"),
                ("PCI10_ADDRESS", "31:00.0")
            ])
        );
    }

    #[test]
    fn nic_is_not_an_assigned_device() {
        assert_eq!(
            addresses(
                "PCI0_ADDRESS='01:00.0'\nPCI0_MAC='02:00:c0:a8:00:65'\n\
                 PCI1_ADDRESS='01:01.0'\nPCI1_MAC=''\n"
            ),
            pairs(&[("PCI1_ADDRESS", "01:01.0")])
        );
    }

    #[test]
    fn other_variables_are_not_pci_addresses() {
        let text = "PCI_ADDRESS='1'\nPCIX_ADDRESS='1'\nPCI0_ADDRESS=' '\nPCI1_ADDRESS2='1'\n\
                    XPCI0_ADDRESS='1'\nPCI1A_ADDRESS='1'\n";
        assert_eq!(addresses(text), []);
    }

    #[test]
    fn invalid_utf8_address_keeps_its_name() {
        let addresses = context(b"PCI0_ADDRESS='\xff'\n").assigned_addresses();
        assert_eq!(addresses, [("PCI0_ADDRESS".to_owned(), "\u{fffd}".to_owned())]);
    }
}
