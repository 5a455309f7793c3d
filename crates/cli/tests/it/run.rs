//! `pagecast run` with the real Firecracker: what it shows, and that nothing is left of it however it ends.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::Signal;
use serde_json::Value;

use crate::command::{pagecast, text};
use crate::daemon::{eventually, signal};
use crate::host::{Host, Vmm};

fn forks(report: &Value) -> &Vec<Value> {
    report["forks"].as_array().unwrap()
}

#[test]
fn forks_of_each_backend_are_resumed_and_measured_and_gone_afterwards() {
    let Some(host) = Host::new() else { return };
    for backend in ["file", "uffd"] {
        let run = host.output(&["-n", "5", "--backend", backend, "--json"]);
        assert!(run.status.success(), "{run:?}");
        assert_eq!(text(&run.stderr), "");
        let report: Value = serde_json::from_slice(&run.stdout).unwrap();
        assert_eq!(forks(&report).len(), 5);
        for fork in forks(&report) {
            assert_eq!(
                (&fork["state"], &fork["backend"]),
                (&"resumed".into(), &backend.into()),
                "{fork:#}"
            );
            assert!(fork["load_ms"].as_f64().unwrap() > 0.0 && fork["resume_ms"].as_f64().unwrap() > 0.0);
            for part in ["rss", "pss", "private"] {
                assert!(fork["memory"][part].as_u64().unwrap() > 0, "{fork:#}");
            }
        }
        let summary = &report["summary"];
        assert_eq!(
            (&summary["resumed"], &summary["memory"]["measured"]),
            (&5.into(), &5.into())
        );
        let pss: u64 = forks(&report)
            .iter()
            .map(|fork| fork["memory"]["pss"].as_u64().unwrap())
            .sum();
        assert_eq!(summary["memory"]["pss"], pss);
        // They are one program, at least.
        assert!(summary["memory"]["unshared"].as_u64().unwrap() > pss, "{summary:#}");
        host.assert_nothing_is_left();
    }
}

#[test]
fn people_get_a_table_a_summary_and_the_reason_for_the_backend() {
    let Some(host) = Host::new() else { return };
    let run = host.output(&["-n", "2"]);
    assert!(run.status.success(), "{run:?}");
    let said = text(&run.stdout);
    let lines: Vec<&str> = said.lines().collect();
    let heading: Vec<&str> = lines[0].split_whitespace().collect();
    assert_eq!(
        heading.join(" "),
        "fork state backend load ms resume ms pid rss pss private"
    );
    assert!(
        lines[1].contains("-1  resumed  file ") && lines[2].contains("-2  resumed  file "),
        "{said}"
    );
    assert!(lines[3].starts_with("resumed 2 of 2 from base in "), "{said}");
    assert!(
        lines[4].starts_with("memory: ") && lines[4].ends_with("(2 of 2 measured)"),
        "{said}"
    );
    assert!(
        lines[5].starts_with("backend file (2): the template is a complete local file"),
        "{said}"
    );
    assert_eq!(lines.len(), 6);
}

#[test]
fn kept_forks_live_until_a_signal_which_is_no_failure() {
    let Some(host) = Host::new() else { return };
    for end in [Signal::INT, Signal::TERM, Signal::HUP] {
        let run = host.start(&["-n", "2", "--keep", "--json"]);
        let report = run.report();
        let vmms = host.vmms();
        assert_eq!(vmms.len(), 2);
        let folder = Path::new(report["folder"].as_str().unwrap());
        for (vmm, fork) in vmms.iter().zip(forks(&report)) {
            assert!(folder.join(fork["id"].as_str().unwrap()).join("api.sock").exists());
            assert!(vmm.lives());
        }
        assert_eq!(host.daemon.forks().len(), 2);
        signal(&run.child, end);
        assert_eq!(run.wait().0, Some(0), "{end:?}");
        host.assert_nothing_is_left();
    }
}

#[test]
fn half_of_the_kept_firecrackers_killed_are_told_of_and_the_others_live_on() {
    let Some(host) = Host::new() else { return };
    for backend in ["file", "uffd"] {
        let run = host.start(&["-n", "6", "--keep", "--json", "--backend", backend]);
        run.report();
        let vmms = host.vmms();
        let (victims, others) = vmms.split_at(3);
        victims.iter().for_each(Vmm::kill);
        let mut told: Vec<_> = victims.iter().map(|_| run.await_line("signal: 9 (SIGKILL)")).collect();
        told.sort();
        let mut ids: Vec<_> = victims.iter().map(Vmm::id).collect();
        ids.sort_unstable();
        for (line, id) in told.iter().zip(ids) {
            assert!(line.starts_with(&format!("pagecast: {id}: ")), "{line}");
        }
        assert_eq!(others.len(), 3);
        assert!(others.iter().all(Vmm::lives));
        signal(&run.child, Signal::INT);
        assert_eq!(run.wait().0, Some(5));
        host.assert_nothing_is_left();
    }
}

#[test]
fn a_run_that_keeps_forks_ends_with_the_last_of_them() {
    let Some(host) = Host::new() else { return };
    let run = host.start(&["-n", "2", "--keep", "--json"]);
    run.report();
    host.vmms().iter().for_each(Vmm::kill);
    let (code, said) = run.wait();
    assert_eq!(code, Some(5));
    assert!(said.contains("no fork is left"), "{said}");
    host.assert_nothing_is_left();
}

#[test]
fn a_killed_run_takes_its_firecrackers_with_it_and_the_next_removes_the_rest() {
    let Some(host) = Host::new() else { return };
    for backend in ["file", "uffd"] {
        // One that keeps forks, and one that loads them.
        let endless = host.endless_vmstate();
        let mut keeping = host.start(&["-n", "3", "--keep", "--json", "--backend", backend]);
        keeping.report();
        host.await_loading(3);
        let mut loading = host.start(&["-n", "3", "--vmstate", &endless, "--backend", backend]);
        let vmms = host.await_loading(6);
        for run in [&mut keeping, &mut loading] {
            run.child.kill().unwrap();
            run.child.wait().unwrap();
        }
        vmms.iter().for_each(Vmm::await_end);
        assert_eq!(host.runs.path().read_dir().unwrap().count(), 2);

        let next = host.output(&["-n", "1"]);
        assert!(next.status.success(), "{next:?}");
        assert_eq!(text(&next.stderr), "");
        host.assert_nothing_is_left();
        fs::remove_file(endless).unwrap();
    }
}

#[test]
fn a_run_leaves_others_that_live_alone() {
    let Some(host) = Host::new() else { return };
    let first = host.start(&["-n", "2", "--keep", "--json"]);
    first.report();
    let vmms = host.vmms();
    assert!(host.output(&["-n", "2"]).status.success());
    assert!(vmms.iter().all(Vmm::lives) && vmms.iter().all(|vmm| vmm.folder.exists()));
    assert_eq!(host.daemon.forks().len(), 2);
    signal(&first.child, Signal::INT);
    assert_eq!(first.wait().0, Some(0));
    host.assert_nothing_is_left();
}

#[test]
fn a_signal_while_firecrackers_start_leaves_nothing() {
    let Some(host) = Host::new() else { return };
    let firecracker = host.firecracker_after("exec sleep 600");
    for (end, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let run = host.start(&["-n", "3", "--firecracker", &firecracker]);
        eventually("they start", || host.vmms().len() == 3);
        signal(&run.child, end);
        let (ended, said) = run.wait();
        assert_eq!(ended, Some(code));
        assert_eq!(said, "pagecast: interrupted: the run was cleaned up\n");
        host.assert_nothing_is_left();
    }
}

#[test]
fn a_signal_while_snapshots_load_leaves_nothing() {
    let Some(host) = Host::new() else { return };
    let endless = host.endless_vmstate();
    for backend in ["file", "uffd"] {
        let run = host.start(&["-n", "4", "--vmstate", &endless, "--backend", backend]);
        host.await_loading(4);
        assert_eq!(host.daemon.forks().len(), 4);
        signal(&run.child, Signal::INT);
        assert_eq!(run.wait().0, Some(130));
        host.assert_nothing_is_left();
    }
}

#[test]
fn a_daemon_that_dies_while_snapshots_load_ends_the_run() {
    let Some(mut host) = Host::new() else { return };
    let endless = host.endless_vmstate();
    let run = host.start(&["-n", "3", "--vmstate", &endless, "--backend", "uffd"]);
    let vmms = host.await_loading(3);
    host.daemon.kill();
    let (code, said) = run.wait();
    assert_eq!(code, Some(3));
    assert_eq!(said, "pagecast: the daemon has ended\n");
    assert!(!vmms.iter().any(Vmm::lives));
    assert_eq!(host.runs.path().read_dir().unwrap().count(), 0);
}

#[test]
fn forks_that_a_stuck_daemon_does_not_forget_are_left_to_the_next_run() {
    let Some(host) = Host::new() else { return };
    let endless = host.endless_vmstate();
    let run = host.start(&["-n", "3", "--vmstate", &endless, "--backend", "uffd"]);
    let vmms = host.await_loading(3);
    host.daemon.stop();
    signal(&run.child, Signal::INT);
    let (code, said) = run.wait();
    assert_eq!(code, Some(130));
    assert!(
        said.contains("the daemon may still have the forks") && said.contains("the next run tries again"),
        "{said}"
    );
    assert!(!vmms.iter().any(Vmm::lives));
    host.daemon.go_on();
    assert!(host.output(&["-n", "1"]).status.success());
    host.assert_nothing_is_left();
}

#[test]
fn a_daemon_that_dies_while_forks_are_kept_is_told_of() {
    let Some(mut host) = Host::new() else { return };
    let run = host.start(&["-n", "2", "--keep", "--json"]);
    run.report();
    let vmms = host.vmms();
    host.daemon.kill();
    run.await_line("the daemon has ended");
    assert!(vmms.iter().all(Vmm::lives), "with `file` they need no daemon");
    signal(&run.child, Signal::INT);
    assert_eq!(run.wait().0, Some(3));
    assert!(!vmms.iter().any(Vmm::lives));
    assert_eq!(host.runs.path().read_dir().unwrap().count(), 0);
}

#[test]
fn a_firecracker_that_dies_at_its_start_costs_only_itself() {
    let Some(host) = Host::new() else { return };
    let firecracker = host.firecracker_after("case \"$2\" in *-2) echo no luck >&2; exit 7;; esac");
    let run = host.output(&["-n", "3", "--json", "--firecracker", &firecracker]);
    assert_eq!(run.status.code(), Some(5), "{run:?}");
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    let states: Vec<_> = forks(&report)
        .iter()
        .map(|fork| fork["state"].as_str().unwrap())
        .collect();
    assert_eq!(states, ["resumed", "failed", "resumed"], "{report:#}");
    let error = forks(&report)[1]["error"].as_str().unwrap();
    assert!(error.starts_with("Firecracker has ended (exit status: 7)"), "{error}");
    assert!(error.contains("no luck"), "{error}");
    assert_eq!(report["summary"]["resumed"], 2);
    host.assert_nothing_is_left();
}

#[test]
fn a_firecracker_that_dies_while_it_loads_is_told_of() {
    let Some(host) = Host::new() else { return };
    let endless = host.endless_vmstate();
    let run = host.start(&["-n", "2", "--json", "--vmstate", &endless]);
    host.await_loading(2).iter().for_each(Vmm::kill);
    let report = run.report();
    for fork in forks(&report) {
        assert_eq!(fork["state"], "failed");
        let error = fork["error"].as_str().unwrap();
        assert!(
            error.starts_with("Firecracker has ended (signal: 9 (SIGKILL))"),
            "{error}"
        );
        assert!(error.contains("its log ends with:"), "{error}");
    }
    assert_eq!(run.wait().0, Some(5));
    host.assert_nothing_is_left();
}

#[test]
fn a_load_that_takes_too_long_fails() {
    let Some(host) = Host::new() else { return };
    let endless = host.endless_vmstate();
    let run = host.output(&["--vmstate", &endless, "--timeout", "2s"]);
    assert_eq!(run.status.code(), Some(5), "{run:?}");
    let said = text(&run.stdout);
    assert!(
        said.contains("PUT /snapshot/load is not answered: no answer from "),
        "{said}"
    );
    assert!(said.contains("resumed 0 of 1 from base"), "{said}");
    host.assert_nothing_is_left();
}

#[test]
fn forks_that_would_write_to_one_drive_are_refused_before_any_is_resumed() {
    let Some(host) = Host::with_writable_drive() else {
        return;
    };
    for backend in ["file", "uffd"] {
        let run = host.output(&["-n", "20", "--backend", backend]);
        assert_eq!(run.status.code(), Some(1), "{run:?}");
        assert_eq!(text(&run.stdout), "");
        let said = text(&run.stderr);
        let drive = host.template.path().canonicalize().unwrap().join("disk");
        let begins = format!(
            "pagecast: no microVM was resumed: {} is open for writing in run-",
            drive.display()
        );
        assert!(said.starts_with(&begins) && said.lines().count() == 1, "{said}");
        assert!(
            said.contains(" and 17 more, ") && said.contains("`PATCH /drives/{id}`"),
            "{said}"
        );
        host.assert_nothing_is_left();
    }
}

#[test]
fn a_fork_whose_drive_another_run_writes_to_is_refused() {
    let Some(host) = Host::with_writable_drive() else {
        return;
    };
    let first = host.start(&["--keep", "--json"]);
    assert_eq!(first.report()["summary"]["resumed"], 1);
    let pid = host.vmms()[0].pid.as_raw_nonzero();
    let second = host.output(&[]);
    assert_eq!(second.status.code(), Some(1), "{second:?}");
    let said = text(&second.stderr);
    assert!(said.contains(&format!("-1, process {pid}, and")), "{said}");
    let train = host.train(&[]).output().unwrap();
    assert_eq!(train.status.code(), Some(1), "{train:?}");
    assert!(text(&train.stderr).contains("is open for writing in"), "{train:?}");
    signal(&first.child, Signal::INT);
    assert_eq!(first.wait().0, Some(0));
    host.assert_nothing_is_left();
}

#[test]
fn forks_that_only_read_their_drive_may_share_it() {
    let Some(host) = Host::with_read_only_drive() else {
        return;
    };
    let run = host.output(&["-n", "3", "--json"]);
    assert!(run.status.success(), "{run:?}");
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["summary"]["resumed"], 3, "{report:#}");
    host.assert_nothing_is_left();
}

#[test]
fn a_file_that_the_command_was_started_with_is_no_drive() {
    let Some(host) = Host::new() else { return };
    // A file descriptor that programs inherit, as `3>FILE` of a shell makes one.
    let run = Command::new("sh")
        .args(["-c", "exec \"$@\" 3>>\"$FILE\"", "sh"])
        .arg(env!("CARGO_BIN_EXE_pagecast"))
        .args(["run", "--template", "base", "-n", "2", "--dir"])
        .arg(host.runs.path())
        .arg("--firecracker")
        .arg(&host.firecracker)
        .env("FILE", host.template.path().join("inherited"))
        .env("PAGECAST_SOCKET", host.daemon.socket())
        .output()
        .unwrap();
    assert!(run.status.success(), "{run:?}");
    host.assert_nothing_is_left();
}

#[test]
fn a_snapshot_that_firecracker_refuses_is_shown_with_its_log() {
    let Some(host) = Host::new() else { return };
    let garbage = host.template.path().join("garbage");
    fs::write(&garbage, "garbage").unwrap();
    let run = host.output(&["-n", "2", "--vmstate", garbage.to_str().unwrap()]);
    assert_eq!(run.status.code(), Some(5), "{run:?}");
    let said = text(&run.stdout);
    assert_eq!(
        said.matches("Firecracker refuses PUT /snapshot/load: Load snapshot error")
            .count(),
        2,
        "{said}"
    );
    assert_eq!(said.matches("its log ends with:").count(), 2, "{said}");
    host.assert_nothing_is_left();
}

#[test]
fn what_the_daemon_refuses_is_told_for_each_fork() {
    let Some(host) = Host::new() else { return };
    // Removed while the Firecrackers start, so that the daemon knows it at first.
    let started = host.template.path().join("started");
    let go = host.template.path().join("go");
    mknodat(CWD, &go, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let script = format!("touch {}; read word < {}", started.display(), go.display());
    let firecracker = host.firecracker_after(&script);
    let run = host.start(&["--json", "--firecracker", &firecracker]);
    eventually("it starts", || started.exists());
    host.daemon.prints(&["template", "rm", "base"]);
    fs::write(&go, "go\n").unwrap();
    let report = run.report();
    let error = forks(&report)[0]["error"].as_str().unwrap();
    assert!(error.ends_with("(template_not_found)"), "{error}");
    assert_eq!(run.wait().0, Some(5));
    host.assert_nothing_is_left();
}

#[test]
fn a_firecracker_that_is_none_is_told_of_before_anything_starts() {
    let runs = tempfile::tempdir().unwrap();
    let text_file = runs.path().join("text");
    fs::write(&text_file, "text").unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (firecracker, why) in [
        (
            "/no/such/firecracker",
            "there is no Firecracker at /no/such/firecracker",
        ),
        (text_file.to_str().unwrap(), "is not a file that this user may execute"),
        (
            folder.path().to_str().unwrap(),
            "is not a file that this user may execute",
        ),
        ("/bin/cat", "is not Firecracker"),
    ] {
        // Not even the daemon is asked: there is none.
        let run = pagecast()
            .args([
                "run",
                "--template",
                "base",
                "--socket",
                "/no/such/socket",
                "--firecracker",
            ])
            .args([firecracker, "--dir"])
            .arg(folder.path())
            .output()
            .unwrap();
        assert_eq!(run.status.code(), Some(1), "{run:?}");
        assert_eq!(text(&run.stdout), "");
        let said = text(&run.stderr);
        assert!(said.contains(why) && said.lines().count() == 1, "{said}");
    }
    let run = pagecast()
        .args(["run", "--template", "base"])
        .env("PATH", runs.path())
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(1));
    assert!(
        text(&run.stderr).contains("install it, or name it with --firecracker"),
        "{run:?}"
    );
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
}

#[test]
fn a_template_that_cannot_be_run_is_told_of_before_anything_starts() {
    let Some(host) = Host::new() else { return };
    let mem_file = host.template.path().join("mem");
    host.daemon.add_template("stateless", &mem_file);
    for (arguments, code, why) in [
        (&["--template", "other"][..], 4, "(template_not_found)"),
        (&["--template", "stateless"], 1, "name it with --vmstate"),
        (
            &["--template", "base", "--vmstate", "/no/such/state"],
            1,
            "cannot read the state file /no/such/state",
        ),
    ] {
        let run = host
            .daemon
            .pagecast(&["run", "--firecracker"])
            .arg(&host.firecracker)
            .arg("--dir")
            .arg(host.runs.path())
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(run.status.code(), Some(code), "{run:?}");
        assert!(text(&run.stderr).contains(why), "{run:?}");
    }
    let nowhere = host
        .daemon
        .pagecast(&["run", "--template", "base", "--dir", "/no/such/folder", "--firecracker"])
        .arg(&host.firecracker)
        .output()
        .unwrap();
    assert_eq!(nowhere.status.code(), Some(1), "{nowhere:?}");
    assert!(
        text(&nowhere.stderr).contains("name another one with --dir"),
        "{nowhere:?}"
    );
    host.assert_nothing_is_left();
}

#[test]
fn without_a_daemon_it_is_said_how_to_start_one() {
    let folder = tempfile::tempdir().unwrap();
    let firecracker = folder.path().join("firecracker");
    fs::write(&firecracker, "#!/bin/sh\necho Firecracker v1.12.1\n").unwrap();
    fs::set_permissions(&firecracker, fs::Permissions::from_mode(0o755)).unwrap();
    let run = pagecast()
        .args([
            "run",
            "--template",
            "base",
            "--socket",
            "/no/such/socket",
            "--firecracker",
        ])
        .arg(&firecracker)
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(3), "{run:?}");
    assert!(text(&run.stderr).contains("`pagecast serve`"), "{run:?}");
}
