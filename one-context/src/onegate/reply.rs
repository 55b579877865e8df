//! Parser for OneGate's replies about services and VMs. Pure.
//!
//! OneGate converts its replies from XML: a number can be a string, a list with one element can be
//! that element, and an empty value can be `{}`, `[]`, `""` or null. The parser accepts all of
//! these and ignores missing values. Only a reply without the requested object or its ID is an
//! error.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::slice;

use serde_json::Value;

use super::{Role, RoleVm, Service, Vm};

/// Error of parsing a reply.
#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    /// Not JSON, or nested too deeply.
    #[error("invalid JSON")]
    NotJson(#[from] serde_json::Error),
    /// JSON without a required value.
    #[error("missing {0}")]
    Missing(&'static str),
}

/// Parses the reply to `GET /service`.
///
/// # Errors
/// Returns [`ReplyError`] if the reply has another format.
pub fn service(json: &[u8]) -> Result<Service, ReplyError> {
    let reply: Value = serde_json::from_slice(json)?;
    let service = &reply["SERVICE"];
    if !service.is_object() {
        return Err(ReplyError::Missing("SERVICE"));
    }
    Ok(Service {
        id: number(&service["id"]).ok_or(ReplyError::Missing("SERVICE.id"))?,
        name: text(&service["name"]).unwrap_or_default(),
        roles: list(&service["roles"]).iter().filter_map(role).collect(),
    })
}

/// Parses the reply to `GET /vm` and `GET /vms/<id>`.
///
/// # Errors
/// Returns [`ReplyError`] if the reply has another format.
pub fn vm(json: &[u8]) -> Result<Vm, ReplyError> {
    let reply: Value = serde_json::from_slice(json)?;
    let vm = &reply["VM"];
    if !vm.is_object() {
        return Err(ReplyError::Missing("VM"));
    }
    Ok(Vm {
        id: number(&vm["ID"]).ok_or(ReplyError::Missing("VM.ID"))?,
        name: text(&vm["NAME"]).unwrap_or_default(),
        is_running: is_running(vm),
        attributes: attributes(&vm["USER_TEMPLATE"]),
        addresses: addresses(&vm["TEMPLATE"]),
    })
}

/// Returns `None` if the role has no name.
fn role(role: &Value) -> Option<Role> {
    Some(Role {
        name: text(&role["name"])?,
        cardinality: number(&role["cardinality"]),
        vms: list(&role["nodes"]).iter().filter_map(role_vm).collect(),
    })
}

/// Returns `None` if the node has no VM ID: OneFlow has not created the VM yet.
fn role_vm(node: &Value) -> Option<RoleVm> {
    let vm = &node["vm_info"]["VM"];
    Some(RoleVm {
        vm_id: number(&node["deploy_id"]).or_else(|| number(&vm["ID"]))?,
        name: text(&vm["NAME"]),
        attributes: attributes(&vm["USER_TEMPLATE"]),
    })
}

/// Returns whether the VM runs: STATE 3 is ACTIVE, LCM_STATE 3 RUNNING (OpenNebula,
/// `include/VirtualMachine.h`).
fn is_running(vm: &Value) -> Option<bool> {
    match (number(&vm["STATE"])?, number(&vm["LCM_STATE"])) {
        (3, lcm_state) => Some(lcm_state? == 3),
        _ => Some(false),
    }
}

/// Returns the text attributes, without empty, repeated and nested ones.
fn attributes(user_template: &Value) -> BTreeMap<String, String> {
    let attributes = user_template.as_object().into_iter().flatten();
    attributes.filter_map(|(name, value)| Some((name.clone(), text(value)?))).collect()
}

/// Returns each address once, without link-local IPv6 addresses: these need the name of an
/// interface.
fn addresses(template: &Value) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for nic in [list(&template["NIC"]), list(&template["NIC_ALIAS"])].concat() {
        for key in ["IP", "IP6", "IP6_GLOBAL", "IP6_ULA"] {
            let address: Option<IpAddr> = nic[key].as_str().and_then(|text| text.parse().ok());
            let is_link_local =
                matches!(address, Some(IpAddr::V6(address)) if address.is_unicast_link_local());
            addresses
                .extend(address.filter(|address| !is_link_local && !addresses.contains(address)));
        }
    }
    addresses
}

/// Returns the elements of a list, which can be an object if it is the only element.
fn list(value: &Value) -> &[Value] {
    match value {
        Value::Array(elements) => elements,
        Value::Object(_) => slice::from_ref(value),
        _ => &[],
    }
}

fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64(),
        Value::String(digits) => decimal(digits),
        _ => None,
    }
}

/// Parses decimal digits; `parse` alone accepts a leading `+`.
pub(super) fn decimal(digits: &str) -> Option<u64> {
    digits.parse().ok().filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit()))
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use serde_json::json;

    fn service_of(service: Value) -> Service {
        super::service(json!({ "SERVICE": service }).to_string().as_bytes()).unwrap()
    }

    fn vm_of(vm: Value) -> Vm {
        super::vm(json!({ "VM": vm }).to_string().as_bytes()).unwrap()
    }

    fn vms_of(nodes: Value) -> Vec<RoleVm> {
        service_of(json!({"id": 7, "roles": [{"name": "superlink", "nodes": nodes}]}))
            .roles
            .remove(0)
            .vms
    }

    fn addresses_of(template: Value) -> Vec<String> {
        vm_of(json!({"ID": 1, "TEMPLATE": template}))
            .addresses
            .iter()
            .map(IpAddr::to_string)
            .collect()
    }

    fn named(names: &[(&str, &str)]) -> BTreeMap<String, String> {
        names.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// Replies of OpenNebula 7.2.0.
    const SERVICE: &str = r#"{"SERVICE":{"name":"flower","id":"7","state":2,
 "roles":[{"name":"superlink","cardinality":1,"state":2,
 "nodes":[{"deploy_id":100,"running":null,"vm_info":{"VM":{"ID":"100","UID":"2","GID":"1",
 "UNAME":"alice","GNAME":"users","NAME":"superlink_0_(service_7)"}}}]}]}}"#;
    const VM: &str = r#"{"VM":{"NAME":"supernode_0","ID":"101","STATE":"3","LCM_STATE":"3",
 "USER_TEMPLATE":{"SERVICE_ID":"7","ROLE_NAME":"supernode","FL_ENDPOINT":"10.0.0.1:9092"},
 "TEMPLATE":{"NIC":[{"IP":"192.168.0.101","MAC":"02:00:c0:a8:00:65","NAME":"NIC0",
 "NETWORK":"private"}],"NIC_ALIAS":[]}}}"#;

    #[test]
    fn service_reply_is_parsed() {
        let vm = RoleVm {
            vm_id: 100,
            name: Some("superlink_0_(service_7)".to_owned()),
            attributes: BTreeMap::new(),
        };
        let role = Role { name: "superlink".to_owned(), cardinality: Some(1), vms: vec![vm] };
        assert_eq!(
            service(SERVICE.as_bytes()).unwrap(),
            Service { id: 7, name: "flower".to_owned(), roles: vec![role] }
        );
    }

    #[test]
    fn vm_reply_is_parsed() {
        let expected = Vm {
            id: 101,
            name: "supernode_0".to_owned(),
            is_running: Some(true),
            attributes: named(&[
                ("SERVICE_ID", "7"),
                ("ROLE_NAME", "supernode"),
                ("FL_ENDPOINT", "10.0.0.1:9092"),
            ]),
            addresses: vec!["192.168.0.101".parse().unwrap()],
        };
        assert_eq!(vm(VM.as_bytes()).unwrap(), expected);
    }

    #[test]
    fn numbers_are_numbers_or_strings() {
        for id in [json!(7), json!("7"), json!("007")] {
            assert_eq!(service_of(json!({ "id": id })).id, 7);
            assert_eq!(vm_of(json!({ "ID": id })).id, 7);
            assert_eq!(vms_of(json!([{ "deploy_id": id }]))[0].vm_id, 7);
            let roles =
                service_of(json!({"id": 1, "roles": [{"name": "a", "cardinality": id}]})).roles;
            assert_eq!(roles[0].cardinality, Some(7));
        }
    }

    #[test]
    fn invalid_id_is_an_error() {
        for id in [
            "null",
            "\"\"",
            "{}",
            "[]",
            "[7]",
            "-1",
            "\"-1\"",
            "\"+7\"",
            "7.0",
            "7.5",
            "1e3",
            "1e400",
            "\"0x7\"",
            "\" 7\"",
            "true",
            "18446744073709551616",
            "\"99999999999999999999999\"",
        ] {
            let json = format!(r#"{{"SERVICE":{{"id":{id}}},"VM":{{"ID":{id}}}}}"#);
            assert!(service(json.as_bytes()).is_err(), "{id}");
            assert!(vm(json.as_bytes()).is_err(), "{id}");
        }
        assert_eq!(vm(b"{\"VM\":{}}").unwrap_err().to_string(), "missing VM.ID");
        assert_eq!(service(b"{\"SERVICE\":{}}").unwrap_err().to_string(), "missing SERVICE.id");
    }

    #[test]
    fn other_reply_is_an_error() {
        for json in [
            "null",
            "[]",
            "7",
            "\"SERVICE\"",
            "{}",
            r#"{"SERVICE":null,"VM":null}"#,
            r#"{"SERVICE":[],"VM":""}"#,
        ] {
            assert_eq!(
                service(json.as_bytes()).unwrap_err().to_string(),
                "missing SERVICE",
                "{json}"
            );
            assert_eq!(vm(json.as_bytes()).unwrap_err().to_string(), "missing VM", "{json}");
        }
        let deep = "[".repeat(1_000_000);
        for json in [
            b"".as_slice(),
            b"Not authorized",
            b"{\"VM\":{\"ID\":1}",
            b"{\"VM\":{\"ID\":1}}x",
            b"\xff",
            deep.as_bytes(),
        ] {
            assert_eq!(service(json).unwrap_err().to_string(), "invalid JSON");
            assert_eq!(vm(json).unwrap_err().to_string(), "invalid JSON");
        }
    }

    #[test]
    fn roles_and_nodes_are_optional() {
        for nothing in [json!(null), json!([]), json!({}), json!("")] {
            assert_eq!(service_of(json!({"id": 7, "roles": nothing})).roles, []);
            assert_eq!(vms_of(nothing), []);
        }
        assert_eq!(service_of(json!({"id": 7})).roles, []);
        assert_eq!(service_of(json!({"id": 7, "roles": [{"name": "a"}]})).roles[0].vms, []);
    }

    #[test]
    fn single_element_needs_no_list() {
        let service =
            service_of(json!({"id": 7, "roles": {"name": "a", "nodes": {"deploy_id": 100}}}));
        assert_eq!((service.roles.len(), service.roles[0].vms[0].vm_id), (1, 100));
    }

    #[test]
    fn roles_keep_order_and_need_a_name() {
        let roles = json!([{"name": "b"}, {"name": ""}, {}, null, 7, {"name": {}}, {"name": "a"}]);
        let names: Vec<_> = service_of(json!({"id": 7, "roles": roles}))
            .roles
            .into_iter()
            .map(|role| role.name)
            .collect();
        assert_eq!(names, ["b", "a"]);
    }

    #[test]
    fn vm_id_comes_from_oneflow_or_vm() {
        let nodes = vms_of(json!([
            {"deploy_id": 100, "vm_info": null},
            {"deploy_id": "101"},
            {"vm_info": {"VM": {"ID": "102"}}},
            {"deploy_id": null, "vm_info": {"VM": {"ID": 103}}},
            {"deploy_id": -1, "vm_info": {}},
            {"deploy_id": {}, "vm_info": {"VM": {}}},
            {"vm_info": {"VM": null}},
            {},
            null,
        ]));
        assert_eq!(nodes.iter().map(|node| node.vm_id).collect::<Vec<_>>(), [100, 101, 102, 103]);
        assert!(nodes.iter().all(|node| node.name.is_none() && node.attributes.is_empty()));
    }

    #[test]
    fn extended_service_has_vm_attributes() {
        let vm = json!({
            "ID": "100",
            "USER_TEMPLATE": {"FL_ENDPOINT": "10.0.0.1:9092"},
            "TEMPLATE": {"NIC": {"IP": "10.0.0.1"}},
        });
        let nodes = vms_of(json!([{"deploy_id": 100, "vm_info": {"VM": vm}}]));
        assert_eq!(nodes[0].attributes, named(&[("FL_ENDPOINT", "10.0.0.1:9092")]));
    }

    #[test]
    fn only_text_attributes_are_kept() {
        let user_template = json!({
            "A": "text", "B": 9092, "C": 1.5, "D": true, "E": -1,
            "F": {}, "G": {"H": "nested"}, "I": ["a", "b"], "J": null, "K": "", "L": [],
        });
        assert_eq!(
            vm_of(json!({"ID": 1, "USER_TEMPLATE": user_template})).attributes,
            named(&[("A", "text"), ("B", "9092"), ("C", "1.5"), ("D", "true"), ("E", "-1")])
        );
        for nothing in [json!(null), json!({}), json!(""), json!([])] {
            assert_eq!(vm_of(json!({"ID": 1, "USER_TEMPLATE": nothing})).attributes, named(&[]));
        }
    }

    #[test]
    fn running_needs_both_states() {
        for (state, lcm_state, expected) in [
            (json!("3"), json!("3"), Some(true)),
            (json!(3), json!(3), Some(true)),
            (json!("3"), json!("36"), Some(false)),
            (json!("8"), json!("0"), Some(false)),
            (json!("8"), json!(null), Some(false)),
            (json!("3"), json!({}), None),
            (json!(null), json!("3"), None),
        ] {
            assert_eq!(
                vm_of(json!({"ID": 1, "STATE": state, "LCM_STATE": lcm_state})).is_running,
                expected
            );
        }
        assert_eq!(vm_of(json!({"ID": 1})).is_running, None);
    }

    #[test]
    fn addresses_are_ordered_by_nic() {
        let template = json!({
            "NIC_ALIAS": [{"IP": "10.0.0.9"}],
            "NIC": [
                {
                    "IP6_ULA": "fd00::1", "IP6_GLOBAL": "2001:db8::1", "IP6": "2001:db8::2",
                    "IP": "10.0.0.1",
                },
                {"IP": "10.0.0.2"},
            ],
        });
        assert_eq!(
            addresses_of(template),
            ["10.0.0.1", "2001:db8::2", "2001:db8::1", "fd00::1", "10.0.0.2", "10.0.0.9"]
        );
    }

    #[test]
    fn single_nic_and_alias_need_no_list() {
        assert_eq!(
            addresses_of(json!({"NIC": {"IP": "10.0.0.1"}, "NIC_ALIAS": {"IP": "10.0.0.2"}})),
            ["10.0.0.1", "10.0.0.2"]
        );
        assert_eq!(addresses_of(json!({"NIC_ALIAS": {"IP": "10.0.0.2"}})), ["10.0.0.2"]);
        for nothing in [json!(null), json!({}), json!(""), json!([])] {
            assert_eq!(addresses_of(json!({"NIC": nothing, "NIC_ALIAS": nothing})), [""; 0]);
            assert_eq!(addresses_of(nothing), [""; 0]);
        }
    }

    #[test]
    fn unusable_and_repeated_addresses_are_dropped() {
        let template = json!({"NIC": [
            {
                "IP": "", "IP6": "fe80::1", "IP6_LINK": "fe80::2", "IP6_GLOBAL": "2001:db8::1",
                "IP6_ULA": "2001:db8::1",
            },
            {"IP": "10.0.0.256"}, {"IP": 7}, {"IP": {}}, {"IP": "10.0.0.1:80"}, {"IP": "host"}, {},
            null, "10.0.0.3", {"IP": "10.0.0.1"},
        ]});
        assert_eq!(addresses_of(template), ["2001:db8::1", "10.0.0.1"]);
    }

    #[test]
    fn unknown_keys_and_order_are_ignored() {
        let json = br#"{"X":1,"VM":{"TEMPLATE":{"X":{},"NIC":{"X":[],"IP":"10.0.0.1"}},
            "X":null,"ID":7},"Y":[[]]}"#;
        let vm = vm(json).unwrap();
        assert_eq!((vm.id, vm.name.as_str(), vm.addresses.len()), (7, "", 1));
    }

    /// Arbitrary JSON with the keys that the parser reads.
    fn anything() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(json!(null)),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[0-9]{1,25}|[0-9a-f:.]{0,12}|.{0,5}".prop_map(Value::from),
        ];
        let names = [
            "id",
            "ID",
            "name",
            "NAME",
            "roles",
            "nodes",
            "cardinality",
            "deploy_id",
            "vm_info",
            "VM",
            "STATE",
            "LCM_STATE",
            "USER_TEMPLATE",
            "TEMPLATE",
            "NIC",
            "NIC_ALIAS",
            "IP",
            "IP6",
        ];
        leaf.prop_recursive(6, 64, 8, move |inner| {
            prop_oneof![
                vec(inner.clone(), 0..4).prop_map(Value::from),
                vec((prop::sample::select(names.to_vec()), inner), 0..8).prop_map(|fields| fields
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value))
                    .collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn arbitrary_json_never_panics(value in anything()) {
            let json = json!({ "SERVICE": value, "VM": value }).to_string();
            let _ = service(json.as_bytes());
            let _ = vm(json.as_bytes());
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in vec(any::<u8>(), 0..64),
            end in 0..SERVICE.len(),
            at in 0..VM.len(),
            byte: u8,
        ) {
            let _ = (service(&bytes), vm(&bytes));
            let _ = service(&SERVICE.as_bytes()[..end]);
            let mut changed = VM.as_bytes().to_vec();
            changed[at] = byte;
            let _ = vm(&changed);
        }
    }
}
