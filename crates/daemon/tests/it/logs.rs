//! The events of log lines: those that are documented are those that there are.

use std::collections::BTreeSet;
use std::path::Path;

/// All that the source code of a folder calls an event.
fn add_events(folder: &Path, events: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            add_events(&path, events);
        } else {
            let text = std::fs::read_to_string(&path).unwrap();
            let named = text.split("event = \"").skip(1);
            events.extend(named.map(|rest| rest.split('"').next().unwrap().to_owned()));
        }
    }
}

#[test]
fn each_event_that_is_logged_is_documented_and_no_other() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut logged = BTreeSet::new();
    add_events(&here.join("src"), &mut logged);
    assert!(logged.len() > 20, "{logged:?}");
    let page = std::fs::read_to_string(here.join("../../docs/logs.md")).unwrap();
    let (_, events) = page.split_once("\n## Events\n").unwrap();
    let rows = events.lines().filter_map(|line| line.strip_prefix("| `"));
    let documented: BTreeSet<String> = rows.map(|row| row.split('`').next().unwrap().to_owned()).collect();
    assert_eq!(documented, logged);
}
