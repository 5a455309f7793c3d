//! Installs the pages around a fault, if the session expects them to be used and their bytes are at hand.

use std::time::Instant;

use pagecast_uffd::Outcome;

use super::{End, Scratch, ServedFork, Tried};
use crate::page::PageSize;
use crate::session::{Content, Install};
use crate::template::{Page, is_zero};

impl ServedFork {
    /// Answers a fault together with its neighbours. Returns `false` if it is to be answered alone.
    pub(super) fn install_around(
        &mut self,
        fault: &Install,
        scratch: &mut Scratch,
        since: Instant,
    ) -> Result<bool, End> {
        if self.context.fault_around < 2
            || fault.page_size != PageSize::Small
            || fault.content == Content::Zeros
            || self.first_faults.is_recording()
        {
            return Ok(false);
        }
        let (zeros, first_faults) = (self.template.zeros(), &self.first_faults);
        let is_wanted = |at| !zeros.covers(at, PageSize::Small.len()) && !first_faults.holds_out(at);
        let Some(install) = self.session.plan_around(fault, self.context.fault_around, is_wanted) else {
            return Ok(false);
        };
        Ok(self.copy_ahead(install, Some(fault), scratch, since)? == Some(Outcome::Installed))
    }

    /// Installs the rest of the window that was planned last.
    pub(super) fn install_ahead(&mut self, scratch: &mut Scratch, since: Instant) -> Result<(), End> {
        while let Some(install) = self.session.next_ahead() {
            self.copy_ahead(install, None, scratch, since)?;
        }
        Ok(())
    }

    /// Copies pages of a window, with the one of `fault` if there is one, as far as their bytes can be had without waiting.
    fn copy_ahead(
        &mut self,
        mut install: Install,
        fault: Option<&Install>,
        scratch: &mut Scratch,
        since: Instant,
    ) -> Result<Option<Outcome>, End> {
        let Some(tried) = self.copy_at_hand(&mut install, fault, scratch)? else {
            self.session.give_up_ahead();
            return Ok(None);
        };
        let installed = self.session.on_ahead(&install, tried.outcome);
        let asked = usize::from(fault.is_some()).min(installed);
        self.record.counters.around.add((installed - asked) as u64);
        if fault.is_some() && tried.outcome == Outcome::Installed {
            self.note_answered(&tried, since, scratch);
        }
        Ok(Some(tried.outcome))
    }

    /// Copies `install`, which it cuts to its data.
    fn copy_at_hand(
        &self,
        install: &mut Install,
        fault: Option<&Install>,
        scratch: &mut Scratch,
    ) -> Result<Option<Tried>, End> {
        let Content::Template(from) = install.content else {
            return Ok(None);
        };
        if let Some(tried) = self.copy_mapped(install, from, scratch)? {
            return Ok(Some(tried));
        }
        let source = self.template.source();
        let buffer = scratch.bytes.first(install.bytes());
        // A failed read is handled where the fault is answered alone.
        let Ok(Page::Bytes(mut bytes)) = source.try_read(from, buffer) else {
            return Ok(None);
        };
        if source.check_unchanged().is_err() {
            return Ok(None);
        }
        if !self.template.zeros_are_known() {
            let first = fault.map_or(0, |fault| fault.pages_after(install));
            let Some((data, cut)) = data_around(bytes, first) else {
                return Ok(None);
            };
            let Some(rest) = install.after(data / PageSize::Small.as_usize()) else {
                return Ok(None);
            };
            *install = rest.truncated(cut.len() / PageSize::Small.as_usize());
            bytes = cut;
        }
        Ok(Some(self.copy(install, bytes)))
    }
}

/// The pages of data around page number `first`, and where they begin in `bytes`. `None` if that page is zeros.
fn data_around(bytes: &[u8], first: usize) -> Option<(usize, &[u8])> {
    let page = PageSize::Small.as_usize();
    let (before, after) = bytes.split_at_checked(first * page)?;
    let ahead = after.chunks_exact(page).take_while(|page| !is_zero(page)).count();
    let behind = before.rchunks_exact(page).take_while(|page| !is_zero(page)).count();
    let start = (first - behind) * page;
    let data = bytes.get(start..(first + ahead) * page)?;
    (ahead > 0).then_some((start, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_data_around_a_page_is_taken() {
        let page = PageSize::Small.as_usize();
        let bytes: Vec<u8> = [0, 1, 2, 0, 3, 4].iter().flat_map(|byte| vec![*byte; page]).collect();
        let found = |first| data_around(&bytes, first).map(|(start, data)| (start / page, data.len() / page));
        assert_eq!(found(0), None);
        assert_eq!(found(1), Some((1, 2)));
        assert_eq!(found(2), Some((1, 2)));
        assert_eq!(found(3), None);
        assert_eq!(found(5), Some((4, 2)));
        assert_eq!(found(6), None);
        assert_eq!(found(7), None);
    }
}
