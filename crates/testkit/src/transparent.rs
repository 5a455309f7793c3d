//! How the kernel makes transparent huge pages, set for a test.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};

use anyhow::{Context as _, Result};

use crate::skip::skip;

const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// A setting of this machine for transparent huge pages, for the time of a test. Dropping it brings the old one back.
///
/// There is one at a time on a machine: others wait, in other processes too.
#[derive(Debug)]
pub struct TransparentHugePages {
    // Holds the lock.
    setting: File,
    before: String,
}

impl TransparentHugePages {
    /// Sets `always`, `madvise` or `never`, waiting for others to be done first. Where that is not permitted, it prints why the
    /// test is skipped and answers `None`.
    ///
    /// # Errors
    ///
    /// If the setting does not behave like one.
    pub fn set(value: &str) -> Result<Option<Self>> {
        let setting = match OpenOptions::new().read(true).write(true).open(SETTING) {
            Ok(setting) => setting,
            Err(error) => {
                skip(&format!("cannot set transparent huge pages: {SETTING}: {error}"));
                return Ok(None);
            }
        };
        setting.lock().with_context(|| format!("failed to lock {SETTING}"))?;
        let mut text = String::new();
        (&setting)
            .read_to_string(&mut text)
            .with_context(|| format!("failed to read {SETTING}"))?;
        let before = text
            .split(['[', ']'])
            .nth(1)
            .with_context(|| format!("{SETTING} holds {text:?}"))?;
        let set = Self {
            before: before.to_owned(),
            setting,
        };
        set.write(value)?;
        Ok(Some(set))
    }

    fn write(&self, value: &str) -> Result<()> {
        let mut setting = &self.setting;
        setting
            .rewind()
            .and_then(|()| setting.write_all(value.as_bytes()))
            .with_context(|| format!("failed to set {SETTING} to {value}"))
    }
}

impl Drop for TransparentHugePages {
    fn drop(&mut self) {
        // There is nobody to tell, and the lock must go in any case.
        let _ = self.write(&self.before);
    }
}
