//! A fork as its owner sees it: name, state, numbers.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::failure::{FailReason, Refusal};
use super::latency::Latency;
use crate::template::{PrefaultTally, Recording};

/// The name of a fork: `[a-z0-9][a-z0-9._-]{0,63}`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForkId(Arc<str>);

/// What is not the name of a fork.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{id:?} is no fork id: up to 64 of a-z, 0-9, '.', '_' and '-', the first a letter or digit")]
pub struct InvalidForkId {
    id: String,
}

impl ForkId {
    /// The name, as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ForkId {
    type Err = InvalidForkId;

    fn from_str(id: &str) -> Result<Self, InvalidForkId> {
        let plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let valid = id.len() <= 64
            && id.as_bytes().first().is_some_and(plain)
            && id.bytes().all(|byte| plain(&byte) || b"._-".contains(&byte));
        if valid {
            Ok(Self(id.into()))
        } else {
            Err(InvalidForkId { id: id.to_owned() })
        }
    }
}

impl Serialize for ForkId {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for ForkId {
    /// From text, held to the same rule as [`FromStr`].
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let id = String::deserialize(from)?;
        id.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for ForkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ForkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Where a fork is in its life. The last three are ends: nothing of it is held any more but its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ForkState {
    /// Its VMM has not connected, or not finished its handshake.
    Waiting,
    /// Its faults are answered.
    Serving,
    /// Everything is installed and unregistered: it no longer needs the server.
    Complete,
    /// Its VMM has exited.
    Exited,
    /// It could not be served: its VMM was refused, or killed rather than left to hang or to go wrong.
    Failed,
}

impl ForkState {
    /// Whether nothing will change any more.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Complete | Self::Exited | Self::Failed)
    }
}

impl fmt::Display for ForkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting => "waiting",
            Self::Serving => "serving",
            Self::Complete => "complete",
            Self::Exited => "exited",
            Self::Failed => "failed",
        })
    }
}

/// How a fork is to be registered.
#[derive(Clone, Debug)]
pub struct ForkOptions {
    pub(super) socket_path: PathBuf,
    pub(super) user: Option<u32>,
    pub(super) group: Option<u32>,
    pub(super) plan: Plan,
}

/// What a fork is given ahead of its faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Prefault {
    /// Nothing: each page is installed when it is asked for.
    None,
    /// The [working set](crate::template::Template::set_working_set) of its template, where there is one and it does well.
    #[default]
    WorkingSet,
    /// The same, then all the rest. Unlike a completion, this keeps serving: what is given back is still noticed.
    All,
}

/// What is planned for a fork.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Plan {
    pub(super) prefault: Prefault,
    pub(super) record: bool,
}

impl ForkOptions {
    /// A fork whose VMM connects to `socket_path`, run by the user who runs the server.
    ///
    /// A unix socket's path is at most 107 bytes long.
    pub fn new(socket_path: impl Into<PathBuf>) -> Self {
        Self {
            socket_path: socket_path.into(),
            user: None,
            group: None,
            plan: Plan::default(),
        }
    }

    /// The VMM runs as this user: it will own the socket, and nobody else is let in.
    #[must_use]
    pub fn user(mut self, uid: u32) -> Self {
        self.user = Some(uid);
        self
    }

    /// What it is given ahead of its faults; by default its working set.
    #[must_use]
    pub fn prefault(mut self, prefault: Prefault) -> Self {
        self.plan.prefault = prefault;
        self
    }

    /// Its first faults are recorded, in a window that ends by itself ([`ForkEvent::Recorded`]). It is given nothing ahead
    /// then, whatever [`prefault`](Self::prefault) says: what is there does not fault.
    #[must_use]
    pub fn record(mut self) -> Self {
        self.plan.record = true;
        self
    }

    /// The socket will belong to this group.
    #[must_use]
    pub fn group(mut self, gid: u32) -> Self {
        self.group = Some(gid);
        self
    }
}

/// What is known of a fork.
#[derive(Clone, Debug, Serialize)]
pub struct ForkStatus {
    /// Its name.
    pub id: ForkId,
    /// Where it is in its life.
    pub state: ForkState,
    /// The process id of its VMM, once connected.
    pub pid: Option<i32>,
    /// The size of its memory in bytes; 0 before the handshake.
    pub memory_bytes: u64,
    /// Why it failed, or cannot be completed.
    #[serde(rename = "error")]
    pub reason: Option<Arc<FailReason>>,
    /// What happened to its pages.
    #[serde(flatten)]
    pub stats: ForkStats,
}

/// What happened to the pages of a fork.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ForkStats {
    /// Counts of pages.
    pub faults: FaultCounts,
    /// From reading a fault to its page being in place.
    pub fault_latency_us: Latency,
    /// Bytes of the template copied into the fork.
    pub installed_bytes: u64,
    /// Bytes of zeros that were given back to the kernel, which fills them in by itself.
    pub given_back_bytes: u64,
    /// How well its prefault has foreseen its first faults.
    pub prefault: PrefaultCounts,
}

/// How well a prefault of the working set has foreseen the first faults of a fork. Counts of faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PrefaultCounts {
    /// Of pages that were to be installed ahead, and whose turn had not come.
    pub late: u64,
    /// Of pages that are not in the working set.
    pub missed: u64,
    /// Of pages that were held out, to see whether they would be asked for.
    pub held_out_used: u64,
}

/// Counts of faults and pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FaultCounts {
    /// Page faults that were answered.
    pub demand: u64,
    /// Those of them that were answered with zeros.
    pub zero: u64,
    /// Pages the guest gave back.
    pub removed: u64,
    /// Pages installed that nobody waited for.
    pub prefaulted: u64,
    /// Installs that the kernel asked to retry.
    pub retried: u64,
    /// Faults that waited for the template to be read from disk.
    pub slow: u64,
}

/// A turn in the life of a fork, for whoever observes the server.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ForkEvent {
    /// Its VMM has connected and its faults are answered from now on.
    Serving {
        /// Which fork.
        id: ForkId,
        /// Its VMM.
        pid: i32,
        /// The size of its memory in bytes.
        memory_bytes: u64,
        /// How many regions that is.
        regions: usize,
    },
    /// It has ended; also where its VMM was refused and it never began.
    Ended(ForkStatus),
    /// A connection was refused that had sent no file descriptor, or was of the wrong user: a probe, a health check, the
    /// VMM of another fork. No fork has ended. Reported a few times in ten seconds for each socket at most.
    Refused {
        /// The fork that the socket is for, which waits on; `None` if it is for any number of forks.
        id: Option<ForkId>,
        /// The process that connected, if it is known.
        pid: Option<i32>,
        /// Why it was refused.
        refusal: Arc<Refusal>,
        /// How many others were refused at this socket since the last that was reported.
        unreported: u64,
    },
    /// The window in which its first faults were recorded is over.
    Recorded {
        /// Which fork.
        id: ForkId,
        /// What it touched.
        recording: Arc<Recording>,
    },
    /// The window in which its prefault was watched is over. The [score](crate::template::Template::prefault_score) of its
    /// template knows.
    Prefaulted {
        /// Which fork.
        id: ForkId,
        /// How well its faults were foreseen.
        tally: PrefaultTally,
    },
    /// It could not be completed, and is served as before.
    NotCompleted {
        /// Which fork.
        id: ForkId,
        /// Why.
        reason: Arc<FailReason>,
    },
}

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For a VMM to connect to a registered fork.
    pub connect: Duration,
    /// From connecting to the end of the handshake message.
    pub handshake: Duration,
    /// For the template to be read, or for memory to become free, before a fault is given up and its VMM killed.
    pub fault: Duration,
}

impl Default for Deadlines {
    /// 60 s to connect, 5 s for the handshake, 60 s for a fault.
    fn default() -> Self {
        Self {
            connect: Duration::from_mins(1),
            handshake: Duration::from_secs(5),
            fault: Duration::from_mins(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fork_ids_are_what_the_design_says() {
        for good in ["a", "0", "fork-1", "a.b_c-d", &"x".repeat(64)] {
            assert_eq!(good.parse::<ForkId>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", ".a", "A", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(bad.parse::<ForkId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_fork_id_in_json_is_held_to_the_same_rule_and_says_so() {
        let id: ForkId = serde_json::from_str(r#""fork-1""#).unwrap();
        assert_eq!(id.as_str(), "fork-1");
        assert_eq!(serde_json::to_string(&id).unwrap(), r#""fork-1""#);
        let refused = serde_json::from_str::<ForkId>(r#""A/b""#).unwrap_err().to_string();
        let expected = "A/b".parse::<ForkId>().unwrap_err().to_string();
        assert!(refused.starts_with(&expected), "{refused}");
        assert!(serde_json::from_str::<ForkId>("7").is_err());
    }
}
