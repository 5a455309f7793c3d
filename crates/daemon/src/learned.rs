//! What is learned of a template and kept beside its memory file: its zeros, and the working set of its forks.
//!
//! Neither is needed. What is not there, or cannot be used or kept, is a line in the log, and found or recorded anew.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use pagecast::PageSize;
use pagecast::server::chain;
use pagecast::template::{ContentIdentity, KeepError, MemFile, Recording, SidecarError, WorkingSet};
use tracing::{debug, info, warn};

use crate::fork::Fork;
use crate::local_file::LocalFile;
use crate::template::Template;

/// Takes up what is kept of a template that was added or found again, and looks for the rest of its zeros.
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

/// Takes up what is kept beside a memory file.
fn take_up_beside(template: &Arc<Template>, file: &LocalFile) {
    let content = file.mem_file.content();
    let set_path = WorkingSet::path_for(file.path());
    match WorkingSet::load(&set_path, &content) {
        Ok(set) => template.pages.set_working_set(Some(Arc::new(set))),
        Err(error) => not_used(template, "working set", &set_path, &error),
    }
    match file.mem_file.kept_zeros() {
        Ok(()) => {
            // A link or permissions of ours may have come since, and have changed its ctime.
            *zeros_kept(file) = Some(content);
            keep_in_background(template, file);
        }
        Err(error) => not_used(template, "map of zeros", &MemFile::zeros_path_for(file.path()), error),
    }
}

/// Keeps the zeros of a template beside its memory file, for the file as it is now. Nothing is written where they are there
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
        // Nothing is wrong.
        Err(error @ (KeepError::TooFresh | KeepError::NotLeased)) => {
            debug!(template = %name, why = chain(&error), "its zeros are not kept beside the memory file, and will be searched for again");
        }
        Err(error) => {
            warn!(template = %name, error = chain(&error), "its zeros cannot be kept beside the memory file, and will be searched for again");
        }
    }
}

/// The same on a thread of its own, unless there is nothing to do.
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
    // What is there is right, whatever becomes of who holds it.
    file.zeros_kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Learns from what a fork has touched, and keeps it. May wait for the disk.
pub(crate) fn learn(fork: &Fork, recording: &Recording) {
    let template = &fork.template;
    // One after the other: each goes on from what the one before has learned.
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
    // Of a file that has changed nothing is worth keeping, and what is kept there may be of the new one.
    let kept = match &template.file {
        Some(file) if template.check().is_ok() => match file.mem_file.state() {
            Ok(now) => set.save(&WorkingSet::path_for(file.path()), &now.content()),
            Err(_) => Ok(()),
        },
        _ => Ok(()),
    };
    let (size_bytes, recordings) = (set.size().get(), set.recordings());
    // Once it is kept: who sees it finds it again after a crash.
    template.pages.set_working_set(Some(Arc::new(set)));
    template.told_switched_off.store(false, Ordering::Relaxed);
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

/// Says that the working set of a template does so badly that forks are not given it any more, once.
pub(crate) fn tell_switched_off(template: &Template) {
    let score = template.pages.prefault_score();
    if score.switched_off && !template.told_switched_off.swap(true, Ordering::Relaxed) {
        warn!(
            event = "prefault_switched_off",
            template = %template.name,
            precision = score.precision,
            forks = score.forks,
            "forks use too little of the working set: it is not prefaulted until the next recording"
        );
    }
}

/// Says why something that is kept is not used, where there is something.
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
