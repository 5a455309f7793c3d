//! Signals that ask a process to end, and their effect.
//!
//! The default action of most signals ends a process at once. A server that ends so leaves the page faults of its VMMs
//! unanswered. So every signal that can be caught and is not a fault asks for the orderly end instead.

use std::io;
use std::ops::RangeInclusive;

use rustix::process::Signal;
use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU, SIGXFSZ,
};
use signal_hook::iterator::Signals;

/// Signals that are sent on purpose, so that a second one is intended, too.
const INSISTING: [i32; 3] = [SIGTERM, SIGINT, SIGQUIT];

/// Signals that are sent automatically, repeatedly (SIGHUP after SIGTERM at the end of a login session, SIGXCPU each
/// second), or by mistake.
const ASKING: [i32; 9] = [
    SIGHUP,
    SIGUSR1,
    SIGUSR2,
    SIGALRM,
    SIGVTALRM,
    SIGPROF,
    SIGXCPU,
    Signal::POWER.as_raw(),
    Signal::STKFLT.as_raw(),
];

/// Signals that are caught without effect. SIGXFSZ: the write beyond the limit fails with `EFBIG`, which its caller
/// handles. SIGIO: it reports broken leases to their threads, so it cannot ask for the end.
const HARMLESS: [i32; 2] = [SIGXFSZ, SIGIO];

/// Real-time signals. The C library reserves those before.
const REAL_TIME: RangeInclusive<i32> = 34..=64;

/// A signal that asks for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndSignal(i32);

impl EndSignal {
    /// Returns the number of the signal.
    pub fn number(self) -> i32 {
        self.0
    }
}

/// Calls `on_signal`, on a thread of its own, for each signal that asks for the end. Such a signal no longer ends the
/// process. Signals that are already ignored, as by `nohup`, stay ignored.
///
/// # Errors
///
/// The kernel refuses a handler or a thread.
pub fn watch(mut on_signal: impl FnMut(EndSignal) + Send + 'static) -> io::Result<()> {
    let ignored = ignored();
    let wanted = INSISTING
        .into_iter()
        .chain(ASKING)
        .chain(HARMLESS)
        .chain(REAL_TIME)
        .filter(|signal| !ignored.contains(*signal));
    let mut signals = Signals::new(wanted)?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in signals.forever().filter(|signal| !HARMLESS.contains(signal)) {
            on_signal(EndSignal(signal));
        }
    })?;
    Ok(())
}

/// The reaction of a server to a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// Complete all forks and end. Nothing to do if that is under way.
    Close,
    /// Kill the VMMs of forks that are not complete, and end.
    Kill,
}

/// Decides the reaction to signals: the second SIGTERM, SIGINT or SIGQUIT kills the VMMs, every other signal asks for
/// the orderly end.
#[derive(Debug, Default)]
pub struct Escalation {
    insisted: bool,
}

impl Escalation {
    /// Returns the reaction to this signal, given those before.
    pub fn react(&mut self, signal: EndSignal) -> Reaction {
        if !INSISTING.contains(&signal.0) {
            return Reaction::Close;
        }
        if std::mem::replace(&mut self.insisted, true) {
            Reaction::Kill
        } else {
            Reaction::Close
        }
    }
}

/// A set of signals: bit `n - 1` is signal `n`.
struct SignalSet(u64);

impl SignalSet {
    fn contains(&self, signal: i32) -> bool {
        (1..=64).contains(&signal) && self.0 >> (signal - 1) & 1 == 1
    }
}

/// Returns the signals that this process ignores: see `proc_pid_status(5)`. `None` if the kernel does not show them.
fn ignored() -> SignalSet {
    let status = std::fs::read("/proc/self/status").unwrap_or_default();
    SignalSet(ignored_in(&String::from_utf8_lossy(&status)))
}

fn ignored_in(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::Reaction::{Close, Kill};
    use super::*;

    #[test]
    fn signals_that_are_ignored_are_found_in_the_status() {
        let ignored = SignalSet(ignored_in("SigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\n"));
        assert!(ignored.contains(SIGHUP) && ignored.contains(13));
        assert!(!ignored.contains(SIGINT) && !ignored.contains(0) && !ignored.contains(65));
        assert_eq!(ignored_in("SigCgt:\t0000000000000001\n"), 0);
        assert_eq!(ignored_in(""), 0);
    }

    #[test]
    fn only_a_second_signal_that_is_sent_on_purpose_kills() {
        let reactions = |signals: &[i32]| {
            let mut escalation = Escalation::default();
            signals
                .iter()
                .map(|signal| escalation.react(EndSignal(*signal)))
                .collect::<Vec<_>>()
        };
        assert_eq!(reactions(&[SIGTERM, SIGTERM]), [Close, Kill]);
        assert_eq!(reactions(&[SIGINT, SIGQUIT]), [Close, Kill]);
        assert_eq!(
            reactions(&[SIGTERM, SIGHUP, SIGXCPU, SIGHUP]),
            [Close, Close, Close, Close]
        );
        assert_eq!(
            reactions(&[SIGHUP, SIGTERM, SIGUSR1, SIGTERM]),
            [Close, Close, Close, Kill]
        );
    }
}
