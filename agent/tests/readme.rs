//! The README and its pages do not lie: each command in them is run or checked, each link leads
//! somewhere, in the tree and in the package. A command that no check covers fails the test, with
//! its line.

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

/// What other programs are asked for, and the test that runs the very words.
const RUN_BY: [(&str, &str); 8] = [
    ("systemctl status flower-supernode", "tests/tests/boot.rs"),
    ("systemctl restart flower-supernode", "tests/tests/boot.rs"),
    ("systemctl reload flower-supernode", "tests/tests/boot.rs"),
    ("systemctl daemon-reload", "tests/tests/boot.rs"),
    ("journalctl -u flower-supernode -p warning -x", "tests/tests/boot.rs"),
    ("journalctl -u docker", "tests/tests/boot.rs"),
    ("journalctl CONTAINER_NAME=flower-supernode", "tests/tests/boot.rs"),
    ("docker logs flower-supernode", "tests/tests/boot.rs"),
];
/// Run below.
const SED: &str =
    "sed 's/: -1,/: 12,/; s/: -2,/: 13,/' packaging/opennebula/service-7.json >service.json";
/// What no test runs, and why. The files that are named are checked: the package is installed into
/// the machines of boot.rs and into the image, the templates pass `check template`, the image
/// passes `make test-image`.
const NOT_RUN: [(&str, &str); 9] = [
    (
        "apt install ./supernode-agent_*.deb",
        "it would install a daemon on the machine of the tests",
    ),
    (
        "curl http://127.0.0.1:9401/metrics",
        "the tests read the page at ports of their own: tests/tests/metrics.rs",
    ),
    ("onehost sync -f", NO_CLOUD),
    (
        "oneimage create --name supernode --path supernode-base.qcow2 --format qcow2 --prefix vd --datastore default",
        NO_CLOUD,
    ),
    ("onetemplate create packaging/opennebula/supernode-gpu-7.tmpl", NO_CLOUD),
    ("onetemplate instantiate supernode-gpu --nic private", NO_CLOUD),
    ("oneflow-template create service.json", NO_CLOUD),
    ("oneflow-template instantiate ID", NO_CLOUD),
    ("oneflow scale ID supernode 5", NO_CLOUD),
];
const NO_CLOUD: &str = "it needs a front-end of OpenNebula";
/// Where commands are looked for in the midst of a text, by their first word.
const PROGRAMS: [&str; 8] =
    ["supernode-agent", "make", "man", "systemctl", "journalctl", "docker", "apt", "onevm"];
const PARTS_OF_THE_TREE: [&str; 7] =
    ["agent/", "one-context/", "packaging/", "systemd/", "tests/", ".ci/", "CONTRIBUTING.md"];

fn in_tree(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(relative)
}

fn read(relative: &str) -> String {
    std::fs::read_to_string(in_tree(relative)).expect(relative)
}

/// The README and its pages, by their paths in the tree.
fn pages() -> Vec<String> {
    let folder = std::fs::read_dir(in_tree("packaging/docs")).unwrap();
    let pages =
        folder.map(|page| format!("packaging/docs/{}", page.unwrap().file_name().display()));
    std::iter::once("README.md".to_owned()).chain(pages).collect()
}

/// A line that somebody wrote by hand: not of a table that is made from the code, nor of the
/// recorded demo, which is compared with each run of CI.
struct Line {
    /// File and number.
    place: String,
    text: String,
    is_code: bool,
}

fn lines() -> Vec<Line> {
    let mut lines = Vec::new();
    for page in pages() {
        let mut is_made = false;
        let mut is_fenced = false;
        for (number, line) in read(&page).lines().enumerate() {
            if line.starts_with("<!-- ") {
                is_made = !line.starts_with("<!-- end");
            } else if line.trim_start().starts_with("```") {
                is_fenced = !is_fenced;
            } else if !is_made {
                let (place, is_code) =
                    (format!("{page}:{}", number + 1), is_fenced || line.starts_with("    "));
                lines.push(Line { place, text: line.trim().to_owned(), is_code });
            }
        }
    }
    lines
}

/// What stands between backticks.
fn spans(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The commands, each with its place: code without its comment, and in a text what begins with a
/// program's name.
fn commands() -> Vec<(String, String)> {
    let mut commands = Vec::new();
    for Line { place, text, is_code } in lines() {
        if is_code {
            let command = text.split("  #").next().unwrap().trim();
            commands.push((place, command.to_owned()));
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

/// Why this command cannot be right; `Ok` where a check covers it.
fn check(command: &str) -> Result<(), String> {
    let words: Vec<&str> = command.split_whitespace().collect();
    if let Some(path) = words.iter().find(|word| is_of_the_tree(word) && !in_tree(word).exists()) {
        return Err(format!("there is no {path}"));
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
                false => Err("there is no such page in packaging/man".into()),
            }
        }
        [program, ..] if is_of_the_tree(program) => Ok(()),
        _ if command == SED || NOT_RUN.iter().any(|(known, _)| *known == command) => Ok(()),
        _ => match RUN_BY.iter().find(|(run, _)| *run == command) {
            Some((_, file)) if read(file).contains(command) => Ok(()),
            Some((_, file)) => Err(format!("{file} does not run it any more")),
            None => Err("no check covers it: see agent/tests/readme.rs".into()),
        },
    }
}

fn is_of_the_tree(word: &str) -> bool {
    PARTS_OF_THE_TREE.iter().any(|part| word.starts_with(part))
}

#[test]
fn every_documented_command_is_run_or_checked() {
    let commands = commands();
    assert!(commands.len() > 30, "the commands are not found: {commands:?}");
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
    assert!(unused.is_empty(), "no page has it any more: {unused:?}");
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
        for path in spans(text).filter(|span| is_of_the_tree(span) && !span.contains(' ')) {
            assert!(in_tree(path).exists(), "{place}: {path}");
        }
    }
}

#[test]
fn every_link_resolves_in_tree_and_package() {
    let assets = read("agent/Cargo.toml");
    for page in pages() {
        let folder = Path::new(&page).parent().unwrap();
        let text = read(&page);
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            if path.starts_with("https://") {
                continue;
            }
            if path.is_empty() {
                let has_it =
                    text.lines().any(|line| line.starts_with("## ") && anchor_of(line) == anchor);
                assert!(has_it, "{page}: #{anchor}");
                continue;
            }
            let file = folder.join(path);
            assert!(in_tree(file.to_str().unwrap()).exists(), "{page}: {link}");
            let shipped =
                format!("\"usr/share/doc/supernode-agent/{}/\"", file.parent().unwrap().display());
            assert!(
                assets.contains(&shipped),
                "{page}: the package has no {link}; name it as code, without a link"
            );
        }
    }
}

/// As GitHub makes it of a heading.
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
    let made =
        Command::new("sh").args(["-c", to_stdout]).current_dir(in_tree("")).output().unwrap();
    let made = String::from_utf8(made.stdout).unwrap();
    assert!(made.contains(": 12,") && made.contains(": 13,"), "{made}");
    let found: Vec<_> =
        template::judge(&made).into_iter().filter(|check| check.level != Level::Ok).collect();
    assert_eq!(found, []);
}

#[test]
fn template_names_match_the_commands() {
    let template = read("packaging/opennebula/supernode-gpu-7.tmpl");
    for attribute in [r#"NAME="supernode-gpu""#, r#"IMAGE="supernode""#] {
        assert!(template.contains(attribute), "{attribute}");
    }
}
