//! Segments, page tables, interrupts, ports: everything that ring 0 needs to start ring 3 and to sleep.

use core::arch::{asm, global_asm};
use core::fmt::Write as _;
use core::ptr;
use core::slice;

use crate::command::{Exchange, Text};
use crate::serial;

global_asm!(include_str!("entry.s"));

unsafe extern "C" {
    fn run_in_ring3_raw(function: extern "C" fn(&mut Exchange), argument: &mut Exchange);
    fn invalid_opcode();
    fn serial_interrupt();
    static exceptions: u8;
    static trap_stack_top: u8;
}

/// Usable memory: Firecracker puts RAM below 3 GiB at its own address.
pub(crate) const RAM_GIB: usize = 3;
/// Devices are in the next GiB.
const MAPPED_GIB: usize = RAM_GIB + 1;

const PRESENT_WRITABLE_USER: u64 = 0b111;
const LARGE: u64 = 1 << 7;
const RING0_CODE: u16 = 0x08;
const TASK_STATE: u16 = 0x28;
/// The vector of IRQ 0; the serial port is IRQ 4.
const FIRST_IRQ_VECTOR: u8 = 0x20;
const SERIAL_IRQ: u8 = 4;
/// The vector of an interrupt that went away before it was taken.
const SPURIOUS_IRQ: u8 = 7;

#[repr(C, align(4096))]
struct PageTable([u64; 512]);

#[repr(C, align(16))]
struct TaskState([u32; 26]);

#[repr(C, align(16))]
struct InterruptTable([[u64; 2]; 64]);

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

/// Null, ring 0 code and data, ring 3 data and code, task state (two entries).
static mut SEGMENTS: [u64; 7] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
    0,
];
static mut TASK: TaskState = TaskState([0; 26]);
static mut INTERRUPTS: InterruptTable = InterruptTable([[0; 2]; 64]);
static mut TOP: PageTable = PageTable([0; 512]);
static mut GIBS: PageTable = PageTable([0; 512]);
/// One page table per GiB. Filled at compile time, since loops in ring 0 can be slow (see the crate's documentation).
static MIBS: [PageTable; MAPPED_GIB] = [identity(0), identity(1), identity(2), identity(3)];

const fn identity(gib: u64) -> PageTable {
    let mut table = PageTable([0; 512]);
    let mut entry = 0;
    while entry < 512 {
        table.0[entry] = (gib << 30) | ((entry as u64) << 21) | LARGE | PRESENT_WRITABLE_USER;
        entry += 1;
    }
    table
}

/// Loads an identity map that ring 3 may use, segments, task state, and handlers for the expected interrupts.
pub(crate) fn set_up() {
    // SAFETY: called once, before anything else runs on the only CPU, so nothing else uses these tables; they are
    // static, so the addresses handed to the CPU stay valid. The new map covers all of the old one.
    unsafe {
        TOP.0[0] = &raw const GIBS as u64 | PRESENT_WRITABLE_USER;
        for (gib, table) in MIBS.iter().enumerate() {
            GIBS.0[gib] = ptr::from_ref(table) as u64 | PRESENT_WRITABLE_USER;
        }
        asm!("mov cr3, {}", in(reg) &raw const TOP, options(nostack));

        let stack = &raw const trap_stack_top as u64;
        TASK.0[1] = low_half(stack);
        TASK.0[2] = low_half(stack >> 32);
        TASK.0[25] = 104 << 16; // no I/O bitmap
        let task = &raw const TASK as u64;
        SEGMENTS[5] = 0x67 | ((task & 0xff_ffff) << 16) | (0x89 << 40) | (((task >> 24) & 0xff) << 56);
        SEGMENTS[6] = task >> 32;

        for vector in 0..32 {
            INTERRUPTS.0[vector] = gate(&raw const exceptions as u64 + 16 * vector as u64);
        }
        INTERRUPTS.0[6] = gate(invalid_opcode as *const () as u64);
        for irq in [SERIAL_IRQ, SPURIOUS_IRQ] {
            INTERRUPTS.0[(FIRST_IRQ_VECTOR + irq) as usize] = gate(serial_interrupt as *const () as u64);
        }

        let segments = TablePointer {
            limit: 7 * 8 - 1,
            base: &raw const SEGMENTS as u64,
        };
        let interrupts = TablePointer {
            limit: 64 * 16 - 1,
            base: &raw const INTERRUPTS as u64,
        };
        asm!(
            "lgdt [{segments}]",
            "lidt [{interrupts}]",
            "ltr {task:x}",
            segments = in(reg) &raw const segments,
            interrupts = in(reg) &raw const interrupts,
            task = in(reg) TASK_STATE,
        );
    }
    // The legacy interrupt controllers: edge triggered, cascaded, all masked but the serial port.
    for (port, value) in [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, FIRST_IRQ_VECTOR),
        (0xa1, FIRST_IRQ_VECTOR + 8),
        (0x21, 1 << 2),
        (0xa1, 2),
        (0x21, 1),
        (0xa1, 1),
        (0x21, !(1 << SERIAL_IRQ)),
        (0xa1, 0xff),
    ] {
        write_port(port, value);
    }
}

/// An interrupt gate of ring 0.
fn gate(handler: u64) -> [u64; 2] {
    let low = (handler & 0xffff) | (u64::from(RING0_CODE) << 16) | (0x8e00 << 32) | ((handler >> 16 & 0xffff) << 48);
    [low, handler >> 32]
}

#[expect(clippy::cast_possible_truncation, reason = "the lower half is what is wanted")]
fn low_half(value: u64) -> u32 {
    value as u32
}

/// Returns the end of usable memory, from the memory map (e820) in the boot parameters; at most [`RAM_GIB`].
pub(crate) fn ram_end(boot_params: *const u8) -> usize {
    const COUNT: usize = 0x1e8;
    const TABLE: usize = 0x2d0;
    const USABLE: u32 = 1;

    #[repr(C, packed)]
    struct Entry {
        base: usize,
        size: usize,
        kind: u32,
    }

    // SAFETY: the boot protocol promises a page of boot parameters here, with at most 128 entries after one another.
    let entries = unsafe {
        slice::from_raw_parts(
            boot_params.add(TABLE).cast::<Entry>(),
            usize::from(boot_params.add(COUNT).read()),
        )
    };
    entries
        .iter()
        .filter(|entry| entry.kind == USABLE && entry.base < RAM_GIB << 30)
        .map(|entry| (entry.base + entry.size).min(RAM_GIB << 30))
        .max()
        .unwrap_or(0)
}

/// Returns the command line, from the boot parameters: a text that ends with a zero.
pub(crate) fn command_line(boot_params: *const u8) -> usize {
    const POINTER: usize = 0x228;

    // SAFETY: as in `ram_end`.
    let address = unsafe { boot_params.add(POINTER).cast::<u32>().read_unaligned() };
    address as usize
}

/// Runs a function in ring 3 and waits for it.
pub(crate) fn run_in_ring3(function: extern "C" fn(&mut Exchange), argument: &mut Exchange) {
    // SAFETY: ring 3 shares our address space and has its own stack; `set_up` loaded all that the ring changes need.
    // Nothing else runs meanwhile.
    unsafe { run_in_ring3_raw(function, argument) }
}

/// Sleeps until an interrupt, then disables interrupts again. A pending interrupt is not missed: `sti` takes effect
/// only after the instruction that follows it.
pub(crate) fn sleep() {
    // SAFETY: the only interrupt that is not masked has a handler that keeps all registers.
    unsafe { asm!("sti", "hlt", "cli") }
}

/// Resets through the keyboard controller, at which Firecracker exits.
pub(crate) fn reset() -> ! {
    write_port(0x64, 0xfe);
    loop {
        // SAFETY: interrupts are off, so this sleeps until the end.
        unsafe { asm!("hlt") }
    }
}

/// Raises an exception, from either ring.
pub(crate) fn fault() -> ! {
    // SAFETY: the handler reports and resets, it never returns here.
    unsafe { asm!("ud2", options(noreturn)) }
}

/// Called by the handlers in entry.s.
#[unsafe(no_mangle)]
extern "C" fn report_exception(vector: u64, first: u64, second: u64, address: u64) -> ! {
    let mut text = Text::new();
    // A text that is full is cut, which is fine here.
    let _ = writeln!(
        text,
        "err exception vector={vector} frame={first:#x},{second:#x} address={address:#x}"
    );
    serial::write(text.bytes());
    reset()
}

pub(crate) fn ticks() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads the time stamp counter, which ring 3 may as well.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack)) };
    (u64::from(high) << 32) | u64::from(low)
}

pub(crate) fn write_port(port: u16, value: u8) {
    // SAFETY: the ports of the interrupt controllers, the serial port and the keyboard controller do not touch memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

pub(crate) fn read_port(port: u16) -> u8 {
    let value;
    // SAFETY: as in `write_port`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}
