//! Templates: added and removed.

use std::path::Path;
use std::sync::Arc;

use pagecast::PageSize;
use pagecast::server::chain;
use pagecast::template::{Lease, LeaseError, MemFile, OpenError, PageSource};
use pagecast_client::template::Protection;
use pagecast_client::{AddTemplate, ApiError, ErrorCode};
use tracing::{info, warn};

use super::{Entry, Service, internal, refuse};
use crate::placement::{self, Placement};
use crate::protection;
use crate::run_dir::Kind;
use crate::template::{Spec, Template, TemplateName};

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
        {
            let mut state = self.state();
            if let Some(there) = state.templates.get(&name) {
                return same(there, &spec).map(|there| (there, false));
            }
            if !state.busy.insert(name.clone()) {
                return Err(refuse(
                    ErrorCode::TemplateExists,
                    format_args!("a template named {name} is just being added or removed"),
                ));
            }
        }
        let opened = self.open_template(name.clone(), spec);
        let mut state = self.state();
        state.busy.remove(&name);
        let template = Arc::new(opened?);
        state.templates.insert(name, Arc::clone(&template));
        drop(state);
        info!(
            template = %template.name,
            mem_path = %template.spec.mem_path.display(),
            size_bytes = template.file.len().get(),
            guard = ?template.guard(),
            "template added"
        );
        self.look_for_zeros(&template);
        Ok((template, true))
    }

    /// Checks what was asked for.
    fn spec(&self, add: AddTemplate) -> Result<Spec, ApiError> {
        absolute("mem_path", &add.mem_path)?;
        let page_size = add.page_size.unwrap_or(PageSize::SMALLEST);
        check_page_size(page_size)?;
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
        Ok(Spec {
            mem_path: add.mem_path,
            vmstate_path: add.vmstate_path,
            page_size,
            protect: add.protect.unwrap_or(self.config.protect),
        })
    }

    /// Opens a template, guards it and puts its file where forks find it; undoes all of that where a part fails.
    fn open_template(self: &Arc<Self>, name: TemplateName, spec: Spec) -> Result<Template, ApiError> {
        let file = Arc::new(MemFile::open(&spec.mem_path).map_err(invalid)?);
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
        // Before the immutable flag, which refuses links.
        let placement = self.place_template(&name, &file);
        let undo_placement = |placement: &Option<Placement>| {
            if let Some(Err(error)) = placement.as_ref().map(Placement::remove) {
                warn!(template = %name, %error, "its memory file cannot be taken away from the run dir");
            }
        };
        let protected = match spec.protect {
            Protection::None => Ok(None),
            wanted => protection::apply(file.as_ref(), wanted).map(Some),
        };
        let protection = protected.map_err(|error| {
            undo_placement(&placement);
            refuse(ErrorCode::TemplateInvalid, format_args!("protect: {}", chain(&error)))
        })?;
        let template = Template::new(name.clone(), spec, Arc::clone(&file), protection, placement, lease);
        if let Err(error) = self.run_dir.save(Kind::Template, name.as_str(), &template.saved()) {
            self.undo(&template);
            return Err(internal("keep the template in the run dir", &error));
        }
        Ok(template)
    }

    /// The lease that guards a template, where its file system has leases and we may have one.
    pub(super) fn lease(self: &Arc<Self>, name: &TemplateName, file: &Arc<MemFile>) -> Result<Option<Lease>, ApiError> {
        let service = Arc::downgrade(self);
        let broken = name.clone();
        let on_break = move || {
            if let Some(service) = service.upgrade() {
                service.lease_broken(broken.clone());
            }
        };
        match self.leases.lease(file, on_break) {
            Ok(lease) => Ok(Some(lease)),
            Err(error @ LeaseError::OpenForWriting) => Err(refuse(
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
    pub(super) fn place_template(&self, name: &TemplateName, file: &MemFile) -> Option<Placement> {
        let at = self.run_dir.template_mem(name.as_str());
        match placement::place(file, &at) {
            Ok(placement) => Some(placement),
            Err(error) => {
                warn!(
                    template = %name,
                    error = chain(&error),
                    "forks with `file` get the template's own path, which may come to lead elsewhere"
                );
                None
            }
        }
    }

    /// Looks through the file for zeros, on a thread that may wait for the disk.
    pub(super) fn look_for_zeros(self: &Arc<Self>, template: &Arc<Template>) {
        let template = Arc::downgrade(template);
        self.runtime.spawn_blocking(move || {
            let Some(template) = template.upgrade() else { return };
            if let Err(error) = template.file.find_zeros() {
                warn!(template = %template.name, error = chain(&error), "cannot look through the template");
            }
        });
    }

    /// Removes a template that no fork uses, and undoes what was done to its file.
    pub(crate) fn remove_template(&self, name: &str) -> Result<(), ApiError> {
        let template = self.template(name)?;
        self.find_vmms();
        {
            let mut state = self.state();
            let users: Vec<String> = state
                .forks
                .iter()
                .filter(|(_, entry)| *entry.template() == template.name && uses_template(entry))
                .map(|(id, _)| id.to_string())
                .collect();
            if !users.is_empty() {
                return Err(refuse(
                    ErrorCode::TemplateInUse,
                    format_args!(
                        "forks of {name} wait or live: {}; end them and delete those forks first",
                        abridged(&users)
                    ),
                ));
            }
            if state.templates.remove(&template.name).is_none() {
                return Err(refuse(
                    ErrorCode::TemplateNotFound,
                    format_args!("no template is named {name:?}"),
                ));
            }
            state.busy.insert(template.name.clone());
        }
        let forgotten = self.run_dir.forget(Kind::Template, name);
        self.undo(&template);
        self.state().busy.remove(&template.name);
        forgotten.map_err(|error| internal("forget the template in the run dir", &error))?;
        info!(template = name, "template removed");
        Ok(())
    }

    /// Undoes what was done to the file of a template.
    fn undo(&self, template: &Template) {
        // The immutable flag first: it refuses to let the link go.
        if let Some(protection) = &template.protection
            && let Err(error) = protection.undo(template.file.as_ref())
        {
            warn!(template = %template.name, error = chain(&error), "its protection cannot be undone");
        }
        if let Some(Err(error)) = template.placement.as_ref().map(Placement::remove) {
            warn!(template = %template.name, error = chain(&error), "its memory file cannot be taken away from the run dir");
        }
        template.release_lease();
    }
}

/// Whether this fork would miss its template.
fn uses_template(entry: &Entry) -> bool {
    match entry {
        Entry::Making(_) => true,
        Entry::Made(fork) => !fork.state().is_end(),
    }
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
    there.check().map_err(|how| {
        refuse(
            ErrorCode::TemplateChanged,
            format_args!("template {} has changed: {how}; remove it and add it again", there.name),
        )
    })?;
    Ok(Arc::clone(there))
}

fn invalid(error: OpenError) -> ApiError {
    refuse(ErrorCode::TemplateInvalid, format_args!("mem_path: {}", chain(&error)))
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

/// A few names, and how many more there are.
fn abridged(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names.get(..SHOWN.min(names.len())).unwrap_or_default().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
