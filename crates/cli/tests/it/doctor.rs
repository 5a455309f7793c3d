//! `pagecast doctor` on this machine, and how its output behaves on a terminal, in a pipe and on a full disk.

use std::fs::File;

use pagecast_testkit::firecracker::{binary, kvm};
use serde_json::Value;

use crate::command::{output, pagecast, text};
use crate::terminal::on_terminal;

/// Fails on any machine, so that its line, its fix and the exit code are known.
const FAILING: [&str; 3] = ["doctor", "--run-dir", "/dev/null"];

fn findings(json: &[u8]) -> Vec<Value> {
    let Value::Array(findings) = serde_json::from_slice(json).unwrap() else {
        panic!("this is no array: {}", text(json));
    };
    findings
}

#[test]
fn this_machine_is_examined() {
    let examined = output(&["doctor", "--json"]);
    assert_eq!(text(&examined.stderr), "");
    let findings = findings(&examined.stdout);
    let mut checks: Vec<&str> = Vec::new();
    for finding in &findings {
        let fields: Vec<&String> = finding.as_object().unwrap().keys().collect();
        let fix = finding.get("fix").and_then(Value::as_str);
        match finding["status"].as_str().unwrap() {
            "ok" => assert_eq!((fields.len(), fix), (3, None), "{finding}"),
            "warn" | "fail" => assert!(fields.len() == 4 && !fix.unwrap().is_empty(), "{finding}"),
            other => panic!("unknown status {other}"),
        }
        assert!(!finding["found"].as_str().unwrap().is_empty(), "{finding}");
        checks.push(finding["check"].as_str().unwrap());
    }
    assert_eq!(
        checks,
        [
            "kernel",
            "pidfd",
            "userfaultfd",
            "userfaultfd_features",
            "userfaultfd_users",
            "kvm",
            "firecracker",
            "memory",
            "hugepages",
            "thp",
            "overcommit",
            "cgroup_memory",
            "cgroup_hugepages",
            "open_files",
            "max_map_count",
            "priority",
            "fuse",
            "leases",
            "lease_break_time",
            "run_dir"
        ]
    );
    let failed = findings.iter().any(|finding| finding["status"] == "fail");
    assert_eq!(examined.status.code(), Some(if failed { 4 } else { 0 }));
    // What every machine of ours has: the tests themselves hold pidfds and read /proc.
    for finding in findings.iter().filter(|finding| finding["check"] == "pidfd") {
        assert_eq!(finding["status"], "ok", "{finding}");
    }
    for finding in &findings {
        assert!(
            !finding["found"].as_str().unwrap().starts_with("cannot tell"),
            "{finding}"
        );
    }
}

#[test]
fn what_failed_is_said_with_its_fix_and_is_exit_code_4() {
    let examined = output(&FAILING);
    assert_eq!(examined.status.code(), Some(4));
    let said = text(&examined.stdout);
    let lines: Vec<&str> = said.lines().collect();
    let at = lines.iter().position(|line| line.contains("run_dir")).unwrap();
    let words: Vec<&str> = lines[at].split_whitespace().collect();
    assert_eq!(words, ["fail", "run_dir", "/dev/null", "is", "not", "a", "folder"]);
    assert_eq!(lines[at + 1].trim(), "fix: remove it, or choose another with --run-dir");
    let column = |line: &str, word: &str| line.find(word).unwrap();
    assert_eq!(column(lines[at], "/dev/null"), column(lines[at + 1], "fix:"));
    assert!(
        said.ends_with(" fail: this host cannot serve forks until the failures are fixed\n"),
        "{said}"
    );
    assert!(!said.contains('\u{1b}') && !said.contains('\t'), "{said}");
}

#[test]
fn a_stranger_in_place_of_firecracker_is_noticed() {
    // It answers to --version, as something else; and one that is not there.
    for program in ["cat", "/no/such/firecracker"] {
        let examined = output(&["doctor", "--json", "--firecracker", program]);
        let findings = findings(&examined.stdout);
        let finding = findings
            .iter()
            .find(|finding| finding["check"] == "firecracker")
            .unwrap();
        assert_eq!(finding["status"], "warn", "{finding}");
        assert!(
            finding["fix"].as_str().unwrap().contains("--firecracker PATH"),
            "{finding}"
        );
    }
}

#[test]
fn where_a_real_firecracker_runs_nothing_it_needs_is_missing() {
    if kvm().unwrap().skips() {
        return;
    }
    let firecracker = binary().unwrap();
    let examined = output(&["doctor", "--json", "--firecracker", firecracker.to_str().unwrap()]);
    let findings = findings(&examined.stdout);
    for check in ["kvm", "userfaultfd", "userfaultfd_features", "firecracker"] {
        let finding = findings.iter().find(|finding| finding["check"] == check).unwrap();
        assert_eq!(finding["status"], "ok", "{finding}");
    }
}

#[test]
fn the_help_tells_options_and_exit_codes() {
    let help = text(&output(&["doctor", "--help"]).stdout);
    for part in [
        "--json",
        "--run-dir",
        "[default: /run/pagecast]",
        "--firecracker",
        "Exit codes:",
        "  4  a check failed",
    ] {
        assert!(help.contains(part), "{part:?} is not in:\n{help}");
    }
    let refused = output(&["doctor", "--jsno"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("a similar argument exists: '--json'"));
}

#[test]
fn a_reader_who_has_gone_is_no_error() {
    for arguments in [&FAILING[..], &["completions", "bash"], &["man"], &["--help"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ended = pagecast().args(arguments).stdout(writer).output().unwrap();
        let expected = if arguments[0] == "doctor" { 4 } else { 0 };
        assert_eq!(ended.status.code(), Some(expected), "{arguments:?}: {ended:?}");
        assert_eq!(text(&ended.stderr), "", "{arguments:?}");
    }
}

#[test]
fn a_full_disk_is_an_error() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let ended = pagecast().args(FAILING).stdout(full).output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert_eq!(
        text(&ended.stderr),
        "pagecast: cannot write to stdout: No space left on device (os error 28)\n"
    );
}

#[test]
fn an_error_that_nobody_reads_is_still_exit_code_1() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = pagecast().args(FAILING).stdout(full).stderr(writer).status().unwrap();
    assert_eq!(ended.code(), Some(1));
}

#[test]
fn there_are_colours_on_a_terminal_unless_they_are_not_wanted() {
    let coloured = on_terminal(pagecast().args(FAILING).env("TERM", "xterm"));
    assert!(coloured.contains("\u{1b}[31m\u{1b}[1mfail\u{1b}[0m"), "{coloured:?}");
    let plain = on_terminal(pagecast().args(FAILING).env("TERM", "xterm").env("NO_COLOR", "1"));
    assert!(
        plain.contains("fail  run_dir") && !plain.contains('\u{1b}'),
        "{plain:?}"
    );
}

#[test]
fn json_is_laid_out_on_a_terminal_only() {
    let arguments = ["doctor", "--json"];
    assert_eq!(text(&output(&arguments).stdout).lines().count(), 1);
    let laid_out = on_terminal(pagecast().args(arguments).env("TERM", "xterm"));
    assert!(laid_out.starts_with("[\r\n  {\r\n    \"check\": "), "{laid_out:?}");
}
