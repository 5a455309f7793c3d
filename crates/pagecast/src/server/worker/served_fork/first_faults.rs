//! The data that a fork's first demand faults give: a recording for the working set, and how well a prefault foresaw
//! them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::page::PageSize;
use crate::server::registry::Counters;
use crate::template::{Planned, PrefaultPlan, PrefaultTally, Recording, Template, TemplateOffset};

/// How often to check whether faults still come.
const LOOK: Duration = Duration::from_millis(250);
/// Pages touched later than this after the first fault are not in the working set.
const LONGEST: Duration = Duration::from_secs(20);
/// The faults have settled if less than one in this many came since the last check.
const SETTLED: u64 = 100;

/// The window in which faults are noted: from the first fault until the faults settle. It is limited in time and in
/// pages.
#[derive(Debug, Default)]
pub(super) struct FirstFaults {
    window: Option<Box<Window>>,
}

#[derive(Debug)]
struct Window {
    recording: Option<Recording>,
    plan: Option<Arc<PrefaultPlan>>,
    /// The time of the first fault, and of the next check.
    times: Option<(Instant, Instant)>,
    noted: u64,
    noted_before: u64,
    full: bool,
}

/// The result of a window.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) recording: Option<Recording>,
    pub(super) tally: Option<PrefaultTally>,
}

impl FirstFaults {
    /// Notes first faults if there is something to learn from them.
    pub(super) fn new(recording: Option<Recording>, plan: Option<Arc<PrefaultPlan>>) -> Self {
        let wanted = recording.is_some() || plan.is_some();
        Self {
            window: wanted.then(|| {
                Box::new(Window {
                    recording,
                    plan,
                    times: None,
                    noted: 0,
                    noted_before: 0,
                    full: false,
                })
            }),
        }
    }

    /// Notes the fault of a page of `template`.
    pub(super) fn note(&mut self, at: TemplateOffset, page_size: PageSize, template: &Template, counters: &Counters) {
        let Some(window) = &mut self.window else { return };
        if window.times.is_none() {
            let now = Instant::now();
            window.times = Some((now, now + LOOK));
        }
        window.noted += 1;
        match window.plan.as_ref().map(|plan| plan.planned(at)) {
            None => {}
            Some(Planned::No) => counters.missed.add(1),
            Some(Planned::Ahead) => counters.late.add(1),
            Some(Planned::HeldOut) => counters.held_out_used.add(1),
        }
        if let Some(recording) = &mut window.recording {
            let small = PageSize::Small;
            // The kernel reports which of its pages faulted, not the place in it.
            for into in (0..page_size.bytes()).step_by(small.as_usize()) {
                let at = TemplateOffset::new(at.get() + into);
                if page_size == small || !template.zeros().covers(at, small.len()) {
                    window.full |= !recording.push(at);
                }
            }
        }
    }

    /// Returns `true` if each first fault is recorded.
    pub(super) fn is_recording(&self) -> bool {
        self.window.as_ref().is_some_and(|window| window.recording.is_some())
    }

    /// Returns `true` if the page at `at` was held out, to see whether the fork will touch it.
    pub(super) fn holds_out(&self, at: TemplateOffset) -> bool {
        let plan = self.window.as_ref().and_then(|window| window.plan.as_ref());
        plan.is_some_and(|plan| plan.planned(at) == Planned::HeldOut)
    }

    /// The time of the next check whether the window is over.
    pub(super) fn next_look(&self) -> Option<Instant> {
        let window = self.window.as_ref()?;
        let (_, look) = window.times?;
        // At once if full.
        Some(if window.full { Instant::now() } else { look })
    }

    /// Ends the window if it is over.
    pub(super) fn look(&mut self, now: Instant, counters: &Counters) -> Option<Shown> {
        let window = self.window.as_mut()?;
        let (first, look) = window.times.as_mut()?;
        if *look > now && !window.full {
            return None;
        }
        let fresh = window.noted - window.noted_before;
        let settled = fresh * SETTLED < window.noted;
        if !settled && !window.full && now.duration_since(*first) < LONGEST {
            window.noted_before = window.noted;
            *look = now + LOOK;
            return None;
        }
        self.end(counters)
    }

    /// Ends the window. Returns its result, if it ever began.
    pub(super) fn end(&mut self, counters: &Counters) -> Option<Shown> {
        let window = *self.window.take()?;
        window.times?;
        Some(Shown {
            recording: window.recording,
            tally: window.plan.map(|plan| PrefaultTally {
                planned: plan.pages(),
                held_out: plan.held_out(),
                held_out_used: counters.held_out_used.get(),
                late: counters.late.get(),
                missed: counters.missed.get(),
            }),
        })
    }
}
