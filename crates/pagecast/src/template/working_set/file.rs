//! A working set beside its mem-file: `MEM-FILE.working-set`.
//!
//! The body follows the head that all such files have (see the module `sidecar`):
//!
//! | bytes | what |
//! | --- | --- |
//! | 4 | how many recordings it was learned from |
//! | 8 for each page | the number of the small page, then rank × 256 + weight, 4 bytes each |
//!
//! Pages are in ascending order of rank, then of number. Each is there once, and the template has it.

use std::path::{Path, PathBuf};

use super::{Entry, MOST_WEIGHT, WorkingSet};
use crate::page::{PageIndex, PageSize};
use crate::page_set::PageSet;
use crate::template::content::Says;
use crate::template::sidecar::{self, Kind};
use crate::template::{ContentIdentity, Recording, SidecarError};

const KIND: Kind = Kind {
    tag: *b"WSET",
    suffix: ".working-set",
    says: Says::Advice,
};

/// How many bytes an entry has.
const ENTRY: usize = 8;

/// How many bytes precede the entries.
const COUNTS: usize = 4;

/// The maximum length of a body in bytes.
const MOST_BODY: u64 = (COUNTS + Recording::MOST_PAGES * ENTRY) as u64;

impl WorkingSet {
    /// The path of the working set of the mem-file at this path: beside it.
    pub fn path_for(mem_file: &Path) -> PathBuf {
        KIND.path(mem_file)
    }

    /// Reads the working set of a template with this `content`; the ctime of its mem-file may differ. It is only a
    /// hint, but costs memory. So only files that our user or root has written are accepted.
    ///
    /// # Errors
    ///
    /// [`SidecarError`]; then there is no working set to prefault, and nothing else is lost.
    pub fn load(path: &Path, content: &ContentIdentity) -> Result<Self, SidecarError> {
        Self::parse(&sidecar::read(path, MOST_BODY, None)?, content)
    }

    /// Writes the file for templates with this `content`. After a failure, the file is either whole or as before.
    ///
    /// # Errors
    ///
    /// [`SidecarError::Io`].
    pub fn save(&self, path: &Path, content: &ContentIdentity) -> Result<(), SidecarError> {
        KIND.write(path, content, &self.body())
    }

    /// Parses the bytes of such a file, without regard to its owner.
    ///
    /// # Errors
    ///
    /// [`SidecarError`], but never one of the file system.
    pub fn parse(bytes: &[u8], content: &ContentIdentity) -> Result<Self, SidecarError> {
        let damaged = |what| SidecarError::Damaged { what };
        let body = KIND.decode(content, bytes)?;
        let (recordings, pages) = body
            .split_first_chunk::<COUNTS>()
            .ok_or(damaged("it has no number of recordings"))?;
        let (pages, rest) = pages.as_chunks::<ENTRY>();
        if !rest.is_empty() {
            return Err(damaged("its last page is cut off"));
        }
        if pages.len() > Recording::MOST_PAGES {
            return Err(SidecarError::TooLarge {
                size: body.len() as u64,
                most: MOST_BODY,
            });
        }
        let entries: Vec<Entry> = pages.iter().copied().map(entry).collect();
        let template = content.template_len();
        let sound = |entry: &Entry| {
            u64::from(entry.page) < template.get() / PageSize::SMALLEST && (1..=MOST_WEIGHT).contains(&entry.weight)
        };
        if !entries.iter().all(sound) {
            return Err(damaged("it has an impossible page"));
        }
        if !entries.is_sorted_by_key(Entry::order) {
            return Err(damaged("its pages are out of order"));
        }
        let end = entries.iter().map(|entry| entry.page as usize + 1).max().unwrap_or(0);
        let mut seen = PageSet::new(end);
        if !entries
            .iter()
            .all(|entry| seen.insert(PageIndex::new(entry.page as usize)))
        {
            return Err(damaged("it has a page twice"));
        }
        Ok(Self::from_entries(template, u32::from_le_bytes(*recordings), entries))
    }

    fn body(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(COUNTS + self.entries.len() * ENTRY);
        body.extend_from_slice(&self.recordings.to_le_bytes());
        for entry in &self.entries {
            body.extend_from_slice(&entry.page.to_le_bytes());
            body.extend_from_slice(&(entry.rank << 8 | u32::from(entry.weight)).to_le_bytes());
        }
        body
    }
}

fn entry(bytes: [u8; ENTRY]) -> Entry {
    let [p0, p1, p2, p3, weight, rank @ ..] = bytes;
    let [r0, r1, r2] = rank;
    Entry {
        page: u32::from_le_bytes([p0, p1, p2, p3]),
        rank: u32::from_le_bytes([r0, r1, r2, 0]),
        weight,
    }
}

#[cfg(test)]
mod tests {
    use pagecast_uffd::ByteLen;
    use proptest::prelude::*;

    use super::*;
    use crate::template::{KeptIdentity, TemplateOffset};

    const PAGES: u32 = 300;

    /// The identity of a mem-file of [`PAGES`] pages.
    fn identity() -> ContentIdentity {
        let file = tempfile::tempfile().unwrap();
        file.set_len(u64::from(PAGES) * PageSize::SMALLEST).unwrap();
        KeptIdentity::of(&file).unwrap().into()
    }

    fn recording(pages: &[u32]) -> Recording {
        let mut recording = Recording::new(ByteLen::new(u64::from(PAGES) * PageSize::SMALLEST));
        for page in pages {
            recording.push(TemplateOffset::new(u64::from(*page) * PageSize::SMALLEST));
        }
        recording
    }

    /// A file with these entries, valid or not.
    fn file_of(identity: &ContentIdentity, entries: &[Entry]) -> Vec<u8> {
        let template = identity.template_len();
        let set = WorkingSet {
            template,
            recordings: 1,
            entries: entries.to_vec(),
            runs: Box::default(),
        };
        KIND.encode(identity, &set.body())
    }

    fn within_the_template(set: &WorkingSet) -> bool {
        let end = u64::from(PAGES) * PageSize::SMALLEST;
        set.pages().all(|at| at.get() < end) && set.runs().iter().all(|run| run.at.get() + run.len.get() <= end)
    }

    #[test]
    fn it_is_found_beside_the_mem_file() {
        let dir = tempfile::tempdir().unwrap();
        let mem = dir.path().join("snap.mem");
        let path = WorkingSet::path_for(&mem);
        assert_eq!(path, dir.path().join("snap.mem.working-set"));
        let identity = identity();
        assert!(matches!(WorkingSet::load(&path, &identity), Err(SidecarError::Missing)));
        let set = WorkingSet::of(&recording(&[5, 1, 2]));
        set.save(&path, &identity).unwrap();
        assert_eq!(WorkingSet::load(&path, &identity).unwrap(), set);
    }

    #[test]
    fn entries_that_cannot_be_are_refused_though_the_checksum_is_right() {
        let identity = identity();
        let good = Entry {
            page: 7,
            rank: 5,
            weight: 1,
        };
        assert!(WorkingSet::parse(&file_of(&identity, &[good]), &identity).is_ok());
        let bad: [&[Entry]; 6] = [
            &[Entry { page: PAGES, ..good }],
            &[Entry { weight: 0, ..good }],
            &[Entry {
                weight: MOST_WEIGHT + 1,
                ..good
            }],
            &[good, good],
            &[good, Entry { rank: 6, ..good }],
            &[
                good,
                Entry {
                    page: 8,
                    rank: 4,
                    ..good
                },
            ],
        ];
        for entries in bad {
            let parsed = WorkingSet::parse(&file_of(&identity, entries), &identity);
            assert!(matches!(parsed, Err(SidecarError::Damaged { .. })), "{entries:?}");
        }
    }

    #[test]
    fn a_body_that_ends_within_a_page_is_refused() {
        let identity = identity();
        for len in [0, 3, 5, 4 + 7, 4 + 9] {
            let bytes = KIND.encode(&identity, &vec![1; len]);
            let parsed = WorkingSet::parse(&bytes, &identity);
            assert!(matches!(parsed, Err(SidecarError::Damaged { .. })), "{len}");
        }
    }

    #[test]
    fn more_pages_than_a_working_set_has_are_refused() {
        let identity = identity();
        let bytes = KIND.encode(&identity, &vec![0; COUNTS + (Recording::MOST_PAGES + 1) * ENTRY]);
        let parsed = WorkingSet::parse(&bytes, &identity);
        assert!(matches!(parsed, Err(SidecarError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn what_was_saved_is_what_is_loaded(recordings in proptest::collection::vec(proptest::collection::vec(0..PAGES, 0..200), 1..6)) {
            let identity = identity();
            let mut set = WorkingSet::of(&recording(&recordings[0]));
            for pages in &recordings[1..] { set.merge(&recording(pages)); }
            let bytes = KIND.encode(&identity, &set.body());
            prop_assert_eq!(WorkingSet::parse(&bytes, &identity).unwrap(), set);
        }

        #[test]
        fn no_bytes_make_it_panic_or_leave_the_template(
            pages in proptest::collection::vec(0..PAGES, 0..50),
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
            cut in any::<proptest::sample::Index>(),
            resealed in any::<bool>(),
        ) {
            let identity = identity();
            let body = WorkingSet::of(&recording(&pages)).body();
            // Also with a correct checksum, as if it had been written so.
            let mut bytes = if resealed { body.clone() } else { KIND.encode(&identity, &body) };
            for (index, value) in changes { let index = index.index(bytes.len()); bytes[index] = value; }
            bytes.truncate(cut.index(bytes.len() + 1));
            if resealed { bytes = KIND.encode(&identity, &bytes); }
            if let Ok(set) = WorkingSet::parse(&bytes, &identity) { prop_assert!(within_the_template(&set)); }
        }
    }
}
