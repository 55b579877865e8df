//! From a context to a configuration: each diagnostic is one line, and none contains a secret.
#![no_main]

use libfuzzer_sys::fuzz_target;
use one_context::Context;
use supernode_agent::config::{Config, Prebaked};
use supernode_fuzz::assert_shown;

fuzz_target!(|text: &[u8]| {
    let Ok(context) = Context::parse(text) else { return };
    match Config::from_context(&context, &Prebaked::default()) {
        Ok((config, diagnostics)) => {
            diagnostics
                .warnings()
                .chain(&diagnostics.ineffective)
                .chain(&diagnostics.notes)
                .for_each(|line| assert_shown(line));
            assert!(!config.resolved().is_empty());
        }
        Err(errors) => errors.lines().for_each(|line| assert_shown(&line)),
    }
});
