//! `variables`: the table of context variables as JSON, text or Markdown, and as the user inputs of
//! an OpenNebula template.

use clap::ValueEnum;
use serde_json::{Value as Json, json};

use crate::config::variables::{VARIABLES, Variable};
use crate::opennebula::templates::{self, NodeKind};

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(super) enum Format {
    /// For a terminal
    #[default]
    Table,
    /// For a document
    Markdown,
    /// CONTEXT and USER_INPUTS of an OpenNebula template
    UserInputs,
}

pub(super) fn as_json() -> Json {
    VARIABLES
        .iter()
        .map(|variable| {
            json!({
                "name": variable.name,
                "aliases": variable.aliases,
                "names": variable.names().collect::<Vec<_>>(),
                "values": variable.kind.values(),
                "default": variable.default,
                "maps_to": variable.maps_to,
                "description": variable.description,
            })
        })
        .collect()
}

pub(super) fn as_text(format: Format) -> String {
    match format {
        Format::Table => {
            let rows: String = VARIABLES.iter().map(as_rows).collect();
            format!("{rows}Each variable is also read with the prefix ONEAPP_.\n")
        }
        Format::Markdown => as_markdown(),
        Format::UserInputs => templates::vm_template(NodeKind::Gpu),
    }
}

fn as_rows(variable: &Variable) -> String {
    let Variable { name, aliases, kind, default, maps_to, description, .. } = variable;
    let aliases = match aliases {
        [] => String::new(),
        aliases => format!(" (also {})", aliases.join(", ")),
    };
    format!(
        "{name}{aliases}\n    {description}.\n    values:  {}\n    default: {default}\n    \
         maps to: {maps_to}\n",
        kind.values()
    )
}

/// Renders the table of variables for a document.
pub fn as_markdown() -> String {
    let mut text =
        String::from("| variable | values | default | maps to |\n| --- | --- | --- | --- |\n");
    for variable in VARIABLES {
        let names: Vec<String> = variable.base_names().map(|name| format!("`{name}`")).collect();
        let cells = [&variable.kind.values(), variable.default, variable.maps_to]
            .map(|cell| cell.replace('|', "\\|"));
        text.push_str(&format!("| {} | {} |\n", names.join(", "), cells.join(" | ")));
    }
    text
}
