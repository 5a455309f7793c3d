//! Templates that were added.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use pagecast::server::ForkId;
use pagecast::template::{PageSource, SourceError};
use pagecast_client::template::{Guard, Warmth};

use crate::local_file::{FileSpec, LocalFile, Spec};
use crate::run_dir::{RunDir, Saved};
use crate::validity::{Forks, Validity};

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
                "{name:?} is not a template name: up to 64 of a-z, 0-9, '.', '_' and '-', the first a letter or digit"
            )
        })
    }
}

impl fmt::Display for TemplateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A template, from addition to removal.
pub(crate) struct Template {
    pub(crate) name: TemplateName,
    pub(crate) spec: Spec,
    /// The page server's handle of its pages.
    pub(crate) pages: pagecast::Template,
    /// The file with its pages; `None` if they come from another source.
    pub(crate) file: Option<Arc<LocalFile>>,
    /// Held while a recording is added to its working set.
    pub(crate) learning: Mutex<()>,
    /// A log line has said that its working set is not used.
    pub(crate) logged_switched_off: AtomicBool,
    /// Whether it has changed since it was added.
    pub(crate) validity: Validity,
}

impl Template {
    /// Creates a template whose pages come from `source`.
    pub(crate) fn new(
        name: TemplateName,
        spec: Spec,
        source: Arc<impl PageSource>,
        file: Option<Arc<LocalFile>>,
    ) -> Self {
        Self {
            name,
            spec,
            pages: pagecast::Template::from_source(source),
            file,
            learning: Mutex::new(()),
            logged_switched_off: AtomicBool::new(false),
            validity: Validity::default(),
        }
    }

    /// Creates a template whose pages come from a memory file.
    pub(crate) fn of_file(name: TemplateName, spec: Spec, file: Arc<LocalFile>) -> Self {
        Self::new(name, spec, Arc::clone(&file.mem_file), Some(file))
    }

    /// Returns `true` if `wanted` requests this template.
    pub(crate) fn is_asked_for(&self, wanted: &FileSpec) -> bool {
        let is_its_file = |file: &Arc<LocalFile>| file.path() == wanted.mem_path && file.protect == wanted.protect;
        self.spec == wanted.spec && self.file.as_ref().is_some_and(is_its_file)
    }

    /// Saves its record in the run dir: see [`LocalFile::save`]. A template without a file has no record, so the next
    /// daemon does not take it up.
    ///
    /// # Errors
    ///
    /// The record cannot be written. The earlier one stays.
    pub(crate) fn save(&self, run_dir: &RunDir, resident: Option<bool>) -> io::Result<()> {
        match &self.file {
            Some(file) => file.save(self.name.as_str(), &self.spec, run_dir, resident),
            None => Ok(()),
        }
    }

    /// Deletes its record in the run dir, and saves none from now on.
    ///
    /// # Errors
    ///
    /// The record cannot be deleted.
    pub(crate) fn forget(&self, run_dir: &RunDir) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.end_saving();
        }
        run_dir.forget(Saved::Template, self.name.as_str())
    }

    /// Checks that its bytes have not changed. May wait for a file server.
    ///
    /// # Errors
    ///
    /// [`SourceError`].
    pub(crate) fn compare(&self) -> Result<(), SourceError> {
        match &self.file {
            Some(file) => file.mem_file.state().map(drop),
            None => self.pages.source().check_unchanged(),
        }
    }

    /// Checks that it can be forked: its bytes, and the path of its file, have not changed.
    ///
    /// # Errors
    ///
    /// [`SourceError::Changed`] says how it has changed, and is final. Other errors may pass.
    pub(crate) fn check(&self) -> Result<(), SourceError> {
        if self.validity.change().is_none() {
            let compared = self.compare().and_then(|()| match &self.file {
                Some(file) => file.mem_file.check_path(),
                None => Ok(()),
            });
            let how = match compared {
                Ok(()) => return Ok(()),
                Err(error) if error.may_pass() => return Err(error),
                Err(SourceError::Changed { how }) => how,
                Err(other) => pagecast::server::chain(&other),
            };
            self.validity.invalidate(&how, Forks::Left);
        }
        // The first reason, perhaps set by another thread.
        let how = self.validity.change().unwrap_or_default().to_string();
        Err(SourceError::Changed { how })
    }

    /// Returns the way its changes are noticed.
    pub(crate) fn guard(&self) -> Guard {
        self.file.as_ref().map_or(Guard::Watch, |file| file.guard())
    }

    /// Drops the lease on its file, so that a waiting writer continues.
    pub(crate) fn release_lease(&self) {
        if let Some(file) = &self.file {
            file.release_lease();
        }
    }

    /// Returns how far its file was read into memory ahead of its forks; `None` without a request for that.
    pub(crate) fn warmth(&self) -> Option<Warmth> {
        self.file.as_ref()?.warmth.progress()
    }
}
