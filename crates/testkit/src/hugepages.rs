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

/// A reservation of 2 MiB pages for tests that need them. Dropping it gives the pages back.
///
/// There is one at a time on a machine: others wait, in other processes too. So no test takes the pages that another
/// one counts on, and the pool has its old size afterwards.
#[derive(Debug)]
pub struct HugePages {
    // Holds the lock.
    pool: File,
    before: u64,
    /// How many pages the kernel was allowed to add before that was changed.
    overcommit_before: Option<u64>,
}

impl HugePages {
    /// Adds this many pages of 2 MiB to the system's pool, waiting for others to be done first. Where that is not
    /// permitted, or there is no memory for it, it prints why the test is skipped and answers `None`.
    ///
    /// # Errors
    ///
    /// If the pool does not behave like one.
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
        // The kernel reserves what it can find, and says nothing.
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
    /// Allows the kernel to add this many pages to the pool while somebody needs them, until this is dropped.
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

/// Waits for pages of processes that have just died: the kernel gives them back some time after their end, and until then
/// they count among those that were added.
fn wait_until_free(pages: u64) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let free = read_number(FREE)?;
        if free >= pages {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "of the pages of 2 MiB that were added, {free} are free and {pages} are needed: who uses the others?"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The pages that the pool is to have. Not those beyond that, which go when whoever still holds them does: taken for a part
/// of it, they would stay for good when the old size is given back.
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
        // There is nobody to tell, and the lock must go in any case.
        if let Some(before) = self.overcommit_before {
            let _ = std::fs::write(OVERCOMMIT, before.to_string());
        }
        let _ = resize(&self.pool, self.before);
    }
}
