//! `pagecast serve` as a process: started, killed, started again, stopped by signals.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pagecast_client::template::{Protection, TemplateState, Warm, WarmthState};
use pagecast_client::{AddTemplate, Backend, ClientError, CreateFork, ErrorCode, ForkState};
use pagecast_testkit::sim_vmm::SimVmm;
use pagecast_testkit::skip::{Need, skip};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};
use rustix::fs::IFlags;
use rustix::process::Signal;

use crate::served::{Served, eventually, is_dead, reads_right, serve};

const SIZE: u64 = 4 << 20;

/// A template, and a folder that the run dir is in.
struct Files {
    template: TemplateFile,
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("template.mem");
        Self {
            template: TemplateFile::create_at(&path, TemplateModel::of_data(SIZE, 1)).unwrap(),
            folder,
        }
    }

    fn run_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// A daemon that has the template as `t`.
    fn serve(&self) -> Served {
        let served = Served::start(&self.run_dir(), &[]);
        served.add_template("t", self.template.path());
        served
    }

    fn serving(&self, served: &Served, id: &str, backend: Backend) -> SimVmm {
        served.serving(fork(id, backend), self.template.model())
    }

    /// The names of what is kept of forks.
    fn kept(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.run_dir().join("forks")).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn fork(id: &str, backend: Backend) -> CreateFork {
    CreateFork {
        id: Some(id.to_owned()),
        backend: Some(backend),
        ..CreateFork::of("t")
    }
}

/// How a daemon that does not start ends, and what it says.
#[track_caller]
fn does_not_start(run_dir: &Path, flags: &[&str]) -> String {
    let output = serve(run_dir, flags).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(output.stdout.is_empty());
    // For people, in one line, however the log looks.
    let last = said.lines().last().unwrap_or_default().to_owned();
    assert!(last.starts_with("pagecast: "), "{said}");
    last
}

#[test]
fn after_a_kill_templates_and_file_forks_are_found_again_and_lost_vmms_are_killed() {
    let files = Files::new();
    let mut first = files.serve();
    let place = files.folder.path().canonicalize().unwrap().join("place");
    let file = files.serving(&first, "file", Backend::File);
    let placed = first.serving(
        CreateFork {
            path: Some(place.clone()),
            ..fork("placed", Backend::File)
        },
        files.template.model(),
    );
    let died = files.serving(&first, "died", Backend::File);
    let uffd = [
        files.serving(&first, "uffd-1", Backend::Uffd),
        files.serving(&first, "uffd-2", Backend::Uffd),
    ];
    reads_right(&uffd[0]);
    let complete = files.serving(&first, "complete", Backend::Uffd);
    first.call(first.client.complete_fork("complete"));
    first.await_fork("complete", ForkState::Complete);
    first.create(&fork("waiting", Backend::Uffd));
    eventually("what is complete is forgotten, what is served is kept", || {
        files.kept()
            == [
                "died.json",
                "file.json",
                "placed.json",
                "uffd-1.json",
                "uffd-2.json",
                "waiting.sock",
            ]
    });
    first.kill();
    died.kill().unwrap();
    let mut garbage = std::fs::read(files.run_dir().join("forks/file.json")).unwrap();
    garbage.truncate(garbage.len() / 2);
    std::fs::write(files.run_dir().join("forks/garbage.json"), garbage).unwrap();
    std::fs::write(files.run_dir().join("forks/NO NAME.json"), "{}").unwrap();
    std::fs::write(files.run_dir().join("templates/garbage.json"), b"\xff").unwrap();

    let mut second = Served::start(&files.run_dir(), &[]);
    // A VMM whose server is gone would hang for ever.
    for (vmm, id) in uffd.iter().zip(["uffd-1", "uffd-2"]) {
        assert!(is_dead(vmm));
        let said = second.said(id);
        assert!(
            said.iter().any(|line| line.contains("ERROR")
                && line.contains("would hang")
                && line.contains(&vmm.pid().to_string())),
            "{said:?}"
        );
    }
    assert_eq!(second.said("garbage").len(), 2);
    for (id, vmm) in [("file", &file), ("placed", &placed)] {
        let found = second.fork(id);
        assert_eq!(
            (found.state, found.pid),
            (ForkState::Serving, Some(vmm.pid().cast_signed()))
        );
        assert!(found.memory.is_some_and(|memory| memory.shared >= SIZE / 2));
        reads_right(vmm);
    }
    reads_right(&complete);
    let ids: Vec<_> = second
        .call(second.client.forks(false))
        .into_iter()
        .map(|fork| fork.id)
        .collect();
    assert_eq!(ids, ["file", "placed"]);
    let template = second.call(second.client.template("t"));
    assert_eq!(
        (template.state, template.forks, template.size_bytes),
        (TemplateState::Ready, 2, SIZE)
    );
    assert!(!files.run_dir().join("forks/waiting.sock").exists());
    // It goes on as if nothing had been.
    let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
    let created = second.create(&fork("next", Backend::File));
    assert_eq!(inode(&created.mem_backend.backend_path), inode(files.template.path()));
    let again = files.serving(&second, "uffd-1", Backend::Uffd);
    reads_right(&again);
    // Their ends are seen too.
    for (id, vmm) in [("file", file), ("placed", placed)] {
        vmm.kill().unwrap();
        second.await_fork(id, ForkState::Exited);
    }
    eventually("its place is taken away", || !place.exists());
    for id in ["next", "uffd-1"] {
        second.call(second.client.remove_fork(id, true));
    }
    second.call(second.client.remove_template("t"));
    assert!(!second.said("WARN").is_empty(), "of what could not be read");
    files.template.check_untouched().unwrap();
    assert_eq!(std::fs::metadata(files.template.path()).unwrap().nlink(), 1);
}

/// A daemon can die between the end of a completion and its forgetting the fork.
#[test]
fn a_vmm_that_was_complete_outlives_a_daemon_that_had_no_time_to_note_it() {
    let files = Files::new();
    let mut first = files.serve();
    let vmm = files.serving(&first, "f", Backend::Uffd);
    reads_right(&vmm);
    let state = files.run_dir().join("forks/f.json");
    eventually("it is kept", || state.exists());
    let kept = std::fs::read(&state).unwrap();
    first.call(first.client.complete_fork("f"));
    first.await_fork("f", ForkState::Complete);
    first.kill();
    // All its memory, and what it writes and gives back.
    reads_right(&vmm);
    std::fs::write(&state, kept).unwrap();
    let second = Served::start(&files.run_dir(), &[]);
    assert!(!is_dead(&vmm));
    reads_right(&vmm);
    assert!(!state.exists());
    assert!(second.call(second.client.forks(false)).is_empty());
}

/// What was written while nobody looked is what these VMMs would read from now on.
#[test]
fn a_template_that_changed_while_no_daemon_ran_takes_its_file_forks_with_it() {
    let files = Files::new();
    let mut first = files.serve();
    let file = files.serving(&first, "file", Backend::File);
    first.kill();
    std::fs::OpenOptions::new()
        .write(true)
        .open(files.template.path())
        .and_then(|file| std::os::unix::fs::FileExt::write_all_at(&file, b"X", 0))
        .unwrap();
    let second = Served::start(&files.run_dir(), &[]);
    assert!(is_dead(&file));
    let found = second.fork("file");
    assert_eq!(
        (found.state, &*found.error.unwrap().code),
        (ForkState::Failed, "template_changed")
    );
    let template = second.call(second.client.template("t"));
    assert_eq!(
        (template.state, template.changed.as_deref()),
        (TemplateState::Changed, Some("it was written"))
    );
    let refused = second.runtime.block_on(second.client.create_fork(&CreateFork::of("t")));
    assert!(matches!(refused, Err(ClientError::Api(error)) if error.code == ErrorCode::TemplateChanged));
    second.call(second.client.remove_template("t"));
    second.add_template("t", files.template.path());
}

/// As often as the daemon is killed while it makes forks, the next one cleans up.
/// The kernel lets go what a process has locked, however it ends; the next one locks it again.
#[test]
fn a_template_that_was_to_stay_in_memory_stays_there_after_a_kill() {
    let files = Files::new();
    let mut first = files.serve();
    let stays = |served: &Served| {
        let told = served.call(served.client.template("t")).warmth;
        told.is_some_and(|told| told.state == WarmthState::Warm && told.resident && told.locked_bytes == SIZE)
    };
    first.call(first.client.warm_template("t", Warm { resident: true }));
    eventually("the template is in memory", || stays(&first));
    let file = files.serving(&first, "file", Backend::File);
    first.kill();
    reads_right(&file);

    let second = Served::start(&files.run_dir(), &[]);
    eventually("the template is kept in memory again", || stays(&second));
    reads_right(&file);
    reads_right(&files.serving(&second, "next", Backend::File));
    second.call(second.client.cool_template("t"));
    assert_eq!(second.call(second.client.template("t")).warmth, None);
}

#[test]
fn nothing_piles_up_however_often_it_is_killed() {
    let files = Files::new();
    files.serve().kill();
    for _ in 0..5 {
        let mut served = Served::start(&files.run_dir(), &[]);
        let socket = served.client.socket().to_owned();
        // Cut off in the middle of it.
        let asking = std::thread::spawn(move || {
            let client = pagecast_client::Client::new(socket);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let mut made = 0;
            for number in 0.. {
                let backend = [Backend::Uffd, Backend::File][number % 2];
                if runtime
                    .block_on(client.create_fork(&fork(&format!("f{number}"), backend)))
                    .is_err()
                {
                    break;
                }
                made += 1;
                let path = format!("f{number}");
                if runtime.block_on(client.remove_fork(&path, false)).is_err() {
                    break;
                }
            }
            made
        });
        eventually("it is busy", || !served.said("fork deleted").is_empty());
        served.kill();
        assert!(asking.join().unwrap() > 0);
    }
    let served = Served::start(&files.run_dir(), &[]);
    for fork in served.call(served.client.forks(false)) {
        served.call(served.client.remove_fork(&fork.id, false));
    }
    served.call(served.client.remove_template("t"));
    assert_eq!(files.kept(), [""; 0]);
    assert_eq!(std::fs::read_dir(files.run_dir().join("templates")).unwrap().count(), 0);
    assert_eq!(std::fs::metadata(files.template.path()).unwrap().nlink(), 1);
}

#[test]
fn sigterm_completes_uffd_forks_and_vmms_of_both_backends_live_on() {
    for signal in [Signal::TERM, Signal::INT] {
        let files = Files::new();
        let mut served = files.serve();
        let uffd: Vec<_> = (0..10)
            .map(|number| files.serving(&served, &format!("uffd-{number}"), Backend::Uffd))
            .collect();
        let file = files.serving(&served, "file", Backend::File);
        reads_right(&uffd[0]);
        served.signal(signal);
        assert_eq!(served.told(), "STOPPING=1");
        assert!(served.wait().success());
        assert!(!files.run_dir().join("control.sock").exists());
        uffd.iter().chain([&file]).for_each(reads_right);
        assert_eq!(files.kept(), ["file.json"]);
        // Nor does the next daemon take them for ones that have lost their server.
        let second = Served::start(&files.run_dir(), &[]);
        assert_eq!(second.fork("file").pid, Some(file.pid().cast_signed()));
        uffd.iter().chain([&file]).for_each(reads_right);
        second.call(second.client.remove_fork("file", true));
        second.call(second.client.remove_template("t"));
        files.template.check_untouched().unwrap();
    }
}

#[test]
fn where_completing_does_not_fit_it_stays_and_a_second_signal_kills() {
    use pagecast_testkit::PageSize;
    use pagecast_testkit::sim_vmm::Connect;
    // In the pool of hugepages, whose size a test can choose.
    let Some(_pages) = pagecast_testkit::hugepages::HugePages::reserve(SIZE >> 21).unwrap() else {
        return;
    };
    let files = Files::new();
    let mut served = files.serve();
    let file = files.serving(&served, "file", Backend::File);
    let created = served.create(&fork("huge", Backend::Uffd));
    let huge = SimVmm::spawn().unwrap();
    huge.run(Connect {
        page_size: PageSize::Huge,
        ..Connect::new(&created.mem_backend.backend_path, files.template.model())
    })
    .unwrap();
    served.await_fork("huge", ForkState::Serving);
    // The reservation gives the old size back.
    std::fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();
    served.signal(Signal::TERM);
    let staying = served.await_line("cannot stop");
    assert!(staying.to_string().contains("hugepages"), "{staying:#}");
    assert_eq!(
        (served.told(), served.told()),
        ("STOPPING=1".to_owned(), "READY=1".to_owned())
    );
    // Comes by itself, also after a SIGTERM: tries again, and kills nobody.
    served.signal(Signal::HUP);
    served.await_line("cannot stop");
    // As before: it is answered, and takes forks.
    let other = files.serving(&served, "other", Backend::File);
    served.signal(Signal::TERM);
    assert_eq!(served.wait().code(), Some(3));
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&huge.wait().unwrap()),
        Some(9)
    );
    [&file, &other].into_iter().for_each(reads_right);
    assert_eq!(files.kept(), ["file.json", "other.json"]);
}

#[test]
fn a_second_daemon_is_refused_and_told_of_the_first() {
    let files = Files::new();
    let first = files.serve();
    let said = does_not_start(&files.run_dir(), &[]);
    assert!(said.contains(&format!("pid {}", first.pid())), "{said}");
    assert!(said.contains("--run-dir"), "{said}");
    // And has done the first no harm.
    assert_eq!(first.call(first.client.health()).pid, first.pid());
    reads_right(&files.serving(&first, "f", Backend::Uffd));
}

#[test]
fn a_run_dir_that_cannot_be_is_told_why() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let said = does_not_start(&file, &[]);
    assert!(
        said.contains(file.to_str().unwrap()) && said.contains("--run-dir"),
        "{said}"
    );
    let said = does_not_start(&file.join("below"), &[]);
    assert!(said.contains("file/below") && said.contains("--run-dir"), "{said}");
    let said = does_not_start(Path::new("/proc/nothing"), &[]);
    assert!(said.contains("/proc/nothing"), "{said}");
    let deep = folder.path().join("x".repeat(90)).join("y".repeat(90));
    let said = does_not_start(&deep, &[]);
    assert!(said.contains("control.sock"), "{said}");
    if !rustix::process::geteuid().is_root() {
        skip((Need::Root, "to have a folder of another user"));
        return;
    }
    let theirs = folder.path().join("theirs");
    std::fs::create_dir(&theirs).unwrap();
    std::os::unix::fs::chown(&theirs, Some(54_321), None).unwrap();
    let said = does_not_start(&theirs, &[]);
    assert!(said.contains("belongs to user 54321"), "{said}");
    assert_eq!(std::fs::read_dir(&theirs).unwrap().count(), 0);
}

#[test]
fn a_run_dir_without_permission_is_told() {
    if !rustix::process::geteuid().is_root() {
        skip((Need::Root, "to be another user"));
        return;
    }
    // Where another user finds it.
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let binary = folder.path().join("pagecast");
    std::fs::copy(env!("CARGO_BIN_EXE_pagecast"), &binary).unwrap();
    let output = std::process::Command::new(&binary)
        .args(["serve", "--run-dir"])
        .arg(folder.path().join("run"))
        .uid(54_321)
        .gid(54_321)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("Permission denied") && said.contains("--run-dir"),
        "{said}"
    );
}

/// The same command on a kernel that has no userfaultfd: `seccomp(2)` says so to it, and `/dev/userfaultfd` too.
fn without_userfaultfd(command: &Command) -> Command {
    const RUN: &str = "
import ctypes, os, struct, sys
userfaultfd, ioctl = {'x86_64': (323, 16), 'aarch64': (282, 29)}[os.uname().machine]
LOAD, IF, RETURN = 0x20, 0x15, 0x06
NUMBER, SECOND_ARGUMENT, NEW = 0, 24, 0xaa00
ALLOW, REFUSE = 0x7fff0000, 0x00050000 | 38 # ENOSYS
code = [
    (LOAD, 0, 0, NUMBER), (IF, 3, 0, userfaultfd), (IF, 0, 3, ioctl),
    (LOAD, 0, 0, SECOND_ARGUMENT), (IF, 0, 1, NEW),
    (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
class Program(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('code', ctypes.c_char_p)]
program = Program(len(code), b''.join(struct.pack('HBBI', *line) for line in code))
libc = ctypes.CDLL(None)
NO_NEW_PRIVS, SECCOMP, FILTER = 38, 22, 2
assert libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0
assert libc.prctl(SECCOMP, FILTER, ctypes.byref(program), 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
";
    let mut without = Command::new("python3");
    without.args(["-c", RUN]).arg(command.get_program());
    without.args(command.get_args()).env_remove("RUST_LOG");
    without
}

#[test]
fn a_kernel_without_userfaultfd_is_told_and_serves_file_forks_where_that_is_enough() {
    let files = Files::new();
    let refused = without_userfaultfd(&serve(&files.run_dir(), &[])).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    for named in ["no userfaultfd", "--backend file"] {
        assert!(said.contains(named), "{said}");
    }
    let mut served = Served::start_as(
        without_userfaultfd(&serve(&files.run_dir(), &["--backend", "file"])),
        &files.run_dir(),
    );
    assert_eq!(served.said("no userfaultfd").len(), 1);
    served.add_template("t", files.template.path());
    reads_right(&files.serving(&served, "f", Backend::File));
}

#[test]
fn bad_settings_are_refused_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.toml");
    let run_dir = folder.path().join("run");
    let refused = |text: &str| {
        std::fs::write(&config, text).unwrap();
        let output = serve(&run_dir, &["--config", config.to_str().unwrap()])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused("wrokers = 3").contains("wrokers"));
    assert!(refused("max_forks = \"many\"").contains("max_forks"));
    assert!(refused("backend = \"tape\"").contains("backend"));
    assert!(refused("= 3").contains("config.toml"));
    let said = does_not_start(&run_dir, &["--config", "/nonexistent"]);
    assert!(said.contains("/nonexistent") && said.contains("No such file"), "{said}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let said = does_not_start(&run_dir, &["--metrics-addr", &taken.local_addr().unwrap().to_string()]);
    assert!(said.contains("--metrics-addr"), "{said}");
    // What a flag cannot be is wrong usage.
    for flags in [
        ["--backend", "tape"],
        ["--protect", "well"],
        ["--connect-deadline", "soon"],
        ["--workers", "-1"],
    ] {
        assert_eq!(
            serve(&run_dir, &flags).output().unwrap().status.code(),
            Some(2),
            "{flags:?}"
        );
    }
    // Given as flag, the file does not count.
    std::fs::write(&config, "max_forks = 0\nbackend = \"uffd\"").unwrap();
    let served = Served::start(&run_dir, &["--config", config.to_str().unwrap(), "--max-forks", "1"]);
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    served.add_template("t", template.path());
    assert_eq!(served.create(&CreateFork::of("t")).backend, Backend::Uffd);
}

/// Clears the flag where a test has failed, so that the file can be deleted.
struct Mutable(PathBuf);

impl Mutable {
    fn is_immutable(&self) -> bool {
        let file = std::fs::File::open(&self.0).unwrap();
        rustix::fs::ioctl_getflags(file).is_ok_and(|flags| flags.contains(IFlags::IMMUTABLE))
    }
}

impl Drop for Mutable {
    fn drop(&mut self) {
        if let Ok(file) = std::fs::File::open(&self.0)
            && let Ok(flags) = rustix::fs::ioctl_getflags(&file)
        {
            let _ = rustix::fs::ioctl_setflags(&file, flags - IFlags::IMMUTABLE);
        }
    }
}

#[test]
fn protection_outlives_the_daemon_and_is_undone_by_the_next() {
    let files = Files::new();
    let path = files.template.path();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o640)).unwrap();
    let mode = || std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let mutable = Mutable(path.to_owned());
    for (protect, protected) in [(Protection::Readonly, false), (Protection::Immutable, true)] {
        let mut first = Served::start(&files.run_dir(), &[]);
        let add = AddTemplate {
            protect: Some(protect),
            ..AddTemplate::new(path)
        };
        match first.runtime.block_on(first.client.add_template("t", &add)) {
            Ok(_) => {}
            Err(error) if protect == Protection::Immutable => return skip(&error.to_string()),
            Err(error) => panic!("{error}"),
        }
        first.kill();
        let is_protected = || (mode() & 0o222 == 0, mutable.is_immutable());
        let expected = (!protected, protected);
        assert_eq!(is_protected(), expected);
        let second = Served::start(&files.run_dir(), &[]);
        assert_eq!(is_protected(), expected);
        assert_eq!(second.call(second.client.template("t")).state, TemplateState::Ready);
        reads_right(&files.serving(&second, "f", Backend::File));
        second.await_fork("f", ForkState::Exited);
        second.call(second.client.remove_template("t"));
        assert_eq!((mode(), mutable.is_immutable()), (0o640, false));
    }
    files.template.check_untouched().unwrap();
}
