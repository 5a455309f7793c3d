//! A page server in this process, so that its CPU time can be measured to the microsecond.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use pagecast::Template;
use pagecast::server::{Builder, Fork, ForkEvent, ForkOptions, ForkState, Prefault, Server};
use pagecast::template::{Lease, Locked, MemFile, Recording, Wanted, WorkingSet};
use pagecast_testkit::sim_vmm::{Connect, Memory, Resume, SimVmm, Visit};
use pagecast_testkit::template_file::TemplateModel;
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

use super::{PATIENCE, folder};

/// A server for forks of one template, with a lease on it as in a daemon.
pub(super) struct InProcess {
    server: Server,
    template: Template,
    mem_file: Arc<MemFile>,
    /// The locked template; dropped before the lease.
    locked: Vec<Locked>,
    /// `None` if the file system has no leases: then the template is checked for each fault.
    _lease: Option<Lease>,
    folder: TempDir,
    recordings: Receiver<Arc<Recording>>,
}

impl InProcess {
    pub(super) fn start(mem_file: &Path) -> Result<Self> {
        Self::start_with(mem_file, |builder| builder)
    }

    /// Starts it with other settings than the default ones.
    pub(super) fn start_with(mem_file: &Path, set_up: impl FnOnce(Builder) -> Builder) -> Result<Self> {
        let (tell, recordings) = channel();
        let server = set_up(Server::builder()).observer(move |event| {
            if let ForkEvent::Recorded { recording, .. } = event {
                // The receiver exists only if recordings were requested.
                let _ = tell.send(recording);
            }
        });
        let mem_file = Arc::new(MemFile::open(mem_file)?);
        Ok(Self {
            server: server.start()?,
            template: Template::from_source(Arc::clone(&mem_file)),
            _lease: mem_file.lease(|| {}).ok(),
            mem_file,
            locked: Vec::new(),
            folder: folder()?,
            recordings,
        })
    }

    /// Locks the template in memory, as `pagecast template warm --resident` does.
    pub(super) fn lock_template(&mut self) -> Result<()> {
        let wanted = Wanted::data(&self.mem_file);
        let locked = wanted.runs().iter().map(|run| Locked::new(&self.mem_file, *run));
        self.locked = locked.collect::<Result<_, _>>()?;
        self.mem_file.set_pinned(true);
        Ok(())
    }

    /// A fork that waits for its VMM.
    pub(super) fn register(&self, number: usize, wanted: impl FnOnce(ForkOptions) -> ForkOptions) -> Result<Fork> {
        let id = format!("fork-{number}").parse()?;
        let options = ForkOptions::new(self.folder.path().join(number.to_string()));
        Ok(self.server.register(id, &self.template, &wanted(options))?)
    }

    /// Connects a VMM to a new fork without prefault, and waits until it is served.
    pub(super) fn connect(&self, number: usize, vmm: &SimVmm, model: &TemplateModel) -> Result<Fork> {
        let fork = self.register(number, |options| options.prefault(Prefault::None))?;
        vmm.run(Connect::new(fork.socket_path(), model))?;
        let status = fork.wait(PATIENCE, |state| state != ForkState::Waiting);
        ensure!(status.state == ForkState::Serving, "not served: {status:?}");
        Ok(fork)
    }

    /// Searches the template for zeros, as a daemon does in the background.
    pub(super) fn find_zeros(&self) {
        self.template.find_zeros(Instant::now() + PATIENCE);
    }

    /// Has one fork visit these pages, and makes its recording the template's working set. Returns its size in bytes.
    pub(super) fn learn(&self, vmm: &SimVmm, model: &TemplateModel, runs: &[Range<u64>]) -> Result<u64> {
        let fork = self.register(usize::MAX, ForkOptions::record)?;
        vmm.run(Resume {
            memory: Memory::Uffd(Connect::new(fork.socket_path(), model)),
            visit: Visit {
                runs: runs.to_vec(),
                write: false,
            },
        })?;
        vmm.kill()?;
        let recording = self.recordings.recv_timeout(PATIENCE).context("nothing was recorded")?;
        let set = WorkingSet::of(&recording);
        let size = set.size().get();
        self.template.set_working_set(Some(Arc::new(set)));
        Ok(size)
    }

    /// Ends the server, and kills all VMMs.
    pub(super) fn end(self) -> Result<()> {
        self.server.kill(PATIENCE).context("the server does not end")
    }
}

/// CPU time that this process has used.
pub(super) fn own_cpu() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}
