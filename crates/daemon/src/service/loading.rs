//! Threads that read templates into memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pagecast::server::chain;
use pagecast::template::{Loader, Locked, Run, Wanted};
use pagecast_client::template::WarmthState;
use tracing::{debug, info, warn};

use crate::local_file::LocalFile;
use crate::template::Template;
use crate::warmth::WarmRequest;

/// Time to search for the zeros of a template before its data is read. A page of zeros that is read takes as much
/// memory as any other.
const ZEROS_TIMEOUT: Duration = Duration::from_mins(1);

/// Carries out a request while it is the last one. Waits for the disk.
pub(super) fn fulfil(template: &Template, file: &LocalFile, request: &WarmRequest) {
    let done = read_all(template, file, request);
    let error = match &done {
        Ok(true) => None,
        // A later request has replaced this one.
        Ok(false) => return,
        Err(error) => Some(error.clone()),
    };
    let mut given_up = Vec::new();
    let is_last = file.warmth.update(request, |locked, progress| {
        if error.is_some() {
            given_up = std::mem::take(locked);
            progress.locked_bytes = 0;
            progress.state = WarmthState::Failed;
        } else {
            progress.state = WarmthState::Warm;
            // Set under the same lock as it is reset.
            file.mem_file
                .set_pinned(progress.resident && request.wanted.is_all_data());
        }
        progress.error.clone_from(&error);
    });
    drop(given_up);
    match (is_last, file.warmth.progress(), error) {
        (true, _, Some(error)) => {
            warn!(event = "template_not_warmed", template = %template.name, error, "the template cannot be read into memory");
        }
        (true, Some(progress), None) => info!(
            event = "template_warmed",
            template = %template.name,
            read_bytes = progress.read_bytes,
            huge_bytes = progress.huge_bytes,
            locked_bytes = progress.locked_bytes,
            "template read into memory"
        ),
        _ => {}
    }
}

/// Reads the requested pages. Returns `false` if a later request has replaced this one.
fn read_all(template: &Template, file: &LocalFile, request: &WarmRequest) -> Result<bool, String> {
    let without_zeros = request.wanted.is_all_data().then(|| {
        template.pages.find_zeros(Instant::now() + ZEROS_TIMEOUT);
        Wanted::data(&file.mem_file)
    });
    let wanted = without_zeros.as_ref().unwrap_or(&request.wanted);
    let bytes = wanted.size().get();
    if !file.warmth.update(request, |_, progress| progress.wanted_bytes = bytes) {
        return Ok(false);
    }
    let mut loader = Loader::dropping(&file.mem_file);
    for &run in wanted.runs() {
        let huge = loader.load(run).map_err(|error| chain(&error))?;
        let locked = request.resident.then(|| Locked::new(&file.mem_file, run)).transpose();
        let locked = locked.map_err(|error| chain(&error))?;
        let goes_on = file.warmth.update(request, |all_locked, progress| {
            progress.read_bytes += run.len.get();
            progress.huge_bytes += huge.get();
            if let Some(locked) = locked {
                progress.locked_bytes += locked.len().get();
                all_locked.push(locked);
            }
        });
        if !goes_on {
            return Ok(false);
        }
    }
    file.mem_file.state().map_err(|error| chain(&error))?;
    Ok(true)
}

/// Starts to read the working set of a template into the page cache, in first-touch order, for a fork with `file` that
/// is being created. Does not wait. One thread reads for any number of forks, and skips cached pages at almost no cost.
pub(super) fn read_ahead(template: &Template, file: &Arc<LocalFile>) {
    let is_kept = || {
        let progress = file.warmth.progress();
        progress.is_some_and(|progress| progress.resident && progress.state == WarmthState::Warm)
    };
    let Some(working_set) = template.pages.working_set() else {
        return;
    };
    if is_kept() || file.warmth.reading_ahead.swap(true, Ordering::SeqCst) {
        return;
    }
    let (name, of) = (template.name.clone(), Arc::clone(file));
    let spawned = std::thread::Builder::new()
        .name("pagecast-ahead".to_owned())
        .spawn(move || {
            let wanted = Wanted::working_set(&of.mem_file, &working_set);
            let done = load(&of, wanted.runs());
            of.warmth.reading_ahead.store(false, Ordering::SeqCst);
            match done {
                Ok(()) => debug!(template = %name, bytes = wanted.size().get(), "working set read ahead of forks"),
                // A VMM that needs these bytes will fail too.
                Err(error) => warn!(template = %name, error, "the working set cannot be read ahead of forks"),
            }
        });
    if let Err(error) = spawned {
        file.warmth.reading_ahead.store(false, Ordering::SeqCst);
        warn!(template = %template.name, %error, "the working set is not read ahead of forks");
    }
}

fn load(file: &LocalFile, runs: &[Run]) -> Result<(), String> {
    let mut loader = Loader::new(&file.mem_file);
    for &run in runs {
        if file.warmth.is_over() {
            return Ok(());
        }
        loader.load(run).map_err(|error| chain(&error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use pagecast::template::{Page, PageSource as _, Recording, TemplateOffset, WorkingSet};
    use pagecast_client::{AddTemplate, Backend, Client, CreateFork};
    use pagecast_testkit::skip::skip;
    use pagecast_testkit::template_file::{TemplateFile, TemplateModel};
    use rustix::fs::{Advice, fadvise, fdatasync};

    use super::*;
    use crate::Settings;
    use crate::daemon::Daemon;

    const PAGE: u64 = 4096;
    const PAGE_LEN: usize = 4096;
    const SIZE: u64 = 32 << 20;
    const PATIENCE: Duration = Duration::from_secs(40);

    fn is_cached(file: &LocalFile, at: u64) -> bool {
        let mut page = [0; PAGE_LEN];
        let read = file.mem_file.try_read(TemplateOffset::new(at), &mut page);
        !matches!(read.unwrap(), Page::NotReady)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_working_set_is_read_ahead_of_a_fork_with_file() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            run_dir: Some(folder.path().join("run")),
            ..Settings::default()
        };
        let daemon = Daemon::start(settings.resolve().unwrap()).await.unwrap();
        let on_disk = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
        let client = Client::new(daemon.control_socket());
        client
            .add_template("t", &AddTemplate::new(on_disk.path()))
            .await
            .unwrap();
        let template = Arc::clone(&daemon.service().registry().templates()[0]);
        let file = template.file.as_ref().unwrap();
        // The search for zeros reads the file, so it must end first.
        template.pages.find_zeros(Instant::now() + PATIENCE);

        let mut recording = Recording::new(template.pages.len());
        // 24 MiB, and the first page.
        let pages = (SIZE / 4 / PAGE..SIZE / PAGE).chain([0]);
        for page in pages {
            recording.push(TemplateOffset::new(page * PAGE));
        }
        template
            .pages
            .set_working_set(Some(Arc::new(WorkingSet::of(&recording))));
        fdatasync(file.mem_file.as_fd()).unwrap();
        fadvise(file.mem_file.as_fd(), 0, None, Advice::DontNeed).unwrap();
        // Checking a page makes the kernel read it, and the following ones.
        if is_cached(file, SIZE - PAGE) {
            return skip("the file system of temporary files keeps its pages in memory");
        }
        let fork = |backend| CreateFork {
            backend: Some(backend),
            ..CreateFork::of("t")
        };
        client.create_fork(&fork(Backend::Uffd)).await.unwrap();
        assert!(
            !file.warmth.reading_ahead.load(Ordering::SeqCst),
            "it prefaults by itself"
        );
        client.create_fork(&fork(Backend::File)).await.unwrap();
        let until = Instant::now() + PATIENCE;
        while file.warmth.reading_ahead.load(Ordering::SeqCst) {
            assert!(Instant::now() < until, "it is still being read");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        for at in [SIZE / 4, SIZE / 2, 0] {
            assert!(is_cached(file, at), "{at} is not in the page cache");
        }
        assert_eq!(file.warmth.progress(), None, "nobody has asked for it");
    }
}
