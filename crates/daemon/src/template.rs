//! A template that has been added.

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

/// A template, from adding to removing.
pub(crate) struct Template {
    pub(crate) name: TemplateName,
    pub(crate) spec: Spec,
    /// Its pages, as the page server knows them.
    pub(crate) pages: pagecast::Template,
    /// The file that they come from. `None` if they come from anywhere else.
    pub(crate) file: Option<Arc<LocalFile>>,
    /// Held while something is learned of it.
    pub(crate) learning: Mutex<()>,
    /// It was told that its working set is not used.
    pub(crate) told_switched_off: AtomicBool,
    /// Whether it is still what it was when it was added.
    pub(crate) validity: Validity,
}

impl Template {
    /// One whose pages come from `source`.
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
            told_switched_off: AtomicBool::new(false),
            validity: Validity::default(),
        }
    }

    /// One whose pages come from a memory file.
    pub(crate) fn of_file(name: TemplateName, spec: Spec, file: Arc<LocalFile>) -> Self {
        Self::new(name, spec, Arc::clone(&file.mem_file), Some(file))
    }

    /// Whether `wanted` asks for this template.
    pub(crate) fn is_asked_for(&self, wanted: &FileSpec) -> bool {
        let is_its_file = |file: &Arc<LocalFile>| file.path() == wanted.mem_path && file.protect == wanted.protect;
        self.spec == wanted.spec && self.file.as_ref().is_some_and(is_its_file)
    }

    /// Keeps in the run dir what is to be known of it after a restart: see [`LocalFile::save`]. Nothing is kept of a template
    /// without a file, and so it is not found again.
    ///
    /// # Errors
    ///
    /// It cannot be written; what was there before is there still.
    pub(crate) fn save(&self, run_dir: &RunDir, resident: Option<bool>) -> io::Result<()> {
        match &self.file {
            Some(file) => file.save(self.name.as_str(), &self.spec, run_dir, resident),
            None => Ok(()),
        }
    }

    /// Forgets what is kept in the run dir, and keeps nothing there from now on.
    ///
    /// # Errors
    ///
    /// It cannot be deleted.
    pub(crate) fn forget(&self, run_dir: &RunDir) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.end_saving();
        }
        run_dir.forget(Saved::Template, self.name.as_str())
    }

    /// Makes sure that its bytes are what they were. Waits for a file server.
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

    /// Makes sure that it can be forked: its bytes, and the path of its file, are what they were.
    ///
    /// # Errors
    ///
    /// In what it has changed. Once changed, always changed; what merely cannot be told now is told another time.
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
        // The first reason that was noticed, perhaps by another thread.
        let how = self.validity.change().unwrap_or_default().to_string();
        Err(SourceError::Changed { how })
    }

    /// How changes are noticed.
    pub(crate) fn guard(&self) -> Guard {
        self.file.as_ref().map_or(Guard::Watch, |file| file.guard())
    }

    /// Lets go whoever waits to write its file.
    pub(crate) fn release_lease(&self) {
        if let Some(file) = &self.file {
            file.release_lease();
        }
    }

    /// How far its file is in memory ahead of its forks; `None` if nobody has asked for that.
    pub(crate) fn warmth(&self) -> Option<Warmth> {
        self.file.as_ref()?.warmth.told()
    }
}
