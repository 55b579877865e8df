use super::parse::SingleAttribute;
use crate::check::Check;
use crate::config::Kind;
use crate::config::variables;
use crate::values::{escape, parse_yes_no};

/// Types of user inputs (src/cli/one_helper.rb of OpenNebula/one).
const INPUT_TYPES: &[&str] = &[
    "text",
    "text64",
    "password",
    "number",
    "number-float",
    "range",
    "range-float",
    "list",
    "list-multiple",
    "boolean",
    "fixed",
];

pub(super) fn has_our_prefix(name: &str) -> bool {
    name.starts_with("FL_") || name.starts_with("ONEAPP_FL_")
}

pub(super) fn check_name(name: &str, line: usize) -> Option<Check> {
    if !has_our_prefix(name) || variables::find(name).is_some() {
        return None;
    }
    let finding = format!("{} is not a known variable and has no effect", escape(name));
    let fix = match variables::nearest(name) {
        Some(known) => format!("did you mean {known}?"),
        None => "delete it; supernode-agent variables lists the known variables".into(),
    };
    Some(Check::warning("variable", finding, fix).at(line))
}

pub(super) fn check_value(name: &str, value: &str) -> Option<Check> {
    let kind = variables::find(name)?.kind;
    if value.is_empty() {
        return None;
    }
    let error = kind.parse(value).err()?;
    let fix = format!("{name}=\"{}\"", example_value(kind));
    Some(Check::error("variable", format!("{name}={}: {error}", kind.quote(value)), fix))
}

/// Returns a value that is accepted, for a fix.
fn example_value(kind: Kind) -> String {
    match kind {
        Kind::YesNo => "YES".into(),
        Kind::Choice(words) => words.first().copied().unwrap_or_default().into(),
        Kind::Count(min) => min.max(1).to_string(),
        Kind::Fraction => "0.5".into(),
        Kind::Version => "1.31.0".into(),
        Kind::Image => "flwr/supernode:1.31.0".into(),
        Kind::HostPort => "superlink.example:9092".into(),
        Kind::Devices => "all".into(),
        Kind::NodeConfig => "partition-id=0 num-partitions=2".into(),
        Kind::CaBundle => "…, the output of base64 -w0 ca.crt".into(),
    }
}

/// Checks a user input, `M|type|description` or `M|type|description|parameters|default`.
pub(super) fn check_user_input(entry: &SingleAttribute) -> Option<Check> {
    let name = &entry.name;
    let fix = "NAME=\"O|text|description\", or with parameters and default \
               NAME=\"O|list|description|a,b|a\"";
    let invalid = |what: String| Some(Check::error("user-input", format!("{name}: {what}"), fix));
    let fields: Vec<&str> = entry.value.split('|').map(str::trim).collect();
    let (necessity, input_type) = (fields[0], fields.get(1).copied().unwrap_or_default());
    if !matches!(fields.len(), 3 | 5) {
        return invalid(format!(
            "it has {} fields, separated by |, and must have 3 or 5",
            fields.len()
        ));
    }
    if !matches!(necessity, "M" | "O") {
        return invalid(format!(
            "its first field is '{}' and must be M (mandatory) or O (optional)",
            escape(necessity)
        ));
    }
    if !INPUT_TYPES.contains(&input_type) {
        return invalid(format!(
            "'{}' is not a type of a user input ({})",
            escape(input_type),
            INPUT_TYPES.join(", ")
        ));
    }
    // Without a default, onetemplate cannot handle an empty answer (parse_user_inputs of
    // src/cli/one_helper.rb).
    if fields.len() == 3
        && necessity == "O"
        && (input_type.starts_with("number") || input_type == "text64")
    {
        let effect = if input_type == "text64" { "crashes" } else { "repeats the prompt forever" };
        let finding = format!(
            "{name}: if left empty, onetemplate instantiate {effect}: a {input_type} needs five \
             fields"
        );
        let fix = format!("{name}=\"O|{input_type}|{}| |\"", escape(fields[2]));
        return Some(Check::warning("user-input", finding, fix));
    }
    let (parameters, default) =
        (fields.get(3).copied().unwrap_or_default(), fields.get(4).copied().unwrap_or_default());
    if input_type == "boolean" && parse_yes_no(default).is_err() {
        let fix = format!("{name}=\"{necessity}|boolean|{}| |NO\"", escape(fields[2]));
        return Some(Check::error(
            "user-input",
            format!("{name}: a boolean needs a default, YES or NO"),
            fix,
        ));
    }
    if input_type.starts_with("list") && parameters.is_empty() {
        return invalid(
            "a list needs its options, separated by commas, in the fourth field".into(),
        );
    }
    if input_type.starts_with("range") && !parameters.contains("..") {
        return invalid("a range needs its limits, min..max, in the fourth field".into());
    }
    if input_type.starts_with("number") && !default.is_empty() && default.parse::<f64>().is_err() {
        return invalid(format!("the default '{}' is not a number", escape(default)));
    }
    check_value(name, default).map(|check| Check { id: "user-input", ..check })
}

#[cfg(test)]
mod tests {
    use super::super::parse::Position;
    use super::*;

    #[test]
    fn example_value_is_accepted() {
        for variable in
            variables::VARIABLES.iter().filter(|variable| variable.kind != Kind::CaBundle)
        {
            assert!(
                variable.kind.parse(&example_value(variable.kind)).is_ok(),
                "{}",
                variable.name
            );
        }
    }

    #[test]
    fn user_input_fields_match_the_type() {
        let finding = |value: &str| {
            let position = Position { line: 1, column: 1 };
            check_user_input(&SingleAttribute { name: "X".into(), value: value.into(), position })
                .map(|check| check.finding)
        };
        for valid in [
            "O|text|what",
            "M|number|what",
            "M|text64|what",
            "O|number|what| |",
            "O|number|what| |5",
            "O|number-float|what| |0.5",
            "O|range|what|1..5|3",
            "O|list|what|a,b|a",
            "O|list-multiple|what|a,b|",
            "O|boolean|what| |NO",
            "O|fixed|what| |x",
        ] {
            assert_eq!(finding(valid), None, "{valid}");
        }
        for (value, words) in [
            (
                "O|number-float|what",
                "X: if left empty, onetemplate instantiate repeats the prompt forever",
            ),
            ("O|number|what| |five", "X: the default 'five' is not a number"),
            ("O|range|what|1-5|3", "X: a range needs its limits"),
            ("O|range-float|what||3", "X: a range needs its limits"),
            ("O|list-multiple|what||a", "X: a list needs its options"),
            ("O", "X: it has 1 fields"),
        ] {
            assert!(
                finding(value).is_some_and(|finding| finding.starts_with(words)),
                "{value}: {:?}",
                finding(value)
            );
        }
    }
}
