//! The tiny guest: a bare x86-64 ELF that Firecracker boots as its kernel, driven by lines on the serial console.
//!
//! # Protocol
//!
//! After boot the guest prints `ok ready mem_mib=M first_mib=F`. Then each line gets exactly one line as an answer.
//! Numbers are decimal, addresses and words hexadecimal. `START` and `COUNT` are in MiB.
//!
//! | line | answer |
//! | --- | --- |
//! | `ping` | `ok ping` |
//! | `write START COUNT EVERY PATTERN` | `ok write pages=N ticks=T`: gave every `EVERY`th page (page number divisible by `EVERY`) pattern 0 to 255; 0 is zeros |
//! | `verify START COUNT` | `ok verify pages=N patterns=D mismatches=N first_bad=A expected=W found=W ticks=T`: read every word; `A` and both `W` are `-` where nothing mismatches |
//! | `touch START COUNT` | `ok touch pages=N sum=W ticks=T`: read one word of every page |
//! | `inflate START COUNT` | `ok inflate pages=N ticks=T`: gave the pages back to the host through Firecracker's balloon, a request for each MiB, and waited until the host had dropped them. They may be written again |
//! | `halt` | `ok halt`, then the guest resets and Firecracker exits |
//!
//! Any other line gets `err` and a reason. The guest notes in its own memory which pattern each page must hold, so that
//! a snapshot has the notes. Pages that were never written, or given back since, must read as zeros. `D` is a digest of
//! the notes for the range (FNV-1a of one byte a page), so that the host notices lost notes. `T` is in ticks of the
//! time stamp counter.
//!
//! # Two rings
//!
//! Some hosts run KVM without VT-x or SVM. There the ring 0 of a guest may be emulated, one instruction at a time:
//! measured, 1 us for each instruction of a loop, 0.7 s to write 1 MiB. Ring 3 of the same guest runs on
//! the bare CPU: 64 MiB that are mapped already are read and compared in 5 ms. So ring 0 here is only a few lines that move bytes
//! between the serial port and two buffers, and everything else (parsing, memory work, formatting) is
//! [`command::run`] in ring 3. Integer instructions only, in both.
//!
//! While it waits for a line the guest sleeps in `hlt` and is woken by the serial interrupt, so idle guests cost no CPU.
#![no_std]
#![no_main]

mod balloon;
mod command;
mod cpu;
mod memory;
mod serial;

use core::panic::PanicInfo;

use command::Exchange;

/// Called by `_start` in entry.s, in ring 0 on the kernel stack, once.
#[unsafe(no_mangle)]
extern "C" fn start(boot_params: *const u8) -> ! {
    cpu::set_up();
    serial::set_up();
    let mut exchange = Exchange::new(cpu::ram_end(boot_params), cpu::command_line(boot_params));
    cpu::run_in_ring3(command::greet, &mut exchange);
    loop {
        serial::write(exchange.reply());
        if exchange.halts {
            cpu::reset();
        }
        exchange.line_len = serial::read_line(&mut exchange.line);
        cpu::run_in_ring3(command::run, &mut exchange);
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    // In ring 3 this faults, and the exception handler reports it. In ring 0 it is reported in the same way.
    cpu::fault()
}
