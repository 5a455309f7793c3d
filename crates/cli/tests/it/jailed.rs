//! Firecrackers in the jail of the real jailer: another root directory, user, PID namespace and cgroup. Skipped where there is
//! no KVM, and for users other than root.

use std::fs;
use std::path::{Path, PathBuf};

use pagecast_client::fork::BackendType;
use pagecast_client::{Backend, CreateFork, ForkState};
use pagecast_testkit::firecracker::{BlankVmm, Jail, MemBackend, MicroVm, Snapshot, SnapshotOptions, jailer, kvm};
use pagecast_testkit::skip::{Need, skip};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, kill_process, pidfd_open};
use serde_json::Value;

use crate::command::text;
use crate::daemon::{eventually, signal};
use crate::host::Host;
use crate::served::Served;

const UID: u32 = 12345;
const GID: u32 = 12346;
const FORKS: usize = 20;

/// A daemon with one template, whose forks are jailed.
struct Jails {
    served: Served,
    snapshot: Snapshot,
    _folder: tempfile::TempDir,
}

/// A jailed fork, and where its jail is.
struct JailedFork {
    id: String,
    vm: MicroVm,
    root: PathBuf,
}

impl Jails {
    fn new() -> Option<Self> {
        if cannot_jail() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let snapshot = Snapshot::create(&SnapshotOptions::default(), folder.path()).unwrap();
        let served = Served::start(&folder.path().join("run"), &[]);
        served.add_template("t", &snapshot.mem_path);
        Some(Self {
            served,
            snapshot,
            _folder: folder,
        })
    }

    /// Makes a fork in a jail that nobody is in yet.
    fn jail(&self, id: &str, backend: Backend) -> (Jail, MemBackend) {
        let jail = Jail::new(UID, GID).unwrap().unwrap();
        let fork = CreateFork {
            id: Some(id.to_owned()),
            backend: Some(backend),
            ..CreateFork::of("t")
        };
        let created = self.served.create(&match backend {
            Backend::File => CreateFork {
                path: Some(jail.root().join("mem")),
                ..fork
            },
            _ => CreateFork {
                socket_path: Some(jail.root().join("uffd.sock")),
                uid: Some(UID),
                gid: Some(GID),
                ..fork
            },
        });
        let path = created.mem_backend.backend_path;
        let backend = match created.mem_backend.backend_type {
            BackendType::Uffd => MemBackend::Uffd(path),
            BackendType::File => MemBackend::File(path),
        };
        (jail, backend)
    }

    /// Makes `count` forks and restores their microVMs at once.
    fn restore(&self, name: &str, backend: Backend, count: usize) -> Vec<JailedFork> {
        let jails: Vec<_> = (1..=count)
            .map(|number| {
                let id = format!("{name}-{backend}-{number}");
                let (jail, told) = self.jail(&id, backend);
                (id, jail, told)
            })
            .collect();
        let (snapshot, served) = (&self.snapshot, &self.served);
        let forks: Vec<_> = std::thread::scope(|scope| {
            let restores: Vec<_> = jails
                .into_iter()
                .map(|(id, jail, told)| scope.spawn(move || enter(snapshot, &id, jail, &told)))
                .collect();
            restores.into_iter().map(|restore| restore.join().unwrap()).collect()
        });
        for fork in &forks {
            let found = served.await_fork(&fork.id, ForkState::Serving);
            assert_eq!(found.pid, Some(fork.vm.pid().cast_signed()));
            assert!(found.memory.is_some(), "{found:#?}");
        }
        forks
    }

    /// Ends them, and sees to it that nothing is left of them.
    fn end(&self, forks: Vec<JailedFork>) {
        let mut gone = Vec::new();
        for mut fork in forks {
            fork.vm.kill().unwrap();
            self.served.await_fork(&fork.id, ForkState::Exited);
            self.served.call(self.served.client.remove_fork(&fork.id, false));
            for name in ["uffd.sock", "mem"] {
                assert!(!fork.root.join(name).exists(), "{name}");
            }
            gone.extend(fork.vm.jail().unwrap().cgroup().map(Path::to_owned));
            gone.push(fork.root);
        }
        for path in gone {
            assert!(!path.exists(), "{} is left", path.display());
            assert_no_mounts_in(&path);
        }
        assert_eq!(self.served.call(self.served.client.forks(false)).len(), 0);
    }
}

/// Restores the microVM of a fork in a jail. Its pid stays unknown to the daemon.
fn enter(snapshot: &Snapshot, id: &str, jail: Jail, backend: &MemBackend) -> JailedFork {
    let root = jail.root();
    let vm = BlankVmm::start_in(jail).unwrap();
    let (vm, _) = vm.restore(snapshot, backend).unwrap();
    JailedFork {
        id: id.to_owned(),
        vm,
        root,
    }
}

fn cannot_jail() -> bool {
    if !geteuid().is_root() {
        skip((Need::Root, "for the jailer"));
        return true;
    }
    kvm().unwrap().skips()
}

fn assert_no_mounts_in(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let folder = folder.to_str().unwrap();
    let left: Vec<_> = mounts.lines().filter(|line| line.contains(folder)).collect();
    assert!(left.is_empty(), "{left:#?}");
}

fn assert_is_jailed(fork: &JailedFork) {
    let pid = fork.vm.pid();
    let jail = fork.vm.jail().unwrap();
    assert!(jail.confines(pid).unwrap());
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for line in [format!("Uid:\t{UID}\t"), format!("Gid:\t{GID}\t")] {
        assert!(status.contains(&line), "{status}");
    }
    // Its pid in each namespace from ours on: it is the first process of its own.
    let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap();
    assert_eq!(pids.split_whitespace().last(), Some("1"), "{pids}");
    if let Some(cgroup) = jail.cgroup() {
        let inside = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
        assert!(inside.lines().any(|line| line == pid.to_string()), "{inside}");
    }
}

/// All at once: each checks its memory, writes some of it with a pattern of its own, and checks again.
fn read_and_write(forks: &mut [JailedFork], snapshot: &Snapshot) {
    let verify = |vm: &mut MicroVm| {
        let verified = vm.verify(snapshot.whole).unwrap();
        assert_eq!(
            (verified.pages, verified.mismatches),
            (snapshot.whole.pages(), 0),
            "{verified:?}"
        );
    };
    std::thread::scope(|scope| {
        for (fork, pattern) in forks.iter_mut().zip(2..) {
            scope.spawn(move || {
                verify(&mut fork.vm);
                fork.vm.write(snapshot.filled, 8, pattern).unwrap();
            });
        }
    });
    std::thread::scope(|scope| {
        for fork in forks {
            scope.spawn(move || verify(&mut fork.vm));
        }
    });
}

#[test]
fn a_jailed_fork_of_each_backend_is_found_and_reads_every_byte() {
    let Some(jails) = Jails::new() else { return };
    for backend in [Backend::Uffd, Backend::File] {
        let mut forks = jails.restore("one", backend, 1);
        assert_is_jailed(&forks[0]);
        read_and_write(&mut forks, &jails.snapshot);
        jails.end(forks);
    }
}

#[test]
fn twenty_jailed_forks_with_uffd_read_every_byte_and_leave_nothing() {
    let Some(jails) = Jails::new() else { return };
    let mut forks = jails.restore("many", Backend::Uffd, FORKS);
    forks.iter().for_each(assert_is_jailed);
    read_and_write(&mut forks, &jails.snapshot);
    jails.end(forks);
}

#[test]
fn twenty_jailed_forks_with_file_read_every_byte_and_leave_nothing() {
    let Some(jails) = Jails::new() else { return };
    let mut forks = jails.restore("many", Backend::File, FORKS);
    forks.iter().for_each(assert_is_jailed);
    read_and_write(&mut forks, &jails.snapshot);
    jails.end(forks);
}

/// The arguments that jail the Firecrackers of a run.
fn jailed(arguments: &[&'static str]) -> Vec<String> {
    let jailer = jailer().unwrap();
    let mut all: Vec<_> = ["--jailer", jailer.to_str().unwrap(), "--uid", "12345", "--gid", "12346"]
        .map(str::to_owned)
        .into();
    if has_memory_cgroup() {
        all.extend(["--cgroup", "memory.limit_in_bytes=1073741824"].map(str::to_owned));
    }
    all.extend(arguments.iter().map(|&argument| argument.to_owned()));
    all
}

/// Of version 1.
fn has_memory_cgroup() -> bool {
    Path::new("/sys/fs/cgroup/memory").exists()
}

fn as_strs(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// The processes that run as the user of the jails, and whose root directory is a jail of a run in `runs`.
fn jailed_in(runs: &Path) -> Vec<i32> {
    use std::os::unix::fs::MetadataExt as _;
    let of = |path: PathBuf| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let below = |folder: PathBuf| {
        fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
    };
    let programs = below(runs.to_owned()).flat_map(below);
    let roots: Vec<_> = programs
        .flat_map(below)
        .filter_map(|jail| of(jail.join("root")))
        .collect();
    below("/proc".into())
        .filter(|process| of(process.join("root")).is_some_and(|root| roots.contains(&root)))
        .filter_map(|process| process.file_name()?.to_str()?.parse().ok())
        .collect()
}

fn assert_nothing_is_left(host: &Host) {
    host.assert_nothing_is_left();
    assert_no_mounts_in(host.runs.path());
}

/// The cgroups of a run.
fn cgroups(report: &Value) -> Vec<PathBuf> {
    let run = Path::new(report["folder"].as_str().unwrap()).file_name().unwrap();
    let mounts = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    mounts
        .map(|mount| mount.path().join(run))
        .filter(|path| path.exists())
        .collect()
}

#[test]
fn a_run_jails_forks_of_each_backend_and_leaves_nothing() {
    if cannot_jail() {
        return;
    }
    let host = Host::new().unwrap();
    for backend in ["uffd", "file", "auto"] {
        let run = host.start(&as_strs(&jailed(&[
            "-n",
            "5",
            "--backend",
            backend,
            "--keep",
            "--json",
        ])));
        let report = run.report();
        let forks = report["forks"].as_array().unwrap();
        assert_eq!(forks.len(), 5);
        let mut told = Vec::new();
        for fork in forks {
            assert_eq!(fork["state"], "resumed", "{fork:#}");
            assert!(fork["memory"]["rss"].as_u64().unwrap() > 0, "{fork:#}");
            let pid = i32::try_from(fork["pid"].as_i64().unwrap()).unwrap();
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            assert!(
                status.contains("Uid:\t12345\t") && status.contains("Gid:\t12346\t"),
                "{status}"
            );
            told.push(pid);
        }
        let mut inside = jailed_in(host.runs.path());
        told.sort_unstable();
        inside.sort_unstable();
        assert_eq!(inside, told);
        assert!(!cgroups(&report).is_empty() || !has_memory_cgroup());
        let raw = |pid: &i32| Pid::from_raw(*pid).unwrap();
        let pidfds: Vec<_> = told
            .iter()
            .map(|pid| pidfd_open(raw(pid), PidfdFlags::empty()).unwrap())
            .collect();
        signal(&run.child, Signal::INT);
        assert_eq!(run.wait().0, Some(0), "{backend}");
        for pidfd in pidfds {
            let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
            assert!(poll(&mut ended, Some(&Timespec::default())).unwrap() > 0, "it lives");
        }
        assert_nothing_is_left(&host);
        assert_eq!(cgroups(&report), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_jailed_firecracker_that_dies_is_told_of_and_the_others_live_on() {
    if cannot_jail() {
        return;
    }
    let host = Host::new().unwrap();
    let run = host.start(&as_strs(&jailed(&["-n", "3", "--keep", "--json"])));
    run.report();
    let all = jailed_in(host.runs.path());
    let victim = Pid::from_raw(all[0]).unwrap();
    kill_process(victim, Signal::KILL).unwrap();
    run.await_line("signal: 9 (SIGKILL)");
    assert_eq!(jailed_in(host.runs.path()).len(), 2);
    signal(&run.child, Signal::TERM);
    assert_eq!(run.wait().0, Some(5));
    assert_nothing_is_left(&host);
}

#[test]
fn jailed_firecrackers_of_a_killed_run_are_ended_by_the_next() {
    if cannot_jail() {
        return;
    }
    let host = Host::new().unwrap();
    for backend in ["uffd", "file"] {
        let mut run = host.start(&as_strs(&jailed(&[
            "-n",
            "2",
            "--backend",
            backend,
            "--keep",
            "--json",
        ])));
        let report = run.report();
        assert_eq!(jailed_in(host.runs.path()).len(), 2);
        run.child.kill().unwrap();
        run.child.wait().unwrap();
        let next = host.output(&as_strs(&jailed(&[])));
        assert!(next.status.success(), "{next:?}");
        assert_eq!(text(&next.stderr), "");
        assert_eq!(jailed_in(host.runs.path()).len(), 0);
        assert_nothing_is_left(&host);
        assert_eq!(cgroups(&report), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_signal_while_the_jailer_starts_leaves_nothing() {
    if cannot_jail() {
        return;
    }
    let host = Host::new().unwrap();
    let started = host.template.path().join("started");
    let script = host.template.path().join("jailer");
    fs::write(
        &script,
        format!("#!/bin/sh\ntouch {}\nexec sleep 600\n", started.display()),
    )
    .unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for backend in ["uffd", "file"] {
        let arguments = ["--uid", "1", "--gid", "1", "-n", "2", "--backend", backend];
        let run = host.start(&[&["--jailer", script.to_str().unwrap()][..], &arguments].concat());
        eventually("it starts", || started.exists());
        signal(&run.child, Signal::INT);
        assert_eq!(run.wait().0, Some(130));
        assert_nothing_is_left(&host);
        fs::remove_file(&started).unwrap();
    }
}

#[test]
fn a_jailer_that_fails_is_shown_with_what_it_said() {
    if cannot_jail() {
        return;
    }
    let host = Host::new().unwrap();
    let run = host.output(&as_strs(&jailed(&["-n", "2", "--cgroup", "memory.no_such_setting=1"])));
    assert_eq!(run.status.code(), Some(5), "{run:?}");
    let said = text(&run.stdout);
    assert!(
        said.contains("the jailer failed") && said.contains("its stderr ends with:"),
        "{said}"
    );
    assert_nothing_is_left(&host);
}

#[test]
fn a_memory_file_that_the_jailed_user_cannot_read_is_told_of() {
    if cannot_jail() {
        return;
    }
    let host = Host::new().unwrap();
    let mem_file = host.template.path().join("mem");
    fs::set_permissions(&mem_file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let run = host.output(&as_strs(&jailed(&["--backend", "file", "--json"])));
    assert_eq!(run.status.code(), Some(5), "{run:?}");
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    let error = report["forks"][0]["error"].as_str().unwrap();
    assert!(error.contains("has to be readable for that user"), "{error}");
    assert_nothing_is_left(&host);
}
