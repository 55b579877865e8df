//! A simulated `/sys` with the kernel's symlinks: devices behind a PCI bridge, drivers, the nvidia
//! module.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::sandbox::{Sandbox, write};

const BRIDGE: &str = "0000:00:1c.0";

/// The tree. Each call changes the files at once, so that a device can appear, disappear or lose
/// its driver while an agent runs. Removed when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Sysfs {
    sandbox: Arc<Sandbox>,
    last: PathBuf,
}

impl Sysfs {
    /// Creates a tree with a PCI bridge but no other device and no nvidia module.
    #[must_use]
    pub fn new() -> Self {
        let sandbox = Arc::new(Sandbox::new("sys"));
        for directory in
            ["bus/pci/devices", "bus/pci/drivers", "module", "class", "devices/pci0000:00"]
        {
            fs::create_dir_all(sandbox.join(directory))
                .expect("cannot create a directory of the tree");
        }
        let sysfs = Self { sandbox, last: PathBuf::new() };
        sysfs.device(BRIDGE, "0x8086", "0x060400", Some("pcieport"))
    }

    /// Returns the directory to use as `/sys`.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.sandbox.path()
    }

    /// Adds an NVIDIA 3D controller (an A100) without a driver; [`Sysfs::driver`] binds one.
    #[must_use]
    pub fn gpu(self, address: &str) -> Self {
        self.device(address, "0x10de", "0x030200", None)
    }

    /// Adds a device with vendor and class as sysfs writes them (`0x10de`, `0x030000`).
    #[must_use]
    pub fn device(
        mut self,
        address: &str,
        vendor: &str,
        class: &str,
        driver: Option<&str>,
    ) -> Self {
        let relative = location(address);
        self.last = self.sandbox.join(&relative);
        for (name, value) in [("vendor", vendor), ("class", class), ("device", "0x20f1")] {
            write(&self.last.join(name), format!("{value}\n"));
        }
        let link = self.sandbox.join("bus/pci/devices").join(address);
        link_to(&link, &format!("../../../{relative}"));
        match driver {
            Some(driver) => self.driver(driver),
            None => self,
        }
    }

    /// Binds the last added device to a driver.
    #[must_use]
    pub fn driver(self, driver: &str) -> Self {
        fs::create_dir_all(self.sandbox.join("bus/pci/drivers").join(driver))
            .expect("cannot create a directory of the tree");
        let above = self.last.strip_prefix(self.root()).map_or(0, |path| path.components().count());
        link_to(
            &self.last.join("driver"),
            &format!("{}bus/pci/drivers/{driver}", "../".repeat(above)),
        );
        self
    }

    /// Loads this version of the nvidia kernel module.
    #[must_use]
    pub fn module(self, version: &str) -> Self {
        self.module_in_state(version, "live")
    }

    /// Sets the state of the nvidia kernel module: `live`, `coming`, `going`.
    #[must_use]
    pub fn module_in_state(self, version: &str, state: &str) -> Self {
        write(&self.sandbox.join("module/nvidia/version"), format!("{version}\n"));
        write(&self.sandbox.join("module/nvidia/initstate"), format!("{state}\n"));
        self
    }

    /// Marks the VM as booted by UEFI, with Secure Boot on or off.
    #[must_use]
    pub fn secure_boot(self, on: bool) -> Self {
        let variable = "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";
        // Four bytes of attributes, then the value.
        write(&self.sandbox.join(variable), [6, 0, 0, 0, u8::from(on)]);
        self
    }

    /// Removes a device.
    pub fn remove(&self, address: &str) {
        let _ = fs::remove_file(self.sandbox.join("bus/pci/devices").join(address));
        let _ = fs::remove_dir_all(self.sandbox.join(location(address)));
    }
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::new()
    }
}

/// Returns the location of a device: bus 0 at the root, every other bus behind a bridge.
fn location(address: &str) -> String {
    if address.starts_with("0000:00:") {
        format!("devices/pci0000:00/{address}")
    } else {
        format!("devices/pci0000:00/{BRIDGE}/{address}")
    }
}

fn link_to(link: &Path, target: &str) {
    let _ = fs::remove_file(link);
    symlink(target, link).unwrap_or_else(|error| panic!("{}: {error}", link.display()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symlinks_match_the_kernel_layout() {
        let sysfs = Sysfs::new().gpu("0000:01:00.0").driver("nvidia").module("550.54.15");
        let device = sysfs.root().join("bus/pci/devices/0000:01:00.0");
        let target = fs::read_link(device.join("driver")).unwrap();
        assert_eq!(target, Path::new("../../../../bus/pci/drivers/nvidia"));
        assert!(device.join("driver").is_dir(), "the link is dangling");
        assert_eq!(fs::read_to_string(device.join("vendor")).unwrap(), "0x10de\n");

        sysfs.remove("0000:01:00.0");
        assert!(!device.exists());
    }
}
