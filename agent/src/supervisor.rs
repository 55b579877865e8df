//! The container's life: adopted or replaced, watched, started again, stopped. The agent is its one owner.
//!
//! ```text
//!           same specification, running, with its GPU
//!          ┌──────────────── adopt ───────────────┐
//! look ────┤                                      ├──> running ──ended──> pause ──> look
//!          └─ (stop, remove) create, start, check ┘       │
//!                   │ refused with the GPU                │
//!                   └──> WARNING, once, then on the CPU   │
//!                                                         ├─ the GPU failed ─> WARNING
//!                                                         │      ├─ cpu ─────> look, on the CPU
//!                                                         │      ├─ restart ─> stop, pause, probe ─> look; in the end cpu
//!                                                         │      └─ ignore ──> running
//!                                                         ├─ the container lost the GPU ─> WARNING, remove ─> look
//!                                                         ├─ on the CPU, and the GPU is usable now: announce,
//!                                                         │      or (gpu.on_late) the whole story again
//!                                                         ├─ Flower hangs ────> WARNING, stop ─> look
//!                                                         ├─ not connected, and the service has another SuperLink:
//!                                                         │      remove ─> look
//!                                                         └─ SIGTERM ──> stop
//! ```

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::atomic;
use crate::backoff::{Backoff, with_jitter};
use crate::cloud::Cloud;
use crate::config::values::ImageRef;
use crate::config::{Config, LogLevel};
use crate::connection::{Connection, Listener, until_reached};
use crate::distribution::Distribution;
use crate::docker::engine::{Container, Engine, EngineError};
use crate::docker::runtime::GpuAccess;
use crate::flower::Release;
use crate::gpu::presence::{self, devices_missing_in};
use crate::gpu::reason::{Finding, Reason};
use crate::gpu::verdict::{GpuDevice, Verdict};
use crate::gpu::watch::Watch;
use crate::gpu::{self, detect_gpus};
use crate::health::{Dead, Liveness};
use crate::journal;
use crate::plan::{self, ContainerSpec, Machine};
use crate::report::Reporter;
use crate::settings::{OnFailure, OnLate, Settings};
use crate::site;
use crate::superlink::{Found, SuperLink, find_superlink};

/// The pause before a container that has ended is started again: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A run of this length makes the next pause the first again.
const HEALTHY_AFTER: Duration = Duration::from_secs(600);
/// The pauses before a GPU that failed is tried again: as many as tries. They begin anew once it has worked for
/// [`HEALTHY_AFTER`].
const GPU_PAUSES: [Duration; 3] = [Duration::from_secs(5), Duration::from_secs(10), Duration::from_secs(20)];
/// While the engine is away it is looked for this often.
const ENGINE_PAUSE: Duration = Duration::from_secs(2);

/// The node: everything its container is made from.
#[derive(Debug)]
pub struct Node {
    /// What the operator wants.
    pub config: Config,
    /// Where things are.
    pub settings: Settings,
    /// The way to OneGate, where there is one.
    pub cloud: Option<Cloud>,
    /// What the node connects to.
    pub superlink: SuperLink,
    /// The image that was found.
    pub image: ImageRef,
    /// What the machine has.
    pub machine: Machine,
    /// The distribution that fixes are for.
    pub distribution: Distribution,
    /// How the GPU gets in.
    pub access: GpuAccess,
    /// What the node runs on.
    pub verdict: Verdict,
    /// Who is told.
    pub reporter: Rc<Reporter>,
    /// The hash of the GPU specification that did not come up, once there is one.
    pub refused_hash: Option<String>,
    /// The reason of the WARNING that holds: it is not given again for every try.
    pub announced: Option<Reason>,
    /// What is true beside the verdict, for the status.
    pub remark: Option<String>,
    /// What Flower says of its connection.
    pub connection: Connection,
    /// Whether the container has a connection to the SuperLink's port: what there is to go by where Flower's log says nothing.
    pub reached: bool,
}

/// What ends the quiet life of a running container.
enum Change {
    /// It has ended, with this exit code, or the engine went away.
    Ended(Option<i64>),
    /// Its GPU failed.
    Failed(Finding),
    /// It has no GPU any more, and the machine has.
    Lost(Finding),
    /// It runs on the CPU, and the GPU is usable now.
    Usable,
    /// Flower has said something of its connection.
    Connection(Connection),
    /// Whether there is a connection to the SuperLink's port has changed.
    Reached(bool),
    /// Flower does not answer any more.
    Hangs(Dead),
    /// The service has another SuperLink.
    Moved(Box<Found>),
}

/// What its supervisor remembers of the node's life so far.
struct Life {
    /// The pause before the next start.
    pause: Duration,
    watch: Watch,
    run: Run,
    liveness: Liveness,
    /// The pauses before the tries that a failed GPU has left.
    gpu_pauses: std::slice::Iter<'static, Duration>,
    /// Whether the GPU may become usable, which is told once.
    waits_for_gpu: bool,
    /// Whether the container had been up for long when the last change came.
    was_healthy: bool,
}

impl Life {
    fn new(node: &Node, engine: &Engine, container: &Container) -> Self {
        Self {
            pause: FIRST_PAUSE,
            watch: Watch::new(Rc::clone(&node.reporter)),
            run: Run::new(engine, container),
            liveness: Liveness::default(),
            gpu_pauses: GPU_PAUSES.iter(),
            waits_for_gpu: gpu::may_come_late(&node.verdict),
            was_healthy: false,
        }
    }
}

/// What listens to one run of a container.
struct Run {
    id: String,
    started_at: String,
    since: Instant,
    listener: Listener,
}

impl Run {
    fn new(engine: &Engine, container: &Container) -> Self {
        Self {
            id: container.id.clone(),
            started_at: container.started_at.clone(),
            since: Instant::now(),
            listener: Listener::new(engine.log(container)),
        }
    }

    fn is_of(&self, container: &Container) -> bool {
        self.id == container.id && self.started_at == container.started_at
    }
}

/// What a node is in want of that its supervisor cannot give: the story from the beginning, because the GPU is usable now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Anew;

/// Why the container does not run.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// There must be a GPU, and there is none.
    #[error("FL_GPU_REQUIRED is YES and no GPU is usable")]
    GpuRequired,
    /// The container did not come up on the GPU, and Docker does not let go of it.
    #[error(
        "{summary}; and Docker does not let go of that container: end what hangs (ps -C nvidia-container-runtime), or restart Docker"
    )]
    Stuck {
        /// What was found about the GPU.
        summary: String,
        /// What Docker said to the removal.
        source: EngineError,
    },
    /// What the container mounts cannot be made.
    #[error("cannot write {path}")]
    Mounts {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl Node {
    fn spec(&self) -> ContainerSpec {
        let superlink = Some(&self.superlink);
        let mut spec = plan::plan_container(
            &self.config,
            &self.verdict,
            &self.access,
            superlink,
            &self.image,
            &self.machine,
            &self.settings,
        );
        if let Some(hash) = &self.refused_hash {
            spec.labels.insert(plan::REFUSED_HASH_LABEL.into(), hash.clone());
        }
        spec
    }

    /// Tells that the node runs, and on what.
    pub fn report_running(&self, container: &Container) {
        self.reporter.up(container);
        self.reporter.decided(&self.verdict, self.distribution, &self.superlink);
        self.reporter.news(|news| {
            news.gpus = self.verdict.devices().iter().filter_map(|device| device.name.clone()).collect();
            (news.gpu_status, news.fallback_reason) = match &self.verdict {
                Verdict::Gpu { .. } => ("gpu", ""),
                Verdict::Cpu { finding: Some(finding) } => ("cpu-fallback", finding.reason.code()),
                Verdict::Cpu { finding: None } => ("cpu", ""),
            };
            news.partition = self.superlink.partition.map(|partition| partition.id);
        });
        self.reporter.connected(self.is_connected());
        self.reporter.ready(&self.status());
    }

    fn release(&self) -> &'static Release {
        Release::of(plan::version_in(&self.config, &self.image))
    }

    /// Whether the container's log tells when Flower has connected.
    fn log_tells(&self) -> bool {
        matches!(self.config.log_level, LogLevel::Debug | LogLevel::Info) && self.release().tells_node_id()
    }

    fn is_connected(&self) -> bool {
        if self.log_tells() { self.connection.node_id().is_some() } else { self.reached }
    }

    /// The line for `systemctl status`.
    fn status(&self) -> String {
        let connected = if self.is_connected() { "connected to" } else { "not connected to" };
        let mut status = format!("{}; {connected} {}", self.runs_on(), self.superlink.address);
        if let Some(remark) = &self.remark {
            status.push_str("; ");
            status.push_str(remark);
        }
        status
    }

    fn runs_on(&self) -> String {
        match &self.verdict {
            Verdict::Gpu { devices, .. } => {
                let names: Vec<String> = devices.iter().map(ToString::to_string).collect();
                format!("Running on {}", names.join(", "))
            }
            Verdict::Cpu { finding: None } => "Running on the CPU (FL_GPU_ENABLED is not YES)".into(),
            Verdict::Cpu { finding: Some(finding) } => {
                format!("Running on the CPU: {}: {}", finding.reason, finding.summary)
            }
        }
    }

    /// Leaves the GPU: says so, once, before anything runs on the CPU.
    ///
    /// # Errors
    /// When there must be a GPU.
    fn fall_back(&mut self, finding: Finding) -> Result<(), LaunchError> {
        if self.announced != Some(finding.reason) {
            announce(&self.config, &finding, self.distribution)?;
            self.announced = Some(finding.reason);
        }
        self.verdict = Verdict::cpu(finding);
        Ok(())
    }

    /// Leaves a GPU that failed while the container ran on it. An agent that is started again adopts the container on the
    /// CPU: only one that is stopped gives the GPU another chance.
    ///
    /// # Errors
    /// When there must be a GPU.
    fn leave_gpu(&mut self, finding: Finding) -> Result<(), LaunchError> {
        if self.config.gpu_required {
            journal::error_required_lost(&finding, self.distribution);
            return Err(LaunchError::GpuRequired);
        }
        self.announced = None;
        self.refused_hash = Some(self.spec().hash());
        self.fall_back(finding)
    }

    /// Adopts the running container of this very specification, or replaces whatever has its name.
    ///
    /// # Errors
    /// When the engine does not do its part, what is mounted cannot be made, or there must be a GPU and the container does
    /// not come up on it.
    pub async fn bring_up(&mut self, engine: &Engine) -> Result<Container, LaunchError> {
        let (verdict, refused_hash) = (self.verdict.clone(), self.refused_hash.clone());
        let brought_up = self.adopt_or_replace(engine).await;
        if brought_up.is_err() {
            // It does not come up on the CPU either, so it was not the GPU: the next try begins with it again.
            (self.verdict, self.refused_hash) = (verdict, refused_hash);
        }
        brought_up
    }

    async fn adopt_or_replace(&mut self, engine: &Engine) -> Result<Container, LaunchError> {
        self.prepare_mounts()?;
        loop {
            let spec = self.spec();
            let found = engine.find_container(&spec.name).await?;
            if let Some(container) = found.as_ref().filter(|container| container.running) {
                if container.spec_hash() == Some(&spec.hash()) {
                    let Some(finding) = missing_in(container, self.verdict.devices()) else {
                        tracing::info!("adopted the running container {} ({})", spec.name, short(&container.id));
                        if container.paused {
                            tracing::warn!("the container {} is paused: docker unpause {0}", spec.name);
                        }
                        return Ok(container.clone());
                    };
                    // The GPU itself is there: a container that is made anew may have it.
                    tracing::warn!("replacing the running container: {}", finding.summary);
                } else if let Some(finding) = stands_in_for(container, &spec) {
                    self.refused_hash = Some(spec.hash());
                    self.fall_back(finding)?;
                    continue;
                }
            }
            match self.launch(engine, &spec, found).await? {
                Launched::Running(container) => {
                    if !self.verdict.devices().is_empty() {
                        self.announced = None;
                    }
                    return Ok(container);
                }
                Launched::NotOnGpu(finding) => {
                    let removed = async {
                        match engine.find_container(&spec.name).await? {
                            Some(dead) => engine.remove(&dead).await,
                            None => Ok(()),
                        }
                    };
                    // Docker 20.10 holds on to a container for as long as its runtime hangs.
                    if let Err(source) = removed.await {
                        return Err(LaunchError::Stuck { summary: finding.summary, source });
                    }
                    self.refused_hash = Some(spec.hash());
                    self.fall_back(finding)?;
                }
            }
        }
    }

    /// Makes what the container's mounts need. Looked after at every start: a folder may have gone in between.
    fn prepare_mounts(&self) -> Result<(), LaunchError> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| LaunchError::Mounts { path, source }
        };
        let data = &self.settings.container.data_dir;
        std::fs::create_dir_all(data).map_err(failed(data))?;
        if let Some(ca) = &self.superlink.ca {
            let file = self.settings.container.certs_dir.join(plan::CA_FILE);
            atomic::replace(&file, ca.pem().as_bytes()).map_err(failed(&file))?;
        }
        let state = &self.settings.state.dir;
        site::write(state).map_err(failed(state))
    }

    async fn launch(
        &self,
        engine: &Engine,
        spec: &ContainerSpec,
        found: Option<Container>,
    ) -> Result<Launched, LaunchError> {
        let on_gpu = matches!(self.verdict, Verdict::Gpu { .. });
        // One that has ended goes on, with its log, where it is what would be made now.
        let image = engine.find_image(&spec.image).await?;
        let same = found.as_ref().filter(|old| {
            !old.running && old.is_made_from(spec) && image.as_ref().is_some_and(|image| image.id == old.image_id)
        });
        let mut started = match same {
            Some(same) => engine.start(&same.id).await,
            None => self.make_and_start(engine, spec, found.as_ref()).await,
        };
        if same.is_some() && matches!(started, Err(EngineError::Refused { .. })) {
            // What it was made with may have gone since: only one that is made now is judged.
            started = self.make_and_start(engine, spec, found.as_ref()).await;
        }
        if let Err(error) = started {
            return match error.may_be_of_the_gpu().filter(|_| on_gpu) {
                Some(why) => Ok(Launched::NotOnGpu(Finding::new(
                    Reason::RuntimeStartFailed,
                    format!("Docker did not start the container with the GPU: {why}"),
                ))),
                None => Err(error.into()),
            };
        }
        let Some(container) = engine.find_container(&spec.name).await? else {
            let message = "it was removed right after its start".into();
            return Err(EngineError::Failed { doing: "start the container", message }.into());
        };
        if let Some(finding) = missing_in(&container, self.verdict.devices()) {
            return Ok(Launched::NotOnGpu(finding));
        }
        tracing::info!(
            "started the container {} ({}) from {} on {}",
            spec.name,
            short(&container.id),
            spec.image,
            match &self.verdict {
                Verdict::Gpu { devices, .. } => devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
                Verdict::Cpu { .. } => "the CPU".into(),
            }
        );
        Ok(Launched::Running(container))
    }

    async fn make_and_start(
        &self,
        engine: &Engine,
        spec: &ContainerSpec,
        old: Option<&Container>,
    ) -> Result<(), EngineError> {
        if let Some(old) = old {
            tracing::info!("replacing the container {} ({})", spec.name, short(&old.id));
            engine.stop(&old.id, self.settings.container.stop_timeout).await?;
            engine.remove(old).await?;
        }
        let id = engine.create(spec).await?;
        engine.start(&id).await
    }

    /// Watches the container and its GPU, and starts it again whenever it ends. Returns only where the story is to begin
    /// anew: a signal ends it from outside.
    ///
    /// # Errors
    /// When there must be a GPU, and it has failed or the container does not come up on it again.
    pub async fn supervise(&mut self, mut engine: Engine, mut container: Container) -> Result<Anew, LaunchError> {
        let mut life = Life::new(self, &engine, &container);
        loop {
            let change = self.next_change(&engine, &container, &mut life).await;
            life.was_healthy = life.run.since.elapsed() >= HEALTHY_AFTER;
            if life.was_healthy {
                life.gpu_pauses = GPU_PAUSES.iter();
            }
            match change {
                Change::Ended(end) => {
                    let engine_went = engine.facts().await.is_err();
                    if engine_went {
                        engine = self.engine_again().await;
                    }
                    // The connection may have gone and the container not.
                    if end.is_none()
                        && let Ok(Some(found)) = engine.find_container(&container.id).await
                        && found.running
                    {
                        tokio::time::sleep(FIRST_PAUSE).await;
                        life.run.listener = Listener::new(engine.log(&container));
                        continue;
                    }
                    // A container that went down with the engine is not to blame.
                    if engine_went || life.was_healthy {
                        life.pause = FIRST_PAUSE;
                    }
                    let what = match end {
                        Some(code) => format!("ended with exit code {code}"),
                        None => "is gone".into(),
                    };
                    let devices = self.verdict.devices();
                    // It may have ended of the very fault that the watcher is about to tell.
                    let failed = tokio::select! {
                        finding = life.watch.until_failed(&self.config, &self.settings, devices),
                            if !devices.is_empty() => Some(finding),
                        () = self.rest(&mut life.pause, &what) => None,
                    };
                    container = match failed {
                        Some(finding) => self.after_failure(finding, &mut engine, container, &mut life).await?,
                        None => self.up_again(&mut engine, &mut life.pause, &what).await?,
                    };
                }
                Change::Failed(finding) => {
                    container = self.after_failure(finding, &mut engine, container, &mut life).await?;
                }
                Change::Lost(finding) => {
                    container = self.after_loss(&finding, &mut engine, &container, &mut life).await?;
                }
                Change::Connection(connection) => {
                    let address = &self.superlink.address;
                    match connection {
                        Connection::Connected { node_id, .. } => {
                            tracing::info!("connected to the SuperLink {address} as SuperNode {node_id}");
                        }
                        Connection::Lost { .. } => tracing::info!("not connected to the SuperLink {address}"),
                        Connection::Unknown => {}
                    }
                    self.connection = connection;
                }
                Change::Reached(reached) => {
                    let no = if reached { "" } else { "no " };
                    tracing::info!("the container has {no}connection to the SuperLink {}", self.superlink.address);
                    self.reached = reached;
                }
                Change::Hangs(dead) => {
                    container = self.after_hang(&dead, &mut engine, &container, &mut life).await?;
                }
                Change::Moved(found) => {
                    for warning in &found.warnings {
                        tracing::warn!("{warning}");
                    }
                    let partition = self.superlink.partition;
                    self.superlink = SuperLink { partition, ..found.superlink };
                    tracing::info!("the service has its SuperLink at {} now", self.superlink.address);
                    container = self.up_again(&mut engine, &mut life.pause, "does not come up").await?;
                }
                Change::Usable => {
                    life.waits_for_gpu = false;
                    if self.settings.gpu.on_late == OnLate::Restart {
                        tracing::warn!("GPU is usable now, and gpu.on_late is restart: the container is replaced");
                        return Ok(Anew);
                    }
                    tracing::info!("GPU is usable now; restart flower-supernode to use it");
                    self.remark = Some("the GPU is usable now: systemctl restart flower-supernode to use it".into());
                }
            }
            if self.verdict.devices().is_empty() {
                life.watch.begin_anew();
            }
            if !life.run.is_of(&container) {
                life.run = Run::new(&engine, &container);
                (self.connection, self.reached) = (Connection::default(), false);
            }
            self.report_running(&container);
        }
    }

    /// What `gpu.on_failure` wants.
    async fn after_failure(
        &mut self,
        finding: Finding,
        engine: &mut Engine,
        container: Container,
        life: &mut Life,
    ) -> Result<Container, LaunchError> {
        self.remark = None;
        let on_failure = self.settings.gpu.on_failure;
        if on_failure == OnFailure::Ignore {
            journal::warn_ignored(&finding, self.distribution);
            self.remark = Some(format!("the GPU failed, which is ignored: {}", finding.summary));
            return Ok(container);
        }
        let tries_again = on_failure == OnFailure::Restart && life.gpu_pauses.len() > 0;
        if !(tries_again && self.gpu_is_back(engine, &container, &finding, life).await) {
            self.leave_gpu(finding)?;
            self.reporter.doing("The GPU failed, moving to the CPU");
        }
        life.watch.begin_anew();
        self.up_again(engine, &mut life.pause, "does not come up").await
    }

    /// The machine has the GPU: a container that is made anew may have it.
    async fn after_loss(
        &mut self,
        finding: &Finding,
        engine: &mut Engine,
        container: &Container,
        life: &mut Life,
    ) -> Result<Container, LaunchError> {
        self.remark = None;
        tracing::warn!(
            gpu_uuid = finding.gpu_uuid,
            pci_address = finding.pci_address,
            "the container {} has lost its GPU and is made anew: {}",
            self.settings.container.name,
            finding.summary
        );
        self.reporter.doing("The container has lost its GPU, making it anew");
        // One that is lost soon after another has to wait, lest a node does nothing but start.
        if life.was_healthy {
            life.pause = FIRST_PAUSE;
        } else if life.pause > FIRST_PAUSE {
            tokio::time::sleep(life.pause).await;
        }
        life.pause = (life.pause * 2).min(LONGEST_PAUSE);
        if let Err(error) = self.take_away(engine, container).await {
            tracing::error!("the container cannot be removed: {}", journal::error_chain(&error));
        }
        life.watch.begin_anew();
        self.up_again(engine, &mut life.pause, "does not come up").await
    }

    /// Flower hangs: it is ended, with a short grace, for it does nothing that could be finished, and started again.
    async fn after_hang(
        &mut self,
        dead: &Dead,
        engine: &mut Engine,
        container: &Container,
        life: &mut Life,
    ) -> Result<Container, LaunchError> {
        const GRACE: Duration = Duration::from_secs(5);
        if let Ok(Some(found)) = engine.find_container(&container.id).await
            && found.paused
        {
            tracing::debug!("the container is paused: it is not asked for its health");
            return Ok(container.clone());
        }
        let name = &self.settings.container.name;
        tracing::warn!("Flower in the container {name} hangs and is started again: {dead}");
        self.reporter.doing("Flower hangs, starting the container again");
        if let Err(error) = engine.stop(&container.id, GRACE.min(self.settings.container.stop_timeout)).await {
            tracing::warn!("the container does not stop: {}", journal::error_chain(&error));
        }
        life.watch.begin_anew();
        self.up_again(engine, &mut life.pause, "does not come up").await
    }

    /// Looks, while a discovered SuperLink is not reached, whether the service has it elsewhere by now, or trusts another CA.
    async fn until_moved(&self) -> Found {
        /// Flower itself tries again for that long first.
        const FIRST_LOOK: Duration = Duration::from_secs(60);
        let Some(cloud) = &self.cloud else {
            return std::future::pending().await;
        };
        let cap = Duration::from_secs(self.config.edge_max_backoff);
        let first = FIRST_LOOK.min(cap);
        let (mut backoff, mut pause) = (Backoff::exponential(cap), first);
        loop {
            tokio::time::sleep(with_jitter(pause, fastrand::f64())).await;
            match find_superlink(Ok(cloud.gate()), &self.config, SystemTime::now()).await {
                Ok(found)
                    if found.superlink.address != self.superlink.address || found.superlink.ca != self.superlink.ca =>
                {
                    return found;
                }
                Ok(_) => {}
                Err(error) => tracing::debug!("looking for the SuperLink again: {}", journal::error_chain(&error)),
            }
            pause = backoff.after_failure().unwrap_or(pause).max(first);
        }
    }

    async fn next_change(&self, engine: &Engine, container: &Container, life: &mut Life) -> Change {
        let devices = self.verdict.devices();
        let by_hook = self.access == GpuAccess::Runtime;
        let port = self.superlink.address.port();
        let searches = self.superlink.vm_id.is_some() && !self.is_connected();
        let asks = self.settings.container.health_check && self.release().serves_health();
        tokio::select! {
            connection = life.run.listener.next_change() => Change::Connection(connection),
            () = until_reached(container, port, !self.reached), if !self.log_tells() => Change::Reached(!self.reached),
            dead = life.liveness.until_dead(container), if asks => Change::Hangs(dead),
            found = self.until_moved(), if searches => Change::Moved(Box::new(found)),
            end = engine.wait(&container.id) => Change::Ended(end),
            finding = life.watch.until_failed(&self.config, &self.settings, devices), if !devices.is_empty() => {
                Change::Failed(finding)
            }
            finding = presence::until_lost(container, devices, by_hook), if !devices.is_empty() => Change::Lost(finding),
            () = gpu::until_usable(&self.config, &self.settings), if life.waits_for_gpu => Change::Usable,
        }
    }

    /// Says that the container is started again, and waits with it, longer each time.
    async fn rest(&self, pause: &mut Duration, what: &str) {
        let seconds = pause.as_secs();
        self.reporter.down();
        tracing::warn!("the container {} {what}; starting it again in {seconds} s", self.settings.container.name);
        self.reporter.doing(&format!("The container {what}, starting it again in {seconds} s"));
        tokio::time::sleep(*pause).await;
        *pause = (*pause * 2).min(LONGEST_PAUSE);
    }

    /// Brings the container up, however often that is to be tried.
    async fn up_again(
        &mut self,
        engine: &mut Engine,
        pause: &mut Duration,
        what: &str,
    ) -> Result<Container, LaunchError> {
        self.reporter.down();
        loop {
            match self.bring_up(engine).await {
                Ok(container) => return Ok(container),
                Err(LaunchError::GpuRequired) => return Err(LaunchError::GpuRequired),
                Err(error) => tracing::error!("the container does not come up: {}", journal::error_chain(&error)),
            }
            if engine.facts().await.is_err() {
                *engine = self.engine_again().await;
            }
            self.rest(pause, what).await;
        }
    }

    /// Gives the GPU that failed the tries that are left: with container and watcher stopped, for a GPU that is in use cannot
    /// be reset. Whether a probe finds it well again.
    async fn gpu_is_back(&self, engine: &Engine, container: &Container, finding: &Finding, life: &mut Life) -> bool {
        journal::warn_tried_again(finding, self.distribution);
        self.reporter.down();
        self.reporter.doing(&format!("The GPU failed, trying it again: {}", finding.summary));
        self.reporter.uses(&[]);
        life.watch.begin_anew();
        if let Err(error) = engine.stop(&container.id, self.settings.container.stop_timeout).await {
            tracing::warn!("the container does not stop: {}", journal::error_chain(&error));
        }
        for pause in life.gpu_pauses.by_ref() {
            tracing::info!("looking at the GPU again in {} s", pause.as_secs());
            tokio::time::sleep(*pause).await;
            let verdict = detect_gpus(&self.config, &self.settings, Duration::ZERO).await.verdict;
            let is_well = |device: &GpuDevice| verdict.devices().iter().any(|found| found.uuid == device.uuid);
            if self.verdict.devices().iter().all(is_well) {
                tracing::info!("a probe finds the GPU well: the container is started on it again");
                return true;
            }
            let why = verdict.finding().map_or_else(String::new, |finding| finding.summary.clone());
            tracing::info!("the GPU is not well: {why}");
        }
        false
    }

    async fn take_away(&self, engine: &Engine, container: &Container) -> Result<(), EngineError> {
        engine.stop(&container.id, self.settings.container.stop_timeout).await?;
        engine.remove(container).await
    }

    /// The engine, once it answers again.
    async fn engine_again(&self) -> Engine {
        let socket = &self.settings.docker.socket;
        tracing::warn!("the Docker engine at {} does not answer; waiting for it", socket.display());
        self.reporter.doing("Waiting for the Docker engine");
        loop {
            tokio::time::sleep(ENGINE_PAUSE).await;
            if let Ok(engine) = Engine::connect(socket).await {
                tracing::info!("the Docker engine answers again");
                return engine;
            }
        }
    }
}

/// Says why there is no GPU, and what helps on this distribution: the WARNING of the fallback, or the error where a GPU is
/// required.
///
/// # Errors
/// When there must be a GPU.
pub fn announce(config: &Config, finding: &Finding, distribution: Distribution) -> Result<(), LaunchError> {
    if config.gpu_required {
        journal::error_required(finding, distribution);
        return Err(LaunchError::GpuRequired);
    }
    journal::warn_fallback(finding, distribution);
    if let Some(fraction) = &config.memory_fraction {
        tracing::info!("FL_GPU_MEMORY_FRACTION={fraction} is idle: this node runs on the CPU");
    }
    Ok(())
}

enum Launched {
    Running(Container),
    NotOnGpu(Finding),
}

/// Whether `container` runs on the CPU because `wanted`, on the GPU, did not come up: why, as its labels tell.
fn stands_in_for(container: &Container, wanted: &ContainerSpec) -> Option<Finding> {
    let label = |name: &str| container.labels.get(name).map(String::as_str);
    if label(plan::REFUSED_HASH_LABEL) != Some(wanted.hash().as_str()) {
        return None;
    }
    let reason = Reason::from_code(label(plan::REASON_LABEL)?)?;
    Some(Finding::new(reason, label(plan::SUMMARY_LABEL)?))
}

/// The devices that are not in the container. Where it cannot be told, none.
fn missing_in(container: &Container, devices: &[GpuDevice]) -> Option<Finding> {
    devices_missing_in(container, devices).unwrap_or_else(|error| {
        tracing::info!("cannot see whether the GPU is in the container: {error}");
        None
    })
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}
