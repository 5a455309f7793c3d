//! 2 MiB pages, reserved for a test.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Seek as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::skip::{Need, skip};

const POOL: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
const OVERCOMMIT: &str = "/proc/sys/vm/nr_overcommit_hugepages";
const SURPLUS: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/surplus_hugepages";

/// A reservation of 2 MiB pages for a test. Dropping it gives the pages back.
///
/// A machine has one at a time: others wait, in other processes too. So no test takes pages that another one needs, and
/// the pool has its old size afterwards.
#[derive(Debug)]
pub struct HugePages {
    // Holds the lock.
    pool: File,
    before: u64,
    /// Number of pages that the kernel was allowed to add before.
    overcommit_before: Option<u64>,
}

impl HugePages {
    /// Adds this number of pages of 2 MiB to the system's pool, after waiting for others. `None`, and a reported skip,
    /// if that is not permitted, or there is no memory for it.
    ///
    /// # Errors
    ///
    /// The files of the pool cannot be read or have unexpected content.
    pub fn reserve(pages: u64) -> Result<Option<Self>> {
        let pool = match OpenOptions::new().read(true).write(true).open(POOL) {
            Ok(pool) => pool,
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
                ) =>
            {
                skip((Need::Hugepages(pages), format_args!("{POOL}: {error}")));
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("failed to open {POOL}")),
        };
        pool.lock().with_context(|| format!("failed to lock {POOL}"))?;
        let before = size(&pool)?;
        let reserved = Self {
            pool,
            before,
            overcommit_before: None,
        };
        resize(&reserved.pool, before + pages)?;
        // The kernel reserves the pages that it can find, without an error.
        let added = size(&reserved.pool)?.saturating_sub(before);
        if added < pages {
            skip((Need::Hugepages(pages), format_args!("the system found {added}")));
            return Ok(None);
        }
        wait_until_free(pages)?;
        Ok(Some(reserved))
    }
}

impl HugePages {
    /// Allows the kernel to add this number of pages to the pool while they are needed, until this is dropped.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn allow_more(&mut self, pages: u64) -> Result<()> {
        let before = read_number(OVERCOMMIT)?;
        self.overcommit_before.get_or_insert(before);
        std::fs::write(OVERCOMMIT, pages.to_string()).with_context(|| format!("failed to set {OVERCOMMIT} to {pages}"))
    }
}

/// Waits for the pages of processes that have just died: the kernel returns them some time after their end.
fn wait_until_free(pages: u64) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let free = read_number(FREE)?;
        if free >= pages {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "of the pages of 2 MiB that were added, {free} are free and {pages} are needed: another process uses the rest"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Returns the configured size of the pool. Surplus pages are not counted, since they go with their last user: counted,
/// they would stay for good when the old size is restored.
fn size(mut pool: &File) -> Result<u64> {
    let mut text = String::new();
    pool.rewind()
        .and_then(|()| pool.read_to_string(&mut text))
        .with_context(|| format!("failed to read {POOL}"))?;
    let all: u64 = text.trim().parse().with_context(|| format!("{POOL} holds {text:?}"))?;
    Ok(all.saturating_sub(read_number(SURPLUS)?))
}

fn read_number(path: &str) -> Result<u64> {
    let text = std::fs::read_to_string(path).with_context(|| format!("failed to read {path}"))?;
    text.trim().parse().with_context(|| format!("{path} holds {text:?}"))
}

fn resize(mut pool: &File, pages: u64) -> Result<()> {
    pool.rewind()
        .and_then(|()| pool.write_all(pages.to_string().as_bytes()))
        .with_context(|| format!("failed to set {POOL} to {pages}"))
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // An error cannot be reported here, and the lock must be released.
        if let Some(before) = self.overcommit_before {
            let _ = std::fs::write(OVERCOMMIT, before.to_string());
        }
        let _ = resize(&self.pool, self.before);
    }
}
