//! Templates: requests and answers.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A template to add: the body of `PUT /v1/templates/{name}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct AddTemplate {
    /// Absolute path of the snapshot's memory file.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub mem_path: PathBuf,
    /// Absolute path of the snapshot's state file. pagecast reads the guest's page size from it, and keeps the path for
    /// tools that restore the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub vmstate_path: Option<PathBuf>,
    /// Page size of the guests in bytes, 4096 or 2097152, unless a fork sets another one. By default the one in the
    /// state file (Firecracker 1.7 to 1.14), else 4096.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u64>,
    /// Protection of the memory file; by default the one in the daemon's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protect: Option<Protection>,
}

impl AddTemplate {
    /// Creates a request for a template with only a memory file.
    pub fn new(mem_path: impl Into<PathBuf>) -> Self {
        Self {
            mem_path: mem_path.into(),
            vmstate_path: None,
            page_size: None,
            protect: None,
        }
    }
}

/// Protection of a template's memory file. Removing the template undoes it. If several templates have the same file,
/// removing the last protected one does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Protection {
    /// No protection: changes are noticed, not prevented.
    #[default]
    None,
    /// The file loses its write permissions. Root can still write.
    Readonly,
    /// The file gets the immutable flag, if its file system has one: no process can write, truncate, rename or delete
    /// it.
    Immutable,
}

/// A template: `GET /v1/templates/{name}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Template {
    /// Name of the template: `[a-z0-9][a-z0-9._-]{0,63}`.
    pub name: String,
    /// The memory file; `null` if the template is no file.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, required = true))]
    pub mem_path: Option<PathBuf>,
    /// The state file, if known.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, required = true))]
    pub vmstate_path: Option<PathBuf>,
    /// Whether it can be forked.
    pub state: TemplateState,
    /// What has changed, if anything has.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub changed: Option<String>,
    /// Warnings for the operator. The template can still be forked. Example: the memory file's owner or mode has
    /// changed since the template was added.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub warnings: Vec<String>,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Bytes that are known to be zeros. Grows during the search for them.
    pub zero_bytes: u64,
    /// Page size of the guests in bytes, unless a fork sets another one.
    pub page_size: u64,
    /// Protection of the memory file.
    pub protect: Protection,
    /// How changes are noticed.
    pub guard: Guard,
    /// Number of forks that wait for a VMM or are alive.
    pub forks: u64,
    /// The pages that forks touch first, if they are known.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub working_set: Option<WorkingSet>,
    /// Progress of reading the template into memory; `null` if that was not asked for.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub warmth: Option<Warmth>,
    /// Memory of the living forks; `null` if it was not asked for, or no fork could be measured.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub memory: Option<TemplateMemory>,
}

/// How to read a template into memory: the body of `POST /v1/templates/{name}/warm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Warm {
    /// Whether to lock all pages that are not zeros in memory, until another request or until the template is removed.
    /// Without it, the kernel may evict unused pages.
    #[serde(default)]
    pub resident: bool,
}

/// Progress of reading a template into the page cache, in pages of 2 MiB if its file system has them. Forks with `file`
/// map the page cache. Lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Warmth {
    /// State of the read.
    pub state: WarmthState,
    /// Whether the template is to be locked in memory.
    pub resident: bool,
    /// Bytes to read: the working set. If there is none, or with `resident`, all that is not known to be zeros.
    pub wanted_bytes: u64,
    /// Bytes read so far. Unless they are locked, the kernel may have evicted some.
    pub read_bytes: u64,
    /// Bytes read in pages of 2 MiB. A fork maps such a page in one fault.
    pub huge_bytes: u64,
    /// Bytes locked in memory. They count as memory of the daemon.
    pub locked_bytes: u64,
    /// Why the read failed. Nothing is locked then.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub error: Option<String>,
}

/// State of reading a template into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum WarmthState {
    /// The read is under way.
    Warming,
    /// The read is done.
    Warm,
    /// The read has failed.
    Failed,
}

/// The pages that forks touch soon after resume, and how well they foresee the faults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkingSet {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Number of recordings in it.
    pub recordings: u64,
    /// Number of forks that were measured since its last change.
    pub forks: u64,
    /// Part of the prefaulted pages that forks used, from 0 to 1; `null` if there is too little data.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub precision: Option<f64>,
    /// Part of the pages used by forks that were prefaulted, from 0 to 1; `null` if there is too little data.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub recall: Option<f64>,
    /// Whether forks no longer get it, since too little of it was used. The next recording ends that.
    pub switched_off: bool,
}

/// Whether a template can be forked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum TemplateState {
    /// It can be forked.
    Ready,
    /// It has changed since it was added. Remove it and add it again.
    Changed,
}

/// How changes of a template are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Guard {
    /// By a lease: a writer waits until every fork that could read the file has ended.
    Lease,
    /// By watching and comparing: a write is noticed afterwards.
    Watch,
}

/// Memory of a template's living forks together, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TemplateMemory {
    /// Number of forks that were measured: those whose process ID is known.
    pub measured: u64,
    /// Sum of their proportional set sizes (PSS).
    pub pss: u64,
    /// Memory that no other process shares: it would be free without these forks.
    pub private: u64,
    /// Memory without sharing: the sum of all resident memory.
    pub unshared: u64,
}
