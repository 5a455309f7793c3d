//! `pagecast completions` and `pagecast man`: both come from the command line's own definition.

use std::fs;
use std::process::Command;

use crate::command::{output, text};

/// The commands that `pagecast --help` lists.
fn commands() -> Vec<String> {
    commands_of(&[])
}

/// The commands of a command, as its help lists them; none where it has none.
fn commands_of(command: &[&str]) -> Vec<String> {
    let help = text(&output(&[command, &["--help"]].concat()).stdout);
    let Some((_, list)) = help.split_once("Commands:\n") else {
        return Vec::new();
    };
    let (list, _) = list.split_once("\n\n").unwrap();
    let words = list.lines().filter_map(|line| line.split_whitespace().next());
    words.filter(|word| *word != "help").map(str::to_owned).collect()
}

#[test]
fn each_shell_gets_completions_that_know_every_command() {
    let commands = commands();
    assert!(commands.contains(&"doctor".to_owned()), "{commands:?}");
    for (shell, sign) in [
        ("bash", "complete -F _pagecast"),
        ("zsh", "#compdef pagecast"),
        ("fish", "complete -c pagecast"),
    ] {
        let completed = output(&["completions", shell]);
        assert!(completed.status.success(), "{shell}: {completed:?}");
        let script = text(&completed.stdout);
        assert!(script.contains(sign), "{shell}: {script}");
        for command in &commands {
            assert!(script.contains(command.as_str()), "{shell} does not know {command}");
        }
    }
}

#[test]
fn bash_completes_commands_and_options() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("pagecast.bash");
    fs::write(&script, output(&["completions", "bash"]).stdout).unwrap();
    let complete = |line: &str| {
        let ask = format!(
            "source {script}; COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _pagecast pagecast \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"; echo \"${{COMPREPLY[@]}}\"",
            script = script.display()
        );
        let answer = Command::new("bash").args(["-c", &ask]).output().unwrap();
        assert!(answer.status.success(), "{answer:?}");
        text(&answer.stdout).trim().to_owned()
    };
    assert_eq!(complete("pagecast doc"), "doctor");
    assert_eq!(complete("pagecast doctor --fire"), "--firecracker");
}

#[test]
fn an_unknown_shell_is_refused_with_those_there_are() {
    let refused = output(&["completions", "cmd.exe"]);
    assert_eq!(refused.status.code(), Some(2));
    let said = text(&refused.stderr);
    assert!(
        said.contains("invalid value 'cmd.exe'") && said.contains("bash"),
        "{said}"
    );
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    // It is made where it is missing.
    let out = folder.path().join("share/man1");
    let written = output(&["man", "--out", out.to_str().unwrap()]);
    assert!(written.status.success(), "{written:?}");
    let commands = commands();
    let mut expected = vec!["pagecast.1".to_owned()];
    for name in &commands {
        expected.push(format!("pagecast-{name}.1"));
        let parts = commands_of(&[name.as_str()]);
        expected.extend(parts.iter().map(|part| format!("pagecast-{name}-{part}.1")));
    }
    expected.sort();
    let entries = fs::read_dir(&out).unwrap();
    let mut found: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, expected);
    let doctor = fs::read_to_string(out.join("pagecast-doctor.1")).unwrap();
    assert!(
        doctor.contains("\\-\\-run\\-dir") && doctor.contains("Exit codes:"),
        "{doctor}"
    );
    // The main page, which also goes to stdout.
    let printed = output(&["man"]);
    assert!(printed.status.success());
    let main = fs::read_to_string(out.join("pagecast.1")).unwrap();
    assert_eq!(text(&printed.stdout), main);
    for command in &commands {
        let name = format!("pagecast\\-{command}");
        assert!(main.contains(&name), "the main page does not name {name}:\n{main}");
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let refused = output(&["man", "--out", file.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1));
    let said = text(&refused.stderr);
    assert!(
        said.starts_with(&format!("pagecast: cannot make the folder {}", file.display())),
        "{said}"
    );
}
