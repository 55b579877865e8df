//! The NVML simulator, loaded as the agent loads NVML: by dlopen, through nvml-wrapper, in a child
//! process.
//!
//! The library reads its script from the environment, so each test starts this executable again as
//! [`child`] with a query and reads what the child printed.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "tests fail by panicking, and the child process prints its answers"
)]

use std::{
    env, fs,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nvml_wrapper::{
    Nvml,
    bitmasks::event::EventTypes,
    enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor},
    error::NvmlError,
    structs::device::FieldId,
};
use serde_json::{Value, json};
use supernode_tests::{Output, Sandbox, eventually, nvml_library, run};

/// NVML_FI_DEV_REMAPPED_FAILURE of nvml.h; the wrapper has no getter for it.
const REMAP_FAILURE: FieldId = FieldId(145);
const QUESTION: &str = "SUPERNODE_TESTS_NVML_QUESTION";

struct SimulatedDriver {
    sandbox: Sandbox,
}

impl SimulatedDriver {
    fn new(script: &Value) -> Self {
        let sandbox = Sandbox::new("nvml");
        sandbox.write("nvml.json", script.to_string());
        Self { sandbox }
    }

    /// Runs a query in a child process; its answers are the lines that start with `> `.
    fn query(&self, question: &str) -> (Vec<String>, Output) {
        let mut command = Command::new(env::current_exe().unwrap());
        command
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .env(QUESTION, question)
            .env("NVML_SIMULATOR", self.sandbox.join("nvml.json"));
        let output = run(&mut command, Duration::from_secs(20));
        let answers = output.stdout.lines().filter_map(|line| line.strip_prefix("> "));
        (answers.map(str::to_owned).collect(), output)
    }

    fn answers(&self, question: &str) -> Vec<String> {
        let (answers, output) = self.query(question);
        assert_eq!(output.code, Some(0), "{output:#?}");
        answers
    }
}

fn report(answer: &str) {
    println!("> {answer}");
}

#[test]
#[ignore = "started by the tests of this file"]
fn child() {
    let Ok(question) = env::var(QUESTION) else {
        return;
    };
    // The test runner's own output is at the beginning of this line.
    println!();
    let nvml = match Nvml::builder().lib_path(nvml_library().as_os_str()).init() {
        Ok(nvml) => nvml,
        Err(error) => return report(&format!("init {error:?}")),
    };
    let answer = match question.as_str() {
        "gpus" => gpus(&nvml),
        "health" => health(&nvml),
        "mig" => mig(&nvml),
        "xid" => xid(&nvml),
        "hang" => {
            hang(nvml);
            Ok(())
        }
        _ => Ok(()),
    };
    if let Err(error) = answer {
        report(&format!("{error:?}"));
    }
}

fn gpus(nvml: &Nvml) -> Result<(), NvmlError> {
    report(&nvml.sys_driver_version()?);
    for index in 0..nvml.device_count()? {
        let gpu = nvml.device_by_index(index)?;
        let (uuid, name, pci) = (gpu.uuid()?, gpu.name()?, gpu.pci_info()?);
        let (minor, memory) = (gpu.minor_number()?, gpu.memory_info()?.total >> 20);
        assert_eq!(nvml.device_by_uuid(uuid.as_str())?.index()?, index);
        assert_eq!(nvml.device_by_pci_bus_id(pci.bus_id.as_str())?.index()?, index);
        report(&format!("{uuid} {name} {} {} {minor} {memory}", pci.bus_id, pci.bus));
    }
    Ok(())
}

fn health(nvml: &Nvml) -> Result<(), NvmlError> {
    for index in 0..nvml.device_count()? {
        let gpu = nvml.device_by_index(index)?;
        report(&format!(
            "{:?}",
            gpu.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile)
        ));
        for sample in gpu.field_values_for(&[REMAP_FAILURE])? {
            let value = sample.and_then(|sample| sample.value);
            report(&format!("{value:?}"));
        }
        report(&format!("{:?}", gpu.temperature(TemperatureSensor::Gpu)));
        report(&format!("{:?}", gpu.power_usage()));
    }
    Ok(())
}

fn mig(nvml: &Nvml) -> Result<(), NvmlError> {
    let gpu = nvml.device_by_index(0)?;
    report(&format!("{}", gpu.mig_mode()?.current));
    for index in 0..gpu.mig_device_count()? {
        let mig = match gpu.mig_device_by_index(index) {
            Err(NvmlError::NotFound) => continue,
            mig => mig?,
        };
        assert!(mig.mig_is_mig_device_handle()?);
        assert_eq!(mig.mig_parent_device()?.uuid()?, gpu.uuid()?);
        report(&format!("{} {}", mig.uuid()?, mig.memory_info()?.total >> 20));
    }
    Ok(())
}

fn xid(nvml: &Nvml) -> Result<(), NvmlError> {
    let gpu = nvml.device_by_index(0)?;
    let set = gpu.register_events(EventTypes::CRITICAL_XID_ERROR, nvml.create_event_set()?);
    let set = set.map_err(|error| error.error)?;
    loop {
        let start = Instant::now();
        let event = set.wait(400)?;
        report(&format!(
            "{} {:?} {}",
            event.device.uuid()?,
            event.event_data,
            start.elapsed().as_millis() >= 100
        ));
    }
}

fn hang(nvml: Nvml) {
    let nvml = Arc::new(nvml);
    let other = Arc::clone(&nvml);
    let hanging = thread::spawn(move || other.device_by_index(0).map(|_| ()));
    thread::sleep(Duration::from_millis(200));
    report(&format!("{:?}", nvml.device_count()));
    report(&format!("{}", hanging.is_finished()));
    std::process::exit(0);
}

#[test]
fn reports_the_scripted_gpus() {
    let driver = SimulatedDriver::new(&json!({"driver_version": "535.1", "gpus": [
        {"uuid": "GPU-a", "name": "NVIDIA L4", "memory_mib": 23034,
            "pci_address": "0000:21:00.0", "minor": 1},
        {"uuid": "GPU-b", "pci_address": "0001:c1:1f.0"},
    ]}));
    let expected = [
        "535.1",
        "GPU-a NVIDIA L4 00000000:21:00.0 33 1 23034",
        "GPU-b NVIDIA A100-PCIE-40GB 00000001:C1:1F.0 193 1 40960",
    ];
    assert_eq!(driver.answers("gpus"), expected);
}

#[test]
fn missing_feature_returns_not_supported() {
    let driver = SimulatedDriver::new(&json!({"gpus": [
        {"uuid": "GPU-a", "ecc_uncorrected": 3, "remap_failed": true, "temperature": 41,
            "power_mw": 52000},
        {"uuid": "GPU-b"},
    ]}));
    let none = "Err(NotSupported)";
    assert_eq!(
        driver.answers("health"),
        ["Ok(3)", "Ok(U32(1))", "Ok(41)", "Ok(52000)", none, none, none, none]
    );
}

#[test]
fn function_fails_with_scripted_code() {
    let driver = SimulatedDriver::new(&json!({"fail": {"nvmlInit_v2": 9}}));
    assert_eq!(driver.answers("gpus"), ["init DriverNotLoaded"]);

    let driver = SimulatedDriver::new(
        &json!({"gpus": [{"uuid": "GPU-a", "fail": {"nvmlDeviceGetMemoryInfo_v2": 15}}]}),
    );
    assert_eq!(driver.answers("gpus")[1..], ["GpuLost"]);

    let driver = SimulatedDriver::new(&json!({"gpus": [
        {"uuid": "GPU-a"},
        {"uuid": "GPU-b", "fail": {"nvmlDeviceGetHandleByIndex_v2": 16}},
    ]}));
    let answers = driver.answers("gpus");
    assert!(answers[1].starts_with("GPU-a"), "{answers:?}");
    assert_eq!(answers[2], "ResetRequired");
}

#[test]
fn driver_is_not_ready_until_the_file_exists() {
    let sandbox = Sandbox::new("ready");
    let driver = SimulatedDriver::new(
        &json!({"ready_file": sandbox.join("ready"), "driver_version": "550"}),
    );
    assert_eq!(driver.answers("gpus"), ["init UnexpectedVariant(27)"]);
    sandbox.write("ready", "");
    assert_eq!(driver.answers("gpus"), ["550"]);
}

#[test]
fn hung_call_does_not_block_others() {
    let driver = SimulatedDriver::new(
        &json!({"hang": ["nvmlDeviceGetHandleByIndex_v2"], "gpus": [{"uuid": "GPU-a"}]}),
    );
    assert_eq!(driver.answers("hang"), ["Ok(1)", "false"]);
}

#[test]
fn crash_is_a_segmentation_fault() {
    let driver = SimulatedDriver::new(&json!({"crash": ["nvmlDeviceGetCount_v2"]}));
    let (_, output) = driver.query("gpus");
    assert_eq!((output.code, output.signal), (None, Some(11)), "{output:#?}");
}

#[test]
fn call_takes_the_scripted_delay() {
    let driver = SimulatedDriver::new(&json!({"delay_ms": {"nvmlInit_v2": 700}}));
    let start = Instant::now();
    driver.answers("gpus");
    assert!(start.elapsed() >= Duration::from_millis(700));
}

#[test]
fn mig_devices_belong_to_their_parent_gpu() {
    let driver = SimulatedDriver::new(&json!({"gpus": [{"uuid": "GPU-a", "mig": [
        {"uuid": "MIG-1"}, {"uuid": "MIG-2", "memory_mib": 9856},
    ]}]}));
    assert_eq!(driver.answers("mig"), ["1", "MIG-1 4864", "MIG-2 9856"]);
}

#[test]
fn each_event_is_delivered_once_at_its_time() {
    let driver =
        SimulatedDriver::new(&json!({"gpus": [{"uuid": "GPU-a"}, {"uuid": "GPU-b"}], "events": [
            {"after_ms": 200, "type": "xid", "data": 79},
            {"type": "xid", "data": 48, "gpu": 1},
            {"type": "double_bit_ecc"},
        ]}));
    // GPU 1 and other event types are not registered; after the one event the wait times out.
    assert_eq!(driver.answers("xid"), ["GPU-a Some(Value(79)) true", "Timeout"]);
}

#[test]
fn file_event_reaches_sets_registered_before_the_file() {
    let sandbox = Sandbox::new("moment");
    let past = sandbox.write("past", "");
    let driver = SimulatedDriver::new(&json!({"gpus": [{"uuid": "GPU-a"}], "events": [
        {"type": "xid", "data": 79, "when_file": past},
        {"type": "xid", "data": 48, "when_file": sandbox.join("never")},
    ]}));
    assert!(eventually(Duration::from_secs(5), || {
        let written = fs::metadata(sandbox.join("past")).unwrap().modified().unwrap();
        written.elapsed().is_ok_and(|age| age > Duration::from_millis(100))
    }));
    assert_eq!(driver.answers("xid"), ["Timeout"]);
}

#[test]
fn invalid_script_is_reported_on_stderr() {
    for script in [
        json!({"driver": "550"}),
        json!({"gpus": [{"uuid": "GPU-a", "memory": 1}]}),
        json!({"fail": {"nvmlInit": 9}}),
        json!({"gpus": [{"uuid": "GPU-a", "pci_address": "01-00"}]}),
        json!({"events": [{"type": "xid"}]}),
    ] {
        let (answers, output) = SimulatedDriver::new(&script).query("gpus");
        assert_eq!(answers, ["init Unknown"], "{script}");
        assert!(
            output.stderr.contains("nvml-simulator: nvmlInit_v2: "),
            "{script}: {}",
            output.stderr
        );
    }
    let driver = SimulatedDriver::new(&json!({}));
    fs::remove_file(driver.sandbox.join("nvml.json")).unwrap();
    assert_eq!(driver.answers("gpus"), ["init Unknown"]);
}

#[test]
fn calls_are_logged() {
    let sandbox = Sandbox::new("log");
    let log = sandbox.join("calls");
    let driver = SimulatedDriver::new(&json!({"log": log, "fail": {"nvmlDeviceGetCount_v2": 999}}));
    driver.answers("gpus");
    let calls = fs::read_to_string(log).unwrap();
    let expected = [
        "nvmlInit_v2",
        // nvml-wrapper calls it to determine the numbering of fields.
        "nvmlSystemGetDriverVersion",
        "nvmlSystemGetDriverVersion",
        "nvmlDeviceGetCount_v2",
        "nvmlShutdown",
    ];
    assert_eq!(calls.lines().collect::<Vec<_>>(), expected);
}
