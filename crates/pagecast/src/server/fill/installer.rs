//! Installs one fill, on any thread: reads and installs, and decides nothing.

use pagecast_uffd::{MappedRange, Outcome, Uffd};

use crate::page::PageSize;
use crate::server::hugepages::presence;
use crate::server::read_buffer::ReadBuffer;
use crate::session::{Content, Fill, Install};
use crate::template::{MappedPages, Page, PageSource, SourceError, TemplateOffset, leading_zero_pages};

/// Installs fills on one thread.
pub(super) struct Installer<'a> {
    pub(super) uffd: &'a Uffd,
    /// The VMM.
    pub(super) pid: i32,
    pub(super) source: &'a dyn PageSource,
    pub(super) mapping: Option<&'a dyn MappedPages>,
    /// The zero map is complete: a page that is not in it holds data.
    pub(super) zeros_are_known: bool,
    /// A huge page of zeros.
    pub(super) zeros: &'a [u8],
    pub(super) buffer: &'a mut ReadBuffer,
}

/// The result for a part of a fill.
#[derive(Debug)]
pub(in crate::server) enum Done {
    /// Its install was tried.
    Tried {
        part: Install,
        zeros: bool,
        outcome: Outcome,
    },
    /// It is zeros, and needs no install.
    Skipped(Install),
    /// Its bytes are not there yet. Nothing after it is done.
    NotReady,
    /// Its bytes cannot be read. Nothing after it is done.
    Unreadable(SourceError),
    /// It was installed, but the check whether it is the template's has failed.
    Unverified(SourceError),
}

impl Done {
    /// Returns `true` if nothing after it was done.
    pub(super) fn is_stuck(&self) -> bool {
        match self {
            Self::Tried { outcome, .. } => !matches!(outcome, Outcome::Installed | Outcome::AlreadyPresent),
            Self::Skipped(_) => false,
            Self::NotReady | Self::Unreadable(_) | Self::Unverified(_) => true,
        }
    }
}

/// The bytes of a part.
#[derive(Clone, Copy)]
enum Bytes<'a> {
    /// All zeros.
    Zero,
    Read(&'a [u8]),
    /// In the page cache.
    Mapped(MappedRange<'a>),
}

impl Installer<'_> {
    /// Installs the parts of `fill` in order, up to the first that cannot be installed. Uses `bytes`, if they are
    /// given, as the bytes of the whole fill; else the bytes that the source has ready.
    pub(super) fn carry_out(&mut self, fill: &Fill, parts: &[Install], bytes: Option<&[u8]>) -> Vec<Done> {
        let mut done = Vec::new();
        let mut buffer = std::mem::take(self.buffer);
        for part in parts {
            let found = match bytes {
                Some(bytes) => {
                    let start = fill.position_of(part);
                    Ok(Bytes::Read(bytes.get(start..start + part.bytes()).unwrap_or_default()))
                }
                None => self.find(fill, part, &mut buffer),
            };
            match found {
                Ok(bytes) => {
                    let goes_on = self.install(fill, *part, bytes, &mut done);
                    if let Bytes::Mapped(range) = bytes {
                        range.release();
                    }
                    if goes_on {
                        continue;
                    }
                }
                Err(stop) => done.push(stop),
            }
            break;
        }
        *self.buffer = buffer;
        done
    }

    /// Finds the bytes of a part, if they are ready.
    fn find<'a>(&'a self, fill: &Fill, part: &Install, buffer: &'a mut ReadBuffer) -> Result<Bytes<'a>, Done> {
        let Content::Template(from) = part.content else {
            return Ok(Bytes::Zero);
        };
        // Pages that other forks have touched are usually data, and need no search for zeros either.
        if (fill.is_planned || self.zeros_are_known)
            && let Some(mapping) = self.mapping
            && let Some(range) = mapping.resident_run(from, part.to.len())
        {
            return Ok(Bytes::Mapped(range));
        }
        let page = self.source.try_read(from, buffer.first(part.bytes()));
        match page.map_err(Done::Unreadable)? {
            Page::NotReady => Err(Done::NotReady),
            Page::Zero => Ok(Bytes::Zero),
            Page::Bytes(bytes) => Ok(Bytes::Read(bytes)),
        }
    }

    /// Installs one part, piece by piece, zeros as zeros. Returns `true` to continue with the next part.
    fn install(&self, fill: &Fill, part: Install, bytes: Bytes<'_>, done: &mut Vec<Done>) -> bool {
        // Checked after reading and before the VMM gets the bytes, so they are the template's.
        if let Err(error) = self.source.check_unchanged() {
            done.push(Done::Unreadable(error));
            return false;
        }
        let mut left = Some(part);
        while let Some(rest) = left {
            let Some((piece, bytes)) = self.next_piece(part, rest, bytes) else {
                // Never: a part is as long as its bytes. In that case the bytes would be read anew.
                done.push(Done::NotReady);
                return false;
            };
            let (piece, outcome) = match bytes {
                Bytes::Zero if fill.skips_zeros => {
                    done.push(Done::Skipped(piece));
                    left = rest.after(piece.pages);
                    continue;
                }
                Bytes::Zero => self.install_zeros(piece),
                Bytes::Read(bytes) => (piece, self.uffd.copy(piece.to.start(), bytes)),
                Bytes::Mapped(range) => (piece, self.uffd.copy_mapped(piece.to.start(), range)),
            };
            // The bytes were read by the install, so they can be checked only now. If they are not the template's, the
            // VMM is killed before it uses them.
            if matches!(bytes, Bytes::Mapped(_))
                && let Err(error) = self.source.check_unchanged()
            {
                done.push(Done::Unverified(error));
                return false;
            }
            let outcome = presence::settle(outcome, piece.page_size, piece.to, self.pid);
            done.push(Done::Tried {
                part: piece,
                zeros: matches!(bytes, Bytes::Zero),
                outcome,
            });
            left = match outcome {
                Outcome::Installed => rest.after(piece.pages),
                // Only the first page is known to be present.
                Outcome::AlreadyPresent => rest.after(1),
                _ => return false,
            };
        }
        true
    }

    /// The first pages of `rest`, the remainder of `part`, that are all zeros or all data, and their bytes.
    fn next_piece<'a>(&self, part: Install, rest: Install, bytes: Bytes<'a>) -> Option<(Install, Bytes<'a>)> {
        let start = part.bytes() - rest.bytes();
        match bytes {
            Bytes::Zero => Some((rest, Bytes::Zero)),
            Bytes::Read(bytes) => {
                let bytes = bytes.get(start..part.bytes())?;
                let (zeros, pages) = leading_zero_pages(bytes, rest.page_size);
                let piece = rest.truncated(pages);
                if zeros {
                    return Some((piece, Bytes::Zero));
                }
                Some((piece, Bytes::Read(bytes.get(..piece.bytes())?)))
            }
            Bytes::Mapped(range) => {
                let (zeros, pages) = self.known_zero_pages(rest);
                let piece = rest.truncated(pages);
                if zeros {
                    return Some((piece, Bytes::Zero));
                }
                Some((piece, Bytes::Mapped(range.part(start as u64, piece.to.len())?)))
            }
        }
    }

    /// Returns whether the first page of `rest` is known to be zeros, and how many pages share that.
    fn known_zero_pages(&self, rest: Install) -> (bool, usize) {
        let Content::Template(from) = rest.content else {
            return (true, rest.pages);
        };
        let page = rest.page_size.len();
        let zeros = self.source.zeros();
        let known = |index: usize| {
            let at = TemplateOffset::new(from.get() + index as u64 * page.get());
            zeros.covers(at, page)
        };
        let first = known(0);
        (
            first,
            1 + (1..rest.pages).take_while(|index| known(*index) == first).count(),
        )
    }

    /// Installs zeros; at most one huge page at a time.
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
