//! Event sets: who watches what, and the wait.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    code::{Answer, INVALID_ARGUMENT, TIMEOUT},
    gate::Call,
    script::Event,
};

/// `nvmlEventSet_t`: a key of [`SETS`], never a real address.
pub(crate) type SetHandle = *mut c_void;

/// One event set.
struct Set {
    created: Instant,
    /// GPU index and mask of each registration.
    watched: Vec<(usize, u64)>,
    /// Indices of the script's events that were told already.
    told: Vec<usize>,
}

static SETS: Mutex<BTreeMap<usize, Arc<Mutex<Set>>>> = Mutex::new(BTreeMap::new());
static LAST: AtomicUsize = AtomicUsize::new(0);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn set(handle: SetHandle) -> Answer<Arc<Mutex<Set>>> {
    lock(&SETS).get(&handle.addr()).cloned().ok_or(INVALID_ARGUMENT)
}

pub(crate) fn create() -> SetHandle {
    let number = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    let set = Set { created: Instant::now(), watched: Vec::new(), told: Vec::new() };
    lock(&SETS).insert(number, Arc::new(Mutex::new(set)));
    std::ptr::without_provenance_mut(number)
}

pub(crate) fn free(handle: SetHandle) -> Answer {
    lock(&SETS).remove(&handle.addr()).map(drop).ok_or(INVALID_ARGUMENT)
}

pub(crate) fn watch(handle: SetHandle, gpu: usize, mask: u64) -> Answer {
    lock(&*set(handle)?).watched.push((gpu, mask));
    Ok(())
}

/// The next event of the set, waiting for it as long as the caller allows.
pub(crate) fn wait(call: &Call, handle: SetHandle, timeout: Duration) -> Answer<&Event> {
    const STEP: Duration = Duration::from_millis(5);
    let set = set(handle)?;
    let begun = Instant::now();
    loop {
        if let Some(event) = next(call, &mut lock(&set)) {
            return Ok(event);
        }
        let left = timeout.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(TIMEOUT);
        }
        thread::sleep(left.min(STEP));
    }
}

fn next<'call>(call: &'call Call, set: &mut Set) -> Option<&'call Event> {
    let age = set.created.elapsed();
    let due = |event: &Event| {
        age >= Duration::from_millis(event.after_ms)
            && event.when_file.as_deref().is_none_or(|file| file.exists())
            && set.watched.iter().any(|(gpu, mask)| *gpu == event.gpu && mask & event.kind.bit() != 0)
    };
    let (number, event) =
        call.script.events.iter().enumerate().find(|(number, event)| !set.told.contains(number) && due(event))?;
    set.told.push(number);
    Some(event)
}
