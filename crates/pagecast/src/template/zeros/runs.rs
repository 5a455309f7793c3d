//! The runs of zeros of a template that are worth giving back to the kernel.

use std::sync::Arc;

use crate::page::PageSize;
use crate::template::run::Run;

/// The shortest run that is given back, in pages: 64 KiB. Unregistering takes as long as answering a fault or two, and a
/// shorter run saves few.
const SHORTEST: usize = 16;

/// The most runs of one fork that are given back, the longest ones. Each splits a mapping in two or three; a process may
/// have 65,530 (`vm.max_map_count`), and each takes some 200 bytes of the kernel.
const MOST: usize = 512;

/// The longest runs of zeros of a template, longest first. Chosen once, and shared by all of its forks.
#[derive(Clone, Debug)]
pub struct ZeroRuns {
    runs: Arc<[Run]>,
    /// The shortest part of a run that is worth giving back, in pages.
    shortest: usize,
}

impl ZeroRuns {
    /// Chooses the runs of `zeros` that are worth giving back.
    pub fn of(zeros: impl IntoIterator<Item = Run>) -> Self {
        Self::bounded(zeros, SHORTEST, MOST)
    }

    pub(crate) fn bounded(zeros: impl IntoIterator<Item = Run>, shortest: usize, most: usize) -> Self {
        let is_long = |run: &Run| run.len.get() >= shortest as u64 * PageSize::SMALLEST;
        let mut runs: Vec<Run> = zeros.into_iter().filter(is_long).collect();
        runs.sort_by_key(|run| std::cmp::Reverse(run.len));
        runs.truncate(most);
        Self {
            runs: runs.into(),
            shortest,
        }
    }

    /// The run with this number; 0 is the longest.
    pub(crate) fn get(&self, number: usize) -> Option<Run> {
        self.runs.get(number).copied()
    }

    /// The shortest part of a run that is worth giving back, in pages.
    pub(crate) fn shortest(&self) -> usize {
        self.shortest
    }
}

impl Default for ZeroRuns {
    /// No runs.
    fn default() -> Self {
        Self::of([])
    }
}

#[cfg(test)]
mod tests {
    use pagecast_uffd::ByteLen;

    use super::*;
    use crate::template::run::TemplateOffset;

    fn run(first: u64, pages: u64) -> Run {
        Run {
            at: TemplateOffset::new(first * PageSize::SMALLEST),
            len: ByteLen::new(pages * PageSize::SMALLEST),
        }
    }

    #[test]
    fn the_longest_are_chosen_and_none_that_is_too_short() {
        let all = [run(0, 4), run(10, 1), run(20, 9), run(40, 2), run(50, 4)];
        let chosen = |most| {
            let runs = ZeroRuns::bounded(all, 2, most);
            (0..).map_while(|number| runs.get(number)).collect::<Vec<_>>()
        };
        assert_eq!(chosen(2), [run(20, 9), run(0, 4)]);
        assert_eq!(chosen(9), [run(20, 9), run(0, 4), run(50, 4), run(40, 2)]);
    }
}
