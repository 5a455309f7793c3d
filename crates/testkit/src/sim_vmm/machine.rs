//! The process of a simulated VMM: reads requests, becomes a guest, answers.

use std::fs::File;
use std::io::{BufRead, Write as _};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pagecast_uffd::{Features, Uffd, UffdOptions, fd_passing};
use rustix::fs::OFlags;
use serde::Serialize;
use serde_json::Value;

use super::guest::{Guest, GuestRegion};
use super::protocol::{
    Answer, AwaitClose, Closed, Command, Connect, Connected, EndRaces, HandshakeForm, MapAnonymous, MapFile, Memory,
    RegisterAgain, Registered, Request, Resume, Resumed,
};
use super::work::{self, nanos};
use crate::memory::{GuestMemory, PageSize};
use crate::peer::{self, micros};
use crate::template_file::{Layout, TemplateModel};

/// Runs a simulated VMM on stdin and stdout until stdin ends.
///
/// This thread never touches guest memory, so it always notices the end of its test.
///
/// # Errors
///
/// A line that is no request, or stdin cannot be read.
pub fn run() -> Result<()> {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        // If only one thread died, the test would wait for its answer.
        std::process::abort();
    }));
    let machine = Arc::new(Machine::default());
    for line in std::io::stdin().lock().lines() {
        let request: Request = serde_json::from_str(&line?).context("not a request")?;
        let machine = Arc::clone(&machine);
        std::thread::Builder::new()
            .name(request.command.name().to_owned())
            .spawn(move || {
                let result = machine.execute(request.command).map_err(|error| format!("{error:#}"));
                answer(&Answer { id: request.id, result });
            })?;
    }
    Ok(())
}

fn answer(answer: &Answer) {
    let mut line = serde_json::to_string(answer).expect("an answer has string keys only");
    line.push('\n');
    let mut stdout = std::io::stdout().lock();
    // The test has gone, and this process ends with stdin.
    let _ = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush());
}

#[derive(Default)]
struct Machine {
    guest: OnceLock<Guest>,
}

/// A region in a handshake (`GuestRegionUffdMapping` in Firecracker's `persist.rs`).
#[derive(Serialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    page_size: Option<u64>,
    page_size_kib: u64,
}

impl Machine {
    fn execute(&self, command: Command) -> Result<Value> {
        match command {
            Command::Connect(connect) => value(self.connect(&connect)?),
            Command::MapFile(map) => value(self.map_file(&map)?),
            Command::MapAnonymous(map) => value(self.map_anonymous(map)?),
            Command::Resume(resume) => value(self.resume(&resume)?),
            Command::AwaitClose(wait) => value(self.await_close(wait)?),
            Command::Read(read) => value(work::read(self.guest()?, &read)?),
            Command::Write(write) => value(work::write(self.guest()?, &write)?),
            Command::Remove(remove) => {
                let guest = self.guest()?;
                remove.ranges.iter().try_for_each(|range| guest.remove(range))?;
                value(())
            }
            Command::RemoveRace(race) => value(work::remove_race(self.guest()?, &race)?),
            Command::RegisterAgain(RegisterAgain) => value(work::register_again(self.guest()?)?),
            Command::EndRaces(EndRaces) => {
                self.guest()?.races_are_over.store(true, Ordering::Relaxed);
                value(())
            }
            Command::Latency(latency) => value(work::latency(self.guest()?, &latency)?),
            Command::Touch(touch) => value(work::touch(self.guest()?, &touch)?),
            Command::Visit(visit) => value(work::visit(self.guest()?, &visit)?),
            Command::TouchOutside(_) => value(work::touch_outside(self.guest()?)?),
            Command::ClearNonblock(_) => {
                let uffd = self.guest()?.kept_uffd()?;
                rustix::fs::fcntl_setfl(uffd, OFlags::empty())?;
                value(())
            }
            Command::RawHandshake(handshake) => value(peer::play(&handshake)?),
            Command::Exit(code) => std::process::exit(code),
            Command::Abort => std::process::abort(),
        }
    }

    fn guest(&self) -> Result<&Guest> {
        self.guest.get().context("not connected yet")
    }

    /// Does what Firecracker does to restore memory from a `Uffd` backend (`guest_memory_from_uffd` and
    /// `send_uffd_handshake` in its `persist.rs`), in that order.
    fn connect(&self, connect: &Connect) -> Result<Connected> {
        ensure!(self.guest.get().is_none(), "connected already");
        let page_size = connect.page_size.bytes();
        let mut regions = Vec::new();
        let mut first_page = 0;
        for region in &connect.regions {
            let memory = GuestMemory::map(region.size, connect.page_size)
                .with_context(|| format!("failed to map {} bytes", region.size))?;
            regions.push(GuestRegion::new(memory, region.offset, first_page, page_size));
            first_page += region.size / page_size;
        }
        let uffd = Uffd::create(UffdOptions {
            features: Features::from_bits_retain(connect.feature_bits),
            nonblocking: true,
        })?;
        for region in &regions {
            match connect.registered {
                Registered::Missing => region.memory.register(&uffd),
                Registered::WriteProtected => region.memory.register_write_protected(&uffd),
            }
            .context("failed to register a region")?;
        }
        let bases = regions.iter().map(|region| region.memory.range().start().get());
        let base_host_virt_addrs: Vec<u64> = bases.collect();
        let message = handshake(connect, &base_host_virt_addrs)?;
        let mut socket = peer::connect(&connect.socket)?;
        let piece = if connect.byte_by_byte { 1 } else { message.len() };
        let sent = fd_passing::send(socket.as_fd(), &message.as_bytes()[..piece], &[uffd.as_fd()])?;
        for piece in message.as_bytes()[sent..].chunks(piece) {
            socket.write_all(piece)?;
        }
        let guest = Guest {
            regions,
            page_size,
            template: connect.template.clone(),
            uffd: connect.keep_uffd.then_some(uffd),
            socket: connect.keep_socket.then_some(socket),
            races_are_over: AtomicBool::new(false),
        };
        ensure!(self.guest.set(guest).is_ok(), "connected twice at once");
        Ok(Connected { base_host_virt_addrs })
    }

    /// Does what Firecracker does to restore memory from a `File` backend (`guest_memory_from_file` in its
    /// `persist.rs`).
    fn map_file(&self, map: &MapFile) -> Result<()> {
        let page_size = PageSize::Base.bytes();
        let path = map.path.display();
        let file = File::open(&map.path).with_context(|| format!("failed to open {path}"))?;
        let memory =
            GuestMemory::map_file(&file, 0, map.template.size).with_context(|| format!("failed to map {path}"))?;
        let guest = Guest {
            regions: vec![GuestRegion::new(memory, 0, 0, page_size)],
            page_size,
            template: map.template.clone(),
            uffd: None,
            socket: None,
            races_are_over: AtomicBool::new(false),
        };
        ensure!(self.guest.set(guest).is_ok(), "a guest already");
        Ok(())
    }

    fn map_anonymous(&self, map: MapAnonymous) -> Result<()> {
        let memory =
            GuestMemory::map(map.size, PageSize::Base).with_context(|| format!("failed to map {} bytes", map.size))?;
        let page_size = PageSize::Base.bytes();
        let template = TemplateModel {
            size: map.size,
            seed: 0,
            layout: Layout {
                holes: std::iter::once(0..map.size / page_size).collect(),
                ..Layout::default()
            },
        };
        let guest = Guest {
            regions: vec![GuestRegion::new(memory, 0, 0, page_size)],
            page_size,
            template,
            uffd: None,
            socket: None,
            races_are_over: AtomicBool::new(false),
        };
        ensure!(self.guest.set(guest).is_ok(), "a guest already");
        Ok(())
    }

    fn resume(&self, resume: &Resume) -> Result<Resumed> {
        let started = Instant::now();
        match &resume.memory {
            Memory::Uffd(connect) => drop(self.connect(connect)?),
            Memory::File(map) => self.map_file(map)?,
        }
        let mapped = started.elapsed();
        work::visit(self.guest()?, &resume.visit)?;
        Ok(Resumed {
            mapped_ns: nanos(mapped),
            ready_ns: nanos(started.elapsed()),
        })
    }

    fn await_close(&self, wait: AwaitClose) -> Result<Closed> {
        let socket = self
            .guest()?
            .socket
            .as_ref()
            .context("the socket was closed by this side")?;
        let started = Instant::now();
        let closed = peer::await_close(socket, started + Duration::from_millis(wait.within_ms))?;
        Ok(Closed {
            after_us: closed.then(|| micros(started.elapsed())),
        })
    }
}

fn handshake(connect: &Connect, bases: &[u64]) -> serde_json::Result<String> {
    let page_size = connect.page_size.bytes();
    let mappings: Vec<_> = connect
        .regions
        .iter()
        .zip(bases)
        .map(|(region, base)| Mapping {
            base_host_virt_addr: *base,
            size: region.size,
            offset: region.offset,
            page_size: (connect.form != HandshakeForm::ArrayPageSizeKib).then_some(page_size),
            // In bytes despite its name, as in Firecracker.
            page_size_kib: page_size,
        })
        .collect();
    match connect.form {
        HandshakeForm::Array | HandshakeForm::ArrayPageSizeKib => serde_json::to_string(&mappings),
        HandshakeForm::Object => serde_json::to_string(&serde_json::json!({ "mappings": mappings })),
    }
}

fn value(report: impl Serialize) -> Result<Value> {
    Ok(serde_json::to_value(report)?)
}
