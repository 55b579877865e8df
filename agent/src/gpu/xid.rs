//! XIDs, the error numbers of NVIDIA's kernel driver, and what each means for the node.
//!
//! [`XIDS`] is the only place where an XID is classified. To add one:
//! 1. Look it up in NVIDIA's Xid Catalog
//!    (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html).
//! 2. Add a row to [`XIDS`] with NVIDIA's description and, if that is too terse, an explanation.
//! 3. Derive the [`Class`] from NVIDIA's immediate action: RESET_GPU, RESTART_BM, RESTART_APP, …
//! 4. Regenerate the documents: `UPDATE_DOCUMENTS=1 cargo test -p supernode-agent --test
//!    documents`.

use std::fmt;

/// What an XID means for the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The GPU works again after a reset.
    ResetGpu,
    /// The GPU works again after a restart of the machine.
    RestartMachine,
    /// The process that uses the GPU cannot continue; a new one may work.
    FatalForWorkload,
    /// A fault of an application, or one contained to it.
    Application,
    /// No action required.
    Ignore,
    /// Accompanies another fault, or reports a change.
    Information,
}

impl Class {
    /// All classes.
    pub const ALL: [Self; 6] = [
        Self::ResetGpu,
        Self::RestartMachine,
        Self::FatalForWorkload,
        Self::Application,
        Self::Ignore,
        Self::Information,
    ];

    /// Returns whether the node stops using the GPU.
    pub fn is_fatal(self) -> bool {
        matches!(self, Self::ResetGpu | Self::RestartMachine | Self::FatalForWorkload)
    }

    /// Returns the action that NVIDIA recommends, as the end of a sentence.
    pub fn advice(self) -> &'static str {
        match self {
            Self::ResetGpu => "reset the GPU",
            Self::RestartMachine => "restart the machine",
            Self::FatalForWorkload => "the workload cannot continue",
            Self::Application => "application error",
            Self::Ignore => "no action required",
            Self::Information => "informational",
        }
    }
}

/// A row of the table.
#[derive(Debug)]
pub struct Entry {
    /// The XID.
    pub number: u64,
    /// NVIDIA's description, then an explanation if that is too terse.
    pub description: &'static str,
    /// What the XID means for the node.
    pub class: Class,
}

/// The known XIDs, in ascending order. Descriptions after NVIDIA's Xid Catalog, classes after the
/// recommended actions in NVIDIA's "XID Errors" document (docs.nvidia.com/deploy/xid-errors).
pub const XIDS: &[Entry] = &[
    entry(8, "GPU stopped processing", Class::Application),
    entry(11, "Invalid or corrupted push buffer stream", Class::Application),
    entry(
        13,
        "Graphics Engine Exception, such as an out-of-bounds access or an illegal instruction",
        Class::Application,
    ),
    entry(31, "GPU memory page fault, an access to an unmapped address", Class::Application),
    entry(32, "Invalid or corrupted push buffer stream (PBDMA error)", Class::Application),
    entry(39, "Copy Engine Exception (CE0)", Class::Application),
    entry(40, "Copy Engine Exception (CE1)", Class::Application),
    entry(41, "Copy Engine Exception (CE2)", Class::Application),
    entry(
        43,
        "GPU stopped processing: a channel was reset after a software-induced fault",
        Class::Ignore,
    ),
    entry(
        45,
        "Preemptive cleanup, due to previous errors or the exit of a process",
        Class::Information,
    ),
    entry(46, "GPU stopped processing (GPU timeout)", Class::ResetGpu),
    entry(48, "Double Bit ECC Error, which is uncorrectable", Class::FatalForWorkload),
    entry(62, "Internal micro-controller halt", Class::ResetGpu),
    entry(63, "GPU memory remapping event: a faulty row or page is recorded", Class::Ignore),
    entry(
        64,
        "GPU memory remapping failure: a faulty row or page could not be recorded",
        Class::ResetGpu,
    ),
    entry(68, "NVDEC0 Exception (video decoder)", Class::Application),
    entry(69, "Graphics Engine class error", Class::Application),
    entry(74, "NVLINK Error", Class::FatalForWorkload),
    entry(79, "GPU has fallen off the bus", Class::RestartMachine),
    entry(92, "High single-bit ECC error rate; the errors are corrected", Class::Ignore),
    entry(94, "Contained memory error: one application is affected", Class::Application),
    entry(95, "Uncontained memory error: all applications are affected", Class::ResetGpu),
    entry(109, "Context Switch Timeout Error", Class::ResetGpu),
    entry(110, "Security Fault Error", Class::ResetGpu),
    entry(119, "GSP RPC Timeout: the GPU System Processor did not respond", Class::ResetGpu),
    entry(120, "GSP Error in the GPU System Processor", Class::ResetGpu),
    entry(136, "Link Training Failed (NVLink)", Class::ResetGpu),
    entry(140, "ECC Unrecovered Error", Class::ResetGpu),
    entry(143, "GPU Initialization Error", Class::ResetGpu),
    entry(144, "NVLINK: SAW Error", Class::FatalForWorkload),
    entry(145, "NVLINK: RLW Error", Class::FatalForWorkload),
    entry(146, "NVLINK: TLW Error", Class::FatalForWorkload),
    entry(147, "NVLINK: TREX Error", Class::FatalForWorkload),
    entry(148, "NVLINK: NVLPW_CTRL Error", Class::FatalForWorkload),
    entry(149, "NVLINK: NETIR Error", Class::FatalForWorkload),
    entry(150, "NVLINK: MSE Error", Class::FatalForWorkload),
    entry(
        154,
        "GPU Recovery Action Changed, the action that another XID requires",
        Class::Information,
    ),
    entry(155, "NVLINK: SW Defined Error", Class::ResetGpu),
    entry(156, "Resource Retirement Event", Class::ResetGpu),
    entry(158, "GPU Fatal Timeout", Class::ResetGpu),
    entry(160, "Channel Retirement Event", Class::RestartMachine),
];

const fn entry(number: u64, description: &'static str, class: Class) -> Entry {
    Entry { number, description, class }
}

/// An XID, known or unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xid(pub u64);

impl Xid {
    fn entry(self) -> Option<&'static Entry> {
        XIDS.iter().find(|entry| entry.number == self.0)
    }

    /// Returns the class. An unknown XID is fatal, as in NVIDIA's device plugin
    /// (NVIDIA/k8s-device-plugin, internal/rm/health.go).
    pub fn class(self) -> Class {
        self.entry().map_or(Class::FatalForWorkload, |entry| entry.class)
    }
}

impl fmt::Display for Xid {
    /// Formats number, description and advice.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(number) = self;
        match self.entry() {
            Some(Entry { description, class, .. }) => {
                write!(f, "XID {number}: {description} ({})", class.advice())
            }
            None => write!(f, "XID {number}: unknown to this release and treated as fatal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sorted_and_complete() {
        assert!(XIDS.is_sorted_by(|one, next| one.number < next.number));
        assert!(XIDS.iter().all(|entry| !entry.description.is_empty()));
    }

    #[test]
    fn known_xid_has_description_and_class() {
        assert_eq!(Xid(79).to_string(), "XID 79: GPU has fallen off the bus (restart the machine)");
        for (fatal, numbers) in [
            (
                true,
                &[
                    46, 48, 62, 64, 74, 79, 95, 109, 110, 119, 120, 136, 140, 143, 144, 150, 155,
                    156, 158, 160,
                ][..],
            ),
            (false, &[8, 11, 13, 31, 32, 39, 40, 41, 43, 45, 63, 68, 69, 92, 94, 154]),
        ] {
            for number in numbers {
                assert_eq!(Xid(*number).class().is_fatal(), fatal, "{number}");
            }
        }
    }

    #[test]
    fn unknown_xid_is_fatal() {
        assert!(Xid(4711).class().is_fatal());
        assert_eq!(Xid(4711).to_string(), "XID 4711: unknown to this release and treated as fatal");
    }

    #[test]
    fn each_class_has_its_own_advice() {
        assert_eq!(
            Class::ALL.map(Class::advice),
            [
                "reset the GPU",
                "restart the machine",
                "the workload cannot continue",
                "application error",
                "no action required",
                "informational",
            ]
        );
    }
}
