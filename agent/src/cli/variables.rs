//! The table of variables, as JSON, text and Markdown; what OpenNebula takes is made by
//! [`crate::opennebula::templates`].

use clap::ValueEnum;
use serde_json::{Value as Json, json};

use crate::config::variables::{VARIABLES, Variable};
use crate::opennebula::templates::{self, Node};

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(super) enum Format {
    /// For a terminal
    #[default]
    Table,
    /// For a document
    Markdown,
    /// The CONTEXT and the USER_INPUTS of an OpenNebula template
    UserInputs,
}

pub(super) fn as_json() -> Json {
    VARIABLES
        .iter()
        .map(|variable| {
            json!({
                "name": variable.name,
                "names": variable.names().collect::<Vec<_>>(),
                "values": variable.kind.values(),
                "unset": variable.unset,
                "goes_to": variable.goes_to,
                "about": variable.about,
            })
        })
        .collect()
}

pub(super) fn as_text(format: Format) -> String {
    let rows = VARIABLES.iter();
    match format {
        Format::Table => {
            rows.map(|variable| {
                let Variable { name, about, unset, goes_to, .. } = variable;
                let also = match variable.also {
                    [] => String::new(),
                    others => format!(" (also {})", others.join(", ")),
                };
                format!(
                    "{name}{also}\n    {about}.\n    values: {}\n    unset:  {unset}\n    goes to {goes_to}\n",
                    variable.kind.values()
                )
            })
            .collect::<String>()
                + "Each is also read with ONEAPP_ before its name.\n"
        }
        Format::Markdown => as_markdown(),
        Format::UserInputs => templates::vm_template(Node::Gpu),
    }
}

/// The table of the variables for a document.
pub fn as_markdown() -> String {
    let mut text =
        String::from("| variable | values | unset means | goes to |\n| --- | --- | --- | --- |\n");
    for variable in VARIABLES {
        let names: Vec<String> = std::iter::once(&variable.name)
            .chain(variable.also)
            .map(|name| format!("`{name}`"))
            .collect();
        let cells = [&variable.kind.values(), variable.unset, variable.goes_to]
            .map(|cell| cell.replace('|', "\\|"));
        text.push_str(&format!("| {} | {} |\n", names.join(", "), cells.join(" | ")));
    }
    text
}
