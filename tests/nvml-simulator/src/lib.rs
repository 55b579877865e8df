//! Simulator of `libnvidia-ml.so.1` without a GPU: the part of NVML's C API that `supernode-agent`
//! uses, driven by a script.
//!
//! `NVML_SIMULATOR` names the script, a JSON file described in `script.rs`. It is read at each
//! `nvmlInit`, so that a test can change the GPUs by rewriting it. Every function passes
//! `dispatch.rs`, which logs the call and applies `crash`, `hang`, `delay_ms` and `fail`. If the
//! file is missing or invalid, every call returns 999 and prints one line on stderr.
//!
//! Return codes, struct layouts and function names are those of NVIDIA's nvml.h, API version 12.

mod code;
mod device;
mod dispatch;
mod event;
mod functions;
mod script;
