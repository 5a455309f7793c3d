//! Tests of the service in orders of events that no client can cause at will.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use pagecast::template::{Page, PageSource, SourceError, TemplateOffset, ZeroMap};
use pagecast_client::template::Guard;
use pagecast_client::{AddTemplate, Backend, CreateFork, ErrorCode, ForkState};
use pagecast_testkit::skip::{Need, skip};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};
use pagecast_uffd::ByteLen;
use rustix::fs::OFlags;
use rustix::thread::CapabilitySet;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use super::Service;
use super::untracked::untracked_vmms;
use crate::daemon::Daemon;
use crate::fork::{Fork, SavedFork};
use crate::local_file::{LocalFile, SavedTemplate, Spec};
use crate::mapper::Mapper;
use crate::placement::{How, PlannedPlacement, Prefer, Removal};
use crate::run_dir::{RunDir, Saved};
use crate::template::Template;
use crate::vmm_process::{self, VmmProcess};
use crate::{Config, Settings};

/// Reached only if an operation hangs.
const PATIENCE: Duration = Duration::from_secs(40);

/// A daemon in a folder of its own, with a template named `t`.
struct Rig {
    // In this order: the daemon goes before its runtime, and both before their folder.
    daemon: Daemon,
    runtime: Runtime,
    file: TemplateFile,
    folder: TempDir,
}

impl Rig {
    fn start() -> Self {
        Self::start_on(Runtime::new().unwrap())
    }

    fn start_on(runtime: Runtime) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), runtime)
    }

    /// Starts a daemon with its run dir in `folder`.
    fn start_in(folder: TempDir, runtime: Runtime) -> Self {
        let rig = Self {
            daemon: runtime.block_on(Daemon::start(config(&folder))).unwrap(),
            runtime,
            file: TemplateFile::create(TemplateModel::of_data(1 << 20, 1)).unwrap(),
            folder,
        };
        rig.add_template();
        rig
    }

    /// Starts a daemon whose template has a lease; `None` if there are no leases here.
    fn leased() -> Option<Self> {
        let rig = Self::start();
        rig.is_leased().then_some(rig)
    }

    /// Returns `false`, and reports the test as skipped, if the template has no lease.
    fn is_leased(&self) -> bool {
        let is_leased = self.template().guard() == Guard::Lease;
        if !is_leased {
            skip(Need::Leases);
        }
        is_leased
    }

    /// Stops the daemon. VMMs of forks with `file` live on.
    fn stop(self) -> (TemplateFile, TempDir) {
        drop(self.daemon);
        // With all tasks that still hold the run dir.
        drop(self.runtime);
        (self.file, self.folder)
    }

    fn service(&self) -> &Arc<Service> {
        self.daemon.service()
    }

    fn add_template(&self) {
        let add = AddTemplate::new(self.file.path());
        self.service().add_template("t", add).unwrap();
    }

    fn template(&self) -> Arc<Template> {
        Arc::clone(&self.service().registry().templates()[0])
    }

    fn fork(&self, id: &str, backend: Backend) -> Arc<Fork> {
        self.fork_as(id, backend, |_| {})
    }

    fn fork_as(&self, id: &str, backend: Backend, change: impl FnOnce(&mut CreateFork)) -> Arc<Fork> {
        let mut wanted = CreateFork {
            id: Some(id.to_owned()),
            backend: Some(backend),
            ..CreateFork::of("t")
        };
        change(&mut wanted);
        self.service().create_fork(&wanted).unwrap()
    }

    /// Returns the forks that the next daemon would take up.
    fn saved(&self) -> Vec<String> {
        let saved = self.service().run_dir().saved_values::<SavedFork>(Saved::Fork);
        saved.unwrap().into_iter().map(|(id, _)| id).collect()
    }
}

fn file_of(template: &Template) -> &Arc<LocalFile> {
    template.file.as_ref().unwrap()
}

fn config(folder: &TempDir) -> Config {
    let settings = Settings {
        run_dir: Some(folder.path().join("run")),
        workers: Some(1),
        ..Settings::default()
    };
    settings.resolve().unwrap()
}

/// Opens a file for writing without blocking. The open is refused, and the lease is broken from then on.
fn break_lease(file: &TemplateFile) {
    let mut open = File::options();
    open.write(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    let refused = open.open(file.path()).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
}

/// A process of which only the end matters.
struct Vmm {
    _mapper: Mapper,
    process: VmmProcess,
}

impl Vmm {
    fn start() -> Self {
        let mapper = Mapper::start("turn()", &[]);
        let process = VmmProcess::open(mapper.pid()).unwrap();
        Self {
            _mapper: mapper,
            process,
        }
    }

    /// Starts the VMM of a fork with `file`.
    fn of_fork(rig: &Rig, id: &str) -> Self {
        let vmm = Self::start();
        rig.fork_as(id, Backend::File, |wanted| wanted.pid = Some(vmm.process.pid()));
        vmm
    }

    fn is_dead_in_time(&self) -> bool {
        self.process.wait_exited(PATIENCE)
    }
}

/// Polls for a condition that no event reports.
#[track_caller]
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A thread that deletes a fork, or forgets an old one, is delayed in the middle.
#[test]
fn whoever_comes_late_to_a_fork_leaves_another_of_its_id_alone() {
    let rig = Rig::start();
    for backend in [Backend::Uffd, Backend::File] {
        let first = rig.fork("f", backend);
        rig.service().remove_fork("f", false).unwrap();
        let second = rig.fork("f", backend);
        rig.service().kill_vmm(&first).unwrap();
        rig.service().forget(&first);
        assert_eq!(second.state(), ForkState::Waiting, "{backend}");
        assert_eq!(rig.saved().len(), usize::from(backend == Backend::File));
        assert!(second.mem_backend.backend_path.exists());
        rig.service().remove_fork("f", false).unwrap();
    }
}

#[test]
fn a_fork_that_has_ended_does_not_take_the_memory_file_of_the_next_at_its_path_with_it() {
    let rig = Rig::start();
    let place = rig.folder.path().canonicalize().unwrap().join("place");
    let at_place = |wanted: &mut CreateFork| wanted.path = Some(place.clone());
    let mut vmm = Mapper::start("turn()", &[]);
    let first = rig.fork_as("first", Backend::File, |wanted| {
        at_place(wanted);
        wanted.pid = Some(vmm.pid());
    });
    vmm.reap();
    eventually("its end is noticed", || first.state().is_end() && !exists(&place));
    let _second = rig.fork_as("second", Backend::File, at_place);
    rig.service().remove_fork("first", false).unwrap();
    assert!(exists(&place), "nobody has deleted the second");
    rig.service().remove_fork("second", false).unwrap();
    assert!(!exists(&place));
}

#[test]
fn a_break_of_the_lease_of_a_removed_template_leaves_another_of_its_name_alone() {
    let rig = Rig::start();
    let removed = rig.template();
    rig.service().remove_template("t").unwrap();
    rig.add_template();
    // The lease was broken before it was dropped, and its thread reports that only now.
    rig.service().lease_broken(&file_of(&removed).mem_file);
    assert!(rig.service().take_withdrawals().is_empty());
    let there = rig.template();
    assert!(!there.validity.is_withdrawn() && there.validity.change().is_none());
}

/// The writer comes before the template is in the registry, or before its forks are.
#[test]
fn a_writer_who_comes_while_the_daemon_starts_is_heeded_once_all_forks_are_found() {
    for on_the_list in [false, true] {
        let Some(rig) = Rig::leased() else { return };
        let vmm = Vmm::of_fork(&rig, "f");
        let (file, folder) = rig.stop();

        let (runtime, config) = (Runtime::new().unwrap(), config(&folder));
        let run_dir = RunDir::take(&config.run_dir, false).unwrap();
        let service = Service::new(config, run_dir, runtime.handle().clone(), |_| {}).unwrap();
        let template = if on_the_list {
            service.find_templates().unwrap();
            Arc::clone(&service.registry().templates()[0])
        } else {
            let mut saved = service
                .run_dir()
                .saved_values::<SavedTemplate>(Saved::Template)
                .unwrap();
            let (name, saved) = saved.remove(0);
            service.find_template(&name, &saved.unwrap()).unwrap()
        };
        let holders = Arc::strong_count(&file_of(&template).mem_file);
        break_lease(&file);
        // The lease's thread holds the file until it has reported the break. No withdrawal may have begun then.
        eventually("the thread of the lease has ended", || {
            Arc::strong_count(&file_of(&template).mem_file) < holders
        });
        for withdrawal in service.take_withdrawals() {
            withdrawal.join().unwrap();
        }
        service.registry().restore_template(Arc::clone(&template));
        let orphans = service.find_forks().unwrap();
        assert!(orphans.is_empty());
        service.act_on_leases();
        assert!(vmm.is_dead_in_time(), "it would read what is written");
        eventually("its fork has failed", || {
            service.registry().forks()[0].state() == ForkState::Failed
        });
    }
}

/// Many slow API calls at once have the same effect.
#[test]
fn calls_that_take_long_do_not_hold_up_who_ends_the_forks_of_a_template_that_is_to_be_written() {
    let mut builder = Builder::new_multi_thread();
    let runtime = builder.worker_threads(1).max_blocking_threads(1).enable_all().build();
    let rig = Rig::start_on(runtime.unwrap());
    if !rig.is_leased() {
        return;
    }
    let (end, ended) = mpsc::channel::<()>();
    // Blocks the only thread for such calls.
    rig.runtime.spawn_blocking(move || ended.recv());
    let vmm = Vmm::of_fork(&rig, "f");
    break_lease(&rig.file);
    let in_time = vmm.is_dead_in_time();
    drop(end);
    assert!(in_time);
}

#[test]
fn without_a_lease_calls_that_take_long_do_not_hold_up_who_notices_a_write_either() {
    let mut builder = Builder::new_multi_thread();
    let runtime = builder.worker_threads(1).max_blocking_threads(1).enable_all().build();
    let rig = Rig::start_on(runtime.unwrap());
    let (end, ended) = mpsc::channel::<()>();
    rig.runtime.spawn_blocking(move || ended.recv());
    // The template then has no lease, as on a file system without leases.
    rig.template().release_lease();
    let vmm = Vmm::of_fork(&rig, "f");
    let file = File::options().write(true).open(rig.file.path()).unwrap();
    file.set_len(2 << 20).unwrap();
    let in_time = vmm.is_dead_in_time();
    drop(end);
    assert!(in_time);
}

/// A call that warms the template holds its lock while zeros are searched for.
#[test]
fn whoever_brings_a_template_into_memory_does_not_hold_up_who_ends_its_forks() {
    let Some(rig) = Rig::leased() else { return };
    let vmm = Vmm::of_fork(&rig, "f");
    let template = rig.template();
    let lock = file_of(&template).warmth.request_lock.lock().unwrap();
    break_lease(&rig.file);
    let in_time = vmm.is_dead_in_time();
    eventually("the writer is let in", || template.guard() == Guard::Watch);
    drop(lock);
    assert!(in_time && file_of(&template).warmth.is_over());
}

/// Its pid was not given, and `/proc` no longer shows its path once the mount is removed.
#[test]
fn who_maps_the_file_by_a_mount_that_forks_were_told_of_dies_before_the_writer_is_let_in() {
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let rig = Rig::start_in(elsewhere, Runtime::new().unwrap());
    if !rig.is_leased() {
        return;
    }
    let placement = file_of(&rig.template()).placement.clone();
    if !placement.is_some_and(|placement| matches!(placement.how(), How::BindMount { .. })) {
        return skip("needs another file system at /dev/shm, and CAP_SYS_ADMIN to mount");
    }
    let fork = rig.fork("f", Backend::File);
    let mapper = Mapper::of_file(&fork.mem_backend.backend_path);
    let vmm = VmmProcess::open(mapper.pid()).unwrap();
    break_lease(&rig.file);
    assert!(vmm.wait_exited(PATIENCE));
    eventually("its fork has failed", || fork.state() == ForkState::Failed);
}

#[test]
fn who_maps_the_file_is_found_also_when_the_place_is_gone() {
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let rig = Rig::start();
    let template = rig.template();
    for (folder, prefer) in [
        (rig.folder.path(), Prefer::Link),
        (rig.folder.path(), Prefer::Mount),
        (elsewhere.path(), Prefer::Link),
    ] {
        let at = folder.canonicalize().unwrap().join("place");
        let file = file_of(&template).mem_file.as_fd();
        let placed = PlannedPlacement::new(file, &at).and_then(|plan| plan.carry_out(file, prefer));
        let Ok(placement) = placed else {
            return skip((Need::Capabilities(CapabilitySet::SYS_ADMIN), "to mount"));
        };
        let mapper = Mapper::of_file(&at);
        let found = || -> Vec<_> {
            let untracked = untracked_vmms(file_of(&template), &[&placement]);
            untracked.unwrap().vmms.iter().map(VmmProcess::pid).collect()
        };
        assert_eq!(found(), [mapper.pid()]);
        assert_eq!(placement.remove().unwrap(), Removal::Removed);
        assert_eq!(found(), [mapper.pid()], "{:?}", placement.how());
    }
}

fn exists(path: &Path) -> bool {
    path.try_exists().unwrap()
}

/// The panic stands for any defect of pagecast.
#[test]
fn a_withdrawal_that_panics_ends_its_forks_all_the_same() {
    let Some(rig) = Rig::leased() else { return };
    let template = rig.template();
    let mapper = Mapper::of_file(file_of(&template).path_for_forks());
    let file = rig.fork_as("file", Backend::File, |wanted| wanted.pid = Some(mapper.pid()));
    let uffd = rig.fork("uffd", Backend::Uffd);
    let vmm = VmmProcess::open(mapper.pid()).unwrap();
    vmm_process::tests::panic_about(file_of(&template).inode());
    break_lease(&rig.file);
    assert!(vmm.wait_exited(PATIENCE));
    for fork in [&file, &uffd] {
        eventually("it has failed", || fork.state() == ForkState::Failed);
    }
    eventually("the writer goes on", || !file_of(&template).is_lease_broken());
}

#[test]
fn forks_that_are_overdue_are_ended_after_a_panic() {
    let rig = Rig::start();
    let fork = rig.fork("f", Backend::File);
    let file = file_of(&fork.template).inode();
    vmm_process::tests::panic_about(file);
    fork.file().unwrap().set_deadline(Some(Instant::now()));
    // The daemon's own task sleeps until the deadline that the fork had before.
    let task = rig.runtime.spawn(Arc::clone(rig.service()).end_overdue());
    eventually("it was looked for again", || {
        vmm_process::tests::panics_about(file) >= 2
    });
    assert_eq!(fork.state(), ForkState::Waiting);
    vmm_process::tests::panic_no_more_about(file);
    eventually("it has failed", || fork.state() == ForkState::Failed);
    task.abort();
}

/// The daemon has `CAP_KILL` but not `CAP_SYS_PTRACE`.
#[test]
fn a_process_that_cannot_be_looked_at_counts_as_a_vmm() {
    let capability = CapabilitySet::SYS_PTRACE;
    let sets = rustix::thread::capabilities(None).unwrap();
    if !sets.effective.contains(capability) {
        return skip((Need::Capabilities(capability), "to give it up"));
    }
    // Started with the capability, so that this process cannot inspect it after giving that up.
    let rig = Rig::start();
    let place = rig.folder.path().canonicalize().unwrap().join("place");
    let fork = rig.fork_as("f", Backend::File, |wanted| wanted.path = Some(place.clone()));
    let mapper = Mapper::of_file(&place);
    vmm_process::tests::look_at_nobody_else();

    fork.file().unwrap().set_deadline(Some(Instant::now()));
    rig.service().look_for_overdue();
    assert_eq!(fork.state(), ForkState::Waiting);
    rig.service().remove_fork("f", false).unwrap();
    let refused = rig.service().remove_template("t").unwrap_err();
    assert_eq!(refused.code, ErrorCode::TemplateInUse);
    assert!(refused.message.contains("may not inspect"), "{}", refused.message);
    drop(mapper);
}

/// A source of zeros without a file.
struct NoFile(ZeroMap);

impl PageSource for NoFile {
    fn len(&self) -> ByteLen {
        ByteLen::new(1 << 20)
    }

    fn try_read<'a>(&'a self, _: TemplateOffset, _: &'a mut [u8]) -> Result<Page<'a>, SourceError> {
        Ok(Page::Zero)
    }

    fn read(&self, _: TemplateOffset, buffer: &mut [u8]) -> Result<(), SourceError> {
        buffer.fill(0);
        Ok(())
    }

    fn check_unchanged(&self) -> Result<(), SourceError> {
        Ok(())
    }

    fn zeros(&self) -> &ZeroMap {
        &self.0
    }
}

#[test]
fn a_template_without_a_file_is_served_with_uffd_and_has_nothing_that_only_a_file_has() {
    let rig = Rig::start();
    let spec = Spec {
        vmstate_path: None,
        page_size: 4096,
        page_size_is_guess: false,
    };
    let source = Arc::new(NoFile(ZeroMap::new(ByteLen::new(1 << 20))));
    let template = Arc::new(Template::new("n".parse().unwrap(), spec, source, None));
    rig.service().registry.restore_template(Arc::clone(&template));

    let shown = rig.service().show_template("n").unwrap();
    assert_eq!((shown.mem_path, shown.size_bytes), (None, 1 << 20));
    let wanted = |backend| CreateFork {
        id: Some("f".to_owned()),
        backend: Some(backend),
        ..CreateFork::of("n")
    };
    let refused = rig.service().create_fork(&wanted(Backend::File)).err().unwrap();
    assert_eq!(refused.code, ErrorCode::BackendUnavailable, "{refused}");
    let fork = rig.service().create_fork(&wanted(Backend::Auto)).unwrap();
    assert_eq!(fork.backend(), Backend::Uffd, "{}", fork.reason);
    let refused = rig.service().warm_template("n", false).err().unwrap();
    assert_eq!(refused.code, ErrorCode::TemplateInvalid, "{refused}");
    let refused = rig.service().add_template("n", AddTemplate::new(rig.file.path()));
    assert_eq!(refused.err().unwrap().code, ErrorCode::TemplateExists);

    rig.service().keep_all();
    rig.service().begin_withdrawal(&template, "it is withdrawn", None);
    for withdrawal in rig.service().take_withdrawals() {
        withdrawal.join().unwrap();
    }
    assert_eq!(fork.state(), ForkState::Failed);
    rig.service().remove_template("n").unwrap();
    assert_eq!(rig.service().registry.templates().len(), 1);
}
