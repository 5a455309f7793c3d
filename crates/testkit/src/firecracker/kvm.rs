//! Whether this machine can run Firecracker at all.

use std::fs::OpenOptions;
use std::io::ErrorKind;

use anyhow::{Context as _, Result};

const DEVICE: &str = "/dev/kvm";

/// What [`kvm`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// Firecracker runs here.
    Usable,
    /// It cannot run here, and why.
    Missing(String),
}

impl Kvm {
    /// For tests, which print why they are skipped and return if this is true.
    pub fn skips(&self) -> bool {
        match self {
            Self::Usable => false,
            Self::Missing(why) => {
                crate::skip::skip((crate::skip::Need::Kvm, why));
                true
            }
        }
    }
}

/// Whether this machine can run Firecracker with the tiny guest.
///
/// # Errors
///
/// If there is a KVM device that cannot be opened: a machine that could run Firecracker must not pass by skipping.
pub fn kvm() -> Result<Kvm> {
    if !cfg!(target_arch = "x86_64") {
        return Ok(Kvm::Missing("the tiny guest needs an x86-64 host".to_owned()));
    }
    match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(_) => Ok(Kvm::Usable),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Kvm::Missing(format!("there is no {DEVICE}"))),
        Err(error) => Err(error).with_context(|| {
            format!("{DEVICE} is there but cannot be opened: give this user access to it (usually the group kvm)")
        }),
    }
}
