//! Whether this machine can run Firecracker.

use std::fs::OpenOptions;
use std::io::ErrorKind;

use anyhow::{Context as _, Result};

const DEVICE: &str = "/dev/kvm";

/// The result of [`kvm`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// Firecracker can run here.
    Usable,
    /// Firecracker cannot run here, for this reason.
    Missing(String),
}

impl Kvm {
    /// For tests: reports the skip and returns `true` if Firecracker cannot run here.
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

/// Checks whether this machine can run Firecracker with the tiny guest.
///
/// # Errors
///
/// There is a KVM device that cannot be opened: a machine that could run Firecracker must not skip.
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
