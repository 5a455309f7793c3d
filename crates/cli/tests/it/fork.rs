//! `pagecast fork`, with simulated VMMs.

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Stdio;

use pagecast_testkit::sim_vmm::{Connect, Read, SimVmm};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};
use serde_json::{Value, json};

use crate::command::text;
use crate::daemon::{Daemon, eventually};
use crate::terminal::Terminal;

const SIZE: u64 = 4 << 20;

/// A daemon with the template `base`.
fn daemon() -> (Daemon, TemplateFile) {
    let daemon = Daemon::start();
    let file = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    daemon.add_template("base", file.path());
    (daemon, file)
}

/// A fork with `uffd` whose VMM has shaken hands.
fn served(daemon: &Daemon, file: &TemplateFile, id: &str) -> SimVmm {
    let printed = daemon.prints(&["fork", "create", "--template", "base", "--id", id, "--backend", "uffd"]);
    let mem_backend: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(mem_backend["backend_type"], "Uffd");
    let vmm = SimVmm::spawn().unwrap();
    let socket = Path::new(mem_backend["backend_path"].as_str().unwrap());
    vmm.run(Connect::new(socket, file.model())).unwrap();
    eventually("the fork is served", || state(daemon, id) == "serving");
    vmm
}

fn state(daemon: &Daemon, id: &str) -> Value {
    daemon.json(&["fork", "show", id])["state"].clone()
}

#[test]
fn create_prints_the_mem_backend_and_nothing_else() {
    let (daemon, _file) = daemon();
    let created = daemon.output(&["fork", "create", "--template", "base", "--id", "a"]);
    assert!(created.status.success(), "{created:?}");
    assert_eq!(text(&created.stderr), "", "stderr is no terminal");
    let mem_backend: Value = serde_json::from_slice(&created.stdout).unwrap();
    let path = mem_backend["backend_path"].clone();
    assert!(Path::new(path.as_str().unwrap()).exists(), "{path}");
    assert_eq!(mem_backend, json!({"backend_type": "File", "backend_path": path}));
    assert_eq!(text(&created.stdout).lines().count(), 1);

    let verbose = daemon.output(&["fork", "create", "-v", "--template", "base", "--id", "b"]);
    assert_eq!(verbose.stdout, created.stdout);
    let said = text(&verbose.stderr);
    assert!(
        said.starts_with("pagecast: b: file: ") && said.lines().count() == 1,
        "{said}"
    );

    let whole = daemon.json(&["fork", "create", "--template", "base", "--id", "c", "--backend", "uffd"]);
    assert_eq!(
        (&whole["id"], &whole["template"], &whole["backend"]),
        (&json!("c"), &json!("base"), &json!("uffd"))
    );
    assert_eq!(whole["reason"], "it was asked for");
    assert_eq!(whole["mem_backend"]["backend_type"], "Uffd");
}

#[test]
fn on_a_terminal_create_tells_the_id_and_the_reason_beside_its_output() {
    let (daemon, _file) = daemon();
    let (terminal, theirs) = Terminal::open();
    let mut create = daemon.pagecast(&["fork", "create", "--template", "base", "--id", "a"]);
    let created = create.stdout(Stdio::piped()).stderr(theirs).spawn().unwrap();
    let created = created.wait_with_output().unwrap();
    // It holds the other end.
    drop(create);
    let mem_backend: Value = serde_json::from_slice(&created.stdout).unwrap();
    assert_eq!(mem_backend["backend_type"], "File");
    let said = terminal.read();
    assert!(said.starts_with("pagecast: a: file: the template is "), "{said}");
}

#[test]
fn a_fork_is_listed_shown_completed_and_removed() {
    let (daemon, file) = daemon();
    let vmm = served(&daemon, &file, "a");
    let report = vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");

    let shown = daemon.json(&["fork", "show", "a"]);
    assert_eq!(shown["pid"], vmm.pid());
    let [demand, around] = ["demand", "around"].map(|key| shown["faults"][key].as_u64().unwrap());
    assert_eq!(demand + around, SIZE / 4096);
    let shown = daemon.prints(&["fork", "show", "a"]);
    for part in [
        "state         serving\n".to_owned(),
        format!("pid           {}\n", vmm.pid()),
        "guest memory  4.00 MiB\n".to_owned(),
        "memory        ".to_owned(),
    ] {
        assert!(shown.contains(&part), "{part:?} is not in:\n{shown}");
    }
    let table = daemon.prints(&["fork", "ls"]);
    let row: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..4], ["a", "base", "uffd", "serving"], "{table}");
    assert_eq!(daemon.forks().len(), 1);

    let said = daemon.refuses(&["fork", "rm", "a"], 4);
    assert!(said.ends_with("(fork_in_use)\n"), "{said}");
    let complete = daemon.json(&["fork", "complete", "a", "--wait"]);
    assert_eq!(complete["state"], "complete");
    assert_eq!(daemon.prints(&["fork", "rm", "a"]), "");
    assert!(daemon.forks().is_empty());
    let report = vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "it lives on: {report:?}");
}

#[test]
fn a_recorded_fork_teaches_its_template_what_the_next_gets_ahead() {
    let (daemon, file) = daemon();
    let create = |id, flag: &[&str]| {
        let arguments = [&["fork", "create", "--template", "base", "--id", id], flag].concat();
        let mem_backend: Value = serde_json::from_str(&daemon.prints(&arguments)).unwrap();
        assert_eq!(mem_backend["backend_type"], "Uffd");
        let vmm = SimVmm::spawn().unwrap();
        let socket = Path::new(mem_backend["backend_path"].as_str().unwrap());
        vmm.run(Connect::new(socket, file.model())).unwrap();
        vmm
    };
    let recorded = create("recorded", &["--record"]);
    assert!(
        daemon
            .prints(&["fork", "show", "recorded"])
            .contains("recording     running\n")
    );
    recorded.run(Read::default()).unwrap();
    let said = "recording     4.00 MiB added to the working set\n";
    eventually("it is learned from", || {
        daemon.prints(&["fork", "show", "recorded"]).contains(said)
    });
    let shown = daemon.prints(&["template", "show", "base"]);
    assert!(shown.contains("working set  4.00 MiB from 1 recording\n"), "{shown}");

    let _ahead = create("ahead", &["--prefault", "working-set", "--backend", "uffd"]);
    eventually("it gets that ahead", || {
        let faults = &daemon.json(&["fork", "show", "ahead"])["faults"];
        faults["prefaulted"].as_u64().unwrap() > SIZE / 4096 * 9 / 10
    });
    let shown = daemon.prints(&["fork", "show", "ahead"]);
    assert!(
        shown.contains("prefault      working-set; first faults: 0 not foreseen"),
        "{shown}"
    );
}

#[test]
fn rm_kill_kills_the_vmm_first() {
    let (daemon, file) = daemon();
    let vmm = served(&daemon, &file, "a");
    daemon.prints(&["fork", "rm", "a", "--kill"]);
    assert_eq!(vmm.wait().unwrap().signal(), Some(9));
    assert!(daemon.forks().is_empty());
}

#[test]
fn a_fork_that_has_exited_cannot_be_completed() {
    let (daemon, file) = daemon();
    served(&daemon, &file, "a").kill().unwrap();
    eventually("its end is noticed", || state(&daemon, "a") == "exited");
    let said = daemon.refuses(&["fork", "complete", "a", "--wait"], 4);
    assert!(said.ends_with("(fork_ended)\n"), "{said}");
}

#[test]
fn a_fork_with_file_knows_its_vmm_by_the_pid_that_is_told() {
    let (daemon, _file) = daemon();
    let vmm = SimVmm::spawn().unwrap();
    let pid = vmm.pid().to_string();
    daemon.prints(&["fork", "create", "--template", "base", "--id", "a", "--pid", &pid]);
    let shown = daemon.json(&["fork", "show", "a"]);
    assert_eq!((&shown["state"], &shown["pid"]), (&json!("serving"), &json!(vmm.pid())));
    assert!(shown["memory"]["rss"].as_u64().unwrap() > 0, "{shown}");
    let said = daemon.refuses(&["fork", "complete", "a"], 4);
    assert!(said.ends_with("(not_completable)\n"), "{said}");
    vmm.kill().unwrap();
    eventually("its end is noticed", || state(&daemon, "a") == "exited");
}

#[test]
fn a_socket_is_put_where_it_is_asked_for() {
    let (daemon, _file) = daemon();
    // Relative to the caller.
    let created = daemon
        .pagecast(&["fork", "create", "--template", "base", "--backend", "uffd"])
        .args(["--socket-path", "fork.sock"])
        .current_dir(daemon.folder())
        .output()
        .unwrap();
    assert!(created.status.success(), "{created:?}");
    let socket = daemon.folder().join("fork.sock");
    let mem_backend: Value = serde_json::from_slice(&created.stdout).unwrap();
    assert_eq!(mem_backend["backend_path"], socket.to_str().unwrap());
    assert!(socket.exists());
}

#[test]
fn what_the_daemon_refuses_is_exit_code_4_with_its_code() {
    let (daemon, _file) = daemon();
    daemon.prints(&["fork", "create", "--template", "base", "--id", "a"]);
    for (arguments, code) in [
        (&["fork", "create", "--template", "other"][..], "template_not_found"),
        (&["fork", "create", "--template", "base", "--id", "a"], "fork_exists"),
        (&["fork", "create", "--template", "base", "--id", "A"], "invalid_field"),
        (
            &[
                "fork",
                "create",
                "--template",
                "base",
                "--page-size",
                "2M",
                "--backend",
                "file",
            ],
            "backend_unavailable",
        ),
        (&["fork", "show", "b/../a"], "fork_not_found"),
        (&["fork", "rm", "b"], "fork_not_found"),
        (&["fork", "complete", "b"], "fork_not_found"),
    ] {
        let said = daemon.refuses(arguments, 4);
        assert!(said.ends_with(&format!("({code})\n")), "{arguments:?}: {said}");
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for arguments in [
        &["fork"][..],
        &["fork", "create"],
        &["fork", "create", "--template", "base", "--backend", "ram"],
        &["fork", "create", "--template", "base", "--pid", "0"],
        &["fork", "create", "--template", "base", "--prefault", "some"],
        &["fork", "create", "--template", "base", "--prefault", "all", "--record"],
        &["fork", "complete"],
    ] {
        assert_eq!(
            crate::command::output(arguments).status.code(),
            Some(2),
            "{arguments:?}"
        );
    }
}
