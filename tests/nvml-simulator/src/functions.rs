//! The exported functions, with the names, arguments and structs of nvml.h.
#![allow(non_snake_case, reason = "names defined by nvml.h")]

use std::{
    ffi::{CStr, c_char, c_int, c_longlong, c_uint, c_ulonglong},
    time::Duration,
};

use crate::{
    code::{
        self, ARGUMENT_VERSION_MISMATCH, Answer, INSUFFICIENT_SIZE, INVALID_ARGUMENT, NOT_FOUND,
        NOT_SUPPORTED,
    },
    device::Handle,
    dispatch::{self, dispatch},
    event::{self, SetHandle},
    script::{EventKind, pci},
};

/// `nvmlPciInfo_t`.
#[repr(C)]
struct PciInfo {
    bus_id_legacy: [c_char; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    pci_device_id: c_uint,
    pci_subsystem_id: c_uint,
    bus_id: [c_char; 32],
}

/// `nvmlMemory_t`, in bytes.
#[repr(C)]
struct Memory {
    total: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

/// `nvmlMemory_v2_t`, in bytes.
#[repr(C)]
struct MemoryV2 {
    version: c_uint,
    total: c_ulonglong,
    reserved: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

impl MemoryV2 {
    /// NVML's struct version: the size, and the version in the highest byte.
    const VERSION: c_uint = size_of::<Self>() as c_uint | 2 << 24;
}

/// `nvmlUtilization_t`, in percent.
#[repr(C)]
struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

/// `nvmlFieldValue_t`. The value is a union of numbers; the low half holds an unsigned int.
#[repr(C)]
struct FieldValue {
    field_id: c_uint,
    scope_id: c_uint,
    timestamp: c_longlong,
    latency_usec: c_longlong,
    value_type: c_uint,
    result: c_uint,
    value: c_ulonglong,
}

/// `nvmlEventData_t`.
#[repr(C)]
struct EventData {
    device: Handle,
    event_type: c_ulonglong,
    event_data: c_ulonglong,
    gpu_instance_id: c_uint,
    compute_instance_id: c_uint,
}

/// Whether a script may name this function.
pub(crate) fn known(name: &str) -> bool {
    ["nvmlInit_v2", "nvmlInitWithFlags"].contains(&name) || EXPORTED.contains(&name)
}

/// Initialises NVML.
#[unsafe(no_mangle)]
extern "C" fn nvmlInit_v2() -> c_uint {
    dispatch::open("nvmlInit_v2")
}

/// Initialises NVML; the flags are ignored.
#[unsafe(no_mangle)]
extern "C" fn nvmlInitWithFlags(_flags: c_uint) -> c_uint {
    dispatch::open("nvmlInitWithFlags")
}

/// Returns the text of a code, whether or not NVML is initialised.
#[unsafe(no_mangle)]
extern "C" fn nvmlErrorString(result: c_uint) -> *const c_char {
    dispatch::note("nvmlErrorString");
    code::text(result).as_ptr()
}

/// Writes a result to the caller's memory.
///
/// # Safety
/// `out` is null or valid for a write of `T`, as NVML requires of its callers.
unsafe fn put<T>(out: *mut T, value: T) -> Answer {
    if out.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: not null, and valid as guaranteed by the caller.
    unsafe { out.write(value) };
    Ok(())
}

/// Writes a NUL-terminated text if it fits.
///
/// # Safety
/// `out` is null or valid for writes of `length` bytes.
unsafe fn put_text(out: *mut c_char, length: c_uint, text: &str) -> Answer {
    if out.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    if text.len() >= length as usize {
        return Err(INSUFFICIENT_SIZE);
    }
    // SAFETY: text and NUL together are at most `length` bytes, which the caller guarantees.
    unsafe {
        out.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len());
        out.add(text.len()).write(0);
    }
    Ok(())
}

/// Reads a text of the caller.
///
/// # Safety
/// `text` is null or points to a NUL-terminated text.
unsafe fn taken<'text>(text: *const c_char) -> Answer<&'text str> {
    if text.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: not null, and valid as guaranteed by the caller.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| INVALID_ARGUMENT)
}

fn fixed<const N: usize>(text: &str) -> [c_char; N] {
    let mut field = [0; N];
    for (to, from) in field.iter_mut().zip(text.bytes().take(N - 1)) {
        *to = from as c_char;
    }
    field
}

/// Defines functions that pass [`dispatch()`]. The body gets the call (script and handles) and
/// returns a code or nothing.
macro_rules! exported {
    ($(
        $(#[$doc:meta])*
        fn $name:ident($($argument:ident: $type:ty),*) |$call:ident| $body:block
    )*) => {
        const EXPORTED: &[&str] = &[$(stringify!($name)),*];
        $(
            $(#[$doc])*
            ///
            /// # Safety
            /// Pointers are null or valid, as nvml.h requires.
            #[unsafe(no_mangle)]
            #[allow(unused_unsafe, reason = "some bodies contain no unsafe operation")]
            unsafe extern "C" fn $name($($argument: $type),*) -> c_uint {
                // SAFETY: the body uses only pointers that the caller guarantees.
                dispatch(stringify!($name), |$call| unsafe { $body })
            }
        )*
    };
}

exported! {
    /// Shuts NVML down.
    fn nvmlShutdown() |_call| {
        dispatch::close();
        Ok(())
    }

    /// Version of the kernel module.
    fn nvmlSystemGetDriverVersion(version: *mut c_char, length: c_uint) |call| {
        put_text(version, length, &call.script.driver_version)
    }

    /// Version of this library.
    fn nvmlSystemGetNVMLVersion(version: *mut c_char, length: c_uint) |call| {
        put_text(version, length, &call.script.nvml_version)
    }

    /// Highest CUDA version that the driver supports.
    fn nvmlSystemGetCudaDriverVersion(version: *mut c_int) |call| {
        put(version, call.script.cuda_version)
    }

    /// Highest CUDA version that the driver supports.
    fn nvmlSystemGetCudaDriverVersion_v2(version: *mut c_int) |call| {
        put(version, call.script.cuda_version)
    }

    /// Number of GPUs.
    fn nvmlDeviceGetCount_v2(count: *mut c_uint) |call| {
        put(count, call.script.count.unwrap_or(call.script.gpus.len() as c_uint))
    }

    /// A GPU by its index.
    fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut Handle) |call| {
        put(device, call.handle(index as usize, None)?)
    }

    /// A GPU or a MIG device by its UUID.
    fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, device: *mut Handle) |call| {
        put(device, call.handle_of_uuid(taken(uuid)?)?)
    }

    /// A GPU by its PCI address.
    fn nvmlDeviceGetHandleByPciBusId_v2(address: *const c_char, device: *mut Handle) |call| {
        let wanted = pci(taken(address)?).ok_or(INVALID_ARGUMENT)?;
        let index = call.script.gpus.iter().position(|gpu| gpu.pci() == Some(wanted));
        put(device, call.handle(index.ok_or(NOT_FOUND)?, None)?)
    }

    /// The UUID.
    fn nvmlDeviceGetUUID(device: Handle, uuid: *mut c_char, length: c_uint) |call| {
        put_text(uuid, length, call.device(device)?.uuid())
    }

    /// The product name.
    fn nvmlDeviceGetName(device: Handle, name: *mut c_char, length: c_uint) |call| {
        put_text(name, length, call.device(device)?.name())
    }

    /// The PCI address in parts and as text, with NVML's eight digits of domain.
    fn nvmlDeviceGetPciInfo_v3(device: Handle, info: *mut PciInfo) |call| {
        let [domain, bus, slot, function] = call.device(device)?.gpu.pci().ok_or(NOT_FOUND)?;
        put(info, PciInfo {
            bus_id_legacy: fixed(&format!("{domain:04X}:{bus:02X}:{slot:02X}.{function}")),
            domain,
            bus,
            device: slot,
            pci_device_id: 0x20f1_10de,
            pci_subsystem_id: 0x145f_10de,
            bus_id: fixed(&format!("{domain:08X}:{bus:02X}:{slot:02X}.{function}")),
        })
    }

    /// Memory in bytes.
    fn nvmlDeviceGetMemoryInfo(device: Handle, memory: *mut Memory) |call| {
        let (total, used) = call.device(device)?.memory();
        put(memory, Memory { total, free: total - used, used })
    }

    /// Memory in bytes, in the versioned struct.
    fn nvmlDeviceGetMemoryInfo_v2(device: Handle, memory: *mut MemoryV2) |call| {
        let (total, used) = call.device(device)?.memory();
        if memory.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        if (*memory).version != MemoryV2::VERSION {
            return Err(ARGUMENT_VERSION_MISMATCH);
        }
        let free = total - used;
        put(memory, MemoryV2 { version: MemoryV2::VERSION, total, reserved: 0, free, used })
    }

    /// Number of the device node, `/dev/nvidia<minor>`.
    fn nvmlDeviceGetMinorNumber(device: Handle, minor: *mut c_uint) |call| {
        let device = call.device(device)?;
        put(minor, device.physical()?.minor.unwrap_or(device.index as c_uint))
    }

    /// Index; for a MIG device, the index within its GPU.
    fn nvmlDeviceGetIndex(device: Handle, index: *mut c_uint) |call| {
        let device = call.device(device)?;
        put(index, device.mig.map_or(device.index, |(index, _)| index) as c_uint)
    }

    /// ECC mode: enabled if the GPU has ECC.
    fn nvmlDeviceGetEccMode(device: Handle, current: *mut c_uint, pending: *mut c_uint) |call| {
        call.device(device)?.physical()?.ecc_uncorrected.ok_or(NOT_SUPPORTED)?;
        put(current, 1)?;
        put(pending, 1)
    }

    /// ECC errors. Only uncorrectable ones are simulated; the volatile and aggregate counts are
    /// equal.
    fn nvmlDeviceGetTotalEccErrors(
        device: Handle, error_type: c_uint, _counter: c_uint, count: *mut c_ulonglong
    ) |call| {
        const UNCORRECTED: c_uint = 1;
        let errors = call.device(device)?.physical()?.ecc_uncorrected.ok_or(NOT_SUPPORTED)?;
        put(count, if error_type == UNCORRECTED { errors } else { 0 })
    }

    /// Remapped rows of memory.
    fn nvmlDeviceGetRemappedRows(
        device: Handle, corrected: *mut c_uint, uncorrected: *mut c_uint, pending: *mut c_uint,
        failed: *mut c_uint
    ) |call| {
        let device = call.device(device)?;
        let gpu = device.physical()?;
        let remap_failed = gpu.remap_failed.ok_or(NOT_SUPPORTED)?;
        put(corrected, 0)?;
        put(uncorrected, c_uint::from(remap_failed))?;
        put(pending, c_uint::from(gpu.remap_pending))?;
        put(failed, c_uint::from(remap_failed))
    }

    /// Field values: the row remapper's, 142 to 145 in nvml.h; others are not supported.
    fn nvmlDeviceGetFieldValues(device: Handle, count: c_int, values: *mut FieldValue) |call| {
        const UNSIGNED_INT: c_uint = 1;
        let device = call.device(device)?;
        let gpu = device.physical()?;
        let count = usize::try_from(count).map_err(|_| INVALID_ARGUMENT)?;
        if values.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        for value in std::slice::from_raw_parts_mut(values, count) {
            let number = gpu.remap_failed.and_then(|failed| match value.field_id {
                142 => Some(0),
                143 | 145 => Some(c_ulonglong::from(failed)),
                144 => Some(c_ulonglong::from(gpu.remap_pending)),
                _ => None,
            });
            value.value_type = UNSIGNED_INT;
            value.result = number.map_or(NOT_SUPPORTED.0, |_| code::SUCCESS);
            value.value = number.unwrap_or_default();
        }
        Ok(())
    }

    /// Whether memory pages are pending retirement, which needs a reset.
    fn nvmlDeviceGetRetiredPagesPendingStatus(device: Handle, pending: *mut c_uint) |call| {
        let device = call.device(device)?;
        let gpu = device.physical()?;
        gpu.ecc_uncorrected.ok_or(NOT_SUPPORTED)?;
        put(pending, c_uint::from(gpu.remap_pending))
    }

    /// MIG mode.
    fn nvmlDeviceGetMigMode(device: Handle, current: *mut c_uint, pending: *mut c_uint) |call| {
        let device = call.device(device)?;
        let gpu = device.physical()?;
        if gpu.mig.is_none() && !gpu.mig_capable {
            return Err(NOT_SUPPORTED);
        }
        let mode = c_uint::from(gpu.mig.is_some());
        put(current, mode)?;
        put(pending, mode)
    }

    /// Maximum number of MIG devices; zero if MIG is disabled or unsupported.
    fn nvmlDeviceGetMaxMigDeviceCount(device: Handle, count: *mut c_uint) |call| {
        let device = call.device(device)?;
        put(count, device.physical()?.mig.as_ref().map_or(0, |list| list.len().max(7)) as c_uint)
    }

    /// A MIG device by its index; indices may have gaps, which return NOT_FOUND.
    fn nvmlDeviceGetMigDeviceHandleByIndex(device: Handle, index: c_uint, mig: *mut Handle) |call| {
        let device = call.device(device)?;
        let list = device.physical()?.mig.as_deref().ok_or(NOT_FOUND)?;
        let index = index as usize;
        if index >= list.len() {
            return Err(NOT_FOUND);
        }
        put(mig, call.handle(device.index, Some(index))?)
    }

    /// Parent GPU of a MIG device.
    fn nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig: Handle, device: *mut Handle) |call| {
        put(device, call.handle(call.device(mig)?.index, None)?)
    }

    /// Whether a handle is a MIG device.
    fn nvmlDeviceIsMigDeviceHandle(device: Handle, is_mig: *mut c_uint) |call| {
        put(is_mig, c_uint::from(call.device(device)?.mig.is_some()))
    }

    /// GPU utilisation.
    fn nvmlDeviceGetUtilizationRates(device: Handle, utilization: *mut Utilization) |call| {
        let gpu = call.device(device)?.physical()?.utilization.ok_or(NOT_SUPPORTED)?;
        put(utilization, Utilization { gpu, memory: gpu / 2 })
    }

    /// Temperature in degrees Celsius.
    fn nvmlDeviceGetTemperature(device: Handle, _sensor: c_uint, temperature: *mut c_uint) |call| {
        put(temperature, call.device(device)?.physical()?.temperature.ok_or(NOT_SUPPORTED)?)
    }

    /// Power in milliwatts.
    fn nvmlDeviceGetPowerUsage(device: Handle, power: *mut c_uint) |call| {
        put(power, call.device(device)?.physical()?.power_mw.ok_or(NOT_SUPPORTED)?)
    }

    /// Creates an empty event set.
    fn nvmlEventSetCreate(set: *mut SetHandle) |_call| {
        put(set, event::create())
    }

    /// Registers a GPU for the events in the mask.
    fn nvmlDeviceRegisterEvents(device: Handle, mask: c_ulonglong, set: SetHandle) |call| {
        if mask & !EventKind::ALL != 0 {
            return Err(NOT_SUPPORTED);
        }
        let device = call.device(device)?;
        event::watch(set, device.index, mask)
    }

    /// Supported event types.
    fn nvmlDeviceGetSupportedEventTypes(device: Handle, mask: *mut c_ulonglong) |call| {
        call.device(device)?;
        put(mask, EventKind::ALL)
    }

    /// Waits for the next event.
    fn nvmlEventSetWait_v2(set: SetHandle, data: *mut EventData, timeout_ms: c_uint) |call| {
        let event = event::wait(call, set, Duration::from_millis(timeout_ms.into()))?;
        put(data, EventData {
            device: call.handle(event.gpu, None)?,
            event_type: event.kind.bit(),
            event_data: event.data,
            gpu_instance_id: c_uint::MAX,
            compute_instance_id: c_uint::MAX,
        })
    }

    /// Frees an event set.
    fn nvmlEventSetFree(set: SetHandle) |_call| {
        event::free(set)
    }
}
