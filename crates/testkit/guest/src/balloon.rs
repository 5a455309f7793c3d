//! A driver for Firecracker's balloon, which gives memory back to the host. It polls, and runs in ring 3.
//!
//! The device is a virtio balloon behind virtio-mmio (version 1.2 of the virtio specification, 4.2 and 5.5).

use core::ffi::{CStr, c_char};
use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use crate::memory;

/// The form of a device on the command line: `virtio_mmio.device=4K@0xd0000000:5`.
const ARGUMENT: &str = "virtio_mmio.device=";
const MAGIC: u32 = 0x7472_6976;
const BALLOON: u32 = 5;

// Offsets of the registers.
const MAGIC_VALUE: usize = 0x00;
const DEVICE_ID: usize = 0x08;
const DRIVER_FEATURES: usize = 0x20;
const DRIVER_FEATURES_SELECT: usize = 0x24;
const QUEUE_SELECT: usize = 0x30;
const QUEUE_SIZE: usize = 0x38;
const QUEUE_READY: usize = 0x44;
const QUEUE_NOTIFY: usize = 0x50;
const INTERRUPT_STATUS: usize = 0x60;
const INTERRUPT_ACK: usize = 0x64;
const STATUS: usize = 0x70;
const QUEUE_DESCRIPTORS: usize = 0x80;
const QUEUE_AVAILABLE: usize = 0x90;
const QUEUE_USED: usize = 0xa0;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
/// A feature in the upper half: the device conforms to the specification, version 1. We accept only this one.
const VERSION_1: u32 = 1;
const USED_BUFFER: u32 = 1;
/// The first of the two queues that a balloon must have. The other takes memory back, which needs no request here.
const INFLATE: usize = 0;

/// A queue of one buffer. The rings start with their flags, which stay zero.
#[repr(C, align(16))]
struct Queue {
    /// Address; length, flags and the next descriptor, of which only the length is set.
    descriptor: [AtomicU64; 2],
    /// Flags; index; the descriptor, which is always the first.
    available: [AtomicU16; 3],
    /// Flags; index; and the used element, which can be only one.
    used: Aligned<[AtomicU16; 6]>,
}

#[repr(C, align(4))]
struct Aligned<T>(T);

static QUEUES: [Queue; 2] = [const {
    Queue {
        descriptor: [const { AtomicU64::new(0) }; 2],
        available: [const { AtomicU16::new(0) }; 3],
        used: Aligned([const { AtomicU16::new(0) }; 6]),
    }
}; 2];
/// The page numbers of one request: 1 MiB of pages, the most that Firecracker takes.
static PAGES: [AtomicU32; memory::PAGES_PER_MIB] = [const { AtomicU32::new(0) }; memory::PAGES_PER_MIB];
/// Address of the registers; 0 if there is no balloon.
static REGISTERS: AtomicUsize = AtomicUsize::new(0);

/// Finds the balloon on the command line, and sets it up. Most guests have none.
pub(crate) fn set_up(command_line: usize) -> Result<(), &'static str> {
    // SAFETY: the boot protocol promises a text that ends with a zero; Firecracker puts it below our image, which
    // nothing writes to. Everything is identity mapped.
    let text = unsafe { CStr::from_ptr(ptr::with_exposed_provenance::<c_char>(command_line)) };
    let text = text.to_str().map_err(|_| "the command line is not text")?;
    let devices = text
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix(ARGUMENT));
    for device in devices {
        let address = device
            .split_once("@0x")
            .and_then(|(_, rest)| rest.split_once(':'))
            .and_then(|(address, _)| usize::from_str_radix(address, 16).ok())
            .ok_or("unexpected device on the command line")?;
        if (read(address, MAGIC_VALUE), read(address, DEVICE_ID)) == (MAGIC, BALLOON) {
            return activate(address);
        }
    }
    Ok(())
}

/// The steps and their order are those of section 3.1.1.
fn activate(registers: usize) -> Result<(), &'static str> {
    write(registers, STATUS, 0);
    write(registers, STATUS, ACKNOWLEDGE);
    write(registers, STATUS, ACKNOWLEDGE | DRIVER);
    for (half, features) in [(0, 0), (1, VERSION_1)] {
        write(registers, DRIVER_FEATURES_SELECT, half);
        write(registers, DRIVER_FEATURES, features);
    }
    write(registers, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    for (number, queue) in (0..).zip(&QUEUES) {
        write(registers, QUEUE_SELECT, number);
        write(registers, QUEUE_SIZE, 1);
        for (register, address) in [
            (QUEUE_DESCRIPTORS, address(&queue.descriptor)),
            (QUEUE_AVAILABLE, address(&queue.available)),
            (QUEUE_USED, address(&queue.used)),
        ] {
            // The upper half, in the register after this one, is zero already.
            write(registers, register, address);
        }
        write(registers, QUEUE_READY, 1);
    }
    let working = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    write(registers, STATUS, working);
    if read(registers, STATUS) != working {
        return Err("the balloon refuses our features");
    }
    REGISTERS.store(registers, Ordering::Relaxed);
    Ok(())
}

/// Gives whole MiB back, one after the other. They read as zeros from then on.
pub(crate) fn inflate(pages: Range<usize>) -> Result<(), &'static str> {
    let registers = REGISTERS.load(Ordering::Relaxed);
    if registers == 0 {
        return Err("there is no balloon");
    }
    for first in pages.step_by(PAGES.len()) {
        for (place, page) in PAGES.iter().zip((low_half(first)..).take(PAGES.len())) {
            place.store(page, Ordering::Relaxed);
        }
        request(registers);
        memory::forget(first..first + PAGES.len());
    }
    Ok(())
}

/// Gives [`PAGES`] to the device, and waits until it is done with them.
fn request(registers: usize) {
    let Queue {
        descriptor: [start, length],
        available: [_, available, _],
        used: Aligned([_, used, ..]),
    } = &QUEUES[INFLATE];
    start.store(u64::from(address(&PAGES)), Ordering::Relaxed);
    length.store(size_of_val(&PAGES) as u64, Ordering::Relaxed);
    let next = available.load(Ordering::Relaxed).wrapping_add(1);
    available.store(next, Ordering::Release);
    write(registers, QUEUE_NOTIFY, 0);
    // Firecracker up to 1.12.0 marks the buffer as used before it drops the pages; all versions interrupt after that.
    // So this waits for the interrupt. An earlier read gets the old bytes, and an earlier write is lost.
    while {
        while read(registers, INTERRUPT_STATUS) & USED_BUFFER == 0 {}
        write(registers, INTERRUPT_ACK, USED_BUFFER);
        used.load(Ordering::Acquire) != next
    } {}
}

fn read(registers: usize, offset: usize) -> u32 {
    // SAFETY: the registers of a device that the command line names; devices are identity mapped.
    unsafe { ptr::with_exposed_provenance::<u32>(registers + offset).read_volatile() }
}

fn write(registers: usize, offset: usize, value: u32) {
    // SAFETY: as in `read`. The device touches only the queues and the pages that it is told to.
    unsafe { ptr::with_exposed_provenance_mut::<u32>(registers + offset).write_volatile(value) }
}

/// The address for the device: our image is identity mapped, far below 4 GiB.
fn address<T>(of: &T) -> u32 {
    low_half(ptr::from_ref(of).expose_provenance())
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "addresses and page numbers of at most 4 GiB"
)]
fn low_half(value: usize) -> u32 {
    value as u32
}
