//! Entry of every call: NVML's initialisation state, the call log, and scripted faults.

use std::{
    env,
    ffi::c_int,
    fs::OpenOptions,
    io::Write,
    os::unix::fs::MetadataExt,
    path::Path,
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, SystemTime},
};

use crate::{
    code::{Answer, Code, NOT_READY, SUCCESS, UNINITIALIZED, UNKNOWN},
    script::Script,
};

/// State of the library between `nvmlInit` and `nvmlShutdown`.
enum State {
    Closed,
    /// The script was missing or invalid: every call fails.
    Broken,
    /// NVML counts initialisations: it needs as many shutdowns.
    Open {
        script: Arc<Script>,
        /// Identity of the script's file.
        stamp: Stamp,
        users: u32,
    },
}

/// Identity of a file: inode and modification time.
type Stamp = Option<(u64, SystemTime)>;

static STATE: Mutex<State> = Mutex::new(State::Closed);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call in progress. It holds no lock, so that a call that hangs does not block others.
pub(crate) struct Call {
    pub(crate) name: &'static str,
    pub(crate) script: Arc<Script>,
}

/// Runs the body of a function other than `nvmlInit`, unless the script injects a fault.
pub(crate) fn dispatch(name: &'static str, body: impl FnOnce(&Call) -> Answer) -> u32 {
    let script = match &mut *state() {
        State::Closed => return UNINITIALIZED.0,
        State::Broken => return UNKNOWN.0,
        State::Open { script, stamp, .. } => {
            reload(script, stamp);
            Arc::clone(script)
        }
    };
    returned(pass(Call { name, script }, body))
}

/// Loads a script that replaced the current file: the GPUs changed while the process runs. An
/// invalid script is ignored.
fn reload(script: &mut Arc<Script>, stamp: &mut Stamp) {
    let now = stamp_of_script();
    if now.is_none() || now == *stamp {
        return;
    }
    *stamp = now;
    match read_script() {
        Ok(new) => *script = Arc::new(new),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "nvml-simulator: {error}");
        }
    }
}

/// `nvmlInit`: reads the script and initialises NVML if the script permits it.
pub(crate) fn open(name: &'static str) -> u32 {
    let stamp = stamp_of_script();
    let script = match read_script() {
        Ok(script) => Arc::new(script),
        Err(error) => {
            // Lost if stderr is closed; the return code is the same.
            let _ = writeln!(std::io::stderr(), "nvml-simulator: {name}: {error}");
            *state() = State::Broken;
            return UNKNOWN.0;
        }
    };
    returned(pass(Call { name, script }, |call| {
        if call.script.ready_file.as_deref().is_some_and(|file| !file.exists()) {
            return Err(NOT_READY);
        }
        let mut state = state();
        let users = match &*state {
            State::Open { users, .. } => users + 1,
            State::Closed | State::Broken => 1,
        };
        *state = State::Open { script: Arc::clone(&call.script), stamp, users };
        Ok(())
    }))
}

/// `nvmlShutdown`: the last one shuts NVML down.
pub(crate) fn close() {
    let mut state = state();
    match &mut *state {
        State::Open { users, .. } if *users > 1 => *users -= 1,
        State::Open { .. } | State::Closed | State::Broken => *state = State::Closed,
    }
}

/// Logs a call that returns no code (`nvmlErrorString`).
pub(crate) fn note(name: &str) {
    if let State::Open { script, .. } = &*state() {
        log(script, name);
    }
}

fn stamp_of_script() -> Stamp {
    let file = std::fs::metadata(env::var_os("NVML_SIMULATOR")?).ok()?;
    Some((file.ino(), file.modified().ok()?))
}

fn read_script() -> Result<Script, String> {
    let path = env::var_os("NVML_SIMULATOR").ok_or("NVML_SIMULATOR is not set")?;
    Script::read(Path::new(&path))
}

fn pass(call: Call, body: impl FnOnce(&Call) -> Answer) -> Answer {
    let script = &call.script;
    let listed = |names: &[String]| names.iter().any(|name| name == call.name);
    log(script, call.name);
    if let Some(delay) = script.delay_ms.get(call.name) {
        thread::sleep(Duration::from_millis(*delay));
    }
    if listed(&script.leave_process) {
        let _ = Command::new("sleep").arg("3600").spawn();
    }
    if listed(&script.flood_stdout) {
        let _ = std::io::stdout().write_all(&[b'x'; 2 << 20]);
    }
    if listed(&script.close_stdout) {
        close_descriptor(1);
    }
    if listed(&script.raise) {
        raise(SIGSEGV);
    }
    if listed(&script.crash) {
        crash();
    }
    while listed(&script.hang) {
        thread::sleep(Duration::from_secs(3600));
    }
    match script.fail.get(call.name) {
        Some(code) => Err(Code(*code)),
        None => body(&call),
    }
}

fn returned(answer: Answer) -> u32 {
    answer.map_or_else(|code| code.0, |()| SUCCESS)
}

fn log(script: &Script, name: &str) {
    let Some(path) = &script.log else { return };
    let written = OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .and_then(|mut file| file.write_all(format!("{name}\n").as_bytes()));
    if let Err(error) = written {
        let _ = writeln!(std::io::stderr(), "nvml-simulator: {}: {error}", path.display());
    }
}

const SIGSEGV: c_int = 11;

unsafe extern "C" {
    safe fn raise(signal: c_int) -> c_int;
    #[link_name = "close"]
    safe fn close_descriptor(descriptor: c_int) -> c_int;
}

/// Terminates by SIGSEGV. The first signal may only reach a handler that restores the default
/// (Rust's handler for stack overflows).
fn crash() -> ! {
    loop {
        raise(SIGSEGV);
    }
}
