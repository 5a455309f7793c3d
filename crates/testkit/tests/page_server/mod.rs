//! The smallest page server that a simulated VMM can be tested with: one VMM, one thread, flaws on demand.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use pagecast_testkit::template_file::TemplateFile;
use pagecast_uffd::{ByteLen, Event, FaultFlags, HostAddr, HostRange, Outcome, PageFault, Uffd, fd_passing};
use rustix::event::{PollFd, PollFlags};
use rustix::time::Timespec;

/// What it does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    None,
    /// Inverts the byte at this offset of the template.
    FlipByte {
        offset: u64,
    },
    /// Answers faults on removed pages with what the template has.
    ForgetRemovals,
    /// Looks at what is removed when it reads a fault, not when it answers it. The kernel may hand out a fault before an
    /// older removal.
    DecideEarly,
    /// Takes every write to an absent page for one to a removed page.
    ZerosForWrites,
    /// Answers nothing.
    IgnoreFaults,
}

/// How long what was decided early is not carried out, or a removal would hardly ever come in between on a busy machine.
const DECIDED_FOR: Duration = Duration::from_millis(1);

/// Why it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The VMM's end of the socket is closed.
    HungUp,
    /// A fault that is in no region.
    FaultOutside,
    /// The test is over.
    Stopped,
}

pub(crate) struct PageServer {
    directory: tempfile::TempDir,
    shared: Arc<Shared>,
    first_fault: mpsc::Receiver<()>,
    ending: mpsc::Receiver<Ending>,
    /// Closing it stops the server.
    stop: Mutex<Option<UnixStream>>,
}

#[derive(Default)]
struct Shared {
    faults: AtomicU64,
    first_region_base: AtomicU64,
}

struct Session {
    uffd: Uffd,
    regions: Vec<ServedRegion>,
    template: File,
    flaw: Flaw,
    removed: BTreeSet<u64>,
    /// Faults the kernel did not let us answer yet.
    parked: Vec<Fault>,
}

#[derive(Clone, Copy)]
struct Fault {
    fault: PageFault,
    /// Whether its page had been removed when it was read.
    removed_before: bool,
}

#[derive(serde::Deserialize)]
struct ServedRegion {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size_kib: u64,
}

#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Handshake {
    Array(Vec<ServedRegion>),
    Object { mappings: Vec<ServedRegion> },
}

impl PageServer {
    pub(crate) fn start(template: &TemplateFile, flaw: Flaw) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        let template = File::open(template.path()).unwrap();
        let shared = Arc::new(Shared::default());
        let (stop, stopped) = UnixStream::pair().unwrap();
        let (fault_seen, first_fault) = mpsc::channel();
        let (ended, ending) = mpsc::channel();
        let counters = Arc::clone(&shared);
        std::thread::spawn(move || {
            let ending = serve(&listener, &stopped, template, flaw, &counters, &fault_seen);
            // The test may have gone.
            let _ = ended.send(ending);
        });
        Self {
            directory,
            shared,
            first_fault,
            ending,
            stop: Mutex::new(Some(stop)),
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        Path::join(self.directory.path(), "s")
    }

    pub(crate) fn faults(&self) -> u64 {
        self.shared.faults.load(Ordering::Relaxed)
    }

    pub(crate) fn first_region_base(&self) -> u64 {
        self.shared.first_region_base.load(Ordering::Relaxed)
    }

    pub(crate) fn wait_for_a_fault(&self) {
        self.first_fault.recv().unwrap();
    }

    pub(crate) fn wait(&self) -> Ending {
        self.ending.recv().unwrap()
    }

    pub(crate) fn stop(&self) {
        self.stop.lock().unwrap().take();
    }
}

fn serve(
    listener: &UnixListener,
    stopped: &UnixStream,
    template: File,
    flaw: Flaw,
    shared: &Shared,
    fault_seen: &mpsc::Sender<()>,
) -> Ending {
    let mut either = [
        PollFd::new(listener, PollFlags::IN),
        PollFd::new(stopped, PollFlags::IN),
    ];
    rustix::event::poll(&mut either, None).unwrap();
    if !either[1].revents().is_empty() {
        return Ending::Stopped;
    }
    let (connection, _) = listener.accept().unwrap();
    let (regions, uffd) = receive_handshake(&connection);
    shared
        .first_region_base
        .store(regions[0].base_host_virt_addr, Ordering::Relaxed);
    let mut session = Session {
        uffd: Uffd::from_received(uffd).unwrap(),
        regions,
        template,
        flaw,
        removed: BTreeSet::new(),
        parked: Vec::new(),
    };
    loop {
        let pause = Timespec {
            tv_sec: 0,
            tv_nsec: 200_000,
        };
        let mut ready = [
            PollFd::new(&session.uffd, PollFlags::IN),
            PollFd::new(&connection, PollFlags::IN),
            PollFd::new(stopped, PollFlags::IN),
        ];
        rustix::event::poll(&mut ready, (!session.parked.is_empty()).then_some(&pause)).unwrap();
        let [_, hung_up, stop] = ready.map(|fd| !fd.revents().is_empty());
        if stop {
            return Ending::Stopped;
        }
        if hung_up {
            return Ending::HungUp;
        }
        let faults = session.read_events();
        shared.faults.fetch_add(faults.len() as u64, Ordering::Relaxed);
        if !faults.is_empty() {
            let _ = fault_seen.send(());
        }
        if flaw == Flaw::IgnoreFaults {
            continue;
        }
        if flaw == Flaw::DecideEarly {
            std::thread::sleep(DECIDED_FOR);
        }
        for fault in std::mem::take(&mut session.parked).into_iter().chain(faults) {
            if let Some(ending) = session.answer(fault) {
                return ending;
            }
        }
    }
}

fn receive_handshake(connection: &UnixStream) -> (Vec<ServedRegion>, OwnedFd) {
    let mut message = Vec::new();
    let mut fds = Vec::new();
    loop {
        rustix::event::poll(&mut [PollFd::new(connection, PollFlags::IN)], None).unwrap();
        let mut buffer = [0; 4096];
        let received = fd_passing::receive(connection.as_fd(), &mut buffer, &mut fds).unwrap();
        assert_ne!(received.bytes, 0, "the handshake was cut off");
        message.extend_from_slice(&buffer[..received.bytes]);
        match serde_json::from_slice(&message) {
            Ok(Handshake::Array(regions) | Handshake::Object { mappings: regions }) => {
                return (regions, fds.pop().unwrap());
            }
            Err(error) => assert!(error.is_eof(), "{error}"),
        }
    }
}

impl Session {
    /// Reads all there is, applies removals, and returns the faults.
    fn read_events(&mut self) -> Vec<Fault> {
        let mut events = pagecast_uffd::EventBuffer::new();
        while self.uffd.read_events(&mut events).unwrap() == pagecast_uffd::Drained::NotYet {}
        let mut faults = Vec::new();
        for event in events.drain() {
            match event {
                Event::PageFault(fault) => faults.push(Fault {
                    fault,
                    removed_before: self.removed.contains(&self.page_of(fault)),
                }),
                Event::Remove(range) => {
                    let page_size = usize::try_from(self.regions[0].page_size_kib).unwrap();
                    let pages = (range.start().get()..range.end().get()).step_by(page_size);
                    self.removed.extend(pages);
                }
                other => panic!("an unexpected event: {other:?}"),
            }
        }
        faults
    }

    /// The address of the page of a fault. All regions have pages of one size.
    fn page_of(&self, fault: PageFault) -> u64 {
        let page_size = self.regions[0].page_size_kib;
        fault.address.get() / page_size * page_size
    }

    fn answer(&mut self, pending: Fault) -> Option<Ending> {
        let Fault { fault, removed_before } = pending;
        let page_size = self.regions[0].page_size_kib;
        let address = self.page_of(fault);
        let Some(region) = self
            .regions
            .iter()
            .find(|region| (region.base_host_virt_addr..region.base_host_virt_addr + region.size).contains(&address))
        else {
            return Some(Ending::FaultOutside);
        };
        let offset = address - region.base_host_virt_addr + region.offset;
        let removed = match self.flaw {
            Flaw::ForgetRemovals => false,
            Flaw::DecideEarly => removed_before,
            _ => self.removed.contains(&address),
        };
        let mistaken = self.flaw == Flaw::ZerosForWrites && fault.flags.contains(FaultFlags::WRITE);
        let mut page = vec![0; usize::try_from(page_size).unwrap()];
        if !removed && !mistaken {
            self.template.read_exact_at(&mut page, offset).unwrap();
        }
        if let Flaw::FlipByte { offset: wrong } = self.flaw
            && (offset..offset + page_size).contains(&wrong)
        {
            page[usize::try_from(wrong - offset).unwrap()] ^= 0xff;
        }
        let to = HostAddr::new(address);
        match self.uffd.copy(to, &page) {
            // Of a VMM that is gone its socket will tell.
            Outcome::Installed | Outcome::PeerGone => {}
            Outcome::AlreadyPresent => self
                .uffd
                .wake(HostRange::new(to, ByteLen::new(page_size)).unwrap())
                .unwrap(),
            Outcome::Retry { .. } => self.parked.push(pending),
            other => panic!("an install came to {other:?}"),
        }
        None
    }
}
