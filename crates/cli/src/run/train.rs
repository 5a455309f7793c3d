//! `pagecast template train`: records in one real Firecracker what a fork touches first.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use indicatif::BinaryBytes;
use pagecast_client::template::WorkingSet;
use pagecast_client::{Backend, Client, Fork};
use serde::Serialize;

use super::fleet::{Fleet, catching_panics};
use super::interrupt::Interrupt;
use super::launch::Turn;
use super::life::Life;
use super::plan::Wanted;
use super::report::milliseconds;
use super::say::{say, start_saying};
use super::setup::{Prepared, Starting};
use super::{Stopped, ended_by, stopped};
use crate::daemon::DaemonError;
use crate::facts::Facts;
use pagecast_command::Output;
use pagecast_command::progress::Progress;

/// Run one real Firecracker from a template, and record the pages that its guest touches first.
///
/// Adds the recording to the template's working set, which is kept beside the memory file and prefaulted into later
/// forks. The recording ends once page faults become rare, after 20 s at most. The guest gets no work: if yours waits
/// for requests, record ordinary forks instead (`pagecast fork create --record`). Afterwards the Firecracker, its
/// folder and its fork are removed.
#[derive(Args)]
#[command(after_help = "\
Exit codes:
  0    learned
  1    failed, or could not clean up
  2    wrong usage
  3    the daemon cannot be reached, or ended
  4    the daemon refused
  128  and the number of the signal that ended it")]
pub(crate) struct Train {
    /// Name of the template.
    name: String,

    #[command(flatten)]
    starting: Starting,
}

/// Time that a recording may take. It ends after 20 s at most, but begins with the first fault.
const PATIENCE: Duration = Duration::from_mins(1);

/// Time between two looks at the recording.
const PACE: Duration = Duration::from_millis(50);

/// The result.
#[derive(Debug, Serialize)]
struct Trained {
    template: String,
    firecracker: PathBuf,
    firecracker_version: String,
    /// Time from the guest's resumption until the recording was added to the working set.
    took_ms: f64,
    /// Page faults of the guest until then.
    faults: u64,
    /// Pages that the guest touched, in bytes.
    recorded_bytes: u64,
    /// The new working set.
    working_set: WorkingSet,
}

impl Train {
    /// Records, and prints the result.
    pub(crate) async fn call(self, client: Client, json: bool) -> Result<ExitCode> {
        start_saying();
        let mut interrupt = Interrupt::watch().context("cannot handle signals")?;
        let wanted = Wanted {
            template: self.name.clone(),
            backend: Some(Backend::Uffd),
            record: true,
            ..Wanted::default()
        };
        let prepared = tokio::select! {
            biased;
            signal = interrupt.signalled() => return Ok(ended_by(signal)),
            prepared = self.starting.prepare(client, wanted) => prepared?,
        };
        let Prepared { plan, daemon, folder } = prepared;
        let firecracker = plan.firecracker.clone();
        let mut fleet = Fleet::start(plan, folder, 1);
        let recorded = catching_panics(record(&mut fleet, &mut interrupt, &daemon)).await;
        let client = fleet.client().clone();
        let problems = fleet.end().await;
        for problem in &problems {
            say(problem);
        }
        let recorded = recorded.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let (fork, took) = match recorded {
            Ok(recorded) => recorded,
            Err(early) => return stopped(early, problems.is_empty()),
        };
        let template = client.template(&self.name).await.map_err(DaemonError::from)?;
        let trained = Trained {
            template: self.name,
            firecracker: firecracker.path,
            firecracker_version: firecracker.version.to_string(),
            took_ms: milliseconds(took),
            faults: fork.faults.map_or(0, |faults| faults.demand),
            recorded_bytes: fork.recording.map_or(0, |recording| recording.size_bytes),
            working_set: template
                .working_set
                .context("the daemon has no working set after the recording")?,
        };
        trained.print(json)?;
        ensure!(problems.is_empty(), "could not clean up");
        Ok(ExitCode::SUCCESS)
    }
}

/// Resumes the guest and waits until its recording is in the working set. Returns the fork at that time, and the time
/// it took.
async fn record(
    fleet: &mut Fleet,
    interrupt: &mut Interrupt,
    daemon: &Life,
) -> Result<Result<(Fork, Duration), Stopped>> {
    let _spinner = Progress::spinner("recording");
    let client = fleet.client().clone();
    let id = fleet.ids().first().cloned().context("a run has a fork")?;
    fleet.fork();
    let mut resumed = None;
    loop {
        let event = tokio::select! {
            signal = interrupt.signalled() => return Ok(Err(Stopped::Signal(signal))),
            () = daemon.ended() => return Ok(Err(Stopped::DaemonEnded)),
            event = fleet.event() => Some(event.context("Firecracker has ended")?),
            () = tokio::time::sleep(PACE), if resumed.is_some() => None,
        };
        match (event.map(|event| event.turn), resumed) {
            (Some(Turn::Loaded { .. }), _) => {
                if let Err(shared) = fleet.resume() {
                    return Ok(Err(Stopped::SharedDrive(shared)));
                }
            }
            (Some(Turn::Resumed { .. }), _) => resumed = Some(Instant::now()),
            (Some(Turn::Failed(error)), _) => return Err(error.into()),
            (Some(Turn::Ended(error)), _) => return Err(error).context("Firecracker ended before the recording"),
            (None, Some(since)) => {
                let fork = client.fork(&id).await.map_err(DaemonError::from)?;
                if fork.recording.is_some_and(|recording| recording.learned) {
                    return Ok(Ok((fork, since.elapsed())));
                }
                if since.elapsed() > PATIENCE {
                    bail!(
                        "no recording within {PATIENCE:?}: the guest had no page faults, or another client has completed it"
                    );
                }
            }
            _ => {}
        }
    }
}

impl Trained {
    fn print(&self, json: bool) -> Result<()> {
        let output = Output::stdout();
        if json {
            return output.print_json(self);
        }
        let mut facts = Facts::default();
        facts.add("template", &self.template);
        facts.add(
            "recorded",
            format!(
                "{} in {:.0} ms, {} faults",
                BinaryBytes(self.recorded_bytes),
                self.took_ms,
                self.faults
            ),
        );
        facts.add("working set", describe(&self.working_set));
        output.print(&facts.text())
    }
}

/// Describes a working set in a sentence.
pub(crate) fn describe(set: &WorkingSet) -> String {
    let mut text = format!("{} from {}", BinaryBytes(set.size_bytes), recordings(set.recordings));
    if let (Some(precision), Some(recall)) = (set.precision, set.recall) {
        let percent = |part: f64| part * 100.0;
        let _ = write!(
            text,
            "; {} forks used {:.0}% of it, and it was {:.0}% of what they used",
            set.forks,
            percent(precision),
            percent(recall)
        );
    }
    if set.switched_off {
        text += "; switched off, since too little of it is used";
    }
    text
}

fn recordings(count: u64) -> String {
    match count {
        1 => "1 recording".to_owned(),
        count => format!("{count} recordings"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_set_is_told_with_how_it_does_where_that_is_known() {
        let set = WorkingSet {
            size_bytes: 3 << 20,
            recordings: 1,
            forks: 2,
            precision: None,
            recall: None,
            switched_off: false,
        };
        assert_eq!(describe(&set), "3.00 MiB from 1 recording");
        let bad = WorkingSet {
            recordings: 2,
            precision: Some(0.1),
            recall: Some(0.5),
            switched_off: true,
            ..set
        };
        assert_eq!(
            describe(&bad),
            "3.00 MiB from 2 recordings; 2 forks used 10% of it, and it was 50% of what they used; switched off, since \
             too little of it is used"
        );
    }
}
