//! One piece of a fill being installed, on whatever thread: reads and installs, and decides nothing.

use pagecast_uffd::{Outcome, Uffd};

use crate::page::PageSize;
use crate::session::{Content, Fill, Install};
use crate::template::{Page, PageSource, SourceError, leading_zero_pages};

/// What a lane works with.
pub(super) struct Lane<'a> {
    pub(super) uffd: &'a Uffd,
    pub(super) source: &'a dyn PageSource,
    /// A huge page of zeros.
    pub(super) zeros: &'a [u8],
    /// Room for a whole fill.
    pub(super) room: &'a mut Vec<u8>,
}

/// What was done about a part of a fill.
#[derive(Debug)]
pub(super) enum Done {
    /// It was tried to install it.
    Tried {
        part: Install,
        zeros: bool,
        outcome: Outcome,
    },
    /// It is zeros, and need not be installed.
    Skipped(Install),
    /// Its bytes are not there yet, nor is anything after it done.
    NotReady,
    /// Its bytes cannot be had, nor is anything after it done.
    Unreadable(SourceError),
}

impl Lane<'_> {
    /// Installs the parts of `fill` in order, up to the first that cannot be: with `bytes`, which are those of the whole
    /// fill, else with what the source has ready.
    pub(super) fn carry_out(&mut self, fill: &Fill, parts: &[Install], bytes: Option<&[u8]>) -> Vec<Done> {
        let mut done = Vec::new();
        for part in parts {
            let Content::Template(from) = part.content else {
                continue;
            };
            let mut room = std::mem::take(self.room);
            let page = match bytes {
                Some(bytes) => {
                    let start = fill.position_of(part);
                    Ok(Page::Bytes(bytes.get(start..start + part.bytes()).unwrap_or_default()))
                }
                None => self.source.try_read(from, super::room(&mut room, part.bytes())),
            };
            // After reading, before anybody sees it: what was read is the template's.
            let page = page.and_then(|page| self.source.check_unchanged().map(|()| page));
            let goes_on = match page {
                Ok(page) => self.install(fill, *part, page, &mut done),
                Err(error) => {
                    done.push(Done::Unreadable(error));
                    false
                }
            };
            *self.room = room;
            if !goes_on {
                break;
            }
        }
        done
    }

    /// Installs one part, zeros as zeros. Whether to go on.
    fn install(&self, fill: &Fill, part: Install, page: Page<'_>, done: &mut Vec<Done>) -> bool {
        let mut left = Some(part);
        while let Some(part_left) = left {
            let (piece, bytes) = match page {
                Page::NotReady => {
                    done.push(Done::NotReady);
                    return false;
                }
                Page::Zero => (part_left, None),
                Page::Bytes(bytes) => {
                    let start = part.bytes() - part_left.bytes();
                    let bytes = bytes.get(start..).unwrap_or_default();
                    let (zeros, pages) = leading_zero_pages(bytes, part.page_size);
                    let piece = part_left.truncated(pages);
                    (piece, bytes.get(..piece.bytes()).filter(|_| !zeros))
                }
            };
            let tried = match bytes {
                Some(bytes) => Some((piece, self.uffd.copy(piece.to.start(), bytes))),
                None if fill.skips_zeros => None,
                None => Some(self.install_zeros(piece)),
            };
            let passed = match tried {
                None => {
                    done.push(Done::Skipped(piece));
                    piece.pages
                }
                Some((part, outcome)) => {
                    done.push(Done::Tried {
                        part,
                        zeros: bytes.is_none(),
                        outcome,
                    });
                    match outcome {
                        Outcome::Installed => part.pages,
                        // Its first page is; the next may not be.
                        Outcome::AlreadyPresent => 1,
                        _ => return false,
                    }
                }
            };
            left = part_left.after(passed);
        }
        true
    }

    /// One huge page of zeros at a time.
    fn install_zeros(&self, piece: Install) -> (Install, Outcome) {
        match piece.page_size {
            PageSize::Small => (piece, self.uffd.zeropage(piece.to)),
            PageSize::Huge => {
                let piece = piece.truncated(1);
                (piece, self.uffd.copy(piece.to.start(), self.zeros))
            }
        }
    }
}
