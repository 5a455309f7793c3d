//! Fuzz targets: functions of bytes from peers, clients, files and the kernel.
//!
//! | target | bytes |
//! | --- | --- |
//! | `handshake` | the message of a VMM, in pieces |
//! | `working_set`, `zeros` | the files beside a mem-file |
//! | `proc` | files of `/proc` |
//! | `api_body` | the body of a request |
//! | `saved_state` | the files of the run dir |
//!
//! A target panics if an invariant does not hold. `cargo xtask fuzz` searches for such bytes with libFuzzer. The test
//! of this crate runs each target on its corpus, `corpus/TARGET`.
#![forbid(unsafe_code)]
#![cfg(target_os = "linux")]

mod api_body;
mod handshake;
mod kept;
mod proc_files;
mod saved_state;

/// A function of bytes, with a name.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The name of the target and of its corpus.
    pub name: &'static str,
    /// Panics if an invariant does not hold for these bytes.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: [Target; 6] = [
    Target {
        name: "handshake",
        run: handshake::run,
    },
    Target {
        name: "working_set",
        run: kept::working_set,
    },
    Target {
        name: "zeros",
        run: kept::zeros,
    },
    Target {
        name: "proc",
        run: proc_files::run,
    },
    Target {
        name: "api_body",
        run: api_body::run,
    },
    Target {
        name: "saved_state",
        run: saved_state::run,
    },
];
