//! `check template`: checks an OpenNebula VM template against the requirements of a SuperNode with
//! a GPU, or checks a OneFlow service template (`service.rs`). Pure. Sources: OpenNebula's manual
//! (Virtual Machine Template Reference; PCI Passthrough); for 6.10 and 7.x, src/vm and src/parsers
//! of OpenNebula/one.

mod context;
mod hardware;
mod inputs;
mod parse;
mod service;
mod vm_template;

use super::Check;
use parse::parse;
use vm_template::VmTemplate;

/// Checks a VM template, or a OneFlow service template, which is JSON.
pub fn judge(text: &str) -> Vec<Check> {
    if text.trim_start().starts_with('{') {
        return service::judge(text);
    }
    let attributes = match parse(text) {
        Ok(attributes) => attributes,
        Err(error) => {
            let fix = "correct this position: KEY=\"value\", KEY=[A=\"x\",B=\"y\"], a quote inside \
                       quotes as \\\"";
            let finding = format!("column {}: {}", error.position.column, error.message);
            return vec![Check::error("syntax", finding, fix).at(error.position.line)];
        }
    };
    let mut checks = vec![Check::ok("syntax", format!("{} attributes", attributes.len()))];
    let template = VmTemplate(attributes);
    checks.extend(template.check_duplicates());
    checks.extend(template.check_hardware());
    checks.extend(template.check_context());
    checks
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::check::Level;
    use crate::opennebula::templates::{NodeKind, vm_template};

    const GOOD: &str = r#"# A SuperNode on one GPU
NAME="supernode"
CPU="8"
VCPU="8"
MEMORY="32768"
OS=[ MACHINE="q35", FIRMWARE="UEFI", FIRMWARE_SECURE="NO" ]
CPU_MODEL=[ MODEL="host-passthrough" ]
PCI=[ VENDOR="10de", CLASS="0302" ]
TOPOLOGY=[ PIN_POLICY="CORE", SOCKETS="1" ]
CONTEXT=[
  NETWORK="YES",
  TOKEN="YES",
  REPORT_READY="YES",
  READY_SCRIPT_PATH="/opt/flower/scripts/health-check.sh",
  FL_GPU_ENABLED="$FL_GPU_ENABLED",
  FL_GPU_MEMORY_FRACTION="0.8" ]
USER_INPUTS=[ FL_GPU_ENABLED="O|boolean|Use the GPU| |YES" ]
INPUTS_ORDER="FL_GPU_ENABLED"
"#;

    fn problems(text: &str) -> Vec<(Level, &'static str, Option<usize>, String)> {
        let checks = judge(text).into_iter().filter(|check| check.level != Level::Ok);
        checks
            .inspect(|check| {
                assert!(check.fix.as_ref().is_some_and(|fix| !fix.is_empty()), "{check:?}")
            })
            .map(|check| (check.level, check.id, check.line, check.finding))
            .collect()
    }

    /// Asserts that [`GOOD`] with `old` replaced has exactly one problem, at this line.
    #[track_caller]
    fn assert_one(old: &str, new: &str, level: Level, id: &str, line: usize, words: &str) {
        assert!(GOOD.contains(old), "{old}");
        let found = problems(&GOOD.replace(old, new));
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!((found[0].0, found[0].1, found[0].2), (level, id, Some(line)), "{found:#?}");
        assert!(found[0].3.contains(words), "{found:#?}");
    }

    #[test]
    fn good_template_has_no_problem() {
        assert_eq!(problems(GOOD), []);
        assert_eq!(problems(&GOOD.replace("\"UEFI\"", "\"/usr/share/OVMF/OVMF_CODE.fd\"")), []);
        assert_eq!(
            problems(&GOOD.replace("VENDOR=\"10de\", CLASS=\"0302\"", "SHORT_ADDRESS=\"e1:00.0\"")),
            []
        );
        assert_eq!(problems(&GOOD.replace("\"0302\"", "\"0300\"")), []);
    }

    #[test]
    fn hardware_problems_are_reported_with_their_line() {
        use Level::{Error, Warning};
        assert_one("MACHINE=\"q35\", ", "", Error, "machine", 6, "i440fx");
        assert_one("\"q35\"", "\"pc\"", Error, "machine", 6, "is not q35");
        assert_one(
            "TOPOLOGY",
            "FEATURES=[MACHINE=\"q35\"]\nTOPOLOGY",
            Error,
            "machine",
            9,
            "OpenNebula ignores it",
        );
        assert_one("FIRMWARE=\"UEFI\", ", "", Error, "firmware", 6, "BIOS");
        assert_one("\"UEFI\"", "\"BIOS\"", Error, "firmware", 6, "is not UEFI");
        assert_one("\"UEFI\"", "\"uefi\"", Error, "firmware", 6, "upper case");
        assert_one(
            "FIRMWARE_SECURE=\"NO\"",
            "FIRMWARE_SECURE=\"YES\"",
            Warning,
            "secure-boot",
            6,
            "unsigned",
        );
        assert_one("host-passthrough", "qemu64", Warning, "cpu-model", 7, "qemu64");
        assert_one(
            "CPU_MODEL=[ MODEL=\"host-passthrough\" ]\n",
            "\n",
            Warning,
            "cpu-model",
            1,
            "no CPU_MODEL",
        );
        assert_one(
            "CLASS=\"0302\" ]",
            "CLASS=\"0302\", SHORT_ADDRESS=\"e1:00.0\" ]",
            Error,
            "pci",
            8,
            "exclude each other",
        );
        assert_one(
            "VENDOR=\"10de\", CLASS=\"0302\"",
            "SHORT_ADDRESS=\"0000:e1:00.0\"",
            Error,
            "pci",
            8,
            "bus:device.function",
        );
        assert_one(", CLASS=\"0302\"", "", Warning, "pci", 8, "VENDOR alone");
        assert_one("\"0302\"", "\"0403\"", Error, "pci", 8, "not a GPU class");
        assert_one("\"10de\"", "\"nvidia\"", Error, "pci", 8, "hexadecimal");
        assert_one("\"10de\"", "\"1002\"", Warning, "pci", 8, "not NVIDIA");
        assert_one(
            "PCI=[ VENDOR=\"10de\", CLASS=\"0302\" ]",
            "PCI=\"10de\"",
            Error,
            "pci",
            8,
            "not a vector attribute",
        );
        assert_one(
            "TOPOLOGY",
            "FEATURES=[PCIHOLE64=\"1T\"]\nTOPOLOGY",
            Error,
            "pci-hole64",
            9,
            "KiB",
        );
        assert_one("\"CORE\", SOCKETS=\"1\"", "\"HARD\"", Error, "topology", 9, "must be one of");
        assert_one(
            "PIN_POLICY=\"CORE\", SOCKETS=\"1\"",
            "SOCKETS=\"2\",CORES=\"2\"",
            Error,
            "topology",
            9,
            "(4) must be VCPU (8)",
        );
        assert_one("SOCKETS=\"1\"", "SOCKETS=\"x\"", Error, "topology", 9, "whole number");
        for (counts, product) in
            [("SOCKETS=\"2\",CORES=\"2\"", "(4)"), ("SOCKETS=\"2\",CORES=\"8\"", "(16)")]
        {
            assert_one("PIN_POLICY=\"CORE\", SOCKETS=\"1\"", counts, Error, "topology", 9, product);
        }
        assert_eq!(
            problems(
                &GOOD.replace("PIN_POLICY=\"CORE\", SOCKETS=\"1\"", "SOCKETS=\"2\",CORES=\"4\"")
            ),
            []
        );
    }

    #[test]
    fn context_is_checked_against_the_variables() {
        use Level::{Error, Warning};
        assert_one("TOKEN=\"YES\"", "TOKEN=\"NO\"", Error, "context-token", 10, "OneGate");
        assert_one(
            "  TOKEN=\"YES\"",
            "  FL_SUPERLINK_ADDRESS=\"h:1\"",
            Warning,
            "context-token",
            10,
            "OneGate",
        );
        assert_one(
            "health-check.sh",
            "other.sh",
            Warning,
            "context-ready",
            14,
            "not the packaged script",
        );
        assert_one(
            "REPORT_READY=\"YES\"",
            "REPORT_READY=\"NO\"",
            Warning,
            "context-ready",
            10,
            "OneFlow does not wait",
        );
        assert_one(
            "NETWORK=\"YES\"",
            "NETWORK=\"NO\"",
            Warning,
            "context-network",
            10,
            "no address",
        );
        assert_one(
            "\"0.8\"",
            "\"1.5\"",
            Error,
            "variable",
            16,
            "FL_GPU_MEMORY_FRACTION='1.5': must be",
        );
        assert_one(
            "FL_GPU_MEMORY_FRACTION=",
            "FL_GPU_MEMORY_FRACTON=",
            Warning,
            "variable",
            16,
            "not a known variable",
        );
        assert_one(
            "\"0.8\"",
            "\"$FL_FRACTION\"",
            Warning,
            "variable",
            16,
            "refers to a user input that does not exist",
        );
        let hint = judge(&GOOD.replace("FL_GPU_MEMORY_FRACTION=", "FL_GPU_MEMORY_FRACTON="));
        assert!(
            hint.iter()
                .any(|check| check.fix.as_deref() == Some("did you mean FL_GPU_MEMORY_FRACTION?"))
        );
        let secret = judge(
            &GOOD.replace("FL_GPU_MEMORY_FRACTION=\"0.8\"", "FL_SSL_CA_CERTFILE=\"hunter2\""),
        );
        assert!(!format!("{secret:?}").contains("hunter2"));
        let off =
            problems(&GOOD.replace("FL_GPU_ENABLED=\"$FL_GPU_ENABLED\"", "FL_GPU_ENABLED=\"NO\""));
        assert!(
            off.iter().any(|(level, id, ..)| (*level, *id) == (Warning, "context-gpu")),
            "{off:?}"
        );
    }

    #[test]
    fn user_input_problems_are_reported() {
        use Level::{Error, Warning};
        const INPUT: &str = "O|boolean|Use the GPU| |YES";
        assert_one(
            INPUT,
            "O|boolean|Use the GPU",
            Error,
            "user-input",
            17,
            "a boolean needs a default",
        );
        assert_one(INPUT, "O|boolean|Use the GPU| ", Error, "user-input", 17, "it has 4 fields");
        assert_one(INPUT, "X|boolean|Use the GPU| |YES", Error, "user-input", 17, "must be M");
        let number = "O|number|Use the GPU";
        assert_one(
            INPUT,
            number,
            Warning,
            "user-input",
            17,
            "if left empty, onetemplate instantiate repeats the prompt forever",
        );
        assert_one(INPUT, "O|text64|Use the GPU", Warning, "user-input", 17, "crashes");
        assert_one(INPUT, "O|bool|Use the GPU| |YES", Error, "user-input", 17, "not a type");
        assert_one(INPUT, "O|list|Use the GPU||", Error, "user-input", 17, "options");
        assert_one(
            INPUT,
            "O|text|Use the GPU| |maybe",
            Error,
            "user-input",
            17,
            "FL_GPU_ENABLED='maybe'",
        );
        assert_one("INPUTS_ORDER=\"", "INPUTS_ORDER=\"OTHER,", Warning, "user-input", 18, "OTHER");
        assert_one(
            "|YES\" ]",
            "|YES\",\n  FL_LOG_LEVEL=\"O|text|Level\" ]",
            Warning,
            "user-input",
            18,
            "does not reach the VM",
        );
    }

    #[test]
    fn generated_context_has_no_problem() {
        for kind in [NodeKind::Gpu, NodeKind::Cpu] {
            let found = problems(&vm_template(kind));
            let wrong = found
                .iter()
                .filter(|(_, id, ..)| !matches!(*id, "machine" | "firmware" | "cpu-model" | "pci"));
            assert_eq!(
                wrong.collect::<Vec<_>>(),
                Vec::<&(Level, &str, Option<usize>, String)>::new()
            );
        }
    }

    #[test]
    fn missing_gpu_is_an_error_only_if_needed() {
        let cpu = "CONTEXT=[TOKEN=\"YES\"]\n";
        assert!(
            problems(cpu).iter().all(|(level, ..)| *level == Level::Warning),
            "{:#?}",
            problems(cpu)
        );
        let gpu = "CONTEXT=[TOKEN=\"YES\",FL_GPU_ENABLED=\"YES\"]\n";
        assert!(problems(gpu).iter().any(|(level, id, ..)| (*level, *id) == (Level::Error, "pci")));
    }

    #[test]
    fn syntax_error_is_the_only_problem() {
        let found = problems("OS=[MACHINE=\"q35\"\n  FIRMWARE=\"UEFI\"]\n");
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].1, found[0].2), ("syntax", Some(2)));
        assert!(found[0].3.starts_with("column 3: "), "{found:?}");
    }

    proptest! {
        #[test]
        fn arbitrary_template_never_panics(
            text in "((OS|PCI|CONTEXT|TOPOLOGY|USER_INPUTS|FEATURES|VCPU|FL_GPU)(=|=\\[)\
                [A-Z]{0,3}=?\"?[a-z0-9|$,\u{e9}]{0,9}\"?\\]?\n?){0,8}"
        ) {
            judge(&text);
        }
    }

    /// Returns the level and finding of the checks with this id.
    fn found(text: &str, id: &str) -> Vec<(Level, String)> {
        judge(text)
            .into_iter()
            .filter(|check| check.id == id)
            .map(|check| (check.level, check.finding))
            .collect()
    }

    #[test]
    fn passed_checks_are_reported() {
        let reported: Vec<(Option<usize>, String)> = judge(GOOD)
            .into_iter()
            .map(|check| (check.line, format!("{}: {}", check.id, check.finding)))
            .collect();
        let expected = [
            (None, "syntax: 11 attributes"),
            (Some(6), "machine: MACHINE=\"q35\""),
            (
                Some(6),
                "firmware: FIRMWARE=\"UEFI\": for OpenNebula 7; 6.10 requires a path instead, \
                 \"/usr/share/OVMF/OVMF_CODE.fd\"",
            ),
            (Some(6), "secure-boot: FIRMWARE_SECURE is NO"),
            (Some(7), "cpu-model: MODEL=\"host-passthrough\""),
            (
                Some(8),
                "pci: a GPU of NVIDIA (class 0302: 3D controller, data-centre cards); only \
                 oneadmin can create this template (PCI is a restricted attribute)",
            ),
            (
                Some(9),
                "topology: PIN_POLICY=CORE: the VM can only run on hosts with PIN_POLICY=PINNED \
                 (onehost update HOST), where unpinned VMs cannot run",
            ),
            (
                None,
                "pci-hole64: no PCIHOLE64; a GPU with a very large BAR (H100, H200, B200) may need \
                 FEATURES=[PCIHOLE64=\"1073741824\"] (in KiB, OpenNebula 7.2 and later)",
            ),
            (Some(10), "context-token: TOKEN=\"YES\""),
            (
                Some(14),
                "context-ready: READY is reported once /opt/flower/scripts/health-check.sh \
                 succeeds",
            ),
            (None, "variable: 2 of the agent's variables in CONTEXT are valid"),
            (None, "user-input: 1 of 1 user inputs are valid"),
        ];
        assert_eq!(reported, expected.map(|(line, text)| (line, text.to_owned())));
        let with = |old: &str, new: &str, id| {
            let found = found(&GOOD.replace(old, new), id);
            let [(Level::Ok, finding)] = &found[..] else { panic!("{found:#?}") };
            finding.clone()
        };
        assert_eq!(with("\"q35\"", "\"pc-q35-7.2\"", "machine"), "MACHINE=\"pc-q35-7.2\"");
        assert!(
            with("\"UEFI\"", "\"/path\"", "firmware")
                .starts_with("FIRMWARE=\"/path\": a path of OVMF_UEFIS")
        );
        assert!(
            with("\"0302\"", "\"0300\"", "pci")
                .contains("NVIDIA (class 0300: VGA controller, GeForce)")
        );
        assert!(with("VENDOR=\"10de\", ", "", "pci").contains("a GPU of any vendor (class 0302"));
        assert!(
            with("CLASS=\"0302\"", "DEVICE=\"20b5\"", "pci").starts_with("the device 10de:20b5;")
        );
        let bars = with("TOPOLOGY", "FEATURES=[PCIHOLE64=\"1073741824\"]\nTOPOLOGY", "pci-hole64");
        assert_eq!(bars, "PCIHOLE64 is 1024 GiB (read by OpenNebula 7.2 and later)");
        assert_eq!(
            with("PIN_POLICY=\"CORE\", SOCKETS=\"1\"", "PIN_POLICY=\"\"", "topology"),
            "the VM is not pinned"
        );
        assert_eq!(
            with("PIN_POLICY=\"CORE\", SOCKETS=\"1\"", "SOCKETS=\"2\",THREADS=\"4\"", "topology"),
            "SOCKETS × CORES × THREADS is VCPU (8)"
        );
        // VCPU defaults to 1.
        let one = GOOD.replace("VCPU=\"8\"\n", "").replace("PIN_POLICY=\"CORE\", ", "");
        assert_eq!(found(&one, "topology")[0].1, "SOCKETS × CORES × THREADS is VCPU (1)");
    }

    #[test]
    fn pci_selectors_are_validated() {
        let pci =
            |pairs: &str| found(&GOOD.replace("VENDOR=\"10de\", CLASS=\"0302\"", pairs), "pci");
        for (pairs, level, words) in [
            (
                "VENDOR=\"010de\", CLASS=\"0302\"",
                Level::Error,
                "VENDOR=\"010de\" must be four hexadecimal digits",
            ),
            ("DEVICE=\"xyz\"", Level::Error, "DEVICE=\"xyz\" must be four"),
            ("NAME=\"gpu\"", Level::Error, "names neither VENDOR, DEVICE, CLASS nor SHORT_ADDRESS"),
            ("SHORT_ADDRESS=\"e1:00\"", Level::Error, "must be bus:device.function"),
            ("SHORT_ADDRESS=\"e1:00.0\", DEVICE=\"20b5\"", Level::Error, "exclude each other"),
            ("SHORT_ADDRESS=\"e1:00.0\"", Level::Ok, "the device e1:00.0 of the host"),
            ("DEVICE=\"20b5\"", Level::Ok, "the device 10de:20b5"),
        ] {
            let found = pci(pairs);
            assert!(
                found.len() == 1 && found[0].0 == level && found[0].1.contains(words),
                "{pairs}: {found:#?}"
            );
        }
        // The same attribute assigns a network card, which is not a GPU.
        let nic = pci("TYPE=\"nic\", VENDOR=\"15b3\"");
        assert_eq!(nic, [(Level::Error, "there is no PCI attribute: this VM gets no GPU".into())]);
        let two = found(
            &GOOD.replace("PCI=[", "PCI=[ TYPE=\"NIC\", SHORT_ADDRESS=\"05:00.0\" ]\nPCI=["),
            "pci",
        );
        assert_eq!(two.len(), 1, "{two:#?}");
    }

    #[test]
    fn gpu_is_needed_by_the_context_or_a_pci_attribute() {
        let level = |text: &str, id| found(text, id)[0].0;
        let context = |variable: &str| format!("CONTEXT=[TOKEN=\"YES\"{variable}]\n");
        for (text, machine, pci) in [
            (context(""), Level::Warning, Level::Warning),
            (context(",FL_GPU_ENABLED=\"NO\""), Level::Warning, Level::Ok),
            (context(",FL_GPU_ENABLED=\"$GPU\""), Level::Error, Level::Error),
            (context(",ONEAPP_FL_GPU_ENABLED=\"on\""), Level::Error, Level::Error),
            (context("") + "PCI=[CLASS=\"0302\"]\n", Level::Error, Level::Ok),
        ] {
            assert_eq!((level(&text, "machine"), level(&text, "pci")), (machine, pci), "{text}");
        }
        let unused = |text: &str| found(text, "context-gpu").len();
        assert_eq!(
            unused(&(context("") + "PCI=[CLASS=\"0302\"]\n")),
            1,
            "it would train on the CPU"
        );
        assert_eq!(unused(&(context(",FL_GPU_ENABLED=\"YES\"") + "PCI=[CLASS=\"0302\"]\n")), 0);
        assert_eq!(unused(&context("")), 0);
        assert_eq!(unused(&(context("") + "PCI=[TYPE=\"NIC\",CLASS=\"0200\"]\n")), 0);
    }

    #[test]
    fn duplicate_and_empty_entries_are_handled() {
        assert_one(
            "MACHINE=\"q35\"",
            "MACHINE=\"q35\", MACHINE=\"pc\"",
            Level::Warning,
            "syntax",
            6,
            "MACHINE is in OS a second",
        );
        assert_one(
            "MACHINE=\"q35\"",
            "MACHINE=\" \"",
            Level::Error,
            "machine",
            6,
            "OS has no MACHINE",
        );
        assert_one(
            "\"/opt/flower/scripts/health-check.sh\"",
            "\"\"",
            Level::Warning,
            "context-ready",
            10,
            "without READY_SCRIPT_PATH",
        );
        assert_eq!(
            problems(&GOOD.replace("INPUTS_ORDER=\"FL_GPU_ENABLED\"", "INPUTS_ORDER=\" , \"")),
            []
        );
        let lone = found(
            &GOOD.replace("VCPU=\"8\"", "VCPU=\" \"").replace("PIN_POLICY=\"CORE\", ", ""),
            "topology",
        );
        assert_eq!(lone[0].0, Level::Ok, "an empty VCPU is one: {lone:#?}");
    }

    #[test]
    fn reference_must_name_an_existing_input() {
        let fraction = |value: &str| problems(&GOOD.replace("\"0.8\"", &format!("\"{value}\"")));
        for fine in ["$GPU-SHARE", "0$X", "$", "${FL_GPU_ENABLED}", "$NAME", ""] {
            assert_eq!(fraction(fine), [], "{fine}");
        }
        for missing in ["$FL_SHARE", "${FL_SHARE}", "$A1"] {
            let found = fraction(missing);
            assert!(
                found.len() == 1
                    && found[0].3.contains("refers to a user input that does not exist"),
                "{found:#?}"
            );
        }
        let count = |text: &str, id| found(text, id).remove(0).1;
        let wrong = GOOD.replace("\"0.8\"", "\"8\"");
        assert_eq!(count(&wrong, "variable"), "1 of the agent's variables in CONTEXT are valid");
        let more = GOOD.replace("\"0.8\"", "\"0.8\", ML_FRAMEWORK=\"base\", OTHER=\"1\"");
        assert_eq!(count(&more, "variable"), "3 of the agent's variables in CONTEXT are valid");
    }

    #[test]
    fn unknown_variable_is_reported_with_a_fix() {
        let fix = |name: &str| {
            let checks = judge(&GOOD.replace("FL_GPU_MEMORY_FRACTION=", &format!("{name}=")));
            checks
                .into_iter()
                .find(|check| check.level == Level::Warning)
                .and_then(|check| check.fix)
        };
        assert_eq!(
            fix("ONEAPP_FL_GPU_MEM").as_deref(),
            Some("did you mean ONEAPP_FL_GPU_MEMORY_FRACTION?")
        );
        let delete = "delete it; supernode-agent variables lists the known variables";
        assert_eq!(fix("FL_SOMETHING_ELSE").as_deref(), Some(delete));
        assert_eq!(fix("OTHER_FL_GPU"), None);
    }

    #[test]
    fn fix_shows_an_accepted_value() {
        let checks = judge(&GOOD.replace("\"0.8\"", "\"8\""));
        let wrong = checks.into_iter().find(|check| check.level == Level::Error).unwrap();
        assert_eq!(wrong.fix.as_deref(), Some("FL_GPU_MEMORY_FRACTION=\"0.5\""));
    }

    #[test]
    fn valid_user_inputs_are_counted() {
        let two = GOOD
            .replace("|YES\" ]", "|YES\", OTHER=\"O|text|what\", FL_LOG_LEVEL=\"O|text|what\" ]");
        assert_eq!(
            found(&two, "user-input")[0].1,
            "2 of 3 user inputs are valid",
            "one does not reach the VM"
        );
    }
}
