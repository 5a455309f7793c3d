//! The memory file of a template, and what is done to it for as long as it is one.
//!
//! All that only a file on this host has is here: a path, an inode, a lease, owner and mode, protection, placement, warmth.

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
use crate::placement::{PlaceError, Placement, Plan, Removal};
use crate::protection::Applied;
use crate::run_dir::{RunDir, Saved};
use crate::warmth::Warmth;

/// What was asked for when a template was added, from wherever its pages come.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) vmstate_path: Option<PathBuf>,
    /// In bytes.
    pub(crate) page_size: u64,
    /// Nobody has said the page size, neither who asked nor the state file of the snapshot.
    #[serde(default)]
    pub(crate) page_size_is_guess: bool,
}

impl PartialEq for Spec {
    /// Whether they ask for the same template. How the page size is known makes no other one of it.
    fn eq(&self, other: &Self) -> bool {
        (&self.vmstate_path, self.page_size) == (&other.vmstate_path, other.page_size)
    }
}

impl Spec {
    pub(crate) fn page_size(&self) -> PageSize {
        // Checked where it came in.
        PageSize::from_bytes(self.page_size).unwrap_or(PageSize::Small)
    }
}

/// What was asked for when a memory file was added as a template, and is asked for again to get the same one.
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
    /// How it was asked to be protected.
    pub(crate) protect: Protection,
    /// How it was protected, to be undone.
    pub(crate) protection: Applied,
    /// Where forks with `file` find it; its own path if it could not be placed anywhere else.
    pub(crate) placement: Option<Placement>,
    /// How far it is in memory ahead of its forks.
    pub(crate) warmth: Warmth,
    /// The content that its zeros were kept for beside it; `None` if they are not. Held while they are.
    pub(crate) zeros_kept: Mutex<Option<ContentIdentity>>,
    /// Owner and mode when it was added, as far as that did not change them.
    ownership: Ownership,
    /// In what they differ, as it was told last.
    told_ownership: Mutex<Option<String>>,
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
            told_ownership: Mutex::default(),
            lease: Mutex::new(lease),
            in_run_dir: Mutex::default(),
        }
    }

    /// The path that it was added with.
    pub(crate) fn path(&self) -> &Path {
        self.mem_file.path()
    }

    /// The inode that is held, wherever its path leads by now.
    pub(crate) fn inode(&self) -> InodeId {
        self.mem_file.identity().inode().into()
    }

    /// Where forks with `file` find it.
    pub(crate) fn path_for_forks(&self) -> &Path {
        self.placement.as_ref().map_or_else(|| self.path(), Placement::path)
    }

    /// Keeps in the run dir what is to be known of its template after a restart, unless that is there already. `resident` if
    /// it is to stay in memory; `None` for what was said last. Nothing is kept of a file that has changed.
    ///
    /// # Errors
    ///
    /// It cannot be written; what was there before is there still.
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

    /// From now on nothing is kept in the run dir.
    pub(crate) fn end_saving(&self) {
        self.in_run_dir().is_over = true;
    }

    fn in_run_dir(&self) -> MutexGuard<'_, InRunDir> {
        // No code that can panic runs under this lock.
        self.in_run_dir.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on nothing of it is kept in memory, and nothing more is kept of it in the run dir for that.
    pub(crate) fn end_warmth(&self) {
        let _asking = self.warmth.asking.lock().unwrap_or_else(PoisonError::into_inner);
        self.warmth.end();
    }

    /// Lets whoever waits to write the file go on.
    pub(crate) fn release_lease(&self) {
        drop(self.lease.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Whether somebody waits to write the file.
    pub(crate) fn is_lease_broken(&self) -> bool {
        let lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        lease.as_ref().is_some_and(Lease::is_broken)
    }

    /// How changes are noticed.
    pub(crate) fn guard(&self) -> Guard {
        match &*self.lease.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(lease) if lease.is_sure() => Guard::Lease,
            _ => Guard::Watch,
        }
    }

    /// Owner and mode when it was added.
    pub(crate) fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// In what owner and mode differ from those when it was added; `None` where they do not, or cannot be told.
    pub(crate) fn ownership_change(&self) -> Option<String> {
        self.ownership.difference(&Ownership::of(self.mem_file.as_fd()).ok()?)
    }

    /// The same, if it is not what this has answered the last time.
    pub(crate) fn new_ownership_change(&self) -> Option<String> {
        let change = self.ownership_change();
        let mut told = self.told_ownership.lock().unwrap_or_else(PoisonError::into_inner);
        if *told == change {
            return None;
        }
        told.clone_from(&change);
        change
    }
}

/// What is kept of a template with a file in the run dir, to be found again after a restart. Kept before anything is done to the
/// memory file, so that it can be undone whatever happens in the middle.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SavedTemplate {
    pub(crate) spec: FileSpec,
    pub(crate) identity: SavedIdentity,
    /// Owner and mode of the file; `None` where an earlier version has kept it.
    #[serde(default)]
    pub(crate) ownership: Option<Ownership>,
    pub(crate) protection: Applied,
    pub(crate) place: Option<Place>,
    /// It is to stay in memory.
    #[serde(default)]
    pub(crate) resident: bool,
}

/// What a memory file was when it was kept in the run dir.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum SavedIdentity {
    State(FileState),
    /// Kept by an older version, which did not look at the ctime.
    Identity(Identity),
}

impl SavedIdentity {
    /// In what the file was written since, if it is `now`. `is_explained` if something is known that explains another ctime.
    pub(crate) fn written(&self, now: &FileState, is_explained: bool) -> Option<String> {
        match self {
            Self::State(state) => state.written(now, is_explained),
            Self::Identity(identity) => identity.difference(now.identity()),
        }
    }
}

/// What is kept in the run dir.
#[derive(Debug, Default)]
struct InRunDir {
    saved_as: Option<FileState>,
    resident: bool,
    /// The template is removed.
    is_over: bool,
}

/// Where a memory file was put, or was about to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Place {
    Planned(Plan),
    Done(Placement),
}

impl Place {
    /// Takes away whatever is there of it.
    pub(crate) fn remove(&self) -> Result<Removal, PlaceError> {
        match self {
            Self::Planned(plan) => plan.undo(),
            Self::Done(placement) => placement.remove(),
        }
    }
}
