//! Ioctl numbers and argument layouts, checked at compile time against `linux/userfaultfd.h`.

pub(crate) use linux_raw_sys::general::{
    uffdio_api, uffdio_continue, uffdio_copy, uffdio_range, uffdio_register, uffdio_zeropage,
};
use linux_raw_sys::{general as sys, ioctl};
use rustix::ioctl::{Opcode, opcode};

/// `UFFD_API`: the only protocol version.
pub(crate) const UFFD_API: u64 = sys::UFFD_API as u64;
/// The ioctl group of userfaultfd, `0xAA`.
const GROUP: u8 = 0xAA;

/// `USERFAULTFD_IOC_NEW` on `/dev/userfaultfd`.
pub(crate) const IOC_NEW: Opcode = opcode::none(GROUP, 0x00);
pub(crate) const API: Opcode = opcode::read_write::<uffdio_api>(GROUP, 0x3F);
pub(crate) const REGISTER: Opcode = opcode::read_write::<uffdio_register>(GROUP, 0x00);
pub(crate) const UNREGISTER: Opcode = opcode::read::<uffdio_range>(GROUP, 0x01);
pub(crate) const WAKE: Opcode = opcode::read::<uffdio_range>(GROUP, 0x02);
pub(crate) const COPY: Opcode = opcode::read_write::<uffdio_copy>(GROUP, 0x03);
pub(crate) const ZEROPAGE: Opcode = opcode::read_write::<uffdio_zeropage>(GROUP, 0x04);
pub(crate) const CONTINUE: Opcode = opcode::read_write::<uffdio_continue>(GROUP, 0x07);

/// `UFFDIO_REGISTER_MODE_MISSING`.
pub(crate) const REGISTER_MODE_MISSING: u64 = sys::UFFDIO_REGISTER_MODE_MISSING as u64;
/// `UFFDIO_REGISTER_MODE_WP`.
pub(crate) const REGISTER_MODE_WP: u64 = sys::UFFDIO_REGISTER_MODE_WP as u64;
/// `UFFDIO_COPY_MODE_WP`.
pub(crate) const COPY_MODE_WP: u64 = sys::UFFDIO_COPY_MODE_WP as u64;
/// `UFFDIO_{COPY,ZEROPAGE,CONTINUE}_MODE_DONTWAKE`: the same bit for all three.
pub(crate) const MODE_DONTWAKE: u64 = sys::UFFDIO_COPY_MODE_DONTWAKE as u64;

// The numbers above are computed from the layouts; these are the kernel's.
const _: () = assert!(API == ioctl::UFFDIO_API as Opcode);
const _: () = assert!(REGISTER == ioctl::UFFDIO_REGISTER as Opcode);
const _: () = assert!(UNREGISTER == ioctl::UFFDIO_UNREGISTER as Opcode);
const _: () = assert!(WAKE == ioctl::UFFDIO_WAKE as Opcode);
const _: () = assert!(COPY == ioctl::UFFDIO_COPY as Opcode);
const _: () = assert!(ZEROPAGE == ioctl::UFFDIO_ZEROPAGE as Opcode);
const _: () = assert!(CONTINUE == ioctl::UFFDIO_CONTINUE as Opcode);
const _: () = assert!(IOC_NEW == 0xAA00);
const _: () = assert!(MODE_DONTWAKE == sys::UFFDIO_ZEROPAGE_MODE_DONTWAKE as u64);

const _: () = assert!(size_of::<sys::uffd_msg>() == crate::event::MESSAGE_SIZE);
const _: () = assert!(size_of::<uffdio_api>() == 24);
const _: () = assert!(size_of::<uffdio_range>() == 16);
const _: () = assert!(size_of::<uffdio_register>() == 32);
const _: () = assert!(size_of::<uffdio_copy>() == 40);
const _: () = assert!(size_of::<uffdio_zeropage>() == 32);
const _: () = assert!(size_of::<uffdio_continue>() == 32);
