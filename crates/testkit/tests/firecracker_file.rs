//! The harness and the guest themselves, with the `File` backend, which needs no page server.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::thread;

use anyhow::Result;
use pagecast_testkit::firecracker::{GuestRange, MemBackend, MicroVm, Snapshot, SnapshotOptions, kvm};
use pagecast_testkit::hugepages::HugePages;

const PAGE: usize = 4096;
const WORDS_OF_A_PAGE: u64 = 512;

#[test]
fn forks_of_a_file_backend_read_what_the_template_holds() -> Result<()> {
    if kvm()?.skips() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let snapshot = Snapshot::create(&SnapshotOptions::default(), folder.path())?;
    let backend = MemBackend::File(snapshot.mem_path.clone());

    let mut forks = Vec::new();
    for _ in 0..3 {
        forks.push(MicroVm::restore(&snapshot, &backend)?.0);
    }
    for fork in &mut forks {
        let verified = fork.verify(snapshot.whole)?;
        assert_eq!(
            (verified.pages, verified.mismatches),
            (snapshot.whole.pages(), 0),
            "{verified:?}"
        );
    }
    // All of them write to the same pages, each something of its own, before any of them reads again.
    for (fork, pattern) in forks.iter_mut().zip(2..) {
        assert_eq!(
            fork.write(snapshot.filled, 8, pattern)?.pages,
            snapshot.filled.pages() / 8
        );
    }
    for fork in &mut forks {
        let verified = fork.verify(snapshot.whole)?;
        assert_eq!(verified.mismatches, 0, "{verified:?}");
        assert!(fork.halt()?.success());
    }
    Ok(())
}

#[test]
fn the_guest_notices_wrong_bytes_wrong_pages_and_pages_that_are_not_zero() -> Result<()> {
    if kvm()?.skips() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let options = SnapshotOptions {
        mem_mib: 32,
        fill_mib: 4,
        ..SnapshotOptions::default()
    };
    let snapshot = Snapshot::create(&options, folder.path())?;
    let offset = |mib: u64, page: u64| (mib << 20) + page * PAGE as u64;

    let mem_file = OpenOptions::new().read(true).write(true).open(&snapshot.mem_path)?;
    let mut page = [0; PAGE];
    mem_file.read_exact_at(&mut page, offset(2, 7))?;
    // One bit of the first MiB, a page of the second in the place of another, a zero page that is none in the fifth.
    mem_file.write_all_at(&[page[PAGE - 1] ^ 1], offset(2, 8) - 1)?;
    mem_file.write_all_at(&page, offset(3, 7))?;
    mem_file.write_all_at(&page, offset(6, 0))?;

    let (mut fork, _) = MicroVm::restore(&snapshot, &MemBackend::File(snapshot.mem_path.clone()))?;
    let mut verify = |start_mib| {
        fork.verify(GuestRange {
            start_mib,
            count_mib: 1,
        })
    };
    for (start_mib, mismatches, first_bad) in [
        (2, 1, "0x207ff8: "),
        (3, WORDS_OF_A_PAGE, "0x307000: "),
        (4, 0, ""),
        (5, 0, ""),
        (6, WORDS_OF_A_PAGE, "0x600000: expected 0x0, "),
        (7, 0, ""),
    ] {
        let verified = verify(start_mib)?;
        assert_eq!(verified.mismatches, mismatches, "{verified:?}");
        assert!(
            verified.first_bad.unwrap_or_default().starts_with(first_bad),
            "MiB {start_mib}"
        );
    }
    Ok(())
}

#[test]
fn memory_that_is_lost_together_with_the_guests_notes_on_it_is_noticed() -> Result<()> {
    if kvm()?.skips() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let options = SnapshotOptions {
        mem_mib: 64,
        fill_mib: 62,
        ..SnapshotOptions::default()
    };
    let snapshot = Snapshot::create(&options, folder.path())?;

    // All that was filled becomes zeros, and so do the pages that hold nothing but the notes "pattern 1, pattern 1, …".
    let mut memory = fs::read(&snapshot.mem_path)?;
    memory[2 << 20..].fill(0);
    for page in memory[..2 << 20]
        .chunks_mut(PAGE)
        .filter(|page| page.iter().all(|&byte| byte == 1))
    {
        page.fill(0);
    }
    fs::write(&snapshot.mem_path, memory)?;

    let (mut fork, _) = MicroVm::restore(&snapshot, &MemBackend::File(snapshot.mem_path.clone()))?;
    let mut without_notes = 0;
    for start_mib in 2..options.mem_mib {
        match fork.verify(GuestRange {
            start_mib,
            count_mib: 1,
        }) {
            Ok(verified) => assert_eq!(verified.mismatches, 256 * WORDS_OF_A_PAGE, "MiB {start_mib}"),
            Err(error) if error.to_string().contains("notes") => without_notes += 1,
            Err(error) => return Err(error),
        }
    }
    assert!(without_notes > 0);
    Ok(())
}

#[test]
fn twenty_forks_restored_at_once_share_what_they_only_read() -> Result<()> {
    if kvm()?.skips() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let snapshot = Snapshot::create(&SnapshotOptions::default(), folder.path())?;
    let backend = MemBackend::File(snapshot.mem_path.clone());

    let forks: Vec<Result<MicroVm>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..20)
            .map(|_| {
                scope.spawn(|| {
                    let (mut fork, _) = MicroVm::restore(&snapshot, &backend)?;
                    let verified = fork.verify(snapshot.filled)?;
                    assert_eq!(verified.mismatches, 0, "{verified:?}");
                    Ok(fork)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no fork reads a wrong byte"))
            .collect()
    });
    let forks: Vec<MicroVm> = forks.into_iter().collect::<Result<_>>()?;
    let filled = u64::from(snapshot.filled.count_mib) << 20;
    for fork in &forks {
        let memory = fork.memory()?;
        assert!(
            memory.shared_bytes >= filled && memory.private_bytes < filled / 4,
            "{memory:?}"
        );
    }
    Ok(())
}

#[test]
fn a_fork_killed_while_it_reads_is_gone_and_the_other_reads_on() -> Result<()> {
    if kvm()?.skips() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let snapshot = Snapshot::create(&SnapshotOptions::default(), folder.path())?;
    let backend = MemBackend::File(snapshot.mem_path.clone());
    let (mut killed, _) = MicroVm::restore(&snapshot, &backend)?;
    let (mut other, _) = MicroVm::restore_paused(&snapshot, &backend)?;
    let process = PathBuf::from(format!("/proc/{}", killed.pid()));
    assert!(process.exists());

    killed.start_verify(snapshot.whole)?;
    assert_eq!(killed.kill()?.signal(), Some(9));
    assert!(!process.exists(), "it was not reaped");
    other.resume()?;
    assert_eq!(other.verify(snapshot.whole)?.mismatches, 0);
    Ok(())
}

#[test]
fn a_command_that_fails_says_what_the_guest_and_firecracker_said() -> Result<()> {
    if kvm()?.skips() {
        return Ok(());
    }
    let mut vm = MicroVm::boot(&SnapshotOptions {
        mem_mib: 32,
        ..SnapshotOptions::default()
    })?;
    let outside = GuestRange {
        start_mib: 31,
        count_mib: 2,
    };
    let error = vm.verify(outside).expect_err("the guest has 32 MiB").to_string();
    assert!(error.contains("err range outside the memory under test"), "{error}");
    assert!(error.contains("Running Firecracker"), "{error}");

    let inside = GuestRange {
        start_mib: 2,
        count_mib: 1,
    };
    let error = vm.inflate(inside).expect_err("it has no balloon").to_string();
    assert!(error.contains("err there is no balloon"), "{error}");

    vm.kill()?;
    let error = vm.ping().expect_err("it was killed").to_string();
    assert!(error.contains("Running Firecracker"), "{error}");
    Ok(())
}

#[test]
fn a_snapshot_of_a_guest_with_2_mib_pages_is_complete() -> Result<()> {
    if kvm()?.skips() {
        return Ok(());
    }
    let options = SnapshotOptions {
        mem_mib: 32,
        fill_mib: 16,
        huge_pages: true,
        ..SnapshotOptions::default()
    };
    let Some(_pages) = HugePages::reserve(u64::from(options.mem_mib) / 2)? else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let snapshot = Snapshot::create(&options, folder.path())?;
    assert_eq!(snapshot.mem_path.metadata()?.len(), 32 << 20);

    // A restore with 2 MiB pages needs a page server: Firecracker itself refuses the `File` backend.
    let error = MicroVm::restore(&snapshot, &MemBackend::File(snapshot.mem_path.clone())).expect_err("it is refused");
    assert!(error.to_string().contains("hugetlbfs"), "{error}");
    Ok(())
}
