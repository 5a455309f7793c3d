//! What a test does to a process, and sees of it from outside.

use std::time::Duration;

use pagecast_testkit::sim_vmm::SimVmm;
use pagecast_testkit::skip::skip;
use rustix::process::{Pid, Signal};

use crate::fixture::eventually;

/// Whether this test has a process of its own, as `cargo nextest` gives it: what the process holds and uses is the
/// test's then. Says that the test is skipped where not.
pub(crate) fn alone() -> bool {
    let alone = std::env::var("NEXTEST_EXECUTION_MODE").is_ok_and(|mode| mode == "process-per-test");
    if !alone {
        skip("needs a process of its own: run it with `cargo nextest`");
    }
    alone
}

/// The processor time that this process uses while `what` is done.
pub(crate) fn cpu_time_of(what: impl FnOnce()) -> Duration {
    let now = || -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        time.try_into().unwrap()
    };
    let before = now();
    what();
    now().saturating_sub(before)
}

/// Stops a VMM, and waits until all its threads have.
pub(crate) fn stop(vmm: &SimVmm) {
    rustix::process::kill_process(pid(vmm), Signal::STOP).unwrap();
    eventually("all threads stopped", || {
        threads(vmm).iter().all(|thread| matches!(thread.state, 'T' | 't'))
    });
}

/// Lets a stopped VMM run.
pub(crate) fn resume(vmm: &SimVmm) {
    rustix::process::kill_process(pid(vmm), Signal::CONT).unwrap();
}

/// A thread of a VMM.
pub(crate) struct Thread {
    pub(crate) id: Pid,
    /// As `proc_pid_stat(5)` has it: `R`unning, `S`leeping, `T` stopped, …
    pub(crate) state: char,
    /// The function of the kernel that it sleeps in.
    pub(crate) sleeps_in: String,
}

/// The threads of a VMM.
pub(crate) fn threads(vmm: &SimVmm) -> Vec<Thread> {
    let tasks = procfs::process::Process::new(pid(vmm).as_raw_nonzero().get())
        .and_then(|process| process.tasks())
        .unwrap();
    // One may end while we look.
    tasks
        .filter_map(|task| {
            let task = task.ok()?;
            let wchan = format!("/proc/{}/task/{}/wchan", vmm.pid(), task.tid);
            Some(Thread {
                id: Pid::from_raw(task.tid)?,
                state: task.stat().ok()?.state,
                sleeps_in: std::fs::read_to_string(wchan).ok()?,
            })
        })
        .collect()
}

/// How many threads of a VMM sleep in a page fault that its server has to answer.
pub(crate) fn in_page_fault(vmm: &SimVmm) -> usize {
    sleeping_in(vmm, "handle_userfault")
}

/// How many threads of a VMM give memory back and wait until the server has heard of it.
pub(crate) fn in_removal(vmm: &SimVmm) -> usize {
    sleeping_in(vmm, "userfaultfd_event_wait_completion")
}

fn sleeping_in(vmm: &SimVmm, function: &str) -> usize {
    let threads = threads(vmm);
    threads.iter().filter(|thread| thread.sleeps_in == function).count()
}

fn pid(vmm: &SimVmm) -> Pid {
    Pid::from_raw(vmm.pid().try_into().unwrap()).unwrap()
}
