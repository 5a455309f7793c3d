//! Starts Firecrackers, jailed or not, and calls their API.
//!
//! [`Vmm`] is one Firecracker: a [`Process`] in a folder of its own or in a [`Jail`], and its API. All of it is async,
//! on the runtime in which the [`Vmm`] was started.
#![forbid(unsafe_code)]
#![cfg(target_os = "linux")]

mod cgroup;
mod jail;
mod process;
mod tail;
mod vmm;

pub use cgroup::{CgroupVersion, remove_cgroups};
pub use jail::{Jail, Jailer, kill_jailed};
pub use process::Process;
pub use vmm::{API_SOCKET, Console, Pipes, Vmm, VmmError};
