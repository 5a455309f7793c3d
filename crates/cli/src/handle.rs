//! `pagecast handle`: one template on one socket, any number of VMMs.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use pagecast::server::{CloseError, ForkEvent, ForkOptions, Server};
use pagecast::template::Template;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::KILLED;
use crate::report::{Format, Line, Reporter};

/// Serve one template on one socket to any number of VMMs, without a daemon.
///
/// Each VMM that connects is a fork of its own. Point Firecracker at the socket with PUT /snapshot/load and
/// `"mem_backend": {"backend_type": "Uffd", "backend_path": SOCKET}`.
#[derive(Args)]
#[command(after_help = "\
Signals:
  SIGTERM, SIGINT  complete all forks (install the rest of their memory), so that they run on without a server, and exit.
                   Where that does not fit into memory, say so and stay. A second signal kills their VMMs.

Exit codes:
  0  stopped by a signal; no VMM was hurt
  1  could not start, or failed
  2  wrong usage
  3  stopped by a second signal; the VMMs that were still served have been killed")]
pub(crate) struct Handle {
    /// Where to listen. A socket file there that nobody listens at is replaced.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// The memory file of the snapshot.
    #[arg(long, value_name = "PATH")]
    mem_file: PathBuf,

    /// How many threads answer page faults [default: two a processor, at most 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,

    /// The user that the VMMs run as, if not the one who runs this: owns the socket, and nobody else is let in.
    #[arg(long, value_name = "UID")]
    user: Option<u32>,

    /// The group of the socket.
    #[arg(long, value_name = "GID")]
    group: Option<u32>,

    /// Report in lines of JSON.
    #[arg(long)]
    json: bool,
}

/// How long forks may take to complete before we say which do not.
const CLOSE_PATIENCE: Duration = Duration::from_mins(1);

/// How long killed processes may take to die.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// What can happen.
enum Happening {
    Fork(ForkEvent),
    Signal,
    /// An attempt to close has ended.
    Closed(Result<(), CloseError>),
}

impl Handle {
    /// Serves until told to stop.
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        crate::fd_limit::raise();
        let (happenings, happened) = mpsc::channel();
        let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot handle signals")?;
        let template = Template::open(&self.mem_file)?;
        let mut builder = Server::builder().observer({
            let happenings = happenings.clone();
            // Nobody listens any more only while we exit.
            move |event| drop(happenings.send(Happening::Fork(event)))
        });
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
        let prefix = "vmm".parse().context("the prefix of fork names")?;
        server.listen(&prefix, &template, &options)?;

        let reporter = Reporter::new(if self.json { Format::Json } else { Format::Human });
        reporter.report(&Line::Listening {
            socket: &self.socket,
            mem_file: &self.mem_file,
            size_bytes: template.len().get(),
        });
        let signalled = happenings.clone();
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for _ in signals.forever() {
                    if signalled.send(Happening::Signal).is_err() {
                        return;
                    }
                }
            })
            .context("cannot start a thread")?;
        until_closed(&server, &reporter, &happenings, &happened)
    }
}

/// Reports what happens until the server is closed.
fn until_closed(
    server: &Arc<Server>,
    reporter: &Reporter,
    happenings: &mpsc::Sender<Happening>,
    happened: &mpsc::Receiver<Happening>,
) -> anyhow::Result<ExitCode> {
    let mut signals = 0;
    loop {
        match happened.recv().context("the server's threads are gone")? {
            Happening::Fork(event) => reporter.fork(&event),
            Happening::Signal => {
                signals += 1;
                if signals == 1 {
                    reporter.report(&Line::Closing {
                        forks: server.forks().len(),
                    });
                    close_beside(server, happenings)?;
                } else {
                    reporter.report(&Line::Killing {
                        forks: server.forks().len(),
                    });
                    server.kill(KILL_PATIENCE)?;
                    report_rest(reporter, happened);
                    reporter.report(&Line::Closed);
                    return Ok(ExitCode::from(KILLED));
                }
            }
            Happening::Closed(Ok(())) => {
                report_rest(reporter, happened);
                reporter.report(&Line::Closed);
                return Ok(ExitCode::SUCCESS);
            }
            Happening::Closed(Err(error)) => reporter.report(&Line::Staying { why: &error }),
        }
    }
}

/// Closes the server on a thread of its own, so that a second signal is heard meanwhile.
fn close_beside(server: &Arc<Server>, happenings: &mpsc::Sender<Happening>) -> anyhow::Result<()> {
    let (server, happenings) = (Arc::clone(server), happenings.clone());
    std::thread::Builder::new()
        .name("close".to_owned())
        .spawn(move || drop(happenings.send(Happening::Closed(server.close(CLOSE_PATIENCE)))))
        .context("cannot start a thread")?;
    Ok(())
}

/// Reports what happened before the end and was not read yet.
fn report_rest(reporter: &Reporter, happened: &mpsc::Receiver<Happening>) {
    for happening in happened.try_iter() {
        if let Happening::Fork(event) = happening {
            reporter.fork(&event);
        }
    }
}
