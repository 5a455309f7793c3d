//! Forks: requests and answers.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A fork to create: the body of `POST /v1/forks`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateFork {
    /// Name of the template.
    pub template: String,
    /// ID of the fork, `[a-z0-9][a-z0-9._-]{0,63}`; by default chosen by the daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The backend; by default the one in the daemon's configuration, which is `auto` unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<Backend>,
    /// Path of the socket, absolute, at most 107 bytes; by default in the run dir. `uffd` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub socket_path: Option<PathBuf>,
    /// Path at which to place the memory file, absolute, for a VMM that sees a part of the file system only. By default
    /// in the run dir. The file is placed as a bind mount or hard link, never as a copy. `file` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub path: Option<PathBuf>,
    /// User ID of the VMM, which owns the socket; by default the daemon's. `uffd` only: with `file`, the memory file
    /// keeps the template's owner and mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(format = Int64))]
    pub uid: Option<u32>,
    /// Group ID of the socket. `uffd` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(format = Int64))]
    pub gid: Option<u32>,
    /// Pages to install before the fork asks for them; by default the template's working set, unless there is none or
    /// too little of it is used. `all` is for `uffd` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefault: Option<Prefault>,
    /// Whether to record the first faults of the fork for the template's working set. `uffd` only, and without
    /// prefault: installed pages cause no faults.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub record: bool,
    /// Page size of the guest in bytes, 4096 or 2097152; by default the template's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u64>,
    /// Process ID of the VMM. `file` only, as that VMM does not connect. Without it, only a VMM that maps the fork's
    /// own `path` is found. Memory and end of any other VMM stay unknown. The fork ends if, after `connect_deadline`,
    /// no process that may be its VMM maps the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
}

impl CreateFork {
    /// Creates a request for a fork of `template`, with defaults for all else.
    pub fn of(template: impl Into<String>) -> Self {
        Self {
            template: template.into(),
            ..Self::default()
        }
    }
}

/// Where the memory of a fork comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The better of the two for the template, the guest and the other settings.
    #[default]
    Auto,
    /// pagecast answers the page faults: lazy, for pages of 4 KiB and 2 MiB; shares zero pages only.
    Uffd,
    /// Firecracker maps the memory file: shares every page that is not written; for pages of 4 KiB.
    File,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Pages to install before the fork asks for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Prefault {
    /// No pages.
    None,
    /// The template's working set, unless there is none or too little of it is used.
    WorkingSet,
    /// The working set, then all other pages. Unlike a complete fork, this one still needs the daemon.
    All,
}

impl fmt::Display for Prefault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Firecracker's `mem_backend`, to paste into `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MemBackend {
    /// `Uffd` or `File`.
    pub backend_type: BackendType,
    /// Path of the socket or of the memory file.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub backend_path: PathBuf,
}

/// Firecracker's name of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum BackendType {
    /// A socket.
    Uffd,
    /// A memory file.
    File,
}

/// A created fork: the answer of `POST /v1/forks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CreatedFork {
    /// ID of the fork.
    pub id: String,
    /// Name of its template.
    pub template: String,
    /// `uffd` or `file`, never `auto`.
    pub backend: Backend,
    /// Reason for this backend.
    pub reason: String,
    /// The `mem_backend` for Firecracker.
    pub mem_backend: MemBackend,
}

/// The state of a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum ForkState {
    /// `uffd`: no VMM has connected. `file`: no VMM is known.
    Waiting,
    /// The VMM is alive and needs the template.
    Serving,
    /// The fork no longer needs the daemon.
    Complete,
    /// The VMM has exited.
    Exited,
    /// The fork could not be served; `error` has the reason.
    Failed,
}

impl ForkState {
    /// All states.
    pub const ALL: [Self; 5] = [Self::Waiting, Self::Serving, Self::Complete, Self::Exited, Self::Failed];

    /// Returns `true` if the state is final.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Complete | Self::Exited | Self::Failed)
    }
}

impl fmt::Display for ForkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A fork: `GET /v1/forks/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Fork {
    /// ID of the fork.
    pub id: String,
    /// Name of its template.
    pub template: String,
    /// `uffd` or `file`.
    pub backend: Backend,
    /// Reason for this backend.
    pub reason: String,
    /// The `mem_backend` for Firecracker.
    pub mem_backend: MemBackend,
    /// State of the fork.
    pub state: ForkState,
    /// Process ID of the VMM, once known.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub pid: Option<i32>,
    /// Why the fork failed, or could not be completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ForkError>,
    /// Size of the guest's memory in bytes; `null` until the VMM has connected, and always with `file`.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub memory_bytes: Option<u64>,
    /// Counts of faults and pages; `null` with `file`, whose faults the kernel answers.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub faults: Option<Faults>,
    /// Latency of the faults; `null` with `file`.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub fault_latency_us: Option<Latency>,
    /// Bytes of the template that were copied into the fork.
    pub installed_bytes: u64,
    /// Bytes of zeros that were left to the kernel to fill in.
    pub given_back_bytes: u64,
    /// What is prefaulted, and how well it foresees the first faults; `null` with `file`.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub prefault: Option<ForkPrefault>,
    /// The recording of the first faults; `null` if the fork is not recorded.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub recording: Option<ForkRecording>,
    /// Memory of the VMM; `null` if it was not asked for, or if the VMM is not known or has exited.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub memory: Option<ForkMemory>,
}

/// An error of a fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ForkError {
    /// The kind of error, for programs; docs/metrics.md lists them.
    pub code: String,
    /// The error, for people.
    pub message: String,
}

/// Counts of faults and pages of a fork.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Faults {
    /// Page faults that were answered.
    pub demand: u64,
    /// Page faults that were answered with zeros.
    pub zero: u64,
    /// Pages that the guest gave back.
    pub removed: u64,
    /// Pages that were installed before a fault asked for them.
    pub prefaulted: u64,
    /// Installs that the kernel asked to retry.
    pub retried: u64,
    /// Faults that waited for a read of the template from disk.
    pub slow: u64,
    /// Pages that were installed together with one that faulted.
    pub around: u64,
}

/// What is prefaulted into a fork, and counts of its first faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ForkPrefault {
    /// The setting.
    pub what: Prefault,
    /// Faults on pages that were still to be prefaulted.
    pub late: u64,
    /// Faults on pages that are not in the working set.
    pub missed: u64,
    /// Faults on pages of the working set that were held out, to measure how much of it is used.
    pub held_out_used: u64,
}

/// The recording of a fork's first faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ForkRecording {
    /// Whether the recording has ended and is part of the template's working set.
    pub learned: bool,
    /// Size of the recorded pages in bytes; 0 until the end of the recording.
    pub size_bytes: u64,
}

/// Latency in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Latency {
    /// The median.
    pub p50: u64,
    /// The 99th percentile.
    pub p99: u64,
    /// The maximum.
    pub max: u64,
}

/// Memory of a fork's VMM in bytes, from `/proc/PID/smaps_rollup`, hugepages included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ForkMemory {
    /// Resident memory (RSS).
    pub rss: u64,
    /// Resident memory, each shared page divided by the number of processes that map it (PSS).
    pub pss: u64,
    /// Memory that no other process maps.
    pub private: u64,
    /// Memory that other processes map, too.
    pub shared: u64,
    /// Memory that was swapped out.
    pub swap: u64,
}
