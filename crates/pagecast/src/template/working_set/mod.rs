//! The pages that the forks of a template touch soon after they have resumed.

#[cfg(target_os = "linux")]
mod file;
mod plan;
mod recording;
mod runs;
mod score;

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;

use pagecast_uffd::ByteLen;

use super::run::{Run, TemplateOffset};
use crate::page::PageSize;
pub use plan::{Planned, PrefaultPlan};
pub use recording::Recording;
pub(super) use score::Tallies;
pub use score::{PrefaultScore, PrefaultTally};

/// How much the weight of a page grows with each recording that has it. Each recording without it takes 1 away. So a
/// page stays if at least a third of the forks touch it: installing a page ahead costs a fraction of a fault.
const GAIN: u8 = 2;

/// The maximum weight. A page that all forks have touched is forgotten after this many forks that did not.
const MOST_WEIGHT: u8 = 3 * GAIN;

/// Ranks are below this.
const RANKS: u32 = 1 << 24;

/// The pages that forks of a template touch soon after they have resumed, in first-touch order, at 4 KiB. Merged over
/// recordings: a page that forks stop touching is forgotten.
///
/// At most [`Recording::MOST_PAGES`] pages, which take 12 bytes each, and 16 for each [`Run`].
#[derive(Clone, PartialEq, Eq)]
pub struct WorkingSet {
    template: ByteLen,
    recordings: u32,
    /// Each page once, in ascending [order](Entry::order).
    entries: Vec<Entry>,
    /// The result of [`runs::merged`] for `entries`.
    runs: Box<[Run]>,
}

/// A page of a working set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// The number of the small page within the template.
    page: u32,
    /// How early the page is touched, below [`RANKS`]; 0 is first. Relative to the length of a recording, so that
    /// recordings of different length can be merged.
    rank: u32,
    /// 1 to [`MOST_WEIGHT`]: how often the page was touched lately.
    weight: u8,
}

impl Entry {
    /// The sort key of entries.
    fn order(&self) -> (u32, u32) {
        (self.rank, self.page)
    }
}

impl WorkingSet {
    /// Creates the working set of one recording.
    pub fn of(recording: &Recording) -> Self {
        let entries = ranked(recording).map(|(page, rank)| Entry {
            page,
            rank,
            weight: GAIN,
        });
        Self::from_entries(recording.template(), 1, entries.collect())
    }

    /// Learns from another recording of the same template. Its pages gain weight and move towards their place in it.
    /// All other pages lose weight, and are forgotten after a few recordings without them. If there are too many pages,
    /// those with the least weight are forgotten, the last of them first.
    ///
    /// A recording that it [cannot learn from](Self::learns_from) changes nothing.
    pub fn merge(&mut self, recording: &Recording) {
        if !self.learns_from(recording) {
            return;
        }
        let mut touched: HashMap<u32, u32> = ranked(recording).collect();
        let mut entries = std::mem::take(&mut self.entries);
        entries.retain_mut(|entry| {
            if let Some(rank) = touched.remove(&entry.page) {
                let weight = u32::from(entry.weight);
                // The mean of both ranks, the old one weighted. No overflow: both ranks have 24 bits.
                entry.rank = (entry.rank * weight + rank) / (weight + 1);
                entry.weight = (entry.weight + GAIN).min(MOST_WEIGHT);
            } else {
                entry.weight -= 1;
            }
            entry.weight > 0
        });
        entries.extend(touched.into_iter().map(|(page, rank)| Entry {
            page,
            rank,
            weight: GAIN,
        }));
        if entries.len() > Recording::MOST_PAGES {
            entries.sort_unstable_by_key(|entry| (Reverse(entry.weight), entry.order()));
            entries.truncate(Recording::MOST_PAGES);
        }
        entries.sort_unstable_by_key(Entry::order);
        *self = Self::from_entries(self.template, self.recordings.saturating_add(1), entries);
    }

    /// Returns `true` if a recording can be learned from. It must not be empty, and must be of a template of the same
    /// length. A recording that was [cut short](Recording::is_cut_short) needs at least half as many pages as this set.
    /// In a shorter one, the fork had hardly begun, so a missing page means nothing. If all forks end early, their
    /// recordings are about equally long.
    pub fn learns_from(&self, recording: &Recording) -> bool {
        let is_too_short = recording.is_cut_short() && recording.len() < self.entries.len() / 2;
        !recording.is_empty() && recording.template() == self.template && !is_too_short
    }

    /// `entries` are sorted, and each page is there once.
    fn from_entries(template: ByteLen, recordings: u32, entries: Vec<Entry>) -> Self {
        let runs = runs::merged(&entries).into();
        Self {
            template,
            recordings,
            entries,
            runs,
        }
    }

    /// The length of the template in bytes.
    pub fn template(&self) -> ByteLen {
        self.template
    }

    /// The number of recordings that it was learned from.
    pub fn recordings(&self) -> u32 {
        self.recordings
    }

    /// The number of bytes in its pages.
    pub fn size(&self) -> ByteLen {
        ByteLen::new(self.entries.len() as u64 * PageSize::SMALLEST)
    }

    /// Returns `true` if it has no page.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Its pages in first-touch order.
    pub fn pages(&self) -> impl ExactSizeIterator<Item = TemplateOffset> + '_ {
        self.entries
            .iter()
            .map(|entry| TemplateOffset::new(u64::from(entry.page) * PageSize::SMALLEST))
    }

    /// Its pages as runs, in the order in which to install them, each page once. A run stays within an aligned 256 KiB,
    /// and is as long as the working set allows. Runs are in the order of their first touched page.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }
}

impl fmt::Debug for WorkingSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkingSet")
            .field("template", &self.template)
            .field("recordings", &self.recordings)
            .field("pages", &self.entries.len())
            .field("runs", &self.runs.len())
            .finish_non_exhaustive()
    }
}

/// Each page of `recording` with its rank.
fn ranked(recording: &Recording) -> impl Iterator<Item = (u32, u32)> + '_ {
    let pages = recording.len().max(1) as u64;
    recording.numbers().zip(0u64..).map(move |(page, index)| {
        // Below `RANKS`, because the index is below the number of pages.
        let rank = u32::try_from(index * u64::from(RANKS) / pages).unwrap_or(RANKS - 1);
        (page, rank)
    })
}

#[cfg(test)]
mod tests;
