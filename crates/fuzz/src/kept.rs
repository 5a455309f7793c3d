//! The files beside a mem-file.

use std::cell::OnceCell;
use std::fs;
use std::path::PathBuf;

use pagecast::PageSize;
use pagecast::template::{ContentIdentity, MemFile, PageSource as _, Recording, TemplateOffset, WorkingSet};
use pagecast_uffd::ByteLen;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

/// Number of small pages of the mem-file: not a multiple of the bits in a word.
const PAGES: u64 = 100;

const CHECKSUM: usize = 32;
/// A working set of one page: the number of recordings, the page, and its rank and weight.
const BODY_OF_ONE_PAGE: usize = 12;
/// Position of the tag in the head, which says which kind of file it is.
const TAG: std::ops::Range<usize> = 8..12;

/// A mem-file, and the head of files beside it.
struct Fixture {
    _folder: TempDir,
    mem_file: PathBuf,
    identity: ContentIdentity,
    head: Vec<u8>,
}

thread_local! {
    static FIXTURE: OnceCell<Fixture> = const { OnceCell::new() };
}

impl Fixture {
    fn with(f: impl FnOnce(&Self)) {
        FIXTURE.with(|fixture| f(fixture.get_or_init(Self::new)));
    }

    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let mem_file = folder.path().join("mem");
        let len = PAGES * PageSize::SMALLEST;
        // Without holes, which are known to be zeros without any file.
        let page = [1; PageSize::Small.as_usize()];
        let bytes: Vec<u8> = (0..PAGES).flat_map(|_| page).collect();
        fs::write(&mem_file, bytes).expect("it can be written");
        let identity = MemFile::open(&mem_file).expect("it can be opened").content();
        let mut recording = Recording::new(ByteLen::new(len));
        recording.push(TemplateOffset::new(0));
        let path = WorkingSet::path_for(&mem_file);
        let set = WorkingSet::of(&recording);
        set.save(&path, &identity).expect("it can be written");
        let mut head = fs::read(&path).expect("it can be read");
        head.truncate(head.len() - CHECKSUM - BODY_OF_ONE_PAGE);
        fs::remove_file(path).expect("it is there");
        Self {
            _folder: folder,
            mem_file,
            identity,
            head,
        }
    }

    /// Makes a file of `bytes`. The first byte says which part the others are: a body, to which the head and the right
    /// checksum are added; a head and a body, to which the checksum is added; or the whole file.
    fn file_of(&self, tag: [u8; 4], bytes: &[u8]) -> Vec<u8> {
        let Some((how, bytes)) = bytes.split_first() else {
            return Vec::new();
        };
        let mut file = self.head.clone();
        file[TAG].copy_from_slice(&tag);
        match how % 4 {
            0 | 1 => file.extend_from_slice(bytes),
            2 => {
                // Each byte of input changes a byte of the head.
                let (changes, body) = bytes.split_at(bytes.len().min(self.head.len()));
                for (byte, change) in file.iter_mut().zip(changes) {
                    *byte ^= change;
                }
                file.extend_from_slice(body);
            }
            _ => return bytes.to_vec(),
        }
        let checksum = Sha256::digest(&file);
        file.extend_from_slice(&checksum);
        file
    }
}

/// An accepted working set is within the template, has each page once, and is written as it was read.
pub(crate) fn working_set(bytes: &[u8]) {
    Fixture::with(|fixture| {
        let file = fixture.file_of(*b"WSET", bytes);
        let Ok(set) = WorkingSet::parse(&file, &fixture.identity) else {
            return;
        };
        let len = PAGES * PageSize::SMALLEST;
        let mut pages: Vec<u64> = set.pages().map(TemplateOffset::get).collect();
        let count = pages.len();
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(pages.len(), count, "a page is there twice");
        assert!(
            pages
                .iter()
                .all(|at| *at < len && at.is_multiple_of(PageSize::SMALLEST))
        );
        assert_eq!(set.size().get(), count as u64 * PageSize::SMALLEST);
        let run_of = |page: u64| {
            let within = |run: &&pagecast::template::Run| (run.at.get()..run.at.get() + run.len.get()).contains(&page);
            set.runs().iter().filter(within).count()
        };
        assert!(set.runs().iter().all(|run| run.at.get() + run.len.get() <= len));
        assert!(pages.iter().all(|page| run_of(*page) == 1), "a page is not in one run");
        let path = WorkingSet::path_for(&fixture.mem_file);
        set.save(&path, &fixture.identity).expect("it can be written");
        // The head may differ in the ctime, on which a working set does not depend.
        let written = fs::read(&path).expect("it can be read");
        let body = fixture.head.len()..file.len() - CHECKSUM;
        assert_eq!(written.len(), file.len());
        assert_eq!(written[body.clone()], file[body], "it is written in another way");
        assert_eq!(
            WorkingSet::parse(&written, &fixture.identity).expect("what was written is read"),
            set
        );
    });
}

/// Pages are known to be zeros exactly if an accepted file says so.
pub(crate) fn zeros(bytes: &[u8]) {
    Fixture::with(|fixture| {
        let file = fixture.file_of(*b"ZERO", bytes);
        fs::write(MemFile::zeros_path_for(&fixture.mem_file), &file).expect("it can be written");
        let opened = MemFile::open(&fixture.mem_file).expect("it can be opened, whatever is beside it");
        let body = match opened.kept_zeros() {
            Ok(()) => &file[fixture.head.len()..file.len() - CHECKSUM],
            Err(_) => &[][..],
        };
        let mut known = 0;
        for page in 0..2 * PAGES {
            let byte = usize::try_from(page / 8).ok().and_then(|byte| body.get(byte));
            let bit = byte.is_some_and(|byte| byte >> (page % 8) & 1 == 1);
            assert!(page < PAGES || !bit, "a page past the end is said to be zeros");
            let at = TemplateOffset::new(page * PageSize::SMALLEST);
            let small = ByteLen::new(PageSize::SMALLEST);
            assert_eq!(opened.zeros().covers(at, small), bit, "page {page}");
            known += u64::from(bit);
        }
        assert_eq!(opened.zeros().known_bytes().get(), known * PageSize::SMALLEST);
    });
}
