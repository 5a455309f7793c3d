//! Every code of an error, each from a daemon that has a reason to say it.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use pagecast_testkit::PageSize;
use pagecast_testkit::hugepages::HugePages;
use pagecast_testkit::sim_vmm::{Connect, SimVmm};
use pagecast_testkit::skip::{Need, skip};
use serde_json::json;

use crate::fixture::{Fixture, PATIENCE, SIZE};
use crate::http::{Answer, request};
use crate::openapi;

/// A test for each code: its status, and how it comes about. `None` where that cannot be on this machine.
macro_rules! codes {
    ($($code:ident: $status:literal, $answer:expr;)+) => {
        $(
            #[test]
            fn $code() {
                let answer: fn() -> Option<Answer> = $answer;
                if let Some(answer) = answer() {
                    let message = answer.error($status, stringify!($code));
                    // Sentences for people, not names for machines.
                    assert!(message.contains(' '), "{message}");
                }
            }
        )+

        /// A new code needs a line in the table above.
        #[test]
        fn every_code_has_a_test() {
            let tested: BTreeSet<&str> = [$(stringify!($code)),+].into();
            assert_eq!(tested, openapi::codes());
        }
    };
}

codes! {
    bad_request: 400, || Some(Fixture::new().send_bytes("POST", "/v1/forks", b"{"));
    invalid_field: 422, || Some(Fixture::new().send("POST", "/v1/forks", &json!({ "template": 1 })));
    body_too_large: 413, || Some(Fixture::new().send_bytes("POST", "/v1/forks", &vec![b' '; (1 << 20) + 1]));
    forbidden: 403, || ask_as(54_321);
    not_found: 404, || Some(Fixture::new().ask("GET", "/v1/nothing"));
    method_not_allowed: 405, || Some(Fixture::new().ask("PATCH", "/v1/forks"));
    template_not_found: 404, || Some(Fixture::new().ask("GET", "/v1/templates/t"));
    template_exists: 409, || {
        let fixture = fixture();
        Some(fixture.send("PUT", "/v1/templates/t", &json!({ "mem_path": fixture.file.path(), "page_size": 2 << 20 })))
    };
    template_in_use: 409, || {
        let fixture = fixture();
        fixture.create(&json!({}));
        Some(fixture.ask("DELETE", "/v1/templates/t"))
    };
    template_changed: 409, || {
        let fixture = fixture();
        std::fs::rename(fixture.file.path(), fixture.folder.path().join("elsewhere")).unwrap();
        Some(fixture.try_create(&json!({})))
    };
    template_invalid: 422, || Some(Fixture::new().send("PUT", "/v1/templates/t", &json!({ "mem_path": "/" })));
    fork_not_found: 404, || Some(Fixture::new().ask("GET", "/v1/forks/f"));
    fork_exists: 409, || {
        let fixture = fixture();
        fixture.create(&json!({ "id": "f" }));
        Some(fixture.try_create(&json!({ "id": "f" })))
    };
    fork_in_use: 409, || {
        let fixture = fixture();
        let _vmm = fixture.serving("f", "uffd");
        Some(fixture.ask("DELETE", "/v1/forks/f"))
    };
    fork_waiting: 409, || {
        let fixture = fixture();
        fixture.create(&json!({ "id": "f", "backend": "uffd" }));
        Some(fixture.ask("POST", "/v1/forks/f/complete"))
    };
    fork_ended: 409, || {
        let fixture = fixture();
        fixture.serving("f", "uffd").kill().unwrap();
        fixture.await_fork("f", "exited");
        Some(fixture.ask("POST", "/v1/forks/f/complete"))
    };
    not_completable: 409, || {
        let fixture = fixture();
        fixture.create(&json!({ "id": "f", "backend": "file" }));
        Some(fixture.ask("POST", "/v1/forks/f/complete"))
    };
    backend_unavailable: 422, || Some(fixture().try_create(&json!({ "backend": "file", "page_size": 2 << 20 })));
    path_invalid: 422, || Some(fixture().try_create(&json!({ "backend": "uffd", "socket_path": "relative" })));
    too_many_forks: 429, || {
        let fixture = Fixture::with(|_, settings| settings.max_forks = Some(0));
        fixture.add_template();
        Some(fixture.try_create(&json!({})))
    };
    not_enough_memory: 503, || {
        // In the pool of hugepages, whose size a test can choose.
        let _pages = HugePages::reserve(SIZE >> 21).unwrap()?;
        let fixture = fixture();
        let created = fixture.create(&json!({ "id": "f", "backend": "uffd" }));
        let vmm = SimVmm::spawn().unwrap();
        let path = created["mem_backend"]["backend_path"].as_str().unwrap();
        vmm.run(Connect { page_size: PageSize::Huge, ..Connect::new(path, fixture.file.model()) }).unwrap();
        fixture.await_fork("f", "serving");
        // The reservation gives the old size back.
        std::fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();
        let answer = fixture.ask("POST", "/v1/forks/f/complete");
        vmm.kill().unwrap();
        Some(answer)
    };
    closing: 503, || {
        let fixture = fixture();
        fixture.runtime.block_on(fixture.daemon().close(PATIENCE)).unwrap();
        Some(fixture.try_create(&json!({})))
    };
    internal: 500, || {
        let fixture = Fixture::new();
        std::fs::remove_dir_all(fixture.run_dir().join("templates")).unwrap();
        Some(fixture.send("PUT", "/v1/templates/t", &json!({ "mem_path": fixture.file.path() })))
    };
}

fn fixture() -> Fixture {
    let fixture = Fixture::new();
    fixture.add_template();
    fixture
}

/// What this user gets of a daemon that allows the user 12345 beside its own.
fn ask_as(uid: u32) -> Option<Answer> {
    const ASK: &str = "
import os, socket, sys
os.setuid(int(sys.argv[1]))
asker = socket.socket(socket.AF_UNIX)
asker.connect(sys.argv[2])
asker.sendall(sys.stdin.buffer.read())
while answer := asker.recv(4096):
    sys.stdout.buffer.write(answer)
";
    if !rustix::process::geteuid().is_root() {
        skip((Need::Root, "to ask as another user"));
        return None;
    }
    let fixture = Fixture::with(|folder, settings| {
        settings.allowed_uids = Some(vec![12_345]);
        let anybody = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(folder, anybody).unwrap();
    });
    let mut asker = Command::new("python3")
        .args(["-c", ASK, &uid.to_string()])
        .arg(fixture.socket())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = asker.stdin.take().unwrap();
    stdin.write_all(&request("GET", "/v1/health", b"")).unwrap();
    drop(stdin);
    let output = asker.wait_with_output().unwrap();
    assert!(output.status.success());
    let answer = Answer::parse(&output.stdout);
    openapi::check("GET", "/v1/health", &answer);
    Some(answer)
}

#[test]
fn a_user_who_is_allowed_is_answered() {
    if let Some(answer) = ask_as(12_345) {
        assert_eq!(answer.ok(200)["status"], "ok");
    }
}

/// Without others who are allowed, not even the socket can be reached.
#[test]
fn the_control_socket_and_the_run_dir_are_for_their_user_only() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = Fixture::new();
    let mode = |path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(fixture.run_dir().to_owned()), 0o700);
    assert_eq!(mode(fixture.socket()), 0o600);
}

#[test]
fn a_daemon_that_could_not_close_takes_forks_again() {
    let Some(_pages) = HugePages::reserve(SIZE >> 21).unwrap() else {
        return;
    };
    let fixture = fixture();
    let created = fixture.create(&json!({ "id": "f", "backend": "uffd" }));
    let vmm = SimVmm::spawn().unwrap();
    let path = created["mem_backend"]["backend_path"].as_str().unwrap();
    vmm.run(Connect {
        page_size: PageSize::Huge,
        ..Connect::new(path, fixture.file.model())
    })
    .unwrap();
    fixture.await_fork("f", "serving");
    std::fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();
    let closed = fixture.runtime.block_on(fixture.daemon().close(Duration::from_secs(1)));
    assert!(closed.unwrap_err().to_string().contains("hugepages"));
    fixture.create(&json!({}));
    vmm.kill().unwrap();
}
