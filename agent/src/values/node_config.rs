use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::error::ValidationError;
use super::text::escape;

/// Node configuration for the ClientApp, in the syntax of `flower-supernode --node-config`. Flower
/// accepts every valid value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig(String);

impl NodeConfig {
    /// Parses space-separated `key=value` pairs whose values are TOML scalars.
    ///
    /// Flower (`flwr/common/config.py`, `parse_config_args`) finds pairs with a regular expression,
    /// silently drops what does not match, and parses the rest as TOML. This function rejects
    /// everything that Flower would drop or fail on.
    ///
    /// # Errors
    /// When a pair is invalid. The error names the pair, but never repeats a value, because values
    /// may be secret.
    pub fn parse(text: &str) -> Result<Self, ValidationError> {
        const ACCEPTED: &str = "must be space-separated key=value pairs, each value a TOML string \
                                in quotes, a number, true or false";
        let text = text.trim();
        if text.len() > MAX_ARGUMENT_BYTES {
            return Err(ValidationError::with_detail(
                format!(
                    "must be at most {MAX_ARGUMENT_BYTES} bytes, the maximum length of one \
                     argument on Linux"
                ),
                format!("it has {}", text.len()),
            ));
        }
        let hidden = Self::may_hold_secret(text);
        let invalid = |number: usize, key: &str, why: &str| {
            // The text in the position of a key may be the second half of a secret that contains
            // whitespace.
            let position = if hidden || key.is_empty() {
                format!("pair {number}")
            } else {
                format!("at '{}'", escape(key))
            };
            ValidationError::with_detail(ACCEPTED, format!("{position}: {why}"))
        };
        let mut keys = KeyTree::default();
        let mut document = String::new();
        let mut rest = text;
        for number in 1.. {
            if rest.is_empty() {
                break;
            }
            let (key, value, after) =
                next_pair(rest).map_err(|(key, why)| invalid(number, key, why))?;
            check_pair(key, value).map_err(|why| invalid(number, key, why))?;
            if !keys.insert(key) {
                return Err(invalid(
                    number,
                    key,
                    "the key is repeated, or one key is a prefix of another",
                ));
            }
            document.push_str(&format!("{key} = {value}\n"));
            rest = after.trim_start();
        }
        // Flower parses all pairs as one document. This also catches a key with more parts than the
        // TOML parser allows.
        if document.parse::<toml::Table>().is_err() {
            return Err(ValidationError::with_detail(
                ACCEPTED,
                "the pairs do not form a valid TOML document",
            ));
        }
        Ok(Self(text.into()))
    }

    /// Returns the value of `--node-config`, as the operator wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns whether `text` has a key that suggests a secret, or a value that looks like one.
    /// Such a text is never printed, not even in an error.
    pub fn may_hold_secret(text: &str) -> bool {
        suggests_secret(text) || looks_like_secret(text)
    }

    /// Returns the text with the possible secrets replaced: values whose key suggests a secret, and
    /// values that look like one.
    pub fn redacted(&self) -> String {
        if !Self::may_hold_secret(&self.0) {
            return self.0.clone();
        }
        let mut pairs = Vec::new();
        let mut rest = self.0.as_str();
        while let Ok((key, value, after)) = next_pair(rest) {
            let value =
                if suggests_secret(key) || looks_like_secret(value) { "'(hidden)'" } else { value };
            pairs.push(format!("{key}={value}"));
            rest = after.trim_start();
        }
        pairs.join(" ")
    }
}

/// Maximum length of one program argument on Linux: MAX_ARG_STRLEN, 32 pages, less the terminating
/// NUL (execve(2)).
const MAX_ARGUMENT_BYTES: usize = 32 * 4096 - 1;

/// Keys seen so far, as the tree of tables that TOML builds from dotted keys.
#[derive(Default)]
struct KeyTree<'t> {
    /// Maps (number of the parent table, part of the key) to the number of a table, or to `None`
    /// for a value.
    nodes: HashMap<(usize, &'t str), Option<usize>>,
}

impl<'t> KeyTree<'t> {
    /// Inserts a key; returns `false` if it is taken by a value or by a table.
    fn insert(&mut self, key: &'t str) -> bool {
        let (tables, name) =
            key.rsplit_once('.').map_or((None, key), |(tables, name)| (Some(tables), name));
        let mut table = 0;
        for part in tables.into_iter().flat_map(|tables| tables.split('.')) {
            let number = self.nodes.len() + 1;
            match self.nodes.entry((table, part)).or_insert(Some(number)) {
                Some(inner) => table = *inner,
                None => return false,
            }
        }
        match self.nodes.entry((table, name)) {
            Entry::Occupied(_) => false,
            Entry::Vacant(free) => {
                free.insert(None);
                true
            }
        }
    }
}

/// Returns whether `text` contains a word that suggests a secret. Most count anywhere in the text;
/// those that are part of harmless words count as whole words only.
fn suggests_secret(text: &str) -> bool {
    const ANYWHERE: [&str; 8] = [
        "password",
        "passwd",
        "passphrase",
        "secret",
        "token",
        "apikey",
        "privatekey",
        "accesskey",
    ];
    const WHOLE_WORD: [&str; 15] = [
        "key",
        "keys",
        "pw",
        "pwd",
        "pass",
        "dbpass",
        "psk",
        "jwt",
        "auth",
        "credential",
        "credentials",
        "creds",
        "bearer",
        "cookie",
        "cookies",
    ];
    let lower = text.to_ascii_lowercase();
    // `apiKey` and `api-key` are both two words.
    let mut words = String::new();
    for c in text.chars() {
        if c.is_ascii_uppercase() && words.ends_with(|before: char| before.is_ascii_lowercase()) {
            words.push(' ');
        }
        words.push(if c.is_ascii_alphabetic() { c } else { ' ' });
    }
    let words = words.to_ascii_lowercase();
    ANYWHERE.iter().any(|part| lower.contains(part))
        || words.split(' ').any(|word| WHOLE_WORD.contains(&word))
}

/// Returns whether `text` has the form of a secret: a URL with a user, which probably includes a
/// password, or a private key.
fn looks_like_secret(text: &str) -> bool {
    text.split_once("://").is_some_and(|(_, rest)| rest.contains('@'))
        || text.contains("PRIVATE KEY-----")
}

/// Splits the first pair off `text`: the key, the value with its quotes, and the rest. The error is
/// the key (empty if there is none) and the reason.
fn next_pair(text: &str) -> Result<(&str, &str, &str), (&str, &'static str)> {
    let word_end = text.find(char::is_whitespace).unwrap_or(text.len());
    let Some(equals) = text[..word_end].find('=') else {
        return Err((&text[..word_end], "'=' and a value are missing"));
    };
    let (key, value_on) = (&text[..equals], &text[equals + 1..]);
    let value_end = match value_on.chars().next() {
        Some(quote @ ('"' | '\'')) => {
            let Some(length) = value_on[1..].find(quote) else {
                return Err((key, "the closing quote is missing"));
            };
            length + 2
        }
        _ => value_on.find(char::is_whitespace).unwrap_or(value_on.len()),
    };
    let (value, after) = value_on.split_at(value_end);
    if value.is_empty() {
        return Err((key, "the value is missing"));
    }
    if after.chars().next().is_some_and(|c| !c.is_whitespace()) {
        return Err((
            key,
            "whitespace must follow the closing quote (a value cannot contain its own quote)",
        ));
    }
    Ok((key, value, after))
}

fn check_pair(key: &str, value: &str) -> Result<(), &'static str> {
    let bare = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    };
    if key.starts_with('-') || !key.split('.').all(bare) {
        return Err(
            "a key consists of letters, digits, '_', '-' and '.', and cannot start with '-'",
        );
    }
    if !value.starts_with(['"', '\'']) && value.contains('#') {
        return Err("'#' starts a comment and Flower would drop the rest: put the value in quotes");
    }
    // Escapes of TOML 1.1; Flower's parser implements TOML 1.0.
    let escapes = value.replace(r"\\", "");
    if value.starts_with('"') && (escapes.contains(r"\e") || escapes.contains(r"\x")) {
        return Err("the value is not TOML");
    }
    let table: toml::Table =
        format!("value = {value}").parse().map_err(|_| "the value is not TOML")?;
    match table.get("value") {
        Some(
            toml::Value::String(_)
            | toml::Value::Integer(_)
            | toml::Value::Float(_)
            | toml::Value::Boolean(_),
        ) => Ok(()),
        _ => Err("the value must be a string, a number, true or false"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::values::error::tests::assert_rejects;

    /// `parse_config_args` of flwr 1.31.0 accepts each of these.
    #[test]
    fn accepts_what_flower_accepts() {
        for text in [
            "k=0",
            "k=\"abc\"",
            "k=true",
            "k=1e-3",
            "a.b=1",
            "partition-id=0 num-partitions=2",
            "a=1\n b=2\tc=3",
            "site=\"St. Mary\"",
            "x='\"; touch /pwned; \"'",
            "k='$(id) `id` \\'",
            "k=\"C:\\\\etc\"",
            "n=-1",
            "n=0x1F",
            "n=1_000",
            "f=inf",
            "k=''",
            "k='a#b' j=\"#\"",
            "a.b=1 a.c=2 b.a=3",
            &format!("{}k=1", "k.".repeat(50)),
        ] {
            assert_eq!(NodeConfig::parse(text).expect(text).as_str(), text);
        }
    }

    #[test]
    fn rejects_what_flower_would_drop_or_fail_on() {
        assert_rejects(
            NodeConfig::parse,
            &[
                "novalue",
                "x=",
                "x= y=1",
                "k=abc",
                "k=/app/data",
                "k=True",
                "a=1,b=2",
                "k=1 k=2",
                "a=1 a.b=2",
                "k=[1]",
                "k={a=1}",
                "k=1979-05-27",
                "k=07:32:00",
                "site='St. Mary''s'",
                "x\"; touch /pwned; \"",
                "k=\"open",
                "k='a'b",
                "=1",
                "-k=1",
                "k=99999999999999999999",
                "k=\"\\e\"",
                "k=\"a\nb\"",
                "a b=1",
                "pairs.toml",
                "k=\"\"\"a\"\"\"",
                // To Flower this is a comment: k is 1 or true, and b is missing.
                "k=1#b=2",
                "a=1 k=true#",
                "a=1 # b=2",
                "a.b=1 a=2",
                "a.b.c=1 a.b=2",
                "a.b=1 a.b=2",
                &format!("{}k=1", "k.".repeat(60_000)),
            ],
        );
    }

    #[test]
    fn length_is_limited_to_one_argument() {
        let longest = format!("k='{}'", "x".repeat(131_071 - 4));
        assert_eq!(NodeConfig::parse(&format!(" {longest} ")).unwrap().as_str(), longest);
        let error = NodeConfig::parse(&longest.replace("k=", "ke=")).unwrap_err().to_string();
        assert!(
            error.starts_with("must be at most 131071 bytes") && error.ends_with("it has 131072"),
            "{error}"
        );
    }

    #[test]
    fn duplicate_key_is_found_among_thousands() {
        let mut keys = KeyTree::default();
        let names: Vec<String> = (0..10_000).map(|n| format!("t.{}.k{n}", n % 7)).collect();
        assert!(names.iter().all(|name| keys.insert(name)));
        // One node for `t`, one for each table in it, one for each value: the cost of a key does
        // not grow with the number of keys.
        assert_eq!(keys.nodes.len(), 1 + 7 + 10_000);
        for taken in ["t", "t.3", "t.0.k0", "t.3.k9999.deeper"] {
            assert!(!keys.insert(taken), "{taken}");
        }
        assert!(keys.insert("t.7") && keys.insert("t.8.k0") && keys.insert("k0"));
        let many: String = (0..14_000).map(|n| format!("a{n}=1 ")).collect();
        assert!(NodeConfig::parse(&many).is_ok());
    }

    #[test]
    fn redacted_hides_secrets() {
        let config = NodeConfig::parse("a=1  db-password=\"x y\" API_TOKEN=\"t\"").unwrap();
        assert_eq!(config.redacted(), "a=1 db-password='(hidden)' API_TOKEN='(hidden)'");
        assert_eq!(NodeConfig::parse("a=1  b=2").unwrap().redacted(), "a=1  b=2");
        for key in [
            "key",
            "api-key",
            "sshKey",
            "db.pwd",
            "PASS",
            "DBPASS",
            "wifi_psk",
            "jwt",
            "auth",
            "aws-credentials",
            "bearer2",
            "cookie",
            "oauthToken",
            "my.secret.name",
        ] {
            let config = NodeConfig::parse(&format!("{key}='hunter2' a=1")).unwrap();
            assert_eq!(config.redacted(), format!("{key}='(hidden)' a=1"));
        }
        for value in
            ["postgres://u:hunter2@h/d", "https://hunter2@h/", "-----BEGIN PRIVATE KEY-----hunter2"]
        {
            let config =
                NodeConfig::parse(&format!("dsn=\"{value}\" url='http://h/' mail='a@b'")).unwrap();
            assert_eq!(config.redacted(), "dsn='(hidden)' url='http://h/' mail='a@b'");
        }
        for key in ["monkey", "keyboard", "author", "passenger", "compass", "cookiecutter", "k"] {
            let text = format!("{key}='seen'");
            assert_eq!(NodeConfig::parse(&text).unwrap().redacted(), text);
        }
    }

    #[test]
    fn error_shows_nothing_of_a_possible_secret() {
        for (text, position) in [
            ("password hunter2", "; pair 1: "),
            ("db-password=hunter two=3", "; pair 1: "),
            ("a=1 db-password='x' hunter2", "; pair 3: "),
            ("a=1 hunter2 api-key='x'", "; pair 2: "),
            ("key='hunter2' key='two'", "; pair 2: "),
            ("auth='x'hunter2", "; pair 1: "),
            ("pwd='x' hunter2\"='y'", "; pair 2: "),
            ("url=http://u:hunter2@h/", "; pair 1: "),
        ] {
            assert!(NodeConfig::may_hold_secret(text));
            let error = NodeConfig::parse(text).expect_err(text).to_string();
            assert!(!error.contains("hunter") && !error.contains("two"), "{error}");
            assert!(error.contains(position), "{text}: {error}");
        }
        let error = NodeConfig::parse("a=1 site=North").unwrap_err().to_string();
        assert!(error.ends_with("; at 'site': the value is not TOML"), "{error}");
    }

    #[test]
    fn error_is_escaped_and_bounded() {
        let text = format!("\x1b{}", "x".repeat(9000));
        let error = NodeConfig::parse(&text).unwrap_err().to_string();
        assert!(error.len() < 500 && !error.contains('\x1b'), "{error}");
        assert!(error.contains("\\u{1b}xxx"), "{error}");
    }

    proptest! {
        #[test]
        fn quoted_pairs_are_accepted(
            pairs in proptest::collection::btree_map("[a-z][a-z-]{0,8}", "[ -&(-~]{0,12}", 0..5),
        ) {
            let pairs: Vec<_> =
                pairs.iter().map(|(key, value)| format!("{key}='{value}'")).collect();
            prop_assert!(NodeConfig::parse(&pairs.join(" ")).is_ok(), "{:?}", pairs);
        }
    }
}
