//! Output of the child processes that run NVIDIA's code: any output yields a GPU that can be named
//! to Docker, or a readable reason.
#![no_main]

use std::cell::LazyCell;
use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use one_context::Context;
use serde::{Serialize, de::DeserializeOwned};
use supernode_agent::config::{Config, Prebaked};
use supernode_agent::gpu::decide::decide_gpu_or_cpu;
use supernode_agent::gpu::monitor_child::MonitorMessage;
use supernode_agent::gpu::pci::{PciDevice, PciFacts};
use supernode_agent::gpu::probe::ProbeOutcome;
use supernode_agent::gpu::probe_child::ProbeAnswer;
use supernode_agent::system::os_release::Distribution;
use supernode_agent::values::PciAddress;
use supernode_fuzz::assert_shown;

thread_local! {
    static CONFIGS: LazyCell<Vec<Config>> = LazyCell::new(|| {
        let configs = ["all", "1", "GPU-4", "0000:01:00.0,MIG-1"].iter().map(|devices| {
            let text = format!(
                "FL_GPU_ENABLED='YES'\nFL_CUDA_VISIBLE_DEVICES='{devices}'\n\
                 PCI0_ADDRESS='01:00.0'\n"
            );
            let context = Context::parse(text.as_bytes()).expect("a context");
            Config::from_context(&context, &Prebaked::default()).expect("a configuration").0
        });
        configs.collect()
    });
    static FACTS: LazyCell<PciFacts> = LazyCell::new(|| {
        let devices = ["0000:01:00.0", "0000:21:00.0"].iter().map(|address| PciDevice {
            address: PciAddress::parse(address).expect("an address"),
            vendor: 0x10de,
            device: Some(0x20b5),
            class: 0x03_02_00,
            driver: Some("nvidia".into()),
        });
        PciFacts { devices: devices.collect(), ..PciFacts::default() }
    });
}

/// Parses a line and checks that it round-trips.
fn parse<T: Serialize + DeserializeOwned + PartialEq + Debug>(line: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(line).ok()?;
    let written = serde_json::to_vec(&value).expect("JSON");
    assert_eq!(serde_json::from_slice::<T>(&written).ok().as_ref(), Some(&value));
    Some(value)
}

fuzz_target!(|line: &[u8]| {
    let _: Option<MonitorMessage> = parse(line);
    let Some(answer) = parse::<ProbeAnswer>(line) else { return };
    let outcome = ProbeOutcome::Answered(answer);
    CONFIGS.with(|configs| {
        for config in configs.iter() {
            let verdict = FACTS
                .with(|facts| decide_gpu_or_cpu(&config.gpu, config.framework, facts, &outcome));
            for device in verdict.devices() {
                assert!(
                    !device.uuid.as_str().is_empty() && !device.uuid.as_str().contains([',', '\0']),
                    "{device:?}"
                );
                assert_shown(&device.to_string());
            }
            if let Some(finding) = verdict.finding() {
                assert_shown(&finding.summary);
            }
            let _ = verdict.to_json(Distribution::default());
        }
    });
});
