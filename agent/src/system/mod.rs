//! The machine that the agent runs on: files, locks, systemd and facts.

pub mod atomic_file;
pub mod facts;
pub mod info;
pub mod lock;
pub mod os_release;
pub mod programs;
pub mod systemd;
