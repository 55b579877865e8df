//! The table of context variables. Parsing, `--help`, `variables`, the README, the man page, the
//! OpenNebula templates and `check template` are all derived from it.
//!
//! To add a variable:
//! 1. Add a field to `Config` in `fields.rs`, of a type that implements `FieldValue` (`kind.rs`).
//! 2. Add a row to [`VARIABLES`] that names the field; `default` is applied if it is a valid value.
//! 3. Use the field, for example in `container::plan`.
//! 4. Run `UPDATE_DOCUMENTS=1 cargo test -p supernode-agent --test documents`.

use serde_json::{Map, Value as Json};

use super::choices::{EdgeBackoff, Framework, Isolation, LogFormat, LogLevel};
use super::fields::Config;
use super::kind::{FieldValue, Kind, Value};

/// A context variable.
#[derive(Debug)]
pub struct Variable {
    /// Name.
    pub name: &'static str,
    /// Alternative names.
    pub aliases: &'static [&'static str],
    /// What it accepts.
    pub kind: Kind,
    /// The value that applies when the variable is unset, or a description of it.
    pub default: &'static str,
    /// The flag, environment variable or component that the value goes to.
    pub maps_to: &'static str,
    /// Purpose, in one line.
    pub description: &'static str,
    /// When the variable has an effect.
    pub effective: Effective,
    pub(super) field: Field,
}

/// When a variable has an effect; otherwise it is reported at INFO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effective {
    /// Always.
    Always,
    /// With `FL_GPU_ENABLED=YES`.
    GpuEnabled,
    /// Without `FL_SUPERNODE_IMAGE`.
    NoOwnImage,
    /// Unless `FL_TLS_ENABLED` is NO.
    TlsNotDisabled,
    /// When the SuperLink is discovered.
    Discovery,
    /// When the SuperLink is discovered and the delay between attempts grows.
    ExponentialDiscovery,
}

impl Effective {
    /// Returns why the variable has no effect with this configuration; `None` if it has.
    pub(super) fn unmet(self, config: &Config) -> Option<&'static str> {
        let reason = |is_unmet: bool, reason| is_unmet.then_some(reason);
        match self {
            Self::Always => None,
            Self::GpuEnabled => reason(!config.gpu.enabled, "FL_GPU_ENABLED is not YES"),
            Self::NoOwnImage => reason(config.image.is_some(), "FL_SUPERNODE_IMAGE is set"),
            Self::TlsNotDisabled => reason(config.tls == Some(false), "FL_TLS_ENABLED is NO"),
            Self::Discovery => reason(
                config.superlink_address.is_some(),
                "FL_SUPERLINK_ADDRESS is set, so discovery is disabled",
            ),
            Self::ExponentialDiscovery => Self::Discovery.unmet(config).or_else(|| {
                reason(config.edge_backoff == EdgeBackoff::Fixed, "FL_EDGE_BACKOFF is fixed")
            }),
        }
    }
}

/// Accessors of the [`Config`] field that a variable fills.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field {
    /// Stores a parsed value.
    pub(super) set: fn(&mut Config, &Value),
    /// Returns the field for `plan`, with secrets hidden.
    pub(super) get: fn(&Config) -> Json,
}

/// The [`Field`] at this path in [`Config`].
macro_rules! field {
    ($($path:ident).+) => {
        Field {
            set: |config, value| store(&mut config.$($path).+, value),
            get: |config| config.$($path).+.to_json(),
        }
    };
}

fn store<T: FieldValue>(field: &mut T, value: &Value) {
    if let Some(value) = T::from_value(value) {
        *field = value;
    }
}

impl Variable {
    /// Returns every name under which the variable is read: its name and aliases, each also with
    /// `ONEAPP_`.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.base_names().flat_map(|name| [name.to_owned(), format!("ONEAPP_{name}")])
    }

    /// Its name and its aliases.
    pub fn base_names(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.name).chain(self.aliases.iter().copied())
    }
}

/// Every variable, in the order of the documentation.
pub const VARIABLES: &[Variable] = &[
    Variable {
        name: "FL_GPU_ENABLED",
        aliases: &[],
        kind: Kind::YesNo,
        default: "NO",
        maps_to: "use of the GPU",
        description: "Use the assigned GPU",
        effective: Effective::Always,
        field: field!(gpu.enabled),
    },
    Variable {
        name: "FL_GPU_REQUIRED",
        aliases: &[],
        kind: Kind::YesNo,
        default: "NO",
        maps_to: "YES: the node does not start without a usable GPU",
        description: "Fail instead of falling back to the CPU",
        effective: Effective::GpuEnabled,
        field: field!(gpu.required),
    },
    Variable {
        name: "FL_CUDA_VISIBLE_DEVICES",
        aliases: &[],
        kind: Kind::Devices,
        default: "all",
        maps_to: "the GPUs that the container gets",
        description: "GPUs for the node",
        effective: Effective::GpuEnabled,
        field: field!(gpu.selection),
    },
    Variable {
        name: "FL_GPU_MEMORY_FRACTION",
        aliases: &[],
        kind: Kind::Fraction,
        default: "frameworks grow on demand",
        maps_to: "the framework's memory limit",
        description: "Fraction of the GPU's memory that the framework may use",
        effective: Effective::GpuEnabled,
        field: field!(memory_fraction),
    },
    Variable {
        name: "FL_DCGM_ENABLED",
        aliases: &[],
        kind: Kind::YesNo,
        default: "NO",
        maps_to: "the DCGM exporter next to the node",
        description: "Export GPU metrics",
        effective: Effective::GpuEnabled,
        field: field!(dcgm_enabled),
    },
    Variable {
        name: "FLOWER_VERSION",
        aliases: &[],
        kind: Kind::Version,
        default: "the prebaked version",
        maps_to: "the image's tag",
        description: "Flower release",
        effective: Effective::NoOwnImage,
        field: field!(version),
    },
    Variable {
        name: "ML_FRAMEWORK",
        aliases: &["FL_FRAMEWORK", "FL_ML_FRAMEWORK"],
        kind: Kind::Choice(Framework::WORDS),
        default: "the prebaked framework, else pytorch",
        maps_to: "the image's name",
        description: "Machine-learning framework",
        effective: Effective::Always,
        field: field!(framework),
    },
    Variable {
        name: "FL_SUPERNODE_IMAGE",
        aliases: &[],
        kind: Kind::Image,
        default: "derived from ML_FRAMEWORK and FLOWER_VERSION",
        maps_to: "the image",
        description: "The operator's own image",
        effective: Effective::Always,
        field: field!(image),
    },
    Variable {
        name: "FL_SUPERLINK_ADDRESS",
        aliases: &[],
        kind: Kind::HostPort,
        default: "OneGate discovery",
        maps_to: "--superlink",
        description: "Address of the SuperLink",
        effective: Effective::Always,
        field: field!(superlink_address),
    },
    Variable {
        name: "FL_NODE_CONFIG",
        aliases: &[],
        kind: Kind::NodeConfig,
        default: "partition from OneGate when in a service, else none",
        maps_to: "--node-config",
        description: "Node configuration for the ClientApp",
        effective: Effective::Always,
        field: field!(node_config),
    },
    Variable {
        name: "FL_MAX_RETRIES",
        aliases: &[],
        kind: Kind::Count(0),
        default: "0 = unlimited",
        maps_to: "--max-retries, omitted when 0",
        description: "Attempts to connect to the SuperLink",
        effective: Effective::Always,
        field: field!(max_retries),
    },
    Variable {
        name: "FL_MAX_WAIT_TIME",
        aliases: &[],
        kind: Kind::Count(0),
        default: "0 = unlimited",
        maps_to: "--max-wait-time, omitted when 0",
        description: "Seconds to keep trying to connect to the SuperLink",
        effective: Effective::Always,
        field: field!(max_wait_time),
    },
    Variable {
        name: "FL_ISOLATION",
        aliases: &[],
        kind: Kind::Choice(Isolation::WORDS),
        default: "subprocess",
        maps_to: "--isolation",
        description: "Where the ClientApp runs",
        effective: Effective::Always,
        field: field!(isolation),
    },
    Variable {
        name: "FL_LOG_LEVEL",
        aliases: &[],
        kind: Kind::Choice(LogLevel::WORDS),
        default: "INFO",
        maps_to: "FLWR_LOG_LEVEL, and the agent's own level",
        description: "Lowest severity that is logged",
        effective: Effective::Always,
        field: field!(log_level),
    },
    Variable {
        name: "FL_LOG_FORMAT",
        aliases: &[],
        kind: Kind::Choice(LogFormat::WORDS),
        default: "text",
        maps_to: "the agent's output outside the journal",
        description: "Format of the agent's log",
        effective: Effective::Always,
        field: field!(log_format),
    },
    Variable {
        name: "FL_TLS_ENABLED",
        aliases: &[],
        kind: Kind::YesNo,
        default: "what the SuperLink publishes through OneGate; with FL_SUPERLINK_ADDRESS: NO \
                  (plaintext)",
        maps_to: "--root-certificates or --insecure",
        description: "Connect to the SuperLink with TLS",
        effective: Effective::Always,
        field: field!(tls),
    },
    Variable {
        name: "FL_SSL_CA_CERTFILE",
        aliases: &[],
        kind: Kind::CaBundle,
        default: "from OneGate",
        maps_to: "the CA file",
        description: "Certificate of the SuperLink's CA",
        effective: Effective::TlsNotDisabled,
        field: field!(ca_certificate),
    },
    Variable {
        name: "FL_GRPC_KEEPALIVE_TIME",
        aliases: &[],
        kind: Kind::Count(1),
        default: "60",
        maps_to: "container environment",
        description: "Seconds between gRPC keepalive pings",
        effective: Effective::Always,
        field: field!(keepalive_time),
    },
    Variable {
        name: "FL_GRPC_KEEPALIVE_TIMEOUT",
        aliases: &[],
        kind: Kind::Count(1),
        default: "20",
        maps_to: "container environment",
        description: "Seconds to wait for a ping response; less than the time between pings",
        effective: Effective::Always,
        field: field!(keepalive_timeout),
    },
    Variable {
        name: "FL_EDGE_BACKOFF",
        aliases: &[],
        kind: Kind::Choice(EdgeBackoff::WORDS),
        default: "exponential",
        maps_to: "discovery retry: 10 s, doubling up to the maximum, without end; or 30 attempts, \
                  10 s apart",
        description: "Backoff of the discovery",
        effective: Effective::Discovery,
        field: field!(edge_backoff),
    },
    Variable {
        name: "FL_EDGE_MAX_BACKOFF",
        aliases: &[],
        kind: Kind::Count(1),
        default: "300",
        maps_to: "the maximum delay",
        description: "Maximum delay between discovery attempts, in seconds",
        effective: Effective::ExponentialDiscovery,
        field: field!(edge_max_backoff),
    },
];

/// Sets every field whose default in the table is a value, not a description.
pub(super) fn apply_defaults(config: &mut Config) {
    for variable in VARIABLES {
        if let Ok(default) = variable.kind.parse(variable.default) {
            (variable.field.set)(config, &default);
        }
    }
}

impl Config {
    /// Returns the resolved values by variable name, with secrets hidden.
    pub fn resolved(&self) -> Map<String, Json> {
        let variables =
            VARIABLES.iter().map(|variable| (variable.name.to_owned(), (variable.field.get)(self)));
        let assigned = self
            .gpu
            .assigned
            .iter()
            .map(|device| (device.variable.clone(), device.written.clone().into()));
        variables.chain(assigned).collect()
    }
}

/// Returns the variable that has `name` among its names.
pub fn find(name: &str) -> Option<&'static Variable> {
    VARIABLES.iter().find(|variable| variable.names().any(|known| known == name))
}

/// Returns the known name that is probably meant by `name`: at most two typing errors away, one
/// word more or fewer, or with abbreviated words (`MEM`, `ADDR`). It keeps the `ONEAPP_` prefix of
/// `name`, so that the result can be pasted.
pub fn nearest(name: &str) -> Option<String> {
    const MAX_DISTANCE: usize = 2;
    // Twice the length of the longest known name. Longer names are no typing errors, and comparing
    // them is slow.
    const MAX_LENGTH: usize = 80;
    if name.len() > MAX_LENGTH {
        return None;
    }
    VARIABLES
        .iter()
        .flat_map(Variable::names)
        .map(|known| (strsim::osa_distance(name, &known), known))
        .filter(|(distance, known)| *distance <= MAX_DISTANCE || is_one_word_apart(name, known))
        .min_by_key(|(distance, known)| (*distance, known.len()))
        .map(|(_, known)| known)
}

/// Returns whether one name is the other without one of its words, prefixes ignored, such as
/// `FL_CUDA_DEVICES` and `FL_CUDA_VISIBLE_DEVICES`. An abbreviated word counts as the word.
fn is_one_word_apart(a: &str, b: &str) -> bool {
    fn words(name: &str) -> Vec<&str> {
        name.trim_start_matches("ONEAPP_").trim_start_matches("FL_").split('_').collect()
    }
    fn is_same(a: &str, b: &str) -> bool {
        const MIN_LENGTH: usize = 3;
        a == b || (a.len().min(b.len()) >= MIN_LENGTH && (a.starts_with(b) || b.starts_with(a)))
    }
    let (short, long) = match (words(a), words(b)) {
        (a, b) if a.len() <= b.len() => (a, b),
        (a, b) => (b, a),
    };
    let mut of_long = long.iter();
    long.len() - short.len() <= 1
        && short.iter().all(|word| of_long.any(|other| is_same(other, word)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_name_allows_typos_and_one_word_of_difference() {
        for (name, known) in [
            ("FL_GPU_ENABLE", "FL_GPU_ENABLED"),
            ("FL_GPU", "FL_GPU_ENABLED"),
            ("ONEAPP_FL_GPU", "ONEAPP_FL_GPU_ENABLED"),
            ("FL_TLS", "FL_TLS_ENABLED"),
            ("FL_SUPERLINK", "FL_SUPERLINK_ADDRESS"),
            ("FL_GPU_MEMORY", "FL_GPU_MEMORY_FRACTION"),
            ("FL_GPU_FRACTION", "FL_GPU_MEMORY_FRACTION"),
            ("FL_CUDA_DEVICES", "FL_CUDA_VISIBLE_DEVICES"),
            ("FL_SSL_CERTFILE", "FL_SSL_CA_CERTFILE"),
            ("FL_RETRIES", "FL_MAX_RETRIES"),
            ("FL_FLOWER_VERSION", "FLOWER_VERSION"),
            ("ONEAPP_FL_FLOWER_VERSION", "ONEAPP_FLOWER_VERSION"),
            ("FL_VERSION", "FLOWER_VERSION"),
            ("FL_NODE_ISOLATION", "FL_ISOLATION"),
            ("FL_GPU_MEM_FRACTION", "FL_GPU_MEMORY_FRACTION"),
            ("ONEAPP_FL_GPU_MEM", "ONEAPP_FL_GPU_MEMORY_FRACTION"),
            ("FL_SUPERLINK_ADDR", "FL_SUPERLINK_ADDRESS"),
        ] {
            assert_eq!(nearest(name).as_deref(), Some(known), "{name}");
        }
        let long = |length: usize| format!("FL_GPU_ENABLED_{}", "X".repeat(length - 15));
        assert_eq!(nearest(&long(80)).as_deref(), Some("FL_GPU_ENABLED"));
        let long = long(81);
        for name in
            ["FL_", "FL_SOMETHING_ELSE", "FL_GPU_MEMORY_FRACTION_OF_IT", "FL_A_B_GPU", &long]
        {
            assert_eq!(nearest(name), None, "{name:.40}");
        }
    }

    #[test]
    fn variable_is_found_by_each_of_its_names() {
        for variable in VARIABLES {
            for name in variable.names() {
                assert_eq!(find(&name).map(|found| found.name), Some(variable.name));
            }
        }
        assert!(find("FL_GPU").is_none());
    }

    #[test]
    fn every_field_accepts_the_kind_of_its_variable() {
        for variable in VARIABLES {
            let text = variable.kind.sample();
            let mut config = Config::default();
            apply_defaults(&mut config);
            let before = (variable.field.get)(&config);
            (variable.field.set)(&mut config, &variable.kind.parse(text).unwrap());
            assert_ne!((variable.field.get)(&config), before, "{}", variable.name);
        }
    }
}
