//! Discovery of the SuperLink, and the decision on TLS for its connection.
//!
//! The address is `FL_SUPERLINK_ADDRESS`, else what OneGate reports for the role `superlink` of the
//! service. Attributes that another VM published are untrusted input: they are validated like an
//! operator's variables and can never weaken a connection that the operator configured.
//! [`decide_trust`] is the one place that decides on TLS and the CA.

use std::net::IpAddr;
use std::time::SystemTime;

use one_context::onegate::{OneGate, OneGateError, Service, Vm};

use crate::config::Config;
use crate::flower::release::Release;
use crate::opennebula::onegate::{OneGateAvailability, OneGateUnavailable};
use crate::opennebula::partition::Partition;
use crate::values::ca_bundle::{CaBundle, ValidBundle};
use crate::values::{HostPort, ValidationError, Version, escape, parse_yes_no};

/// Name of the service role that holds the SuperLink, as in OneFlow's templates.
const ROLE: &str = "superlink";

/// The SuperLink that the node connects to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuperLink {
    /// Address of its Fleet API.
    pub address: HostPort,
    /// CAs that its certificate is verified against; `None` is a plaintext connection.
    pub ca: Option<CaBundle>,
    /// ID of its VM, if its address came from OneGate.
    pub vm_id: Option<u64>,
    /// Flower release that it published.
    pub version: Option<Version>,
    /// Partition of this node in the service.
    pub partition: Option<Partition>,
}

/// Why there is no SuperLink to connect to.
#[derive(Debug, thiserror::Error)]
pub enum SuperLinkError {
    /// No static address, and OneGate cannot be queried.
    #[error(
        "FL_SUPERLINK_ADDRESS is not set and OneGate is unavailable; set FL_SUPERLINK_ADDRESS to \
         host:port, or run the VM in a OneFlow service"
    )]
    OneGateUnavailable(#[source] OneGateUnavailable),
    /// A OneGate request failed.
    #[error("cannot read the SuperLink from OneGate")]
    OneGate(#[from] OneGateError),
    /// The VM does not belong to a service.
    #[error(
        "FL_SUPERLINK_ADDRESS is not set and this VM is not part of a OneFlow service; set \
         FL_SUPERLINK_ADDRESS to host:port, or run the VM in a service with a role {ROLE}"
    )]
    NoService,
    /// The service has roles, none of them named `superlink`.
    #[error(
        "FL_SUPERLINK_ADDRESS is not set and the service {service} has no role {ROLE} (it has \
         {roles}); name the SuperLink's role {ROLE}, or set FL_SUPERLINK_ADDRESS to host:port"
    )]
    NoRole {
        /// Name of the service.
        service: String,
        /// Names of its roles.
        roles: String,
    },
    /// The role has no VM yet.
    #[error("the role {ROLE} of the service has no VM yet")]
    NoVm,
    /// The VM is not running.
    #[error("the SuperLink's VM {0} is not running yet (onevm show {0})")]
    NotRunning(u64),
    /// The VM has neither `FL_ENDPOINT` nor an IP address.
    #[error(
        "the SuperLink's VM {0} has neither FL_ENDPOINT nor a NIC with an address (onevm show {0})"
    )]
    NoAddress(u64),
    /// An attribute that the VM published does not validate.
    #[error("the SuperLink's VM {vm_id} published an invalid {attribute}={value}: {reason}")]
    InvalidAttribute {
        /// ID of the VM.
        vm_id: u64,
        /// Name of the attribute.
        attribute: &'static str,
        /// Its value, escaped, or only its length if it is long.
        value: String,
        /// What is accepted.
        reason: ValidationError,
    },
    /// TLS is enabled, no CA is configured, and OneGate was not queried or is unavailable.
    #[error(
        "FL_TLS_ENABLED is YES and FL_SSL_CA_CERTFILE is not set; set it to the base64 of the CA's \
         PEM certificate (base64 -w0 ca.crt)"
    )]
    NoCa,
    /// TLS is enabled without a CA, and the SuperLink published none.
    #[error(
        "TLS is required ({required_by}), but FL_SSL_CA_CERTFILE is not set and the SuperLink's VM \
         {vm_id} published no FL_CA_CERT; set FL_SSL_CA_CERTFILE to the base64 of the CA's PEM \
         certificate (base64 -w0 ca.crt)"
    )]
    NoPublishedCa {
        /// The variable or attribute that enables TLS, with its value.
        required_by: &'static str,
        /// ID of the SuperLink's VM.
        vm_id: u64,
    },
    /// No certificate of `FL_SSL_CA_CERTFILE` is currently valid.
    #[error("FL_SSL_CA_CERTFILE: {0}")]
    InvalidCa(ValidationError),
    /// All attempts of `FL_EDGE_BACKOFF=fixed` failed.
    #[error("found no SuperLink in {attempts} attempts (FL_EDGE_BACKOFF is fixed)")]
    AttemptsExhausted {
        /// Number of attempts.
        attempts: u32,
        /// Error of the last one.
        #[source]
        last: Box<SuperLinkError>,
    },
}

impl SuperLinkError {
    /// Reports whether only a changed configuration of this VM can fix the error. Every other error
    /// is worth a retry.
    pub fn is_final(&self) -> bool {
        match self {
            Self::OneGateUnavailable(_)
            | Self::NoService
            | Self::NoRole { .. }
            | Self::NoCa
            | Self::InvalidCa(_) => true,
            Self::OneGate(error) => error.is_final(),
            _ => false,
        }
    }
}

/// Result of one discovery attempt.
#[derive(Debug)]
pub(crate) struct Discovery {
    /// The SuperLink, without the partition.
    pub superlink: SuperLink,
    /// The service, if OneGate was queried for it.
    pub service: Option<Service>,
    /// Configuration problems to log as WARNINGs.
    pub warnings: Vec<String>,
}

/// How the connection to the SuperLink is secured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trust {
    /// CAs that the SuperLink's certificate is verified against; `None` is a plaintext connection.
    pub ca: Option<CaBundle>,
    /// Configuration problems to log as WARNINGs.
    pub warnings: Vec<String>,
}

/// Decides on TLS and the CA for the connection to the SuperLink. Pure.
///
/// `published` is the SuperLink's VM as OneGate reports it, or `None` if OneGate was not queried.
/// The first match wins:
///
/// | decision | sources, in this order |
/// | --- | --- |
/// | TLS | `FL_TLS_ENABLED`; `FL_TLS` of the SuperLink; NO |
/// | CA | `FL_SSL_CA_CERTFILE`; `FL_CA_CERT` of the SuperLink |
///
/// # Errors
/// If TLS is enabled and no CA is valid at `now`: a connection is never silently downgraded to
/// plaintext. With `published` = `None`, [`SuperLinkError::NoCa`] means that only OneGate can still
/// supply the CA.
pub(crate) fn decide_trust(
    config: &Config,
    published: Option<&Vm>,
    now: SystemTime,
) -> Result<Trust, SuperLinkError> {
    let advertised = published.map(published_tls).transpose()?.flatten();
    let tls = config.tls.or(advertised).unwrap_or(false);
    match (tls, &config.ca_certificate, published) {
        (false, ..) => {
            Ok(Trust { ca: None, warnings: plaintext_warning(config, published, advertised) })
        }
        (true, Some(ca), _) => {
            let ValidBundle { bundle, warnings } =
                ca.valid_at(now).map_err(SuperLinkError::InvalidCa)?;
            let warnings =
                warnings.into_iter().map(|line| format!("FL_SSL_CA_CERTFILE: {line}")).collect();
            Ok(Trust { ca: Some(bundle), warnings })
        }
        (true, None, Some(vm)) => {
            let required_by = if config.tls == Some(true) {
                "FL_TLS_ENABLED is YES"
            } else {
                "the SuperLink's FL_TLS is YES"
            };
            published_ca(vm, required_by, now)
        }
        (true, None, None) => Err(SuperLinkError::NoCa),
    }
}

/// Returns the warning about a plaintext connection to a SuperLink in a service.
/// `FL_TLS_ENABLED=NO` together with a CA is an explicit choice and causes no warning about the CA.
fn plaintext_warning(
    config: &Config,
    published: Option<&Vm>,
    advertised: Option<bool>,
) -> Vec<String> {
    let warning = if advertised == Some(true) {
        "the SuperLink requires TLS, but FL_TLS_ENABLED is NO: the connection will fail"
    } else if published.is_some() && config.ca_certificate.is_some() && config.tls.is_none() {
        "FL_SSL_CA_CERTFILE is set, but the SuperLink does not advertise TLS: the connection is in \
         plaintext; set FL_TLS_ENABLED=YES to require TLS"
    } else {
        return Vec::new();
    };
    vec![warning.to_owned()]
}

fn published_tls(vm: &Vm) -> Result<Option<bool>, SuperLinkError> {
    let Some(text) = attribute(vm, "FL_TLS") else {
        return Ok(None);
    };
    parse_yes_no(text).map(Some).map_err(|reason| invalid(vm, "FL_TLS", quoted(text), reason))
}

fn published_ca(
    vm: &Vm,
    required_by: &'static str,
    now: SystemTime,
) -> Result<Trust, SuperLinkError> {
    let text = attribute(vm, "FL_CA_CERT")
        .ok_or(SuperLinkError::NoPublishedCa { required_by, vm_id: vm.id })?;
    let invalid_ca = |reason| {
        invalid(vm, "FL_CA_CERT", format!("({} characters)", text.chars().count()), reason)
    };
    let bundle = CaBundle::parse(text).map_err(invalid_ca)?;
    let valid = bundle.valid_at(now).map_err(invalid_ca)?;
    let ignored = bundle.ignored().map(str::to_owned);
    let warnings = ignored
        .into_iter()
        .chain(valid.warnings)
        .map(|line| format!("FL_CA_CERT of the SuperLink's VM {}: {line}", vm.id))
        .collect();
    Ok(Trust { ca: Some(valid.bundle), warnings })
}

/// Runs one discovery attempt: the static address, else the first running VM of the role
/// `superlink`. OneGate is queried only for values that the variables do not provide.
///
/// # Errors
/// Why there is no SuperLink; see [`SuperLinkError::is_final`] for whether to retry.
pub(crate) async fn find_superlink(
    onegate: OneGateAvailability<'_>,
    config: &Config,
    now: SystemTime,
) -> Result<Discovery, SuperLinkError> {
    let Some(address) = &config.superlink_address else {
        let onegate = onegate.map_err(|error| SuperLinkError::OneGateUnavailable(error.clone()))?;
        return discover(onegate, config, now).await;
    };
    let superlink = |ca| SuperLink {
        address: address.clone(),
        ca,
        vm_id: None,
        version: None,
        partition: None,
    };
    match (decide_trust(config, None, now), onegate) {
        (Err(SuperLinkError::NoCa), Ok(onegate)) => match discover(onegate, config, now).await {
            Ok(discovery) => {
                Ok(Discovery { superlink: superlink(discovery.superlink.ca), ..discovery })
            }
            Err(error) if error.is_final() => Err(SuperLinkError::NoCa),
            Err(error) => Err(error),
        },
        (trust, _) => {
            let Trust { ca, warnings } = trust?;
            Ok(Discovery { superlink: superlink(ca), service: None, warnings })
        }
    }
}

/// Checks for the configuration errors that [`find_superlink`] would return, without querying
/// OneGate.
///
/// # Errors
/// Only final errors; see [`SuperLinkError::is_final`].
pub(crate) fn check_config(
    onegate: OneGateAvailability<'_>,
    config: &Config,
    now: SystemTime,
) -> Result<(), SuperLinkError> {
    if let (None, Err(error)) = (&config.superlink_address, onegate) {
        return Err(SuperLinkError::OneGateUnavailable(error.clone()));
    }
    match decide_trust(config, None, now) {
        // OneGate may supply the CA.
        Err(SuperLinkError::NoCa) if onegate.is_ok() => Ok(()),
        trust => trust.map(drop),
    }
}

/// Finds the SuperLink in the service through OneGate.
async fn discover(
    onegate: &OneGate,
    config: &Config,
    now: SystemTime,
) -> Result<Discovery, SuperLinkError> {
    let service = onegate.service().await.map_err(|error| match error {
        OneGateError::NotInService => SuperLinkError::NoService,
        error => error.into(),
    })?;
    let vm = superlink_vm(onegate, &service).await?;
    let (superlink, warnings) = resolve_published(config, &vm, now)?;
    Ok(Discovery { superlink, service: Some(service), warnings })
}

/// Returns the first VM of the role `superlink` that is running.
async fn superlink_vm(onegate: &OneGate, service: &Service) -> Result<Vm, SuperLinkError> {
    let Some(role) = service.roles.iter().find(|role| role.name.eq_ignore_ascii_case(ROLE)) else {
        if service.roles.is_empty() {
            return Err(SuperLinkError::NoVm);
        }
        let roles: Vec<String> =
            service.roles.iter().take(8).map(|role| escape(&role.name)).collect();
        return Err(SuperLinkError::NoRole {
            service: escape(&service.name),
            roles: roles.join(", "),
        });
    };
    let mut error = SuperLinkError::NoVm;
    for node in &role.vms {
        let vm = onegate.vm_of_service(node.vm_id).await?;
        if vm.is_running != Some(false) {
            return Ok(vm);
        }
        error = SuperLinkError::NotRunning(vm.id);
    }
    Err(error)
}

/// Derives the SuperLink and the warnings from its VM as OneGate reports it. Pure.
///
/// # Errors
/// If the VM has no address, an attribute does not validate, or [`decide_trust`] fails.
pub fn resolve_published(
    config: &Config,
    vm: &Vm,
    now: SystemTime,
) -> Result<(SuperLink, Vec<String>), SuperLinkError> {
    let mut warnings = Vec::new();
    let version = attribute(vm, "FL_VERSION").and_then(|text| {
        Version::parse(text)
            .map_err(|reason| {
                warnings.push(format!(
                    "ignoring FL_VERSION={} of the SuperLink's VM {}: {reason}",
                    quoted(text),
                    vm.id
                ));
            })
            .ok()
    });
    let address = published_address(vm, version.as_ref().unwrap_or(&config.version))?;
    let trust = decide_trust(config, Some(vm), now)?;
    warnings.extend(trust.warnings);
    let superlink =
        SuperLink { address, ca: trust.ca, vm_id: Some(vm.id), version, partition: None };
    Ok((superlink, warnings))
}

/// Returns `FL_ENDPOINT` of the VM, else its first address with the Fleet API's port in `version`.
fn published_address(vm: &Vm, version: &Version) -> Result<HostPort, SuperLinkError> {
    if let Some(text) = attribute(vm, "FL_ENDPOINT") {
        return HostPort::parse(text)
            .map_err(|reason| invalid(vm, "FL_ENDPOINT", quoted(text), reason));
    }
    let address = vm.addresses.first().ok_or(SuperLinkError::NoAddress(vm.id))?;
    let port = Release::of(version).fleet_port();
    let text = match address {
        IpAddr::V4(address) => format!("{address}:{port}"),
        IpAddr::V6(address) => format!("[{address}]:{port}"),
    };
    HostPort::parse(&text).map_err(|reason| invalid(vm, "NIC", text.clone(), reason))
}

/// Returns an attribute of the VM, trimmed; `None` if it is absent or empty.
fn attribute<'a>(vm: &'a Vm, name: &str) -> Option<&'a str> {
    vm.attributes.get(name).map(|text| text.trim()).filter(|text| !text.is_empty())
}

fn quoted(text: &str) -> String {
    format!("'{}'", escape(text))
}

fn invalid(
    vm: &Vm,
    attribute: &'static str,
    value: String,
    reason: ValidationError,
) -> SuperLinkError {
    SuperLinkError::InvalidAttribute { vm_id: vm.id, attribute, value, reason }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::time::{Duration, UNIX_EPOCH};

    use one_context::{Context, Secret};
    use serde_json::json;

    use super::*;
    use crate::config::Prebaked;
    use crate::logging::error_chain;

    const CA: &str = include_str!("../../tests/certificates/hospital-ca.crt");
    const LEAF: &str = include_str!("../../tests/certificates/leaf.crt");

    fn config(pairs: &[(&str, &str)]) -> Config {
        let text: String =
            pairs.iter().map(|(name, value)| format!("{name}='{value}'\n")).collect();
        Config::from_context(&Context::parse(text.as_bytes()).unwrap(), &Prebaked::default())
            .unwrap()
            .0
    }

    fn vm(attributes: &[(&str, &str)]) -> Vm {
        Vm {
            id: 100,
            name: "superlink_0_(service_7)".into(),
            is_running: Some(true),
            attributes: attributes
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            addresses: vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()],
        }
    }

    fn no_token() -> OneGateUnavailable {
        OneGateUnavailable::MissingToken("/var/run/one_env".into())
    }

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn resolve(
        pairs: &[(&str, &str)],
        attributes: &[(&str, &str)],
    ) -> Result<(SuperLink, Vec<String>), SuperLinkError> {
        resolve_published(&config(pairs), &vm(attributes), now())
    }

    fn address(pairs: &[(&str, &str)], attributes: &[(&str, &str)]) -> String {
        resolve(pairs, attributes).unwrap().0.address.to_string()
    }

    #[test]
    fn endpoint_wins_over_first_nic_and_default_port() {
        assert_eq!(
            address(&[], &[("FL_ENDPOINT", " superlink.example:9999 ")]),
            "superlink.example:9999"
        );
        assert_eq!(address(&[], &[("FL_ENDPOINT", " ")]), "10.0.0.5:9092");
        assert_eq!(address(&[], &[("FL_VERSION", "1.41.0")]), "10.0.0.5:8000");
        assert_eq!(address(&[("FLOWER_VERSION", "1.40.0")], &[]), "10.0.0.5:8000");
        let mut only_ipv6 = vm(&[]);
        only_ipv6.addresses.remove(0);
        assert_eq!(
            resolve_published(&config(&[]), &only_ipv6, now()).unwrap().0.address.to_string(),
            "[fd00::5]:9092"
        );
        only_ipv6.addresses.clear();
        assert!(matches!(
            resolve_published(&config(&[]), &only_ipv6, now()),
            Err(SuperLinkError::NoAddress(100))
        ));
    }

    #[test]
    fn invalid_attributes_of_the_vm_are_not_final() {
        for (name, value) in [
            ("FL_ENDPOINT", "http://h:1"),
            ("FL_ENDPOINT", "h:1 --insecure"),
            ("FL_ENDPOINT", "h\n:1"),
            ("FL_ENDPOINT", "10.0.0.5"),
            ("FL_TLS", "perhaps"),
        ] {
            let error = resolve(&[], &[(name, value)]).unwrap_err();
            assert!(!error.is_final());
            let text = error.to_string();
            assert!(
                text.starts_with(&format!("the SuperLink's VM 100 published an invalid {name}='")),
                "{text}"
            );
            assert!(!text.contains('\n'), "{text}");
        }
        let (superlink, warnings) = resolve(&[], &[("FL_VERSION", "new")]).unwrap();
        assert_eq!((superlink.version, warnings.len()), (None, 1));
    }

    #[test]
    fn fl_tls_enabled_wins_and_tls_is_never_downgraded() {
        let tls = |pairs: &[(&str, &str)], attributes: &[(&str, &str)]| {
            resolve(pairs, attributes)
                .map(|(superlink, warnings)| (superlink.ca.is_some(), warnings.len()))
        };
        assert_eq!(tls(&[], &[]).unwrap(), (false, 0));
        assert_eq!(tls(&[], &[("FL_TLS", "YES"), ("FL_CA_CERT", CA)]).unwrap(), (true, 0));
        assert_eq!(
            tls(&[("FL_TLS_ENABLED", "YES")], &[("FL_TLS", "NO"), ("FL_CA_CERT", CA)]).unwrap(),
            (true, 0)
        );
        assert_eq!(
            tls(&[("FL_TLS_ENABLED", "NO")], &[("FL_TLS", "YES"), ("FL_CA_CERT", CA)]).unwrap(),
            (false, 1)
        );
        assert_eq!(
            tls(&[("FL_SSL_CA_CERTFILE", CA)], &[("FL_TLS", "NO")]).unwrap(),
            (false, 1),
            "warns"
        );
        for attributes in [&[("FL_TLS", "YES")][..], &[("FL_TLS", "YES"), ("FL_CA_CERT", LEAF)]] {
            assert!(!tls(&[], attributes).unwrap_err().is_final());
        }
        assert!(matches!(
            tls(&[("FL_TLS_ENABLED", "YES")], &[]),
            Err(SuperLinkError::NoPublishedCa { .. })
        ));
    }

    #[test]
    fn configured_ca_wins_over_published_ca() {
        let own = [("FL_SSL_CA_CERTFILE", CA)];
        let (superlink, _) =
            resolve(&own, &[("FL_TLS", "YES"), ("FL_CA_CERT", "no certificate at all")]).unwrap();
        assert!(superlink.ca.unwrap().pem().contains("BEGIN CERTIFICATE"));
    }

    #[test]
    fn check_config_finds_errors_without_onegate() {
        let far = now() + Duration::from_secs(200 * 366 * 24 * 3600);
        let no_token = no_token();
        let check = |pairs: &[(&str, &str)], now| check_config(Err(&no_token), &config(pairs), now);
        let final_error = |pairs: &[(&str, &str)], now| check(pairs, now).unwrap_err();
        assert!(error_chain(&final_error(&[], now())).contains("has no token"));
        assert!(matches!(
            final_error(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_TLS_ENABLED", "YES")], now()),
            SuperLinkError::NoCa
        ));
        let expired = [
            ("FL_SUPERLINK_ADDRESS", "h:1"),
            ("FL_TLS_ENABLED", "YES"),
            ("FL_SSL_CA_CERTFILE", CA),
        ];
        assert!(check(&expired, now()).is_ok());
        let error = final_error(&expired, far);
        assert!(error.is_final() && error.to_string().contains("expired"), "{error}");
        // Without TLS no CA is needed.
        assert!(check(&[expired[0]], now()).is_ok());
        assert!(check(&[expired[0], expired[2]], far).is_ok());
    }

    #[test]
    fn final_onegate_errors_are_final() {
        assert!(SuperLinkError::OneGate(OneGateError::InvalidVmId).is_final());
        assert!(SuperLinkError::OneGate(OneGateError::NotInService).is_final());
    }

    /// Starts a OneGate server that sends these responses, one per request.
    fn onegate_with(answers: Vec<String>) -> OneGate {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for body in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    request.extend(byte);
                }
                write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                    body.len()
                )
                .unwrap();
            }
        });
        OneGate::new(&endpoint, "101", Secret::new("token"), None, Duration::from_secs(20)).unwrap()
    }

    fn service(role: &str, vms: &[u64]) -> String {
        let nodes: Vec<_> =
            vms.iter().map(|vm| json!({"deploy_id": vm, "vm_info": {"VM": {"ID": vm}}})).collect();
        json!({"SERVICE": {"id": 7, "name": "flower", "roles": [{"name": role, "nodes": nodes}]}})
            .to_string()
    }

    /// A VM in the state ACTIVE/RUNNING or POWEROFF.
    fn peer(id: u64, is_running: bool, attributes: serde_json::Value) -> String {
        let (state, lcm_state) = if is_running { (3, 3) } else { (8, 0) };
        let vm = json!({
            "ID": id, "STATE": state, "LCM_STATE": lcm_state, "USER_TEMPLATE": attributes,
        });
        json!({ "VM": vm }).to_string()
    }

    #[tokio::test]
    async fn static_address_takes_only_the_ca_from_onegate() {
        let published = json!({"FL_ENDPOINT": "other:2", "FL_VERSION": "1.31.0", "FL_CA_CERT": CA});
        let onegate = onegate_with(vec![service("superlink", &[100]), peer(100, true, published)]);
        let config = config(&[("FL_SUPERLINK_ADDRESS", "own:1"), ("FL_TLS_ENABLED", "YES")]);
        let discovery = find_superlink(Ok(&onegate), &config, now()).await.unwrap();
        let ca = Some(CaBundle::parse(CA).unwrap());
        let address = HostPort::parse("own:1").unwrap();
        assert_eq!(
            discovery.superlink,
            SuperLink { address, ca, vm_id: None, version: None, partition: None }
        );
        assert_eq!(
            discovery.service.map(|service| service.id),
            Some(7),
            "the partition needs the service"
        );
    }

    #[tokio::test]
    async fn static_address_and_ca_need_no_onegate() {
        let own = [("FL_SUPERLINK_ADDRESS", "own:1"), ("FL_SSL_CA_CERTFILE", CA)];
        let find = async |tls| {
            find_superlink(Err(&no_token()), &config(&[own[0], own[1], tls]), now()).await
        };
        let discovery = find(("FL_TLS_ENABLED", "YES")).await.unwrap();
        assert_eq!(discovery.superlink.ca, Some(CaBundle::parse(CA).unwrap()));
        assert_eq!(find(("FL_TLS_ENABLED", "NO")).await.unwrap().superlink.ca, None);
        let without = config(&[own[0], ("FL_TLS_ENABLED", "YES")]);
        let error = find_superlink(Err(&no_token()), &without, now()).await.unwrap_err();
        assert!(matches!(error, SuperLinkError::NoCa), "{error}");
    }

    #[tokio::test]
    async fn missing_ca_is_final_only_without_a_superlink_role() {
        let config = config(&[("FL_SUPERLINK_ADDRESS", "own:1"), ("FL_TLS_ENABLED", "YES")]);
        let onegate = onegate_with(vec![service("trainer", &[100])]);
        let error = find_superlink(Ok(&onegate), &config, now()).await.unwrap_err();
        assert!(matches!(error, SuperLinkError::NoCa), "{error}");
        let onegate = onegate_with(vec![service("superlink", &[])]);
        let error = find_superlink(Ok(&onegate), &config, now()).await.unwrap_err();
        assert!(matches!(error, SuperLinkError::NoVm), "{error}");
    }

    #[tokio::test]
    async fn superlink_is_first_running_vm_of_its_role() {
        let find =
            async |answers| find_superlink(Ok(&onegate_with(answers)), &config(&[]), now()).await;
        let endpoint = || json!({"FL_ENDPOINT": "h:1"});
        let discovery = find(vec![
            service("SuperLink", &[100, 102]),
            peer(100, false, endpoint()),
            peer(102, true, endpoint()),
        ])
        .await
        .unwrap();
        assert_eq!(
            (discovery.superlink.vm_id, discovery.superlink.address.to_string()),
            (Some(102), "h:1".into())
        );
        let error = find(vec![service("superlink", &[100]), peer(100, false, endpoint())])
            .await
            .unwrap_err();
        assert!(matches!(error, SuperLinkError::NotRunning(100)) && !error.is_final(), "{error}");
        let error = find(vec![service("trainer", &[100])]).await.unwrap_err();
        assert!(
            error.is_final()
                && error.to_string().contains("has no role superlink (it has trainer)"),
            "{error}"
        );
        let error =
            find(vec![json!({"SERVICE": {"id": 7, "name": "flower", "roles": []}}).to_string()])
                .await;
        assert!(matches!(error, Err(SuperLinkError::NoVm)), "the roles may still be created");
    }

    #[test]
    fn warns_when_tls_settings_contradict() {
        let warnings = |pairs: &[(&str, &str)], attributes: &[(&str, &str)]| {
            resolve(pairs, attributes).unwrap().1
        };
        let no = [("FL_TLS_ENABLED", "NO")];
        assert_eq!(
            warnings(&no, &[("FL_TLS", "YES")]),
            ["the SuperLink requires TLS, but FL_TLS_ENABLED is NO: the connection will fail"]
        );
        // An explicit NO causes no warning.
        let no_with_ca = [("FL_TLS_ENABLED", "NO"), ("FL_SSL_CA_CERTFILE", CA)];
        assert_eq!(warnings(&no_with_ca, &[]), Vec::<String>::new());
        assert_eq!(warnings(&[("FL_SSL_CA_CERTFILE", CA)], &[]).len(), 1);
        let text =
            |pairs: &[(&str, &str)]| resolve(pairs, &[("FL_TLS", "YES")]).unwrap_err().to_string();
        assert!(text(&[]).contains("(the SuperLink's FL_TLS is YES)"));
        assert!(text(&[("FL_TLS_ENABLED", "YES")]).contains("(FL_TLS_ENABLED is YES)"));
    }
}
