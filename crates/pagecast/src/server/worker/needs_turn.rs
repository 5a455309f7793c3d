//! The forks of a worker that need a turn without an event.

/// The forks with a pending retry, read or fill. There is usually none, and then the cost of a fault does not depend on
/// the number of forks.
#[derive(Debug, Default)]
pub(super) struct NeedsTurn {
    slots: Vec<usize>,
    /// For each slot, whether it is in `slots`.
    is_noted: Vec<bool>,
    /// Where the next round of fills begins, so that all forks get their turn.
    next_to_fill: usize,
}

impl NeedsTurn {
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    pub(super) fn contains(&self, slot: usize) -> bool {
        self.is_noted.get(slot).copied().unwrap_or(false)
    }

    /// Notes a fork, if it is not noted yet.
    pub(super) fn insert(&mut self, slot: usize) {
        if self.is_noted.len() <= slot {
            self.is_noted.resize(slot + 1, false);
        }
        if let Some(is_noted) = self.is_noted.get_mut(slot).filter(|is_noted| !**is_noted) {
            *is_noted = true;
            self.slots.push(slot);
        }
    }

    /// Keeps the forks that still need a turn.
    pub(super) fn retain(&mut self, needs_turn: impl Fn(usize) -> bool) {
        let is_noted = &mut self.is_noted;
        self.slots.retain(|slot| {
            let stays = needs_turn(*slot);
            if let Some(is_noted) = is_noted.get_mut(*slot) {
                *is_noted = stays;
            }
            stays
        });
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = usize> {
        self.slots.iter().copied()
    }

    /// The next fork to fill, of those that `wants_to_fill` accepts.
    pub(super) fn next_to_fill(&mut self, wants_to_fill: impl Fn(usize) -> bool) -> Option<usize> {
        let filling = || self.slots().filter(|slot| wants_to_fill(*slot));
        let next = filling().filter(|slot| *slot >= self.next_to_fill).min();
        let slot = next.or_else(|| filling().min())?;
        self.next_to_fill = slot + 1;
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_is_noted_once_until_it_needs_no_turn() {
        let mut needs_turn = NeedsTurn::default();
        for slot in [3, 0, 3] {
            needs_turn.insert(slot);
        }
        assert_eq!(needs_turn.slots().collect::<Vec<_>>(), [3, 0]);
        needs_turn.retain(|slot| slot != 3);
        assert!(needs_turn.contains(0) && !needs_turn.contains(3) && !needs_turn.contains(7));
        needs_turn.insert(3);
        assert_eq!(needs_turn.slots().collect::<Vec<_>>(), [0, 3]);
    }

    #[test]
    fn forks_are_filled_by_turns() {
        let mut needs_turn = NeedsTurn::default();
        for slot in [5, 1, 3, 2] {
            needs_turn.insert(slot);
        }
        let mut filled = || needs_turn.next_to_fill(|slot| slot != 2).unwrap();
        assert_eq!([(); 4].map(|()| filled()), [1, 3, 5, 1]);
        assert_eq!(needs_turn.next_to_fill(|_| false), None);
    }
}
