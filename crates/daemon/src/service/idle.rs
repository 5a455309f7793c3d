//! Completes forks without page faults, so that they no longer need the daemon.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pagecast::server::ForkId;
use tracing::{info, warn};

use super::{Service, backends};
use crate::fork::Fork;
use crate::own_thread::survive;

/// The shortest and the longest interval between two looks at the fault counts.
const INTERVAL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// The last fault count of each fork, and the time when it was first seen.
type Seen = HashMap<ForkId, (u64, Instant)>;

impl Service {
    /// Completes forks with `uffd` that had no fault for `after`. Sleeps while none is served. Blocks.
    pub(crate) async fn complete_idle(self: Arc<Self>, after: Duration) {
        let interval = (after / 4).clamp(INTERVAL.0, INTERVAL.1);
        let mut seen = Seen::new();
        loop {
            let served = survive("idle", || {
                let forks = self.served();
                for fork in look(&mut seen, &forks, after, Instant::now()) {
                    complete_idle_fork(&fork);
                }
                !forks.is_empty()
            });
            if served == Some(false) {
                self.fork_serving.notified().await;
            } else {
                tokio::time::sleep(interval).await;
            }
        }
    }

    /// Returns the forks with `uffd` that are served.
    fn served(&self) -> Vec<Arc<Fork>> {
        let mut forks = self.registry.forks();
        forks.retain(|fork| fork.activity().is_some());
        forks
    }
}

fn complete_idle_fork(fork: &Fork) {
    match backends::of(fork).complete(fork) {
        Ok(()) => info!(event = "fork_idle", fork = %fork.id, "fork is idle, and is being completed"),
        Err(error) => warn!(fork = %fork.id, error = error.message, "fork is idle, but cannot be completed now"),
    }
}

/// Returns the forks that had no fault for `after`, and are not being recorded. Each is returned at most once per
/// `after`, since its completion may take long, or fail.
fn look(seen: &mut Seen, forks: &[Arc<Fork>], after: Duration, now: Instant) -> Vec<Arc<Fork>> {
    seen.retain(|id, _| forks.iter().any(|fork| fork.id == *id));
    let mut idle = Vec::new();
    for fork in forks {
        let Some(activity) = fork.activity() else { continue };
        let (before, since) = seen.entry(fork.id.clone()).or_insert((activity.faults, now));
        if *before != activity.faults || activity.is_recorded {
            (*before, *since) = (activity.faults, now);
        } else if now.duration_since(*since) >= after {
            *since = now;
            idle.push(Arc::clone(fork));
        }
    }
    idle
}
