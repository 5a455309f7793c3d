//! What a fork's first demand faults tell of its template: a recording for the working set, and how well a prefault foresaw
//! them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::page::PageSize;
use crate::server::record::Counters;
use crate::template::{Planned, PrefaultPlan, PrefaultTally, Recording, Template, TemplateOffset};

/// How often it is looked whether faults still come.
const LOOK: Duration = Duration::from_millis(250);
/// What is touched later than this after the first fault is no working set.
const LONGEST: Duration = Duration::from_secs(20);
/// The faults have settled once fewer than this part of all came since the last look.
const SETTLED: u64 = 100;

/// The window in which a fork is watched: from its first fault until the faults settle, for a bounded time and a bounded
/// number of pages.
#[derive(Debug, Default)]
pub(super) struct Watch {
    subject: Option<Box<Subject>>,
}

#[derive(Debug)]
struct Subject {
    recording: Option<Recording>,
    plan: Option<Arc<PrefaultPlan>>,
    /// The first fault, and when to look next.
    times: Option<(Instant, Instant)>,
    noted: u64,
    noted_before: u64,
    full: bool,
}

/// What a window has shown.
#[derive(Debug)]
pub(in crate::server) struct Watched {
    pub(in crate::server) recording: Option<Recording>,
    pub(in crate::server) tally: Option<PrefaultTally>,
}

impl Watch {
    /// Watches where there is something to learn.
    pub(super) fn new(recording: Option<Recording>, plan: Option<Arc<PrefaultPlan>>) -> Self {
        let wanted = recording.is_some() || plan.is_some();
        Self {
            subject: wanted.then(|| {
                Box::new(Subject {
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
        let Some(subject) = &mut self.subject else { return };
        if subject.times.is_none() {
            let now = Instant::now();
            subject.times = Some((now, now + LOOK));
        }
        subject.noted += 1;
        match subject.plan.as_ref().map(|plan| plan.planned(at)) {
            None => {}
            Some(Planned::No) => counters.missed.add(1),
            Some(Planned::Ahead) => counters.late.add(1),
            Some(Planned::HeldOut) => counters.held_out_used.add(1),
        }
        if let Some(recording) = &mut subject.recording {
            let small = PageSize::Small;
            // The kernel tells which page of those it manages, not where in it.
            for into in (0..page_size.bytes()).step_by(small.as_usize()) {
                let at = TemplateOffset::new(at.get() + into);
                if page_size == small || !template.zeros().covers(at, small.len()) {
                    subject.full |= !recording.push(at);
                }
            }
        }
    }

    /// When to look whether it is over.
    pub(super) fn next_look(&self) -> Option<Instant> {
        let subject = self.subject.as_ref()?;
        let (_, look) = subject.times?;
        // Full: at once.
        Some(if subject.full { Instant::now() } else { look })
    }

    /// Ends the window where it is over.
    pub(super) fn look(&mut self, now: Instant, counters: &Counters) -> Option<Watched> {
        let subject = self.subject.as_mut()?;
        let (first, look) = subject.times.as_mut()?;
        if *look > now && !subject.full {
            return None;
        }
        let fresh = subject.noted - subject.noted_before;
        let settled = fresh * SETTLED < subject.noted;
        if !settled && !subject.full && now.duration_since(*first) < LONGEST {
            subject.noted_before = subject.noted;
            *look = now + LOOK;
            return None;
        }
        self.end(counters)
    }

    /// Ends the window: what it has shown, if it ever began.
    pub(super) fn end(&mut self, counters: &Counters) -> Option<Watched> {
        let subject = *self.subject.take()?;
        subject.times?;
        Some(Watched {
            recording: subject.recording,
            tally: subject.plan.map(|plan| PrefaultTally {
                planned: plan.pages(),
                held_out: plan.held_out(),
                held_out_used: counters.held_out_used.get(),
                late: counters.late.get(),
                missed: counters.missed.get(),
            }),
        })
    }
}
