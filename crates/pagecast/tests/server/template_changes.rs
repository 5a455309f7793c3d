//! A template that changes under its forks is noticed before a wrong byte reaches one.

use std::fs::File;
use std::os::unix::fs::FileExt;

use pagecast::Template;
use pagecast::server::{Error, Fork, ForkOptions, ForkState};
use pagecast_testkit::sim_vmm::{Connect, Order, Pages, Read, SimVmm};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};

use crate::fixture::{Fixture, PATIENCE, assert_reads_right, eventually};

fn all() -> Read {
    Read::default()
}

/// Changes the template under two forks that run, one of which is at it just then. Both have to be killed rather than
/// to get a byte that is not the old template's; a fork of another template has to notice nothing.
fn assert_killed_when(change: impl FnOnce(&Fixture)) {
    let fixture = Fixture::new();
    let (idle_fork, idle) = fixture.fork("idle");
    let (busy_fork, busy) = fixture.fork("busy");
    let other_file = TemplateFile::create(TemplateModel::of_data(4 << 20, 2)).unwrap();
    let other_template = Template::open(other_file.path()).unwrap();
    let options = ForkOptions::new(fixture.folder.path().join("other"));
    let other_fork = fixture
        .server
        .register("other".parse().unwrap(), &other_template, &options)
        .unwrap();
    let other = SimVmm::spawn().unwrap();
    other
        .run(Connect::new(other_fork.socket_path(), other_file.model()))
        .unwrap();

    let first_half = Read {
        pages: Pages::range(0..1024),
        ..Read::default()
    };
    assert_reads_right(&idle, first_half.clone());
    let read = busy
        .start(Read {
            threads: 4,
            order: Order::Random(1),
            passes: 1000,
            ..Read::default()
        })
        .unwrap();
    // Some pages, and many to go.
    eventually("faults", || busy_fork.status().stats.faults.demand > 100);
    change(&fixture);
    // One fault, so that none can be answered before the change is noticed at another. Data, in what is left of the
    // file.
    let late = idle
        .start(Read {
            pages: Pages::range(1024 + 1..1024 + 2),
            ..Read::default()
        })
        .unwrap();
    assert_killed(&idle_fork, &idle);
    assert!(late.join_within(PATIENCE).is_err());
    // The other may have had all its pages by the time of the change.
    if busy_fork.status().state != ForkState::Serving || read.is_done() {
        assert_killed(&busy_fork, &busy);
    }

    // The server lives, and so does everybody else.
    assert_reads_right(&other, all());
    let late = ForkOptions::new(fixture.folder.path().join("late"));
    let refused = fixture
        .server
        .register("late".parse().unwrap(), &fixture.template, &late);
    assert!(matches!(refused, Err(Error::Template(_))), "{refused:?}");
    assert_eq!(
        fixture
            .server
            .forks()
            .iter()
            .filter(|fork| fork.id().as_str() == "late")
            .count(),
        0
    );
    drop(busy);
    fixture.server.close(PATIENCE).unwrap();
    assert_eq!(other_fork.status().state, ForkState::Complete);
    assert_reads_right(&other, all());
}

fn assert_killed(fork: &Fork, vmm: &SimVmm) {
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Failed, "{status:?}");
    let code = status.reason.unwrap().code();
    assert!(["template_changed", "template_truncated"].contains(&code), "{code}");
    let status = vmm.wait().unwrap();
    assert!(!status.success(), "{status}");
}

fn open_to_write(fixture: &Fixture) -> File {
    File::options().write(true).open(fixture.file.path()).unwrap()
}

#[test]
fn a_template_truncated_under_its_forks_costs_them_and_nobody_else() {
    assert_killed_when(|fixture| open_to_write(fixture).set_len(6 << 20).unwrap());
    // What is asked for is not there any more.
    assert_killed_when(|fixture| open_to_write(fixture).set_len(4 << 20).unwrap());
}

#[test]
fn a_template_extended_under_its_forks_costs_them_and_nobody_else() {
    assert_killed_when(|fixture| open_to_write(fixture).set_len(16 << 20).unwrap());
}

#[test]
fn a_template_written_under_its_forks_costs_them_and_nobody_else() {
    // All that is not read yet becomes wrong, at the same size.
    assert_killed_when(|fixture| {
        open_to_write(fixture).write_all_at(&vec![0xEE; 8 << 20], 0).unwrap();
    });
}

#[test]
fn a_template_overwritten_with_its_mtime_set_back_costs_its_forks_and_nobody_else() {
    // As `cp -p` and `rsync -t --inplace` do.
    assert_killed_when(|fixture| {
        let file = open_to_write(fixture);
        let modified = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(&vec![0xEE; 8 << 20], 0).unwrap();
        file.set_modified(modified).unwrap();
    });
}

#[test]
fn a_template_written_in_a_page_that_its_forks_have_costs_them_all_the_same() {
    // What a fork reads next is as it was, and still nobody knows what else was written.
    assert_killed_when(|fixture| open_to_write(fixture).write_all_at(&[1], 0).unwrap());
}

#[test]
fn a_hole_filled_under_its_forks_costs_them_and_nobody_else() {
    // Pages 100..200 are known to be zeros, so nobody looks into the file for them.
    assert_killed_when(|fixture| {
        open_to_write(fixture)
            .write_all_at(&vec![0xEE; 4096], 150 * 4096)
            .unwrap();
    });
}

#[test]
fn a_written_template_is_noticed_where_only_zeros_are_asked_for() {
    let fixture = Fixture::new();
    let (fork, vmm) = fixture.fork("a");
    open_to_write(&fixture)
        .write_all_at(&vec![0xEE; 4096], 305 * 4096)
        .unwrap();
    let read = Read {
        pages: Pages::range(305..306),
        ..Read::default()
    };
    assert!(vmm.start(read).unwrap().join_within(PATIENCE).is_err());
    assert_killed(&fork, &vmm);
}

#[test]
fn closing_a_server_whose_template_has_changed_completes_nobody_with_wrong_bytes() {
    let fixture = Fixture::new();
    let (fork, vmm) = fixture.fork("a");
    open_to_write(&fixture).write_all_at(&vec![0xEE; 8 << 20], 0).unwrap();
    fixture.server.close(PATIENCE).unwrap();
    assert_killed(&fork, &vmm);
}

#[test]
fn forks_of_a_template_that_was_replaced_read_the_one_they_are_of() {
    let fixture = Fixture::new();
    let (_, vmm) = fixture.fork("a");
    let half = Read {
        pages: Pages::range(0..1000),
        ..Read::default()
    };
    assert_reads_right(&vmm, half);
    let folder = fixture.file.path().parent().unwrap();
    let other = TemplateFile::create_at(&folder.join("other"), TemplateModel::of_data(8 << 20, 2)).unwrap();
    std::fs::rename(other.path(), fixture.file.path()).unwrap();
    assert_reads_right(&vmm, all());
    // The template is the file, wherever its path leads.
    let (_, late) = fixture.fork("late");
    assert_reads_right(&late, all());
    // And deleted it is the same.
    std::fs::remove_file(fixture.file.path()).unwrap();
    let (_, last) = fixture.fork("last");
    assert_reads_right(&last, all());
    fixture.server.close(PATIENCE).unwrap();
    for vmm in [&vmm, &late, &last] {
        assert_reads_right(vmm, all());
    }
}
