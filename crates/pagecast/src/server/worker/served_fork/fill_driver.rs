//! The progress of filling a fork.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::backoff::Backoff;
use crate::session::{Fill, Session};

/// The fills that were begun and not ended, and the time to continue them. The session decides what is to be filled.
#[derive(Debug, Default)]
pub(super) struct FillDriver {
    /// Fills that were begun and not ended, for lack of room or because their mapping was split.
    begun: Vec<Fill>,
    read: FillRead,
    /// How often all begun fills were dropped. Fills of an earlier generation are not continued.
    generation: u64,
    /// Set while a step is carried out on another thread; stops that step.
    elsewhere: Option<Arc<AtomicBool>>,
    paused_until: Option<Instant>,
    /// The kernel refused to install fills, or to unregister the fork.
    retry: Option<Backoff>,
}

/// A fill whose bytes are not ready. There is at most one.
#[derive(Debug, Default)]
enum FillRead {
    #[default]
    None,
    /// Its bytes are being read.
    Waiting(Fill),
    /// Its bytes are read, and the next step installs them.
    Ready(Fill, Arc<Vec<u8>>),
}

impl FillDriver {
    /// Returns `true` if a step can continue something that was begun.
    pub(super) fn has_begun(&self) -> bool {
        !self.begun.is_empty() || matches!(self.read, FillRead::Ready(..))
    }

    /// Returns `true` if a step may be taken now.
    pub(super) fn may_step(&self) -> bool {
        self.paused_until.is_none() && self.elsewhere.is_none() && !matches!(self.read, FillRead::Waiting(_))
    }

    /// The current generation: only its fills are continued.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The next fills, at most `most`; or the one whose bytes were read, with these bytes.
    pub(super) fn next(&mut self, session: &mut Session, most: usize) -> (Vec<Fill>, Option<Arc<Vec<u8>>>) {
        match std::mem::take(&mut self.read) {
            FillRead::Ready(fill, bytes) => (vec![fill], Some(bytes)),
            other => {
                self.read = other;
                let fills = std::iter::from_fn(|| self.begun.pop().or_else(|| session.next_fill()));
                (fills.take(most).collect(), None)
            }
        }
    }

    /// Keeps a fill that was begun and has not ended.
    pub(super) fn keep(&mut self, fill: Fill) {
        self.begun.push(fill);
    }

    /// Keeps fills that were handed out and not begun. They are next, in this order.
    pub(super) fn keep_all(&mut self, fills: Vec<Fill>) {
        self.begun.extend(fills.into_iter().rev());
    }

    /// Makes a fill wait for its bytes. Returns `false` if another one waits; then keeps the fill for later.
    pub(super) fn wait_for_bytes(&mut self, fill: Fill) -> bool {
        if !matches!(self.read, FillRead::None) {
            self.begun.push(fill);
            return false;
        }
        self.read = FillRead::Waiting(fill);
        true
    }

    /// The fill that waits for its bytes.
    pub(super) fn waiting_for_bytes(&self) -> Option<&Fill> {
        match &self.read {
            FillRead::Waiting(fill) => Some(fill),
            _ => None,
        }
    }

    /// Notes the bytes of the fill that waits for them.
    pub(super) fn bytes_ready(&mut self, bytes: Arc<Vec<u8>>) {
        self.read = match std::mem::take(&mut self.read) {
            FillRead::Waiting(fill) => FillRead::Ready(fill, bytes),
            other => other,
        };
    }

    /// Notes that a step begins on another thread. Setting the returned flag ends the step soon.
    pub(super) fn begin_elsewhere(&mut self) -> Arc<AtomicBool> {
        let interrupt = Arc::new(AtomicBool::new(false));
        self.elsewhere = Some(Arc::clone(&interrupt));
        interrupt
    }

    pub(super) fn end_elsewhere(&mut self) {
        self.elsewhere = None;
    }

    /// Returns `true` if a step is carried out on another thread.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.elsewhere.is_some()
    }

    /// Ends the step on another thread after its current fill. Returns `true` if there is such a step.
    pub(super) fn interrupt(&self) -> bool {
        if let Some(interrupt) = &self.elsewhere {
            interrupt.store(true, Ordering::Relaxed);
        }
        self.is_elsewhere()
    }

    /// The time to continue, if that is not now.
    pub(super) fn paused_until(&self) -> Option<Instant> {
        self.paused_until
    }

    /// Ends a pause that is over.
    pub(super) fn on_timer(&mut self, now: Instant) {
        self.paused_until = self.paused_until.filter(|until| *until > now);
    }

    /// Ends the pause at once.
    pub(super) fn end_pause(&mut self) {
        self.paused_until = None;
    }

    /// Pauses so that `bytes` since `begun` were not installed faster than `rate`, in bytes a second.
    pub(super) fn keep_rate(&mut self, rate: NonZeroU64, begun: Instant, bytes: u64) {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.get());
        let until = begun + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        if until > Instant::now() {
            self.paused_until = self.paused_until.max(Some(until));
        }
    }

    /// Pauses because the kernel asked for another try: shortly at first, then ever longer.
    pub(super) fn pause_for_retry(&mut self) {
        let now = Instant::now();
        let retry = self.retry.get_or_insert_with(|| Backoff::first(now));
        retry.lengthen(now);
        self.paused_until = self.paused_until.max(Some(retry.until()));
    }

    /// Notes that a try succeeded: the next pause is a short one.
    pub(super) fn end_retry(&mut self) {
        self.retry = None;
    }

    /// Drops all begun fills, and the read for one. Later fills begin anew.
    pub(super) fn drop_all(&mut self) {
        *self = Self {
            generation: self.generation + 1,
            elsewhere: self.elsewhere.take(),
            ..Self::default()
        };
    }
}

#[cfg(test)]
mod tests {
    use pagecast_uffd::{ByteLen, HostAddr, HostRange};

    use super::*;
    use crate::page::PageSize;
    use crate::session::{Region, RegionMap};
    use crate::template::TemplateOffset;

    /// A session of 1 MiB that is being completed.
    fn session() -> Session {
        let memory = HostRange::new(HostAddr::new(1 << 20), ByteLen::new(1 << 20)).unwrap();
        let region = Region::new(memory, TemplateOffset::new(0), PageSize::Small);
        let mut session = Session::new(RegionMap::new(vec![region]));
        session.begin_completion(false);
        session
    }

    #[test]
    fn one_fill_at_a_time_waits_for_its_bytes_and_is_next_once_they_have_come() {
        let (mut session, mut driver) = (session(), FillDriver::default());
        let (fills, _) = driver.next(&mut session, 2);
        let [first, second] = <[Fill; 2]>::try_from(fills).unwrap();
        let from = first.from;
        assert!(driver.wait_for_bytes(first));
        assert!(!driver.wait_for_bytes(second), "kept for later");
        assert!(driver.has_begun() && !driver.may_step());
        driver.bytes_ready(Arc::default());
        assert!(driver.may_step());
        let (fills, bytes) = driver.next(&mut session, 9);
        assert!(bytes.is_some());
        assert_eq!(fills.iter().map(|fill| fill.from).collect::<Vec<_>>(), [from]);
        assert_eq!(driver.next(&mut session, 9).0.len(), 3, "the other, and the rest");
    }

    #[test]
    fn dropping_all_forgets_everything_but_a_step_that_is_carried_out_elsewhere() {
        let (mut session, mut driver) = (session(), FillDriver::default());
        let (fills, _) = driver.next(&mut session, 2);
        driver.keep_all(fills);
        driver.pause_for_retry();
        let interrupt = driver.begin_elsewhere();
        driver.drop_all();
        assert!(!driver.has_begun() && driver.paused_until().is_none());
        assert_eq!(driver.generation(), 1);
        assert!(driver.interrupt() && interrupt.load(Ordering::Relaxed));
    }
}
