//! A simulated VMM, driven over stdin and stdout (see `pagecast_testkit::sim_vmm`).

fn main() -> anyhow::Result<()> {
    pagecast_testkit::sim_vmm::run()
}
