//! Docker's API with nothing but a socket between: what the floor is made of, and what the agent asks for.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// More than any call takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// One call in HTTP/1.0, whose answer ends with the connection; gives the body.
pub(crate) fn call(socket: &Path, method: &str, path: &str, body: &str) -> String {
    let exchange = || {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.0\r\nHost: docker\r\nContent-Type: application/json\r\n");
        stream.write_all(format!("{head}Content-Length: {length}\r\n\r\n{body}").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    };
    let answer = exchange().unwrap_or_else(|error: std::io::Error| panic!("{method} {path}: {error}"));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{method} {path}: {answer}"));
    let status = head.split(' ').nth(1).unwrap_or_default();
    assert!(status.starts_with('2'), "{method} {path}: {answer}");
    body.to_owned()
}

/// A socket before the engine's, which notes all that is sent to it.
#[derive(Debug)]
pub(crate) struct Recorder {
    socket: PathBuf,
    sent: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Recorder {
    /// Listens on `socket` and passes on to `engine`.
    pub(crate) fn start(socket: PathBuf, engine: &Path) -> Self {
        let listener = UnixListener::bind(&socket).unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
        let sent = Arc::new(Mutex::new(Vec::new()));
        let (engine, notes) = (engine.to_owned(), Arc::clone(&sent));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = UnixStream::connect(&engine).expect("the engine");
                let number = {
                    let mut notes = notes.lock().unwrap();
                    notes.push(Vec::new());
                    notes.len() - 1
                };
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let notes = Arc::clone(&notes);
                thread::spawn(move || {
                    pass_on(from, to, |bytes| notes.lock().unwrap()[number].extend_from_slice(bytes))
                });
                thread::spawn(move || pass_on(server, client, |_| {}));
            }
        });
        Self { socket, sent }
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The calls so far: method, path without the version, and body.
    pub(crate) fn calls(&self) -> Vec<(String, String, String)> {
        let sent = self.sent.lock().unwrap();
        sent.iter().flat_map(|bytes| requests_in(&String::from_utf8_lossy(bytes))).collect()
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

/// The requests that were sent over one connection, one after the other, each with a length or without a body.
fn requests_in(mut text: &str) -> Vec<(String, String, String)> {
    let mut requests = Vec::new();
    while let Some((head, rest)) = text.split_once("\r\n\r\n") {
        let mut words = head.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        // "/v1.41/containers/create"
        let path = match path.strip_prefix("/v").and_then(|rest| rest.split_once('/')) {
            Some((_, path)) => format!("/{path}"),
            None => path.to_owned(),
        };
        let length =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let (body, next) = rest.split_at(length.unwrap_or(0));
        requests.push((method.to_owned(), path, body.to_owned()));
        text = next;
    }
    requests
}
