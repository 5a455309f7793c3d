//! `pagecast run`: many real Firecrackers, forked from one template.
//!
//! | module | holds |
//! | --- | --- |
//! | [`setup`] | checks and preparations before anything is started |
//! | [`firecracker`] | checks of the Firecracker binary |
//! | [`exec`] | child processes that the kernel kills when we end |
//! | [`advice`] | advice for a snapshot that Firecracker does not load |
//! | [`drives`] | files that two microVMs would write to |
//! | [`jail`] | the jailer of a run, and the files that the daemon places in its jails |
//! | [`launch`] | one fork, from its creation to its end |
//! | [`fleet`] | all forks of a run |
//! | [`folder`] | the folder of a run, and the folders that killed runs left |
//! | [`life`], [`interrupt`] | reasons for an early end: the daemon's end, signals |
//! | [`report`], [`table`], [`say`](mod@say) | results, and lines on standard error |
//! | [`train`] | one fork, to record the pages that it touches first |

mod advice;
mod drives;
mod exec;
mod firecracker;
mod fleet;
mod folder;
mod forget;
mod interrupt;
mod jail;
mod launch;
mod life;
mod plan;
mod report;
mod say;
mod setup;
mod table;
mod train;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use pagecast_client::{Backend, Prefault};
use tokio::sync::oneshot;

use self::drives::SharedDrive;
pub(crate) use self::exec::Exec;
use self::fleet::{Fleet, catching_panics};
use self::interrupt::Interrupt;
use self::life::Life;
use self::plan::Wanted;
use self::report::{Report, State};
use self::say::{say, start_saying};
use self::setup::{Prepared, Starting};
pub(crate) use self::train::{Train, describe as describe_working_set};
use crate::argument;
use crate::daemon::{DaemonArgs, DaemonError, block_on};
use pagecast_command::Output;
use pagecast_command::progress::{Progress, Unit};

/// Start real Firecrackers from one template, resume all at once, and print the time and memory of each.
///
/// Each runs in a folder of its own, with its API socket `api.sock`, its log and its output. Afterwards the
/// Firecrackers, their folders and their forks are removed, also after errors, signals and crashes. The next run
/// removes what a killed run has left.
#[derive(Args)]
#[command(after_help = "\
Exit codes:
  0    all forks resumed, and none died while they were kept
  1    could not start, or could not clean up
  2    wrong usage
  3    the daemon cannot be reached, or ended
  4    the daemon refused
  5    some forks failed or died
  128  and the number of the signal that ended it, unless it only kept the forks")]
pub(crate) struct Run {
    /// Name of the template.
    #[arg(long, value_name = "NAME")]
    template: String,

    /// Number of forks.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=4096))]
    count: u16,

    /// Backend for the forks' memory [default: chosen by the daemon]
    #[arg(long, value_parser = argument::backend())]
    backend: Option<Backend>,

    /// Pages to install before each fork asks for them [default: the working set, if one is known]
    #[arg(long, value_parser = argument::prefault())]
    prefault: Option<Prefault>,

    /// Keep the forks running until a signal: SIGINT (Ctrl-C), SIGTERM, SIGHUP.
    #[arg(long)]
    keep: bool,

    #[command(flatten)]
    starting: Starting,

    /// Print JSON.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    daemon: DaemonArgs,
}

const SOME_FAILED: u8 = 5;
/// Shells add this to the number of the signal that ended a program.
const SIGNALLED: u8 = 128;

/// Reasons for an early end.
#[derive(Debug)]
enum Stopped {
    Signal(u8),
    DaemonEnded,
    SharedDrive(SharedDrive),
}

/// A running `pagecast run`.
struct Conductor<'a> {
    fleet: &'a mut Fleet,
    report: &'a mut Report,
    interrupt: &'a mut Interrupt,
    daemon: &'a Life,
}

impl Run {
    /// Starts the forks, waits for their end, and cleans up.
    pub(crate) fn run(self) -> Result<ExitCode> {
        block_on(self.play())
    }

    async fn play(self) -> Result<ExitCode> {
        // Each Firecracker takes a few file descriptors.
        crate::fd_limit::raise();
        start_saying();
        let mut interrupt = Interrupt::watch().context("cannot handle signals")?;
        let prepared = tokio::select! {
            biased;
            signal = interrupt.signalled() => return Ok(ended_by(signal)),
            prepared = self.starting.prepare(self.daemon.client(), self.wanted()) => prepared?,
        };
        let Prepared { plan, daemon, folder } = prepared;
        let firecracker = plan.firecracker.clone();
        let mut fleet = Fleet::start(plan, folder, self.count);
        let folder = fleet.folder().path().to_owned();
        let mut report = Report::new(&self.template, &firecracker, folder, fleet.ids());
        let conductor = Conductor {
            fleet: &mut fleet,
            report: &mut report,
            interrupt: &mut interrupt,
            daemon: &daemon,
        };
        let conducted = catching_panics(self.conduct(conductor)).await;
        // Signals are caught from here on, and ignored.
        let problems = fleet.end().await;
        for problem in &problems {
            say(problem);
        }
        let early = conducted.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        if let Some(early) = early {
            return stopped(early, problems.is_empty());
        }
        if !self.keep {
            self.print(&report)?;
        }
        ensure!(problems.is_empty(), "could not clean up");
        Ok(if report.is_good() {
            ExitCode::SUCCESS
        } else {
            ExitCode::from(SOME_FAILED)
        })
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            template: self.template.clone(),
            backend: self.backend,
            prefault: self.prefault,
            record: false,
        }
    }

    async fn conduct(&self, mut conductor: Conductor<'_>) -> Result<Option<Stopped>> {
        let resumed = match conductor.resume_all().await {
            Ok(resumed) => resumed,
            Err(stopped) => return Ok(Some(stopped)),
        };
        conductor.report.sum_up(resumed);
        if self.keep {
            let printed = self.print_beside(conductor.report)?;
            return conductor.keep(printed).await;
        }
        Ok(None)
    }

    fn print(&self, report: &Report) -> Result<()> {
        Output::stdout().print(&self.text(report)?)
    }

    /// Prints on a thread of its own: the run must not wait for the reader of its output.
    fn print_beside(&self, report: &Report) -> Result<oneshot::Receiver<Result<()>>> {
        let text = self.text(report)?;
        let (printed, is_printed) = oneshot::channel();
        std::thread::Builder::new()
            .name("print".to_owned())
            .spawn(move || printed.send(Output::stdout().print(&text)))
            .context("cannot start a thread")?;
        Ok(is_printed)
    }

    fn text(&self, report: &Report) -> Result<String> {
        let output = Output::stdout();
        if self.json {
            output.json(report)
        } else {
            Ok(table::for_people(report, output))
        }
    }
}

impl Conductor<'_> {
    /// Starts and forks all, and measures their memory. Returns the time from the first fork to the last resumption.
    async fn resume_all(&mut self) -> Result<Duration, Stopped> {
        self.until_all("starting", |state| state > State::Starting).await?;
        let started = Instant::now();
        self.fleet.fork();
        self.until_all("forking", |state| state > State::Started).await?;
        self.fleet.resume().map_err(Stopped::SharedDrive)?;
        self.until_all("resuming", |state| state > State::Loaded).await?;
        let took = started.elapsed();

        let client = self.fleet.client().clone();
        match self.unless_stopped(client.forks(true)).await? {
            Ok(forks) => self.report.measure(forks),
            Err(error) => {
                let error = anyhow::Error::from(DaemonError::from(error));
                say(&format!("the memory of the forks is not known: {error:#}"));
            }
        }
        while let Some(event) = self.fleet.event_so_far() {
            self.turn(event);
        }
        Ok(took)
    }

    /// Waits until `done` holds for each fork. Ended forks count as done.
    async fn until_all(&mut self, what: &'static str, done: fn(State) -> bool) -> Result<(), Stopped> {
        let progress = Progress::bar(what, self.report.forks.len() as u64, Unit::Things("forks"));
        loop {
            let count = self.report.count(done);
            progress.set(count as u64);
            if count == self.report.forks.len() {
                return Ok(());
            }
            let event = tokio::select! {
                signal = self.interrupt.signalled() => return Err(Stopped::Signal(signal)),
                () = self.daemon.ended() => return Err(Stopped::DaemonEnded),
                event = self.fleet.event() => event,
            };
            match event {
                Some(event) => self.turn(event),
                // All forks have ended and reported it.
                None => return Ok(()),
            }
        }
    }

    /// Waits for a signal or the end of the last fork. Reports each fork that ends meanwhile, and the end of the
    /// daemon.
    ///
    /// # Errors
    ///
    /// The report could not be printed.
    async fn keep(&mut self, mut printed: oneshot::Receiver<Result<()>>) -> Result<Option<Stopped>> {
        say(&format!(
            "API sockets: {}/FORK/api.sock; Ctrl-C ends all of them",
            self.report.folder.display()
        ));
        let (mut stopped, mut is_printed) = (None, false);
        loop {
            tokio::select! {
                _ = self.interrupt.signalled() => return Ok(stopped),
                done = &mut printed, if !is_printed => {
                    done.context("the thread that prints is gone")??;
                    is_printed = true;
                }
                () = self.daemon.ended(), if stopped.is_none() => {
                    stopped = Some(Stopped::DaemonEnded);
                    say("the daemon has ended: forks with `uffd` that it has not completed stand still");
                }
                event = self.fleet.event() => {
                    let Some(event) = event else {
                        say("no fork is left");
                        if !is_printed {
                            tokio::select! {
                                _ = self.interrupt.signalled() => {}
                                done = &mut printed => done.context("the thread that prints is gone")??,
                            }
                        }
                        return Ok(stopped);
                    };
                    let number = event.number;
                    self.turn(event);
                    if let Some(fork) = self.report.forks.get(number) {
                        say(&format!("{}: {}", fork.id, fork.error.as_deref().unwrap_or_default()));
                    }
                }
            }
        }
    }

    async fn unless_stopped<T>(&mut self, step: impl Future<Output = T>) -> Result<T, Stopped> {
        tokio::select! {
            signal = self.interrupt.signalled() => Err(Stopped::Signal(signal)),
            () = self.daemon.ended() => Err(Stopped::DaemonEnded),
            done = step => Ok(done),
        }
    }

    fn turn(&mut self, event: launch::Event) {
        if let Some(fork) = self.report.forks.get_mut(event.number) {
            fork.turn(event.turn);
        }
    }
}

/// The result of a run that was stopped, after the cleanup. `clean` is `true` if that succeeded.
fn stopped(early: Stopped, clean: bool) -> Result<ExitCode> {
    match early {
        Stopped::Signal(signal) if clean => Ok(ended_by(signal)),
        Stopped::Signal(signal) => Ok(ExitCode::from(SIGNALLED.saturating_add(signal))),
        Stopped::DaemonEnded => Err(DaemonError::Ended.into()),
        Stopped::SharedDrive(error) => Err(error.into()),
    }
}

fn ended_by(signal: u8) -> ExitCode {
    say("interrupted: the run was cleaned up");
    ExitCode::from(SIGNALLED.saturating_add(signal))
}
