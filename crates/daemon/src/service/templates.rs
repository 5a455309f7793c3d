//! Templates: added and removed.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};

use pagecast::PageSize;
use pagecast::server::chain;
use pagecast::template::{Lease, LeaseError, MemFile, OpenError, PageSource, SourceError};
use pagecast_client::template::Protection;
use pagecast_client::{AddTemplate, ApiError, ErrorCode};
use tracing::{info, warn};

use super::Service;
use super::refusal::{abridged, internal, refuse};
use super::registry::Name;
use super::untracked::untracked_vmms;
use crate::learned;
use crate::own_thread::survive;
use crate::ownership::Ownership;
use crate::placement::{Placement, Plan, Prefer};
use crate::protection::{self, Applied};
use crate::run_dir::Saved;
use crate::template::{Place, SavedTemplate, Spec, Template, TemplateName, Was};
use crate::vmstate;

impl Service {
    /// Adds a template; `true` beside it where it is new, `false` where the same was there.
    pub(crate) fn add_template(
        self: &Arc<Self>,
        name: &str,
        add: AddTemplate,
    ) -> Result<(Arc<Template>, bool), ApiError> {
        self.check_open()?;
        let name: TemplateName = name
            .parse()
            .map_err(|error| refuse(ErrorCode::InvalidField, format_args!("name: {error}")))?;
        let spec = self.spec(add)?;
        let taken = match self.registry.take_name(name.clone())? {
            Name::Template(there) => return same(&there, &spec).map(|there| (there, false)),
            Name::Free(taken) => taken,
        };
        let (template, protecting) = self.open_template(name, spec)?;
        let template = Arc::new(template);
        taken.add(Arc::clone(&template));
        drop(protecting);
        // Before it could be found.
        if template.is_lease_broken() {
            self.lease_broken(&template.file);
        }
        learned::take_up(&template);
        info!(
            event = "template_added",
            template = %template.name,
            mem_path = %template.spec.mem_path.display(),
            size_bytes = template.file.len().get(),
            guard = ?template.guard(),
            placed = ?template.placement.as_ref().map(Placement::how),
            "template added"
        );
        Ok((template, true))
    }

    /// Checks what was asked for.
    fn spec(&self, add: AddTemplate) -> Result<Spec, ApiError> {
        absolute("mem_path", &add.mem_path)?;
        if let Some(bytes) = add.page_size {
            check_page_size(bytes)?;
        }
        if let Some(path) = &add.vmstate_path {
            absolute("vmstate_path", path)?;
            match std::fs::metadata(path) {
                Ok(metadata) if metadata.is_file() => {}
                Ok(_) => {
                    return Err(refuse(
                        ErrorCode::TemplateInvalid,
                        format_args!("vmstate_path: {} is not a file", path.display()),
                    ));
                }
                Err(error) => {
                    return Err(refuse(
                        ErrorCode::TemplateInvalid,
                        format_args!("vmstate_path: cannot look at {}: {error}", path.display()),
                    ));
                }
            }
        }
        let said = add
            .vmstate_path
            .as_deref()
            .and_then(|path| page_size_said(path, &add.mem_path));
        if let (Some(said), Some(asked)) = (said, add.page_size)
            && said != asked
        {
            warn!(vmstate = ?add.vmstate_path, said, asked, "the snapshot has pages of another size than the template is added with");
        }
        Ok(Spec {
            mem_path: add.mem_path,
            vmstate_path: add.vmstate_path,
            page_size: add.page_size.or(said).unwrap_or(PageSize::SMALLEST),
            page_size_is_guess: add.page_size.is_none() && said.is_none(),
            protect: add.protect.unwrap_or(self.config.protect),
        })
    }

    /// Opens a template, guards it and puts its file where forks find it; undoes all of that where a part fails. What is
    /// beside it is to be held until it can be found by its name.
    fn open_template(
        self: &Arc<Self>,
        name: TemplateName,
        spec: Spec,
    ) -> Result<(Template, Option<MutexGuard<'_, ()>>), ApiError> {
        let file = Arc::new(MemFile::open(&spec.mem_path).map_err(|error| invalid(&error))?);
        if !spec.page_size().is_aligned(file.len().get()) {
            return Err(refuse(
                ErrorCode::TemplateInvalid,
                format_args!(
                    "mem_path: {} has {} bytes, which is no multiple of the page size of {} bytes",
                    spec.mem_path.display(),
                    file.len(),
                    spec.page_size
                ),
            ));
        }
        let lease = self.lease(&name, &file)?;
        self.look_before_own_change(&file);
        let may_change = spec.protect != Protection::None || protection::is_left(file.as_fd());
        let protecting = may_change.then(|| self.protecting());
        let ownership = self.ownership(&file)?;
        let protection = self.plan_protection(&spec, &file)?;
        let placement = self.place_template(&name, &spec, &file, ownership, protection, false)?;
        let template = Template::new(name, spec, file, ownership, protection, placement, lease);
        // After the link was made, which the immutable flag refuses.
        if let Err(error) = protection.enforce(template.file.as_fd()) {
            undo(&template, self.protects_too(&template.protection).as_deref());
            self.forget_template(&template.name);
            return Err(refuse(
                ErrorCode::TemplateInvalid,
                format_args!("protect: {}", chain(&error)),
            ));
        }
        self.note_own_change(&template.file);
        // In no list yet. Its own links were made under its lease, or a moment ago.
        if template.file.accept_own_change().is_ok() {
            self.save_template(&template);
        }
        Ok((template, protecting))
    }

    /// Owner and mode of a memory file, before any template of it was protected.
    pub(super) fn ownership(&self, file: &MemFile) -> Result<Ownership, ApiError> {
        let mut templates = self.registry.templates().into_iter();
        let other = templates.find(|template| template.file.identity().inode() == file.identity().inode());
        match other {
            Some(other) => Ok(other.ownership()),
            None => Ownership::of(file.as_fd()).map_err(|errno| internal("look at the memory file", &errno)),
        }
    }

    /// Held while a file is protected, or that is undone.
    fn protecting(&self) -> MutexGuard<'_, ()> {
        // There is nothing in it that could be wrong.
        self.protecting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at what protecting a file will change.
    fn plan_protection(&self, spec: &Spec, file: &MemFile) -> Result<Applied, ApiError> {
        let invalid = |why: &dyn Display| refuse(ErrorCode::TemplateInvalid, format_args!("protect: {why}"));
        let planned = Applied::plan(file.as_fd(), spec.protect).map_err(|error| invalid(&chain(&error)))?;
        match self.protects_too(&planned) {
            None => {
                if !planned.is_nothing() && spec.protect == Protection::None {
                    info!(path = %spec.mem_path.display(), "protected by an earlier pagecast, which has lost its note of that: removing the template undoes it");
                }
                Ok(planned)
            }
            Some(_) if spec.protect == Protection::None => Ok(planned.nothing()),
            Some(other) => planned.beside(&other.protection).ok_or_else(|| {
                invalid(&format_args!(
                    "the file is that of template {} too, which is protected in another way; ask for the same",
                    other.name
                ))
            }),
        }
    }

    /// A template that protects the same file.
    fn protects_too(&self, protection: &Applied) -> Option<Arc<Template>> {
        let mut templates = self.registry.templates().into_iter();
        templates.find(|template| template.protection.is_shared_with(protection))
    }

    /// The lease that guards a template, where its file system has leases and we may have one.
    pub(super) fn lease(self: &Arc<Self>, name: &TemplateName, file: &Arc<MemFile>) -> Result<Option<Lease>, ApiError> {
        let service = Arc::downgrade(self);
        let leased = Arc::clone(file);
        let on_break = move || {
            if let Some(service) = service.upgrade() {
                // A second time, where the first was a panic: nobody else is told of the break.
                for _ in 0..2 {
                    if survive("lease", || service.lease_broken(&leased)).is_some() {
                        return;
                    }
                }
            }
        };
        match file.lease(on_break) {
            Ok(lease) => Ok(Some(lease)),
            Err(error @ (LeaseError::OpenForWriting | LeaseError::Changed(_))) => Err(refuse(
                ErrorCode::TemplateInvalid,
                format_args!("mem_path: {}", chain(&error)),
            )),
            Err(error) => {
                warn!(template = %name, error = chain(&error), "no lease: a change will only be noticed once it has happened");
                Ok(None)
            }
        }
    }

    /// Puts the memory file where nobody can exchange it for another, so that every fork with `file` opens this inode.
    /// What is about to be done is kept in the run dir first.
    pub(super) fn place_template(
        &self,
        name: &TemplateName,
        spec: &Spec,
        file: &MemFile,
        ownership: Ownership,
        protection: Applied,
        resident: bool,
    ) -> Result<Option<Placement>, ApiError> {
        let mut saved = SavedTemplate {
            spec: spec.clone(),
            identity: Was::State(file.state().map_err(|error| internal("look at the template", &error))?),
            ownership: Some(ownership),
            protection,
            place: None,
            resident,
        };
        let save = |saved: &SavedTemplate| {
            let kept = self.run_dir.save(Saved::Template, name.as_str(), saved);
            kept.map_err(|error| internal("keep the template in the run dir", &error))
        };
        let placed = Plan::new(file.as_fd(), &self.run_dir.template_mem(name.as_str())).map(|plan| {
            saved.place = Some(Place::Planned(plan.clone()));
            save(&saved).map(|()| plan.carry_out(file.as_fd(), Prefer::Link))
        });
        let placement = match placed {
            Ok(Err(error)) => return Err(error),
            Ok(Ok(Ok(placement))) => Some(placement),
            Ok(Ok(Err(error))) | Err(error) => {
                warn!(
                    template = %name,
                    error = chain(&error),
                    "forks with `file` get the template's own path, which may come to lead elsewhere"
                );
                None
            }
        };
        saved.place = placement.clone().map(Place::Done);
        if let Ok(state) = file.accept_own_change() {
            saved.identity = Was::State(state);
        }
        if let Err(error) = save(&saved) {
            if let Some(placement) = &placement {
                take_away(name, placement);
            }
            return Err(error);
        }
        Ok(placement)
    }

    /// Before the daemon links this file, takes a link away, or changes its permissions, which could hide a write: looks at
    /// it, and ends the forks of its templates if it was written.
    pub(super) fn look_before_own_change(self: &Arc<Self>, file: &MemFile) {
        for template in self.templates_of(file) {
            if let Err(error) = template.file.state()
                && !error.may_pass()
            {
                self.begin_withdrawal(&template, &chain(&error), None);
            }
        }
    }

    /// After that: the ctime that the file has by now is ours, and what is kept in the run dir of its templates says so.
    pub(super) fn note_own_change(&self, file: &MemFile) {
        for template in self.templates_of(file) {
            // What has changed is told where it is looked for.
            if template.file.accept_own_change().is_ok() && template.validity.change().is_none() {
                self.save_template(&template);
            }
        }
    }

    /// The templates of this file whose forks are not being ended.
    fn templates_of(&self, file: &MemFile) -> Vec<Arc<Template>> {
        let mut templates = self.registry.templates();
        templates.retain(|template| {
            !template.validity.is_withdrawn() && template.file.identity().inode() == file.identity().inode()
        });
        templates
    }

    /// Keeps in the run dir what a template is now.
    pub(super) fn save_template(&self, template: &Template) {
        if let Err(error) = template.save(&self.run_dir, None) {
            warn!(template = %template.name, %error, "cannot be kept in the run dir as it is now");
        }
    }

    /// Keeps what is known of all templates, for the next daemon.
    pub(crate) fn keep_all(&self) {
        for template in self.registry.templates() {
            if template.validity.change().is_none() {
                self.save_template(&template);
                learned::keep(&template);
            }
        }
    }

    fn forget_template(&self, name: &TemplateName) {
        if let Err(error) = self.run_dir.forget(Saved::Template, name.as_str()) {
            warn!(template = %name, %error, "cannot be forgotten in the run dir");
        }
    }

    /// Removes a template that no fork uses, and undoes what was done to its file.
    pub(crate) fn remove_template(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
        let template = self.registry.template(name)?;
        self.find_vmms();
        let forks = self.registry.forks();
        let pids: BTreeSet<i32> = forks
            .iter()
            .filter_map(|fork| fork.vmm())
            .map(|vmm| vmm.pid())
            .collect();
        let place: Vec<_> = template.placement.iter().collect();
        let untracked = untracked_vmms(&template, &place).map_err(|error| {
            refuse(
                ErrorCode::TemplateInUse,
                format_args!("cannot find out who maps {name}: {error}"),
            )
        })?;
        let untold: Vec<String> = untracked
            .vmms
            .iter()
            .filter(|vmm| !pids.contains(&vmm.pid()))
            .map(|vmm| format!("pid {}", vmm.pid()))
            .collect();
        if !untold.is_empty() {
            return Err(refuse(
                ErrorCode::TemplateInUse,
                format_args!(
                    "forks of {name} live whose pid was not told: {}; end them first",
                    abridged(&untold)
                ),
            ));
        }
        let unknown = untracked.unknown.iter().filter(|(pid, _)| !pids.contains(pid));
        let unknown: Vec<String> = unknown.map(|(pid, why)| format!("pid {pid} ({why})")).collect();
        if !unknown.is_empty() {
            return Err(refuse(
                ErrorCode::TemplateInUse,
                format_args!(
                    "processes that cannot be looked at may map {name}: {}; end them, or run pagecast with CAP_SYS_PTRACE",
                    abridged(&unknown)
                ),
            ));
        }
        let protecting = (!template.protection.is_nothing()).then(|| self.protecting());
        let taken = self.registry.remove_template(&template)?;
        template.end_warmth();
        self.look_before_own_change(&template.file);
        undo(&template, self.protects_too(&template.protection).as_deref());
        drop(protecting);
        self.note_own_change(&template.file);
        if let Err(error) = template.forget(&self.run_dir) {
            warn!(template = name, %error, "cannot be forgotten in the run dir");
        }
        drop(taken);
        info!(event = "template_removed", template = name, "template removed");
        Ok(())
    }
}

/// Undoes what was done to the file of a template, but for what `other` protects too.
fn undo(template: &Template, other: Option<&Template>) {
    let protection = &template.protection;
    // The immutable flag first: it refuses to let the link go.
    let undone = match other {
        Some(_) if !protection.holds_links() => Ok(()),
        _ => protection.undo(template.file.as_fd()).map(drop),
    };
    let removed = template.placement.as_ref().map(Placement::remove);
    let enforced = other.map(|other| (other, other.protection.enforce(other.file.as_fd())));
    // While nobody can write the file: it is found as it is now when it is added again.
    if template.validity.change().is_none() && template.file.accept_own_change().is_ok() {
        learned::keep(template);
    }
    template.release_lease();
    if let Err(error) = undone {
        warn!(template = %template.name, error = chain(&error), "its protection cannot be undone");
    }
    if let Some(Err(error)) = removed {
        warn_not_taken_away(&template.name, &error);
    }
    if let Some((other, Err(error))) = enforced {
        warn!(template = %other.name, error = chain(&error), "it is not protected any more");
    }
}

fn take_away(name: &TemplateName, placement: &Placement) {
    if let Err(error) = placement.remove() {
        warn_not_taken_away(name, &error);
    }
}

fn warn_not_taken_away(name: &TemplateName, error: &dyn std::error::Error) {
    warn!(template = %name, error = chain(error), "its memory file cannot be taken away from the run dir");
}

/// The template that is there, where it is the one that was asked for.
fn same(there: &Arc<Template>, wanted: &Spec) -> Result<Arc<Template>, ApiError> {
    if there.spec != *wanted {
        return Err(refuse(
            ErrorCode::TemplateExists,
            format_args!(
                "a template named {} exists, and is another ({}): remove it first, or choose another name",
                there.name,
                there.spec.mem_path.display()
            ),
        ));
    }
    check(there)?;
    Ok(Arc::clone(there))
}

/// Refuses a template that cannot be forked.
pub(super) fn check(template: &Template) -> Result<(), ApiError> {
    template.check().map_err(|error| match error {
        SourceError::Changed { how } => changed(template, &how),
        error => internal("compare the memory file with what it was, which may pass", &error),
    })
}

/// It is not what it was when it was added.
pub(super) fn changed(template: &Template, how: &str) -> ApiError {
    refuse(
        ErrorCode::TemplateChanged,
        format_args!(
            "template {} has changed: {how}; remove it and add it again",
            template.name
        ),
    )
}

fn invalid(error: &OpenError) -> ApiError {
    refuse(ErrorCode::TemplateInvalid, format_args!("mem_path: {}", chain(error)))
}

/// The page size that the state file of a snapshot says, in bytes.
fn page_size_said(vmstate: &Path, mem: &Path) -> Option<u64> {
    // A memory file that cannot be looked at is told of when it is opened.
    let memory_bytes = std::fs::metadata(mem).ok()?.len();
    match vmstate::page_size_at(vmstate, memory_bytes) {
        Ok(said) => said.map(PageSize::bytes),
        Err(error) => {
            warn!(vmstate = %vmstate.display(), %error, "cannot be read: the page size of the guest is not known");
            None
        }
    }
}

fn absolute(field: &str, path: &Path) -> Result<(), ApiError> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(refuse(
        ErrorCode::InvalidField,
        format_args!("{field}: {:?} is not an absolute path", path.display().to_string()),
    ))
}

pub(super) fn check_page_size(bytes: u64) -> Result<PageSize, ApiError> {
    PageSize::from_bytes(bytes).ok_or_else(|| {
        refuse(
            ErrorCode::InvalidField,
            format_args!("page_size: {bytes} is neither 4096 nor 2097152"),
        )
    })
}
