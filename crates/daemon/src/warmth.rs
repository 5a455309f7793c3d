//! Templates in memory ahead of their forks: brought into the page cache, and kept there where that is asked for.
//!
//! What is locked is locked by a mapping of this process, so it ends with it, however it ends. Nothing else is changed on the
//! host: the memory file, its inode and whoever guards it stay the same.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagecast::server::chain;
use pagecast::template::{Loader, Locked, MemFile, Run, Wanted};
use pagecast_client::template::{Warmth as Told, WarmthState};
use tracing::{debug, info, warn};

use crate::template::Template;

/// How long to wait until the zeros of a template are known, before all that may be data is read: a zero that is read costs as
/// much memory as a byte that is none.
const ZEROS_PATIENCE: Duration = Duration::from_mins(1);

/// How far a template has been brought into memory, and what keeps it there.
pub(crate) struct Warmth {
    file: Arc<MemFile>,
    state: Mutex<State>,
    /// Held by whoever changes what is wanted and keeps that in the run dir, so that both happen in one order.
    pub(crate) asking: Mutex<()>,
    /// A thread reads ahead of forks with `file`.
    reading_ahead: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Counts what was wished for: whoever works for an earlier wish stops.
    wish: u64,
    told: Option<Told>,
    locked: Vec<Locked>,
    /// The template is gone, or no longer what it was: nothing is wished for any more.
    over: bool,
}

/// A wish that was taken down, to be fulfilled.
#[derive(Debug)]
pub(crate) struct Wish {
    number: u64,
    resident: bool,
    wanted: Wanted,
}

impl Warmth {
    pub(crate) fn new(file: Arc<MemFile>) -> Self {
        Self {
            file,
            state: Mutex::default(),
            asking: Mutex::default(),
            reading_ahead: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is said of it.
    pub(crate) fn told(&self) -> Option<Told> {
        self.state().told.clone()
    }

    /// Takes down what is wished for from now on. What was locked for an earlier wish is let go. `None` where it is over.
    pub(crate) fn wish(&self, wanted: Wanted, resident: bool) -> Option<Wish> {
        let mut state = self.state();
        if state.over {
            return None;
        }
        state.wish += 1;
        self.file.set_pinned(false);
        state.told = Some(Told {
            state: WarmthState::Warming,
            resident,
            wanted_bytes: wanted.size().get(),
            read_bytes: 0,
            huge_bytes: 0,
            locked_bytes: 0,
            error: None,
        });
        let number = state.wish;
        // Unmapping much takes a while.
        let locked = std::mem::take(&mut state.locked);
        drop(state);
        drop(locked);
        Some(Wish {
            number,
            resident,
            wanted,
        })
    }

    /// Nothing is wished for: whoever reads stops soon, and nothing is locked any more.
    pub(crate) fn cool(&self) {
        self.stop(false);
    }

    /// The same, for good.
    pub(crate) fn end(&self) {
        self.stop(true);
    }

    fn stop(&self, for_good: bool) {
        let mut state = self.state();
        state.wish += 1;
        self.file.set_pinned(false);
        state.told = None;
        state.over |= for_good;
        let locked = std::mem::take(&mut state.locked);
        drop(state);
        drop(locked);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.state().over
    }

    /// Changes what is said, where the wish is still the last. `false` where it is not.
    fn tell(&self, wish: &Wish, change: impl FnOnce(&mut State, &mut Told)) -> bool {
        let mut state = self.state();
        if state.wish != wish.number {
            return false;
        }
        let Some(mut told) = state.told.take() else {
            return false;
        };
        change(&mut state, &mut told);
        state.told = Some(told);
        true
    }
}

/// Fulfils a wish, as long as it is the last one. Waits for the disk.
pub(crate) fn fulfil(template: &Template, wish: &Wish) {
    let done = read_all(template, wish);
    let error = match &done {
        Ok(true) => None,
        // Somebody else wishes something else by now.
        Ok(false) => return,
        Err(error) => Some(error.clone()),
    };
    let mut given_up = Vec::new();
    let is_last = template.warmth.tell(wish, |state, told| {
        if error.is_some() {
            given_up = std::mem::take(&mut state.locked);
            told.locked_bytes = 0;
            told.state = WarmthState::Failed;
        } else {
            told.state = WarmthState::Warm;
            // Said under this lock, as is that it is no more.
            template.file.set_pinned(told.resident && wish.wanted.is_all_data());
        }
        told.error.clone_from(&error);
    });
    drop(given_up);
    match (is_last, template.warmth.told(), error) {
        (true, _, Some(error)) => {
            warn!(event = "template_not_warmed", template = %template.name, error, "cannot be brought into memory");
        }
        (true, Some(told), None) => info!(
            event = "template_warmed",
            template = %template.name,
            read_bytes = told.read_bytes,
            huge_bytes = told.huge_bytes,
            locked_bytes = told.locked_bytes,
            "template brought into memory"
        ),
        _ => {}
    }
}

/// `false` where the wish is not the last any more.
fn read_all(template: &Template, wish: &Wish) -> Result<bool, String> {
    let without_zeros = wish.wanted.is_all_data().then(|| {
        template.pages.find_zeros(Instant::now() + ZEROS_PATIENCE);
        Wanted::data(&template.file)
    });
    let wanted = without_zeros.as_ref().unwrap_or(&wish.wanted);
    let bytes = wanted.size().get();
    if !template.warmth.tell(wish, |_, told| told.wanted_bytes = bytes) {
        return Ok(false);
    }
    let mut loader = Loader::dropping(&template.file);
    for &run in wanted.runs() {
        let huge = loader.load(run).map_err(|error| chain(&error))?;
        let locked = wish.resident.then(|| Locked::new(&template.file, run)).transpose();
        let locked = locked.map_err(|error| chain(&error))?;
        let goes_on = template.warmth.tell(wish, |state, told| {
            told.read_bytes += run.len.get();
            told.huge_bytes += huge.get();
            if let Some(locked) = locked {
                told.locked_bytes += locked.len().get();
                state.locked.push(locked);
            }
        });
        if !goes_on {
            return Ok(false);
        }
    }
    template.file.state().map_err(|error| chain(&error))?;
    Ok(true)
}

/// Has the working set of a template brought into the page cache, in first-touch order, ahead of a fork with `file` that is
/// just being made. Waits for nothing: one thread does it, however many forks are made meanwhile, and what is there already
/// costs it next to nothing.
pub(crate) fn read_ahead(template: &Arc<Template>) {
    let is_kept = || {
        let told = template.warmth.told();
        told.is_some_and(|told| told.resident && told.state == WarmthState::Warm)
    };
    let Some(working_set) = template.pages.working_set() else {
        return;
    };
    if is_kept() || template.warmth.reading_ahead.swap(true, Ordering::SeqCst) {
        return;
    }
    let read = Arc::clone(template);
    let spawned = std::thread::Builder::new()
        .name("pagecast-ahead".to_owned())
        .spawn(move || {
            let wanted = Wanted::working_set(&read.file, &working_set);
            let done = load(&read, wanted.runs());
            read.warmth.reading_ahead.store(false, Ordering::SeqCst);
            match done {
                Ok(()) => debug!(template = %read.name, bytes = wanted.size().get(), "working set read ahead of forks"),
                // Whoever needs the bytes will say so too.
                Err(error) => warn!(template = %read.name, error, "the working set cannot be read ahead of forks"),
            }
        });
    if let Err(error) = spawned {
        template.warmth.reading_ahead.store(false, Ordering::SeqCst);
        warn!(template = %template.name, %error, "the working set is not read ahead of forks");
    }
}

fn load(template: &Template, runs: &[Run]) -> Result<(), String> {
    let mut loader = Loader::new(&template.file);
    for &run in runs {
        if template.warmth.is_over() {
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

    fn is_cached(template: &Template, at: u64) -> bool {
        let mut page = [0; PAGE_LEN];
        let read = template.file.try_read(TemplateOffset::new(at), &mut page);
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
        let file = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
        let client = Client::new(daemon.control_socket());
        client.add_template("t", &AddTemplate::new(file.path())).await.unwrap();
        let template = Arc::clone(&daemon.service().registry().templates()[0]);
        // Whoever looks for zeros reads.
        template.pages.find_zeros(Instant::now() + PATIENCE);

        let mut recording = Recording::new(template.pages.len());
        // 24 MiB, and the very first page.
        let pages = (SIZE / 4 / PAGE..SIZE / PAGE).chain([0]);
        for page in pages {
            recording.push(TemplateOffset::new(page * PAGE));
        }
        template
            .pages
            .set_working_set(Some(Arc::new(WorkingSet::of(&recording))));
        fdatasync(template.file.as_fd()).unwrap();
        fadvise(template.file.as_fd(), 0, None, Advice::DontNeed).unwrap();
        // To ask for a page has the kernel read it, and what follows.
        if is_cached(&template, SIZE - PAGE) {
            return skip("the file system of temporary files keeps its pages in memory");
        }
        let fork = |backend| CreateFork {
            backend: Some(backend),
            ..CreateFork::of("t")
        };
        client.create_fork(&fork(Backend::Uffd)).await.unwrap();
        assert!(
            !template.warmth.reading_ahead.load(Ordering::SeqCst),
            "it prefaults by itself"
        );
        client.create_fork(&fork(Backend::File)).await.unwrap();
        let until = Instant::now() + PATIENCE;
        while template.warmth.reading_ahead.load(Ordering::SeqCst) {
            assert!(Instant::now() < until, "it is still being read");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        for at in [SIZE / 4, SIZE / 2, 0] {
            assert!(is_cached(&template, at), "{at} is not in the page cache");
        }
        assert_eq!(template.warmth.told(), None, "nobody has asked for it");
    }
}
