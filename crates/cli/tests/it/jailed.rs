//! Firecrackers in the jail of the real jailer: another root directory, user, PID namespace and cgroup. Skipped where there is
//! no KVM, and for users other than root.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use pagecast_client::fork::BackendType;
use pagecast_client::{Backend, ClientError, CreateFork, ErrorCode, ForkState};
use pagecast_testkit::firecracker::{BlankVmm, Jail, MemBackend, MicroVm, Snapshot, SnapshotOptions, jailer, kvm};
use pagecast_testkit::skip::{Need, skip};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Gid, Uid, chown};
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

    /// Ends them, and sees to it that nothing is left of them. `others` forks stay.
    fn end(&self, forks: Vec<JailedFork>, others: usize) {
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
        assert_eq!(self.served.call(self.served.client.forks(false)).len(), others);
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
        jails.end(forks, 0);
    }
}

#[test]
fn twenty_jailed_forks_with_uffd_read_every_byte_and_leave_nothing() {
    let Some(jails) = Jails::new() else { return };
    let mut forks = jails.restore("many", Backend::Uffd, FORKS);
    forks.iter().for_each(assert_is_jailed);
    read_and_write(&mut forks, &jails.snapshot);
    jails.end(forks, 0);
}

#[test]
fn twenty_jailed_forks_with_file_read_every_byte_and_leave_nothing() {
    let Some(jails) = Jails::new() else { return };
    let mut forks = jails.restore("many", Backend::File, FORKS);
    forks.iter().for_each(assert_is_jailed);
    read_and_write(&mut forks, &jails.snapshot);
    jails.end(forks, 0);
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
    assert!(error.contains("must be readable for that user"), "{error}");
    assert_nothing_is_left(&host);
}

/// What a VMM that a guest has taken over could do: a process with the root directory, the mounts and the user of a jail.
const HOSTILE: &str = r#"
import ctypes, fcntl, mmap, os, socket, sys
root, uid, gid, act = sys.argv[1].encode(), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    if result != 0:
        raise OSError(ctypes.get_errno(), "a call failed")
# As the jailer does it: a mount namespace (CLONE_NEWNS) whose mounts are slaves (MS_SLAVE, MS_REC), the root directory as a
# mount of its own (MS_BIND, MS_REC), pivot_root(2), and nothing of the old root (MNT_DETACH).
check(libc.unshare(0x20000))
check(libc.mount(None, b"/", None, 0x80000 | 0x4000, None))
check(libc.mount(root, root, None, 0x1000 | 0x4000, None))
os.chdir(root)
check(libc.syscall(155, b".", b"."))
check(libc.umount2(b".", 2))
os.chdir("/")
os.setgroups([])
os.setgid(gid)
os.setuid(uid)
kept = []
if act == "lock":
    kept.append(os.open("/", os.O_RDONLY))
    fcntl.flock(kept[0], fcntl.LOCK_EX)
if act == "map":
    fd = os.open(b"/" + bytes.fromhex(sys.argv[5]), os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, 4096)
    kept.append(mmap.mmap(fd, 4096, mmap.MAP_SHARED))
if act == "probe":
    for _ in range(20):
        probe = socket.socket(socket.AF_UNIX)
        probe.connect("/uffd.sock")
        probe.close()
print("done", flush=True)
sys.stdin.read()
"#;

/// A process in a jail that does one of these. Dropping it ends it.
struct Hostile(Child);

impl Hostile {
    /// Returns once it has done it. It keeps its lock or its mappings.
    fn start(jail: &Jail, act: &[&str]) -> Self {
        chown(jail.root(), Some(Uid::from_raw(UID)), Some(Gid::from_raw(GID))).unwrap();
        let mut child = Command::new("python3")
            .args(["-c", HOSTILE])
            .arg(jail.root())
            .args([UID.to_string(), GID.to_string()])
            .args(act)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let read = BufReader::new(child.stdout.take().unwrap()).read_line(&mut said);
        let hostile = Self(child);
        read.unwrap();
        assert_eq!(said, "done\n");
        hostile
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Has a process in the jail of a fork do something hostile, and sees to it that all other forks, those before and those after
/// it, and at last the fork itself and the daemon's end, go well.
fn nobody_else_is_hurt_by(acts: &[&[&str]]) {
    let Some(mut jails) = Jails::new() else { return };
    let mut others = jails.restore("before", Backend::Uffd, 1);
    others.extend(jails.restore("before", Backend::File, 1));
    let (jail, backend) = jails.jail("its", Backend::Uffd);
    let hostile: Vec<_> = acts.iter().map(|act| Hostile::start(&jail, act)).collect();

    others.extend(jails.restore("after", Backend::Uffd, 1));
    others.extend(jails.restore("after", Backend::File, 1));
    assert_eq!(jails.served.call(jails.served.client.forks(true)).len(), 5);
    read_and_write(&mut others, &jails.snapshot);
    assert_eq!(jails.served.fork("its").state, ForkState::Waiting);
    let mut its = vec![enter(&jails.snapshot, "its", jail, &backend)];
    jails.served.await_fork("its", ForkState::Serving);
    read_and_write(&mut its, &jails.snapshot);
    let removed = jails.served.runtime.block_on(jails.served.client.remove_template("t"));
    let Err(ClientError::Api(refused)) = removed else {
        panic!("{removed:?}")
    };
    assert_eq!(refused.code, ErrorCode::TemplateInUse);

    jails.end(others, 1);
    jails.served.signal(Signal::TERM);
    assert!(jails.served.wait().success());
    read_and_write(&mut its, &jails.snapshot);
    drop(hostile);
}

#[test]
fn a_jailed_process_that_locks_the_folder_of_its_socket_hurts_nobody_else() {
    nobody_else_is_hurt_by(&[&["lock"]]);
}

#[test]
fn a_jailed_process_that_maps_files_with_strange_names_hurts_nobody_else() {
    // In hexadecimal: `SYSV`, `SYSV0000000z`, bytes that are not UTF-8, a second line, and `mem (deleted)`, a process each, so that
    // one name does not keep a parser from another.
    let names = [
        "53595356",
        "53595356303030303030307a",
        "fffe",
        "610a2d",
        "6d656d202864656c6574656429",
    ];
    let acts = names.map(|name| ["map", name]);
    let acts: Vec<&[&str]> = acts.iter().map(|act| &act[..]).collect();
    nobody_else_is_hurt_by(&acts);
}

#[test]
fn a_jailed_process_that_connects_and_closes_does_not_use_its_fork_up() {
    nobody_else_is_hurt_by(&[&["probe"]]);
}

/// As scripts do before they start the jailer.
#[test]
fn a_jail_that_is_given_to_its_user_with_all_that_is_in_it_takes_no_template_along() {
    let Some(jails) = Jails::new() else { return };
    let (jail, backend) = jails.jail("its", Backend::File);
    let owner_and_mode = || {
        let metadata = fs::metadata(&jails.snapshot.mem_path).unwrap();
        (metadata.uid(), metadata.gid(), metadata.mode())
    };
    let before = owner_and_mode();
    for (program, wanted) in [("chown", "12345:12346"), ("chmod", "0777")] {
        // It may fail for the memory file.
        Command::new(program)
            .args(["-R", wanted])
            .arg(jail.root())
            .status()
            .unwrap();
    }
    assert_eq!(owner_and_mode(), before);
    let mut its = vec![enter(&jails.snapshot, "its", jail, &backend)];
    jails.served.await_fork("its", ForkState::Serving);
    read_and_write(&mut its, &jails.snapshot);
    jails.end(its, 0);
}
