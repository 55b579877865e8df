//! Simulator of OneGate: a real HTTP server that replies as OpenNebula's does, fails as scripted,
//! and records its requests.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::{
    net::{Shutdown, listen, shutdown},
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

mod state;

pub use state::{Service, Shape, State, Vm};

/// Number of agents that may connect at the same time.
const BACKLOG: i32 = 4096;

/// Clients send a request and read its reply at once; slower ones are disconnected.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Interval at which a connection that is held open checks whether OneGate was stopped.
const STEP: Duration = Duration::from_millis(100);

/// Scripted reply to a request.
#[derive(Debug, Clone)]
pub enum Reply {
    /// The regular reply.
    Regular,
    /// This status and text, with OneGate's JSON content type.
    Status(u16, String),
    /// A redirect, 302, to this address.
    Redirect(String),
    /// These bytes instead of HTTP.
    Bytes(Vec<u8>),
    /// Half of the regular reply's body, then closes the connection.
    HalfBody,
    /// A body of spaces without an end.
    Endless,
    /// The regular reply at one byte per second.
    Slow,
    /// Closes the connection without a reply.
    Close,
    /// Keeps the connection open without a reply.
    Hang,
}

/// A received request.
#[derive(Debug, Clone)]
pub struct Request {
    /// Time at which it was complete.
    pub at: Instant,
    /// `GET`, `PUT`.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names and values, in order.
    pub headers: Vec<(String, String)>,
    /// The body; empty if it was chunked.
    pub body: String,
}

impl Request {
    /// Returns the path without the query.
    #[must_use]
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// Returns the value of a header; the name is case-insensitive.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    /// Returns the ID of the VM that the request claims to be from.
    #[must_use]
    pub fn vm_id(&self) -> Option<u32> {
        self.header("X-ONEGATE-VMID")?.parse().ok()
    }

    /// Returns the decoded text of an update (one `K=V` per line); `None` for any other request.
    #[must_use]
    pub fn update(&self) -> Option<String> {
        if self.method == "PUT" { self.form("data") } else { None }
    }

    /// Returns whether this update sets OneFlow's ready gate.
    #[must_use]
    pub fn sets_ready_gate(&self) -> bool {
        self.update().is_some_and(|text| text.contains("READY=YES"))
    }

    /// Returns the decoded form field of the body.
    fn form(&self, name: &str) -> Option<String> {
        let mut pairs = self.body.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(known, _)| *known == name).map(|(_, value)| decoded(value))
    }

    /// Returns whether a script for this route applies to this request.
    fn matches_route(&self, route: &str) -> bool {
        route == "*" || route.split_once(' ') == Some((&self.method, self.path()))
    }
}

/// A running OneGate; stopped on drop.
#[derive(Debug)]
pub struct OneGateSimulator {
    shared: Arc<Mutex<Shared>>,
    namespace: Option<String>,
    address: SocketAddr,
    listening: Option<Listening>,
}

#[derive(Debug, Default)]
struct Shared {
    state: State,
    scripts: Vec<(String, VecDeque<Reply>)>,
    requests: Vec<Request>,
}

#[derive(Debug)]
struct Listening {
    socket: TcpListener,
    stopped: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl OneGateSimulator {
    /// Starts OneGate on the loopback interface, without VMs.
    ///
    /// # Panics
    /// If it cannot listen.
    #[must_use]
    #[track_caller]
    pub fn start() -> Self {
        Self::start_at(None, Ipv4Addr::LOCALHOST.into())
    }

    /// Starts OneGate in a network namespace (a name in /run/netns) on an existing address.
    ///
    /// # Panics
    /// If it cannot listen.
    #[must_use]
    #[track_caller]
    pub fn start_in(namespace: &str, address: IpAddr) -> Self {
        Self::start_at(Some(namespace.to_owned()), address)
    }

    #[track_caller]
    fn start_at(namespace: Option<String>, address: IpAddr) -> Self {
        // Each connection is a file descriptor; the default limit is 1024.
        let limit = getrlimit(Resource::Nofile);
        let _ =
            setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
        let address = SocketAddr::new(address, 0);
        let mut onegate = Self { shared: Arc::default(), namespace, address, listening: None };
        onegate.restart();
        onegate
    }

    /// Stops listening: connections are refused. Open requests end without a reply.
    pub fn stop(&mut self) {
        if let Some(Listening { socket, stopped, thread }) = self.listening.take() {
            stopped.store(true, Ordering::Relaxed);
            // Wakes the thread that accepts connections.
            let _ = shutdown(&socket, Shutdown::Both);
            let _ = thread.join();
        }
    }

    /// Listens again on the previous address.
    ///
    /// # Panics
    /// If it cannot listen.
    #[track_caller]
    pub fn restart(&mut self) {
        self.stop();
        let listening = listen_at(self.namespace.as_deref(), self.address, &self.shared);
        let listening =
            listening.unwrap_or_else(|error| panic!("OneGate at {}: {error}", self.address));
        self.address = listening.socket.local_addr().expect("the address of a socket");
        self.listening = Some(listening);
    }

    /// Returns the value for ONEGATE_ENDPOINT.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the listening address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Reads or changes OneGate's state between two requests.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut lock(&self.shared).state)
    }

    /// Sets the replies to the next requests for a route (`GET /service`, without the query) or for
    /// all routes (`*`). Scripts apply in the order in which they were added; after the last reply
    /// the replies are regular again.
    pub fn script(&self, route: &str, replies: impl IntoIterator<Item = Reply>) {
        lock(&self.shared).scripts.push((route.to_owned(), replies.into_iter().collect()));
    }

    /// Removes all scripts.
    pub fn clear_scripts(&self) {
        lock(&self.shared).scripts.clear();
    }

    /// Requests so far, in order.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.shared).requests.clone()
    }

    /// Returns the highest number of requests within any one second.
    #[must_use]
    pub fn peak_requests_per_second(&self) -> usize {
        let times: Vec<Instant> =
            lock(&self.shared).requests.iter().map(|request| request.at).collect();
        peak_per_second(&times)
    }
}

impl Drop for OneGateSimulator {
    fn drop(&mut self) {
        self.stop();
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `times` is in ascending order.
fn peak_per_second(times: &[Instant]) -> usize {
    let mut first = 0;
    let mut peak = 0;
    for (last, time) in times.iter().enumerate() {
        while time.duration_since(times[first]) >= Duration::from_secs(1) {
            first += 1;
        }
        peak = peak.max(last + 1 - first);
    }
    peak
}

/// Starts a thread that enters the namespace and listens there, with a thread per connection.
fn listen_at(
    namespace: Option<&str>,
    address: SocketAddr,
    shared: &Arc<Mutex<Shared>>,
) -> io::Result<Listening> {
    let namespace = namespace.map(|name| PathBuf::from("/run/netns").join(name));
    let stopped = Arc::new(AtomicBool::new(false));
    let (bound, receive) = mpsc::channel();
    let bind = move || {
        if let Some(path) = namespace {
            move_into_link_name_space(File::open(path)?.as_fd(), Some(LinkNameSpaceType::Network))?;
        }
        let socket = TcpListener::bind(address)?;
        // Called again because std listens with a backlog of 128.
        listen(&socket, BACKLOG)?;
        Ok((socket.try_clone()?, socket))
    };
    let connection = Connection { shared: shared.clone(), stopped: stopped.clone() };
    let thread = thread::spawn(move || {
        let socket = match bind() {
            Ok((ours, theirs)) => {
                let _ = bound.send(Ok(theirs));
                ours
            }
            Err(error) => {
                let _ = bound.send(Err(error));
                return;
            }
        };
        while !connection.stopped.load(Ordering::Relaxed) {
            let Ok((stream, _)) = socket.accept() else {
                // The client has disconnected, or there are no free file descriptors.
                thread::sleep(STEP / 10);
                continue;
            };
            let connection = connection.clone();
            // If no thread can be started, the connection is closed.
            let _ = thread::Builder::new().stack_size(256 << 10).spawn(move || {
                // Connection errors are ignored: the test inspects the client.
                let _ = connection.serve(&stream);
            });
        }
    });
    let socket =
        receive.recv().unwrap_or_else(|_| Err(io::Error::other("the listening thread ended")))?;
    Ok(Listening { socket, stopped, thread })
}

/// State for serving one connection, which carries one request.
#[derive(Clone)]
struct Connection {
    shared: Arc<Mutex<Shared>>,
    stopped: Arc<AtomicBool>,
}

impl Connection {
    fn serve(&self, mut stream: &TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let request = read_request(stream)?;
        let chunked = request.header("Transfer-Encoding").is_some();
        let reply = self.record(&request);
        let regular = || match request.method.as_str() {
            // The HTTP server in front of the real OneGate does not support chunked requests.
            "PUT" if chunked || request.header("Content-Length").is_none() => {
                (411, "Length Required".to_owned())
            }
            _ => lock(&self.shared).state.answer(&request),
        };
        match reply {
            Reply::Regular => stream.write_all(http(regular()).as_bytes()),
            Reply::Status(status, text) => stream.write_all(http((status, text)).as_bytes()),
            Reply::Redirect(location) => stream.write_all(
                head(302, &format!("Content-Length: 0\r\nLocation: {location}\r\n")).as_bytes(),
            ),
            Reply::Bytes(bytes) => stream.write_all(&bytes),
            Reply::HalfBody => {
                let (status, body) = regular();
                stream.write_all(head(status, &content_length(body.len().max(1))).as_bytes())?;
                stream.write_all(&body.as_bytes()[..body.len() / 2])
            }
            Reply::Endless => {
                stream.write_all(head(200, "").as_bytes())?;
                stream.set_write_timeout(Some(STEP))?;
                self.unless_stopped(STEP / 10, || match stream.write(&[b' '; 64 << 10]) {
                    Err(error) if !waits(&error) => Err(error),
                    _ => Ok(true),
                })
            }
            Reply::Slow => {
                let answer = http(regular());
                let mut bytes = answer.bytes();
                self.unless_stopped(Duration::from_secs(1), || match bytes.next() {
                    Some(byte) => stream.write_all(&[byte]).map(|()| true),
                    None => Ok(false),
                })
            }
            Reply::Close => Ok(()),
            Reply::Hang => {
                stream.set_read_timeout(Some(STEP))?;
                self.unless_stopped(Duration::ZERO, || match stream.read(&mut [0; 64]) {
                    Ok(length) => Ok(length > 0),
                    Err(error) if waits(&error) => Ok(true),
                    Err(error) => Err(error),
                })
            }
        }
    }

    /// Records the request and returns its scripted reply.
    fn record(&self, request: &Request) -> Reply {
        let mut shared = lock(&self.shared);
        let Shared { scripts, requests, .. } = &mut *shared;
        // The time is taken under the lock, so that requests are ordered by time.
        requests.push(Request { at: Instant::now(), ..request.clone() });
        let mut queues = scripts.iter_mut().filter(|(route, _)| request.matches_route(route));
        queues.find_map(|(_, replies)| replies.pop_front()).unwrap_or(Reply::Regular)
    }

    /// Repeats a step with a delay until it returns false or OneGate is stopped.
    fn unless_stopped(
        &self,
        interval: Duration,
        mut step: impl FnMut() -> io::Result<bool>,
    ) -> io::Result<()> {
        while !self.stopped.load(Ordering::Relaxed) && step()? {
            thread::sleep(interval);
        }
        Ok(())
    }
}

fn waits(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn read_request(stream: &TcpStream) -> io::Result<Request> {
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.strip_suffix("\r\n").ok_or_else(bad)? {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let mut lines = lines.iter();
    let first: Vec<&str> = lines.next().ok_or_else(bad)?.split(' ').collect();
    let [method, target, _version] = first[..] else {
        return Err(bad());
    };
    let header = |line: &String| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_owned(), value.trim().to_owned()))
    };
    let mut request = Request {
        at: Instant::now(),
        method: method.to_owned(),
        target: target.to_owned(),
        headers: lines.filter_map(header).collect(),
        body: String::new(),
    };
    let length =
        request.header("Content-Length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    request.body = String::from_utf8_lossy(&body).into_owned();
    Ok(request)
}

/// Renders the head of a reply with additional header lines.
fn head(status: u16, more: &str) -> String {
    format!(
        "HTTP/1.1 {status} Status {status}\r\nContent-Type: application/json;charset=utf-8\r\n\
         {more}Connection: close\r\n\r\n"
    )
}

fn content_length(length: usize) -> String {
    format!("Content-Length: {length}\r\n")
}

fn http((status, body): (u16, String)) -> String {
    head(status, &content_length(body.len())) + &body
}

/// Decodes form encoding.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|code| std::str::from_utf8(code).ok());
        match (first, code.and_then(|code| u8::from_str_radix(code, 16).ok())) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
                continue;
            }
            (b'+', _) => bytes.push(b' '),
            (byte, _) => bytes.push(*byte),
        }
        rest = after;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_form_encoding() {
        assert_eq!(decoded("K%3DV+1%0aK2=%22%22"), "K=V 1\nK2=\"\"");
        assert_eq!(decoded("100%"), "100%");
    }

    #[test]
    fn peak_second_may_start_at_any_instant() {
        let begin = Instant::now();
        let at = |milliseconds: &[u64]| -> Vec<Instant> {
            milliseconds.iter().map(|after| begin + Duration::from_millis(*after)).collect()
        };
        assert_eq!(peak_per_second(&at(&[])), 0);
        assert_eq!(peak_per_second(&at(&[0, 900, 999, 1000, 1899, 3000])), 4);
    }
}
