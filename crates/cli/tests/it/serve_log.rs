//! The log of `pagecast serve`: one line for each turn in the life of a fork or template, none for a fault.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};

use pagecast_testkit::peer::{FdKind, RawHandshake};
use pagecast_testkit::sim_vmm::{Connect, Read, SimVmm};
use pagecast_testkit::skip::{Need, skip};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::command::PATIENCE;

const SIZE: u64 = 1 << 20;

/// A running `pagecast serve`, and what it has logged.
struct Serve {
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
    socket: PathBuf,
}

impl Serve {
    fn start(run_dir: &Path, format: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_pagecast"))
            .args(["serve", "--log-format", format, "--run-dir"])
            .arg(run_dir)
            .env_remove("RUST_LOG")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            lines,
            said: Vec::new(),
            socket: run_dir.join("control.sock"),
        }
    }

    /// Waits until a line is as wanted, be it one that came before.
    fn await_line(&mut self, wanted: impl Fn(&str) -> bool) {
        let mut seen = 0;
        loop {
            if self.said.iter().skip(seen).any(|line| wanted(line)) {
                return;
            }
            seen = self.said.len();
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => self.said.push(line),
                Err(error) => panic!("{error}; said {:#?}", self.said),
            }
        }
    }

    /// Waits until a line of JSON tells of this.
    fn await_event(&mut self, event: &str, of: &str) {
        self.await_line(|line| {
            let line = parse(line);
            line["event"] == event && subject(&line) == of
        });
    }

    /// Asks the control API and gives the answer, whose status must be as told.
    fn call(&self, method: &str, path: &str, body: &Value, status: u16) -> Value {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{method} {path}: {answer}"
        );
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str(body).unwrap_or(Value::Null)
    }

    /// The socket of a new fork.
    fn fork(&self, id: &str, backend: &str) -> PathBuf {
        let wanted = json!({"template": "t", "id": id, "backend": backend});
        let made = self.call("POST", "/v1/forks", &wanted, 201);
        made["mem_backend"]["backend_path"].as_str().unwrap().into()
    }

    /// A new fork, all of whose pages have been read.
    fn reader(&mut self, id: &str, template: &TemplateFile) -> SimVmm {
        let vmm = SimVmm::spawn().unwrap();
        vmm.run(Connect::new(self.fork(id, "uffd"), template.model())).unwrap();
        let report = vmm.run(Read::default()).unwrap();
        assert_eq!(report.checked.mismatches, 0);
        vmm
    }

    /// Stops it, and gives all that it has said.
    fn stop(mut self) -> (ExitStatus, Vec<String>) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, Signal::TERM).unwrap();
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.said.push(line);
        }
        (self.child.wait().unwrap(), std::mem::take(&mut self.said))
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let rest: Vec<String> = self.lines.iter().collect();
            eprintln!("pagecast serve said {:#?} and {rest:#?}", self.said);
        }
    }
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
}

/// What a line is about.
fn subject(line: &Value) -> String {
    let name = line["fork"].as_str().or_else(|| line["template"].as_str());
    // A new fork names both.
    name.unwrap_or_default().to_owned()
}

/// Everything that can become of a fork and of a template.
fn live(serve: &mut Serve, template: &TemplateFile) {
    let vmm = serve.reader("exits", template);
    vmm.exit(0).unwrap();
    serve.await_event("fork_ended", "exits");
    serve.call("DELETE", "/v1/forks/exits", &Value::Null, 204);

    let refused = SimVmm::spawn().unwrap();
    let socket = serve.fork("refused", "uffd");
    drop(std::os::unix::net::UnixStream::connect(&socket).unwrap());
    serve.await_event("connection_refused", "refused");
    refused
        .run(RawHandshake::new(socket, "GET /", &[FdKind::Uffd]))
        .unwrap();
    serve.await_event("fork_ended", "refused");

    let killed = serve.reader("killed", template);
    serve.call("DELETE", "/v1/forks/killed?kill=true", &Value::Null, 204);
    killed.wait().unwrap();

    let completed = serve.reader("complete", template);
    serve.call("POST", "/v1/forks/complete/complete", &Value::Null, 202);
    serve.await_event("fork_ended", "complete");
    completed.run(Read::default()).unwrap();

    serve.fork("waits", "uffd");
    serve.call("DELETE", "/v1/forks/waits", &Value::Null, 204);
    serve.fork("file", "file");
    serve.call("DELETE", "/v1/forks/file", &Value::Null, 204);

    // Somebody wants to write the template: forks are completed, or fail.
    serve.fork("file-too", "file");
    let last = serve.reader("lives", template);
    let writer = OpenOptions::new()
        .write(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(template.path());
    assert!(writer.is_err(), "nothing holds writers off");
    serve.await_event("template_withdrawn", "t");
    last.run(Read::default()).unwrap();
}

#[test]
fn each_turn_is_one_line_of_json_and_faults_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    let mut serve = Serve::start(&folder.path().join("run"), "json");
    serve.await_event("ready", "");
    let added = serve.call("PUT", "/v1/templates/t", &json!({"mem_path": template.path()}), 201);
    if added["guard"] != "lease" {
        skip(Need::Leases);
        return;
    }

    live(&mut serve, &template);
    let (status, said) = serve.stop();
    assert!(status.success(), "{status}");
    let mut lines: BTreeMap<(String, String), Value> = BTreeMap::new();
    for line in &said {
        let line = parse(line);
        let event = line["event"].as_str().unwrap_or_else(|| panic!("no event: {line}"));
        assert!(line["timestamp"].is_string() && line["message"].is_string(), "{line}");
        let key = (subject(&line), event.to_owned());
        assert!(lines.insert(key, line.clone()).is_none(), "twice: {line}; {said:#?}");
    }
    let happened: Vec<(&str, &str)> = lines.keys().map(|(of, event)| (&**of, &**event)).collect();
    assert_eq!(
        happened,
        [
            ("", "ready"),
            ("", "stopped"),
            ("", "stopping"),
            ("complete", "fork_created"),
            ("complete", "fork_ended"),
            ("complete", "fork_serving"),
            ("exits", "fork_created"),
            ("exits", "fork_deleted"),
            ("exits", "fork_ended"),
            ("exits", "fork_serving"),
            ("file", "fork_created"),
            ("file", "fork_deleted"),
            ("file-too", "fork_created"),
            ("file-too", "fork_ended"),
            ("killed", "fork_created"),
            ("killed", "fork_deleted"),
            ("killed", "fork_ended"),
            ("killed", "fork_serving"),
            ("lives", "fork_created"),
            ("lives", "fork_ended"),
            ("lives", "fork_serving"),
            ("refused", "connection_refused"),
            ("refused", "fork_created"),
            ("refused", "fork_ended"),
            ("t", "template_added"),
            ("t", "template_lease_broken"),
            ("t", "template_withdrawn"),
            ("waits", "fork_created"),
            ("waits", "fork_deleted"),
            ("waits", "fork_ended"),
        ]
    );
    let line = |of: &str, event: &str| &lines[&(of.to_owned(), event.to_owned())];
    for (fork, state, code) in [
        ("exits", "exited", Value::Null),
        ("refused", "failed", "message_framing".into()),
        ("killed", "failed", "killed".into()),
        ("complete", "complete", Value::Null),
        ("waits", "failed", "closed".into()),
        ("file-too", "failed", "template_changed".into()),
        ("lives", "complete", Value::Null),
    ] {
        let ended = line(fork, "fork_ended");
        assert_eq!((&ended["state"], &ended["code"]), (&state.into(), &code), "{ended}");
    }
    assert_eq!(line("exits", "fork_created")["backend"], "uffd");
    assert_eq!(line("exits", "fork_serving")["memory_bytes"], SIZE);
    let ended = line("exits", "fork_ended");
    assert_eq!(ended["installed_bytes"], SIZE);
    assert!(
        (1..=SIZE / 4096).contains(&ended["faults"].as_u64().unwrap()),
        "{ended}"
    );

    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/logs.md");
    let page = std::fs::read_to_string(page).unwrap();
    for (_, event) in happened {
        assert!(page.contains(&format!("| `{event}` |")), "docs/logs.md lacks {event}");
    }
}

#[test]
fn what_is_kept_and_not_sound_is_a_warning_once_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    for suffix in ["working-set", "zeros"] {
        std::fs::write(format!("{}.{suffix}", template.path().display()), "no such thing").unwrap();
    }
    let mut serve = Serve::start(&folder.path().join("run"), "json");
    serve.await_line(|line| line.contains("\"ready\""));
    serve.call("PUT", "/v1/templates/t", &json!({"mem_path": template.path()}), 201);
    for id in ["a", "b"] {
        serve.reader(id, &template).exit(0).unwrap();
        serve.await_line(|line| line.contains("fork_ended"));
    }
    let (_, said) = serve.stop();
    let warnings: Vec<_> = said
        .iter()
        .filter(|line| line.contains("WARN") || line.contains("ERROR"))
        .collect();
    assert_eq!(warnings.len(), 2, "{said:#?}");
    assert!(
        warnings.iter().all(|line| line.contains("\"kept_not_used\"")),
        "{warnings:#?}"
    );
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/logs.md");
    assert!(std::fs::read_to_string(page).unwrap().contains("| `kept_not_used` |"));
}

#[test]
fn text_is_for_people_a_line_each() {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    let mut serve = Serve::start(&folder.path().join("run"), "text");
    serve.await_line(|line| line.contains("pagecast is ready"));
    serve.call("PUT", "/v1/templates/t", &json!({"mem_path": template.path()}), 201);
    let vmm = serve.reader("a", &template);
    vmm.exit(0).unwrap();
    serve.await_line(|line| line.contains("ended"));
    let (_, said) = serve.stop();
    let messages = [
        " INFO pagecast is ready control_socket=",
        " INFO template added template=t ",
        " INFO fork created fork=a ",
        " INFO serving fork=a pid=",
        " INFO ended fork=a state=exited faults=",
        " INFO stopping: forks are completed; a second signal kills their VMMs forks=",
        " INFO stopped",
    ];
    assert_eq!(said.len(), messages.len(), "{said:#?}");
    for (line, message) in said.iter().zip(messages) {
        assert!(line.contains(message), "{message:?} is not in {line:?}");
        assert!(!line.contains("event=") && !line.contains('\u{1b}'), "{line:?}");
    }
}
