//! The values that operators write, as types: each is parsed once, here, and is valid ever after.
//! A parser answers with what is accepted ("must be …"); who asked adds the variable's name and the value.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use base64::Engine as _;

use crate::gpu::pci::PciAddress;

/// Why a value is refused: the second half of `VARIABLE='value': must be …`.
pub type Refusal = String;

/// `YES` or `NO` in any of the spellings that OpenNebula and its users have.
///
/// # Errors
/// What is accepted, for any other text.
pub fn parse_yes_no(text: &str) -> Result<bool, Refusal> {
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
pub fn parse_count(text: &str, least: u64) -> Result<u64, Refusal> {
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
    pub fn parse(text: &str) -> Result<Self, Refusal> {
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

/// A release of Flower, `X.Y.Z`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version(String);

impl Version {
    /// The release `major.minor.patch`.
    pub fn of(major: u16, minor: u16, patch: u16) -> Self {
        Self(format!("{major}.{minor}.{patch}"))
    }

    /// Reads `X.Y.Z`, each a decimal number.
    ///
    /// # Errors
    /// What is accepted, for any other text.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let parts: Vec<&str> = text.split('.').collect();
        let numeric = |p: &&str| (1..=5).contains(&p.len()) && p.bytes().all(|b| b.is_ascii_digit());
        if parts.len() == 3 && parts.iter().all(numeric) {
            Ok(Self(text.into()))
        } else {
            Err("must be a Flower release X.Y.Z, such as 1.31.0".into())
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
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
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        if Self::is_valid(text) {
            Ok(Self(text.into()))
        } else {
            Err("must be an image reference [host[:port]/]name[:tag][@sha256:digest], the name in lower case".into())
        }
    }

    fn is_valid(text: &str) -> bool {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        if let Some(digest) = digest {
            let hex = digest.strip_prefix("sha256:").unwrap_or_default();
            if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
                return false;
            }
        }
        let last_part_at = rest.rfind('/').map_or(0, |at| at + 1);
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
            .all(|separator| matches!(separator, "." | "_" | "__") || separator.bytes().all(|b| b == b'-'))
}

/// Where a SuperLink listens: a host (name, IPv4 or IPv6) and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort(String);

impl HostPort {
    /// Reads `host:port`; an IPv6 address stands in brackets.
    ///
    /// # Errors
    /// What is accepted, for any other text.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
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
            (host, rest.strip_prefix(':'))
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
                // An underscore is no host name by RFC 952, but Docker's networks and many a zone have it.
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
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        match text.to_ascii_lowercase().as_str() {
            "all" => return Ok(Self::All),
            "none" => return Ok(Self::None),
            _ => {}
        }
        let mut names = Vec::new();
        for part in text.split(',').map(str::trim) {
            let name = DeviceName::parse(part).ok_or_else(|| {
                format!(
                    "must be all, none, or a comma list of indices, GPU- or MIG-UUIDs and PCI addresses; '{part}' is none of these"
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

/// What the node tells its ClientApp, in the words of `flower-supernode --node-config`: checked to be accepted there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig(String);

impl NodeConfig {
    /// Reads space-separated `key=value` pairs whose values are TOML scalars.
    ///
    /// Flower (`flwr/common/config.py`, `parse_config_args`) finds pairs with a regular expression, drops what does not
    /// match in silence, and reads the rest as TOML: what it would drop or stumble over is refused here.
    ///
    /// # Errors
    /// What is accepted, with the pair that is not. Values are not repeated: they may be secret.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        const EXPECTED: &str =
            "must be space-separated key=value pairs, each value a TOML string in quotes, a number, true or false";
        let mut document = String::new();
        let mut rest = text.trim_start();
        while !rest.is_empty() {
            let (key, value, after) = next_pair(rest).map_err(|(key, why)| format!("{EXPECTED}; {}{why}", at(key)))?;
            if let Err(why) = check_pair(key, value) {
                return Err(format!("{EXPECTED}; {}{why}", at(key)));
            }
            document.push_str(key);
            document.push_str(" = ");
            document.push_str(value);
            document.push('\n');
            if document.parse::<toml::Table>().is_err() {
                return Err(format!("{EXPECTED}; {}the key is there twice", at(key)));
            }
            rest = after.trim_start();
        }
        Ok(Self(text.trim().into()))
    }

    /// The text for `--node-config`, as the operator wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `text` has a key that sounds like a secret: such a text is not shown, not even to say that it is wrong.
    pub fn may_hold_secret(text: &str) -> bool {
        sounds_secret(text)
    }

    /// The same for people's eyes: values whose key sounds like a secret are hidden.
    pub fn redacted(&self) -> String {
        if !sounds_secret(&self.0) {
            return self.0.clone();
        }
        let mut shown = Vec::new();
        let mut rest = self.0.as_str();
        while let Ok((key, value, after)) = next_pair(rest) {
            let value = if sounds_secret(key) { "'(hidden)'" } else { value };
            shown.push(format!("{key}={value}"));
            rest = after.trim_start();
        }
        shown.join(" ")
    }
}

fn at(key: &str) -> String {
    if key.is_empty() { String::new() } else { format!("at '{}': ", key.escape_debug()) }
}

fn sounds_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase().replace('-', "_");
    ["password", "passwd", "passphrase", "secret", "token", "api_key", "apikey", "private_key", "access_key"]
        .iter()
        .any(|word| key.contains(word))
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
        return Err((key, "a blank must follow the closing quote (a quote inside is not possible)"));
    }
    Ok((key, value, after))
}

fn check_pair(key: &str, value: &str) -> Result<(), &'static str> {
    let bare =
        |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if key.starts_with('-') || !key.split('.').all(bare) {
        return Err("a key is of letters, digits, '_', '-' and '.', and does not begin with '-'");
    }
    // What TOML 1.1 accepts and Flower's reader, of TOML 1.0, does not.
    if value.starts_with('"') && (value.contains("\\e") || value.contains("\\x")) {
        return Err("the value is not TOML");
    }
    let table: toml::Table = format!("value = {value}").parse().map_err(|_| "the value is not TOML")?;
    match table.get("value") {
        Some(toml::Value::String(_) | toml::Value::Integer(_) | toml::Value::Float(_) | toml::Value::Boolean(_)) => {
            Ok(())
        }
        _ => Err("the value must be a string, a number, true or false"),
    }
}

/// A PEM certificate, or several.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate(String);

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Certificate({} bytes)", self.0.len())
    }
}

impl Certificate {
    /// Reads base64 of PEM text (line breaks and blanks in it are dropped), or the PEM text itself.
    ///
    /// # Errors
    /// What is accepted. The value is never repeated: it may be a private key by mistake.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        const EXPECTED: &str = "must be the base64 of a PEM certificate";
        let pem = if text.starts_with("-----BEGIN") {
            text.to_owned()
        } else {
            let bytes = decode_base64(text).ok_or_else(|| format!("{EXPECTED}; it is not base64"))?;
            String::from_utf8(bytes).map_err(|_| format!("{EXPECTED}; what it encodes is not text"))?
        };
        if pem.contains("PRIVATE KEY-----") {
            return Err(format!("{EXPECTED}; it holds a private key, which must not leave its owner"));
        }
        let mut rest = pem.as_str();
        let mut certificates = 0;
        while let Some((_, body)) = rest.split_once("-----BEGIN CERTIFICATE-----") {
            let (body, after) = body
                .split_once("-----END CERTIFICATE-----")
                .ok_or_else(|| format!("{EXPECTED}; its END line is missing"))?;
            // A certificate in DER is one ASN.1 sequence.
            if decode_base64(body).is_none_or(|der| der.first() != Some(&0x30)) {
                return Err(format!("{EXPECTED}; what stands between BEGIN and END is not a certificate"));
            }
            certificates += 1;
            rest = after;
        }
        if certificates == 0 {
            return Err(format!("{EXPECTED}; there is no BEGIN CERTIFICATE line"));
        }
        Ok(Self(pem))
    }

    /// The PEM text.
    pub fn pem(&self) -> &str {
        &self.0
    }
}

/// Standard base64 (RFC 4648, section 4), in lines or in one, padded or not.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
    const LENIENT: GeneralPurpose = GeneralPurpose::new(
        &base64::alphabet::STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let joined: String = text.split_ascii_whitespace().collect();
    LENIENT.decode(joined).ok()
}
