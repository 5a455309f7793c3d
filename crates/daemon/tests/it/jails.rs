//! Memory files in a jail whose owner changes the owner of all that is in it.

use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use pagecast_testkit::sim_vmm::SimVmm;
use pagecast_testkit::skip::{Need, skip};
use rustix::thread::CapabilitySet;
use serde_json::json;

use crate::fixture::{Fixture, reads_right};

const TENANT: u32 = 54_321;

fn owner(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().uid()
}

/// As `chown -R` of the jail does.
#[test]
fn giving_a_jail_to_its_user_does_not_give_away_the_template() {
    let needed = Need::Capabilities(CapabilitySet::SYS_ADMIN | CapabilitySet::CHOWN);
    if !needed.is_there() {
        skip(needed);
        return;
    }
    let fixture = Fixture::new();
    fixture.add_template();
    let before = owner(fixture.file.path());
    let place = fixture.folder.path().canonicalize().unwrap().join("mem");
    let created = fixture.create(&json!({ "id": "f", "path": place }));
    let refused = chown(&place, Some(TENANT), Some(TENANT)).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(owner(fixture.file.path()), before);
    assert_eq!(fixture.template()["warnings"], json!([]));

    let vmm = SimVmm::spawn().unwrap();
    fixture.restore(&vmm, &created);
    reads_right(&vmm);
    assert_eq!(fixture.await_fork("f", "serving")["pid"], vmm.pid());
    fixture.ask("DELETE", "/v1/forks/f?kill=true").ok(204);
    assert!(!place.exists());
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    assert_eq!(std::fs::metadata(fixture.file.path()).unwrap().nlink(), 1);
}

#[test]
fn a_template_whose_owner_or_mode_was_changed_says_so() {
    let needed = Need::Capabilities(CapabilitySet::CHOWN | CapabilitySet::SYS_ADMIN);
    if !needed.is_there() {
        skip((needed, "the latter to give it up"));
        return;
    }
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::SYS_ADMIN);
    rustix::thread::set_capabilities(None, sets).unwrap();
    // Its threads can do no more than the one that starts them.
    let mut fixture = Fixture::new();
    fixture.add_template();
    let before = owner(fixture.file.path());
    let place = fixture.folder.path().canonicalize().unwrap().join("mem");
    fixture.create(&json!({ "id": "f", "path": place }));
    assert_eq!(fixture.template()["warnings"], json!([]));
    chown(&place, Some(TENANT), None).unwrap();
    assert_eq!(owner(fixture.file.path()), TENANT);
    for _ in 0..2 {
        let template = fixture.template();
        let warning = template["warnings"][0].as_str().unwrap_or_default();
        assert!(warning.contains(&format!("and is {TENANT}")), "{template:#}");
        assert_eq!(template["state"], "ready");
        fixture.restart();
    }
    chown(fixture.file.path(), Some(before), None).unwrap();
    assert_eq!(fixture.template()["warnings"], json!([]));
}
