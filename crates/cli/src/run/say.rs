//! Lines on standard error.

use pagecast_command::stderr;

/// Begins to write lines through [`stderr`], panics included.
pub(crate) fn start_saying() {
    stderr::start(|lines| {
        format!("pagecast: lines that nobody has read in time, and that were dropped: {lines}\n").into_bytes()
    });
    std::panic::set_hook(Box::new(|panic| say(&stderr::describe_panic(panic))));
}

/// Prints the text on stderr, on a line of its own.
pub(crate) fn say(line: &str) {
    stderr::write_line(format!("pagecast: {line}\n").as_bytes());
}
