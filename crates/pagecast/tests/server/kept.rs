//! What is kept beside a template and taken up by the next server.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pagecast::Template;
use pagecast::template::{
    KeptIdentity, LeaseError, MappedPages, MemFile, Page, PageSource, Residency, SourceError, TemplateOffset, ZeroMap,
};
use pagecast_testkit::sim_vmm::Read;
use pagecast_testkit::skip::skip;
use pagecast_uffd::{ByteLen, MappedRange};

use crate::fixture::{Fixture, assert_reads_right, eventually};

/// A mem-file that counts the pages which were copied straight from where it is mapped.
struct Counting {
    mem_file: Arc<MemFile>,
    from_mapping: Arc<AtomicU64>,
}

impl PageSource for Counting {
    fn len(&self) -> ByteLen {
        self.mem_file.len()
    }

    fn try_read<'a>(&'a self, at: TemplateOffset, buffer: &'a mut [u8]) -> Result<Page<'a>, SourceError> {
        self.mem_file.try_read(at, buffer)
    }

    fn read(&self, at: TemplateOffset, buffer: &mut [u8]) -> Result<(), SourceError> {
        self.mem_file.read(at, buffer)
    }

    fn check_unchanged(&self) -> Result<(), SourceError> {
        self.mem_file.check_unchanged()
    }

    fn zeros(&self) -> &ZeroMap {
        self.mem_file.zeros()
    }

    fn knows_all_zeros(&self) -> bool {
        self.mem_file.knows_all_zeros()
    }

    fn find_zeros(&self, at: TemplateOffset, len: ByteLen) -> Result<(), SourceError> {
        self.mem_file.find_zeros(at, len)
    }

    fn mapping(self: Arc<Self>) -> Option<Arc<dyn MappedPages>> {
        Some(self)
    }
}

impl MappedPages for Counting {
    fn resident_run(&self, at: TemplateOffset, len: ByteLen) -> Option<MappedRange<'_>> {
        self.mem_file.resident_run(at, len)
    }

    fn known_resident(&self, at: TemplateOffset, len: ByteLen) -> Residency<'_> {
        let found = self.mem_file.known_resident(at, len);
        if let Residency::Mapped(_) = found {
            self.from_mapping.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    fn map(&self, at: TemplateOffset) {
        self.mem_file.map(at);
    }

    fn release(&self) {
        self.mem_file.release();
    }
}

#[test]
fn where_the_zeros_were_kept_faults_are_answered_straight_from_the_mapped_file() {
    let mut fixture = Fixture::new();
    let changed = KeptIdentity::of(File::open(fixture.file.path()).unwrap())
        .unwrap()
        .changed();
    eventually("it is old enough for its zeros to be kept", || {
        changed.elapsed().is_ok_and(|age| age > Duration::from_millis(100))
    });
    let first = Arc::new(MemFile::open(fixture.file.path()).unwrap());
    let lease = match first.lease(|| {}) {
        Ok(lease) => lease,
        Err(error @ (LeaseError::Unsupported | LeaseError::NotPermitted)) => return skip(&error.to_string()),
        Err(error) => panic!("{error:?}"),
    };
    first.find_zeros(TemplateOffset::new(0), first.len()).unwrap();
    first.keep_zeros().unwrap();
    drop((lease, first));

    let mem_file = Arc::new(MemFile::open(fixture.file.path()).unwrap());
    mem_file.kept_zeros().unwrap();
    let _lease = mem_file.lease(|| {}).unwrap();
    // Whether it is locked in memory makes no difference to who asks for it: all of it is there.
    mem_file.set_pinned(true);
    let from_mapping = Arc::new(AtomicU64::new(0));
    fixture.template = Template::from_source(Arc::new(Counting {
        mem_file,
        from_mapping: Arc::clone(&from_mapping),
    }));
    assert!(fixture.template.zeros_are_known());
    let (_fork, vmm) = fixture.fork("a");
    assert_reads_right(&vmm, Read::default());
    assert!(from_mapping.load(Ordering::Relaxed) > 0);
}
