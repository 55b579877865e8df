use super::inputs::{check_name, check_user_input, check_value, has_our_prefix};
use super::vm_template::{VmTemplate, is_reference, referenced_name};
use crate::check::{Check, Level};
use crate::config::variables;
use crate::opennebula::templates::READY_SCRIPT;
use crate::values::escape;

impl VmTemplate {
    /// Checks CONTEXT and USER_INPUTS.
    pub(super) fn check_context(&self) -> Vec<Check> {
        let mut checks = self.check_attributes();
        checks.extend(self.check_variables());
        checks.extend(self.check_user_inputs());
        checks
    }

    fn check_attributes(&self) -> Vec<Check> {
        let Some(context) = self.vector("CONTEXT") else {
            let fix = format!(
                "CONTEXT=[TOKEN=\"YES\",REPORT_READY=\"YES\",\
                 READY_SCRIPT_PATH=\"{READY_SCRIPT}\",NETWORK=\"YES\",FL_GPU_ENABLED=\"YES\"]"
            );
            return vec![Check::error(
                "context",
                "there is no CONTEXT: the VM gets neither a network configuration nor variables",
                fix,
            )];
        };
        let line = context.position.line;
        let is_yes =
            |key: &str| context.value(key).is_some_and(|value| value.eq_ignore_ascii_case("YES"));
        let mut checks = Vec::new();
        let has_address = ["FL_SUPERLINK_ADDRESS", "ONEAPP_FL_SUPERLINK_ADDRESS"]
            .iter()
            .any(|name| context.value(name).is_some());
        checks.push(if is_yes("TOKEN") {
            Check::ok("context-token", "TOKEN=\"YES\"").at(line)
        } else {
            let finding = "CONTEXT has no TOKEN=\"YES\": OneGate rejects this VM, so that \
                           the SuperLink is not discovered and nothing is published";
            let level = if has_address { Level::Warning } else { Level::Error };
            Check::problem("context-token", level, finding, "CONTEXT=[TOKEN=\"YES\"]").at(line)
        });
        let ready =
            context.entry("READY_SCRIPT_PATH").filter(|entry| !entry.value.trim().is_empty());
        checks.push(match (is_yes("REPORT_READY"), ready) {
            (true, Some(entry)) if entry.value.trim() == READY_SCRIPT => Check::ok(
                "context-ready",
                format!("READY is reported once {READY_SCRIPT} succeeds"),
            )
            .at(entry.position.line),
            (true, Some(entry)) => {
                let finding = format!(
                    "READY_SCRIPT_PATH=\"{}\" is not the packaged script",
                    escape(&entry.value)
                );
                let fix = format!("READY_SCRIPT_PATH=\"{READY_SCRIPT}\"");
                Check::warning("context-ready", finding, fix).at(entry.position.line)
            }
            (true, None) => {
                let finding = "REPORT_READY without READY_SCRIPT_PATH: READY is reported even \
                               if the node did not start";
                let fix = format!("CONTEXT=[READY_SCRIPT_PATH=\"{READY_SCRIPT}\"]");
                Check::warning("context-ready", finding, fix).at(line)
            }
            (false, _) => {
                let finding = "CONTEXT has no REPORT_READY=\"YES\": OneFlow does not wait for this \
                               node";
                let fix =
                    format!("CONTEXT=[REPORT_READY=\"YES\",READY_SCRIPT_PATH=\"{READY_SCRIPT}\"]");
                Check::warning("context-ready", finding, fix).at(line)
            }
        });
        if !is_yes("NETWORK") {
            let finding = "CONTEXT has no NETWORK=\"YES\": the NICs of the VM get no address";
            checks.push(
                Check::warning("context-network", finding, "CONTEXT=[NETWORK=\"YES\"]").at(line),
            );
        }
        if self.pci_devices().next().is_some() && !self.is_gpu_enabled() {
            let finding = "the VM gets a PCI device and FL_GPU_ENABLED is not YES: the node \
                           would train on the CPU";
            checks.push(
                Check::warning("context-gpu", finding, "CONTEXT=[FL_GPU_ENABLED=\"YES\"]").at(line),
            );
        }
        checks
    }

    /// Checks the agent's variables in CONTEXT against the table.
    fn check_variables(&self) -> Vec<Check> {
        let entries = self.vector("CONTEXT").map_or(&[][..], |context| &context.entries);
        let ours = entries
            .iter()
            .filter(|entry| variables::find(&entry.name).is_some() || has_our_prefix(&entry.name));
        let mut checks = Vec::new();
        let mut valid = 0;
        for entry in ours {
            let before = checks.len();
            checks.extend(check_name(&entry.name, entry.position.line));
            let value = entry.value.trim();
            if let Some(name) = referenced_name(value) {
                let is_input =
                    self.entry("USER_INPUTS", name).is_some() || self.single(name).is_some();
                if !is_input {
                    let finding = format!(
                        "{}=\"{}\" refers to a user input that does not exist",
                        entry.name,
                        escape(value)
                    );
                    let fix = format!(
                        "add {name} to USER_INPUTS (supernode-agent variables --format \
                         user-inputs), or write the value here"
                    );
                    checks.push(Check::warning("variable", finding, fix).at(entry.position.line));
                }
            } else if !is_reference(value) {
                checks.extend(
                    check_value(&entry.name, value).map(|check| check.at(entry.position.line)),
                );
            }
            valid += usize::from(checks.len() == before);
        }
        checks.insert(
            0,
            Check::ok("variable", format!("{valid} of the agent's variables in CONTEXT are valid")),
        );
        checks
    }

    fn check_user_inputs(&self) -> Vec<Check> {
        let Some(inputs) = self.vector("USER_INPUTS") else { return Vec::new() };
        let mut checks = Vec::new();
        let mut valid = 0;
        for entry in &inputs.entries {
            let before = checks.len();
            checks.extend(check_user_input(entry).map(|check| check.at(entry.position.line)));
            checks.extend(check_name(&entry.name, entry.position.line));
            let is_ours = variables::find(&entry.name).is_some();
            let is_used = self.vector("CONTEXT").is_some_and(|context| {
                context
                    .entries
                    .iter()
                    .any(|used| referenced_name(used.value.trim()) == Some(entry.name.as_str()))
            });
            if is_ours && !is_used {
                let name = &entry.name;
                let finding = format!(
                    "the user input {name} does not reach the VM: CONTEXT does not reference it"
                );
                checks.push(
                    Check::warning("user-input", finding, format!("CONTEXT=[{name}=\"${name}\"]"))
                        .at(entry.position.line),
                );
            }
            valid += usize::from(checks.len() == before);
        }
        if let Some(order) = self.single("INPUTS_ORDER") {
            for name in order.value.split(',').map(str::trim).filter(|name| !name.is_empty()) {
                if inputs.entry(&name.to_ascii_uppercase()).is_none() {
                    let finding =
                        format!("INPUTS_ORDER names {}, which is not in USER_INPUTS", escape(name));
                    checks.push(
                        Check::warning("user-input", finding, "delete it from INPUTS_ORDER")
                            .at(order.position.line),
                    );
                }
            }
        }
        checks.insert(
            0,
            Check::ok(
                "user-input",
                format!("{valid} of {} user inputs are valid", inputs.entries.len()),
            ),
        );
        checks
    }
}
