//! State machine of the node's container. Pure: it takes an event and returns the next command. It
//! reads no clock: commands contain delays, and events contain durations.
//!
//! Exactly one event answers each command. In the diagrams below, each arrow is labelled with an
//! event and leads to the next state.
//!
//! Launch. `on the CPU` means that the target is the CPU from here on:
//!
//! ```text
//! Inspecting ──UpToDate────────────────────────────> Running                (adopted)
//!     ├──Absent────────────────> Starting ──Done───> Running
//!     ├──Exited────────────────> Starting ──Done───> Running                (same container)
//!     │                             ├──Refused─────> Removing ──Done──> Starting
//!     │                             └──GpuStartFailed──> RemovingFailed ──Done──> Inspecting
//!     │                                                                      (on the CPU)
//!     ├──Outdated, WithoutGpu──> Removing ──Done───> Starting
//!     └──CpuFallback───────────> Inspecting                                 (on the CPU)
//!
//! any of these ──Failed──> CheckingEngine, or Terminated if the container never ran
//! ```
//!
//! Container exit:
//!
//! ```text
//! Running ──Exited──> CheckingEngine ──answers─────────> BackingOff ──Done──> Inspecting
//!                           │ no answer                      ^ ^
//!                           v                                │ │ not running
//!                     EngineUnavailable <──> Reconnecting ───┘ │
//!                                                              │
//!                     Exited without a code: the connection to the engine may have been lost,
//!                     so both go through CheckingContainer ────┘
//!                                             └──running──> Settling ──Done──> Running
//! ```
//!
//! Container that must be stopped. The first stop is immediate. A stop soon after another start
//! goes through the state `StopDelayed`, which prevents a restart loop:
//!
//! ```text
//! Running ──GpuLost───────────> Stopping (stop and remove) ──Done──> Inspecting
//!    ├──Unresponsive──────────> Stopping (stop) ─────────────Done──> Inspecting
//!    └──SuperLinkChanged───────────────────────────────────────────> Inspecting
//! ```
//!
//! GPU failure, by `gpu.on_failure`:
//!
//! ```text
//! Running, BackingOff ──GpuFailed──┬──ignore───> the same state
//!                                  ├──cpu──────> Inspecting                 (on the CPU)
//!                                  └──restart──> StoppingForGpu ──Done──> GpuRetryPending
//!                                                                                │ Done
//!                  Inspecting <──healthy── Probing <─────────────────────────────┘
//!                                             └──unhealthy──> GpuRetryPending; after the last
//!                                                             attempt Inspecting (on the CPU)
//! ```
//!
//! GPU that becomes available later, by `gpu.on_available`:
//!
//! ```text
//! Running ──GpuAvailable──┬──announce──> Running
//!                         └──restart───> Terminated: the daemon restarts from detection
//! ```
//!
//! If the target would become the CPU and `FL_GPU_REQUIRED` is YES, the next state is `Terminated`
//! instead. A failure of the first launch also leads to `Terminated`: the service manager restarts
//! the agent.

use std::time::Duration;

use crate::backoff::Backoff;
use crate::config::settings::{OnAvailable, OnFailure};
use crate::gpu;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::Verdict;

/// Initial and maximum restart delay. A run of [`HEALTHY_AFTER`] or an outage of the engine resets
/// the backoff.
const INITIAL_DELAY: Duration = Duration::from_secs(1);
const MAX_DELAY: Duration = Duration::from_secs(60);
/// A container that ran for this long was healthy.
const HEALTHY_AFTER: Duration = Duration::from_secs(600);
/// Delays before each attempt to use a failed GPU again. A run of [`HEALTHY_AFTER`] grants new
/// attempts.
const GPU_RETRY_DELAYS: [Duration; 3] =
    [Duration::from_secs(5), Duration::from_secs(10), Duration::from_secs(20)];
/// Interval of connection attempts to an engine that does not answer.
const ENGINE_RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// Configured reactions to a missing, failed or newly available GPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    /// `FL_GPU_REQUIRED`.
    pub(crate) gpu_required: bool,
    /// `gpu.on_failure`.
    pub(crate) on_failure: OnFailure,
    /// `gpu.on_available`.
    pub(crate) on_available: OnAvailable,
}

/// The answer to a [`Command`].
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// The container with the node's name.
    Inspected(Existing),
    /// The command succeeded.
    Done,
    /// The command failed because of the engine or the file system.
    Failed,
    /// Docker refused to start the existing container.
    Refused,
    /// The container did not start with the GPU, or started without it.
    GpuStartFailed(Finding),
    /// Whether the engine answers.
    Engine { answers: bool },
    /// Whether the monitored container still runs.
    ContainerRunning(bool),
    /// Whether a probe finds the failed GPU usable.
    GpuHealthy(bool),
    /// A watcher reported an event.
    Container {
        event: ContainerEvent,
        /// How long this run of the container was monitored; zero while none runs.
        up_for: Duration,
    },
}

/// The container that already has the node's name, compared with the container spec.
#[derive(Debug, Clone)]
pub(crate) enum Existing {
    /// There is none.
    Absent,
    /// It runs, matches the spec and has its GPU.
    UpToDate,
    /// It runs and matches the spec, but does not have its GPU.
    WithoutGpu(Finding),
    /// It runs on the CPU because the same spec did not start on the GPU.
    CpuFallback(Finding),
    /// It matches the spec and has exited.
    Exited,
    /// It does not match the spec.
    Outdated,
}

/// An event of a monitored container that needs a decision.
#[derive(Debug, Clone)]
pub(crate) enum ContainerEvent {
    /// The container exited with this code; without a code, the container is gone or the engine
    /// stopped answering.
    Exited(Option<i64>),
    /// A GPU in use failed.
    GpuFailed(Finding),
    /// The container no longer has a GPU that the VM still has.
    GpuLost,
    /// The node runs on the CPU, and a GPU became available.
    GpuAvailable,
    /// Flower does not answer its health checks.
    Unresponsive,
    /// The service has another SuperLink.
    SuperLinkChanged,
}

/// What the supervisor does next. The comment names the events that answer the command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Command {
    /// Inspect the container with the node's name: `Inspected`, `Failed`.
    Inspect,
    /// Stop and remove the existing container: `Done`, `Failed`.
    RemoveExisting,
    /// Create and start a container: `Done`, `GpuStartFailed`, `Failed`.
    CreateAndStart,
    /// Start the container that exited: `Done`, `Refused`, `GpuStartFailed`, `Failed`.
    StartExisting,
    /// Remove the container that did not start with the GPU: `Done`, `Failed`.
    RemoveFailed(Finding),
    /// Monitor the container: `Container`.
    Monitor,
    /// Check whether the engine answers: `Engine`.
    CheckEngine,
    /// Connect to the engine again: `Engine`.
    Reconnect,
    /// Check whether the monitored container still runs: `ContainerRunning`.
    CheckRunning,
    /// Sleep: `Done`.
    Sleep(Duration),
    /// Sleep before a restart and monitor the GPU meanwhile, since its failure may be why the
    /// container exited: `Done`, `Container`.
    BackOff(Duration),
    /// Stop the container: `Done`, even if it does not stop.
    Stop(GracePeriod),
    /// Stop and remove the monitored container: `Done`, even if that fails.
    StopAndRemove,
    /// Probe the failed GPU: `GpuHealthy`.
    Probe,
    /// End the supervisor. No event follows.
    Exit(ExitReason),
}

/// How long a container may take to stop before Docker kills it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GracePeriod {
    /// `container.stop_timeout_seconds`.
    Configured,
    /// A few seconds: the container is unresponsive and has nothing to finish.
    Short,
}

/// Why the supervisor exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExitReason {
    /// `FL_GPU_REQUIRED` is YES, and no GPU is usable.
    GpuRequired,
    /// The first launch failed.
    LaunchFailed,
    /// A GPU became available: the node restarts from detection.
    RestartRequested,
}

/// What the supervisor logs and reports before it executes the next command.
#[derive(Debug, Clone)]
pub(crate) enum Notification {
    /// The running container was adopted.
    Adopted,
    /// The running container is replaced for this reason.
    Replacing(Finding),
    /// The node falls back to the CPU: the one WARNING.
    CpuFallback(Finding),
    /// The GPU is required and did not start.
    GpuRequired(Finding),
    /// The GPU is required and failed while the container ran.
    RequiredGpuFailed(Finding),
    /// The container moves to the CPU.
    MovingToCpu,
    /// A launch failed.
    LaunchFailed,
    /// The container is restarted after this delay.
    RestartScheduled(RestartReason, Duration),
    /// The engine does not answer.
    EngineUnavailable,
    /// The engine answers again.
    EngineAvailable,
    /// The GPU failed, and `gpu.on_failure` is `ignore`.
    GpuFailureIgnored(Finding),
    /// The GPU failed and is retried.
    GpuRetry(Finding),
    /// The failed GPU is probed after this delay.
    GpuProbeScheduled(Duration),
    /// A GPU became available; the operator may restart the agent to use it.
    GpuAvailable,
    /// A GPU became available, and the container moves to it.
    GpuReclaimed,
}

/// Why a container is restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RestartReason {
    /// It exited with this code; without a code, it is gone.
    Exited(Option<i64>),
    /// It did not start.
    LaunchFailed,
}

/// The result of an event: notifications first, then the command.
#[derive(Debug)]
pub(crate) struct Transition {
    pub(crate) notifications: Vec<Notification>,
    pub(crate) command: Command,
}

/// Current state, see the diagrams above. Each state waits for the answer to one command.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Inspecting,
    Removing,
    Starting,
    RemovingFailed(Finding),
    Running,
    CheckingEngine(RestartReason),
    EngineUnavailable(RestartReason),
    Reconnecting(RestartReason),
    CheckingContainer,
    Settling,
    BackingOff,
    StopDelayed(StopMode),
    Stopping,
    StoppingForGpu(Finding),
    GpuRetryPending(Finding),
    Probing(Finding),
    Terminated(ExitReason),
}

/// How a running container is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StopMode {
    Remove,
    Stop,
    /// It keeps running until `Inspecting` finds it outdated.
    Replace,
}

/// The device that the container is launched on.
#[derive(Debug, Clone)]
struct Target {
    verdict: Verdict,
    /// The GPU verdict that a CPU verdict replaces, because the GPU did not start or failed.
    fallback_from: Option<Verdict>,
}

#[derive(Debug, Clone)]
pub(crate) struct StateMachine {
    policy: Policy,
    state: State,
    target: Target,
    /// The target before the current launch.
    previous_target: Target,
    /// Reason of the last fallback WARNING, which is not repeated for every attempt.
    reported_fallback: Option<Reason>,
    restart_backoff: Backoff,
    /// Attempts to use a failed GPU again.
    gpu_attempts: usize,
    awaits_gpu: bool,
    /// Whether the container has run since the supervisor started.
    has_run: bool,
}

impl StateMachine {
    /// Returns the state machine of a node with this verdict, and its first command. A fallback
    /// that the verdict contains was reported by the caller.
    pub(crate) fn new(policy: Policy, verdict: Verdict) -> (Self, Command) {
        let reported_fallback = verdict.finding().map(|finding| finding.reason);
        let target = Target { verdict, fallback_from: None };
        let state_machine = Self {
            policy,
            state: State::Inspecting,
            previous_target: target.clone(),
            target,
            reported_fallback,
            restart_backoff: Backoff::new(INITIAL_DELAY, MAX_DELAY),
            gpu_attempts: 0,
            awaits_gpu: false,
            has_run: false,
        };
        (state_machine, Command::Inspect)
    }

    /// Returns the verdict that the container runs on or is launched on.
    pub(crate) fn verdict(&self) -> &Verdict {
        &self.target.verdict
    }

    /// Returns the GPU verdict that the current CPU verdict replaces, because the GPU did not start
    /// or failed.
    pub(crate) fn fallback_from(&self) -> Option<&Verdict> {
        self.target.fallback_from.as_ref()
    }

    /// Whether the node runs on the CPU and waits for a GPU to become available.
    pub(crate) fn awaits_gpu(&self) -> bool {
        self.awaits_gpu
    }

    /// Takes the answer to the last command and returns the next command.
    pub(crate) fn handle(&mut self, event: Event) -> Transition {
        let mut notifications = Vec::new();
        let command = self.next_command(event, &mut notifications);
        Transition { notifications, command }
    }

    fn next_command(&mut self, event: Event, notifications: &mut Vec<Notification>) -> Command {
        let is_on_gpu = self.is_on_gpu();
        match (self.state.clone(), event) {
            (State::Inspecting, Event::Inspected(existing)) => {
                self.on_inspected(existing, notifications)
            }
            (State::Removing, Event::Done) => self.enter(State::Starting, Command::CreateAndStart),
            (State::Starting, Event::Done) => {
                if is_on_gpu {
                    self.reported_fallback = None;
                }
                self.monitor()
            }
            (State::Starting, Event::Refused) => {
                self.enter(State::Removing, Command::RemoveExisting)
            }
            (State::Starting, Event::GpuStartFailed(finding)) if is_on_gpu => {
                self.enter(State::RemovingFailed(finding.clone()), Command::RemoveFailed(finding))
            }
            (State::RemovingFailed(finding), Event::Done) => {
                self.fall_back_to_cpu(finding, notifications)
            }
            (
                State::Inspecting | State::Removing | State::Starting | State::RemovingFailed(_),
                Event::Failed,
            ) => self.on_launch_failed(notifications),

            (State::Running, Event::Container { event, up_for }) => {
                self.on_container_event(event, up_for, notifications)
            }
            (State::CheckingEngine(reason), Event::Engine { answers: true }) => {
                self.on_engine_ready(reason, notifications)
            }
            (State::CheckingEngine(reason), Event::Engine { answers: false }) => {
                self.on_engine_unavailable(reason, notifications)
            }
            (State::EngineUnavailable(reason), Event::Done) => {
                self.enter(State::Reconnecting(reason), Command::Reconnect)
            }
            (State::Reconnecting(reason), Event::Engine { answers: false }) => {
                self.enter(State::EngineUnavailable(reason), Command::Sleep(ENGINE_RETRY_INTERVAL))
            }
            (State::Reconnecting(reason), Event::Engine { answers: true }) => {
                notifications.push(Notification::EngineAvailable);
                self.on_engine_ready(reason, notifications)
            }
            (State::CheckingContainer, Event::ContainerRunning(true)) => {
                self.enter(State::Settling, Command::Sleep(INITIAL_DELAY))
            }
            (State::CheckingContainer, Event::ContainerRunning(false)) => {
                self.schedule_restart(RestartReason::Exited(None), notifications)
            }
            (State::Settling, Event::Done) => self.monitor(),

            (State::BackingOff, Event::Done) => {
                self.restart_backoff.next_delay(0.0);
                self.relaunch()
            }
            (
                State::BackingOff,
                Event::Container { event: ContainerEvent::GpuFailed(finding), .. },
            ) if is_on_gpu => {
                let if_ignored = Command::BackOff(self.restart_backoff.peek());
                self.on_gpu_failed(finding, if_ignored, notifications)
            }
            (State::StopDelayed(mode), Event::Done) => self.stop_container(mode),
            (State::Stopping, Event::Done) => self.relaunch(),

            (State::StoppingForGpu(finding), Event::Done)
            | (State::Probing(finding), Event::GpuHealthy(false)) => {
                self.schedule_gpu_retry(finding, notifications)
            }
            (State::GpuRetryPending(finding), Event::Done) => {
                self.enter(State::Probing(finding), Command::Probe)
            }
            (State::Probing(_), Event::GpuHealthy(true)) => self.relaunch(),

            (State::Terminated(reason), _) => Command::Exit(reason),
            _ => self.on_unexpected_event(notifications),
        }
    }

    fn enter(&mut self, state: State, command: Command) -> Command {
        self.state = state;
        command
    }

    fn terminate(&mut self, reason: ExitReason) -> Command {
        self.enter(State::Terminated(reason), Command::Exit(reason))
    }

    fn is_on_gpu(&self) -> bool {
        matches!(self.target.verdict, Verdict::Gpu { .. })
    }

    fn relaunch(&mut self) -> Command {
        self.previous_target = self.target.clone();
        self.enter(State::Inspecting, Command::Inspect)
    }

    fn monitor(&mut self) -> Command {
        if !self.has_run {
            self.has_run = true;
            self.awaits_gpu = gpu::is_recoverable(self.verdict());
        }
        self.enter(State::Running, Command::Monitor)
    }

    fn on_inspected(
        &mut self,
        existing: Existing,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        match existing {
            Existing::Absent => self.enter(State::Starting, Command::CreateAndStart),
            Existing::UpToDate => {
                notifications.push(Notification::Adopted);
                self.monitor()
            }
            Existing::CpuFallback(finding) if self.is_on_gpu() => {
                self.fall_back_to_cpu(finding, notifications)
            }
            Existing::Exited => self.enter(State::Starting, Command::StartExisting),
            Existing::WithoutGpu(finding) => {
                // The VM still has the GPU: a new container gets it.
                notifications.push(Notification::Replacing(finding));
                self.enter(State::Removing, Command::RemoveExisting)
            }
            Existing::CpuFallback(_) | Existing::Outdated => {
                self.enter(State::Removing, Command::RemoveExisting)
            }
        }
    }

    /// Restores the target: a launch that fell back to the CPU and failed there as well did not
    /// fail because of the GPU, so the next launch uses the GPU again.
    fn on_launch_failed(&mut self, notifications: &mut Vec<Notification>) -> Command {
        self.target = self.previous_target.clone();
        if !self.has_run {
            return self.terminate(ExitReason::LaunchFailed);
        }
        notifications.push(Notification::LaunchFailed);
        self.enter(State::CheckingEngine(RestartReason::LaunchFailed), Command::CheckEngine)
    }

    /// Handles an event that does not answer the last command: inspects again after a delay.
    fn on_unexpected_event(&mut self, notifications: &mut Vec<Notification>) -> Command {
        if self.has_run {
            self.schedule_restart(RestartReason::LaunchFailed, notifications)
        } else {
            self.terminate(ExitReason::LaunchFailed)
        }
    }

    fn on_container_event(
        &mut self,
        event: ContainerEvent,
        up_for: Duration,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        if up_for >= HEALTHY_AFTER {
            self.restart_backoff.reset();
            self.gpu_attempts = 0;
        }
        match event {
            ContainerEvent::Exited(code) => {
                self.enter(State::CheckingEngine(RestartReason::Exited(code)), Command::CheckEngine)
            }
            ContainerEvent::GpuFailed(finding) if self.is_on_gpu() => {
                self.on_gpu_failed(finding, Command::Monitor, notifications)
            }
            ContainerEvent::GpuLost => self.schedule_stop(StopMode::Remove),
            ContainerEvent::Unresponsive => self.schedule_stop(StopMode::Stop),
            ContainerEvent::SuperLinkChanged => self.schedule_stop(StopMode::Replace),
            ContainerEvent::GpuAvailable if self.policy.on_available == OnAvailable::Restart => {
                notifications.push(Notification::GpuReclaimed);
                self.terminate(ExitReason::RestartRequested)
            }
            ContainerEvent::GpuAvailable => {
                self.awaits_gpu = false;
                notifications.push(Notification::GpuAvailable);
                Command::Monitor
            }
            ContainerEvent::GpuFailed(_) => self.on_unexpected_event(notifications),
        }
    }

    fn on_engine_ready(
        &mut self,
        reason: RestartReason,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        match reason {
            // The connection to the engine may have been lost while the container ran on.
            RestartReason::Exited(None) => {
                self.enter(State::CheckingContainer, Command::CheckRunning)
            }
            reason => self.schedule_restart(reason, notifications),
        }
    }

    fn on_engine_unavailable(
        &mut self,
        reason: RestartReason,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        notifications.push(Notification::EngineUnavailable);
        // A container that exited together with the engine did not crash.
        if matches!(reason, RestartReason::Exited(_)) {
            self.restart_backoff.reset();
        }
        self.enter(State::EngineUnavailable(reason), Command::Sleep(ENGINE_RETRY_INTERVAL))
    }

    fn schedule_restart(
        &mut self,
        reason: RestartReason,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        let delay = self.restart_backoff.peek();
        notifications.push(Notification::RestartScheduled(reason, delay));
        self.enter(State::BackingOff, Command::BackOff(delay))
    }

    /// Stops a running container: the first one immediately, one that started soon after another
    /// after a delay.
    fn schedule_stop(&mut self, mode: StopMode) -> Command {
        let delay = self.restart_backoff.next_delay(0.0);
        if delay > INITIAL_DELAY {
            self.enter(State::StopDelayed(mode), Command::Sleep(delay))
        } else {
            self.stop_container(mode)
        }
    }

    fn stop_container(&mut self, mode: StopMode) -> Command {
        match mode {
            StopMode::Remove => self.enter(State::Stopping, Command::StopAndRemove),
            StopMode::Stop => self.enter(State::Stopping, Command::Stop(GracePeriod::Short)),
            StopMode::Replace => self.relaunch(),
        }
    }

    /// Handles a GPU failure according to `gpu.on_failure`; `if_ignored` is the command for
    /// `ignore`.
    fn on_gpu_failed(
        &mut self,
        finding: Finding,
        if_ignored: Command,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        match self.policy.on_failure {
            OnFailure::Ignore => {
                notifications.push(Notification::GpuFailureIgnored(finding));
                if_ignored
            }
            OnFailure::Restart if self.gpu_attempts < GPU_RETRY_DELAYS.len() => {
                notifications.push(Notification::GpuRetry(finding.clone()));
                let stop = Command::Stop(GracePeriod::Configured);
                self.enter(State::StoppingForGpu(finding), stop)
            }
            OnFailure::Restart | OnFailure::Cpu => self.leave_failed_gpu(finding, notifications),
        }
    }

    /// Schedules the next probe of a failed GPU, or moves to the CPU after the last attempt. The
    /// container stays stopped meanwhile, because a GPU in use cannot be reset.
    fn schedule_gpu_retry(
        &mut self,
        finding: Finding,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        let Some(delay) = GPU_RETRY_DELAYS.get(self.gpu_attempts) else {
            return self.leave_failed_gpu(finding, notifications);
        };
        self.gpu_attempts += 1;
        notifications.push(Notification::GpuProbeScheduled(*delay));
        self.enter(State::GpuRetryPending(finding), Command::Sleep(*delay))
    }

    /// Moves the container from a GPU that failed while it ran to the CPU. A restarted agent adopts
    /// the container on the CPU; the GPU is used again only after the container was stopped.
    fn leave_failed_gpu(
        &mut self,
        finding: Finding,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        if self.policy.gpu_required {
            notifications.push(Notification::RequiredGpuFailed(finding));
            return self.terminate(ExitReason::GpuRequired);
        }
        self.reported_fallback = None;
        self.fall_back_to_cpu(finding, notifications);
        notifications.push(Notification::MovingToCpu);
        self.relaunch()
    }

    /// Makes the CPU the target of the launch and reports the fallback, unless the last fallback
    /// WARNING had the same reason. Terminates instead if the GPU is required.
    fn fall_back_to_cpu(
        &mut self,
        finding: Finding,
        notifications: &mut Vec<Notification>,
    ) -> Command {
        if self.policy.gpu_required {
            notifications.push(Notification::GpuRequired(finding));
            return self.terminate(ExitReason::GpuRequired);
        }
        if self.reported_fallback != Some(finding.reason) {
            self.reported_fallback = Some(finding.reason);
            notifications.push(Notification::CpuFallback(finding.clone()));
        }
        let gpu = std::mem::replace(&mut self.target.verdict, Verdict::cpu(finding));
        self.target.fallback_from = Some(gpu);
        self.enter(State::Inspecting, Command::Inspect)
    }
}

#[cfg(test)]
mod tests;
