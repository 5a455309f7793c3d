//! `pagecast template`.

use pagecast_testkit::cgroup::Cgroup;
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};

use crate::command::{output, text};
use crate::daemon::Daemon;

const SIZE: u64 = 4 << 20;

fn template() -> TemplateFile {
    TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap()
}

#[test]
fn a_template_is_added_listed_shown_and_removed() {
    let daemon = Daemon::start();
    let file = template();
    let mem_file = file.path().to_str().unwrap();
    assert_eq!(daemon.prints(&["template", "ls", "--json"]), "[]\n");

    let added = daemon.json(&["template", "add", "base", "--mem-file", mem_file, "--page-size", "4K"]);
    assert_eq!(added["name"], "base");
    assert_eq!(added["mem_path"], mem_file);
    assert_eq!(
        (&added["size_bytes"], &added["page_size"]),
        (&SIZE.into(), &4096.into())
    );

    let listed = daemon.json(&["template", "ls"]);
    assert_eq!(listed[0]["name"], "base");
    let table = daemon.prints(&["template", "ls"]);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("template  state"), "{table}");
    assert!(lines[1].starts_with("base      ready  4.00 MiB"), "{table}");
    assert!(lines[1].ends_with(mem_file), "{table}");

    let shown = daemon.prints(&["template", "show", "base"]);
    for line in [
        "template   base\n",
        "state      ready\n",
        &format!("mem-file   {mem_file}\n"),
        "page size  4.00 KiB\n",
        "forks      0\n",
    ] {
        assert!(shown.contains(line), "{line:?} is not in:\n{shown}");
    }
    assert_eq!(daemon.json(&["template", "show", "base"])["name"], "base");

    assert_eq!(daemon.prints(&["template", "rm", "base"]), "");
    assert!(file.path().exists());
    let said = daemon.refuses(&["template", "show", "base"], 4);
    assert!(said.ends_with("(template_not_found)\n"), "{said}");
}

#[test]
fn relative_paths_are_those_of_the_caller() {
    let daemon = Daemon::start();
    let file = template();
    let folder = file.path().parent().unwrap();
    std::fs::write(folder.join("vmstate"), "state").unwrap();
    let name = file.path().file_name().unwrap().to_str().unwrap();
    let added = daemon
        .pagecast(&["template", "add", "base", "--json"])
        .args(["--mem-file", name, "--vmstate", "vmstate"])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(added.status.success(), "{added:?}");
    let added = daemon.json(&["template", "show", "base"]);
    assert_eq!(added["mem_path"], file.path().to_str().unwrap());
    assert_eq!(added["vmstate_path"], folder.join("vmstate").to_str().unwrap());
}

#[test]
fn the_same_template_again_is_fine_and_another_of_its_name_refused() {
    let daemon = Daemon::start();
    let (file, other) = (template(), template());
    daemon.add_template("base", file.path());
    daemon.add_template("base", file.path());
    let said = daemon.refuses(
        &["template", "add", "base", "--mem-file", other.path().to_str().unwrap()],
        4,
    );
    assert!(said.ends_with("(template_exists)\n"), "{said}");
}

#[test]
fn a_template_with_forks_is_not_removed() {
    let daemon = Daemon::start();
    let file = template();
    daemon.add_template("base", file.path());
    daemon.prints(&["fork", "create", "--template", "base"]);
    let said = daemon.refuses(&["template", "rm", "base"], 4);
    assert!(said.ends_with("(template_in_use)\n"), "{said}");
}

#[test]
fn a_read_only_template_is_so_until_it_is_removed() {
    let daemon = Daemon::start();
    let file = template();
    let is_readonly = || file.path().metadata().unwrap().permissions().readonly();
    let mem_file = file.path().to_str().unwrap();
    daemon.prints(&[
        "template",
        "add",
        "base",
        "--mem-file",
        mem_file,
        "--protect",
        "readonly",
    ]);
    assert!(is_readonly());
    daemon.prints(&["template", "rm", "base"]);
    assert!(!is_readonly());
}

#[test]
fn what_cannot_be_a_template_is_refused_with_the_reason() {
    let daemon = Daemon::start();
    for (mem_file, why) in [("/nonexistent", "/nonexistent"), ("/", "is a directory")] {
        let said = daemon.refuses(&["template", "add", "base", "--mem-file", mem_file], 4);
        assert!(said.contains(why) && said.contains("(template_invalid)"), "{said}");
    }
}

#[test]
fn without_a_daemon_it_is_said_how_to_start_one() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control.sock");
    // Before the part of the command and after it.
    for arguments in [
        ["template", "--socket", socket.to_str().unwrap(), "ls"],
        ["template", "ls", "--socket", socket.to_str().unwrap()],
    ] {
        let output = output(&arguments);
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(text(&output.stdout), "");
        let said = text(&output.stderr);
        assert!(
            said.starts_with(&format!("pagecast: no daemon at {}", socket.display())),
            "{said}"
        );
        assert!(said.contains("`pagecast serve`"), "{said}");
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for arguments in [
        &["template"][..],
        &["template", "add", "base"],
        &["template", "add", "base", "--mem-file", "m", "--page-size", "1G"],
        &["template", "add", "base", "--mem-file", "m", "--protect", "very"],
        &["template", "show"],
        &["template", "warm"],
        &["template", "warm", "base", "--resident", "--off"],
    ] {
        assert_eq!(output(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn a_template_is_brought_into_memory_kept_there_and_let_go() {
    let daemon = Daemon::start();
    let file = template();
    daemon.add_template("base", file.path());
    let warm = daemon.prints(&["template", "warm", "base"]);
    assert!(warm.contains("in memory  4.00 MiB read, "), "{warm}");
    assert!(warm.contains("the kernel may evict it\n"), "{warm}");
    let resident = |table: &str| {
        table
            .lines()
            .nth(1)
            .unwrap()
            .split("  ")
            .filter(|cell| !cell.is_empty())
            .nth(4)
            .map(str::trim)
            .map(str::to_owned)
    };
    assert_eq!(resident(&daemon.prints(&["template", "ls"])).unwrap(), "-");

    let warmth = daemon.json(&["template", "warm", "base", "--resident"])["warmth"].clone();
    assert_eq!(
        (&warmth["state"], &warmth["resident"], &warmth["locked_bytes"]),
        (&"warm".into(), &true.into(), &SIZE.into())
    );
    let shown = daemon.prints(&["template", "show", "base"]);
    assert!(shown.contains("; 4.00 MiB locked\n"), "{shown}");
    assert_eq!(resident(&daemon.prints(&["template", "ls"])).unwrap(), "4.00 MiB");
    let status = daemon.json(&["status"]);
    assert_eq!(status["templates"][0]["warmth"]["locked_bytes"], SIZE);
    let status = daemon.prints(&["status"]);
    assert!(status.contains(", 4.00 MiB of it resident templates\n"), "{status}");

    assert_eq!(daemon.prints(&["template", "warm", "base", "--off"]), "");
    assert!(!daemon.prints(&["template", "show", "base"]).contains("in memory"));
    let said = daemon.refuses(&["template", "warm", "none"], 4);
    assert!(said.ends_with("(template_not_found)\n"), "{said}");
}

#[test]
fn a_template_that_does_not_fit_into_memory_is_not_brought_there() {
    // It outlives the daemon.
    let Some(cgroup) = Cgroup::new().unwrap() else { return };
    let daemon = Daemon::start();
    let file = TemplateFile::create(TemplateModel::of_data(64 << 20, 1)).unwrap();
    daemon.add_template("base", file.path());
    cgroup.take(daemon.pid()).unwrap();
    cgroup.limit(48 << 20).unwrap();
    for how in [
        &["template", "warm", "base"][..],
        &["template", "warm", "base", "--resident"],
    ] {
        let said = daemon.refuses(how, 4);
        assert!(said.ends_with("(not_enough_memory)\n"), "{said}");
        assert!(said.contains(cgroup.path().to_str().unwrap()), "{said}");
    }
    // What fits is brought there. The kernel may give it up again, so it may be nearly all that there is.
    cgroup.limit(80 << 20).unwrap();
    let warmth = daemon.json(&["template", "warm", "base"])["warmth"].clone();
    assert_eq!(warmth["state"], "warm", "{warmth:#}");
}
