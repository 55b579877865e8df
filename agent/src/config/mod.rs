//! Context -> Config: every variable checked before anything is done, all errors together.

pub mod settings;
pub mod variables;

use std::fmt;
use std::path::Path;

use one_context::Context;
use serde_json::{Map, Value as Json, json};
use tracing::level_filters::LevelFilter;

use crate::values::PciAddress;
use crate::values::ca_bundle::CaBundle;
use crate::values::{DeviceSelection, Fraction, HostPort, ImageRef, NodeConfig, Version, escape};
use variables::{Kind, VARIABLES, Value, Variable};

/// The machine-learning framework of the node's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Framework {
    PyTorch,
    TensorFlow,
    Sklearn,
    /// Flower alone: the operator's ClientApp brings what it needs.
    Base,
}

impl Framework {
    fn parse(word: &str) -> Option<Self> {
        match word.to_ascii_lowercase().as_str() {
            "pytorch" => Some(Self::PyTorch),
            "tensorflow" => Some(Self::TensorFlow),
            "sklearn" => Some(Self::Sklearn),
            "base" => Some(Self::Base),
            _ => None,
        }
    }

    /// The word for it in `ML_FRAMEWORK` and in the image's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::PyTorch => "pytorch",
            Self::TensorFlow => "tensorflow",
            Self::Sklearn => "sklearn",
            Self::Base => "base",
        }
    }
}

impl fmt::Display for Framework {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Least severity that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum LogLevel {
    Debug,
    Info,
    Warning,
    Error,
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Info => Self::INFO,
            LogLevel::Warning => Self::WARN,
            LogLevel::Error => Self::ERROR,
        }
    }
}

impl LogLevel {
    fn parse(word: &str) -> Self {
        match word {
            "DEBUG" => Self::Debug,
            "WARNING" => Self::Warning,
            "ERROR" => Self::Error,
            _ => Self::Info,
        }
    }

    /// The word for it in `FL_LOG_LEVEL` and `FLWR_LOG_LEVEL`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Debug => "DEBUG",
            Self::Info => "INFO",
            Self::Warning => "WARNING",
            Self::Error => "ERROR",
        }
    }
}

/// A PCI device that OpenNebula passed through: what the cloud assigned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assigned {
    /// The variable, `PCI<n>_ADDRESS`, fit to be shown.
    pub variable: String,
    /// Its value as written, fit to be shown: it is foreign text, and goes into findings.
    pub written: String,
    /// The address, where the value is one.
    pub address: Option<PciAddress>,
}

/// What the image build left behind: the version and the framework of the image that is on the
/// machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prebaked {
    /// Release of Flower.
    pub version: Version,
    /// Framework.
    pub framework: Framework,
}

/// What the operator wants, checked.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "each field is the variable of its name, see `variables`")]
pub struct Config {
    pub gpu_enabled: bool,
    pub gpu_required: bool,
    pub devices: DeviceSelection,
    pub memory_fraction: Option<Fraction>,
    pub dcgm_enabled: bool,
    pub version: Version,
    pub framework: Framework,
    pub image: Option<ImageRef>,
    pub superlink_address: Option<HostPort>,
    pub node_config: Option<NodeConfig>,
    pub max_retries: u64,
    pub max_wait_time: u64,
    pub isolation: &'static str,
    pub log_level: LogLevel,
    pub log_json: bool,
    pub tls: Option<bool>,
    pub ca_certificate: Option<CaBundle>,
    pub keepalive_time: u64,
    pub keepalive_timeout: u64,
    pub edge_backoff: &'static str,
    pub edge_max_backoff: u64,
    /// The passed-through PCI devices that are not NICs.
    pub assigned: Vec<Assigned>,
    /// The image that is on the machine, to fall back on.
    pub prebaked: Prebaked,
}

/// What an operator should know although nothing is wrong enough to stop.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diagnostics {
    /// Unknown names: each is a WARNING.
    pub unknown: Vec<String>,
    /// Settings that do not do all that they seem to: each is a WARNING.
    pub misconfigured: Vec<String>,
    /// Settings that another one makes idle: each is an INFO.
    pub idle: Vec<String>,
    /// Settings that are taken although they are not written as they should be: each is an INFO.
    pub notes: Vec<String>,
}

impl Diagnostics {
    /// All that is a WARNING.
    pub fn warnings(&self) -> impl Iterator<Item = &String> {
        self.unknown.iter().chain(&self.misconfigured)
    }
}

/// Everything that is wrong with the configuration, one line each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors(pub Vec<String>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl Default for Prebaked {
    /// Flower 1.31.0 with PyTorch, which the field's appliance ships.
    fn default() -> Self {
        Self { version: Version::new(1, 31, 0), framework: Framework::PyTorch }
    }
}

impl Prebaked {
    /// Reads `PREBAKED_VERSION` and `PREBAKED_FRAMEWORK` in `folder`; without these files Flower
    /// 1.31.0 with PyTorch.
    ///
    /// # Errors
    /// Names the file that is there and does not say what it should.
    pub fn read(folder: &Path) -> Result<Self, ConfigErrors> {
        let mut errors = Vec::new();
        let mut content = |name: &str| {
            let path = folder.join(name);
            match std::fs::read_to_string(&path) {
                Ok(text) => Some((path, text.trim().to_owned())),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                Err(error) => {
                    errors.push(format!("{}: {error}", path.display()));
                    None
                }
            }
        };
        let (version, framework) = (content("PREBAKED_VERSION"), content("PREBAKED_FRAMEWORK"));
        let mut prebaked = Self::default();
        if let Some((path, text)) = version {
            match Version::parse(&text) {
                Ok(version) => prebaked.version = version,
                Err(why) => {
                    errors.push(format!("{}: {} {why}", path.display(), Kind::Version.quote(&text)))
                }
            }
        }
        if let Some((path, text)) = framework {
            let kind = Kind::Choice(variables::FRAMEWORKS);
            match kind.parse(&text) {
                Ok(_) => prebaked.framework = Framework::parse(&text).unwrap_or(prebaked.framework),
                Err(why) => errors.push(format!("{}: {} {why}", path.display(), kind.quote(&text))),
            }
        }
        if errors.is_empty() { Ok(prebaked) } else { Err(ConfigErrors(errors)) }
    }
}

/// The log's level and whether it is JSON, before the variables are checked: what is wrong about
/// them is logged as well.
pub fn log_settings(context: &Context) -> (LogLevel, bool) {
    let found = ParsedVariables::read(context);
    found.log_settings()
}

impl Config {
    /// Reads every variable of the table out of `context`.
    ///
    /// # Errors
    /// All that is wrong, one line for each variable as the operator wrote it, with its value and
    /// what is accepted.
    pub fn from_context(
        context: &Context,
        prebaked: &Prebaked,
    ) -> Result<(Self, Diagnostics), ConfigErrors> {
        let mut found = ParsedVariables::read(context);
        let keepalive_time = found.count("FL_GRPC_KEEPALIVE_TIME").unwrap_or(60);
        let keepalive_timeout = found.count("FL_GRPC_KEEPALIVE_TIMEOUT").unwrap_or(20);
        let both_right = !["FL_GRPC_KEEPALIVE_TIME", "FL_GRPC_KEEPALIVE_TIMEOUT"]
            .iter()
            .any(|name| found.wrong.contains(name));
        if both_right && keepalive_timeout >= keepalive_time {
            found.errors.push(format!(
                "{}: must be less than {}",
                found.described("FL_GRPC_KEEPALIVE_TIMEOUT", "20"),
                found.described("FL_GRPC_KEEPALIVE_TIME", "60"),
            ));
        }
        let (log_level, log_json) = found.log_settings();
        let config = Self {
            gpu_enabled: found.yes_no("FL_GPU_ENABLED").unwrap_or(false),
            gpu_required: found.yes_no("FL_GPU_REQUIRED").unwrap_or(false),
            devices: match found.take("FL_CUDA_VISIBLE_DEVICES") {
                Some(Value::Devices(devices)) => devices,
                _ => DeviceSelection::All,
            },
            memory_fraction: match found.take("FL_GPU_MEMORY_FRACTION") {
                Some(Value::Fraction(fraction)) => Some(fraction),
                _ => None,
            },
            dcgm_enabled: found.yes_no("FL_DCGM_ENABLED").unwrap_or(false),
            version: match found.take("FLOWER_VERSION") {
                Some(Value::Version(version)) => version,
                _ => prebaked.version.clone(),
            },
            framework: found
                .choice("ML_FRAMEWORK")
                .and_then(Framework::parse)
                .unwrap_or(prebaked.framework),
            image: match found.take("FL_SUPERNODE_IMAGE") {
                Some(Value::Image(image)) => Some(image),
                _ => None,
            },
            superlink_address: match found.take("FL_SUPERLINK_ADDRESS") {
                Some(Value::HostPort(address)) => Some(address),
                _ => None,
            },
            node_config: match found.take("FL_NODE_CONFIG") {
                Some(Value::NodeConfig(node_config)) => Some(node_config),
                _ => None,
            },
            max_retries: found.count("FL_MAX_RETRIES").unwrap_or(0),
            max_wait_time: found.count("FL_MAX_WAIT_TIME").unwrap_or(0),
            isolation: found.choice("FL_ISOLATION").unwrap_or("subprocess"),
            log_level,
            log_json,
            tls: found.yes_no("FL_TLS_ENABLED"),
            ca_certificate: found.ca().map(|(_, ca)| ca.clone()),
            keepalive_time,
            keepalive_timeout,
            edge_backoff: found.choice("FL_EDGE_BACKOFF").unwrap_or("exponential"),
            edge_max_backoff: found.count("FL_EDGE_MAX_BACKOFF").unwrap_or(300),
            assigned: context
                .assigned_addresses()
                .into_iter()
                .map(|(variable, written)| Assigned {
                    variable: escape(&variable),
                    address: PciAddress::parse(&written),
                    written: escape(&written),
                })
                .collect(),
            prebaked: prebaked.clone(),
        };
        if !found.errors.is_empty() {
            return Err(ConfigErrors(found.errors));
        }
        let remarks = Diagnostics {
            unknown: unknown_names(context),
            misconfigured: doubtful_settings(&config, &found),
            idle: idle_settings(&config, &found),
            notes: notes(&found),
        };
        Ok((config, remarks))
    }

    /// The resolved values, by the variables' names; secrets hidden.
    pub fn resolved(&self) -> Map<String, Json> {
        let text = |value: Option<String>| value.map_or(Json::Null, Json::String);
        let mut map = Map::new();
        for variable in VARIABLES {
            let value = match variable.name {
                "FL_GPU_ENABLED" => json!(self.gpu_enabled),
                "FL_GPU_REQUIRED" => json!(self.gpu_required),
                "FL_CUDA_VISIBLE_DEVICES" => json!(self.devices.to_string()),
                "FL_GPU_MEMORY_FRACTION" => {
                    json!(self.memory_fraction.as_ref().map(Fraction::value))
                }
                "FL_DCGM_ENABLED" => json!(self.dcgm_enabled),
                "FLOWER_VERSION" => json!(self.version.to_string()),
                "ML_FRAMEWORK" => json!(self.framework.name()),
                "FL_SUPERNODE_IMAGE" => text(self.image.as_ref().map(ImageRef::to_string)),
                "FL_SUPERLINK_ADDRESS" => {
                    text(self.superlink_address.as_ref().map(HostPort::to_string))
                }
                "FL_NODE_CONFIG" => text(self.node_config.as_ref().map(NodeConfig::redacted)),
                "FL_MAX_RETRIES" => json!(self.max_retries),
                "FL_MAX_WAIT_TIME" => json!(self.max_wait_time),
                "FL_ISOLATION" => json!(self.isolation),
                "FL_LOG_LEVEL" => json!(self.log_level.name()),
                "FL_LOG_FORMAT" => json!(if self.log_json { "json" } else { "text" }),
                "FL_TLS_ENABLED" => json!(self.tls),
                "FL_SSL_CA_CERTFILE" => {
                    json!(
                        self.ca_certificate
                            .as_ref()
                            .map(|ca| format!("PEM, {} bytes", ca.pem().len()))
                    )
                }
                "FL_GRPC_KEEPALIVE_TIME" => json!(self.keepalive_time),
                "FL_GRPC_KEEPALIVE_TIMEOUT" => json!(self.keepalive_timeout),
                "FL_EDGE_BACKOFF" => json!(self.edge_backoff),
                "FL_EDGE_MAX_BACKOFF" => json!(self.edge_max_backoff),
                _ => continue,
            };
            map.insert(variable.name.into(), value);
        }
        for assigned in &self.assigned {
            map.insert(assigned.variable.clone(), json!(assigned.written));
        }
        map
    }
}

/// The variables that are set in a context, with what is wrong about them.
struct ParsedVariables {
    set: Vec<(&'static Variable, SetVariable)>,
    errors: Vec<String>,
    /// The variables that the errors are about, by their names in the table.
    wrong: Vec<&'static str>,
}

/// A variable that is set: under which name, how it was written, what it is.
struct SetVariable {
    name: String,
    shown: String,
    value: Value,
}

impl ParsedVariables {
    fn read(context: &Context) -> Self {
        let mut found = Self { set: Vec::new(), errors: Vec::new(), wrong: Vec::new() };
        for variable in VARIABLES {
            let errors_before = found.errors.len();
            let mut first: Option<SetVariable> = None;
            for name in variable.names() {
                let text = match context.text(&name) {
                    Ok(Some(text)) => text,
                    Ok(None) => continue,
                    Err(_) => {
                        let lossy = String::from_utf8_lossy(
                            context.bytes(&name).unwrap_or_default().trim_ascii(),
                        );
                        found.errors.push(format!(
                            "{name}={}: must be UTF-8 text: {}",
                            variable.kind.quote(&lossy),
                            variable.kind.values()
                        ));
                        continue;
                    }
                };
                let shown = variable.kind.quote(text);
                match (variable.kind.parse(text), &first) {
                    (Err(refusal), _) => found.errors.push(format!("{name}={shown}: {refusal}")),
                    (Ok(value), Some(first)) if first.value != value => found.errors.push(format!(
                        "{}={} and {name}={shown}: both are set and differ; set one of them",
                        first.name, first.shown
                    )),
                    (Ok(_), Some(_)) => {}
                    (Ok(value), None) => first = Some(SetVariable { name, shown, value }),
                }
            }
            found.set.extend(first.map(|set| (variable, set)));
            if found.errors.len() > errors_before {
                found.wrong.push(variable.name);
            }
        }
        found
    }

    fn get(&self, name: &str) -> Option<&SetVariable> {
        self.set.iter().find(|(variable, _)| variable.name == name).map(|(_, set)| set)
    }

    fn take(&self, name: &str) -> Option<Value> {
        self.get(name).map(|set| set.value.clone())
    }

    fn yes_no(&self, name: &str) -> Option<bool> {
        match self.get(name)?.value {
            Value::YesNo(switch) => Some(switch),
            _ => None,
        }
    }

    fn count(&self, name: &str) -> Option<u64> {
        match self.get(name)?.value {
            Value::Count(count) => Some(count),
            _ => None,
        }
    }

    fn choice(&self, name: &str) -> Option<&'static str> {
        match self.get(name)?.value {
            Value::Choice(word) => Some(word),
            _ => None,
        }
    }

    /// The CA, with the name under which it was set.
    fn ca(&self) -> Option<(&str, &CaBundle)> {
        match self.get("FL_SSL_CA_CERTFILE")? {
            SetVariable { name, value: Value::CaBundle(ca), .. } => Some((name, ca)),
            _ => None,
        }
    }

    fn log_settings(&self) -> (LogLevel, bool) {
        let level = self.choice("FL_LOG_LEVEL").map_or(LogLevel::Info, LogLevel::parse);
        (level, self.choice("FL_LOG_FORMAT") == Some("json"))
    }

    /// `NAME='value'` as the operator wrote it, or the default.
    fn described(&self, name: &str, default: &str) -> String {
        match self.get(name) {
            Some(set) => format!("{}={}", set.name, set.shown),
            None => format!("{name}='{default}' (the default)"),
        }
    }
}

fn unknown_names(context: &Context) -> Vec<String> {
    context
        .names()
        .filter(|name| name.starts_with("FL_") || name.starts_with("ONEAPP_FL_"))
        .filter(|name| variables::find(name).is_none())
        // An unset user input arrives empty, whatever its name.
        .filter(|name| context.bytes(name).is_some_and(|value| !value.trim_ascii().is_empty()))
        .map(|name| match variables::nearest(name) {
            Some(known) => {
                format!("{name} is not a known variable and has no effect: did you mean {known}?")
            }
            None => format!("{} is not a known variable and has no effect", escape(name)),
        })
        .collect()
}

fn doubtful_settings(config: &Config, found: &ParsedVariables) -> Vec<String> {
    let Some((name, ca)) = found.ca() else { return Vec::new() };
    let mut misconfigured = Vec::new();
    if config.tls.is_none() && config.superlink_address.is_some() {
        misconfigured.push(format!(
            "{name} is set and FL_TLS_ENABLED is not: the connection to the SuperLink is NOT encrypted; set FL_TLS_ENABLED=YES"
        ));
    }
    misconfigured.extend(ca.ignored().map(|what| format!("{name}: {what}")));
    misconfigured
}

fn notes(found: &ParsedVariables) -> Vec<String> {
    let raw = found.ca().filter(|(_, ca)| ca.was_raw_pem());
    let note = raw.map(|(name, _)| {
        format!("{name} is PEM text; the base64 of it is expected (base64 -w0 ca.crt), and the text is taken as it is")
    });
    note.into_iter().collect()
}

fn idle_settings(config: &Config, found: &ParsedVariables) -> Vec<String> {
    const DISCOVERY_ONLY: [&str; 2] = ["FL_EDGE_BACKOFF", "FL_EDGE_MAX_BACKOFF"];
    let mut idle = Vec::new();
    let mut note = |names: &[&str], active: bool, why: &str| {
        for set in names.iter().filter_map(|name| found.get(name)).filter(|_| !active) {
            let switched_off = set.value == Value::YesNo(false);
            if !switched_off {
                idle.push(format!("{} is idle: {why}", set.name));
            }
        }
    };
    note(variables::GPU_ONLY, config.gpu_enabled, "FL_GPU_ENABLED is not YES");
    note(&["FLOWER_VERSION"], config.image.is_none(), "FL_SUPERNODE_IMAGE names the image");
    note(&["FL_SSL_CA_CERTFILE"], config.tls != Some(false), "FL_TLS_ENABLED is NO");
    note(
        &DISCOVERY_ONLY,
        config.superlink_address.is_none(),
        "FL_SUPERLINK_ADDRESS is set, nothing is discovered",
    );
    let discovered_with_cap =
        config.edge_backoff == "exponential" || config.superlink_address.is_some();
    note(&["FL_EDGE_MAX_BACKOFF"], discovered_with_cap, "FL_EDGE_BACKOFF is fixed");
    idle
}

impl Config {
    /// Validates all context variables, and the versions that are prebaked into the VM image.
    ///
    /// # Errors
    /// All errors together.
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
}

#[cfg(test)]
mod tests {
    use super::*;

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
        read(pairs).unwrap_err().0
    }

    #[test]
    fn without_variables_there_are_the_defaults() {
        let (config, remarks) = read(&[]).unwrap();
        assert!(!config.gpu_enabled && !config.gpu_required && config.tls.is_none());
        assert_eq!(
            (config.version.to_string().as_str(), config.framework),
            ("1.31.0", Framework::PyTorch)
        );
        assert_eq!(
            (config.keepalive_time, config.keepalive_timeout, config.edge_max_backoff),
            (60, 20, 300)
        );
        assert_eq!((config.isolation, config.edge_backoff), ("subprocess", "exponential"));
        assert_eq!(remarks, Diagnostics::default());
        assert_eq!(
            config.resolved().len(),
            VARIABLES.len(),
            "a variable of the table is not among the resolved ones"
        );
    }

    #[test]
    fn every_variable_is_read_by_each_of_its_names() {
        for variable in VARIABLES {
            let value = match variable.kind {
                Kind::YesNo => "YES",
                Kind::Choice(words) => words.last().unwrap(),
                Kind::Count(_) => "25",
                Kind::Fraction => "0.25",
                Kind::Version => "1.25.0",
                Kind::Image => "own/image:1",
                Kind::HostPort => "h:25",
                Kind::Devices => "25",
                Kind::NodeConfig => "k=25",
                Kind::CaBundle => CA,
            };
            let default = Config::from_context(&context(&[]), &Prebaked::default()).unwrap().0;
            for name in variable.names() {
                let (config, remarks) = read(&[(&name, value)]).unwrap();
                assert_ne!(config.resolved(), default.resolved(), "{name} is not read");
                assert_eq!(remarks.unknown, Vec::<String>::new());
            }
        }
    }

    #[test]
    fn all_errors_are_told_together_by_the_names_that_were_written() {
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
        assert!(config.gpu_enabled);
        let (config, _) =
            read(&[("FL_GPU_ENABLED", ""), ("ONEAPP_FL_GPU_ENABLED", " yes ")]).unwrap();
        assert!(config.gpu_enabled);
        assert_eq!(
            errors(&[("FL_GPU_ENABLED", "YES"), ("ONEAPP_FL_GPU_ENABLED", "no")]),
            [
                "FL_GPU_ENABLED='YES' and ONEAPP_FL_GPU_ENABLED='no': both are set and differ; set one of them"
            ]
        );
        assert_eq!(errors(&[("ML_FRAMEWORK", "base"), ("FL_ML_FRAMEWORK", "sklearn")]).len(), 1);
    }

    #[test]
    fn a_keepalive_timeout_must_be_less_than_its_time() {
        assert_eq!(
            errors(&[("FL_GRPC_KEEPALIVE_TIME", "20")]),
            [
                "FL_GRPC_KEEPALIVE_TIMEOUT='20' (the default): must be less than FL_GRPC_KEEPALIVE_TIME='20'"
            ]
        );
        assert_eq!(errors(&[("FL_GRPC_KEEPALIVE_TIME", "x")]).len(), 1);
        // What is wrong is not held against the other by its default.
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
    fn an_unknown_name_is_told_with_the_nearest_known_one() {
        let (_, remarks) = read(&[
            ("FL_GPU_ENABLE", "YES"),
            ("ONEAPP_FL_TSL_ENABLED", "YES"),
            ("FL_GPU_MEMORY", "0.5"),
            ("FL_SOMETHING_ELSE", "secret-value"),
            ("FL_EMPTY", ""),
            ("OTHER_FL_GPU", "1"),
        ])
        .unwrap();
        assert_eq!(
            remarks.unknown,
            [
                "FL_GPU_ENABLE is not a known variable and has no effect: did you mean FL_GPU_ENABLED?",
                "FL_GPU_MEMORY is not a known variable and has no effect: did you mean FL_GPU_MEMORY_FRACTION?",
                "FL_SOMETHING_ELSE is not a known variable and has no effect",
                "ONEAPP_FL_TSL_ENABLED is not a known variable and has no effect: did you mean ONEAPP_FL_TLS_ENABLED?",
            ]
        );
    }

    #[test]
    fn a_setting_that_another_makes_idle_is_told() {
        let (_, remarks) = read(&[
            ("FL_GPU_ENABLED", "NO"),
            ("ONEAPP_FL_GPU_MEMORY_FRACTION", "0.5"),
            ("FL_DCGM_ENABLED", "NO"),
            ("FL_SUPERLINK_ADDRESS", "h:1"),
            ("FL_EDGE_MAX_BACKOFF", "60"),
        ])
        .unwrap();
        assert_eq!(
            remarks.idle,
            [
                "ONEAPP_FL_GPU_MEMORY_FRACTION is idle: FL_GPU_ENABLED is not YES",
                "FL_EDGE_MAX_BACKOFF is idle: FL_SUPERLINK_ADDRESS is set, nothing is discovered",
            ]
        );
    }

    const CA: &str = include_str!("../../tests/ca.crt");

    #[test]
    fn a_ca_without_tls_is_a_connection_in_the_clear_and_warned_of() {
        let (_, remarks) =
            read(&[("ONEAPP_FL_SSL_CA_CERTFILE", CA), ("FL_SUPERLINK_ADDRESS", "h:1")]).unwrap();
        assert_eq!(
            remarks.warnings().collect::<Vec<_>>(),
            [
                "ONEAPP_FL_SSL_CA_CERTFILE is set and FL_TLS_ENABLED is not: the connection to the SuperLink is NOT encrypted; set FL_TLS_ENABLED=YES"
            ]
        );
        assert_eq!(remarks.idle, Vec::<String>::new());
        // Whoever says NO means it.
        let (_, remarks) = read(&[
            ("FL_SSL_CA_CERTFILE", CA),
            ("FL_SUPERLINK_ADDRESS", "h:1"),
            ("FL_TLS_ENABLED", "NO"),
        ])
        .unwrap();
        assert_eq!(remarks.warnings().count(), 0);
        assert_eq!(remarks.idle, ["FL_SSL_CA_CERTFILE is idle: FL_TLS_ENABLED is NO"]);
        // Without an address the SuperLink has its say.
        let (_, remarks) = read(&[("FL_SSL_CA_CERTFILE", CA)]).unwrap();
        assert_eq!((remarks.warnings().count(), remarks.idle.len()), (0, 0));
    }

    #[test]
    fn how_a_ca_was_written_and_what_stood_beside_it_is_remarked() {
        let bundle = format!("{}{CA}", include_str!("../../tests/certificates/leaf.crt"));
        let (config, remarks) =
            read(&[("FL_SSL_CA_CERTFILE", &bundle), ("FL_TLS_ENABLED", "YES")]).unwrap();
        assert_eq!(config.ca_certificate.unwrap().pem(), CA);
        assert_eq!(
            remarks.misconfigured,
            [
                "FL_SSL_CA_CERTFILE: what is no CA is left out: CN=superlink.example, which is no CA (its basicConstraints do not say CA:TRUE)"
            ]
        );
        assert_eq!(
            remarks.notes,
            [
                "FL_SSL_CA_CERTFILE is PEM text; the base64 of it is expected (base64 -w0 ca.crt), and the text is taken as it is"
            ]
        );
    }

    #[test]
    fn a_value_that_may_be_secret_is_not_in_the_error() {
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
    fn what_the_cloud_wrote_as_an_address_is_shown_in_one_bounded_line() {
        let hostile = format!("\x1b[31m\n{}", "x".repeat(9000));
        let (config, _) =
            read(&[("PCI0_ADDRESS", &hostile), ("PCI1_ADDRESS", " 01:00.0 ")]).unwrap();
        let written = &config.assigned[0].written;
        assert!(
            written.starts_with("\\u{1b}[31m\\nxxx") && written.chars().count() < 250,
            "{written}"
        );
        assert_eq!(config.assigned[1].written, "01:00.0");
        assert_eq!(config.assigned[1].address, PciAddress::parse("01:00.0"));
    }

    #[test]
    fn a_value_that_is_not_text_is_named_with_what_it_is_and_what_is_accepted() {
        let text = b"ONEAPP_FL_LOG_LEVEL=' de\xffbug'\nFL_NODE_CONFIG='password=\"hunter\xff\"'\nOTHER='\xff'\n";
        let context = Context::parse(text).unwrap();
        let errors = Config::from_context(&context, &Prebaked::default()).unwrap_err();
        assert_eq!(
            errors.0,
            [
                "FL_NODE_CONFIG=(18 characters, not shown): must be UTF-8 text: space-separated key=value, values TOML scalars",
                "ONEAPP_FL_LOG_LEVEL='de\u{fffd}bug': must be UTF-8 text: DEBUG, INFO, WARNING, ERROR",
            ]
        );
    }

    #[test]
    fn every_word_of_a_choice_is_read_as_what_it_says() {
        for (word, framework) in [
            ("PyTorch", Framework::PyTorch),
            ("tensorflow", Framework::TensorFlow),
            ("sklearn", Framework::Sklearn),
            ("base", Framework::Base),
        ] {
            let prebaked = Prebaked {
                framework: if framework == Framework::PyTorch {
                    Framework::Base
                } else {
                    Framework::PyTorch
                },
                ..Prebaked::default()
            };
            let (config, _) =
                Config::from_context(&context(&[("ML_FRAMEWORK", word)]), &prebaked).unwrap();
            assert_eq!(config.framework, framework);
            assert_eq!(framework.to_string(), word.to_lowercase());
        }
        for (word, level) in [
            ("debug", LogLevel::Debug),
            ("INFO", LogLevel::Info),
            ("Warning", LogLevel::Warning),
            ("ERROR", LogLevel::Error),
        ] {
            assert_eq!(log_settings(&context(&[("FL_LOG_LEVEL", word)])), (level, false));
            assert_eq!(level.name(), word.to_uppercase());
        }
        assert_eq!(log_settings(&context(&[("FL_LOG_FORMAT", "JSON")])), (LogLevel::Info, true));
    }

    #[test]
    fn what_the_image_build_left_behind_is_read_and_a_file_that_says_nothing_is_named() {
        let folder = std::env::temp_dir().join(format!("sn-prebaked-{}", std::process::id()));
        assert_eq!(Prebaked::read(&folder), Ok(Prebaked::default()), "without the files");
        std::fs::create_dir_all(&folder).unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
        write("PREBAKED_VERSION", "1.25.0\n");
        write("PREBAKED_FRAMEWORK", "tensorflow\n");
        let read = Prebaked { version: Version::new(1, 25, 0), framework: Framework::TensorFlow };
        assert_eq!(Prebaked::read(&folder), Ok(read));
        write("PREBAKED_VERSION", "latest");
        write("PREBAKED_FRAMEWORK", "jax");
        let place = folder.display();
        assert_eq!(
            Prebaked::read(&folder).unwrap_err().to_string(),
            format!(
                "{place}/PREBAKED_VERSION: 'latest' must be a Flower release X.Y.Z, such as 1.31.0\n\
                 {place}/PREBAKED_FRAMEWORK: 'jax' must be one of pytorch, tensorflow, sklearn, base"
            )
        );
        std::fs::remove_dir_all(&folder).unwrap();
        // A folder in the place of a file.
        std::fs::create_dir_all(folder.join("PREBAKED_VERSION")).unwrap();
        let error = Prebaked::read(&folder).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{place}/PREBAKED_VERSION: ")), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_cap_of_the_pauses_is_idle_where_they_are_fixed_or_nothing_is_discovered() {
        let idle = |pairs: &[(&str, &str)]| {
            read(&[&[("FL_EDGE_MAX_BACKOFF", "60")], pairs].concat()).unwrap().1.idle
        };
        assert_eq!(idle(&[]), Vec::<String>::new());
        assert_eq!(idle(&[("FL_EDGE_BACKOFF", "exponential")]), Vec::<String>::new());
        let fixed = ("FL_EDGE_BACKOFF", "fixed");
        assert_eq!(idle(&[fixed]), ["FL_EDGE_MAX_BACKOFF is idle: FL_EDGE_BACKOFF is fixed"]);
        assert_eq!(
            idle(&[fixed, ("FL_SUPERLINK_ADDRESS", "h:1")]),
            ["FL_EDGE_BACKOFF", "FL_EDGE_MAX_BACKOFF"].map(|name| format!(
                "{name} is idle: FL_SUPERLINK_ADDRESS is set, nothing is discovered"
            ))
        );
    }
}
