//! A template that has been added.

use std::fmt;
use std::io;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagecast::PageSize;
use pagecast::server::ForkId;
use pagecast::template::{FileState, Identity, KeptIdentity, MemFile, SourceError};
use pagecast_client::template::{Guard, Protection};
use serde::{Deserialize, Serialize};

use crate::ownership::Ownership;
use crate::placement::{PlaceError, Placement, Plan, Removal};
use crate::protection::Applied;
use crate::run_dir::{RunDir, Saved};
use crate::validity::{Forks, Validity};
use crate::warmth::Warmth;

/// The name of a template: `[a-z0-9][a-z0-9._-]{0,63}`, as the ids of forks are.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct TemplateName(ForkId);

impl TemplateName {
    pub(crate) fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl FromStr for TemplateName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        name.parse().map(Self).map_err(|_| {
            format!(
                "{name:?} is no name of a template: up to 64 of a-z, 0-9, '.', '_' and '-', the first a letter or digit"
            )
        })
    }
}

impl fmt::Display for TemplateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// What was asked for when it was added, and is asked for again to get the same one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) mem_path: PathBuf,
    pub(crate) vmstate_path: Option<PathBuf>,
    /// In bytes.
    pub(crate) page_size: u64,
    /// Nobody has said the page size, neither who asked nor the state file of the snapshot.
    #[serde(default)]
    pub(crate) page_size_is_guess: bool,
    pub(crate) protect: Protection,
}

impl PartialEq for Spec {
    /// Whether they ask for the same template. How the page size is known makes no other one of it.
    fn eq(&self, other: &Self) -> bool {
        let all = |spec: &Self| {
            (
                spec.mem_path.clone(),
                spec.vmstate_path.clone(),
                spec.page_size,
                spec.protect,
            )
        };
        all(self) == all(other)
    }
}

impl Spec {
    pub(crate) fn page_size(&self) -> PageSize {
        // Checked where it came in.
        PageSize::from_bytes(self.page_size).unwrap_or(PageSize::Small)
    }
}

/// A template, from adding to removing.
pub(crate) struct Template {
    pub(crate) name: TemplateName,
    pub(crate) spec: Spec,
    pub(crate) file: Arc<MemFile>,
    /// The same file, as the page server knows it.
    pub(crate) pages: pagecast::Template,
    /// How the memory file was protected, to be undone.
    pub(crate) protection: Applied,
    /// Where forks with `file` find the memory file; its own path where it could not be placed anywhere else.
    pub(crate) placement: Option<Placement>,
    /// How far it is in memory ahead of its forks.
    pub(crate) warmth: Warmth,
    /// Held while something is learned of it.
    pub(crate) learning: Mutex<()>,
    /// What the memory file was when its zeros were kept beside it; `None` where they are not. Held while they are.
    pub(crate) zeros_kept: Mutex<Option<KeptIdentity>>,
    /// It was told that its working set is not used.
    pub(crate) told_switched_off: AtomicBool,
    /// Owner and mode of its file when it was added, as far as that did not change them.
    ownership: Ownership,
    /// In what they differ, as it was told last.
    told_ownership: Mutex<Option<String>>,
    lease: Mutex<Option<pagecast::template::Lease>>,
    in_run_dir: Mutex<InRunDir>,
    /// Whether it is still what it was when it was added.
    pub(crate) validity: Validity,
}

impl Template {
    pub(crate) fn new(
        name: TemplateName,
        spec: Spec,
        file: Arc<MemFile>,
        ownership: Ownership,
        protection: Applied,
        placement: Option<Placement>,
        lease: Option<pagecast::template::Lease>,
    ) -> Self {
        Self {
            name,
            spec,
            pages: pagecast::Template::from_source(Arc::clone(&file)),
            warmth: Warmth::new(Arc::clone(&file)),
            file,
            protection,
            placement,
            learning: Mutex::new(()),
            zeros_kept: Mutex::new(None),
            told_switched_off: AtomicBool::new(false),
            ownership,
            told_ownership: Mutex::default(),
            lease: Mutex::new(lease),
            in_run_dir: Mutex::default(),
            validity: Validity::default(),
        }
    }

    /// Keeps in the run dir what is to be known of it after a restart, unless that is there already. `resident` if it is to
    /// stay in memory; `None` for what was said last. Nothing is kept of a file that has changed.
    ///
    /// # Errors
    ///
    /// It cannot be written; what was there before is there still.
    pub(crate) fn save(&self, run_dir: &RunDir, resident: Option<bool>) -> io::Result<()> {
        let mut there = self.in_run_dir();
        let Ok(state) = self.file.state() else { return Ok(()) };
        let resident = resident.unwrap_or(there.resident);
        if there.is_over || (there.saved_as == Some(state) && there.resident == resident) {
            return Ok(());
        }
        let saved = SavedTemplate {
            spec: self.spec.clone(),
            identity: Was::State(state),
            ownership: Some(self.ownership),
            protection: self.protection,
            place: self.placement.clone().map(Place::Done),
            resident,
        };
        run_dir.save(Saved::Template, self.name.as_str(), &saved)?;
        there.saved_as = Some(state);
        there.resident = resident;
        Ok(())
    }

    /// Forgets what is kept in the run dir, and keeps nothing there from now on.
    ///
    /// # Errors
    ///
    /// It cannot be deleted.
    pub(crate) fn forget(&self, run_dir: &RunDir) -> io::Result<()> {
        self.in_run_dir().is_over = true;
        run_dir.forget(Saved::Template, self.name.as_str())
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

    /// Makes sure that it can be forked: the file that is held, and the path it came from, are what they were.
    ///
    /// # Errors
    ///
    /// In what it has changed. Once changed, always changed; what merely cannot be told now is told another time.
    pub(crate) fn check(&self) -> Result<(), SourceError> {
        if self.validity.change().is_none() {
            let compared = self.file.state().and_then(|_| self.file.check_path());
            let how = match compared {
                Ok(()) => return Ok(()),
                Err(error) if error.may_pass() => return Err(error),
                Err(SourceError::Changed { how }) => how,
                Err(other) => pagecast::server::chain(&other),
            };
            self.validity.invalidate(&how, Forks::Left);
        }
        // The first reason that was noticed, perhaps by another thread.
        let how = self.validity.change().unwrap_or_default().to_string();
        Err(SourceError::Changed { how })
    }

    /// Lets whoever waits to write the file go on.
    pub(crate) fn release_lease(&self) {
        drop(self.lease.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Whether somebody waits to write the file.
    pub(crate) fn is_lease_broken(&self) -> bool {
        let lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        lease.as_ref().is_some_and(pagecast::template::Lease::is_broken)
    }

    /// How changes are noticed.
    pub(crate) fn guard(&self) -> Guard {
        match &*self.lease.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(lease) if lease.is_sure() => Guard::Lease,
            _ => Guard::Watch,
        }
    }

    /// Owner and mode of its file when it was added.
    pub(crate) fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// In what owner and mode of its file differ from those when it was added; `None` where they do not, or cannot be told.
    pub(crate) fn ownership_change(&self) -> Option<String> {
        self.ownership.difference(&Ownership::of(self.file.as_fd()).ok()?)
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

    /// Where forks with `file` find the memory file.
    pub(crate) fn path_for_forks(&self) -> PathBuf {
        self.placement
            .as_ref()
            .map_or_else(|| self.spec.mem_path.clone(), |placement| placement.path().to_owned())
    }

    /// The name of its file system, where its pages come from elsewhere.
    pub(crate) fn remote(&self) -> Option<&'static str> {
        self.file.remote()
    }
}

/// What is kept of a template in the run dir, to be found again after a restart. Kept before anything is done to the
/// memory file, so that it can be undone whatever happens in the middle.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SavedTemplate {
    pub(crate) spec: Spec,
    pub(crate) identity: Was,
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
pub(crate) enum Was {
    State(FileState),
    /// Kept by an older version, which did not look at the ctime.
    Identity(Identity),
}

impl Was {
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
