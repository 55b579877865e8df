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
//!   ├─ pause <── the engine answers? <── a launch failed, or the container ended <─────────┤
//!   │                │ no: wait, connect, …      (it runs all the same: wait ──> watch)    │
//!   ├─ stop, or take away <── pause, but for the first <── hangs, has lost its GPU <───────┤
//!   ├─ pause, but for the first <── the service has another SuperLink <────────────────────┤
//!   ├─ on the CPU <──────────────────────┬─ the GPU failed <───────────────────────────────┤
//!   └─ well <── pause, probe <── stop <──┘  (ignored: watch)                               │
//!                                                  the GPU is usable now: told, or anew <──┘
//! ```
//!
//! The pause is 1 s, doubles up to 60 s, and is 1 s again after ten minutes of health or when the
//! engine had gone. Whenever the node must have a GPU and would go on the CPU, it ends. So does a
//! first launch that fails: the service manager tries again, from the beginning.

use std::time::Duration;

use crate::config::settings::{OnFailure, OnLate};
use crate::gpu;
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::Verdict;

/// The pause before a container that has ended is started again: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A run of this length makes the next pause the first again.
const HEALTHY_AFTER: Duration = Duration::from_secs(600);
/// The pauses before a GPU that failed is tried again: as many as tries. They begin anew once it
/// has worked for [`HEALTHY_AFTER`].
const GPU_PAUSES: [Duration; 3] =
    [Duration::from_secs(5), Duration::from_secs(10), Duration::from_secs(20)];
/// While the engine is away it is looked for this often.
const ENGINE_PAUSE: Duration = Duration::from_secs(2);

/// What the operator wants.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// `FL_GPU_REQUIRED`.
    pub gpu_required: bool,
    /// `gpu.on_failure`.
    pub on_failure: OnFailure,
    /// `gpu.on_late`.
    pub on_late: OnLate,
}

/// What has happened: the answer to an [`Act`].
#[derive(Debug, Clone)]
pub enum Event {
    /// What has the container's name.
    Found(Found),
    /// It is done.
    Done,
    /// It could not be done: the engine or a file did not do its part.
    Failed,
    /// Docker refuses to start what it has.
    Refused,
    /// The container did not come up with the GPU.
    NotOnGpu(Finding),
    /// Whether the engine answers.
    Engine {
        /// It does.
        answers: bool,
    },
    /// Whether the container that was watched runs all the same.
    Runs(bool),
    /// Whether a probe finds the GPU well.
    Well(bool),
    /// The container was watched, and there is a change.
    Changed {
        /// What it is.
        change: Change,
        /// For how long this run of the container has been watched; nothing where none runs.
        up_for: Duration,
    },
}

/// What has the container's name.
#[derive(Debug, Clone)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// A container of this very specification runs, and has its GPU.
    Same,
    /// The same, and the GPU is not in it.
    WithoutGpu(Finding),
    /// One runs on the CPU because this very specification did not come up on the GPU.
    StandIn(Finding),
    /// One of this very specification has ended.
    Ended,
    /// Another.
    Other,
}

/// What ends the quiet life of a running container.
#[derive(Debug, Clone)]
pub enum Change {
    /// It has ended, with this exit code; without one the container or the engine went away.
    Ended(Option<i64>),
    /// Its GPU failed.
    Failed(Finding),
    /// It has no GPU any more, and the machine has.
    Lost,
    /// It runs on the CPU, and the GPU is usable now.
    Usable,
    /// Flower does not answer any more.
    Hangs,
    /// The service has another SuperLink.
    Moved,
}

/// What is to be done next. Each is answered by one event; in brackets: by which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Look what has the container's name (Found, Failed).
    Look,
    /// Stop and remove it (Done, Failed).
    Clear,
    /// Make and start a container (Done, NotOnGpu, Failed).
    Make,
    /// Start the one that has ended (Done, Refused, NotOnGpu, Failed).
    StartAgain,
    /// Remove the container that did not come up with the GPU, for this (Done, Failed).
    Discard(Finding),
    /// Wait until something changes (Changed).
    Watch,
    /// Ask the engine whether it is there (Engine).
    AskEngine,
    /// Connect to the engine (Engine).
    Connect,
    /// See whether the container that was watched still runs (Runs).
    See,
    /// Wait (Done).
    Wait(Duration),
    /// Wait, and watch the GPU meanwhile: the container may have ended of its fault (Done,
    /// Changed).
    Rest(Duration),
    /// Stop the container (Done, also where it does not stop).
    Stop(Grace),
    /// Stop and remove the container that was watched (Done, also where that fails).
    TakeAway,
    /// Ask a probe for the GPU that failed (Well).
    Probe,
    /// It is over: nothing follows.
    End(End),
}

/// How long a container has to stop by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grace {
    /// What the settings give it.
    Whole,
    /// It does nothing that could be finished.
    Short,
}

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// There must be a GPU, and there is none.
    GpuRequired,
    /// The container did not come up, and never had.
    NotUp,
    /// The GPU is usable now, and the story is to begin anew.
    Anew,
}

/// What is told before the next act.
#[derive(Debug, Clone)]
pub enum Tell {
    /// The running container is taken over.
    Adopted,
    /// The running container is replaced, for this.
    Replacing(Finding),
    /// The node leaves the GPU: the WARNING of the fallback.
    FallBack(Finding),
    /// The node would have to leave the GPU, and must not.
    Required(Finding),
    /// The same, of a GPU that failed while the container ran.
    RequiredLost(Finding),
    /// The container moves to the CPU.
    MovesToCpu,
    /// The launch failed.
    NotUp,
    /// The container is started again, after this pause.
    Again(Cause, Duration),
    /// The engine is waited for.
    EngineAway,
    /// The engine is back.
    EngineBack,
    /// The GPU failed, which is ignored.
    Ignored(Finding),
    /// The GPU failed, and is tried again.
    TriedAgain(Finding),
    /// After this pause.
    LooksAgain(Duration),
    /// The GPU is usable now, for whoever wants it.
    Usable,
    /// The GPU is usable now, and is taken.
    UsableTaken,
}

/// Why a container is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It has ended, with this exit code, or is gone.
    Ended(Option<i64>),
    /// It did not come up.
    NotUp,
}

/// What follows from an event: first this is told, then that is done.
#[derive(Debug)]
pub struct Step {
    /// What is told.
    pub tell: Vec<Tell>,
    /// What is done.
    pub act: Act,
}

/// Where the node is in its story: what the next event is about.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Looking,
    Clearing,
    Starting,
    /// The container that did not come up with the GPU goes.
    Discarding(Finding),
    Running,
    /// Whether the engine answers, after this.
    Asking(Cause),
    /// It does not: between two tries, and at one.
    Away(Cause),
    Connecting(Cause),
    /// The connection to the container has gone, and the container perhaps not.
    Seeing,
    Calming,
    /// Before the next start.
    Resting,
    /// Before a container that runs is ended, and while it is.
    Holding(Ending),
    Ending,
    /// The container of a GPU that failed is stopped; between two tries of the GPU, and at one.
    Stopping(Finding),
    Trying(Finding),
    Probing(Finding),
    Over(End),
}

/// How a container that runs comes to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    TakenAway,
    Stopped,
    /// It is replaced when it is looked for.
    Replaced,
}

/// What a container is launched on.
#[derive(Debug, Clone)]
struct Ground {
    verdict: Verdict,
    /// The GPU that did not come up or failed, where the verdict stands in for it.
    left: Option<Verdict>,
}

/// The machine.
#[derive(Debug, Clone)]
pub struct Machine {
    rules: Rules,
    place: Place,
    ground: Ground,
    /// The ground before the launch that is on its way.
    before: Ground,
    /// The reason of the WARNING that holds: it is not given again for every try.
    announced: Option<Reason>,
    /// The pause before the next start.
    pause: Duration,
    /// The tries that a GPU that failed has had.
    gpu_tries: usize,
    waits_for_gpu: bool,
    was_up: bool,
}

impl Machine {
    /// A node that is to run on this, which was announced where it is a fallback; and its first
    /// act.
    pub fn new(rules: Rules, verdict: Verdict) -> (Self, Act) {
        let announced = verdict.finding().map(|finding| finding.reason);
        let ground = Ground { verdict, left: None };
        let machine = Self {
            rules,
            place: Place::Looking,
            before: ground.clone(),
            ground,
            announced,
            pause: FIRST_PAUSE,
            gpu_tries: 0,
            waits_for_gpu: false,
            was_up: false,
        };
        (machine, Act::Look)
    }

    /// What the container runs on, or is to be started on.
    pub fn verdict(&self) -> &Verdict {
        &self.ground.verdict
    }

    /// The GPU that the verdict stands in for, because it did not come up or failed.
    pub fn left_gpu(&self) -> Option<&Verdict> {
        self.ground.left.as_ref()
    }

    /// Whether the GPU may become usable, which is told once.
    pub fn waits_for_gpu(&self) -> bool {
        self.waits_for_gpu
    }

    /// What follows from what has happened.
    pub fn after(&mut self, event: Event) -> Step {
        let mut tell = Vec::new();
        let act = self.decide(event, &mut tell);
        Step { tell, act }
    }

    fn decide(&mut self, event: Event, tell: &mut Vec<Tell>) -> Act {
        let on_gpu = self.on_gpu();
        match (self.place.clone(), event) {
            (Place::Looking, Event::Found(found)) => self.judge(found, tell),
            (Place::Clearing, Event::Done) => self.go(Place::Starting, Act::Make),
            (Place::Starting, Event::Done) => {
                if on_gpu {
                    self.announced = None;
                }
                self.watch()
            }
            (Place::Starting, Event::Refused) => self.go(Place::Clearing, Act::Clear),
            (Place::Starting, Event::NotOnGpu(finding)) if on_gpu => {
                self.go(Place::Discarding(finding.clone()), Act::Discard(finding))
            }
            (Place::Discarding(finding), Event::Done) => self.fall_back(finding, tell),
            (
                Place::Looking | Place::Clearing | Place::Starting | Place::Discarding(_),
                Event::Failed,
            ) => self.not_up(tell),

            (Place::Running, Event::Changed { change, up_for }) => {
                self.change(change, up_for, tell)
            }
            (Place::Asking(cause), Event::Engine { answers: true }) => self.settle(cause, tell),
            (Place::Asking(cause), Event::Engine { answers: false }) => {
                tell.push(Tell::EngineAway);
                // A container that went down with the engine is not to blame.
                if matches!(cause, Cause::Ended(_)) {
                    self.pause = FIRST_PAUSE;
                }
                self.go(Place::Away(cause), Act::Wait(ENGINE_PAUSE))
            }
            (Place::Away(cause), Event::Done) => self.go(Place::Connecting(cause), Act::Connect),
            (Place::Connecting(cause), Event::Engine { answers: false }) => {
                self.go(Place::Away(cause), Act::Wait(ENGINE_PAUSE))
            }
            (Place::Connecting(cause), Event::Engine { answers: true }) => {
                tell.push(Tell::EngineBack);
                self.settle(cause, tell)
            }
            (Place::Seeing, Event::Runs(true)) => self.go(Place::Calming, Act::Wait(FIRST_PAUSE)),
            (Place::Seeing, Event::Runs(false)) => self.rest(Cause::Ended(None), tell),
            (Place::Calming, Event::Done) => self.watch(),

            (Place::Resting, Event::Done) => {
                self.lengthen_pause();
                self.bring_up()
            }
            (Place::Resting, Event::Changed { change: Change::Failed(finding), .. }) if on_gpu => {
                self.gpu_failed(finding, Act::Rest(self.pause), tell)
            }
            (Place::Holding(ending), Event::Done) => self.end_container(ending),
            (Place::Ending, Event::Done) => self.bring_up(),

            (Place::Stopping(finding), Event::Done)
            | (Place::Probing(finding), Event::Well(false)) => self.try_gpu(finding, tell),
            (Place::Trying(finding), Event::Done) => self.go(Place::Probing(finding), Act::Probe),
            (Place::Probing(_), Event::Well(true)) => self.bring_up(),

            (Place::Over(end), _) => Act::End(end),
            _ => self.lost_the_thread(tell),
        }
    }

    fn go(&mut self, place: Place, act: Act) -> Act {
        self.place = place;
        act
    }

    fn end(&mut self, end: End) -> Act {
        self.go(Place::Over(end), Act::End(end))
    }

    fn on_gpu(&self) -> bool {
        matches!(self.ground.verdict, Verdict::Gpu { .. })
    }

    /// Brings the container up, from the ground of now.
    fn bring_up(&mut self) -> Act {
        self.before = self.ground.clone();
        self.go(Place::Looking, Act::Look)
    }

    fn judge(&mut self, found: Found, tell: &mut Vec<Tell>) -> Act {
        match found {
            Found::Nothing => self.go(Place::Starting, Act::Make),
            Found::Same => {
                tell.push(Tell::Adopted);
                self.watch()
            }
            Found::StandIn(finding) if self.on_gpu() => self.fall_back(finding, tell),
            Found::Ended => self.go(Place::Starting, Act::StartAgain),
            Found::WithoutGpu(finding) => {
                // The GPU itself is there: a container that is made anew may have it.
                tell.push(Tell::Replacing(finding));
                self.go(Place::Clearing, Act::Clear)
            }
            Found::StandIn(_) | Found::Other => self.go(Place::Clearing, Act::Clear),
        }
    }

    fn watch(&mut self) -> Act {
        if !self.was_up {
            self.was_up = true;
            self.waits_for_gpu = gpu::may_come_late(self.verdict());
        }
        self.go(Place::Running, Act::Watch)
    }

    /// The launch failed. Where it had moved to the CPU: it does not come up there either, so it
    /// was not the GPU, and the next try begins with it again.
    fn not_up(&mut self, tell: &mut Vec<Tell>) -> Act {
        self.ground = self.before.clone();
        if !self.was_up {
            return self.end(End::NotUp);
        }
        tell.push(Tell::NotUp);
        self.go(Place::Asking(Cause::NotUp), Act::AskEngine)
    }

    /// An event that is no answer to the last act: the node is looked at anew, after a pause.
    fn lost_the_thread(&mut self, tell: &mut Vec<Tell>) -> Act {
        if self.was_up { self.rest(Cause::NotUp, tell) } else { self.end(End::NotUp) }
    }

    fn change(&mut self, change: Change, up_for: Duration, tell: &mut Vec<Tell>) -> Act {
        if up_for >= HEALTHY_AFTER {
            self.pause = FIRST_PAUSE;
            self.gpu_tries = 0;
        }
        match change {
            Change::Ended(code) => self.go(Place::Asking(Cause::Ended(code)), Act::AskEngine),
            Change::Failed(finding) if self.on_gpu() => self.gpu_failed(finding, Act::Watch, tell),
            Change::Lost => self.hold(Ending::TakenAway),
            Change::Hangs => self.hold(Ending::Stopped),
            Change::Moved => self.hold(Ending::Replaced),
            Change::Usable if self.rules.on_late == OnLate::Restart => {
                tell.push(Tell::UsableTaken);
                self.end(End::Anew)
            }
            Change::Usable => {
                self.waits_for_gpu = false;
                tell.push(Tell::Usable);
                Act::Watch
            }
            Change::Failed(_) => self.lost_the_thread(tell),
        }
    }

    /// The engine answers.
    fn settle(&mut self, cause: Cause, tell: &mut Vec<Tell>) -> Act {
        match cause {
            // The connection may have gone and the container not.
            Cause::Ended(None) => self.go(Place::Seeing, Act::See),
            cause => self.rest(cause, tell),
        }
    }

    fn rest(&mut self, cause: Cause, tell: &mut Vec<Tell>) -> Act {
        tell.push(Tell::Again(cause, self.pause));
        self.go(Place::Resting, Act::Rest(self.pause))
    }

    fn lengthen_pause(&mut self) {
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// A container that runs has to end: the first at once, and one soon after another has to wait,
    /// lest a node does nothing but start.
    fn hold(&mut self, ending: Ending) -> Act {
        let pause = self.pause;
        self.lengthen_pause();
        if pause > FIRST_PAUSE {
            self.go(Place::Holding(ending), Act::Wait(pause))
        } else {
            self.end_container(ending)
        }
    }

    fn end_container(&mut self, ending: Ending) -> Act {
        match ending {
            Ending::TakenAway => self.go(Place::Ending, Act::TakeAway),
            Ending::Stopped => self.go(Place::Ending, Act::Stop(Grace::Short)),
            Ending::Replaced => self.bring_up(),
        }
    }

    /// What `gpu.on_failure` wants; `ignored`: what goes on where it is to be ignored.
    fn gpu_failed(&mut self, finding: Finding, ignored: Act, tell: &mut Vec<Tell>) -> Act {
        match self.rules.on_failure {
            OnFailure::Ignore => {
                tell.push(Tell::Ignored(finding));
                ignored
            }
            OnFailure::Restart if self.gpu_tries < GPU_PAUSES.len() => {
                tell.push(Tell::TriedAgain(finding.clone()));
                self.go(Place::Stopping(finding), Act::Stop(Grace::Whole))
            }
            OnFailure::Restart | OnFailure::Cpu => self.leave_gpu(finding, tell),
        }
    }

    /// Gives the GPU that failed one of the tries that are left: with the container stopped, for a
    /// GPU that is in use cannot be reset.
    fn try_gpu(&mut self, finding: Finding, tell: &mut Vec<Tell>) -> Act {
        let Some(pause) = GPU_PAUSES.get(self.gpu_tries) else {
            return self.leave_gpu(finding, tell);
        };
        self.gpu_tries += 1;
        tell.push(Tell::LooksAgain(*pause));
        self.go(Place::Trying(finding), Act::Wait(*pause))
    }

    /// Leaves a GPU that failed while the container ran on it. An agent that is started again
    /// adopts the container on the CPU: only one that is stopped gives the GPU another chance.
    fn leave_gpu(&mut self, finding: Finding, tell: &mut Vec<Tell>) -> Act {
        if self.rules.gpu_required {
            tell.push(Tell::RequiredLost(finding));
            return self.end(End::GpuRequired);
        }
        self.announced = None;
        self.fall_back(finding, tell);
        tell.push(Tell::MovesToCpu);
        self.bring_up()
    }

    /// Leaves the GPU: says so, once, before anything runs on the CPU. Not where there must be one.
    fn fall_back(&mut self, finding: Finding, tell: &mut Vec<Tell>) -> Act {
        if self.rules.gpu_required {
            tell.push(Tell::Required(finding));
            return self.end(End::GpuRequired);
        }
        if self.announced != Some(finding.reason) {
            self.announced = Some(finding.reason);
            tell.push(Tell::FallBack(finding.clone()));
        }
        let gpu = std::mem::replace(&mut self.ground.verdict, Verdict::cpu(finding));
        self.ground.left = Some(gpu);
        self.go(Place::Looking, Act::Look)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::gpu::verdict::GpuDevice;

    const RULES: Rules =
        Rules { gpu_required: false, on_failure: OnFailure::Cpu, on_late: OnLate::Announce };

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

    fn changed(change: Change) -> Event {
        Event::Changed { change, up_for: Duration::from_secs(10) }
    }

    /// More than any chain of acts that do not wait: the old container is taken away; on the GPU,
    /// and then on the CPU, it is looked for, started again, cleared, made and discarded; and the
    /// engine is asked.
    const MOST_ACTS: u32 = 12;

    /// A node, its next act, and what a test remembers of its story.
    #[derive(Debug)]
    struct Story {
        machine: Machine,
        act: Act,
        /// The WARNINGs since the container came up on the GPU last.
        warned: Vec<Reason>,
        /// The acts since one that waits.
        busy: u32,
        /// How often the container was brought up, and the time that was waited, since the pause
        /// was the first.
        bring_ups: u32,
        waited: Duration,
    }

    impl Story {
        fn new(rules: Rules, verdict: Verdict) -> Self {
            let warned = verdict.finding().map(|finding| finding.reason).into_iter().collect();
            let (machine, act) = Machine::new(rules, verdict);
            Self { machine, act, warned, busy: 0, bring_ups: 1, waited: Duration::ZERO }
        }

        /// Goes on, and holds the machine to what is true in every story.
        #[track_caller]
        fn hear(&mut self, event: Event) -> Vec<Tell> {
            let Step { tell, act } = self.machine.after(event.clone());
            if self.act == Act::Make && matches!(event, Event::Done) && self.machine.on_gpu() {
                self.warned.clear();
            }
            for tell in &tell {
                match tell {
                    Tell::FallBack(finding) => self.warned.push(finding.reason),
                    Tell::EngineAway => (self.bring_ups, self.waited) = (0, Duration::ZERO),
                    _ => {}
                }
            }
            if matches!(event, Event::Changed { up_for, .. } if up_for >= HEALTHY_AFTER) {
                (self.bring_ups, self.waited) = (0, Duration::ZERO);
            }
            match &act {
                // Two containers: what is started was just made sure of to be the only one.
                Act::Make => assert!(
                    matches!(event, Event::Found(Found::Nothing))
                        || self.act == Act::Clear && matches!(event, Event::Done),
                    "{event:?}: {self:?}"
                ),
                Act::StartAgain => {
                    assert!(matches!(event, Event::Found(Found::Ended)), "{event:?}: {self:?}")
                }
                // The other looks belong to a launch that goes on, on the CPU.
                Act::Look if !matches!(self.act, Act::Look | Act::Discard(_)) => {
                    self.bring_ups += 1;
                    assert!(self.waited >= least_wait(self.bring_ups), "{event:?}: {self:?}");
                }
                _ => {}
            }
            // The CPU: with its WARNING, and not at all where it must not be.
            if matches!(act, Act::Make | Act::StartAgain | Act::Watch)
                && let Verdict::Cpu { finding } = self.machine.verdict()
            {
                assert!(!self.machine.rules.gpu_required, "{event:?}: {self:?}");
                assert!(
                    finding.iter().all(|finding| self.warned.contains(&finding.reason)),
                    "{event:?}: {self:?}"
                );
            }
            // A busy loop: some acts, and then one that waits.
            self.busy += 1;
            match &act {
                Act::Watch | Act::End(_) => self.busy = 0,
                Act::Wait(pause) | Act::Rest(pause) => {
                    assert!(*pause >= FIRST_PAUSE, "{event:?}: {self:?}");
                    self.busy = 0;
                    self.waited += *pause;
                }
                _ => assert!(self.busy <= MOST_ACTS, "{event:?}: {self:?}"),
            }
            self.act = act;
            tell
        }

        /// From here on all goes well: whether the container runs in the end, or the story is over.
        fn ends_well(&mut self) -> bool {
            for _ in 0..MOST_ACTS {
                self.hear(match &self.act {
                    Act::Watch | Act::End(_) => return true,
                    Act::Look => Event::Found(Found::Nothing),
                    Act::AskEngine | Act::Connect => Event::Engine { answers: true },
                    Act::See => Event::Runs(true),
                    Act::Probe => Event::Well(true),
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
        let free = 3 + GPU_PAUSES.len() as u32;
        (0..n.saturating_sub(free))
            .map(|n| (FIRST_PAUSE * 2_u32.pow(n.min(10))).min(LONGEST_PAUSE))
            .sum()
    }

    /// Chance, for one act.
    #[derive(Debug, Clone, Copy)]
    struct Dice {
        which: usize,
        finding: usize,
        found: usize,
        change: usize,
        up_for: u16,
    }

    fn dice() -> impl Strategy<Value = Dice> {
        any::<[u8; 6]>().prop_map(|[which, finding, found, change, high, low]| Dice {
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

    impl Dice {
        /// An answer that the act may have, as its own comment says.
        fn answer(self, act: &Act) -> Event {
            let reasons = [Reason::RuntimeStartFailed, Reason::GpuNotVisible, Reason::GpuFailed];
            let finding = finding(pick(&reasons, self.finding));
            let not_on_gpu = Event::NotOnGpu(finding.clone());
            let yes = self.which.is_multiple_of(2);
            let found = [
                Found::Nothing,
                Found::Same,
                Found::WithoutGpu(finding.clone()),
                Found::StandIn(finding.clone()),
                Found::Ended,
                Found::Other,
            ];
            let change = [
                Change::Ended(Some(1)),
                Change::Ended(None),
                Change::Failed(finding.clone()),
                Change::Lost,
                Change::Usable,
                Change::Hangs,
                Change::Moved,
            ];
            let up_for = Duration::from_secs(self.up_for.into());
            let answers = match act {
                Act::Look => vec![Event::Found(pick(&found, self.found)), Event::Failed],
                Act::Clear | Act::Discard(_) => vec![Event::Done, Event::Failed],
                Act::Make => vec![Event::Done, not_on_gpu, Event::Failed],
                Act::StartAgain => vec![Event::Done, Event::Refused, not_on_gpu, Event::Failed],
                Act::Watch => vec![Event::Changed { change: pick(&change, self.change), up_for }],
                Act::AskEngine | Act::Connect => vec![Event::Engine { answers: yes }],
                Act::See => vec![Event::Runs(yes)],
                Act::Rest(_) => vec![Event::Done, changed(Change::Failed(finding))],
                Act::Probe => vec![Event::Well(yes)],
                Act::Wait(_) | Act::Stop(_) | Act::TakeAway | Act::End(_) => vec![Event::Done],
            };
            pick(&answers, self.which)
        }

        /// Anything: an answer to some act.
        fn anything(self) -> Event {
            let acts = [
                Act::Look,
                Act::Clear,
                Act::StartAgain,
                Act::Watch,
                Act::AskEngine,
                Act::See,
                Act::Probe,
            ];
            self.answer(&pick(&acts, self.which / 4))
        }
    }

    fn a_node() -> impl Strategy<Value = Story> {
        let on_failure = select(vec![OnFailure::Cpu, OnFailure::Restart, OnFailure::Ignore]);
        let on_late = select(vec![OnLate::Announce, OnLate::Restart]);
        let cpu =
            select(vec![Verdict::not_wanted(), Verdict::cpu(finding(Reason::DriverNotLoaded))]);
        let verdict = prop_oneof![3 => Just(on_gpu()), 1 => cpu];
        (any::<bool>(), on_failure, on_late, verdict).prop_map(
            |(required, on_failure, on_late, verdict)| {
                // A node that must have a GPU and has none from the start is ended before it comes
                // here.
                let gpu_required = required && matches!(verdict, Verdict::Gpu { .. });
                Story::new(Rules { gpu_required, on_failure, on_late }, verdict)
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
                let event = dice.answer(&story.act);
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
    fn up(rules: Rules, verdict: Verdict) -> Story {
        let mut story = Story::new(rules, verdict);
        assert!(story.ends_well());
        story
    }

    #[test]
    fn a_container_that_ends_again_and_again_is_started_after_ever_longer_pauses() {
        let mut story = up(RULES, Verdict::not_wanted());
        let mut pauses = Vec::new();
        for _ in 0..8 {
            story.hear(changed(Change::Ended(Some(1))));
            story.hear(Event::Engine { answers: true });
            let Act::Rest(pause) = story.act else { panic!("{story:?}") };
            pauses.push(pause.as_secs());
            story.ends_well();
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        story.hear(Event::Changed { change: Change::Ended(Some(1)), up_for: HEALTHY_AFTER });
        story.hear(Event::Engine { answers: true });
        assert_eq!(story.act, Act::Rest(FIRST_PAUSE));
    }

    #[test]
    fn a_container_that_hangs_loses_its_gpu_or_moves_is_made_anew_at_once_and_the_next_time_later()
    {
        for (change, act) in [
            (Change::Lost, Act::TakeAway),
            (Change::Hangs, Act::Stop(Grace::Short)),
            (Change::Moved, Act::Look),
        ] {
            let mut story = up(RULES, on_gpu());
            story.hear(changed(change.clone()));
            assert_eq!(story.act, act);
            story.ends_well();
            story.hear(changed(change));
            assert_eq!(story.act, Act::Wait(FIRST_PAUSE * 2));
        }
    }

    #[test]
    fn an_engine_that_went_is_looked_for_and_what_went_down_with_it_is_not_to_blame() {
        let mut story = up(RULES, Verdict::not_wanted());
        for _ in 0..3 {
            story.hear(changed(Change::Ended(None)));
            for _ in 0..3 {
                story.hear(Event::Engine { answers: false });
                assert_eq!(story.act, Act::Wait(ENGINE_PAUSE));
                story.hear(Event::Done);
            }
            story.hear(Event::Engine { answers: true });
            assert_eq!(story.act, Act::See);
            story.hear(Event::Runs(false));
            assert_eq!(story.act, Act::Rest(FIRST_PAUSE));
            story.ends_well();
        }
    }

    #[test]
    fn where_the_cpu_fails_as_well_the_gpu_is_tried_again_with_one_warning() {
        let mut story = up(RULES, on_gpu());
        story.hear(changed(Change::Ended(Some(1))));
        story.hear(Event::Engine { answers: true });
        let mut told = Vec::new();
        for _ in 0..3 {
            story.hear(Event::Done);
            assert_eq!(story.machine.verdict(), &on_gpu());
            story.hear(Event::Found(Found::Nothing));
            story.hear(Event::NotOnGpu(finding(Reason::RuntimeStartFailed)));
            told.extend(story.hear(Event::Done));
            assert_eq!(story.machine.left_gpu(), Some(&on_gpu()));
            story.hear(Event::Found(Found::Nothing));
            told.extend(story.hear(Event::Failed));
            told.extend(story.hear(Event::Engine { answers: true }));
        }
        let warnings = told.iter().filter(|tell| matches!(tell, Tell::FallBack(_))).count();
        assert_eq!(warnings, 1, "{told:?}");
        assert_eq!(story.machine.left_gpu(), None);
    }

    #[test]
    fn a_gpu_that_failed_has_three_tries_where_that_is_wanted() {
        let mut story = up(Rules { on_failure: OnFailure::Restart, ..RULES }, on_gpu());
        let failed = || changed(Change::Failed(finding(Reason::GpuFailed)));
        story.hear(failed());
        assert_eq!(story.act, Act::Stop(Grace::Whole));
        let mut pauses = Vec::new();
        story.hear(Event::Done);
        while let Act::Wait(pause) = story.act {
            pauses.push(pause);
            story.hear(Event::Done);
            // The first finds it well, and it fails once more.
            story.hear(Event::Well(pauses.len() == 1));
            if pauses.len() == 1 {
                story.ends_well();
                story.hear(failed());
                story.hear(Event::Done);
            }
        }
        assert_eq!(pauses, GPU_PAUSES);
        assert_eq!(
            story.machine.verdict().finding().map(|finding| finding.reason),
            Some(Reason::GpuFailed)
        );
        assert_eq!(story.act, Act::Look);
    }

    #[test]
    fn a_first_launch_that_fails_is_the_end_and_a_later_one_is_not() {
        let mut story = Story::new(RULES, Verdict::not_wanted());
        story.hear(Event::Failed);
        assert_eq!(story.act, Act::End(End::NotUp));
        let mut story = up(RULES, Verdict::not_wanted());
        story.hear(changed(Change::Moved));
        story.hear(Event::Failed);
        assert_eq!(story.act, Act::AskEngine);
    }

    #[test]
    fn a_gpu_that_must_be_there_and_does_not_come_up_or_fails_is_the_end() {
        let rules = Rules { gpu_required: true, ..RULES };
        let mut story = up(rules, on_gpu());
        let told = story.hear(changed(Change::Failed(finding(Reason::GpuFailed))));
        assert!(matches!(told[..], [Tell::RequiredLost(_)]), "{told:?}");
        assert_eq!(story.act, Act::End(End::GpuRequired));
        let mut story = Story::new(rules, on_gpu());
        let told = story.hear(Event::Found(Found::StandIn(finding(Reason::RuntimeStartFailed))));
        assert!(matches!(told[..], [Tell::Required(_)]), "{told:?}");
        assert_eq!(story.act, Act::End(End::GpuRequired));
    }

    #[test]
    fn a_gpu_that_is_usable_late_is_told_once_or_taken() {
        let verdict = || Verdict::cpu(finding(Reason::DriverNotLoaded));
        let mut story = up(RULES, verdict());
        assert!(story.machine.waits_for_gpu());
        story.hear(changed(Change::Usable));
        assert!(story.act == Act::Watch && !story.machine.waits_for_gpu(), "{story:?}");
        let mut story = up(Rules { on_late: OnLate::Restart, ..RULES }, verdict());
        story.hear(changed(Change::Usable));
        assert_eq!(story.act, Act::End(End::Anew));
        assert!(!up(RULES, Verdict::not_wanted()).machine.waits_for_gpu());
    }

    #[test]
    fn another_container_is_taken_away_before_ours_is_made() {
        let mut story = Story::new(RULES, Verdict::not_wanted());
        for (event, act) in [
            (Event::Found(Found::Other), Act::Clear),
            (Event::Done, Act::Make),
            (Event::Done, Act::Watch),
        ] {
            assert!(story.hear(event).is_empty());
            assert_eq!(story.act, act);
        }
        // On the CPU there is nothing that it could stand in for.
        let mut story = Story::new(RULES, Verdict::not_wanted());
        story.hear(Event::Found(Found::StandIn(finding(Reason::RuntimeStartFailed))));
        assert_eq!(story.act, Act::Clear);
    }

    #[test]
    fn a_container_that_docker_refuses_to_start_again_is_made_anew() {
        let mut story = Story::new(RULES, on_gpu());
        for (event, act) in [
            (Event::Found(Found::Ended), Act::StartAgain),
            (Event::Refused, Act::Clear),
            (Event::Done, Act::Make),
            (Event::Done, Act::Watch),
        ] {
            story.hear(event);
            assert_eq!(story.act, act);
        }
    }

    #[test]
    fn a_container_that_runs_as_it_is_wanted_is_adopted_and_one_that_has_lost_its_gpu_is_replaced()
    {
        let mut story = Story::new(RULES, on_gpu());
        let told = story.hear(Event::Found(Found::Same));
        assert!(matches!(told[..], [Tell::Adopted]), "{told:?}");
        assert_eq!(story.act, Act::Watch);
        let mut story = Story::new(RULES, on_gpu());
        let told = story.hear(Event::Found(Found::WithoutGpu(finding(Reason::GpuNotVisible))));
        assert!(
            matches!(&told[..], [Tell::Replacing(why)] if why.reason == Reason::GpuNotVisible),
            "{told:?}"
        );
        assert_eq!((story.act, story.machine.verdict()), (Act::Clear, &on_gpu()));
    }

    #[test]
    fn a_container_that_outlived_the_connection_to_it_is_watched_on() {
        let mut story = up(RULES, on_gpu());
        for (event, act) in [
            (changed(Change::Ended(None)), Act::AskEngine),
            (Event::Engine { answers: true }, Act::See),
            (Event::Runs(true), Act::Wait(FIRST_PAUSE)),
            (Event::Done, Act::Watch),
        ] {
            assert!(story.hear(event).is_empty());
            assert_eq!(story.act, act);
        }
    }

    #[test]
    fn why_and_after_what_pause_a_container_is_started_again_is_told() {
        let mut story = up(RULES, Verdict::not_wanted());
        let again = |told: Vec<Tell>| match told[..] {
            [Tell::Again(cause, pause)] => (cause, pause.as_secs()),
            _ => panic!("{told:?}"),
        };
        story.hear(changed(Change::Ended(Some(137))));
        assert_eq!(
            again(story.hear(Event::Engine { answers: true })),
            (Cause::Ended(Some(137)), 1)
        );
        story.ends_well();
        story.hear(changed(Change::Ended(None)));
        story.hear(Event::Engine { answers: true });
        assert_eq!(again(story.hear(Event::Runs(false))), (Cause::Ended(None), 2));
        story.hear(Event::Done);
        let told = story.hear(Event::Failed);
        assert!(matches!(told[..], [Tell::NotUp]), "{told:?}");
        assert_eq!(again(story.hear(Event::Engine { answers: true })), (Cause::NotUp, 4));
    }

    #[test]
    fn the_engine_is_told_once_when_it_goes_and_once_when_it_is_back() {
        let mut story = up(RULES, Verdict::not_wanted());
        story.hear(changed(Change::Ended(Some(1))));
        let told = story.hear(Event::Engine { answers: false });
        assert!(matches!(told[..], [Tell::EngineAway]), "{told:?}");
        assert!(story.hear(Event::Done).is_empty());
        assert_eq!(story.act, Act::Connect);
        assert!(story.hear(Event::Engine { answers: false }).is_empty());
        assert_eq!(story.act, Act::Wait(ENGINE_PAUSE));
        story.hear(Event::Done);
        let told = story.hear(Event::Engine { answers: true });
        assert!(
            matches!(told[..], [Tell::EngineBack, Tell::Again(Cause::Ended(Some(1)), FIRST_PAUSE)]),
            "{told:?}"
        );
    }

    #[test]
    fn a_launch_that_failed_before_the_engine_went_keeps_its_pause() {
        let mut story = up(RULES, Verdict::not_wanted());
        story.hear(changed(Change::Ended(Some(1))));
        story.hear(Event::Engine { answers: true });
        story.hear(Event::Done);
        story.hear(Event::Failed);
        story.hear(Event::Engine { answers: false });
        story.hear(Event::Done);
        story.hear(Event::Engine { answers: true });
        assert_eq!(story.act, Act::Rest(FIRST_PAUSE * 2));
    }

    #[test]
    fn a_gpu_that_fails_is_ignored_where_that_is_wanted_also_between_two_starts() {
        let mut story = up(Rules { on_failure: OnFailure::Ignore, ..RULES }, on_gpu());
        let failed = || changed(Change::Failed(finding(Reason::GpuFailed)));
        let told = story.hear(failed());
        assert!(matches!(told[..], [Tell::Ignored(_)]), "{told:?}");
        assert_eq!(story.act, Act::Watch);
        story.hear(changed(Change::Ended(Some(1))));
        story.hear(Event::Engine { answers: true });
        let told = story.hear(failed());
        assert!(matches!(told[..], [Tell::Ignored(_)]), "{told:?}");
        assert_eq!((&story.act, story.machine.verdict()), (&Act::Rest(FIRST_PAUSE), &on_gpu()));
        story.hear(Event::Done);
        assert_eq!(story.act, Act::Look);
    }

    #[test]
    fn a_gpu_whose_fault_ended_the_container_is_tried_again_or_left_before_the_next_start() {
        for (on_failure, act) in
            [(OnFailure::Restart, Act::Stop(Grace::Whole)), (OnFailure::Cpu, Act::Look)]
        {
            let mut story = up(Rules { on_failure, ..RULES }, on_gpu());
            story.hear(changed(Change::Ended(Some(1))));
            story.hear(Event::Engine { answers: true });
            story.hear(changed(Change::Failed(finding(Reason::GpuFailed))));
            assert_eq!(story.act, act);
        }
    }

    #[test]
    fn every_try_of_a_gpu_that_failed_is_told_and_health_gives_it_new_ones() {
        let mut story = up(Rules { on_failure: OnFailure::Restart, ..RULES }, on_gpu());
        let failed = |seconds| Event::Changed {
            change: Change::Failed(finding(Reason::GpuFailed)),
            up_for: Duration::from_secs(seconds),
        };
        for seconds in [10, 599, 600] {
            let told = story.hear(failed(seconds));
            assert!(matches!(told[..], [Tell::TriedAgain(_)]), "{told:?}");
            let told = story.hear(Event::Done);
            let pause = if seconds == 599 { GPU_PAUSES[1] } else { GPU_PAUSES[0] };
            assert!(matches!(told[..], [Tell::LooksAgain(told)] if told == pause), "{told:?}");
            assert_eq!(story.act, Act::Wait(pause));
            story.hear(Event::Done);
            assert_eq!(story.act, Act::Probe);
            story.hear(Event::Well(true));
            assert_eq!(story.act, Act::Look);
            story.ends_well();
        }
    }

    #[test]
    fn a_node_that_leaves_its_gpu_says_so_and_says_so_again_after_it_was_well() {
        let mut story = up(RULES, on_gpu());
        let told = story.hear(changed(Change::Failed(finding(Reason::GpuFailed))));
        assert!(matches!(told[..], [Tell::FallBack(_), Tell::MovesToCpu]), "{told:?}");
        assert_eq!(story.machine.left_gpu(), Some(&on_gpu()));
        // Where the GPU did not come up, and then did, and then does not again, each is a WARNING
        // of its own.
        let mut story = up(RULES, on_gpu());
        for _ in 0..2 {
            story.hear(changed(Change::Moved));
            if story.act != Act::Look {
                story.hear(Event::Done);
            }
            story.hear(Event::Found(Found::Nothing));
            story.hear(Event::NotOnGpu(finding(Reason::RuntimeStartFailed)));
            assert_eq!(story.act, Act::Discard(finding(Reason::RuntimeStartFailed)));
            let told = story.hear(Event::Done);
            assert!(matches!(told[..], [Tell::FallBack(_)]), "{told:?}");
            // It does not come up on the CPU either, so the next try is with the GPU: that one
            // comes up.
            story.hear(Event::Failed);
            story.ends_well();
            assert_eq!(story.machine.verdict(), &on_gpu());
        }
    }

    #[test]
    fn a_container_that_has_to_end_soon_after_another_ends_after_a_pause() {
        for (change, act) in [
            (Change::Lost, Act::TakeAway),
            (Change::Hangs, Act::Stop(Grace::Short)),
            (Change::Moved, Act::Look),
        ] {
            let mut story = up(RULES, on_gpu());
            story.hear(changed(change.clone()));
            story.ends_well();
            story.hear(changed(change));
            story.hear(Event::Done);
            assert_eq!(story.act, act);
            if act != Act::Look {
                story.hear(Event::Done);
                assert_eq!(story.act, Act::Look);
            }
        }
    }

    #[test]
    fn what_is_over_stays_over() {
        let mut story = up(Rules { gpu_required: true, ..RULES }, on_gpu());
        story.hear(changed(Change::Failed(finding(Reason::GpuFailed))));
        for event in [Event::Done, Event::Found(Found::Nothing), changed(Change::Lost)] {
            assert!(story.hear(event).is_empty());
            assert_eq!(story.act, Act::End(End::GpuRequired));
        }
    }

    #[test]
    fn a_gpu_that_is_usable_late_is_told_or_said_to_be_taken() {
        let verdict = || Verdict::cpu(finding(Reason::DriverNotLoaded));
        let told = up(RULES, verdict()).hear(changed(Change::Usable));
        assert!(matches!(told[..], [Tell::Usable]), "{told:?}");
        let told = up(Rules { on_late: OnLate::Restart, ..RULES }, verdict())
            .hear(changed(Change::Usable));
        assert!(matches!(told[..], [Tell::UsableTaken]), "{told:?}");
    }

    #[test]
    fn a_gpu_that_had_its_three_tries_is_left_at_the_next_fault() {
        let mut story = up(Rules { on_failure: OnFailure::Restart, ..RULES }, on_gpu());
        for _ in GPU_PAUSES {
            story.hear(changed(Change::Failed(finding(Reason::GpuFailed))));
            assert_eq!(story.act, Act::Stop(Grace::Whole));
            story.ends_well();
        }
        let told = story.hear(changed(Change::Failed(finding(Reason::GpuFailed))));
        assert!(matches!(told[..], [Tell::FallBack(_), Tell::MovesToCpu]), "{told:?}");
        assert_eq!(story.act, Act::Look);
    }

    #[test]
    fn on_the_cpu_no_gpu_can_fail_and_the_node_is_looked_at_anew_after_a_pause() {
        let failed = || changed(Change::Failed(finding(Reason::GpuFailed)));
        let mut story = up(RULES, Verdict::not_wanted());
        for event in [failed(), failed()] {
            let told = story.hear(event);
            assert!(matches!(told[..], [Tell::Again(Cause::NotUp, FIRST_PAUSE)]), "{told:?}");
            assert_eq!(story.act, Act::Rest(FIRST_PAUSE));
        }
        story.hear(Event::Done);
        story.hear(Event::Found(Found::Nothing));
        let told = story.hear(Event::NotOnGpu(finding(Reason::GpuNotVisible)));
        assert!(matches!(told[..], [Tell::Again(Cause::NotUp, _)]), "{told:?}");
        assert_eq!(
            (story.act, story.machine.verdict()),
            (Act::Rest(FIRST_PAUSE * 2), &Verdict::not_wanted())
        );
    }
}
