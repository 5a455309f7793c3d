//! Each target, run on its corpus.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::{Path, PathBuf};

use pagecast_fuzz::TARGETS;

/// The most bytes of all that is committed.
const MOST_BYTES: usize = 200 * 1024;

fn corpus(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let entries = folder.read_dir().expect("each target has a corpus");
    entries.map(|entry| entry.expect("it can be listed").path()).collect()
}

#[test]
fn each_target_holds_on_its_corpus() {
    for target in TARGETS {
        let inputs = corpus(target.name);
        assert!(!inputs.is_empty(), "{} has no corpus", target.name);
        for input in inputs {
            // Captured, and so printed where the next line panics.
            println!("{}", input.display());
            (target.run)(&fs::read(&input).expect("it can be read"));
        }
    }
}

#[test]
fn the_corpus_is_small_and_has_no_folder_without_a_target() {
    let inputs: Vec<_> = TARGETS.iter().flat_map(|target| corpus(target.name)).collect();
    let bytes: usize = inputs
        .iter()
        .map(|input| fs::read(input).expect("it can be read").len())
        .sum();
    assert!(
        bytes <= MOST_BYTES,
        "{bytes} bytes: `cargo xtask fuzz --minimize` makes it smaller"
    );
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for entry in folder.read_dir().expect("it is there") {
        let name = entry.expect("it can be listed").file_name();
        assert!(TARGETS.iter().any(|target| name == target.name), "{name:?}");
    }
}
