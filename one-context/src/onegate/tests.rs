//! The client against servers that answer from a script, one connection after another.

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
/// More than a reply between two processes of one machine takes.
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(300);

/// What a server sends when it has read a request.
enum Reply {
    /// This, and the end.
    Ends(Vec<u8>),
    /// This, and then nothing more.
    Hangs(Vec<u8>),
    /// This, and then that again and again, with a pause in between.
    Goes(Vec<u8>, Vec<u8>, Duration),
}

/// A whole reply of OneGate, which says JSON whatever it sends.
fn reply(status: u16, body: &str) -> Reply {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: application/json;charset=utf-8\r\nContent-Length: {length}\r\n\r\n"
    );
    Reply::Ends((head + body).into_bytes())
}

fn raw(bytes: &str) -> Reply {
    Reply::Ends(bytes.as_bytes().to_vec())
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
        self.client_within(LONG)
    }

    fn client_within(&self, limit: Duration) -> OneGate {
        OneGate::new(&format!("http://{}", self.address), "101", Secret::new(TOKEN), None, limit)
            .unwrap()
    }

    fn tls_client(&self, host: &str, ca_file: &Path) -> OneGate {
        let endpoint = format!("https://{host}:{}/", self.address.port());
        OneGate::new(&endpoint, "101", Secret::new(TOKEN), Some(ca_file), LONG).unwrap()
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

/// Reads one request and replies. That the client may leave early is no error here.
async fn serve(
    mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin,
    reply: Reply,
    seen: &Mutex<Vec<String>>,
) {
    let mut request = Vec::new();
    while !is_whole(&request) {
        let mut piece = [0; 1024];
        match stream.read(&mut piece).await {
            Ok(length) if length > 0 => request.extend_from_slice(&piece[..length]),
            _ => return,
        }
    }
    seen.lock().unwrap().push(String::from_utf8(request).unwrap());
    match reply {
        Reply::Ends(bytes) => {
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
        }
        Reply::Hangs(bytes) => {
            let _ = stream.write_all(&bytes).await;
            tokio::time::sleep(LONG * 10).await;
        }
        Reply::Goes(head, piece, pause) => {
            let _ = stream.write_all(&head).await;
            while stream.write_all(&piece).await.is_ok() {
                tokio::time::sleep(pause).await;
            }
        }
    }
}

fn is_whole(request: &[u8]) -> bool {
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

/// Why `GET /vm` fails when the server replies like this.
async fn error_of(reply: Reply) -> OneGateError {
    let server = Server::start(vec![reply]).await;
    server.client().vm().await.unwrap_err()
}

/// An error and its causes, as somebody reads them.
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
fn assert_not_whole(error: &OneGateError) {
    assert!(
        matches!(error, OneGateError::NoAnswer { source: NoAnswer::NotWhole(_), .. }),
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
    OneGate::new(endpoint, vm_id, Secret::new(token), ca_file, LONG)
}

#[tokio::test]
async fn each_question_has_its_route_and_says_who_asks() {
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
            "GET {route} HTTP/1.1\r\nhost: {}\r\nx-onegate-token: {TOKEN}\r\nx-onegate-vmid: 101\r\nconnection: close\r\n\r\n",
            server.address
        )
    });
    assert_eq!(server.requests(), expected);
}

#[tokio::test]
async fn an_update_is_one_form_with_its_length() {
    let server = Server::start(vec![reply(200, "")]).await;
    let attributes = [
        ("FL_NODE_ID", "101".to_owned()),
        ("FL_GPU_NAME", "A, B".to_owned()),
        ("FL_X", String::new()),
    ];
    server.client().publish(&attributes).await.unwrap();
    let expected = format!(
        "PUT /vm HTTP/1.1\r\nhost: {}\r\nx-onegate-token: {TOKEN}\r\nx-onegate-vmid: 101\r\nconnection: close\r\n\
         content-type: application/x-www-form-urlencoded\r\ncontent-length: 73\r\n\r\n\
         data=FL_NODE_ID%3D101%0AFL_GPU_NAME%3DQSwgQg%3D%3D%0AFL_X%3D%22%22&type=1",
        server.address
    );
    assert_eq!(server.requests(), [expected]);
}

#[tokio::test]
async fn a_bad_name_of_an_attribute_is_never_sent() {
    let server = Server::start(vec![reply(200, "")]).await;
    let error = server.client().publish(&[("fl_x", String::new())]).await.unwrap_err();
    assert!(matches!(error, OneGateError::BadAttribute { .. }) && error.is_final(), "{error}");
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn the_path_of_the_endpoint_comes_before_every_route() {
    let server = Server::start(vec![reply(200, VM)]).await;
    let client =
        client_of(&format!("http://{}/cloud/gate/", server.address), "101", TOKEN, None).unwrap();
    client.vm().await.unwrap();
    assert!(server.requests()[0].starts_with("GET /cloud/gate/vm HTTP/1.1\r\n"));
}

#[tokio::test]
async fn a_refusal_says_what_it_probably_is_and_what_onegate_says() {
    for (status, text, meaning) in [
        (
            401,
            "Not authorized",
            "the token is not valid for this VM, or OneGate does not reach oned",
        ),
        (
            400,
            "Service 7 does not contain VM 101",
            "OneFlow has not registered this VM yet, or it is of another service",
        ),
        (400, "Service 7 is empty.", "OneFlow has not registered the VMs of this service yet"),
        (400, "Bad request", "OneGate does not take this request"),
        (
            403,
            "Action (update) on resource (vm) not supported",
            "OneGate's configuration does not allow it",
        ),
        (404, "Service 7 not found", "there is no such service, or OneFlow is down"),
        (
            404,
            "[one.vm.info] Error getting virtual machine [101].",
            "OpenNebula has no such VM, or this is not OneGate",
        ),
        (500, "syntax error", "OpenNebula rejects it, or OneGate is broken"),
        (502, "Bad Gateway", "the proxy before OneGate does not reach it"),
        (418, "teapot", "which OneGate never answers"),
    ] {
        let server = Server::start(vec![reply(status, text)]).await;
        let error = server.client().vm().await.unwrap_err();
        let expected =
            format!("GET http://{}/vm: {status}, {meaning}; OneGate says: {text}", server.address);
        assert_eq!(error.to_string(), expected);
        assert!(!error.is_final());
    }
}

#[tokio::test]
async fn a_vm_without_a_service_is_told_for_ever() {
    let server = Server::start(vec![reply(400, "Empty or invalid SERVICE_ID")]).await;
    let error = server.client().service().await.unwrap_err();
    assert!(matches!(error, OneGateError::NotInService) && error.is_final());
    let error = error_of(reply(500, "Empty or invalid SERVICE_ID")).await;
    assert!(matches!(error, OneGateError::Refused { status: 500, .. }) && !error.is_final());
}

#[tokio::test]
async fn two_refusals_and_then_an_answer() {
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
async fn what_the_other_side_says_is_short_and_on_one_line() {
    let text = format!("\u{1b}[31m\r\nevil\t\u{202e}\0\"{}", "x".repeat(100_000));
    for status in [500, 200] {
        let message = chain(&error_of(reply(status, &text)).await);
        assert!(message.contains(r#"\u{1b}[31m\r\nevil\t\u{202e}\0"xxx"#), "{message}");
        assert!(message.chars().count() < 450 && message.contains("x…"), "{message}");
    }
    assert!(error_of(reply(500, " \n")).await.to_string().ends_with("OneGate says: (nothing)"));
}

#[tokio::test]
async fn the_token_is_shown_nowhere() {
    let echo = format!("You sent X-ONEGATE-TOKEN: {TOKEN}");
    let server = Server::start(vec![reply(500, &echo), reply(200, &echo)]).await;
    let client = server.client();
    assert!(!format!("{client:?}").contains(TOKEN), "{client:?}");
    for _ in 0..2 {
        let error = client.vm().await.unwrap_err();
        let shown = format!("{} {error:?}", chain(&error));
        assert!(
            !shown.contains(TOKEN) && shown.contains("X-ONEGATE-TOKEN: (the token)"),
            "{shown}"
        );
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed_nor_shown() {
    for status in [301, 302, 303, 307, 308] {
        let other = Server::start(vec![reply(200, VM)]).await;
        let location = format!(
            "HTTP/1.1 {status} X\r\nLocation: http://{}/vm\r\nContent-Length: 0\r\n\r\n",
            other.address
        );
        let error = error_of(raw(&location)).await;
        assert!(
            matches!(error, OneGateError::Redirected { status: told, .. } if told == status),
            "{error:?}"
        );
        assert!(error.to_string().contains(&status.to_string()) && !error.is_final());
        assert!(!format!("{error} {error:?}").contains(&other.address.to_string()));
        assert!(other.requests().is_empty());
    }
}

#[tokio::test]
async fn an_answer_to_something_else_is_an_error_with_its_beginning() {
    let error = error_of(reply(200, "<html>Welcome to nginx!")).await;
    assert!(
        chain(&error).contains(
            "/vm: the reply is not one of OneGate: <html>Welcome to nginx!: it is not JSON"
        ),
        "{error}"
    );
    assert!(!error.is_final());
    let error = error_of(reply(200, r#"{"SERVICE":{}}"#)).await;
    assert!(chain(&error).ends_with(r#"{"SERVICE":{}}: it has no VM"#), "{error}");
    let error = error_of(raw("HTTP/1.1 204 No Content\r\n\r\n")).await;
    assert!(matches!(error, OneGateError::Unexpected { .. }), "{error:?}");
}

#[tokio::test]
async fn a_chunked_answer_and_one_that_ends_with_the_connection_are_read() {
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
async fn half_an_answer_is_an_error() {
    for half in [
        "",
        "HTTP/1.1 2",
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"VM\":{\"ID\":1}}",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n{\"VM\":{\"ID\":1}}\r\n",
        "HTTP/1.1 401 X\r\nContent-Length: 1000\r\n\r\nNot authorized",
    ] {
        assert_not_whole(&error_of(raw(half)).await);
    }
    let error =
        error_of(raw("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{\"VM\":{\"ID\":1}}")).await;
    assert!(matches!(error, OneGateError::Unexpected { .. }), "{error:?}");
}

#[tokio::test]
async fn what_is_not_http_is_an_error() {
    for garbage in [
        "SSH-2.0-OpenSSH_9.6\r\n",
        "\0\u{1}\u{2}\u{3}\r\n\r\n",
        "HTTP/1.1 abc\r\n\r\n",
        "{\"VM\":{\"ID\":1}}",
        "HTTP/2 200\r\n\r\n",
    ] {
        assert_not_whole(&error_of(raw(garbage)).await);
    }
    for length in ["x", "-1", "18446744073709551616", "1\r\nContent-Length: 2"] {
        assert_not_whole(
            &error_of(raw(&format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{VM}")))
                .await,
        );
    }
}

#[tokio::test]
async fn a_huge_head_is_an_error() {
    assert_not_whole(
        &error_of(raw(&format!("HTTP/1.1 200 OK\r\nA: {}\r\n\r\n", "x".repeat(4_000_000)))).await,
    );
    assert_not_whole(
        &error_of(raw(&format!("HTTP/1.1 200 OK\r\n{}\r\n", "A: b\r\n".repeat(10_000)))).await,
    );
    let endless =
        Reply::Goes(b"HTTP/1.1 200 OK\r\nA: ".to_vec(), vec![b'x'; 10_000], Duration::ZERO);
    assert_not_whole(&error_of(endless).await);
}

#[tokio::test]
async fn a_body_over_the_limit_is_an_error_whatever_was_promised() {
    const LIMIT: usize = 4 * 1024 * 1024;
    let server =
        Server::start(vec![reply(200, &format!("{VM}{}", " ".repeat(LIMIT - VM.len())))]).await;
    assert_eq!(server.client().vm().await.unwrap().id, 101);
    let piece = || " ".repeat(10_000).into_bytes();
    let chunk = format!("2710\r\n{}\r\n", " ".repeat(10_000)).into_bytes();
    for reply in [
        reply(200, &" ".repeat(LIMIT + 1)),
        Reply::Goes(b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), piece(), Duration::ZERO),
        Reply::Goes(
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n".to_vec(),
            piece(),
            Duration::ZERO,
        ),
        Reply::Goes(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec(),
            chunk,
            Duration::ZERO,
        ),
        Reply::Goes(b"HTTP/1.1 500 X\r\n\r\n".to_vec(), piece(), Duration::ZERO),
    ] {
        let error = error_of(reply).await;
        assert!(
            matches!(error, OneGateError::NoAnswer { source: NoAnswer::TooLarge, .. }),
            "{error:?}"
        );
        assert!(chain(&error).contains("4 MiB") && !error.is_final());
    }
}

#[tokio::test]
async fn one_limit_holds_for_all_of_a_request() {
    let pause = SHORT / 5;
    for reply in [
        Reply::Hangs(Vec::new()),
        Reply::Hangs(b"HTTP/1.1 200 OK\r\n".to_vec()),
        Reply::Hangs(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{".to_vec()),
        Reply::Goes(Vec::new(), b"H".to_vec(), LONG),
        Reply::Goes(b"HTTP/1.1 200 OK\r\nA: ".to_vec(), b"x".to_vec(), pause),
        Reply::Goes(b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), b" ".to_vec(), pause),
        Reply::Goes(Vec::new(), b"HTTP/1.1 100 Continue\r\n\r\n".to_vec(), pause),
    ] {
        let server = Server::start(vec![reply]).await;
        let start = Instant::now();
        let error = server.client_within(SHORT).vm().await.unwrap_err();
        assert!(
            matches!(&error, OneGateError::NoAnswer { source: NoAnswer::TimedOut { .. }, .. }),
            "{error:?}"
        );
        assert!(
            chain(&error).ends_with("no whole reply after 300ms") && !error.is_final(),
            "{error}"
        );
        assert!(start.elapsed() >= SHORT && start.elapsed() < LONG / 2);
    }
}

#[tokio::test]
async fn the_limit_holds_for_a_tls_handshake_too() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("https://{}", listener.local_addr().unwrap());
    let client =
        OneGate::new(&endpoint, "101", Secret::new(TOKEN), Some(&tls_file("ca.pem")), SHORT)
            .unwrap();
    let error = client.vm().await.unwrap_err();
    assert!(
        matches!(error, OneGateError::NoAnswer { source: NoAnswer::TimedOut { .. }, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn nobody_there_is_an_error_that_may_heal() {
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = client_of(&format!("http://{address}"), "101", TOKEN, None)
        .unwrap()
        .vm()
        .await
        .unwrap_err();
    assert!(
        matches!(error, OneGateError::NoAnswer { source: NoAnswer::Unreachable(_), .. }),
        "{error:?}"
    );
    let message = chain(&error);
    assert!(
        message.starts_with(&format!(
            "GET http://{address}/vm: OneGate does not answer: cannot connect;"
        )),
        "{message}"
    );
    assert!(!error.is_final());
}

#[tokio::test]
async fn https_is_trusted_through_the_ca_file_alone() {
    let server = Server::start_tls(vec![reply(200, VM), reply(200, VM)]).await;
    assert_eq!(server.tls_client("127.0.0.1", &tls_file("ca.pem")).vm().await.unwrap().id, 101);
    assert_eq!(server.tls_client("localhost", &tls_file("ca.pem")).vm().await.unwrap().id, 101);
    assert_eq!(server.requests().len(), 2);
    assert!(server.requests()[0].contains(&format!("\r\nx-onegate-token: {TOKEN}\r\n")));
}

#[tokio::test]
async fn a_ca_file_may_have_several_certificates() {
    let file = TempFile::new(
        [tls_file("other-ca.pem"), tls_file("ca.pem")].map(|path| fs::read(path).unwrap()).concat(),
    );
    let server = Server::start_tls(vec![reply(200, VM)]).await;
    assert_eq!(server.tls_client("127.0.0.1", &file.0).vm().await.unwrap().id, 101);
}

#[tokio::test]
async fn a_server_of_another_ca_gets_no_token() {
    let server = Server::start_tls(vec![reply(200, VM)]).await;
    let error = server.tls_client("127.0.0.1", &tls_file("other-ca.pem")).vm().await.unwrap_err();
    assert!(
        matches!(error, OneGateError::NoAnswer { source: NoAnswer::NoTls(_), .. }),
        "{error:?}"
    );
    assert!(!error.is_final() && server.requests().is_empty());
}

#[tokio::test]
async fn a_server_with_the_certificate_of_another_host_gets_no_token() {
    let server = Server::start_tls(vec![reply(200, VM)]).await;
    let error = server.tls_client("127.0.0.2", &tls_file("ca.pem")).vm().await.unwrap_err();
    assert!(matches!(error, OneGateError::NoAnswer { .. }), "{error:?}");
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn without_a_ca_file_a_private_ca_is_not_trusted() {
    let server = Server::start_tls(vec![reply(200, VM)]).await;
    match client_of(&format!("https://{}", server.address), "101", TOKEN, None) {
        Ok(client) => {
            let error = client.vm().await.unwrap_err();
            assert!(
                matches!(error, OneGateError::NoAnswer { source: NoAnswer::NoTls(_), .. }),
                "{error:?}"
            );
        }
        // A machine without ca-certificates.
        Err(error) => {
            assert!(
                chain(&error).starts_with("no CA certificates for OneGate from this machine: "),
                "{error}"
            )
        }
    }
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn a_server_without_tls_is_an_error() {
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
        matches!(error, OneGateError::NoAnswer { source: NoAnswer::NoTls(_), .. }),
        "{error:?}"
    );
}

#[test]
fn a_ca_file_that_cannot_be_used_is_named() {
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
            matches!(error, OneGateError::NoCertificates { .. }) && error.is_final(),
            "{error:?}"
        );
        assert!(
            error.to_string().ends_with(&path.display().to_string()) && error.source().is_some(),
            "{error}"
        );
    }
}

#[test]
fn an_endpoint_that_is_none_is_final_and_not_shown() {
    let error = client_of("http://alice:hunter2@onegate.example", "101", TOKEN, None).unwrap_err();
    assert!(matches!(error, OneGateError::BadEndpoint { .. }) && error.is_final());
    assert_eq!(
        error.to_string(),
        "ONEGATE_ENDPOINT is not as OpenNebula writes it: it has a user name or a password in it; \
         accepted is http://HOST or https://HOST, with :PORT and /PATH where needed"
    );
    assert!(!format!("{error:?}").contains("hunter2"));
}

#[tokio::test]
async fn an_endpoint_whose_path_leaves_no_room_for_a_route_is_an_error() {
    let endpoint = format!("http://onegate.example/{}", "a".repeat(65_511));
    let error = client_of(&endpoint, "101", TOKEN, None)
        .unwrap()
        .vm_of_service(u64::MAX)
        .await
        .unwrap_err();
    assert!(matches!(error, OneGateError::BadEndpoint { .. }), "{error:?}");
}

#[test]
fn a_vm_number_or_a_token_that_is_none_is_final() {
    for vm_id in ["", " 1", "+1", "-1", "1.0", "0x1", "one", "1\r\nX: y", "18446744073709551616"] {
        let error = client_of("http://169.254.16.9:5030", vm_id, TOKEN, None).unwrap_err();
        assert!(matches!(error, OneGateError::BadVmId) && error.is_final(), "{vm_id}");
    }
    for token in
        ["", "secret\n", "secret\r\nX: y", "secret token", "sécret", "secret\0", "secret\u{7f}"]
    {
        let error = client_of("http://169.254.16.9:5030", "101", token, None).unwrap_err();
        assert!(matches!(error, OneGateError::BadToken) && error.is_final(), "{token}");
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
