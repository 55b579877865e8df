//! OpenNebula's state and OneGate's replies to requests, without a socket.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::Request;

/// OneGate's state; a test changes it with [`super::OneGateSimulator::change`].
#[derive(Debug, Clone, Default)]
pub struct State {
    /// VMs by ID.
    pub vms: BTreeMap<u32, Vm>,
    /// Services by ID.
    pub services: BTreeMap<u32, Service>,
    /// OneGate cannot reach oned: every token is rejected.
    pub oned_down: bool,
    /// OneGate cannot reach OneFlow: no service is found.
    pub oneflow_down: bool,
    /// Variant of OpenNebula's JSON.
    pub shape: Shape,
}

/// A VM.
#[derive(Debug, Clone)]
pub struct Vm {
    /// Name; the default is `vm-ID`.
    pub name: String,
    /// Token that its agent must send; the default is `token-of-ID`.
    pub token: String,
    /// OpenNebula's STATE; the default is 3, ACTIVE.
    pub state: u32,
    /// OpenNebula's LCM_STATE; the default is 3, RUNNING.
    pub lcm_state: u32,
    /// Attributes, including those of OneFlow. OneGate takes a VM's service from here.
    pub user_template: BTreeMap<String, String>,
    /// NICs, each the value of a template's NIC.
    pub nics: Vec<Value>,
    /// OneFlow's ready gate is open: an update contained the text `READY=YES`. It is never closed.
    pub ready: bool,
}

impl Vm {
    /// Sets an attribute.
    pub fn attribute(&mut self, name: &str, value: &str) -> &mut Self {
        self.user_template.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Adds a NIC with this address.
    pub fn nic(&mut self, ip: &str) -> &mut Self {
        let number = self.nics.len();
        self.nics.push(json!({
            "IP": ip, "MAC": format!("02:00:0a:4d:00:{number:02x}"),
            "NAME": format!("NIC{number}"), "NETWORK": "private",
        }));
        self
    }
}

/// A OneFlow service.
#[derive(Debug, Clone, Default)]
pub struct Service {
    /// VMs of each role, in the order in which OneFlow created them.
    pub roles: Vec<(String, Vec<u32>)>,
    /// Number in the name of the next VM of each role; numbers are never reused.
    pub next_numbers: BTreeMap<String, u32>,
}

/// Variants of OpenNebula's JSON between versions and locations.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shape {
    /// IDs and states are numbers instead of strings.
    pub numbers: bool,
    /// Renders a single NIC as an object instead of an array with one element. Extended services
    /// always render an object.
    pub one_nic_is_an_object: bool,
    /// An empty list is `{}` instead of `[]`.
    pub empty_lists_are_objects: bool,
    /// `vm_info` of the service's nodes is null.
    pub vm_info_is_null: bool,
}

/// A status other than 200 and its plain text.
type Refusal = (u16, String);

impl State {
    /// Returns the VM with this ID. Creates it if necessary: running, without a NIC, in no service.
    pub fn vm(&mut self, id: u32) -> &mut Vm {
        self.vms.entry(id).or_insert_with(|| Vm {
            name: format!("vm-{id}"),
            token: format!("token-of-{id}"),
            state: 3,
            lcm_state: 3,
            user_template: BTreeMap::new(),
            nics: Vec::new(),
            ready: false,
        })
    }

    /// Adds a VM to a role as OneFlow does: the VM's attributes are set first and the VM is listed
    /// later. To simulate the time between, when OneGate reports that the service does not contain
    /// the VM, set only SERVICE_ID.
    pub fn join(&mut self, service: u32, role: &str, id: u32) -> &mut Vm {
        let of_service = self.services.entry(service).or_default();
        match of_service.roles.iter_mut().find(|(name, _)| name == role) {
            Some((_, nodes)) => nodes.push(id),
            None => of_service.roles.push((role.to_owned(), vec![id])),
        }
        let next = of_service.next_numbers.entry(role.to_owned()).or_default();
        let name = format!("{role}_{next}_(service_{service})");
        *next += 1;
        let vm = self.vm(id);
        vm.name = name;
        vm.attribute("SERVICE_ID", &service.to_string()).attribute("ROLE_NAME", role)
    }

    /// Returns the status and the body.
    pub(super) fn answer(&mut self, request: &Request) -> (u16, String) {
        match self.route(request) {
            Ok(body) => (200, body),
            Err(refusal) => refusal,
        }
    }

    fn route(&mut self, request: &Request) -> Result<String, Refusal> {
        let segments: Vec<&str> = request.path().split('/').skip(1).collect();
        match (request.method.as_str(), &segments[..]) {
            ("GET", ["vm"]) => {
                let id = self.authenticate(request)?;
                Ok(self.vm_json(id).to_string())
            }
            ("GET", ["vms", peer]) => {
                let peer = self.peer(self.authenticate(request)?, peer)?;
                Ok(self.vm_json(peer).to_string())
            }
            ("GET", ["service"]) => {
                let id = self.authenticate(request)?;
                let service = self.service_with(id, id)?;
                Ok(self
                    .service_json(service, request.target.ends_with("?extended=true"))
                    .to_string())
            }
            ("PUT", ["vm"]) => {
                let id = self.authenticate(request)?;
                self.update(id, request)
            }
            ("PUT", ["vms", peer]) => {
                let peer = self.peer(self.authenticate(request)?, peer)?;
                self.update(peer, request)
            }
            _ => Err((400, "Route not found".to_owned())),
        }
    }

    fn authenticate(&self, request: &Request) -> Result<u32, Refusal> {
        let token = request.header("X-ONEGATE-TOKEN");
        let id = request
            .vm_id()
            .filter(|id| self.vms.get(id).is_some_and(|vm| token == Some(&vm.token)));
        id.filter(|_| !self.oned_down).ok_or_else(|| (401, "Not authorized".to_owned()))
    }

    /// Returns the service of the VM `own` if it contains the VM `id`.
    fn service_with(&self, own: u32, id: u32) -> Result<u32, Refusal> {
        let text = self.vms[&own].user_template.get("SERVICE_ID").map_or("", String::as_str);
        let number: u32 =
            text.parse().map_err(|_| (400, "Empty or invalid SERVICE_ID".to_owned()))?;
        let service = self.services.get(&number).filter(|_| !self.oneflow_down);
        let service = service.ok_or_else(|| (404, format!("Service {number} not found")))?;
        if service.roles.iter().any(|(_, nodes)| nodes.contains(&id)) {
            Ok(number)
        } else {
            Err((400, format!("Service {number} does not contain VM {id}")))
        }
    }

    fn peer(&self, own: u32, id: &str) -> Result<u32, Refusal> {
        // Like Ruby's to_i: a string that is not a number is 0.
        let id = id.parse().unwrap_or(0);
        self.service_with(own, id)?;
        if self.vms.contains_key(&id) {
            Ok(id)
        } else {
            Err((404, format!("Error getting virtual machine [{id}].")))
        }
    }

    fn update(&mut self, id: u32, request: &Request) -> Result<String, Refusal> {
        let (Some(text), Some("1")) = (request.update(), request.form("type").as_deref()) else {
            return Err((400, "The simulator accepts only data=...&type=1".to_owned()));
        };
        let attributes = attributes(&text).map_err(|line| {
            (500, format!("[one.vm.update] Error updating [{id}]. syntax error: {line}"))
        })?;
        let vm = self.vm(id);
        vm.user_template.extend(attributes);
        // EventManager.rb searches the whole text of the update, not an attribute.
        vm.ready |= request.sets_ready_gate();
        Ok(String::new())
    }

    fn number(&self, number: u32) -> Value {
        if self.shape.numbers { json!(number) } else { json!(number.to_string()) }
    }

    fn list(&self, list: &[Value], one_is_an_object: bool) -> Value {
        match list {
            [] if self.shape.empty_lists_are_objects => json!({}),
            [one] if one_is_an_object => one.clone(),
            list => json!(list),
        }
    }

    fn vm_json(&self, id: u32) -> Value {
        json!({"VM": self.vm_fields(id, self.shape.one_nic_is_an_object)})
    }

    fn vm_fields(&self, id: u32, one_nic_is_an_object: bool) -> Map<String, Value> {
        let vm = &self.vms[&id];
        // An XML element without content.
        let value = |value: &String| if value.is_empty() { json!({}) } else { json!(value) };
        let user_template: Map<_, _> =
            vm.user_template.iter().map(|(name, text)| (name.clone(), value(text))).collect();
        let fields = [
            ("NAME", json!(vm.name)),
            ("ID", self.number(id)),
            ("STATE", self.number(vm.state)),
            ("LCM_STATE", self.number(vm.lcm_state)),
            ("USER_TEMPLATE", user_template.into()),
            (
                "TEMPLATE",
                json!({"NIC": self.list(&vm.nics, one_nic_is_an_object),
                    "NIC_ALIAS": self.list(&[], false)}),
            ),
        ];
        fields.map(|(name, value)| (name.to_owned(), value)).into_iter().collect()
    }

    fn service_json(&self, id: u32, extended: bool) -> Value {
        let node = |id: &u32| {
            let vm_info = self.vms.get(id).filter(|_| !self.shape.vm_info_is_null).map(|vm| {
                let mut fields = if extended { self.vm_fields(*id, true) } else { Map::new() };
                let basic = [
                    ("ID", self.number(*id)),
                    ("UID", self.number(2)),
                    ("GID", self.number(1)),
                    ("UNAME", json!("alice")),
                    ("GNAME", json!("users")),
                    ("NAME", json!(vm.name)),
                ];
                fields.extend(basic.map(|(name, value)| (name.to_owned(), value)));
                json!({"VM": fields})
            });
            json!({"deploy_id": id, "running": null, "vm_info": vm_info})
        };
        let role = |(name, nodes): &(String, Vec<u32>)| {
            let list: Vec<Value> = nodes.iter().map(node).collect();
            json!({"name": name, "cardinality": nodes.len(), "state": 2,
                "nodes": self.list(&list, false)})
        };
        let roles: Vec<Value> = self.services[&id].roles.iter().map(role).collect();
        json!({"SERVICE": {"name": "flower", "id": self.number(id), "state": 2, "roles": roles}})
    }
}

/// Parses the attributes of an update, with upper-case names. The error is the line that oned
/// rejects.
fn attributes(text: &str) -> Result<Vec<(String, String)>, String> {
    let attribute = |line: &str| {
        let (name, value) = line.split_once('=')?;
        let name_is_good =
            !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let value = match value {
            "\"\"" => "",
            "" => return None,
            value if value.contains([',', '[', ']', '"', '\\', '\r']) => return None,
            value => value,
        };
        name_is_good.then(|| (name.to_uppercase(), value.to_owned()))
    };
    let lines = text.split('\n').filter(|line| !line.is_empty());
    lines.map(|line| attribute(line).ok_or_else(|| line.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oned_accepts_only_bare_values() {
        let one = |name: &str, value: &str| Ok(vec![(name.to_owned(), value.to_owned())]);
        assert_eq!(attributes("fl_node_id=7"), one("FL_NODE_ID", "7"));
        assert_eq!(attributes("K=\"\"\n"), one("K", ""));
        assert_eq!(attributes("K=base64=="), one("K", "base64=="));
        for value in ["a,b", "[a", "a]", "\"a\"", "a\\b", "a\nb", "a\rb", ""] {
            assert!(attributes(&format!("K={value}")).is_err(), "{value:?}");
        }
    }
}
