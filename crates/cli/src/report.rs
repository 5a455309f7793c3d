//! The lines that a serving command writes to stderr. No call blocks: see [`stderr`].

use std::fmt::{self, Display};
use std::path::Path;

use indicatif::BinaryBytes;
use pagecast::server::{CloseError, FailReason, ForkEvent, ForkState, ForkStatus, Refusal, chain};
use pagecast_client::fork::{Faults, ForkError, ForkPrefault, Latency, Prefault};
use pagecast_command::stderr;
use pagecast_daemon::conversion;
use serde::{Serialize, Serializer};

/// The format of the lines.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Format {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Writes lines to stderr.
pub(crate) struct Reporter {
    format: Format,
}

/// A line.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Line<'a> {
    Listening {
        socket: &'a Path,
        mem_file: &'a Path,
        size_bytes: u64,
    },
    Serving {
        id: &'a str,
        pid: i32,
        memory_bytes: u64,
        regions: usize,
    },
    Ended(#[serde(serialize_with = "ended")] &'a ForkStatus),
    /// A connection that became no fork.
    Refused {
        pid: Option<i32>,
        #[serde(serialize_with = "refusal")]
        error: &'a Refusal,
        unreported: u64,
    },
    NotCompleted {
        id: &'a str,
        #[serde(serialize_with = "fail_reason")]
        error: &'a FailReason,
    },
    /// A file beside the template that is not used.
    KeptNotUsed {
        what: &'static str,
        error: &'a str,
    },
    /// Facts about the template that cannot be kept beside it.
    NotKept {
        what: &'static str,
        error: &'a str,
    },
    Closing {
        forks: usize,
    },
    Staying {
        #[serde(rename = "error", serialize_with = "as_text")]
        why: &'a CloseError,
    },
    Killing {
        forks: usize,
    },
    Vacating {
        forks: usize,
    },
    Vacated,
    NotVacated,
    Closed,
    LinesDropped {
        lines: u64,
    },
    Panicked {
        error: &'a str,
    },
}

/// The end of a fork: the fields of [`pagecast_client::Fork`] that exist without a daemon.
#[derive(Serialize)]
struct Ended<'a> {
    id: &'a str,
    state: pagecast_client::ForkState,
    pid: Option<i32>,
    memory_bytes: Option<u64>,
    error: Option<ForkError>,
    faults: Faults,
    fault_latency_us: Latency,
    installed_bytes: u64,
    given_back_bytes: u64,
    prefault: ForkPrefault,
}

fn ended<S: Serializer>(status: &ForkStatus, to: S) -> Result<S::Ok, S::Error> {
    let counts = status.stats;
    let ended = Ended {
        id: status.id.as_str(),
        state: conversion::state(status.state),
        pid: status.pid,
        memory_bytes: conversion::memory_bytes(status),
        error: status.reason.as_deref().map(conversion::fail_reason),
        faults: conversion::faults(counts.faults),
        fault_latency_us: conversion::latency(counts.fault_latency_us),
        installed_bytes: counts.installed_bytes,
        given_back_bytes: counts.given_back_bytes,
        // `handle` creates its forks with the page server's default.
        prefault: conversion::prefault(Prefault::WorkingSet, counts.prefault),
    };
    ended.serialize(to)
}

fn refusal<S: Serializer>(refusal: &Refusal, to: S) -> Result<S::Ok, S::Error> {
    conversion::refusal(refusal).serialize(to)
}

fn fail_reason<S: Serializer>(reason: &FailReason, to: S) -> Result<S::Ok, S::Error> {
    conversion::fail_reason(reason).serialize(to)
}

fn as_text<S: Serializer>(error: &CloseError, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&chain(error))
}

impl Reporter {
    /// Starts to write lines, panics included.
    pub(crate) fn start(format: Format) -> Self {
        stderr::start(move |lines| format.text(&Line::LinesDropped { lines }).into_bytes());
        std::panic::set_hook(Box::new(move |panic| {
            let error = &stderr::describe_panic(panic);
            stderr::write_line(format.text(&Line::Panicked { error }).as_bytes());
        }));
        Self { format }
    }

    /// Reports the event of a fork.
    pub(crate) fn fork(&self, event: &ForkEvent) {
        match event {
            ForkEvent::Serving {
                id,
                pid,
                memory_bytes,
                regions,
            } => self.report(&Line::Serving {
                id: id.as_str(),
                pid: *pid,
                memory_bytes: *memory_bytes,
                regions: *regions,
            }),
            ForkEvent::Ended(status) => self.report(&Line::Ended(status)),
            ForkEvent::Refused {
                pid,
                refusal,
                unreported,
                ..
            } => self.report(&Line::Refused {
                pid: *pid,
                error: refusal,
                unreported: *unreported,
            }),
            ForkEvent::NotCompleted { id, reason } => self.report(&Line::NotCompleted {
                id: id.as_str(),
                error: reason,
            }),
            // Events that this version does not know are not reported.
            _ => {}
        }
    }

    /// Queues the line for standard error. Never waits for its reader.
    pub(crate) fn report(&self, line: &Line<'_>) {
        stderr::write_line(self.format.text(line).as_bytes());
    }
}

impl Format {
    /// The line, with its line feed.
    fn text(self, line: &Line<'_>) -> String {
        match self {
            Self::Human => format!("pagecast: {line}\n"),
            Self::Json => match serde_json::to_string(line) {
                Ok(json) => json + "\n",
                Err(error) => format!("pagecast: cannot write a line of JSON: {error}\n"),
            },
        }
    }
}

impl Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listening {
                socket,
                mem_file,
                size_bytes,
            } => write!(
                f,
                "listening at {}, template {} ({})",
                socket.display(),
                mem_file.display(),
                BinaryBytes(*size_bytes)
            ),
            Self::Serving {
                id,
                pid,
                memory_bytes,
                regions,
            } => {
                let plural = if *regions == 1 { "" } else { "s" };
                let memory = BinaryBytes(*memory_bytes);
                write!(f, "{id}: serving pid {pid}: {memory} in {regions} region{plural}")
            }
            Self::Ended(status) => write_ended(f, status),
            Self::Refused { pid, error, unreported } => {
                write!(f, "refused a connection{}: {}", of_pid(*pid), chain(*error))?;
                match unreported {
                    0 => Ok(()),
                    _ => write!(f, " ({unreported} more since the last such line)"),
                }
            }
            Self::NotCompleted { id, error } => {
                write!(f, "{id}: cannot be completed, still served: {}", chain(*error))
            }
            Self::KeptNotUsed { what, error } => write!(f, "the {what} file beside the template is not used: {error}"),
            Self::NotKept { what, error } => write!(f, "the {what} cannot be kept beside the template: {error}"),
            Self::Closing { forks } => {
                write!(
                    f,
                    "closing: forks to complete: {forks}; a second signal kills their VMMs"
                )
            }
            Self::Staying { why } => write!(f, "cannot close, still serving: {}", chain(*why)),
            Self::Killing { forks } => write!(f, "second signal: VMMs to kill: {forks}"),
            Self::Vacating { forks } => {
                write!(
                    f,
                    "another process opens the template for writing: forks to complete first: {forks}"
                )
            }
            Self::Vacated => f.write_str(
                "the template is opened for writing and no fork needs it: restart once the template is complete",
            ),
            Self::NotVacated => f.write_str("some VMMs do not die, or the template cannot be read: still serving"),
            Self::Closed => f.write_str("closed"),
            Self::LinesDropped { lines } => {
                write!(f, "lines dropped because stderr was not read in time: {lines}")
            }
            Self::Panicked { error } => f.write_str(error),
        }
    }
}

fn of_pid(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" pid {pid}")).unwrap_or_default()
}

fn write_ended(f: &mut fmt::Formatter<'_>, status: &ForkStatus) -> fmt::Result {
    write!(f, "{}: ", status.id)?;
    match (status.state, &status.reason) {
        (ForkState::Failed, Some(reason)) => match &**reason {
            FailReason::Refused(refusal) => {
                // A refused VMM never had a page: there are no numbers.
                return write!(f, "refused{}: {}", of_pid(status.pid), chain(refusal));
            }
            reason => write!(f, "failed: {}", chain(reason))?,
        },
        (state, _) => write!(f, "{state}")?,
    }
    let (faults, latency) = (&status.stats.faults, &status.stats.fault_latency_us);
    write!(
        f,
        ": {} faults (p50 {} us, p99 {} us, max {} us), {} copied, {} zero pages, {} removed, {} prefaulted, {} came with others",
        faults.demand,
        latency.p50,
        latency.p99,
        latency.max,
        BinaryBytes(status.stats.installed_bytes),
        faults.zero,
        faults.removed,
        faults.prefaulted,
        faults.around
    )
}
