//! Reads that may block, kept off the fault path.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::live_source::LiveSource;
use super::run::TemplateOffset;
use super::source::SourceError;

/// The most threads that read one template at once. Each template has its own, so one that hangs (a network file system)
/// holds up no other.
const MOST_THREADS: usize = 4;

/// The most parts that wait to be mapped.
const MOST_MAPS: usize = 64;

/// How long a thread without work stays. The last one stays until the template is dropped.
const IDLE: Duration = Duration::from_secs(2);

/// The bytes of a read, shared by all its waiters.
pub(crate) type ReadResult = Result<Arc<Vec<u8>>, SourceError>;

/// Called with the bytes, or with the error. Runs on a reading thread.
type Done = Box<dyn FnOnce(ReadResult) + Send>;

/// The offset and the length of a read.
type Key = (TemplateOffset, usize);

/// The purpose of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadFor {
    /// A vCPU is blocked on it.
    Demand,
    /// No vCPU is blocked on it.
    Fill,
}

/// The threads that read one template, and their queues. More threads come with requests and end when idle.
pub(super) struct SlowReads {
    readers: Arc<Readers>,
}

struct Readers {
    source: Arc<LiveSource>,
    state: Mutex<State>,
    work: Condvar,
    /// Notified when no thread reads.
    quiet: Condvar,
}

#[derive(Default)]
struct State {
    /// All reads that were requested and have not ended.
    requests: HashMap<Key, Request>,
    /// Requests that no thread has begun. Demand goes first.
    demand: VecDeque<Key>,
    fills: VecDeque<Key>,
    /// Parts to be mapped that no thread has begun. These come after demand, and take some microseconds each.
    maps: VecDeque<TemplateOffset>,
    threads: usize,
    idle: usize,
    /// The number of threads that carry out a request.
    reading: usize,
    /// The number of these that carry out a fill.
    filling: usize,
    /// The last attempt to start a thread failed.
    short_of_threads: bool,
    /// The template was dropped.
    closed: bool,
    stats: SlowReadStats,
}

/// Statistics of the reads of a template away from the fault path, for bytes that were not in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlowReadStats {
    /// Finished reads, failed ones included. Forks that need the same bytes at the same time share one.
    pub reads: u64,
    /// Failed reads. A failure that may pass is retried, and each try counts.
    pub failed: u64,
    /// Bytes of the successful reads.
    pub bytes: u64,
    /// The sum of the durations of all reads; several may run at once.
    pub time: Duration,
}

struct Request {
    read_for: ReadFor,
    begun: bool,
    /// The callbacks of all waiters.
    done: Vec<Done>,
}

impl SlowReads {
    /// Creates the queues, without a thread.
    pub(super) fn new(source: &Arc<LiveSource>) -> Self {
        Self {
            readers: Arc::new(Readers {
                source: Arc::clone(source),
                state: Mutex::default(),
                work: Condvar::new(),
                quiet: Condvar::new(),
            }),
        }
    }

    /// Ensures that there is a thread, so that no read depends on starting one later.
    ///
    /// # Errors
    ///
    /// The thread cannot be started.
    pub(super) fn start(&self) -> std::io::Result<()> {
        let mut state = self.readers.lock();
        if state.threads > 0 {
            return Ok(());
        }
        self.readers.spawn(&mut state)
    }

    /// Reads `length` bytes at `at` and calls `done` with them. Demand reads run in the order of the calls, and before
    /// all fills. A read of the same bytes that is under way is shared. Returns `false` if a wanted thread could not be
    /// started: call [`start_wanted`](Self::start_wanted) later, since the other threads may all be stuck.
    #[must_use]
    pub(super) fn submit(&self, at: TemplateOffset, length: usize, read_for: ReadFor, done: Done) -> bool {
        let readers = &self.readers;
        let mut state = readers.lock();
        let key = (at, length);
        let state = &mut *state;
        if let Some(request) = state.requests.get_mut(&key) {
            request.done.push(done);
            if request.begun || request.read_for == ReadFor::Demand || read_for == ReadFor::Fill {
                return true;
            }
            // A vCPU is blocked on it now.
            request.read_for = ReadFor::Demand;
            state.fills.retain(|fill| *fill != key);
            state.demand.push_back(key);
        } else {
            let request = Request {
                read_for,
                begun: false,
                done: vec![done],
            };
            state.requests.insert(key, request);
            match read_for {
                ReadFor::Demand => state.demand.push_back(key),
                ReadFor::Fill => state.fills.push_back(key),
            }
        }
        // Idle threads are all alike, and one that was woken looks at both queues.
        readers.work.notify_one();
        readers.spawn_wanted(state)
    }

    /// Maps the pages around `at`, if they are in memory. Does nothing if no thread is there, or too much is queued.
    #[cfg(target_os = "linux")]
    pub(super) fn map_later(&self, at: TemplateOffset) {
        let mut state = self.readers.lock();
        if state.threads > 0 && state.maps.len() < MOST_MAPS {
            state.maps.push_back(at);
            self.readers.work.notify_one();
        }
    }

    /// Tries again to start a wanted thread. Returns `false` if that fails again.
    pub(super) fn start_wanted(&self) -> bool {
        let mut state = self.readers.lock();
        self.readers.spawn_wanted(&mut state)
    }

    /// Waits until no thread reads. Returns `false` if one still does.
    pub(super) fn wait(&self, until: Instant) -> bool {
        let mut state = self.readers.lock();
        while state.reading > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return false;
            }
            let (woken, _) = self
                .readers
                .quiet
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
        }
        true
    }

    pub(super) fn stats(&self) -> SlowReadStats {
        self.readers.lock().stats
    }
}

impl Drop for SlowReads {
    /// Closes the queues: the template is dropped, so no fork waits for a read. A read under way completes; others
    /// never begin.
    fn drop(&mut self) {
        self.readers.lock().closed = true;
        self.readers.work.notify_all();
    }
}

impl State {
    /// Returns `true` if one more thread is of use: one idle thread for each queued read, and one more if a fill is
    /// queued, so that one is left for demand.
    fn wants_thread(&self) -> bool {
        let spare = usize::from(!self.fills.is_empty());
        self.threads < MOST_THREADS && self.demand.len() + self.fills.len() + spare > self.idle
    }

    /// Returns `true` if a thread may begin a fill. One thread is left for demand, unless only one can be started.
    fn may_fill(&self) -> bool {
        self.filling + 1 < self.threads || (self.threads == 1 && self.short_of_threads)
    }

    fn next(&mut self) -> Option<Work> {
        if self.demand.is_empty()
            && let Some(at) = self.maps.pop_front()
        {
            self.reading += 1;
            return Some(Work::Map(at));
        }
        let key = self
            .demand
            .pop_front()
            .or_else(|| self.may_fill().then(|| self.fills.pop_front()).flatten())?;
        if let Some(request) = self.requests.get_mut(&key) {
            request.begun = true;
            self.reading += 1;
            self.filling += usize::from(request.read_for == ReadFor::Fill);
        }
        Some(Work::Read(key))
    }
}

/// The work of a reading thread.
enum Work {
    Read(Key),
    /// Map the pages around this offset.
    Map(TemplateOffset),
}

impl Readers {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread if one is wanted. Returns `false` if that fails.
    fn spawn_wanted(self: &Arc<Self>, state: &mut State) -> bool {
        if state.wants_thread() && self.spawn(state).is_err() {
            // The thread that is there has to do fills, too.
            self.work.notify_one();
            return false;
        }
        true
    }

    fn spawn(self: &Arc<Self>, state: &mut State) -> std::io::Result<()> {
        let readers = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("pagecast-read".to_owned())
            .spawn(move || readers.run());
        state.short_of_threads = spawned.is_err();
        state.threads += usize::from(spawned.is_ok());
        spawned.map(drop)
    }

    fn run(&self) {
        // A worker starts this thread, and may run at raised priority.
        #[cfg(target_os = "linux")]
        crate::priority::reset();
        while let Some(work) = self.next() {
            let (at, length) = match work {
                Work::Read(key) => key,
                Work::Map(at) => {
                    self.source.map(at);
                    self.mapped();
                    continue;
                }
            };
            let begun = Instant::now();
            let bytes = self.source.read(at, length).map(Arc::new);
            for done in self.finished((at, length), &bytes, begun.elapsed()) {
                done(bytes.clone());
            }
        }
    }

    /// The next read, or `None` after some time without any: the calling thread is then no longer counted.
    fn next(&self) -> Option<Work> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(work) = state.next() {
                return Some(work);
            }
            state.idle += 1;
            if state.threads == 1 {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            }
            let (woken, timeout) = self
                .work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if timeout.timed_out()
                && state.threads > 1
                && state.demand.is_empty()
                && state.fills.is_empty()
                && state.maps.is_empty()
            {
                state.threads -= 1;
                return None;
            }
        }
    }

    /// Notes that a thread has mapped something.
    fn mapped(&self) {
        let mut state = self.lock();
        state.reading -= 1;
        if state.reading == 0 {
            self.quiet.notify_all();
        }
    }

    /// Notes that a read has ended, and returns the callbacks of its waiters.
    fn finished(&self, key: Key, bytes: &ReadResult, time: Duration) -> Vec<Done> {
        let mut state = self.lock();
        state.reading -= 1;
        state.stats.reads += 1;
        state.stats.failed += u64::from(bytes.is_err());
        state.stats.bytes += bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
        state.stats.time += time;
        let request = state.requests.remove(&key);
        // Once begun, a read stays what it was begun for.
        state.filling -= usize::from(
            request
                .as_ref()
                .is_some_and(|request| request.read_for == ReadFor::Fill),
        );
        if state.reading == 0 {
            self.quiet.notify_all();
        }
        request.map(|request| request.done).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};

    use pagecast_uffd::ByteLen;

    use super::*;
    use crate::Template;
    use crate::template::{Page, PageSource, ZeroMap};

    const PATIENCE: Duration = Duration::from_secs(30);
    const PAGE: usize = 4096;
    const FILL: usize = 64 * PAGE;
    const LEN: ByteLen = ByteLen::new(1 << 30);

    fn page(number: u64) -> TemplateOffset {
        TemplateOffset::new(number * PAGE as u64)
    }

    /// A template that reports each read as it begins, and ends it on request.
    struct Stepped {
        begun: Mutex<Sender<TemplateOffset>>,
        go: Mutex<Receiver<()>>,
        zeros: ZeroMap,
    }

    impl PageSource for Stepped {
        fn len(&self) -> ByteLen {
            LEN
        }
        fn try_read<'a>(&'a self, _: TemplateOffset, _: &'a mut [u8]) -> Result<Page<'a>, SourceError> {
            Ok(Page::NotReady)
        }
        fn read(&self, at: TemplateOffset, _: &mut [u8]) -> Result<(), SourceError> {
            self.begun.lock().unwrap().send(at).unwrap();
            // Closed at the end of a test.
            let _ = self.go.lock().unwrap().recv();
            Ok(())
        }
        fn check_unchanged(&self) -> Result<(), SourceError> {
            Ok(())
        }
        fn zeros(&self) -> &ZeroMap {
            &self.zeros
        }
    }

    /// Such a template, with the channel that reports its reads, and the one that ends them.
    fn stepped() -> (Template, Receiver<TemplateOffset>, Sender<()>) {
        let (said, begun) = channel();
        let (go, gone) = channel();
        let template = Template::from_source(Arc::new(Stepped {
            begun: Mutex::new(said),
            go: Mutex::new(gone),
            zeros: ZeroMap::new(LEN),
        }));
        (template, begun, go)
    }

    /// The idle thread may be stuck in its read by then, which must not hold up other reads.
    #[test]
    fn an_idle_thread_is_counted_on_for_one_read_only() {
        let (template, begun, go) = stepped();
        {
            // One that was woken and does not come to run.
            let mut state = template.inner.slow_reads.readers.lock();
            state.threads = 1;
            state.idle = 1;
        }
        let (done, all_done) = channel();
        for number in 0..2 {
            let done = done.clone();
            let ended = move |_| done.send(number).unwrap();
            assert!(template.read_later(page(number), PAGE, ReadFor::Demand, ended));
        }
        drop(go);
        assert_eq!(all_done.recv_timeout(PATIENCE), Ok(0));
        assert_eq!(all_done.recv_timeout(PATIENCE), Ok(1));
        drop(begun);
    }

    #[test]
    fn one_reader_is_left_for_demand_however_many_fills_there_are() {
        let (template, begun, go) = stepped();
        for number in 0..10 {
            assert!(template.read_later(page(64 * number), FILL, ReadFor::Fill, |_| {}));
        }
        // Each on a thread of its own, so that any of them may say so first.
        let mut first: Vec<_> = (0..3).map(|_| begun.recv_timeout(PATIENCE).unwrap()).collect();
        first.sort_unstable();
        assert_eq!(first, [page(0), page(64), page(128)]);
        // Nothing has ended, so a fourth fill would hold up what comes now.
        let demand = page(1000);
        assert!(template.read_later(demand, PAGE, ReadFor::Demand, |_| {}));
        assert_eq!(begun.recv_timeout(PATIENCE), Ok(demand));
        drop(go);
    }

    #[test]
    fn demand_is_read_before_fills_that_were_asked_for_earlier() {
        let (template, begun, go) = stepped();
        for number in 0..4 {
            assert!(template.read_later(page(number), PAGE, ReadFor::Demand, |_| {}));
            begun.recv_timeout(PATIENCE).unwrap();
        }
        assert!(template.read_later(page(64), FILL, ReadFor::Fill, |_| {}));
        assert!(template.read_later(page(128), FILL, ReadFor::Fill, |_| {}));
        assert!(template.read_later(page(500), PAGE, ReadFor::Demand, |_| {}));
        // Requested once more, by a fault with a vCPU that is blocked on it.
        assert!(template.read_later(page(128), FILL, ReadFor::Demand, |_| {}));
        for next in [500, 128, 64] {
            go.send(()).unwrap();
            assert_eq!(begun.recv_timeout(PATIENCE), Ok(page(next)));
        }
        drop(go);
    }

    #[test]
    fn one_read_is_for_all_who_wait_for_the_same_bytes() {
        let (template, begun, go) = stepped();
        let (done, all_done) = channel();
        let ask = |length, number| {
            let done = done.clone();
            let ended = move |bytes: ReadResult| done.send((number, bytes.unwrap().len())).unwrap();
            assert!(template.read_later(page(7), length, ReadFor::Demand, ended));
        };
        ask(PAGE, 0);
        begun.recv_timeout(PATIENCE).unwrap();
        ask(PAGE, 1);
        ask(PAGE, 2);
        // Other bytes, though they begin at the same place.
        ask(2 * PAGE, 3);
        assert_eq!(begun.recv_timeout(PATIENCE), Ok(page(7)));
        drop(go);
        let mut ended: Vec<_> = (0..4).map(|_| all_done.recv_timeout(PATIENCE).unwrap()).collect();
        ended.sort_unstable();
        assert_eq!(ended, [(0, PAGE), (1, PAGE), (2, PAGE), (3, 2 * PAGE)]);
        assert_eq!(template.slow_reads().reads, 2);
    }

    /// The bytes may have been read before the template changed, so that a later request gets a read that begins later.
    #[test]
    fn a_read_that_has_ended_is_for_nobody_who_asks_later() {
        let (template, begun, go) = stepped();
        let (done, ended) = channel();
        for _ in 0..2 {
            let done = done.clone();
            let ended_now = move |_| done.send(()).unwrap();
            assert!(template.read_later(page(7), PAGE, ReadFor::Demand, ended_now));
            assert_eq!(begun.recv_timeout(PATIENCE), Ok(page(7)));
            go.send(()).unwrap();
            ended.recv_timeout(PATIENCE).unwrap();
        }
    }

    #[test]
    fn the_last_thread_stays_until_the_template_is_dropped() {
        let (template, begun, go) = stepped();
        template.start_reader().unwrap();
        template.start_reader().unwrap();
        let readers = Arc::clone(&template.inner.slow_reads.readers);
        assert_eq!(readers.lock().threads, 1);
        drop(go);
        let (done, ended) = channel();
        assert!(template.read_later(page(0), FILL, ReadFor::Fill, move |_| done.send(()).unwrap()));
        ended.recv_timeout(PATIENCE).unwrap();
        let until = Instant::now() + PATIENCE;
        // One for the fill, which goes again, and one for demand.
        while readers.lock().threads > 1 || readers.lock().idle < 1 {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(begun.recv_timeout(PATIENCE), Ok(page(0)));
        let readers = {
            let weak = Arc::downgrade(&readers);
            drop(readers);
            weak
        };
        drop(template);
        // Each thread holds what the source says its reads to.
        assert_eq!(begun.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected));
        while readers.strong_count() > 0 {
            assert!(Instant::now() < until, "the thread does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
