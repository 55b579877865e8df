//! The table of variables as OpenNebula takes it: CONTEXT and USER_INPUTS of a VM template, a
//! OneFlow service, the parameters of a marketplace appliance. What is below packaging/ is made
//! from it; the facts are from OpenNebula/one.

use serde_json::{Map, Value as Json, json};

use crate::check::template::READY_SCRIPT;
use crate::config::variables::{GPU_ONLY, Kind, VARIABLES, Variable};

/// What a VM template is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// A VM with a passed-through GPU.
    Gpu,
    /// A VM without.
    Cpu,
}

/// The releases of OpenNebula that take different service templates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// 6.10: `vm_template_contents` is text, in which OneFlow replaces `$KEY`.
    V6,
    /// 7: `template_contents` is an object, and OneFlow adds every input to it and to its CONTEXT.
    V7,
}

/// The switch is no input: OneFlow neither asks for the inputs of a VM template nor knows their
/// defaults, so that a node of a service would leave its GPU alone. The template says it, and who
/// chooses the template has chosen.
const SWITCH: &str = "FL_GPU_ENABLED";
/// What every node needs of OpenNebula.
const CONTEXT: &[(&str, &str)] = &[
    ("NETWORK", "YES"),
    ("SSH_PUBLIC_KEY", "$USER[SSH_PUBLIC_KEY]"),
    ("TOKEN", "YES"),
    ("REPORT_READY", "YES"),
    ("READY_SCRIPT_PATH", READY_SCRIPT),
];

/// CONTEXT, USER_INPUTS and INPUTS_ORDER of a VM template.
pub fn vm_template(node: Node) -> String {
    let inputs =
        || inputs().filter(|variable| node == Node::Gpu || !GPU_ONLY.contains(&variable.name));
    let switch = if node == Node::Gpu { "YES" } else { "NO" };
    let fixed = CONTEXT
        .iter()
        .copied()
        .chain([(SWITCH, switch)])
        .map(|(name, value)| format!("  {name}=\"{value}\""));
    let context: Vec<String> = fixed
        .chain(inputs().map(|Variable { name, .. }| format!("  {name}=\"${name}\"")))
        .collect();
    let asked: Vec<String> = inputs()
        .map(|variable| format!("  {}=\"{}\"", variable.name, user_input(variable)))
        .collect();
    let order: Vec<&str> = inputs().map(|variable| variable.name).collect();
    let (context, asked, order) = (context.join(",\n"), asked.join(",\n"), order.join(","));
    format!("CONTEXT=[\n{context} ]\nUSER_INPUTS=[\n{asked} ]\nINPUTS_ORDER=\"{order}\"\n")
}

/// The OneFlow service as `oneflow-template create` takes it: a SuperLink, and from one SuperNode
/// on. The ids of the VM templates are -1 and -2, which no template has: whoever forgets to fill
/// them in is told so.
pub fn service(release: Release) -> Json {
    let asked: Map<String, Json> =
        inputs().map(|input| (input.name.into(), user_input(input).into())).collect();
    // By the names of the marketplace's SuperLink.
    let superlink = [
        ("ONEAPP_FLOWER_VERSION", "$FLOWER_VERSION"),
        ("ONEAPP_FL_TLS_ENABLED", "$FL_TLS_ENABLED"),
    ];
    let head = json!({
        "name": "flower",
        "description": "A Flower SuperLink, and SuperNodes that find it through OneGate",
        "deployment": "straight",
        "ready_status_gate": true,
        "shutdown_action": "terminate",
        "networks": {"private": "M|network|Network of the SuperLink and the SuperNodes| |id:"},
    });
    let body = match release {
        Release::V6 => {
            let mut references: Vec<(&str, String)> =
                inputs().map(|Variable { name, .. }| (*name, format!("${name}"))).collect();
            // The text is replaced from its top: $FL_GRPC_KEEPALIVE_TIMEOUT must have gone before
            // $FL_GRPC_KEEPALIVE_TIME is replaced, wherever it stands.
            references.sort_by(|(a, _), (b, _)| b.cmp(a));
            let supernode: Vec<(&str, &str)> =
                references.iter().map(|(name, value)| (*name, value.as_str())).collect();
            // An input without a value would stay in the text as $KEY, and reach the VM so.
            let values: Map<String, Json> =
                inputs().map(|input| (input.name.into(), form(input).default.into())).collect();
            json!({
                "custom_attrs": asked,
                "custom_attrs_values": values,
                "roles": [
                    {"name": "superlink", "cardinality": 1, "min_vms": 1, "max_vms": 1,
                     "vm_template": -1, "vm_template_contents": contents(&superlink)},
                    {"name": "supernode", "parents": ["superlink"], "cardinality": 2, "min_vms": 1, "max_vms": 10,
                     "vm_template": -2, "vm_template_contents": contents(&supernode)},
                ],
            })
        }
        Release::V7 => {
            let nic = json!([{"NETWORK_ID": "$private"}]);
            let context: Map<String, Json> =
                superlink.map(|(name, value)| (name.into(), value.into())).into_iter().collect();
            json!({
                "user_inputs": asked,
                "roles": [
                    {"name": "superlink", "type": "vm", "cardinality": 1, "min_vms": 1, "max_vms": 1,
                     "template_id": -1, "template_contents": {"NIC": nic, "CONTEXT": context}},
                    {"name": "supernode", "type": "vm", "parents": ["superlink"], "cardinality": 2, "min_vms": 1, "max_vms": 10,
                     "template_id": -2, "template_contents": {"NIC": nic}},
                ],
            })
        }
    };
    [head, body]
        .into_iter()
        .filter_map(|part| part.as_object().cloned())
        .flatten()
        .collect::<Map<_, _>>()
        .into()
}

/// The text of `vm_template_contents`.
fn contents(attributes: &[(&str, &str)]) -> String {
    let lines = attributes.iter().map(|(name, value)| format!("{name}=\"{value}\"\n"));
    format!("NIC=[NETWORK_ID=\"$private\"]\n{}", lines.collect::<String>())
}

/// `ONE_SERVICE_PARAMS` of an appliance of OpenNebula/one-apps: name, stage, description, input.
pub fn appliance_params() -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "'\\''"));
    let line = |variable: &Variable| {
        let fields =
            [&appliance_name(variable), "configure", variable.about, &user_input(variable)]
                .map(quoted);
        format!("    {}\n", fields.join(" "))
    };
    format!("ONE_SERVICE_PARAMS=(\n{})\n", VARIABLES.iter().map(line).collect::<String>())
}

/// `context`, `inputs_order` and `user_inputs` of an appliance's description in the marketplace.
pub fn appliance_template() -> String {
    let mut text = String::from("  context:\n");
    let fixed = CONTEXT.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let params = || VARIABLES.iter().map(|variable| (appliance_name(variable), variable));
    for (name, value) in fixed.chain(params().map(|(name, _)| (name.clone(), format!("${name}")))) {
        text.push_str(&format!("    {}: \"{value}\"\n", name.to_lowercase()));
    }
    let order: Vec<String> = params().map(|(name, _)| name).collect();
    text.push_str(&format!("  inputs_order: >-\n    {}\n  user_inputs:\n", order.join(",")));
    for (name, variable) in params() {
        text.push_str(&format!("    {}: \"{}\"\n", name.to_lowercase(), user_input(variable)));
    }
    text
}

/// The table of an appliance's parameters for its README.
pub fn appliance_markdown() -> String {
    let mut text =
        String::from("| parameter | values | unset means | |\n| --- | --- | --- | --- |\n");
    for variable in VARIABLES {
        let cells = [&variable.kind.values(), variable.unset, variable.about]
            .map(|cell| cell.replace('|', "\\|"));
        text.push_str(&format!("| `{}` | {} |\n", appliance_name(variable), cells.join(" | ")));
    }
    text
}

/// The name in the marketplace, where every parameter of Flower begins with `ONEAPP_FL`.
fn appliance_name(variable: &Variable) -> String {
    let names = std::iter::once(variable.name).chain(variable.also.iter().copied());
    let name = names.into_iter().find(|name| name.starts_with("FL")).unwrap_or(variable.name);
    format!("ONEAPP_{name}")
}

fn inputs() -> impl Iterator<Item = &'static Variable> {
    VARIABLES.iter().filter(|variable| variable.name != SWITCH)
}

/// How OpenNebula asks for a variable.
struct Form {
    kind: &'static str,
    parameters: String,
    default: &'static str,
}

fn form(variable: &Variable) -> Form {
    let plain = |kind, default| Form { kind, parameters: " ".into(), default };
    match variable.kind {
        Kind::YesNo if variable.unset == "NO" => plain("boolean", "NO"),
        // Where being unset means something of its own, it must be possible to stay unset.
        Kind::YesNo => Form { kind: "list", parameters: ",YES,NO".into(), default: "" },
        Kind::Choice(words) if words.contains(&variable.unset) => {
            Form { kind: "list", parameters: words.join(","), default: variable.unset }
        }
        Kind::Choice(words) => {
            Form { kind: "list", parameters: format!(",{}", words.join(",")), default: "" }
        }
        Kind::Count(_) => plain("number", variable.unset.split(' ').next().unwrap_or_default()),
        Kind::Fraction => plain("number-float", ""),
        Kind::CaBundle => plain("text64", ""),
        _ => plain("text", ""),
    }
}

/// `O|type|description|parameters|default`. Always five fields: with three, OpenNebula's command
/// line has no default to take for an empty answer, asks for a number for ever and dies of a text64
/// (src/cli/one_helper.rb).
fn user_input(variable: &Variable) -> String {
    let Form { kind, parameters, default } = form(variable);
    format!("O|{kind}|{}|{parameters}|{default}", variable.about)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::template::{Attribute, Pair, parse};

    fn pairs(text: &str, vector: &str) -> Vec<Pair> {
        let found = parse(text).unwrap().into_iter().find_map(|attribute| match attribute {
            Attribute::Vector(found) if found.name == vector => Some(found.pairs),
            _ => None,
        });
        found.unwrap()
    }

    fn names(text: &str, vector: &str) -> Vec<String> {
        pairs(text, vector).into_iter().map(|pair| pair.name).collect()
    }

    #[test]
    fn a_vm_template_has_every_variable_of_the_table_and_no_other() {
        for (node, switch) in [(Node::Gpu, "YES"), (Node::Cpu, "NO")] {
            let text = vm_template(node);
            let wanted: Vec<_> = VARIABLES
                .iter()
                .map(|variable| variable.name)
                .filter(|name| node == Node::Gpu || !GPU_ONLY.contains(name))
                .collect();
            assert_eq!(names(&text, "CONTEXT")[CONTEXT.len()..], wanted);
            assert_eq!(names(&text, "USER_INPUTS"), wanted[1..]);
            assert!(text.ends_with(&format!("INPUTS_ORDER=\"{}\"\n", wanted[1..].join(","))));
            let switched = pairs(&text, "CONTEXT").into_iter().find(|pair| pair.name == SWITCH);
            assert_eq!(switched.unwrap().value, switch);
        }
    }

    #[test]
    fn every_input_of_a_service_reaches_the_node_as_it_was_given() {
        let inputs: Vec<&str> = inputs().map(|variable| variable.name).collect();
        let seven = service(Release::V7);
        assert_eq!(seven["user_inputs"].as_object().unwrap().keys().collect::<Vec<_>>(), inputs);
        let six = service(Release::V6);
        for list in ["custom_attrs", "custom_attrs_values"] {
            assert_eq!(six[list].as_object().unwrap().keys().collect::<Vec<_>>(), inputs, "{list}");
        }
        // As OneFlow 6.10 does it: each $KEY in the order of the text, and then wherever it stands.
        let mut contents = six["roles"][1]["vm_template_contents"].as_str().unwrap().to_owned();
        let in_order: Vec<String> = contents
            .split('$')
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap().to_owned())
            .filter(|key| key != "private")
            .collect();
        for key in in_order {
            contents = contents.replace(&format!("${key}"), &format!("<{key}>"));
        }
        for name in inputs {
            assert!(contents.contains(&format!("\n{name}=\"<{name}>\"\n")), "{name}: {contents}");
        }
    }

    #[test]
    fn an_appliance_has_every_variable_by_a_name_that_the_agent_knows() {
        for variable in VARIABLES {
            let name = appliance_name(variable);
            assert!(
                name.starts_with("ONEAPP_FL") && variable.names().any(|known| known == name),
                "{name}"
            );
        }
        assert_eq!(appliance_params().lines().count(), VARIABLES.len() + 2);
        assert!(appliance_params().contains("'Share of the GPU'\\''s memory"));
    }
}
