//! Settings, from a file and from flags. Flags win.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use pagecast_client::Backend;
use pagecast_client::template::Protection;
use serde::{Deserialize, Serialize};

/// The default of [`Settings::run_dir`].
pub const RUN_DIR: &str = "/run/pagecast";

/// The default of [`Settings::completion_rate`], in MiB per second.
const COMPLETION_RATE: u32 = 1024;

/// The default of [`Settings::busy_poll`].
pub const BUSY_POLL: Duration = Duration::from_micros(100);

/// The default of [`Settings::fault_around`].
pub const FAULT_AROUND: u8 = 32;

/// The longest time for [`Settings::busy_poll`]: with more, a worker would hardly ever sleep.
pub const LONGEST_BUSY_POLL: Duration = Duration::from_millis(10);

/// Settings that were given; `None` for those that were not. The file uses the names of the flags, with `_` for `-`.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Folder of the control socket, the forks' sockets and all state [default: /run/pagecast]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,

    /// Number of threads that answer page faults; forks are spread evenly over them [default: two a processor, at most 16]
    #[arg(long, value_name = "N")]
    pub workers: Option<u16>,

    /// Time that a VMM has to connect to its fork [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    #[serde(default, with = "humantime_serde")]
    pub connect_deadline: Option<Duration>,

    /// Time that a VMM has from connecting to the end of its handshake [default: 5s]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    #[serde(default, with = "humantime_serde")]
    pub handshake_deadline: Option<Duration>,

    /// Most forks that may wait or live at once; further requests get 429 [default: 4096]
    #[arg(long, value_name = "N")]
    pub max_forks: Option<u32>,

    /// Most ended forks to keep until they are deleted; the oldest are forgotten first [default: 1000]
    #[arg(long, value_name = "N")]
    pub ended_forks: Option<u32>,

    /// User ID that may use the control socket, besides root and the daemon's own; can be given more than once
    #[arg(long = "allowed-uid", value_name = "UID")]
    #[serde(rename = "allowed_uids")]
    pub allowed_uids: Option<Vec<u32>>,

    /// Folder in which requests may place sockets and memory files, besides the run dir; can be given more than once
    /// [default: any folder]
    #[arg(long = "allowed-dir", value_name = "DIR")]
    #[serde(rename = "allowed_dirs")]
    pub allowed_dirs: Option<Vec<PathBuf>>,

    /// Backend of forks whose request names none: auto, uffd or file [default: auto]
    #[arg(long, value_name = "BACKEND", value_parser = parse_backend)]
    pub backend: Option<Backend>,

    /// Protection of templates whose request names none: none, readonly or immutable [default: none]
    #[arg(long, value_name = "HOW", value_parser = parse_protection)]
    pub protect: Option<Protection>,

    /// Time without a page fault after which a fork with `uffd` is completed, so that it no longer needs the daemon
    /// [default: never]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    #[serde(default, with = "humantime_serde")]
    pub complete_idle_after: Option<Duration>,

    /// Most MiB per second that a background completion installs; 0 for no limit [default: 1024]
    #[arg(long, value_name = "MIB")]
    pub completion_rate: Option<u32>,

    /// Longest time that a thread polls for the next page fault after an answer, before it sleeps; at most 10ms, 0s to
    /// never poll. Answers faster if cores are free. A thread polls only while that finds faults, while no other thread
    /// wants its core, and for a bounded part of the time [default: 100us]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    #[serde(default, with = "humantime_serde")]
    pub busy_poll: Option<Duration>,

    /// Most pages of 4 KiB that one page fault installs, from 1 to 64. With 1, only pages that have faulted are installed.
    /// Otherwise, pages that a guest is about to read in order come with them [default: 32]
    #[arg(long, value_name = "PAGES")]
    pub fault_around: Option<u8>,

    /// TCP address on which to serve the metrics, too, to every client that can reach it
    #[arg(long, value_name = "ADDR:PORT")]
    pub metrics_addr: Option<SocketAddr>,

    /// Format of log lines [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// The error of the read.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a valid configuration.
    #[error("{} is not a valid configuration", path.display())]
    Parse {
        /// Path of the file.
        path: PathBuf,
        /// The error, with line and key.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value is out of range.
    #[error("{setting} cannot be {value}: {reason}")]
    Value {
        /// Name of the setting.
        setting: &'static str,
        /// The value.
        value: String,
        /// The reason.
        reason: &'static str,
    },
}

impl Settings {
    /// Reads the settings in the file at `path`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`]: the file cannot be read, or has an unknown setting.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// Returns these settings, with missing ones taken from `other`.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            run_dir: self.run_dir.or(other.run_dir),
            workers: self.workers.or(other.workers),
            connect_deadline: self.connect_deadline.or(other.connect_deadline),
            handshake_deadline: self.handshake_deadline.or(other.handshake_deadline),
            max_forks: self.max_forks.or(other.max_forks),
            ended_forks: self.ended_forks.or(other.ended_forks),
            allowed_uids: self.allowed_uids.or(other.allowed_uids),
            allowed_dirs: self.allowed_dirs.or(other.allowed_dirs),
            backend: self.backend.or(other.backend),
            protect: self.protect.or(other.protect),
            complete_idle_after: self.complete_idle_after.or(other.complete_idle_after),
            completion_rate: self.completion_rate.or(other.completion_rate),
            busy_poll: self.busy_poll.or(other.busy_poll),
            fault_around: self.fault_around.or(other.fault_around),
            metrics_addr: self.metrics_addr.or(other.metrics_addr),
            log_format: self.log_format.or(other.log_format),
        }
    }

    /// Applies the defaults.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Value`].
    pub fn resolve(self) -> Result<Config, ConfigError> {
        let workers = match self.workers {
            Some(workers @ (0 | 257..)) => {
                return Err(ConfigError::Value {
                    setting: "workers",
                    value: workers.to_string(),
                    reason: "the range is 1 to 256",
                });
            }
            workers => workers.map(usize::from),
        };
        let busy_poll = self.busy_poll.unwrap_or(BUSY_POLL);
        if busy_poll > LONGEST_BUSY_POLL {
            return Err(ConfigError::Value {
                setting: "busy_poll",
                value: humantime::format_duration(busy_poll).to_string(),
                reason: "the maximum is 10ms, as threads would hardly ever sleep",
            });
        }
        let fault_around = self.fault_around.unwrap_or(FAULT_AROUND);
        if !(1..=64).contains(&fault_around) {
            return Err(ConfigError::Value {
                setting: "fault_around",
                value: fault_around.to_string(),
                reason: "the range is 1 to 64",
            });
        }
        let run_dir = self.run_dir.unwrap_or_else(|| RUN_DIR.into());
        let run_dir = std::path::absolute(&run_dir).map_err(|_| ConfigError::Value {
            setting: "run_dir",
            value: run_dir.display().to_string(),
            reason: "it is not a path",
        })?;
        Ok(Config {
            run_dir,
            workers,
            connect_deadline: self.connect_deadline.unwrap_or(Duration::from_mins(1)),
            handshake_deadline: self.handshake_deadline.unwrap_or(Duration::from_secs(5)),
            max_forks: self.max_forks.map_or(4096, |most| most as usize),
            ended_forks: self.ended_forks.map_or(1000, |most| most as usize),
            allowed_uids: self.allowed_uids.unwrap_or_default(),
            allowed_dirs: self.allowed_dirs.unwrap_or_default(),
            backend: self.backend.unwrap_or_default(),
            protect: self.protect.unwrap_or_default(),
            complete_idle_after: self.complete_idle_after,
            completion_rate: NonZeroU64::new(u64::from(self.completion_rate.unwrap_or(COMPLETION_RATE)) << 20),
            busy_poll,
            fault_around: fault_around.into(),
            metrics_addr: self.metrics_addr,
            log_format: self.log_format.unwrap_or_default(),
        })
    }
}

/// The configuration of a daemon.
#[derive(Clone, Debug)]
pub struct Config {
    /// Folder of the control socket, the forks' sockets and all state; absolute.
    pub run_dir: PathBuf,
    /// Number of threads that answer page faults; `None` for the library's default.
    pub workers: Option<usize>,
    /// Time that a VMM has to connect to its fork.
    pub connect_deadline: Duration,
    /// Time that a VMM has from connecting to the end of its handshake.
    pub handshake_deadline: Duration,
    /// Most forks that may wait or live at once.
    pub max_forks: usize,
    /// Most ended forks that are kept.
    pub ended_forks: usize,
    /// Users who may use the control socket, besides the daemon's own and root.
    pub allowed_uids: Vec<u32>,
    /// Folders in which requests may place sockets and memory files, besides the run dir; empty for any folder.
    pub allowed_dirs: Vec<PathBuf>,
    /// The backend of forks whose request names none.
    pub backend: Backend,
    /// The protection of templates whose request names none.
    pub protect: Protection,
    /// Time without a page fault after which a fork with `uffd` is completed; `None` for never.
    pub complete_idle_after: Option<Duration>,
    /// Most bytes per second that a background completion installs; `None` for no limit.
    pub completion_rate: Option<NonZeroU64>,
    /// Longest time that a worker polls for the next fault before it sleeps.
    pub busy_poll: Duration,
    /// Most pages that one fault installs.
    pub fault_around: usize,
    /// TCP address of the metrics, besides the control socket.
    pub metrics_addr: Option<SocketAddr>,
    /// The format of log lines.
    pub log_format: LogFormat,
}

fn parse_backend(text: &str) -> Result<Backend, &'static str> {
    parse(text).ok_or("it is one of auto, uffd and file")
}

fn parse_protection(text: &str) -> Result<Protection, &'static str> {
    parse(text).ok_or("it is one of none, readonly and immutable")
}

/// Parses the JSON name, so that the names are listed once.
fn parse<T: serde::de::DeserializeOwned>(text: &str) -> Option<T> {
    serde_json::from_value(serde_json::Value::String(text.to_owned())).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Settings, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        Settings::read(&path)
    }

    #[test]
    fn a_file_can_set_everything() {
        let settings = read(
            r#"
            run_dir = "/run/other"
            workers = 3
            connect_deadline = "10s"
            handshake_deadline = "500ms"
            max_forks = 20
            ended_forks = 5
            allowed_uids = [1000]
            allowed_dirs = ["/srv/jailer"]
            backend = "file"
            protect = "readonly"
            complete_idle_after = "10m"
            completion_rate = 100
            busy_poll = "50us"
            fault_around = 8
            metrics_addr = "127.0.0.1:9100"
            log_format = "json"
            "#,
        );
        let config = settings.unwrap().resolve().unwrap();
        assert_eq!(config.run_dir, Path::new("/run/other"));
        assert_eq!(config.handshake_deadline, Duration::from_millis(500));
        assert_eq!(config.backend, Backend::File);
        assert_eq!(config.protect, Protection::Readonly);
        assert_eq!(config.log_format, LogFormat::Json);
        assert_eq!(config.complete_idle_after, Some(Duration::from_mins(10)));
        assert_eq!(config.completion_rate, NonZeroU64::new(100 << 20));
        assert_eq!(config.busy_poll, Duration::from_micros(50));
        assert_eq!(config.fault_around, 8);
        assert_eq!(config.allowed_uids, [1000]);
    }

    #[test]
    fn a_completion_can_be_as_fast_as_can_be() {
        let resolved = |text| read(text).unwrap().resolve().unwrap().completion_rate;
        assert_eq!(resolved(""), NonZeroU64::new(1 << 30));
        assert_eq!(resolved("completion_rate = 0"), None);
    }

    #[test]
    fn what_is_not_known_is_refused_and_named() {
        let Err(ConfigError::Parse { source, .. }) = read("wrokers = 3") else {
            panic!("it was taken");
        };
        assert!(source.to_string().contains("wrokers"), "{source}");
        assert!(read("backend = \"tape\"").is_err());
        assert!(read("connect_deadline = 3").is_err());
        assert!(read("workers = 0").unwrap().resolve().is_err());
        assert!(read("busy_poll = \"11ms\"").unwrap().resolve().is_err());
        for pages in [0, 65] {
            assert!(read(&format!("fault_around = {pages}")).unwrap().resolve().is_err());
        }
    }

    #[test]
    fn flags_win_over_the_file() {
        let flags = Settings {
            workers: Some(1),
            ..Settings::default()
        };
        let file = Settings {
            workers: Some(2),
            max_forks: Some(3),
            ..Settings::default()
        };
        let config = flags.or(file).resolve().unwrap();
        assert_eq!((config.workers, config.max_forks), (Some(1), 3));
    }
}
