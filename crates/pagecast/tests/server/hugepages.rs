//! Guests with pages of 2 MiB: the same, and never a page that the pool does not have.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use pagecast::server::{Error, Fork, ForkState};
use pagecast_testkit::PageSize;
use pagecast_testkit::cgroup::HugetlbCgroup;
use pagecast_testkit::hugepages::HugePages;
use pagecast_testkit::process::MemoryUse;
use pagecast_testkit::sim_vmm::{AwaitClose, Connect, Pages, Remove, SimVmm, Write};
use pagecast_testkit::template_file::{Layout, TemplateFile, TemplateModel};

use crate::fixture::{
    Fixture, PATIENCE, assert_reads_right, assert_right, cpu_time_over, eventually, read_everything, read_range,
};
use crate::scripted_source::{Access, Script, ScriptedSource};

const HUGE: u64 = 2 << 20;
/// How many huge pages a fork has.
const PAGES: u64 = 8;

/// A template with a page that is a hole, one that is a hole in part, and zeros here and there.
fn fixture() -> Fixture {
    let file = TemplateFile::create(TemplateModel {
        size: PAGES * HUGE,
        seed: 3,
        layout: Layout {
            zero_every: std::num::NonZeroU64::new(7),
            holes: vec![512..1024, 1700..1800],
        },
    })
    .unwrap();
    Fixture {
        template: pagecast::Template::open(file.path()).unwrap(),
        file,
        ..Fixture::new()
    }
}

fn huge(connect: Connect) -> Connect {
    Connect {
        page_size: PageSize::Huge,
        ..connect
    }
}

/// How many pages of the pool are free. Nobody else takes any while this test holds its reservation.
fn free() -> u64 {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap();
    free.trim().parse().unwrap()
}

/// Registers a fork and connects a VMM that should be refused for lack of hugepages.
fn assert_refused(fixture: &Fixture, id: &str) {
    let fork = fixture.register(id);
    let vmm = SimVmm::spawn().unwrap();
    let connect = Connect::new(fork.socket_path(), fixture.file.model());
    vmm.run(huge(connect)).unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    let code = status.reason.as_ref().map(|reason| reason.code());
    assert_eq!(code, Some("not_enough_hugepages"), "{status:?}");
    assert_eq!(status.stats.faults.demand, 0, "{status:?}");
    let closed = vmm.run(AwaitClose { within_ms: 10_000 }).unwrap();
    assert!(closed.after_us.is_some(), "the VMM was not told");
}

#[test]
fn forks_with_huge_pages_read_right_remove_and_are_completed() {
    let Some(_reserved) = HugePages::reserve(2 * PAGES).unwrap() else {
        return;
    };
    let fixture = fixture();
    let (reading_fork, reading) = fixture.fork_with("reading", huge);
    let (idle_fork, idle) = fixture.fork_with("idle", huge);
    assert_reads_right(&reading, read_everything(1));
    let faults = reading_fork.status().stats.faults;
    assert!(faults.demand >= PAGES && faults.zero == 1, "{faults:?}");
    assert_eq!(
        MemoryUse::of(reading.pid()).unwrap().hugetlb_bytes,
        PAGES * HUGE,
        "not huge pages at all"
    );

    // Touched and removed; removed and never touched; written after it was removed.
    reading.run(Remove::range(2..5)).unwrap();
    idle.run(Remove::range(6..8)).unwrap();
    let pages = Pages::range(3..4);
    let generation = NonZeroU32::MIN;
    reading
        .run(Write {
            pages,
            generation,
            threads: 1,
        })
        .unwrap();
    assert_reads_right(&reading, read_everything(1));
    assert_reads_right(&idle, read_range(6, 7));
    assert_eq!(reading_fork.status().stats.faults.removed, 3);

    fixture.server.close(PATIENCE).unwrap();
    for (fork, vmm) in [(&reading_fork, &reading), (&idle_fork, &idle)] {
        assert_eq!(fork.status().state, ForkState::Complete, "{:?}", fork.status());
        assert_reads_right(vmm, read_everything(1));
    }
    fixture.file.check_untouched().unwrap();
}

#[test]
fn a_fork_for_which_the_pool_is_too_small_is_refused_before_it_gets_a_page() {
    let Some(_reserved) = HugePages::reserve(1).unwrap() else {
        return;
    };
    let mut fixture = fixture();
    // One page more than there is, wherever that is; all of it a hole but what nobody will read.
    let size = (free() + 1) * HUGE;
    let model = TemplateModel {
        size,
        seed: 3,
        layout: Layout {
            zero_every: None,
            holes: vec![1..2, 2..size / 4096],
        },
    };
    fixture.file = TemplateFile::create(model).unwrap();
    fixture.template = pagecast::Template::open(fixture.file.path()).unwrap();
    assert_refused(&fixture, "a");
}

#[test]
fn of_two_forks_with_room_for_one_the_second_is_refused_until_the_first_is_gone() {
    let Some(_reserved) = HugePages::reserve(PAGES).unwrap() else {
        return;
    };
    if free() >= 2 * PAGES {
        return pagecast_testkit::skip::skip("the pool had room for two already");
    }
    let fixture = fixture();
    let connect = |id: &str| -> (Fork, SimVmm) { fixture.fork_with(id, huge) };
    let (first_fork, first) = connect("first");
    // It has not touched a page, so all are free; but they are promised to it.
    assert_refused(&fixture, "second");
    assert_reads_right(&first, read_range(0, 3));
    assert_refused(&fixture, "third");
    assert_reads_right(&first, read_everything(1));
    first.kill().unwrap();
    let status = first_fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Exited, "{status:?}");
    eventually("the pages are free again", || free() >= PAGES);
    let (_, fourth) = connect("fourth");
    assert_reads_right(&fourth, read_everything(1));
}

#[test]
fn a_fork_fits_into_pages_that_the_kernel_may_add_to_the_pool() {
    let Some(mut reserved) = HugePages::reserve(1).unwrap() else {
        return;
    };
    reserved.allow_more(PAGES - 1).unwrap();
    if free() > 1 {
        return pagecast_testkit::skip::skip("the pool had room already");
    }
    let fixture = fixture();
    let (fork, vmm) = fixture.fork_with("first", huge);
    assert_reads_right(&vmm, read_everything(1));
    assert_refused(&fixture, "second");
    // And may be completed.
    fixture.server.close(PATIENCE).unwrap();
    assert_eq!(fork.status().state, ForkState::Complete, "{:?}", fork.status());
    assert_reads_right(&vmm, read_everything(1));
}

/// The kernel charges a hugepage to the process that installs it: us.
#[test]
fn a_fork_that_our_own_cgroup_has_no_hugepages_for_is_refused_and_the_reason_names_it() {
    let Some(reserved) = HugePages::reserve(2 * PAGES).unwrap() else {
        return;
    };
    // In another cgroup than we will be.
    let vmm = SimVmm::spawn().unwrap();
    let Some(cgroup) = HugetlbCgroup::enter(&reserved).unwrap() else {
        return;
    };
    cgroup.limit(PAGES).unwrap();
    let fixture = fixture();
    let fork = fixture.register("first");
    vmm.run(huge(Connect::new(fork.socket_path(), fixture.file.model())))
        .unwrap();
    assert_reads_right(&vmm, read_everything(1));
    assert_eq!(cgroup.used().unwrap(), PAGES * HUGE, "charged to the server");
    assert_refused(&fixture, "second");
    let status = fixture.server.fork(&"second".parse().unwrap()).unwrap().status();
    let reason = pagecast::server::chain(&**status.reason.as_ref().unwrap());
    assert!(reason.contains(cgroup.path().to_str().unwrap()), "{reason}");
    assert_eq!(fork.status().state, ForkState::Serving);
    drop(vmm);
    fork.wait(PATIENCE, ForkState::is_end);
}

/// `UFFDIO_COPY` answers `EEXIST` then, as if the page were there.
#[test]
fn a_page_that_no_hugepage_is_left_for_is_not_taken_for_one_that_is_there() {
    let Some(reserved) = HugePages::reserve(PAGES).unwrap() else {
        return;
    };
    let vmm = SimVmm::spawn().unwrap();
    let Some(cgroup) = HugetlbCgroup::enter(&reserved).unwrap() else {
        return;
    };
    let fixture = fixture();
    let fork = fixture.register("fork");
    vmm.run(huge(Connect::new(fork.socket_path(), fixture.file.model())))
        .unwrap();
    fork.wait(PATIENCE, |state| state == ForkState::Serving);
    assert_reads_right(&vmm, read_range(0, 2));
    cgroup.limit(2).unwrap();
    let reading = vmm.start(read_everything(1)).unwrap();
    eventually("it waits for memory", || fork.status().stats.faults.demand > 2);
    // It is refused: what is left would be zeros.
    let completed = fork.complete();
    assert!(matches!(completed, Err(Error::NotEnoughMemory(_))), "{completed:?}");
    // Long enough for it to fault again and again, were its pages taken for present.
    let window = Duration::from_millis(500);
    let used = cpu_time_over(window);
    assert!(used < window / 4, "{used:?} of processor time in {window:?}");
    assert_eq!(fork.status().state, ForkState::Serving, "{:?}", fork.status());
    cgroup.limit(PAGES).unwrap();
    assert_right(reading);
    drop(vmm);
    fork.wait(PATIENCE, ForkState::is_end);
}

/// The same while it is completed: once it is unregistered, such a page would read as zeros.
#[test]
fn a_completion_that_finds_no_hugepage_is_given_up_and_leaves_no_zeros() {
    let Some(reserved) = HugePages::reserve(PAGES).unwrap() else {
        return;
    };
    let vmm = SimVmm::spawn().unwrap();
    let Some(cgroup) = HugetlbCgroup::enter(&reserved).unwrap() else {
        return;
    };
    let model = TemplateModel::of_data(PAGES * HUGE, 3);
    let script = Arc::new(Script::new(&model, |_| Access::Gated));
    let fixture = Fixture {
        template: pagecast::Template::from_source(Arc::new(ScriptedSource(Arc::clone(&script)))),
        file: TemplateFile::create(model).unwrap(),
        ..Fixture::new()
    };
    let fork = fixture.register("fork");
    vmm.run(huge(Connect::new(fork.socket_path(), fixture.file.model())))
        .unwrap();
    fork.wait(PATIENCE, |state| state == ForkState::Serving);
    // There is room when it is asked for, and none any more when the pages are there.
    fork.complete().unwrap();
    eventually("it reads", || script.reads() > 0);
    cgroup.limit(2).unwrap();
    script.open_gate();
    eventually("it is given up", || fork.status().reason.is_some());
    let status = fork.status();
    assert_eq!(status.state, ForkState::Serving, "{status:?}");
    assert_eq!(status.reason.unwrap().code(), "out_of_memory");
    cgroup.limit(PAGES).unwrap();
    assert_reads_right(&vmm, read_everything(1));
    fork.complete().unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    assert_reads_right(&vmm, read_everything(2));
}
