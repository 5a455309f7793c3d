//! The life of forks with both backends, as their VMMs live it and as the API tells it.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use pagecast_testkit::peer::{FdKind, RawHandshake};
use pagecast_testkit::sim_vmm::{MapFile, SimVmm};
use pagecast_testkit::skip::{Need, skip};
use serde_json::{Value, json};

use crate::fixture::{Fixture, SIZE, eventually, is_dead, reads_right, writes};

fn fixture() -> Fixture {
    let fixture = Fixture::new();
    fixture.add_template();
    fixture
}

fn bytes(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value:#}"))
}

#[test]
fn a_fork_with_uffd_is_served_measured_and_seen_to_exit() {
    let fixture = fixture();
    let vmm = fixture.serving("f", "uffd");
    // Once the kernel was asked how it fills them.
    eventually("zeros are given back", || {
        bytes(&fixture.fork("f")["given_back_bytes"]) > 0
    });
    reads_right(&vmm);
    writes(&vmm);
    reads_right(&vmm);
    let fork = fixture.fork("f");
    assert_eq!((&fork["pid"], &fork["memory_bytes"]), (&json!(vmm.pid()), &json!(SIZE)));
    // Each page once; but for long runs of zeros, which the kernel fills in by itself.
    let given_back = bytes(&fork["given_back_bytes"]) / 4096;
    assert!(given_back > 0, "{fork:#}");
    let [demand, around] = ["demand", "around"].map(|kind| bytes(&fork["faults"][kind]));
    assert_eq!(demand + around + given_back, SIZE / 4096);
    let (installed, private) = (bytes(&fork["installed_bytes"]), bytes(&fork["memory"]["private"]));
    assert!(installed > SIZE / 2 && installed < SIZE, "{fork:#}");
    assert!(
        private >= installed && bytes(&fork["memory"]["rss"]) >= private,
        "{fork:#}"
    );
    assert_eq!(fixture.template()["forks"], 1);
    fixture.ask("DELETE", "/v1/forks/f").error(409, "fork_in_use");
    fixture.ask("DELETE", "/v1/templates/t").error(409, "template_in_use");
    vmm.kill().unwrap();
    let fork = fixture.await_fork("f", "exited");
    assert_eq!((&fork["pid"], &fork["memory"]), (&json!(vmm.pid()), &Value::Null));
    assert_eq!(
        bytes(&fork["installed_bytes"]),
        installed,
        "what was counted stays readable"
    );
    assert!(fork.get("error").is_none(), "{fork:#}");
    assert_eq!(fixture.template()["forks"], 0);
    eventually("nothing of it is kept", || fixture.kept("forks").is_empty());
    fixture.ask("DELETE", "/v1/forks/f").ok(204);
}

#[test]
fn a_fork_with_file_and_a_pid_is_serving_measured_and_seen_to_exit() {
    let fixture = fixture();
    let vmm = SimVmm::spawn().unwrap();
    let created = fixture.create(&json!({ "id": "f", "backend": "file", "pid": vmm.pid() }));
    let path = created["mem_backend"]["backend_path"].as_str().unwrap();
    let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
    assert_eq!(
        inode(path.as_ref()),
        inode(fixture.file.path()),
        "a copy shares nothing"
    );
    assert_eq!(fixture.fork("f")["state"], "serving");
    fixture.restore(&vmm, &created);
    let other = fixture.serving("g", "file");
    for vmm in [&vmm, &other] {
        reads_right(vmm);
    }
    let before = fixture.fork("f");
    assert!(bytes(&before["memory"]["shared"]) >= SIZE, "{before:#}");
    writes(&vmm);
    reads_right(&vmm);
    reads_right(&other);
    let fork = fixture.fork("f");
    let added = bytes(&fork["memory"]["private"]) - bytes(&before["memory"]["private"]);
    assert!((SIZE / 8..SIZE / 4).contains(&added), "{before:#} {fork:#}");
    assert_eq!((&fork["faults"], &fork["memory_bytes"]), (&Value::Null, &Value::Null));

    let template = fixture.template();
    let total = &template["memory"];
    assert_eq!((bytes(&total["measured"]), &template["forks"]), (2, &json!(2)));
    // Two that share most of what each has mapped.
    assert!(
        bytes(&total["unshared"]) - bytes(&total["pss"]) >= SIZE / 2,
        "{template:#}"
    );
    assert!(bytes(&total["private"]) >= SIZE / 8, "{template:#}");

    fixture
        .ask("POST", "/v1/forks/f/complete")
        .error(409, "not_completable");
    fixture.ask("DELETE", "/v1/forks/f").error(409, "fork_in_use");
    vmm.kill().unwrap();
    assert_eq!(fixture.await_fork("f", "exited")["memory"], Value::Null);
    reads_right(&other);
    fixture.file.check_untouched().unwrap();
}

/// A folder on another file system, of which it is the only thing; gone with the test.
struct Elsewhere(tempfile::TempDir);

impl Elsewhere {
    fn new() -> Option<Self> {
        let here = std::fs::metadata(std::env::temp_dir()).unwrap().dev();
        let folder = tempfile::tempdir_in("/dev/shm").ok();
        let folder = folder.filter(|folder| std::fs::metadata(folder.path()).unwrap().dev() != here);
        let may_mount = rustix::thread::capabilities(None)
            .unwrap()
            .effective
            .contains(rustix::thread::CapabilitySet::SYS_ADMIN);
        if folder.is_none() || !may_mount {
            skip("needs another file system at /dev/shm, and CAP_SYS_ADMIN to mount");
        }
        folder.filter(|_| may_mount).map(Self)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        // Where a test has failed.
        for entry in std::fs::read_dir(self.0.path()).into_iter().flatten().flatten() {
            let _ = rustix::mount::unmount(entry.path(), rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// The memory file at a path of the fork's own: its VMM is found by that, and the path is gone with it.
fn placed_at(path: &Path) {
    let fixture = fixture();
    let created = fixture.create(&json!({ "id": "f", "path": path }));
    assert_eq!(created["backend"], "file");
    assert_eq!(created["mem_backend"]["backend_path"], path.to_str().unwrap());
    assert_eq!(fixture.fork("f")["state"], "waiting");
    let inode = |path: &Path| {
        (
            std::fs::metadata(path).unwrap().dev(),
            std::fs::metadata(path).unwrap().ino(),
        )
    };
    assert_eq!(inode(path), inode(fixture.file.path()));
    // Another fork's VMM is not taken for its.
    let other = fixture.serving("g", "file");
    assert_eq!(fixture.fork("f")["state"], "waiting");

    let vmm = SimVmm::spawn().unwrap();
    fixture.restore(&vmm, &created);
    let fork = fixture.await_fork("f", "serving");
    assert_eq!(fork["pid"], vmm.pid());
    assert!(fork["memory"].is_object(), "{fork:#}");
    reads_right(&vmm);
    vmm.kill().unwrap();
    fixture.await_fork("f", "exited");
    eventually("its place is taken away", || !path.exists());
    reads_right(&other);
    fixture.file.check_untouched().unwrap();
    // One that no VMM ever took, too.
    fixture.create(&json!({ "id": "h", "path": path }));
    fixture.ask("DELETE", "/v1/forks/h").ok(204);
    assert!(!path.exists());
}

#[test]
fn a_fork_with_a_hard_link_of_its_own_is_found_by_it() {
    let folder = tempfile::tempdir().unwrap();
    placed_at(&folder.path().canonicalize().unwrap().join("mem"));
}

#[test]
fn a_fork_with_a_bind_mount_of_its_own_is_found_by_it() {
    if let Some(folder) = Elsewhere::new() {
        placed_at(&folder.0.path().canonicalize().unwrap().join("mem"));
    }
}

#[test]
fn deleting_with_kill_kills_the_vmm_first() {
    let fixture = fixture();
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().canonicalize().unwrap().join("mem");
    let uffd = fixture.serving("uffd", "uffd");
    let file = fixture.serving("file", "file");
    let placed = SimVmm::spawn().unwrap();
    let created = fixture.create(&json!({ "id": "placed", "path": place }));
    // Nobody has asked for it since.
    fixture.restore(&placed, &created);
    let complete = fixture.serving("complete", "uffd");
    fixture.ask("POST", "/v1/forks/complete/complete").ok(202);
    fixture.await_fork("complete", "complete");
    fixture.create(&json!({ "id": "waiting", "backend": "uffd" }));
    let bystander = fixture.serving("bystander", "uffd");
    for (id, vmm) in [
        ("uffd", Some(&uffd)),
        ("file", Some(&file)),
        ("placed", Some(&placed)),
        ("complete", Some(&complete)),
        ("waiting", None),
    ] {
        fixture.ask("DELETE", &format!("/v1/forks/{id}?kill=true")).ok(204);
        assert!(
            vmm.is_none_or(is_dead),
            "{id}: it is answered only once the VMM is dead"
        );
        fixture
            .ask("GET", &format!("/v1/forks/{id}"))
            .error(404, "fork_not_found");
    }
    assert!(!place.exists());
    reads_right(&bystander);
    assert_eq!(fixture.kept("forks"), ["bystander.json"]);
}

#[test]
fn a_fork_that_is_complete_is_let_go() {
    let fixture = fixture();
    let vmm = fixture.serving("f", "uffd");
    fixture.ask("POST", "/v1/forks/f/complete").ok(202);
    let fork = fixture.await_fork("f", "complete");
    assert_eq!(bytes(&fork["faults"]["demand"]), 0);
    fixture.ask("POST", "/v1/forks/f/complete").ok(202);
    // Its VMM lives and costs what it costs, but nobody needs the template any more.
    assert!(fork["memory"].is_object(), "{fork:#}");
    assert_eq!(fixture.template()["forks"], 0);
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    reads_right(&vmm);
    fixture.ask("DELETE", "/v1/forks/f").ok(204);
    reads_right(&vmm);
}

#[test]
fn only_forks_that_wait_or_are_served_need_the_daemon() {
    let fixture = fixture();
    let _served = fixture.serving("served", "uffd");
    fixture.create(&json!({ "id": "waiting", "backend": "uffd" }));
    let _file = fixture.serving("file", "file");
    fixture.serving("ended", "uffd").kill().unwrap();
    fixture.await_fork("ended", "exited");
    let _complete = fixture.serving("complete", "uffd");
    fixture.ask("POST", "/v1/forks/complete/complete").ok(202);
    fixture.await_fork("complete", "complete");
    assert_eq!(fixture.daemon().serving(), 2);
}

#[test]
fn a_vmm_that_is_refused_fails_its_fork_and_says_why() {
    let fixture = fixture();
    let created = fixture.create(&json!({ "id": "f", "backend": "uffd" }));
    let socket = created["mem_backend"]["backend_path"].as_str().unwrap();
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(RawHandshake::new(socket, "GET / HTTP/1.1", &[FdKind::Uffd]))
        .unwrap();
    let fork = fixture.await_fork("f", "failed");
    assert_eq!(fork["error"]["code"], "message_framing", "{fork:#}");
    fixture.ask("POST", "/v1/forks/f/complete").error(409, "fork_ended");
    // The name is taken until it is deleted.
    fixture.try_create(&json!({ "id": "f" })).error(409, "fork_exists");
    fixture.ask("DELETE", "/v1/forks/f").ok(204);
    fixture.create(&json!({ "id": "f" }));
}

#[test]
fn a_probe_of_its_socket_leaves_a_fork_waiting_for_its_vmm() {
    let fixture = fixture();
    let created = fixture.create(&json!({ "id": "f", "backend": "uffd" }));
    let socket = created["mem_backend"]["backend_path"].as_str().unwrap();
    for _ in 0..3 {
        drop(std::os::unix::net::UnixStream::connect(socket).unwrap());
    }
    let counted =
        |line: &str| line.starts_with("pagecast_refusals_total") && line.contains("hung_up") && line.ends_with(" 3");
    eventually("they are counted", || {
        let metrics = fixture.ask("GET", "/metrics").body;
        String::from_utf8(metrics).unwrap().lines().any(counted)
    });
    assert_eq!(fixture.await_fork("f", "waiting")["error"], Value::Null);
    let vmm = SimVmm::spawn().unwrap();
    fixture.restore(&vmm, &created);
    fixture.await_fork("f", "serving");
    reads_right(&vmm);
}

#[test]
fn a_vmm_that_does_not_come_in_time_fails_its_fork() {
    let fixture = Fixture::with(|_, settings| settings.connect_deadline = Some(std::time::Duration::from_millis(100)));
    fixture.add_template();
    fixture.create(&json!({ "id": "f", "backend": "uffd" }));
    let fork = fixture.await_fork("f", "failed");
    assert_eq!(fork["error"]["code"], "connect_deadline", "{fork:#}");
    eventually("nothing of it is kept", || fixture.kept("forks").is_empty());
}

const SOON: Option<Duration> = Some(Duration::from_millis(100));

/// A client that makes these forks and is killed before it does anything with them.
fn client_that_dies(fixture: &Fixture, forks: &[Value]) {
    const MAKE: &str = "
import socket, sys
for body in sys.argv[2:]:
    asker = socket.socket(socket.AF_UNIX)
    asker.connect(sys.argv[1])
    head = f'POST /v1/forks HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n'
    asker.sendall((head + body).encode())
    assert asker.recv(4096).startswith(b'HTTP/1.1 201')
print(flush=True)
sys.stdin.read()
";
    let mut client = Command::new("python3")
        .args(["-c", MAKE])
        .arg(fixture.socket())
        .args(forks.iter().map(Value::to_string))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut made = BufReader::new(client.stdout.take().unwrap());
    made.read_line(&mut line).unwrap();
    assert_eq!(line, "\n", "not all forks were made");
    client.kill().unwrap();
    client.wait().unwrap();
}

#[test]
fn the_forks_with_file_of_a_client_that_died_end() {
    let fixture = Fixture::with(|_, settings| {
        settings.connect_deadline = SOON;
        settings.max_forks = Some(2);
    });
    fixture.add_template();
    let place = fixture.folder.path().canonicalize().unwrap().join("place");
    client_that_dies(
        &fixture,
        &[
            json!({ "template": "t", "id": "placed", "backend": "file", "path": place }),
            json!({ "template": "t", "id": "shared", "backend": "file" }),
        ],
    );
    for id in ["placed", "shared"] {
        let fork = fixture.await_fork(id, "failed");
        assert_eq!(fork["error"]["code"], "connect_deadline", "{fork:#}");
    }
    eventually("its place is taken away", || !place.exists());
    eventually("nothing of them is kept", || fixture.kept("forks").is_empty());
    // They keep neither other forks nor the end of their template from anybody.
    fixture.create(&json!({ "id": "other", "backend": "uffd" }));
    fixture.ask("DELETE", "/v1/forks/other").ok(204);
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
}

#[test]
fn a_fork_with_file_that_was_found_again_waits_no_longer_than_a_new_one() {
    let mut fixture = fixture();
    let folder = fixture.folder.path().canonicalize().unwrap();
    let mapped = fixture.create(&json!({ "id": "mapped", "path": folder.join("mapped") }));
    fixture.create(&json!({ "id": "placed", "path": folder.join("placed") }));
    let vmm = SimVmm::spawn().unwrap();
    // Nobody has asked for it since.
    fixture.restore(&vmm, &mapped);
    fixture.restart_with(|settings| settings.connect_deadline = SOON);
    fixture.await_fork("placed", "failed");
    eventually("its place is taken away", || !folder.join("placed").exists());
    assert_eq!(fixture.fork("mapped")["pid"], vmm.pid());
    assert_eq!(fixture.fork("mapped")["state"], "serving");
    reads_right(&vmm);
}

/// By another path than the daemon knows, as in a mount namespace of its own, or by the one that all forks share.
#[test]
fn a_fork_with_file_waits_on_while_somebody_maps_it_who_may_be_its_vmm() {
    let fixture = Fixture::with(|_, settings| settings.connect_deadline = SOON);
    fixture.add_template();
    let folder = fixture.folder.path().canonicalize().unwrap();
    let stray = folder.join("stray");
    std::fs::hard_link(fixture.file.path(), &stray).unwrap();
    let map = |path: &Path| {
        let vmm = SimVmm::spawn().unwrap();
        vmm.run(MapFile {
            path: path.to_owned(),
            template: fixture.file.model().clone(),
        })
        .unwrap();
        vmm
    };
    // Before there are forks, so that no deadline comes first.
    let on_shared = map(&fixture.run_dir().join("templates/t.mem"));
    let on_stray = map(&stray);
    fixture.create(&json!({ "id": "shared" }));
    fixture.create(&json!({ "id": "placed", "path": folder.join("placed") }));
    // One whose deadline comes after theirs, and that nobody can have mapped.
    let other = folder.join("other");
    std::fs::write(&other, [1; 4096]).unwrap();
    fixture
        .send("PUT", "/v1/templates/u", &json!({ "mem_path": other }))
        .ok(201);
    fixture.create(&json!({ "id": "unmapped", "template": "u" }));
    fixture.await_fork("unmapped", "failed");
    for id in ["shared", "placed"] {
        assert_eq!(fixture.fork(id)["state"], "waiting", "{id}");
    }
    assert!(folder.join("placed").exists());
    // Whoever it was has exited.
    on_stray.kill().unwrap();
    let fork = fixture.await_fork("placed", "exited");
    assert!(fork.get("error").is_none(), "{fork:#}");
    eventually("its place is taken away", || !folder.join("placed").exists());
    assert_eq!(fixture.fork("shared")["state"], "waiting");
    reads_right(&on_shared);
    on_shared.kill().unwrap();
    fixture.await_fork("shared", "exited");
}

#[test]
fn the_oldest_forks_that_have_ended_are_forgotten() {
    let fixture = Fixture::with(|_, settings| settings.ended_forks = Some(2));
    fixture.add_template();
    for (number, backend) in ["uffd", "file", "uffd", "file"].into_iter().enumerate() {
        let id = format!("f{number}");
        let vmm = fixture.serving(&id, backend);
        vmm.kill().unwrap();
        fixture.await_fork(&id, "exited");
    }
    let _alive = fixture.serving("alive", "uffd");
    eventually("the oldest are forgotten", || {
        let forks = fixture.ask("GET", "/v1/forks").ok(200);
        let ids: Vec<_> = forks
            .as_array()
            .unwrap()
            .iter()
            .map(|fork| fork["id"].as_str().unwrap())
            .collect();
        ids == ["alive", "f2", "f3"]
    });
    // Their names are free, and do not count.
    fixture.create(&json!({ "id": "f0", "backend": "uffd" }));
}

#[test]
fn a_fork_that_ends_makes_room_for_another() {
    let fixture = Fixture::with(|_, settings| settings.max_forks = Some(3));
    fixture.add_template();
    let uffd = fixture.serving("uffd", "uffd");
    let file = fixture.serving("file", "file");
    fixture.create(&json!({ "id": "waiting" }));
    let full = || {
        fixture
            .try_create(&json!({ "id": "more" }))
            .error(429, "too_many_forks")
    };
    assert!(full().contains("max_forks"));
    let fits = || {
        fixture.create(&json!({ "id": "more" }));
        fixture
            .try_create(&json!({ "id": "most" }))
            .error(429, "too_many_forks");
        fixture.ask("DELETE", "/v1/forks/more").ok(204);
    };
    uffd.kill().unwrap();
    eventually("there is room", || {
        fixture.try_create(&json!({ "id": "more" })).status == 201
    });
    fixture.ask("DELETE", "/v1/forks/more").ok(204);
    fits();
    // One that has ended and is deleted makes no more room than it has made.
    fixture.ask("DELETE", "/v1/forks/uffd").ok(204);
    fits();
    file.kill().unwrap();
    fixture.await_fork("file", "exited");
    fixture.ask("DELETE", "/v1/forks/waiting").ok(204);
    for id in ["a", "b", "c"] {
        fixture.create(&json!({ "id": id }));
    }
    full();
}

#[test]
fn the_socket_of_a_fork_is_where_and_whose_it_was_asked_to_be() {
    use std::os::unix::fs::PermissionsExt;
    if !rustix::process::geteuid().is_root() {
        return skip((Need::Root, "to give a socket to another user"));
    }
    let fixture = fixture();
    let socket = fixture.folder.path().canonicalize().unwrap().join("vm.sock");
    let created = fixture.create(&json!({
        "id": "f", "backend": "uffd", "socket_path": socket, "uid": 54_321, "gid": 12_345
    }));
    assert_eq!(created["mem_backend"]["backend_path"], socket.to_str().unwrap());
    let metadata = std::fs::metadata(&socket).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (54_321, 12_345));
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    // Root may connect, but is not who was asked for.
    let vmm = SimVmm::spawn().unwrap();
    let report = vmm.run(RawHandshake::silent(&socket)).unwrap();
    assert!(report.closed_after_us.is_some(), "{report:?}");
    assert_eq!(fixture.await_fork("f", "waiting")["error"], Value::Null);
    fixture.ask("DELETE", "/v1/forks/f").ok(204);
    eventually("its socket is gone", || !socket.exists());
}

/// Each reads and writes for itself, many at once, both backends beside each other.
#[test]
fn forks_of_both_backends_live_beside_each_other() {
    let fixture = fixture();
    let vmms: Vec<_> = (0..8)
        .map(|number| fixture.serving(&format!("f{number}"), ["uffd", "file"][number % 2]))
        .collect();
    std::thread::scope(|scope| {
        for vmm in &vmms {
            scope.spawn(|| {
                reads_right(vmm);
                writes(vmm);
                reads_right(vmm);
            });
        }
    });
    let template = fixture.template();
    assert_eq!(
        (&template["forks"], &template["memory"]["measured"]),
        (&json!(8), &json!(8))
    );
    // Half of them share what they have not written.
    let (unshared, pss) = (
        bytes(&template["memory"]["unshared"]),
        bytes(&template["memory"]["pss"]),
    );
    assert!(unshared - pss >= SIZE * 2, "{template:#}");
    for vmm in &vmms {
        reads_right(vmm);
    }
    fixture.file.check_untouched().unwrap();
}

/// A VMM that maps a file that is no template of the daemon's is none of its business.
#[test]
fn who_maps_a_copy_of_the_template_is_not_taken_for_its_fork() {
    let fixture = fixture();
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().canonicalize().unwrap().join("mem");
    let copy = folder.path().join("copy");
    std::fs::copy(fixture.file.path(), &copy).unwrap();
    fixture.create(&json!({ "id": "f", "path": place }));
    let stranger = SimVmm::spawn().unwrap();
    let model = fixture.file.model().clone();
    stranger
        .run(MapFile {
            path: copy,
            template: model,
        })
        .unwrap();
    assert_eq!(fixture.fork("f")["state"], "waiting");
    fixture.ask("DELETE", "/v1/forks/f?kill=true").ok(204);
    reads_right(&stranger);
}
