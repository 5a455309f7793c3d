//! The facts that each backend knows about a fork.

use std::collections::BTreeMap;
use std::sync::Arc;

use pagecast::server::{ForkStats, LatencyHistogram};
use pagecast_client::fork::ForkError;
use pagecast_client::{Backend, ForkState};

use crate::placement::Placement;
use crate::vmm_process::VmmProcess;

/// The memory backend of one fork.
pub(crate) trait Backing {
    /// `uffd` or `file`.
    fn backend(&self) -> Backend;

    /// The state of the fork.
    fn state(&self) -> ForkState;

    /// The VMM, if it is known.
    fn vmm(&self) -> Option<Arc<VmmProcess>>;

    /// Why the fork failed, or could not be completed.
    fn error(&self) -> Option<ForkError>;

    /// The path of the memory file that was created for this fork alone.
    fn placement(&self) -> Option<&Placement>;

    /// Returns `true` if the VMM would hang forever without this daemon.
    fn needs_daemon(&self) -> bool;

    /// The fork's recent activity, for the idle check. `None` while the page server does not serve it.
    fn activity(&self) -> Option<Activity>;

    /// The fork's counters and outcome so far.
    fn numbers(&self) -> Numbers;

    /// Adds the backend's fields to the API's answer.
    fn describe(&self, shown: &mut pagecast_client::Fork);
}

/// The activity of a fork that the page server serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Activity {
    /// Page faults so far.
    pub(crate) faults: u64,
    /// The fork is being recorded, and completing it would cut the recording short. A recording begins with the first
    /// fault, and ends by itself soon after faults have become rare.
    pub(crate) is_recorded: bool,
}

/// The counters and outcome of a fork.
pub(crate) struct Numbers {
    pub(crate) state: ForkState,
    /// Set if the fork has failed.
    pub(crate) failure: Option<Failure>,
    /// Set if the page server answers its faults.
    pub(crate) served: Option<Served>,
}

/// The failure of a fork.
pub(crate) struct Failure {
    /// The code of the reason.
    pub(crate) code: String,
    /// The connection of its VMM was refused.
    pub(crate) is_refusal: bool,
    /// Its VMM was killed.
    pub(crate) is_kill: bool,
}

/// The page server's counters of a fork.
pub(crate) struct Served {
    pub(crate) stats: ForkStats,
    /// Time from reading a fault to installing its page.
    pub(crate) fault_latency: LatencyHistogram,
    /// Time that the kernel took to install pages for demand faults.
    pub(crate) install_latency: LatencyHistogram,
    /// Connections that were refused without ending the fork, by code.
    pub(crate) refusals: BTreeMap<&'static str, u64>,
}
