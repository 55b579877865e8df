use std::path::Path;

use one_context::Context;

use super::choices::{LogFormat, LogLevel};
use super::error::{ConfigError, ConfigErrors};
use super::fields::{AssignedDevice, Config};
use super::kind::Value;
use super::prebaked::Prebaked;
use super::variables::{self, VARIABLES, Variable};
use crate::values::ca_bundle::CaBundle;
use crate::values::{PciAddress, escape};

/// Findings about a configuration that is valid.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diagnostics {
    /// Unknown names, reported at WARNING.
    pub unknown: Vec<String>,
    /// Variables that do not do what they seem to do, reported at WARNING.
    pub misconfigured: Vec<String>,
    /// Variables that have no effect because of another one, reported at INFO.
    pub ineffective: Vec<String>,
    /// Values that are accepted although they have the wrong form, reported at INFO.
    pub notes: Vec<String>,
}

impl Diagnostics {
    /// Returns the findings that are reported at WARNING.
    pub fn warnings(&self) -> impl Iterator<Item = &String> {
        self.unknown.iter().chain(&self.misconfigured)
    }
}

/// Returns level and format of the log. Called before the configuration is validated, so that its
/// errors are logged with them.
pub fn log_settings(context: &Context) -> (LogLevel, LogFormat) {
    let config = ParsedVariables::parse(context).apply(Config::default());
    (config.log_level, config.log_format)
}

impl Config {
    /// Reads and validates every variable of the table, and the files of the image build in
    /// `prebaked_dir`.
    ///
    /// # Errors
    /// Returns all errors.
    pub fn read(
        context: &Context,
        prebaked_dir: &Path,
    ) -> Result<(Self, Diagnostics), ConfigErrors> {
        match Prebaked::read(prebaked_dir) {
            Ok(prebaked) => Self::from_context(context, &prebaked),
            Err(mut errors) => {
                if let Err(more) = Self::from_context(context, &Prebaked::default()) {
                    errors.0.extend(more.0);
                }
                Err(errors)
            }
        }
    }

    /// Reads and validates every variable of the table.
    ///
    /// # Errors
    /// Returns all errors, each with the variable as written, its value and what is accepted.
    pub fn from_context(
        context: &Context,
        prebaked: &Prebaked,
    ) -> Result<(Self, Diagnostics), ConfigErrors> {
        let mut parsed = ParsedVariables::parse(context);
        let mut config = parsed.apply(Self {
            version: prebaked.version.clone(),
            framework: prebaked.framework,
            prebaked: prebaked.clone(),
            ..Self::default()
        });
        config.gpu.assigned = assigned_devices(context);
        parsed.check_keepalive(&config);
        if !parsed.errors.is_empty() {
            return Err(ConfigErrors(parsed.errors));
        }
        let diagnostics = Diagnostics {
            unknown: unknown_names(context),
            misconfigured: misconfigured(&config, &parsed),
            ineffective: ineffective(&config, &parsed),
            notes: notes(&parsed),
        };
        Ok((config, diagnostics))
    }
}

fn assigned_devices(context: &Context) -> Vec<AssignedDevice> {
    context
        .assigned_addresses()
        .into_iter()
        .map(|(variable, written)| AssignedDevice {
            variable: escape(&variable),
            address: PciAddress::parse(&written),
            written: escape(&written),
        })
        .collect()
}

/// The variables that are set in a context, and their errors.
#[derive(Default)]
struct ParsedVariables {
    set: Vec<SetVariable>,
    errors: Vec<ConfigError>,
    /// Variables with an error, by their names in the table.
    invalid: Vec<&'static str>,
}

/// A variable that is set to a valid value.
struct SetVariable {
    variable: &'static Variable,
    /// The name under which it is set.
    name: String,
    /// The value as written, quoted or hidden.
    quoted: String,
    value: Value,
}

impl ParsedVariables {
    fn parse(context: &Context) -> Self {
        let mut parsed = Self::default();
        for variable in VARIABLES {
            let errors_before = parsed.errors.len();
            let mut first: Option<SetVariable> = None;
            for name in variable.names() {
                match parse_name(context, variable, name) {
                    Ok(None) => {}
                    Err(error) => parsed.errors.push(error),
                    Ok(Some(set)) => match &first {
                        None => first = Some(set),
                        Some(first) if first.value == set.value => {}
                        Some(first) => parsed.errors.push(ConfigError::Conflict {
                            first: (first.name.clone(), first.quoted.clone()),
                            second: (set.name, set.quoted),
                        }),
                    },
                }
            }
            parsed.set.extend(first);
            if parsed.errors.len() > errors_before {
                parsed.invalid.push(variable.name);
            }
        }
        parsed
    }

    /// Sets the fields of `config`: the defaults of the table, then the variables that are set.
    fn apply(&self, mut config: Config) -> Config {
        variables::apply_defaults(&mut config);
        for set in &self.set {
            (set.variable.field.set)(&mut config, &set.value);
        }
        config
    }

    fn get(&self, name: &str) -> Option<&SetVariable> {
        self.set.iter().find(|set| set.variable.name == name)
    }

    /// Returns the CA bundle, and the name under which it is set.
    fn ca_bundle(&self) -> Option<(&str, &CaBundle)> {
        match self.get("FL_SSL_CA_CERTFILE")? {
            SetVariable { name, value: Value::CaBundle(ca), .. } => Some((name, ca)),
            _ => None,
        }
    }

    fn check_keepalive(&mut self, config: &Config) {
        const TIME: &str = "FL_GRPC_KEEPALIVE_TIME";
        const TIMEOUT: &str = "FL_GRPC_KEEPALIVE_TIMEOUT";
        let are_valid = ![TIME, TIMEOUT].iter().any(|name| self.invalid.contains(name));
        if are_valid && config.keepalive_timeout >= config.keepalive_time {
            self.errors.push(ConfigError::KeepaliveTimeout {
                timeout: self.describe(TIMEOUT, config.keepalive_timeout),
                time: self.describe(TIME, config.keepalive_time),
            });
        }
    }

    /// Returns `NAME='value'` as the operator wrote it, or the default.
    fn describe(&self, name: &str, default: u64) -> String {
        match self.get(name) {
            Some(set) => format!("{}={}", set.name, set.quoted),
            None => format!("{name}='{default}' (the default)"),
        }
    }
}

/// Parses `variable` under one of its names; `None` if it is not set.
fn parse_name(
    context: &Context,
    variable: &'static Variable,
    name: String,
) -> Result<Option<SetVariable>, ConfigError> {
    let kind = variable.kind;
    let text = match context.text(&name) {
        Ok(Some(text)) => text,
        Ok(None) => return Ok(None),
        Err(_) => {
            let bytes = context.bytes(&name).unwrap_or_default().trim_ascii();
            let value = kind.quote(&String::from_utf8_lossy(bytes));
            return Err(ConfigError::NotUtf8 { name, value, accepted: kind.values() });
        }
    };
    let quoted = kind.quote(text);
    match kind.parse(text) {
        Ok(value) => Ok(Some(SetVariable { variable, name, quoted, value })),
        Err(reason) => Err(ConfigError::Invalid { name, value: quoted, reason }),
    }
}

fn unknown_names(context: &Context) -> Vec<String> {
    context
        .names()
        .filter(|name| name.starts_with("FL_") || name.starts_with("ONEAPP_FL_"))
        .filter(|name| variables::find(name).is_none())
        // An unset user input arrives with an empty value, whatever its name.
        .filter(|name| context.bytes(name).is_some_and(|value| !value.trim_ascii().is_empty()))
        .map(|name| match variables::nearest(name) {
            Some(known) => {
                format!("{name} is not a known variable and has no effect: did you mean {known}?")
            }
            None => format!("{} is not a known variable and has no effect", escape(name)),
        })
        .collect()
}

fn misconfigured(config: &Config, parsed: &ParsedVariables) -> Vec<String> {
    let Some((name, ca)) = parsed.ca_bundle() else { return Vec::new() };
    let unencrypted = (config.tls.is_none() && config.superlink_address.is_some()).then(|| {
        format!(
            "{name} is set and FL_TLS_ENABLED is not: the connection to the SuperLink is NOT \
             encrypted; set FL_TLS_ENABLED=YES"
        )
    });
    unencrypted.into_iter().chain(ca.ignored().map(|what| format!("{name}: {what}"))).collect()
}

fn notes(parsed: &ParsedVariables) -> Vec<String> {
    let raw_pem = parsed.ca_bundle().filter(|(_, ca)| ca.was_raw_pem());
    let note = raw_pem
        .map(|(name, _)| format!("{name} is PEM text, not base64 (base64 -w0 ca.crt); accepted"));
    note.into_iter().collect()
}

fn ineffective(config: &Config, parsed: &ParsedVariables) -> Vec<String> {
    parsed
        .set
        .iter()
        // NO disables a feature that has no effect anyway, so it is not reported.
        .filter(|set| set.value != Value::YesNo(false))
        .filter_map(|set| {
            let reason = set.variable.effective.unmet(config)?;
            Some(format!("{} has no effect: {reason}", set.name))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::choices::{EdgeBackoff, Framework, Isolation};
    use super::*;
    use crate::values::DeviceSelection;

    fn context(pairs: &[(&str, &str)]) -> Context {
        let text: String = pairs
            .iter()
            .map(|(name, value)| format!("{name}='{}'\n", value.replace('\'', r"'\''")))
            .collect();
        Context::parse(text.as_bytes()).unwrap()
    }

    fn read(pairs: &[(&str, &str)]) -> Result<(Config, Diagnostics), ConfigErrors> {
        Config::from_context(&context(pairs), &Prebaked::default())
    }

    fn errors(pairs: &[(&str, &str)]) -> Vec<String> {
        read(pairs).unwrap_err().lines().collect()
    }

    #[test]
    fn defaults_apply_without_variables() {
        let (config, diagnostics) = read(&[]).unwrap();
        assert!(!config.gpu.enabled && !config.gpu.required && config.tls.is_none());
        assert_eq!(
            (config.version.to_string().as_str(), config.framework),
            ("1.31.0", Framework::PyTorch)
        );
        assert_eq!(
            (config.keepalive_time, config.keepalive_timeout, config.edge_max_backoff),
            (60, 20, Duration::from_secs(300))
        );
        assert_eq!(
            (config.isolation, config.edge_backoff),
            (Isolation::Subprocess, EdgeBackoff::Exponential)
        );
        assert_eq!((config.max_retries, config.max_wait_time), (0, 0));
        assert_eq!(config.gpu.selection, DeviceSelection::All);
        assert_eq!((config.log_level, config.log_format), (LogLevel::Info, LogFormat::Text));
        assert_eq!(diagnostics, Diagnostics::default());
        assert_eq!(config.resolved().len(), VARIABLES.len(), "two variables have the same name");
    }

    #[test]
    fn every_variable_is_read_by_each_of_its_names() {
        for variable in VARIABLES {
            let value = variable.kind.sample();
            let default = Config::from_context(&context(&[]), &Prebaked::default()).unwrap().0;
            for name in variable.names() {
                let (config, diagnostics) = read(&[(&name, value)]).unwrap();
                assert_ne!(config.resolved(), default.resolved(), "{name} is not read");
                assert_eq!(diagnostics.unknown, Vec::<String>::new());
            }
        }
    }

    #[test]
    fn all_errors_are_reported_together() {
        assert_eq!(
            errors(&[
                ("FL_GPU_MEMORY_FRACTION", "1.5"),
                ("ONEAPP_FL_GPU_ENABLED", " maybe "),
                ("FL_FRAMEWORK", "jax"),
                ("FL_MAX_RETRIES", "-1"),
            ]),
            [
                "ONEAPP_FL_GPU_ENABLED='maybe': must be YES or NO (or TRUE/FALSE, ON/OFF, 1/0)",
                "FL_GPU_MEMORY_FRACTION='1.5': must be greater than 0 and at most 1",
                "FL_FRAMEWORK='jax': must be one of pytorch, tensorflow, sklearn, base",
                "FL_MAX_RETRIES='-1': must be a whole number from 0 to 2147483647",
            ]
        );
    }

    #[test]
    fn two_names_of_one_variable_must_agree() {
        let (config, _) =
            read(&[("FL_GPU_ENABLED", "YES"), ("ONEAPP_FL_GPU_ENABLED", "true")]).unwrap();
        assert!(config.gpu.enabled);
        let (config, _) =
            read(&[("FL_GPU_ENABLED", ""), ("ONEAPP_FL_GPU_ENABLED", " yes ")]).unwrap();
        assert!(config.gpu.enabled);
        assert_eq!(
            errors(&[("FL_GPU_ENABLED", "YES"), ("ONEAPP_FL_GPU_ENABLED", "no")]),
            ["FL_GPU_ENABLED='YES' and ONEAPP_FL_GPU_ENABLED='no': both are set and differ; set \
                 one of them"]
        );
        assert_eq!(errors(&[("ML_FRAMEWORK", "base"), ("FL_ML_FRAMEWORK", "sklearn")]).len(), 1);
    }

    #[test]
    fn keepalive_timeout_is_less_than_time() {
        assert_eq!(
            errors(&[("FL_GRPC_KEEPALIVE_TIME", "20")]),
            ["FL_GRPC_KEEPALIVE_TIMEOUT='20' (the default): must be less than \
                 FL_GRPC_KEEPALIVE_TIME='20'"]
        );
        assert_eq!(errors(&[("FL_GRPC_KEEPALIVE_TIME", "x")]).len(), 1);
        // An invalid value is not compared with the default of the other.
        assert_eq!(
            errors(&[("FL_GRPC_KEEPALIVE_TIME", "10"), ("FL_GRPC_KEEPALIVE_TIMEOUT", "x")]).len(),
            1
        );
        assert_eq!(errors(&[("ONEAPP_FL_GRPC_KEEPALIVE_TIME", "x")]).len(), 1);
        assert_eq!(
            errors(&[("FL_LOG_LEVEL", "FL_GRPC_KEEPALIVE_"), ("FL_GRPC_KEEPALIVE_TIME", "20")])
                .len(),
            2
        );
        assert!(
            read(&[("FL_GRPC_KEEPALIVE_TIME", "10"), ("FL_GRPC_KEEPALIVE_TIMEOUT", "9")]).is_ok()
        );
    }

    #[test]
    fn unknown_name_is_reported_with_the_nearest_known() {
        let (_, diagnostics) = read(&[
            ("FL_GPU_ENABLE", "YES"),
            ("ONEAPP_FL_TSL_ENABLED", "YES"),
            ("FL_GPU_MEMORY", "0.5"),
            ("FL_SOMETHING_ELSE", "secret-value"),
            ("FL_EMPTY", ""),
            ("OTHER_FL_GPU", "1"),
        ])
        .unwrap();
        assert_eq!(
            diagnostics.unknown,
            [
                "FL_GPU_ENABLE is not a known variable and has no effect: did you mean \
                 FL_GPU_ENABLED?",
                "FL_GPU_MEMORY is not a known variable and has no effect: did you mean \
                 FL_GPU_MEMORY_FRACTION?",
                "FL_SOMETHING_ELSE is not a known variable and has no effect",
                "ONEAPP_FL_TSL_ENABLED is not a known variable and has no effect: did you mean \
                 ONEAPP_FL_TLS_ENABLED?",
            ]
        );
    }

    #[test]
    fn ineffective_variable_is_reported() {
        let (_, diagnostics) = read(&[
            ("FL_GPU_ENABLED", "NO"),
            ("ONEAPP_FL_GPU_MEMORY_FRACTION", "0.5"),
            ("FL_DCGM_ENABLED", "NO"),
            ("FL_SUPERLINK_ADDRESS", "h:1"),
            ("FL_EDGE_MAX_BACKOFF", "60"),
        ])
        .unwrap();
        assert_eq!(
            diagnostics.ineffective,
            [
                "ONEAPP_FL_GPU_MEMORY_FRACTION has no effect: FL_GPU_ENABLED is not YES",
                "FL_EDGE_MAX_BACKOFF has no effect: FL_SUPERLINK_ADDRESS is set, so discovery is \
                 disabled",
            ]
        );
    }

    const CA: &str = include_str!("../../tests/ca.crt");

    #[test]
    fn ca_without_tls_is_warned_about() {
        let (_, diagnostics) =
            read(&[("ONEAPP_FL_SSL_CA_CERTFILE", CA), ("FL_SUPERLINK_ADDRESS", "h:1")]).unwrap();
        assert_eq!(
            diagnostics.warnings().collect::<Vec<_>>(),
            ["ONEAPP_FL_SSL_CA_CERTFILE is set and FL_TLS_ENABLED is not: the connection to the \
                 SuperLink is NOT encrypted; set FL_TLS_ENABLED=YES"]
        );
        assert_eq!(diagnostics.ineffective, Vec::<String>::new());
        // An explicit NO is intended.
        let (_, diagnostics) = read(&[
            ("FL_SSL_CA_CERTFILE", CA),
            ("FL_SUPERLINK_ADDRESS", "h:1"),
            ("FL_TLS_ENABLED", "NO"),
        ])
        .unwrap();
        assert_eq!(diagnostics.warnings().count(), 0);
        assert_eq!(
            diagnostics.ineffective,
            ["FL_SSL_CA_CERTFILE has no effect: FL_TLS_ENABLED is NO"]
        );
        // Without a static address the SuperLink decides about TLS.
        let (_, diagnostics) = read(&[("FL_SSL_CA_CERTFILE", CA)]).unwrap();
        assert_eq!((diagnostics.warnings().count(), diagnostics.ineffective.len()), (0, 0));
    }

    #[test]
    fn form_and_ignored_parts_of_a_ca_are_reported() {
        let bundle = format!("{}{CA}", include_str!("../../tests/certificates/leaf.crt"));
        let (config, diagnostics) =
            read(&[("FL_SSL_CA_CERTFILE", &bundle), ("FL_TLS_ENABLED", "YES")]).unwrap();
        assert_eq!(config.ca_certificate.unwrap().pem(), CA);
        assert_eq!(
            diagnostics.misconfigured,
            ["FL_SSL_CA_CERTFILE: ignored because it is not a CA: CN=superlink.example, which is \
                 not a CA (basicConstraints is not CA:TRUE)"]
        );
        assert_eq!(
            diagnostics.notes,
            ["FL_SSL_CA_CERTFILE is PEM text, not base64 (base64 -w0 ca.crt); accepted"]
        );
    }

    #[test]
    fn possible_secret_is_not_in_the_error() {
        let key = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----";
        for pair in [
            ("FL_SSL_CA_CERTFILE", key),
            ("FL_NODE_CONFIG", "db-password=c2VjcmV0"),
            ("FL_SUPERLINK_ADDRESS", "http://user:c2VjcmV0@h:9092"),
            ("FL_SUPERLINK_ADDRESS", "user:c2VjcmV0@h:9092"),
            ("FL_SUPERNODE_IMAGE", "user:c2VjcmV0@registry.example/node:1"),
        ] {
            let errors = errors(&[pair]);
            assert!(errors.len() == 1 && !errors[0].contains("c2VjcmV0"), "{errors:?}");
        }
        let errors = errors(&[("FL_SUPERNODE_IMAGE", "registry.example/node:1@sha512:0")]);
        assert!(errors[0].contains("='registry.example/node:1@sha512:0': must be"), "{errors:?}");
    }

    #[test]
    fn assigned_address_is_escaped_and_bounded() {
        let hostile = format!("\x1b[31m\n{}", "x".repeat(9000));
        let (config, _) =
            read(&[("PCI0_ADDRESS", &hostile), ("PCI1_ADDRESS", " 01:00.0 ")]).unwrap();
        let written = &config.gpu.assigned[0].written;
        assert!(
            written.starts_with("\\u{1b}[31m\\nxxx") && written.chars().count() < 250,
            "{written}"
        );
        assert_eq!(config.gpu.assigned[1].written, "01:00.0");
        assert_eq!(config.gpu.assigned[1].address, PciAddress::parse("01:00.0"));
    }

    #[test]
    fn value_that_is_not_utf8_is_rejected() {
        let text = b"ONEAPP_FL_LOG_LEVEL=' \
                     de\xffbug'\nFL_NODE_CONFIG='password=\"hunter\xff\"'\nOTHER='\xff'\n";
        let context = Context::parse(text).unwrap();
        let errors = Config::from_context(&context, &Prebaked::default()).unwrap_err();
        assert_eq!(
            errors.lines().collect::<Vec<_>>(),
            [
                "FL_NODE_CONFIG=(18 characters, not shown): must be UTF-8 text: space-separated \
                 key=value, values TOML scalars",
                "ONEAPP_FL_LOG_LEVEL='de\u{fffd}bug': must be UTF-8 text: DEBUG, INFO, WARNING, \
                 ERROR",
            ]
        );
    }

    #[test]
    fn max_backoff_has_no_effect_without_exponential_discovery() {
        let ineffective = |pairs: &[(&str, &str)]| {
            read(&[&[("FL_EDGE_MAX_BACKOFF", "60")], pairs].concat()).unwrap().1.ineffective
        };
        assert_eq!(ineffective(&[]), Vec::<String>::new());
        assert_eq!(ineffective(&[("FL_EDGE_BACKOFF", "exponential")]), Vec::<String>::new());
        let fixed = ("FL_EDGE_BACKOFF", "fixed");
        assert_eq!(
            ineffective(&[fixed]),
            ["FL_EDGE_MAX_BACKOFF has no effect: FL_EDGE_BACKOFF is fixed"]
        );
        assert_eq!(
            ineffective(&[fixed, ("FL_SUPERLINK_ADDRESS", "h:1")]),
            ["FL_EDGE_BACKOFF", "FL_EDGE_MAX_BACKOFF"].map(|name| format!(
                "{name} has no effect: FL_SUPERLINK_ADDRESS is set, so discovery is disabled"
            ))
        );
    }

    #[test]
    fn log_settings_are_known_before_validation() {
        let settings = |pairs: &[(&str, &str)]| log_settings(&context(pairs));
        assert_eq!(settings(&[]), (LogLevel::Info, LogFormat::Text));
        assert_eq!(
            settings(&[("FL_LOG_LEVEL", "debug"), ("FL_GPU_ENABLED", "maybe")]),
            (LogLevel::Debug, LogFormat::Text)
        );
        assert_eq!(settings(&[("FL_LOG_FORMAT", "JSON")]), (LogLevel::Info, LogFormat::Json));
    }

    #[test]
    fn prebaked_image_is_the_default() {
        let prebaked = Prebaked { framework: Framework::Base, ..Prebaked::default() };
        let read = |pairs: &[(&str, &str)]| {
            Config::from_context(&context(pairs), &prebaked).unwrap().0.framework
        };
        assert_eq!(read(&[]), Framework::Base);
        assert_eq!(read(&[("ML_FRAMEWORK", "PyTorch")]), Framework::PyTorch);
    }
}
