//! What the supervisor decides: a value that hears what has happened and answers what is to be done
//! next. Pure: it reads no clock, and the time comes in with what has happened and goes out as
//! pauses.
//!
//! ```text
//! look ──┬─ runs, as it is wanted: adopted ────────────────────────────────────────────> watch
//!   ^    ├─ nothing ─────────────────────────────> make ───────────────────────────────>   │
//!   │    ├─ another ──────────────────> clear ──> make   │                             ^   │
//!   │    ├─ ended, as it is wanted ──> start again ──────┼─────────────────────────────┘   │
//!   │    │                              │ refused: clear │                                 │
//!   │    │                                               │ without the GPU                 │
//!   │    └─ stands in for the GPU ─────────> on the CPU <┴ discard                         │
//!   │                                          │                                           │
//!   ├──────────────────────────────────────────┘                                           │
//!   │                                                                                      │
//!   ├─ delay <── the engine answers? <── a launch failed, or the container ended <─────────┤
//!   │                │ no: wait, connect, …      (it runs all the same: wait ──> watch)    │
//!   ├─ stop, or take away <── delay, but for the first <── hangs, has lost its GPU <───────┤
//!   ├─ delay, but for the first <── the service has another SuperLink <────────────────────┤
//!   ├─ on the CPU <──────────────────────┬─ the GPU failed <───────────────────────────────┤
//!   └─ well <── delay, probe <── stop <──┘  (ignored: watch)                               │
//!                                                  the GPU is usable now: told, or anew <──┘
//! ```
//!
//! The delay is 1 s, doubles up to 60 s, and is 1 s again after ten minutes of health or when the
//! engine had gone. Whenever the node must have a GPU and would go on the CPU, it ends. So does a
//! first launch that fails: the service manager tries again, from the beginning.

use std::time::Duration;

use crate::config::settings::{OnFailure, OnLate};
use crate::gpu;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::Verdict;

/// The delay before a container that has ended is started again: the first, and the longest.
const INITIAL_DELAY: Duration = Duration::from_secs(1);
const MAX_DELAY: Duration = Duration::from_secs(60);
/// A run of this length makes the next delay the first again.
const HEALTHY_AFTER: Duration = Duration::from_secs(600);
/// The pauses before a GPU that failed is tried again: as many as tries. They begin anew once it
/// has worked for [`HEALTHY_AFTER`].
const GPU_RETRY_DELAYS: [Duration; 3] =
    [Duration::from_secs(5), Duration::from_secs(10), Duration::from_secs(20)];
/// While the engine is away it is looked for this often.
const ENGINE_RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// What the operator wants.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// `FL_GPU_REQUIRED`.
    pub gpu_required: bool,
    /// `gpu.on_failure`.
    pub on_failure: OnFailure,
    /// `gpu.on_late`.
    pub on_late: OnLate,
}

/// What has happened: the answer to an [`Command`].
#[derive(Debug, Clone)]
pub enum Event {
    /// What has the container's name.
    Inspected(Existing),
    /// It is done.
    Done,
    /// It could not be done: the engine or a file did not do its part.
    Failed,
    /// Docker refuses to start what it has.
    Refused,
    /// The container did not come up with the GPU.
    GpuStartFailed(Finding),
    /// Whether the engine answers.
    Engine {
        /// It does.
        answers: bool,
    },
    /// Whether the container that was watched runs all the same.
    Running(bool),
    /// Whether a probe finds the GPU well.
    GpuHealthy(bool),
    /// The container was watched, and there is a change.
    Changed {
        /// What it is.
        change: ContainerEvent,
        /// For how long this run of the container has been watched; nothing where none runs.
        up_for: Duration,
    },
}

/// What has the container's name.
#[derive(Debug, Clone)]
pub enum Existing {
    /// Nothing.
    Nothing,
    /// A container of this very specification runs, and has its GPU.
    UpToDate,
    /// The same, and the GPU is not in it.
    WithoutGpu(Finding),
    /// One runs on the CPU because this very specification did not come up on the GPU.
    CpuFallback(Finding),
    /// One of this very specification has ended.
    Exited,
    /// Another.
    Outdated,
}

/// What ends the quiet life of a running container.
#[derive(Debug, Clone)]
pub enum ContainerEvent {
    /// It has ended, with this exit code; without one the container or the engine went away.
    Exited(Option<i64>),
    /// Its GPU failed.
    GpuFailed(Finding),
    /// It has no GPU any more, and the machine has.
    GpuLost,
    /// It runs on the CPU, and the GPU is usable now.
    GpuAvailable,
    /// Flower does not answer any more.
    Unresponsive,
    /// The service has another SuperLink.
    SuperLinkChanged,
}

/// What is to be done next. Each is answered by one event; in brackets: by which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Look what has the container's name (Existing, Failed).
    Inspect,
    /// Stop and remove it (Done, Failed).
    RemoveExisting,
    /// Make and start a container (Done, NotOnGpu, Failed).
    CreateAndStart,
    /// Start the one that has ended (Done, Refused, NotOnGpu, Failed).
    StartExisting,
    /// Remove the container that did not come up with the GPU, for this (Done, Failed).
    RemoveFailed(Finding),
    /// Wait until something changes (Changed).
    Monitor,
    /// Ask the engine whether it is there (Engine).
    PingEngine,
    /// Connect to the engine (Engine).
    Reconnect,
    /// See whether the container that was watched still runs (Runs).
    CheckRunning,
    /// Wait (Done).
    Sleep(Duration),
    /// Wait, and watch the GPU meanwhile: the container may have ended of its fault (Done,
    /// Changed).
    BackOff(Duration),
    /// Stop the container (Done, also where it does not stop).
    Stop(Grace),
    /// Stop and remove the container that was watched (Done, also where that fails).
    StopAndRemove,
    /// Ask a probe for the GPU that failed (Well).
    Probe,
    /// It is over: nothing follows.
    Exit(ExitReason),
}

/// How long a container has to stop by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grace {
    /// What the settings give it.
    Configured,
    /// It does nothing that could be finished.
    Short,
}

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// There must be a GPU, and there is none.
    GpuRequired,
    /// The container did not come up, and never had.
    LaunchFailed,
    /// The GPU is usable now, and the story is to begin anew.
    RestartRequested,
}

/// What is told before the next command.
#[derive(Debug, Clone)]
pub enum Notification {
    /// The running container is taken over.
    Adopted,
    /// The running container is replaced, for this.
    Replacing(Finding),
    /// The node leaves the GPU: the WARNING of the fallback.
    CpuFallback(Finding),
    /// The node would have to leave the GPU, and must not.
    GpuRequired(Finding),
    /// The same, of a GPU that failed while the container ran.
    RequiredGpuLost(Finding),
    /// The container moves to the CPU.
    MovingToCpu,
    /// The launch failed.
    LaunchFailed,
    /// The container is started again, after this delay.
    RestartScheduled(RestartReason, Duration),
    /// The engine is waited for.
    EngineUnavailable,
    /// The engine is back.
    EngineAvailable,
    /// The GPU failed, which is ignored.
    GpuFaultIgnored(Finding),
    /// The GPU failed, and is tried again.
    GpuRetry(Finding),
    /// After this delay.
    GpuProbeScheduled(Duration),
    /// The GPU is usable now, for whoever wants it.
    GpuAvailable,
    /// The GPU is usable now, and is taken.
    GpuReclaimed,
}

/// Why a container is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartReason {
    /// It has ended, with this exit code, or is gone.
    Exited(Option<i64>),
    /// It did not come up.
    LaunchFailed,
}

/// What follows from an event: first this is told, then that is done.
#[derive(Debug)]
pub struct Transition {
    /// What is told.
    pub notifications: Vec<Notification>,
    /// What is done.
    pub command: Command,
}

/// Where the node is in its story: what the next event is about.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Inspecting,
    Removing,
    Starting,
    /// The container that did not come up with the GPU goes.
    RemovingFailed(Finding),
    Running,
    /// Whether the engine answers, after this.
    CheckingEngine(RestartReason),
    /// It does not: between two tries, and at one.
    EngineUnavailable(RestartReason),
    Reconnecting(RestartReason),
    /// The connection to the container has gone, and the container perhaps not.
    CheckingContainer,
    Settling,
    /// Before the next start.
    BackingOff,
    /// Before a container that runs is ended, and while it is.
    StopDelayed(StopMode),
    Stopping,
    /// The container of a GPU that failed is stopped; between two tries of the GPU, and at one.
    StoppingForGpu(Finding),
    GpuRetryPending(Finding),
    Probing(Finding),
    Terminated(ExitReason),
}

/// How a container that runs comes to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StopMode {
    Remove,
    Stop,
    /// It is replaced when it is looked for.
    Replace,
}

/// What a container is launched on.
#[derive(Debug, Clone)]
struct Target {
    verdict: Verdict,
    /// The GPU that did not come up or failed, where the verdict stands in for it.
    fallback_from: Option<Verdict>,
}

/// The machine.
#[derive(Debug, Clone)]
pub struct StateMachine {
    policy: Policy,
    state: State,
    target: Target,
    /// The target before the launch that is on its way.
    before: Target,
    /// The reason of the WARNING that holds: it is not given again for every try.
    reported: Option<Reason>,
    /// The delay before the next start.
    delay: Duration,
    /// The tries that a GPU that failed has had.
    gpu_attempts: usize,
    awaits_gpu: bool,
    was_up: bool,
}

impl StateMachine {
    /// A node that is to run on this, which was reported where it is a fallback; and its first
    /// command.
    pub fn new(policy: Policy, verdict: Verdict) -> (Self, Command) {
        let reported = verdict.finding().map(|finding| finding.reason);
        let target = Target { verdict, fallback_from: None };
        let machine = Self {
            policy,
            state: State::Inspecting,
            before: target.clone(),
            target,
            reported,
            delay: INITIAL_DELAY,
            gpu_attempts: 0,
            awaits_gpu: false,
            was_up: false,
        };
        (machine, Command::Inspect)
    }

    /// What the container runs on, or is to be started on.
    pub fn verdict(&self) -> &Verdict {
        &self.target.verdict
    }

    /// The GPU that the verdict stands in for, because it did not come up or failed.
    pub fn fallback_from(&self) -> Option<&Verdict> {
        self.target.fallback_from.as_ref()
    }

    /// Whether the GPU may become usable, which is told once.
    pub fn awaits_gpu(&self) -> bool {
        self.awaits_gpu
    }

    /// What follows from what has happened.
    pub fn handle(&mut self, event: Event) -> Transition {
        let mut notifications = Vec::new();
        let command = self.decide(event, &mut notifications);
        Transition { notifications, command }
    }

    fn decide(&mut self, event: Event, notifications: &mut Vec<Notification>) -> Command {
        let on_gpu = self.on_gpu();
        match (self.state.clone(), event) {
            (State::Inspecting, Event::Inspected(found)) => self.judge(found, notifications),
            (State::Removing, Event::Done) => self.go(State::Starting, Command::CreateAndStart),
            (State::Starting, Event::Done) => {
                if on_gpu {
                    self.reported = None;
                }
                self.watch()
            }
            (State::Starting, Event::Refused) => self.go(State::Removing, Command::RemoveExisting),
            (State::Starting, Event::GpuStartFailed(finding)) if on_gpu => {
                self.go(State::RemovingFailed(finding.clone()), Command::RemoveFailed(finding))
            }
            (State::RemovingFailed(finding), Event::Done) => self.fall_back(finding, notifications),
            (
                State::Inspecting | State::Removing | State::Starting | State::RemovingFailed(_),
                Event::Failed,
            ) => self.not_up(notifications),

            (State::Running, Event::Changed { change, up_for }) => {
                self.change(change, up_for, notifications)
            }
            (State::CheckingEngine(cause), Event::Engine { answers: true }) => {
                self.on_engine_ready(cause, notifications)
            }
            (State::CheckingEngine(cause), Event::Engine { answers: false }) => {
                notifications.push(Notification::EngineUnavailable);
                // A container that went down with the engine is not to blame.
                if matches!(cause, RestartReason::Exited(_)) {
                    self.delay = INITIAL_DELAY;
                }
                self.go(State::EngineUnavailable(cause), Command::Sleep(ENGINE_RETRY_INTERVAL))
            }
            (State::EngineUnavailable(cause), Event::Done) => {
                self.go(State::Reconnecting(cause), Command::Reconnect)
            }
            (State::Reconnecting(cause), Event::Engine { answers: false }) => {
                self.go(State::EngineUnavailable(cause), Command::Sleep(ENGINE_RETRY_INTERVAL))
            }
            (State::Reconnecting(cause), Event::Engine { answers: true }) => {
                notifications.push(Notification::EngineAvailable);
                self.on_engine_ready(cause, notifications)
            }
            (State::CheckingContainer, Event::Running(true)) => {
                self.go(State::Settling, Command::Sleep(INITIAL_DELAY))
            }
            (State::CheckingContainer, Event::Running(false)) => {
                self.schedule_restart(RestartReason::Exited(None), notifications)
            }
            (State::Settling, Event::Done) => self.watch(),

            (State::BackingOff, Event::Done) => {
                self.increase_backoff();
                self.bring_up()
            }
            (
                State::BackingOff,
                Event::Changed { change: ContainerEvent::GpuFailed(finding), .. },
            ) if on_gpu => self.gpu_failed(finding, Command::BackOff(self.delay), notifications),
            (State::StopDelayed(ending), Event::Done) => self.end_container(ending),
            (State::Stopping, Event::Done) => self.bring_up(),

            (State::StoppingForGpu(finding), Event::Done)
            | (State::Probing(finding), Event::GpuHealthy(false)) => {
                self.try_gpu(finding, notifications)
            }
            (State::GpuRetryPending(finding), Event::Done) => {
                self.go(State::Probing(finding), Command::Probe)
            }
            (State::Probing(_), Event::GpuHealthy(true)) => self.bring_up(),

            (State::Terminated(end), _) => Command::Exit(end),
            _ => self.on_unexpected_event(notifications),
        }
    }

    fn go(&mut self, state: State, command: Command) -> Command {
        self.state = state;
        command
    }

    fn end(&mut self, end: ExitReason) -> Command {
        self.go(State::Terminated(end), Command::Exit(end))
    }

    fn on_gpu(&self) -> bool {
        matches!(self.target.verdict, Verdict::Gpu { .. })
    }

    /// Brings the container up, from the target of now.
    fn bring_up(&mut self) -> Command {
        self.before = self.target.clone();
        self.go(State::Inspecting, Command::Inspect)
    }

    fn judge(&mut self, found: Existing, notifications: &mut Vec<Notification>) -> Command {
        match found {
            Existing::Nothing => self.go(State::Starting, Command::CreateAndStart),
            Existing::UpToDate => {
                notifications.push(Notification::Adopted);
                self.watch()
            }
            Existing::CpuFallback(finding) if self.on_gpu() => {
                self.fall_back(finding, notifications)
            }
            Existing::Exited => self.go(State::Starting, Command::StartExisting),
            Existing::WithoutGpu(finding) => {
                // The GPU itself is there: a container that is made anew may have it.
                notifications.push(Notification::Replacing(finding));
                self.go(State::Removing, Command::RemoveExisting)
            }
            Existing::CpuFallback(_) | Existing::Outdated => {
                self.go(State::Removing, Command::RemoveExisting)
            }
        }
    }

    fn watch(&mut self) -> Command {
        if !self.was_up {
            self.was_up = true;
            self.awaits_gpu = gpu::is_recoverable(self.verdict());
        }
        self.go(State::Running, Command::Monitor)
    }

    /// The launch failed. Where it had moved to the CPU: it does not come up there either, so it
    /// was not the GPU, and the next try begins with it again.
    fn not_up(&mut self, notifications: &mut Vec<Notification>) -> Command {
        self.target = self.before.clone();
        if !self.was_up {
            return self.end(ExitReason::LaunchFailed);
        }
        notifications.push(Notification::LaunchFailed);
        self.go(State::CheckingEngine(RestartReason::LaunchFailed), Command::PingEngine)
    }

    /// An event that is no answer to the last command: the node is looked at anew, after a delay.
    fn on_unexpected_event(&mut self, notifications: &mut Vec<Notification>) -> Command {
        if self.was_up {
            self.schedule_restart(RestartReason::LaunchFailed, notifications)
        } else {
            self.end(ExitReason::LaunchFailed)
        }
    }

    fn change(
        &mut self,
        change: ContainerEvent,
        up_for: Duration,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        if up_for >= HEALTHY_AFTER {
            self.delay = INITIAL_DELAY;
            self.gpu_attempts = 0;
        }
        match change {
            ContainerEvent::Exited(code) => {
                self.go(State::CheckingEngine(RestartReason::Exited(code)), Command::PingEngine)
            }
            ContainerEvent::GpuFailed(finding) if self.on_gpu() => {
                self.gpu_failed(finding, Command::Monitor, notifications)
            }
            ContainerEvent::GpuLost => self.schedule_stop(StopMode::Remove),
            ContainerEvent::Unresponsive => self.schedule_stop(StopMode::Stop),
            ContainerEvent::SuperLinkChanged => self.schedule_stop(StopMode::Replace),
            ContainerEvent::GpuAvailable if self.policy.on_late == OnLate::Restart => {
                notifications.push(Notification::GpuReclaimed);
                self.end(ExitReason::RestartRequested)
            }
            ContainerEvent::GpuAvailable => {
                self.awaits_gpu = false;
                notifications.push(Notification::GpuAvailable);
                Command::Monitor
            }
            ContainerEvent::GpuFailed(_) => self.on_unexpected_event(notifications),
        }
    }

    /// The engine answers.
    fn on_engine_ready(
        &mut self,
        cause: RestartReason,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        match cause {
            // The connection may have gone and the container not.
            RestartReason::Exited(None) => self.go(State::CheckingContainer, Command::CheckRunning),
            cause => self.schedule_restart(cause, notifications),
        }
    }

    fn schedule_restart(
        &mut self,
        cause: RestartReason,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        notifications.push(Notification::RestartScheduled(cause, self.delay));
        self.go(State::BackingOff, Command::BackOff(self.delay))
    }

    fn increase_backoff(&mut self) {
        self.delay = (self.delay * 2).min(MAX_DELAY);
    }

    /// A container that runs has to end: the first at once, and one soon after another has to wait,
    /// lest a node does nothing but start.
    fn schedule_stop(&mut self, ending: StopMode) -> Command {
        let delay = self.delay;
        self.increase_backoff();
        if delay > INITIAL_DELAY {
            self.go(State::StopDelayed(ending), Command::Sleep(delay))
        } else {
            self.end_container(ending)
        }
    }

    fn end_container(&mut self, ending: StopMode) -> Command {
        match ending {
            StopMode::Remove => self.go(State::Stopping, Command::StopAndRemove),
            StopMode::Stop => self.go(State::Stopping, Command::Stop(Grace::Short)),
            StopMode::Replace => self.bring_up(),
        }
    }

    /// What `gpu.on_failure` wants; `ignored`: what goes on where it is to be ignored.
    fn gpu_failed(
        &mut self,
        finding: Finding,
        ignored: Command,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        match self.policy.on_failure {
            OnFailure::Ignore => {
                notifications.push(Notification::GpuFaultIgnored(finding));
                ignored
            }
            OnFailure::Restart if self.gpu_attempts < GPU_RETRY_DELAYS.len() => {
                notifications.push(Notification::GpuRetry(finding.clone()));
                self.go(State::StoppingForGpu(finding), Command::Stop(Grace::Configured))
            }
            OnFailure::Restart | OnFailure::Cpu => self.leave_gpu(finding, notifications),
        }
    }

    /// Gives the GPU that failed one of the tries that are fallback_from: with the container stopped, for a
    /// GPU that is in use cannot be reset.
    fn try_gpu(&mut self, finding: Finding, notifications: &mut Vec<Notification>) -> Command {
        let Some(delay) = GPU_RETRY_DELAYS.get(self.gpu_attempts) else {
            return self.leave_gpu(finding, notifications);
        };
        self.gpu_attempts += 1;
        notifications.push(Notification::GpuProbeScheduled(*delay));
        self.go(State::GpuRetryPending(finding), Command::Sleep(*delay))
    }

    /// Leaves a GPU that failed while the container ran on it. An agent that is started again
    /// adopts the container on the CPU: only one that is stopped gives the GPU another chance.
    fn leave_gpu(&mut self, finding: Finding, notifications: &mut Vec<Notification>) -> Command {
        if self.policy.gpu_required {
            notifications.push(Notification::RequiredGpuLost(finding));
            return self.end(ExitReason::GpuRequired);
        }
        self.reported = None;
        self.fall_back(finding, notifications);
        notifications.push(Notification::MovingToCpu);
        self.bring_up()
    }

    /// Leaves the GPU: says so, once, before anything runs on the CPU. Not where there must be one.
    fn fall_back(&mut self, finding: Finding, notifications: &mut Vec<Notification>) -> Command {
        if self.policy.gpu_required {
            notifications.push(Notification::GpuRequired(finding));
            return self.end(ExitReason::GpuRequired);
        }
        if self.reported != Some(finding.reason) {
            self.reported = Some(finding.reason);
            notifications.push(Notification::CpuFallback(finding.clone()));
        }
        let gpu = std::mem::replace(&mut self.target.verdict, Verdict::cpu(finding));
        self.target.fallback_from = Some(gpu);
        self.go(State::Inspecting, Command::Inspect)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::gpu::verdict::GpuDevice;

    const RULES: Policy =
        Policy { gpu_required: false, on_failure: OnFailure::Cpu, on_late: OnLate::Announce };

    fn on_gpu() -> Verdict {
        let device = GpuDevice {
            index: 0,
            uuid: "GPU-a".into(),
            name: None,
            pci_address: "0000:01:00.0".into(),
            memory_mib: None,
            minor: None,
        };
        Verdict::Gpu { devices: vec![device], missing: Vec::new() }
    }

    fn finding(reason: Reason) -> Finding {
        Finding::new(reason, "why")
    }

    fn changed(change: ContainerEvent) -> Event {
        Event::Changed { change, up_for: Duration::from_secs(10) }
    }

    /// More than any chain of acts that do not wait: the old container is taken away; on the GPU,
    /// and then on the CPU, it is looked for, started again, cleared, made and discarded; and the
    /// engine is asked.
    const MAX_ACTS: u32 = 12;

    /// A node, its next command, and what a test remembers of its story.
    #[derive(Debug)]
    struct Simulation {
        machine: StateMachine,
        command: Command,
        /// The WARNINGs since the container came up on the GPU last.
        warned: Vec<Reason>,
        /// The acts since one that waits.
        busy: u32,
        /// How often the container was brought up, and the time that was waited, since the delay
        /// was the first.
        bring_ups: u32,
        waited: Duration,
    }

    impl Simulation {
        fn new(policy: Policy, verdict: Verdict) -> Self {
            let warned = verdict.finding().map(|finding| finding.reason).into_iter().collect();
            let (machine, command) = StateMachine::new(policy, verdict);
            Self { machine, command, warned, busy: 0, bring_ups: 1, waited: Duration::ZERO }
        }

        /// Goes on, and holds the machine to what is true in every story.
        #[track_caller]
        fn hear(&mut self, event: Event) -> Vec<Notification> {
            let Transition { notifications, command } = self.machine.handle(event.clone());
            if self.command == Command::CreateAndStart
                && matches!(event, Event::Done)
                && self.machine.on_gpu()
            {
                self.warned.clear();
            }
            for notifications in &notifications {
                match notifications {
                    Notification::CpuFallback(finding) => self.warned.push(finding.reason),
                    Notification::EngineUnavailable => {
                        (self.bring_ups, self.waited) = (0, Duration::ZERO)
                    }
                    _ => {}
                }
            }
            if matches!(event, Event::Changed { up_for, .. } if up_for >= HEALTHY_AFTER) {
                (self.bring_ups, self.waited) = (0, Duration::ZERO);
            }
            match &command {
                // Two containers: what is started was just made sure of to be the only one.
                Command::CreateAndStart => assert!(
                    matches!(event, Event::Inspected(Existing::Nothing))
                        || self.command == Command::RemoveExisting && matches!(event, Event::Done),
                    "{event:?}: {self:?}"
                ),
                Command::StartExisting => {
                    assert!(
                        matches!(event, Event::Inspected(Existing::Exited)),
                        "{event:?}: {self:?}"
                    )
                }
                // The other looks belong to a launch that goes on, on the CPU.
                Command::Inspect
                    if !matches!(self.command, Command::Inspect | Command::RemoveFailed(_)) =>
                {
                    self.bring_ups += 1;
                    assert!(self.waited >= least_wait(self.bring_ups), "{event:?}: {self:?}");
                }
                _ => {}
            }
            // The CPU: with its WARNING, and not at all where it must not be.
            if matches!(
                command,
                Command::CreateAndStart | Command::StartExisting | Command::Monitor
            ) && let Verdict::Cpu { finding } = self.machine.verdict()
            {
                assert!(!self.machine.policy.gpu_required, "{event:?}: {self:?}");
                assert!(
                    finding.iter().all(|finding| self.warned.contains(&finding.reason)),
                    "{event:?}: {self:?}"
                );
            }
            // A busy loop: some acts, and then one that waits.
            self.busy += 1;
            match &command {
                Command::Monitor | Command::Exit(_) => self.busy = 0,
                Command::Sleep(delay) | Command::BackOff(delay) => {
                    assert!(*delay >= INITIAL_DELAY, "{event:?}: {self:?}");
                    self.busy = 0;
                    self.waited += *delay;
                }
                _ => assert!(self.busy <= MAX_ACTS, "{event:?}: {self:?}"),
            }
            self.command = command;
            notifications
        }

        /// From here on all goes well: whether the container runs in the end, or the story is over.
        fn ends_well(&mut self) -> bool {
            for _ in 0..MAX_ACTS {
                self.hear(match &self.command {
                    Command::Monitor | Command::Exit(_) => return true,
                    Command::Inspect => Event::Inspected(Existing::Nothing),
                    Command::PingEngine | Command::Reconnect => Event::Engine { answers: true },
                    Command::CheckRunning => Event::Running(true),
                    Command::Probe => Event::GpuHealthy(true),
                    _ => Event::Done,
                });
            }
            false
        }
    }

    /// What bringing the container up for the `n`th time without health has cost in pauses at the
    /// least. Some times are for nothing: the first, the first container that had to be ended, and
    /// the way to the CPU when the GPU has failed. The tries of the GPU before that have pauses of
    /// their own.
    fn least_wait(n: u32) -> Duration {
        let free = 3 + GPU_RETRY_DELAYS.len() as u32;
        (0..n.saturating_sub(free))
            .map(|n| (INITIAL_DELAY * 2_u32.pow(n.min(10))).min(MAX_DELAY))
            .sum()
    }

    /// Chance, for one command.
    #[derive(Debug, Clone, Copy)]
    struct Choices {
        which: usize,
        finding: usize,
        found: usize,
        change: usize,
        up_for: u16,
    }

    fn dice() -> impl Strategy<Value = Choices> {
        any::<[u8; 6]>().prop_map(|[which, finding, found, change, high, low]| Choices {
            which: which.into(),
            finding: finding.into(),
            found: found.into(),
            change: change.into(),
            // A third of the runs is healthy.
            up_for: u16::from_be_bytes([high, low]) % 900,
        })
    }

    fn pick<T: Clone>(among: &[T], which: usize) -> T {
        among[which % among.len()].clone()
    }

    impl Choices {
        /// An answer that the command may have, as its own comment says.
        fn answer(self, command: &Command) -> Event {
            let reasons = [Reason::RuntimeStartFailed, Reason::GpuNotVisible, Reason::GpuFailed];
            let finding = finding(pick(&reasons, self.finding));
            let not_on_gpu = Event::GpuStartFailed(finding.clone());
            let yes = self.which.is_multiple_of(2);
            let found = [
                Existing::Nothing,
                Existing::UpToDate,
                Existing::WithoutGpu(finding.clone()),
                Existing::CpuFallback(finding.clone()),
                Existing::Exited,
                Existing::Outdated,
            ];
            let change = [
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
                Command::Inspect => vec![Event::Inspected(pick(&found, self.found)), Event::Failed],
                Command::RemoveExisting | Command::RemoveFailed(_) => {
                    vec![Event::Done, Event::Failed]
                }
                Command::CreateAndStart => vec![Event::Done, not_on_gpu, Event::Failed],
                Command::StartExisting => {
                    vec![Event::Done, Event::Refused, not_on_gpu, Event::Failed]
                }
                Command::Monitor => {
                    vec![Event::Changed { change: pick(&change, self.change), up_for }]
                }
                Command::PingEngine | Command::Reconnect => vec![Event::Engine { answers: yes }],
                Command::CheckRunning => vec![Event::Running(yes)],
                Command::BackOff(_) => {
                    vec![Event::Done, changed(ContainerEvent::GpuFailed(finding))]
                }
                Command::Probe => vec![Event::GpuHealthy(yes)],
                Command::Sleep(_)
                | Command::Stop(_)
                | Command::StopAndRemove
                | Command::Exit(_) => vec![Event::Done],
            };
            pick(&answers, self.which)
        }

        /// Anything: an answer to some command.
        fn anything(self) -> Event {
            let acts = [
                Command::Inspect,
                Command::RemoveExisting,
                Command::StartExisting,
                Command::Monitor,
                Command::PingEngine,
                Command::CheckRunning,
                Command::Probe,
            ];
            self.answer(&pick(&acts, self.which / 4))
        }
    }

    fn a_node() -> impl Strategy<Value = Simulation> {
        let on_failure = select(vec![OnFailure::Cpu, OnFailure::Restart, OnFailure::Ignore]);
        let on_late = select(vec![OnLate::Announce, OnLate::Restart]);
        let cpu = select(vec![
            Verdict::gpu_not_enabled(),
            Verdict::cpu(finding(Reason::DriverNotLoaded)),
        ]);
        let verdict = prop_oneof![3 => Just(on_gpu()), 1 => cpu];
        (any::<bool>(), on_failure, on_late, verdict).prop_map(
            |(required, on_failure, on_late, verdict)| {
                // A node that must have a GPU and has none from the start is ended before it comes
                // here.
                let gpu_required = required && matches!(verdict, Verdict::Gpu { .. });
                Simulation::new(Policy { gpu_required, on_failure, on_late }, verdict)
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// No story leads to two containers, to a busy loop, to the CPU without its WARNING, or to
        /// the CPU at all where there must be a GPU; and from wherever it has led the node gets
        /// well.
        #[test]
        fn no_story_breaks_the_contract(mut story in a_node(), dice in prop::collection::vec(dice(), 1..200)) {
            for dice in dice {
                let event = dice.answer(&story.command);
                story.hear(event);
            }
            prop_assert!(story.ends_well(), "{story:?}");
        }

        /// The same where the answers do not even fit.
        #[test]
        fn no_nonsense_breaks_the_contract(mut story in a_node(), dice in prop::collection::vec(dice(), 1..200)) {
            for dice in dice {
                story.hear(dice.anything());
            }
            prop_assert!(story.ends_well(), "{story:?}");
        }
    }

    /// A node that is up.
    fn up(policy: Policy, verdict: Verdict) -> Simulation {
        let mut story = Simulation::new(policy, verdict);
        assert!(story.ends_well());
        story
    }

    #[test]
    fn a_container_that_ends_again_and_again_is_started_after_ever_longer_pauses() {
        let mut story = up(RULES, Verdict::gpu_not_enabled());
        let mut pauses = Vec::new();
        for _ in 0..8 {
            story.hear(changed(ContainerEvent::Exited(Some(1))));
            story.hear(Event::Engine { answers: true });
            let Command::BackOff(delay) = story.command else { panic!("{story:?}") };
            pauses.push(delay.as_secs());
            story.ends_well();
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        story.hear(Event::Changed {
            change: ContainerEvent::Exited(Some(1)),
            up_for: HEALTHY_AFTER,
        });
        story.hear(Event::Engine { answers: true });
        assert_eq!(story.command, Command::BackOff(INITIAL_DELAY));
    }

    #[test]
    fn a_container_that_hangs_loses_its_gpu_or_moves_is_made_anew_at_once_and_the_next_time_later()
    {
        for (change, command) in [
            (ContainerEvent::GpuLost, Command::StopAndRemove),
            (ContainerEvent::Unresponsive, Command::Stop(Grace::Short)),
            (ContainerEvent::SuperLinkChanged, Command::Inspect),
        ] {
            let mut story = up(RULES, on_gpu());
            story.hear(changed(change.clone()));
            assert_eq!(story.command, command);
            story.ends_well();
            story.hear(changed(change));
            assert_eq!(story.command, Command::Sleep(INITIAL_DELAY * 2));
        }
    }

    #[test]
    fn an_engine_that_went_is_looked_for_and_what_went_down_with_it_is_not_to_blame() {
        let mut story = up(RULES, Verdict::gpu_not_enabled());
        for _ in 0..3 {
            story.hear(changed(ContainerEvent::Exited(None)));
            for _ in 0..3 {
                story.hear(Event::Engine { answers: false });
                assert_eq!(story.command, Command::Sleep(ENGINE_RETRY_INTERVAL));
                story.hear(Event::Done);
            }
            story.hear(Event::Engine { answers: true });
            assert_eq!(story.command, Command::CheckRunning);
            story.hear(Event::Running(false));
            assert_eq!(story.command, Command::BackOff(INITIAL_DELAY));
            story.ends_well();
        }
    }

    #[test]
    fn where_the_cpu_fails_as_well_the_gpu_is_tried_again_with_one_warning() {
        let mut story = up(RULES, on_gpu());
        story.hear(changed(ContainerEvent::Exited(Some(1))));
        story.hear(Event::Engine { answers: true });
        let mut told = Vec::new();
        for _ in 0..3 {
            story.hear(Event::Done);
            assert_eq!(story.machine.verdict(), &on_gpu());
            story.hear(Event::Inspected(Existing::Nothing));
            story.hear(Event::GpuStartFailed(finding(Reason::RuntimeStartFailed)));
            told.extend(story.hear(Event::Done));
            assert_eq!(story.machine.fallback_from(), Some(&on_gpu()));
            story.hear(Event::Inspected(Existing::Nothing));
            told.extend(story.hear(Event::Failed));
            told.extend(story.hear(Event::Engine { answers: true }));
        }
        let warnings = told
            .iter()
            .filter(|notifications| matches!(notifications, Notification::CpuFallback(_)))
            .count();
        assert_eq!(warnings, 1, "{told:?}");
        assert_eq!(story.machine.fallback_from(), None);
    }

    #[test]
    fn a_gpu_that_failed_has_three_tries_where_that_is_wanted() {
        let mut story = up(Policy { on_failure: OnFailure::Restart, ..RULES }, on_gpu());
        let failed = || changed(ContainerEvent::GpuFailed(finding(Reason::GpuFailed)));
        story.hear(failed());
        assert_eq!(story.command, Command::Stop(Grace::Configured));
        let mut pauses = Vec::new();
        story.hear(Event::Done);
        while let Command::Sleep(delay) = story.command {
            pauses.push(delay);
            story.hear(Event::Done);
            // The first finds it well, and it fails once more.
            story.hear(Event::GpuHealthy(pauses.len() == 1));
            if pauses.len() == 1 {
                story.ends_well();
                story.hear(failed());
                story.hear(Event::Done);
            }
        }
        assert_eq!(pauses, GPU_RETRY_DELAYS);
        assert_eq!(
            story.machine.verdict().finding().map(|finding| finding.reason),
            Some(Reason::GpuFailed)
        );
        assert_eq!(story.command, Command::Inspect);
    }

    #[test]
    fn a_first_launch_that_fails_is_the_end_and_a_later_one_is_not() {
        let mut story = Simulation::new(RULES, Verdict::gpu_not_enabled());
        story.hear(Event::Failed);
        assert_eq!(story.command, Command::Exit(ExitReason::LaunchFailed));
        let mut story = up(RULES, Verdict::gpu_not_enabled());
        story.hear(changed(ContainerEvent::SuperLinkChanged));
        story.hear(Event::Failed);
        assert_eq!(story.command, Command::PingEngine);
    }

    #[test]
    fn a_gpu_that_must_be_there_and_does_not_come_up_or_fails_is_the_end() {
        let policy = Policy { gpu_required: true, ..RULES };
        let mut story = up(policy, on_gpu());
        let told = story.hear(changed(ContainerEvent::GpuFailed(finding(Reason::GpuFailed))));
        assert!(matches!(told[..], [Notification::RequiredGpuLost(_)]), "{told:?}");
        assert_eq!(story.command, Command::Exit(ExitReason::GpuRequired));
        let mut story = Simulation::new(policy, on_gpu());
        let told = story
            .hear(Event::Inspected(Existing::CpuFallback(finding(Reason::RuntimeStartFailed))));
        assert!(matches!(told[..], [Notification::GpuRequired(_)]), "{told:?}");
        assert_eq!(story.command, Command::Exit(ExitReason::GpuRequired));
    }

    #[test]
    fn a_gpu_that_is_usable_late_is_told_once_or_taken() {
        let verdict = || Verdict::cpu(finding(Reason::DriverNotLoaded));
        let mut story = up(RULES, verdict());
        assert!(story.machine.awaits_gpu());
        story.hear(changed(ContainerEvent::GpuAvailable));
        assert!(story.command == Command::Monitor && !story.machine.awaits_gpu(), "{story:?}");
        let mut story = up(Policy { on_late: OnLate::Restart, ..RULES }, verdict());
        story.hear(changed(ContainerEvent::GpuAvailable));
        assert_eq!(story.command, Command::Exit(ExitReason::RestartRequested));
        assert!(!up(RULES, Verdict::gpu_not_enabled()).machine.awaits_gpu());
    }

    #[test]
    fn another_container_is_taken_away_before_ours_is_made() {
        let mut story = Simulation::new(RULES, Verdict::gpu_not_enabled());
        for (event, command) in [
            (Event::Inspected(Existing::Outdated), Command::RemoveExisting),
            (Event::Done, Command::CreateAndStart),
            (Event::Done, Command::Monitor),
        ] {
            assert!(story.hear(event).is_empty());
            assert_eq!(story.command, command);
        }
        // On the CPU there is nothing that it could stand in for.
        let mut story = Simulation::new(RULES, Verdict::gpu_not_enabled());
        story.hear(Event::Inspected(Existing::CpuFallback(finding(Reason::RuntimeStartFailed))));
        assert_eq!(story.command, Command::RemoveExisting);
    }

    #[test]
    fn a_container_that_docker_refuses_to_start_again_is_made_anew() {
        let mut story = Simulation::new(RULES, on_gpu());
        for (event, command) in [
            (Event::Inspected(Existing::Exited), Command::StartExisting),
            (Event::Refused, Command::RemoveExisting),
            (Event::Done, Command::CreateAndStart),
            (Event::Done, Command::Monitor),
        ] {
            story.hear(event);
            assert_eq!(story.command, command);
        }
    }

    #[test]
    fn a_container_that_runs_as_it_is_wanted_is_adopted_and_one_that_has_lost_its_gpu_is_replaced()
    {
        let mut story = Simulation::new(RULES, on_gpu());
        let told = story.hear(Event::Inspected(Existing::UpToDate));
        assert!(matches!(told[..], [Notification::Adopted]), "{told:?}");
        assert_eq!(story.command, Command::Monitor);
        let mut story = Simulation::new(RULES, on_gpu());
        let told =
            story.hear(Event::Inspected(Existing::WithoutGpu(finding(Reason::GpuNotVisible))));
        assert!(
            matches!(&told[..], [Notification::Replacing(why)] if why.reason == Reason::GpuNotVisible),
            "{told:?}"
        );
        assert_eq!((story.command, story.machine.verdict()), (Command::RemoveExisting, &on_gpu()));
    }

    #[test]
    fn a_container_that_outlived_the_connection_to_it_is_watched_on() {
        let mut story = up(RULES, on_gpu());
        for (event, command) in [
            (changed(ContainerEvent::Exited(None)), Command::PingEngine),
            (Event::Engine { answers: true }, Command::CheckRunning),
            (Event::Running(true), Command::Sleep(INITIAL_DELAY)),
            (Event::Done, Command::Monitor),
        ] {
            assert!(story.hear(event).is_empty());
            assert_eq!(story.command, command);
        }
    }

    #[test]
    fn why_and_after_what_pause_a_container_is_started_again_is_told() {
        let mut story = up(RULES, Verdict::gpu_not_enabled());
        let again = |told: Vec<Notification>| match told[..] {
            [Notification::RestartScheduled(cause, delay)] => (cause, delay.as_secs()),
            _ => panic!("{told:?}"),
        };
        story.hear(changed(ContainerEvent::Exited(Some(137))));
        assert_eq!(
            again(story.hear(Event::Engine { answers: true })),
            (RestartReason::Exited(Some(137)), 1)
        );
        story.ends_well();
        story.hear(changed(ContainerEvent::Exited(None)));
        story.hear(Event::Engine { answers: true });
        assert_eq!(again(story.hear(Event::Running(false))), (RestartReason::Exited(None), 2));
        story.hear(Event::Done);
        let told = story.hear(Event::Failed);
        assert!(matches!(told[..], [Notification::LaunchFailed]), "{told:?}");
        assert_eq!(
            again(story.hear(Event::Engine { answers: true })),
            (RestartReason::LaunchFailed, 4)
        );
    }

    #[test]
    fn the_engine_is_told_once_when_it_goes_and_once_when_it_is_back() {
        let mut story = up(RULES, Verdict::gpu_not_enabled());
        story.hear(changed(ContainerEvent::Exited(Some(1))));
        let told = story.hear(Event::Engine { answers: false });
        assert!(matches!(told[..], [Notification::EngineUnavailable]), "{told:?}");
        assert!(story.hear(Event::Done).is_empty());
        assert_eq!(story.command, Command::Reconnect);
        assert!(story.hear(Event::Engine { answers: false }).is_empty());
        assert_eq!(story.command, Command::Sleep(ENGINE_RETRY_INTERVAL));
        story.hear(Event::Done);
        let told = story.hear(Event::Engine { answers: true });
        assert!(
            matches!(
                told[..],
                [
                    Notification::EngineAvailable,
                    Notification::RestartScheduled(RestartReason::Exited(Some(1)), INITIAL_DELAY)
                ]
            ),
            "{told:?}"
        );
    }

    #[test]
    fn a_launch_that_failed_before_the_engine_went_keeps_its_pause() {
        let mut story = up(RULES, Verdict::gpu_not_enabled());
        story.hear(changed(ContainerEvent::Exited(Some(1))));
        story.hear(Event::Engine { answers: true });
        story.hear(Event::Done);
        story.hear(Event::Failed);
        story.hear(Event::Engine { answers: false });
        story.hear(Event::Done);
        story.hear(Event::Engine { answers: true });
        assert_eq!(story.command, Command::BackOff(INITIAL_DELAY * 2));
    }

    #[test]
    fn a_gpu_that_fails_is_ignored_where_that_is_wanted_also_between_two_starts() {
        let mut story = up(Policy { on_failure: OnFailure::Ignore, ..RULES }, on_gpu());
        let failed = || changed(ContainerEvent::GpuFailed(finding(Reason::GpuFailed)));
        let told = story.hear(failed());
        assert!(matches!(told[..], [Notification::GpuFaultIgnored(_)]), "{told:?}");
        assert_eq!(story.command, Command::Monitor);
        story.hear(changed(ContainerEvent::Exited(Some(1))));
        story.hear(Event::Engine { answers: true });
        let told = story.hear(failed());
        assert!(matches!(told[..], [Notification::GpuFaultIgnored(_)]), "{told:?}");
        assert_eq!(
            (&story.command, story.machine.verdict()),
            (&Command::BackOff(INITIAL_DELAY), &on_gpu())
        );
        story.hear(Event::Done);
        assert_eq!(story.command, Command::Inspect);
    }

    #[test]
    fn a_gpu_whose_fault_ended_the_container_is_tried_again_or_left_before_the_next_start() {
        for (on_failure, command) in [
            (OnFailure::Restart, Command::Stop(Grace::Configured)),
            (OnFailure::Cpu, Command::Inspect),
        ] {
            let mut story = up(Policy { on_failure, ..RULES }, on_gpu());
            story.hear(changed(ContainerEvent::Exited(Some(1))));
            story.hear(Event::Engine { answers: true });
            story.hear(changed(ContainerEvent::GpuFailed(finding(Reason::GpuFailed))));
            assert_eq!(story.command, command);
        }
    }

    #[test]
    fn every_try_of_a_gpu_that_failed_is_told_and_health_gives_it_new_ones() {
        let mut story = up(Policy { on_failure: OnFailure::Restart, ..RULES }, on_gpu());
        let failed = |seconds| Event::Changed {
            change: ContainerEvent::GpuFailed(finding(Reason::GpuFailed)),
            up_for: Duration::from_secs(seconds),
        };
        for seconds in [10, 599, 600] {
            let told = story.hear(failed(seconds));
            assert!(matches!(told[..], [Notification::GpuRetry(_)]), "{told:?}");
            let told = story.hear(Event::Done);
            let delay = if seconds == 599 { GPU_RETRY_DELAYS[1] } else { GPU_RETRY_DELAYS[0] };
            assert!(
                matches!(told[..], [Notification::GpuProbeScheduled(told)] if told == delay),
                "{told:?}"
            );
            assert_eq!(story.command, Command::Sleep(delay));
            story.hear(Event::Done);
            assert_eq!(story.command, Command::Probe);
            story.hear(Event::GpuHealthy(true));
            assert_eq!(story.command, Command::Inspect);
            story.ends_well();
        }
    }

    #[test]
    fn a_node_that_leaves_its_gpu_says_so_and_says_so_again_after_it_was_well() {
        let mut story = up(RULES, on_gpu());
        let told = story.hear(changed(ContainerEvent::GpuFailed(finding(Reason::GpuFailed))));
        assert!(
            matches!(told[..], [Notification::CpuFallback(_), Notification::MovingToCpu]),
            "{told:?}"
        );
        assert_eq!(story.machine.fallback_from(), Some(&on_gpu()));
        // Where the GPU did not come up, and then did, and then does not again, each is a WARNING
        // of its own.
        let mut story = up(RULES, on_gpu());
        for _ in 0..2 {
            story.hear(changed(ContainerEvent::SuperLinkChanged));
            if story.command != Command::Inspect {
                story.hear(Event::Done);
            }
            story.hear(Event::Inspected(Existing::Nothing));
            story.hear(Event::GpuStartFailed(finding(Reason::RuntimeStartFailed)));
            assert_eq!(story.command, Command::RemoveFailed(finding(Reason::RuntimeStartFailed)));
            let told = story.hear(Event::Done);
            assert!(matches!(told[..], [Notification::CpuFallback(_)]), "{told:?}");
            // It does not come up on the CPU either, so the next try is with the GPU: that one
            // comes up.
            story.hear(Event::Failed);
            story.ends_well();
            assert_eq!(story.machine.verdict(), &on_gpu());
        }
    }

    #[test]
    fn a_container_that_has_to_end_soon_after_another_ends_after_a_pause() {
        for (change, command) in [
            (ContainerEvent::GpuLost, Command::StopAndRemove),
            (ContainerEvent::Unresponsive, Command::Stop(Grace::Short)),
            (ContainerEvent::SuperLinkChanged, Command::Inspect),
        ] {
            let mut story = up(RULES, on_gpu());
            story.hear(changed(change.clone()));
            story.ends_well();
            story.hear(changed(change));
            story.hear(Event::Done);
            assert_eq!(story.command, command);
            if command != Command::Inspect {
                story.hear(Event::Done);
                assert_eq!(story.command, Command::Inspect);
            }
        }
    }

    #[test]
    fn what_is_over_stays_over() {
        let mut story = up(Policy { gpu_required: true, ..RULES }, on_gpu());
        story.hear(changed(ContainerEvent::GpuFailed(finding(Reason::GpuFailed))));
        for event in
            [Event::Done, Event::Inspected(Existing::Nothing), changed(ContainerEvent::GpuLost)]
        {
            assert!(story.hear(event).is_empty());
            assert_eq!(story.command, Command::Exit(ExitReason::GpuRequired));
        }
    }

    #[test]
    fn a_gpu_that_is_usable_late_is_told_or_said_to_be_taken() {
        let verdict = || Verdict::cpu(finding(Reason::DriverNotLoaded));
        let told = up(RULES, verdict()).hear(changed(ContainerEvent::GpuAvailable));
        assert!(matches!(told[..], [Notification::GpuAvailable]), "{told:?}");
        let told = up(Policy { on_late: OnLate::Restart, ..RULES }, verdict())
            .hear(changed(ContainerEvent::GpuAvailable));
        assert!(matches!(told[..], [Notification::GpuReclaimed]), "{told:?}");
    }

    #[test]
    fn a_gpu_that_had_its_three_tries_is_left_at_the_next_fault() {
        let mut story = up(Policy { on_failure: OnFailure::Restart, ..RULES }, on_gpu());
        for _ in GPU_RETRY_DELAYS {
            story.hear(changed(ContainerEvent::GpuFailed(finding(Reason::GpuFailed))));
            assert_eq!(story.command, Command::Stop(Grace::Configured));
            story.ends_well();
        }
        let told = story.hear(changed(ContainerEvent::GpuFailed(finding(Reason::GpuFailed))));
        assert!(
            matches!(told[..], [Notification::CpuFallback(_), Notification::MovingToCpu]),
            "{told:?}"
        );
        assert_eq!(story.command, Command::Inspect);
    }

    #[test]
    fn on_the_cpu_no_gpu_can_fail_and_the_node_is_looked_at_anew_after_a_pause() {
        let failed = || changed(ContainerEvent::GpuFailed(finding(Reason::GpuFailed)));
        let mut story = up(RULES, Verdict::gpu_not_enabled());
        for event in [failed(), failed()] {
            let told = story.hear(event);
            assert!(
                matches!(
                    told[..],
                    [Notification::RestartScheduled(RestartReason::LaunchFailed, INITIAL_DELAY)]
                ),
                "{told:?}"
            );
            assert_eq!(story.command, Command::BackOff(INITIAL_DELAY));
        }
        story.hear(Event::Done);
        story.hear(Event::Inspected(Existing::Nothing));
        let told = story.hear(Event::GpuStartFailed(finding(Reason::GpuNotVisible)));
        assert!(
            matches!(told[..], [Notification::RestartScheduled(RestartReason::LaunchFailed, _)]),
            "{told:?}"
        );
        assert_eq!(
            (story.command, story.machine.verdict()),
            (Command::BackOff(INITIAL_DELAY * 2), &Verdict::gpu_not_enabled())
        );
    }
}
