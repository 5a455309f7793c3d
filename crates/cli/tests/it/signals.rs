//! Signals that would end a process end a server in order, and freeze no VMM.

use std::path::Path;
use std::process::Command;

use pagecast_client::{Backend, CreateFork};
use pagecast_testkit::sim_vmm::{Connect, SimVmm};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};

use crate::command::Handle;
use crate::served::{Served, reads_right, serve};

const SIZE: u64 = 1 << 20;

/// The signals whose default action ends a process, that are no faults and do not tell of files: see `signal(7)`. Numbers of x86-64 and Arm.
const ENDS: [(&str, i32); 14] = [
    ("SIGHUP", 1),
    ("SIGINT", 2),
    ("SIGQUIT", 3),
    ("SIGUSR1", 10),
    ("SIGUSR2", 12),
    ("SIGALRM", 14),
    ("SIGTERM", 15),
    ("SIGSTKFLT", 16),
    ("SIGXCPU", 24),
    ("SIGVTALRM", 26),
    ("SIGPROF", 27),
    ("SIGPWR", 30),
    ("the first real-time signal", 34),
    ("the last real-time signal", 64),
];

const SIGHUP: i32 = 1;
const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;
const SIGXFSZ: i32 = 25;
const SIGIO: i32 = 29;

/// Sends a signal by its number, which may be a real-time signal.
fn send(pid: u32, signal: i32) {
    let sent = Command::new("sh")
        .args(["-c", &format!("kill -{signal} {pid}")])
        .status()
        .unwrap();
    assert!(sent.success(), "kill -{signal}");
}

/// Whether the process ignores a signal.
fn ignores(pid: u32, signal: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap() >> (signal - 1) & 1 == 1
}

/// The command, started with these signals ignored, as a shell or `nohup` does.
fn ignoring(signals: &str, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("trap '' {signals}; exec \"$0\" \"$@\"")]);
    shell.arg(command.get_program()).args(command.get_args());
    shell
}

fn template() -> TemplateFile {
    TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap()
}

fn handled(handle: &mut Handle, template: &TemplateFile) -> SimVmm {
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(&handle.socket, template.model())).unwrap();
    handle.await_event("serving");
    vmm
}

fn served(run_dir: &Path, template: &TemplateFile, command: Command) -> (Served, SimVmm) {
    let served = Served::start_as(command, run_dir);
    served.add_template("t", template.path());
    let wanted = CreateFork {
        backend: Some(Backend::Uffd),
        ..CreateFork::of("t")
    };
    let vmm = served.serving(wanted, template.model());
    (served, vmm)
}

#[test]
fn each_signal_that_would_end_handle_completes_its_forks() {
    for (name, signal) in ENDS {
        let folder = tempfile::tempdir().unwrap();
        let template = template();
        let mut handle = Handle::start(folder.path(), template.path());
        let vmm = handled(&mut handle, &template);
        send(handle.pid(), signal);
        let status = handle.wait();
        assert!(status.success(), "{name}: {status}");
        reads_right(&vmm);
    }
}

#[test]
fn each_signal_that_would_end_a_daemon_completes_its_forks() {
    for (name, signal) in ENDS {
        let folder = tempfile::tempdir().unwrap();
        let (template, run_dir) = (template(), folder.path().join("run"));
        let (mut served, vmm) = served(&run_dir, &template, serve(&run_dir, &[]));
        send(served.pid(), signal);
        let status = served.wait();
        assert!(status.success(), "{name}: {status}");
        reads_right(&vmm);
    }
}

#[test]
fn signals_that_tell_of_files_do_not_end_handle() {
    let folder = tempfile::tempdir().unwrap();
    let template = template();
    let mut handle = Handle::start(folder.path(), template.path());
    send(handle.pid(), SIGXFSZ);
    send(handle.pid(), SIGIO);
    let vmm = handled(&mut handle, &template);
    send(handle.pid(), SIGXFSZ);
    send(handle.pid(), SIGIO);
    reads_right(&vmm);
    assert!(handle.said("closing").is_empty());
    send(handle.pid(), SIGTERM);
    assert!(handle.wait().success());
    assert_eq!(handle.said("closing").len(), 1);
}

#[test]
fn signals_that_are_ignored_at_the_start_of_handle_stay_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let template = template();
    let command = Handle::command(folder.path(), template.path());
    let mut handle = Handle::start_as(ignoring("HUP INT", &command), folder.path());
    assert!(ignores(handle.pid(), SIGHUP) && ignores(handle.pid(), SIGINT));
    let vmm = handled(&mut handle, &template);
    send(handle.pid(), SIGHUP);
    send(handle.pid(), SIGINT);
    reads_right(&vmm);
    assert!(!ignores(handle.pid(), SIGTERM));
    send(handle.pid(), SIGTERM);
    assert!(handle.wait().success());
    // A second signal would have killed it.
    reads_right(&vmm);
}

#[test]
fn signals_that_are_ignored_at_the_start_of_a_daemon_stay_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let (template, run_dir) = (template(), folder.path().join("run"));
    let command = ignoring("HUP INT", &serve(&run_dir, &[]));
    let (mut served, vmm) = served(&run_dir, &template, command);
    assert!(ignores(served.pid(), SIGHUP) && ignores(served.pid(), SIGINT));
    send(served.pid(), SIGHUP);
    send(served.pid(), SIGINT);
    reads_right(&vmm);
    send(served.pid(), SIGTERM);
    assert!(served.wait().success());
    assert_eq!(served.said("\"stopping\"").len(), 1);
    reads_right(&vmm);
}
