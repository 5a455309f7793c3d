//! The templates and forks of the daemon, by name, under one lock.
//!
//! - A name is taken before its template is opened, and until that of a removed one is cleaned up. So is the id of a fork.
//! - A template can be removed once its forks have ended. A fork that is being made counts as one that lives.
//! - A fork that has ended can be read until it is deleted, or too many others have ended since.
//! - The numbers of a fork or template move to the totals in the same moment as it goes, so no metric counts down.
//!
//! Nothing under this lock waits for a disk or a process, but the deletion of what is kept of a fork.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagecast::server::ForkId;
use pagecast_client::{ApiError, Backend, ErrorCode};

use super::refusal::{abridged, internal, refuse};
use super::totals::Totals;
use crate::fork::Fork;
use crate::template::{Template, TemplateName};

/// The templates and forks that exist, and the numbers of those that are gone.
pub(crate) struct Registry {
    /// How many forks may wait or live at once.
    max_forks: usize,
    /// How many forks that have ended are remembered.
    ended_forks: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    templates: BTreeMap<TemplateName, Arc<Template>>,
    /// Names of templates that are just being added or removed.
    busy: BTreeSet<TemplateName>,
    forks: BTreeMap<ForkId, Entry>,
    /// Forks that have ended, in that order.
    ended: VecDeque<ForkId>,
    /// The number in the last id that was made up.
    last_id: u64,
    totals: Totals,
}

/// A fork by its id.
enum Entry {
    /// Just being made.
    Making(TemplateName),
    Made(Arc<Fork>),
}

/// All that exists at one moment, and the numbers of what existed.
pub(crate) struct Snapshot {
    /// All templates.
    pub(crate) templates: Vec<Arc<Template>>,
    /// All forks, those that have ended included.
    pub(crate) forks: Vec<Arc<Fork>>,
    /// The numbers of templates and forks that are gone.
    pub(crate) totals: Totals,
}

impl Registry {
    /// Creates an empty one. At most `max_forks` wait or live at once, and `ended_forks` that have ended are remembered.
    pub(super) fn new(max_forks: usize, ended_forks: usize) -> Self {
        Self {
            max_forks,
            ended_forks,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic under this lock leaves a state that is true all the same.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All templates, by name.
    pub(crate) fn templates(&self) -> Vec<Arc<Template>> {
        self.state().templates.values().cloned().collect()
    }

    /// All forks, by id.
    pub(crate) fn forks(&self) -> Vec<Arc<Fork>> {
        self.state().made_forks()
    }

    /// All of it at one moment.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let state = self.state();
        Snapshot {
            templates: state.templates.values().cloned().collect(),
            forks: state.made_forks(),
            totals: state.totals.clone(),
        }
    }

    /// The template of this name.
    pub(crate) fn template(&self, name: &str) -> Result<Arc<Template>, ApiError> {
        self.state().template(name)
    }

    /// The fork of this id, once it is made.
    pub(crate) fn fork(&self, id: &str) -> Result<Arc<Fork>, ApiError> {
        let parsed = id.parse::<ForkId>().ok();
        let state = self.state();
        let fork = parsed.and_then(|id| state.forks.get(&id).and_then(Entry::made).cloned());
        fork.ok_or_else(|| refuse(ErrorCode::ForkNotFound, format_args!("no fork has the id {id:?}")))
    }

    /// Takes the name for a template that is to be added, unless there is one.
    pub(super) fn take_name(&self, name: TemplateName) -> Result<Name<'_>, ApiError> {
        let mut state = self.state();
        if let Some(there) = state.templates.get(&name) {
            return Ok(Name::Template(Arc::clone(there)));
        }
        if !state.busy.insert(name.clone()) {
            return Err(refuse(
                ErrorCode::TemplateExists,
                format_args!("a template named {name} is being added or removed"),
            ));
        }
        Ok(Name::Free(TakenName::new(self, name)))
    }

    /// Adds a template that was found again at the start.
    pub(super) fn restore_template(&self, template: Arc<Template>) {
        self.state().templates.insert(template.name.clone(), template);
    }

    /// Removes a template that no fork uses. Its name stays taken until what is returned is dropped.
    pub(super) fn remove_template(&self, template: &Arc<Template>) -> Result<TakenName<'_>, ApiError> {
        let name = &template.name;
        let mut state = self.state();
        let users = state.users(name);
        if !users.is_empty() {
            return Err(refuse(
                ErrorCode::TemplateInUse,
                format_args!(
                    "forks of {name} wait or live: {}; end them and delete those forks first",
                    abridged(&users)
                ),
            ));
        }
        // Another call may have removed it and added another of this name.
        if !state
            .template(name.as_str())
            .is_ok_and(|there| Arc::ptr_eq(&there, template))
        {
            return Err(template_not_found(name.as_str()));
        }
        state.templates.remove(name);
        state.totals.add_reads(name, template.pages.slow_reads());
        state.forget_totals(name);
        state.busy.insert(name.clone());
        Ok(TakenName::new(self, name.clone()))
    }

    /// Takes an id for a new fork, `wanted` or one that is made up. The template cannot be removed meanwhile.
    pub(super) fn take_id(&self, template: &str, wanted: Option<ForkId>) -> Result<TakenId<'_>, ApiError> {
        let most = self.max_forks;
        let mut state = self.state();
        let template = state.template(template)?;
        if state.forks.len().saturating_sub(state.ended.len()) >= most {
            return Err(refuse(
                ErrorCode::TooManyForks,
                format_args!("{most} forks wait or live, which is the maximum (max_forks): end some first"),
            ));
        }
        let id = match wanted {
            Some(id) if state.forks.contains_key(&id) => {
                return Err(refuse(
                    ErrorCode::ForkExists,
                    format_args!("a fork with the id {id} exists: delete it first, or choose another id"),
                ));
            }
            Some(id) => id,
            None => state.free_id()?,
        };
        state.forks.insert(id.clone(), Entry::Making(template.name.clone()));
        Ok(TakenId {
            registry: self,
            id,
            template,
            is_taken: true,
        })
    }

    /// Adds a fork that was found again at the start.
    pub(super) fn restore_fork(&self, fork: Arc<Fork>) {
        self.state().forks.insert(fork.id.clone(), Entry::Made(fork));
    }

    /// Notes that a fork has ended, and returns those that are forgotten for it. Returns `None` if that was noted before, or
    /// the fork is not here: its end may be reported by its event and by the call that made it, and late.
    pub(super) fn note_end(&self, fork: &Arc<Fork>) -> Option<Vec<Arc<Fork>>> {
        let mut state = self.state();
        if !fork.state().is_end() || !state.has(fork) || state.ended.contains(&fork.id) {
            return None;
        }
        state.ended.push_back(fork.id.clone());
        let mut forgotten = Vec::new();
        while state.ended.len() > self.ended_forks {
            let Some(oldest) = state.ended.pop_front() else { break };
            forgotten.extend(state.remove_fork(&oldest));
        }
        Some(forgotten)
    }

    /// Removes a fork. Returns whether its end had been noted, or `None` if it is not here any more.
    pub(super) fn remove_fork(&self, fork: &Arc<Fork>) -> Option<bool> {
        let mut state = self.state();
        if !state.has(fork) {
            return None;
        }
        let was_noted = state.ended.contains(&fork.id);
        state.remove_fork(&fork.id);
        state.ended.retain(|ended| *ended != fork.id);
        Some(was_noted)
    }

    /// Calls `act` unless the id of this fork is another's by now. Nobody can take the id meanwhile.
    pub(super) fn unless_replaced<T>(&self, fork: &Fork, act: impl FnOnce() -> T) -> Option<T> {
        let state = self.state();
        let is_it = |entry: &Entry| entry.made().is_some_and(|made| std::ptr::eq(&raw const **made, fork));
        state.forks.get(&fork.id).is_none_or(is_it).then(act)
    }

    /// Counts a VMM that was killed and is that of no fork here.
    pub(super) fn count_kill(&self, template: &TemplateName, backend: Backend, reason: &str) {
        self.state().totals.count_kill(template, backend, reason);
    }
}

impl State {
    fn template(&self, name: &str) -> Result<Arc<Template>, ApiError> {
        let parsed = name.parse::<TemplateName>().ok();
        let template = parsed.and_then(|name| self.templates.get(&name).cloned());
        template.ok_or_else(|| template_not_found(name))
    }

    fn made_forks(&self) -> Vec<Arc<Fork>> {
        self.forks.values().filter_map(Entry::made).cloned().collect()
    }

    /// The ids of forks that would miss this template.
    fn users(&self, template: &TemplateName) -> Vec<String> {
        let forks = self.forks.iter();
        let users = forks.filter(|(_, entry)| entry.template() == template && entry.uses_template());
        users.map(|(id, _)| id.to_string()).collect()
    }

    /// An id that no fork has and no earlier call has made up.
    fn free_id(&mut self) -> Result<ForkId, ApiError> {
        loop {
            self.last_id += 1;
            let id: ForkId = format!("fork-{}", self.last_id)
                .parse()
                .map_err(|error| internal("choose an id", &error))?;
            if !self.forks.contains_key(&id) {
                return Ok(id);
            }
        }
    }

    /// Whether it is this very fork that has its id.
    fn has(&self, fork: &Arc<Fork>) -> bool {
        let there = self.forks.get(&fork.id).and_then(Entry::made);
        there.is_some_and(|there| Arc::ptr_eq(there, fork))
    }

    /// Removes a fork; its numbers stay.
    fn remove_fork(&mut self, id: &ForkId) -> Option<Arc<Fork>> {
        let Some(Entry::Made(fork)) = self.forks.remove(id) else {
            return None;
        };
        self.totals.keep(&fork);
        self.forget_totals(&fork.template.name);
        Some(fork)
    }

    /// Forgets the numbers of a template that is gone, with all its forks.
    fn forget_totals(&mut self, name: &TemplateName) {
        if !self.templates.contains_key(name) && !self.forks.values().any(|entry| entry.template() == name) {
            self.totals.forget(name);
        }
    }
}

impl Entry {
    fn template(&self) -> &TemplateName {
        match self {
            Self::Making(template) => template,
            Self::Made(fork) => &fork.template.name,
        }
    }

    fn made(&self) -> Option<&Arc<Fork>> {
        match self {
            Self::Making(_) => None,
            Self::Made(fork) => Some(fork),
        }
    }

    /// Whether this fork would miss its template.
    fn uses_template(&self) -> bool {
        self.made().is_none_or(|fork| !fork.state().is_end())
    }
}

/// A name that a template was to be added by.
pub(super) enum Name<'a> {
    Free(TakenName<'a>),
    Template(Arc<Template>),
}

/// The name of a template that is being added or removed: no other can be added by it. Given back when this is dropped.
pub(super) struct TakenName<'a> {
    registry: &'a Registry,
    name: TemplateName,
    /// `false` once a template has it.
    is_taken: bool,
}

impl<'a> TakenName<'a> {
    fn new(registry: &'a Registry, name: TemplateName) -> Self {
        Self {
            registry,
            name,
            is_taken: true,
        }
    }

    /// Adds the template of this name.
    pub(super) fn add(mut self, template: Arc<Template>) {
        self.is_taken = false;
        let mut state = self.registry.state();
        state.busy.remove(&self.name);
        state.templates.insert(self.name.clone(), template);
    }
}

impl Drop for TakenName<'_> {
    fn drop(&mut self) {
        if self.is_taken {
            self.registry.state().busy.remove(&self.name);
        }
    }
}

/// The id of a fork that is being made. Given back when this is dropped.
pub(super) struct TakenId<'a> {
    registry: &'a Registry,
    pub(super) id: ForkId,
    pub(super) template: Arc<Template>,
    /// `false` once a fork has it.
    is_taken: bool,
}

impl TakenId<'_> {
    /// Adds the fork of this id.
    ///
    /// # Errors
    ///
    /// The change of its template, noticed meanwhile: all forks that were here may have been ended for it already.
    pub(super) fn add(mut self, fork: &Arc<Fork>) -> Result<(), Arc<str>> {
        let mut state = self.registry.state();
        if let Some(how) = fork.template.validity.change() {
            return Err(how);
        }
        self.is_taken = false;
        state.forks.insert(self.id.clone(), Entry::Made(Arc::clone(fork)));
        Ok(())
    }
}

impl Drop for TakenId<'_> {
    fn drop(&mut self) {
        if self.is_taken {
            self.registry.state().forks.remove(&self.id);
        }
    }
}

fn template_not_found(name: &str) -> ApiError {
    refuse(
        ErrorCode::TemplateNotFound,
        format_args!("no template is named {name:?}"),
    )
}
