//! A lease holds writers off a template until no fork reads it any more.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use pagecast::Template;
use pagecast::server::ForkState;
use pagecast::template::{Lease, LeaseError, LockError, Locked, MemFile, PageSource as _, Wanted};
use pagecast_testkit::process::ProcessUse;
use pagecast_testkit::sim_vmm::Read;
use pagecast_testkit::skip::{Need, skip};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};
use rustix::fs::OFlags;

use crate::fixture::{
    Fixture, PATIENCE, assert_lives_on, assert_reads_right, assert_right, eventually, failed_with, read_everything,
};
use crate::vmm_process::alone;

/// Says that the test is skipped where this machine has no leases.
fn taken(lease: Result<Lease, LeaseError>) -> Option<Lease> {
    match lease {
        Ok(lease) => Some(lease),
        Err(error @ (LeaseError::Unsupported | LeaseError::NotPermitted)) => {
            skip((Need::Leases, error));
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

/// A small mem-file.
fn mem_file() -> (TemplateFile, Arc<MemFile>) {
    let file = TemplateFile::create(TemplateModel::of_data(64 << 10, 1)).unwrap();
    let mem_file = Arc::new(MemFile::open(file.path()).unwrap());
    (file, mem_file)
}

/// A lease, and how to hear of its break.
fn lease(mem_file: &Arc<MemFile>) -> Option<(Lease, mpsc::Receiver<()>)> {
    let (broken, breaks) = mpsc::channel();
    let lease = taken(mem_file.lease(move || broken.send(()).unwrap()))?;
    Some((lease, breaks))
}

/// Another process that writes one byte at the beginning of a file.
fn start_writing(path: &Path) -> Child {
    Command::new("sh")
        .args(["-c", r#"printf X 1<>"$0""#])
        .arg(path)
        .spawn()
        .unwrap()
}

fn first_byte(path: &Path) -> u8 {
    let mut byte = [0];
    File::open(path).unwrap().read_exact_at(&mut byte, 0).unwrap();
    byte[0]
}

/// The writer sleeps where the kernel holds it up.
fn await_held_up(writer: &Child) {
    let wchan = format!("/proc/{}/wchan", writer.id());
    eventually("the writer is held up", || {
        std::fs::read_to_string(&wchan).is_ok_and(|function| function.contains("break_lease"))
    });
}

#[test]
fn a_writer_in_another_process_is_held_up_until_the_lease_is_dropped() {
    let (file, mem_file) = mem_file();
    let before = first_byte(file.path());
    let Some((lease, breaks)) = lease(&mem_file) else {
        return;
    };
    assert!(!lease.is_broken());
    let mut writer = start_writing(file.path());
    // No sooner than somebody wants to write, and soon then.
    breaks.recv_timeout(PATIENCE).unwrap();
    assert!(lease.is_broken());
    await_held_up(&writer);
    assert!(writer.try_wait().unwrap().is_none());
    assert_eq!(
        first_byte(file.path()),
        before,
        "readers are not held up, and see what it was"
    );
    drop(lease);
    assert!(writer.wait().unwrap().success());
    assert_eq!(first_byte(file.path()), b'X');
}

#[test]
fn a_writer_that_does_not_wait_is_refused_and_breaks_the_lease_all_the_same() {
    let (file, mem_file) = mem_file();
    let Some((lease, breaks)) = lease(&mem_file) else {
        return;
    };
    let refused = File::options()
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(file.path());
    assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    breaks.recv_timeout(PATIENCE).unwrap();
    assert!(lease.is_broken());
    drop(lease);
    // It was not written, so it can be taken again.
    let lease = mem_file.lease(|| {}).unwrap();
    assert!(!lease.is_broken());
}

#[test]
fn readers_and_renaming_break_no_lease() {
    let (file, mem_file) = mem_file();
    let Some((lease, breaks)) = lease(&mem_file) else {
        return;
    };
    file.check_untouched().unwrap();
    let link = file.path().with_extension("link");
    std::fs::hard_link(file.path(), &link).unwrap();
    std::fs::rename(&link, file.path().with_extension("renamed")).unwrap();
    assert!(!lease.is_broken());
    drop(lease);
    // Its thread has gone without a call.
    assert!(breaks.recv_timeout(PATIENCE).is_err());
}

#[test]
fn a_file_that_can_be_written_gets_no_lease_and_one_with_a_lease_no_second() {
    let (file, mem_file) = mem_file();
    let writer = File::options().write(true).open(file.path()).unwrap();
    let refused = mem_file.lease(|| {});
    assert!(matches!(refused, Err(LeaseError::OpenForWriting)), "{refused:?}");
    drop(writer);
    let Some((lease, _breaks)) = lease(&mem_file) else {
        return;
    };
    let second = mem_file.lease(|| {});
    assert!(matches!(second, Err(LeaseError::Held)), "{second:?}");
    assert!(!lease.is_broken(), "the second attempt cost the first its lease");
    // By another mem-file of the same file, it can be had.
    let other = Arc::new(MemFile::open(file.path()).unwrap());
    drop(other.lease(|| {}).unwrap());
    assert!(!lease.is_broken());
}

#[test]
fn a_file_that_was_written_before_the_lease_gets_none() {
    let (file, mem_file) = mem_file();
    let writer = File::options().write(true).open(file.path()).unwrap();
    writer.set_len(32 << 10).unwrap();
    drop(writer);
    match mem_file.lease(|| {}) {
        Err(LeaseError::Changed(_)) => {}
        other => drop(taken(other)),
    }
    // And keeps none: nobody is held up.
    assert!(start_writing(file.path()).wait().unwrap().success());
}

#[test]
fn a_lease_that_is_dropped_leaves_no_thread_and_no_file_descriptor() {
    if !alone() {
        return;
    }
    let (file, mem_file) = mem_file();
    let own_use = || ProcessUse::of(std::process::id()).unwrap();
    let before = own_use();
    for round in 0..50 {
        let Some((lease, breaks)) = lease(&mem_file) else {
            return;
        };
        if round % 2 == 0 {
            let nobody = File::options()
                .write(true)
                .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
                .open(file.path());
            assert!(nobody.is_err());
            breaks.recv_timeout(PATIENCE).unwrap();
        }
        drop(lease);
    }
    eventually("no thread is left", || own_use().threads <= before.threads);
    eventually("no file descriptor is left", || own_use().fds <= before.fds);
}

/// What leases are for: a template that is overwritten while its forks run, and not one byte of it reaches them.
#[test]
fn a_template_is_written_only_after_its_forks_have_ended() {
    let mut fixture = Fixture::new();
    let mem_file = Arc::new(MemFile::open(fixture.file.path()).unwrap());
    fixture.template = Template::from_source(Arc::clone(&mem_file));
    let Some((lease, breaks)) = lease(&mem_file) else {
        return;
    };
    let (done_fork, done) = fixture.fork("complete");
    done_fork.complete().unwrap();
    done_fork.wait(PATIENCE, ForkState::is_end);
    let (fork, vmm) = fixture.fork("a");
    let read = vmm
        .start(Read {
            passes: 1000,
            ..read_everything(1)
        })
        .unwrap();
    eventually("faults", || fork.status().stats.faults.demand > 100);

    let mut writer = start_writing(fixture.file.path());
    breaks.recv_timeout(PATIENCE).unwrap();
    // As long as the lease is there the template is what it was, and forks may go on for that long.
    let (_, late) = fixture.fork("late");
    assert_reads_right(&late, Read::default());
    assert!(writer.try_wait().unwrap().is_none());
    assert_eq!(
        fixture
            .server
            .withdraw(&fixture.template, "somebody opens it for writing"),
        2
    );
    assert!(
        fixture
            .server
            .wait_withdrawn(&fixture.template, Duration::from_secs(30))
    );
    mem_file.check_unchanged().unwrap();
    drop(lease);
    assert!(writer.wait().unwrap().success());
    assert_eq!(failed_with(&fork.status()), "template_changed");
    assert!(read.join_within(PATIENCE).is_err());
    assert_lives_on(&done);
}

/// Under a lease, what is locked in memory is installed straight from there.
#[test]
fn forks_of_a_template_that_is_locked_in_memory_read_what_it_holds_also_while_it_is_let_go() {
    let mut fixture = Fixture::new();
    let mem_file = Arc::new(MemFile::open(fixture.file.path()).unwrap());
    fixture.template = Template::from_source(Arc::clone(&mem_file));
    let Some((lease, _breaks)) = lease(&mem_file) else {
        return;
    };
    let wanted = Wanted::data(&mem_file);
    let lock =
        || -> Result<Vec<Locked>, LockError> { wanted.runs().iter().map(|run| Locked::new(&mem_file, *run)).collect() };
    let mut locked = match lock() {
        Err(LockError::Limit) => return skip("this process may not lock so much memory"),
        locked => locked.unwrap(),
    };
    mem_file.set_pinned(true);
    let (_fork, vmm) = fixture.fork("a");
    assert_lives_on(&vmm);
    let (fork, vmm) = fixture.fork("b");
    let read = vmm.start(read_everything(2)).unwrap();
    for _ in 0..50 {
        mem_file.set_pinned(false);
        drop(std::mem::take(&mut locked));
        locked = lock().unwrap();
        mem_file.set_pinned(true);
    }
    assert_right(read);
    drop(lease);
    assert_eq!(fork.status().state, ForkState::Serving);
    // Without a lease a change is noticed, locked or not.
    let (fork, vmm) = fixture.fork("late");
    let writer = File::options().write(true).open(fixture.file.path()).unwrap();
    writer.write_all_at(&[0xEE; 4096], 2000 * 4096).unwrap();
    assert!(vmm.start(Read::default()).unwrap().join_within(PATIENCE).is_err());
    assert_eq!(failed_with(&fork.wait(PATIENCE, ForkState::is_end)), "template_changed");
}
