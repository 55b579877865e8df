//! The README's tables are those of the code. To renew them: `UPDATE_README=1 cargo test -p supernode-agent --test readme`.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test fails by a panic")]

use std::path::Path;

use supernode_agent::cli::variables::as_markdown;
use supernode_agent::gpu::reason::CATALOGUE;

/// What the catalogue makes of the table of reasons.
fn reasons() -> String {
    let mut table = String::from("| code | what it means | fix |\n| --- | --- | --- |\n");
    for entry in CATALOGUE {
        let fix = entry.fix.replace('|', "\\|");
        table.push_str(&format!("| `{}` | {} | {fix} |\n", entry.code, entry.meaning));
    }
    table
}

/// `text` with `table` between the comment that begins with `opening` and the next `<!-- end -->`.
fn with_table(text: &str, opening: &str, table: &str) -> String {
    let start = text.find(opening).expect(opening);
    let start = start + text[start..].find('\n').unwrap() + 1;
    let end = start + text[start..].find("<!-- end -->").unwrap();
    format!("{}{table}{}", &text[..start], &text[end..])
}

#[test]
fn the_tables_of_the_readme_are_those_of_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let present = std::fs::read_to_string(&path).unwrap();
    let expected = with_table(&present, "<!-- from: supernode-agent variables", &as_markdown());
    let expected = with_table(&expected, "<!-- from the catalogue", &reasons());
    if std::env::var_os("UPDATE_README").is_some() {
        std::fs::write(&path, &expected).unwrap();
    } else {
        assert_eq!(present, expected, "UPDATE_README=1 renews the tables");
    }
}
