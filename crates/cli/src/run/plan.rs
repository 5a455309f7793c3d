//! What a run is to do.

use std::path::PathBuf;
use std::time::Duration;

use pagecast_client::{Backend, Client, Prefault};
use pagecast_firecracker::Jailer;

use super::firecracker::Firecracker;

/// Settings that all forks of a run share.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) client: Client,
    pub(crate) firecracker: Firecracker,
    /// The program of the jailer that starts it, and its settings, if there is one.
    pub(crate) jailer: Option<(PathBuf, Jailer)>,
    pub(crate) wanted: Wanted,
    pub(crate) vmstate: PathBuf,
    /// Time that each step of each fork may take.
    pub(crate) patience: Duration,
}

/// Which forks.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) template: String,
    /// None: as the daemon does by default.
    pub(crate) backend: Option<Backend>,
    /// None: as the daemon does by default.
    pub(crate) prefault: Option<Prefault>,
    pub(crate) record: bool,
}
