//! A CA as text, as base64 of the bytes, and as PEM: what is accepted is accepted again with the
//! same result.
#![no_main]

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use libfuzzer_sys::fuzz_target;
use supernode_agent::values::ca_bundle::CaBundle;
use supernode_fuzz::assert_shown;

fn assert_stable(text: &str) {
    match CaBundle::parse(text) {
        Ok(ca) => {
            assert_eq!(CaBundle::parse(ca.pem()).as_ref(), Ok(&ca));
            ca.ignored().into_iter().for_each(assert_shown);
            // 2030, when the certificates of the corpus are valid.
            match ca.valid_at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000)) {
                Ok(valid) => valid.warnings.iter().for_each(|warning| assert_shown(warning)),
                Err(error) => assert_shown(&error.to_string()),
            }
        }
        Err(error) => assert_shown(&error.to_string()),
    }
}

fuzz_target!(|bytes: &[u8]| {
    assert_stable(&String::from_utf8_lossy(bytes));
    let base64 = BASE64_STANDARD.encode(bytes);
    assert_stable(&base64);
    assert_stable(&format!("-----BEGIN CERTIFICATE-----\n{base64}\n-----END CERTIFICATE-----\n"));
});
