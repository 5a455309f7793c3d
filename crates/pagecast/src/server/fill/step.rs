//! A bounded step of filling one fork, carried out by one or more threads.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use pagecast_uffd::Uffd;

use super::installer::{Done, Installer};
use super::pool::FillThreads;
use crate::server::read_buffer::ReadBuffer;
use crate::session::{Fill, Install};
use crate::template::Template;

thread_local! {
    /// Each filling thread has its own.
    static BUFFER: RefCell<ReadBuffer> = const { RefCell::new(ReadBuffer::new()) };
}

/// Fills to install. It has all data that it needs, so it needs neither its fork nor its worker.
pub(in crate::server) struct FillStep {
    pub(in crate::server) uffd: Arc<Uffd>,
    /// The process id of the VMM.
    pub(in crate::server) pid: i32,
    pub(in crate::server) template: Template,
    pub(in crate::server) fills: Vec<Fill>,
    /// The parts of each fill that are still to be installed.
    pub(in crate::server) parts: Vec<Vec<Install>>,
    /// The bytes of the only fill, if they were read on another thread.
    pub(in crate::server) bytes: Option<Arc<Vec<u8>>>,
    /// The generation of the fills: those of an earlier one are not continued.
    pub(in crate::server) generation: u64,
}

/// The result of a step.
pub(in crate::server) struct Filled {
    pub(in crate::server) begun: Instant,
    pub(in crate::server) done: Vec<(Fill, Vec<Done>)>,
    /// The fills that were not begun.
    pub(in crate::server) left: Vec<Fill>,
    pub(in crate::server) generation: u64,
}

impl FillStep {
    /// Installs the fills, on this thread and `others`. Stops early, after a fill, if `is_interrupted` says
    /// so.
    pub(in crate::server) fn carry_out(
        self,
        others: &FillThreads<'_>,
        zeros: &[u8],
        is_interrupted: impl Fn() -> bool + Sync,
    ) -> Filled {
        let begun = Instant::now();
        let threads = 1 + others.count();
        let zeros_are_known = self.template.zeros_are_known();
        let ended = AtomicBool::new(false);
        let (step, ended, is_interrupted) = (&self, &ended, &is_interrupted);
        let work = (0..threads).map(|number| {
            move || {
                let mut buffer = BUFFER.take();
                let mut installer = Installer {
                    uffd: &step.uffd,
                    pid: step.pid,
                    source: step.template.source(),
                    mapping: step.template.mapping(),
                    zeros_are_known,
                    zeros,
                    buffer: &mut buffer,
                };
                let mut all_done = Vec::new();
                let pieces = step.fills.iter().zip(&step.parts).enumerate();
                for (index, (fill, parts)) in pieces.skip(number).step_by(threads) {
                    let done = installer.carry_out(fill, parts, step.bytes.as_deref().map(Vec::as_slice));
                    // The fills after a stuck one would fail too. A demand fault goes first; one thread checks for all.
                    let is_stuck = done.last().is_some_and(Done::is_stuck);
                    all_done.push((index, done));
                    if is_stuck || (number == 0 && is_interrupted()) {
                        ended.store(true, Ordering::Relaxed);
                    }
                    if ended.load(Ordering::Relaxed) {
                        break;
                    }
                }
                BUFFER.set(buffer);
                all_done
            }
        });
        let mut all_done: Vec<_> = others.run(work.collect()).into_iter().flatten().collect();
        // Fills that were not begun are next.
        all_done.sort_unstable_by_key(|(index, _)| *index);
        let mut all_done = all_done.into_iter().peekable();
        let mut filled = Filled {
            begun,
            done: Vec::new(),
            left: Vec::new(),
            generation: self.generation,
        };
        for (index, fill) in self.fills.into_iter().enumerate() {
            match all_done.next_if(|(done, _)| *done == index) {
                Some((_, done)) => filled.done.push((fill, done)),
                None => filled.left.push(fill),
            }
        }
        filled
    }
}
