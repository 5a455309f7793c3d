//! Templates and forks as the API shows them.

use std::sync::Arc;

use pagecast_client::ApiError;
use pagecast_client::fork::ForkMemory;
use pagecast_client::template::{Protection, TemplateMemory, TemplateState, WorkingSet};

use super::Service;
use crate::fork::Fork;
use crate::local_file::LocalFile;
use crate::template::Template;

impl Service {
    /// Returns a template as the API shows it. With `memory`, measures the memory of its forks.
    pub(crate) fn describe_template(&self, template: &Template, memory: bool) -> pagecast_client::Template {
        // A change is stored in the template's validity, which is read next.
        let _ = template.check();
        let change = template.validity.change();
        let living: Vec<Arc<Fork>> = self
            .registry
            .forks()
            .into_iter()
            .filter(|fork| fork.template.name == template.name && !fork.state().is_end())
            .collect();
        let file = template.file.as_deref();
        pagecast_client::Template {
            name: template.name.to_string(),
            mem_path: file.map(|file| file.path().to_owned()),
            vmstate_path: template.spec.vmstate_path.clone(),
            state: match change {
                Some(_) => TemplateState::Changed,
                None => TemplateState::Ready,
            },
            changed: change.as_deref().map(str::to_owned),
            warnings: file.and_then(LocalFile::ownership_change).into_iter().collect(),
            size_bytes: template.pages.len().get(),
            zero_bytes: template.pages.zeros().known_bytes().get(),
            page_size: template.spec.page_size,
            protect: file.map_or(Protection::None, |file| file.protect),
            guard: template.guard(),
            forks: living.len() as u64,
            working_set: working_set(template),
            warmth: template.warmth(),
            memory: if memory { measure(&living) } else { None },
        }
    }

    /// Returns one template as the API shows it.
    pub(crate) fn show_template(self: &Arc<Self>, name: &str) -> Result<pagecast_client::Template, ApiError> {
        self.find_vmms();
        Ok(self.describe_template(&*self.registry.template(name)?, true))
    }

    /// Returns one fork as the API shows it.
    pub(crate) fn show_fork(self: &Arc<Self>, id: &str) -> Result<pagecast_client::Fork, ApiError> {
        self.find_vmms();
        Ok(describe_fork(&*self.registry.fork(id)?, true))
    }

    /// Returns all templates as the API shows them.
    pub(crate) fn show_templates(self: &Arc<Self>, memory: bool) -> Vec<pagecast_client::Template> {
        self.find_vmms();
        let templates = self.registry.templates();
        templates
            .iter()
            .map(|template| self.describe_template(template, memory))
            .collect()
    }

    /// Returns all forks as the API shows them.
    pub(crate) fn show_forks(self: &Arc<Self>, memory: bool) -> Vec<pagecast_client::Fork> {
        self.find_vmms();
        self.registry
            .forks()
            .iter()
            .map(|fork| describe_fork(fork, memory))
            .collect()
    }
}

/// Returns a fork as the API shows it. With `memory`, measures its memory.
fn describe_fork(fork: &Fork, memory: bool) -> pagecast_client::Fork {
    let mut shown = pagecast_client::Fork {
        id: fork.id.to_string(),
        template: fork.template.name.to_string(),
        backend: fork.backend(),
        reason: fork.reason.clone(),
        mem_backend: fork.mem_backend.clone(),
        state: fork.state(),
        pid: None,
        error: fork.error(),
        memory_bytes: None,
        faults: None,
        fault_latency_us: None,
        installed_bytes: 0,
        given_back_bytes: 0,
        prefault: None,
        recording: None,
        memory: if memory { measure_fork(fork) } else { None },
    };
    fork.describe(&mut shown);
    shown
}

/// Returns the working set of a template, with its score.
fn working_set(template: &Template) -> Option<WorkingSet> {
    let set = template.pages.working_set()?;
    let score = template.pages.prefault_score();
    Some(WorkingSet {
        size_bytes: set.size().get(),
        recordings: u64::from(set.recordings()),
        forks: score.forks,
        precision: score.precision,
        recall: score.recall,
        switched_off: score.switched_off,
    })
}

/// Returns the sum of the forks' memory.
fn measure(forks: &[Arc<Fork>]) -> Option<TemplateMemory> {
    let total = forks
        .iter()
        .filter_map(|fork| measure_fork(fork))
        .fold(TemplateMemory::default(), |total, memory| TemplateMemory {
            measured: total.measured + 1,
            pss: total.pss + memory.pss,
            private: total.private + memory.private,
            unshared: total.unshared + memory.rss,
        });
    (total.measured > 0).then_some(total)
}

/// Returns the memory of a fork's VMM, if that is known and alive.
fn measure_fork(fork: &Fork) -> Option<ForkMemory> {
    fork.vmm()?.memory()
}
