//! What OpenNebula holds, and what OneGate makes of it: the answer to a request, without a socket.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::Request;

/// What OneGate knows; a test changes it by [`super::OneGateSimulator::change`].
#[derive(Debug, Clone, Default)]
pub struct State {
    /// VMs by their id.
    pub vms: BTreeMap<u32, Vm>,
    /// Services by their id.
    pub services: BTreeMap<u32, Service>,
    /// OneGate cannot ask oned: it takes nobody's token.
    pub oned_down: bool,
    /// OneGate cannot ask OneFlow: it finds no service.
    pub oneflow_down: bool,
    /// Which of the forms that JSON of OpenNebula comes in.
    pub shape: Shape,
}

/// A VM.
#[derive(Debug, Clone)]
pub struct Vm {
    /// Its name; `vm-ID` of a new one.
    pub name: String,
    /// What its agent must send; `token-of-ID` of a new one.
    pub token: String,
    /// OpenNebula's STATE; 3, ACTIVE, of a new one.
    pub state: u32,
    /// OpenNebula's LCM_STATE; 3, RUNNING, of a new one.
    pub lcm_state: u32,
    /// The attributes, its own and those of OneFlow. OneGate takes a VM's service from here.
    pub user_template: BTreeMap<String, String>,
    /// The NICs, each the value of a template's NIC.
    pub nics: Vec<Value>,
    /// OneFlow has opened its gate: an update had the text `READY=YES`. Nothing closes it again.
    pub ready: bool,
}

impl Vm {
    /// Sets an attribute, or another value of it.
    pub fn attribute(&mut self, name: &str, value: &str) -> &mut Self {
        self.user_template.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Adds a NIC with this address.
    pub fn nic(&mut self, ip: &str) -> &mut Self {
        let number = self.nics.len();
        self.nics.push(json!({
            "IP": ip, "MAC": format!("02:00:0a:4d:00:{number:02x}"), "NAME": format!("NIC{number}"), "NETWORK": "private",
        }));
        self
    }
}

/// A service of OneFlow.
#[derive(Debug, Clone, Default)]
pub struct Service {
    /// The VMs of each role, in the order in which OneFlow made them.
    pub roles: Vec<(String, Vec<u32>)>,
    /// The number that the next VM of each role gets in its name: none is ever given twice.
    pub next_numbers: BTreeMap<String, u32>,
}

/// The forms of OpenNebula's JSON that differ between versions and places.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shape {
    /// Ids and states are numbers; otherwise strings.
    pub numbers: bool,
    /// Renders a single NIC as an object instead of an array with one element. Extended services
    /// always render an object.
    pub one_nic_is_an_object: bool,
    /// A list without an entry is `{}`; otherwise `[]`.
    pub empty_lists_are_objects: bool,
    /// The service's nodes have no `vm_info`, but null.
    pub vm_info_is_null: bool,
}

/// A status other than 200, and its plain text.
type Refusal = (u16, String);

impl State {
    /// The VM of this number, which is made where there is none: running, without a NIC, in no
    /// service.
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

    /// A VM of a role, made as OneFlow makes it: the VM is told first and listed then. For the time
    /// between, when OneGate says that the service does not contain it, set its SERVICE_ID alone.
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

    /// The status and the body.
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

    /// The service of the VM `own`, if the VM `id` is in it.
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
        // Ruby's to_i: what is no number is 0.
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
            return Err((400, "The simulator takes data=...&type=1 alone".to_owned()));
        };
        let attributes = attributes(&text).map_err(|line| {
            (500, format!("[one.vm.update] Error updating [{id}]. syntax error: {line}"))
        })?;
        let vm = self.vm(id);
        vm.user_template.extend(attributes);
        // EventManager.rb looks at the whole text of the update, not for an attribute.
        vm.ready |= request.opens_gate();
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
        // An element of XML without content.
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
                json!({"NIC": self.list(&vm.nics, one_nic_is_an_object), "NIC_ALIAS": self.list(&[], false)}),
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
            json!({"name": name, "cardinality": nodes.len(), "state": 2, "nodes": self.list(&list, false)})
        };
        let roles: Vec<Value> = self.services[&id].roles.iter().map(role).collect();
        json!({"SERVICE": {"name": "flower", "id": self.number(id), "state": 2, "roles": roles}})
    }
}

/// The attributes of an update, their names in capitals; or the line that oned does not take.
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
