//! Messages from a `read` of a userfaultfd (`struct uffd_msg`, `userfaultfd(2)`), as types.

use std::num::NonZeroU32;

use bitflags::bitflags;

use crate::address::{ByteLen, HostAddr, HostRange};

/// The size of one message, in bytes.
pub const MESSAGE_SIZE: usize = 32;

/// A message of the kernel about an address space.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A thread touched an absent page, and waits.
    PageFault(PageFault),
    /// The process gives the range back. Its thread waits until this event is read.
    Remove(HostRange),
    /// The range was unmapped.
    Unmap(HostRange),
    /// Registered memory moved.
    Remap {
        /// The old range's address.
        from: HostAddr,
        /// The new range's address.
        to: HostAddr,
        /// The length in bytes.
        len: ByteLen,
    },
    /// The process forked. Has the userfaultfd of the child.
    #[cfg(target_os = "linux")]
    Fork(std::os::fd::OwnedFd),
    /// An event with an unknown number, or with invalid content.
    Unknown(u8),
}

/// A page fault: a thread is blocked until the page is installed or the range is woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// The address, aligned down to its page unless [`Features::EXACT_ADDRESS`](crate::Features::EXACT_ADDRESS) is on.
    pub address: HostAddr,
    /// The kind of the fault.
    pub flags: FaultFlags,
    /// The thread, if [`Features::THREAD_ID`](crate::Features::THREAD_ID) is on.
    pub thread: Option<NonZeroU32>,
}

bitflags! {
    /// The kind of a page fault (`UFFD_PAGEFAULT_FLAG_*`). No flag: a read of a missing page.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct FaultFlags: u64 {
        /// The access was a write.
        const WRITE = 1 << 0;
        /// The page is present but write-protected.
        const WRITE_PROTECT = 1 << 1;
        /// The page is in the page cache but not mapped.
        const MINOR = 1 << 2;
        // Bits of newer kernels are kept.
        const _ = !0;
    }
}

// The layout of `struct uffd_msg`: a byte with the number of the event, and three words from byte 8 on that depend on
// it.
const PAGEFAULT: u8 = 0x12;
const FORK: u8 = 0x13;
const REMAP: u8 = 0x14;
const REMOVE: u8 = 0x15;
const UNMAP: u8 = 0x16;

/// A parsed message whose file descriptor is not yet owned.
pub(crate) enum Parsed {
    Event(Event),
    #[cfg_attr(
        not(target_os = "linux"),
        expect(dead_code, reason = "only Linux delivers fork events")
    )]
    Fork {
        fd: i32,
    },
}

/// Parses one message. Total: any bytes give an event.
pub(crate) fn parse(message: &[u8; MESSAGE_SIZE]) -> Parsed {
    let [kind, _, _, _, _, _, _, _, arguments @ ..] = message;
    let (words, _) = arguments.as_chunks::<8>();
    let word = |index: usize| words.get(index).map_or(0, |bytes| u64::from_ne_bytes(*bytes));
    // The third word and the first of a fork event are 32 bits wide: their first four bytes count.
    let half = |index: usize| {
        words
            .get(index)
            .and_then(|bytes| bytes.first_chunk())
            .map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    };
    let range = || HostRange::between(HostAddr::new(word(0)), HostAddr::new(word(1)));
    let event = match *kind {
        PAGEFAULT => Some(Event::PageFault(PageFault {
            flags: FaultFlags::from_bits_retain(word(0)),
            address: HostAddr::new(word(1)),
            thread: NonZeroU32::new(half(2)),
        })),
        REMOVE => range().map(Event::Remove),
        UNMAP => range().map(Event::Unmap),
        REMAP => Some(Event::Remap {
            from: HostAddr::new(word(0)),
            to: HostAddr::new(word(1)),
            len: ByteLen::new(word(2)),
        }),
        FORK => {
            return Parsed::Fork {
                fd: half(0).cast_signed(),
            };
        }
        _ => None,
    };
    Parsed::Event(event.unwrap_or(Event::Unknown(*kind)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, words: [u64; 3]) -> [u8; MESSAGE_SIZE] {
        let mut bytes = [0; MESSAGE_SIZE];
        bytes[0] = kind;
        for (index, word) in words.iter().enumerate() {
            bytes[8 + index * 8..16 + index * 8].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    fn event(kind: u8, words: [u64; 3]) -> Event {
        match parse(&message(kind, words)) {
            Parsed::Event(event) => event,
            Parsed::Fork { .. } => panic!("a fork event"),
        }
    }

    #[test]
    fn page_fault_carries_flags_address_and_thread() {
        let Event::PageFault(fault) = event(PAGEFAULT, [1, 0x7000, 42]) else {
            panic!("not a page fault");
        };
        assert_eq!(fault.flags, FaultFlags::WRITE);
        assert_eq!(fault.address, HostAddr::new(0x7000));
        assert_eq!(fault.thread.map(NonZeroU32::get), Some(42));
    }

    #[test]
    fn a_removed_range_runs_from_start_to_end() {
        let Event::Remove(range) = event(REMOVE, [0x1000, 0x3000, 0]) else {
            panic!("not a removal");
        };
        assert_eq!(range.start(), HostAddr::new(0x1000));
        assert_eq!(range.len(), ByteLen::new(0x2000));
    }

    #[test]
    fn what_makes_no_sense_is_unknown_and_nothing_panics() {
        assert!(matches!(event(REMOVE, [0x3000, 0x1000, 0]), Event::Unknown(REMOVE)));
        for kind in 0..=u8::MAX {
            let _ = parse(&message(kind, [u64::MAX; 3]));
        }
    }
}
