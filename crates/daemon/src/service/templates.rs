//! Calls that add and remove templates.

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
use crate::inode::InodeId;
use crate::learned;
use crate::local_file::{FileSpec, LocalFile, Place, SavedIdentity, SavedTemplate, Spec};
use crate::own_thread::survive;
use crate::ownership::Ownership;
use crate::placement::{Placement, PlannedPlacement, Prefer};
use crate::protection::{self, Applied};
use crate::run_dir::Saved;
use crate::template::{Template, TemplateName};
use crate::vmstate;

impl Service {
    /// Adds a template. Returns it with `true` if it is new, `false` if the same one existed.
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
        // The lease may have been broken before the template was in the registry.
        let file = template.file.as_deref();
        if let Some(file) = file.filter(|file| file.is_lease_broken()) {
            self.lease_broken(&file.mem_file);
        }
        learned::take_up(&template);
        info!(
            event = "template_added",
            template = %template.name,
            mem_path = file.map(|file| display(file.path().display())),
            size_bytes = template.pages.len().get(),
            guard = ?template.guard(),
            placed = ?file.and_then(|file| file.placement.as_ref()).map(Placement::how),
            "template added"
        );
        Ok((template, true))
    }

    /// Checks the request.
    fn spec(&self, add: AddTemplate) -> Result<FileSpec, ApiError> {
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
                        format_args!("vmstate_path: cannot check {}: {error}", path.display()),
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
            warn!(vmstate = ?add.vmstate_path, said, asked, "the page size of the snapshot differs from the requested one");
        }
        Ok(FileSpec {
            spec: Spec {
                vmstate_path: add.vmstate_path,
                page_size: add.page_size.or(said).unwrap_or(PageSize::SMALLEST),
                page_size_is_guess: add.page_size.is_none() && said.is_none(),
            },
            mem_path: add.mem_path,
            protect: add.protect.unwrap_or(self.config.protect),
        })
    }

    /// Opens a template, leases, protects and places its file; undoes all of that if a step fails. The caller holds the
    /// returned guard until the template is in the registry.
    fn open_template(
        self: &Arc<Self>,
        name: TemplateName,
        wanted: FileSpec,
    ) -> Result<(Template, Option<MutexGuard<'_, ()>>), ApiError> {
        let mem_file = Arc::new(MemFile::open(&wanted.mem_path).map_err(|error| invalid(&error))?);
        if !wanted.spec.page_size().is_aligned(mem_file.len().get()) {
            return Err(refuse(
                ErrorCode::TemplateInvalid,
                format_args!(
                    "mem_path: {} has {} bytes, which is not a multiple of the page size of {} bytes",
                    wanted.mem_path.display(),
                    mem_file.len(),
                    wanted.spec.page_size
                ),
            ));
        }
        let lease = self.lease(&name, &mem_file)?;
        let inode = mem_file.identity().inode().into();
        self.look_before_own_change(inode);
        let may_change = wanted.protect != Protection::None || protection::is_left(mem_file.as_fd());
        let protecting = may_change.then(|| self.protecting());
        let ownership = self.ownership(&mem_file)?;
        let protection = self.plan_protection(&wanted, &mem_file)?;
        let placement = self.place_template(&name, &wanted, &mem_file, ownership, protection, false)?;
        let file = Arc::new(LocalFile::new(
            mem_file,
            wanted.protect,
            ownership,
            protection,
            placement,
            lease,
        ));
        let template = Template::of_file(name, wanted.spec, Arc::clone(&file));
        // Protected after the link was made, since an immutable file cannot be linked.
        if let Err(error) = protection.enforce(file.mem_file.as_fd()) {
            undo(&template, &file, self.protects_too(&protection).as_ref());
            self.forget_template(&template);
            return Err(refuse(
                ErrorCode::TemplateInvalid,
                format_args!("protect: {}", chain(&error)),
            ));
        }
        self.note_own_change(inode);
        // Accepted here, since the template is not in the registry yet. Its link was made under its lease, or a moment
        // ago.
        if file.mem_file.accept_own_change().is_ok() {
            self.save_template(&template);
        }
        Ok((template, protecting))
    }

    /// Returns owner and mode of a memory file before any template of it was protected.
    pub(super) fn ownership(&self, file: &MemFile) -> Result<Ownership, ApiError> {
        let inode = file.identity().inode().into();
        let templates = self.registry.templates().into_iter();
        let mut files = templates.filter_map(|template| template.file.clone());
        match files.find(|other| other.inode() == inode) {
            Some(other) => Ok(other.ownership()),
            None => Ownership::of(file.as_fd()).map_err(|errno| internal("look at the memory file", &errno)),
        }
    }

    /// Locks the protection of files, while one is protected or its protection undone.
    fn protecting(&self) -> MutexGuard<'_, ()> {
        // The lock holds no data, so poisoning does not matter.
        self.protecting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Plans the protection of a file.
    fn plan_protection(&self, spec: &FileSpec, file: &MemFile) -> Result<Applied, ApiError> {
        let invalid = |why: &dyn Display| refuse(ErrorCode::TemplateInvalid, format_args!("protect: {why}"));
        let planned = Applied::plan(file.as_fd(), spec.protect).map_err(|error| invalid(&chain(&error)))?;
        match self.protects_too(&planned) {
            None => {
                if !planned.is_nothing() && spec.protect == Protection::None {
                    info!(path = %spec.mem_path.display(), "protected by an earlier pagecast, whose run dir is lost: removing the template undoes it");
                }
                Ok(planned)
            }
            Some(_) if spec.protect == Protection::None => Ok(planned.nothing()),
            Some((other, file)) => planned.beside(&file.protection).ok_or_else(|| {
                invalid(&format_args!(
                    "the file is that of template {other} too, which is protected in another way; ask for the same"
                ))
            }),
        }
    }

    /// Returns another template that protects the same file, with its handle of that file.
    fn protects_too(&self, protection: &Applied) -> Option<(TemplateName, Arc<LocalFile>)> {
        self.registry.templates().into_iter().find_map(|template| {
            let file = template.file.clone()?;
            let is_shared = file.protection.is_shared_with(protection);
            is_shared.then(|| (template.name.clone(), file))
        })
    }

    /// Takes the lease that guards a template, if its file system has leases and this process may take one.
    pub(super) fn lease(self: &Arc<Self>, name: &TemplateName, file: &Arc<MemFile>) -> Result<Option<Lease>, ApiError> {
        let service = Arc::downgrade(self);
        let leased = Arc::clone(file);
        let on_break = move || {
            if let Some(service) = service.upgrade() {
                // Tried again after a panic, since the break is reported only once.
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
                warn!(template = %name, error = chain(&error), "no lease: a write will be noticed afterwards only");
                Ok(None)
            }
        }
    }

    /// Places the memory file in the run dir, where no other user can replace it, so that every fork with `file` opens
    /// this inode. Saves the plan in the run dir first.
    pub(super) fn place_template(
        &self,
        name: &TemplateName,
        spec: &FileSpec,
        file: &MemFile,
        ownership: Ownership,
        protection: Applied,
        resident: bool,
    ) -> Result<Option<Placement>, ApiError> {
        let mut saved = SavedTemplate {
            spec: spec.clone(),
            identity: SavedIdentity::State(file.state().map_err(|error| internal("look at the template", &error))?),
            ownership: Some(ownership),
            protection,
            place: None,
            resident,
        };
        let save = |saved: &SavedTemplate| {
            let kept = self.run_dir.save(Saved::Template, name.as_str(), saved);
            kept.map_err(|error| internal("keep the template in the run dir", &error))
        };
        let placed = PlannedPlacement::new(file.as_fd(), &self.run_dir.template_mem(name.as_str())).map(|plan| {
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
                    "forks with `file` get the template's own path, which may name another file later"
                );
                None
            }
        };
        saved.place = placement.clone().map(Place::Done);
        if let Ok(state) = file.accept_own_change() {
            saved.identity = SavedIdentity::State(state);
        }
        if let Err(error) = save(&saved) {
            if let Some(placement) = &placement {
                take_away(name, placement);
            }
            return Err(error);
        }
        Ok(placement)
    }

    /// Ends the forks of all templates of this file if it was written. To be called before the daemon changes its links
    /// or permissions, since that changes the ctime and could hide a write.
    pub(super) fn look_before_own_change(self: &Arc<Self>, inode: InodeId) {
        for (template, file) in self.templates_of(inode) {
            if let Err(error) = file.mem_file.state()
                && !error.may_pass()
            {
                self.begin_withdrawal(&template, &chain(&error), None);
            }
        }
    }

    /// Accepts the ctime after such a change, and saves it in the records of all templates of this file.
    pub(super) fn note_own_change(&self, inode: InodeId) {
        for (template, file) in self.templates_of(inode) {
            // A changed template is reported by the next comparison.
            if file.mem_file.accept_own_change().is_ok() && template.validity.change().is_none() {
                self.save_template(&template);
            }
        }
    }

    /// Returns the templates of this file whose forks are not being ended.
    fn templates_of(&self, inode: InodeId) -> Vec<(Arc<Template>, Arc<LocalFile>)> {
        let templates = self.registry.templates().into_iter();
        let valid = templates.filter(|template| !template.validity.is_withdrawn());
        let with_file = valid.filter_map(|template| template.file.clone().map(|file| (template, file)));
        with_file.filter(|(_, file)| file.inode() == inode).collect()
    }

    /// Saves the record of a template in the run dir.
    pub(super) fn save_template(&self, template: &Template) {
        if let Err(error) = template.save(&self.run_dir, None) {
            warn!(template = %template.name, %error, "cannot be kept in the run dir as it is now");
        }
    }

    /// Saves the records and learned data of all templates, for the next daemon.
    pub(crate) fn keep_all(&self) {
        for template in self.registry.templates() {
            if template.validity.change().is_none() {
                self.save_template(&template);
                learned::keep(&template);
            }
        }
    }

    /// Deletes the record of a template in the run dir.
    fn forget_template(&self, template: &Template) {
        if let Err(error) = template.forget(&self.run_dir) {
            warn!(template = %template.name, %error, "cannot be forgotten in the run dir");
        }
    }

    /// Removes a template that no fork uses, and undoes all changes to its file.
    pub(crate) fn remove_template(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
        let template = self.registry.template(name)?;
        self.find_vmms();
        let forks = self.registry.forks();
        let pids: BTreeSet<i32> = forks
            .iter()
            .filter_map(|fork| fork.vmm())
            .map(|vmm| vmm.pid())
            .collect();
        let file = template.file.as_deref();
        if let Some(file) = file {
            check_unmapped(name, file, &pids)?;
        }
        let protecting = file
            .filter(|file| !file.protection.is_nothing())
            .map(|_| self.protecting());
        let taken = self.registry.remove_template(&template)?;
        if let Some(file) = file {
            file.end_warmth();
            self.look_before_own_change(file.inode());
            undo(&template, file, self.protects_too(&file.protection).as_ref());
            drop(protecting);
            self.note_own_change(file.inode());
        }
        self.forget_template(&template);
        drop(taken);
        info!(event = "template_removed", template = name, "template removed");
        Ok(())
    }
}

/// Refuses to remove a template if VMMs with other pids than `pids` map its file, or may map it.
fn check_unmapped(name: &str, file: &LocalFile, pids: &BTreeSet<i32>) -> Result<(), ApiError> {
    let place: Vec<_> = file.placement.iter().collect();
    let untracked = untracked_vmms(file, &place).map_err(|error| {
        refuse(
            ErrorCode::TemplateInUse,
            format_args!("cannot find the processes that map {name}: {error}"),
        )
    })?;
    let others: Vec<String> = untracked
        .vmms
        .iter()
        .filter(|vmm| !pids.contains(&vmm.pid()))
        .map(|vmm| format!("pid {}", vmm.pid()))
        .collect();
    if !others.is_empty() {
        return Err(refuse(
            ErrorCode::TemplateInUse,
            format_args!(
                "VMMs whose pid was not given map {name}: {}; end them first",
                abridged(&others)
            ),
        ));
    }
    let unknown = untracked.unknown.iter().filter(|(pid, _)| !pids.contains(pid));
    let unknown: Vec<String> = unknown.map(|(pid, why)| format!("pid {pid} ({why})")).collect();
    if !unknown.is_empty() {
        return Err(refuse(
            ErrorCode::TemplateInUse,
            format_args!(
                "processes that pagecast may not inspect may map {name}: {}; end them, or run pagecast with CAP_SYS_PTRACE",
                abridged(&unknown)
            ),
        ));
    }
    Ok(())
}

/// Undoes all changes to the file of a template, except for a protection that `other` shares.
fn undo(template: &Template, file: &LocalFile, other: Option<&(TemplateName, Arc<LocalFile>)>) {
    let protection = &file.protection;
    // The immutable flag first, since it prevents removing the link.
    let undone = match other {
        Some(_) if !protection.holds_links() => Ok(()),
        _ => protection.undo(file.mem_file.as_fd()).map(drop),
    };
    let removed = file.placement.as_ref().map(Placement::remove);
    let enforced = other.map(|(other, file)| (other, file.protection.enforce(file.mem_file.as_fd())));
    // Saved while the lease still holds writers off, so that the data is valid if the file is added again.
    if template.validity.change().is_none() && file.mem_file.accept_own_change().is_ok() {
        learned::keep(template);
    }
    file.release_lease();
    if let Err(error) = undone {
        warn!(template = %template.name, error = chain(&error), "its protection cannot be undone");
    }
    if let Some(Err(error)) = removed {
        warn_not_taken_away(&template.name, &error);
    }
    if let Some((other, Err(error))) = enforced {
        warn!(template = %other, error = chain(&error), "it is no longer protected");
    }
}

fn take_away(name: &TemplateName, placement: &Placement) {
    if let Err(error) = placement.remove() {
        warn_not_taken_away(name, &error);
    }
}

fn warn_not_taken_away(name: &TemplateName, error: &dyn std::error::Error) {
    warn!(template = %name, error = chain(error), "its memory file cannot be removed from the run dir");
}

/// Returns the existing template if it equals the requested one.
fn same(there: &Arc<Template>, wanted: &FileSpec) -> Result<Arc<Template>, ApiError> {
    if !there.is_asked_for(wanted) {
        let of = there.file.as_ref().map(|file| format!(" ({})", file.path().display()));
        return Err(refuse(
            ErrorCode::TemplateExists,
            format_args!(
                "a template named {} exists, and is another{}: remove it first, or choose another name",
                there.name,
                of.unwrap_or_default()
            ),
        ));
    }
    check(there)?;
    Ok(Arc::clone(there))
}

/// Returns an error if a template cannot be forked.
pub(super) fn check(template: &Template) -> Result<(), ApiError> {
    template.check().map_err(|error| match error {
        SourceError::Changed { how } => changed(template, &how),
        error => internal(
            "compare the memory file with its earlier state, which may succeed later",
            &error,
        ),
    })
}

/// Creates the error for a template that has changed since it was added.
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

/// Returns the page size from the state file of a snapshot, in bytes.
fn page_size_said(vmstate: &Path, mem: &Path) -> Option<u64> {
    // An error of the memory file is reported when it is opened.
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
