//! Templates in memory ahead of their forks: brought into the page cache, and kept there where that is asked for.
//!
//! What is locked is locked by a mapping of this process, so it ends with it, however it ends. Nothing else is changed on the
//! host: the memory file, its inode and whoever guards it stay the same.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagecast::template::{Locked, MemFile, Wanted};
use pagecast_client::template::{Warmth as Told, WarmthState};

/// How far a template has been brought into memory, and what keeps it there.
pub(crate) struct Warmth {
    file: Arc<MemFile>,
    state: Mutex<State>,
    /// Held by whoever changes what is wanted and keeps that in the run dir, so that both happen in one order.
    pub(crate) asking: Mutex<()>,
    /// A thread reads ahead of forks with `file`.
    pub(crate) reading_ahead: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Counts what was wished for: whoever works for an earlier wish stops.
    wish: u64,
    told: Option<Told>,
    locked: Vec<Locked>,
    /// The template is gone, or no longer what it was: nothing is wished for any more.
    over: bool,
}

/// A wish that was taken down, to be fulfilled.
#[derive(Debug)]
pub(crate) struct Wish {
    number: u64,
    pub(crate) resident: bool,
    pub(crate) wanted: Wanted,
}

impl Warmth {
    pub(crate) fn new(file: Arc<MemFile>) -> Self {
        Self {
            file,
            state: Mutex::default(),
            asking: Mutex::default(),
            reading_ahead: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is said of it.
    pub(crate) fn told(&self) -> Option<Told> {
        self.state().told.clone()
    }

    /// Takes down what is wished for from now on. What was locked for an earlier wish is let go. `None` where it is over.
    pub(crate) fn wish(&self, wanted: Wanted, resident: bool) -> Option<Wish> {
        let mut state = self.state();
        if state.over {
            return None;
        }
        state.wish += 1;
        self.file.set_pinned(false);
        state.told = Some(Told {
            state: WarmthState::Warming,
            resident,
            wanted_bytes: wanted.size().get(),
            read_bytes: 0,
            huge_bytes: 0,
            locked_bytes: 0,
            error: None,
        });
        let number = state.wish;
        // Unmapping much takes a while.
        let locked = std::mem::take(&mut state.locked);
        drop(state);
        drop(locked);
        Some(Wish {
            number,
            resident,
            wanted,
        })
    }

    /// Nothing is wished for: whoever reads stops soon, and nothing is locked any more.
    pub(crate) fn cool(&self) {
        self.stop(false);
    }

    /// The same, for good.
    pub(crate) fn end(&self) {
        self.stop(true);
    }

    fn stop(&self, for_good: bool) {
        let mut state = self.state();
        state.wish += 1;
        self.file.set_pinned(false);
        state.told = None;
        state.over |= for_good;
        let locked = std::mem::take(&mut state.locked);
        drop(state);
        drop(locked);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.state().over
    }

    /// Changes what is locked and what is said, if the wish is still the last. Returns `false` if it is not.
    pub(crate) fn tell(&self, wish: &Wish, change: impl FnOnce(&mut Vec<Locked>, &mut Told)) -> bool {
        let mut state = self.state();
        if state.wish != wish.number {
            return false;
        }
        let Some(mut told) = state.told.take() else {
            return false;
        };
        change(&mut state.locked, &mut told);
        state.told = Some(told);
        true
    }
}
