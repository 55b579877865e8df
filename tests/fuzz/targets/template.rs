//! A template of OpenNebula, or a service of OneFlow: each finding is one line, and names a line
//! that is there.
#![no_main]

use libfuzzer_sys::fuzz_target;
use supernode_agent::check::template::judge;
use supernode_fuzz::assert_shown;

fuzz_target!(|text: &str| {
    let lines = text.split('\n').count();
    for check in judge(text) {
        assert_shown(&check.finding);
        check.fix.iter().for_each(|fix| assert_shown(fix));
        assert!(check.line.is_none_or(|line| (1..=lines).contains(&line)), "{check:?}");
    }
});
