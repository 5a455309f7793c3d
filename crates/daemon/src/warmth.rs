//! Templates in memory ahead of their forks: read into the page cache, and locked there on request.
//!
//! Memory is locked by a mapping of this process, so the lock ends with the process. Nothing else changes on the host:
//! the memory file, its inode, lease and protection stay the same.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagecast::template::{Locked, MemFile, Wanted};
use pagecast_client::template::{Warmth as Progress, WarmthState};

/// How far a template has been read into memory, and the locks that keep it there.
pub(crate) struct Warmth {
    file: Arc<MemFile>,
    state: Mutex<State>,
    /// Held while a request is changed and saved in the run dir, so that both happen in the same order.
    pub(crate) request_lock: Mutex<()>,
    /// A thread is reading ahead of forks with `file`.
    pub(crate) reading_ahead: AtomicBool,
}

#[derive(Default)]
struct State {
    /// The number of the last request. Threads that work for an earlier one stop.
    last_request: u64,
    progress: Option<Progress>,
    locked: Vec<Locked>,
    /// The template was removed or has changed. No more requests are accepted.
    over: bool,
}

/// An accepted request to warm a template.
#[derive(Debug)]
pub(crate) struct WarmRequest {
    number: u64,
    pub(crate) resident: bool,
    pub(crate) wanted: Wanted,
}

impl Warmth {
    pub(crate) fn new(file: Arc<MemFile>) -> Self {
        Self {
            file,
            state: Mutex::default(),
            request_lock: Mutex::default(),
            reading_ahead: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the progress, as the API shows it.
    pub(crate) fn progress(&self) -> Option<Progress> {
        self.state().progress.clone()
    }

    /// Accepts a request, which replaces the earlier one, and unlocks the memory of that. Returns `None` if no more
    /// requests are accepted.
    pub(crate) fn accept(&self, wanted: Wanted, resident: bool) -> Option<WarmRequest> {
        let mut state = self.state();
        if state.over {
            return None;
        }
        state.last_request += 1;
        self.file.set_pinned(false);
        state.progress = Some(Progress {
            state: WarmthState::Warming,
            resident,
            wanted_bytes: wanted.size().get(),
            read_bytes: 0,
            huge_bytes: 0,
            locked_bytes: 0,
            error: None,
        });
        let number = state.last_request;
        // Unlocked outside of the lock, since unmapping much memory takes long.
        let locked = std::mem::take(&mut state.locked);
        drop(state);
        drop(locked);
        Some(WarmRequest {
            number,
            resident,
            wanted,
        })
    }

    /// Cancels the request: reading stops soon, and all memory is unlocked.
    pub(crate) fn cool(&self) {
        self.stop(false);
    }

    /// Does the same, and accepts no more requests.
    pub(crate) fn end(&self) {
        self.stop(true);
    }

    fn stop(&self, for_good: bool) {
        let mut state = self.state();
        state.last_request += 1;
        self.file.set_pinned(false);
        state.progress = None;
        state.over |= for_good;
        let locked = std::mem::take(&mut state.locked);
        drop(state);
        drop(locked);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.state().over
    }

    /// Changes the locks and the progress, if `request` is still the last request. Returns `false` if it is not.
    pub(crate) fn update(&self, request: &WarmRequest, change: impl FnOnce(&mut Vec<Locked>, &mut Progress)) -> bool {
        let mut state = self.state();
        if state.last_request != request.number {
            return false;
        }
        let Some(mut progress) = state.progress.take() else {
            return false;
        };
        change(&mut state.locked, &mut progress);
        state.progress = Some(progress);
        true
    }
}
