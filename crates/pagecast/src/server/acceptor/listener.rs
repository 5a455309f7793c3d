//! A socket that VMMs connect to, and the forks that it is for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::server::fork::{ForkId, ForkOptions};
use crate::server::registry::{ForkRecord, Registry};
use crate::server::socket_file::SocketFile;
use crate::template::Template;

/// The most connections to one socket that may be in their handshake at once. Others wait in the queue of the socket.
/// Other sockets are not affected.
const MOST_HANDSHAKES: usize = 128;

/// The most refused connections to one socket that are reported in each [`REPORT_PERIOD`]. The others are only counted,
/// so that a flood of connections is no flood of log lines.
const REPORTS_PER_PERIOD: u32 = 8;
const REPORT_PERIOD: Duration = Duration::from_secs(10);

/// A socket that VMMs connect to.
pub(in crate::server) struct Listener {
    pub(super) socket: SocketFile,
    /// The user whose VMMs may connect.
    pub(super) user: u32,
    serves: Serves,
    /// Connections that are in their handshake.
    handshakes: usize,
    reports: Reports,
}

/// The forks that a socket is for.
pub(in crate::server) enum Serves {
    /// One fork, whose VMM must connect by the deadline.
    One { record: Arc<ForkRecord>, deadline: Instant },
    /// Any number of forks of a template, named with the prefix and a number.
    Any {
        template: Template,
        options: ForkOptions,
        prefix: String,
        next: u64,
    },
}

impl Listener {
    pub(in crate::server) fn new(socket: SocketFile, user: u32, serves: Serves) -> Self {
        Self {
            socket,
            user,
            serves,
            handshakes: 0,
            reports: Reports::default(),
        }
    }

    /// The fork that this socket is for; `None` if it is for any number.
    pub(super) fn one(&self) -> Option<&Arc<ForkRecord>> {
        match &self.serves {
            Serves::One { record, .. } => Some(record),
            Serves::Any { .. } => None,
        }
    }

    /// The time by which the VMM of its one fork must have connected.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.serves {
            Serves::One { deadline, .. } => Some(deadline),
            Serves::Any { .. } => None,
        }
    }

    pub(super) fn postpone_deadline(&mut self, to: Instant) {
        if let Serves::One { deadline, .. } = &mut self.serves {
            *deadline = to;
        }
    }

    /// Returns `true` if another connection may begin its handshake.
    pub(super) fn has_room(&self) -> bool {
        self.handshakes < MOST_HANDSHAKES
    }

    pub(super) fn begin_handshake(&mut self) {
        self.handshakes += 1;
    }

    pub(super) fn end_handshake(&mut self) {
        self.handshakes = self.handshakes.saturating_sub(1);
    }

    /// The fork of a VMM that has connected here: the one fork, or a new one with the next free name. Never `None`:
    /// `Server::listen` checked that the prefix leaves room for any number.
    pub(super) fn fork(&mut self, registry: &Registry) -> Option<Arc<ForkRecord>> {
        match &mut self.serves {
            Serves::One { record, .. } => Some(Arc::clone(record)),
            Serves::Any {
                template,
                options,
                prefix,
                next,
            } => loop {
                *next += 1;
                let id: ForkId = format!("{prefix}-{next}").parse().ok()?;
                if let Ok(record) = registry.insert(id, template, options, true) {
                    return Some(record);
                }
            },
        }
    }

    /// Returns `Some` if one more refused connection is to be reported, with the number not reported since the last
    /// one.
    pub(super) fn report(&mut self, now: Instant) -> Option<u64> {
        self.reports.one_more(now)
    }
}

/// Bounds how many refused connections are reported.
#[derive(Default)]
struct Reports {
    period: Option<Instant>,
    in_period: u32,
    unreported: u64,
}

impl Reports {
    fn one_more(&mut self, now: Instant) -> Option<u64> {
        if self
            .period
            .is_none_or(|begun| now.saturating_duration_since(begun) >= REPORT_PERIOD)
        {
            self.period = Some(now);
            self.in_period = 0;
        }
        if self.in_period == REPORTS_PER_PERIOD {
            self.unreported += 1;
            return None;
        }
        self.in_period += 1;
        Some(std::mem::take(&mut self.unreported))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_reported_a_few_times_a_period_and_counted() {
        let mut reports = Reports::default();
        let begin = Instant::now();
        let reported = (0..1000).filter_map(|_| reports.one_more(begin)).count();
        assert_eq!(reported, REPORTS_PER_PERIOD as usize);
        let unreported = 1000 - u64::from(REPORTS_PER_PERIOD);
        assert_eq!(reports.one_more(begin + REPORT_PERIOD), Some(unreported));
        assert_eq!(reports.one_more(begin + REPORT_PERIOD), Some(0));
    }
}
