//! Detects that no fault has come for a while, at no cost for a fault.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Time without a fault that counts as idle. Noticed after one to two such periods.
const PERIOD: Duration = Duration::from_secs(2);

/// A timer that runs while faults come, and once more after the last one.
pub(super) struct IdleTimer {
    /// Readable at the end of a period.
    timer: OwnedFd,
    is_running: bool,
    /// There was a fault in this period.
    had_fault: bool,
}

impl IdleTimer {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )?,
            is_running: false,
            had_fault: false,
        })
    }

    /// Notes a fault.
    pub(super) fn note_fault(&mut self) {
        self.had_fault = true;
        if !self.is_running {
            self.run();
        }
    }

    /// Ends a period, when the timer is readable. Returns `true` if there was no fault in it.
    pub(super) fn end_period(&mut self) -> bool {
        let had_fault = std::mem::take(&mut self.had_fault);
        self.is_running = false;
        if had_fault {
            self.run();
        } else {
            self.set(Duration::ZERO);
        }
        !had_fault
    }

    fn run(&mut self) {
        self.is_running = self.set(PERIOD);
    }

    /// Sets the timer to be readable once, after `after`; never, if that is zero. It is not readable before.
    fn set(&self, after: Duration) -> bool {
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(after).unwrap_or_default(),
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok()
    }
}

impl AsFd for IdleTimer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    /// Returns `true` if the timer becomes readable within `within`.
    fn is_due(idle: &IdleTimer, within: Duration) -> bool {
        let mut ready = [PollFd::new(idle, PollFlags::IN)];
        poll(&mut ready, Some(&Timespec::try_from(within).unwrap())).unwrap() > 0
    }

    #[test]
    fn it_is_idle_once_after_the_last_fault() {
        let long = Duration::from_secs(30);
        let mut idle = IdleTimer::new().unwrap();
        assert!(!is_due(&idle, 2 * PERIOD), "nothing has happened yet");
        for _ in 0..2 {
            idle.note_fault();
            idle.note_fault();
            assert!(is_due(&idle, long));
            assert!(!idle.end_period(), "there was a fault");
            assert!(is_due(&idle, long));
            assert!(idle.end_period());
            assert!(!is_due(&idle, 2 * PERIOD), "said once");
        }
    }
}
