//! The smallest page servers that do the same job, to compare others with.

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

/// The reaction of a floor to a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// Repeats a blocking `read` of a fault and `UFFDIO_COPY` of one page. Firecracker's example handler does the same
    /// on demand, but with a `poll` before each read, and from a mapped file instead of memory.
    Demand,
    /// `UFFDIO_COPY` of all the guest's memory at the first fault, in one call: the strategy of Firecracker's other
    /// example, which installs every page at once.
    AllAtFirstFault,
}

/// A bare loop for each VMM, on a thread of its own. It checks nothing, counts nothing, knows no removal and never
/// ends: its threads stay blocked in `read` until this process exits.
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
    /// Serves the mem-file at `template` on demand, to up to `vmms` VMMs at `socket`. The file is read into memory
    /// first.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or the socket not be bound.
    pub fn start(socket: &Path, template: &Path, vmms: usize) -> Result<Self> {
        Self::start_with(Strategy::Demand, socket, &read(template)?, vmms)
    }

    /// Serves with another strategy, and a template that is already in memory.
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

    /// Path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits until all its VMMs have finished their handshake.
    pub fn wait_until_all_have_connected(self) {
        // Errors are reported by the thread itself.
        let _ = self.accepting.join();
    }
}

/// One thread that copies a whole template into a VMM with `UFFDIO_COPY`, without a fault, for comparison with bulk
/// prefault.
#[derive(Debug)]
pub struct BulkCopy {
    copying: JoinHandle<Result<Copied>>,
}

/// The result of copying a whole template.
#[derive(Clone, Copy, Debug)]
pub struct Copied {
    /// Bytes copied.
    pub bytes: u64,
    /// Time from the first call of `UFFDIO_COPY` to the end of the last.
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

    /// Waits for the end of the copy.
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

/// Reads a whole mem-file into memory.
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
    // The message and its file descriptor are sent at once, so one blocking read is enough.
    rustix::event::poll(
        &mut [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::IN)],
        None,
    )?;
    let received = fd_passing::receive(stream.as_fd(), &mut message, &mut fds)?;
    let Some(fd) = fds.pop() else {
        bail!("no userfaultfd was received");
    };
    let uffd = Uffd::from_received(fd)?;
    rustix::fs::fcntl_setfl(&uffd, OFlags::empty())?;
    let regions = serde_json::from_slice(message.get(..received.bytes).unwrap_or_default())?;
    // Until the VMM ends.
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
                    // Later faults on the page find it installed, and were woken by the copy.
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
