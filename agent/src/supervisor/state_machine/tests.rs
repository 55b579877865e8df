use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::gpu::verdict::GpuDevice;
use crate::values::{GpuUuid, PciAddress};

const DEFAULT_POLICY: Policy =
    Policy { gpu_required: false, on_failure: OnFailure::Cpu, on_available: OnAvailable::Announce };

fn gpu_verdict() -> Verdict {
    let device = GpuDevice {
        index: 0,
        uuid: GpuUuid::parse("GPU-a").unwrap(),
        name: None,
        pci_address: PciAddress::parse("0000:01:00.0"),
        memory_mib: None,
        minor: None,
    };
    Verdict::Gpu { devices: vec![device], missing: Vec::new() }
}

fn finding(reason: Reason) -> Finding {
    Finding::new(reason, "why")
}

fn container(event: ContainerEvent) -> Event {
    Event::Container { event, up_for: Duration::from_secs(10) }
}

/// Upper bound of commands without a wait: remove the old container; on the GPU and then on the CPU
/// inspect, start the existing one, remove it, create one and remove that; ping the engine.
const MAX_COMMANDS_WITHOUT_WAIT: u32 = 12;

/// A state machine, its next command, and the history that the invariants need.
#[derive(Debug)]
struct Simulation {
    state_machine: StateMachine,
    command: Command,
    /// Fallback WARNINGs since the container last started on the GPU.
    warned: Vec<Reason>,
    /// Commands since the last one that waits.
    commands: u32,
    /// Launches, and the time waited, since the restart delay was last reset.
    launches: u32,
    waited: Duration,
}

impl Simulation {
    fn new(policy: Policy, verdict: Verdict) -> Self {
        let warned = verdict.finding().map(|finding| finding.reason).into_iter().collect();
        let (state_machine, command) = StateMachine::new(policy, verdict);
        Self { state_machine, command, warned, commands: 0, launches: 1, waited: Duration::ZERO }
    }

    /// Applies an event and checks the invariants.
    #[track_caller]
    fn apply(&mut self, event: Event) -> Vec<Notification> {
        let Transition { notifications, command } = self.state_machine.handle(event.clone());
        if self.command == Command::CreateAndStart
            && matches!(event, Event::Done)
            && self.state_machine.is_on_gpu()
        {
            self.warned.clear();
        }
        for notification in &notifications {
            match notification {
                Notification::CpuFallback(finding) => self.warned.push(finding.reason),
                Notification::EngineUnavailable => {
                    (self.launches, self.waited) = (0, Duration::ZERO)
                }
                _ => {}
            }
        }
        if matches!(event, Event::Container { up_for, .. } if up_for >= HEALTHY_AFTER) {
            (self.launches, self.waited) = (0, Duration::ZERO);
        }
        match &command {
            // Never two containers: before a start, the name is known to be free.
            Command::CreateAndStart => assert!(
                matches!(event, Event::Inspected(Existing::Absent))
                    || self.command == Command::RemoveExisting && matches!(event, Event::Done),
                "{event:?}: {self:?}"
            ),
            Command::StartExisting => {
                assert!(matches!(event, Event::Inspected(Existing::Exited)), "{event:?}: {self:?}")
            }
            // Any other inspection belongs to a launch that continues on the CPU.
            Command::Inspect
                if !matches!(self.command, Command::Inspect | Command::RemoveFailed(_)) =>
            {
                self.launches += 1;
                assert!(self.waited >= min_wait(self.launches), "{event:?}: {self:?}");
            }
            _ => {}
        }
        // The CPU is used only after its WARNING, and never if the GPU is required.
        if matches!(command, Command::CreateAndStart | Command::StartExisting | Command::Monitor)
            && let Verdict::Cpu { finding } = self.state_machine.verdict()
        {
            assert!(!self.state_machine.policy.gpu_required, "{event:?}: {self:?}");
            assert!(
                finding.iter().all(|finding| self.warned.contains(&finding.reason)),
                "{event:?}: {self:?}"
            );
        }
        // No busy loop: a limited number of commands, then one that waits.
        self.commands += 1;
        match &command {
            Command::Monitor | Command::Exit(_) => self.commands = 0,
            Command::Sleep(delay) | Command::BackOff(delay) => {
                assert!(*delay >= INITIAL_DELAY, "{event:?}: {self:?}");
                self.commands = 0;
                self.waited += *delay;
            }
            _ => assert!(self.commands <= MAX_COMMANDS_WITHOUT_WAIT, "{event:?}: {self:?}"),
        }
        self.command = command;
        notifications
    }

    /// Lets every command succeed. Returns whether the container finally runs or the state machine
    /// has terminated.
    fn recovers(&mut self) -> bool {
        for _ in 0..MAX_COMMANDS_WITHOUT_WAIT {
            self.apply(match &self.command {
                Command::Monitor | Command::Exit(_) => return true,
                Command::Inspect => Event::Inspected(Existing::Absent),
                Command::CheckEngine | Command::Reconnect => Event::Engine { answers: true },
                Command::CheckRunning => Event::ContainerRunning(true),
                Command::Probe => Event::GpuHealthy(true),
                _ => Event::Done,
            });
        }
        false
    }
}

/// Returns the minimum total delay before launch `n` without a healthy run. Some launches need no
/// delay: the first one, the one after the first stop, and the one on the CPU after a GPU failure.
/// Launches after a GPU retry have their own delays.
fn min_wait(n: u32) -> Duration {
    let free = 3 + GPU_RETRY_DELAYS.len() as u32;
    (0..n.saturating_sub(free)).map(|n| (INITIAL_DELAY * 2_u32.pow(n.min(10))).min(MAX_DELAY)).sum()
}

/// Random choices for one event.
#[derive(Debug, Clone, Copy)]
struct Choices {
    which: usize,
    finding: usize,
    existing: usize,
    container_event: usize,
    up_for: u16,
}

fn choices() -> impl Strategy<Value = Choices> {
    any::<[u8; 6]>().prop_map(|[which, finding, existing, container_event, high, low]| Choices {
        which: which.into(),
        finding: finding.into(),
        existing: existing.into(),
        container_event: container_event.into(),
        // A third of the runs are healthy.
        up_for: u16::from_be_bytes([high, low]) % 900,
    })
}

fn pick<T: Clone>(among: &[T], which: usize) -> T {
    among[which % among.len()].clone()
}

impl Choices {
    /// One of the answers that the documentation of the command lists.
    fn answer(self, command: &Command) -> Event {
        let reasons = [Reason::RuntimeStartFailed, Reason::GpuNotVisible, Reason::GpuFailed];
        let finding = finding(pick(&reasons, self.finding));
        let gpu_start_failed = Event::GpuStartFailed(finding.clone());
        let flag = self.which.is_multiple_of(2);
        let existing = [
            Existing::Absent,
            Existing::UpToDate,
            Existing::WithoutGpu(finding.clone()),
            Existing::CpuFallback(finding.clone()),
            Existing::Exited,
            Existing::Outdated,
        ];
        let events = [
            ContainerEvent::Exited(Some(1)),
            ContainerEvent::Exited(None),
            ContainerEvent::GpuFailed(finding.clone()),
            ContainerEvent::GpuLost,
            ContainerEvent::GpuAvailable,
            ContainerEvent::Unresponsive,
            ContainerEvent::SuperLinkChanged,
        ];
        let up_for = Duration::from_secs(self.up_for.into());
        let answers = match command {
            Command::Inspect => {
                vec![Event::Inspected(pick(&existing, self.existing)), Event::Failed]
            }
            Command::RemoveExisting | Command::RemoveFailed(_) => {
                vec![Event::Done, Event::Failed]
            }
            Command::CreateAndStart => vec![Event::Done, gpu_start_failed, Event::Failed],
            Command::StartExisting => {
                vec![Event::Done, Event::Refused, gpu_start_failed, Event::Failed]
            }
            Command::Monitor => {
                vec![Event::Container { event: pick(&events, self.container_event), up_for }]
            }
            Command::CheckEngine | Command::Reconnect => vec![Event::Engine { answers: flag }],
            Command::CheckRunning => vec![Event::ContainerRunning(flag)],
            Command::BackOff(_) => {
                vec![Event::Done, container(ContainerEvent::GpuFailed(finding))]
            }
            Command::Probe => vec![Event::GpuHealthy(flag)],
            Command::Sleep(_) | Command::Stop(_) | Command::StopAndRemove | Command::Exit(_) => {
                vec![Event::Done]
            }
        };
        pick(&answers, self.which)
    }

    /// An answer to any command.
    fn any_event(self) -> Event {
        let commands = [
            Command::Inspect,
            Command::RemoveExisting,
            Command::StartExisting,
            Command::Monitor,
            Command::CheckEngine,
            Command::CheckRunning,
            Command::Probe,
        ];
        self.answer(&pick(&commands, self.which / 4))
    }
}

fn simulation() -> impl Strategy<Value = Simulation> {
    let on_failure = select(vec![OnFailure::Cpu, OnFailure::Restart, OnFailure::Ignore]);
    let on_available = select(vec![OnAvailable::Announce, OnAvailable::Restart]);
    let cpu =
        select(vec![Verdict::gpu_not_enabled(), Verdict::cpu(finding(Reason::DriverNotLoaded))]);
    let verdict = prop_oneof![3 => Just(gpu_verdict()), 1 => cpu];
    (any::<bool>(), on_failure, on_available, verdict).prop_map(
        |(required, on_failure, on_available, verdict)| {
            // The daemon exits before supervision if a required GPU is missing.
            let gpu_required = required && matches!(verdict, Verdict::Gpu { .. });
            Simulation::new(Policy { gpu_required, on_failure, on_available }, verdict)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// No sequence of events leads to two containers, to a busy loop, to the CPU without a
    /// WARNING, or to the CPU if the GPU is required; and the node recovers from any state.
    #[test]
    fn invariants_hold_for_valid_events(
        mut simulation in simulation(),
        choices in prop::collection::vec(choices(), 1..200),
    ) {
        for choice in choices {
            let event = choice.answer(&simulation.command);
            simulation.apply(event);
        }
        prop_assert!(simulation.recovers(), "{simulation:?}");
    }

    /// The same for events that do not answer the last command.
    #[test]
    fn invariants_hold_for_arbitrary_events(
        mut simulation in simulation(),
        choices in prop::collection::vec(choices(), 1..200),
    ) {
        for choice in choices {
            simulation.apply(choice.any_event());
        }
        prop_assert!(simulation.recovers(), "{simulation:?}");
    }
}

/// A node whose container runs.
fn running(policy: Policy, verdict: Verdict) -> Simulation {
    let mut simulation = Simulation::new(policy, verdict);
    assert!(simulation.recovers());
    simulation
}

#[test]
fn restart_delay_doubles_until_healthy() {
    let mut simulation = running(DEFAULT_POLICY, Verdict::gpu_not_enabled());
    let mut delays = Vec::new();
    for _ in 0..8 {
        simulation.apply(container(ContainerEvent::Exited(Some(1))));
        simulation.apply(Event::Engine { answers: true });
        let Command::BackOff(delay) = simulation.command else { panic!("{simulation:?}") };
        delays.push(delay.as_secs());
        simulation.recovers();
    }
    assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60]);
    simulation
        .apply(Event::Container { event: ContainerEvent::Exited(Some(1)), up_for: HEALTHY_AFTER });
    simulation.apply(Event::Engine { answers: true });
    assert_eq!(simulation.command, Command::BackOff(INITIAL_DELAY));
}

#[test]
fn first_stop_is_immediate_second_is_delayed() {
    for (event, command) in [
        (ContainerEvent::GpuLost, Command::StopAndRemove),
        (ContainerEvent::Unresponsive, Command::Stop(GracePeriod::Short)),
        (ContainerEvent::SuperLinkChanged, Command::Inspect),
    ] {
        let mut simulation = running(DEFAULT_POLICY, gpu_verdict());
        simulation.apply(container(event.clone()));
        assert_eq!(simulation.command, command);
        simulation.recovers();
        simulation.apply(container(event));
        assert_eq!(simulation.command, Command::Sleep(INITIAL_DELAY * 2));
    }
}

#[test]
fn engine_outage_resets_restart_delay() {
    let mut simulation = running(DEFAULT_POLICY, Verdict::gpu_not_enabled());
    for _ in 0..3 {
        simulation.apply(container(ContainerEvent::Exited(None)));
        for _ in 0..3 {
            simulation.apply(Event::Engine { answers: false });
            assert_eq!(simulation.command, Command::Sleep(ENGINE_RETRY_INTERVAL));
            simulation.apply(Event::Done);
        }
        simulation.apply(Event::Engine { answers: true });
        assert_eq!(simulation.command, Command::CheckRunning);
        simulation.apply(Event::ContainerRunning(false));
        assert_eq!(simulation.command, Command::BackOff(INITIAL_DELAY));
        simulation.recovers();
    }
}

#[test]
fn launch_failing_on_cpu_too_returns_to_gpu() {
    let mut simulation = running(DEFAULT_POLICY, gpu_verdict());
    simulation.apply(container(ContainerEvent::Exited(Some(1))));
    simulation.apply(Event::Engine { answers: true });
    let mut notifications = Vec::new();
    for _ in 0..3 {
        simulation.apply(Event::Done);
        assert_eq!(simulation.state_machine.verdict(), &gpu_verdict());
        simulation.apply(Event::Inspected(Existing::Absent));
        simulation.apply(Event::GpuStartFailed(finding(Reason::RuntimeStartFailed)));
        notifications.extend(simulation.apply(Event::Done));
        assert_eq!(simulation.state_machine.fallback_from(), Some(&gpu_verdict()));
        simulation.apply(Event::Inspected(Existing::Absent));
        notifications.extend(simulation.apply(Event::Failed));
        notifications.extend(simulation.apply(Event::Engine { answers: true }));
    }
    let warnings = notifications
        .iter()
        .filter(|notification| matches!(notification, Notification::CpuFallback(_)))
        .count();
    assert_eq!(warnings, 1, "{notifications:?}");
    assert_eq!(simulation.state_machine.fallback_from(), None);
}

#[test]
fn failed_gpu_gets_three_attempts() {
    let mut simulation =
        running(Policy { on_failure: OnFailure::Restart, ..DEFAULT_POLICY }, gpu_verdict());
    let failed = || container(ContainerEvent::GpuFailed(finding(Reason::GpuFailed)));
    simulation.apply(failed());
    assert_eq!(simulation.command, Command::Stop(GracePeriod::Configured));
    let mut delays = Vec::new();
    simulation.apply(Event::Done);
    while let Command::Sleep(delay) = simulation.command {
        delays.push(delay);
        simulation.apply(Event::Done);
        // The first probe finds the GPU usable, and it fails again.
        simulation.apply(Event::GpuHealthy(delays.len() == 1));
        if delays.len() == 1 {
            simulation.recovers();
            simulation.apply(failed());
            simulation.apply(Event::Done);
        }
    }
    assert_eq!(delays, GPU_RETRY_DELAYS);
    assert_eq!(
        simulation.state_machine.verdict().finding().map(|finding| finding.reason),
        Some(Reason::GpuFailed)
    );
    assert_eq!(simulation.command, Command::Inspect);
}

#[test]
fn only_first_launch_failure_terminates() {
    let mut simulation = Simulation::new(DEFAULT_POLICY, Verdict::gpu_not_enabled());
    simulation.apply(Event::Failed);
    assert_eq!(simulation.command, Command::Exit(ExitReason::LaunchFailed));
    let mut simulation = running(DEFAULT_POLICY, Verdict::gpu_not_enabled());
    simulation.apply(container(ContainerEvent::SuperLinkChanged));
    simulation.apply(Event::Failed);
    assert_eq!(simulation.command, Command::CheckEngine);
}

#[test]
fn required_gpu_failure_terminates() {
    let policy = Policy { gpu_required: true, ..DEFAULT_POLICY };
    let mut simulation = running(policy, gpu_verdict());
    let notifications =
        simulation.apply(container(ContainerEvent::GpuFailed(finding(Reason::GpuFailed))));
    assert!(matches!(notifications[..], [Notification::RequiredGpuFailed(_)]), "{notifications:?}");
    assert_eq!(simulation.command, Command::Exit(ExitReason::GpuRequired));
    let mut simulation = Simulation::new(policy, gpu_verdict());
    let notifications = simulation
        .apply(Event::Inspected(Existing::CpuFallback(finding(Reason::RuntimeStartFailed))));
    assert!(matches!(notifications[..], [Notification::GpuRequired(_)]), "{notifications:?}");
    assert_eq!(simulation.command, Command::Exit(ExitReason::GpuRequired));
}

#[test]
fn late_gpu_is_logged_or_reclaimed() {
    let verdict = || Verdict::cpu(finding(Reason::DriverNotLoaded));
    let mut simulation = running(DEFAULT_POLICY, verdict());
    assert!(simulation.state_machine.awaits_gpu());
    simulation.apply(container(ContainerEvent::GpuAvailable));
    assert!(
        simulation.command == Command::Monitor && !simulation.state_machine.awaits_gpu(),
        "{simulation:?}"
    );
    let mut simulation =
        running(Policy { on_available: OnAvailable::Restart, ..DEFAULT_POLICY }, verdict());
    simulation.apply(container(ContainerEvent::GpuAvailable));
    assert_eq!(simulation.command, Command::Exit(ExitReason::RestartRequested));
    assert!(!running(DEFAULT_POLICY, Verdict::gpu_not_enabled()).state_machine.awaits_gpu());
}

#[test]
fn outdated_container_is_removed_before_creation() {
    let mut simulation = Simulation::new(DEFAULT_POLICY, Verdict::gpu_not_enabled());
    for (event, command) in [
        (Event::Inspected(Existing::Outdated), Command::RemoveExisting),
        (Event::Done, Command::CreateAndStart),
        (Event::Done, Command::Monitor),
    ] {
        assert!(simulation.apply(event).is_empty());
        assert_eq!(simulation.command, command);
    }
    // If the CPU is the target, a fallback container is outdated.
    let mut simulation = Simulation::new(DEFAULT_POLICY, Verdict::gpu_not_enabled());
    simulation.apply(Event::Inspected(Existing::CpuFallback(finding(Reason::RuntimeStartFailed))));
    assert_eq!(simulation.command, Command::RemoveExisting);
}

#[test]
fn refused_restart_recreates_container() {
    let mut simulation = Simulation::new(DEFAULT_POLICY, gpu_verdict());
    for (event, command) in [
        (Event::Inspected(Existing::Exited), Command::StartExisting),
        (Event::Refused, Command::RemoveExisting),
        (Event::Done, Command::CreateAndStart),
        (Event::Done, Command::Monitor),
    ] {
        simulation.apply(event);
        assert_eq!(simulation.command, command);
    }
}

#[test]
fn matching_container_is_adopted_unless_gpu_is_missing() {
    let mut simulation = Simulation::new(DEFAULT_POLICY, gpu_verdict());
    let notifications = simulation.apply(Event::Inspected(Existing::UpToDate));
    assert!(matches!(notifications[..], [Notification::Adopted]), "{notifications:?}");
    assert_eq!(simulation.command, Command::Monitor);
    let mut simulation = Simulation::new(DEFAULT_POLICY, gpu_verdict());
    let notifications =
        simulation.apply(Event::Inspected(Existing::WithoutGpu(finding(Reason::GpuNotVisible))));
    assert!(
        matches!(
            &notifications[..],
            [Notification::Replacing(why)] if why.reason == Reason::GpuNotVisible
        ),
        "{notifications:?}"
    );
    assert_eq!(
        (simulation.command, simulation.state_machine.verdict()),
        (Command::RemoveExisting, &gpu_verdict())
    );
}

#[test]
fn running_container_survives_engine_disconnect() {
    let mut simulation = running(DEFAULT_POLICY, gpu_verdict());
    for (event, command) in [
        (container(ContainerEvent::Exited(None)), Command::CheckEngine),
        (Event::Engine { answers: true }, Command::CheckRunning),
        (Event::ContainerRunning(true), Command::Sleep(INITIAL_DELAY)),
        (Event::Done, Command::Monitor),
    ] {
        assert!(simulation.apply(event).is_empty());
        assert_eq!(simulation.command, command);
    }
}

#[test]
fn restart_notification_has_reason_and_delay() {
    let mut simulation = running(DEFAULT_POLICY, Verdict::gpu_not_enabled());
    let again = |notifications: Vec<Notification>| match notifications[..] {
        [Notification::RestartScheduled(reason, delay)] => (reason, delay.as_secs()),
        _ => panic!("{notifications:?}"),
    };
    simulation.apply(container(ContainerEvent::Exited(Some(137))));
    assert_eq!(
        again(simulation.apply(Event::Engine { answers: true })),
        (RestartReason::Exited(Some(137)), 1)
    );
    simulation.recovers();
    simulation.apply(container(ContainerEvent::Exited(None)));
    simulation.apply(Event::Engine { answers: true });
    assert_eq!(
        again(simulation.apply(Event::ContainerRunning(false))),
        (RestartReason::Exited(None), 2)
    );
    simulation.apply(Event::Done);
    let notifications = simulation.apply(Event::Failed);
    assert!(matches!(notifications[..], [Notification::LaunchFailed]), "{notifications:?}");
    assert_eq!(
        again(simulation.apply(Event::Engine { answers: true })),
        (RestartReason::LaunchFailed, 4)
    );
}

#[test]
fn engine_outage_and_return_are_notified_once() {
    let mut simulation = running(DEFAULT_POLICY, Verdict::gpu_not_enabled());
    simulation.apply(container(ContainerEvent::Exited(Some(1))));
    let notifications = simulation.apply(Event::Engine { answers: false });
    assert!(matches!(notifications[..], [Notification::EngineUnavailable]), "{notifications:?}");
    assert!(simulation.apply(Event::Done).is_empty());
    assert_eq!(simulation.command, Command::Reconnect);
    assert!(simulation.apply(Event::Engine { answers: false }).is_empty());
    assert_eq!(simulation.command, Command::Sleep(ENGINE_RETRY_INTERVAL));
    simulation.apply(Event::Done);
    let notifications = simulation.apply(Event::Engine { answers: true });
    assert!(
        matches!(
            notifications[..],
            [
                Notification::EngineAvailable,
                Notification::RestartScheduled(RestartReason::Exited(Some(1)), INITIAL_DELAY)
            ]
        ),
        "{notifications:?}"
    );
}

#[test]
fn launch_failure_keeps_delay_in_engine_outage() {
    let mut simulation = running(DEFAULT_POLICY, Verdict::gpu_not_enabled());
    simulation.apply(container(ContainerEvent::Exited(Some(1))));
    simulation.apply(Event::Engine { answers: true });
    simulation.apply(Event::Done);
    simulation.apply(Event::Failed);
    simulation.apply(Event::Engine { answers: false });
    simulation.apply(Event::Done);
    simulation.apply(Event::Engine { answers: true });
    assert_eq!(simulation.command, Command::BackOff(INITIAL_DELAY * 2));
}

#[test]
fn ignored_gpu_failure_changes_nothing() {
    let mut simulation =
        running(Policy { on_failure: OnFailure::Ignore, ..DEFAULT_POLICY }, gpu_verdict());
    let failed = || container(ContainerEvent::GpuFailed(finding(Reason::GpuFailed)));
    let notifications = simulation.apply(failed());
    assert!(matches!(notifications[..], [Notification::GpuFailureIgnored(_)]), "{notifications:?}");
    assert_eq!(simulation.command, Command::Monitor);
    simulation.apply(container(ContainerEvent::Exited(Some(1))));
    simulation.apply(Event::Engine { answers: true });
    let notifications = simulation.apply(failed());
    assert!(matches!(notifications[..], [Notification::GpuFailureIgnored(_)]), "{notifications:?}");
    assert_eq!(
        (&simulation.command, simulation.state_machine.verdict()),
        (&Command::BackOff(INITIAL_DELAY), &gpu_verdict())
    );
    simulation.apply(Event::Done);
    assert_eq!(simulation.command, Command::Inspect);
}

#[test]
fn gpu_failure_during_backoff_is_handled() {
    for (on_failure, command) in [
        (OnFailure::Restart, Command::Stop(GracePeriod::Configured)),
        (OnFailure::Cpu, Command::Inspect),
    ] {
        let mut simulation = running(Policy { on_failure, ..DEFAULT_POLICY }, gpu_verdict());
        simulation.apply(container(ContainerEvent::Exited(Some(1))));
        simulation.apply(Event::Engine { answers: true });
        simulation.apply(container(ContainerEvent::GpuFailed(finding(Reason::GpuFailed))));
        assert_eq!(simulation.command, command);
    }
}

#[test]
fn healthy_run_grants_new_gpu_attempts() {
    let mut simulation =
        running(Policy { on_failure: OnFailure::Restart, ..DEFAULT_POLICY }, gpu_verdict());
    let failed = |seconds| Event::Container {
        event: ContainerEvent::GpuFailed(finding(Reason::GpuFailed)),
        up_for: Duration::from_secs(seconds),
    };
    for seconds in [10, 599, 600] {
        let notifications = simulation.apply(failed(seconds));
        assert!(matches!(notifications[..], [Notification::GpuRetry(_)]), "{notifications:?}");
        let notifications = simulation.apply(Event::Done);
        let delay = if seconds == 599 { GPU_RETRY_DELAYS[1] } else { GPU_RETRY_DELAYS[0] };
        assert!(
            matches!(
                notifications[..],
                [Notification::GpuProbeScheduled(announced)] if announced == delay
            ),
            "{notifications:?}"
        );
        assert_eq!(simulation.command, Command::Sleep(delay));
        simulation.apply(Event::Done);
        assert_eq!(simulation.command, Command::Probe);
        simulation.apply(Event::GpuHealthy(true));
        assert_eq!(simulation.command, Command::Inspect);
        simulation.recovers();
    }
}

#[test]
fn fallback_warning_repeats_after_gpu_recovered() {
    let mut simulation = running(DEFAULT_POLICY, gpu_verdict());
    let notifications =
        simulation.apply(container(ContainerEvent::GpuFailed(finding(Reason::GpuFailed))));
    assert!(
        matches!(notifications[..], [Notification::CpuFallback(_), Notification::MovingToCpu]),
        "{notifications:?}"
    );
    assert_eq!(simulation.state_machine.fallback_from(), Some(&gpu_verdict()));
    // A GPU that does not start, then starts, then does not start again: two WARNINGs.
    let mut simulation = running(DEFAULT_POLICY, gpu_verdict());
    for _ in 0..2 {
        simulation.apply(container(ContainerEvent::SuperLinkChanged));
        if simulation.command != Command::Inspect {
            simulation.apply(Event::Done);
        }
        simulation.apply(Event::Inspected(Existing::Absent));
        simulation.apply(Event::GpuStartFailed(finding(Reason::RuntimeStartFailed)));
        assert_eq!(simulation.command, Command::RemoveFailed(finding(Reason::RuntimeStartFailed)));
        let notifications = simulation.apply(Event::Done);
        assert!(matches!(notifications[..], [Notification::CpuFallback(_)]), "{notifications:?}");
        // The launch on the CPU fails as well, so the next one uses the GPU, and starts.
        simulation.apply(Event::Failed);
        simulation.recovers();
        assert_eq!(simulation.state_machine.verdict(), &gpu_verdict());
    }
}

#[test]
fn delayed_stop_executes_after_delay() {
    for (event, command) in [
        (ContainerEvent::GpuLost, Command::StopAndRemove),
        (ContainerEvent::Unresponsive, Command::Stop(GracePeriod::Short)),
        (ContainerEvent::SuperLinkChanged, Command::Inspect),
    ] {
        let mut simulation = running(DEFAULT_POLICY, gpu_verdict());
        simulation.apply(container(event.clone()));
        simulation.recovers();
        simulation.apply(container(event));
        simulation.apply(Event::Done);
        assert_eq!(simulation.command, command);
        if command != Command::Inspect {
            simulation.apply(Event::Done);
            assert_eq!(simulation.command, Command::Inspect);
        }
    }
}

#[test]
fn terminated_is_final() {
    let mut simulation = running(Policy { gpu_required: true, ..DEFAULT_POLICY }, gpu_verdict());
    simulation.apply(container(ContainerEvent::GpuFailed(finding(Reason::GpuFailed))));
    for event in
        [Event::Done, Event::Inspected(Existing::Absent), container(ContainerEvent::GpuLost)]
    {
        assert!(simulation.apply(event).is_empty());
        assert_eq!(simulation.command, Command::Exit(ExitReason::GpuRequired));
    }
}

#[test]
fn late_gpu_notification_matches_policy() {
    let verdict = || Verdict::cpu(finding(Reason::DriverNotLoaded));
    let notifications =
        running(DEFAULT_POLICY, verdict()).apply(container(ContainerEvent::GpuAvailable));
    assert!(matches!(notifications[..], [Notification::GpuAvailable]), "{notifications:?}");
    let notifications =
        running(Policy { on_available: OnAvailable::Restart, ..DEFAULT_POLICY }, verdict())
            .apply(container(ContainerEvent::GpuAvailable));
    assert!(matches!(notifications[..], [Notification::GpuReclaimed]), "{notifications:?}");
}

#[test]
fn gpu_failure_after_last_attempt_falls_back() {
    let mut simulation =
        running(Policy { on_failure: OnFailure::Restart, ..DEFAULT_POLICY }, gpu_verdict());
    for _ in GPU_RETRY_DELAYS {
        simulation.apply(container(ContainerEvent::GpuFailed(finding(Reason::GpuFailed))));
        assert_eq!(simulation.command, Command::Stop(GracePeriod::Configured));
        simulation.recovers();
    }
    let notifications =
        simulation.apply(container(ContainerEvent::GpuFailed(finding(Reason::GpuFailed))));
    assert!(
        matches!(notifications[..], [Notification::CpuFallback(_), Notification::MovingToCpu]),
        "{notifications:?}"
    );
    assert_eq!(simulation.command, Command::Inspect);
}

#[test]
fn unexpected_gpu_failure_on_cpu_is_retried() {
    let failed = || container(ContainerEvent::GpuFailed(finding(Reason::GpuFailed)));
    let mut simulation = running(DEFAULT_POLICY, Verdict::gpu_not_enabled());
    for event in [failed(), failed()] {
        let notifications = simulation.apply(event);
        assert!(
            matches!(
                notifications[..],
                [Notification::RestartScheduled(RestartReason::LaunchFailed, INITIAL_DELAY)]
            ),
            "{notifications:?}"
        );
        assert_eq!(simulation.command, Command::BackOff(INITIAL_DELAY));
    }
    simulation.apply(Event::Done);
    simulation.apply(Event::Inspected(Existing::Absent));
    let notifications = simulation.apply(Event::GpuStartFailed(finding(Reason::GpuNotVisible)));
    assert!(
        matches!(
            notifications[..],
            [Notification::RestartScheduled(RestartReason::LaunchFailed, _)]
        ),
        "{notifications:?}"
    );
    assert_eq!(
        (simulation.command, simulation.state_machine.verdict()),
        (Command::BackOff(INITIAL_DELAY * 2), &Verdict::gpu_not_enabled())
    );
}
