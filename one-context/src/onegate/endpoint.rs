//! Parser for `ONEGATE_ENDPOINT`. Pure. No error contains the text, which may include a password.

use std::fmt;
use std::net::Ipv6Addr;

use hyper::Uri;
use tokio_rustls::rustls::pki_types::ServerName;

/// Address of OneGate. `Display` prints the URL without a trailing slash.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) is_https: bool,
    /// Host and port as written, for the `Host` header.
    pub(super) authority: String,
    pub(super) host: ServerName<'static>,
    pub(super) port: u16,
    /// Path before each route: empty, or with a leading and without a trailing slash.
    pub(super) prefix: String,
}

impl Endpoint {
    /// Parses an endpoint. The error is the cause.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        // Uri drops a fragment.
        if text.contains(['?', '#']) {
            return Err("it contains ? or #");
        }
        let uri: Uri = text.parse().map_err(|_| "it is not a URL")?;
        let (is_https, default_port) = match uri.scheme_str() {
            Some("http") => (false, 80),
            Some("https") => (true, 443),
            Some(_) => return Err("its scheme is neither http nor https"),
            None => return Err("it does not start with http:// or https://"),
        };
        let authority = uri.authority().ok_or("it has no host")?;
        if authority.as_str().contains('@') {
            return Err("it contains a user name or password");
        }
        let bare_host =
            match authority.host().strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
                Some(host) if host.parse::<Ipv6Addr>().is_ok() => host,
                Some(_) => return Err("the text in brackets is not an IPv6 address"),
                None => authority.host(),
            };
        let host = ServerName::try_from(bare_host.to_owned())
            .map_err(|_| "its host is not a name or address")?;
        let port = match authority.as_str().strip_prefix(authority.host()).unwrap_or_default() {
            "" => default_port,
            // Uri accepts invalid port numbers and returns none.
            _ => authority.port_u16().filter(|&port| port > 0).ok_or("its port is invalid")?,
        };
        let prefix = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { is_https, authority: authority.to_string(), host, port, prefix })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_https { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn assert_parsed(text: &str, is_https: bool, host: &str, port: u16, prefix: &str) {
        let endpoint = Endpoint::parse(text).unwrap();
        let parsed =
            (endpoint.is_https, endpoint.host.to_str(), endpoint.port, endpoint.prefix.as_str());
        assert_eq!(parsed, (is_https, host.into(), port, prefix), "{text}");
    }

    #[test]
    fn endpoint_has_scheme_host_port_and_path() {
        assert_parsed("http://169.254.16.9:5030", false, "169.254.16.9", 5030, "");
        assert_parsed("http://169.254.16.9:5030/", false, "169.254.16.9", 5030, "");
        assert_parsed("HTTP://onegate.example", false, "onegate.example", 80, "");
        assert_parsed("https://onegate.example/", true, "onegate.example", 443, "");
        assert_parsed(
            "https://onegate.example/path/gate//",
            true,
            "onegate.example",
            443,
            "/path/gate",
        );
        assert_parsed("http://one_gate", false, "one_gate", 80, "");
    }

    #[test]
    fn ipv6_address_is_in_brackets() {
        assert_parsed("http://[fd00::1]:5030/", false, "fd00::1", 5030, "");
        assert_parsed("https://[::1]", true, "::1", 443, "");
    }

    #[test]
    fn display_omits_trailing_slash() {
        for (text, displayed) in [
            ("http://[fd00::1]:5030/", "http://[fd00::1]:5030"),
            ("https://onegate.example/gate/", "https://onegate.example/gate"),
        ] {
            assert_eq!(Endpoint::parse(text).unwrap().to_string(), displayed);
        }
    }

    #[test]
    fn user_or_password_is_rejected_and_hidden() {
        for text in [
            "http://alice:hunter2@onegate.example",
            "https://alice@[::1]:5030/",
            "http://@onegate.example",
        ] {
            let error = Endpoint::parse(text).unwrap_err();
            assert!(!error.contains("hunter2") && !error.contains("alice"), "{error}");
        }
        assert_eq!(
            Endpoint::parse("http://alice:hunter2@onegate.example").unwrap_err(),
            "it contains a user name or password"
        );
    }

    #[test]
    fn invalid_endpoint_is_rejected() {
        for text in [
            "",
            " ",
            "169.254.16.9",
            "169.254.16.9:5030",
            "onegate.example/gate",
            "/gate",
            "//onegate.example",
            "ftp://onegate.example",
            "file:///etc/passwd",
            "unix:/run/onegate.sock",
            "http:",
            "http://",
            "http:///gate",
            "http://:5030",
            "http://onegate.example:",
            "http://onegate.example:0",
            "http://onegate.example:65536",
            "http://onegate.example:port",
            "http://onegate.example:5030:5030",
            "http://fd00::1",
            "http://[fd00::1",
            "http://[169.254.16.9]",
            "http://[onegate.example]",
            "http://[fe80::1%25eth0]:5030",
            "http://[fd00::1]5030",
            "http://one gate",
            "http://onegate.example/a b",
            " http://onegate.example",
            "http://onegate.example\r\nX-Evil: 1",
            "http://onegate.example/?a=b",
            "http://onegate.example/#a",
            "http://önegate.example",
            "http://-",
        ] {
            assert!(Endpoint::parse(text).is_err(), "{text:?}: {:?}", Endpoint::parse(text));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,40}", rest in "[]\\[:@/a.0-9%?#-]{0,20}") {
            let _ = Endpoint::parse(&text);
            let _ = Endpoint::parse(&format!("http://{rest}"));
        }
    }
}
