//! The memory file of a template, and the changes to it that last as long as the template.
//!
//! It holds the properties that only a file on this host has: path, inode, lease, ownership, protection, placement,
//! warmth.

use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagecast::PageSize;
use pagecast::template::{ContentIdentity, FileState, Identity, Lease, MemFile};
use pagecast_client::template::{Guard, Protection};
use serde::{Deserialize, Serialize};

use crate::inode::InodeId;
use crate::ownership::Ownership;
use crate::placement::{PlaceError, Placement, PlannedPlacement, Removal};
use crate::protection::Applied;
use crate::run_dir::{RunDir, Saved};
use crate::warmth::Warmth;

/// The request with which a template was added, for any source of pages.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) vmstate_path: Option<PathBuf>,
    /// In bytes.
    pub(crate) page_size: u64,
    /// The page size is a guess: neither the request nor the state file of the snapshot has it.
    #[serde(default)]
    pub(crate) page_size_is_guess: bool,
}

impl PartialEq for Spec {
    /// Returns `true` if both request the same template. A guessed page size equals a given one.
    fn eq(&self, other: &Self) -> bool {
        (&self.vmstate_path, self.page_size) == (&other.vmstate_path, other.page_size)
    }
}

impl Spec {
    pub(crate) fn page_size(&self) -> PageSize {
        // Checked when the request was parsed.
        PageSize::from_bytes(self.page_size).unwrap_or(PageSize::Small)
    }
}

/// The request with which a memory file was added. An equal request returns the same template.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct FileSpec {
    #[serde(flatten)]
    pub(crate) spec: Spec,
    pub(crate) mem_path: PathBuf,
    pub(crate) protect: Protection,
}

/// The memory file of a template.
pub(crate) struct LocalFile {
    pub(crate) mem_file: Arc<MemFile>,
    /// The requested protection.
    pub(crate) protect: Protection,
    /// The protection that was applied, and is undone at the end.
    pub(crate) protection: Applied,
    /// The path for forks with `file`; `None` if the file could not be placed, and its own path is used.
    pub(crate) placement: Option<Placement>,
    /// How far it was read into memory ahead of its forks.
    pub(crate) warmth: Warmth,
    /// The content that its zeros were saved for; `None` if they were not. Locked while they are being saved.
    pub(crate) zeros_kept: Mutex<Option<ContentIdentity>>,
    /// Owner and mode when it was added, before it was protected.
    ownership: Ownership,
    /// The difference that was reported last.
    logged_ownership: Mutex<Option<String>>,
    lease: Mutex<Option<Lease>>,
    in_run_dir: Mutex<InRunDir>,
}

impl LocalFile {
    pub(crate) fn new(
        mem_file: Arc<MemFile>,
        protect: Protection,
        ownership: Ownership,
        protection: Applied,
        placement: Option<Placement>,
        lease: Option<Lease>,
    ) -> Self {
        Self {
            warmth: Warmth::new(Arc::clone(&mem_file)),
            mem_file,
            protect,
            protection,
            placement,
            zeros_kept: Mutex::new(None),
            ownership,
            logged_ownership: Mutex::default(),
            lease: Mutex::new(lease),
            in_run_dir: Mutex::default(),
        }
    }

    /// Returns the path that it was added with.
    pub(crate) fn path(&self) -> &Path {
        self.mem_file.path()
    }

    /// Returns the inode of the open file, even if its path leads to another one by now.
    pub(crate) fn inode(&self) -> InodeId {
        self.mem_file.identity().inode().into()
    }

    /// Returns the path for forks with `file`.
    pub(crate) fn path_for_forks(&self) -> &Path {
        self.placement.as_ref().map_or_else(|| self.path(), Placement::path)
    }

    /// Saves the record of its template in the run dir, unless that is there already. `resident` says whether the
    /// template stays locked in memory; `None` keeps the last value. Saves nothing for a file that has changed.
    ///
    /// # Errors
    ///
    /// The record cannot be written. The earlier one stays.
    pub(crate) fn save(&self, name: &str, spec: &Spec, run_dir: &RunDir, resident: Option<bool>) -> io::Result<()> {
        let mut there = self.in_run_dir();
        let Ok(state) = self.mem_file.state() else {
            return Ok(());
        };
        let resident = resident.unwrap_or(there.resident);
        if there.is_over || (there.saved_as == Some(state) && there.resident == resident) {
            return Ok(());
        }
        let saved = SavedTemplate {
            spec: FileSpec {
                spec: spec.clone(),
                mem_path: self.path().to_owned(),
                protect: self.protect,
            },
            identity: SavedIdentity::State(state),
            ownership: Some(self.ownership),
            protection: self.protection,
            place: self.placement.clone().map(Place::Done),
            resident,
        };
        run_dir.save(Saved::Template, name, &saved)?;
        there.saved_as = Some(state);
        there.resident = resident;
        Ok(())
    }

    /// Stops saving in the run dir.
    pub(crate) fn end_saving(&self) {
        self.in_run_dir().is_over = true;
    }

    fn in_run_dir(&self) -> MutexGuard<'_, InRunDir> {
        // No code that can panic runs under this lock.
        self.in_run_dir.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unlocks it in memory for good. Requests to lock it are no longer saved in the run dir.
    pub(crate) fn end_warmth(&self) {
        let _lock = self.warmth.request_lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.warmth.end();
    }

    /// Drops the lease, so that a process that waits to write the file continues.
    pub(crate) fn release_lease(&self) {
        drop(self.lease.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Returns `true` if a process waits to write the file.
    pub(crate) fn is_lease_broken(&self) -> bool {
        let lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        lease.as_ref().is_some_and(Lease::is_broken)
    }

    /// Returns the way changes of the file are noticed.
    pub(crate) fn guard(&self) -> Guard {
        match &*self.lease.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(lease) if lease.is_sure() => Guard::Lease,
            _ => Guard::Watch,
        }
    }

    /// Returns owner and mode when it was added.
    pub(crate) fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// Describes how owner and mode differ from those when it was added. `None` if they do not, or `fstat(2)` fails.
    pub(crate) fn ownership_change(&self) -> Option<String> {
        self.ownership.difference(&Ownership::of(self.mem_file.as_fd()).ok()?)
    }

    /// Returns the same, unless it equals the last result.
    pub(crate) fn new_ownership_change(&self) -> Option<String> {
        let change = self.ownership_change();
        let mut logged = self.logged_ownership.lock().unwrap_or_else(PoisonError::into_inner);
        if *logged == change {
            return None;
        }
        logged.clone_from(&change);
        change
    }
}

/// The record of a template with a file in the run dir, for the next daemon. Saved before the memory file is changed,
/// so that any change can be undone after a crash.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SavedTemplate {
    pub(crate) spec: FileSpec,
    pub(crate) identity: SavedIdentity,
    /// Owner and mode of the file; `None` in a record of an earlier version.
    #[serde(default)]
    pub(crate) ownership: Option<Ownership>,
    pub(crate) protection: Applied,
    pub(crate) place: Option<Place>,
    /// The template stays locked in memory.
    #[serde(default)]
    pub(crate) resident: bool,
}

/// The identity of a memory file when its record was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum SavedIdentity {
    State(FileState),
    /// Saved by an older version, without the ctime.
    Identity(Identity),
}

impl SavedIdentity {
    /// Describes how the file differs from `now` if it was written since. `is_explained` if a change by the daemon
    /// explains another ctime.
    pub(crate) fn written(&self, now: &FileState, is_explained: bool) -> Option<String> {
        match self {
            Self::State(state) => state.written(now, is_explained),
            Self::Identity(identity) => identity.difference(now.identity()),
        }
    }
}

/// The state of the record in the run dir.
#[derive(Debug, Default)]
struct InRunDir {
    saved_as: Option<FileState>,
    resident: bool,
    /// The template is removed.
    is_over: bool,
}

/// The place where a memory file was put, or was about to be put.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Place {
    Planned(PlannedPlacement),
    Done(Placement),
}

impl Place {
    /// Removes the placement, or the parts of it that exist.
    pub(crate) fn remove(&self) -> Result<Removal, PlaceError> {
        match self {
            Self::Planned(plan) => plan.undo(),
            Self::Done(placement) => placement.remove(),
        }
    }
}
