//! Between a program and Docker: what is asked for, and how long Docker takes.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// A call that went through a [`Recorder`].
#[derive(Debug)]
pub(crate) struct Call {
    connection: usize,
    sent: Instant,
    /// Until its answer began; nothing where there was none yet.
    took: Option<Duration>,
    text: Vec<u8>,
}

impl Call {
    /// Whether it is this one: `POST`, and how its path ends, without the query.
    pub(crate) fn is(&self, method: &str, end: &str) -> bool {
        let text = String::from_utf8_lossy(&self.text);
        let mut words = text.split(' ');
        words.next() == Some(method)
            && words
                .next()
                .is_some_and(|path| path.split('?').next().is_some_and(|path| path.ends_with(end)))
    }

    /// What it sent after its head.
    pub(crate) fn body(&self) -> String {
        let text = String::from_utf8_lossy(&self.text);
        text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()
    }
}

/// A socket before the engine's, which notes what is sent to it and how long the engine takes.
#[derive(Debug)]
pub(crate) struct Recorder {
    socket: PathBuf,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Recorder {
    /// Listens on `socket` and passes on to `engine`.
    pub(crate) fn start(socket: PathBuf, engine: &Path) -> Self {
        let listener = UnixListener::bind(&socket)
            .unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
        let calls = Arc::new(Mutex::new(Vec::new()));
        let (engine, notes) = (engine.to_owned(), Arc::clone(&calls));
        thread::spawn(move || {
            for (connection, client) in listener.incoming().flatten().enumerate() {
                let Ok(server) = UnixStream::connect(&engine) else { continue };
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let (asked, answered) = (Arc::clone(&notes), Arc::clone(&notes));
                thread::spawn(move || {
                    pass_on(from, to, |bytes| note_request(&asked, connection, bytes))
                });
                thread::spawn(move || {
                    pass_on(server, client, |_| note_answer(&answered, connection))
                });
            }
        });
        Self { socket, calls }
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The calls since this was asked last, in their order.
    pub(crate) fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

/// What no launch can do without, as the engine took it: create, start, and the look at what was
/// started.
pub(crate) fn needed(calls: &[Call]) -> Duration {
    let started = calls.iter().position(|call| call.is("POST", "/start")).expect("it was started");
    let create =
        calls.iter().find(|call| call.is("POST", "/containers/create")).expect("it was created");
    let look =
        calls[started..].iter().find(|call| call.is("GET", "/json")).expect("it was looked at");
    [create, &calls[started], look].iter().map(|call| call.took.expect("an answer")).sum()
}

/// A request begins with its method; what does not is more of the one before.
fn note_request(calls: &Mutex<Vec<Call>>, connection: usize, bytes: &[u8]) {
    let mut calls = calls.lock().unwrap();
    let begins = ["GET ", "HEAD ", "POST ", "DELETE "]
        .iter()
        .any(|method| bytes.starts_with(method.as_bytes()));
    match calls.iter_mut().rev().find(|call| call.connection == connection) {
        Some(call) if !begins => call.text.extend_from_slice(bytes),
        _ => calls.push(Call {
            connection,
            sent: Instant::now(),
            took: None,
            text: bytes.to_owned(),
        }),
    }
}

fn note_answer(calls: &Mutex<Vec<Call>>, connection: usize) {
    let mut calls = calls.lock().unwrap();
    if let Some(call) = calls.iter_mut().rev().find(|call| call.connection == connection) {
        call.took.get_or_insert(call.sent.elapsed());
    }
}

fn pass_on(mut from: UnixStream, mut to: UnixStream, mut note: impl FnMut(&[u8])) {
    let mut buffer = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        note(&buffer[..length]);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
