//! The machine and time of a run.

use std::fs;
use std::time::SystemTime;

use procfs::Current as _;
use serde::Serialize;

use crate::spread::to_f64;

/// The machine and time of a run. Facts that the kernel does not show are left out.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// The name of the processors.
    pub processor: Option<String>,
    /// Number of processors.
    pub processors: usize,
    /// Whether it is a virtual machine.
    pub virtual_machine: bool,
    /// All memory, in GiB.
    pub memory_gib: Option<f64>,
    /// The load average of the last minute before the run: the load by others.
    pub load_before: Option<f32>,
    /// Use of huge pages for anonymous memory (`/sys/kernel/mm/transparent_hugepage/enabled`).
    pub transparent_hugepages: Option<String>,
    /// Start of the run: RFC 3339, UTC.
    pub began: String,
    /// The version of pagecast.
    pub pagecast: &'static str,
}

impl Machine {
    /// This machine, now.
    pub(crate) fn here() -> Self {
        let cpuinfo = procfs::CpuInfo::current().ok();
        let flags = cpuinfo.as_ref().and_then(|info| info.flags(0));
        Self {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            processor: cpuinfo
                .as_ref()
                .and_then(|info| info.model_name(0))
                .map(|name| name.split_whitespace().collect::<Vec<_>>().join(" ")),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            virtual_machine: flags.is_some_and(|flags| flags.contains(&"hypervisor")),
            memory_gib: procfs::Meminfo::current()
                .ok()
                .map(|memory| to_f64(memory.mem_total) / f64::from(1 << 30)),
            load_before: procfs::LoadAverage::current().ok().map(|load| load.one),
            transparent_hugepages: fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
                .ok()
                .and_then(|modes| chosen(&modes)),
            began: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            pagecast: env!("CARGO_PKG_VERSION"),
        }
    }

    /// Formats it in one line.
    pub fn line(&self) -> String {
        let processor = self.processor.as_deref().unwrap_or("unknown processor");
        let machine = if self.virtual_machine { "VM" } else { "machine" };
        let memory = self.memory_gib.map(|gib| format!(", {gib:.0} GiB")).unwrap_or_default();
        let load = self
            .load_before
            .map(|load| format!(", load {load:.1} before"))
            .unwrap_or_default();
        let began = self.began.get(..10).unwrap_or(&self.began);
        format!(
            "{began}, Linux {}, {machine} with {} x {processor}{memory}{load}",
            self.kernel, self.processors
        )
    }
}

/// The word in brackets.
fn chosen(modes: &str) -> Option<String> {
    let (_, rest) = modes.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_that_holds_is_the_one_in_brackets() {
        assert_eq!(chosen("always [madvise] never\n").as_deref(), Some("madvise"));
        assert_eq!(chosen("never"), None);
    }

    #[test]
    fn this_machine_can_be_described() {
        let machine = Machine::here();
        assert!(machine.line().contains(&machine.kernel), "{}", machine.line());
    }
}
