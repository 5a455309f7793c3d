//! Processes that map files with strange names: `/proc/PID/maps` shows what any user has named a file.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use pagecast_testkit::skip::{Need, skip};
use rustix::thread::CapabilitySet;
use serde_json::json;

use crate::fixture::{Fixture, eventually};

/// Maps each of its arguments privately, as a VMM does, says so, and lives until it is killed.
const MAPS: &str = "
import mmap, signal, sys
maps = []
for path in sys.argv[1:]:
    with open(path, 'rb') as file:
        maps.append(mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ))
print(flush=True)
signal.pause()
";

/// A process that maps files, killed and reaped when this is dropped.
struct Maps(Child);

impl Maps {
    fn of(paths: &[&Path]) -> Self {
        let child = Command::new("python3")
            .args(["-c", MAPS])
            .args(paths)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the tests of the daemon need python3");
        let mut maps = Self(child);
        let mut line = String::new();
        BufReader::new(maps.0.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "\n", "the script has failed");
        maps
    }

    fn has_exited(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }
}

impl Drop for Maps {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A file that is deleted with the test.
struct Named(PathBuf);

impl Named {
    fn create(path: PathBuf) -> std::io::Result<Self> {
        std::fs::write(&path, [7; 4096])?;
        Ok(Self(path))
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A fork of `t` with `file` whose VMM has a path of its own, and is to be found by that.
fn place(fixture: &Fixture, id: &str, name: &str) -> PathBuf {
    let place = fixture.folder.path().canonicalize().unwrap().join(name);
    fixture.create(&json!({ "id": id, "path": place }));
    place
}

/// The VMM of a fork is found, and the template cannot be removed while it lives.
#[track_caller]
fn is_found(fixture: &Fixture, id: &str, vmm: &Maps) {
    let fork = fixture.await_fork(id, "serving");
    assert_eq!(fork["pid"], vmm.0.id(), "{fork:#}");
    fixture.ask("DELETE", "/v1/templates/t").error(409, "template_in_use");
}

#[test]
fn a_vmm_that_maps_a_file_whose_name_is_not_utf8_is_found_and_keeps_its_template() {
    let fixture = Fixture::new();
    fixture.add_template();
    let name = OsString::from_vec(b"not utf-8 \xff\xfe".to_vec());
    let other = Named::create(fixture.folder.path().join(name)).unwrap();
    let place = place(&fixture, "f", "place");
    let vmm = Maps::of(&[&other.0, &place]);
    is_found(&fixture, "f", &vmm);
}

#[test]
fn a_vmm_is_found_by_a_place_with_any_name() {
    let fixture = Fixture::new();
    fixture.add_template();
    for (id, name) in [
        ("newline", "a\nb"),
        ("space", " a  "),
        ("escape", r"a\012b"),
        ("deleted", "a (deleted)"),
    ] {
        let place = place(&fixture, id, name);
        let vmm = Maps::of(&[&place]);
        is_found(&fixture, id, &vmm);
    }
}

/// A file of this name in the root folder looks in `maps` like a segment of System V's shared memory, but for the number that
/// follows there.
#[test]
fn a_file_named_like_shared_memory_of_system_v_breaks_no_call_and_no_guard() {
    if !rustix::process::geteuid().is_root() {
        skip((
            Need::Root,
            "to make a file in the root folder, and to have one of another user",
        ));
        return;
    }
    let Ok(_strange) = Named::create("/SYSV".into()) else {
        skip("the root folder cannot be written");
        return;
    };
    // Without a lease, so that the template is watched.
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::LEASE);
    rustix::thread::set_capabilities(None, sets).unwrap();
    let fixture = Fixture::new();
    std::os::unix::fs::chown(fixture.file.path(), Some(54_321), None).unwrap();
    assert_eq!(fixture.add_template()["guard"], "watch");
    let _anybody = Maps::of(&[Path::new("/SYSV")]);

    fixture.create(&json!({ "id": "waiting", "backend": "file" }));
    let place = place(&fixture, "f", "place");
    let mut vmm = Maps::of(&[&place]);
    fixture.ask("GET", "/v1/forks").ok(200);
    is_found(&fixture, "f", &vmm);

    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(fixture.file.path())
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"X", 0).unwrap();
    drop(file);
    eventually("the VMM of a template that was written is killed", || vmm.has_exited());
    fixture.await_fork("f", "failed");
    fixture.await_fork("waiting", "failed");
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
}
