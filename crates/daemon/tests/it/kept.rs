//! What is kept of a template is of this file as it is: not of one that was overwritten since, and still of one that the
//! daemon itself has linked or protected.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pagecast::template::MemFile;
use pagecast_testkit::skip::{Need, skip};
use serde_json::{Value, json};

use crate::fixture::{Fixture, SIZE, eventually, is_dead, reads_right};

/// Overwrites a file in place, as `cp -p` does.
fn overwrite(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&vec![0xEE; usize::try_from(SIZE).unwrap()], 0)
        .unwrap();
    file.set_modified(modified).unwrap();
}

/// Changes what is kept of template `t` in the run dir.
fn edit_kept(run_dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = run_dir.join("templates/t.json");
    let mut kept = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut kept);
    std::fs::write(&path, kept.to_string()).unwrap();
}

#[track_caller]
fn lives_on(fixture: &Fixture, vmm: &pagecast_testkit::sim_vmm::SimVmm) {
    assert_eq!(fixture.template()["state"], "ready");
    assert_eq!(fixture.fork("f")["state"], "serving");
    assert!(!is_dead(vmm));
    reads_right(vmm);
}

#[test]
fn a_template_overwritten_with_its_mtime_set_back_while_no_daemon_runs_costs_its_forks() {
    let mut fixture = Fixture::new();
    fixture.add_template();
    let vmm = fixture.serving("f", "file");
    let path = fixture.file.path().to_owned();
    fixture.restart_with(|_| overwrite(&path));
    let template = fixture.template();
    assert_eq!(template["state"], "changed", "{template:#}");
    assert!(template["changed"].as_str().unwrap().contains("ctime"), "{template:#}");
    eventually("its VMM is killed", || is_dead(&vmm));
}

#[test]
fn links_and_protection_of_our_own_cost_no_fork_and_no_new_search() {
    let mut fixture = Fixture::new();
    fixture.age();
    let add = json!({ "mem_path": fixture.file.path(), "protect": "readonly" });
    if fixture.send("PUT", "/v1/templates/t", &add).ok(201)["guard"] != "lease" {
        return skip(Need::Leases);
    }
    let vmm = fixture.serving("f", "file");
    let place = fixture.folder.path().canonicalize().unwrap().join("place");
    fixture.create(&json!({ "id": "placed", "path": place }));
    let path = fixture.file.path().to_owned();
    // They are found under the lease, and the link of the fork comes before or after that.
    eventually("the zeros are kept", || MemFile::zeros_path_for(&path).exists());
    fixture.restart_with(|_| MemFile::open(&path).unwrap().kept_zeros().unwrap());
    lives_on(&fixture, &vmm);
    fixture.ask("DELETE", "/v1/forks/placed").ok(204);
    assert!(!place.exists());
    fixture.restart_with(|_| MemFile::open(&path).unwrap().kept_zeros().unwrap());
    lives_on(&fixture, &vmm);

    vmm.kill().unwrap();
    fixture.await_fork("f", "exited");
    fixture.ask("DELETE", "/v1/forks/f").ok(204);
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    // The link is gone and the mode is back.
    MemFile::open(&path).unwrap().kept_zeros().unwrap();
}

#[test]
fn a_daemon_killed_between_a_link_or_a_change_of_mode_and_keeping_that_costs_no_fork() {
    let mut fixture = Fixture::new();
    fixture.add_template();
    let vmm = fixture.serving("f", "file");
    let run_dir = fixture.run_dir().to_owned();
    // Before the link.
    fixture.restart_with(|_| {
        edit_kept(&run_dir, |kept| {
            let links = kept["identity"]["links"].as_u64().unwrap();
            kept["identity"]["links"] = json!(links - 1);
            kept["identity"]["changed_ns"] = json!(1);
        });
    });
    lives_on(&fixture, &vmm);
    // Before the mode was changed.
    fixture.restart_with(|_| {
        edit_kept(&run_dir, |kept| {
            kept["identity"]["mode"] = json!(0o100_666);
            kept["identity"]["changed_ns"] = json!(1);
        });
    });
    lives_on(&fixture, &vmm);
    // By a daemon that kept no ctime.
    fixture.restart_with(|_| {
        edit_kept(&run_dir, |kept| {
            let identity = kept["identity"].as_object_mut().unwrap();
            let old = ["device", "inode", "size", "modified_s", "modified_ns"];
            identity.retain(|name, _| old.contains(&&**name));
        });
    });
    lives_on(&fixture, &vmm);
    // And now it is kept.
    fixture.restart_with(|_| {
        edit_kept(&run_dir, |kept| {
            assert!(kept["identity"]["changed_s"].is_i64(), "{kept:#}");
            kept["identity"]["changed_ns"] = json!(1);
        });
    });
    assert_eq!(fixture.template()["state"], "changed", "nothing explains it");
    eventually("its VMM is killed", || is_dead(&vmm));
}

#[test]
fn two_templates_of_one_file_do_not_take_each_others_links_for_writes() {
    let mut fixture = Fixture::new();
    fixture.add_template();
    let vmm = fixture.serving("f", "file");
    let add = json!({ "mem_path": fixture.file.path() });
    fixture.send("PUT", "/v1/templates/other", &add).ok(201);
    fixture.ask("DELETE", "/v1/templates/other").ok(204);
    fixture.restart();
    lives_on(&fixture, &vmm);
}
