//! Tests of the client against scripted servers, one connection after another.

use std::error::Error;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::*;

const TOKEN: &str = "aZ09+/_-==";
const VM: &str = r#"{"VM":{"NAME":"supernode_0","ID":"101","STATE":"3","LCM_STATE":"3"}}"#;
/// Upper limit for a reply between two processes on one machine.
const LONG_TIMEOUT: Duration = Duration::from_secs(20);
const SHORT_TIMEOUT: Duration = Duration::from_millis(300);

/// What a server sends after it has read a request.
enum Reply {
    /// These bytes; then it closes the connection.
    Close(Vec<u8>),
    /// These bytes; then nothing.
    Hang(Vec<u8>),
    /// These bytes, and then a piece repeatedly at an interval.
    Repeat(Vec<u8>, Vec<u8>, Duration),
}

/// Returns a complete reply. OneGate always declares JSON, whatever it sends.
fn reply(status: u16, body: &str) -> Reply {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: application/json;charset=utf-8\r\n\
         Content-Length: {length}\r\n\r\n"
    );
    Reply::Close((head + body).into_bytes())
}

fn raw(bytes: &str) -> Reply {
    Reply::Close(bytes.as_bytes().to_vec())
}

struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    async fn start(script: Vec<Reply>) -> Self {
        Self::listen(script, None).await
    }

    async fn start_tls(script: Vec<Reply>) -> Self {
        let certificate = CertificateDer::from_pem_file(tls_file("server.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(tls_file("server.key")).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        Self::listen(script, Some(TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn listen(script: Vec<Reply>, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        tokio::spawn(async move {
            for reply in script {
                let (stream, _) = listener.accept().await.unwrap();
                match &tls {
                    None => serve(stream, reply, &seen).await,
                    Some(acceptor) => {
                        if let Ok(stream) = acceptor.accept(stream).await {
                            serve(stream, reply, &seen).await;
                        }
                    }
                }
            }
        });
        Self { address, requests }
    }

    fn client(&self) -> OneGate {
        self.client_with_timeout(LONG_TIMEOUT)
    }

    fn client_with_timeout(&self, timeout: Duration) -> OneGate {
        OneGate::new(&format!("http://{}", self.address), "101", Secret::new(TOKEN), None, timeout)
            .unwrap()
    }

    fn tls_client(&self, host: &str, ca_file: &Path) -> OneGate {
        let endpoint = format!("https://{host}:{}/", self.address.port());
        OneGate::new(&endpoint, "101", Secret::new(TOKEN), Some(ca_file), LONG_TIMEOUT).unwrap()
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

/// Reads one request and replies. The client may close the connection early.
async fn serve(
    mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin,
    reply: Reply,
    seen: &Mutex<Vec<String>>,
) {
    let mut request = Vec::new();
    while !is_complete(&request) {
        let mut piece = [0; 1024];
        match stream.read(&mut piece).await {
            Ok(length) if length > 0 => request.extend_from_slice(&piece[..length]),
            _ => return,
        }
    }
    seen.lock().unwrap().push(String::from_utf8(request).unwrap());
    match reply {
        Reply::Close(bytes) => {
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
        }
        Reply::Hang(bytes) => {
            let _ = stream.write_all(&bytes).await;
            tokio::time::sleep(LONG_TIMEOUT * 10).await;
        }
        Reply::Repeat(head, piece, interval) => {
            let _ = stream.write_all(&head).await;
            while stream.write_all(&piece).await.is_ok() {
                tokio::time::sleep(interval).await;
            }
        }
    }
}

fn is_complete(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    body.len() >= length.map_or(0, |length| length.parse().unwrap())
}

fn tls_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls").join(name)
}

/// Returns the error of `GET /vm` for this reply.
async fn error_of(reply: Reply) -> OneGateError {
    let server = Server::start(vec![reply]).await;
    server.client().vm().await.unwrap_err()
}

/// Returns an error and its causes as one line.
fn chain(error: &OneGateError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[track_caller]
fn assert_invalid_http(error: &OneGateError) {
    assert!(
        matches!(error, OneGateError::RequestFailed { source: RequestError::InvalidHttp(_), .. }),
        "{error:?}"
    );
    assert!(!error.is_final());
}

fn client_of(
    endpoint: &str,
    vm_id: &str,
    token: &str,
    ca_file: Option<&Path>,
) -> Result<OneGate, OneGateError> {
    OneGate::new(endpoint, vm_id, Secret::new(token), ca_file, LONG_TIMEOUT)
}

#[tokio::test]
async fn requests_have_route_token_and_vm_id() {
    let service = r#"{"SERVICE":{"id":"7","name":"flower"}}"#;
    let replies = vec![reply(200, VM), reply(200, VM), reply(200, service), reply(200, service)];
    let server = Server::start(replies).await;
    let client = server.client();
    assert_eq!(client.vm().await.unwrap().id, 101);
    assert_eq!(client.vm_of_service(100).await.unwrap().name, "supernode_0");
    assert_eq!(client.service().await.unwrap().id, 7);
    assert_eq!(client.service_with_attributes().await.unwrap().name, "flower");
    let expected = ["/vm", "/vms/100", "/service", "/service?extended=true"].map(|route| {
        format!(
            "GET {route} HTTP/1.1\r\nhost: {}\r\nx-onegate-token: {TOKEN}\r\n\
             x-onegate-vmid: 101\r\nconnection: close\r\n\r\n",
            server.address
        )
    });
    assert_eq!(server.requests(), expected);
}

#[tokio::test]
async fn update_is_one_form_with_length() {
    let server = Server::start(vec![reply(200, "")]).await;
    let attributes = [
        ("FL_NODE_ID", "101".to_owned()),
        ("FL_GPU_NAME", "A, B".to_owned()),
        ("FL_X", String::new()),
    ];
    server.client().publish(&attributes).await.unwrap();
    let expected = format!(
        "PUT /vm HTTP/1.1\r\nhost: {}\r\nx-onegate-token: {TOKEN}\r\n\
         x-onegate-vmid: 101\r\nconnection: close\r\n\
         content-type: application/x-www-form-urlencoded\r\ncontent-length: 73\r\n\r\n\
         data=FL_NODE_ID%3D101%0AFL_GPU_NAME%3DQSwgQg%3D%3D%0AFL_X%3D%22%22&type=1",
        server.address
    );
    assert_eq!(server.requests(), [expected]);
}

#[tokio::test]
async fn invalid_attribute_name_is_not_sent() {
    let server = Server::start(vec![reply(200, "")]).await;
    let error = server.client().publish(&[("fl_x", String::new())]).await.unwrap_err();
    assert!(matches!(error, OneGateError::InvalidAttribute { .. }) && error.is_final(), "{error}");
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn endpoint_path_precedes_route() {
    let server = Server::start(vec![reply(200, VM)]).await;
    let client =
        client_of(&format!("http://{}/path/gate/", server.address), "101", TOKEN, None).unwrap();
    client.vm().await.unwrap();
    assert!(server.requests()[0].starts_with("GET /path/gate/vm HTTP/1.1\r\n"));
}

#[tokio::test]
async fn rejection_has_probable_cause_and_reply() {
    for (status, text, meaning) in [
        (401, "Not authorized", "the token is invalid for this VM, or OneGate cannot reach oned"),
        (
            400,
            "Service 7 does not contain VM 101",
            "OneFlow has not registered this VM yet, or it belongs to another service",
        ),
        (400, "Service 7 is empty.", "OneFlow has not registered the VMs of this service yet"),
        (400, "Bad request", "OneGate does not accept this request"),
        (
            403,
            "Action (update) on resource (vm) not supported",
            "OneGate's configuration does not allow it",
        ),
        (404, "Service 7 not found", "the service does not exist, or OneFlow is down"),
        (
            404,
            "[one.vm.info] Error getting virtual machine [101].",
            "the VM does not exist, or this server is not OneGate",
        ),
        (500, "syntax error", "OpenNebula rejected the request, or OneGate failed"),
        (502, "Bad Gateway", "the proxy cannot reach OneGate"),
        (418, "teapot", "a status that OneGate does not use"),
    ] {
        let server = Server::start(vec![reply(status, text)]).await;
        let error = server.client().vm().await.unwrap_err();
        let expected = format!(
            "GET http://{}/vm: HTTP {status}: {meaning}; OneGate replied: {text}",
            server.address
        );
        assert_eq!(error.to_string(), expected);
        assert!(!error.is_final());
    }
}

#[tokio::test]
async fn vm_without_service_is_final() {
    let server = Server::start(vec![reply(400, "Empty or invalid SERVICE_ID")]).await;
    let error = server.client().service().await.unwrap_err();
    assert!(matches!(error, OneGateError::NotInService) && error.is_final());
    let error = error_of(reply(500, "Empty or invalid SERVICE_ID")).await;
    assert!(matches!(error, OneGateError::Rejected { status: 500, .. }) && !error.is_final());
}

#[tokio::test]
async fn client_recovers_after_rejections() {
    let server = Server::start(vec![
        reply(404, "Service 7 not found"),
        reply(401, "Not authorized"),
        reply(200, VM),
    ])
    .await;
    let client = server.client();
    assert!(!client.vm().await.unwrap_err().is_final());
    assert!(!client.vm().await.unwrap_err().is_final());
    assert_eq!(client.vm().await.unwrap().id, 101);
}

#[tokio::test]
async fn excerpt_is_short_and_on_one_line() {
    let text = format!("\u{1b}[31m\r\nevil\t\u{202e}\0\"{}", "x".repeat(100_000));
    for status in [500, 200] {
        let message = chain(&error_of(reply(status, &text)).await);
        assert!(message.contains(r#"\u{1b}[31m\r\nevil\t\u{202e}\0"xxx"#), "{message}");
        assert!(message.chars().count() < 450 && message.contains("x…"), "{message}");
    }
    assert!(error_of(reply(500, " \n")).await.to_string().ends_with("OneGate replied: (empty)"));
}

#[tokio::test]
async fn token_is_never_printed() {
    let echo = format!("You sent X-ONEGATE-TOKEN: {TOKEN}");
    let server = Server::start(vec![reply(500, &echo), reply(200, &echo)]).await;
    let client = server.client();
    assert!(!format!("{client:?}").contains(TOKEN), "{client:?}");
    for _ in 0..2 {
        let error = client.vm().await.unwrap_err();
        let printed = format!("{} {error:?}", chain(&error));
        assert!(
            !printed.contains(TOKEN) && printed.contains("X-ONEGATE-TOKEN: (token)"),
            "{printed}"
        );
    }
}

#[tokio::test]
async fn redirect_is_neither_followed_nor_printed() {
    for status in [301, 302, 303, 307, 308] {
        let other = Server::start(vec![reply(200, VM)]).await;
        let location = format!(
            "HTTP/1.1 {status} X\r\nLocation: http://{}/vm\r\nContent-Length: 0\r\n\r\n",
            other.address
        );
        let error = error_of(raw(&location)).await;
        assert!(
            matches!(error, OneGateError::Redirected { status: found, .. } if found == status),
            "{error:?}"
        );
        assert!(error.to_string().contains(&status.to_string()) && !error.is_final());
        assert!(!format!("{error} {error:?}").contains(&other.address.to_string()));
        assert!(other.requests().is_empty());
    }
}

#[tokio::test]
async fn unexpected_reply_is_an_error_with_excerpt() {
    let error = error_of(reply(200, "<html>Welcome to nginx!")).await;
    assert!(
        chain(&error).contains("/vm: unexpected reply: <html>Welcome to nginx!: invalid JSON"),
        "{error}"
    );
    assert!(!error.is_final());
    let error = error_of(reply(200, r#"{"SERVICE":{}}"#)).await;
    assert!(chain(&error).ends_with(r#"{"SERVICE":{}}: missing VM"#), "{error}");
    let error = error_of(raw("HTTP/1.1 204 No Content\r\n\r\n")).await;
    assert!(matches!(error, OneGateError::UnexpectedReply { .. }), "{error:?}");
}

#[tokio::test]
async fn chunked_and_unframed_replies_are_read() {
    let (start, end) = VM.split_at(10);
    let chunked =
        format!("{:x}\r\n{start}\r\n{:x};x=y\r\n{end}\r\n0\r\n\r\n", start.len(), end.len());
    let server = Server::start(vec![
        raw(&format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunked}")),
        raw(&format!("HTTP/1.1 200 OK\r\n\r\n{VM}")),
        raw(&format!("HTTP/1.0 200 OK\r\n\r\n{VM}")),
    ])
    .await;
    for _ in 0..3 {
        assert_eq!(server.client().vm().await.unwrap().id, 101);
    }
}

#[tokio::test]
async fn incomplete_reply_is_an_error() {
    for incomplete in [
        "",
        "HTTP/1.1 2",
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"VM\":{\"ID\":1}}",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n{\"VM\":{\"ID\":1}}\r\n",
        "HTTP/1.1 401 X\r\nContent-Length: 1000\r\n\r\nNot authorized",
    ] {
        assert_invalid_http(&error_of(raw(incomplete)).await);
    }
    let error =
        error_of(raw("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{\"VM\":{\"ID\":1}}")).await;
    assert!(matches!(error, OneGateError::UnexpectedReply { .. }), "{error:?}");
}

#[tokio::test]
async fn invalid_http_is_an_error() {
    for garbage in [
        "SSH-2.0-OpenSSH_9.6\r\n",
        "\0\u{1}\u{2}\u{3}\r\n\r\n",
        "HTTP/1.1 abc\r\n\r\n",
        "{\"VM\":{\"ID\":1}}",
        "HTTP/2 200\r\n\r\n",
    ] {
        assert_invalid_http(&error_of(raw(garbage)).await);
    }
    for length in ["x", "-1", "18446744073709551616", "1\r\nContent-Length: 2"] {
        assert_invalid_http(
            &error_of(raw(&format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{VM}")))
                .await,
        );
    }
}

#[tokio::test]
async fn huge_head_is_an_error() {
    assert_invalid_http(
        &error_of(raw(&format!("HTTP/1.1 200 OK\r\nA: {}\r\n\r\n", "x".repeat(4_000_000)))).await,
    );
    assert_invalid_http(
        &error_of(raw(&format!("HTTP/1.1 200 OK\r\n{}\r\n", "A: b\r\n".repeat(10_000)))).await,
    );
    let endless =
        Reply::Repeat(b"HTTP/1.1 200 OK\r\nA: ".to_vec(), vec![b'x'; 10_000], Duration::ZERO);
    assert_invalid_http(&error_of(endless).await);
}

#[tokio::test]
async fn body_over_limit_is_an_error() {
    const LIMIT: usize = 4 * 1024 * 1024;
    let server =
        Server::start(vec![reply(200, &format!("{VM}{}", " ".repeat(LIMIT - VM.len())))]).await;
    assert_eq!(server.client().vm().await.unwrap().id, 101);
    let piece = || " ".repeat(10_000).into_bytes();
    let chunk = format!("2710\r\n{}\r\n", " ".repeat(10_000)).into_bytes();
    for reply in [
        reply(200, &" ".repeat(LIMIT + 1)),
        Reply::Repeat(b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), piece(), Duration::ZERO),
        Reply::Repeat(
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n".to_vec(),
            piece(),
            Duration::ZERO,
        ),
        Reply::Repeat(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec(),
            chunk,
            Duration::ZERO,
        ),
        Reply::Repeat(b"HTTP/1.1 500 X\r\n\r\n".to_vec(), piece(), Duration::ZERO),
    ] {
        let error = error_of(reply).await;
        assert!(
            matches!(error, OneGateError::RequestFailed { source: RequestError::TooLarge, .. }),
            "{error:?}"
        );
        assert!(chain(&error).contains("4 MiB") && !error.is_final());
    }
}

#[tokio::test]
async fn timeout_applies_to_whole_request() {
    let interval = SHORT_TIMEOUT / 5;
    for reply in [
        Reply::Hang(Vec::new()),
        Reply::Hang(b"HTTP/1.1 200 OK\r\n".to_vec()),
        Reply::Hang(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{".to_vec()),
        Reply::Repeat(Vec::new(), b"H".to_vec(), LONG_TIMEOUT),
        Reply::Repeat(b"HTTP/1.1 200 OK\r\nA: ".to_vec(), b"x".to_vec(), interval),
        Reply::Repeat(b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), b" ".to_vec(), interval),
        Reply::Repeat(Vec::new(), b"HTTP/1.1 100 Continue\r\n\r\n".to_vec(), interval),
    ] {
        let server = Server::start(vec![reply]).await;
        let start = Instant::now();
        let error = server.client_with_timeout(SHORT_TIMEOUT).vm().await.unwrap_err();
        assert!(
            matches!(
                &error,
                OneGateError::RequestFailed { source: RequestError::TimedOut { .. }, .. }
            ),
            "{error:?}"
        );
        assert!(chain(&error).ends_with("timed out after 300ms") && !error.is_final(), "{error}");
        assert!(start.elapsed() >= SHORT_TIMEOUT && start.elapsed() < LONG_TIMEOUT / 2);
    }
}

#[tokio::test]
async fn timeout_applies_to_tls_handshake() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("https://{}", listener.local_addr().unwrap());
    let client = OneGate::new(
        &endpoint,
        "101",
        Secret::new(TOKEN),
        Some(&tls_file("ca.pem")),
        SHORT_TIMEOUT,
    )
    .unwrap();
    let error = client.vm().await.unwrap_err();
    assert!(
        matches!(error, OneGateError::RequestFailed { source: RequestError::TimedOut { .. }, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn refused_connection_is_temporary() {
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = client_of(&format!("http://{address}"), "101", TOKEN, None)
        .unwrap()
        .vm()
        .await
        .unwrap_err();
    assert!(
        matches!(error, OneGateError::RequestFailed { source: RequestError::Unreachable(_), .. }),
        "{error:?}"
    );
    let message = chain(&error);
    assert!(
        message.starts_with(&format!("GET http://{address}/vm failed: cannot connect;")),
        "{message}"
    );
    assert!(!error.is_final());
}

#[tokio::test]
async fn https_trusts_ca_file_only() {
    let server = Server::start_tls(vec![reply(200, VM), reply(200, VM)]).await;
    assert_eq!(server.tls_client("127.0.0.1", &tls_file("ca.pem")).vm().await.unwrap().id, 101);
    assert_eq!(server.tls_client("localhost", &tls_file("ca.pem")).vm().await.unwrap().id, 101);
    assert_eq!(server.requests().len(), 2);
    assert!(server.requests()[0].contains(&format!("\r\nx-onegate-token: {TOKEN}\r\n")));
}

#[tokio::test]
async fn ca_file_can_have_several_certificates() {
    let file = TempFile::new(
        [tls_file("other-ca.pem"), tls_file("ca.pem")].map(|path| fs::read(path).unwrap()).concat(),
    );
    let server = Server::start_tls(vec![reply(200, VM)]).await;
    assert_eq!(server.tls_client("127.0.0.1", &file.0).vm().await.unwrap().id, 101);
}

#[tokio::test]
async fn server_of_other_ca_gets_no_token() {
    let server = Server::start_tls(vec![reply(200, VM)]).await;
    let error = server.tls_client("127.0.0.1", &tls_file("other-ca.pem")).vm().await.unwrap_err();
    assert!(
        matches!(error, OneGateError::RequestFailed { source: RequestError::Tls(_), .. }),
        "{error:?}"
    );
    assert!(!error.is_final() && server.requests().is_empty());
}

#[tokio::test]
async fn server_with_other_name_gets_no_token() {
    let server = Server::start_tls(vec![reply(200, VM)]).await;
    let error = server.tls_client("127.0.0.2", &tls_file("ca.pem")).vm().await.unwrap_err();
    assert!(matches!(error, OneGateError::RequestFailed { .. }), "{error:?}");
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn private_ca_needs_ca_file() {
    let server = Server::start_tls(vec![reply(200, VM)]).await;
    match client_of(&format!("https://{}", server.address), "101", TOKEN, None) {
        Ok(client) => {
            let error = client.vm().await.unwrap_err();
            assert!(
                matches!(error, OneGateError::RequestFailed { source: RequestError::Tls(_), .. }),
                "{error:?}"
            );
        }
        // As on a machine without ca-certificates.
        Err(error) => {
            assert!(
                chain(&error)
                    .starts_with("cannot load CA certificates for OneGate from this machine: "),
                "{error}"
            )
        }
    }
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn plaintext_server_is_a_tls_error() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("https://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _): (TcpStream, _) = listener.accept().await.unwrap();
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        let _ = stream.read(&mut [0; 1024]).await;
    });
    let error = client_of(&endpoint, "101", TOKEN, Some(&tls_file("ca.pem")))
        .unwrap()
        .vm()
        .await
        .unwrap_err();
    assert!(
        matches!(error, OneGateError::RequestFailed { source: RequestError::Tls(_), .. }),
        "{error:?}"
    );
}

#[test]
fn unusable_ca_file_is_named() {
    let ca = fs::read(tls_file("ca.pem")).unwrap();
    let no_certificate = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let files = [
        b"certificate".to_vec(),
        ca[..100].to_vec(),
        no_certificate.to_vec(),
        [&ca, no_certificate.as_slice()].concat(),
        [ca.as_slice(), &[b'\n'; 1024 * 1024]].concat(),
    ]
    .map(TempFile::new);
    let key = tls_file("server.key");
    let others = [&key, Path::new("/nowhere/ca.pem"), Path::new("/")];
    for path in files.iter().map(|file| file.0.as_path()).chain(others) {
        let error = client_of("https://onegate.example", "101", TOKEN, Some(path)).unwrap_err();
        assert!(
            matches!(error, OneGateError::NoCaCertificates { .. }) && error.is_final(),
            "{error:?}"
        );
        assert!(
            error.to_string().ends_with(&path.display().to_string()) && error.source().is_some(),
            "{error}"
        );
    }
}

#[test]
fn invalid_endpoint_is_final_and_hidden() {
    let error = client_of("http://alice:hunter2@onegate.example", "101", TOKEN, None).unwrap_err();
    assert!(matches!(error, OneGateError::InvalidEndpoint { .. }) && error.is_final());
    assert_eq!(
        error.to_string(),
        "invalid ONEGATE_ENDPOINT: it contains a user name or password; expected http://HOST or \
         https://HOST, optionally with :PORT and /PATH"
    );
    assert!(!format!("{error:?}").contains("hunter2"));
}

#[tokio::test]
async fn too_long_endpoint_path_is_an_error() {
    let endpoint = format!("http://onegate.example/{}", "a".repeat(65_511));
    let error = client_of(&endpoint, "101", TOKEN, None)
        .unwrap()
        .vm_of_service(u64::MAX)
        .await
        .unwrap_err();
    assert!(matches!(error, OneGateError::InvalidEndpoint { .. }), "{error:?}");
}

#[test]
fn invalid_vm_id_or_token_is_final() {
    for vm_id in ["", " 1", "+1", "-1", "1.0", "0x1", "one", "1\r\nX: y", "18446744073709551616"] {
        let error = client_of("http://169.254.16.9:5030", vm_id, TOKEN, None).unwrap_err();
        assert!(matches!(error, OneGateError::InvalidVmId) && error.is_final(), "{vm_id}");
    }
    for token in
        ["", "secret\n", "secret\r\nX: y", "secret token", "sécret", "secret\0", "secret\u{7f}"]
    {
        let error = client_of("http://169.254.16.9:5030", "101", token, None).unwrap_err();
        assert!(matches!(error, OneGateError::InvalidToken) && error.is_final(), "{token}");
        assert!(!format!("{error} {error:?}").contains("cret"), "{error}");
    }
}

/// A file for one test.
struct TempFile(PathBuf);

impl TempFile {
    fn new(bytes: Vec<u8>) -> Self {
        use std::sync::atomic::{AtomicUsize, Ordering};
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name =
            format!("onegate-{}-{}.pem", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
