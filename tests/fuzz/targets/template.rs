//! An OpenNebula template or a OneFlow service: each finding is one line and refers to an existing
//! line.
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
