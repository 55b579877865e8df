//! The VM that the agent runs on: files, locks, programs, the operating system, systemd.

pub(crate) mod atomic_file;
pub(crate) mod blocking;
pub mod info;
pub mod lock;
pub mod os_release;
pub(crate) mod programs;
pub mod root;
pub mod systemd;
pub mod time;
