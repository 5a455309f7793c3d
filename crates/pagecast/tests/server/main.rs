//! The page server against the real kernel: VMMs are processes of their own that check every byte they are given.
//!
//! Each module shows one thing that a page server has to get right; the numbers of bugs that others shipped are named where
//! a test shows that one of them is not here.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "what a test needs and does not get fails it")]

mod bad_input;
mod close;
mod complete;
mod embedded;
mod ends;
mod failing_reads;
mod fault_around;
mod file_systems;
mod fixture;
mod hugepages;
mod kept;
mod kills;
mod lease;
mod prefault;
mod probes;
mod removal;
mod scripted_source;
mod serving;
mod slow_template;
mod template_changes;
mod transparent;
mod vmm_process;
mod withdraw;
