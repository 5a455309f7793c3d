//! Hugepages for the time of a test.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, ensure};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Hugepages of 2 MiB that the host set aside in addition to those it had. Given back when this is dropped.
#[derive(Debug)]
pub struct HugePages {
    count: u64,
}

impl HugePages {
    /// Has `count` more hugepages set aside. Other test processes may do so at the same time.
    ///
    /// # Errors
    ///
    /// This is not root, the kernel has no hugepages, or there is not enough memory in one piece: a reason to skip.
    pub fn reserve(count: u64) -> Result<Self> {
        let _turn = take_turn()?;
        let before = pool_size()?;
        set_pool_size(before + count)?;
        let after = pool_size()?;
        if after < before + count {
            set_pool_size(before)?;
        }
        ensure!(
            after >= before + count,
            "only {} of {count} hugepages could be set aside",
            after.saturating_sub(before)
        );
        Ok(Self { count })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let shrink = || {
            let _turn = take_turn()?;
            set_pool_size(pool_size()?.saturating_sub(self.count))
        };
        if let Err(error) = shrink() {
            eprintln!("failed to give {} hugepages back: {error:#}", self.count);
        }
    }
}

/// Reading the size and setting another one takes a turn among all test processes. Over when the file is closed.
fn take_turn() -> Result<File> {
    let path = std::env::temp_dir().join("pagecast-hugepages.lock");
    let file = File::options().create(true).append(true).open(&path);
    let file = file.with_context(|| format!("failed to open {}", path.display()))?;
    file.lock()?;
    Ok(file)
}

fn pool_size() -> Result<u64> {
    let text = std::fs::read_to_string(POOL).with_context(|| format!("failed to read {POOL}"))?;
    Ok(text.trim().parse()?)
}

fn set_pool_size(size: u64) -> Result<()> {
    std::fs::write(Path::new(POOL), size.to_string()).with_context(|| format!("failed to set {POOL} to {size}"))
}
