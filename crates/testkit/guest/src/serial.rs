//! The serial console, COM1.

use crate::cpu::{read_port, sleep, write_port};

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const LINE_STATUS: u16 = DATA + 5;
const RECEIVED_DATA: u8 = 1;

/// Interrupts for each received byte. Firecracker enables this again after a restore, as it does not save the state of
/// the port.
pub(crate) fn set_up() {
    write_port(INTERRUPT_ENABLE, RECEIVED_DATA);
}

pub(crate) fn write(bytes: &[u8]) {
    for &byte in bytes {
        write_port(DATA, byte);
    }
}

/// Waits for a line, and returns its length without the line feed. Bytes that do not fit are dropped.
pub(crate) fn read_line(line: &mut [u8]) -> usize {
    let mut length = 0;
    loop {
        while read_port(LINE_STATUS) & RECEIVED_DATA == 0 {
            sleep();
        }
        let byte = read_port(DATA);
        if byte == b'\n' {
            return length;
        }
        if let Some(place) = line.get_mut(length) {
            *place = byte;
            length += 1;
        }
    }
}
