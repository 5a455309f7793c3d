//! The kernel's setting for transparent huge pages, for a test.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};

use anyhow::{Context as _, Result};

use crate::skip::skip;

const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// The machine's setting for transparent huge pages, for the time of a test. Dropping it restores the old one.
///
/// A machine has one at a time: others wait, in other processes too.
#[derive(Debug)]
pub struct TransparentHugePages {
    // Holds the lock.
    setting: File,
    before: String,
}

impl TransparentHugePages {
    /// Sets `always`, `madvise` or `never`, after waiting for others. `None`, and a reported skip, if that is not
    /// permitted.
    ///
    /// # Errors
    ///
    /// The file of the setting cannot be read or has unexpected content.
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
        // An error cannot be reported here, and the lock must be released.
        let _ = self.write(&self.before);
    }
}
