//! Tests that cannot run on this machine.

use std::io::Write;

/// Says why the rest of a test is skipped: on its output, and in the file that the variable `PAGECAST_SKIPPED` names, since
/// test runners hide the output of tests that pass.
pub fn skip(reason: &str) {
    println!("skipped: {reason}");
    let Some(path) = std::env::var_os("PAGECAST_SKIPPED") else {
        return;
    };
    let test = std::thread::current().name().unwrap_or("main").to_owned();
    // One write of one line: tests that run at once do not mix theirs.
    let line = format!("{test}: {reason}\n");
    let file = std::fs::File::options().create(true).append(true).open(&path);
    if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
        eprintln!("failed to note a skipped test in {}: {error}", path.display());
    }
}
