//! The memory that completing forks takes, and the memory available.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use crate::cgroup::MemoryCgroup;
use crate::memory;
use crate::page::PageSize;
use crate::server::error::NotEnoughMemory;
use crate::server::hugepages::HugeRoom;
use crate::server::registry::ForkRecord;
use crate::session::Region;
use crate::template::{Template, TemplateOffset, ZeroMap};

/// The most memory that completing some forks takes.
#[derive(Clone, Copy, Debug, Default)]
struct Needed {
    small_bytes: u64,
    huge_pages: u64,
}

/// Compares the memory needed to complete these forks with that of the host, of their cgroups and of the pool of
/// hugepages. Known zeros of the templates are not counted.
pub(in crate::server) fn check_room(forks: &[Arc<ForkRecord>]) -> Result<(), NotEnoughMemory> {
    let demand = Demand::of(forks);
    Room::now().check(&demand, demand.by_cgroup.keys())
}

/// Returns those of `wanted`, in order, that can be completed beside `completing`: as many as there is memory for.
/// Examines each fork once, and none after `until`.
pub(in crate::server) fn fitting(
    completing: &[Arc<ForkRecord>],
    wanted: &[Arc<ForkRecord>],
    until: Instant,
) -> Vec<Arc<ForkRecord>> {
    let mut demand = Demand::of(completing);
    let in_time = wanted.iter().take_while(|_| Instant::now() < until);
    let shares: Vec<_> = in_time.map(|fork| (fork, Share::of(fork))).collect();
    // Taken last: memory installed meanwhile is then counted twice, never missed.
    let mut room = Room::now();
    let mut fitting = Vec::new();
    for (fork, share) in shares {
        demand.add(&share);
        if room.check(&demand, &share.cgroups).is_ok() {
            fitting.push(Arc::clone(fork));
        } else {
            demand.remove(&share);
        }
    }
    fitting
}

/// The memory to complete one fork, and the cgroups that are charged for it.
struct Share {
    needed: Needed,
    cgroups: Vec<MemoryCgroup>,
}

impl Share {
    fn of(fork: &ForkRecord) -> Self {
        Self {
            needed: needed(fork),
            cgroups: fork.pid().map(MemoryCgroup::of_process).unwrap_or_default(),
        }
    }
}

/// The memory to complete some forks together.
#[derive(Default)]
struct Demand {
    forks: usize,
    all: Needed,
    by_cgroup: BTreeMap<MemoryCgroup, u64>,
}

impl Demand {
    fn of(forks: &[Arc<ForkRecord>]) -> Self {
        let mut demand = Self::default();
        for fork in forks {
            demand.add(&Share::of(fork));
        }
        demand
    }

    fn add(&mut self, share: &Share) {
        self.forks += 1;
        self.all.small_bytes += share.needed.small_bytes;
        self.all.huge_pages += share.needed.huge_pages;
        for cgroup in &share.cgroups {
            *self.by_cgroup.entry(cgroup.clone()).or_default() += share.needed.small_bytes;
        }
    }

    /// Subtracts a share that was added.
    fn remove(&mut self, share: &Share) {
        self.forks -= 1;
        self.all.small_bytes -= share.needed.small_bytes;
        self.all.huge_pages -= share.needed.huge_pages;
        for cgroup in &share.cgroups {
            if let Some(needed) = self.by_cgroup.get_mut(cgroup) {
                *needed -= share.needed.small_bytes;
            }
        }
    }
}

/// The available memory, read once for each place.
struct Room {
    host: Option<u64>,
    huge: HugeRoom,
    cgroups: BTreeMap<MemoryCgroup, Option<u64>>,
}

impl Room {
    fn now() -> Self {
        Self {
            host: memory::host_available(),
            huge: HugeRoom::now(),
            cgroups: BTreeMap::new(),
        }
    }

    /// Checks that there is this much, on the host and in these cgroups.
    fn check<'a>(
        &mut self,
        demand: &Demand,
        cgroups: impl IntoIterator<Item = &'a MemoryCgroup>,
    ) -> Result<(), NotEnoughMemory> {
        let forks = demand.forks;
        let check = |needed: u64, available: Option<u64>, place: &dyn Fn() -> String| {
            let Some(available) = available.map(memory::usable) else {
                return Ok(());
            };
            if needed <= available {
                return Ok(());
            }
            Err(NotEnoughMemory {
                forks,
                needed,
                available,
                place: place(),
            })
        };
        check(demand.all.small_bytes, self.host, &|| "on this host".to_owned())?;
        for cgroup in cgroups {
            let looked_at = self.cgroups.entry(cgroup.clone());
            let available = *looked_at.or_insert_with(|| cgroup.available());
            let needed = demand.by_cgroup.get(cgroup).copied().unwrap_or(0);
            check(needed, available, &|| {
                format!("in the cgroup {}", cgroup.folder().display())
            })?;
        }
        if demand.all.huge_pages > self.huge.pages {
            return Err(NotEnoughMemory {
                forks,
                needed: demand.all.huge_pages * PageSize::Huge.bytes(),
                available: self.huge.pages * PageSize::Huge.bytes(),
                place: match &self.huge.cgroup {
                    None => "in the pool of hugepages".to_owned(),
                    Some(cgroup) => format!("of hugepages in the server's own cgroup {}", cgroup.display()),
                },
            });
        }
        Ok(())
    }
}

/// Searches for more zeros in the templates of these forks, as long as there is time: each is one page less to install.
pub(in crate::server) fn find_zeros(forks: &[Arc<ForkRecord>], until: Instant) {
    let mut templates: Vec<&Template> = Vec::new();
    for fork in forks {
        if !templates.iter().any(|known| known.is_same(&fork.template)) {
            templates.push(&fork.template);
        }
    }
    for template in templates {
        template.find_zeros(until);
    }
}

/// The memory that is left to install of a fork: all of it, less the template's zeros, less the installed pages (each
/// page of the template is installed once at most). Removed pages are counted though they are not installed, which errs
/// on the safe side.
fn needed(fork: &ForkRecord) -> Needed {
    let mut needed = Needed::default();
    let zeros = fork.template.zeros();
    let mut installed = fork.counters.installed_bytes.get();
    for region in fork.regions.get().into_iter().flatten() {
        let bytes = bytes_not_zero(region, zeros);
        let left = bytes.saturating_sub(installed);
        installed = installed.saturating_sub(bytes);
        match region.page_size() {
            PageSize::Small => needed.small_bytes += left,
            PageSize::Huge => needed.huge_pages += left / PageSize::Huge.bytes(),
        }
    }
    needed
}

fn bytes_not_zero(region: &Region, zeros: &ZeroMap) -> u64 {
    let page = region.page_size();
    let start = region.offset().get();
    let pages = 0..region.pages() as u64;
    let data = pages.filter(|index| !zeros.covers(TemplateOffset::new(start + index * page.bytes()), page.len()));
    data.count() as u64 * page.bytes()
}
