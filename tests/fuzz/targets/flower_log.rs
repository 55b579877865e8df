//! A line of the container's log, in which a ClientApp may print what it likes: only what stands
//! behind a level counts, and colours change nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supernode_agent::flower::log::said;

fuzz_target!(|line: &str| {
    let heard = said(line);
    if !line.starts_with('\x1b') {
        assert!(
            heard.is_none()
                || ["INFO", "WARNING", "ERROR"].iter().any(|level| line.starts_with(level))
        );
        assert_eq!(said(&format!("\x1b[92m{line}")), heard);
    }
    assert_eq!(said(&format!("a ClientApp says {line}")), None);
});
