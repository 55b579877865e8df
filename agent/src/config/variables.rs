//! The one table of context variables: what exists, what each accepts, what it means when unset,
//! and where it goes. The parser, the `variables` command, the README and the tests come from it.

use crate::values::ca_bundle::CaBundle;
use crate::values::{
    DeviceSelection, Fraction, HostPort, ImageRef, NodeConfig, ValidationError, Version, escape,
    parse_count, parse_yes_no,
};

/// What a variable accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A switch.
    YesNo,
    /// One of these words, in any case.
    Choice(&'static [&'static str]),
    /// A whole number that is at least this.
    Count(u64),
    /// A number greater than 0, at most 1.
    Fraction,
    /// A Flower release.
    Version,
    /// An image reference.
    Image,
    /// A host and a port.
    HostPort,
    /// A list of GPUs.
    Devices,
    /// Flower's node configuration.
    NodeConfig,
    /// A certificate.
    CaBundle,
}

/// A value that was checked against its [`Kind`].
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "each variant is named after the kind it was read by")]
pub enum Value {
    YesNo(bool),
    /// The word as the table has it.
    Choice(&'static str),
    Count(u64),
    Fraction(Fraction),
    Version(Version),
    Image(ImageRef),
    HostPort(HostPort),
    Devices(DeviceSelection),
    NodeConfig(NodeConfig),
    CaBundle(CaBundle),
}

impl Kind {
    /// Reads `text`, which has no blanks at its ends and is not empty.
    ///
    /// # Errors
    /// What is accepted.
    pub fn parse(self, text: &str) -> Result<Value, ValidationError> {
        match self {
            Self::YesNo => parse_yes_no(text).map(Value::YesNo),
            Self::Choice(words) => words
                .iter()
                .find(|word| word.eq_ignore_ascii_case(text))
                .map(|word| Value::Choice(word))
                .ok_or_else(|| {
                    ValidationError::new(format!("must be one of {}", words.join(", ")))
                }),
            Self::Count(least) => parse_count(text, least).map(Value::Count),
            Self::Fraction => Fraction::parse(text).map(Value::Fraction),
            Self::Version => Version::parse(text).map(Value::Version),
            Self::Image => ImageRef::parse(text).map(Value::Image),
            Self::HostPort => HostPort::parse(text).map(Value::HostPort),
            Self::Devices => DeviceSelection::parse(text).map(Value::Devices),
            Self::NodeConfig => NodeConfig::parse(text).map(Value::NodeConfig),
            Self::CaBundle => CaBundle::parse(text).map(Value::CaBundle),
        }
    }

    /// How the value of this kind may be shown in an error: in full, in part, or not at all.
    pub fn quote(self, text: &str) -> String {
        let hidden = match self {
            Self::CaBundle => true,
            Self::NodeConfig => NodeConfig::may_hold_secret(text),
            // No address and no image has a user and a password; where somebody wrote them, they
            // stand before an `@`.
            Self::HostPort => text.contains('@'),
            Self::Image => text.split_once('@').is_some_and(|(_, host_on)| host_on.contains('/')),
            _ => false,
        };
        if hidden {
            return format!("({} characters, not shown)", text.chars().count());
        }
        format!("'{}'", escape(text))
    }

    /// The accepted values, for people.
    pub fn values(self) -> String {
        match self {
            Self::YesNo => "YES, NO (also TRUE/FALSE, ON/OFF, 1/0)".into(),
            Self::Choice(words) => words.join(", "),
            Self::Count(0) => "whole number >= 0".into(),
            Self::Count(_) => "whole number > 0".into(),
            Self::Fraction => "number, 0 < f <= 1".into(),
            Self::Version => "X.Y.Z".into(),
            Self::Image => "image reference".into(),
            Self::HostPort => "host:port, [IPv6]:port".into(),
            Self::Devices => {
                "all; none; comma list of indices, GPU-UUIDs (a unique beginning is enough), MIG-UUIDs, PCI addresses"
                    .into()
            }
            Self::NodeConfig => "space-separated key=value, values TOML scalars".into(),
            Self::CaBundle => "base64 of a CA's PEM certificate, or of several".into(),
        }
    }
}

/// A context variable.
#[derive(Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// Other names it goes by.
    pub also: &'static [&'static str],
    /// What it accepts.
    pub kind: Kind,
    /// What it means when it is not set.
    pub unset: &'static str,
    /// Where its value goes.
    pub goes_to: &'static str,
    /// What it is for, in one line.
    pub about: &'static str,
}

impl Variable {
    /// Every name under which it is read: its own, the others, and each with `ONEAPP_` before it.
    pub fn names(&self) -> impl Iterator<Item = String> {
        std::iter::once(self.name)
            .chain(self.also.iter().copied())
            .flat_map(|name| [name.to_owned(), format!("ONEAPP_{name}")])
    }
}

/// Frameworks, as [`super::Framework`] reads them.
pub const FRAMEWORKS: &[&str] = &["pytorch", "tensorflow", "sklearn", "base"];

/// The variables that do nothing unless `FL_GPU_ENABLED` is YES.
pub const GPU_ONLY: &[&str] =
    &["FL_GPU_REQUIRED", "FL_CUDA_VISIBLE_DEVICES", "FL_GPU_MEMORY_FRACTION", "FL_DCGM_ENABLED"];

/// Every variable the agent knows, in the order of the manual.
pub const VARIABLES: &[Variable] = &[
    Variable {
        name: "FL_GPU_ENABLED",
        also: &[],
        kind: Kind::YesNo,
        unset: "NO",
        goes_to: "the master switch",
        about: "Use the passed-through GPU",
    },
    Variable {
        name: "FL_GPU_REQUIRED",
        also: &[],
        kind: Kind::YesNo,
        unset: "NO",
        goes_to: "YES: without a usable GPU the node does not start",
        about: "Fail instead of falling back to the CPU",
    },
    Variable {
        name: "FL_CUDA_VISIBLE_DEVICES",
        also: &[],
        kind: Kind::Devices,
        unset: "all",
        goes_to: "which GPUs the container gets",
        about: "GPUs for the node",
    },
    Variable {
        name: "FL_GPU_MEMORY_FRACTION",
        also: &[],
        kind: Kind::Fraction,
        unset: "frameworks grow on demand",
        goes_to: "the framework's memory limit",
        about: "Share of the GPU's memory that the framework may take",
    },
    Variable {
        name: "FL_DCGM_ENABLED",
        also: &[],
        kind: Kind::YesNo,
        unset: "NO",
        goes_to: "the DCGM exporter beside the node",
        about: "Export GPU metrics",
    },
    Variable {
        name: "FLOWER_VERSION",
        also: &[],
        kind: Kind::Version,
        unset: "the prebaked version",
        goes_to: "the image's tag",
        about: "Release of Flower",
    },
    Variable {
        name: "ML_FRAMEWORK",
        also: &["FL_FRAMEWORK", "FL_ML_FRAMEWORK"],
        kind: Kind::Choice(FRAMEWORKS),
        unset: "the prebaked framework, else pytorch",
        goes_to: "the image's name",
        about: "Machine-learning framework",
    },
    Variable {
        name: "FL_SUPERNODE_IMAGE",
        also: &[],
        kind: Kind::Image,
        unset: "from the two above",
        goes_to: "the image",
        about: "Image of the operator's own",
    },
    Variable {
        name: "FL_SUPERLINK_ADDRESS",
        also: &[],
        kind: Kind::HostPort,
        unset: "OneGate discovery",
        goes_to: "--superlink",
        about: "Address of the SuperLink",
    },
    Variable {
        name: "FL_NODE_CONFIG",
        also: &[],
        kind: Kind::NodeConfig,
        unset: "partition from OneGate when in a service, else none",
        goes_to: "--node-config",
        about: "Configuration of the node for its ClientApp",
    },
    Variable {
        name: "FL_MAX_RETRIES",
        also: &[],
        kind: Kind::Count(0),
        unset: "0 = unlimited",
        goes_to: "--max-retries, omitted when 0",
        about: "Attempts to connect to the SuperLink",
    },
    Variable {
        name: "FL_MAX_WAIT_TIME",
        also: &[],
        kind: Kind::Count(0),
        unset: "0 = unlimited",
        goes_to: "--max-wait-time, omitted when 0",
        about: "Seconds of attempts to connect to the SuperLink",
    },
    Variable {
        name: "FL_ISOLATION",
        also: &[],
        kind: Kind::Choice(&["subprocess", "process"]),
        unset: "subprocess",
        goes_to: "--isolation",
        about: "Where the ClientApp runs",
    },
    Variable {
        name: "FL_LOG_LEVEL",
        also: &[],
        kind: Kind::Choice(&["DEBUG", "INFO", "WARNING", "ERROR"]),
        unset: "INFO",
        goes_to: "FLWR_LOG_LEVEL, and the agent's own level",
        about: "Least severity that is logged",
    },
    Variable {
        name: "FL_LOG_FORMAT",
        also: &[],
        kind: Kind::Choice(&["text", "json"]),
        unset: "text",
        goes_to: "the agent's output when it is not on the journal",
        about: "Format of the agent's log",
    },
    Variable {
        name: "FL_TLS_ENABLED",
        also: &[],
        kind: Kind::YesNo,
        unset: "what the SuperLink publishes through OneGate; with FL_SUPERLINK_ADDRESS: NO (plaintext)",
        goes_to: "--root-certificates or --insecure",
        about: "Speak TLS with the SuperLink",
    },
    Variable {
        name: "FL_SSL_CA_CERTFILE",
        also: &[],
        kind: Kind::CaBundle,
        unset: "from OneGate",
        goes_to: "the CA file",
        about: "Certificate of the SuperLink's CA",
    },
    Variable {
        name: "FL_GRPC_KEEPALIVE_TIME",
        also: &[],
        kind: Kind::Count(1),
        unset: "60",
        goes_to: "container environment",
        about: "Seconds between gRPC keepalive pings",
    },
    Variable {
        name: "FL_GRPC_KEEPALIVE_TIMEOUT",
        also: &[],
        kind: Kind::Count(1),
        unset: "20",
        goes_to: "container environment",
        about: "Seconds to wait for a ping's answer; less than the time between pings",
    },
    Variable {
        name: "FL_EDGE_BACKOFF",
        also: &[],
        kind: Kind::Choice(&["exponential", "fixed"]),
        unset: "exponential",
        goes_to: "discovery retry: 10 s doubling to the cap without end, or 30 tries of 10 s",
        about: "How discovery is tried again",
    },
    Variable {
        name: "FL_EDGE_MAX_BACKOFF",
        also: &[],
        kind: Kind::Count(1),
        unset: "300",
        goes_to: "the cap",
        about: "Longest pause of the discovery in seconds",
    },
];

/// The variable that goes by `name`, in any of its forms.
pub fn find(name: &str) -> Option<&'static Variable> {
    VARIABLES.iter().find(|variable| variable.names().any(|known| known == name))
}

/// The known name nearest to `name`, where one is near enough to be meant: at most two slips apart,
/// or a word more or less, or words cut short (`MEM`, `ADDR`). The answer has the `ONEAPP_` of
/// `name`, so that it can be pasted.
pub fn nearest(name: &str) -> Option<String> {
    const MAX_SLIPS: usize = 2;
    // Twice as long as any known name: it is nobody's slip, and comparing takes its time.
    const LONGEST: usize = 80;
    if name.len() > LONGEST {
        return None;
    }
    VARIABLES
        .iter()
        .flat_map(Variable::names)
        .map(|known| (strsim::osa_distance(name, &known), known))
        .filter(|(distance, known)| *distance <= MAX_SLIPS || is_one_word_apart(name, known))
        .min_by_key(|(distance, known)| (*distance, known.len()))
        .map(|(_, known)| known)
}

/// `FL_CUDA_DEVICES` and `FL_CUDA_VISIBLE_DEVICES`: the one is the other without one of its words,
/// whatever prefix they have. A word cut short is still that word.
fn is_one_word_apart(a: &str, b: &str) -> bool {
    fn words(name: &str) -> Vec<&str> {
        name.trim_start_matches("ONEAPP_").trim_start_matches("FL_").split('_').collect()
    }
    fn same(a: &str, b: &str) -> bool {
        const SHORTEST: usize = 3;
        a == b || (a.len().min(b.len()) >= SHORTEST && (a.starts_with(b) || b.starts_with(a)))
    }
    let (short, long) = match (words(a), words(b)) {
        (a, b) if a.len() <= b.len() => (a, b),
        (a, b) => (b, a),
    };
    let mut of_long = long.iter();
    long.len() - short.len() <= 1 && short.iter().all(|word| of_long.any(|other| same(other, word)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_slips_or_with_a_word_too_few_or_too_many_is_known_again() {
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
    fn a_value_that_may_be_secret_is_not_shown() {
        for (kind, shown, hidden) in [
            (Kind::NodeConfig, "a=1", "token=1"),
            (Kind::HostPort, "h:1", "u:p@h:1"),
            (Kind::Image, "own/node:1@sha256:0", "u:p@own/node:1"),
        ] {
            assert_eq!(kind.quote(shown), format!("'{shown}'"));
            assert_eq!(kind.quote(hidden), format!("({} characters, not shown)", hidden.len()));
        }
        assert_eq!(Kind::CaBundle.quote("é"), "(1 characters, not shown)");
        assert_eq!(Kind::YesNo.quote("maybe\n"), "'maybe\\n'");
    }

    #[test]
    fn what_is_accepted_is_told_in_words() {
        let told = [
            (Kind::YesNo, "YES, NO (also TRUE/FALSE, ON/OFF, 1/0)"),
            (Kind::Choice(&["a", "b"]), "a, b"),
            (Kind::Count(0), "whole number >= 0"),
            (Kind::Count(1), "whole number > 0"),
            (Kind::HostPort, "host:port, [IPv6]:port"),
        ];
        for (kind, values) in told {
            assert_eq!(kind.values(), values);
        }
    }

    #[test]
    fn a_variable_is_found_by_each_of_its_names_and_by_no_other() {
        for variable in VARIABLES {
            for name in variable.names() {
                assert_eq!(find(&name).map(|found| found.name), Some(variable.name));
            }
        }
        assert!(find("FL_GPU").is_none());
    }
}
