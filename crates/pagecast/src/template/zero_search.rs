//! The search for the zeros of a template, on its own thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecast_uffd::ByteLen;

use super::live_source::LiveSource;
use super::run::TemplateOffset;
use super::source::SourceError;

/// How many bytes one step searches.
const STEP_BYTES: u64 = 1 << 20;

/// Called with the result of a search in the background.
type Done = Box<dyn FnOnce(Result<(), &SourceError>) + Send>;

/// The search for the zeros of one template. At most one runs at a time, for any number of callers; none once all are
/// known.
pub(super) struct ZeroSearch {
    shared: Arc<Shared>,
}

/// The state that the template and the searching threads share.
struct Shared {
    source: Arc<LiveSource>,
    state: Mutex<State>,
    changed: Condvar,
    /// Whether the progress is [`Progress::Done`], readable without the lock.
    is_done: AtomicBool,
}

#[derive(Default)]
struct State {
    progress: Progress,
    /// Where the background thread has stopped, for another thread to continue.
    left_off: Option<u64>,
    /// Called with the result.
    done: Vec<Done>,
    /// The template was dropped: its zeros are not needed any more.
    closed: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Progress {
    #[default]
    Idle,
    Running(Urgency),
    /// All zeros are known.
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Urgency {
    /// No caller waits for it.
    Background,
    Urgent,
}

impl ZeroSearch {
    /// Creates the search, already done if `all_are_known`.
    pub(super) fn new(source: &Arc<LiveSource>, all_are_known: bool) -> Self {
        let progress = if all_are_known { Progress::Done } else { Progress::Idle };
        Self {
            shared: Arc::new(Shared {
                source: Arc::clone(source),
                state: Mutex::new(State {
                    progress,
                    ..State::default()
                }),
                changed: Condvar::new(),
                is_done: AtomicBool::new(all_are_known),
            }),
        }
    }

    /// Starts the search, or joins the one that runs, and waits for its end, but no longer than `until`: the template
    /// may hang, and the caller must not. The search itself continues.
    pub(super) fn run(&self, until: Instant) {
        let mut state = self.shared.lock();
        match state.progress {
            Progress::Idle if self.spawn(|shared| shared.look(0, Urgency::Urgent)) => {
                state.progress = Progress::Running(Urgency::Urgent);
            }
            // Started from here: a thread inherits the weight of its creator, and can only ever lower it.
            Progress::Running(Urgency::Background) if self.spawn(Shared::take_over) => {
                state.progress = Progress::Running(Urgency::Urgent);
            }
            Progress::Running(_) => {}
            Progress::Idle | Progress::Done => return,
        }
        drop(state);
        self.wait(until);
    }

    /// Searches at low priority, and calls `done` with the result.
    pub(super) fn run_in_background(&self, done: Done) {
        let mut state = self.shared.lock();
        match state.progress {
            Progress::Idle if self.spawn(|shared| shared.look(0, Urgency::Background)) => {
                state.progress = Progress::Running(Urgency::Background);
                state.done.push(done);
            }
            Progress::Running(_) => state.done.push(done),
            Progress::Done => {
                drop(state);
                done(Ok(()));
            }
            Progress::Idle => {}
        }
    }

    /// Returns `true` if all zeros are known. No other flag says so.
    pub(super) fn is_done(&self) -> bool {
        self.shared.is_done.load(Ordering::Acquire)
    }

    /// Waits until no search runs. Returns `false` if one still runs at `until`.
    pub(super) fn wait(&self, until: Instant) -> bool {
        let mut state = self.shared.lock();
        while matches!(state.progress, Progress::Running(_)) {
            let left = until.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return false;
            }
            let (woken, _) = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
        }
        true
    }

    /// Searches on a new thread. Returns `false` if the thread cannot be started.
    fn spawn(&self, search: fn(&Shared)) -> bool {
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new()
            .name("pagecast-zeros".to_owned())
            .spawn(move || search(&shared))
            .is_ok()
    }
}

impl Drop for ZeroSearch {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    /// Returns `true` if the search ends at `at`: the template was dropped, or an urgent search takes over from there.
    fn ends_early(&self, at: u64, urgency: Urgency) -> bool {
        let mut state = self.lock();
        if state.closed {
            return true;
        }
        let is_taken_over = urgency == Urgency::Background && state.progress == Progress::Running(Urgency::Urgent);
        if is_taken_over {
            state.left_off = Some(at);
            self.changed.notify_all();
        }
        is_taken_over
    }

    fn finish(&self, result: &Result<(), SourceError>) {
        let mut state = self.lock();
        // Pages that cannot be read count as data. A later read of them reports why.
        state.left_off = None;
        state.progress = if result.is_ok() { Progress::Done } else { Progress::Idle };
        self.is_done.store(result.is_ok(), Ordering::Release);
        let done = std::mem::take(&mut state.done);
        drop(state);
        self.changed.notify_all();
        for done in done {
            done(result.as_ref().copied());
        }
    }

    /// Continues where the background thread stops, unless that thread finishes the search.
    fn take_over(&self) {
        let mut state = self.lock();
        let from = loop {
            if let Some(from) = state.left_off.take() {
                break from;
            }
            if state.closed || !matches!(state.progress, Progress::Running(_)) {
                return;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        self.look(from, Urgency::Urgent);
    }

    /// Searches from `from` to the end, unless the search [ends early](Self::ends_early).
    fn look(&self, from: u64, urgency: Urgency) {
        #[cfg(target_os = "linux")]
        if urgency == Urgency::Background {
            crate::priority::lower();
        }
        let size = self.source.source().len().get();
        let mut at = from;
        let mut result = Ok(());
        while at < size && result.is_ok() {
            if self.ends_early(at, urgency) {
                return;
            }
            let len = STEP_BYTES.min(size - at);
            result = self.source.find_zeros(TemplateOffset::new(at), ByteLen::new(len));
            at += len;
        }
        self.finish(&result);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;
    use crate::Template;
    use crate::template::{Page, PageSource, ZeroMap};

    const STEPS: u64 = 4;

    /// The number of a step, and its thread.
    type Step = (u64, std::thread::ThreadId);

    /// A template whose search reports the place and the thread of each step, then waits for permission to continue.
    struct Stepped {
        steps: Mutex<(Sender<Step>, Receiver<bool>)>,
        zeros: ZeroMap,
    }

    impl PageSource for Stepped {
        fn len(&self) -> ByteLen {
            ByteLen::new(STEPS * STEP_BYTES)
        }
        fn try_read<'a>(&'a self, _: TemplateOffset, _: &'a mut [u8]) -> Result<Page<'a>, SourceError> {
            Ok(Page::NotReady)
        }
        fn read(&self, _: TemplateOffset, _: &mut [u8]) -> Result<(), SourceError> {
            Ok(())
        }
        fn check_unchanged(&self) -> Result<(), SourceError> {
            Ok(())
        }
        fn zeros(&self) -> &ZeroMap {
            &self.zeros
        }
        fn find_zeros(&self, at: TemplateOffset, _: ByteLen) -> Result<(), SourceError> {
            let steps = self.steps.lock().unwrap();
            steps
                .0
                .send((at.get() / STEP_BYTES, std::thread::current().id()))
                .unwrap();
            if steps.1.recv().unwrap() {
                Ok(())
            } else {
                Err(SourceError::Truncated { end: at.get() })
            }
        }
    }

    fn stepped() -> (Template, Receiver<Step>, Sender<bool>) {
        let (step, steps) = channel();
        let (go, gone) = channel();
        let template = Template::from_source(Arc::new(Stepped {
            steps: Mutex::new((step, gone)),
            zeros: ZeroMap::new(ByteLen::new(STEPS * STEP_BYTES)),
        }));
        (template, steps, go)
    }

    #[test]
    fn whoever_waits_takes_over_from_the_background() {
        let (template, steps, go) = stepped();
        let (done, ended) = channel();
        template.find_zeros_in_background(move |result| done.send(result.is_ok()).unwrap());
        let (first, background) = steps.recv().unwrap();
        // Does not wait for the search, but makes it urgent.
        template.find_zeros(Instant::now());
        go.send(true).unwrap();
        let (second, urgent) = steps.recv().unwrap();
        assert_eq!((first, second), (0, 1));
        assert_ne!(background, urgent);
        for step in 2..STEPS {
            go.send(true).unwrap();
            assert_eq!(steps.recv().unwrap(), (step, urgent));
        }
        go.send(true).unwrap();
        assert!(ended.recv().unwrap());
        // All zeros are known, so there is no second search.
        let (done, ended) = channel();
        template.find_zeros_in_background(move |result| done.send(result.is_ok()).unwrap());
        assert!(ended.recv().unwrap() && steps.try_recv().is_err());
    }

    #[test]
    fn the_search_of_a_template_that_is_dropped_ends() {
        let (template, steps, go) = stepped();
        template.find_zeros_in_background(|_| panic!("nobody needs them"));
        assert_eq!(steps.recv().unwrap().0, 0);
        drop(template);
        go.send(true).unwrap();
        // The source is dropped with the thread.
        steps.recv().unwrap_err();
    }

    #[test]
    fn a_search_that_failed_says_so_and_can_be_tried_again() {
        let (template, steps, go) = stepped();
        for _ in 0..2 {
            let (done, ended) = channel();
            template.find_zeros_in_background(move |result| done.send(result.is_ok()).unwrap());
            assert_eq!(steps.recv().unwrap().0, 0);
            go.send(false).unwrap();
            assert!(!ended.recv().unwrap());
        }
    }
}
