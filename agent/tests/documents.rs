//! What is written from the tables of the code is what they say: the README, the journal catalog,
//! the man pages, the shell completions. To renew them: `UPDATE_DOCUMENTS=1 cargo test -p
//! supernode-agent --test documents`.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by a panic"
)]

use std::path::{Path, PathBuf};

use clap_complete::{Shell, generate};
use supernode_agent::check::{Level, template};
use supernode_agent::cli::variables::as_markdown;
use supernode_agent::cli::visible_command;
use supernode_agent::config::variables::VARIABLES;
use supernode_agent::gpu::reason::CATALOGUE;
use supernode_agent::gpu::xid::{Class, XIDS};
use supernode_agent::opennebula::templates::{
    Node, Release, appliance_markdown, appliance_params, appliance_template, service, vm_template,
};

fn in_tree(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(relative)
}

fn read(relative: &str) -> String {
    std::fs::read_to_string(in_tree(relative)).unwrap_or_default()
}

/// The file is this text; with `UPDATE_DOCUMENTS` it becomes so.
#[track_caller]
fn is_or_becomes(relative: &str, expected: &str) {
    if std::env::var_os("UPDATE_DOCUMENTS").is_some() {
        std::fs::write(in_tree(relative), expected).unwrap();
    } else {
        assert_eq!(read(relative), expected, "{relative}: UPDATE_DOCUMENTS=1 renews it");
    }
}

/// `text` with `part` between the line that has `opening` and the next line that has `closing`.
fn with_part(text: &str, opening: &str, closing: &str, part: &str) -> String {
    let start = text.find(opening).expect(opening);
    let start = start + text[start..].find('\n').unwrap() + 1;
    let end = start + text[start..].find(closing).expect(closing);
    format!("{}{part}{}", &text[..start], &text[end..])
}

#[test]
fn documentation_tables_match_the_code() {
    let mut reasons = String::from("| code | what it means | fix |\n| --- | --- | --- |\n");
    for entry in CATALOGUE {
        let fixes: Vec<String> =
            entry.fix.all().iter().map(|(whose, fix)| of_one(whose, fix)).collect();
        let fix = fixes.join("<br>").replace('|', "\\|");
        reasons.push_str(&format!("| `{}` | {} | {fix} |\n", entry.code, entry.meaning));
    }
    let end = "<!-- end -->";
    let text =
        with_part(&read("README.md"), "<!-- from: supernode-agent variables", end, &as_markdown());
    is_or_becomes("README.md", &with_part(&text, "<!-- from the catalogue", end, &reasons));
    let page = "packaging/docs/gpu.md";
    is_or_becomes(page, &with_part(&read(page), "<!-- from the XIDs", end, &xids()));
}

fn xids() -> String {
    let mut table = String::from("| the XID says | fatal | XIDs |\n| --- | --- | --- |\n");
    for class in Class::ALL {
        let of_class = XIDS.iter().filter(|entry| entry.class == class);
        let numbers: Vec<String> = of_class.map(|entry| entry.number.to_string()).collect();
        let fatal = if class.is_fatal() { "yes" } else { "no" };
        table.push_str(&format!("| {} | {fatal} | {} |\n", class.advice(), numbers.join(", ")));
    }
    table
}

#[test]
fn journal_catalog_explains_every_reason() {
    let mut catalog = String::from(
        "# What `journalctl -x` adds to a WARNING of supernode-agent. Made from the catalogue, agent/src/gpu/reason.rs, by\n\
         # UPDATE_DOCUMENTS=1 cargo test -p supernode-agent --test documents\n",
    );
    for entry in CATALOGUE {
        let (id, code) = (entry.message_id, entry.code);
        let meaning = wrapped(entry.meaning);
        let fixes: Vec<String> = entry
            .fix
            .all()
            .iter()
            .map(|(whose, fix)| wrapped(&format!("{whose}: {fix}")))
            .collect();
        let fix = fixes.join("\n");
        catalog.push_str(&format!(
            "\n-- {id}\nSubject: No usable GPU: {code}\nDefined-By: supernode-agent\nDocumentation: man:supernode-agent(8)\n\n\
             {meaning}\n\nFound on this machine: @FL_GPU_SUMMARY@\n\n{fix}\n"
        ));
    }
    is_or_becomes("systemd/supernode-agent.catalog", &catalog);
}

#[test]
fn manual_lists_every_variable_and_reason() {
    let variables: String = VARIABLES
        .iter()
        .map(|variable| {
            let names: Vec<String> = std::iter::once(&variable.name)
                .chain(variable.also)
                .map(|n| n.to_string())
                .collect();
            let (about, values, unset) = (variable.about, variable.kind.values(), variable.unset);
            format!(
                ".TP\n.B {}\n{}.\nValues: {}.\nUnset: {}.\n",
                names.join(", "),
                roff(about),
                roff(&values),
                roff(unset)
            )
        })
        .collect();
    let reasons: String = CATALOGUE
        .iter()
        .map(|entry| {
            let (code, meaning) = (roff(entry.code), roff(entry.meaning));
            let fixes = entry
                .fix
                .all()
                .into_iter()
                .map(|(whose, fix)| format!(".br\n{whose}: {}.\n", roff(fix)));
            format!(
                ".TP\n.B {code}\n{meaning}\n{}.br\nMESSAGE_ID={}\n",
                fixes.collect::<String>(),
                entry.message_id
            )
        })
        .collect();
    let page = "packaging/man/supernode-agent.8";
    let end = ".\\\" end";
    let text = with_part(&read(page), ".\\\" from the table of variables", end, &variables);
    is_or_becomes(page, &with_part(&text, ".\\\" from the catalogue of reasons", end, &reasons));
}

#[test]
fn settings_manual_matches_example_file() {
    let mut settings = String::new();
    for line in
        read("packaging/examples/agent.toml").lines().skip_while(|line| !line.starts_with('['))
    {
        let (setting, about) = line.split_once('#').unwrap_or((line, ""));
        match (setting.trim(), roff(about.trim())) {
            ("", _) => {}
            (section, _) if section.starts_with('[') => {
                settings.push_str(&format!(".SS {section}\n"))
            }
            (setting, about) if about.is_empty() => {
                settings.push_str(&format!(".TP\n.B {}\n", roff(setting)))
            }
            (setting, about) => {
                settings.push_str(&format!(".TP\n.B {}\n{about}.\n", roff(setting)))
            }
        }
    }
    let page = "packaging/man/agent.toml.5";
    is_or_becomes(
        page,
        &with_part(&read(page), ".\\\" from packaging/examples", ".\\\" end", &settings),
    );
}

#[test]
fn vm_templates_have_every_variable_and_pass_check() {
    for (node, file) in [
        (Node::Gpu, "packaging/opennebula/supernode-gpu-6.10.tmpl"),
        (Node::Gpu, "packaging/opennebula/supernode-gpu-7.tmpl"),
        (Node::Cpu, "packaging/opennebula/supernode-cpu-6.10.tmpl"),
        (Node::Cpu, "packaging/opennebula/supernode-cpu-7.tmpl"),
    ] {
        let text =
            with_part(&read(file), "# from the table of variables", "# end", &vm_template(node));
        is_or_becomes(file, &text);
        is_without_finding(file, &text);
    }
}

#[test]
fn services_have_every_variable_and_pass_check() {
    for (release, file) in [
        (Release::V6, "packaging/opennebula/service-6.10.json"),
        (Release::V7, "packaging/opennebula/service-7.json"),
    ] {
        let text = format!("{:#}\n", service(release));
        is_or_becomes(file, &text);
        is_without_finding(file, &text);
    }
}

#[test]
fn appliance_has_every_variable() {
    const TABLE: &str = "from the table of variables";
    for (file, end, part) in [
        ("appliance.sh", "# end", appliance_params()),
        ("9470177f-a0dd-450b-90eb-e4325ac71e7e.yaml", "  # end", appliance_template()),
        ("README.md", "<!-- end -->", appliance_markdown()),
    ] {
        let file = format!("packaging/marketplace/appliances/flower-supernode/{file}");
        is_or_becomes(&file, &with_part(&read(&file), TABLE, end, &part));
    }
}

#[track_caller]
fn is_without_finding(file: &str, text: &str) {
    let found: Vec<_> =
        template::judge(text).into_iter().filter(|check| check.level != Level::Ok).collect();
    assert_eq!(found, [], "{file}");
}

#[test]
fn shell_completions_match_the_command_line() {
    for (shell, file) in [
        (Shell::Bash, "packaging/completions/supernode-agent.bash"),
        (Shell::Fish, "packaging/completions/supernode-agent.fish"),
        (Shell::Zsh, "packaging/completions/_supernode-agent"),
    ] {
        let mut script = Vec::new();
        generate(shell, &mut visible_command(), "supernode-agent", &mut script);
        is_or_becomes(file, &String::from_utf8(script).unwrap());
    }
}

/// A fix in a table that has a column for it.
fn of_one(whose: &str, fix: &str) -> String {
    match whose.strip_prefix("Fix ") {
        Some(whose) => format!("{whose}: {fix}"),
        None => fix.to_owned(),
    }
}

/// In lines that fit a terminal beside journalctl's mark.
fn wrapped(text: &str) -> String {
    const COLUMNS: usize = 76;
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().unwrap();
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > COLUMNS {
            lines.push(word.to_owned());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines.join("\n")
}

/// For a line of a man page: a backslash, a hyphen that stands for itself, a line that looks like a
/// request.
fn roff(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}
