//! Published attributes: one line per attribute for any value, and nothing that opens OneFlow's
//! ready gate. Names and values alternate, separated by NUL.
#![no_main]

use libfuzzer_sys::fuzz_target;
use one_context::onegate::update_text;

fuzz_target!(|text: &str| {
    let mut parts = text.split('\0');
    let mut attributes = Vec::new();
    while let Some(name) = parts.next() {
        attributes.push((name, parts.next().unwrap_or_default().to_owned()));
    }
    match update_text(&attributes) {
        Ok(update) => {
            assert_eq!(update.lines().count(), attributes.len());
            for (line, (name, value)) in update.lines().zip(&attributes) {
                let written = line.strip_prefix(name).and_then(|rest| rest.strip_prefix('='));
                let written = written.expect("NAME=value");
                assert!(!written.is_empty() && !written.contains([',', '[', ']', '\\']));
                assert!(written == "\"\"" || !written.contains('"'));
                assert_eq!(written == "\"\"", value.is_empty());
                assert!(!written.to_ascii_uppercase().contains("READY=YES"));
            }
        }
        Err(error) => supernode_fuzz::assert_shown(&error.to_string()),
    }
});
