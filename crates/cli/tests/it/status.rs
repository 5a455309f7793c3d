//! `pagecast status`.

use pagecast_testkit::sim_vmm::SimVmm;
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};

use crate::command::text;
use crate::daemon::Daemon;

#[test]
fn one_screen_tells_of_the_daemon_its_templates_and_its_forks() {
    let daemon = Daemon::start();
    let empty = daemon.prints(&["status"]);
    assert!(
        empty.contains("ok: pagecast ") && empty.contains("`pagecast template add`"),
        "{empty}"
    );

    let file = TemplateFile::create(TemplateModel::of_data(4 << 20, 1)).unwrap();
    daemon.add_template("base", file.path());
    let vmm = SimVmm::spawn().unwrap();
    let pid = vmm.pid().to_string();
    daemon.prints(&["fork", "create", "--template", "base", "--pid", &pid]);
    for _ in 0..2 {
        daemon.prints(&["fork", "create", "--template", "base", "--backend", "uffd"]);
    }

    let status = daemon.json(&["status"]);
    assert_eq!(status["daemon"]["templates"], 1);
    assert_eq!(status["templates"][0]["name"], "base");
    let groups = status["forks"].as_array().unwrap();
    assert_eq!(groups.len(), 2, "{status:#}");
    let (uffd, file) = (&groups[0], &groups[1]);
    assert_eq!((&uffd["state"], &uffd["forks"]), (&"waiting".into(), &2.into()));
    assert_eq!(
        (&file["state"], &file["forks"], &file["measured"]),
        (&"serving".into(), &1.into(), &1.into())
    );
    assert!(file["pss"].as_u64().unwrap() > 0, "{status:#}");

    let shown = daemon.prints(&["status"]);
    let rows: Vec<Vec<&str>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
    let count = |start: &[&str]| rows.iter().filter(|row| row.starts_with(start)).count();
    assert_eq!(count(&["base", "uffd", "waiting", "2"]), 1, "{shown}");
    assert_eq!(count(&["base", "file", "serving", "1"]), 1, "{shown}");
    assert_eq!(count(&["base", "ready"]), 1, "{shown}");
}

#[test]
fn a_reader_who_has_gone_is_no_error() {
    let daemon = Daemon::start();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = daemon.pagecast(&["status"]).stdout(writer).output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(text(&ended.stderr), "");
}
