//! A page server in this very process, so that its CPU time can be told to the microsecond.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pagecast::Template;
use pagecast::server::{Fork, ForkOptions, ForkState, Server};
use pagecast_testkit::sim_vmm::{Connect, SimVmm};
use pagecast_testkit::template_file::TemplateModel;
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

use super::{PATIENCE, folder};

/// A server for forks of one template.
pub(super) struct InProcess {
    server: Server,
    template: Template,
    folder: TempDir,
}

impl InProcess {
    pub(super) fn start(mem_file: &Path) -> Result<Self> {
        Ok(Self {
            server: Server::builder().start()?,
            template: Template::open(mem_file)?,
            folder: folder()?,
        })
    }

    /// A fork that waits for its VMM.
    pub(super) fn register(&self, number: usize) -> Result<Fork> {
        let id = format!("fork-{number}").parse()?;
        let options = ForkOptions::new(self.folder.path().join(number.to_string()));
        Ok(self.server.register(id, &self.template, &options)?)
    }

    /// Connects a VMM to a new fork, and waits until it is served.
    pub(super) fn connect(&self, number: usize, vmm: &SimVmm, model: &TemplateModel) -> Result<Fork> {
        let fork = self.register(number)?;
        vmm.run(Connect::new(fork.socket_path(), model))?;
        let status = fork.wait(PATIENCE, |state| state != ForkState::Waiting);
        ensure!(status.state == ForkState::Serving, "not served: {status:?}");
        Ok(fork)
    }

    /// Ends, and kills all VMMs.
    pub(super) fn end(self) -> Result<()> {
        self.server.kill(PATIENCE).context("the server does not end")
    }
}

/// CPU time that this process has used so far.
pub(super) fn own_cpu() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}
