//! A registry with one image that serves half of its layer, and the rest when the test asks for it.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::AsFd as _,
    process::Command,
    sync::{Arc, Condvar, Mutex},
    thread,
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::json;

use crate::{engine::Engine, image, process::run, sandbox::Sandbox};

const MANIFEST_TYPE: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// A registry in an engine's network namespace.
#[derive(Debug)]
pub struct Registry {
    gate: Arc<Gate>,
}

#[derive(Debug, Default)]
struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
}

/// Content by the end of its path.
struct Content {
    manifest: Vec<u8>,
    config: (String, Vec<u8>),
    layer: (String, Vec<u8>),
}

impl Registry {
    /// Name of the image in the registry.
    pub const IMAGE: &str = "127.0.0.1:5000/node:1";

    /// Starts a registry in an engine's network namespace; engines accept their loopback without
    /// TLS.
    ///
    /// # Panics
    /// If it cannot listen.
    #[must_use]
    pub fn start(engine: &Engine) -> Self {
        let content = content();
        let gate = Arc::new(Gate::default());
        let namespace = File::open(format!("/run/netns/{}", engine.network_namespace()))
            .expect("the engine's network");
        let shared = gate.clone();
        let (is_up, up) = std::sync::mpsc::channel();
        thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("its network");
            let socket = TcpListener::bind("127.0.0.1:5000").expect("a port");
            is_up.send(()).expect("the test");
            let content = Arc::new(content);
            for caller in socket.incoming().flatten() {
                let (content, gate) = (content.clone(), shared.clone());
                thread::spawn(move || answer(&caller, &content, &gate));
            }
        });
        up.recv_timeout(Duration::from_secs(10)).expect("the registry listens");
        Self { gate }
    }

    /// Serves the rest of the layer.
    pub fn release_layer(&self) {
        *self.gate.is_open.lock().expect("the gate") = true;
        self.gate.opened.notify_all();
    }
}

/// The image of [`crate::image`] as Image Manifest V2, Schema 2.
fn content() -> Content {
    let tar = std::fs::read(image::test_image()).expect("the image's file system");
    let layer = (digest(&tar), tar);
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/usr/bin/flower-supernode"], "Env": ["PATH=/usr/bin:/bin"],
            "User": "49999:49999"},
        "rootfs": {"type": "layers", "diff_ids": [layer.0]},
    });
    let config = config.to_string().into_bytes();
    let config = (digest(&config), config);
    let part = |kind: &str, part: &(String, Vec<u8>)| {
        json!({"mediaType": kind,
            "size": part.1.len(), "digest": part.0})
    };
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": part("application/vnd.docker.container.image.v1+json", &config),
        "layers": [part("application/vnd.docker.image.rootfs.diff.tar.gzip", &layer)],
    });
    Content { manifest: manifest.to_string().into_bytes(), config, layer }
}

fn digest(bytes: &[u8]) -> String {
    let sandbox = Sandbox::new("digest");
    let file = sandbox.write("content", bytes);
    let sum = run(Command::new("sha256sum").arg(file), Duration::from_secs(60))
        .expect_success()
        .to_owned();
    format!("sha256:{}", sum.split(' ').next().expect("a sum"))
}

/// Answers one request and closes the connection. A closed client connection is not an error.
fn answer(mut caller: &TcpStream, content: &Content, gate: &Gate) {
    let mut head =
        BufReader::new(caller).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let request = head.next().unwrap_or_default();
    head.for_each(drop);
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (kind, body): (&str, &[u8]) = if path.contains("/manifests/") {
        (MANIFEST_TYPE, &content.manifest)
    } else if path.ends_with(&content.config.0) {
        ("application/octet-stream", &content.config.1)
    } else if path.ends_with(&content.layer.0) {
        ("application/octet-stream", &content.layer.1)
    } else {
        ("application/json", b"{}")
    };
    let length = body.len();
    let _ = write!(
        caller,
        "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\
         Docker-Distribution-API-Version: registry/2.0\r\n\r\n"
    );
    if method == "HEAD" {
        return;
    }
    let half = if path.ends_with(&content.layer.0) { length / 2 } else { length };
    let _ = caller.write_all(&body[..half]);
    if half < length {
        let is_open = gate.is_open.lock().expect("the gate");
        drop(gate.opened.wait_while(is_open, |is_open| !*is_open).expect("the gate"));
        let _ = caller.write_all(&body[half..]);
    }
}
