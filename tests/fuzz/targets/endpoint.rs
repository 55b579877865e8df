//! `ONEGATE_ENDPOINT`, `VMID` and the token, one per line: no error message contains a password.
#![no_main]

use std::path::Path;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use one_context::Secret;
use one_context::onegate::OneGate;

fuzz_target!(|text: &str| {
    let mut lines = text.splitn(3, '\n');
    let mut next = || lines.next().unwrap_or("7");
    let (endpoint, vm_id, token) = (next(), next(), next());
    // A directory, so that this machine's CAs are not read.
    let ca_file = Some(Path::new("/"));
    match OneGate::new(endpoint, vm_id, Secret::new(token), ca_file, Duration::from_secs(1)) {
        Ok(gate) => {
            // A path may contain an @.
            let authority = endpoint.split('/').nth(2).unwrap_or_default();
            assert!(!authority.contains('@') && !endpoint.contains(['?', '#']), "{gate:?}");
            assert!(vm_id.bytes().all(|byte| byte.is_ascii_digit()));
            assert!(token.bytes().all(|byte| byte.is_ascii_graphic()));
        }
        Err(error) => {
            supernode_fuzz::assert_shown(&error.to_string());
            assert!(error.is_final());
        }
    }
});
