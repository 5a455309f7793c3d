//! What `pagecast-bench` measures: each number beside its floor and its rivals, in one run, on this machine.
//!
//! | module | holds |
//! | --- | --- |
//! | [`section`] | what can be measured |
//! | [`report`] | what came of it |
//! | [`spread`], [`goal`] | statistics: medians, how sure they are, and what they have to be |
//! | [`plots`] | pictures of it |
//! | [`fleet`], [`daemon`], [`sim_vmm`] | many forks at once and the daemon that they are of, for other tools as well |
#![forbid(unsafe_code)]

pub mod daemon;
pub mod fleet;
pub mod goal;
pub mod interrupt;
pub mod machine;
pub mod measure;
pub mod plots;
pub mod progress;
pub mod report;
pub mod samples;
pub mod section;
pub mod sim_vmm;
pub mod spread;

mod sections;

pub use sections::{Bench, run};
