//! Commands: a line in, a line out. Runs in ring 3.

use core::fmt::{self, Write as _};
use core::ops::Range;
use core::str::SplitAsciiWhitespace;

use crate::memory::{self, FIRST_MIB, PAGES_PER_MIB, Pattern};
use crate::{balloon, cpu};

const MIB: usize = 1 << 20;

/// Data that ring 0 and ring 3 exchange, past the ring change in assembly.
#[repr(C)]
pub(crate) struct Exchange {
    pub(crate) line: [u8; 128],
    pub(crate) line_len: usize,
    pub(crate) halts: bool,
    reply: Text,
    ram_end: usize,
    command_line: usize,
}

impl Exchange {
    pub(crate) fn new(ram_end: usize, command_line: usize) -> Self {
        Self {
            line: [0; 128],
            line_len: 0,
            halts: false,
            reply: Text::new(),
            ram_end,
            command_line,
        }
    }

    pub(crate) fn reply(&self) -> &[u8] {
        self.reply.bytes()
    }

    fn pages(&self, words: &mut SplitAsciiWhitespace<'_>) -> Result<Range<usize>, &'static str> {
        let start: usize = number(words)?;
        let count: usize = number(words)?;
        let end = start.checked_add(count).ok_or("range too large")?;
        if count == 0 {
            return Err("empty range");
        }
        if start < FIRST_MIB || end > self.ram_end / MIB {
            return Err("range outside the memory under test");
        }
        Ok(start * PAGES_PER_MIB..end * PAGES_PER_MIB)
    }

    fn answer(&mut self) -> Result<(), &'static str> {
        let line = self.line;
        let text = line
            .get(..self.line_len)
            .and_then(|line| str::from_utf8(line).ok())
            .ok_or("not text")?;
        let mut words = text.split_ascii_whitespace();
        // A reply that does not fit is cut, which the host notices. All replies are far shorter than the text.
        let _ = match words.next() {
            Some("ping") => writeln!(self.reply, "ok ping"),
            Some("write") => {
                let pages = self.pages(&mut words)?;
                let every: usize = number(&mut words)?;
                let pattern = Pattern::new(number(&mut words)?);
                if every == 0 {
                    return Err("every 0 pages");
                }
                let done = memory::write(pages, every, pattern);
                writeln!(self.reply, "ok write pages={} ticks={}", done.pages, done.ticks)
            }
            Some("verify") => {
                let done = memory::verify(self.pages(&mut words)?);
                let _ = write!(
                    self.reply,
                    "ok verify pages={} patterns={} mismatches={}",
                    done.pages, done.patterns, done.mismatches
                );
                let _ = match done.first_bad {
                    Some(bad) => write!(
                        self.reply,
                        " first_bad={:#x} expected={:#x} found={:#x}",
                        bad.address, bad.expected, bad.found
                    ),
                    None => write!(self.reply, " first_bad=- expected=- found=-"),
                };
                writeln!(self.reply, " ticks={}", done.ticks)
            }
            Some("touch") => {
                let done = memory::touch(self.pages(&mut words)?);
                writeln!(
                    self.reply,
                    "ok touch pages={} sum={:#x} ticks={}",
                    done.pages, done.sum, done.ticks
                )
            }
            Some("inflate") => {
                let pages = self.pages(&mut words)?;
                let count = pages.len();
                let started = cpu::ticks();
                balloon::inflate(pages)?;
                writeln!(self.reply, "ok inflate pages={count} ticks={}", cpu::ticks() - started)
            }
            Some("halt") => {
                self.halts = true;
                writeln!(self.reply, "ok halt")
            }
            _ => return Err("unknown command"),
        };
        Ok(())
    }
}

pub(crate) extern "C" fn greet(exchange: &mut Exchange) {
    let mib = exchange.ram_end / MIB;
    let _ = match balloon::set_up(exchange.command_line) {
        Ok(()) => writeln!(exchange.reply, "ok ready mem_mib={mib} first_mib={FIRST_MIB}"),
        Err(reason) => writeln!(exchange.reply, "err {reason}"),
    };
}

pub(crate) extern "C" fn run(exchange: &mut Exchange) {
    exchange.reply = Text::new();
    if let Err(reason) = exchange.answer() {
        exchange.reply = Text::new();
        let _ = writeln!(exchange.reply, "err {reason}");
    }
}

fn number<T: core::str::FromStr>(words: &mut SplitAsciiWhitespace<'_>) -> Result<T, &'static str> {
    words
        .next()
        .ok_or("missing number")?
        .parse()
        .map_err(|_| "not a number, or out of its range")
}

/// A text of bounded length.
#[repr(C)]
pub(crate) struct Text {
    bytes: [u8; 256],
    length: usize,
}

impl Text {
    pub(crate) const fn new() -> Self {
        Self {
            bytes: [0; 256],
            length: 0,
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.length + text.len();
        self.bytes
            .get_mut(self.length..end)
            .ok_or(fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}
