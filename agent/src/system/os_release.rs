//! Which distribution this VM runs: a fix is a command, and commands differ.

use std::fs;
use std::path::Path;

/// The distributions whose commands fixes know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Distribution {
    /// Debian and what is made from it, but for Ubuntu.
    Debian,
    /// Ubuntu and what is made from it.
    Ubuntu,
    /// Fedora, RHEL, AlmaLinux, Rocky and what is made from them.
    RedHat,
    /// Any other, or not to be told.
    #[default]
    Other,
}

impl Distribution {
    /// Reads `etc/os-release` below `root`, else `usr/lib/os-release` (os-release(5) has them in
    /// this order).
    pub fn read(root: &Path) -> Self {
        Self::told_by(|file| fs::read_to_string(root.join(file)).ok())
    }

    /// The same, where `read` gives the text of a file below the root.
    pub fn told_by(read: impl Fn(&str) -> Option<String>) -> Self {
        read("etc/os-release")
            .or_else(|| read("usr/lib/os-release"))
            .map_or(Self::Other, |text| Self::parse(&text))
    }

    /// What a text of os-release(5) says: by `ID`, else by the nearest of `ID_LIKE`.
    pub fn parse(os_release: &str) -> Self {
        let value = |name: &str| {
            let mut lines = os_release.lines().rev().filter_map(|line| line.trim().split_once('='));
            lines
                .find(|(key, _)| *key == name)
                .map_or("", |(_, value)| value.trim_matches(['"', '\'']))
        };
        let known = |id: &str| match id {
            "ubuntu" => Some(Self::Ubuntu),
            "debian" => Some(Self::Debian),
            "fedora" | "rhel" | "centos" => Some(Self::RedHat),
            _ => None,
        };
        known(value("ID"))
            .or_else(|| value("ID_LIKE").split_whitespace().find_map(known))
            .unwrap_or_default()
    }

    /// The command that installs a package, by its names in Debian's world and in Red Hat's.
    pub fn install(self, deb: &str, rpm: &str) -> String {
        match self {
            Self::Debian | Self::Ubuntu => format!("apt install {deb}"),
            Self::RedHat => format!("dnf install {rpm}"),
            Self::Other => {
                format!(
                    "install {deb} (Debian, Ubuntu: apt install {deb}; RHEL, AlmaLinux: dnf install {rpm})"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_is_known_by_its_id_else_by_what_it_is_like() {
        for (text, expected) in [
            ("PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nID=debian\n", Distribution::Debian),
            ("NAME=\"Ubuntu\"\nID=ubuntu\nID_LIKE=debian\n", Distribution::Ubuntu),
            ("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n", Distribution::Ubuntu),
            ("ID=raspbian\nID_LIKE=debian", Distribution::Debian),
            ("ID='debian'\n", Distribution::Debian),
            ("ID=\"almalinux\"\nID_LIKE=\"rhel centos fedora\"\n", Distribution::RedHat),
            ("VERSION_ID=debian\n# ID=debian\n", Distribution::Other),
            ("", Distribution::Other),
        ] {
            assert_eq!(Distribution::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn a_machine_that_does_not_tell_is_any_other() {
        assert_eq!(Distribution::read(Path::new("/nowhere")), Distribution::Other);
    }
}
