//! Data learned about a template and kept beside its memory file: its zeros, and the working set of its forks.
//!
//! Neither is needed. If a file is missing, or cannot be used or saved, its data is searched for or recorded again.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use pagecast::PageSize;
use pagecast::server::chain;
use pagecast::template::{ContentIdentity, KeepError, MemFile, Recording, SidecarError, WorkingSet};
use tracing::{debug, info, warn};

use crate::fork::Fork;
use crate::local_file::LocalFile;
use crate::template::Template;

/// Loads the saved data of a template that was added or taken up, and searches for the rest of its zeros.
pub(crate) fn take_up(template: &Arc<Template>) {
    if let Some(file) = &template.file {
        take_up_beside(template, file);
    }
    if template.pages.zeros_are_known() {
        return;
    }
    let searched = Arc::downgrade(template);
    template.pages.find_zeros_in_background(move |found| {
        let Some(template) = searched.upgrade() else { return };
        match found {
            Ok(()) => keep(&template),
            Err(error) => {
                warn!(template = %template.name, error = chain(error), "not all of the template could be searched for zeros");
            }
        }
    });
}

/// Loads the data saved beside a memory file.
fn take_up_beside(template: &Arc<Template>, file: &LocalFile) {
    let content = file.mem_file.content();
    let set_path = WorkingSet::path_for(file.path());
    match WorkingSet::load(&set_path, &content) {
        Ok(set) => template.pages.set_working_set(Some(Arc::new(set))),
        Err(error) => not_used(template, "working set", &set_path, &error),
    }
    match file.mem_file.kept_zeros() {
        Ok(()) => {
            // The daemon may have linked or protected the file since, which changes its ctime.
            *zeros_kept(file) = Some(content);
            keep_in_background(template, file);
        }
        Err(error) => not_used(template, "map of zeros", &MemFile::zeros_path_for(file.path()), error),
    }
}

/// Saves the zeros of a template beside its memory file, for the file as it is now. Writes nothing if they are saved
/// already. Waits for the disk, and for a tick of the file system's clock if the file was linked just now.
pub(crate) fn keep(template: &Template) {
    let Some(file) = &template.file else { return };
    let mut kept_as = zeros_kept(file);
    let Ok(now) = file.mem_file.state() else { return };
    let name = &template.name;
    if *kept_as == Some(now.content()) || !template.pages.zeros_are_known() {
        return;
    }
    match file.mem_file.keep_zeros() {
        Ok(identity) => {
            *kept_as = Some(identity);
            debug!(template = %name, "its zeros are kept beside the memory file");
        }
        // These errors are expected.
        Err(error @ (KeepError::TooFresh | KeepError::NotLeased)) => {
            debug!(template = %name, why = chain(&error), "its zeros are not kept beside the memory file, and will be searched for again");
        }
        Err(error) => {
            warn!(template = %name, error = chain(&error), "its zeros cannot be kept beside the memory file, and will be searched for again");
        }
    }
}

/// Calls [`keep`] on a thread of its own, if the file has changed its identity.
fn keep_in_background(template: &Arc<Template>, file: &LocalFile) {
    let content = file.mem_file.content();
    if file.mem_file.state().is_ok_and(|now| now.content() == content) {
        return;
    }
    let kept = Arc::downgrade(template);
    let spawned = std::thread::Builder::new()
        .name("pagecast-keep".to_owned())
        .spawn(move || {
            if let Some(template) = kept.upgrade() {
                keep(&template);
            }
        });
    if let Err(error) = spawned {
        debug!(template = %template.name, %error, "no thread to keep zeros and working set of the template: the zeros will be searched for again");
    }
}

fn zeros_kept(file: &LocalFile) -> MutexGuard<'_, Option<ContentIdentity>> {
    // The value is right even if a thread panicked with the lock held.
    file.zeros_kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds a fork's recording to the working set, and saves that. May wait for the disk.
pub(crate) fn learn(fork: &Fork, recording: &Recording) {
    let template = &fork.template;
    // One at a time: each adds to the result of the one before.
    let _one = template.learning.lock().unwrap_or_else(PoisonError::into_inner);
    let recorded_bytes = recording.len() as u64 * PageSize::SMALLEST;
    let set = match template.pages.working_set() {
        Some(known) if recording.is_cut_short() && !known.learns_from(recording) => {
            info!(
                event = "recording_too_short",
                template = %template.name,
                fork = %fork.id,
                recorded_bytes,
                "the recorded fork ended before it had touched much: its recording is dropped"
            );
            return;
        }
        Some(known) => {
            let mut set = WorkingSet::clone(&known);
            set.merge(recording);
            set
        }
        None => WorkingSet::of(recording),
    };
    let name = &template.name;
    // Nothing is saved for a changed file: the saved data there may be that of the new content.
    let kept = match &template.file {
        Some(file) if template.check().is_ok() => match file.mem_file.state() {
            Ok(now) => set.save(&WorkingSet::path_for(file.path()), &now.content()),
            Err(_) => Ok(()),
        },
        _ => Ok(()),
    };
    let (size_bytes, recordings) = (set.size().get(), set.recordings());
    // Set after saving, so that a working set that was seen survives a crash.
    template.pages.set_working_set(Some(Arc::new(set)));
    template.logged_switched_off.store(false, Ordering::Relaxed);
    // Stored last: a thread that sees this finds all of the above.
    if let Some(uffd) = fork.uffd() {
        uffd.set_recorded(recorded_bytes);
    }
    if let Err(error) = kept {
        warn!(template = %name, error = chain(&error), "its working set cannot be kept beside the memory file, and is lost when the daemon stops");
    }
    info!(
        event = "working_set_learned",
        template = %name,
        fork = %fork.id,
        recorded_bytes,
        size_bytes,
        recordings,
        "recording added to the working set"
    );
}

/// Logs once that the working set of a template is switched off, since forks use too little of it.
pub(crate) fn log_switched_off(template: &Template) {
    let score = template.pages.prefault_score();
    if score.switched_off && !template.logged_switched_off.swap(true, Ordering::Relaxed) {
        warn!(
            event = "prefault_switched_off",
            template = %template.name,
            precision = score.precision,
            forks = score.forks,
            "forks use too little of the working set: it is not prefaulted until the next recording"
        );
    }
}

/// Logs why saved data is not used, if there is any.
fn not_used(template: &Template, what: &str, path: &std::path::Path, error: &SidecarError) {
    if !matches!(error, SidecarError::Missing) {
        warn!(
            event = "kept_not_used",
            template = %template.name,
            path = %path.display(),
            error = chain(error),
            "the {what} kept beside the memory file is not used"
        );
    }
}
