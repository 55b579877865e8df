//! The JSON that a test writes: the driver and the GPUs of the machine, and what goes wrong with
//! them.
//!
//! A file that is renamed into the place of one that was read is taken up by the next call: cards
//! fall ill while a process runs. Every key may be left out. What a card has not
//! (`ecc_uncorrected`, `temperature`, …) is answered NOT_SUPPORTED, as a real card does. A key, or
//! the name of a function, that is not known is an error: a typing error in a test is loud.

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
    /// As NVML encodes it: 12040 is 12.4.
    pub(crate) cuda_version: i32,
    pub(crate) gpus: Vec<Gpu>,
    /// Function → the code that it answers.
    pub(crate) fail: BTreeMap<String, u32>,
    /// Function → how long it takes.
    pub(crate) delay_ms: BTreeMap<String, u64>,
    /// Functions that never return.
    pub(crate) hang: Vec<String>,
    /// Functions that die by SIGSEGV.
    pub(crate) crash: Vec<String>,
    /// Functions that send themselves one SIGSEGV, and go on where that is let pass.
    pub(crate) raise: Vec<String>,
    /// Functions that write two MiB to the standard output.
    pub(crate) babble: Vec<String>,
    /// Functions that close the standard output.
    pub(crate) close_stdout: Vec<String>,
    /// Functions that start a process, which lives on with the standard output and error of its
    /// parent.
    pub(crate) leave_process: Vec<String>,
    /// What `nvmlDeviceGetCount` answers instead of how many there are.
    pub(crate) count: Option<u32>,
    /// `nvmlInit` answers NOT_READY until this file exists.
    pub(crate) ready_file: Option<PathBuf>,
    pub(crate) events: Vec<Event>,
    /// Each call appends its name here, a line each.
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
            babble: Vec::new(),
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
    /// As sysfs writes it, `0000:01:00.0`.
    #[serde(default = "default_pci_address")]
    pub(crate) pci_address: String,
    /// Number of the device node; the index where it is left out.
    pub(crate) minor: Option<u32>,
    /// Uncorrectable ECC errors; left out: the card has no ECC.
    pub(crate) ecc_uncorrected: Option<u64>,
    /// Whether a row remap failed; left out: the card cannot remap rows.
    pub(crate) remap_failed: Option<bool>,
    /// Whether a row remap, or the retirement of a page, waits for a reset.
    #[serde(default)]
    pub(crate) remap_pending: bool,
    /// Per cent.
    pub(crate) utilization: Option<u32>,
    /// Degrees Celsius.
    pub(crate) temperature: Option<u32>,
    pub(crate) power_mw: Option<u32>,
    /// Whether the card knows MIG at all; a card with `mig` does.
    #[serde(default)]
    pub(crate) mig_capable: bool,
    /// MIG is on, with these devices; an empty list is MIG on and not divided yet.
    pub(crate) mig: Option<Vec<Mig>>,
    /// Function → the code that it answers for this GPU alone.
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

/// Something that happens to a GPU, told once to each event set that watches it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Event {
    /// Counted from the creation of the event set.
    #[serde(default)]
    pub(crate) after_ms: u64,
    /// It happens when this file is written: for a test that wants to choose the moment. As with a
    /// real card, a set that is made later does not hear of it.
    pub(crate) when_file: Option<PathBuf>,
    /// It happens so many times a second from then on, without end.
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

/// Kinds of events, with NVML's bit for each.
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
    /// Everything that a card of ours can report.
    pub(crate) const ALL: u64 = 0x19f;

    /// The bit in NVML's mask.
    pub(crate) fn bit(self) -> u64 {
        self as u64
    }
}

impl Script {
    /// Reads and checks the file; the error is one line for stderr.
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let text =
            fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let script: Self =
            serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        script.check().map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(script)
    }

    fn check(&self) -> Result<(), String> {
        let lists = [&self.hang, &self.crash, &self.raise, &self.babble, &self.close_stdout]
            .into_iter()
            .flatten();
        let tables = self.fail.keys().chain(self.delay_ms.keys());
        let per_gpu = self.gpus.iter().flat_map(|gpu| gpu.fail.keys());
        if let Some(name) = lists.chain(tables).chain(per_gpu).find(|name| !functions::known(name))
        {
            return Err(format!("{name} is not a function of this simulator"));
        }
        if let Some(gpu) = self.gpus.iter().find(|gpu| gpu.pci().is_none()) {
            return Err(format!("{} is not a PCI address", gpu.pci_address));
        }
        if let Some(event) = self.events.iter().find(|event| event.gpu >= self.gpus.len()) {
            return Err(format!("an event names GPU {}, of {}", event.gpu, self.gpus.len()));
        }
        Ok(())
    }
}

impl Gpu {
    /// Domain, bus, device and function.
    pub(crate) fn pci(&self) -> Option<[u32; 4]> {
        pci(&self.pci_address)
    }
}

/// Reads `0000:01:00.0`, `00000000:01:00.0` or `01:00.0`.
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
