//! Forks, as they are asked for and as they are described.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A fork to make: the body of `POST /v1/forks`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateFork {
    /// The name of the template.
    pub template: String,
    /// The id of the fork, `[a-z0-9][a-z0-9._-]{0,63}`; by default the daemon makes one up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Which backend; by default what the daemon's configuration says, which by default is `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<Backend>,
    /// Where the socket is to be, absolute, at most 107 bytes; by default in the run dir. Takes `uffd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub socket_path: Option<PathBuf>,
    /// Where the memory file is to be put, absolute, for a VMM that sees only a part of the file system: a hard link or
    /// else a bind mount, never a copy. By default a place in the run dir. Takes `file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub path: Option<PathBuf>,
    /// The user that the VMM runs as, who gets the socket; by default the daemon's. Takes `uffd`: the memory file of one
    /// with `file` keeps the owner and mode of the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(format = Int64))]
    pub uid: Option<u32>,
    /// The group of the socket. Takes `uffd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(format = Int64))]
    pub gid: Option<u32>,
    /// What is installed before it is asked for; by default the working set of the template, where there is one and it does
    /// well. `all` takes `uffd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefault: Option<Prefault>,
    /// Whether its first faults are recorded for the working set of the template. Takes `uffd`, and no prefault: what is there
    /// before it is touched does not fault.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub record: bool,
    /// The page size of the guest in bytes, 4096 or 2097152; by default the template's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u64>,
    /// `file`: the VMM, which never shakes hands with pagecast. Without it, one that maps the fork's own `path` is found by
    /// that, while any other stays unknown with its memory and its end. Where no process that may be the VMM maps the
    /// template within `connect_deadline`, or any more after that, the fork ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
}

impl CreateFork {
    /// A fork of `template`, all else by default.
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
    /// The best of the others for the template, the guest and what else is asked for.
    #[default]
    Auto,
    /// pagecast answers page faults: lazy, for 4 KiB and 2 MiB pages; shares zero pages only.
    Uffd,
    /// Firecracker maps the memory file: shares every page not written; for 4 KiB pages.
    File,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// What is installed before it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Prefault {
    /// Nothing.
    None,
    /// The working set of the template, where there is one and it does well.
    WorkingSet,
    /// The same, then everything else. Unlike a fork that is complete, this one still needs the daemon.
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
    /// The socket, or the memory file.
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

/// A fork that was made: the answer of `POST /v1/forks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CreatedFork {
    /// Its id.
    pub id: String,
    /// The name of its template.
    pub template: String,
    /// `uffd` or `file`, never `auto`.
    pub backend: Backend,
    /// Why this backend.
    pub reason: String,
    /// What to tell Firecracker.
    pub mem_backend: MemBackend,
}

/// Where a fork is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum ForkState {
    /// `uffd`: no VMM has connected. `file`: no VMM is known.
    Waiting,
    /// Its VMM lives and needs the template.
    Serving,
    /// It no longer needs the server.
    Complete,
    /// Its VMM has exited.
    Exited,
    /// It could not be served; `error` says why.
    Failed,
}

impl ForkState {
    /// Every state.
    pub const ALL: [Self; 5] = [Self::Waiting, Self::Serving, Self::Complete, Self::Exited, Self::Failed];

    /// Whether nothing will change any more.
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
    /// Its id.
    pub id: String,
    /// The name of its template.
    pub template: String,
    /// `uffd` or `file`.
    pub backend: Backend,
    /// Why this backend.
    pub reason: String,
    /// What to tell Firecracker.
    pub mem_backend: MemBackend,
    /// Where it is in its life.
    pub state: ForkState,
    /// Its VMM, once known.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub pid: Option<i32>,
    /// Why it failed, or could not be completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ForkError>,
    /// The size of its guest's memory in bytes; `null` until its VMM has said it, which one with `file` never does.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub memory_bytes: Option<u64>,
    /// Its faults; `null` with `file`, whose faults the kernel answers.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub faults: Option<Faults>,
    /// How long its faults took; `null` with `file`.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub fault_latency_us: Option<Latency>,
    /// Bytes of the template copied into it.
    pub installed_bytes: u64,
    /// Bytes of zeros that the kernel fills in by itself.
    pub given_back_bytes: u64,
    /// What it is given ahead of its faults, and how well these were foreseen; `null` with `file`.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub prefault: Option<ForkPrefault>,
    /// What was recorded of its first faults; `null` where they are not.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub recording: Option<ForkRecording>,
    /// What it costs; `null` where its VMM is not known, has exited, or was not asked for.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub memory: Option<ForkMemory>,
}

/// Why a fork failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ForkError {
    /// For machines; see the documentation of metrics for a list.
    pub code: String,
    /// For people.
    pub message: String,
}

/// Faults and pages of a fork, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Faults {
    /// Page faults that were answered.
    pub demand: u64,
    /// Those of them that were answered with zeros.
    pub zero: u64,
    /// Pages that the guest gave back.
    pub removed: u64,
    /// Pages installed that nobody waited for.
    pub prefaulted: u64,
    /// Installs that the kernel asked to retry.
    pub retried: u64,
    /// Faults that waited for the template to be read from disk.
    pub slow: u64,
}

/// What a fork is given ahead of its faults, and how well its first faults were foreseen. Counts of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ForkPrefault {
    /// What it was to be given.
    pub what: Prefault,
    /// Of pages that were to be installed ahead, and whose turn had not come.
    pub late: u64,
    /// Of pages that are not in the working set.
    pub missed: u64,
    /// Of pages of the working set that were held out, to see whether they would be asked for.
    pub held_out_used: u64,
}

/// What was recorded of a fork's first faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ForkRecording {
    /// Whether it is over, and part of the working set of the template.
    pub learned: bool,
    /// What was touched until then, in bytes; 0 while it goes on.
    pub size_bytes: u64,
}

/// Times in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Latency {
    /// Half were as fast.
    pub p50: u64,
    /// 99 of 100 were as fast.
    pub p99: u64,
    /// The slowest.
    pub max: u64,
}

/// What a fork's VMM costs, in bytes, from `/proc/PID/smaps_rollup`, hugepages included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ForkMemory {
    /// All that is resident.
    pub rss: u64,
    /// The same, with what is shared divided by the number of processes that share it.
    pub pss: u64,
    /// What no other process maps.
    pub private: u64,
    /// What others map too.
    pub shared: u64,
    /// What was swapped out.
    pub swap: u64,
}
