//! Templates on file systems that are not all alike: what is a fast way on one is a wrong byte on another.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use pagecast::Template;
use pagecast::server::ForkState;
use pagecast::template::{MemFile, Page, PageSource as _, SourceError, TemplateOffset};
use pagecast_testkit::fuse_file::FuseFile;
use pagecast_testkit::mounted::Mounted;
use pagecast_testkit::sim_vmm::{Pages, Read};
use pagecast_testkit::template_file::TemplateFile;
use pagecast_uffd::ByteLen;
use rustix::fs::OFlags;

use crate::fixture::{Fixture, PATIENCE, assert_reads_right, model};

const SIZE: u64 = 8 << 20;
const PAGE: usize = 4096;

/// Overwrites a file in place, as `cp -p` does.
fn overwrite(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&vec![0xEE; usize::try_from(SIZE).unwrap()], 0)
        .unwrap();
    file.set_modified(modified).unwrap();
}

#[test]
fn a_template_overwritten_in_the_upper_layer_of_an_overlay_gives_its_forks_no_wrong_byte() {
    let Some(overlay) = Mounted::overlay() else { return };
    let mut fixture = Fixture::new();
    fixture.file = TemplateFile::create_at(&overlay.path().join("mem"), model(SIZE)).unwrap();
    let mem_file = Arc::new(MemFile::open(fixture.file.path()).unwrap());
    let lease = mem_file.lease(|| {}).ok();
    fixture.template = Template::from_source(Arc::clone(&mem_file));
    let (fork, vmm) = fixture.fork("a");
    let first = Read {
        pages: Pages::range(0..100),
        ..Read::default()
    };
    assert_reads_right(&vmm, first);

    // From the host, past the overlay.
    overwrite(&overlay.upper().join("mem"));
    // None that gets another byte lives to use it.
    if let Ok(report) = vmm.start(Read::default()).unwrap().join_within(PATIENCE) {
        panic!("{} wrong pages, nothing noticed", report.checked.mismatches);
    }
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Failed, "{status:?}");
    assert_eq!(status.reason.unwrap().code(), "template_changed");
    assert!(lease.is_none_or(|lease| !lease.is_sure()));
    mem_file.keep_zeros().unwrap_err();
}

#[test]
fn a_template_copied_up_from_the_lower_layer_of_an_overlay_is_noticed() {
    let Some(overlay) = Mounted::overlay() else { return };
    let lower = overlay.upper().with_file_name("lower").join("mem");
    std::fs::write(&lower, vec![7; 16 * PAGE]).unwrap();
    let path = overlay.path().join("mem");
    let mem_file = MemFile::open(&path).unwrap();
    overwrite(&path);
    assert!(matches!(mem_file.check_unchanged(), Err(SourceError::Changed { .. })));
}

#[test]
fn a_template_overwritten_on_a_file_server_gives_its_forks_no_wrong_byte() {
    let bytes = |byte| vec![byte; 64 * PAGE];
    let Some(served) = FuseFile::mount(bytes(7)) else {
        return;
    };
    let mem_file = Arc::new(MemFile::open(&served.path()).unwrap());
    assert_eq!(mem_file.remote(), Some("FUSE"));
    let mut page = [0; PAGE];
    let at = TemplateOffset::new(32 * PAGE as u64);
    mem_file.read(at, &mut page).unwrap();
    assert_eq!(page, [7; PAGE]);

    served.overwrite(bytes(8));
    // The kernel still has what it was told before, which holds for an hour.
    assert_eq!(served.path().metadata().unwrap().mtime(), 1);
    assert_eq!(mem_file.try_read(at, &mut page).unwrap(), Page::NotReady);
    // Whatever it reads, from the server or out of the page cache: it asks before it gives it away.
    assert!(matches!(mem_file.read(at, &mut page), Err(SourceError::Changed { .. })));
    assert!(matches!(mem_file.check_unchanged(), Err(SourceError::Changed { .. })));
}

/// What `template/mem_file/guarantees.rs` says of them.
#[test]
fn a_lease_holds_off_writers_and_holes_are_right_on_each_file_system_that_is_relied_upon() {
    let kinds = ["ext4", "xfs", "btrfs"];
    let mounted = kinds.map(Mounted::image).into_iter().chain([Mounted::tmpfs()]);
    for mounted in mounted.flatten() {
        let path = mounted.path().join("mem");
        let file = File::create(&path).unwrap();
        // Data, a hole, data that is zeros, a hole. All of it dirty.
        file.write_all_at(&[7; PAGE], 0).unwrap();
        file.write_all_at(&[0; PAGE], 512 << 10).unwrap();
        file.write_all_at(&[9; PAGE], 600 << 10).unwrap();
        file.set_len(1 << 20).unwrap();
        drop(file);
        let mem_file = Arc::new(MemFile::open(&path).unwrap());
        let at_once = mem_file.zeros().known_bytes();
        assert!(at_once > ByteLen::new(512 << 10), "{mounted:?}: {at_once}");
        mem_file.find_zeros(TemplateOffset::new(0), mem_file.len()).unwrap();
        let all = ByteLen::new((1 << 20) - 2 * PAGE as u64);
        assert_eq!(mem_file.zeros().known_bytes(), all, "{mounted:?}");

        let lease = mem_file.lease(|| {}).unwrap();
        assert!(lease.is_sure(), "{mounted:?}");
        let refused = File::options()
            .write(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(&path);
        assert_eq!(
            refused.unwrap_err().kind(),
            std::io::ErrorKind::WouldBlock,
            "{mounted:?}"
        );
        assert!(lease.is_broken(), "{mounted:?}");
    }
}
