//! The harness: a machine for `supernode-agent` to run on, made of files, simulators and a Docker
//! engine of its own.
//!
//! | part | stands for |
//! | --- | --- |
//! | [`TestVm`] | one machine: context, settings, state, and the agent that runs there |
//! | [`Sysfs`] | what the kernel shows: PCI devices, their drivers, the module |
//! | `nvml-simulator` | `libnvidia-ml.so.1`, answering from the JSON given to [`TestVm::nvml`] |
//! | [`Engine`] | a Docker engine in a network namespace of its own |
//! | `nvidia-container-runtime` | nvidia's runtime, obeying [`Engine::nvidia_runtime`] |
//! | [`DockerProxy`] | the same engine on a bad day: it refuses a call, hangs in it, cuts its answer |
//! | [`FaultyMount`] | a disk that is full, or read-only |
//! | [`TestNetwork`] | the network that engines are connected to |
//! | [`herd`] | many machines that boot in the same moment |
//! | [`OneGateSimulator`] | OneGate, with the VMs and services that a test gives it, and faults |
//! | [`Registry`] | a registry of images that is slow |
//! | [`SuperLink`] | nothing: it is Flower's own, and so is what the nodes train with it |
//! | [`BootedVm`] | a whole VM: systemd, Docker, the package, and what contextualizes it |
//! | [`image`] | the framework images, made of busybox and one script |
//!
//! All of it lies in temporary directories and ends with the value that made it.
//! `SUPERNODE_TESTS_KEEP=1` keeps the directories. A failure of the harness is a panic with the whole
//! story: a test has nothing better to do with it.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "this crate is only ever part of a test, and a panic is how a test fails"
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
