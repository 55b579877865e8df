//! Event sets: registrations and waiting.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use crate::{
    code::{Answer, INVALID_ARGUMENT, TIMEOUT},
    dispatch::Call,
    script::Event,
};

/// `nvmlEventSet_t`: a key of [`SETS`], never a real address.
pub(crate) type SetHandle = *mut c_void;

/// One event set.
struct Set {
    created: Instant,
    created_at: SystemTime,
    /// GPU index and mask of each registration.
    watched: Vec<(usize, u64)>,
    /// Number of deliveries of each scripted event, by its index.
    delivered: BTreeMap<usize, u64>,
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
    let set = Set {
        created: Instant::now(),
        created_at: SystemTime::now(),
        watched: Vec::new(),
        delivered: BTreeMap::new(),
    };
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

/// Returns the next event of the set, waiting up to the caller's timeout.
pub(crate) fn wait(call: &Call, handle: SetHandle, timeout: Duration) -> Answer<&Event> {
    const STEP: Duration = Duration::from_millis(5);
    let set = set(handle)?;
    let start = Instant::now();
    loop {
        if let Some(event) = next(call, &mut lock(&set)) {
            return Ok(event);
        }
        let left = timeout.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(TIMEOUT);
        }
        thread::sleep(left.min(STEP));
    }
}

fn next<'call>(call: &'call Call, set: &mut Set) -> Option<&'call Event> {
    let happened = |number: &usize, event: &Event| {
        let due = set.times(event);
        let watched =
            set.watched.iter().any(|(gpu, mask)| *gpu == event.gpu && mask & event.kind.bit() != 0);
        watched && due > set.delivered.get(number).copied().unwrap_or(0)
    };
    let (number, event) =
        call.script.events.iter().enumerate().find(|(number, event)| happened(number, event))?;
    *set.delivered.entry(number).or_default() += 1;
    Some(event)
}

impl Set {
    /// Returns the number of occurrences of the event since the set was created.
    fn times(&self, event: &Event) -> u64 {
        /// File timestamps lag by up to this much.
        const TICK: Duration = Duration::from_millis(20);
        let since = match &event.when_file {
            None => Some(self.created.elapsed()),
            Some(file) => {
                let written = std::fs::metadata(file).and_then(|file| file.modified());
                written
                    .ok()
                    .filter(|at| *at + TICK >= self.created_at)
                    .map(|at| at.elapsed().unwrap_or_default())
            }
        };
        match since.and_then(|since| since.checked_sub(Duration::from_millis(event.after_ms))) {
            None => 0,
            Some(since) => {
                1 + (since.as_micros() * u128::from(event.per_second) / 1_000_000) as u64
            }
        }
    }
}
