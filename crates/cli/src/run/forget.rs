//! Forks of runs that the daemon is to forget.

use std::time::Duration;

use pagecast_client::{Client, ErrorCode};
use tokio::task::JoinSet;

use super::folder::LeftFolder;
use crate::daemon::DaemonError;

/// Time that the daemon has to forget forks.
const PATIENCE: Duration = Duration::from_secs(10);

/// Has the daemon forget forks, all at once. Returns the problems, one a line.
pub(super) async fn forget(client: &Client, ids: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut removals = JoinSet::new();
    for id in ids {
        let client = client.clone();
        removals.spawn(async move {
            let removed = client.remove_fork(&id, true).await.map_err(DaemonError::from);
            (id, removed)
        });
    }
    let mut problems = Vec::new();
    let mut unreachable = None;
    let all = tokio::time::timeout(PATIENCE, async {
        while let Some(removal) = removals.join_next().await {
            match removal {
                // Without a daemon there is nobody to remember them.
                Ok((_, Ok(()) | Err(DaemonError::NotRunning { .. }))) | Err(_) => {}
                Ok((_, Err(error))) if error.is(ErrorCode::ForkNotFound) => {}
                Ok((id, Err(error @ DaemonError::Refused { .. }))) => {
                    problems.push(format!("the daemon does not forget {id}: {error}"));
                }
                // The same for all of them.
                Ok((_, Err(error))) => unreachable = Some(error),
            }
        }
    });
    let late = all.await.is_err();
    if let Some(error) = unreachable {
        problems.push(format!(
            "the daemon may still have the forks: {:#}",
            anyhow::Error::from(error)
        ));
    } else if late {
        problems.push(format!(
            "the daemon may still have the forks, and does not answer within {PATIENCE:?}"
        ));
    }
    problems
}

/// Cleans up after runs that were killed. Returns the problems, one a line.
pub(crate) async fn clean_up(left: Vec<LeftFolder>) -> Vec<String> {
    let mut problems = Vec::new();
    for folder in left {
        if let Err(error) = folder.end_jailed() {
            problems.push(format!("{}, left by a killed run: {error}", folder.path().display()));
            continue;
        }
        if let Some(socket) = folder.socket() {
            let remembered = forget(&Client::new(socket), folder.ids()).await;
            if !remembered.is_empty() {
                problems.extend(remembered);
                continue;
            }
        }
        let path = folder.path().to_owned();
        if let Err(error) = folder.remove() {
            problems.push(format!(
                "cannot remove {}, left by a killed run: {error}",
                path.display()
            ));
        }
    }
    problems
}
