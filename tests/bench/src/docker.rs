//! Recording proxy between a program and Docker: the calls and the time that Docker takes for them.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// A call recorded by a [`Recorder`].
#[derive(Debug)]
pub(crate) struct Call {
    connection: usize,
    sent: Instant,
    /// Time until the response starts; `None` without a response.
    took: Option<Duration>,
    text: Vec<u8>,
}

impl Call {
    /// Returns whether this is a call with this method whose path, without the query, ends with
    /// `end`.
    pub(crate) fn is(&self, method: &str, end: &str) -> bool {
        let text = String::from_utf8_lossy(&self.text);
        let mut words = text.split(' ');
        words.next() == Some(method)
            && words
                .next()
                .is_some_and(|path| path.split('?').next().is_some_and(|path| path.ends_with(end)))
    }

    /// Returns the body of the request.
    pub(crate) fn body(&self) -> String {
        let text = String::from_utf8_lossy(&self.text);
        text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()
    }
}

/// A socket in front of the engine's that records the requests and the engine's response times.
#[derive(Debug)]
pub(crate) struct Recorder {
    socket: PathBuf,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Recorder {
    /// Listens on `socket` and forwards to `engine`.
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

    /// Returns the path of the socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns the calls since the previous `take`, in order.
    pub(crate) fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

/// Returns the engine time of the calls that every launch needs: create, start, and the inspect
/// after the start.
pub(crate) fn needed(calls: &[Call]) -> Duration {
    let started = calls.iter().position(|call| call.is("POST", "/start")).expect("a start call");
    let create =
        calls.iter().find(|call| call.is("POST", "/containers/create")).expect("a create call");
    let look =
        calls[started..].iter().find(|call| call.is("GET", "/json")).expect("an inspect call");
    [create, &calls[started], look].iter().map(|call| call.took.expect("an answer")).sum()
}

/// Records a request. It starts with its method; other data continues the previous request.
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
