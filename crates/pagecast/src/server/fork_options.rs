//! How a fork is to be registered.

use std::path::PathBuf;

/// How a fork is to be registered.
#[derive(Clone, Debug)]
pub struct ForkOptions {
    pub(super) socket_path: PathBuf,
    pub(super) user: Option<u32>,
    pub(super) group: Option<u32>,
    pub(super) plan: Plan,
}

/// What a fork is given ahead of its faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Prefault {
    /// Nothing: each page is installed when it is asked for.
    None,
    /// The [working set](crate::template::Template::set_working_set) of its template, where there is one and it does well.
    #[default]
    WorkingSet,
    /// The same, then all the rest. Unlike a completion, this keeps serving: what is given back is still noticed.
    All,
}

/// What is planned for a fork.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Plan {
    pub(super) prefault: Prefault,
    pub(super) record: bool,
}

impl ForkOptions {
    /// A fork whose VMM connects to `socket_path`, run by the user who runs the server.
    ///
    /// A unix socket's path is at most 107 bytes long.
    pub fn new(socket_path: impl Into<PathBuf>) -> Self {
        Self {
            socket_path: socket_path.into(),
            user: None,
            group: None,
            plan: Plan::default(),
        }
    }

    /// The VMM runs as this user: it will own the socket, and nobody else is let in.
    #[must_use]
    pub fn user(mut self, uid: u32) -> Self {
        self.user = Some(uid);
        self
    }

    /// What it is given ahead of its faults; by default its working set.
    #[must_use]
    pub fn prefault(mut self, prefault: Prefault) -> Self {
        self.plan.prefault = prefault;
        self
    }

    /// Its first faults are recorded, in a window that ends by itself ([`ForkEvent::Recorded`](super::ForkEvent::Recorded)). It is given nothing ahead
    /// then, whatever [`prefault`](Self::prefault) says: what is there does not fault.
    #[must_use]
    pub fn record(mut self) -> Self {
        self.plan.record = true;
        self
    }

    /// The socket will belong to this group.
    #[must_use]
    pub fn group(mut self, gid: u32) -> Self {
        self.group = Some(gid);
        self
    }
}
