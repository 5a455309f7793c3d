//! Lines on standard error that never block the thread that writes them.
//!
//! A full pipe blocks its writer. So a bounded queue and a thread of its own take the lines from threads that serve,
//! guard, answer or stop. Lines are dropped and counted if the queue is full.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, Write};
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::fmt::MakeWriter;

/// Most lines that wait for the reader of standard error.
const QUEUED_LINES: usize = 2048;

/// Time that [`finish`] gives the reader for the remaining lines. The guard of `tracing-appender` needs 1.1 s at most.
const FINISH_PATIENCE: Duration = Duration::from_millis(1500);

/// The queue of this process, if it was started.
static QUEUE: OnceLock<Queue> = OnceLock::new();

/// Starts the thread that writes lines to standard error, once a process. After that [`write_line`] and [`Lines`] do
/// not block. `told` makes the line, with its line feed, that reports the number of dropped lines. It is written when
/// the queue is empty again.
pub fn start(told: impl Fn(u64) -> Vec<u8> + Send + 'static) {
    QUEUE.get_or_init(|| Queue::start(Unlocked, QUEUED_LINES, told));
}

/// Writes a line, which ends with a line feed, to standard error: through the queue if it was started, else at once. Errors
/// are ignored, since a server goes on without a reader of its lines.
pub fn write_line(line: &[u8]) {
    let _ = Lines.write_all(line);
}

/// Number of lines that were dropped because the queue was full, or because they could not be written.
pub fn dropped_lines() -> u64 {
    QUEUE.get().map_or(0, |queue| queue.lost.lines())
}

/// Waits until the lines in the queue are written, 1.5 s at most, and stops the thread. Lines that come later are dropped.
pub fn finish() {
    if let Some(queue) = QUEUE.get() {
        queue.finish();
    }
}

/// Describes a panic: the thread, the place, the message, and a backtrace if `RUST_BACKTRACE` asks for one.
pub fn describe_panic(panic: &PanicHookInfo<'_>) -> String {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("without a name");
    let message = panic.payload_as_str().unwrap_or("no message");
    let place = panic.location().map(|place| format!(" at {place}")).unwrap_or_default();
    let backtrace = Backtrace::capture();
    let backtrace = match backtrace.status() {
        BacktraceStatus::Captured => format!("\n{backtrace}"),
        _ => String::new(),
    };
    format!("thread {name} panicked{place}: {message}{backtrace}")
}

/// Standard error through the queue; each write is a line. It blocks only if the queue was not started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match QUEUE.get() {
            Some(queue) => queue.lines.clone().write(line),
            None => io::stderr().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}

struct Queue {
    lines: NonBlocking,
    lost: Arc<Lost>,
    /// Stops the thread when it is dropped.
    guard: Mutex<Option<WorkerGuard>>,
}

impl Queue {
    fn start(to: impl Write + Send + 'static, limit: usize, told: impl Fn(u64) -> Vec<u8> + Send + 'static) -> Self {
        let lost = Arc::<Lost>::default();
        let writer = Writer {
            to,
            lost: Arc::clone(&lost),
            told_lines: 0,
            told,
        };
        let (lines, guard) = NonBlockingBuilder::default()
            .buffered_lines_limit(limit)
            .lossy(true)
            .thread_name("stderr")
            .finish(writer);
        // The first line comes after this.
        let _ = lost.no_room.set(lines.error_counter());
        Self {
            lines,
            lost,
            guard: Mutex::new(Some(guard)),
        }
    }

    /// If the queue is full, the guard prints that to standard output, which can block, too. So it is dropped on a
    /// thread of its own.
    fn finish(&'static self) {
        let (finished, is_finished) = mpsc::channel();
        let spawned = std::thread::Builder::new()
            .name("stderr-end".to_owned())
            .spawn(move || {
                drop(self.guard.lock().unwrap_or_else(PoisonError::into_inner).take());
                let _ = finished.send(());
            });
        if spawned.is_ok() {
            let _ = is_finished.recv_timeout(FINISH_PATIENCE);
        }
    }
}

/// Counts of lost lines.
#[derive(Default)]
struct Lost {
    /// Lines dropped because the queue was full.
    no_room: OnceLock<ErrorCounter>,
    /// Lines that could not be written: the reader has gone, or a disk is full.
    failed: AtomicU64,
}

impl Lost {
    fn lines(&self) -> u64 {
        let no_room = self.no_room.get().map_or(0, ErrorCounter::dropped_lines);
        self.failed.load(Ordering::Relaxed) + no_room as u64
    }
}

/// The writer in the thread of a queue.
struct Writer<W, F> {
    to: W,
    lost: Arc<Lost>,
    /// Lost lines that were already reported.
    told_lines: u64,
    told: F,
}

impl<W: Write, F: Fn(u64) -> Vec<u8>> Write for Writer<W, F> {
    /// A line that cannot be written is counted; an error would make `tracing-appender` skip the flush.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.to.write_all(line).is_err() {
            self.lost.failed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    /// Called when the queue is empty.
    fn flush(&mut self) -> io::Result<()> {
        let lost = self.lost.lines();
        if lost > self.told_lines && self.to.write_all(&(self.told)(lost - self.told_lines)).is_ok() {
            self.told_lines = lost;
        }
        Ok(())
    }
}

/// Standard error without the lock of `std`, which would block other threads while a write blocks.
struct Unlocked;

impl Write for Unlocked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        loop {
            match rustix::io::write(&stderr, bytes) {
                // Another process has made the pipe or terminal non-blocking.
                Err(Errno::AGAIN) => drop(poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], None)?),
                written => return Ok(written?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, PipeReader};
    use std::time::Instant;

    use super::*;

    /// A queue of `limit` lines whose pipe is full of empty lines, and the pipe.
    fn stuck(limit: usize) -> (&'static Queue, BufReader<PipeReader>) {
        let (reader, mut writer) = io::pipe().unwrap();
        let size = rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
        writer.write_all(&vec![b'\n'; size]).unwrap();
        let queue = Queue::start(writer, limit, |lines| format!("lost {lines}\n").into_bytes());
        (Box::leak(Box::new(queue)), BufReader::new(reader))
    }

    fn write(queue: &Queue, lines: usize) {
        for line in 0..lines {
            queue
                .lines
                .clone()
                .write_all(format!("line {line}\n").as_bytes())
                .unwrap();
        }
    }

    #[test]
    fn lines_for_which_there_is_no_room_are_counted_and_told_after_those_that_were_kept() {
        let (queue, reader) = stuck(10);
        write(queue, 100);
        let dropped = queue.lost.lines();
        // The thread may hold one line more.
        assert!((89..=90).contains(&dropped), "{dropped}");
        let mut lines = reader.lines().map(Result::unwrap).filter(|line| !line.is_empty());
        // Which lines are kept depends on when the thread takes its first one.
        for _ in 0..100 - dropped {
            let line = lines.next().unwrap();
            assert!(line.starts_with("line "), "{line}");
        }
        assert_eq!(lines.next().unwrap(), format!("lost {dropped}"));
        // Reported once.
        write(queue, 1);
        queue.finish();
        assert_eq!(lines.next().unwrap(), "line 0");
        assert_eq!(queue.lost.lines(), dropped);
    }

    #[test]
    fn a_line_that_cannot_be_written_is_counted() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let queue: &'static Queue = Box::leak(Box::new(Queue::start(writer, 10, |_| Vec::new())));
        write(queue, 3);
        queue.finish();
        assert_eq!(queue.lost.lines(), 3);
    }

    #[test]
    fn the_end_writes_the_lines_that_are_left() {
        let (reader, writer) = io::pipe().unwrap();
        let queue: &'static Queue = Box::leak(Box::new(Queue::start(writer, 1000, |_| Vec::new())));
        write(queue, 1000);
        queue.finish();
        let last = BufReader::new(reader).lines().map(Result::unwrap).nth(999).unwrap();
        assert_eq!(last, "line 999");
    }

    #[test]
    fn the_end_waits_no_longer_than_its_patience_for_a_reader_that_does_not_read() {
        for lines in [1, 100] {
            let (queue, _reader) = stuck(10);
            write(queue, lines);
            let started = Instant::now();
            queue.finish();
            // Long enough for a busy machine, but bounded.
            assert!(started.elapsed() < FINISH_PATIENCE + Duration::from_secs(30));
        }
    }
}
