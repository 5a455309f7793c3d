//! What each backend says of a fork.

use std::collections::BTreeMap;
use std::sync::Arc;

use pagecast::server::{ForkStats, LatencyHistogram};
use pagecast_client::fork::ForkError;
use pagecast_client::{Backend, ForkState};

use crate::placement::Placement;
use crate::vmm_process::VmmProcess;

/// How the memory of one fork is backed.
pub(crate) trait Backing {
    /// `uffd` or `file`.
    fn backend(&self) -> Backend;

    /// Where the fork is in its life.
    fn state(&self) -> ForkState;

    /// The VMM, if it is known.
    fn vmm(&self) -> Option<Arc<VmmProcess>>;

    /// Why the fork failed, or could not be completed.
    fn error(&self) -> Option<ForkError>;

    /// A path of the memory file that was made for this fork alone.
    fn placement(&self) -> Option<&Placement>;

    /// Whether the VMM would wait for ever without this daemon.
    fn needs_daemon(&self) -> bool;

    /// What tells whether the fork is idle. `None` while the page server does not serve it.
    fn activity(&self) -> Option<Activity>;

    /// What has happened to the fork so far.
    fn numbers(&self) -> Numbers;

    /// Adds what the backend knows to the answer of the API.
    fn describe(&self, shown: &mut pagecast_client::Fork);
}

/// What a fork has done that the page server serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Activity {
    /// Page faults so far.
    pub(crate) faults: u64,
    /// Its recording is not over, and would be cut short by completing it. The recording begins with the first fault, and
    /// ends by itself soon after faults have become rare.
    pub(crate) is_recorded: bool,
}

/// What has happened to a fork.
pub(crate) struct Numbers {
    pub(crate) state: ForkState,
    /// Set if the fork has failed.
    pub(crate) failure: Option<Failure>,
    /// Set if the page server answers its faults.
    pub(crate) served: Option<Served>,
}

/// How a fork has failed.
pub(crate) struct Failure {
    /// The code of the reason.
    pub(crate) code: String,
    /// The connection of its VMM was refused.
    pub(crate) is_refusal: bool,
    /// Its VMM was killed.
    pub(crate) is_kill: bool,
}

/// What the page server counts of a fork.
pub(crate) struct Served {
    pub(crate) stats: ForkStats,
    /// From reading a fault to its page being in place.
    pub(crate) fault_latency: LatencyHistogram,
    /// What the kernel took for the installs of demand faults.
    pub(crate) install_latency: LatencyHistogram,
    /// Connections that were refused without ending the fork, by code.
    pub(crate) refusals: BTreeMap<&'static str, u64>,
}
