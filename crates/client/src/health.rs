//! The daemon itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::fork::ForkState;

/// How the daemon does: `GET /v1/health`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Health {
    /// Always `ok`: a daemon that does not do well does not answer.
    pub status: String,
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// How long it has run, in seconds.
    pub uptime_s: u64,
    /// How many templates there are.
    pub templates: u64,
    /// How many forks there are in each state that any is in.
    pub forks: BTreeMap<ForkState, u64>,
    /// Its own resident memory in bytes, that of templates it keeps in memory included; `null` where the platform does not
    /// tell.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub rss_bytes: Option<u64>,
}
