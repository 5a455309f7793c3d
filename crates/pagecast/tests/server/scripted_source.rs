//! A template that is slow, stuck or broken where a test wants it to be.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use pagecast::template::{Page, PageSource, SourceError, TemplateOffset, ZeroMap};
use pagecast_testkit::template_file::{Expected, LAYOUT_PAGE, TemplateModel};
use pagecast_uffd::ByteLen;
use rustix::io::Errno as E;

/// How a page of 4 KiB is to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// At once.
    Ready,
    /// Never at once; reading it takes this long, every time.
    Slow(Duration),
    /// Never at once; reading it takes until the [gate](Script::open_gate) is open.
    Gated,
    /// Never at once, and reading it fails, for a reason that may pass.
    Broken,
    /// Never at once, and reading it fails `n` times, each time for another reason that may pass.
    Fails(u64),
    /// At once, after `n` tries that fail for reasons that may pass.
    FailsAtOnce(u64),
    /// At once, but "at once" takes until the gate is open. No source may do this; it holds a worker where a test wants
    /// it to be.
    HoldsWorker,
}

/// What a [`ScriptedSource`] does. Shared between the test and the template.
pub(crate) struct Script {
    model: TemplateModel,
    /// By the number of the page.
    access: Box<dyn Fn(u64) -> Access + Send + Sync>,
    gate: Mutex<bool>,
    opened: Condvar,
    /// Whether looking for zeros takes until the gate is open.
    pub(crate) zeros_gated: bool,
    /// How many times more it cannot be told whether the template has changed.
    pub(crate) failing_checks: AtomicU64,
    /// How often the pages that fail have failed.
    failures: Mutex<BTreeMap<u64, u64>>,
    reads: AtomicU64,
    holds: AtomicU64,
    /// Which pages of 4 KiB were read, slowly or at once, in this order.
    accesses: Mutex<Vec<Range<u64>>>,
    /// None of them is known to be zeros.
    zeros: ZeroMap,
    /// How often its zeros were looked through.
    zero_looks: AtomicU64,
}

impl Script {
    pub(crate) fn new(model: &TemplateModel, access: impl Fn(u64) -> Access + Send + Sync + 'static) -> Self {
        Self {
            model: model.clone(),
            access: Box::new(access),
            gate: Mutex::new(false),
            opened: Condvar::new(),
            zeros_gated: false,
            failing_checks: AtomicU64::new(0),
            failures: Mutex::new(BTreeMap::new()),
            reads: AtomicU64::new(0),
            holds: AtomicU64::new(0),
            accesses: Mutex::new(Vec::new()),
            zeros: ZeroMap::new(ByteLen::new(model.size)),
            zero_looks: AtomicU64::new(0),
        }
    }

    /// Lets go whatever waits at the gate, now and later.
    pub(crate) fn open_gate(&self) {
        *self.gate.lock().unwrap() = true;
        self.opened.notify_all();
    }

    /// How many slow reads have begun.
    pub(crate) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// How often a worker was held, or would have been were the gate not open.
    pub(crate) fn holds(&self) -> u64 {
        self.holds.load(Ordering::Relaxed)
    }

    /// Which pages were read, slowly or at once, in this order.
    pub(crate) fn accesses(&self) -> Vec<Range<u64>> {
        self.accesses.lock().unwrap().clone()
    }

    /// How often its zeros were looked through.
    pub(crate) fn zero_looks(&self) -> u64 {
        self.zero_looks.load(Ordering::SeqCst)
    }

    fn wait_at_gate(&self) {
        let gate = self.gate.lock().unwrap();
        drop(self.opened.wait_while(gate, |open| !*open).unwrap());
    }

    fn access_at(&self, at: TemplateOffset, buffer: &[u8]) -> impl Iterator<Item = Access> {
        let first = at.get() / LAYOUT_PAGE;
        let pages = first..first + buffer.len() as u64 / LAYOUT_PAGE;
        self.accesses.lock().unwrap().push(pages.clone());
        pages.map(|page| (self.access)(page))
    }

    /// Fails where the pages from `at` on have not failed so often yet.
    fn fail(&self, at: TemplateOffset, times: u64) -> Result<(), SourceError> {
        let mut failures = self.failures.lock().unwrap();
        let failed = failures.entry(at.get() / LAYOUT_PAGE).or_default();
        if *failed >= times {
            return Ok(());
        }
        *failed += 1;
        let errors = [E::IO, E::TIMEDOUT, E::STALE, E::NOTCONN, E::AGAIN, E::INTR, E::NOMEM];
        let error = errors[usize::try_from(at.get() / LAYOUT_PAGE + *failed).unwrap() % errors.len()];
        Err(SourceError::Io {
            at,
            source: error.into(),
        })
    }

    fn fill(&self, at: TemplateOffset, buffer: &mut [u8]) {
        let offsets = (at.get()..).step_by(usize::try_from(LAYOUT_PAGE).unwrap());
        for (page, offset) in buffer.chunks_mut(usize::try_from(LAYOUT_PAGE).unwrap()).zip(offsets) {
            match self.model.expected(offset) {
                Expected::Pattern(pattern) => pattern.fill(offset, page),
                Expected::Zero => page.fill(0),
            }
        }
    }
}

/// The template that a [`Script`] tells of.
pub(crate) struct ScriptedSource(pub(crate) Arc<Script>);

impl PageSource for ScriptedSource {
    fn len(&self) -> ByteLen {
        ByteLen::new(self.0.model.size)
    }

    fn try_read<'a>(&'a self, at: TemplateOffset, buffer: &'a mut [u8]) -> Result<Page<'a>, SourceError> {
        let accesses: Vec<Access> = self.0.access_at(at, buffer).collect();
        if accesses.contains(&Access::HoldsWorker) {
            self.0.holds.fetch_add(1, Ordering::Relaxed);
            self.0.wait_at_gate();
        }
        for access in &accesses {
            if let Access::FailsAtOnce(times) = access {
                self.0.fail(at, *times)?;
            }
        }
        if accesses
            .iter()
            .any(|access| !matches!(access, Access::Ready | Access::HoldsWorker | Access::FailsAtOnce(_)))
        {
            return Ok(Page::NotReady);
        }
        self.0.fill(at, buffer);
        Ok(Page::Bytes(buffer))
    }

    fn read(&self, at: TemplateOffset, buffer: &mut [u8]) -> Result<(), SourceError> {
        self.0.reads.fetch_add(1, Ordering::Relaxed);
        for access in self.0.access_at(at, buffer).collect::<Vec<_>>() {
            match access {
                Access::Ready | Access::FailsAtOnce(_) => {}
                Access::Fails(times) => self.0.fail(at, times)?,
                Access::Slow(time) => std::thread::sleep(time),
                Access::Gated | Access::HoldsWorker => self.0.wait_at_gate(),
                Access::Broken => {
                    let source = std::io::Error::other("scripted to fail");
                    return Err(SourceError::Io { at, source });
                }
            }
        }
        self.0.fill(at, buffer);
        Ok(())
    }

    fn check_unchanged(&self) -> Result<(), SourceError> {
        let one_less = |left: u64| left.checked_sub(1);
        let failing = &self.0.failing_checks;
        match failing.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less) {
            Ok(_) => Err(SourceError::Io {
                at: TemplateOffset::new(0),
                source: E::STALE.into(),
            }),
            Err(_) => Ok(()),
        }
    }

    fn zeros(&self) -> &ZeroMap {
        self.0.zero_looks.fetch_add(1, Ordering::SeqCst);
        &self.0.zeros
    }

    fn find_zeros(&self, _at: TemplateOffset, _len: ByteLen) -> Result<(), SourceError> {
        if self.0.zeros_gated {
            self.0.wait_at_gate();
        }
        Ok(())
    }
}
