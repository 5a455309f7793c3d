//! All forks of a run.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use pagecast_client::Client;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::drives::{Loaded, SharedDrive, refuse_shared};
use super::folder::RunFolder;
use super::forget::forget;
use super::launch::{Event, Launch, Registered, Stage, Turn};
use super::plan::Plan;

/// Time that Firecrackers have to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// The forks of a run. Must be ended in any case: see [`end`](Self::end).
#[derive(Debug)]
pub(crate) struct Fleet {
    plan: Arc<Plan>,
    folder: RunFolder,
    ids: Vec<String>,
    lives: JoinSet<(usize, Registered)>,
    stage: watch::Sender<Stage>,
    events: mpsc::UnboundedReceiver<Event>,
    /// Those microVMs that have loaded their snapshot.
    loaded: Vec<Loaded>,
}

impl Fleet {
    /// Starts `count` Firecrackers at once.
    pub(crate) fn start(plan: Plan, folder: RunFolder, count: u16) -> Self {
        let plan = Arc::new(plan);
        let (stage, stages) = watch::channel(Stage::Start);
        let (sender, events) = mpsc::unbounded_channel();
        let digits = count.to_string().len();
        let ids: Vec<_> = (1..=u32::from(count)).map(|number| folder.id(number, digits)).collect();
        let mut lives = JoinSet::new();
        for (number, id) in ids.iter().enumerate() {
            let launch = Launch {
                number,
                id: id.clone(),
                folder: folder.of_fork(id),
                stage: stages.clone(),
                events: sender.clone(),
            };
            let plan = Arc::clone(&plan);
            lives.spawn(async move { (number, launch.live(&plan).await) });
        }
        Self {
            plan,
            folder,
            ids,
            lives,
            stage,
            events,
            loaded: Vec::new(),
        }
    }

    /// The IDs of the forks, in the order of their numbers.
    pub(crate) fn ids(&self) -> &[String] {
        &self.ids
    }

    pub(crate) fn client(&self) -> &Client {
        &self.plan.client
    }

    pub(crate) fn folder(&self) -> &RunFolder {
        &self.folder
    }

    /// Lets started Firecrackers create their forks and load.
    pub(crate) fn fork(&self) {
        self.stage.send_replace(Stage::Fork);
    }

    /// Lets loaded forks resume. Call it once each has loaded or failed.
    ///
    /// # Errors
    ///
    /// Two forks would write to one drive. None is resumed then.
    pub(crate) fn resume(&self) -> Result<(), SharedDrive> {
        refuse_shared(&self.loaded)?;
        self.stage.send_replace(Stage::Resume);
        Ok(())
    }

    /// The next event, if one has already come.
    pub(crate) fn event_so_far(&mut self) -> Option<Event> {
        let event = self.events.try_recv().ok()?;
        Some(self.noted(event))
    }

    /// Waits for the next event. `None` once all forks have ended. Cancel safe.
    pub(crate) async fn event(&mut self) -> Option<Event> {
        let event = self.events.recv().await?;
        Some(self.noted(event))
    }

    fn noted(&mut self, mut event: Event) -> Event {
        if let Turn::Loaded { vm, .. } = &mut event.turn {
            self.loaded.push(std::mem::take(vm));
        }
        event
    }

    /// Kills every Firecracker, has the daemon forget the forks, and removes the folder. Returns the problems, one a
    /// line.
    pub(crate) async fn end(mut self) -> Vec<String> {
        self.stage.send_replace(Stage::End);
        let mut ids: Vec<_> = self.ids.iter().cloned().map(Some).collect();
        let drained = tokio::time::timeout(PATIENCE, async {
            while let Some(life) = self.lives.join_next().await {
                // If the task of a fork panicked, its state is unknown, so its ID stays.
                if let Ok((number, Registered::No)) = life
                    && let Some(id) = ids.get_mut(number)
                {
                    *id = None;
                }
            }
        });
        let mut problems = Vec::new();
        if drained.await.is_err() {
            problems.push(format!("some Firecrackers have not ended within {PATIENCE:?}"));
        }
        // Kills the Firecrackers that are still alive, by dropping them.
        self.lives.shutdown().await;
        let remembered = forget(&self.plan.client, ids.into_iter().flatten()).await;
        let path = self.folder.path().to_owned();
        if !remembered.is_empty() {
            problems.extend(remembered);
            problems.push(format!("{} is kept: the next run tries again", path.display()));
            self.folder.leave();
        } else if let Err(error) = self.folder.remove() {
            problems.push(format!("cannot remove {}: {error}", path.display()));
        }
        problems
    }
}

/// The value of the future, or its panic, so that the caller can still clean up.
pub(crate) async fn catching_panics<T>(future: impl Future<Output = T>) -> std::thread::Result<T> {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|context| {
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context)));
        match polled {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(value)) => Poll::Ready(Ok(value)),
            Err(panic) => Poll::Ready(Err(panic)),
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_does_not_keep_from_what_comes_after() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let caught = runtime.block_on(catching_panics(async {
            tokio::task::yield_now().await;
            assert!(std::hint::black_box(false), "on purpose");
        }));
        assert!(caught.is_err());
        assert_eq!(runtime.block_on(catching_panics(async { 1 })).unwrap(), 1);
    }
}
