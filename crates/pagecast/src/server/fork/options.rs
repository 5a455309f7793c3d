//! The options of a new fork.

use std::path::PathBuf;

/// The options of a new fork.
#[derive(Clone, Debug)]
pub struct ForkOptions {
    pub(in crate::server) socket_path: PathBuf,
    pub(in crate::server) user: Option<u32>,
    pub(in crate::server) group: Option<u32>,
    pub(in crate::server) plan: Plan,
}

/// The pages that a fork gets ahead of its faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Prefault {
    /// None: each page is installed by its fault.
    None,
    /// The [working set](crate::template::Template::set_working_set) of the template, if it has one with a good score.
    #[default]
    WorkingSet,
    /// The working set, then all the rest. Unlike a completed fork, the fork stays served: pages that it gives back are
    /// still noticed.
    All,
}

/// The prefault and the recording of a fork.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::server) struct Plan {
    pub(in crate::server) prefault: Prefault,
    pub(in crate::server) record: bool,
}

impl ForkOptions {
    /// Creates the options of a fork whose VMM connects to `socket_path`, run by the user who runs the server.
    ///
    /// The path of a unix socket has at most 107 bytes.
    pub fn new(socket_path: impl Into<PathBuf>) -> Self {
        Self {
            socket_path: socket_path.into(),
            user: None,
            group: None,
            plan: Plan::default(),
        }
    }

    /// The VMM runs as this user, who will own the socket. Connections of other users are refused.
    #[must_use]
    pub fn user(mut self, uid: u32) -> Self {
        self.user = Some(uid);
        self
    }

    /// The pages that the fork gets ahead of its faults. Default: its working set.
    #[must_use]
    pub fn prefault(mut self, prefault: Prefault) -> Self {
        self.plan.prefault = prefault;
        self
    }

    /// Records the first faults, in a window that ends by itself ([`ForkEvent::Recorded`](super::ForkEvent::Recorded)).
    /// The fork then gets no pages ahead, whatever [`prefault`](Self::prefault) says: installed pages do not fault.
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
