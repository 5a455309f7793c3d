//! Calls that read templates into memory ahead of their forks, and lock them there.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use pagecast::cgroup::MemoryCgroup;
use pagecast::memory;
use pagecast::template::Wanted;
use pagecast_client::template::WarmthState;
use pagecast_client::{ApiError, ErrorCode};
use tracing::{info, warn};

use super::refusal::{internal, refuse};
use super::templates::check;
use super::{Service, loading};
use crate::local_file::LocalFile;
use crate::template::Template;

/// Time to search for zeros if a template would not fit into memory without knowing them.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(20);

impl Service {
    /// Starts to read a template into memory. With `resident`, locks it there.
    pub(crate) fn warm_template(&self, name: &str, resident: bool) -> Result<Arc<Template>, ApiError> {
        self.check_open()?;
        let template = self.registry.template(name)?;
        check(&template)?;
        let file = file_of(&template)?;
        let lock = file.warmth.request_lock.lock().unwrap_or_else(PoisonError::into_inner);
        // Nothing to do if it is locked already, or being read for an equal request.
        let is_so = file.warmth.progress().is_some_and(|progress| {
            progress.resident == resident
                && (progress.state == WarmthState::Warming || (resident && progress.state == WarmthState::Warm))
        });
        if !is_so {
            let wanted = self::wanted(&template, file, resident).or_else(|_| {
                // The pages that are not zeros may be far fewer than those not yet known to be zeros.
                template.pages.find_zeros(Instant::now() + SEARCH_TIMEOUT);
                self::wanted(&template, file, resident)
            })?;
            if file.warmth.is_over() {
                return Err(refuse(
                    ErrorCode::TemplateNotFound,
                    format_args!("no template is named {name:?}"),
                ));
            }
            self.keep_resident(&template, resident)?;
            begin(&template, file, wanted, resident)?;
            info!(
                event = "template_warming",
                template = name,
                resident,
                "reading the template into memory"
            );
        }
        drop(lock);
        Ok(template)
    }

    /// Stops reading a template into memory, and unlocks it.
    pub(crate) fn cool_template(&self, name: &str) -> Result<(), ApiError> {
        let template = self.registry.template(name)?;
        let file = file_of(&template)?;
        let _lock = file.warmth.request_lock.lock().unwrap_or_else(PoisonError::into_inner);
        file.warmth.cool();
        if file.warmth.is_over() {
            return Ok(());
        }
        let kept = self.keep_resident(&template, false);
        info!(
            event = "template_cooled",
            template = name,
            "the template is no longer locked in memory"
        );
        kept
    }

    fn keep_resident(&self, template: &Template, resident: bool) -> Result<(), ApiError> {
        template
            .save(&self.run_dir, Some(resident))
            .map_err(|error| internal("keep the template in the run dir", &error))
    }
}

/// Locks a template in memory again, as an earlier daemon was asked to.
pub(super) fn warm_again(template: &Arc<Template>) {
    let begun = file_of(template).and_then(|file| {
        let wanted = wanted(template, file, true)?;
        begin(template, file, wanted, true)
    });
    if let Err(error) = begun {
        warn!(event = "template_not_warmed", template = %template.name, error = error.message, "the template can no longer be locked in memory");
    }
}

/// Returns the file of a template. Only a file can be read into memory.
fn file_of(template: &Template) -> Result<&Arc<LocalFile>, ApiError> {
    template.file.as_ref().ok_or_else(|| {
        refuse(
            ErrorCode::TemplateInvalid,
            format_args!(
                "template {} is no file that could be brought into memory",
                template.name
            ),
        )
    })
}

/// Returns the pages to read into memory. Refuses if they do not fit.
fn wanted(template: &Template, file: &LocalFile, resident: bool) -> Result<Wanted, ApiError> {
    let wanted = match template.pages.working_set() {
        Some(working_set) if !resident => Wanted::working_set(&file.mem_file, &working_set),
        _ => Wanted::data(&file.mem_file),
    };
    check_room(template, file, wanted.size().get(), resident)?;
    Ok(wanted)
}

/// Starts to read them, on a thread of its own.
fn begin(template: &Arc<Template>, file: &Arc<LocalFile>, wanted: Wanted, resident: bool) -> Result<(), ApiError> {
    let Some(request) = file.warmth.accept(wanted, resident) else {
        return Ok(());
    };
    let (warmed, of) = (Arc::clone(template), Arc::clone(file));
    let spawned = std::thread::Builder::new()
        .name("pagecast-warm".to_owned())
        .spawn(move || loading::fulfil(&warmed, &of, &request));
    spawned.map(drop).map_err(|error| {
        file.warmth.cool();
        internal("read the template into memory", &error)
    })
}

/// Refuses `wanted` bytes that do not fit into the memory of the host or of the daemon's cgroups, which are charged for
/// reads. Pages that are locked must fit into the available memory of a cgroup. Other pages must fit under its limit,
/// or they would evict each other.
fn check_room(template: &Template, file: &LocalFile, wanted: u64, resident: bool) -> Result<(), ApiError> {
    let progress = file.warmth.progress();
    // The memory locked for the earlier request is unlocked first.
    let locked = progress.map_or(0, |progress| progress.locked_bytes);
    let check = |room: Option<u64>, place: &str| {
        let Some(room) = room.map(memory::usable) else {
            return Ok(());
        };
        if wanted <= room.saturating_add(locked) {
            return Ok(());
        }
        Err(refuse(
            ErrorCode::NotEnoughMemory,
            format_args!(
                "{wanted} bytes of template {} are to be in memory, and {room} bytes are available {place}: free memory, \
                 or give it more",
                template.name
            ),
        ))
    };
    check(memory::host_available(), "on this host")?;
    for cgroup in MemoryCgroup::own() {
        let room = if resident { cgroup.available() } else { cgroup.limit() };
        check(room, &format!("in the cgroup {}", cgroup.folder().display()))?;
    }
    Ok(())
}
