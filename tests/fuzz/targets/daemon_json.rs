//! Editing daemon.json: all bytes except our entry are preserved, and the second edit changes
//! nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use supernode_agent::docker::daemon_json::{Merged, merge};

const PATH: &str = "nvidia-container-runtime";

/// Returns the part of `old` that is missing in `new`, assuming that one piece was replaced.
fn removed<'t>(old: &'t str, new: &str) -> &'t str {
    let same = |pair: &(u8, u8)| pair.0 == pair.1;
    let before = old.bytes().zip(new.bytes()).take_while(same).count();
    let most = old.len().min(new.len()) - before;
    let after = old.bytes().rev().zip(new.bytes().rev()).take(most).take_while(same).count();
    old.get(before..old.len() - after).expect("whole characters")
}

fuzz_target!(|text: &str| {
    match merge(text, PATH) {
        Ok(Merged::Unchanged) => {}
        Ok(Merged::Changed(new)) => {
            assert_eq!(merge(&new, PATH), Ok(Merged::Unchanged), "{new}");
            let removed = removed(text, &new).trim();
            assert!("null".contains(removed), "{removed:?} was removed: {new}");
            let is_json = |text: &str| serde_json::from_str::<Value>(text).is_ok();
            assert_eq!(is_json(text), is_json(&new), "{new}");
        }
        Err(refused) => {
            assert!((1..=text.split('\n').count()).contains(&refused.line), "{refused}");
            supernode_fuzz::assert_shown(&refused.to_string());
        }
    }
});
