//! Attributes to the text of an update, and to the body of the request that carries it. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::OneGateError;

/// The text with which [`OneGate::publish`](super::OneGate::publish) sets `attributes`:
/// `NAME=value`, a line for each, in their order.
///
/// Values go without quotes, which OneGate adds (OpenNebula, `src/onegate/onegate-server.rb`); an
/// empty one is `NAME=""`. A value that would not survive that becomes base64 (standard alphabet),
/// and so does one with `READY=YES` in it, in any case: OneFlow opens its gate on that text
/// anywhere in an update (`src/flow/lib/EventManager.rb`). Whether an attribute whose name ends in
/// `READY` is YES is the caller's to decide.
///
/// # Errors
/// [`OneGateError::BadAttribute`] where a name is not `[A-Z0-9_]+`.
pub fn update_text(attributes: &[(&str, String)]) -> Result<String, OneGateError> {
    let mut text = String::new();
    for (name, value) in attributes {
        if name.is_empty()
            || !name.bytes().all(|byte| matches!(byte, b'A'..=b'Z' | b'0'..=b'9' | b'_'))
        {
            return Err(OneGateError::BadAttribute { name: name.chars().take(100).collect() });
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

/// Whether a value arrives as it is, and means nothing to OneFlow.
fn is_plain(value: &str) -> bool {
    // The last two are no characters of XML, as which OpenNebula keeps a template.
    let is_lost =
        |character| matches!(character, ',' | '[' | ']' | '"' | '\\' | '\u{fffe}' | '\u{ffff}');
    let is_kept = |character: char| !character.is_control() && !is_lost(character);
    value.trim() == value
        && value.chars().all(is_kept)
        && !value.to_ascii_uppercase().contains("READY=YES")
}

/// The form that carries the text of an update; type 1 adds to what is there.
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
    fn an_update_has_a_line_for_each_attribute_in_their_order() {
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
    fn a_plain_value_stays_as_it_is() {
        for value in ["YES", "a b", "=b", "a=b", "it's", "Grüße", "日本", "$(id)", "a#b", "%41+"]
        {
            assert_eq!(text_of(value), value);
        }
    }

    #[test]
    fn an_empty_value_is_two_quotes() {
        assert_eq!(text_of(""), "\"\"");
    }

    #[test]
    fn what_opennebula_would_refuse_or_change_is_base64() {
        assert_eq!(text_of("a,b"), "YSxi");
        for value in [
            "a,b", "[", "]", "\"", "\\", "a\nb", "a\rb", "a\tb", "\0", "\u{7f}", "\u{85}", " a",
            "a ", " ", "\u{a0}a", "\u{fffe}", "\u{ffff}",
        ] {
            assert_eq!(STANDARD.decode(text_of(value)).unwrap(), value.as_bytes(), "{value:?}");
        }
    }

    #[test]
    fn a_value_that_would_open_oneflows_gate_is_base64() {
        for value in ["READY=YES", "x Ready=yes!", "FL_NODE_READY=YES"] {
            assert_eq!(STANDARD.decode(text_of(value)).unwrap(), value.as_bytes());
        }
        for value in ["READY=NO", "READY = YES", "YES"] {
            assert_eq!(text_of(value), value);
        }
    }

    #[test]
    fn that_the_vm_is_ready_is_said_as_it_is() {
        let attributes = [("FL_NODE_READY", "YES".to_owned()), ("READY", "YES".to_owned())];
        assert_eq!(update_text(&attributes).unwrap(), "FL_NODE_READY=YES\nREADY=YES");
    }

    #[test]
    fn a_name_that_is_none_is_an_error() {
        for name in ["", "a", "A-B", "A B", "A=", "A\nREADY=YES", "Ä", "A[B"] {
            let error = update_text(&[("OK", "1".to_owned()), (name, "1".to_owned())]).unwrap_err();
            assert!(
                matches!(&error, OneGateError::BadAttribute { .. })
                    && !error.to_string().contains('\n'),
                "{error}"
            );
        }
        let error = update_text(&[(&"a".repeat(10_000), String::new())]).unwrap_err();
        assert!(error.to_string().len() < 300, "{error}");
    }

    #[test]
    fn a_form_says_every_byte_but_letters_digits_and_a_few_by_its_number() {
        assert_eq!(form("A=a b\nB_1=ü&+%.-"), "data=A%3Da%20b%0AB_1%3D%C3%BC%26%2B%25.-&type=1");
        assert_eq!(form(""), "data=&type=1");
    }

    proptest! {
        #[test]
        fn every_value_stays_on_its_line_and_comes_back(value in any::<String>()) {
            let text = text_of(&value);
            prop_assert!(!text.contains(['\n', '\r', ',', '[', ']', '\\']));
            let came_back = match text.as_str() {
                "\"\"" => Vec::new(),
                same if same == value => value.clone().into_bytes(),
                encoded => STANDARD.decode(encoded).unwrap(),
            };
            prop_assert_eq!(came_back, value.into_bytes());
        }

        #[test]
        fn no_value_opens_oneflows_gate(value in "[ -~]{0,5}[Rr]EADY=YE[Ss][ -~]{0,5}") {
            prop_assert!(!text_of(&value).to_ascii_uppercase().contains("READY=YES"));
        }

        #[test]
        fn a_form_is_read_back_as_the_text(text in any::<String>()) {
            let form = form(&text);
            let data = form.strip_prefix("data=").unwrap().strip_suffix("&type=1").unwrap();
            let mut bytes = data.bytes();
            let mut read = Vec::new();
            while let Some(byte) = bytes.next() {
                read.push(match byte {
                    b'%' => {
                        let digits = [bytes.next().unwrap(), bytes.next().unwrap()];
                        u8::from_str_radix(str::from_utf8(&digits).unwrap(), 16).unwrap()
                    }
                    b'&' | b'=' | b'+' => panic!("{data}"),
                    byte => byte,
                });
            }
            prop_assert_eq!(read, text.into_bytes());
        }
    }
}
