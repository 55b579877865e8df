//! Tests on the files in `cases/`: each `.sh` is a `context.sh` as OpenNebula writes it, and the
//! `.json` next to it has the expected values.

#![allow(clippy::unwrap_used)]

use one_context::Context;
use one_context::parse::parse;
use serde_json::{Map, Value};
use std::fs;
use std::path::Path;

/// Name, text and expected values of every case.
fn cases() -> Vec<(String, Vec<u8>, Map<String, Value>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut cases = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "sh") {
            let json = fs::read(path.with_extension("json")).unwrap();
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            cases.push((name, fs::read(&path).unwrap(), serde_json::from_slice(&json).unwrap()));
        }
    }
    assert!(cases.len() >= 2, "cases are missing");
    cases
}

#[test]
fn every_value_of_every_case_round_trips() {
    for (case, text, expected) in cases() {
        let context = Context::parse(&text).unwrap();
        for (name, value) in &expected {
            assert_eq!(
                context.bytes(name),
                Some(value.as_str().unwrap().as_bytes()),
                "{case}: {name}"
            );
        }
        assert_eq!(context.len(), expected.len(), "{case}: {context:?}");
    }
}

#[test]
fn truncated_case_never_yields_a_different_value() {
    for (case, text, _) in cases() {
        let complete = parse(&text).unwrap();
        for end in 0..text.len() {
            match parse(&text[..end]) {
                Err(error) => assert!(error.is_truncated(), "{case} at {end}: {error}"),
                Ok(part) if text[..end].ends_with(b"\n") => {
                    assert!(complete.starts_with(&part), "{case} at {end}")
                }
                // Without a line break the last value can continue after an escaped quote.
                Ok(mut part) => {
                    let Some((name, value)) = part.pop() else {
                        continue;
                    };
                    assert!(complete.starts_with(&part), "{case} at {end}");
                    assert_eq!(name, complete[part.len()].0, "{case} at {end}");
                    assert!(complete[part.len()].1.starts_with(&value), "{case} at {end}");
                }
            }
        }
    }
}

#[test]
fn q35_case_assigns_the_gpu() {
    let (_, text, _) = cases().into_iter().find(|(case, ..)| case == "gpu-q35").unwrap();
    let assigned = Context::parse(&text).unwrap().assigned_addresses();
    assert_eq!(assigned, [("PCI0_ADDRESS".to_owned(), "01:00.0".to_owned())]);
}
