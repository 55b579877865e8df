//! Renders the table of variables for OpenNebula: CONTEXT and USER_INPUTS of a VM template, a
//! OneFlow service, the parameters of a marketplace appliance. The files in packaging/ are
//! generated from it; the formats are those of OpenNebula/one.

use serde_json::{Map, Value as Json, json};

use crate::config::Kind;
use crate::config::variables::{Effective, VARIABLES, Variable};

/// Path of the packaged script that reports whether the node is ready.
pub const READY_SCRIPT: &str = "/opt/flower/scripts/health-check.sh";

/// Device that the nodes of a VM template train on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeKind {
    /// A VM with an assigned GPU.
    Gpu,
    /// A VM without a GPU.
    Cpu,
}

/// OpenNebula release series, which determines the format of service templates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenNebulaRelease {
    /// 6.10: `vm_template_contents` is text, in which OneFlow replaces `$KEY`.
    V6,
    /// 7: `template_contents` is an object. OneFlow adds every input to it and to its CONTEXT.
    V7,
}

/// The variable that the template sets, and that is not a user input. OneFlow neither asks for the
/// user inputs of a VM template nor applies their defaults, so a node of a service would not use
/// its GPU. The choice of the template sets the variable instead.
const FIXED: &str = "FL_GPU_ENABLED";
/// Attributes of CONTEXT that every node needs.
const CONTEXT: &[(&str, &str)] = &[
    ("NETWORK", "YES"),
    ("SSH_PUBLIC_KEY", "$USER[SSH_PUBLIC_KEY]"),
    ("TOKEN", "YES"),
    ("REPORT_READY", "YES"),
    ("READY_SCRIPT_PATH", READY_SCRIPT),
];

/// Renders CONTEXT, USER_INPUTS and INPUTS_ORDER of a VM template.
pub fn vm_template(kind: NodeKind) -> String {
    let inputs = || inputs().filter(|variable| is_for(variable, kind));
    let gpu_enabled = if kind == NodeKind::Gpu { "YES" } else { "NO" };
    let fixed = CONTEXT
        .iter()
        .copied()
        .chain([(FIXED, gpu_enabled)])
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

/// Whether a variable belongs in the template of this kind of node.
fn is_for(variable: &Variable, kind: NodeKind) -> bool {
    kind == NodeKind::Gpu || variable.effective != Effective::GpuEnabled
}

/// Renders the OneFlow service for `oneflow-template create`: a SuperLink and one or more
/// SuperNodes. The ids of the VM templates are -1 and -2, which OpenNebula rejects until the
/// operator replaces them.
pub fn service(release: OpenNebulaRelease) -> Json {
    let asked: Map<String, Json> =
        inputs().map(|input| (input.name.into(), user_input(input).into())).collect();
    // The names that the marketplace appliance of the SuperLink reads.
    let superlink = [
        ("ONEAPP_FLOWER_VERSION", "$FLOWER_VERSION"),
        ("ONEAPP_FL_TLS_ENABLED", "$FL_TLS_ENABLED"),
    ];
    let common = json!({
        "name": "flower",
        "description": "A Flower SuperLink, and SuperNodes that find it through OneGate",
        "deployment": "straight",
        "ready_status_gate": true,
        "shutdown_action": "terminate",
        "networks": {"private": "M|network|Network of the SuperLink and the SuperNodes| |id:"},
    });
    let specific = match release {
        OpenNebulaRelease::V6 => {
            let mut references: Vec<(&str, String)> =
                inputs().map(|Variable { name, .. }| (*name, format!("${name}"))).collect();
            // OneFlow replaces each $KEY in the order of the text, everywhere in it. The longer
            // $FL_GRPC_KEEPALIVE_TIMEOUT must come before its prefix $FL_GRPC_KEEPALIVE_TIME.
            references.sort_by(|(a, _), (b, _)| b.cmp(a));
            let supernode: Vec<(&str, &str)> =
                references.iter().map(|(name, value)| (*name, value.as_str())).collect();
            // An input without a value would reach the VM as the text $KEY.
            let values: Map<String, Json> = inputs()
                .map(|input| (input.name.into(), input_form(input).default.into()))
                .collect();
            json!({
                "custom_attrs": asked,
                "custom_attrs_values": values,
                "roles": [
                    {"name": "superlink", "cardinality": 1,
                     "min_vms": 1, "max_vms": 1,
                     "vm_template": -1, "vm_template_contents": contents(&superlink)},
                    {"name": "supernode", "parents": ["superlink"], "cardinality": 2,
                     "min_vms": 1, "max_vms": 10,
                     "vm_template": -2, "vm_template_contents": contents(&supernode)},
                ],
            })
        }
        OpenNebulaRelease::V7 => {
            let nic = json!([{"NETWORK_ID": "$private"}]);
            let context: Map<String, Json> =
                superlink.map(|(name, value)| (name.into(), value.into())).into_iter().collect();
            json!({
                "user_inputs": asked,
                "roles": [
                    {"name": "superlink", "type": "vm", "cardinality": 1,
                     "min_vms": 1, "max_vms": 1,
                     "template_id": -1, "template_contents": {"NIC": nic, "CONTEXT": context}},
                    {"name": "supernode", "type": "vm", "parents": ["superlink"],
                     "cardinality": 2, "min_vms": 1, "max_vms": 10,
                     "template_id": -2, "template_contents": {"NIC": nic}},
                ],
            })
        }
    };
    [common, specific]
        .into_iter()
        .filter_map(|part| part.as_object().cloned())
        .flatten()
        .collect::<Map<_, _>>()
        .into()
}

/// Renders the text of `vm_template_contents`.
fn contents(attributes: &[(&str, &str)]) -> String {
    let lines = attributes.iter().map(|(name, value)| format!("{name}=\"{value}\"\n"));
    format!("NIC=[NETWORK_ID=\"$private\"]\n{}", lines.collect::<String>())
}

/// Renders `ONE_SERVICE_PARAMS` of an appliance of OpenNebula/one-apps: name, stage, description,
/// input.
pub fn appliance_params() -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "'\\''"));
    let line = |variable: &Variable| {
        let fields =
            [&appliance_name(variable), "configure", variable.description, &user_input(variable)]
                .map(quoted);
        format!("    {}\n", fields.join(" "))
    };
    format!("ONE_SERVICE_PARAMS=(\n{})\n", VARIABLES.iter().map(line).collect::<String>())
}

/// Renders `context`, `inputs_order` and `user_inputs` of an appliance description in the
/// marketplace.
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

/// Renders the table of an appliance's parameters for its README.
pub fn appliance_markdown() -> String {
    let mut text = String::from("| parameter | values | default | |\n| --- | --- | --- | --- |\n");
    for variable in VARIABLES {
        let cells = [&variable.kind.values(), variable.default, variable.description]
            .map(|cell| cell.replace('|', "\\|"));
        text.push_str(&format!("| `{}` | {} |\n", appliance_name(variable), cells.join(" | ")));
    }
    text
}

/// The name in the marketplace, where every parameter of Flower starts with `ONEAPP_FL`.
fn appliance_name(variable: &Variable) -> String {
    let name = variable.base_names().find(|name| name.starts_with("FL")).unwrap_or(variable.name);
    format!("ONEAPP_{name}")
}

/// The variables that are user inputs.
fn inputs() -> impl Iterator<Item = &'static Variable> {
    VARIABLES.iter().filter(|variable| variable.name != FIXED)
}

/// Fields of a user input.
struct InputForm {
    input_type: &'static str,
    parameters: String,
    default: &'static str,
}

fn input_form(variable: &Variable) -> InputForm {
    let plain = |input_type, default| InputForm { input_type, parameters: " ".into(), default };
    let list = |parameters, default| InputForm { input_type: "list", parameters, default };
    match variable.kind {
        Kind::YesNo if variable.default == "NO" => plain("boolean", "NO"),
        // The empty option leaves a variable unset if its default is neither YES nor NO.
        Kind::YesNo => list(",YES,NO".into(), ""),
        Kind::Choice(words) if words.contains(&variable.default) => {
            list(words.join(","), variable.default)
        }
        Kind::Choice(words) => list(format!(",{}", words.join(",")), ""),
        Kind::Count(_) => {
            // The default can be a description, or a number with an explanation.
            let default = variable.default.split(' ').next().unwrap_or_default();
            plain("number", if default.parse::<u64>().is_ok() { default } else { "" })
        }
        Kind::Fraction => plain("number-float", ""),
        Kind::CaBundle => plain("text64", ""),
        _ => plain("text", ""),
    }
}

/// Renders `O|type|description|parameters|default`. The form with three fields has no default: the
/// OpenNebula command line then asks for a number forever and crashes on an empty text64
/// (src/cli/one_helper.rb).
fn user_input(variable: &Variable) -> String {
    let InputForm { input_type, parameters, default } = input_form(variable);
    format!("O|{input_type}|{}|{parameters}|{default}", variable.description)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names in the vector `NAME=[ … ]` of a template that [`vm_template`] rendered, with their
    /// values.
    fn pairs<'t>(template: &'t str, vector: &str) -> Vec<(&'t str, &'t str)> {
        let (_, rest) = template.split_once(&format!("{vector}=[\n")).unwrap();
        let (inside, _) = rest.split_once(" ]").unwrap();
        inside
            .lines()
            .map(|line| line.trim().trim_end_matches(',').split_once('=').unwrap())
            .map(|(name, value)| (name, value.trim_matches('"')))
            .collect()
    }

    #[test]
    fn vm_template_has_exactly_the_variables_of_the_table() {
        for (kind, gpu_enabled) in [(NodeKind::Gpu, "YES"), (NodeKind::Cpu, "NO")] {
            let text = vm_template(kind);
            let names = |vector| -> Vec<&str> {
                pairs(&text, vector).into_iter().map(|(name, _)| name).collect()
            };
            let expected: Vec<_> = VARIABLES
                .iter()
                .filter(|variable| is_for(variable, kind))
                .map(|variable| variable.name)
                .collect();
            assert_eq!(names("CONTEXT")[CONTEXT.len()..], expected);
            assert_eq!(names("USER_INPUTS"), expected[1..]);
            assert!(text.ends_with(&format!("INPUTS_ORDER=\"{}\"\n", expected[1..].join(","))));
            assert!(pairs(&text, "CONTEXT").contains(&(FIXED, gpu_enabled)));
        }
        let in_cpu_template = |name| vm_template(NodeKind::Cpu).contains(name);
        assert!(!in_cpu_template("FL_GPU_REQUIRED") && !in_cpu_template("FL_DCGM_ENABLED"));
        assert!(in_cpu_template("FL_TLS_ENABLED"));
    }

    #[test]
    fn every_input_of_a_service_reaches_the_node() {
        let inputs: Vec<&str> = inputs().map(|variable| variable.name).collect();
        let seven = service(OpenNebulaRelease::V7);
        assert_eq!(seven["user_inputs"].as_object().unwrap().keys().collect::<Vec<_>>(), inputs);
        let six = service(OpenNebulaRelease::V6);
        for list in ["custom_attrs", "custom_attrs_values"] {
            assert_eq!(six[list].as_object().unwrap().keys().collect::<Vec<_>>(), inputs, "{list}");
        }
        // As OneFlow 6.10 does it: each $KEY in the order of the text, everywhere in it.
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
    fn appliance_has_every_variable_under_a_known_name() {
        for variable in VARIABLES {
            let name = appliance_name(variable);
            assert!(
                name.starts_with("ONEAPP_FL") && variable.names().any(|known| known == name),
                "{name}"
            );
        }
        assert_eq!(appliance_params().lines().count(), VARIABLES.len() + 2);
        assert!(appliance_params().contains("'Fraction of the GPU'\\''s memory"));
    }
}
