//! The script that a test writes: the driver, the GPUs and their faults, as JSON.
//!
//! The next call loads a file that was renamed over the current one, so that GPUs can fail while a
//! process runs. Every key is optional. A missing feature (`ecc_uncorrected`, `temperature`, …)
//! returns NOT_SUPPORTED, as on a real GPU. Unknown keys and function names are errors, so that a
//! typing error in a test is noticed.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::functions;

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Script {
    pub(crate) driver_version: String,
    pub(crate) nvml_version: String,
    /// In NVML's encoding: 12040 is 12.4.
    pub(crate) cuda_version: i32,
    pub(crate) gpus: Vec<Gpu>,
    /// Function → code that it returns.
    pub(crate) fail: BTreeMap<String, u32>,
    /// Function → duration of a call.
    pub(crate) delay_ms: BTreeMap<String, u64>,
    /// Functions that never return.
    pub(crate) hang: Vec<String>,
    /// Functions that terminate the process by SIGSEGV.
    pub(crate) crash: Vec<String>,
    /// Functions that raise SIGSEGV once and continue if it is handled.
    pub(crate) raise: Vec<String>,
    /// Functions that write two MiB to standard output.
    pub(crate) flood_stdout: Vec<String>,
    /// Functions that close standard output.
    pub(crate) close_stdout: Vec<String>,
    /// Functions that start a child process, which keeps the standard output and error of its
    /// parent open.
    pub(crate) leave_process: Vec<String>,
    /// Result of `nvmlDeviceGetCount` in place of the number of GPUs.
    pub(crate) count: Option<u32>,
    /// `nvmlInit` returns NOT_READY until this file exists.
    pub(crate) ready_file: Option<PathBuf>,
    pub(crate) events: Vec<Event>,
    /// File to which each call appends its name, one per line.
    pub(crate) log: Option<PathBuf>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            driver_version: "550.54.15".to_owned(),
            nvml_version: "12.550.54.15".to_owned(),
            cuda_version: 12040,
            gpus: Vec::new(),
            fail: BTreeMap::new(),
            delay_ms: BTreeMap::new(),
            hang: Vec::new(),
            crash: Vec::new(),
            raise: Vec::new(),
            flood_stdout: Vec::new(),
            close_stdout: Vec::new(),
            leave_process: Vec::new(),
            count: None,
            ready_file: None,
            events: Vec::new(),
            log: None,
        }
    }
}

/// One physical GPU.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Gpu {
    pub(crate) uuid: String,
    #[serde(default = "default_name")]
    pub(crate) name: String,
    #[serde(default = "default_memory_mib")]
    pub(crate) memory_mib: u64,
    #[serde(default)]
    pub(crate) memory_used_mib: u64,
    /// As in sysfs, `0000:01:00.0`.
    #[serde(default = "default_pci_address")]
    pub(crate) pci_address: String,
    /// Number of the device node; the default is the index.
    pub(crate) minor: Option<u32>,
    /// Uncorrectable ECC errors; absent: the GPU has no ECC.
    pub(crate) ecc_uncorrected: Option<u64>,
    /// Whether a row remap failed; absent: the GPU cannot remap rows.
    pub(crate) remap_failed: Option<bool>,
    /// Whether a row remap or page retirement is pending, which needs a reset.
    #[serde(default)]
    pub(crate) remap_pending: bool,
    /// In percent.
    pub(crate) utilization: Option<u32>,
    /// In degrees Celsius.
    pub(crate) temperature: Option<u32>,
    pub(crate) power_mw: Option<u32>,
    /// Whether the GPU supports MIG; a GPU with `mig` does.
    #[serde(default)]
    pub(crate) mig_capable: bool,
    /// MIG is enabled with these devices; an empty list: enabled but not partitioned.
    pub(crate) mig: Option<Vec<Mig>>,
    /// Function → code that it returns for this GPU only.
    #[serde(default)]
    pub(crate) fail: BTreeMap<String, u32>,
}

/// One MIG device of a GPU.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Mig {
    pub(crate) uuid: String,
    #[serde(default = "default_mig_memory_mib")]
    pub(crate) memory_mib: u64,
    #[serde(default = "default_mig_name")]
    pub(crate) name: String,
}

/// An event of a GPU, delivered once to each event set that is registered for it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Event {
    /// Counted from the creation of the event set.
    #[serde(default)]
    pub(crate) after_ms: u64,
    /// The event occurs when this file is written, at a time that the test chooses. As on a real
    /// GPU, sets created later do not get it.
    pub(crate) when_file: Option<PathBuf>,
    /// From then on the event occurs this many times per second, without end.
    #[serde(default)]
    pub(crate) per_second: u32,
    #[serde(rename = "type")]
    pub(crate) kind: EventKind,
    /// The XID, for `xid`.
    #[serde(default)]
    pub(crate) data: u64,
    /// Index in `gpus`.
    #[serde(default)]
    pub(crate) gpu: usize,
}

/// Event types, with NVML's bit for each.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum EventKind {
    SingleBitEcc = 0x1,
    DoubleBitEcc = 0x2,
    PState = 0x4,
    Xid = 0x8,
    Clock = 0x10,
    PowerSource = 0x80,
    MigConfig = 0x100,
}

impl EventKind {
    /// All events that a simulated GPU supports.
    pub(crate) const ALL: u64 = 0x19f;

    /// Returns the bit in NVML's mask.
    pub(crate) fn bit(self) -> u64 {
        self as u64
    }
}

impl Script {
    /// Reads and checks the file. The error is one line for stderr.
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let text =
            fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let script: Self =
            serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        script.check().map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(script)
    }

    fn check(&self) -> Result<(), String> {
        let lists = [&self.hang, &self.crash, &self.raise, &self.flood_stdout, &self.close_stdout]
            .into_iter()
            .flatten();
        let tables = self.fail.keys().chain(self.delay_ms.keys());
        let per_gpu = self.gpus.iter().flat_map(|gpu| gpu.fail.keys());
        if let Some(name) = lists.chain(tables).chain(per_gpu).find(|name| !functions::known(name))
        {
            return Err(format!("{name} is not a simulated function"));
        }
        if let Some(gpu) = self.gpus.iter().find(|gpu| gpu.pci().is_none()) {
            return Err(format!("{} is not a PCI address", gpu.pci_address));
        }
        if let Some(event) = self.events.iter().find(|event| event.gpu >= self.gpus.len()) {
            return Err(format!("an event refers to GPU {} of {}", event.gpu, self.gpus.len()));
        }
        Ok(())
    }
}

impl Gpu {
    /// Returns the domain, bus, device and function.
    pub(crate) fn pci(&self) -> Option<[u32; 4]> {
        pci(&self.pci_address)
    }
}

/// Parses `0000:01:00.0`, `00000000:01:00.0` or `01:00.0`.
pub(crate) fn pci(address: &str) -> Option<[u32; 4]> {
    let hex = |digits: &str| u32::from_str_radix(digits, 16).ok();
    let (rest, function) = address.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
    Some([hex(domain)?, hex(bus)?, hex(device)?, hex(function)?])
}

fn default_name() -> String {
    "NVIDIA A100-PCIE-40GB".to_owned()
}

fn default_memory_mib() -> u64 {
    40960
}

fn default_pci_address() -> String {
    "0000:01:00.0".to_owned()
}

fn default_mig_memory_mib() -> u64 {
    4864
}

fn default_mig_name() -> String {
    "NVIDIA A100-PCIE-40GB MIG 1g.5gb".to_owned()
}
