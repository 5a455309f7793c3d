//! The examples, run as they are, and what they say held against the API.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};

use pagecast_client::fork::MemBackend;
use pagecast_client::{CreateFork, CreatedFork};
use pagecast_testkit::firecracker::{Snapshot, SnapshotOptions, binary, jailer, kvm};
use pagecast_testkit::skip::{Need, skip};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::command::PATIENCE;

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples")
}

/// Whether there is such a program; says so where there is not.
fn skips_without(program: &'static str, argument: &str) -> bool {
    let there = Command::new(program)
        .arg(argument)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if there.is_ok() {
        return false;
    }
    skip(Need::Program(program));
    true
}

/// An example that restores a microVM, with the console of its guest. Ended when this is dropped.
struct Script {
    child: Child,
    console: Receiver<String>,
    said: Receiver<String>,
    /// Where it keeps what it makes.
    folder: tempfile::TempDir,
}

impl Script {
    fn start(name: &str, snapshot: &Snapshot, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(examples().join(name))
            .arg(&snapshot.mem_path)
            .arg(&snapshot.vmstate_path)
            .args(arguments)
            .env("PAGECAST", env!("CARGO_BIN_EXE_pagecast"))
            .env("FIRECRACKER", binary().unwrap())
            .env("JAILER", jailer().unwrap())
            .env("TMPDIR", folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let console = lines(child.stdout.take().unwrap());
        let said = lines(child.stderr.take().unwrap());
        Self {
            child,
            console,
            said,
            folder,
        }
    }

    /// Asks the guest for something, and waits for the line with its answer.
    fn ask(&mut self, command: &str) -> String {
        writeln!(self.child.stdin.as_mut().unwrap(), "{command}").unwrap();
        let word = command.split(' ').next().unwrap();
        await_line(&self.console, &format!("ok {word}"))
    }

    fn wait(&mut self) -> ExitStatus {
        // Both close with it and all that it has started.
        while self.console.recv_timeout(PATIENCE).is_ok() {}
        while self.said.recv_timeout(PATIENCE).is_ok() {}
        self.child.wait().unwrap()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            // Not killed, so that it can clean up.
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            let _ = self.child.wait();
        }
    }
}

fn lines(from: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

fn await_line(lines: &Receiver<String>, part: &str) -> String {
    let mut others = Vec::new();
    loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) if line.contains(part) => return line,
            Ok(line) => others.push(line),
            Err(error) => panic!("no {part:?} ({error}); {others:#?}"),
        }
    }
}

fn is_empty(folder: &Path) -> bool {
    folder.read_dir().unwrap().next().is_none()
}

fn restored_with_curl(backend: &str) {
    restored("curl/restore.sh", backend, &[backend]);
}

fn restored(name: &str, backend: &str, arguments: &[&str]) {
    if kvm().unwrap().skips() || skips_without("curl", "--version") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::create(&SnapshotOptions::default(), folder.path()).unwrap();
    let mut script = Script::start(name, &snapshot, arguments);
    await_line(&script.said, &format!("\"backend\":\"{backend}\""));
    await_line(&script.said, "\"state\":\"serving\"");

    let verified = script.ask(&format!("verify {}", snapshot.whole));
    assert!(verified.contains(" mismatches=0 "), "{verified}");
    let pages = format!(" pages={} ", snapshot.whole.pages());
    assert!(verified.contains(&pages), "{verified}");
    script.ask("halt");
    assert!(script.wait().success());
    assert!(is_empty(script.folder.path()));
}

#[test]
fn curl_restores_a_stock_firecracker_with_uffd() {
    restored_with_curl("uffd");
}

#[test]
fn curl_restores_a_stock_firecracker_with_file() {
    restored_with_curl("file");
}

#[test]
fn the_curl_example_leaves_nothing_when_it_is_interrupted() {
    if kvm().unwrap().skips() || skips_without("curl", "--version") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::create(&SnapshotOptions::default(), folder.path()).unwrap();
    let mut script = Script::start("curl/restore.sh", &snapshot, &["auto"]);
    script.ask("ping");
    kill_process(Pid::from_child(&script.child), Signal::TERM).unwrap();
    assert_eq!(script.wait().code(), Some(130));
    assert!(is_empty(script.folder.path()));
}

#[test]
fn curl_restores_a_jailed_firecracker_with_uffd() {
    restored_in_a_jail("uffd");
}

#[test]
fn curl_restores_a_jailed_firecracker_with_file() {
    restored_in_a_jail("file");
}

fn restored_in_a_jail(backend: &str) {
    if !geteuid().is_root() {
        return skip((Need::Root, "for the jailer"));
    }
    restored("jailer/restore.sh", backend, &["12345", "12346", backend]);
}

#[test]
fn the_jailer_example_leaves_nothing_when_it_is_interrupted() {
    if !geteuid().is_root() {
        return skip((Need::Root, "for the jailer"));
    }
    if kvm().unwrap().skips() || skips_without("curl", "--version") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::create(&SnapshotOptions::default(), folder.path()).unwrap();
    let mut script = Script::start("jailer/restore.sh", &snapshot, &["12345", "12346", "uffd"]);
    script.ask("ping");
    kill_process(Pid::from_child(&script.child), Signal::TERM).unwrap();
    assert_eq!(script.wait().code(), Some(130));
    assert!(is_empty(script.folder.path()));
}

/// One of the JSON files that the Go program is built with.
fn json_of_go<T: DeserializeOwned>(name: &str) -> T {
    let text = std::fs::read(examples().join("go").join(name)).unwrap();
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Holds a file of the Go program against a type of ours: each must have all that the other has.
fn is_exactly<T: Serialize + DeserializeOwned>(name: &str) {
    let ours = serde_json::to_value(json_of_go::<T>(name)).unwrap();
    assert_eq!(ours, json_of_go::<Value>(name), "{name}");
}

/// What Firecracker wants to load.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LoadSnapshot {
    snapshot_path: PathBuf,
    mem_backend: MemBackend,
    resume_vm: bool,
}

#[test]
fn the_go_example_says_what_the_api_wants_to_hear() {
    is_exactly::<CreateFork>("create_fork.json");
    is_exactly::<CreatedFork>("created_fork.json");
    is_exactly::<LoadSnapshot>("load_snapshot.json");
    let created: CreatedFork = json_of_go("created_fork.json");
    let load: LoadSnapshot = json_of_go("load_snapshot.json");
    assert_eq!(created.mem_backend, load.mem_backend);
}

#[test]
fn the_go_example_is_formatted_vetted_and_tested() {
    if skips_without("go", "version") {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(examples().join("go"))
            .env("GOCACHE", cache.path())
            // Not another version than the one that is there.
            .env("GOTOOLCHAIN", "local")
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    };
    assert_eq!(run("gofmt", &["-l", "."]), (true, String::new()));
    assert_eq!(run("go", &["vet", "./..."]), (true, String::new()));
    let (passed, said) = run("go", &["test", "./..."]);
    assert!(passed, "{said}");
}
