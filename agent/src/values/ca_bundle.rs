//! CA certificates for the connection to the SuperLink, from the operator or a peer, parsed as
//! X.509 (RFC 5280). Pure: the caller passes the current time.

use std::fmt::{self, Write as _};
use std::time::SystemTime;

use base64::Engine as _;
use x509_cert::Version;
use x509_cert::der::asn1::Any;
use x509_cert::der::{DateTime, Decode as _, Reader as _, SliceReader, Tag, Tagged as _};
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage};
use x509_cert::name::Name;
use x509_cert::request::CertReq;

use super::error::ValidationError;
use super::text::escape;
use crate::system::time::format_utc;

const BEGIN: &str = "-----BEGIN ";
const MALFORMED: &str = "it does not contain a complete certificate";
const PRIVATE_KEY: &str = "it contains a private key; provide the certificate only";
const REQUEST: &str = "a certificate request that no CA has signed yet";
const PUBLIC_KEY: &str = "a public key";
const PKCS7: &str = "PKCS#7 (extract the certificates: openssl pkcs7 -print_certs -in FILE)";
const TRUSTED: &str = "a certificate in OpenSSL's trusted form (convert it: openssl x509 -in FILE)";

/// One or more CA certificates without duplicates, in their original order.
#[derive(Clone)]
pub struct CaBundle {
    cas: Vec<Ca>,
    pem: String,
    was_raw_pem: bool,
    ignored: Option<String>,
}

/// A certificate that may sign others.
#[derive(Clone)]
struct Ca {
    der: Vec<u8>,
    subject: String,
    not_before: DateTime,
    not_after: DateTime,
}

/// One element of a bundle.
enum Piece {
    Ca(Ca),
    /// Anything else that a bundle may contain, described for a message.
    Other(String),
}

/// The part of a [`CaBundle`] that is valid at a given time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidBundle {
    /// The CAs that have not expired.
    pub bundle: CaBundle,
    /// Problems with the validity of some, each reported at WARNING. The caller adds the source of
    /// the bundle.
    pub warnings: Vec<String>,
}

impl fmt::Debug for CaBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CaBundle({} bytes)", self.pem.len())
    }
}

/// Bundles with the same certificates are equal, whatever their original form.
impl PartialEq for CaBundle {
    fn eq(&self, other: &Self) -> bool {
        self.pem == other.pem
    }
}

impl Eq for CaBundle {}

impl CaBundle {
    /// Parses base64 (whitespace is ignored) of PEM text or of one certificate in DER, or the PEM
    /// text itself. Text around the certificates and duplicates are dropped; anything else that is
    /// not a CA is described by [`Self::ignored`].
    ///
    /// # Errors
    /// When there is no CA, or something is malformed. The error describes the value but never
    /// repeats it, because it may be a private key by mistake.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        Self::parse_any_form(text).map_err(|why| {
            ValidationError::with_detail(
                "must be the base64 of a CA's PEM certificate (base64 -w0 ca.crt)",
                why,
            )
        })
    }

    fn parse_any_form(text: &str) -> Result<Self, String> {
        let was_raw_pem = text.contains(BEGIN);
        let bytes = if was_raw_pem {
            text.into()
        } else {
            decode_base64(text).ok_or("it is not base64")?
        };
        let pieces = read_pieces(&bytes)?;
        let (mut cas, mut others) = (Vec::<Ca>::new(), Vec::new());
        for piece in pieces {
            match piece {
                Piece::Ca(ca) if cas.iter().any(|known| known.der == ca.der) => {}
                Piece::Ca(ca) => cas.push(ca),
                Piece::Other(what) => others.push(what),
            }
        }
        if cas.is_empty() {
            return Err(format!("this is {}", list(&others)));
        }
        let ignored = (!others.is_empty())
            .then(|| format!("ignored because it is not a CA: {}", list(&others)));
        Ok(Self::new(cas, was_raw_pem, ignored))
    }

    fn new(cas: Vec<Ca>, was_raw_pem: bool, ignored: Option<String>) -> Self {
        let mut pem = String::new();
        cas.iter().for_each(|ca| push_pem(&mut pem, &ca.der));
        Self { cas, pem, was_raw_pem, ignored }
    }

    /// Returns the PEM text in the strict form of RFC 7468, which gRPC requires.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Returns whether the original form was PEM text instead of its base64.
    pub fn was_raw_pem(&self) -> bool {
        self.was_raw_pem
    }

    /// Returns a description of the elements that are ignored because they are not a CA, reported
    /// at WARNING. The caller adds the source of the bundle.
    pub fn ignored(&self) -> Option<&str> {
        self.ignored.as_deref()
    }

    /// Returns the part that is usable at `now`. An expired CA is dropped; a CA that is not valid
    /// yet is kept, because the clock of a VM may be behind at boot.
    ///
    /// # Errors
    /// When all CAs have expired.
    pub fn valid_at(&self, now: SystemTime) -> Result<ValidBundle, ValidationError> {
        let clock = format!("the clock of this VM says {}", format_utc(now));
        let (expired, kept): (Vec<&Ca>, Vec<&Ca>) =
            self.cas.iter().partition(|ca| ca.not_after.to_system_time() < now);
        let ends: Vec<String> = expired
            .iter()
            .map(|ca| format!("{} expired at {}", ca.subject, ca.not_after))
            .collect();
        if kept.is_empty() {
            return Err(ValidationError::with_detail(
                "must be a CA that has not expired",
                format!("{}; {clock}", list(&ends)),
            ));
        }
        let starts: Vec<String> = kept
            .iter()
            .filter(|ca| ca.not_before.to_system_time() > now)
            .map(|ca| format!("{} is not valid before {}", ca.subject, ca.not_before))
            .collect();
        let mut warnings = Vec::new();
        if !ends.is_empty() {
            warnings.push(format!("ignored because it has expired: {}; {clock}", list(&ends)));
        }
        if !starts.is_empty() {
            warnings.push(format!("{}; {clock}, which may be wrong", list(&starts)));
        }
        let kept = kept.into_iter().cloned().collect();
        Ok(ValidBundle {
            bundle: Self::new(kept, self.was_raw_pem, self.ignored.clone()),
            warnings,
        })
    }
}

fn read_pieces(bytes: &[u8]) -> Result<Vec<Piece>, String> {
    // The text around a certificate may be in any encoding; the certificate itself is ASCII.
    let text = String::from_utf8_lossy(bytes);
    if text.contains("PRIVATE KEY") {
        Err(PRIVATE_KEY.into())
    } else if text.contains(BEGIN) {
        read_pem(&text)
    } else if starts_as_der(bytes) {
        Ok(vec![read_der(bytes)?])
    } else if decode_base64(&text)
        .is_some_and(|inner| inner.starts_with(BEGIN.as_bytes()) || starts_as_der(&inner))
    {
        Err("it is base64 of base64: encode it once (Sunstone itself encodes a text64 input)"
            .into())
    } else {
        Err("the decoded bytes are neither PEM nor DER".into())
    }
}

/// Returns whether `bytes` begins with the tag of a sequence, as every structure here does.
fn starts_as_der(bytes: &[u8]) -> bool {
    bytes.first() == Some(&0x30)
}

fn read_pem(text: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some((_, after)) = rest.split_once(BEGIN) {
        let (label, body) = after.split_once("-----").ok_or("its BEGIN line is incomplete")?;
        let (body, after) =
            body.split_once(&format!("-----END {label}-----")).ok_or("its END line is missing")?;
        rest = after;
        pieces.push(match label {
            // The second is the label from before RFC 7468 (section 5.1).
            "CERTIFICATE" | "X509 CERTIFICATE" => read_der(&decode_base64(body).ok_or(MALFORMED)?)?,
            "TRUSTED CERTIFICATE" => Piece::Other(TRUSTED.into()),
            "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST" => Piece::Other(REQUEST.into()),
            "PUBLIC KEY" | "RSA PUBLIC KEY" => Piece::Other(PUBLIC_KEY.into()),
            "PKCS7" | "CMS" => Piece::Other(PKCS7.into()),
            label => Piece::Other(format!("PEM of '{}'", escape(label))),
        });
    }
    Ok(pieces)
}

fn read_der(der: &[u8]) -> Result<Piece, String> {
    let mut reader = SliceReader::new(der).map_err(|_| MALFORMED)?;
    match reader.decode::<x509_cert::Certificate>() {
        Ok(_) if !reader.is_finished() => {
            Err("there are bytes after the end of the certificate".into())
        }
        Ok(certificate) => classify_certificate(&certificate, der),
        Err(_) => classify_other(der),
    }
}

/// Determines whether a certificate is a CA (RFC 5280, sections 4.2.1.3 and 4.2.1.9). gRPC 1.85
/// checks keyUsage only, so it would also accept the server's own certificate, which fails once the
/// server renews it.
fn classify_certificate(certificate: &x509_cert::Certificate, der: &[u8]) -> Result<Piece, String> {
    let signed = &certificate.tbs_certificate;
    if signed.extensions.is_some() && signed.version != Version::V3 {
        return Err(MALFORMED.into());
    }
    let constraints = signed.get::<BasicConstraints>().map_err(|_| MALFORMED)?;
    let usage = signed.get::<KeyUsage>().map_err(|_| MALFORMED)?;
    // X.509 v1 has no such extension; OpenSSL and BoringSSL accept a self-signed certificate as a
    // CA.
    let is_v1_root = signed.version == Version::V1 && signed.subject == signed.issuer;
    let subject = subject(&signed.subject);
    let why_not = if !constraints.map_or(is_v1_root, |(_, constraints)| constraints.ca) {
        "basicConstraints is not CA:TRUE"
    } else if usage.is_some_and(|(_, usage)| !usage.key_cert_sign()) {
        "keyUsage lacks keyCertSign"
    } else {
        return Ok(Piece::Ca(Ca {
            der: der.to_vec(),
            subject,
            not_before: signed.validity.not_before.to_date_time(),
            not_after: signed.validity.not_after.to_date_time(),
        }));
    };
    Ok(Piece::Other(format!("{subject}, which is not a CA ({why_not})")))
}

/// Classifies DER that is not a certificate by its outermost sequence.
fn classify_other(der: &[u8]) -> Result<Piece, String> {
    let elements = Vec::<Any>::from_der(der).map_err(|_| MALFORMED)?;
    let tags: Vec<Tag> = elements.iter().map(|element| element.tag()).collect();
    let version = elements.first().map_or(&[][..], |first| first.value());
    let what = match (tags.as_slice(), version) {
        ([Tag::Integer, Tag::Sequence, ..], [3]) => {
            return Err("it is PKCS#12, a format for private keys".into());
        }
        // PKCS#8, PKCS#1 and SEC 1 begin with their version.
        ([Tag::Integer, ..], [0 | 1]) => return Err(PRIVATE_KEY.into()),
        // PKCS#8, encrypted.
        ([Tag::Sequence, Tag::OctetString], _) => return Err(PRIVATE_KEY.into()),
        ([Tag::Sequence, Tag::BitString] | [Tag::Integer, Tag::Integer], _) => PUBLIC_KEY,
        ([Tag::ObjectIdentifier, ..], _) => PKCS7,
        _ if CertReq::from_der(der).is_ok() => REQUEST,
        _ => return Err(MALFORMED.into()),
    };
    Ok(Piece::Other(what.into()))
}

/// Returns the subject in RFC 4514 notation, escaped.
fn subject(name: &Name) -> String {
    let mut text = String::new();
    // `to_string` would panic if the name cannot be formatted.
    match write!(text, "{name}") {
        Ok(()) if !text.is_empty() => escape(&text),
        _ => "a certificate without a subject".into(),
    }
}

/// Joins the first few of `items` and counts the rest: a peer may send thousands.
fn list(items: &[String]) -> String {
    const MAX_ITEMS: usize = 4;
    let mut text = items.iter().take(MAX_ITEMS).map(String::as_str).collect::<Vec<_>>().join("; ");
    if items.len() > MAX_ITEMS {
        text.push_str(&format!("; and {} more", items.len() - MAX_ITEMS));
    }
    text
}

/// Appends a certificate to `pem`, in lines of 64 characters.
fn push_pem(pem: &mut String, der: &[u8]) {
    let base64 = base64::prelude::BASE64_STANDARD.encode(der);
    let mut rest = base64.as_str();
    pem.push_str("-----BEGIN CERTIFICATE-----\n");
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = after;
    }
    pem.push_str("-----END CERTIFICATE-----\n");
}

/// Decodes standard base64 (RFC 4648, section 4), with or without line breaks and padding.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
    const LENIENT: GeneralPurpose = GeneralPurpose::new(
        &base64::alphabet::STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let joined: String = text.split_ascii_whitespace().collect();
    LENIENT.decode(joined).ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use base64::prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD};
    use proptest::prelude::*;

    use super::*;

    const TEST_CA: &str = include_str!("../../tests/ca.crt");
    const HOSPITAL_CA: &str = include_str!("../../tests/certificates/hospital-ca.crt");
    const OLD_CA: &str = include_str!("../../tests/certificates/old-ca.crt");
    const V1_ROOT: &str = include_str!("../../tests/certificates/v1-root.crt");
    const LEAF: &str = include_str!("../../tests/certificates/leaf.crt");
    const HOSTILE_NAME: &str = include_str!("../../tests/certificates/hostile-name.crt");
    const REQUEST_PEM: &str = include_str!("../../tests/certificates/request.csr");
    const PUBLIC_PEM: &str = include_str!("../../tests/certificates/public.pem");
    const CHAIN: &str = include_str!("../../tests/certificates/chain.p7b");
    const KEY: &str = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n";

    fn der_of(pem: &str) -> Vec<u8> {
        let body: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        BASE64_STANDARD.decode(body).unwrap()
    }

    fn pem_of(der: &[u8]) -> String {
        let mut pem = String::new();
        push_pem(&mut pem, der);
        pem
    }

    /// Encodes an element of DER.
    fn element(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = content.len() as u16;
        [&[tag, 0x82], &length.to_be_bytes()[..], content].concat()
    }

    fn short(tag: u8, content: &[u8]) -> Vec<u8> {
        [&[tag, content.len() as u8], content].concat()
    }

    /// Returns the second half of the error, which describes the text.
    #[track_caller]
    fn why(text: &str) -> String {
        let error = CaBundle::parse(text).unwrap_err().to_string();
        let (expected, why) = error.split_once("; ").unwrap();
        assert_eq!(expected, "must be the base64 of a CA's PEM certificate (base64 -w0 ca.crt)");
        assert!(!why.contains('\n') && why.len() < 1000, "{why}");
        why.to_owned()
    }

    /// Like [`why`], and asserts that the error is the same for PEM, base64 of PEM and base64 of
    /// DER.
    #[track_caller]
    fn why_in_any_form(pem: &str) -> String {
        let first = why(pem);
        assert_eq!(why(&BASE64_STANDARD.encode(pem)), first);
        assert_eq!(why(&BASE64_STANDARD.encode(der_of(pem))), first);
        first
    }

    /// Returns noon of the first day of a year.
    fn noon(year: u16) -> SystemTime {
        DateTime::new(year, 1, 1, 12, 0, 0).unwrap().to_system_time()
    }

    #[test]
    fn parses_pem_and_base64_of_pem_and_der() {
        let base64 = BASE64_STANDARD.encode(TEST_CA);
        let wrapped: String = base64
            .as_bytes()
            .chunks(20)
            .map(|line| format!("{}\n ", line.escape_ascii()))
            .collect();
        let no_padding = BASE64_STANDARD_NO_PAD.encode(format!("{TEST_CA}\n"));
        let der = BASE64_STANDARD.encode(der_of(TEST_CA));
        for (text, was_raw_pem) in [
            (TEST_CA, true),
            (&base64, false),
            (&wrapped, false),
            (&no_padding, false),
            (&der, false),
        ] {
            let bundle = CaBundle::parse(text).expect(text);
            assert_eq!((bundle.pem(), bundle.ignored()), (TEST_CA, None));
            assert_eq!(bundle.was_raw_pem(), was_raw_pem, "{text}");
        }
        assert_eq!(CaBundle::parse(TEST_CA), CaBundle::parse(&base64));
        assert_ne!(CaBundle::parse(TEST_CA), CaBundle::parse(HOSPITAL_CA));
    }

    #[test]
    fn pem_is_normalised_for_grpc() {
        let in_one_line = TEST_CA.replace('\n', " ");
        let for_windows = format!("\u{feff}{}", TEST_CA.replace('\n', "\r\n"));
        let of_old = TEST_CA.replace("CERTIFICATE", "X509 CERTIFICATE");
        let latin_1 = BASE64_STANDARD.encode([b"# Klinikum S\xfcd\n", TEST_CA.as_bytes()].concat());
        let with_text = format!("subject=CN = a CA\n{}# bye", TEST_CA.trim_end_matches('\n'));
        for text in [in_one_line, for_windows, of_old, latin_1, with_text] {
            assert_eq!(CaBundle::parse(&text).expect(&text).pem(), TEST_CA);
        }
    }

    #[test]
    fn cas_keep_their_order_without_duplicates() {
        let bundle = format!("{HOSPITAL_CA}{TEST_CA}\n{HOSPITAL_CA}{V1_ROOT}");
        let bundle = CaBundle::parse(&bundle).unwrap();
        assert_eq!(bundle.pem(), format!("{HOSPITAL_CA}{TEST_CA}{V1_ROOT}"));
        assert_eq!(bundle.ignored(), None);
    }

    #[test]
    fn other_elements_are_ignored_and_described() {
        let bundle = CaBundle::parse(&format!("{LEAF}{REQUEST_PEM}{TEST_CA}")).unwrap();
        assert_eq!(bundle.pem(), TEST_CA);
        assert_eq!(
            bundle.ignored(),
            Some(
                "ignored because it is not a CA: CN=superlink.example, which is not a CA \
                 (basicConstraints is not CA:TRUE); a certificate request that no CA has signed yet"
            )
        );
        let many = CaBundle::parse(&format!("{TEST_CA}{}", LEAF.repeat(1000))).unwrap();
        let ignored = many.ignored().unwrap();
        assert!(ignored.len() < 500 && ignored.ends_with("; and 996 more"), "{ignored}");
    }

    #[test]
    fn private_key_is_rejected_anywhere() {
        let version = |number| short(0x02, &[number]);
        let octets = short(0x04, b"secret");
        let pkcs_8 = short(0x30, &[version(0), short(0x30, &[]), octets.clone()].concat());
        let pkcs_1 = short(
            0x30,
            &[version(0), short(0x02, b"secret"), short(0x02, b"x"), version(7)].concat(),
        );
        let sec_1 = short(0x30, &[version(1), octets.clone()].concat());
        let encrypted = short(0x30, &[short(0x30, &[]), octets].concat());
        let in_a_bundle = format!("{TEST_CA}{KEY}{HOSPITAL_CA}");
        let of_rsa = KEY.replace("PRIVATE", "RSA PRIVATE");
        let mut texts =
            vec![KEY.to_owned(), in_a_bundle.clone(), of_rsa, BASE64_STANDARD.encode(in_a_bundle)];
        texts.push(BASE64_STANDARD.encode(KEY));
        for der in [pkcs_8, pkcs_1, sec_1, encrypted] {
            texts.extend([pem_of(&der), BASE64_STANDARD.encode(&der)]);
        }
        for text in texts {
            assert_eq!(
                why(&text),
                "it contains a private key; provide the certificate only",
                "{text}"
            );
        }
        let pkcs_12 = short(0x30, &[version(3), short(0x30, &[])].concat());
        assert_eq!(
            why(&BASE64_STANDARD.encode(pkcs_12)),
            "it is PKCS#12, a format for private keys"
        );
    }

    #[test]
    fn text_without_certificate_is_described() {
        assert_eq!(why_in_any_form(REQUEST_PEM), format!("this is {REQUEST}"));
        assert_eq!(why_in_any_form(PUBLIC_PEM), "this is a public key");
        assert_eq!(why_in_any_form(CHAIN), format!("this is {PKCS7}"));
        let rsa = short(0x30, &[short(0x02, &[1; 9]), short(0x02, &[1, 0, 1])].concat());
        assert_eq!(why(&BASE64_STANDARD.encode(rsa)), "this is a public key");
        assert_eq!(
            why(&TEST_CA.replace("CERTIFICATE", "TRUSTED CERTIFICATE")),
            format!("this is {TRUSTED}")
        );
        assert_eq!(
            why(&TEST_CA.replace("CERTIFICATE", "DH \x1bPARAMETERS")),
            "this is PEM of 'DH \\u{1b}PARAMETERS'"
        );
    }

    #[test]
    fn certificate_that_is_not_a_ca_is_named() {
        let no_constraints = "basicConstraints is not CA:TRUE";
        for (pem, subject, reason) in [
            (LEAF, "CN=superlink.example", no_constraints),
            (
                include_str!("../../tests/certificates/no-constraints.crt"),
                "CN=no-constraints",
                no_constraints,
            ),
            (include_str!("../../tests/certificates/v1-leaf.crt"), "CN=v1-root", no_constraints),
            (
                include_str!("../../tests/certificates/no-cert-sign.crt"),
                "CN=no-cert-sign",
                "keyUsage lacks keyCertSign",
            ),
        ] {
            assert_eq!(
                why_in_any_form(pem),
                format!("this is {subject}, which is not a CA ({reason})")
            );
        }
        let hostile = why(HOSTILE_NAME);
        assert!(
            hostile.starts_with("this is CN=a\\1b[31m\\0ab000") && hostile.is_ascii(),
            "{hostile}"
        );
    }

    #[test]
    fn self_signed_x509_v1_certificate_is_a_ca() {
        assert_eq!(CaBundle::parse(V1_ROOT).unwrap().pem(), V1_ROOT);
    }

    #[test]
    fn malformed_certificate_is_rejected() {
        let der = der_of(TEST_CA);
        let more = [&der[..], &[0]].concat();
        for text in [pem_of(&more), BASE64_STANDARD.encode(&more), pem_of(&der.repeat(2))] {
            assert_eq!(why(&text), "there are bytes after the end of the certificate");
        }
        let endless = [&[0x30, 0x80][..], &der[4..], &[0, 0]].concat();
        let wrong_tag = [&[0x31][..], &der[1..]].concat();
        for der in
            [&der[..der.len() - 1], &endless, &wrong_tag, &[], &[0x30], &element(0x30, &[0; 300])]
        {
            assert_eq!(why(&pem_of(der)), MALFORMED, "{der:02x?}");
        }
        let end = TEST_CA.find("-----END").unwrap();
        assert_eq!(why(&TEST_CA[..end]), "its END line is missing");
        assert_eq!(why("-----BEGIN CERT"), "its BEGIN line is incomplete");
        // One malformed certificate rejects the whole bundle.
        assert_eq!(why(&format!("{HOSPITAL_CA}{}", TEST_CA.replacen("MII", "MII!", 1))), MALFORMED);
    }

    #[test]
    fn invalid_encoding_is_described() {
        assert_eq!(why("!!!"), "it is not base64");
        assert_eq!(why("aGVsbG8="), "the decoded bytes are neither PEM nor DER");
        for once in [BASE64_STANDARD.encode(TEST_CA), BASE64_STANDARD.encode(der_of(TEST_CA))] {
            assert!(
                why(&BASE64_STANDARD.encode(once))
                    .starts_with("it is base64 of base64: encode it once")
            );
        }
    }

    #[test]
    fn valid_ca_has_no_warning() {
        let ca = CaBundle::parse(TEST_CA).unwrap();
        assert_eq!(
            ca.valid_at(noon(2100)),
            Ok(ValidBundle { bundle: ca.clone(), warnings: vec![] })
        );
    }

    #[test]
    fn expired_ca_is_rejected_with_both_dates() {
        let old = CaBundle::parse(OLD_CA).unwrap();
        assert_eq!(
            old.valid_at(noon(2026)).unwrap_err().to_string(),
            "must be a CA that has not expired; CN=old-ca expired at 2024-05-01T00:00:00Z; \
             the clock of this VM says 2026-01-01T12:00:00Z"
        );
        // The last second is within (RFC 5280, section 4.1.2.5).
        let last = DateTime::new(2024, 5, 1, 0, 0, 0).unwrap().to_system_time();
        assert!(old.valid_at(last).is_ok() && old.valid_at(last + Duration::from_secs(1)).is_err());
    }

    #[test]
    fn expired_ca_in_a_bundle_is_ignored_with_warning() {
        let bundle = CaBundle::parse(&format!("{TEST_CA}{OLD_CA}{LEAF}")).unwrap();
        let valid = bundle.valid_at(noon(2100)).unwrap();
        assert_eq!(valid.bundle.pem(), TEST_CA);
        assert_eq!(valid.bundle.ignored(), bundle.ignored());
        assert_eq!(
            valid.warnings,
            ["ignored because it has expired: CN=old-ca expired at 2024-05-01T00:00:00Z; \
              the clock of this VM says 2100-01-01T12:00:00Z"]
        );
    }

    #[test]
    fn ca_that_is_not_valid_yet_is_kept() {
        let ca = CaBundle::parse(HOSPITAL_CA).unwrap();
        for (now, clock) in [
            (noon(1970), "1970-01-01T12:00:00Z"),
            (UNIX_EPOCH - Duration::from_secs(1), "a year before 1970 or after 9999"),
        ] {
            let ValidBundle { bundle, warnings } = ca.valid_at(now).unwrap();
            assert_eq!(bundle, ca);
            assert_eq!(warnings.len(), 1);
            let (dates, doubt) = warnings[0].split_once("; ").unwrap();
            assert!(
                dates.starts_with("CN=hospital-ca,O=Klinikum Süd is not valid before 2026-11-26T"),
                "{dates}"
            );
            assert_eq!(doubt, format!("the clock of this VM says {clock}, which may be wrong"));
        }
    }

    fn pems() -> impl Strategy<Value = &'static str> {
        prop::sample::select(vec![
            TEST_CA,
            HOSPITAL_CA,
            OLD_CA,
            V1_ROOT,
            LEAF,
            HOSTILE_NAME,
            REQUEST_PEM,
            PUBLIC_PEM,
            CHAIN,
        ])
    }

    /// Asserts that an accepted bundle is accepted again from its own PEM, with the same result.
    fn is_stable(text: &str) -> Result<(), TestCaseError> {
        if let Ok(bundle) = CaBundle::parse(text) {
            let again = CaBundle::parse(bundle.pem())
                .map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!(&again, &bundle);
            prop_assert_eq!(again.ignored(), None);
            prop_assert_eq!(again.valid_at(noon(2030)), bundle.valid_at(noon(2030)));
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(
            text in "\\PC{0,60}",
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            is_stable(&text)?;
            is_stable(&BASE64_STANDARD.encode(&bytes))?;
            is_stable(&pem_of(&bytes))?;
        }

        #[test]
        fn damaged_bundle_never_panics(
            pem in pems(),
            at in any::<prop::sample::Index>(),
            byte: u8,
            cut: bool,
        ) {
            let mut der = der_of(pem);
            let at = at.index(der.len());
            der[at] = byte;
            if cut {
                der.truncate(at + 1);
            }
            is_stable(&pem_of(&der))?;
            is_stable(&BASE64_STANDARD.encode(&der))?;
        }

        #[test]
        fn mixed_bundle_never_panics(
            parts in prop::collection::vec(pems(), 1..5),
            at in any::<prop::sample::Index>(),
            byte in 0u8..0x80,
        ) {
            let mut text = parts.concat();
            is_stable(&text)?;
            let at = at.index(text.len());
            text.replace_range(at..=at, &char::from(byte).to_string());
            is_stable(&text)?;
        }
    }

    #[test]
    fn debug_output_is_short() {
        let ca = CaBundle::parse(TEST_CA).unwrap();
        assert_eq!(format!("{ca:?}"), format!("CaBundle({} bytes)", TEST_CA.len()));
    }

    #[test]
    fn ca_is_valid_from_its_first_second() {
        let ca = CaBundle::parse(HOSPITAL_CA).unwrap();
        let first = ca.cas[0].not_before.to_system_time();
        assert_eq!(ca.valid_at(first).unwrap().warnings, Vec::<String>::new());
        assert_eq!(ca.valid_at(first - Duration::from_secs(1)).unwrap().warnings.len(), 1);
    }

    #[test]
    fn unknown_der_structure_is_malformed() {
        assert_eq!(why(&pem_of(&short(0x30, &short(0x04, b"x")))), MALFORMED);
    }

    #[test]
    fn empty_subject_and_long_list_are_handled() {
        assert_eq!(subject(&Name::default()), "a certificate without a subject");
        let items = ["a", "b", "c", "d", "e"].map(String::from);
        assert_eq!(list(&items[..4]), "a; b; c; d");
        assert_eq!(list(&items), "a; b; c; d; and 1 more");
    }
}
