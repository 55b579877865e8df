//! A `libnvidia-ml.so.1` without a GPU: the part of NVML's C interface that `supernode-agent` uses,
//! answered from a file.
//!
//! `NVML_SIMULATOR` names that file, JSON as described in `script.rs`; it is read anew at each
//! `nvmlInit`, so a test changes the machine by rewriting it. Every function passes one gate
//! (`gate.rs`) that logs the call and obeys `crash`, `hang`, `delay_ms` and `fail`. A file that is
//! missing or not understood answers every call with 999 and one line on stderr.
//!
//! Return codes, struct layouts and function names are those of NVIDIA's nvml.h, API version 12.

mod code;
mod device;
mod event;
mod functions;
mod gate;
mod script;
