//! Looking for the zeros of a template, on a thread of its own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecast_uffd::ByteLen;

use crate::template::live_source::LiveSource;
use crate::template::{SourceError, TemplateOffset};

/// How much is looked at in one go.
const STEP_BYTES: u64 = 1 << 20;

/// What is told of how a search in the background ended.
type Done = Box<dyn FnOnce(Result<(), &SourceError>) + Send>;

/// The search for the zeros of one template: one at a time, however many want to know, and none once all are known.
pub(in crate::template) struct ZeroSearch {
    shared: Arc<Shared>,
}

/// What the template and the searching threads share.
struct Shared {
    source: Arc<LiveSource>,
    state: Mutex<State>,
    changed: Condvar,
    /// Its progress is [`Progress::Done`], without the lock.
    is_done: AtomicBool,
}

#[derive(Default)]
struct State {
    progress: Progress,
    /// Where the thread in the background has left off, for another one to go on.
    left_off: Option<u64>,
    /// Who wants to know how it ends.
    done: Vec<Done>,
    /// The template was dropped: nobody needs the zeros any more.
    closed: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Progress {
    #[default]
    Idle,
    Running(Urgency),
    /// All are known.
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Urgency {
    /// Nobody waits for it.
    Background,
    Urgent,
}

impl ZeroSearch {
    /// One that is over already where `all_are_known`.
    pub(in crate::template) fn new(source: &Arc<LiveSource>, all_are_known: bool) -> Self {
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

    /// Looks for the zeros, or waits for who does so already, but no longer than `until`: the template may hang, and
    /// whoever wants to know must not. The search itself goes on.
    pub(in crate::template) fn run(&self, until: Instant) {
        let mut state = self.shared.lock();
        match state.progress {
            Progress::Idle if self.spawn(|shared| shared.look(0, Urgency::Urgent)) => {
                state.progress = Progress::Running(Urgency::Urgent);
            }
            // From here, because a thread inherits the weight of the one that makes it, and can only ever give it up.
            Progress::Running(Urgency::Background) if self.spawn(Shared::take_over) => {
                state.progress = Progress::Running(Urgency::Urgent);
            }
            Progress::Running(_) => {}
            Progress::Idle | Progress::Done => return,
        }
        drop(state);
        self.wait(until);
    }

    /// Looks for the zeros when there is nothing better to do, and says how that ended.
    pub(in crate::template) fn run_in_background(&self, done: Done) {
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

    /// Whether all zeros are known. Nobody else keeps this.
    pub(in crate::template) fn is_done(&self) -> bool {
        self.shared.is_done.load(Ordering::Acquire)
    }

    /// Waits until nobody is looking; `false` where somebody still is.
    pub(in crate::template) fn wait(&self, until: Instant) -> bool {
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

    /// Searches on a thread of its own; `false` where there is none to be had.
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
    /// Whether the search ends at `at`: nobody needs the zeros any more, or another thread goes on from there because somebody
    /// waits.
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
        // What cannot be read is counted as data; whoever needs it will say why.
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

    /// Goes on where the thread in the background leaves off, if it does before it has come to the end.
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

    /// Looks at everything from `from` on, or in the background until somebody waits for it.
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

    /// The number of a step, and who does it.
    type Step = (u64, std::thread::ThreadId);

    /// A template that is looked at step by step: each says where and on which thread, then waits to be let go on.
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
        // Does not wait for it, but it should hurry.
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
        // Known by now, so nobody looks again.
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
