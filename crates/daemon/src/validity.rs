//! Whether a template has changed since it was added.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Whether a template can be forked, and whether its forks are being ended.
#[derive(Debug, Default)]
pub(crate) struct Validity(Mutex<State>);

/// The state only moves down this list. The first reason stays.
#[derive(Debug, Default)]
enum State {
    /// No change is known.
    #[default]
    Valid,
    /// The template has changed in the given way, and cannot be forked.
    Changed(Arc<str>),
    /// The template has changed, and its forks are ended or being ended.
    Withdrawn(Arc<str>),
}

/// The treatment of the forks of a changed template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Forks {
    /// They are left alone for now.
    Left,
    /// They must be ended.
    Ended,
}

impl Validity {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the template has changed, as described by `how`. Returns `true` once: to the caller that must end its
    /// forks.
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

    /// Describes how the template has changed; `None` if no change is known.
    pub(crate) fn change(&self) -> Option<Arc<str>> {
        match &*self.state() {
            State::Valid => None,
            State::Changed(how) | State::Withdrawn(how) => Some(Arc::clone(how)),
        }
    }

    /// Returns `true` if the forks of the template are ended, or being ended.
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
