//! Compares the generated parts of the documents with the tables in the code: packaging/docs, the
//! man pages, the journal catalog, the OpenNebula templates and the marketplace appliance.
//! `UPDATE_DOCUMENTS=1 cargo test -p supernode-agent --test documents` regenerates them.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by a panic"
)]

use std::path::{Path, PathBuf};

use supernode_agent::check::{Level, template};
use supernode_agent::cli::variables::as_markdown;
use supernode_agent::config::variables::VARIABLES;
use supernode_agent::gpu::reason::CATALOGUE;
use supernode_agent::gpu::xid::{Class, XIDS};
use supernode_agent::opennebula::templates::{
    NodeKind, OpenNebulaRelease, appliance_markdown, appliance_params, appliance_template, service,
    vm_template,
};

fn in_tree(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(relative)
}

fn read(relative: &str) -> String {
    std::fs::read_to_string(in_tree(relative)).unwrap_or_default()
}

/// Asserts that the file has this text; with `UPDATE_DOCUMENTS`, writes it.
#[track_caller]
fn assert_or_update(relative: &str, expected: &str) {
    if std::env::var_os("UPDATE_DOCUMENTS").is_some() {
        std::fs::write(in_tree(relative), expected).unwrap();
    } else {
        assert_eq!(read(relative), expected, "{relative}: UPDATE_DOCUMENTS=1 regenerates it");
    }
}

/// Replaces the lines between the one that has `opening` and the next one that has `closing`.
fn replace_part(text: &str, opening: &str, closing: &str, part: &str) -> String {
    let start = text.find(opening).expect(opening);
    let start = start + text[start..].find('\n').unwrap() + 1;
    let end = start + text[start..].find(closing).expect(closing);
    format!("{}{part}{}", &text[..start], &text[end..])
}

#[test]
fn documentation_tables_match_the_code() {
    for (page, opening, part) in [
        ("configuration.md", "<!-- from: supernode-agent variables", as_markdown()),
        ("troubleshooting.md", "<!-- from the catalogue", reasons()),
        ("gpu.md", "<!-- from the XIDs", xids()),
    ] {
        let page = format!("packaging/docs/{page}");
        assert_or_update(&page, &replace_part(&read(&page), opening, "<!-- end -->", &part));
    }
}

/// Returns a section per reason, so that a WARNING can link to it.
fn reasons() -> String {
    const COLUMNS: usize = 100;
    let mut sections = String::new();
    for entry in CATALOGUE {
        let meaning = wrap(entry.meaning, COLUMNS).join("\n");
        sections.push_str(&format!("\n### {}\n\n{meaning}\n\n", entry.code));
        for (target, fix) in entry.fix.all() {
            for (number, line) in wrap(&format!("{target}: {fix}"), COLUMNS - 2).iter().enumerate()
            {
                // At the start of a line this would be a quotation.
                let escape = if line.starts_with('>') { "\\" } else { "" };
                let indent = if number == 0 { "- " } else { "  " };
                sections.push_str(&format!("{indent}{escape}{line}\n"));
            }
        }
    }
    sections.push('\n');
    sections
}

fn xids() -> String {
    let mut table =
        String::from("| NVIDIA's recommended action | fatal | XIDs |\n| --- | --- | --- |\n");
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
        "# Explanations that `journalctl -x` adds to a WARNING of supernode-agent.\n\
         # Generated from agent/src/gpu/reason.rs by\n\
         # UPDATE_DOCUMENTS=1 cargo test -p supernode-agent --test documents\n",
    );
    for entry in CATALOGUE {
        let (id, code) = (entry.message_id, entry.code);
        let meaning = wrapped(entry.meaning);
        let fixes: Vec<String> = entry
            .fix
            .all()
            .iter()
            .map(|(target, fix)| wrapped(&format!("{target}: {fix}")))
            .collect();
        let fix = fixes.join("\n");
        catalog.push_str(&format!(
            "\n-- {id}\nSubject: GPU problem: {code}\nDefined-By: supernode-agent\n\
             Documentation: man:supernode-agent(8)\n\n\
             {meaning}\n\nFound on this machine: @FL_GPU_SUMMARY@\n\n{fix}\n"
        ));
    }
    assert_or_update("systemd/supernode-agent.catalog", &catalog);
}

#[test]
fn manual_lists_every_variable_and_reason() {
    let variables: String = VARIABLES
        .iter()
        .map(|variable| {
            let names: Vec<&str> = variable.base_names().collect();
            format!(
                ".TP\n.B {}\n{}{}{}",
                names.join(", "),
                roff_prose(&format!("{}.", variable.description)),
                roff_prose(&format!("Values: {}.", variable.kind.values())),
                roff_prose(&format!("Default: {}.", variable.default))
            )
        })
        .collect();
    let reasons: String = CATALOGUE
        .iter()
        .map(|entry| {
            let (code, meaning) = (roff(entry.code), roff_prose(entry.meaning));
            let fixes =
                entry.fix.all().into_iter().map(|(target, fix)| {
                    format!(".br\n{}", roff_prose(&format!("{target}: {fix}.")))
                });
            format!(
                ".TP\n.B {code}\n{meaning}{}.br\nMESSAGE_ID={}\n",
                fixes.collect::<String>(),
                entry.message_id
            )
        })
        .collect();
    let page = "packaging/man/supernode-agent.8";
    let end = ".\\\" end";
    let text = replace_part(&read(page), ".\\\" from the table of variables", end, &variables);
    assert_or_update(
        page,
        &replace_part(&text, ".\\\" from the catalogue of reasons", end, &reasons),
    );
}

#[test]
fn settings_manual_matches_example_file() {
    let mut settings = String::new();
    let mut comment = String::new();
    let example = read("packaging/examples/agent.toml");
    for line in example.lines().skip_while(|line| !line.starts_with('[')) {
        if let Some(text) = line.strip_prefix('#') {
            comment.push_str(&format!("{}\n", roff(text.trim())));
        } else if line.starts_with('[') {
            settings.push_str(&format!(".SS {line}\n"));
        } else if !line.is_empty() {
            assert!(!comment.is_empty(), "no comment above: {line}");
            settings.push_str(&format!(".TP\n.B {}\n{comment}", roff(line)));
            comment.clear();
        }
    }
    let page = "packaging/man/agent.toml.5";
    assert_or_update(
        page,
        &replace_part(&read(page), ".\\\" from packaging/examples", ".\\\" end", &settings),
    );
}

#[test]
fn vm_templates_have_every_variable_and_pass_check() {
    for (node, file) in [
        (NodeKind::Gpu, "packaging/opennebula/supernode-gpu-6.10.tmpl"),
        (NodeKind::Gpu, "packaging/opennebula/supernode-gpu-7.tmpl"),
        (NodeKind::Cpu, "packaging/opennebula/supernode-cpu-6.10.tmpl"),
        (NodeKind::Cpu, "packaging/opennebula/supernode-cpu-7.tmpl"),
    ] {
        let text =
            replace_part(&read(file), "# from the table of variables", "# end", &vm_template(node));
        assert_or_update(file, &text);
        assert_no_findings(file, &text);
    }
}

#[test]
fn services_have_every_variable_and_pass_check() {
    for (release, file) in [
        (OpenNebulaRelease::V6, "packaging/opennebula/service-6.10.json"),
        (OpenNebulaRelease::V7, "packaging/opennebula/service-7.json"),
    ] {
        let text = format!("{:#}\n", service(release));
        assert_or_update(file, &text);
        assert_no_findings(file, &text);
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
        assert_or_update(&file, &replace_part(&read(&file), TABLE, end, &part));
    }
}

#[track_caller]
fn assert_no_findings(file: &str, text: &str) {
    let found: Vec<_> =
        template::judge(text).into_iter().filter(|check| check.level != Level::Ok).collect();
    assert_eq!(found, [], "{file}");
}

#[test]
fn data_flow_diagram_names_existing_types() {
    let diagram = read("CONTRIBUTING.md");
    let diagram = diagram.split("```mermaid").nth(1).expect("a mermaid diagram");
    let diagram = diagram.split("```").next().unwrap();
    // A node of the diagram: `Name["<b>Type</b><br>file"]`.
    let types: Vec<(&str, &str)> = diagram
        .split("<b>")
        .skip(1)
        .filter_map(|node| node.split_once("</b><br>"))
        .map(|(name, rest)| (name, rest.split('"').next().unwrap()))
        .collect();
    assert!(types.len() > 8, "{types:?}");
    for (name, file) in types {
        let text = read(file);
        let defined = ["struct", "enum"].iter().any(|kind| {
            text.lines().any(|line| {
                line.trim_start_matches("pub")
                    .trim_start_matches("(crate)")
                    .trim_start()
                    .strip_prefix(kind)
                    .and_then(|rest| rest.trim_start().strip_prefix(name))
                    .is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()))
            })
        });
        assert!(defined, "CONTRIBUTING.md: {file} does not define {name}");
    }
}

#[test]
fn contributing_names_existing_code() {
    let text = read("CONTRIBUTING.md");
    let mut references = 0;
    for span in text.split('`').skip(1).step_by(2).filter(|span| !span.contains(' ')) {
        let (path, name) = span.split_once("::").unwrap_or((span, ""));
        if !path.ends_with(".rs") {
            continue;
        }
        let in_agent = format!("agent/src/{path}");
        let file = if in_tree(&in_agent).exists() { in_agent } else { path.to_owned() };
        assert!(in_tree(&file).exists(), "CONTRIBUTING.md: {path} does not exist");
        let code = read(&file);
        let words: Vec<&str> = code.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        let is_defined = name.is_empty()
            || words.windows(2).any(|pair| {
                ["fn", "struct", "enum", "const", "static"].contains(&pair[0]) && pair[1] == name
            });
        assert!(is_defined, "CONTRIBUTING.md: {file} does not define {name}");
        references += 1;
    }
    assert!(references > 30, "{references}");
}

/// Wraps to a width that fits a terminal next to journalctl's margin.
fn wrapped(text: &str) -> String {
    const COLUMNS: usize = 76;
    wrap(text, COLUMNS).join("\n")
}

fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().unwrap();
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > columns {
            lines.push(word.to_owned());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

/// Escapes text for a man page and wraps it.
fn roff_prose(text: &str) -> String {
    const COLUMNS: usize = 100;
    let lines = wrap(&text.replace('\\', "\\e").replace('-', "\\-"), COLUMNS - 2);
    lines.iter().map(|line| format!("{}{line}\n", request_escape(line))).collect()
}

/// Escapes text for a man page: backslashes, literal hyphens, and a line that would be a request.
fn roff(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    format!("{}{text}", request_escape(&text))
}

fn request_escape(line: &str) -> &'static str {
    if line.starts_with(['.', '\'']) { "\\&" } else { "" }
}
