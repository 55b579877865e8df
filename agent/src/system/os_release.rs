//! Distribution of this VM. The commands in a fix depend on it.

use std::fs;
use std::path::Path;

/// Distribution family, by package manager and package names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Distribution {
    /// Debian and its derivatives, except Ubuntu.
    Debian,
    /// Ubuntu and its derivatives.
    Ubuntu,
    /// Fedora, RHEL, AlmaLinux, Rocky Linux and their derivatives.
    RedHat,
    /// Another distribution, or an unknown one.
    #[default]
    Other,
}

impl Distribution {
    /// Reads `etc/os-release` below `root`, or else `usr/lib/os-release`, in the order of
    /// os-release(5).
    pub(crate) fn read(root: &Path) -> Self {
        Self::read_with(|file| fs::read_to_string(root.join(file)).ok())
    }

    /// Like [`read`](Self::read), with a function that returns the text of a file below the root.
    pub(crate) fn read_with(read: impl Fn(&str) -> Option<String>) -> Self {
        read("etc/os-release")
            .or_else(|| read("usr/lib/os-release"))
            .map_or(Self::Other, |text| Self::parse(&text))
    }

    /// Parses os-release(5). `ID` takes precedence over `ID_LIKE`, whose closest entry is first.
    pub(crate) fn parse(os_release: &str) -> Self {
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

    /// Returns the command that installs a package, given its deb and its rpm name.
    pub(crate) fn install_command(self, deb: &str, rpm: &str) -> String {
        match self {
            Self::Debian | Self::Ubuntu => format!("apt install {deb}"),
            Self::RedHat => format!("dnf install {rpm}"),
            Self::Other => {
                format!(
                    "install {deb} (Debian, Ubuntu: apt install {deb}; RHEL, AlmaLinux: dnf \
                     install {rpm})"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_takes_precedence_over_id_like() {
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
    fn missing_os_release_is_other() {
        assert_eq!(Distribution::read(Path::new("/nowhere")), Distribution::Other);
    }
}
