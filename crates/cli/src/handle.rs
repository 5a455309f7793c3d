//! `pagecast handle`: one template on one socket, for `n` VMMs, without a daemon.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use pagecast::server::{CloseError, ForkEvent, ForkOptions, Server, chain};
use pagecast::template::{KeepError, Lease, LeaseError, MemFile, SidecarError, Template, WorkingSet};
use pagecast_command::signals::{self, EndSignal, Escalation, Reaction};
use pagecast_daemon::config::FAULT_AROUND;

use crate::KILLED;
use crate::argument;
use crate::report::{Format, Line, Reporter};

/// Serve one template on one socket to any number of VMMs, without a daemon.
///
/// Each VMM that connects is a fork of its own. Point Firecracker at the socket with PUT /snapshot/load and
/// `"mem_backend": {"backend_type": "Uffd", "backend_path": SOCKET}`.
#[derive(Args)]
#[command(after_help = "\
Signals:
  SIGTERM, SIGINT, SIGQUIT
                   Complete all forks (install the rest of their memory), so that they run on without a server, and exit.
                   If memory is short, report it and keep serving. A second of these signals kills their VMMs.
  SIGHUP, other signals
                   The same, but never kill. These are the signals that can be caught, are no faults, and end a process by
                   default. A signal that is ignored at the start, as by nohup, stays ignored.
  SIGIO, SIGXFSZ   No effect.
  SIGSTOP, SIGTSTP (Ctrl-Z)
                   Suspend the server, and with it each fork at its next page fault, until SIGCONT.

If stderr is not read, lines are dropped, and counted in a line once it is read again.

If another process opens the template for writing, it is held up until all forks are complete. VMMs of forks that cannot be
completed are killed, since a wrong byte is worse. Then this exits.

Exit codes:
  0  stopped by a signal; no VMM was hurt
  1  could not start, or failed, or the template was opened for writing
  2  wrong usage
  3  stopped by a second SIGTERM, SIGINT or SIGQUIT; the VMMs that were still served were killed")]
pub(crate) struct Handle {
    /// Path of the socket to listen on. A stale socket file at this path is replaced.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// The memory file of the snapshot.
    #[arg(long, value_name = "PATH")]
    mem_file: PathBuf,

    /// Number of threads that answer page faults; forks are spread evenly over them [default: two a processor, at most 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,

    /// Longest time that a thread polls for the next page fault after an answer, before it sleeps; at most 10ms, 0s to never
    /// poll. Answers faster if cores are free. A thread polls only while that finds faults, while no other thread wants its core,
    /// and for a bounded part of the time.
    #[arg(long, value_name = "TIME", value_parser = argument::busy_poll, default_value = "100us")]
    busy_poll: Duration,

    /// Most pages of 4 KiB that one page fault installs. With 1, only pages that have faulted are installed. Otherwise, pages that
    /// a guest is about to read in order come with them.
    #[arg(long, value_name = "PAGES", value_parser = clap::value_parser!(u8).range(1..=64), default_value_t = FAULT_AROUND)]
    fault_around: u8,

    /// User ID of the VMMs, if it is not this process's own: it owns the socket, and no other user is served.
    #[arg(long, value_name = "UID")]
    user: Option<u32>,

    /// Group ID of the socket.
    #[arg(long, value_name = "GID")]
    group: Option<u32>,

    /// Write lines of JSON.
    #[arg(long)]
    json: bool,
}

/// Time that forks may take to complete, before an error names those that do not.
const CLOSE_PATIENCE: Duration = Duration::from_mins(1);

/// Time that killed VMMs may take to die.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// Time that forks may take to complete or die while a writer of the template waits. Less than the 45 s for which the
/// kernel holds the writer up.
const VACATE_PATIENCE: Duration = Duration::from_secs(40);

/// The reason that forks get when their template is opened for writing.
const OPENED_FOR_WRITING: &str = "another process opens it for writing";

/// Events that the command waits for.
enum Happening {
    Fork(ForkEvent),
    Signal(EndSignal),
    /// The end of an attempt to close.
    Closed(Result<(), CloseError>),
    /// A process wants to write the template, and waits.
    LeaseBroken,
    /// The zeros of the template were found, but cannot be kept beside it.
    ZerosNotKept(KeepError),
    /// `true` if no fork needs the template any more. `false` if some VMM did not complete or die.
    Vacated(bool),
}

impl Handle {
    /// Serves until a signal asks for the end.
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        crate::fd_limit::raise();
        let (happenings, happened) = mpsc::channel();
        let signalled = happenings.clone();
        // The receiver is gone only while the process exits.
        signals::watch(move |signal| drop(signalled.send(Happening::Signal(signal))))
            .context("cannot handle signals")?;
        let reporter = Reporter::start(if self.json { Format::Json } else { Format::Human });
        let mem_file = Arc::new(MemFile::open(&self.mem_file)?);
        let template = Template::from_source(Arc::clone(&mem_file));
        let lease = take_lease(&mem_file, &happenings)?;
        let mut builder = Server::builder().observer({
            let happenings = happenings.clone();
            // The receiver is gone only while the process exits.
            move |event| drop(happenings.send(Happening::Fork(event)))
        });
        builder = builder.busy_poll(self.busy_poll).fault_around(self.fault_around.into());
        if let Some(workers) = self.workers {
            builder = builder.workers(workers.into());
        }
        let server = Arc::new(builder.start()?);
        let mut options = ForkOptions::new(&self.socket);
        if let Some(user) = self.user {
            options = options.user(user);
        }
        if let Some(group) = self.group {
            options = options.group(group);
        }
        take_up_kept(&mem_file, &template, &reporter, &happenings);
        let prefix = "vmm".parse().context("the prefix of fork names")?;
        server.listen(&prefix, &template, &options)?;

        reporter.report(&Line::Listening {
            socket: &self.socket,
            mem_file: &self.mem_file,
            size_bytes: template.len().get(),
        });
        Handling {
            server,
            template,
            lease,
            reporter,
            happenings,
        }
        .until_closed(&happened)
    }
}

/// Loads the working set and the zeros that are kept beside the mem-file. Searches for the zeros if they are not known.
/// Neither is needed to serve.
fn take_up_kept(
    mem_file: &Arc<MemFile>,
    template: &Template,
    reporter: &Reporter,
    happenings: &mpsc::Sender<Happening>,
) {
    let not_used = |what, error: &SidecarError| {
        if !matches!(error, SidecarError::Missing) {
            let error = &chain(error);
            reporter.report(&Line::KeptNotUsed { what, error });
        }
    };
    match WorkingSet::load(&WorkingSet::path_for(mem_file.path()), &mem_file.content()) {
        Ok(set) => template.set_working_set(Some(Arc::new(set))),
        Err(error) => not_used("working set", &error),
    }
    if template.zeros_are_known() {
        return;
    }
    if let Err(error) = mem_file.kept_zeros() {
        not_used("zeros", error);
    }
    let (searched, happenings) = (Arc::clone(mem_file), happenings.clone());
    template.find_zeros_in_background(move |found| {
        // A template that cannot be read is reported by the forks that need it.
        if found.is_ok()
            && let Err(error) = searched.keep_zeros()
            && !matches!(error, KeepError::TooFresh | KeepError::NotLeased)
        {
            drop(happenings.send(Happening::ZerosNotKept(error)));
        }
    });
}

/// Takes a lease on the mem-file, which holds writers off. `None` if the file system has no leases: then forks fail
/// after a write.
fn take_lease(mem_file: &Arc<MemFile>, happenings: &mpsc::Sender<Happening>) -> anyhow::Result<Option<Lease>> {
    let happenings = happenings.clone();
    match mem_file.lease(move || drop(happenings.send(Happening::LeaseBroken))) {
        Ok(lease) => Ok(Some(lease)),
        Err(LeaseError::NotPermitted | LeaseError::Unsupported) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot serve {}", mem_file.path().display())),
    }
}

/// A running `pagecast handle`.
struct Handling {
    server: Arc<Server>,
    template: Template,
    lease: Option<Lease>,
    reporter: Reporter,
    happenings: mpsc::Sender<Happening>,
}

impl Handling {
    /// Reports events until the server is closed.
    fn until_closed(mut self, happened: &mpsc::Receiver<Happening>) -> anyhow::Result<ExitCode> {
        let mut escalation = Escalation::default();
        let mut closing = false;
        loop {
            match happened.recv().context("the server's threads are gone")? {
                Happening::Fork(event) => self.reporter.fork(&event),
                Happening::Signal(signal) => {
                    let forks = self.server.forks().len();
                    match escalation.react(signal) {
                        Reaction::Close if closing => {}
                        Reaction::Close => {
                            self.beside(|server| Happening::Closed(server.close(CLOSE_PATIENCE)));
                            closing = true;
                            self.reporter.report(&Line::Closing { forks });
                        }
                        Reaction::Kill => {
                            let killed = self.server.kill(KILL_PATIENCE);
                            self.reporter.report(&Line::Killing { forks });
                            killed?;
                            return Ok(self.closed(happened, ExitCode::from(KILLED)));
                        }
                    }
                }
                Happening::Closed(Ok(())) => return Ok(self.closed(happened, ExitCode::SUCCESS)),
                Happening::Closed(Err(error)) => {
                    closing = false;
                    self.reporter.report(&Line::Staying { why: &error });
                }
                Happening::ZerosNotKept(error) => self.reporter.report(&Line::NotKept {
                    what: "zeros",
                    error: &chain(&error),
                }),
                Happening::LeaseBroken => {
                    let forks = self.server.forks().len();
                    let template = self.template.clone();
                    self.beside(move |server| {
                        Happening::Vacated(server.vacate(&template, OPENED_FOR_WRITING, VACATE_PATIENCE))
                    });
                    self.reporter.report(&Line::Vacating { forks });
                }
                Happening::Vacated(all) => {
                    // The writer continues.
                    self.lease = None;
                    // Once its threads have ended, all events have been sent.
                    if all && self.server.close(CLOSE_PATIENCE).is_ok() {
                        self.reporter.report(&Line::Vacated);
                        return Ok(self.closed(happened, ExitCode::FAILURE));
                    }
                    self.reporter.report(&Line::NotVacated);
                }
            }
        }
    }

    /// Runs long work on a thread of its own, so that a second signal is handled meanwhile.
    fn beside(&self, work: impl FnOnce(&Server) -> Happening + Send + 'static) {
        let (server, happenings) = (Arc::clone(&self.server), self.happenings.clone());
        let work = Arc::new(Mutex::new(Some(move || drop(happenings.send(work(&server))))));
        let take = |work: &Mutex<Option<_>>| work.lock().unwrap_or_else(PoisonError::into_inner).take();
        let taken = Arc::clone(&work);
        let spawned = std::thread::Builder::new()
            .name("beside".to_owned())
            .spawn(move || take(&taken).map(|work| work()));
        // Without a thread the work is done here: a second signal has to wait, but no VMM is left without its server.
        if spawned.is_err()
            && let Some(work) = take(&work)
        {
            work();
        }
    }

    fn closed(&self, happened: &mpsc::Receiver<Happening>, code: ExitCode) -> ExitCode {
        report_rest(&self.reporter, happened);
        self.reporter.report(&Line::Closed);
        code
    }
}

/// Reports the events that were sent before the end and not received yet.
fn report_rest(reporter: &Reporter, happened: &mpsc::Receiver<Happening>) {
    for happening in happened.try_iter() {
        if let Happening::Fork(event) = happening {
            reporter.fork(&event);
        }
    }
}
