//! A memory cgroup for VMMs.

use std::path::{Path, PathBuf};

use pagecast_testkit::sim_vmm::SimVmm;
use pagecast_testkit::skip::skip;

/// A memory cgroup for VMMs, beneath the one that the test is in.
pub(crate) struct Cgroup {
    path: PathBuf,
    limit: &'static str,
}

impl Cgroup {
    /// Says that the test is skipped where there can be none.
    pub(crate) fn new() -> Option<Self> {
        let groups = procfs::process::Process::myself()
            .and_then(|process| process.cgroups())
            .unwrap();
        let ours = |wanted: &dyn Fn(&procfs::ProcessCGroup) -> bool| {
            let group = (&groups).into_iter().find(|group| wanted(group))?;
            Some(group.pathname.trim_start_matches('/').to_owned())
        };
        let of_memory = |group: &procfs::ProcessCGroup| group.controllers.iter().any(|name| name == "memory");
        let candidates = [
            ("/sys/fs/cgroup/memory", ours(&of_memory), "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", ours(&|group| group.hierarchy == 0), "memory.max"),
        ];
        for (root, ours, limit) in candidates {
            let Some(ours) = ours else { continue };
            let path = Path::new(root)
                .join(ours)
                .join(format!("pagecast-test-{}", std::process::id()));
            if std::fs::create_dir(&path).is_err() {
                continue;
            }
            let cgroup = Self { path, limit };
            if cgroup.path.join(limit).exists() {
                return Some(cgroup);
            }
        }
        skip("no memory cgroup can be made here");
        None
    }

    pub(crate) fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    pub(crate) fn take(&self, vmm: &SimVmm) {
        std::fs::write(self.path.join("cgroup.procs"), vmm.pid().to_string()).unwrap();
    }

    /// What is charged to it, in bytes.
    pub(crate) fn used(&self) -> u64 {
        let used = ["memory.usage_in_bytes", "memory.current"]
            .into_iter()
            .find_map(|name| std::fs::read_to_string(self.path.join(name)).ok());
        used.unwrap().trim().parse().unwrap()
    }

    pub(crate) fn limit(&self, bytes: u64) {
        std::fs::write(self.path.join(self.limit), bytes.to_string()).unwrap();
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its VMM is dead by now; where it is not, an empty folder is left.
        let _ = std::fs::remove_dir(&self.path);
    }
}
