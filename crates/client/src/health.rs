//! The daemon itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::fork::ForkState;

/// Version, process and counts of the daemon: `GET /v1/health`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Health {
    /// Always `ok`: an unhealthy daemon does not answer.
    pub status: String,
    /// Version of pagecast.
    pub version: String,
    /// Process ID of the daemon.
    pub pid: u32,
    /// Time since the start, in seconds.
    pub uptime_s: u64,
    /// Number of templates.
    pub templates: u64,
    /// Number of forks in each state that has any.
    pub forks: BTreeMap<ForkState, u64>,
    /// Resident memory of the daemon in bytes, locked templates included; `null` if the platform does not show it.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub rss_bytes: Option<u64>,
}
