//! The measurements of `pagecast-bench`: each number beside its floor and its rivals, in one run, on this machine.
//!
//! | module | holds |
//! | --- | --- |
//! | [`section`] | the sections |
//! | [`report`] | the results |
//! | [`spread`], [`goal`] | statistics: medians, their intervals, and goals |
//! | [`plots`] | pictures of the results |
//! | [`fleet`], [`daemon`], [`sim_vmm`] | many forks at once and their daemon, also for other tools |
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
pub mod rival;
pub mod samples;
pub mod section;
pub mod sim_vmm;
pub mod spread;

mod sections;

pub use sections::{Bench, run};
