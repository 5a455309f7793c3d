//! A page server in a program of your own: one template and one fork, served until its VMM has gone.
//!
//! ```console
//! $ cargo run --example embed -- snapshot.mem /run/fork-1.sock
//! {"backend_path":"/run/fork-1.sock","backend_type":"Uffd"}
//! ```
//!
//! The line is the `mem_backend` for Firecracker's `PUT /snapshot/load`.

use std::error::Error;
use std::time::Duration;

use pagecast::server::{ForkEvent, ForkOptions, ForkState};
use pagecast::{Server, Template};

const A_YEAR: Duration = Duration::from_hours(365 * 24);

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(mem_file), Some(socket)) = (arguments.next(), arguments.next()) else {
        return Err("usage: embed MEM_FILE SOCKET".into());
    };

    // Opened once, for `n` forks.
    let template = Template::open(mem_file.as_ref())?;
    let server = Server::builder()
        .observer(|event| {
            if let ForkEvent::Serving { id, pid, .. } = event {
                eprintln!("{id} is served, its VMM is process {pid}");
            }
        })
        .start()?;

    let options = ForkOptions::new(socket);
    let fork = server.register("fork-1".parse()?, &template, &options)?;
    let mem_backend = serde_json::json!({ "backend_type": "Uffd", "backend_path": fork.socket_path() });
    println!("{mem_backend}");

    // The server answers faults on threads of its own; this one is free meanwhile.
    let status = fork.wait(A_YEAR, ForkState::is_end);
    let faults = status.stats.faults;
    println!("{} after {} pages", status.state, faults.demand + faults.around);

    // Forks that still live would be completed: their memory made whole, so that they need no server.
    server.close(Duration::from_mins(1))?;
    match status.reason {
        Some(reason) => Err(reason.to_string().into()),
        None => Ok(()),
    }
}
