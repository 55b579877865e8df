//! A line of the container's log, in which a ClientApp may print anything: only text after a log
//! level is interpreted, and colours make no difference.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supernode_agent::flower::log::parse_log_line;

fuzz_target!(|line: &str| {
    let heard = parse_log_line(line);
    if !line.starts_with('\x1b') {
        assert!(
            heard.is_none()
                || ["INFO", "WARNING", "ERROR"].iter().any(|level| line.starts_with(level))
        );
        assert_eq!(parse_log_line(&format!("\x1b[92m{line}")), heard);
    }
    assert_eq!(parse_log_line(&format!("a ClientApp says {line}")), None);
});
