//! libFuzzer on the target that `PAGECAST_FUZZ_TARGET` names.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use pagecast_fuzz::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("PAGECAST_FUZZ_TARGET").expect("PAGECAST_FUZZ_TARGET names a target");
    let target = TARGETS.iter().find(|target| target.name == name);
    *target.expect("PAGECAST_FUZZ_TARGET names a target")
});

fuzz_target!(|bytes: &[u8]| (TARGET.run)(bytes));
