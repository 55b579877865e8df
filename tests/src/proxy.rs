//! Fault injection for the Docker API: a proxy with a Unix socket in front of a real engine's
//! socket that forwards every call and applies faults to some.

use std::{
    fs, io,
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};

use crate::sandbox::Sandbox;

/// More than the head of any request.
const MAX_HEAD_BYTES: usize = 64 * 1024;

/// Fault applied to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Answers with 500; the engine does not receive the call.
    Refuse,
    /// Neither forwards nor answers the call until [`DockerProxy::clear_faults`].
    Hang,
    /// Forwards the call after this time.
    Delay(Duration),
    /// Forwards the call and cuts the connection after the first bytes of the response.
    Truncate,
}

/// The proxy. Its listener ends with the test's process; dropping it ends the open calls.
#[derive(Debug)]
pub struct DockerProxy {
    sandbox: Sandbox,
    upstream: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    calls: Vec<String>,
    faulty: Option<(Faulty, Fault)>,
    /// Number of calls that hang.
    hanging: usize,
    /// Every open connection, to the agent and to the engine.
    open: Vec<Weak<UnixStream>>,
}

#[derive(Debug, PartialEq, Eq)]
enum Faulty {
    Nth(usize),
    Kind(String),
    Every,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DockerProxy {
    /// Creates a proxy for the engine that listens on `upstream`, now or later.
    ///
    /// # Panics
    /// If the socket cannot be created.
    #[must_use]
    pub fn start(upstream: &Path) -> Self {
        let proxy = Self {
            sandbox: Sandbox::new("proxy"),
            upstream: upstream.to_owned(),
            shared: Arc::default(),
        };
        proxy.listen();
        proxy
    }

    fn listen(&self) {
        let listener = UnixListener::bind(self.socket()).expect("the proxy's socket");
        let (shared, upstream) = (Arc::clone(&self.shared), self.upstream.clone());
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let (shared, upstream) = (Arc::clone(&shared), upstream.clone());
                thread::spawn(move || {
                    let client = Arc::new(client);
                    // Broken connections are expected here.
                    let _ = shared.serve(&client, &upstream);
                    let _ = client.shutdown(Shutdown::Both);
                });
            }
        });
    }

    /// Replaces the socket file with a new socket.
    ///
    /// # Panics
    /// If it cannot be created.
    pub fn recreate_socket(&self) {
        fs::remove_file(self.socket()).expect("the proxy's socket");
        self.cut();
        self.listen();
    }

    /// Returns the path of the socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.sandbox.join("docker.sock")
    }

    /// Calls since the last change of the faults, in order: `POST /containers/create`.
    #[must_use]
    pub fn calls(&self) -> Vec<String> {
        self.shared.lock().calls.clone()
    }

    /// Returns the number of calls that hang now.
    #[must_use]
    pub fn hanging(&self) -> usize {
        self.shared.lock().hanging
    }

    /// Applies a fault to the call with this index, counted from 0 from now on.
    pub fn fault_at(&self, number: usize, fault: Fault) {
        self.set(Some((Faulty::Nth(number), fault)));
    }

    /// Applies a fault to every call of this name, `POST /containers/create`.
    pub fn fault_of(&self, kind: &str, fault: Fault) {
        self.set(Some((Faulty::Kind(kind.to_owned()), fault)));
    }

    /// Applies a fault to every call.
    pub fn fault_always(&self, fault: Fault) {
        self.set(Some((Faulty::Every, fault)));
    }

    /// Removes all faults and forwards every call, including those that hang.
    pub fn clear_faults(&self) {
        self.set(None);
    }

    fn set(&self, faulty: Option<(Faulty, Fault)>) {
        let mut state = self.shared.lock();
        state.calls.clear();
        state.faulty = faulty;
        self.shared.changed.notify_all();
    }

    /// Cuts all open connections.
    pub fn cut(&self) {
        for stream in self.shared.lock().open.drain(..).filter_map(|stream| stream.upgrade()) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for DockerProxy {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.socket());
        self.clear_faults();
        self.cut();
    }
}

impl Shared {
    fn serve(&self, client: &Arc<UnixStream>, upstream: &Path) -> io::Result<()> {
        let (head, body) = read_head(client)?;
        let fault = self.begin(name_of(&head), client);
        match fault {
            Some(Fault::Refuse) => return refuse(client),
            Some(Fault::Hang) if !self.hang(client)? => return Ok(()),
            Some(Fault::Delay(time)) => thread::sleep(time),
            Some(Fault::Hang | Fault::Truncate) | None => {}
        }
        let engine = Arc::new(UnixStream::connect(upstream)?);
        self.lock().open.push(Arc::downgrade(&engine));
        // Makes the engine close the connection after one call, so that the next call passes the
        // proxy too.
        let head = head.replacen("\r\n", "\r\nConnection: close\r\n", 1);
        (&*engine).write_all(head.as_bytes())?;
        (&*engine).write_all(&body)?;
        if fault == Some(Fault::Truncate) {
            let mut first = [0; 64];
            let length = (&*engine).read(&mut first)?;
            return (&**client).write_all(&first[..length]);
        }
        let (from_client, to_engine) = (Arc::clone(client), Arc::clone(&engine));
        thread::spawn(move || {
            let _ = io::copy(&mut &*from_client, &mut &*to_engine);
            let _ = to_engine.shutdown(Shutdown::Both);
        });
        io::copy(&mut &*engine, &mut &**client).map(|_| ())
    }

    /// Records the call and returns its fault.
    fn begin(&self, call: String, client: &Arc<UnixStream>) -> Option<Fault> {
        let mut state = self.lock();
        let number = state.calls.len();
        let is_this = |faulty: &Faulty| match faulty {
            Faulty::Nth(wanted) => *wanted == number,
            Faulty::Kind(kind) => *kind == call,
            Faulty::Every => true,
        };
        let fault =
            state.faulty.as_ref().filter(|(faulty, _)| is_this(faulty)).map(|(_, fault)| *fault);
        state.calls.push(call);
        state.open.retain(|stream| stream.strong_count() > 0);
        state.open.push(Arc::downgrade(client));
        fault
    }

    /// Waits until the faults are cleared. Returns whether the client still waits.
    fn hang(&self, client: &UnixStream) -> io::Result<bool> {
        let mut state = self.lock();
        state.hanging += 1;
        let waited = self.changed.wait_while(state, |state| state.faulty.is_some());
        waited.unwrap_or_else(PoisonError::into_inner).hanging -= 1;
        // A client that has given up has closed its end.
        client.set_nonblocking(true)?;
        let given_up = matches!((&*client).read(&mut [0]), Ok(0));
        client.set_nonblocking(false)?;
        Ok(!given_up)
    }
}

fn refuse(mut client: &UnixStream) -> io::Result<()> {
    let message = r#"{"message":"injected fault"}"#;
    let length = message.len();
    write!(
        client,
        "HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\
         Connection: close\r\n\r\n{message}"
    )
}

/// Reads the head of a request and the part of the body that arrived with it.
fn read_head(mut client: &UnixStream) -> io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    while bytes.len() < MAX_HEAD_BYTES {
        let length = client.read(&mut buffer)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&buffer[..length]);
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let body = bytes.split_off(end + 4);
            return Ok((String::from_utf8_lossy(&bytes).into_owned(), body));
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

/// Returns the name of a call: `POST /containers/create` for `POST /v1.41/containers/create?name=x
/// HTTP/1.1`; IDs and names become `*`.
fn name_of(head: &str) -> String {
    let mut words = head.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split('?').next().unwrap_or_default();
    let mut parts: Vec<&str> = path.split('/').skip(1).collect();
    if parts.first().is_some_and(|first| first.starts_with("v1.")) {
        parts.remove(0);
    }
    if parts.len() > 1 && !["create", "json"].contains(&parts[1]) {
        parts[1] = "*";
    }
    format!("{method} /{}", parts.join("/"))
}

#[test]
fn call_name_omits_version_id_and_query() {
    assert_eq!(name_of("GET /version HTTP/1.1\r\n"), "GET /version");
    assert_eq!(
        name_of("POST /v1.41/containers/create?name=x HTTP/1.1\r\n"),
        "POST /containers/create"
    );
    assert_eq!(name_of("GET /v1.41/containers/ab12/json HTTP/1.1\r\n"), "GET /containers/*/json");
    assert_eq!(name_of("GET /v1.41/containers/json?all=1 HTTP/1.1\r\n"), "GET /containers/json");
    assert_eq!(name_of("DELETE /containers/ab12 HTTP/1.1\r\n"), "DELETE /containers/*");
}
