//! A process that maps memory for a test.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Functions for every script. `turn` returns control to the test, and exits when the test has ended.
const PRELUDE: &str = "
import mmap, os, sys
def turn():
    print(flush=True)
    sys.stdin.readline() or os._exit(0)
def map(path, flags=mmap.MAP_PRIVATE):
    with open(path, 'rb') as file:
        return mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
def touch(memory, write=False):
    for at in range(0, len(memory), 4096):
        if write: memory[at] = 1
        else: memory[at]
";

/// A Python process, killed and reaped when this is dropped.
pub(crate) struct Mapper {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Mapper {
    /// Starts a process, and waits until its script first calls `turn`.
    pub(crate) fn start(script: &str, args: &[&str]) -> Self {
        Self::start_with(script, args)
    }

    /// Does the same with arguments that need not be UTF-8.
    pub(crate) fn start_with(script: &str, args: &[impl AsRef<std::ffi::OsStr>]) -> Self {
        let mut child = Command::new("python3")
            .arg("-c")
            .arg(format!("{PRELUDE}\n{script}"))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the tests of the daemon need python3");
        let mut mapper = Self {
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
        };
        mapper.wait();
        mapper
    }

    /// Starts a process that maps a file privately, as a VMM does, and reads all of it.
    pub(crate) fn of_file(path: &std::path::Path) -> Self {
        let path = path.to_str().unwrap();
        Self::start("memory = map(sys.argv[1])\ntouch(memory)\nturn()", &[path])
    }

    /// Continues the script up to its next `turn`.
    pub(crate) fn next(&mut self) {
        self.go_on();
        self.wait();
    }

    /// Continues the script, and does not wait.
    pub(crate) fn go_on(&mut self) {
        writeln!(self.stdin).unwrap();
    }

    fn wait(&mut self) {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "\n", "the script has failed");
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().try_into().unwrap()
    }

    /// Kills the process, which stays a zombie.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Kills and reaps the process.
    pub(crate) fn reap(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        // These fail if the process is dead and reaped already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
