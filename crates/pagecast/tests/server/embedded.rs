//! The example that embeds the library, run as it is.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use pagecast_testkit::sim_vmm::{Connect, Read, SimVmm};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};
use serde_json::Value;

const EXAMPLE: &str = include_str!("../../examples/embed.rs");

/// Killed when this is dropped, so that a test that fails leaves nothing.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Tests are in `target/<profile>/deps`, examples beside that folder.
fn binary() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().with_file_name("examples").join("embed");
    assert!(path.is_file(), "build it with `cargo build -p pagecast --examples`");
    path
}

#[test]
fn a_program_of_under_60_lines_serves_a_fork() {
    assert!(EXAMPLE.lines().count() < 60);
    let template = TemplateFile::create(TemplateModel::of_data(4 << 20, 1)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("fork.sock");
    let child = Command::new(binary())
        .arg(template.path())
        .arg(&socket)
        .stdout(Stdio::piped())
        .spawn();
    let mut program = Running(child.unwrap());
    let mut lines = BufReader::new(program.0.stdout.take().unwrap()).lines();
    let mem_backend: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(mem_backend["backend_type"], "Uffd");
    assert_eq!(mem_backend["backend_path"], socket.to_str().unwrap());

    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(&socket, template.model())).unwrap();
    let checked = vmm.run(Read::default()).unwrap().checked;
    assert_eq!((checked.pages, checked.mismatches), (1024, 0), "{checked:?}");
    vmm.kill().unwrap();

    assert_eq!(lines.next().unwrap().unwrap(), "exited after 1024 pages");
    assert!(program.0.wait().unwrap().success());
    assert!(!socket.exists());
}
