//! The guest's serial console: a line out, a line back.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{ChildStdin, ChildStdout};
use std::str::FromStr;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

/// The result of `write`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Pages of 4 KiB.
    pub pages: u64,
    /// Time in the guest, in ticks of its time stamp counter.
    pub ticks: u64,
    /// Time on the host.
    pub elapsed: Duration,
}

/// The result of `verify`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Pages of 4 KiB.
    pub pages: u64,
    /// Words of 8 bytes with wrong content.
    pub mismatches: u64,
    /// The first of them: its guest-physical address, its expected and its actual content.
    pub first_bad: Option<String>,
    /// Time in the guest, in ticks of its time stamp counter.
    pub ticks: u64,
    /// Time on the host.
    pub elapsed: Duration,
}

/// The result of `touch`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Touched {
    /// Pages of 4 KiB.
    pub pages: u64,
    /// Time in the guest, in ticks of its time stamp counter.
    pub ticks: u64,
    /// Time on the host.
    pub elapsed: Duration,
}

/// The result of `inflate`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inflated {
    /// Pages of 4 KiB.
    pub pages: u64,
    /// Time in the guest, in ticks of its time stamp counter.
    pub ticks: u64,
    /// Time on the host.
    pub elapsed: Duration,
}

#[derive(Debug)]
pub(crate) struct Console {
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Console {
    pub(crate) fn new(input: ChildStdin, output: ChildStdout) -> Self {
        let (sender, lines) = mpsc::channel();
        // The thread ends with Firecracker, whose end of the pipe then closes.
        thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                let Ok(line) = line else { break };
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self { input, lines }
    }

    pub(crate) fn send(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}").with_context(|| format!("failed to send {line:?} to the guest"))
    }

    pub(crate) fn reply(&mut self, command: &str, timeout: Duration) -> Result<Reply> {
        match self.lines.recv_timeout(timeout) {
            Ok(line) => Reply::parse(&line, command),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the guest did not answer {command:?} in {timeout:?}")
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("Firecracker ended before the guest answered {command:?}")
            }
        }
    }
}

/// `ok COMMAND name=value …`
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    line: String,
    fields: BTreeMap<String, String>,
}

impl Reply {
    fn parse(line: &str, command: &str) -> Result<Self> {
        let mut words = line.split_ascii_whitespace();
        ensure!(
            words.next() == Some("ok") && words.next() == command.split_ascii_whitespace().next(),
            "the guest answered {command:?} with {line:?}"
        );
        let fields = words
            .map(|word| word.split_once('='))
            .map(|pair| pair.map(|(name, value)| (name.to_owned(), value.to_owned())))
            .collect::<Option<_>>()
            .with_context(|| format!("the guest answered {command:?} with {line:?}"))?;
        Ok(Self {
            line: line.to_owned(),
            fields,
        })
    }

    pub(crate) fn field<T: FromStr>(&self, name: &str) -> Result<T> {
        self.fields
            .get(name)
            .and_then(|value| value.parse().ok())
            .with_context(|| format!("the guest's answer {:?} has no usable field {name:?}", self.line))
    }

    pub(crate) fn into_written(self, elapsed: Duration) -> Result<Written> {
        Ok(Written {
            pages: self.field("pages")?,
            ticks: self.field("ticks")?,
            elapsed,
        })
    }

    pub(crate) fn into_verified(self, elapsed: Duration) -> Result<Verified> {
        let mismatches = self.field("mismatches")?;
        let first_bad = if mismatches == 0 {
            None
        } else {
            let [address, expected, found]: [String; 3] =
                [self.field("first_bad")?, self.field("expected")?, self.field("found")?];
            Some(format!("{address}: expected {expected}, found {found}"))
        };
        Ok(Verified {
            pages: self.field("pages")?,
            mismatches,
            first_bad,
            ticks: self.field("ticks")?,
            elapsed,
        })
    }

    pub(crate) fn into_touched(self, elapsed: Duration) -> Result<Touched> {
        Ok(Touched {
            pages: self.field("pages")?,
            ticks: self.field("ticks")?,
            elapsed,
        })
    }

    pub(crate) fn into_inflated(self, elapsed: Duration) -> Result<Inflated> {
        Ok(Inflated {
            pages: self.field("pages")?,
            ticks: self.field("ticks")?,
            elapsed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bad_word_is_told_in_full() -> Result<()> {
        let line = "ok verify pages=2 mismatches=512 first_bad=0x201000 expected=0x1f found=0x0 ticks=77";
        let verified = Reply::parse(line, "verify 2 1")?.into_verified(Duration::ZERO)?;
        let expected = Verified {
            pages: 2,
            mismatches: 512,
            first_bad: Some("0x201000: expected 0x1f, found 0x0".to_owned()),
            ticks: 77,
            elapsed: Duration::ZERO,
        };
        assert_eq!(verified, expected);
        Ok(())
    }

    #[test]
    fn a_clean_memory_has_no_first_bad_word() -> Result<()> {
        let line = "ok verify pages=2 mismatches=0 first_bad=- expected=- found=- ticks=77";
        assert_eq!(
            Reply::parse(line, "verify 2 1")?
                .into_verified(Duration::ZERO)?
                .first_bad,
            None
        );
        Ok(())
    }

    #[test]
    fn an_answer_to_something_else_is_refused() {
        for line in [
            "err unknown command",
            "ok touch pages=1 ticks=2",
            "ok",
            "",
            "ok verify pages",
        ] {
            assert!(Reply::parse(line, "verify 2 1").is_err(), "{line:?}");
        }
    }

    #[test]
    fn a_missing_number_is_an_error() -> Result<()> {
        let reply = Reply::parse("ok write pages=many", "write 2 1 1 1")?;
        assert!(reply.into_written(Duration::ZERO).is_err());
        Ok(())
    }
}
