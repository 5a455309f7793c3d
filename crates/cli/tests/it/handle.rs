//! `pagecast handle` with simulated VMMs: signals, exit codes, what it says.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pagecast::template::{KeptIdentity, MemFile, Recording, TemplateOffset, WorkingSet};
use pagecast_testkit::PageSize;
use pagecast_testkit::hugepages::HugePages;
use pagecast_testkit::peer::{FdKind, RawHandshake};
use pagecast_testkit::process::ProcessUse;
use pagecast_testkit::sim_vmm::{Connect, Read, SimVmm};
use pagecast_testkit::template_file::{Layout, TemplateFile, TemplateModel};
use pagecast_uffd::ByteLen;
use rustix::process::Signal;

use crate::command::Handle;
use crate::served::eventually;

const SIZE: u64 = 4 << 20;

fn vmm(handle: &Handle, template: &TemplateFile) -> SimVmm {
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(&handle.socket, template.model())).unwrap();
    vmm
}

fn reads_right(vmm: &SimVmm) {
    let report = vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
}

#[test]
fn any_number_of_vmms_is_served_and_each_is_accounted_for() {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    let mut handle = Handle::start(folder.path(), template.path());
    let vmms: Vec<_> = (0..3).map(|_| vmm(&handle, &template)).collect();
    let serving = handle.await_events("serving", 3);
    assert!(
        serving
            .iter()
            .all(|line| line["memory_bytes"] == SIZE && line["regions"] == 1),
        "{serving:#?}"
    );
    vmms.iter().for_each(reads_right);
    for vmm in vmms {
        let pid = vmm.pid();
        vmm.kill().unwrap();
        let ended = handle.await_event("ended");
        assert_eq!(ended["state"], "exited");
        assert_eq!(ended["pid"], pid);
        assert_eq!(ended["installed_bytes"], SIZE);
        let [demand, around] = ["demand", "around"].map(|key| ended["faults"][key].as_u64().unwrap());
        assert_eq!(demand + around, SIZE / 4096);
        let fields = ["fault_latency_us", "given_back_bytes", "memory_bytes", "prefault"];
        assert!(fields.iter().all(|field| !ended[field].is_null()), "{ended:#}");
        assert_eq!(ended["prefault"]["what"], "working-set");
    }
}

#[test]
fn a_working_set_beside_the_template_is_given_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    let mut touched = Recording::new(ByteLen::new(SIZE));
    for at in (0..SIZE).step_by(4096) {
        touched.push(TemplateOffset::new(at));
    }
    let identity = KeptIdentity::of(File::open(template.path()).unwrap()).unwrap().into();
    let path = WorkingSet::path_for(template.path());
    WorkingSet::of(&touched).save(&path, &identity).unwrap();
    let mut handle = Handle::start(folder.path(), template.path());
    assert!(handle.said("kept_not_used").is_empty());
    let vmm = vmm(&handle, &template);
    reads_right(&vmm);
    vmm.kill().unwrap();
    let ended = handle.await_event("ended");
    assert!(ended["faults"]["prefaulted"].as_u64().unwrap() > 0, "{ended:#}");
}

#[test]
fn zeros_kept_of_a_template_that_was_overwritten_with_its_mtime_set_back_are_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let half_zeros = TemplateModel {
        size: SIZE,
        seed: 1,
        layout: Layout {
            zero_every: NonZeroU64::new(2),
            holes: Vec::new(),
        },
    };
    let template = TemplateFile::create(half_zeros).unwrap();
    await_age(template.path());
    let zeros = MemFile::zeros_path_for(template.path());
    let mut handle = Handle::start(folder.path(), template.path());
    eventually("its zeros are kept", || zeros.exists());
    handle.signal(Signal::TERM);
    assert!(handle.wait().success());

    // As `cp -p` does.
    let data = TemplateFile::create(TemplateModel::of_data(SIZE, 2)).unwrap();
    let modified = template.path().metadata().unwrap().modified().unwrap();
    std::fs::copy(data.path(), template.path()).unwrap();
    File::open(template.path()).unwrap().set_modified(modified).unwrap();

    let handle = Handle::start(folder.path(), template.path());
    let told = handle.said("kept_not_used");
    assert!(told.iter().any(|line| line["what"] == "zeros"), "{told:?}");
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(&handle.socket, data.model())).unwrap();
    reads_right(&vmm);
}

/// Waits until the clock of the file system has ticked since the file was changed last.
fn await_age(path: &Path) {
    let changed = KeptIdentity::of(File::open(path).unwrap()).unwrap().changed();
    eventually("it is old enough", || {
        changed.elapsed().is_ok_and(|age| age > Duration::from_millis(100))
    });
}

#[test]
fn what_is_not_sound_beside_the_template_is_told_and_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    std::fs::write(WorkingSet::path_for(template.path()), "no working set").unwrap();
    std::fs::write(MemFile::zeros_path_for(template.path()), [0xff; 300]).unwrap();
    let handle = Handle::start(folder.path(), template.path());
    let told: Vec<_> = handle.said("kept_not_used").iter().map(|line| &line["what"]).collect();
    assert_eq!(told, ["working set", "zeros"]);
    reads_right(&vmm(&handle, &template));
}

#[test]
fn who_is_refused_is_told_why_and_the_others_do_not_notice() {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    let mut handle = Handle::start(folder.path(), template.path());
    let good = vmm(&handle, &template);
    let bad = SimVmm::spawn().unwrap();
    let report = bad
        .run(RawHandshake::new(&handle.socket, "GET / HTTP/1.1", &[]))
        .unwrap();
    assert!(report.closed_after_us.is_some(), "{report:?}");
    let refused = handle.await_event("refused");
    assert_eq!(refused["error"]["code"], "message_framing", "{refused:#?}");
    assert_eq!(refused["pid"].as_u64(), Some(u64::from(bad.pid())), "{refused:#?}");
    // It is a fork only if it sends a file descriptor.
    let report = bad
        .run(RawHandshake::new(&handle.socket, "GET / HTTP/1.1", &[FdKind::Uffd]))
        .unwrap();
    assert!(report.closed_after_us.is_some(), "{report:?}");
    let ended = handle.await_event("ended");
    assert_eq!(ended["state"], "failed");
    assert_eq!(ended["error"]["code"], "message_framing", "{ended:#?}");
    reads_right(&good);
}

#[test]
fn sigterm_completes_all_forks_and_exits_with_0() {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    for signal in [Signal::TERM, Signal::INT] {
        let mut handle = Handle::start(folder.path(), template.path());
        let vmms: Vec<_> = (0..3).map(|_| vmm(&handle, &template)).collect();
        handle.await_events("serving", 3);
        handle.signal(signal);
        assert!(handle.wait().success());
        assert!(!handle.socket.exists());
        vmms.iter().for_each(reads_right);
    }
}

#[test]
fn where_completing_does_not_fit_it_stays_and_a_second_signal_kills_and_exits_with_3() {
    // In the pool of hugepages, whose size a test can choose.
    let Some(_pages) = HugePages::reserve(SIZE >> 21).unwrap() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    let mut handle = Handle::start(folder.path(), template.path());
    let victim = SimVmm::spawn().unwrap();
    let connect = Connect {
        page_size: PageSize::Huge,
        ..Connect::new(&handle.socket, template.model())
    };
    victim.run(connect).unwrap();
    handle.await_event("serving");
    // The reservation gives the old size back.
    std::fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();

    handle.signal(Signal::TERM);
    let staying = handle.await_event("staying");
    let why = staying["error"].as_str().unwrap();
    assert!(why.contains("in the pool of hugepages"), "{why}");
    // Comes by itself, also after a SIGTERM: tries again, and kills nobody.
    handle.signal(Signal::HUP);
    handle.await_event("staying");

    handle.signal(Signal::TERM);
    let ended = handle.await_event("ended");
    assert_eq!(
        (&ended["state"], &ended["error"]["code"]),
        (&"failed".into(), &"killed".into())
    );
    assert_eq!(handle.wait().code(), Some(3));
    assert_eq!(victim.wait().unwrap().signal(), Some(9));
}

#[test]
fn a_live_socket_is_refused_and_a_stale_one_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    let handle = Handle::start(folder.path(), template.path());
    let second = Command::new(env!("CARGO_BIN_EXE_pagecast"))
        .args(["handle", "--socket"])
        .arg(&handle.socket)
        .arg("--mem-file")
        .arg(template.path())
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains("another process listens at"), "{said}");
    assert!(second.stdout.is_empty());
    let socket = handle.socket.clone();
    // Killed, so it leaves its socket file.
    drop(handle);
    assert!(socket.exists());
    let handle = Handle::start(folder.path(), template.path());
    reads_right(&vmm(&handle, &template));
}

#[test]
fn wrong_usage_exits_with_2_and_a_missing_mem_file_with_1() {
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_pagecast"))
            .args(arguments)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(run(&["handle"]).0, Some(2));
    let (code, said) = run(&["handle", "--socket", "s", "--mem-file", "m", "--busy-poll", "2s"]);
    assert_eq!(code, Some(2));
    assert!(
        said.contains("--busy-poll") && said.contains("the maximum is 10ms"),
        "{said}"
    );
    let (code, said) = run(&["handle", "--socket", "/nonexistent/s", "--mem-file", "/nonexistent/m"]);
    assert_eq!(code, Some(1));
    assert!(
        said.starts_with("pagecast: cannot open the mem-file /nonexistent/m: "),
        "{said}"
    );
}

#[test]
fn an_idle_server_uses_no_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    let mut handle = Handle::start(folder.path(), template.path());
    let vmms: Vec<_> = (0..5).map(|_| vmm(&handle, &template)).collect();
    handle.await_events("serving", 5);
    vmms.iter().for_each(reads_right);
    let used = || {
        let before = ProcessUse::of(handle.pid()).unwrap().cpu_time;
        // Not to wait for something, but to see that nothing happens.
        std::thread::sleep(Duration::from_secs(2));
        ProcessUse::of(handle.pid()).unwrap().cpu_time.saturating_sub(before)
    };
    // It comes to rest once it has looked for zeros in the background, which may take its time on a busy machine. One that
    // never does uses more than a tick of the clock that CPU time is counted in, each time that it is looked at.
    let mut looked = Vec::new();
    while looked.len() < 10 {
        looked.push(used());
        if looked.last() <= Some(&Duration::from_millis(10)) {
            return;
        }
    }
    panic!("{looked:?}");
}

#[test]
fn whoever_writes_the_template_waits_until_its_forks_are_complete() {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    let mut handle = Handle::start(folder.path(), template.path());
    let vmms: Vec<_> = (0..3).map(|_| vmm(&handle, &template)).collect();
    handle.await_events("serving", 3);
    // Held up in `open`.
    std::fs::write(template.path(), "other bytes").unwrap();
    vmms.iter().for_each(reads_right);
    assert_eq!(handle.await_event("vacating")["forks"], 3);
    let ended = handle.await_events("ended", 3);
    assert!(ended.iter().all(|line| line["state"] == "complete"), "{ended:#?}");
    assert_eq!(handle.wait().code(), Some(1));
}
