//! The token of `one_env`, a file with unescaped operator values: an accepted token is valid in a
//! header and comes from one of the first three lines.
#![no_main]

use libfuzzer_sys::fuzz_target;
use one_context::source::token_in;

fuzz_target!(|head: &[u8]| {
    if let Some(token) = token_in(head) {
        let token = token.expose();
        assert!(
            !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"')
        );
        let line = format!("export TOKENTXT=\"{token}\"");
        assert!(head.split(|&byte| byte == b'\n').take(3).any(|found| found == line.as_bytes()));
    }
});
