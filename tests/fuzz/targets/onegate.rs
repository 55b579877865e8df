//! OneGate's JSON, and the SuperLink derived from a VM whose attributes any peer may have written:
//! an operator who requires TLS gets a CA or no connection.
#![no_main]

use std::cell::LazyCell;
use std::time::{Duration, SystemTime};

use libfuzzer_sys::fuzz_target;
use one_context::Context;
use one_context::onegate::reply;
use supernode_agent::config::{Config, Prebaked};
use supernode_agent::opennebula::superlink::resolve_published;
use supernode_agent::values::HostPort;
use supernode_fuzz::assert_shown;

thread_local! {
    static CONFIGS: LazyCell<Vec<Config>> = LazyCell::new(|| {
        let texts = ["", "FL_TLS_ENABLED='YES'\n", "FL_TLS_ENABLED='NO'\n"];
        let configs = texts.iter().map(|text| {
            let context = Context::parse(text.as_bytes()).expect("a context");
            Config::from_context(&context, &Prebaked::default()).expect("a configuration").0
        });
        configs.collect()
    });
}

fuzz_target!(|json: &[u8]| {
    if let Ok(service) = reply::service(json) {
        assert!(service.roles.iter().all(|role| !role.name.is_empty()));
    }
    let Ok(vm) = reply::vm(json) else { return };
    assert!(vm.attributes.values().all(|value| !value.is_empty()));
    // 2030, when the certificates of the corpus are valid.
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000);
    CONFIGS.with(|configs| {
        for config in configs.iter() {
            match resolve_published(config, &vm, now) {
                Ok((superlink, warnings)) => {
                    assert!(config.tls != Some(true) || superlink.ca.is_some());
                    assert_eq!(
                        HostPort::parse(&superlink.address.to_string()).as_ref(),
                        Ok(&superlink.address)
                    );
                    warnings.iter().for_each(|warning| assert_shown(warning));
                }
                Err(error) => assert_shown(&error.to_string()),
            }
        }
    });
});
