//! The templates and forks of the daemon, by name, under one lock.
//!
//! - A name is taken before its template is opened, and until a removed template is cleaned up. So is the id of a fork.
//! - A template can be removed once its forks have ended. A fork that is being created counts as alive.
//! - A fork that has ended can be read until it is deleted, or `ended_forks` others have ended since.
//! - The counters of a fork or template move to the totals when it is removed, under the same lock, so no metric counts
//!   down.
//!
//! No code under this lock waits for a disk or a process, except the deletion of a fork's record.

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

/// The existing templates and forks, and the counters of removed ones.
pub(crate) struct Registry {
    /// Most forks that may wait or live at once.
    max_forks: usize,
    /// Most ended forks that are kept.
    ended_forks: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    templates: BTreeMap<TemplateName, Arc<Template>>,
    /// Names of templates that are being added or removed.
    busy: BTreeSet<TemplateName>,
    forks: BTreeMap<ForkId, Entry>,
    /// Ended forks, oldest first.
    ended: VecDeque<ForkId>,
    /// The number in the last generated id.
    last_id: u64,
    totals: Totals,
}

/// A fork by its id.
enum Entry {
    /// The fork is being created.
    Making(TemplateName),
    Made(Arc<Fork>),
}

/// All templates and forks at one moment, and the counters of removed ones.
pub(crate) struct Snapshot {
    /// All templates.
    pub(crate) templates: Vec<Arc<Template>>,
    /// All forks, ended ones included.
    pub(crate) forks: Vec<Arc<Fork>>,
    /// The counters of removed templates and forks.
    pub(crate) totals: Totals,
}

impl Registry {
    /// Creates an empty registry. At most `max_forks` forks wait or live at once, and at most `ended_forks` ended ones
    /// are kept.
    pub(super) fn new(max_forks: usize, ended_forks: usize) -> Self {
        Self {
            max_forks,
            ended_forks,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is consistent even after a panic under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns all templates, sorted by name.
    pub(crate) fn templates(&self) -> Vec<Arc<Template>> {
        self.state().templates.values().cloned().collect()
    }

    /// Returns all forks, sorted by id.
    pub(crate) fn forks(&self) -> Vec<Arc<Fork>> {
        self.state().made_forks()
    }

    /// Returns templates, forks and totals of one moment.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let state = self.state();
        Snapshot {
            templates: state.templates.values().cloned().collect(),
            forks: state.made_forks(),
            totals: state.totals.clone(),
        }
    }

    /// Returns the template with this name.
    pub(crate) fn template(&self, name: &str) -> Result<Arc<Template>, ApiError> {
        self.state().template(name)
    }

    /// Returns the fork with this id, once it is created.
    pub(crate) fn fork(&self, id: &str) -> Result<Arc<Fork>, ApiError> {
        let parsed = id.parse::<ForkId>().ok();
        let state = self.state();
        let fork = parsed.and_then(|id| state.forks.get(&id).and_then(Entry::made).cloned());
        fork.ok_or_else(|| refuse(ErrorCode::ForkNotFound, format_args!("no fork has the id {id:?}")))
    }

    /// Takes the name of a template that is to be added, or returns the template that has it.
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

    /// Adds a template that was taken up at start-up.
    pub(super) fn restore_template(&self, template: Arc<Template>) {
        self.state().templates.insert(template.name.clone(), template);
    }

    /// Removes a template that no fork uses. Its name stays taken until the returned guard is dropped.
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

    /// Takes an id for a new fork: `wanted`, or a generated one. The template cannot be removed meanwhile.
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

    /// Adds a fork that was taken up at start-up.
    pub(super) fn restore_fork(&self, fork: Arc<Fork>) {
        self.state().forks.insert(fork.id.clone(), Entry::Made(fork));
    }

    /// Notes that a fork has ended, and returns the older ended forks that this removes. Returns `None` if its end was
    /// noted before, or it is not in the registry: its end may be reported twice, and late.
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

    /// Removes a fork. Returns whether its end had been noted, or `None` if it is no longer in the registry.
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

    /// Calls `act` unless another fork has this fork's id by now. No call can take the id meanwhile.
    pub(super) fn unless_replaced<T>(&self, fork: &Fork, act: impl FnOnce() -> T) -> Option<T> {
        let state = self.state();
        let is_it = |entry: &Entry| entry.made().is_some_and(|made| std::ptr::eq(&raw const **made, fork));
        state.forks.get(&fork.id).is_none_or(is_it).then(act)
    }

    /// Counts a killed VMM that belongs to no fork in the registry.
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

    /// Returns the ids of forks that still need this template.
    fn users(&self, template: &TemplateName) -> Vec<String> {
        let forks = self.forks.iter();
        let users = forks.filter(|(_, entry)| entry.template() == template && entry.uses_template());
        users.map(|(id, _)| id.to_string()).collect()
    }

    /// Generates an id that no fork has and no earlier call has returned.
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

    /// Returns `true` if this fork itself, not another with its id, is in the registry.
    fn has(&self, fork: &Arc<Fork>) -> bool {
        let there = self.forks.get(&fork.id).and_then(Entry::made);
        there.is_some_and(|there| Arc::ptr_eq(there, fork))
    }

    /// Removes a fork, and keeps its counters.
    fn remove_fork(&mut self, id: &ForkId) -> Option<Arc<Fork>> {
        let Some(Entry::Made(fork)) = self.forks.remove(id) else {
            return None;
        };
        self.totals.keep(&fork);
        self.forget_totals(&fork.template.name);
        Some(fork)
    }

    /// Removes the counters of a template once it and all its forks are removed.
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

    /// Returns `true` if this fork still needs its template.
    fn uses_template(&self) -> bool {
        self.made().is_none_or(|fork| !fork.state().is_end())
    }
}

/// A requested template name: free, or that of an existing template.
pub(super) enum Name<'a> {
    Free(TakenName<'a>),
    Template(Arc<Template>),
}

/// The name of a template that is being added or removed. No other template can take it until this is dropped.
pub(super) struct TakenName<'a> {
    registry: &'a Registry,
    name: TemplateName,
    /// `false` once a template has the name.
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

    /// Adds the template with this name.
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

/// The id of a fork that is being created. Released when this is dropped.
pub(super) struct TakenId<'a> {
    registry: &'a Registry,
    pub(super) id: ForkId,
    pub(super) template: Arc<Template>,
    /// `false` once a fork has the id.
    is_taken: bool,
}

impl TakenId<'_> {
    /// Adds the fork with this id.
    ///
    /// # Errors
    ///
    /// The template has changed meanwhile: all its forks in the registry may have been ended already.
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
