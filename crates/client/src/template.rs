//! Templates, as they are added and as they are described.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A template to add: the body of `PUT /v1/templates/{name}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct AddTemplate {
    /// The memory file of the snapshot; an absolute path.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub mem_path: PathBuf,
    /// The state file of the snapshot; an absolute path. pagecast reads the page size of the guest
    /// there, and remembers the path for those who restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub vmstate_path: Option<PathBuf>,
    /// The page size of the guests in bytes, 4096 or 2097152, where a fork does not say otherwise. If it is left out, it is what
    /// the state file says (of Firecracker 1.7 to 1.14), else 4096.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u64>,
    /// How the memory file is protected; the daemon's configuration says where this does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protect: Option<Protection>,
}

impl AddTemplate {
    /// A template with only a memory file.
    pub fn new(mem_path: impl Into<PathBuf>) -> Self {
        Self {
            mem_path: mem_path.into(),
            vmstate_path: None,
            page_size: None,
            protect: None,
        }
    }
}

/// How the memory file of a template is protected while it is a template. Removing the template undoes it; where
/// the file is that of several, the last of them that is protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Protection {
    /// Not at all: changes are only noticed.
    #[default]
    None,
    /// Its write permissions are taken away. Root can write all the same.
    Readonly,
    /// It gets the immutable flag, where the filesystem has one: nobody can write, truncate, rename or delete it.
    Immutable,
}

/// A template: `GET /v1/templates/{name}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Template {
    /// Its name: `[a-z0-9][a-z0-9._-]{0,63}`.
    pub name: String,
    /// The memory file; `null` if the template is no file.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, required = true))]
    pub mem_path: Option<PathBuf>,
    /// The state file, if known.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, required = true))]
    pub vmstate_path: Option<PathBuf>,
    /// Whether it can be forked.
    pub state: TemplateState,
    /// In what it has changed, where it has.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub changed: Option<String>,
    /// What somebody should look at, though it can be forked: such as an owner or mode of its memory file that is not what it was
    /// when the template was added.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub warnings: Vec<String>,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// How much of it is known to be zeros, in bytes. Grows while the file is looked through.
    pub zero_bytes: u64,
    /// The page size of its guests in bytes, where a fork does not say otherwise.
    pub page_size: u64,
    /// How its memory file is protected.
    pub protect: Protection,
    /// How changes are noticed.
    pub guard: Guard,
    /// How many of its forks wait or are alive.
    pub forks: u64,
    /// What its forks touch first, as far as that was learned.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub working_set: Option<WorkingSet>,
    /// How far it has been brought into memory ahead of its forks; `null` where nobody has asked for that.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub warmth: Option<Warmth>,
    /// What its living forks cost together; `null` where it was not asked for, or not one could be measured.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub memory: Option<TemplateMemory>,
}

/// How to bring a template into memory: the body of `POST /v1/templates/{name}/warm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Warm {
    /// Keep it there: all of it that is not zeros is locked in memory until it is asked for otherwise, or the template is
    /// removed. Else the kernel may give up what nobody uses.
    #[serde(default)]
    pub resident: bool,
}

/// How far a template has been brought into memory: into the page cache, which its forks with `file` map, in pages of
/// 2 MiB where its file system has such. Lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Warmth {
    /// Whether that is done.
    pub state: WarmthState,
    /// Whether it is to stay.
    pub resident: bool,
    /// How much is to be brought in: the working set, or where there is none, or it is to stay, all that is not known to be
    /// zeros.
    pub wanted_bytes: u64,
    /// How much has been. Unless it is locked, the kernel may have given up some of it since.
    pub read_bytes: u64,
    /// How much of that came in pages of 2 MiB, which forks map in one fault each.
    pub huge_bytes: u64,
    /// How much is locked in memory now. It counts as memory of the daemon.
    pub locked_bytes: u64,
    /// Why it failed; then nothing is locked.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub error: Option<String>,
}

/// How far a template has been brought into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum WarmthState {
    /// It is being read.
    Warming,
    /// All of it has been.
    Warm,
    /// That has failed.
    Failed,
}

/// The pages that forks touch soon after resume, and how forks do that are given them ahead.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkingSet {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// How many recordings it was learned from.
    pub recordings: u64,
    /// How many forks have been given it ahead, and watched, since it was last learned.
    pub forks: u64,
    /// Which part of what they were given they have used, from 0 to 1; `null` where too little is known.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub precision: Option<f64>,
    /// Which part of what they have used they were given, from 0 to 1; `null` where too little is known.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub recall: Option<f64>,
    /// Too little of it was used: forks are not given it any more, until something else is learned.
    pub switched_off: bool,
}

/// Whether a template can be forked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum TemplateState {
    /// It can.
    Ready,
    /// It is not what it was when it was added. Remove it and add it again.
    Changed,
}

/// How changes of a template are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Guard {
    /// By a lease: whoever wants to write waits until every fork that could read it has stopped.
    Lease,
    /// By watching and comparing: a write is noticed once it has happened.
    Watch,
}

/// What the living forks of a template cost together, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TemplateMemory {
    /// How many forks were measured: those whose pid is known.
    pub measured: u64,
    /// What they cost: their proportional shares.
    pub pss: u64,
    /// What would be free without them: what they share with nobody.
    pub private: u64,
    /// What they would cost without sharing: everything resident, counted for each.
    pub unshared: u64,
}
