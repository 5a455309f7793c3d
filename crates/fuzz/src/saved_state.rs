//! The files of the run dir.

use pagecast_daemon::fuzzing::{saved_fork, saved_template};

/// An accepted template or fork is written in a way that is read as the same.
pub(crate) fn run(bytes: &[u8]) {
    for read in [saved_template, saved_fork] {
        if let Ok(written) = read(bytes) {
            assert_eq!(read(&written).expect("what was written is read"), written);
        }
    }
}
