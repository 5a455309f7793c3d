//! The pages of a working set, merged into as few runs as their order allows.

use pagecast_uffd::ByteLen;

use super::Entry;
use crate::page::{PageIndex, PageSize};
use crate::page_set::PageSet;
use crate::template::run::{Run, TemplateOffset};

/// The size of an aligned chunk, which no run crosses, in small pages. These 256 KiB are installed at the full speed of
/// the kernel, and hold up a demand fault for some tens of microseconds.
const CHUNK_PAGES: usize = 64;

/// Merges `entries` into runs: each page takes along its neighbours that are not yet in a run.
pub(super) fn merged(entries: &[Entry]) -> Vec<Run> {
    let pages = entries.iter().map(|entry| entry.page as usize + 1).max().unwrap_or(0);
    let mut left = PageSet::new(pages);
    for entry in entries {
        left.insert(PageIndex::new(entry.page as usize));
    }
    let mut runs = Vec::new();
    for entry in entries {
        let page = entry.page as usize;
        let is_left = |page: &usize| left.contains(PageIndex::new(*page));
        if !is_left(&page) {
            continue;
        }
        let chunk = page - page % CHUNK_PAGES;
        let before = (chunk..page).rev().take_while(is_left).count();
        let from = (page..chunk + CHUNK_PAGES).take_while(is_left).count();
        left.remove_run(PageIndex::new(page - before), before + from);
        runs.push(Run {
            at: TemplateOffset::new((page - before) as u64 * PageSize::SMALLEST),
            len: ByteLen::new((before + from) as u64 * PageSize::SMALLEST),
        });
    }
    runs
}
