//! Whether a template is still what it was when it was added.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Whether a template can be forked, and what becomes of its forks if it cannot.
#[derive(Debug, Default)]
pub(crate) struct Validity(Mutex<State>);

/// Only ever moves down this list. The first reason stays.
#[derive(Debug, Default)]
enum State {
    /// No change is known.
    #[default]
    Valid,
    /// The template has changed in the way that is told, and cannot be forked.
    Changed(Arc<str>),
    /// The template has changed, and its forks are ended or being ended.
    Withdrawn(Arc<str>),
}

/// What becomes of the forks of a template that has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Forks {
    /// They are left alone for now.
    Left,
    /// They are to be ended.
    Ended,
}

impl Validity {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The template has changed, `how` says in what way. Returns `true` once: to the caller that has to end its forks.
    pub(crate) fn invalidate(&self, how: &str, forks: Forks) -> bool {
        let mut state = self.state();
        let first = match &*state {
            State::Valid => how.into(),
            State::Changed(first) => Arc::clone(first),
            State::Withdrawn(_) => return false,
        };
        let ends_forks = forks == Forks::Ended;
        *state = if ends_forks {
            State::Withdrawn(first)
        } else {
            State::Changed(first)
        };
        ends_forks
    }

    /// In what the template has changed, as far as that was noticed.
    pub(crate) fn change(&self) -> Option<Arc<str>> {
        match &*self.state() {
            State::Valid => None,
            State::Changed(how) | State::Withdrawn(how) => Some(Arc::clone(how)),
        }
    }

    /// Whether the forks of the template are ended, or being ended.
    pub(crate) fn is_withdrawn(&self) -> bool {
        matches!(&*self.state(), State::Withdrawn(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_caller_ends_the_forks_and_the_first_reason_stays() {
        let validity = Validity::default();
        assert!(validity.change().is_none() && !validity.is_withdrawn());
        assert!(!validity.invalidate("first", Forks::Left));
        assert!(!validity.is_withdrawn());
        assert!(validity.invalidate("second", Forks::Ended));
        assert!(validity.is_withdrawn());
        assert!(!validity.invalidate("third", Forks::Ended));
        assert!(!validity.invalidate("fourth", Forks::Left));
        assert!(validity.is_withdrawn());
        assert_eq!(validity.change().as_deref(), Some("first"));
    }
}
