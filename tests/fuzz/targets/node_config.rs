//! `FL_NODE_CONFIG`: what is accepted is accepted again, also in its displayed form; an error
//! message does not contain the text, which may hold a secret.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supernode_agent::values::NodeConfig;
use supernode_fuzz::assert_shown;

fuzz_target!(|text: &str| {
    match NodeConfig::parse(text) {
        Ok(config) => {
            assert_eq!(NodeConfig::parse(config.as_str()).as_ref(), Ok(&config));
            let redacted = config.redacted();
            assert!(NodeConfig::parse(&redacted).is_ok(), "{redacted:?}");
            assert!(NodeConfig::may_hold_secret(text) || redacted == config.as_str());
        }
        Err(error) => assert_shown(&error.to_string()),
    }
});
