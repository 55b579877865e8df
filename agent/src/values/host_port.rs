use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::error::ValidationError;

/// Network address: a host (name, IPv4 or IPv6) and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    text: String,
    port: u16,
}

impl HostPort {
    /// Parses `host:port`; an IPv6 address is in brackets.
    ///
    /// # Errors
    /// When the text has another form.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        if text.contains("://") {
            return Err(ValidationError::new(
                "must be host:port without a scheme, such as superlink.example:9092",
            ));
        }
        match split_host_port(text, None) {
            Some((_, port)) => Ok(Self { text: text.into(), port }),
            None => Err(ValidationError::new(
                "must be host:port with a name, an IPv4 or an [IPv6] address and a port from 1 to \
                 65535",
            )),
        }
    }

    /// Returns the port, 1 to 65535.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Splits `host:port` and checks both; `None` if either is invalid, or the port is missing and
/// there is no default.
pub(super) fn split_host_port(text: &str, default_port: Option<u16>) -> Option<(&str, u16)> {
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
                // RFC 952 does not allow an underscore; Docker networks and many zones use it.
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::values::error::tests::assert_rejects;

    #[test]
    fn address_is_host_and_port() {
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
        assert_rejects(
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
}
