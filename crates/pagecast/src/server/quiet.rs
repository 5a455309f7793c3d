//! Notices that no fault has come for a while, at no cost for a fault.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// How long, to within twice that.
const WHILE: Duration = Duration::from_millis(100);

/// A timer that runs while faults come, and once more after the last one.
pub(super) struct Quiet {
    /// Readable when it is time to look.
    timer: OwnedFd,
    is_running: bool,
    /// There was a fault since it was looked at last.
    is_stirred: bool,
}

impl Quiet {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )?,
            is_running: false,
            is_stirred: false,
        })
    }

    /// There was a fault.
    pub(super) fn stir(&mut self) {
        self.is_stirred = true;
        if !self.is_running {
            self.run();
        }
    }

    /// The timer is readable: whether there was no fault for a while.
    pub(super) fn look(&mut self) -> bool {
        let was_stirred = std::mem::take(&mut self.is_stirred);
        self.is_running = false;
        if was_stirred {
            self.run();
        } else {
            self.set(Duration::ZERO);
        }
        !was_stirred
    }

    fn run(&mut self) {
        self.is_running = self.set(WHILE);
    }

    /// Has it be readable once, after so long; with zero, never. Whatever it had to say before is forgotten.
    fn set(&self, after: Duration) -> bool {
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(after).unwrap_or_default(),
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok()
    }
}

impl AsFd for Quiet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    /// Whether it becomes readable within so long.
    fn is_due(quiet: &Quiet, within: Duration) -> bool {
        let mut ready = [PollFd::new(quiet, PollFlags::IN)];
        poll(&mut ready, Some(&Timespec::try_from(within).unwrap())).unwrap() > 0
    }

    #[test]
    fn it_is_quiet_once_after_the_last_fault() {
        let long = Duration::from_secs(30);
        let mut quiet = Quiet::new().unwrap();
        assert!(!is_due(&quiet, 2 * WHILE), "nothing has happened yet");
        for _ in 0..2 {
            quiet.stir();
            quiet.stir();
            assert!(is_due(&quiet, long));
            assert!(!quiet.look(), "there was a fault");
            assert!(is_due(&quiet, long));
            assert!(quiet.look());
            assert!(!is_due(&quiet, 2 * WHILE), "said once");
        }
    }
}
