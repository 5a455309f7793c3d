//! Real Firecracker microVMs, restored through `pagecast serve` with either backend. Skipped where there is no KVM.

use std::path::PathBuf;
use std::process::Command;

use pagecast_client::fork::BackendType;
use pagecast_client::template::{Warm, WarmthState};
use pagecast_client::{AddTemplate, Backend, CreateFork, ForkState};
use pagecast_testkit::firecracker::{GuestRange, MemBackend, MicroVm, Snapshot, SnapshotOptions, kvm};
use pagecast_testkit::skip::{Need, skip};

use crate::served::{Served, eventually};

const FORKS: u8 = 20;

/// Of so many pages each guest writes one.
const WRITE_ONE_IN: u32 = 8;

/// A daemon with one template, and where the forks get told of their places.
struct Fleet {
    // The daemon goes before its run dir.
    served: Served,
    snapshot: Snapshot,
    folder: tempfile::TempDir,
}

impl Fleet {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let snapshot = Snapshot::create(&SnapshotOptions::default(), folder.path()).unwrap();
        let served = Served::start(&folder.path().join("run"), &[]);
        served.add_template("t", &snapshot.mem_path);
        Self {
            served,
            snapshot,
            folder,
        }
    }

    /// Where forks with `file` find the memory file, each by a path of its own: Firecracker says no pid to anybody.
    fn place(&self, id: &str) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join(id)
    }

    /// Makes forks, restores them all at once, and waits until the daemon has seen it.
    fn restore(&self, backend: Backend, count: u8) -> Vec<MicroVm> {
        let ids: Vec<_> = (1..=count).map(|number| format!("{backend}-{number}")).collect();
        let backends: Vec<_> = ids
            .iter()
            .map(|id| {
                let created = self.served.create(&CreateFork {
                    id: Some(id.clone()),
                    backend: Some(backend),
                    path: (backend == Backend::File).then(|| self.place(id)),
                    ..CreateFork::of("t")
                });
                let path = created.mem_backend.backend_path;
                match created.mem_backend.backend_type {
                    BackendType::Uffd => MemBackend::Uffd(path),
                    BackendType::File => MemBackend::File(path),
                }
            })
            .collect();
        let snapshot = &self.snapshot;
        let forks = std::thread::scope(|scope| {
            let restores: Vec<_> = backends
                .iter()
                .map(|backend| scope.spawn(|| MicroVm::restore(snapshot, backend).unwrap().0))
                .collect();
            restores
                .into_iter()
                .map(|restore| restore.join().unwrap())
                .collect::<Vec<_>>()
        });
        for (id, fork) in ids.iter().zip(&forks) {
            let found = self.served.await_fork(id, ForkState::Serving);
            assert_eq!(found.pid, Some(fork.pid().cast_signed()));
        }
        forks
    }
}

#[track_caller]
fn verify(fork: &mut MicroVm, range: GuestRange) {
    let verified = fork.verify(range).unwrap();
    assert_eq!(
        (verified.pages, verified.mismatches),
        (range.pages(), 0),
        "{verified:?}"
    );
}

/// Each checks its memory, writes some of it with a pattern of its own, and checks again, all at the same time.
fn read_and_write(forks: &mut [MicroVm], snapshot: &Snapshot) {
    std::thread::scope(|scope| {
        for (fork, pattern) in forks.iter_mut().zip(2..) {
            scope.spawn(move || {
                verify(fork, snapshot.filled);
                let written = fork.write(snapshot.filled, WRITE_ONE_IN, pattern).unwrap();
                assert_eq!(written.pages, snapshot.filled.pages() / u64::from(WRITE_ONE_IN));
            });
        }
    });
    std::thread::scope(|scope| {
        for fork in forks {
            scope.spawn(|| verify(fork, snapshot.filled));
        }
    });
}

/// What a Firecracker has to itself that has restored a guest which has read nothing: no fork can do without.
fn idle_private_bytes(fleet: &Fleet) -> u64 {
    // Two, so that what they share (the binary) is not taken for one's own.
    let mut idle = fleet.restore(Backend::File, 2);
    for fork in &mut idle {
        fork.ping().unwrap();
    }
    let private = idle
        .iter()
        .map(|fork| fork.memory().unwrap().private_bytes)
        .max()
        .unwrap();
    drop(idle);
    for id in ["file-1", "file-2"] {
        fleet.served.await_fork(id, ForkState::Exited);
        fleet.served.call(fleet.served.client.remove_fork(id, false));
    }
    private
}

#[test]
fn twenty_real_forks_with_file_share_what_they_do_not_write() {
    if kvm().unwrap().skips() {
        return;
    }
    let fleet = Fleet::new();
    let idle = idle_private_bytes(&fleet);
    let mut forks = fleet.restore(Backend::File, FORKS);
    read_and_write(&mut forks, &fleet.snapshot);

    let told = fleet.served.call(fleet.served.client.template("t")).memory.unwrap();
    assert_eq!(told.measured, u64::from(FORKS));
    let pss: u64 = forks.iter().map(|fork| fork.memory().unwrap().pss_bytes).sum();
    let working_set = u64::from(fleet.snapshot.filled.count_mib) << 20;
    let count = u64::from(FORKS);
    let floor = working_set + count * (working_set / u64::from(WRITE_ONE_IN)) + count * idle;
    println!(
        "sum of PSS {} KiB, measured by the daemon {} KiB, without sharing {} KiB; one working set, what was written and \
         {FORKS} idle Firecrackers of {} KiB: {} KiB",
        pss >> 10,
        told.pss >> 10,
        told.unshared >> 10,
        idle >> 10,
        floor >> 10
    );
    assert!(pss <= floor + floor / 10, "{pss} of {floor}");
    // The daemon measures what the kernel says.
    assert!(told.pss.abs_diff(pss) < pss / 20, "{} and {pss}", told.pss);
    assert!(told.unshared >= count * working_set);
}

#[test]
fn twenty_real_forks_with_uffd_read_write_and_outlive_the_daemon() {
    if kvm().unwrap().skips() {
        return;
    }
    let mut fleet = Fleet::new();
    let mut forks = fleet.restore(Backend::Uffd, FORKS);
    read_and_write(&mut forks, &fleet.snapshot);
    for fork in fleet.served.call(fleet.served.client.forks(true)) {
        assert_eq!((fork.state, fork.memory_bytes), (ForkState::Serving, Some(128 << 20)));
        assert!(
            fork.faults
                .is_some_and(|faults| faults.demand + faults.around >= fleet.snapshot.filled.pages())
        );
        assert!(fork.memory.is_some_and(|memory| memory.private >= 64 << 20));
    }
    fleet.served.signal(rustix::process::Signal::TERM);
    assert!(fleet.served.wait().success());
    std::thread::scope(|scope| {
        let whole = fleet.snapshot.whole;
        for fork in &mut forks {
            scope.spawn(move || verify(fork, whole));
        }
    });
}

/// One fault maps 2 MiB of the template, and a write copies 4 KiB all the same.
#[test]
fn real_forks_with_file_map_a_warm_template_in_pages_of_2_mib() {
    if kvm().unwrap().skips() {
        return;
    }
    let fleet = Fleet::new();
    fleet
        .served
        .call(fleet.served.client.warm_template("t", Warm { resident: true }));
    let mut told = None;
    eventually("the template is in memory", || {
        told = fleet.served.call(fleet.served.client.template("t")).warmth;
        told.as_ref().is_some_and(|told| told.state != WarmthState::Warming)
    });
    let told = told.unwrap();
    assert_eq!((told.state, told.locked_bytes), (WarmthState::Warm, told.wanted_bytes));

    let mut forks = fleet.restore(Backend::File, 3);
    for fork in &mut forks {
        verify(fork, fleet.snapshot.filled);
        let mapped = in_rollup(fork, "FilePmdMapped:");
        println!("{mapped} bytes mapped in pages of 2 MiB, {told:?}");
        let filled = u64::from(fleet.snapshot.filled.count_mib) << 20;
        if told.huge_bytes == told.wanted_bytes {
            assert!(mapped >= filled, "{mapped} of {filled}");
        } else {
            skip("the file system of temporary files has no pages of 2 MiB, or the host no memory for them");
        }
    }
    read_and_write(&mut forks, &fleet.snapshot);
    let whole = fleet.snapshot.whole;
    for fork in &mut forks {
        verify(fork, whole);
        // One page in eight, and what Firecracker itself needs: far from what copying 2 MiB for each would come to.
        let written = in_rollup(fork, "Private_Dirty:");
        assert!(written < 16 << 20, "{written}");
    }
}

/// What the kernel says of all memory of a VMM together, in bytes.
fn in_rollup(fork: &MicroVm, field: &str) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", fork.pid())).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix(field));
    line.unwrap().trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Both at once, from one template.
#[test]
fn real_forks_of_both_backends_live_beside_each_other() {
    if kvm().unwrap().skips() {
        return;
    }
    let fleet = Fleet::new();
    let mut uffd = fleet.restore(Backend::Uffd, 3);
    let mut file = fleet.restore(Backend::File, 3);
    std::thread::scope(|scope| {
        scope.spawn(|| read_and_write(&mut uffd, &fleet.snapshot));
        scope.spawn(|| read_and_write(&mut file, &fleet.snapshot));
    });
    assert_eq!(fleet.served.call(fleet.served.client.template("t")).forks, 6);
    for number in 1..=3 {
        for backend in ["uffd", "file"] {
            let id = format!("{backend}-{number}");
            fleet.served.call(fleet.served.client.remove_fork(&id, true));
            assert!(!fleet.place(&id).exists());
        }
    }
    fleet.served.call(fleet.served.client.remove_template("t"));
}

#[test]
fn who_overwrites_a_template_gets_in_only_after_its_real_forks_are_dead_or_complete() {
    if kvm().unwrap().skips() {
        return;
    }
    let fleet = Fleet::new();
    if fleet.served.call(fleet.served.client.template("t")).guard != pagecast_client::template::Guard::Lease {
        return skip(Need::Leases);
    }
    let mut file = fleet.restore(Backend::File, 3);
    let mut uffd = fleet.restore(Backend::Uffd, 2);
    verify(&mut file[0], fleet.snapshot.filled);
    verify(&mut uffd[0], fleet.snapshot.filled);
    // In the middle of it.
    file[1].start_verify(fleet.snapshot.whole).unwrap();

    let writer = Command::new("dd")
        .args(["if=/dev/zero", "bs=1M", "count=128", "conv=notrunc", "status=none"])
        .arg(format!("of={}", fleet.snapshot.mem_path.display()))
        .status();
    assert!(writer.unwrap().success());
    for (number, fork) in (1..).zip(&file) {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", fork.pid())).unwrap();
        // A zombie, which this process has yet to reap.
        assert!(stat.contains(") Z "), "{stat}");
        let told = fleet.served.fork(&format!("file-{number}"));
        assert_eq!(
            (told.state, &*told.error.unwrap().code),
            (ForkState::Failed, "template_changed")
        );
    }
    for (number, fork) in (1..).zip(&mut uffd) {
        fleet.served.await_fork(&format!("uffd-{number}"), ForkState::Complete);
        verify(fork, fleet.snapshot.whole);
    }
    eventually("their places are taken away", || {
        (1..=3).all(|number| !fleet.place(&format!("file-{number}")).exists())
    });
}

/// Nobody says which pages the guest has but its snapshot.
#[test]
fn a_snapshot_with_two_mebibyte_pages_is_restored_with_the_backend_that_auto_gives() {
    if kvm().unwrap().skips() {
        return;
    }
    let options = SnapshotOptions {
        huge_pages: true,
        ..SnapshotOptions::default()
    };
    // For the guest that is snapshotted, whose pages the kernel may give back some time after its end, and for a fork.
    let Some(_pages) = pagecast_testkit::hugepages::HugePages::reserve(u64::from(options.mem_mib)).unwrap() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::create(&options, folder.path()).unwrap();
    let served = Served::start(&folder.path().join("run"), &[]);
    let mut add = AddTemplate::new(&snapshot.mem_path);
    add.vmstate_path = Some(snapshot.vmstate_path.clone());
    let template = served.call(served.client.add_template("t", &add));
    assert_eq!(template.page_size, 2 << 20);
    let created = served.create(&CreateFork::of("t"));
    assert_eq!(created.backend, Backend::Uffd, "{}", created.reason);
    let backend = MemBackend::Uffd(created.mem_backend.backend_path);
    let (mut fork, _) = MicroVm::restore(&snapshot, &backend).unwrap();
    fork.verify(snapshot.whole).unwrap();
    // Without its state file the template counts as one of 4 KiB pages, and the error names the way out.
    let created = {
        served.call(
            served
                .client
                .add_template("guess", &AddTemplate::new(&snapshot.mem_path)),
        );
        served.create(&CreateFork::of("guess"))
    };
    assert_eq!(created.backend, Backend::File);
    assert!(created.reason.contains("--page-size 2M"), "{}", created.reason);
    let refused = MicroVm::restore(&snapshot, &MemBackend::File(created.mem_backend.backend_path)).unwrap_err();
    assert!(format!("{refused:#}").contains("hugetlbfs"), "{refused:#}");
}
