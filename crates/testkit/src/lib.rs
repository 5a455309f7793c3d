//! Tools to test pagecast, or any other page server.
//!
//! | module | holds |
//! | --- | --- |
//! | [`sim_vmm`] | a process that does what Firecracker does, and checks every byte it is given |
//! | [`peer`] | peers that do what Firecracker never does |
//! | [`template_file`] | mem-files that know what is in them |
//! | [`pattern`] | bytes that tell where they belong |
//! | [`process`] | what a process holds |
//! | [`hugepages`] | hugepages for the time of a test |
#![deny(unsafe_code)]

pub mod hugepages;
pub mod pattern;
pub mod peer;
pub mod process;
pub mod sim_vmm;
pub mod template_file;

mod memory;

pub use memory::PageSize;
