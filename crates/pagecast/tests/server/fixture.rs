//! What every test of the server needs: a template, a server, forks of it.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use pagecast::Template;
use pagecast::server::{Builder, Deadlines, Fork, ForkOptions, ForkState, Server};
use pagecast_testkit::sim_vmm::{Connect, SimVmm};
use pagecast_testkit::template_file::{Layout, TemplateFile, TemplateModel};

use crate::scripted_source::{Script, ScriptedSource};

/// Long enough for anything that works, on a busy machine; reached only where something hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A server, one template, and a folder for sockets.
pub(crate) struct Fixture {
    // Before the folder that its sockets are in, and before the template.
    pub(crate) server: Server,
    pub(crate) template: Template,
    pub(crate) file: TemplateFile,
    pub(crate) folder: tempfile::TempDir,
}

impl Fixture {
    /// A template of 8 MiB with zero pages and a hole, and a server with two workers.
    pub(crate) fn new() -> Self {
        Self::with(8 << 20, |builder| builder)
    }

    pub(crate) fn with(size: u64, set_up: impl FnOnce(Builder) -> Builder) -> Self {
        let file = TemplateFile::create(model(size)).unwrap();
        let template = Template::open(file.path()).unwrap();
        let server = set_up(Server::builder().workers(2)).start().unwrap();
        Self {
            server,
            template,
            file,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// The same file and server, but the template's bytes come as `script` says.
    pub(crate) fn scripted(script: Script, set_up: impl FnOnce(Builder) -> Builder) -> (Self, Arc<Script>) {
        let script = Arc::new(script);
        let fixture = Self {
            template: Template::from_source(ScriptedSource(Arc::clone(&script))),
            ..Self::with(8 << 20, set_up)
        };
        (fixture, script)
    }

    /// Registers a fork.
    pub(crate) fn register(&self, id: &str) -> Fork {
        let options = ForkOptions::new(self.folder.path().join(id));
        self.server
            .register(id.parse().unwrap(), &self.template, &options)
            .unwrap()
    }

    /// Registers a fork and connects a simulated VMM to it, as Firecracker does.
    pub(crate) fn fork(&self, id: &str) -> (Fork, SimVmm) {
        self.fork_with(id, |connect| connect)
    }

    /// The same, with a VMM that does something other than usual.
    pub(crate) fn fork_with(&self, id: &str, change: impl FnOnce(Connect) -> Connect) -> (Fork, SimVmm) {
        let fork = self.register(id);
        let vmm = SimVmm::spawn().unwrap();
        vmm.run(change(Connect::new(fork.socket_path(), self.file.model())))
            .unwrap();
        let status = fork.wait(PATIENCE, |state| state != ForkState::Waiting);
        assert_eq!(status.state, ForkState::Serving, "{status:?}");
        (fork, vmm)
    }
}

/// What the fixture's template holds, where it has so many bytes.
pub(crate) fn model(size: u64) -> TemplateModel {
    TemplateModel {
        size,
        seed: 1,
        layout: Layout {
            zero_every: NonZeroU64::new(7),
            holes: vec![100..200, 1000..1024],
        },
    }
}

/// Deadlines for tests that wait for them.
pub(crate) fn short_deadlines() -> Deadlines {
    Deadlines {
        connect: Duration::from_millis(300),
        handshake: Duration::from_millis(300),
        ..Deadlines::default()
    }
}
