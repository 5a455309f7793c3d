//! How far filling a fork has come.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::backoff::Backoff;
use crate::session::{Fill, Session};

/// The fills that were begun and not ended, and when to go on with them. What is to be filled is the session's to say.
#[derive(Debug, Default)]
pub(super) struct FillDriver {
    /// Fills that were begun and not ended, for lack of room or because their mapping was split.
    begun: Vec<Fill>,
    read: FillRead,
    /// How often all that was begun was dropped: fills from before that are not carried on with.
    generation: u64,
    /// A step is carried out elsewhere, and this tells it to stop.
    elsewhere: Option<Arc<AtomicBool>>,
    paused_until: Option<Instant>,
    /// The kernel would not let fills go on, nor the fork be unregistered.
    retry: Option<Backoff>,
}

/// A fill whose bytes are not ready. There is one at a time.
#[derive(Debug, Default)]
enum FillRead {
    #[default]
    None,
    /// Its bytes are being read.
    Waiting(Fill),
    /// Its bytes have come, and are installed by the next step.
    Ready(Fill, Arc<Vec<u8>>),
}

impl FillDriver {
    /// Whether something was begun that a step can go on with.
    pub(super) fn has_begun(&self) -> bool {
        !self.begun.is_empty() || matches!(self.read, FillRead::Ready(..))
    }

    /// Whether a step may be taken now.
    pub(super) fn may_step(&self) -> bool {
        self.paused_until.is_none() && self.elsewhere.is_none() && !matches!(self.read, FillRead::Waiting(_))
    }

    /// Which fills are carried on with: those of this generation.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The next fills, `most` at most; or the one whose bytes have come, and these bytes.
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

    /// A fill was begun, and has not ended.
    pub(super) fn keep(&mut self, fill: Fill) {
        self.begun.push(fill);
    }

    /// Fills that were handed out, and not begun. They are next, in this order.
    pub(super) fn keep_all(&mut self, fills: Vec<Fill>) {
        self.begun.extend(fills.into_iter().rev());
    }

    /// Has a fill wait for its bytes. Returns `false` if another does, and then keeps it for later.
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

    /// The bytes of the fill that waits for them have come.
    pub(super) fn bytes_ready(&mut self, bytes: Arc<Vec<u8>>) {
        self.read = match std::mem::take(&mut self.read) {
            FillRead::Waiting(fill) => FillRead::Ready(fill, bytes),
            other => other,
        };
    }

    /// A step is carried out elsewhere from now on. It ends soon after what this returns is set.
    pub(super) fn begin_elsewhere(&mut self) -> Arc<AtomicBool> {
        let interrupt = Arc::new(AtomicBool::new(false));
        self.elsewhere = Some(Arc::clone(&interrupt));
        interrupt
    }

    pub(super) fn end_elsewhere(&mut self) {
        self.elsewhere = None;
    }

    /// Whether a step is carried out elsewhere.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.elsewhere.is_some()
    }

    /// Ends the step that is carried out elsewhere with the fill that it is at. Returns whether there is one.
    pub(super) fn interrupt(&self) -> bool {
        if let Some(interrupt) = &self.elsewhere {
            interrupt.store(true, Ordering::Relaxed);
        }
        self.is_elsewhere()
    }

    /// When to go on, if that is not at once.
    pub(super) fn paused_until(&self) -> Option<Instant> {
        self.paused_until
    }

    /// Ends a pause that is over.
    pub(super) fn on_timer(&mut self, now: Instant) {
        self.paused_until = self.paused_until.filter(|until| *until > now);
    }

    /// Goes on at once.
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

    /// The kernel asked for another try: soon at first, then ever less often.
    pub(super) fn pause_for_retry(&mut self) {
        let now = Instant::now();
        let retry = self.retry.get_or_insert_with(|| Backoff::first(now));
        retry.lengthen(now);
        self.paused_until = self.paused_until.max(Some(retry.until()));
    }

    /// A try has got on: the next pause is a short one.
    pub(super) fn end_retry(&mut self) {
        self.retry = None;
    }

    /// Drops all that was begun, and what is being read for it: what is wanted later begins anew.
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
