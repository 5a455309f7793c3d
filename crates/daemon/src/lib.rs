//! The long-lived service: control API, registry of templates and forks, metrics, configuration.
#![forbid(unsafe_code)]

#[cfg(target_os = "linux")]
pub mod inode;
#[cfg(target_os = "linux")]
pub mod placement;
#[cfg(target_os = "linux")]
pub mod process_memory;
#[cfg(target_os = "linux")]
pub mod protection;

#[cfg(test)]
#[cfg(target_os = "linux")]
mod mapper;
#[cfg(target_os = "linux")]
pub mod vmm_process;
