//! Files of `/proc`.

use pagecast::proc_files::{cgroups, has_flag, mappings, mounts};
use pagecast_uffd::fuzzing::features_of_fdinfo;

/// Each line that is not empty is parsed, or is an error of its own.
pub(crate) fn run(bytes: &[u8]) {
    let lines = bytes
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .count();
    for mapping in mappings(bytes).flatten() {
        let written = [
            format!("{:x}-{:x} r--p {:x} ", mapping.start, mapping.end, mapping.offset).as_bytes(),
            format!("{:x}:{:x} {}  ", mapping.device.0, mapping.device.1, mapping.inode).as_bytes(),
            mapping.path,
        ]
        .concat();
        let again: Vec<_> = mappings(&written).collect();
        assert_eq!(again, [Ok(mapping)]);
    }
    assert_eq!(mappings(bytes).count(), lines);
    assert_eq!(mounts(bytes).count(), lines);
    for cgroup in cgroups(bytes).flatten() {
        assert!(!cgroup.controllers.contains(&b':'));
    }
    assert_eq!(cgroups(bytes).count(), lines);
    if has_flag(bytes, "um") {
        assert!(bytes.windows(2).any(|word| word == b"um"));
    }
    if let Ok(text) = str::from_utf8(bytes)
        && features_of_fdinfo(text).is_some()
    {
        assert!(text.lines().any(|line| line.starts_with("API:")));
    }
}
