//! Looking for the zeros of a template, on a thread of its own.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecast_uffd::ByteLen;

use super::Inner;
use super::source::{SourceError, TemplateOffset};

/// How much is looked at in one go.
const STEP_BYTES: u64 = 1 << 20;

/// The search for the zeros of one template: one at a time, however many want to know, and none once all are known.
#[derive(Default)]
pub(super) struct ZeroSearch {
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Progress {
    #[default]
    Idle,
    Running,
    /// All are known.
    Done,
}

impl ZeroSearch {
    /// Looks for the zeros, or waits for who does so already, but no longer than `until`: the template may hang, and
    /// whoever wants to know must not. The search itself goes on.
    pub(super) fn run(template: &Arc<Inner>, until: Instant) {
        let search = &template.zero_search;
        let mut progress = search.lock();
        if *progress == Progress::Idle {
            let template = Arc::clone(template);
            let spawned = std::thread::Builder::new()
                .name("pagecast-zeros".to_owned())
                .spawn(move || template.zero_search.finish(look(&template)));
            if spawned.is_err() {
                return;
            }
            *progress = Progress::Running;
        }
        drop(progress);
        search.wait(until);
    }

    /// Waits until nobody is looking; `false` where somebody still is.
    pub(super) fn wait(&self, until: Instant) -> bool {
        let mut progress = self.lock();
        while *progress == Progress::Running {
            let left = until.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return false;
            }
            let (woken, _) = self
                .changed
                .wait_timeout(progress, left)
                .unwrap_or_else(PoisonError::into_inner);
            progress = woken;
        }
        true
    }

    fn finish(&self, result: Result<(), SourceError>) {
        // What cannot be read is counted as data; whoever needs it will say why.
        *self.lock() = result.map_or(Progress::Idle, |()| Progress::Done);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        // No code that can panic runs under this lock.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn look(template: &Inner) -> Result<(), SourceError> {
    let size = template.source.len().get();
    let steps = (0..size.div_ceil(STEP_BYTES)).map(|step| step * STEP_BYTES);
    for at in steps {
        template.check_not_withdrawn()?;
        let len = STEP_BYTES.min(size - at);
        template.source.find_zeros(TemplateOffset::new(at), ByteLen::new(len))?;
    }
    Ok(())
}
