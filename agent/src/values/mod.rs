//! The values that operators write, as types: each is parsed once, here, and is valid ever after. A
//! parser answers with what is accepted ("must be …"); who asked adds the variable's name and the
//! value.

pub mod ca_bundle;

use std::cmp::Ordering;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::gpu::pci::PciAddress;

/// Why a value is refused: the second half of `VARIABLE='value': must be …`.
pub type ValidationError = String;

/// Foreign text as a message shows it: one line of bounded length, in which nothing acts upon a
/// terminal or a reader.
pub fn shown(text: &str) -> String {
    const MAX_CHARACTERS: usize = 200;
    let mut shown = String::new();
    for c in text.chars().take(MAX_CHARACTERS) {
        match c {
            // They are harmless, and operators know them as they wrote them.
            '\'' | '"' | '\\' => shown.push(c),
            c => shown.extend(c.escape_debug()),
        }
    }
    if text.chars().nth(MAX_CHARACTERS).is_some() {
        shown.push('…');
    }
    shown
}

/// `YES` or `NO` in any of the spellings that OpenNebula and its users have.
///
/// # Errors
/// What is accepted, for any other text.
pub fn parse_yes_no(text: &str) -> Result<bool, ValidationError> {
    match text.to_ascii_uppercase().as_str() {
        "YES" | "TRUE" | "ON" | "1" => Ok(true),
        "NO" | "FALSE" | "OFF" | "0" => Ok(false),
        _ => Err("must be YES or NO (or TRUE/FALSE, ON/OFF, 1/0)".into()),
    }
}

/// A whole number that is at least `least`.
///
/// # Errors
/// What is accepted, for any other text.
pub fn parse_count(text: &str, least: u64) -> Result<u64, ValidationError> {
    let plain_digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse::<u64>() {
        Ok(number) if plain_digits && number >= least && number <= MAX_COUNT => Ok(number),
        _ => Err(format!("must be a whole number from {least} to {MAX_COUNT}")),
    }
}

/// The largest count: what a signed 32-bit integer holds, enough for 68 years in seconds.
pub const MAX_COUNT: u64 = i32::MAX as u64;

/// The share of a GPU's memory that a framework may take: greater than 0, at most 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Fraction(f64);

impl Fraction {
    /// Reads a decimal number such as `0.8`.
    ///
    /// # Errors
    /// What is accepted, for anything that is not a number greater than 0 and at most 1.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        match text.parse::<f64>() {
            Ok(share) if share > 0.0 && share <= 1.0 => Ok(Self(share)),
            Ok(_) => Err("must be greater than 0 and at most 1".into()),
            Err(_) if text.contains(',') => {
                Err("must be greater than 0 and at most 1, with a point, not a comma".into())
            }
            Err(_) => Err("must be a number greater than 0 and at most 1".into()),
        }
    }

    /// The share, greater than 0 and at most 1.
    pub fn share(&self) -> f64 {
        self.0
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A release of Flower, `X.Y.Z`: shown as it was written, compared by its numbers.
#[derive(Debug, Clone)]
pub struct Version {
    text: String,
    numbers: [u32; 3],
}

impl Version {
    /// The release `major.minor.patch`.
    pub fn of(major: u16, minor: u16, patch: u16) -> Self {
        Self {
            text: format!("{major}.{minor}.{patch}"),
            numbers: [major, minor, patch].map(u32::from),
        }
    }

    /// Major, minor, patch.
    pub fn numbers(&self) -> [u32; 3] {
        self.numbers
    }

    /// Reads `X.Y.Z`, each a decimal number.
    ///
    /// # Errors
    /// What is accepted, for any other text.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        let number = |part: &str| {
            let numeric = (1..=5).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
            numeric.then(|| part.parse().ok()).flatten()
        };
        let numbers: Option<Vec<u32>> = text.split('.').map(number).collect();
        let numbers = numbers.and_then(|numbers| <[u32; 3]>::try_from(numbers).ok());
        let numbers = numbers.ok_or("must be a Flower release X.Y.Z, such as 1.31.0")?;
        Ok(Self { text: text.into(), numbers })
    }
}

impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        self.numbers == other.numbers
    }
}

impl Eq for Version {}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        self.numbers.cmp(&other.numbers)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A reference to a container image: `[host[:port]/]path[:tag][@digest]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRef(String);

impl ImageRef {
    /// Reads a reference as Docker does (grammar: distribution/reference, `reference.go`).
    ///
    /// # Errors
    /// What is accepted, for any other text.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        if Self::is_valid(text) {
            Ok(Self(text.into()))
        } else {
            Err("must be an image reference [host[:port]/]name[:tag][@sha256:digest], name and digest in lower case, not an image's ID".into())
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
        // Docker would take it for an ID, and there is none to pull.
        if is_sha256(text) {
            return false;
        }
        // A slash before the last part may stay with it.
        let last_part_at = rest.rfind('/').unwrap_or(0);
        let (name, tag) = match rest[last_part_at..].split_once(':') {
            Some((last, tag)) => (&rest[..last_part_at + last.len()], Some(tag)),
            None => (rest, None),
        };
        if let Some(tag) = tag {
            let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
            let valid = tag.len() <= 128
                && tag.bytes().next().is_some_and(word)
                && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-');
            if !valid {
                return false;
            }
        }
        let mut path = name;
        if let Some((first, others)) = name.split_once('/')
            && (first.contains(['.', ':']) || first == "localhost")
        {
            // A first part with a point or a port is the registry's host.
            if parse_host_port_parts(first, Some(5000)).is_none() {
                return false;
            }
            path = others;
        }
        name.len() <= 255 && path.split('/').all(is_path_component)
    }

    /// The image `name` of a release of Flower.
    pub fn of(name: &str, version: &Version) -> Self {
        Self(format!("{name}:{version}"))
    }

    /// The reference as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// 64 hexadecimal digits, in lower case as Docker wants them.
fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Lower-case letters and digits, separated by `.`, `_`, `__` or dashes, none of them at an end.
fn is_path_component(part: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    alphanumeric(first)
        && alphanumeric(last)
        && part
            .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            .filter(|separator| !separator.is_empty())
            .all(|separator| {
                matches!(separator, "." | "_" | "__") || separator.bytes().all(|b| b == b'-')
            })
}

/// Where a SuperLink listens: a host (name, IPv4 or IPv6) and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort(String);

impl HostPort {
    /// Reads `host:port`; an IPv6 address stands in brackets.
    ///
    /// # Errors
    /// What is accepted, for any other text.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        if text.contains("://") {
            return Err("must be host:port without a scheme, such as superlink.example:9092".into());
        }
        match parse_host_port_parts(text, None) {
            Some(_) => Ok(Self(text.into())),
            None => {
                Err("must be host:port with a name, an IPv4 or an [IPv6] address and a port from 1 to 65535".into())
            }
        }
    }
}

impl HostPort {
    /// The port.
    pub fn port(&self) -> u16 {
        self.0.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(0)
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Splits and checks `host:port`; without a port `default_port` is taken, where there is one.
fn parse_host_port_parts(text: &str, default_port: Option<u16>) -> Option<(&str, u16)> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            host.parse::<Ipv6Addr>().ok()?;
            (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) })
        }
        None => {
            let (host, port) = match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            };
            if !is_host_name_or_ipv4(host) {
                return None;
            }
            (host, port)
        }
    };
    let port = match port {
        Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok()?,
        Some(_) => return None,
        None => default_port?,
    };
    (port > 0).then_some((host, port))
}

fn is_host_name_or_ipv4(host: &str) -> bool {
    if host.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return host.parse::<Ipv4Addr>().is_ok();
    }
    let name = host.strip_suffix('.').unwrap_or(host);
    name.len() <= 253
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                // An underscore is no host name by RFC 952, but Docker's networks and many a zone
                // have it.
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        })
}

/// Which GPUs the operator wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceSelection {
    /// Every usable GPU.
    All,
    /// No GPU at all.
    None,
    /// Those that are named, in the operator's order.
    Named(Vec<DeviceName>),
}

/// One way to name a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceName {
    /// The index that NVML and nvidia-smi give it.
    Index(u32),
    /// A `GPU-…` UUID or the beginning of one.
    GpuUuid(String),
    /// A `MIG-…` UUID or the beginning of one.
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
    /// Reads `all`, `none` or a comma list of indices, UUIDs and PCI addresses.
    ///
    /// # Errors
    /// What is accepted, with the first part that is not.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        match text.to_ascii_lowercase().as_str() {
            "all" => return Ok(Self::All),
            "none" => return Ok(Self::None),
            _ => {}
        }
        let mut names = Vec::new();
        for part in text.split(',').map(str::trim) {
            let name = DeviceName::parse(part).ok_or_else(|| {
                format!(
                    "must be all, none, or a comma list of indices, GPU- or MIG-UUIDs and PCI addresses; '{}' is none of these",
                    shown(part)
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

/// What the node tells its ClientApp, in the words of `flower-supernode --node-config`: checked to
/// be accepted there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig(String);

impl NodeConfig {
    /// Reads space-separated `key=value` pairs whose values are TOML scalars.
    ///
    /// Flower (`flwr/common/config.py`, `parse_config_args`) finds pairs with a regular expression,
    /// drops what does not match in silence, and reads the rest as TOML: what it would drop or
    /// stumble over is refused here.
    ///
    /// # Errors
    /// What is accepted, with the pair that is not. Values are not repeated: they may be secret.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        const EXPECTED: &str = "must be space-separated key=value pairs, each value a TOML string in quotes, a number, true or false";
        let text = text.trim();
        if text.len() > MAX_ARGUMENT_BYTES {
            return Err(format!(
                "must be at most {MAX_ARGUMENT_BYTES} bytes, the most that Linux passes as one argument; it has {}",
                text.len()
            ));
        }
        let hidden = Self::may_hold_secret(text);
        let refused = |number: usize, key: &str, why: &str| {
            // What stands where a key should may be half of a secret with a blank in it.
            let place = if hidden || key.is_empty() {
                format!("pair {number}")
            } else {
                format!("at '{}'", shown(key))
            };
            format!("{EXPECTED}; {place}: {why}")
        };
        let mut keys = Keys::default();
        let mut document = String::new();
        let mut rest = text;
        for number in 1.. {
            if rest.is_empty() {
                break;
            }
            let (key, value, after) =
                next_pair(rest).map_err(|(key, why)| refused(number, key, why))?;
            check_pair(key, value).map_err(|why| refused(number, key, why))?;
            if !keys.add(key) {
                return Err(refused(
                    number,
                    key,
                    "the key is there twice, or one key is the beginning of another",
                ));
            }
            document.push_str(&format!("{key} = {value}\n"));
            rest = after.trim_start();
        }
        // What Flower reads is the whole; and a key of more parts than a reader can recurse through
        // is found here.
        if document.parse::<toml::Table>().is_err() {
            return Err(format!("{EXPECTED}; together the pairs are not TOML"));
        }
        Ok(Self(text.into()))
    }

    /// The text for `--node-config`, as the operator wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `text` has a key that sounds like a secret, or a value that looks like one: such a
    /// text is not shown, not even to say that it is wrong.
    pub fn may_hold_secret(text: &str) -> bool {
        sounds_secret(text) || looks_secret(text)
    }

    /// The same for people's eyes: values whose key sounds like a secret, or that look like one,
    /// are hidden.
    pub fn redacted(&self) -> String {
        if !Self::may_hold_secret(&self.0) {
            return self.0.clone();
        }
        let mut pairs = Vec::new();
        let mut rest = self.0.as_str();
        while let Ok((key, value, after)) = next_pair(rest) {
            let value =
                if sounds_secret(key) || looks_secret(value) { "'(hidden)'" } else { value };
            pairs.push(format!("{key}={value}"));
            rest = after.trim_start();
        }
        pairs.join(" ")
    }
}

/// The most that Linux takes as one argument of a program: MAX_ARG_STRLEN, 32 pages, less the NUL
/// at its end (execve(2)).
const MAX_ARGUMENT_BYTES: usize = 32 * 4096 - 1;

/// The keys so far, as the tree that TOML makes of their points.
#[derive(Default)]
struct Keys<'t> {
    /// By the table that it is in, and its part of the key: the number of a table, or nothing where
    /// a value is.
    nodes: HashMap<(usize, &'t str), Option<usize>>,
}

impl<'t> Keys<'t> {
    /// Adds a key; `false` where a value, or a table, is there already.
    fn add(&mut self, key: &'t str) -> bool {
        let (tables, name) =
            key.rsplit_once('.').map_or((None, key), |(tables, name)| (Some(tables), name));
        let mut table = 0;
        for part in tables.into_iter().flat_map(|tables| tables.split('.')) {
            let number = self.nodes.len() + 1;
            match self.nodes.entry((table, part)).or_insert(Some(number)) {
                Some(inner) => table = *inner,
                None => return false,
            }
        }
        match self.nodes.entry((table, name)) {
            Entry::Occupied(_) => false,
            Entry::Vacant(free) => {
                free.insert(None);
                true
            }
        }
    }
}

/// Whether `text` has a word that goes with secrets: anywhere in it, or, where the word is a part
/// of innocent ones, alone.
fn sounds_secret(text: &str) -> bool {
    const ANYWHERE: [&str; 8] = [
        "password",
        "passwd",
        "passphrase",
        "secret",
        "token",
        "apikey",
        "privatekey",
        "accesskey",
    ];
    const ALONE: [&str; 15] = [
        "key",
        "keys",
        "pw",
        "pwd",
        "pass",
        "dbpass",
        "psk",
        "jwt",
        "auth",
        "credential",
        "credentials",
        "creds",
        "bearer",
        "cookie",
        "cookies",
    ];
    let lower = text.to_ascii_lowercase();
    // `apiKey` and `api-key` are two words each.
    let mut words = String::new();
    for c in text.chars() {
        if c.is_ascii_uppercase() && words.ends_with(|before: char| before.is_ascii_lowercase()) {
            words.push(' ');
        }
        words.push(if c.is_ascii_alphabetic() { c } else { ' ' });
    }
    let words = words.to_ascii_lowercase();
    ANYWHERE.iter().any(|part| lower.contains(part))
        || words.split(' ').any(|word| ALONE.contains(&word))
}

/// Whether `text` is a secret by its form, whatever it is called: a URL with a user and most likely
/// a password, or a private key.
fn looks_secret(text: &str) -> bool {
    text.split_once("://").is_some_and(|(_, rest)| rest.contains('@'))
        || text.contains("PRIVATE KEY-----")
}

/// Takes the first pair off `text`: its key, its value with the quotes, and what follows.
/// An error is the key, as far as there is one, and why.
fn next_pair(text: &str) -> Result<(&str, &str, &str), (&str, &'static str)> {
    let word_end = text.find(char::is_whitespace).unwrap_or(text.len());
    let Some(equals) = text[..word_end].find('=') else {
        return Err((&text[..word_end], "'=' and a value are missing"));
    };
    let (key, value_on) = (&text[..equals], &text[equals + 1..]);
    let value_end = match value_on.chars().next() {
        Some(quote @ ('"' | '\'')) => {
            let Some(length) = value_on[1..].find(quote) else {
                return Err((key, "the closing quote is missing"));
            };
            length + 2
        }
        _ => value_on.find(char::is_whitespace).unwrap_or(value_on.len()),
    };
    let (value, after) = value_on.split_at(value_end);
    if value.is_empty() {
        return Err((key, "the value is missing"));
    }
    if after.chars().next().is_some_and(|c| !c.is_whitespace()) {
        return Err((
            key,
            "a blank must follow the closing quote (a quote inside is not possible)",
        ));
    }
    Ok((key, value, after))
}

fn check_pair(key: &str, value: &str) -> Result<(), &'static str> {
    let bare = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    };
    if key.starts_with('-') || !key.split('.').all(bare) {
        return Err("a key is of letters, digits, '_', '-' and '.', and does not begin with '-'");
    }
    if !value.starts_with(['"', '\'']) && value.contains('#') {
        return Err(
            "'#' begins a comment, and Flower would drop the rest: put the value in quotes",
        );
    }
    // Escapes of TOML 1.1, which Flower's reader, of TOML 1.0, does not know.
    let escapes = value.replace(r"\\", "");
    if value.starts_with('"') && (escapes.contains(r"\e") || escapes.contains(r"\x")) {
        return Err("the value is not TOML");
    }
    let table: toml::Table =
        format!("value = {value}").parse().map_err(|_| "the value is not TOML")?;
    match table.get("value") {
        Some(
            toml::Value::String(_)
            | toml::Value::Integer(_)
            | toml::Value::Float(_)
            | toml::Value::Boolean(_),
        ) => Ok(()),
        _ => Err("the value must be a string, a number, true or false"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refuses<T: fmt::Debug>(parse: impl Fn(&str) -> Result<T, ValidationError>, texts: &[&str]) {
        for text in texts {
            let refusal = parse(text).expect_err(text);
            assert!(refusal.starts_with("must be "), "{text}: {refusal}");
        }
    }

    #[test]
    fn a_switch_is_read_in_any_spelling_and_any_case() {
        for (text, expected) in [
            ("YES", true),
            ("on", true),
            ("True", true),
            ("1", true),
            ("no", false),
            ("oFF", false),
        ] {
            assert_eq!(parse_yes_no(text), Ok(expected));
        }
        refuses(parse_yes_no, &["Y", "JA", "2", "YES NO"]);
    }

    #[test]
    fn a_fraction_is_greater_than_0_and_at_most_1() {
        for text in ["1", "1.0", "0.8", ".5", "1e-3"] {
            assert!(Fraction::parse(text).is_ok(), "{text}");
        }
        refuses(
            Fraction::parse,
            &["0", "0.0", "-0.1", "1.0001", "1.5", "NaN", "inf", "80%", "0,8", "half"],
        );
        assert_eq!(Fraction::parse("1.5").unwrap_err(), "must be greater than 0 and at most 1");
        assert!(Fraction::parse("0,8").unwrap_err().ends_with("with a point, not a comma"));
        assert_eq!(
            Fraction::parse("half").unwrap_err(),
            "must be a number greater than 0 and at most 1"
        );
    }

    #[test]
    fn a_count_is_plain_digits_in_its_range() {
        assert_eq!(parse_count("0", 0), Ok(0));
        assert_eq!(parse_count("2147483647", 1), Ok(2_147_483_647));
        refuses(
            |text| parse_count(text, 1),
            &["0", "-1", "+1", "1.0", "1e3", "0x10", "2147483648", "99999999999999999999"],
        );
    }

    #[test]
    fn a_version_has_three_numbers() {
        assert_eq!(Version::parse("1.31.0").unwrap().to_string(), "1.31.0");
        refuses(
            Version::parse,
            &["123456.0.0", "1.31", "v1.31.0", "1.31.0.1", "1.31.x", "latest", "1..0", "1.31.0 "],
        );
    }

    #[test]
    fn versions_are_compared_by_their_numbers_and_shown_as_written() {
        let version = |text: &str| Version::parse(text).unwrap();
        assert!(version("1.9.0") < version("1.31.0") && version("1.31.0") < version("1.31.1"));
        assert!(version("2.0.0") > version("1.99999.9"));
        assert_eq!(version("1.031.0"), Version::of(1, 31, 0));
        assert_ne!(version("1.31.0"), version("1.31.1"));
        assert_eq!(version("1.031.0").to_string(), "1.031.0");
    }

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for text in [
            "superlink:9092",
            "fl.example.org:1",
            "10.0.0.1:65535",
            "[::1]:9092",
            "[fe80::1]:80",
            "my_host:80",
            "a.:80",
        ] {
            assert!(HostPort::parse(text).is_ok(), "{text}");
        }
        assert_eq!(HostPort::parse("[::1]:9092").unwrap().port(), 9092);
        refuses(
            HostPort::parse,
            &[
                "superlink",
                "superlink:",
                ":9092",
                "h:0",
                "h:65536",
                "h:-1",
                "h:+80",
                "http://h:80",
                "::1:9092",
                "[::1]",
                "[h]:80",
                "300.1.1.1:80",
                "1.2.3:80",
                "h h:80",
                "-h:80",
                "h-:80",
                "h..h:80",
                "h:80/path",
                "user@h:80",
                "h:80:80",
            ],
        );
    }

    #[test]
    fn an_image_reference_is_read_as_docker_reads_it() {
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
        refuses(
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
    fn a_registrys_ipv6_address_is_followed_by_its_port_or_by_nothing() {
        for text in ["[fd00::1]/a", "[fd00::1]:5000/a"] {
            assert!(ImageRef::parse(text).is_ok(), "{text}");
        }
        refuses(
            ImageRef::parse,
            &["[fd00::1]registry/a", "[fd00::1]\0/a", "[fd00::1]5000/a", "[fd00::1]:/a"],
        );
    }

    #[test]
    fn gpus_are_named_by_index_uuid_mig_uuid_and_pci_address() {
        assert_eq!(DeviceSelection::parse("ALL"), Ok(DeviceSelection::All));
        assert_eq!(DeviceSelection::parse("None"), Ok(DeviceSelection::None));
        let selection =
            DeviceSelection::parse("1, gpu-ABC , MIG-1f, 01:00.0,0000:01:00.0, 1").unwrap();
        assert_eq!(selection.to_string(), "1,GPU-abc,MIG-1f,0000:01:00.0");
        refuses(
            DeviceSelection::parse,
            &[
                "-1", "all,1", "0,,1", "GPU-", "GPU-xyz", "0;1", "0 1", "01:00", "01:20.0",
                "01:00.8", "cuda:0", "12345", "$(id)",
            ],
        );
    }

    /// Each was given to `parse_config_args` of flwr 1.31.0: accepted, and read as this many keys.
    #[test]
    fn node_config_accepts_what_flower_accepts_whole() {
        for text in [
            "k=0",
            "k=\"abc\"",
            "k=true",
            "k=1e-3",
            "a.b=1",
            "partition-id=0 num-partitions=2",
            "a=1\n b=2\tc=3",
            "site=\"St. Mary\"",
            "x='\"; touch /pwned; \"'",
            "k='$(id) `id` \\'",
            "k=\"C:\\\\etc\"",
            "n=-1",
            "n=0x1F",
            "n=1_000",
            "f=inf",
            "k=''",
            "k='a#b' j=\"#\"",
            "a.b=1 a.c=2 b.a=3",
            &format!("{}k=1", "k.".repeat(50)),
        ] {
            assert_eq!(NodeConfig::parse(text).expect(text).as_str(), text);
        }
    }

    #[test]
    fn node_config_refuses_what_flower_would_drop_or_die_of() {
        refuses(
            NodeConfig::parse,
            &[
                "novalue",
                "x=",
                "x= y=1",
                "k=abc",
                "k=/app/data",
                "k=True",
                "a=1,b=2",
                "k=1 k=2",
                "a=1 a.b=2",
                "k=[1]",
                "k={a=1}",
                "k=1979-05-27",
                "k=07:32:00",
                "site='St. Mary''s'",
                "x\"; touch /pwned; \"",
                "k=\"open",
                "k='a'b",
                "=1",
                "-k=1",
                "k=99999999999999999999",
                "k=\"\\e\"",
                "k=\"a\nb\"",
                "a b=1",
                "pairs.toml",
                "k=\"\"\"a\"\"\"",
                // A comment, to Flower: k is 1 and true, and b is not there.
                "k=1#b=2",
                "a=1 k=true#",
                "a=1 # b=2",
                "a.b=1 a=2",
                "a.b.c=1 a.b=2",
                "a.b=1 a.b=2",
                &format!("{}k=1", "k.".repeat(60_000)),
            ],
        );
    }

    #[test]
    fn node_config_is_no_longer_than_an_argument_may_be() {
        let longest = format!("k='{}'", "x".repeat(131_071 - 4));
        assert_eq!(NodeConfig::parse(&format!(" {longest} ")).unwrap().as_str(), longest);
        let refusal = NodeConfig::parse(&longest.replace("k=", "ke=")).unwrap_err();
        assert!(
            refusal.starts_with("must be at most 131071 bytes")
                && refusal.ends_with("it has 131072"),
            "{refusal}"
        );
    }

    #[test]
    fn a_key_is_known_again_among_any_number_of_others() {
        let mut keys = Keys::default();
        let names: Vec<String> = (0..10_000).map(|n| format!("t.{}.k{n}", n % 7)).collect();
        assert!(names.iter().all(|name| keys.add(name)));
        // One node for `t`, one for each table in it, one for each value: what a key costs does not
        // grow with the others.
        assert_eq!(keys.nodes.len(), 1 + 7 + 10_000);
        for taken in ["t", "t.3", "t.0.k0", "t.3.k9999.deeper"] {
            assert!(!keys.add(taken), "{taken}");
        }
        assert!(keys.add("t.7") && keys.add("t.8.k0") && keys.add("k0"));
        let most: String = (0..14_000).map(|n| format!("a{n}=1 ")).collect();
        assert!(NodeConfig::parse(&most).is_ok());
    }

    #[test]
    fn secrets_of_the_node_config_are_hidden_from_people() {
        let config = NodeConfig::parse("a=1  db-password=\"x y\" API_TOKEN=\"t\"").unwrap();
        assert_eq!(config.redacted(), "a=1 db-password='(hidden)' API_TOKEN='(hidden)'");
        assert_eq!(NodeConfig::parse("a=1  b=2").unwrap().redacted(), "a=1  b=2");
        for key in [
            "key",
            "api-key",
            "sshKey",
            "db.pwd",
            "PASS",
            "DBPASS",
            "wifi_psk",
            "jwt",
            "auth",
            "aws-credentials",
            "bearer2",
            "cookie",
            "oauthToken",
            "my.secret.name",
        ] {
            let config = NodeConfig::parse(&format!("{key}='hunter2' a=1")).unwrap();
            assert_eq!(config.redacted(), format!("{key}='(hidden)' a=1"));
        }
        for value in
            ["postgres://u:hunter2@h/d", "https://hunter2@h/", "-----BEGIN PRIVATE KEY-----hunter2"]
        {
            let config =
                NodeConfig::parse(&format!("dsn=\"{value}\" url='http://h/' mail='a@b'")).unwrap();
            assert_eq!(config.redacted(), "dsn='(hidden)' url='http://h/' mail='a@b'");
        }
        for key in ["monkey", "keyboard", "author", "passenger", "compass", "cookiecutter", "k"] {
            let text = format!("{key}='seen'");
            assert_eq!(NodeConfig::parse(&text).unwrap().redacted(), text);
        }
    }

    #[test]
    fn a_refusal_shows_nothing_of_a_text_that_may_hold_a_secret() {
        for (text, place) in [
            ("password hunter2", "; pair 1: "),
            ("db-password=hunter two=3", "; pair 1: "),
            ("a=1 db-password='x' hunter2", "; pair 3: "),
            ("a=1 hunter2 api-key='x'", "; pair 2: "),
            ("key='hunter2' key='two'", "; pair 2: "),
            ("auth='x'hunter2", "; pair 1: "),
            ("pwd='x' hunter2\"='y'", "; pair 2: "),
            ("url=http://u:hunter2@h/", "; pair 1: "),
        ] {
            assert!(NodeConfig::may_hold_secret(text));
            let refusal = NodeConfig::parse(text).expect_err(text);
            assert!(!refusal.contains("hunter") && !refusal.contains("two"), "{refusal}");
            assert!(refusal.contains(place), "{text}: {refusal}");
        }
        let refusal = NodeConfig::parse("a=1 site=North").unwrap_err();
        assert!(refusal.ends_with("; at 'site': the value is not TOML"), "{refusal}");
    }

    #[test]
    fn foreign_text_is_shown_in_one_line_of_bounded_length() {
        assert_eq!(shown("St. Mary's \"ü\" C:\\x"), "St. Mary's \"ü\" C:\\x");
        assert_eq!(shown("a\nb\x1b[31m\u{202e}\u{200b}"), "a\\nb\\u{1b}[31m\\u{202e}\\u{200b}");
        assert_eq!(shown(&"é".repeat(201)), format!("{}…", "é".repeat(200)));
        for refusal in [
            DeviceSelection::parse(&format!("0,\x1b{}", "x".repeat(9000))).unwrap_err(),
            NodeConfig::parse(&format!("\x1b{}", "x".repeat(9000))).unwrap_err(),
        ] {
            assert!(
                refusal.len() < 500 && !refusal.contains('\x1b') && refusal.contains("\\u{1b}xxx"),
                "{refusal}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC{0,40}") {
            let _ = (parse_count(&text, 0), Fraction::parse(&text), Version::parse(&text), ImageRef::parse(&text));
            let _ = (HostPort::parse(&text), DeviceSelection::parse(&text), NodeConfig::parse(&text));
        }

        #[test]
        fn node_config_pairs_are_read_back(pairs in proptest::collection::btree_map("[a-z][a-z-]{0,8}", "[ -&(-~]{0,12}", 0..5)) {
            let text = pairs.iter().map(|(key, value)| format!("{key}='{value}'")).collect::<Vec<_>>().join(" ");
            prop_assert!(NodeConfig::parse(&text).is_ok(), "{}", text);
        }
    }
}
