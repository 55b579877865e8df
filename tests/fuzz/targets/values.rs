//! Single values: an accepted value is accepted again in its displayed form and is equal.
#![no_main]

use std::fmt::{Debug, Display};

use libfuzzer_sys::fuzz_target;
use supernode_agent::values::{
    DeviceSelection, Fraction, HostPort, ImageRef, MAX_COUNT, PciAddress, Version, parse_count,
    parse_yes_no,
};
use supernode_fuzz::assert_shown;

fn assert_stable<T, E>(text: &str, parse: impl Fn(&str) -> Result<T, E>)
where
    T: PartialEq + Debug + Display,
    E: PartialEq + Debug + Display,
{
    match parse(text) {
        Ok(value) => {
            let shown = value.to_string();
            assert_shown(&shown);
            assert_eq!(parse(&shown), Ok(value));
            // It is passed as an argument and must not look like an option.
            assert!(!shown.starts_with('-'), "{shown}");
        }
        Err(error) => assert_shown(&error.to_string()),
    }
}

fuzz_target!(|text: &str| {
    assert_stable(text, HostPort::parse);
    assert_stable(text, ImageRef::parse);
    assert_stable(text, Version::parse);
    assert_stable(text, DeviceSelection::parse);
    assert_stable(text, Fraction::parse);
    assert_stable(text, |text| PciAddress::parse(text).ok_or_else(String::new));
    if let Ok(fraction) = Fraction::parse(text) {
        assert!(fraction.value() > 0.0 && fraction.value() <= 1.0);
    }
    if let Ok(count) = parse_count(text, 1) {
        assert!((1..=MAX_COUNT).contains(&count));
    }
    let _ = parse_yes_no(text);
});
