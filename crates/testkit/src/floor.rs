//! The smallest page server that could do the same job: what others are measured against.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use pagecast_uffd::{Event, HostAddr, Uffd, fd_passing};
use rustix::fs::OFlags;
use serde::Deserialize;

/// A bare loop for each VMM, on a thread of its own: a blocking `read` of a fault, `UFFDIO_COPY` of one page from memory,
/// again. It checks nothing, counts nothing, knows no removal and never ends: its threads stay blocked in `read` until this
/// process exits.
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
    /// Serves the mem-file at `template`, which is read into memory first, to as many as `vmms` VMMs at `socket`.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or the socket not be bound.
    pub fn start(socket: &Path, template: &Path, vmms: usize) -> Result<Self> {
        let template: Arc<[u8]> = std::fs::read(template)
            .with_context(|| format!("failed to read {}", template.display()))?
            .into();
        let listener = UnixListener::bind(socket).with_context(|| format!("failed to bind {}", socket.display()))?;
        let accepting = std::thread::spawn(move || {
            for _ in 0..vmms {
                let template = Arc::clone(&template);
                let served = accept(&listener).map(|(uffd, regions)| {
                    std::thread::spawn(move || serve(&uffd, &regions, &template));
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

fn serve(uffd: &Uffd, regions: &[Region], template: &[u8]) {
    const PAGE: u64 = 4096;
    let mut events = Vec::new();
    while uffd.read_events_blocking(&mut events).is_ok() {
        for event in events.drain(..) {
            let Event::PageFault(fault) = event else { continue };
            let address = fault.address.get() & !(PAGE - 1);
            for region in regions {
                let into = address.wrapping_sub(region.base_host_virt_addr);
                if into < region.size {
                    let from = usize::try_from(region.offset + into).expect("a template fits into memory");
                    let _ = uffd.copy(HostAddr::new(address), &template[from..from + 4096]);
                }
            }
        }
    }
}
