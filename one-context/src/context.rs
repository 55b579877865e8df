//! [`Context`]: the variables of a VM's contextualization, and the look-ups that their readers
//! need. Values may be secrets, so nothing here prints one.

use std::collections::BTreeMap;
use std::fmt;

use crate::parse::{ParseError, parse};

/// The context variables of a VM.
///
/// Two are equal when they hold the same variables, whatever the files looked like: removing a NIC,
/// for one, only adds a blank line to `context.sh`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Context {
    values: BTreeMap<String, Vec<u8>>,
}

impl Context {
    /// Parses the text of a `context.sh`.
    ///
    /// # Errors
    /// [`ParseError`] where the text is not what OpenNebula writes: see [`parse`].
    pub fn parse(text: &[u8]) -> Result<Self, ParseError> {
        Ok(Self { values: parse(text)?.into_iter().collect() })
    }

    /// The value as it was written; empty where it was written empty.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.values.get(name).map(Vec::as_slice)
    }

    /// The value without the blanks (ASCII whitespace) around it. `None` where nothing is left: a
    /// user input that was not filled in arrives as `''`, so empty means unset.
    ///
    /// # Errors
    /// [`NotText`] where the value is not UTF-8.
    pub fn text(&self, name: &str) -> Result<Option<&str>, NotText> {
        let Some(value) = self.filled_in(name) else {
            return Ok(None);
        };
        str::from_utf8(value).map(Some).map_err(|_| NotText { name: name.to_owned() })
    }

    /// Like [`Context::text`], for what must not be printed. `None` also where the value is not
    /// UTF-8.
    pub fn secret(&self, name: &str) -> Option<Secret> {
        self.text(name).ok().flatten().map(Secret::new)
    }

    /// The PCI devices that the cloud promised and that are not NICs: variable name
    /// (`PCI0_ADDRESS`) and address as written (`01:00.0`), without the blanks around it, by the
    /// number in the name.
    ///
    /// OpenNebula sets `PCI<n>_ADDRESS` for every passed-through device; one that is a NIC has a
    /// `PCI<n>_MAC` too.
    pub fn passthrough_addresses(&self) -> Vec<(String, String)> {
        let mut numbered: Vec<_> = self
            .names()
            .filter_map(|name| {
                let number = name.strip_prefix("PCI")?.strip_suffix("_ADDRESS")?;
                let is_number =
                    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
                let is_nic = self.filled_in(&format!("PCI{number}_MAC")).is_some();
                let address = self.filled_in(name).filter(|_| is_number && !is_nic)?;
                let digits = number.trim_start_matches('0');
                Some((
                    (digits.len(), digits),
                    (name.to_owned(), String::from_utf8_lossy(address).into_owned()),
                ))
            })
            .collect();
        numbered.sort_by_key(|(number, _)| *number);
        numbered.into_iter().map(|(_, promised)| promised).collect()
    }

    /// The names of all variables, sorted; those with an empty value too.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// How many variables there are; those with an empty value count.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there is no variable at all.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    fn filled_in(&self, name: &str) -> Option<&[u8]> {
        self.bytes(name).map(<[u8]>::trim_ascii).filter(|value| !value.is_empty())
    }
}

/// The names only.
impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Context ")?;
        f.debug_set().entries(self.names()).finish()
    }
}

/// A value that is not UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}: the value is not UTF-8 text")]
pub struct NotText {
    /// The variable.
    pub name: String,
}

/// A token, password or key. It has no `Display`, and its `Debug` hides it; only [`Secret::expose`]
/// gives it away.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides `value` from now on.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The secret itself: for the one place that sends it, never for a message.
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
        context(text.as_bytes()).passthrough_addresses()
    }

    fn promised(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|&(name, address)| (name.to_owned(), address.to_owned())).collect()
    }

    #[test]
    fn bytes_are_the_value_as_written() {
        let context = context(b"A=' \xff '\nB=''\n");
        assert_eq!(context.bytes("A"), Some(b" \xff ".as_slice()));
        assert_eq!(context.bytes("B"), Some(b"".as_slice()));
        assert_eq!(context.bytes("C"), None);
    }

    #[test]
    fn text_is_the_value_without_the_blanks_around_it() {
        assert_eq!(context(b"A=' \t\n info x\r\n'\n").text("A"), Ok(Some("info x")));
    }

    #[test]
    fn empty_or_blank_means_unset() {
        let context = context(b"A=''\nB=' \n'\n");
        for name in ["A", "B", "C"] {
            assert_eq!(context.text(name), Ok(None), "{name}");
            assert_eq!(context.secret(name), None, "{name}");
        }
    }

    #[test]
    fn a_value_that_is_not_utf_8_is_an_error_that_names_the_variable() {
        let error = context(b"FL_X=' \xff'\n").text("FL_X").unwrap_err();
        assert_eq!(error.to_string(), "FL_X: the value is not UTF-8 text");
        assert_eq!(context(b"FL_X='\xff'\n").secret("FL_X"), None);
    }

    #[test]
    fn a_secret_is_shown_only_when_asked_for() {
        let secret = context(b"PASSWORD=' hunter2\n'\n").secret("PASSWORD").unwrap();
        assert_eq!(secret.expose(), "hunter2");
        assert_eq!(format!("{secret:?}"), "Secret(hidden)");
    }

    #[test]
    fn debug_shows_names_and_no_values() {
        assert_eq!(
            format!("{:?}", context(b"PASSWORD='hunter2'\nA=''\n")),
            r#"Context {"A", "PASSWORD"}"#
        );
    }

    #[test]
    fn contexts_are_equal_when_the_variables_are() {
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
    fn promised_devices_come_by_their_number() {
        assert_eq!(
            addresses(
                "PCI10_ADDRESS='31:00.0'\nPCI2_ADDRESS=' 21:00.0 '\nPCI0_ADDRESS='01:00.0'\n"
            ),
            promised(&[
                ("PCI0_ADDRESS", "01:00.0"),
                ("PCI2_ADDRESS", "21:00.0"),
                ("PCI10_ADDRESS", "31:00.0")
            ])
        );
    }

    #[test]
    fn a_pci_nic_is_not_a_promised_device() {
        assert_eq!(
            addresses(
                "PCI0_ADDRESS='01:00.0'\nPCI0_MAC='02:00:c0:a8:00:65'\nPCI1_ADDRESS='01:01.0'\nPCI1_MAC=''\n"
            ),
            promised(&[("PCI1_ADDRESS", "01:01.0")])
        );
    }

    #[test]
    fn what_is_no_pci_address_variable_is_passed_over() {
        let text = "PCI_ADDRESS='1'\nPCIX_ADDRESS='1'\nPCI0_ADDRESS=' '\nPCI1_ADDRESS2='1'\nXPCI0_ADDRESS='1'\nPCI1A_ADDRESS='1'\n";
        assert_eq!(addresses(text), []);
    }

    #[test]
    fn an_address_that_is_not_utf_8_is_still_named() {
        let promised = context(b"PCI0_ADDRESS='\xff'\n").passthrough_addresses();
        assert_eq!(promised, [("PCI0_ADDRESS".to_owned(), "\u{fffd}".to_owned())]);
    }
}
