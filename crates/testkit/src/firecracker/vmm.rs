//! Firecracker for blocking callers.

use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use pagecast_client::fork::{self, BackendType};
use pagecast_client::http::Method;
use pagecast_firecracker::{Console, Pipes, VmmError};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{Jail, MemBackend, binary, jailer};

/// The longest request writes the snapshot of a large guest to a slow disk.
const PATIENCE: Duration = Duration::from_mins(2);

/// A Firecracker in a temporary folder, or in a jail. Dropping it kills it, waits for its end, and removes the folder
/// or the jail.
///
/// Every error has the end of Firecracker's log.
#[derive(Debug)]
pub(crate) struct Vmm {
    firecracker: pagecast_firecracker::Vmm,
    place: Place,
    runtime: Runtime,
}

/// The folder of Firecracker's files.
#[derive(Debug)]
enum Place {
    Folder(#[expect(dead_code, reason = "removed when it is dropped")] TempDir),
    Jail(Jail),
}

impl Vmm {
    pub(crate) fn start() -> Result<(Self, Pipes)> {
        let folder = tempfile::Builder::new()
            .prefix("pagecast-vm-")
            .tempdir()
            .context("failed to create a folder for Firecracker")?;
        let command = Command::new(binary()?);
        let runtime = runtime()?;
        let entered = runtime.enter();
        let vmm = pagecast_firecracker::Vmm::start(command, "test", folder.path(), Console::Pipes, PATIENCE)?;
        drop(entered);
        Self::started(vmm, Place::Folder(folder), runtime)
    }

    pub(crate) fn start_in(jail: Jail) -> Result<(Self, Pipes)> {
        let command = Command::new(jailer()?);
        let runtime = runtime()?;
        let start = pagecast_firecracker::Vmm::start_in(jail.place(), command, Console::Pipes, PATIENCE);
        let vmm = runtime.block_on(start)?;
        Self::started(vmm, Place::Jail(jail), runtime)
    }

    /// Waits until the API accepts connections.
    fn started(mut firecracker: pagecast_firecracker::Vmm, place: Place, runtime: Runtime) -> Result<(Self, Pipes)> {
        let pipes = firecracker
            .take_pipes()
            .context("Firecracker was started without pipes")?;
        let vmm = Self {
            firecracker,
            place,
            runtime,
        };
        vmm.explained(vmm.runtime.block_on(vmm.firecracker.listens()))?;
        Ok((vmm, pipes))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.firecracker.pid().unsigned_abs()
    }

    pub(crate) fn jail(&self) -> Option<&Jail> {
        match &self.place {
            Place::Jail(jail) => Some(jail),
            Place::Folder(_) => None,
        }
    }

    /// Loads a snapshot by the paths of the host. Returns the time it took.
    pub(crate) fn load(&self, vmstate: &Path, backend: &MemBackend, resume: bool) -> Result<Duration> {
        let (backend_type, path) = match backend {
            MemBackend::File(path) => (BackendType::File, path),
            MemBackend::Uffd(path) => (BackendType::Uffd, path),
        };
        let (vmstate, backend_path) = match self.jail().map(Jail::place) {
            Some(jail) => (jail.copy_vmstate(vmstate)?, jail.inside(path)),
            None => (vmstate.to_owned(), path.clone()),
        };
        let backend = fork::MemBackend {
            backend_type,
            backend_path,
        };
        self.explained(self.runtime.block_on(self.firecracker.load(&vmstate, &backend, resume)))
    }

    /// Sends a request to the API. Returns the time until the answer.
    pub(crate) fn call(&self, method: Method, path: &str, body: &Value) -> Result<Duration> {
        self.explained(self.runtime.block_on(self.firecracker.call(method, path, body)))
            .with_context(|| format!("{path} {body} failed"))
    }

    pub(crate) fn kill(&self) -> Result<ExitStatus> {
        Ok(self.runtime.block_on(self.firecracker.kill())?)
    }

    /// Waits until Firecracker has ended by itself.
    pub(crate) fn wait(&self, timeout: Duration) -> Result<ExitStatus> {
        let ended = async { tokio::time::timeout(timeout, self.firecracker.ended()).await };
        match self.runtime.block_on(ended) {
            Ok(VmmError::Ended(status)) => Ok(status),
            Ok(error) => Err(error.into()),
            Err(_) => Err(self.explain(&anyhow!("Firecracker still runs after {timeout:?}"))),
        }
    }

    fn explained<T>(&self, outcome: Result<T, VmmError>) -> Result<T> {
        outcome.map_err(|error| self.explain(&error.into()))
    }

    /// The error, with the end of Firecracker's log.
    pub(crate) fn explain(&self, error: &anyhow::Error) -> anyhow::Error {
        anyhow!("{error:#}{}", self.firecracker.last_words())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It fails only if the process has already ended.
        let _ = self.kill();
    }
}

fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("failed to start a runtime")
}
