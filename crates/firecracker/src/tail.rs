//! The end of a process's output.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use pagecast_command::harmless;

/// Number of bytes that are read at the end of a file.
const BYTES: u64 = 8192;
/// Number of lines that are shown.
const LINES: usize = 15;

/// The last lines of each file under its title, indented. Empty if the files are.
pub(crate) fn of_files(files: &[(PathBuf, &'static str)]) -> String {
    let mut text = String::new();
    for (path, title) in files {
        let lines = last_lines(path).unwrap_or_default();
        if !lines.is_empty() {
            let _ = write!(text, "\n  {title}:\n    {}", lines.join("\n    "));
        }
    }
    text
}

fn last_lines(path: &Path) -> io::Result<Vec<String>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
    let mut bytes = Vec::new();
    file.take(BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines.len().saturating_sub(LINES);
    Ok(lines.into_iter().skip(last).map(harmless).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_its_last_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let lines: Vec<_> = (0..2000).map(|number| format!("line {number}\n")).collect();
        std::fs::write(&path, lines.concat() + "\n\u{1b}[2Jlast\n").unwrap();
        let tail = last_lines(&path).unwrap();
        assert_eq!(tail.len(), LINES);
        assert_eq!(tail.last().unwrap(), "\\u{1b}[2Jlast");
        assert_eq!(tail[LINES - 2], "line 1999");
    }

    #[test]
    fn empty_and_missing_files_say_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (empty, missing) = (folder.path().join("empty"), folder.path().join("missing"));
        std::fs::write(&empty, "\n").unwrap();
        assert_eq!(of_files(&[(empty, "log"), (missing, "stderr")]), "");
    }
}
