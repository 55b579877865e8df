//! The OneGate simulator: regular replies, faults, and recorded requests.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use supernode_tests::{
    OneGateSimulator,
    onegate::{Reply, Shape},
};

const SERVICE_JSON: &str = concat!(
    r#"{"SERVICE":{"name":"flower","id":"7","state":2,"roles":[{"name":"superlink","#,
    r#""cardinality":1,"state":2,"nodes":[{"deploy_id":100,"running":null,"vm_info":{"VM":{"#,
    r#""ID":"100","UID":"2","GID":"1","UNAME":"alice","GNAME":"users","#,
    r#""NAME":"superlink_0"}}}]},{"name":"supernode","cardinality":1,"state":2,"nodes":[{"#,
    r#""deploy_id":101,"running":null,"vm_info":{"VM":{"ID":"101","UID":"2","GID":"1","#,
    r#""UNAME":"alice","GNAME":"users","NAME":"supernode_0_(service_7)"}}}]}]}}"#,
);

/// Service 7: the SuperLink 100 with an endpoint and a NIC, the SuperNode 101. VM 102 is in no
/// service, 103 in service 8.
fn onegate() -> OneGateSimulator {
    let onegate = OneGateSimulator::start();
    onegate.change(|state| {
        let superlink = state
            .join(7, "superlink", 100)
            .attribute("FL_ENDPOINT", "10.77.0.1:9092")
            .nic("10.77.0.1");
        superlink.name = "superlink_0".to_owned();
        state.join(7, "supernode", 101);
        state.vm(102);
        state.join(8, "superlink", 103);
    });
    onegate
}

/// Sends bytes and reads until the connection is closed.
fn exchange(onegate: &OneGateSimulator, bytes: &str) -> String {
    let mut stream = TcpStream::connect(onegate.address()).unwrap();
    stream.write_all(bytes.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

fn head(method: &str, target: &str, vm: u32) -> String {
    format!(
        "{method} {target} HTTP/1.1\r\nHost: onegate\r\n\
         X-ONEGATE-TOKEN: token-of-{vm}\r\nX-ONEGATE-VMID: {vm}\r\n"
    )
}

/// Status and body of a reply; asserts OneGate's content type and the content length.
fn parsed(answer: &str) -> (u16, String) {
    let (head, body) =
        answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("not HTTP: {answer:?}"));
    assert!(head.contains("\r\nContent-Type: application/json;charset=utf-8\r\n"), "{head}");
    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{answer}");
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn get(onegate: &OneGateSimulator, target: &str, vm: u32) -> (u16, String) {
    parsed(&exchange(onegate, &(head("GET", target, vm) + "\r\n")))
}

#[track_caller]
fn json_of(onegate: &OneGateSimulator, target: &str, vm: u32) -> Value {
    let (status, body) = get(onegate, target, vm);
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

fn put(onegate: &OneGateSimulator, target: &str, vm: u32, body: &str) -> (u16, String) {
    let request =
        format!("{}Content-Length: {}\r\n\r\n{body}", head("PUT", target, vm), body.len());
    parsed(&exchange(onegate, &request))
}

fn text(status: u16, body: &str) -> (u16, String) {
    (status, body.to_owned())
}

#[test]
fn vm_reads_itself_its_service_and_its_peers() {
    let onegate = onegate();
    assert_eq!(get(&onegate, "/service", 101), text(200, SERVICE_JSON));
    let superlink = json!({"VM": {
        "NAME": "superlink_0", "ID": "100", "STATE": "3", "LCM_STATE": "3",
        "USER_TEMPLATE": {"FL_ENDPOINT": "10.77.0.1:9092", "ROLE_NAME": "superlink",
            "SERVICE_ID": "7"},
        "TEMPLATE": {
            "NIC": [{"IP": "10.77.0.1", "MAC": "02:00:0a:4d:00:00", "NAME": "NIC0",
                "NETWORK": "private"}],
            "NIC_ALIAS": [],
        },
    }});
    assert_eq!(json_of(&onegate, "/vms/100", 101), superlink);
    assert_eq!(json_of(&onegate, "/vm", 100), superlink);

    let extended = json_of(&onegate, "/service?extended=true", 101);
    let vm = &extended["SERVICE"]["roles"][0]["nodes"][0]["vm_info"]["VM"];
    assert_eq!(vm["USER_TEMPLATE"], superlink["VM"]["USER_TEMPLATE"]);
    assert_eq!(vm["TEMPLATE"]["NIC"], superlink["VM"]["TEMPLATE"]["NIC"][0]);
}

#[test]
fn json_format_is_selectable() {
    let onegate = onegate();
    onegate.change(|state| {
        state.shape = Shape {
            numbers: true,
            one_nic_is_an_object: true,
            empty_lists_are_objects: true,
            vm_info_is_null: true,
        };
        state.vm(101).attribute("EMPTY", "");
    });
    let superlink = &json_of(&onegate, "/vms/100", 101)["VM"];
    assert_eq!((&superlink["ID"], &superlink["STATE"]), (&json!(100), &json!(3)));
    assert_eq!(superlink["TEMPLATE"]["NIC"]["IP"], "10.77.0.1");
    onegate.change(|state| state.vm(100).nic("10.77.0.2").state = 8);
    let superlink = &json_of(&onegate, "/vms/100", 101)["VM"];
    assert_eq!(superlink["TEMPLATE"]["NIC"][1]["IP"], "10.77.0.2");
    assert_eq!(superlink["STATE"], 8);

    let own = &json_of(&onegate, "/vm", 101)["VM"];
    assert_eq!(own["TEMPLATE"], json!({"NIC": {}, "NIC_ALIAS": {}}));
    assert_eq!(own["USER_TEMPLATE"]["EMPTY"], json!({}));
    let service = &json_of(&onegate, "/service", 101)["SERVICE"];
    assert_eq!(service["id"], 7);
    assert_eq!(service["roles"][0]["nodes"][0]["vm_info"], Value::Null);
}

#[test]
fn refusal_is_plain_text_with_original_message() {
    let onegate = onegate();
    assert_eq!(get(&onegate, "/service", 102), text(400, "Empty or invalid SERVICE_ID"));
    assert_eq!(get(&onegate, "/vms/103", 101), text(400, "Service 7 does not contain VM 103"));
    assert_eq!(get(&onegate, "/nothing", 101).0, 400);
    assert_eq!(get(&onegate, "/vm", 999), text(401, "Not authorized"));
    let wrong = head("GET", "/vm", 101).replace("token-of", "no-token-of") + "\r\n";
    assert_eq!(parsed(&exchange(&onegate, &wrong)), text(401, "Not authorized"));
    assert_eq!(
        parsed(&exchange(&onegate, "GET /vm HTTP/1.1\r\n\r\n")),
        text(401, "Not authorized")
    );

    // OneFlow has created the VM but not listed it yet.
    onegate.change(|state| {
        state.vm(104).attribute("SERVICE_ID", "7");
    });
    assert_eq!(get(&onegate, "/service", 104), text(400, "Service 7 does not contain VM 104"));
    onegate.change(|state| state.oneflow_down = true);
    assert_eq!(get(&onegate, "/service", 101), text(404, "Service 7 not found"));
    assert_eq!(get(&onegate, "/vms/100", 101), text(404, "Service 7 not found"));
    assert_eq!(get(&onegate, "/vm", 101).0, 200);
    onegate.change(|state| state.oned_down = true);
    assert_eq!(get(&onegate, "/vm", 101), text(401, "Not authorized"));
}

#[test]
fn update_is_merged_and_unparsable_value_rejected() {
    let onegate = onegate();
    let attribute = |vm, name: &str| {
        onegate.change(|state| state.vms[&vm].user_template.get(name).map(ToOwned::to_owned))
    };
    let update = "data=fl_node_id%3D101%0AFL_GPU_NAME%3DNVIDIA+A100%0AFL_REASON%3D%22%22&type=1";
    assert_eq!(put(&onegate, "/vm", 101, update), text(200, ""));
    assert_eq!(attribute(101, "FL_NODE_ID").as_deref(), Some("101"));
    assert_eq!(attribute(101, "FL_GPU_NAME").as_deref(), Some("NVIDIA A100"));
    assert_eq!(attribute(101, "FL_REASON").as_deref(), Some(""));
    assert_eq!(attribute(101, "SERVICE_ID").as_deref(), Some("7"));
    for value in ["a%2Cb", "%5Ba", "a%5D", "%22a%22", "a%5Cb", "a%0Ab", "a%0Db"] {
        assert_eq!(
            put(&onegate, "/vm", 101, &format!("data=GOOD%3D1%0ABAD%3D{value}&type=1")).0,
            500,
            "{value}"
        );
    }
    assert_eq!((attribute(101, "GOOD"), attribute(101, "BAD")), (None, None));

    // Any VM of a service can write any other's attributes.
    assert_eq!(put(&onegate, "/vms/100", 101, "data=FL_CA_CERT%3Devil&type=1").0, 200);
    assert_eq!(attribute(100, "FL_CA_CERT").as_deref(), Some("evil"));
    assert_eq!(put(&onegate, "/vms/103", 101, "data=FL_CA_CERT%3Devil&type=1").0, 400);
}

#[test]
fn chunked_update_is_rejected() {
    let onegate = onegate();
    let chunked = head("PUT", "/vm", 101)
        + "Transfer-Encoding: chunked\r\n\r\n11\r\ndata=K%3D1&type=1\r\n0\r\n\r\n";
    let endless = head("PUT", "/vm", 101) + "\r\n";
    for request in [chunked, endless] {
        assert_eq!(parsed(&exchange(&onegate, &request)).0, 411);
    }
    assert!(!onegate.change(|state| state.vms[&101].user_template.contains_key("K")));
}

#[test]
fn ready_gate_opens_on_its_text_and_stays_open() {
    let onegate = onegate();
    let ready = |vm| onegate.change(|state| state.vms[&vm].ready);
    put(&onegate, "/vm", 101, "data=READY%3DNO%0AFL_X%3D1&type=1");
    // Rejected: OneFlow does not receive it.
    put(&onegate, "/vm", 101, "data=READY%3DYES%0AFL_X%3Da%2Cb&type=1");
    assert!(!ready(101));
    put(&onegate, "/vm", 101, "data=FL_NODE_READY%3DYES&type=1");
    assert!(ready(101) && !ready(100));
    put(&onegate, "/vm", 101, "data=READY%3DNO&type=1");
    assert!(ready(101));
    let opening: Vec<bool> =
        onegate.requests().iter().map(supernode_tests::onegate::Request::sets_ready_gate).collect();
    assert_eq!(opening, [false, true, true, false]);
}

#[test]
fn requests_are_recorded_completely() {
    let onegate = onegate();
    get(&onegate, "/service?extended=true", 101);
    put(&onegate, "/vm", 101, "data=A%3D1%0AB%3Dx+y&type=1");
    let requests = onegate.requests();
    let [service, update] = &requests[..] else { panic!("{requests:?}") };
    assert_eq!((service.method.as_str(), service.path()), ("GET", "/service"));
    assert_eq!(service.target, "/service?extended=true");
    assert_eq!(service.header("x-onegate-token"), Some("token-of-101"));
    assert_eq!(service.vm_id(), Some(101));
    assert_eq!(service.update(), None);
    assert_eq!(update.body, "data=A%3D1%0AB%3Dx+y&type=1");
    assert_eq!(update.update().as_deref(), Some("A=1\nB=x y"));
    assert!(update.at > service.at);
    assert_eq!(onegate.peak_requests_per_second(), 2);
}

#[test]
fn scripted_answer_is_used_once_per_route() {
    let onegate = onegate();
    let bad = || Reply::Status(500, "oned is busy".to_owned());
    onegate.script("GET /service", [bad(), Reply::Regular, bad()]);
    onegate.script("*", [Reply::Status(403, "restricted".to_owned())]);
    assert_eq!(get(&onegate, "/service?extended=true", 101), text(500, "oned is busy"));
    assert_eq!(get(&onegate, "/vm", 101), text(403, "restricted"));
    let statuses = [(); 3].map(|()| get(&onegate, "/service", 101).0);
    assert_eq!(statuses, [200, 500, 200]);
    onegate.script("*", vec![bad(); 100]);
    assert_eq!(get(&onegate, "/vm", 101).0, 500);
    onegate.clear_scripts();
    assert_eq!(get(&onegate, "/vm", 101).0, 200);
}

#[test]
fn simulates_missing_and_invalid_answers() {
    let onegate = onegate();
    let whole = get(&onegate, "/vm", 101).1;
    let ask = || exchange(&onegate, &(head("GET", "/vm", 101) + "\r\n"));
    onegate.script(
        "*",
        [
            Reply::Bytes(b"\x00SSH-2.0\r\n".to_vec()),
            Reply::HalfBody,
            Reply::Close,
            Reply::Redirect("http://10.0.0.1/vm".to_owned()),
        ],
    );
    assert_eq!(ask(), "\0SSH-2.0\r\n");
    let half = ask();
    assert!(half.contains(&format!("Content-Length: {}\r\n", whole.len())), "{half}");
    assert_eq!(half.split_once("\r\n\r\n").unwrap().1, &whole[..whole.len() / 2]);
    assert_eq!(ask(), "");
    let redirect = ask();
    assert_eq!(parsed(&redirect), text(302, ""));
    assert!(redirect.contains("\r\nLocation: http://10.0.0.1/vm\r\n"), "{redirect}");
}

#[test]
fn simulates_endless_answers() {
    let mut onegate = onegate();
    onegate.script("*", [Reply::Endless, Reply::Slow, Reply::Hang]);
    let open = || {
        let mut stream = TcpStream::connect(onegate.address()).unwrap();
        stream.write_all((head("GET", "/vm", 101) + "\r\n").as_bytes()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(2500))).unwrap();
        stream
    };
    let mut endless = open();
    let mut much = vec![0; 4 << 20];
    endless.read_exact(&mut much).unwrap();
    assert!(much.starts_with(b"HTTP/1.1 200") && much.ends_with(b"    "));
    assert!(!String::from_utf8_lossy(&much[..500]).contains("Content-Length"));

    let mut slow = open();
    let start = Instant::now();
    let mut three = [0; 3];
    slow.read_exact(&mut three).unwrap();
    assert_eq!(&three, b"HTT");
    assert!((1900..2900).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());

    let mut hanging = open();
    assert!(hanging.read(&mut [0]).is_err());
    // Stopping is not delayed by open connections and closes them.
    let start = Instant::now();
    onegate.stop();
    assert_eq!(hanging.read(&mut [0]).unwrap(), 0);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

#[test]
fn stopped_onegate_refuses_and_restarts_at_same_address() {
    let mut onegate = onegate();
    let address = onegate.address();
    onegate.stop();
    assert_eq!(
        TcpStream::connect(address).unwrap_err().kind(),
        std::io::ErrorKind::ConnectionRefused
    );
    onegate.restart();
    assert_eq!(onegate.address(), address);
    assert_eq!(get(&onegate, "/service", 101), text(200, SERVICE_JSON));
}

#[test]
fn serves_five_hundred_concurrent_requests() {
    let onegate = onegate();
    let start = Instant::now();
    let mut streams: Vec<TcpStream> =
        std::iter::repeat_with(|| TcpStream::connect(onegate.address()).unwrap())
            .take(500)
            .collect();
    for stream in &mut streams {
        stream.write_all((head("GET", "/service", 101) + "\r\n").as_bytes()).unwrap();
    }
    for stream in &mut streams {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(parsed(&answer), text(200, SERVICE_JSON));
    }
    assert_eq!(onegate.requests().len(), 500);
    let elapsed = start.elapsed();
    if elapsed < Duration::from_secs(1) {
        assert_eq!(onegate.peak_requests_per_second(), 500);
    }
}
