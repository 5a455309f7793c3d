//! CPU time, memory and file descriptors of the daemon, under Prometheus' standard names.

use procfs::process::{LimitValue, Process};

use super::families::{Families, NO_LABELS, number};

/// Adds the metrics of this process. Those that the platform does not report are left out.
pub(super) fn collect(families: &mut Families) {
    let Ok(process) = Process::myself() else { return };
    if let Ok(stat) = process.stat() {
        let seconds = |ticks| number(ticks) / number(procfs::ticks_per_second());
        families.counter(
            "process_cpu_seconds_total",
            "Processor time of the daemon, in user and kernel mode.",
            [(NO_LABELS, seconds(stat.utime + stat.stime))],
        );
        families.gauge(
            "process_resident_memory_bytes",
            "Resident memory of the daemon.",
            [(NO_LABELS, number(stat.rss * procfs::page_size()))],
        );
        families.gauge(
            "process_virtual_memory_bytes",
            "Virtual memory of the daemon.",
            [(NO_LABELS, number(stat.vsize))],
        );
        if let Ok(boot) = procfs::boot_time_secs() {
            families.gauge(
                "process_start_time_seconds",
                "Start time of the daemon, in seconds since 1970.",
                [(NO_LABELS, number(boot) + seconds(stat.starttime))],
            );
        }
    }
    if let Ok(count) = process.fd_count() {
        families.gauge(
            "process_open_fds",
            "Open file descriptors of the daemon.",
            [(NO_LABELS, number(count as u64))],
        );
    }
    if let Ok(limits) = process.limits() {
        let most = match limits.max_open_files.soft_limit {
            LimitValue::Value(most) => number(most),
            LimitValue::Unlimited => f64::INFINITY,
        };
        families.gauge(
            "process_max_fds",
            "Most file descriptors that the daemon may have open.",
            [(NO_LABELS, most)],
        );
    }
}
