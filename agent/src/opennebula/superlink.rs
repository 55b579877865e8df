//! Which SuperLink the node connects to, and why it is trusted: the address that the operator gave,
//! else what OneGate says of the service. What another VM publishes is untrusted: it is read like
//! an operator's input, and never makes a connection less safe than the operator wants it.

use std::net::IpAddr;
use std::time::SystemTime;

use one_context::onegate::{OneGate, OneGateError, Service, Vm};

use crate::config::Config;
use crate::flower::release::Release;
use crate::opennebula::partition::Partition;
use crate::values::ca_bundle::{CaBundle, ValidBundle};
use crate::values::{HostPort, Version, parse_yes_no, shown};

/// The role of a service in which the SuperLink is, as OneFlow's templates name it.
pub const ROLE: &str = "superlink";

/// A SuperLink and the way to speak with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuperLink {
    /// Where it listens.
    pub address: HostPort,
    /// The CA that its certificate must come from; without one the connection is in the clear.
    pub ca: Option<CaBundle>,
    /// Its VM, where it was found through OneGate.
    pub vm_id: Option<u64>,
    /// The release of Flower that it publishes.
    pub version: Option<Version>,
    /// The share of the data that the service has for this node.
    pub partition: Option<Partition>,
}

/// Why there is no SuperLink to connect to.
#[derive(Debug, thiserror::Error)]
pub enum SuperLinkError {
    /// Nobody said where it is, and OneGate cannot be asked.
    #[error(
        "FL_SUPERLINK_ADDRESS is not set, and the SuperLink cannot be looked for through OneGate: {0}; set FL_SUPERLINK_ADDRESS to host:port, or run the VM in a OneFlow service"
    )]
    NoOneGate(String),
    /// OneGate has no answer.
    #[error("OneGate does not tell the SuperLink")]
    OneGate(#[from] OneGateError),
    /// The VM is in no service.
    #[error(
        "FL_SUPERLINK_ADDRESS is not set, and this VM is in no OneFlow service that could have a SuperLink: set FL_SUPERLINK_ADDRESS to host:port, or run the VM in a service with a role {ROLE}"
    )]
    NoService,
    /// The service is made of other roles.
    #[error(
        "FL_SUPERLINK_ADDRESS is not set, and the service {service} has no role {ROLE} (it has {roles}): name the SuperLink's role {ROLE}, or set FL_SUPERLINK_ADDRESS to host:port"
    )]
    NoRole {
        /// Its name.
        service: String,
        /// What it has instead.
        roles: String,
    },
    /// The role is empty.
    #[error("the role {ROLE} of the service has no VM yet")]
    NoVm,
    /// The VM does not run.
    #[error("the SuperLink's VM {0} is not running yet (onevm show {0})")]
    NotRunning(u64),
    /// Nothing tells its address.
    #[error(
        "the SuperLink's VM {0} has published no FL_ENDPOINT and has no NIC with an address (onevm show {0})"
    )]
    NoAddress(u64),
    /// What the SuperLink's VM has published is not what it should be.
    #[error("the SuperLink's VM {vm_id} has published {attribute}={value}: {refusal}")]
    Published {
        /// The VM.
        vm_id: u64,
        /// The attribute.
        attribute: &'static str,
        /// Its value, fit to be shown.
        value: String,
        /// What is accepted.
        refusal: String,
    },
    /// TLS is wanted and there is nothing to check the certificate against.
    #[error(
        "FL_TLS_ENABLED is YES and FL_SSL_CA_CERTFILE is not set: set it to the base64 of the CA's PEM certificate (base64 -w0 ca.crt)"
    )]
    NoCertificate,
    /// The same, where the SuperLink could have published it.
    #[error(
        "TLS is wanted ({wish}), FL_SSL_CA_CERTFILE is not set, and the SuperLink's VM {vm_id} has published no FL_CA_CERT: the node does not connect without a CA; set FL_SSL_CA_CERTFILE to the base64 of the CA's PEM certificate (base64 -w0 ca.crt)"
    )]
    NoPublishedCertificate {
        /// Who wants it.
        wish: &'static str,
        /// The VM.
        vm_id: u64,
    },
    /// The CA is of no use now.
    #[error("FL_SSL_CA_CERTFILE: {0}")]
    CaBundle(String),
    /// The tries of FL_EDGE_BACKOFF=fixed are over.
    #[error("the SuperLink was not found in {tries} tries (FL_EDGE_BACKOFF is fixed)")]
    GaveUp {
        /// How many.
        tries: u32,
        /// Why the last one failed.
        #[source]
        last: Box<SuperLinkError>,
    },
}

impl SuperLinkError {
    /// Whether only a change of this VM's own configuration can cure it; anything else is asked for
    /// again.
    pub fn is_final(&self) -> bool {
        match self {
            Self::NoOneGate(_)
            | Self::NoService
            | Self::NoRole { .. }
            | Self::NoCertificate
            | Self::CaBundle(_) => true,
            Self::OneGate(error) => error.is_final(),
            _ => false,
        }
    }
}

/// What one look brings.
#[derive(Debug)]
pub struct Discovery {
    /// The SuperLink; its partition is not looked for here.
    pub superlink: SuperLink,
    /// The service, where OneGate was asked for it.
    pub service: Option<Service>,
    /// What the operator should know: each is a WARNING.
    pub warnings: Vec<String>,
}

/// The way to OneGate, or why there is none.
pub type OneGateAvailability<'a> = Result<&'a OneGate, &'a str>;

/// Looks once: the operator's address, else the role `superlink` of the service and what its VM has
/// published. OneGate is asked only for what the operator does not say.
///
/// # Errors
/// Why there is none; [`SuperLinkError::is_final`] tells whether to look again. Where TLS is wanted
/// there is none without a CA that is valid at `now`: the connection is never downgraded in
/// silence.
pub async fn find_superlink(
    gate: OneGateAvailability<'_>,
    config: &Config,
    now: SystemTime,
) -> Result<Discovery, SuperLinkError> {
    let Some(address) = &config.superlink_address else {
        let gate = gate.map_err(|why| SuperLinkError::NoOneGate(why.into()))?;
        return ask(gate, config, now).await;
    };
    let found = |superlink, warnings| Ok(Discovery { superlink, service: None, warnings });
    let superlink = SuperLink {
        address: address.clone(),
        ca: None,
        vm_id: None,
        version: None,
        partition: None,
    };
    match (config.tls.unwrap_or(false), &config.ca_certificate) {
        (false, _) => found(superlink, Vec::new()),
        (true, Some(own)) => {
            let (ca, warnings) = own_ca(own, now)?;
            found(SuperLink { ca: Some(ca), ..superlink }, warnings)
        }
        (true, None) => {
            let gate = gate.map_err(|_| SuperLinkError::NoCertificate)?;
            match ask(gate, config, now).await {
                Ok(found) => Ok(Discovery {
                    superlink: SuperLink { ca: found.superlink.ca, ..superlink },
                    ..found
                }),
                Err(error) if error.is_final() => Err(SuperLinkError::NoCertificate),
                Err(error) => Err(error),
            }
        }
    }
}

/// What of this can be judged without asking anybody.
///
/// # Errors
/// A final one.
pub fn check(
    gate: OneGateAvailability<'_>,
    config: &Config,
    now: SystemTime,
) -> Result<(), SuperLinkError> {
    match (&config.superlink_address, &config.ca_certificate, gate) {
        (None, _, Err(why)) => return Err(SuperLinkError::NoOneGate(why.into())),
        (Some(_), None, Err(_)) if config.tls == Some(true) => {
            return Err(SuperLinkError::NoCertificate);
        }
        (_, Some(own), _) if config.tls == Some(true) => drop(own_ca(own, now)?),
        _ => {}
    }
    Ok(())
}

fn own_ca(ca: &CaBundle, now: SystemTime) -> Result<(CaBundle, Vec<String>), SuperLinkError> {
    let ValidBundle { certificate, warnings } =
        ca.valid_at(now).map_err(SuperLinkError::CaBundle)?;
    Ok((
        certificate,
        warnings.into_iter().map(|line| format!("FL_SSL_CA_CERTFILE: {line}")).collect(),
    ))
}

async fn ask(
    gate: &OneGate,
    config: &Config,
    now: SystemTime,
) -> Result<Discovery, SuperLinkError> {
    let service = gate.service().await.map_err(|error| match error {
        OneGateError::NotInService => SuperLinkError::NoService,
        error => error.into(),
    })?;
    let vm = superlink_vm(gate, &service).await?;
    let (superlink, warnings) = resolve_published(config, &vm, now)?;
    Ok(Discovery { superlink, service: Some(service), warnings })
}

/// The first VM of the role that runs.
async fn superlink_vm(gate: &OneGate, service: &Service) -> Result<Vm, SuperLinkError> {
    let Some(role) = service.roles.iter().find(|role| role.name.eq_ignore_ascii_case(ROLE)) else {
        if service.roles.is_empty() {
            return Err(SuperLinkError::NoVm);
        }
        let roles: Vec<String> =
            service.roles.iter().take(8).map(|role| shown(&role.name)).collect();
        return Err(SuperLinkError::NoRole {
            service: shown(&service.name),
            roles: roles.join(", "),
        });
    };
    let mut failed = SuperLinkError::NoVm;
    for node in &role.nodes {
        let vm = gate.vm_of_service(node.vm_id).await?;
        if vm.is_running != Some(false) {
            return Ok(vm);
        }
        failed = SuperLinkError::NotRunning(vm.id);
    }
    Err(failed)
}

/// What is made of the SuperLink's VM, and what the operator should know of it: each is a WARNING.
/// Pure.
///
/// # Errors
/// Why the node does not connect to what the VM has published; as in [`find_superlink`].
pub fn resolve_published(
    config: &Config,
    vm: &Vm,
    now: SystemTime,
) -> Result<(SuperLink, Vec<String>), SuperLinkError> {
    let published = |name: &'static str| {
        vm.attributes.get(name).map(|text| text.trim()).filter(|text| !text.is_empty())
    };
    let refused = |attribute, value: String, refusal| SuperLinkError::Published {
        vm_id: vm.id,
        attribute,
        value,
        refusal,
    };
    let mut warnings = Vec::new();
    let version = match published("FL_VERSION").map(|text| (text, Version::parse(text))) {
        Some((_, Ok(version))) => Some(version),
        Some((text, Err(refusal))) => {
            warnings.push(format!(
                "the SuperLink's VM {} has published FL_VERSION='{}', which is not looked at: {refusal}",
                vm.id,
                shown(text)
            ));
            None
        }
        None => None,
    };
    let address = match published("FL_ENDPOINT") {
        Some(text) => HostPort::parse(text)
            .map_err(|refusal| refused("FL_ENDPOINT", format!("'{}'", shown(text)), refusal))?,
        None => {
            let address = vm.addresses.first().ok_or(SuperLinkError::NoAddress(vm.id))?;
            let port = Release::of(version.as_ref().unwrap_or(&config.version)).fleet_port();
            let text = match address {
                IpAddr::V4(address) => format!("{address}:{port}"),
                IpAddr::V6(address) => format!("[{address}]:{port}"),
            };
            HostPort::parse(&text).map_err(|refusal| refused("NIC", text.clone(), refusal))?
        }
    };
    let advertised = match published("FL_TLS") {
        Some(text) => Some(
            parse_yes_no(text)
                .map_err(|refusal| refused("FL_TLS", format!("'{}'", shown(text)), refusal))?,
        ),
        None => None,
    };
    let wants_tls = config.tls.or(advertised).unwrap_or(false);
    let ca = match (wants_tls, &config.ca_certificate) {
        (false, own) => {
            if advertised == Some(true) {
                warnings.push("the SuperLink speaks TLS, and FL_TLS_ENABLED is NO: the node will not reach it".into());
            } else if own.is_some() && config.tls.is_none() {
                warnings.push(
                    "FL_SSL_CA_CERTFILE is set, and the SuperLink does not offer TLS: the connection is in the clear; set FL_TLS_ENABLED=YES to insist on TLS"
                        .into(),
                );
            }
            None
        }
        (true, Some(own)) => {
            let (ca, more) = own_ca(own, now)?;
            warnings.extend(more);
            Some(ca)
        }
        (true, None) => {
            let wish = if config.tls == Some(true) {
                "FL_TLS_ENABLED is YES"
            } else {
                "the SuperLink's FL_TLS is YES"
            };
            let text = published("FL_CA_CERT")
                .ok_or(SuperLinkError::NoPublishedCertificate { wish, vm_id: vm.id })?;
            let of_peer = |refusal| {
                refused("FL_CA_CERT", format!("({} characters)", text.chars().count()), refusal)
            };
            let ca = CaBundle::parse(text).map_err(of_peer)?;
            let valid = ca.valid_at(now).map_err(of_peer)?;
            let remarks = ca.ignored().map(str::to_owned).into_iter().chain(valid.warnings);
            warnings.extend(
                remarks.map(|line| format!("FL_CA_CERT of the SuperLink's VM {}: {line}", vm.id)),
            );
            Some(valid.certificate)
        }
    };
    Ok((SuperLink { address, ca, vm_id: Some(vm.id), version, partition: None }, warnings))
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

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn trusted(
        pairs: &[(&str, &str)],
        attributes: &[(&str, &str)],
    ) -> Result<(SuperLink, Vec<String>), SuperLinkError> {
        resolve_published(&config(pairs), &vm(attributes), now())
    }

    fn address(pairs: &[(&str, &str)], attributes: &[(&str, &str)]) -> String {
        trusted(pairs, attributes).unwrap().0.address.to_string()
    }

    #[test]
    fn the_published_endpoint_comes_before_the_first_nic_and_flowers_port() {
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
    fn what_a_peer_publishes_is_checked_and_may_heal() {
        for (name, value) in [
            ("FL_ENDPOINT", "http://h:1"),
            ("FL_ENDPOINT", "h:1 --insecure"),
            ("FL_ENDPOINT", "h\n:1"),
            ("FL_ENDPOINT", "10.0.0.5"),
            ("FL_TLS", "perhaps"),
        ] {
            let error = trusted(&[], &[(name, value)]).unwrap_err();
            assert!(!error.is_final());
            let text = error.to_string();
            assert!(
                text.starts_with(&format!("the SuperLink's VM 100 has published {name}='")),
                "{text}"
            );
            assert!(!text.contains('\n'), "{text}");
        }
        let (superlink, warnings) = trusted(&[], &[("FL_VERSION", "new")]).unwrap();
        assert_eq!((superlink.version, warnings.len()), (None, 1));
    }

    #[test]
    fn the_operators_word_on_tls_wins_and_nothing_is_downgraded() {
        let tls = |pairs: &[(&str, &str)], attributes: &[(&str, &str)]| {
            trusted(pairs, attributes)
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
            "not in silence"
        );
        for attributes in [&[("FL_TLS", "YES")][..], &[("FL_TLS", "YES"), ("FL_CA_CERT", LEAF)]] {
            assert!(!tls(&[], attributes).unwrap_err().is_final());
        }
        assert!(matches!(
            tls(&[("FL_TLS_ENABLED", "YES")], &[]),
            Err(SuperLinkError::NoPublishedCertificate { .. })
        ));
    }

    #[test]
    fn the_operators_ca_comes_before_the_published_one() {
        let own = [("FL_SSL_CA_CERTFILE", CA)];
        let (superlink, _) =
            trusted(&own, &[("FL_TLS", "YES"), ("FL_CA_CERT", "no certificate at all")]).unwrap();
        assert!(superlink.ca.unwrap().pem().contains("BEGIN CERTIFICATE"));
    }

    #[test]
    fn what_needs_nobody_to_be_asked_is_told_at_once() {
        let far = now() + Duration::from_secs(200 * 366 * 24 * 3600);
        let final_error =
            |pairs: &[(&str, &str)], now| check(Err("no token"), &config(pairs), now).unwrap_err();
        assert!(final_error(&[], now()).to_string().contains("no token"));
        assert!(matches!(
            final_error(&[("FL_SUPERLINK_ADDRESS", "h:1"), ("FL_TLS_ENABLED", "YES")], now()),
            SuperLinkError::NoCertificate
        ));
        let expired = [
            ("FL_SUPERLINK_ADDRESS", "h:1"),
            ("FL_TLS_ENABLED", "YES"),
            ("FL_SSL_CA_CERTFILE", CA),
        ];
        assert!(check(Err("no token"), &config(&expired), now()).is_ok());
        let error = final_error(&expired, far);
        assert!(error.is_final() && error.to_string().contains("expired"), "{error}");
        // Without TLS nobody needs a CA.
        assert!(check(Err("no token"), &config(&[expired[0]]), now()).is_ok());
        assert!(check(Err("no token"), &config(&[expired[0], expired[2]]), far).is_ok());
    }

    #[test]
    fn what_onegate_refuses_for_good_is_final() {
        assert!(SuperLinkError::OneGate(OneGateError::BadVmId).is_final());
        assert!(SuperLinkError::OneGate(OneGateError::NotInService).is_final());
    }

    /// A OneGate that gives these answers, one to each request.
    fn onegate(answers: Vec<String>) -> OneGate {
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

    /// A VM in the state ACTIVE, RUNNING, or in POWEROFF.
    fn peer(id: u64, runs: bool, attributes: serde_json::Value) -> String {
        let (state, lcm_state) = if runs { (3, 3) } else { (8, 0) };
        json!({"VM": {"ID": id, "STATE": state, "LCM_STATE": lcm_state, "USER_TEMPLATE": attributes}}).to_string()
    }

    #[tokio::test]
    async fn the_operators_address_stays_where_onegate_is_asked_for_the_ca_alone() {
        let published = json!({"FL_ENDPOINT": "other:2", "FL_VERSION": "1.31.0", "FL_CA_CERT": CA});
        let gate = onegate(vec![service("superlink", &[100]), peer(100, true, published)]);
        let config = config(&[("FL_SUPERLINK_ADDRESS", "own:1"), ("FL_TLS_ENABLED", "YES")]);
        let found = find_superlink(Ok(&gate), &config, now()).await.unwrap();
        let ca = Some(CaBundle::parse(CA).unwrap());
        let address = HostPort::parse("own:1").unwrap();
        assert_eq!(
            found.superlink,
            SuperLink { address, ca, vm_id: None, version: None, partition: None }
        );
        assert_eq!(
            found.service.map(|service| service.id),
            Some(7),
            "its partition may be looked for"
        );
    }

    #[tokio::test]
    async fn the_operators_address_and_ca_need_no_onegate() {
        let own = [("FL_SUPERLINK_ADDRESS", "own:1"), ("FL_SSL_CA_CERTFILE", CA)];
        let find = async |tls| {
            find_superlink(Err("no token"), &config(&[own[0], own[1], tls]), now()).await
        };
        let found = find(("FL_TLS_ENABLED", "YES")).await.unwrap();
        assert_eq!(found.superlink.ca, Some(CaBundle::parse(CA).unwrap()));
        assert_eq!(find(("FL_TLS_ENABLED", "NO")).await.unwrap().superlink.ca, None);
        let without = config(&[own[0], ("FL_TLS_ENABLED", "YES")]);
        let error = find_superlink(Err("no token"), &without, now()).await.unwrap_err();
        assert!(matches!(error, SuperLinkError::NoCertificate), "{error}");
    }

    #[tokio::test]
    async fn where_no_service_could_tell_the_ca_the_operator_has_to_and_else_it_is_asked_for_again()
    {
        let config = config(&[("FL_SUPERLINK_ADDRESS", "own:1"), ("FL_TLS_ENABLED", "YES")]);
        let gate = onegate(vec![service("trainer", &[100])]);
        let error = find_superlink(Ok(&gate), &config, now()).await.unwrap_err();
        assert!(matches!(error, SuperLinkError::NoCertificate), "{error}");
        let gate = onegate(vec![service("superlink", &[])]);
        let error = find_superlink(Ok(&gate), &config, now()).await.unwrap_err();
        assert!(matches!(error, SuperLinkError::NoVm), "{error}");
    }

    #[tokio::test]
    async fn the_superlink_is_the_first_vm_of_its_role_that_runs() {
        let find = async |answers| find_superlink(Ok(&onegate(answers)), &config(&[]), now()).await;
        let endpoint = || json!({"FL_ENDPOINT": "h:1"});
        let found = find(vec![
            service("SuperLink", &[100, 102]),
            peer(100, false, endpoint()),
            peer(102, true, endpoint()),
        ])
        .await
        .unwrap();
        assert_eq!(
            (found.superlink.vm_id, found.superlink.address.to_string()),
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
        assert!(matches!(error, Err(SuperLinkError::NoVm)), "its roles are still to come");
    }

    #[test]
    fn what_the_two_sides_say_of_tls_is_warned_of_where_it_does_not_fit() {
        let warnings = |pairs: &[(&str, &str)], attributes: &[(&str, &str)]| {
            trusted(pairs, attributes).unwrap().1
        };
        let no = [("FL_TLS_ENABLED", "NO")];
        assert_eq!(
            warnings(&no, &[("FL_TLS", "YES")]),
            ["the SuperLink speaks TLS, and FL_TLS_ENABLED is NO: the node will not reach it"]
        );
        // Whoever says NO means it.
        let no_with_ca = [("FL_TLS_ENABLED", "NO"), ("FL_SSL_CA_CERTFILE", CA)];
        assert_eq!(warnings(&no_with_ca, &[]), Vec::<String>::new());
        assert_eq!(warnings(&[("FL_SSL_CA_CERTFILE", CA)], &[]).len(), 1);
        let text =
            |pairs: &[(&str, &str)]| trusted(pairs, &[("FL_TLS", "YES")]).unwrap_err().to_string();
        assert!(text(&[]).contains("(the SuperLink's FL_TLS is YES)"));
        assert!(text(&[("FL_TLS_ENABLED", "YES")]).contains("(FL_TLS_ENABLED is YES)"));
    }
}
