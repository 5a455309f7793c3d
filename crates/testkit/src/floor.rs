//! The smallest page servers that could do the same job: what others are measured against.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use pagecast_uffd::{Event, EventBuffer, HostAddr, Outcome, Uffd, fd_passing};
use rustix::fs::OFlags;
use serde::Deserialize;

const PAGE: u64 = 4096;

/// What a floor does when a fault comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// A blocking `read` of a fault, `UFFDIO_COPY` of one page from memory, again. It is also what Firecracker's example
    /// of a handler does on demand, less a `poll` before each read and with the bytes at hand rather than in a mapped file.
    Demand,
    /// At the first fault `UFFDIO_COPY` of all that the guest has, in one call: the strategy of Firecracker's other
    /// example, which gives every page at once.
    AllAtFirstFault,
}

/// A bare loop for each VMM, on a thread of its own. It checks nothing, counts nothing, knows no removal and never ends: its
/// threads stay blocked in `read` until this process exits.
#[derive(Debug)]
pub struct Floor {
    socket: PathBuf,
    accepting: JoinHandle<()>,
}

#[derive(Deserialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
}

impl Floor {
    /// Serves the mem-file at `template` on demand, to as many as `vmms` VMMs at `socket`. The file is read into memory
    /// first.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or the socket not be bound.
    pub fn start(socket: &Path, template: &Path, vmms: usize) -> Result<Self> {
        Self::start_with(Strategy::Demand, socket, &read(template)?, vmms)
    }

    /// The same with another strategy, and a template that is in memory already.
    ///
    /// # Errors
    ///
    /// The socket cannot be bound.
    pub fn start_with(strategy: Strategy, socket: &Path, template: &Arc<[u8]>, vmms: usize) -> Result<Self> {
        let template = Arc::clone(template);
        let listener = bind(socket)?;
        let accepting = std::thread::spawn(move || {
            for _ in 0..vmms {
                let template = Arc::clone(&template);
                let served = accept(&listener).map(|(uffd, regions)| {
                    std::thread::spawn(move || serve(strategy, &uffd, &regions, &template));
                });
                if let Err(error) = served {
                    eprintln!("the floor cannot serve a VMM: {error:#}");
                }
            }
        });
        Ok(Self {
            socket: socket.to_owned(),
            accepting,
        })
    }

    /// Where VMMs connect.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits until as many VMMs as it was made for have shaken hands.
    pub fn wait_until_all_have_connected(self) {
        // It reports what goes wrong by itself.
        let _ = self.accepting.join();
    }
}

/// One thread that copies a whole template into a VMM as fast as `UFFDIO_COPY` goes, without a fault: what bulk prefault is
/// measured against.
#[derive(Debug)]
pub struct BulkCopy {
    copying: JoinHandle<Result<Copied>>,
}

/// A whole template was copied.
#[derive(Clone, Copy, Debug)]
pub struct Copied {
    /// How much.
    pub bytes: u64,
    /// From the first call of `UFFDIO_COPY` to the end of the last.
    pub took: Duration,
}

impl BulkCopy {
    /// Waits for a VMM at `socket` and copies `template` into it, `chunk` bytes (whole pages) a call.
    ///
    /// # Errors
    ///
    /// The socket cannot be bound.
    pub fn start(socket: &Path, template: &Arc<[u8]>, chunk: usize) -> Result<Self> {
        let template = Arc::clone(template);
        let listener = bind(socket)?;
        let copying = std::thread::spawn(move || {
            let (uffd, regions) = accept(&listener)?;
            copy_all(&uffd, &regions, &template, chunk)
        });
        Ok(Self { copying })
    }

    /// Waits until it is done.
    ///
    /// # Errors
    ///
    /// The handshake or a copy failed.
    pub fn join(self) -> Result<Copied> {
        self.copying
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the thread that copies has panicked")))
    }
}

/// All of a mem-file, in memory.
///
/// # Errors
///
/// It cannot be read.
pub fn read(template: &Path) -> Result<Arc<[u8]>> {
    let bytes = std::fs::read(template).with_context(|| format!("failed to read {}", template.display()))?;
    Ok(bytes.into())
}

fn bind(socket: &Path) -> Result<UnixListener> {
    UnixListener::bind(socket).with_context(|| format!("failed to bind {}", socket.display()))
}

fn accept(listener: &UnixListener) -> Result<(Uffd, Vec<Region>)> {
    let (stream, _) = listener.accept()?;
    let mut message = vec![0; 64 * 1024];
    let mut fds = Vec::new();
    // The message and its file descriptor are sent at once; wait for it the simplest way.
    rustix::event::poll(
        &mut [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::IN)],
        None,
    )?;
    let received = fd_passing::receive(stream.as_fd(), &mut message, &mut fds)?;
    let Some(fd) = fds.pop() else {
        bail!("no userfaultfd came");
    };
    let uffd = Uffd::from_received(fd)?;
    rustix::fs::fcntl_setfl(&uffd, OFlags::empty())?;
    let regions = serde_json::from_slice(message.get(..received.bytes).unwrap_or_default())?;
    // As long as the VMM lives.
    std::mem::forget(stream);
    Ok((uffd, regions))
}

fn serve(strategy: Strategy, uffd: &Uffd, regions: &[Region], template: &[u8]) {
    let mut events = EventBuffer::new();
    while uffd.read_events_blocking(&mut events).is_ok() {
        for event in events.drain() {
            let Event::PageFault(fault) = event else { continue };
            match strategy {
                Strategy::Demand => copy_page(uffd, regions, template, fault.address.get() & !(PAGE - 1)),
                Strategy::AllAtFirstFault => {
                    // Whoever comes later finds its page in place, and was woken by the copy.
                    let _ = copy_all(uffd, regions, template, usize::MAX);
                }
            }
        }
    }
}

fn copy_page(uffd: &Uffd, regions: &[Region], template: &[u8], address: u64) {
    for region in regions {
        let into = address.wrapping_sub(region.base_host_virt_addr);
        if into < region.size {
            let from = usize::try_from(region.offset + into).expect("a template fits into memory");
            let _ = uffd.copy(HostAddr::new(address), &template[from..from + 4096]);
        }
    }
}

fn copy_all(uffd: &Uffd, regions: &[Region], template: &[u8], chunk: usize) -> Result<Copied> {
    let started = Instant::now();
    let mut bytes = 0;
    for region in regions {
        let from = usize::try_from(region.offset)?;
        let to = from + usize::try_from(region.size)?;
        let mut address = region.base_host_virt_addr;
        for chunk in template[from..to].chunks(chunk) {
            let outcome = uffd.copy(HostAddr::new(address), chunk);
            ensure!(matches!(outcome, Outcome::Installed), "a bulk copy: {outcome:?}");
            address += chunk.len() as u64;
        }
        bytes += region.size;
    }
    Ok(Copied {
        bytes,
        took: started.elapsed(),
    })
}
