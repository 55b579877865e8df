//! Checks the README and the pages of packaging/docs: a test runs or parses each command, each path
//! exists, and each link has its target in the tree and in the package. A command that no check
//! covers fails the test, with its line.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by a panic"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use supernode_agent::check::{Level, template};
use supernode_agent::cli::visible_command;

/// Commands of other programs, each with the test that runs exactly this command.
const RUN_BY: [(&str, &str); 9] = [
    ("systemctl status flower-supernode", "tests/tests/boot.rs"),
    ("systemctl restart flower-supernode", "tests/tests/boot.rs"),
    ("systemctl reload flower-supernode", "tests/tests/boot.rs"),
    ("systemctl daemon-reload", "tests/tests/boot.rs"),
    ("journalctl -u flower-supernode -p warning -x", "tests/tests/boot.rs"),
    ("journalctl -u docker", "tests/tests/boot.rs"),
    ("journalctl CONTAINER_NAME=flower-supernode", "tests/tests/boot.rs"),
    ("docker logs flower-supernode", "tests/tests/boot.rs"),
    ("docker inspect", "tests/tests/boot.rs"),
];
/// Run by [`documented_service_passes_the_check`].
const SED: &str =
    "sed 's/: -1,/: 12,/; s/: -2,/: 13,/' packaging/opennebula/service-7.json >service.json";
/// Commands that no test runs, with the reason. Other tests cover the files they name: boot.rs
/// installs, removes and purges the package, the templates pass `check template`, and the image
/// passes `make test-image`.
const NOT_RUN: [(&str, &str); 12] = [
    ("apt install ./supernode-agent_*.deb", NO_APT),
    ("apt remove supernode-agent", NO_APT),
    ("apt purge supernode-agent", NO_APT),
    (
        "curl http://127.0.0.1:9401/metrics",
        "tests/tests/metrics.rs reads the endpoint at a port of its own",
    ),
    ("onevm updateconf", NO_FRONT_END),
    ("onehost sync -f", NO_FRONT_END),
    (
        "oneimage create --name supernode --path supernode-base.qcow2 --format qcow2 --prefix vd \
         --datastore default",
        NO_FRONT_END,
    ),
    ("onetemplate create packaging/opennebula/supernode-gpu-7.tmpl", NO_FRONT_END),
    ("onetemplate instantiate supernode-gpu --nic private", NO_FRONT_END),
    ("oneflow-template create service.json", NO_FRONT_END),
    ("oneflow-template instantiate ID", NO_FRONT_END),
    ("oneflow scale ID supernode 5", NO_FRONT_END),
];
const NO_APT: &str = "boot.rs does it with dpkg, in a VM of its own";
const NO_FRONT_END: &str = "it needs an OpenNebula front-end";
/// First words that mark a code span in prose as a command.
const PROGRAMS: [&str; 8] =
    ["supernode-agent", "make", "man", "systemctl", "journalctl", "docker", "apt", "onevm"];
const TREE_PREFIXES: [&str; 7] =
    ["agent/", "one-context/", "packaging/", "systemd/", "tests/", ".ci/", "CONTRIBUTING.md"];
const MAX_README_BYTES: usize = 8192;

fn in_tree(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(relative)
}

fn read(relative: &str) -> String {
    std::fs::read_to_string(in_tree(relative)).expect(relative)
}

/// README.md and the pages of packaging/docs, as paths in the tree.
fn pages() -> Vec<String> {
    let directory = std::fs::read_dir(in_tree("packaging/docs")).unwrap();
    let pages =
        directory.map(|page| format!("packaging/docs/{}", page.unwrap().file_name().display()));
    std::iter::once("README.md".to_owned()).chain(pages).collect()
}

/// A handwritten line. Generated tables are checked by documents.rs, the recorded demo by CI.
struct Line {
    /// File and line number.
    place: String,
    text: String,
    is_code: bool,
}

fn lines() -> Vec<Line> {
    let mut lines = Vec::new();
    for page in pages() {
        let mut is_generated = false;
        let mut is_fenced = false;
        for (number, line) in read(&page).lines().enumerate() {
            if line.starts_with("<!-- ") {
                is_generated = !line.starts_with("<!-- end");
            } else if line.trim_start().starts_with("```") {
                is_fenced = !is_fenced;
            } else if !is_generated {
                let (place, is_code) =
                    (format!("{page}:{}", number + 1), is_fenced || line.starts_with("    "));
                lines.push(Line { place, text: line.trim().to_owned(), is_code });
            }
        }
    }
    lines
}

/// Returns the code spans of `text`.
fn spans(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Returns each command with its place: the lines of code blocks without comments, and code spans
/// in prose that start with the name of a program.
fn commands() -> Vec<(String, String)> {
    let mut commands: Vec<(String, String)> = Vec::new();
    for Line { place, text, is_code } in lines() {
        if is_code {
            let command = text.split("  #").next().unwrap().trim();
            match commands.last_mut() {
                Some((_, first)) if first.ends_with(" \\") => {
                    first.pop();
                    first.push_str(command);
                }
                _ => commands.push((place, command.to_owned())),
            }
            continue;
        }
        for span in spans(&text) {
            if span.split_once(' ').is_some_and(|(program, _)| PROGRAMS.contains(&program)) {
                commands.push((place.clone(), span.to_owned()));
            }
        }
    }
    commands.retain(|(_, command)| !command.is_empty());
    commands
}

/// Checks one command, or returns why it is wrong or not covered.
fn check(command: &str) -> Result<(), String> {
    let words: Vec<&str> = command.split_whitespace().collect();
    if let Some(path) = words.iter().find(|word| is_tree_path(word) && !in_tree(word).exists()) {
        return Err(format!("{path} does not exist"));
    }
    match words[..] {
        ["supernode-agent", ..] => visible_command()
            .try_get_matches_from(&words)
            .map(drop)
            .map_err(|error| error.to_string()),
        ["make", target, ..] => {
            match read("Makefile").lines().any(|line| line.starts_with(&format!("{target}: "))) {
                true => Ok(()),
                false => Err(format!("the Makefile has no {target}")),
            }
        }
        ["make"] => Ok(()),
        ["man", page] => {
            match ["5", "8"].iter().any(|n| in_tree(&format!("packaging/man/{page}.{n}")).exists())
            {
                true => Ok(()),
                false => Err("packaging/man has no such page".into()),
            }
        }
        [program, ..] if is_tree_path(program) => Ok(()),
        _ if command == SED || NOT_RUN.iter().any(|(known, _)| *known == command) => Ok(()),
        _ => match RUN_BY.iter().find(|(run, _)| *run == command) {
            Some((_, file)) if read(file).contains(command) => Ok(()),
            Some((_, file)) => Err(format!("{file} no longer runs it")),
            None => Err("no check covers it: see agent/tests/readme.rs".into()),
        },
    }
}

fn is_tree_path(word: &str) -> bool {
    TREE_PREFIXES.iter().any(|part| word.starts_with(part))
}

#[test]
fn every_documented_command_is_run_or_checked() {
    let commands = commands();
    assert!(commands.len() > 30, "found too few commands: {commands:?}");
    let wrong: Vec<String> = commands
        .iter()
        .filter_map(|(place, command)| {
            Some(format!("{place}: {command}: {}", check(command).err()?))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let listed = RUN_BY.iter().chain(&NOT_RUN).map(|(listed, _)| *listed);
    let unused: Vec<_> =
        listed.filter(|listed| !commands.iter().any(|(_, command)| command == listed)).collect();
    assert!(unused.is_empty(), "not on any page: {unused:?}");
}

#[test]
fn detects_an_invalid_command() {
    for command in [
        "supernode-agent status --wach",
        "supernode-agent stat",
        "make dmeo",
        "man supernode",
        "packaging/images/biuld.sh pytorch",
        "onetemplate create packaging/opennebula/supernode-gpu-8.tmpl",
        "systemctl start flower-supernode",
        "curl example.org | sh",
    ] {
        assert!(check(command).is_err(), "{command}");
    }
}

#[test]
fn every_documented_flag_exists() {
    fn has_flag(command: &clap::Command, flag: &str) -> bool {
        command.get_arguments().any(|argument| argument.get_long() == Some(flag))
            || command.get_subcommands().any(|sub| has_flag(sub, flag))
    }
    for Line { place, text, .. } in lines().iter().filter(|line| !line.is_code) {
        for flag in spans(text).filter_map(|span| span.strip_prefix("--")) {
            let flag = flag.split([' ', '=']).next().unwrap();
            assert!(has_flag(&visible_command(), flag), "{place}: --{flag}");
        }
    }
}

#[test]
fn every_documented_path_exists() {
    for Line { place, text, .. } in lines().iter().filter(|line| !line.is_code) {
        for path in spans(text).filter(|span| is_tree_path(span) && !span.contains(' ')) {
            assert!(in_tree(path).exists(), "{place}: {path}");
        }
    }
}

#[test]
fn every_link_resolves_in_tree_and_package() {
    let assets = read("agent/Cargo.toml");
    for page in pages() {
        let directory = Path::new(&page).parent().unwrap();
        let text = read(&page);
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            if path.starts_with("https://") {
                continue;
            }
            let target = if path.is_empty() { page.clone().into() } else { directory.join(path) };
            let target_page = target.to_str().unwrap();
            assert!(in_tree(target_page).exists(), "{page}: {link}");
            if !anchor.is_empty() {
                let has_anchor = read(target_page)
                    .lines()
                    .any(|line| line.starts_with("##") && anchor_of(line) == anchor);
                assert!(has_anchor, "{page}: {link}");
            }
            let parent = target.parent().unwrap().display().to_string();
            let parent = if parent.is_empty() { parent } else { format!("{parent}/") };
            assert!(
                assets.contains(&format!("\"usr/share/doc/supernode-agent/{parent}\"")),
                "{page}: the package does not contain {link}; name it as code, without a link"
            );
        }
    }
}

#[test]
fn readme_links_every_page() {
    let readme = read("README.md");
    for page in pages().iter().filter(|page| *page != "README.md") {
        assert!(readme.contains(&format!("]({page})")), "README.md does not link {page}");
    }
}

#[test]
fn readme_has_at_most_8_kib() {
    let bytes = read("README.md").len();
    assert!(bytes <= MAX_README_BYTES, "{bytes} bytes");
}

/// Returns the anchor that GitHub derives from a heading.
fn anchor_of(heading: &str) -> String {
    let words = heading.trim_start_matches(['#', ' ']).to_lowercase();
    words
        .chars()
        .filter(|c| c.is_alphanumeric() || " -".contains(*c))
        .collect::<String>()
        .replace(' ', "-")
}

#[test]
fn documented_service_passes_the_check() {
    let to_stdout = SED.split(" >").next().unwrap();
    let output =
        Command::new("sh").args(["-c", to_stdout]).current_dir(in_tree("")).output().unwrap();
    let service = String::from_utf8(output.stdout).unwrap();
    assert!(service.contains(": 12,") && service.contains(": 13,"), "{service}");
    let found: Vec<_> =
        template::judge(&service).into_iter().filter(|check| check.level != Level::Ok).collect();
    assert_eq!(found, []);
}

#[test]
fn template_names_match_the_commands() {
    let template = read("packaging/opennebula/supernode-gpu-7.tmpl");
    for attribute in [r#"NAME="supernode-gpu""#, r#"IMAGE="supernode""#] {
        assert!(template.contains(attribute), "{attribute}");
    }
}
