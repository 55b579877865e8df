//! A OneFlow service template, in JSON, against what the agent and the OneFlow of each release
//! need. Pure: text in, checks out. What OneFlow does is in src/flow/lib/models and
//! src/oca/ruby/opennebula/flow of OpenNebula/one.

use serde_json::{Map, Value as Json};

use super::{Pair, Place, judge_input, unknown_name};
use crate::check::Check;
use crate::values::escape;

const ROLES: &str = "service-roles";
const REFERENCES: &str = "service-references";

/// Checks the text of a service template.
pub(super) fn judge(text: &str) -> Vec<Check> {
    let service: Map<String, Json> = match serde_json::from_str(text) {
        Ok(service) => service,
        Err(error) => {
            return vec![
                Check::error("syntax", error.to_string(), "mend that place")
                    .at(error.line().max(1)),
            ];
        }
    };
    let mut checks = vec![Check::ok("syntax", "a service template of OneFlow")];
    let roles: Vec<&Json> =
        service.get("roles").and_then(Json::as_array).into_iter().flatten().collect();
    let named = |name: &str| roles.iter().find(|role| role["name"] == name);
    for name in ["superlink", "supernode"] {
        checks.push(match named(name) {
            Some(role) => sized(name, role),
            None => {
                let finding =
                    format!("there is no role {name}, by which the nodes find the SuperLink");
                Check::error(ROLES, finding, format!("\"roles\": [{{\"name\": \"{name}\", …}}]"))
            }
        });
    }
    if let Some(supernode) = named("supernode") {
        let is_child = strings(&supernode["parents"]).any(|parent| parent == "superlink");
        let is_straight =
            service.get("deployment").is_some_and(|deployment| deployment == "straight");
        checks.push(if is_child && is_straight {
            Check::ok(ROLES, "the SuperNodes start after the SuperLink")
        } else {
            let finding = "the SuperNodes do not wait for the SuperLink";
            let fix = "\"deployment\": \"straight\", and \"parents\": [\"superlink\"] in the role supernode";
            Check::warning(ROLES, finding, fix)
        });
    }
    checks.push(if service.get("ready_status_gate") == Some(&Json::Bool(true)) {
        Check::ok("service-gate", "a VM counts once it reports READY")
    } else {
        let finding = "without the gate a VM counts as ready while it boots";
        Check::warning(
            "service-gate",
            finding,
            "\"ready_status_gate\": true, and REPORT_READY=\"YES\" in the VM templates",
        )
    });
    checks.extend(inputs(&service));
    // What only OneFlow 6 reads.
    for role in roles {
        if let Some(contents) = role["vm_template_contents"].as_str() {
            checks.extend(references(
                role["name"].as_str().unwrap_or_default(),
                contents,
                &service,
                role,
            ));
        }
    }
    checks
}

/// Whether the ids are filled in is for OpenNebula to say; how many VMs there may be is said here.
fn sized(name: &str, role: &Json) -> Check {
    let [min, cardinality, max] =
        ["min_vms", "cardinality", "max_vms"].map(|key| role[key].as_u64());
    match (min, cardinality, max) {
        (Some(min), Some(cardinality), Some(max)) if min <= cardinality && cardinality <= max => {
            Check::ok(
                ROLES,
                format!("the role {name} has {cardinality} VMs, {min} to {max} by oneflow scale"),
            )
        }
        (Some(_), Some(_), Some(_)) => {
            let finding = format!(
                "the role {name} has a cardinality outside of min_vms and max_vms: OneFlow refuses it"
            );
            Check::error(ROLES, finding, "\"min_vms\": 1, \"cardinality\": 2, \"max_vms\": 10")
        }
        _ => {
            let finding = format!(
                "the role {name} has no cardinality with min_vms and max_vms: nothing bounds oneflow scale"
            );
            Check::warning(ROLES, finding, "\"min_vms\": 1, \"cardinality\": 2, \"max_vms\": 10")
        }
    }
}

fn inputs(service: &Map<String, Json>) -> Vec<Check> {
    let asked = ["custom_attrs", "user_inputs"]
        .into_iter()
        .filter_map(|key| service.get(key)?.as_object())
        .flatten();
    let mut checks = Vec::new();
    let mut count = 0;
    for (name, input) in asked {
        count += 1;
        let value = input.as_str().unwrap_or_default().to_owned();
        let pair = Pair { name: name.clone(), value, place: Place { line: 1, column: 1 } };
        checks.extend(
            judge_input(&pair)
                .into_iter()
                .chain(unknown_name(name, 1))
                .map(|check| Check { line: None, ..check }),
        );
    }
    let wrong = checks.len();
    checks.insert(
        0,
        Check::ok(
            "user-input",
            format!("{} of {count} inputs are right", count - wrong.min(count)),
        ),
    );
    checks
}

/// `vm_template_contents`: OneFlow 6 replaces each `$KEY` that it has a value for, in the order of
/// the text, each time everywhere, also as the beginning of a longer name; the others stay
/// (resolve_attributes of models/service.rb).
fn references(name: &str, contents: &str, service: &Map<String, Json>, role: &Json) -> Vec<Check> {
    let keys: Vec<&str> = contents
        .split('$')
        .skip(1)
        .map(|rest| {
            rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default()
        })
        .filter(|key| !key.is_empty())
        .collect();
    let given = |list: &str, key: &str| {
        [service.get(list), role.get(list)]
            .into_iter()
            .flatten()
            .any(|values| values.get(key).is_some())
    };
    let role = escape(name);
    let mut checks = Vec::new();
    for (at, key) in keys.iter().enumerate() {
        let is_answered = given("custom_attrs_values", key);
        let is_replaced =
            is_answered || ["custom_attrs", "networks"].iter().any(|list| given(list, key));
        let longer =
            keys[at + 1..].iter().find(|later| later.len() > key.len() && later.starts_with(key));
        if let Some(longer) = longer.filter(|_| is_replaced) {
            let finding = format!(
                "role {role}: ${key} is the beginning of ${longer}, which OneFlow 6 corrupts with it"
            );
            checks.push(Check::error(
                REFERENCES,
                finding,
                format!("write ${longer} before ${key}"),
            ));
        }
        if given("custom_attrs", key) && !is_answered {
            let finding = format!(
                "role {role}: where {key} is not answered, OneFlow 6 gives the VM the text ${key}"
            );
            let fix = format!("\"custom_attrs_values\": {{\"{key}\": \"\"}}");
            checks.push(Check::warning(REFERENCES, finding, fix));
        }
    }
    if checks.is_empty() {
        checks.push(Check::ok(
            REFERENCES,
            format!("role {role}: {} references, none spoils another", keys.len()),
        ));
    }
    checks
}

fn strings(of: &Json) -> impl Iterator<Item = &str> {
    of.as_array().into_iter().flatten().filter_map(Json::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Level;
    use crate::opennebula::templates::{OpenNebulaRelease, service};

    fn bad(service: &Json) -> Vec<(Level, &'static str, String)> {
        let checks =
            judge(&service.to_string()).into_iter().filter(|check| check.level != Level::Ok);
        checks.map(|check| (check.level, check.id, check.finding)).collect()
    }

    /// Our service after this change has exactly one finding, of this kind.
    #[track_caller]
    fn one(
        release: OpenNebulaRelease,
        change: impl FnOnce(&mut Json),
        level: Level,
        id: &str,
        words: &str,
    ) {
        let mut service = service(release);
        assert_eq!(bad(&service), []);
        change(&mut service);
        let found = bad(&service);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!((found[0].0, found[0].1), (level, id), "{found:#?}");
        assert!(found[0].2.contains(words), "{found:#?}");
    }

    #[test]
    fn each_fault_of_a_service_has_its_check() {
        use Level::{Error, Warning};
        for release in [OpenNebulaRelease::V6, OpenNebulaRelease::V7] {
            one(
                release,
                |it| it["roles"][1]["name"] = "node".into(),
                Error,
                ROLES,
                "there is no role supernode",
            );
            one(
                release,
                |it| it["roles"][1]["parents"] = Json::Null,
                Warning,
                ROLES,
                "do not wait",
            );
            one(release, |it| it["deployment"] = "none".into(), Warning, ROLES, "do not wait");
            one(
                release,
                |it| it["roles"][1]["cardinality"] = 11.into(),
                Error,
                ROLES,
                "refuses it",
            );
            one(
                release,
                |it| it["roles"][1]["max_vms"] = Json::Null,
                Warning,
                ROLES,
                "nothing bounds",
            );
            one(
                release,
                |it| it["ready_status_gate"] = false.into(),
                Warning,
                "service-gate",
                "while it boots",
            );
        }
        one(
            OpenNebulaRelease::V7,
            |it| it["user_inputs"]["FL_TLS_ENABLED"] = "O|bool|x".into(),
            Error,
            "user-input",
            "no type",
        );
        one(
            OpenNebulaRelease::V7,
            |it| it["user_inputs"]["FL_TSL_ENABLED"] = "O|text|x| |".into(),
            Warning,
            "variable",
            "not a known",
        );
        // Whatever is in the JSON, it is judged.
        judge(
            r#"{"roles": [1, {"name": 2, "parents": 3, "vm_template_contents": "$ $$é"}], "custom_attrs": {"X": 1}}"#,
        );
        let syntax = judge("{\n\"roles\": [}");
        assert_eq!((syntax.len(), syntax[0].id, syntax[0].line), (1, "syntax", Some(2)));
    }

    #[test]
    fn a_name_that_begins_another_and_an_input_without_a_value_are_what_oneflow_6_corrupts() {
        let contents = "A=\"$FL_GRPC_KEEPALIVE_TIME\"\nB=\"$FL_GRPC_KEEPALIVE_TIMEOUT\"\n";
        let change = |it: &mut Json| it["roles"][1]["vm_template_contents"] = contents.into();
        one(
            OpenNebulaRelease::V6,
            change,
            Level::Error,
            REFERENCES,
            "$FL_GRPC_KEEPALIVE_TIME is the beginning of $FL_GRPC_KEEPALIVE_TIMEOUT",
        );
        let change = |it: &mut Json| {
            it["custom_attrs_values"].as_object_mut().map(|values| values.remove("FL_NODE_CONFIG"));
        };
        one(
            OpenNebulaRelease::V6,
            change,
            Level::Warning,
            REFERENCES,
            "gives the VM the text $FL_NODE_CONFIG",
        );
    }

    #[test]
    fn the_number_of_vms_is_told_and_may_be_at_its_bounds() {
        let sized = |min: u64, cardinality: u64, max: u64| {
            let check = sized(
                "trainer",
                &serde_json::json!({"min_vms": min, "cardinality": cardinality, "max_vms": max}),
            );
            (check.level, check.finding)
        };
        assert_eq!(
            sized(2, 2, 2),
            (Level::Ok, "the role trainer has 2 VMs, 2 to 2 by oneflow scale".into())
        );
        assert_eq!(sized(3, 2, 9).0, Level::Error);
        assert_eq!(sized(1, 3, 2).0, Level::Error);
    }

    #[test]
    fn inputs_are_counted_and_have_no_line_for_json_has_none() {
        let text = r#"{"custom_attrs": {"A": "O|text|what", "B": "O"}, "user_inputs": {"FL_SOMETHING": "O|text|what"}}"#;
        let found: Vec<_> = judge(text)
            .into_iter()
            .filter(|check| matches!(check.id, "user-input" | "variable"))
            .collect();
        assert_eq!(found[0].finding, "1 of 3 inputs are right");
        assert_eq!(found.iter().map(|check| check.line).collect::<Vec<_>>(), [None; 3]);
        assert_eq!(
            judge("{}").iter().filter(|check| check.finding == "0 of 0 inputs are right").count(),
            1
        );
    }

    #[test]
    fn a_reference_spoils_a_longer_one_only_where_it_is_replaced_and_comes_first() {
        let judged = |contents: &str| {
            let service = serde_json::json!({
                "custom_attrs": {"A": "O|text|what", "ASKED": "O|text|what"},
                "custom_attrs_values": {"A": "1", "AB": "2", "A_B": "3"},
            });
            let Json::Object(service) = service else { unreachable!() };
            let role = serde_json::json!({"networks": {"NET": "x"}});
            references("trainer", contents, &service, &role)
                .into_iter()
                .map(|check| check.finding)
                .collect::<Vec<_>>()
        };
        for (contents, count) in
            [("", 0), ("a$b$", 1), ("X=\"$A\" Y=\"$A\"", 2), ("$AB $A", 2), ("$OTHER $OTHERS", 2)]
        {
            assert_eq!(
                judged(contents),
                [format!("role trainer: {count} references, none spoils another")]
            );
        }
        let spoils = |short, long| {
            [format!(
                "role trainer: ${short} is the beginning of ${long}, which OneFlow 6 corrupts with it"
            )]
        };
        assert_eq!(judged("$A,$AB"), spoils("A", "AB"));
        assert_eq!(judged("$A-$A_B"), spoils("A", "A_B"));
        assert_eq!(
            judged("$NET $NETS"),
            spoils("NET", "NETS"),
            "a network of the role is replaced as well"
        );
        let unanswered =
            "role trainer: where ASKED is not answered, OneFlow 6 gives the VM the text $ASKED";
        assert_eq!(judged("$ASKED"), [unanswered]);
    }
}
