//! The table of variables, as JSON, text, Markdown and OpenNebula's USER_INPUTS.

use clap::ValueEnum;
use serde_json::{Value as Json, json};

use crate::config::variables::{Kind, VARIABLES, Variable};

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(super) enum Format {
    /// For a terminal
    #[default]
    Table,
    /// For a document
    Markdown,
    /// The USER_INPUTS of an OpenNebula template
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
        Format::UserInputs => as_user_inputs(),
    }
}

/// The table of the variables for a document.
pub fn as_markdown() -> String {
    let mut text = String::from("| variable | values | unset means | goes to |\n| --- | --- | --- | --- |\n");
    for variable in VARIABLES {
        let names: Vec<String> =
            std::iter::once(&variable.name).chain(variable.also).map(|name| format!("`{name}`")).collect();
        let cells = [&variable.kind.values(), variable.unset, variable.goes_to].map(|cell| cell.replace('|', "\\|"));
        text.push_str(&format!("| {} | {} |\n", names.join(", "), cells.join(" | ")));
    }
    text
}

/// `VAR="O|type|description|parameters|default"`: three fields or five, as OpenNebula reads them.
pub(crate) fn as_user_inputs() -> String {
    let input = |variable: &Variable| {
        let about = variable.about;
        match variable.kind {
            Kind::YesNo if variable.unset == "NO" => format!("O|boolean|{about}| |NO"),
            // Where being unset means something of its own, it must be possible to stay unset.
            Kind::YesNo => format!("O|list|{about}|,YES,NO|"),
            Kind::Choice(words) if words.contains(&variable.unset) => {
                format!("O|list|{about}|{}|{}", words.join(","), variable.unset)
            }
            Kind::Choice(words) => format!("O|list|{about}|,{}|", words.join(",")),
            Kind::Count(_) => {
                let default = variable.unset.split(' ').next().unwrap_or_default();
                format!("O|number|{about}| |{default}")
            }
            Kind::Fraction => format!("O|number-float|{about}"),
            Kind::Certificate => format!("O|text64|{about}"),
            _ => format!("O|text|{about}"),
        }
    };
    let lines: Vec<String> =
        VARIABLES.iter().map(|variable| format!("  {}=\"{}\"", variable.name, input(variable))).collect();
    let order: Vec<&str> = VARIABLES.iter().map(|variable| variable.name).collect();
    format!("USER_INPUTS=[\n{} ]\nINPUTS_ORDER=\"{}\"\n", lines.join(",\n"), order.join(","))
}
