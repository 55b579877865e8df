//! Encoding of attributes as the text of an update and as the form that carries it. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::OneGateError;

/// Returns the text with which [`OneGate::publish`](super::OneGate::publish) sets `attributes`: one
/// line `NAME=value` for each, in order.
///
/// Values are not quoted; OneGate adds quotes (OpenNebula, `src/onegate/onegate-server.rb`). An
/// empty value is `NAME=""`. A value that OneGate or OpenNebula would change is encoded as base64
/// (standard alphabet), and so is a value that contains `READY=YES` in any case: OneFlow considers
/// the VM ready if that text is anywhere in an update (`src/flow/lib/EventManager.rb`). An
/// attribute whose own name ends in `READY` is the caller's decision.
///
/// # Errors
/// Returns [`OneGateError::InvalidAttribute`] if a name does not match `[A-Z0-9_]+`.
pub fn update_text(attributes: &[(&str, String)]) -> Result<String, OneGateError> {
    let mut text = String::new();
    for (name, value) in attributes {
        if name.is_empty()
            || !name.bytes().all(|byte| matches!(byte, b'A'..=b'Z' | b'0'..=b'9' | b'_'))
        {
            return Err(OneGateError::InvalidAttribute { name: name.chars().take(100).collect() });
        }
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(name);
        text.push('=');
        match value.as_str() {
            "" => text.push_str("\"\""),
            value if is_plain(value) => text.push_str(value),
            value => STANDARD.encode_string(value, &mut text),
        }
    }
    Ok(text)
}

/// Returns whether OpenNebula stores a value unchanged and OneFlow does not interpret it.
fn is_plain(value: &str) -> bool {
    // OpenNebula stores templates as XML, which does not allow the last two.
    let is_lost =
        |character| matches!(character, ',' | '[' | ']' | '"' | '\\' | '\u{fffe}' | '\u{ffff}');
    let is_kept = |character: char| !character.is_control() && !is_lost(character);
    value.trim() == value
        && value.chars().all(is_kept)
        && !value.to_ascii_uppercase().contains("READY=YES")
}

/// Returns the form that carries the text of an update. Type 1 merges it with the present
/// attributes.
pub(super) fn form(update_text: &str) -> String {
    let mut form = String::from("data=");
    for byte in update_text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' => {
                form.push(char::from(byte))
            }
            _ => form.push_str(&format!("%{byte:02X}")),
        }
    }
    form + "&type=1"
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text_of(value: &str) -> String {
        let text = update_text(&[("K", value.to_owned())]).unwrap();
        text.strip_prefix("K=").unwrap().to_owned()
    }

    #[test]
    fn update_has_one_line_per_attribute() {
        let attributes = [
            ("FL_NODE_ID", "7".to_owned()),
            ("FL_GPU_NAME", "NVIDIA H100 80GB".to_owned()),
            ("A", "b".to_owned()),
        ];
        assert_eq!(
            update_text(&attributes).unwrap(),
            "FL_NODE_ID=7\nFL_GPU_NAME=NVIDIA H100 80GB\nA=b"
        );
        assert_eq!(update_text(&[]).unwrap(), "");
    }

    #[test]
    fn plain_value_is_unchanged() {
        for value in ["YES", "a b", "=b", "a=b", "it's", "Grüße", "日本", "$(id)", "a#b", "%41+"]
        {
            assert_eq!(text_of(value), value);
        }
    }

    #[test]
    fn empty_value_is_quoted() {
        assert_eq!(text_of(""), "\"\"");
    }

    #[test]
    fn value_that_opennebula_changes_is_base64() {
        assert_eq!(text_of("a,b"), "YSxi");
        for value in [
            "a,b", "[", "]", "\"", "\\", "a\nb", "a\rb", "a\tb", "\0", "\u{7f}", "\u{85}", " a",
            "a ", " ", "\u{a0}a", "\u{fffe}", "\u{ffff}",
        ] {
            assert_eq!(STANDARD.decode(text_of(value)).unwrap(), value.as_bytes(), "{value:?}");
        }
    }

    #[test]
    fn value_with_ready_yes_is_base64() {
        for value in ["READY=YES", "x Ready=yes!", "FL_NODE_READY=YES"] {
            assert_eq!(STANDARD.decode(text_of(value)).unwrap(), value.as_bytes());
        }
        for value in ["READY=NO", "READY = YES", "YES"] {
            assert_eq!(text_of(value), value);
        }
    }

    #[test]
    fn ready_attribute_is_plain() {
        let attributes = [("FL_NODE_READY", "YES".to_owned()), ("READY", "YES".to_owned())];
        assert_eq!(update_text(&attributes).unwrap(), "FL_NODE_READY=YES\nREADY=YES");
    }

    #[test]
    fn invalid_name_is_an_error() {
        for name in ["", "a", "A-B", "A B", "A=", "A\nREADY=YES", "Ä", "A[B"] {
            let error = update_text(&[("OK", "1".to_owned()), (name, "1".to_owned())]).unwrap_err();
            assert!(
                matches!(&error, OneGateError::InvalidAttribute { .. })
                    && !error.to_string().contains('\n'),
                "{error}"
            );
        }
        let error = update_text(&[(&"a".repeat(10_000), String::new())]).unwrap_err();
        assert!(error.to_string().len() < 300, "{error}");
    }

    #[test]
    fn form_is_percent_encoded() {
        assert_eq!(form("A=a b\nB_1=ü&+%.-"), "data=A%3Da%20b%0AB_1%3D%C3%BC%26%2B%25.-&type=1");
        assert_eq!(form(""), "data=&type=1");
    }

    proptest! {
        #[test]
        fn every_value_is_one_line_and_round_trips(value in any::<String>()) {
            let text = text_of(&value);
            prop_assert!(!text.contains(['\n', '\r', ',', '[', ']', '\\']));
            let decoded = match text.as_str() {
                "\"\"" => Vec::new(),
                same if same == value => value.clone().into_bytes(),
                encoded => STANDARD.decode(encoded).unwrap(),
            };
            prop_assert_eq!(decoded, value.into_bytes());
        }

        #[test]
        fn no_value_contains_ready_yes(value in "[ -~]{0,5}[Rr]EADY=YE[Ss][ -~]{0,5}") {
            prop_assert!(!text_of(&value).to_ascii_uppercase().contains("READY=YES"));
        }

        #[test]
        fn form_round_trips(text in any::<String>()) {
            let form = form(&text);
            let data = form.strip_prefix("data=").unwrap().strip_suffix("&type=1").unwrap();
            let mut bytes = data.bytes();
            let mut decoded = Vec::new();
            while let Some(byte) = bytes.next() {
                decoded.push(match byte {
                    b'%' => {
                        let digits = [bytes.next().unwrap(), bytes.next().unwrap()];
                        u8::from_str_radix(str::from_utf8(&digits).unwrap(), 16).unwrap()
                    }
                    b'&' | b'=' | b'+' => panic!("{data}"),
                    byte => byte,
                });
            }
            prop_assert_eq!(decoded, text.into_bytes());
        }
    }
}
