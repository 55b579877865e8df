//! Checks of a OneFlow service template in JSON. Pure. Sources: src/flow/lib/models and
//! src/oca/ruby/opennebula/flow of OpenNebula/one.

use serde_json::{Map, Value as Json};

use super::inputs::{check_name, check_user_input};
use super::parse::{Position, SingleAttribute};
use crate::check::Check;
use crate::values::escape;

const ROLES: &str = "service-roles";
const REFERENCES: &str = "service-references";

/// Checks a service template.
pub(super) fn judge(text: &str) -> Vec<Check> {
    let service: Map<String, Json> = match serde_json::from_str(text) {
        Ok(service) => service,
        Err(error) => {
            return vec![
                Check::error("syntax", error.to_string(), "correct the JSON at this position")
                    .at(error.line().max(1)),
            ];
        }
    };
    let mut checks = vec![Check::ok("syntax", "a OneFlow service template")];
    let roles: Vec<&Json> =
        service.get("roles").and_then(Json::as_array).into_iter().flatten().collect();
    let role_named = |name: &str| roles.iter().find(|role| role["name"] == name);
    for name in ["superlink", "supernode"] {
        checks.push(match role_named(name) {
            Some(role) => check_size(name, role),
            None => {
                let finding =
                    format!("there is no role {name}, which the nodes need to find the SuperLink");
                Check::error(ROLES, finding, format!("\"roles\": [{{\"name\": \"{name}\", …}}]"))
            }
        });
    }
    if let Some(supernode) = role_named("supernode") {
        let is_child = strings(&supernode["parents"]).any(|parent| parent == "superlink");
        let is_straight =
            service.get("deployment").is_some_and(|deployment| deployment == "straight");
        checks.push(if is_child && is_straight {
            Check::ok(ROLES, "the SuperNodes start after the SuperLink")
        } else {
            let finding = "the SuperNodes do not wait for the SuperLink";
            let fix = "\"deployment\": \"straight\", and \"parents\": [\"superlink\"] in the role \
                       supernode";
            Check::warning(ROLES, finding, fix)
        });
    }
    checks.push(if service.get("ready_status_gate") == Some(&Json::Bool(true)) {
        Check::ok("service-gate", "a VM is ready once it reports READY")
    } else {
        let finding = "without ready_status_gate a VM counts as ready while it boots";
        Check::warning(
            "service-gate",
            finding,
            "\"ready_status_gate\": true, and REPORT_READY=\"YES\" in the VM templates",
        )
    });
    checks.extend(check_inputs(&service));
    // Only OneFlow 6 reads vm_template_contents.
    for role in roles {
        if let Some(contents) = role["vm_template_contents"].as_str() {
            checks.extend(check_references(
                role["name"].as_str().unwrap_or_default(),
                contents,
                &service,
                role,
            ));
        }
    }
    checks
}

/// Checks the number of VMs of a role. OpenNebula itself rejects template ids that are not filled
/// in.
fn check_size(name: &str, role: &Json) -> Check {
    let [min, cardinality, max] =
        ["min_vms", "cardinality", "max_vms"].map(|key| role[key].as_u64());
    match (min, cardinality, max) {
        (Some(min), Some(cardinality), Some(max)) if min <= cardinality && cardinality <= max => {
            Check::ok(
                ROLES,
                format!(
                    "the role {name} has {cardinality} VMs; oneflow scale accepts {min} to {max}"
                ),
            )
        }
        (Some(_), Some(_), Some(_)) => {
            let finding = format!(
                "the role {name} has a cardinality outside min_vms and max_vms: OneFlow rejects it"
            );
            Check::error(ROLES, finding, "\"min_vms\": 1, \"cardinality\": 2, \"max_vms\": 10")
        }
        _ => {
            let finding = format!(
                "the role {name} has no cardinality with min_vms and max_vms: oneflow scale is \
                 unbounded"
            );
            Check::warning(ROLES, finding, "\"min_vms\": 1, \"cardinality\": 2, \"max_vms\": 10")
        }
    }
}

/// Checks the user inputs of both OpenNebula releases.
fn check_inputs(service: &Map<String, Json>) -> Vec<Check> {
    let user_inputs = ["custom_attrs", "user_inputs"]
        .into_iter()
        .filter_map(|key| service.get(key)?.as_object())
        .flatten();
    let mut checks = Vec::new();
    let mut count = 0;
    for (name, input) in user_inputs {
        count += 1;
        let value = input.as_str().unwrap_or_default().to_owned();
        let position = Position { line: 1, column: 1 };
        let input = SingleAttribute { name: name.clone(), value, position };
        checks.extend(
            check_user_input(&input)
                .into_iter()
                .chain(check_name(name, 1))
                .map(|check| Check { line: None, ..check }),
        );
    }
    let invalid = checks.len();
    checks.insert(
        0,
        Check::ok(
            "user-input",
            format!("{} of {count} inputs are valid", count - invalid.min(count)),
        ),
    );
    checks
}

/// Checks `vm_template_contents`. OneFlow 6 replaces each `$KEY` that has a value, in the order of
/// the text and everywhere in it, even if the key is a prefix of a longer one. Other references are
/// kept (resolve_attributes of models/service.rb).
fn check_references(
    name: &str,
    contents: &str,
    service: &Map<String, Json>,
    role: &Json,
) -> Vec<Check> {
    let keys: Vec<&str> = contents
        .split('$')
        .skip(1)
        .map(|rest| {
            rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default()
        })
        .filter(|key| !key.is_empty())
        .collect();
    let is_in = |list: &str, key: &str| {
        [service.get(list), role.get(list)]
            .into_iter()
            .flatten()
            .any(|values| values.get(key).is_some())
    };
    let role = escape(name);
    let mut checks = Vec::new();
    for (at, key) in keys.iter().enumerate() {
        let has_value = is_in("custom_attrs_values", key);
        let is_replaced =
            has_value || ["custom_attrs", "networks"].iter().any(|list| is_in(list, key));
        let longer =
            keys[at + 1..].iter().find(|later| later.len() > key.len() && later.starts_with(key));
        if let Some(longer) = longer.filter(|_| is_replaced) {
            let finding = format!(
                "role {role}: ${key} is a prefix of ${longer}, which OneFlow 6 corrupts \
                 when it replaces ${key}"
            );
            checks.push(Check::error(
                REFERENCES,
                finding,
                format!("write ${longer} before ${key}"),
            ));
        }
        if is_in("custom_attrs", key) && !has_value {
            let finding = format!(
                "role {role}: if {key} has no value, OneFlow 6 passes the text ${key} to the VM"
            );
            let fix = format!("\"custom_attrs_values\": {{\"{key}\": \"\"}}");
            checks.push(Check::warning(REFERENCES, finding, fix));
        }
    }
    if checks.is_empty() {
        checks.push(Check::ok(
            REFERENCES,
            format!("role {role}: {} references, no conflicts", keys.len()),
        ));
    }
    checks
}

fn strings(value: &Json) -> impl Iterator<Item = &str> {
    value.as_array().into_iter().flatten().filter_map(Json::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Level;
    use crate::opennebula::templates::{OpenNebulaRelease, service};

    fn problems(service: &Json) -> Vec<(Level, &'static str, String)> {
        let checks =
            judge(&service.to_string()).into_iter().filter(|check| check.level != Level::Ok);
        checks.map(|check| (check.level, check.id, check.finding)).collect()
    }

    /// Asserts that the generated service has exactly one problem after this change.
    #[track_caller]
    fn assert_one(
        release: OpenNebulaRelease,
        change: impl FnOnce(&mut Json),
        level: Level,
        id: &str,
        words: &str,
    ) {
        let mut service = service(release);
        assert_eq!(problems(&service), []);
        change(&mut service);
        let found = problems(&service);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!((found[0].0, found[0].1), (level, id), "{found:#?}");
        assert!(found[0].2.contains(words), "{found:#?}");
    }

    #[test]
    fn every_problem_of_a_service_has_a_check() {
        use Level::{Error, Warning};
        for release in [OpenNebulaRelease::V6, OpenNebulaRelease::V7] {
            assert_one(
                release,
                |it| it["roles"][1]["name"] = "node".into(),
                Error,
                ROLES,
                "there is no role supernode",
            );
            assert_one(
                release,
                |it| it["roles"][1]["parents"] = Json::Null,
                Warning,
                ROLES,
                "do not wait",
            );
            assert_one(
                release,
                |it| it["deployment"] = "none".into(),
                Warning,
                ROLES,
                "do not wait",
            );
            assert_one(
                release,
                |it| it["roles"][1]["cardinality"] = 11.into(),
                Error,
                ROLES,
                "rejects it",
            );
            assert_one(
                release,
                |it| it["roles"][1]["max_vms"] = Json::Null,
                Warning,
                ROLES,
                "is unbounded",
            );
            assert_one(
                release,
                |it| it["ready_status_gate"] = false.into(),
                Warning,
                "service-gate",
                "while it boots",
            );
        }
        assert_one(
            OpenNebulaRelease::V7,
            |it| it["user_inputs"]["FL_TLS_ENABLED"] = "O|bool|x".into(),
            Error,
            "user-input",
            "not a type",
        );
        assert_one(
            OpenNebulaRelease::V7,
            |it| it["user_inputs"]["FL_TSL_ENABLED"] = "O|text|x| |".into(),
            Warning,
            "variable",
            "not a known",
        );
        // JSON of any shape is checked without a panic.
        judge(
            r#"{"roles": [1, {"name": 2, "parents": 3, "vm_template_contents": "$ $$é"}],
                "custom_attrs": {"X": 1}}"#,
        );
        let syntax = judge("{\n\"roles\": [}");
        assert_eq!((syntax.len(), syntax[0].id, syntax[0].line), (1, "syntax", Some(2)));
    }

    #[test]
    fn oneflow_6_corrupts_prefixes_and_inputs_without_value() {
        let contents = "A=\"$FL_GRPC_KEEPALIVE_TIME\"\nB=\"$FL_GRPC_KEEPALIVE_TIMEOUT\"\n";
        let change = |it: &mut Json| it["roles"][1]["vm_template_contents"] = contents.into();
        assert_one(
            OpenNebulaRelease::V6,
            change,
            Level::Error,
            REFERENCES,
            "$FL_GRPC_KEEPALIVE_TIME is a prefix of $FL_GRPC_KEEPALIVE_TIMEOUT",
        );
        let change = |it: &mut Json| {
            it["custom_attrs_values"].as_object_mut().map(|values| values.remove("FL_NODE_CONFIG"));
        };
        assert_one(
            OpenNebulaRelease::V6,
            change,
            Level::Warning,
            REFERENCES,
            "passes the text $FL_NODE_CONFIG to the VM",
        );
    }

    #[test]
    fn cardinality_may_be_at_its_bounds() {
        let size = |min: u64, cardinality: u64, max: u64| {
            let check = check_size(
                "trainer",
                &serde_json::json!({"min_vms": min, "cardinality": cardinality, "max_vms": max}),
            );
            (check.level, check.finding)
        };
        assert_eq!(
            size(2, 2, 2),
            (Level::Ok, "the role trainer has 2 VMs; oneflow scale accepts 2 to 2".into())
        );
        assert_eq!(size(3, 2, 9).0, Level::Error);
        assert_eq!(size(1, 3, 2).0, Level::Error);
    }

    #[test]
    fn inputs_are_counted_and_have_no_line() {
        let text = r#"{"custom_attrs": {"A": "O|text|what", "B": "O"},
            "user_inputs": {"FL_SOMETHING": "O|text|what"}}"#;
        let found: Vec<_> = judge(text)
            .into_iter()
            .filter(|check| matches!(check.id, "user-input" | "variable"))
            .collect();
        assert_eq!(found[0].finding, "1 of 3 inputs are valid");
        assert_eq!(found.iter().map(|check| check.line).collect::<Vec<_>>(), [None; 3]);
        assert_eq!(
            judge("{}").iter().filter(|check| check.finding == "0 of 0 inputs are valid").count(),
            1
        );
    }

    #[test]
    fn prefix_corrupts_only_if_replaced_first() {
        let findings = |contents: &str| {
            let service = serde_json::json!({
                "custom_attrs": {"A": "O|text|what", "ASKED": "O|text|what"},
                "custom_attrs_values": {"A": "1", "AB": "2", "A_B": "3"},
            });
            let Json::Object(service) = service else { unreachable!() };
            let role = serde_json::json!({"networks": {"NET": "x"}});
            check_references("trainer", contents, &service, &role)
                .into_iter()
                .map(|check| check.finding)
                .collect::<Vec<_>>()
        };
        for (contents, count) in
            [("", 0), ("a$b$", 1), ("X=\"$A\" Y=\"$A\"", 2), ("$AB $A", 2), ("$OTHER $OTHERS", 2)]
        {
            assert_eq!(
                findings(contents),
                [format!("role trainer: {count} references, no conflicts")]
            );
        }
        let corrupts = |short, long| {
            [format!(
                "role trainer: ${short} is a prefix of ${long}, which OneFlow 6 corrupts when it \
                 replaces ${short}"
            )]
        };
        assert_eq!(findings("$A,$AB"), corrupts("A", "AB"));
        assert_eq!(findings("$A-$A_B"), corrupts("A", "A_B"));
        assert_eq!(
            findings("$NET $NETS"),
            corrupts("NET", "NETS"),
            "networks of the role are replaced as well"
        );
        let without_value =
            "role trainer: if ASKED has no value, OneFlow 6 passes the text $ASKED to the VM";
        assert_eq!(findings("$ASKED"), [without_value]);
    }
}
