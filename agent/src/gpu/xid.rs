//! XIDs: the numbers under which NVIDIA's kernel driver reports what went wrong, and what each asks
//! for. One table.

use std::fmt;

/// What an XID means for the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The GPU works again after a reset.
    ResetGpu,
    /// The GPU works again after the machine was restarted.
    RestartMachine,
    /// The process that uses the GPU cannot go on; the next one may.
    FatalForWorkload,
    /// A process used the GPU wrongly, or met with a fault that was contained: its own affair.
    Application,
    /// Nothing to be done.
    Ignore,
    /// Tells of something else that went wrong, or of a change.
    Information,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::ResetGpu,
        Self::RestartMachine,
        Self::FatalForWorkload,
        Self::Application,
        Self::Ignore,
        Self::Information,
    ];

    /// Whether the node leaves the GPU for it.
    pub fn is_fatal(self) -> bool {
        matches!(self, Self::ResetGpu | Self::RestartMachine | Self::FatalForWorkload)
    }

    /// What NVIDIA advises, as the end of a sentence.
    pub fn advice(self) -> &'static str {
        match self {
            Self::ResetGpu => "the GPU must be reset",
            Self::RestartMachine => "the machine must be restarted",
            Self::FatalForWorkload => "what runs on the GPU cannot go on",
            Self::Application => "an application's own fault",
            Self::Ignore => "nothing is to be done",
            Self::Information => "for information",
        }
    }
}

/// What the table says about an XID.
#[derive(Debug)]
pub struct Entry {
    /// The XID.
    pub number: u64,
    /// What it means, in a few words.
    pub meaning: &'static str,
    /// What it asks for.
    pub class: Class,
}

/// The XIDs that are known here, in ascending order. Meanings and actions after NVIDIA's "XID
/// Errors" document (docs.nvidia.com/deploy/xid-errors, the table of XIDs and the table of
/// recommended actions).
pub const XIDS: &[Entry] = &[
    entry(8, "the GPU stopped working on a channel", Class::Application),
    entry(11, "an invalid or corrupted stream of commands", Class::Application),
    entry(
        13,
        "an exception of the graphics engine, such as an illegal instruction or access",
        Class::Application,
    ),
    entry(31, "an access to GPU memory that is not mapped", Class::Application),
    entry(32, "an invalid or corrupted push buffer", Class::Application),
    entry(39, "an exception of copy engine 0", Class::Application),
    entry(40, "an exception of copy engine 1", Class::Application),
    entry(41, "an exception of copy engine 2", Class::Application),
    entry(43, "a channel was stopped after its process had failed", Class::Ignore),
    entry(
        45,
        "channels were cleaned up after an earlier error or the end of a process",
        Class::Information,
    ),
    entry(46, "the GPU stopped working", Class::ResetGpu),
    entry(48, "a double-bit ECC error, which cannot be corrected", Class::FatalForWorkload),
    entry(62, "the GPU's internal microcontroller has halted", Class::ResetGpu),
    entry(63, "a faulty page or row of memory was recorded for its replacement", Class::Ignore),
    entry(
        64,
        "a faulty page or row of memory could not be recorded for its replacement",
        Class::ResetGpu,
    ),
    entry(68, "an exception of the video decoder", Class::Application),
    entry(69, "a wrong use of the graphics engine", Class::Application),
    entry(74, "an NVLink error", Class::FatalForWorkload),
    entry(79, "the GPU has fallen off the bus", Class::RestartMachine),
    entry(92, "many single-bit ECC errors, all corrected", Class::Ignore),
    entry(94, "an ECC error that was contained to one application", Class::Application),
    entry(95, "an ECC error that was not contained", Class::ResetGpu),
    entry(109, "the switch to another context did not end in time", Class::ResetGpu),
    entry(110, "a security fault", Class::ResetGpu),
    entry(119, "the GPU's system processor (GSP) did not answer in time", Class::ResetGpu),
    entry(120, "an error of the GPU's system processor (GSP)", Class::ResetGpu),
    entry(136, "the training of an NVLink failed", Class::ResetGpu),
    entry(140, "an ECC error that was not recovered", Class::ResetGpu),
    entry(143, "the GPU could not be initialised", Class::ResetGpu),
    entry(144, "an NVLink error (SAW)", Class::FatalForWorkload),
    entry(145, "an NVLink error (RLW)", Class::FatalForWorkload),
    entry(146, "an NVLink error (TLW)", Class::FatalForWorkload),
    entry(147, "an NVLink error (TREX)", Class::FatalForWorkload),
    entry(148, "an NVLink error (NVLPW_CTRL)", Class::FatalForWorkload),
    entry(149, "an NVLink error (NETIR)", Class::FatalForWorkload),
    entry(150, "an NVLink error (MSE)", Class::FatalForWorkload),
    entry(154, "the action that the GPU needs for its recovery has changed", Class::Information),
    entry(155, "an NVLink error that the driver defines", Class::ResetGpu),
    entry(156, "a resource of the GPU was retired", Class::ResetGpu),
    entry(158, "the GPU did not answer in time, beyond recovery", Class::ResetGpu),
    entry(160, "a channel of the GPU could not be retired", Class::RestartMachine),
];

const fn entry(number: u64, meaning: &'static str, class: Class) -> Entry {
    Entry { number, meaning, class }
}

/// An XID, known or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xid(pub u64);

impl Xid {
    fn entry(self) -> Option<&'static Entry> {
        XIDS.iter().find(|entry| entry.number == self.0)
    }

    /// What it asks for. One that is not known is fatal, as NVIDIA's device plugin takes it
    /// (NVIDIA/k8s-device-plugin, internal/rm/health.go).
    pub fn class(self) -> Class {
        self.entry().map_or(Class::FatalForWorkload, |entry| entry.class)
    }
}

impl fmt::Display for Xid {
    /// Number, meaning, advice.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(number) = self;
        match self.entry() {
            Some(Entry { meaning, class, .. }) => {
                write!(f, "XID {number}: {meaning} ({})", class.advice())
            }
            None => write!(
                f,
                "XID {number}: not in the table of this release, so it is taken for fatal"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_ascends_and_every_entry_has_a_meaning() {
        assert!(XIDS.is_sorted_by(|one, next| one.number < next.number));
        assert!(XIDS.iter().all(|entry| !entry.meaning.is_empty()));
    }

    #[test]
    fn an_xid_is_told_with_its_meaning_and_what_it_asks_for() {
        assert_eq!(
            Xid(79).to_string(),
            "XID 79: the GPU has fallen off the bus (the machine must be restarted)"
        );
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
    fn an_unknown_xid_is_fatal_and_says_that_it_is_unknown() {
        assert!(Xid(4711).class().is_fatal());
        assert!(Xid(4711).to_string().starts_with("XID 4711: not in the table"));
    }

    #[test]
    fn every_class_has_its_own_advice() {
        let told: Vec<&str> = Class::ALL.map(Class::advice).to_vec();
        assert_eq!(
            told,
            [
                "the GPU must be reset",
                "the machine must be restarted",
                "what runs on the GPU cannot go on",
                "an application's own fault",
                "nothing is to be done",
                "for information",
            ]
        );
    }
}
