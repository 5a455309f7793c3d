//! What the scheduler did with the calling thread.

use std::mem::MaybeUninit;

/// Returns how often the calling thread was made to leave its processor though it could run on (`getrusage(2)`).
pub fn involuntary_switches() -> u64 {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel writes to this structure only, which lives through the call.
    let result = unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
    if result != 0 {
        // Never: the arguments are valid.
        return 0;
    }
    // SAFETY: every bit pattern is valid, and the call has succeeded.
    let usage = unsafe { usage.assume_init() };
    usage.ru_nivcsw.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_thread_that_competes_for_a_processor_is_switched_off() {
        let one = std::thread::spawn(|| {
            let before = involuntary_switches();
            let end = Instant::now() + Duration::from_mins(1);
            while involuntary_switches() == before && Instant::now() < end {
                std::hint::spin_loop();
            }
            involuntary_switches() > before
        });
        // Busy threads on all processors.
        let stop = std::sync::atomic::AtomicBool::new(false);
        let switched = std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let switched = one.join();
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            switched
        });
        assert!(switched.unwrap());
    }
}
