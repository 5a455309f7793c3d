//! Takes up the templates and forks that an earlier daemon has left in the run dir.

use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use pagecast::server::{Deadlines, ForkEvent, Server, chain};
use pagecast::template::MemFile;
use tracing::{error, info, warn};

use super::warm::warm_again;
use super::{Registry, Service, backends};
use crate::config::Config;
use crate::error::StartError;
use crate::exit_watch::ExitWatch;
use crate::fork::SavedFork;
use crate::learned;
use crate::local_file::{LocalFile, Place, SavedTemplate};
use crate::run_dir::{RunDir, Saved};
use crate::template::{Template, TemplateName};
use crate::validity::Forks;

impl Service {
    /// Starts the page server, and takes up the state of the last daemon of this run dir. `observer` is called with
    /// each event of forks with `uffd`, and must not block.
    pub(crate) fn start_up(
        config: Config,
        run_dir: RunDir,
        runtime: tokio::runtime::Handle,
        observer: impl Fn(ForkEvent) + Send + Sync + 'static,
    ) -> Result<Arc<Self>, StartError> {
        let service = Self::new(config, run_dir, runtime, observer)?;
        let state = |source| StartError::State { source };
        service.find_templates().map_err(state)?;
        let orphans = service.find_forks().map_err(state)?;
        for template in service.registry.templates() {
            service.withdraw_changed(&template);
        }
        let withdrawals = service.take_withdrawals();
        service.act_on_leases();
        for withdrawal in withdrawals {
            // Its thread has logged a panic.
            let _ = withdrawal.join();
        }
        for (id, orphan) in &orphans {
            backends::end_orphan(&service, id, orphan);
        }
        service.clear_sockets();
        Ok(service)
    }

    /// Creates a service without templates and forks.
    pub(super) fn new(
        config: Config,
        run_dir: RunDir,
        runtime: tokio::runtime::Handle,
        observer: impl Fn(ForkEvent) + Send + Sync + 'static,
    ) -> Result<Arc<Self>, StartError> {
        let mut builder = Server::builder()
            .observer(observer)
            .completion_rate(config.completion_rate)
            .busy_poll(config.busy_poll)
            .fault_around(config.fault_around)
            .deadlines(Deadlines {
                connect: config.connect_deadline,
                handshake: config.handshake_deadline,
                ..Deadlines::default()
            });
        if let Some(workers) = config.workers {
            builder = builder.workers(workers);
        }
        Ok(Arc::new(Self {
            server: builder.start().map_err(StartError::Server)?,
            exits: ExitWatch::start().map_err(|source| StartError::Thread { source })?,
            registry: Registry::new(config.max_forks, config.ended_forks),
            config,
            run_dir,
            protecting: Mutex::new(()),
            closing: AtomicBool::new(false),
            acts_on_leases: AtomicBool::new(false),
            withdrawals: Mutex::default(),
            fork_made: tokio::sync::Notify::new(),
            fork_serving: tokio::sync::Notify::new(),
            file_fork_waits: tokio::sync::Notify::new(),
            started: Instant::now(),
            runtime,
        }))
    }

    pub(super) fn find_templates(self: &Arc<Self>) -> std::io::Result<()> {
        for (name, saved) in self.run_dir.saved_values::<SavedTemplate>(Saved::Template)? {
            let saved = match saved {
                Ok(saved) => saved,
                Err(error) => {
                    error!(event = "template_lost", template = name, %error, "template lost: its state cannot be read");
                    continue;
                }
            };
            match self.find_template(&name, &saved) {
                Ok(template) => {
                    // Learned data does not apply to a changed file.
                    if template.validity.change().is_none() {
                        learned::take_up(&template);
                        if saved.resident {
                            warm_again(&template);
                        }
                    }
                    self.registry.restore_template(template);
                    info!(event = "template_found", template = name, "template taken up");
                }
                Err(why) => {
                    let undone = saved.protection.undo_at(&saved.spec.mem_path);
                    remove_place(&name, saved.place.as_ref());
                    let forgotten = self.run_dir.forget(Saved::Template, &name);
                    error!(
                        event = "template_lost",
                        template = name,
                        why,
                        "template lost; the protection of its file is undone"
                    );
                    if let Err(error) = undone {
                        error!(
                            template = name,
                            error = chain(&error),
                            "its protection cannot be undone"
                        );
                    }
                    if let Err(error) = forgotten {
                        warn!(template = name, %error, "cannot be forgotten in the run dir");
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn find_template(self: &Arc<Self>, name: &str, saved: &SavedTemplate) -> Result<Arc<Template>, String> {
        let parsed: TemplateName = name.parse()?;
        let mem_file = MemFile::open(&saved.spec.mem_path).map_err(|error| chain(&error))?;
        let mem_file = Arc::new(mem_file);
        // A planned link explains another ctime.
        let is_explained = matches!(saved.place, Some(Place::Planned(_)));
        let mut changed = match mem_file.state() {
            Ok(now) => saved.identity.written(&now, is_explained),
            Err(error) => Some(chain(&error)),
        };
        let lease = match self.lease(&parsed, &mem_file) {
            Ok(lease) => lease,
            Err(error) => {
                changed.get_or_insert(error.message);
                None
            }
        };
        let ownership = match saved.ownership {
            Some(ownership) => ownership,
            None => self.ownership(&mem_file).map_err(|error| error.message)?,
        };
        let placement = match (&saved.place, &changed) {
            // Kept, since living forks may use this path. Also, links of an immutable file can be neither removed nor
            // created.
            (Some(Place::Done(placement)), None) if placement.holds(mem_file.as_fd()) => Some(placement.clone()),
            (place, changed) => {
                remove_place(name, place.as_ref());
                match changed {
                    Some(_) => None,
                    None => self
                        .place_template(
                            &parsed,
                            &saved.spec,
                            &mem_file,
                            ownership,
                            saved.protection,
                            saved.resident,
                        )
                        .map_err(|error| error.message)?,
                }
            }
        };
        let file = Arc::new(LocalFile::new(
            mem_file,
            saved.spec.protect,
            ownership,
            saved.protection,
            placement,
            lease,
        ));
        if changed.is_none() {
            let _ = file.mem_file.accept_own_change();
        }
        let template = Template::of_file(parsed, saved.spec.spec.clone(), file);
        if let Some(how) = changed {
            template.validity.invalidate(&how, Forks::Left);
            warn!(event = "template_changed", template = %template.name, how, "the template has changed while no daemon ran");
        } else if let Err(error) = template.save(&self.run_dir, Some(saved.resident)) {
            warn!(template = name, %error, "cannot be kept in the run dir as it is now");
        }
        Ok(Arc::new(template))
    }

    /// Takes up forks with `file`. Returns those with `uffd`, whose VMMs the caller must kill: that takes time, and
    /// must not delay the others.
    pub(super) fn find_forks(self: &Arc<Self>) -> std::io::Result<Vec<(String, SavedFork)>> {
        let mut orphans = Vec::new();
        for (id, saved) in self.run_dir.saved_values::<SavedFork>(Saved::Fork)? {
            match saved {
                Ok(saved) => orphans.extend(backends::find_again(self, &id, saved).map(|orphan| (id, orphan))),
                Err(error) => warn!(event = "fork_lost", fork = id, %error, "fork lost: its state cannot be read"),
            }
        }
        Ok(orphans)
    }

    pub(super) fn forget_saved_as(&self, id: &str) {
        if let Err(error) = self.run_dir.forget(Saved::Fork, id) {
            warn!(fork = id, %error, "its state in the run dir cannot be deleted");
        }
    }

    /// Deletes sockets left by a killed daemon.
    fn clear_sockets(&self) {
        let forks = self.run_dir.path().join("forks");
        for entry in std::fs::read_dir(forks).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
                // A remaining socket is replaced when its fork is created again.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

fn remove_place(template: &str, place: Option<&Place>) {
    if let Some(Err(error)) = place.map(Place::remove) {
        warn!(
            template,
            error = chain(&error),
            "its memory file cannot be removed from the run dir"
        );
    }
}
