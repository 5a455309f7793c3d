//! Lines on standard error.

use pagecast_command::stderr;

/// Starts to write lines through [`stderr`], panics included.
pub(crate) fn start_saying() {
    stderr::start(|lines| {
        format!("pagecast: lines dropped because stderr was not read in time: {lines}\n").into_bytes()
    });
    std::panic::set_hook(Box::new(|panic| say(&stderr::describe_panic(panic))));
}

/// Writes a line to stderr.
pub(crate) fn say(line: &str) {
    stderr::write_line(format!("pagecast: {line}\n").as_bytes());
}
