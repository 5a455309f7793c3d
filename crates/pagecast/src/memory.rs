//! How much memory of the host may be used.

use procfs::Current;

/// One part in this many stays for other programs.
const SPARE_PART: u64 = 16;

/// Memory that the host can give without swapping, in bytes (`MemAvailable`, `proc_meminfo(5)`). `None` if the kernel does not
/// say it.
pub fn host_available() -> Option<u64> {
    procfs::Meminfo::current().ok()?.mem_available
}

/// Returns how many of `available` bytes may be used: all but the part that stays for other programs.
pub fn usable(available: u64) -> u64 {
    available - available / SPARE_PART
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_says_what_it_has() {
        assert!(host_available().unwrap() > 0);
    }

    #[test]
    fn a_sixteenth_stays() {
        assert_eq!(usable(1600), 1500);
        assert_eq!(usable(0), 0);
        assert_eq!(usable(u64::MAX), u64::MAX / 16 * 15 + 15);
    }
}
