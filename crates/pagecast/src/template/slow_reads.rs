//! Reads that may block, away from the fault path.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Inner;
use super::source::{SourceError, TemplateOffset};

/// The most threads that read one template at once. Each template has its own, so one that hangs (a network file system)
/// holds up no other.
const MOST_THREADS: usize = 4;

/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(2);

/// What to do with the bytes, or with the reason why there are none. Runs on a reading thread.
type Done = Box<dyn FnOnce(Result<Vec<u8>, SourceError>) + Send>;

/// The threads that read one template, and what waits for them. Threads come with the first request and go when idle.
#[derive(Default)]
pub(super) struct SlowReads {
    state: Mutex<State>,
    work: Condvar,
    /// No thread reads.
    quiet: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Request>,
    threads: usize,
    idle: usize,
    /// How many threads are at a request.
    reading: usize,
    stats: SlowReadStats,
}

/// What was read of a template away from the fault path, because it was not in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlowReadStats {
    /// Reads that have ended, well or not.
    pub reads: u64,
    /// Those of them that failed.
    pub failed: u64,
    /// Bytes that the others gave.
    pub bytes: u64,
    /// What all of them took together; several are under way at once.
    pub time: Duration,
}

struct Request {
    at: TemplateOffset,
    length: usize,
    done: Done,
}

impl SlowReads {
    /// Reads `length` bytes from `at` on and hands them to `done`, in the order of the calls.
    pub(super) fn submit(template: &Arc<Inner>, at: TemplateOffset, length: usize, done: Done) {
        let reads = &template.slow_reads;
        let mut state = reads.lock();
        state.queue.push_back(Request { at, length, done });
        // A thread that was woken is idle until it runs, so each can be counted on once.
        if state.queue.len() <= state.idle {
            reads.work.notify_one();
            return;
        }
        if state.threads < MOST_THREADS {
            let template = Arc::clone(template);
            let spawned = std::thread::Builder::new()
                .name("pagecast-read".to_owned())
                .spawn(move || serve(&template));
            match spawned {
                Ok(_) => state.threads += 1,
                // Others will get to it. Without any, it must not wait for ever.
                Err(error) if state.threads == 0 => {
                    if let Some(request) = state.queue.pop_back() {
                        drop(state);
                        (request.done)(Err(SourceError::Io { at, source: error }));
                    }
                }
                Err(_) => {}
            }
        }
    }

    /// A request that [`next`](Self::next) gave has been read, and gave so many bytes or failed.
    fn finished(&self, bytes: Option<usize>, time: Duration) {
        let mut state = self.lock();
        state.reading -= 1;
        state.stats.reads += 1;
        state.stats.failed += u64::from(bytes.is_none());
        state.stats.bytes += bytes.unwrap_or(0) as u64;
        state.stats.time += time;
        if state.reading == 0 {
            self.quiet.notify_all();
        }
    }

    /// Waits until no thread reads; `false` where one still does.
    pub(super) fn wait(&self, until: Instant) -> bool {
        let mut state = self.lock();
        while state.reading > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return false;
            }
            let (woken, _) = self
                .quiet
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
        }
        true
    }

    pub(super) fn stats(&self) -> SlowReadStats {
        self.lock().stats
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next request, or `None` after some time without any: the calling thread is then no longer counted.
    fn next(&self) -> Option<Request> {
        let mut state = self.lock();
        loop {
            if let Some(request) = state.queue.pop_front() {
                state.reading += 1;
                return Some(request);
            }
            state.idle += 1;
            let (woken, timeout) = self
                .work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if timeout.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return None;
            }
        }
    }
}

fn serve(template: &Inner) {
    // A worker has made this thread, and may be raised.
    #[cfg(target_os = "linux")]
    crate::priority::reset();
    while let Some(Request { at, length, done }) = template.slow_reads.next() {
        let begun = Instant::now();
        let bytes = read(template, at, length);
        template
            .slow_reads
            .finished(bytes.as_ref().ok().map(Vec::len), begun.elapsed());
        done(bytes);
    }
}

fn read(template: &Inner, at: TemplateOffset, length: usize) -> Result<Vec<u8>, SourceError> {
    template.check_not_withdrawn()?;
    let mut bytes = vec![0; length];
    template.source.read(at, &mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use pagecast_uffd::ByteLen;

    use super::*;
    use crate::Template;
    use crate::template::{Page, PageSource};

    /// A template that reads at once.
    struct Quick;

    impl PageSource for Quick {
        fn len(&self) -> ByteLen {
            ByteLen::new(1 << 20)
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
        fn is_known_zero(&self, _: TemplateOffset, _: ByteLen) -> bool {
            false
        }
        fn find_zeros(&self, _: TemplateOffset, _: ByteLen) -> Result<(), SourceError> {
            Ok(())
        }
    }

    /// It may be stuck in its read by then, which must hold up nobody else.
    #[test]
    fn an_idle_thread_is_counted_on_for_one_read_only() {
        let template = Template::from_source(Quick);
        {
            // One that was woken and does not come to run.
            let mut state = template.inner.slow_reads.lock();
            state.threads = 1;
            state.idle = 1;
        }
        let (done, all_done) = channel();
        for number in 0..2 {
            let done = done.clone();
            template.read_later(TemplateOffset::new(0), 4096, move |_| done.send(number).unwrap());
        }
        drop(done);
        let patience = Duration::from_secs(30);
        assert_eq!(all_done.recv_timeout(patience), Ok(0));
        assert_eq!(all_done.recv_timeout(patience), Ok(1));
    }
}
