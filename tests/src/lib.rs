//! Test harness: VMs on which `supernode-agent` runs, each made of files, simulators and a Docker
//! engine per test.
//!
//! | part | purpose |
//! | --- | --- |
//! | [`TestVm`] | one VM: context, settings, state, and the agent that runs there |
//! | [`Sysfs`] | the kernel's view: PCI devices, their drivers, the nvidia module |
//! | `nvml-simulator` | `libnvidia-ml.so.1`, scripted by the JSON given to [`TestVm::nvml`] |
//! | [`Engine`] | a real Docker engine in its own network namespace |
//! | `nvidia-container-runtime` | NVIDIA's runtime, controlled by [`Engine::nvidia_runtime`] |
//! | [`DockerProxy`] | proxy in front of an engine that refuses, delays or truncates calls |
//! | [`FaultyMount`] | a full or read-only file system |
//! | [`TestNetwork`] | the network that connects engines |
//! | [`herd`] | many agents that start at the same time |
//! | [`OneGateSimulator`] | OneGate with the VMs and services of the test, and faults |
//! | [`Registry`] | a slow image registry |
//! | [`SuperLink`] | Flower's own SuperLink; nothing about it is simulated |
//! | [`BootedVm`] | a whole VM: systemd, Docker, the package and contextualization |
//! | [`image`] | the framework images, made of busybox and one script |
//!
//! Everything is in temporary directories and removed on drop; `SUPERNODE_TESTS_KEEP=1` keeps the
//! directories. The harness panics on its own failures, with the collected output in the message.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "this crate is only used by tests, which fail by panicking"
)]

mod booted_vm;
mod engine;
mod faulty_mount;
mod federation;
pub mod herd;
pub mod image;
mod network;
pub mod onegate;
mod process;
mod proxy;
mod registry;
mod sandbox;
mod sysfs;
mod test_vm;

pub use booted_vm::{Boot, BootedVm};
pub use engine::{Engine, EngineBuilder, Record, RuntimeMode};
pub use faulty_mount::FaultyMount;
pub use federation::{Flower, Round, State, SuperLink};
pub use network::{TestNetwork, in_namespace};
pub use onegate::OneGateSimulator;
pub use process::{Output, eventually, run};
pub use proxy::{DockerProxy, Fault};
pub use registry::Registry;
pub use sandbox::{Sandbox, agent_binary, nvml_library, runtime_binary};
pub use sysfs::Sysfs;
pub use test_vm::{Agent, TestVm};
