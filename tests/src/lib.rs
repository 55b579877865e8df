//! The harness: a machine for `supernode-agent` to run on, made of files, stand-ins and a Docker
//! engine of its own.
//!
//! | part | stands for |
//! | --- | --- |
//! | [`Case`] | one machine: context, settings, state, and the agent that runs there |
//! | [`Sysfs`] | what the kernel shows: PCI devices, their drivers, the module |
//! | `nvml-standin` | `libnvidia-ml.so.1`, answering from the JSON given to [`Case::nvml`] |
//! | [`Engine`] | a Docker engine in a network namespace of its own |
//! | `nvidia-container-runtime` | nvidia's runtime, obeying [`Engine::nvidia_runtime`] |
//! | [`DockerProxy`] | the same engine on a bad day: it refuses a call, hangs in it, cuts its answer |
//! | [`Mounted`] | a disk that is full, or read-only |
//! | [`Cloud`] | the network that engines are connected to |
//! | [`crowd`] | many machines that boot in the same moment |
//! | [`OneGateStandIn`] | OneGate, with the VMs and services that a test gives it, and faults |
//! | [`Registry`] | a registry of images that is slow |
//! | [`SuperLink`] | nothing: it is Flower's own, and so is what the nodes train with it |
//! | [`Machine`] | a whole VM: systemd, Docker, the package, and what contextualizes it |
//! | [`image`] | the framework images, made of busybox and one script |
//!
//! All of it lies in temporary folders and ends with the value that made it.
//! `SUPERNODE_TESTS_KEEP=1` keeps the folders. A failure of the harness is a panic with the whole
//! story: a test has nothing better to do with it.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "this crate is only ever part of a test, and a panic is how a test fails"
)]

mod case;
pub mod crowd;
mod disk;
mod engine;
mod federation;
pub mod image;
mod machine;
mod network;
pub mod onegate;
mod process;
mod proxy;
mod registry;
mod sandbox;
mod sysfs;

pub use case::{Agent, Case};
pub use disk::Mounted;
pub use engine::{Engine, EngineBuilder, Record, RuntimeMode};
pub use federation::{Flower, Round, State, SuperLink};
pub use machine::{Boot, Machine};
pub use network::{Cloud, in_namespace};
pub use onegate::OneGateStandIn;
pub use process::{Output, eventually, run};
pub use proxy::{DockerProxy, Fault};
pub use registry::Registry;
pub use sandbox::{Sandbox, agent_binary, nvml_library, runtime_binary};
pub use sysfs::Sysfs;
