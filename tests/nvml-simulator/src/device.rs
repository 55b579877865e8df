//! Handles of GPUs and MIG devices.

use std::ffi::c_void;

use crate::{
    code::{Answer, Code, INVALID_ARGUMENT, NOT_FOUND, NOT_SUPPORTED},
    dispatch::Call,
    script::{Gpu, Mig},
};

/// `nvmlDevice_t`: never a real address, but GPU and MIG index, each plus one, packed into a
/// number.
pub(crate) type Handle = *mut c_void;

const MIG_BITS: u32 = 8;

/// The device of a handle.
pub(crate) struct Device<'call> {
    pub(crate) index: usize,
    pub(crate) gpu: &'call Gpu,
    /// Index and device, for a MIG device.
    pub(crate) mig: Option<(usize, &'call Mig)>,
}

impl Device<'_> {
    /// Returns the GPU, for queries that MIG devices do not support.
    pub(crate) fn physical(&self) -> Answer<&Gpu> {
        match self.mig {
            Some(_) => Err(NOT_SUPPORTED),
            None => Ok(self.gpu),
        }
    }

    pub(crate) fn uuid(&self) -> &str {
        self.mig.map_or(&self.gpu.uuid, |(_, mig)| &mig.uuid)
    }

    pub(crate) fn name(&self) -> &str {
        self.mig.map_or(&self.gpu.name, |(_, mig)| &mig.name)
    }

    /// Returns the total and used memory in bytes.
    pub(crate) fn memory(&self) -> (u64, u64) {
        let (total, used) = match self.mig {
            Some((_, mig)) => (mig.memory_mib, 0),
            None => (self.gpu.memory_mib, self.gpu.memory_used_mib),
        };
        (total << 20, used << 20)
    }
}

impl Call {
    /// Resolves a handle, unless the script makes this function fail for that GPU.
    pub(crate) fn device(&self, handle: Handle) -> Answer<Device<'_>> {
        let number = handle.addr();
        let index = (number >> MIG_BITS).checked_sub(1).ok_or(INVALID_ARGUMENT)?;
        let gpu = self.script.gpus.get(index).ok_or(INVALID_ARGUMENT)?;
        let mig = match number & ((1 << MIG_BITS) - 1) {
            0 => None,
            slot => {
                let mig = gpu.mig.as_ref().and_then(|list| list.get(slot - 1));
                Some((slot - 1, mig.ok_or(INVALID_ARGUMENT)?))
            }
        };
        match gpu.fail.get(self.name) {
            Some(code) => Err(Code(*code)),
            None => Ok(Device { index, gpu, mig }),
        }
    }

    /// Returns the handle of a GPU or of one of its MIG devices, unless the script makes this
    /// function fail for that GPU.
    pub(crate) fn handle(&self, gpu: usize, mig: Option<usize>) -> Answer<Handle> {
        let number = ((gpu + 1) << MIG_BITS) + mig.map_or(0, |index| index + 1);
        let handle = std::ptr::without_provenance_mut(number);
        self.device(handle).map(|_| handle)
    }

    /// Returns the handle of the device with this UUID.
    pub(crate) fn handle_of_uuid(&self, uuid: &str) -> Answer<Handle> {
        for (index, gpu) in self.script.gpus.iter().enumerate() {
            if gpu.uuid == uuid {
                return self.handle(index, None);
            }
            let migs = gpu.mig.as_deref().unwrap_or_default();
            if let Some(mig) = migs.iter().position(|mig| mig.uuid == uuid) {
                return self.handle(index, Some(mig));
            }
        }
        Err(NOT_FOUND)
    }
}
