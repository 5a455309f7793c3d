//! The session against a model of the kernel, whatever the order of events.

use std::collections::VecDeque;

use pagecast_uffd::{ByteLen, FaultFlags, HostAddr};
use proptest::prelude::*;

use super::*;
use crate::page::PageSize;
use crate::template::{Recording, Run, TemplateOffset, WorkingSet};

const PAGES: usize = 24;
const THREADS: usize = 4;
const BASE: u64 = 0x7000_0000;
const PAGE: u64 = PageSize::SMALLEST;
/// Two regions, apart in memory and the other way round in the template, so that nothing fits by chance.
const FIRST_REGION: usize = 10;
const GAP: u64 = 7 * PAGE;

/// The page of the model at this place, and its template offset.
fn address(page: usize) -> u64 {
    BASE + page as u64 * PAGE + if page < FIRST_REGION { 0 } else { GAP }
}

fn offset(page: usize) -> u64 {
    let moved = if page < FIRST_REGION {
        page + PAGES - FIRST_REGION
    } else {
        page - FIRST_REGION
    };
    moved as u64 * PAGE
}

/// The page of the model at this place in the template.
fn page_in_template(index: usize) -> usize {
    (0..PAGES)
        .find(|page| offset(*page) == index as u64 * PAGE)
        .expect("a page of the template")
}

fn page_of(address: HostAddr) -> usize {
    (0..PAGES)
        .find(|page| self::address(*page) == address.get())
        .expect("the address of a page")
}

/// How many faults have been read and not answered yet.
fn unanswered(session: &Session) -> usize {
    let waiting = |tracked: &TrackedRegion| {
        let pages = (0..tracked.region.pages()).map(PageIndex::new);
        pages.filter(|page| tracked.states.is_waiting(*page)).count()
    };
    session.ready.len()
        + session
            .regions
            .iter()
            .map(|(_, tracked)| waiting(tracked))
            .sum::<usize>()
}

fn regions() -> RegionMap {
    let region = |first: usize, end: usize| {
        let memory = HostRange::new(HostAddr::new(address(first)), ByteLen::new((end - first) as u64 * PAGE)).unwrap();
        Region::new(memory, TemplateOffset::new(offset(first)), PageSize::Small)
    };
    RegionMap::new(vec![region(FIRST_REGION, PAGES), region(0, FIRST_REGION)])
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    Absent,
    Template,
    Zeros,
}

/// A thread that gives a run of pages back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remover {
    /// Its event is unread.
    Queued,
    /// Its event was read, but it has not run since: the kernel still refuses installs.
    Read,
    /// It has run, and is about to drop the pages.
    Running,
}

/// A model of the kernel, as far as a page server can see it (`fs/userfaultfd.c`).
struct Kernel {
    memory: [Memory; PAGES],
    /// Pages that were dropped at least once: the template's bytes there are stale.
    dropped: [bool; PAGES],
    waiting: [Option<usize>; THREADS],
    faults: VecDeque<usize>,
    removers: Vec<(Remover, usize, usize)>,
    registered: [bool; PAGES],
    /// Pages that are zeros in the template.
    zeros: [bool; PAGES],
}

impl Kernel {
    fn new(zeros: [bool; PAGES]) -> Self {
        Self {
            memory: [Memory::Absent; PAGES],
            dropped: [false; PAGES],
            waiting: [None; THREADS],
            faults: VecDeque::new(),
            removers: Vec::new(),
            registered: [true; PAGES],
            zeros,
        }
    }

    fn touch(&mut self, thread: usize, page: usize) {
        if self.waiting[thread].is_some() {
            return;
        }
        match self.memory[page] {
            Memory::Absent if self.registered[page] => {
                self.waiting[thread] = Some(page);
                self.faults.push_back(page);
            }
            Memory::Absent => assert!(
                self.may_be_zeros(page),
                "page {page} reads as zeros for want of an install"
            ),
            Memory::Template => assert!(!self.dropped[page], "page {page} is stale"),
            Memory::Zeros => assert!(self.may_be_zeros(page), "page {page} lost its bytes"),
        }
    }

    /// Also during a removal: the removing thread cannot know when.
    fn may_be_zeros(&self, page: usize) -> bool {
        let mut removers = self.removers.iter();
        let being_removed = removers.any(|(_, first, count)| (*first..first + count).contains(&page));
        self.dropped[page] || self.zeros[page] || being_removed
    }

    fn is_changing(&self) -> bool {
        self.removers.iter().any(|(state, ..)| *state != Remover::Running)
    }

    fn remove(&mut self, first: usize, count: usize) {
        let end = (first + count).min(PAGES);
        if self.removers.len() >= 2 {
            return;
        }
        let mut from = first;
        while from < end {
            let registered = self.registered[from];
            let to = (from..end)
                .find(|page| self.registered[*page] != registered)
                .unwrap_or(end);
            if registered {
                // Each mapping is given back by itself.
                self.removers.push((Remover::Queued, from, to - from));
            } else {
                for page in from..to {
                    self.memory[page] = Memory::Absent;
                    self.dropped[page] = true;
                }
            }
            from = to;
        }
    }

    /// Lets a remover run on.
    fn run_remover(&mut self, which: usize) {
        if self.removers.is_empty() {
            return;
        }
        let which = which % self.removers.len();
        let (state, first, count) = self.removers[which];
        match state {
            Remover::Queued => {}
            Remover::Read => self.removers[which].0 = Remover::Running,
            Remover::Running => {
                for page in first..first + count {
                    self.memory[page] = Memory::Absent;
                    self.dropped[page] = true;
                }
                self.removers.remove(which);
            }
        }
    }

    /// One `read`: faults before removals, as the kernel does.
    fn read(&mut self) -> Vec<Event> {
        let mut events: Vec<Event> = self
            .faults
            .drain(..)
            .map(|page| {
                Event::PageFault(PageFault {
                    address: HostAddr::new(address(page)),
                    flags: FaultFlags::empty(),
                    thread: None,
                })
            })
            .collect();
        for (state, first, count) in &mut self.removers {
            if *state == Remover::Queued {
                *state = Remover::Read;
                // One event, though it may span both regions and the gap between.
                let end = HostAddr::new(address(*first + *count - 1) + PAGE);
                let range = HostRange::between(HostAddr::new(address(*first)), end).unwrap();
                events.push(Event::Remove(range));
            }
        }
        events
    }

    fn install(&mut self, first: usize, count: usize, what: Memory) -> Outcome {
        if self.is_changing() {
            return Outcome::Retry {
                installed: ByteLen::ZERO,
            };
        }
        if (first..first + count).any(|page| !self.registered[page]) {
            return Outcome::NotRegistered;
        }
        for done in 0..count {
            let page = first + done;
            if self.memory[page] != Memory::Absent {
                return if done == 0 {
                    Outcome::AlreadyPresent
                } else {
                    Outcome::Retry {
                        installed: ByteLen::new(done as u64 * PAGE),
                    }
                };
            }
            let what = if what == Memory::Template && self.zeros[page] {
                Memory::Zeros
            } else {
                what
            };
            if what == Memory::Template {
                assert!(!self.dropped[page], "stale bytes for page {page}");
                let being_dropped = self
                    .removers
                    .iter()
                    .any(|(state, first, count)| *state == Remover::Running && (*first..first + count).contains(&page));
                assert!(!being_dropped, "bytes for page {page}, whose removal was read");
            }
            self.memory[page] = what;
            self.wake(page);
        }
        Outcome::Installed
    }

    /// The page is put in place from elsewhere, without a wake.
    fn install_by_another(&mut self, page: usize) {
        if self.memory[page] == Memory::Absent && self.registered[page] && !self.is_changing() {
            let zeros = self.may_be_zeros(page);
            self.memory[page] = if zeros { Memory::Zeros } else { Memory::Template };
        }
    }

    fn wake(&mut self, page: usize) {
        for thread in 0..THREADS {
            if self.waiting[thread] == Some(page) {
                self.waiting[thread] = None;
                // It tries again, and faults again if the page is not there.
                self.touch(thread, page);
            }
        }
    }

    fn unregister(&mut self, first: usize, count: usize) {
        for page in first..first + count {
            self.registered[page] = false;
            // An unread fault is not reported any more.
            self.faults.retain(|fault| *fault != page);
            self.wake(page);
        }
    }
}

#[derive(Clone, Debug)]
enum Act {
    Touch(usize, usize),
    Remove(usize, usize),
    RunRemover(usize),
    InstallByAnother(usize),
    Read,
    Step,
    Release,
    BytesArrive(usize),
    Complete,
    Abandon,
    Fill(usize),
    Prefault,
    All,
    StopPrefault,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        6 => (0..THREADS, 0..PAGES).prop_map(|(thread, page)| Act::Touch(thread, page)),
        2 => (0..PAGES, 1..8usize).prop_map(|(first, count)| Act::Remove(first, count)),
        4 => (0..2usize).prop_map(Act::RunRemover),
        1 => (0..PAGES).prop_map(Act::InstallByAnother),
        4 => Just(Act::Read),
        6 => Just(Act::Step),
        2 => Just(Act::Release),
        2 => (0..8usize).prop_map(Act::BytesArrive),
        1 => Just(Act::Complete),
        1 => Just(Act::Abandon),
        3 => (0..8usize).prop_map(Act::Fill),
        1 => Just(Act::Prefault),
        1 => Just(Act::All),
        1 => Just(Act::StopPrefault),
    ];
    proptest::collection::vec(act, 0..300)
}

/// The driver of the session, like the server.
struct Driver {
    kernel: Kernel,
    session: Session,
    /// Whether a page's bytes are not there at the first request.
    slow: [bool; PAGES],
    awaited: Vec<Install>,
    /// Fills that were begun.
    fills: Vec<Fill>,
    /// The working set, if one is to be prefaulted.
    working_set: Arc<WorkingSet>,
    /// The most pages that are installed for one fault.
    fault_around: usize,
}

impl Driver {
    fn new(zeros: [bool; PAGES], slow: [bool; PAGES], order: &[usize]) -> Self {
        let mut recording = Recording::new(ByteLen::new(PAGES as u64 * PAGE));
        for page in order {
            recording.push(TemplateOffset::new(offset(*page)));
        }
        let mut session = Session::new(regions());
        let mut runs: Vec<Run> = Vec::new();
        for page in (0..PAGES).filter(|page| zeros[page_in_template(*page)]) {
            let at = page as u64 * PAGE;
            match runs.last_mut() {
                Some(run) if run.at.get() + run.len.get() == at => run.len = ByteLen::new(run.len.get() + PAGE),
                _ => runs.push(Run {
                    at: TemplateOffset::new(at),
                    len: ByteLen::new(PAGE),
                }),
            }
        }
        session.give_back = GiveBack::new(ZeroRuns::bounded(runs, 2, 3));
        Self {
            kernel: Kernel::new(zeros),
            session,
            slow,
            awaited: Vec::new(),
            fills: Vec::new(),
            working_set: Arc::new(WorkingSet::of(&recording)),
            fault_around: 1,
        }
    }

    fn act(&mut self, act: &Act) {
        match *act {
            Act::Touch(thread, page) => self.kernel.touch(thread, page),
            Act::Remove(first, count) => self.kernel.remove(first, count),
            Act::RunRemover(which) => self.kernel.run_remover(which),
            Act::InstallByAnother(page) => self.kernel.install_by_another(page),
            Act::Read => self.read(),
            Act::Step => {
                let step = self.session.next_step().unwrap();
                self.carry_out(step, true);
            }
            Act::Release => self.session.release_parked(),
            Act::BytesArrive(which) => {
                if !self.awaited.is_empty() {
                    let install = self.awaited.swap_remove(which % self.awaited.len());
                    let step = self.session.bytes_ready(install.at).unwrap();
                    self.carry_out(step, false);
                }
            }
            Act::Complete => self.session.begin_completion(false),
            // Not once it is all but complete.
            Act::Abandon if self.kernel.registered.contains(&true) => {
                self.session.abandon_completion();
                self.fills.clear();
            }
            Act::Abandon => {}
            Act::Fill(which) => self.fill(which),
            Act::Prefault => {
                let plan = PrefaultPlan::new(Arc::clone(&self.working_set), None);
                self.session.begin_working_set(Arc::new(plan));
            }
            Act::All => self.session.begin_all(),
            Act::StopPrefault => self.session.stop_prefault(),
        }
    }

    fn read(&mut self) {
        for event in self.kernel.read() {
            self.session.on_event(&event).unwrap();
        }
    }

    fn carry_out(&mut self, step: Option<Step>, may_wait: bool) {
        let install = match step {
            None => return,
            Some(Step::Wake(range)) => return self.kernel.wake(page_of(range.start())),
            Some(Step::Install(install)) => install,
        };
        let page = page_of(install.to.start());
        let what = match install.content {
            Content::Zeros => Memory::Zeros,
            Content::Template(from) => {
                assert_eq!(from.get(), offset(page), "bytes from the wrong place");
                if may_wait && self.slow[page] {
                    self.session.await_bytes(&install);
                    self.awaited.push(install);
                    return;
                }
                if self.install_around(&install) {
                    return self.install_ahead();
                }
                Memory::Template
            }
        };
        let outcome = self.kernel.install(page, 1, what);
        if let After::Wake(range) = self.session.on_outcome(&install, outcome) {
            self.kernel.wake(page_of(range.start()));
        }
        self.install_ahead();
    }

    /// Installs a page with its neighbours. Returns `false` if it is to be installed alone.
    fn install_around(&mut self, fault: &Install) -> bool {
        let zeros = self.kernel.zeros;
        let is_data = |at: TemplateOffset| !zeros[page_in_template(usize::try_from(at.get() / PAGE).unwrap())];
        let Some(install) = self.session.plan_around(fault, self.fault_around, is_data) else {
            return false;
        };
        let pages = page_of(install.to.start())..page_of(install.to.start()) + install.pages;
        assert!(pages.contains(&page_of(fault.to.start())));
        assert!(
            pages
                .filter(|page| *page != page_of(fault.to.start()))
                .all(|page| !zeros[page])
        );
        let outcome = self
            .kernel
            .install(page_of(install.to.start()), install.pages, Memory::Template);
        self.session.on_ahead(&install, outcome);
        outcome == Outcome::Installed
    }

    fn install_ahead(&mut self) {
        while let Some(install) = self.session.next_ahead() {
            let outcome = self
                .kernel
                .install(page_of(install.to.start()), install.pages, Memory::Template);
            self.session.on_ahead(&install, outcome);
        }
    }

    /// One turn of filling. Each fill that is begun is carried on with until it is done, among others.
    fn fill(&mut self, which: usize) {
        if let Some(range) = self.session.next_give_back() {
            let first = page_of(range.memory.start());
            self.kernel.unregister(first, range.pages);
            self.session.on_given_back(&range);
            return;
        }
        self.fills.extend(self.session.next_fill());
        if self.fills.is_empty() {
            if self.session.completion().is_some() {
                self.kernel.unregister(0, PAGES);
            }
            return;
        }
        let mut fill = self.fills.swap_remove(which % self.fills.len());
        for part in self.session.fill_parts(&fill) {
            if !self.fill_part(&mut fill, part) {
                break;
            }
        }
        if !self.session.fill_parts(&fill).is_empty() {
            self.fills.push(fill);
        }
    }

    fn fill_part(&mut self, fill: &mut Fill, part: Install) -> bool {
        let mut left = Some(part);
        while let Some(part) = left {
            let first = page_of(part.to.start());
            let Content::Template(from) = part.content else {
                panic!("a fill of zeros");
            };
            assert_eq!(from.get(), offset(first));
            let zeros = self.kernel.zeros[first];
            let pages = (first..first + part.pages)
                .take_while(|page| self.kernel.zeros[*page] == zeros)
                .count();
            let piece = part.truncated(pages);
            if zeros && fill.skips_zeros {
                fill.skip(&piece);
                left = part.after(pages);
                continue;
            }
            let outcome = self.kernel.install(first, pages, Memory::Template);
            match self.session.on_filled(fill, &piece, outcome) {
                (_, After::Done) => match outcome {
                    Outcome::NotRegistered if pages > 1 => return false,
                    Outcome::AlreadyPresent | Outcome::NotRegistered => left = part.after(1),
                    _ => left = part.after(pages),
                },
                (_, After::Parked) => return false,
                other => panic!("{other:?}"),
            }
        }
        true
    }

    /// Runs until no thread waits for anything.
    fn settle(&mut self) {
        for _ in 0..1000 {
            if self.kernel.waiting.iter().all(Option::is_none) && self.kernel.removers.is_empty() {
                return;
            }
            self.read();
            self.kernel.run_remover(0);
            self.act(&Act::BytesArrive(0));
            self.session.release_parked();
            while unanswered(&self.session) > self.awaited.len() + usize::from(self.session.has_parked()) {
                let before = unanswered(&self.session);
                self.act(&Act::Step);
                if self.session.has_parked() || unanswered(&self.session) == before {
                    break;
                }
            }
        }
        panic!("threads wait for ever: {:?}, {:?}", self.kernel.waiting, self.session);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Never a stale byte, never a byte from elsewhere, never a thread that waits for ever. A fork that is complete
    /// needs no server.
    #[test]
    fn whatever_happens_every_fault_is_answered_and_no_byte_is_wrong(
        acts in acts(),
        zeros in any::<[bool; PAGES]>(),
        slow in any::<[bool; PAGES]>(),
        completes in any::<bool>(),
        fault_around in 1..PAGES,
        order in proptest::collection::vec(0..PAGES, 0..PAGES),
    ) {
        let mut driver = Driver::new(zeros, slow, &order);
        driver.fault_around = fault_around;
        for act in &acts {
            driver.act(act);
        }
        driver.settle();
        if completes {
            driver.session.begin_completion(false);
            for _ in 0..100 {
                driver.fill(0);
            }
            prop_assert_eq!(driver.kernel.registered, [false; PAGES], "never complete");
        }
        // Every page can be read, and `touch` checks what is there.
        for page in 0..PAGES {
            driver.kernel.touch(page % THREADS, page);
            driver.settle();
        }
    }
}

fn fault(page: usize) -> Event {
    Event::PageFault(PageFault {
        address: HostAddr::new(address(page)),
        flags: FaultFlags::WRITE,
        thread: None,
    })
}

#[test]
fn a_fault_outside_every_region_is_a_violation() {
    let mut session = Session::new(regions());
    let outside = Event::PageFault(PageFault {
        address: HostAddr::new(address(FIRST_REGION) - PAGE),
        flags: FaultFlags::empty(),
        thread: None,
    });
    assert!(matches!(
        session.on_event(&outside),
        Err(Violation::FaultOutside { .. })
    ));
}

#[test]
fn a_fault_that_is_not_a_missing_page_is_a_violation() {
    let mut session = Session::new(regions());
    for flags in [
        FaultFlags::WRITE_PROTECT,
        FaultFlags::MINOR,
        FaultFlags::from_bits_retain(1 << 40),
    ] {
        let event = Event::PageFault(PageFault {
            address: HostAddr::new(address(0)),
            flags,
            thread: None,
        });
        assert!(
            matches!(session.on_event(&event), Err(Violation::NotMissing { .. })),
            "{flags:?}"
        );
    }
}

#[test]
fn a_page_that_keeps_faulting_though_installed_is_given_up_and_not_spun_on() {
    let mut session = Session::new(regions());
    session.on_event(&fault(3)).unwrap();
    let Some(Step::Install(install)) = session.next_step().unwrap() else {
        panic!("no install");
    };
    assert_eq!(session.on_outcome(&install, Outcome::Installed), After::Done);
    for _ in 0..MOST_REPEATS {
        session.on_event(&fault(3)).unwrap();
        assert_eq!(session.next_step(), Ok(Some(Step::Wake(install.to))));
    }
    session.on_event(&fault(3)).unwrap();
    assert!(matches!(session.next_step(), Err(Violation::PageLost { .. })));
}

#[test]
fn an_install_of_several_pages_ends_a_row_of_wakes_too() {
    let mut session = Session::new(regions());
    let mut answer = |page: usize| {
        session.on_event(&fault(page)).unwrap();
        match session.next_step().unwrap() {
            Some(Step::Install(install)) => match session.plan_around(&install, 8, |_| true) {
                Some(wide) => assert_eq!(session.on_ahead(&wide, Outcome::Installed), wide.pages),
                None => assert_eq!(session.on_outcome(&install, Outcome::Installed), After::Done),
            },
            Some(Step::Wake(_)) => {}
            None => panic!("no step"),
        }
        session.repeated
    };
    assert_eq!(answer(12), None);
    assert!(answer(12).is_some_and(|(_, times)| times == 1));
    assert_eq!(answer(13), None, "installed with its neighbour");
    assert!(answer(14).is_some_and(|(_, times)| times == 1), "it came with page 13");
    assert!(answer(14).is_some_and(|(_, times)| times == 2));
}

#[test]
fn a_thread_hit_by_signals_does_not_fill_our_queues() {
    let mut session = Session::new(regions());
    // All that one turn reads is answered in that turn, and a page that has to wait is waited for once.
    for _ in 0..3 {
        assert!(matches!(session.on_event(&fault(3)), Ok(Noted::Fault { .. })));
    }
    let Some(Step::Install(install)) = session.next_step().unwrap() else {
        panic!("no install");
    };
    session.await_bytes(&install);
    assert_eq!(session.next_step(), Ok(None));
    for _ in 0..1000 {
        assert_eq!(session.on_event(&fault(3)), Ok(Noted::SameFault));
    }
    assert_eq!(unanswered(&session), 1);
    assert_eq!(session.bytes_ready(install.at), Ok(Some(Step::Install(install))));
    assert_eq!(
        session.on_outcome(
            &install,
            Outcome::Retry {
                installed: ByteLen::ZERO
            }
        ),
        After::Parked
    );
    for _ in 0..1000 {
        assert_eq!(session.on_event(&fault(3)), Ok(Noted::SameFault));
    }
    assert_eq!(unanswered(&session), 1);
    session.release_parked();
    assert_eq!(session.next_step(), Ok(Some(Step::Install(install))));
    assert_eq!(session.on_outcome(&install, Outcome::Installed), After::Done);
    assert_eq!(unanswered(&session), 0);
}

#[test]
fn a_run_that_spans_two_mappings_is_filled_page_by_page() {
    let mut session = Session::new(regions());
    session.begin_completion(false);
    let mut fill = session.next_fill().unwrap();
    let [whole] = *session.fill_parts(&fill) else {
        panic!("several parts");
    };
    assert_eq!(whole.pages, FIRST_REGION);
    let refused = session.on_filled(&mut fill, &whole, Outcome::NotRegistered);
    assert_eq!(refused, (0, After::Done));
    let parts = session.fill_parts(&fill);
    let pages: Vec<usize> = parts.iter().map(|part| page_of(part.to.start())).collect();
    assert_eq!(pages, (0..FIRST_REGION).collect::<Vec<_>>());
    for part in &parts {
        assert_eq!(session.on_filled(&mut fill, part, Outcome::Installed), (1, After::Done));
    }
    assert!(session.fill_parts(&fill).is_empty());
    let next = session.next_fill().unwrap();
    assert_eq!(next.bytes() as u64, (PAGES - FIRST_REGION) as u64 * PAGE);
    assert!(session.next_fill().is_none());
}

#[test]
fn a_working_set_is_filled_in_first_touch_order_and_what_is_there_is_left_out() {
    let mut driver = Driver::new([false; PAGES], [false; PAGES], &[20, 3, 4, 21]);
    driver.session.begin_all();
    let plan = PrefaultPlan::new(Arc::clone(&driver.working_set), None);
    driver.session.begin_working_set(Arc::new(plan));
    driver.kernel.touch(0, 21);
    driver.read();
    driver.act(&Act::Step);
    let mut order = Vec::new();
    while let Some(mut fill) = driver.session.next_fill() {
        for part in driver.session.fill_parts(&fill) {
            order.push((page_of(part.to.start()), part.pages));
            assert!(driver.fill_part(&mut fill, part));
        }
    }
    // The working set, then the rest of each region.
    assert_eq!(order, [(20, 1), (3, 2), (0, 3), (5, 5), (10, 10), (22, 2)]);
    assert_eq!(driver.kernel.memory, [Memory::Template; PAGES]);
    assert!(driver.session.completion().is_none());
}

#[test]
fn zeros_are_not_given_back_where_a_fault_waits_or_a_page_is_there() {
    let mut driver = Driver::new([true; PAGES], [false; PAGES], &[]);
    driver.kernel.touch(0, 1);
    driver.kernel.touch(1, 15);
    driver.read();
    driver.act(&Act::Step);
    // Page 1 is there, page 15 is to be answered.
    assert_eq!(driver.session.next_give_back(), None);
    let Ok(Some(Step::Install(install))) = driver.session.next_step() else {
        panic!("no install");
    };
    let retry = Outcome::Retry {
        installed: ByteLen::ZERO,
    };
    assert_eq!(driver.session.on_outcome(&install, retry), After::Parked);
    // Now it waits.
    let mut given = Vec::new();
    while let Some(range) = driver.session.next_give_back() {
        given.push((page_of(range.memory.start()), range.pages));
        driver.session.on_given_back(&range);
    }
    assert_eq!(given, [(2, FIRST_REGION - 2)]);
    assert_eq!(unanswered(&driver.session), 1);
}
