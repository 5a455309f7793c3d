//! A running Firecracker with the tiny guest in it.

use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use pagecast_client::http::Method;
use pagecast_firecracker::Pipes;
use serde_json::{Value, json};

use super::console::{Console, Inflated, Reply, Touched, Verified, Written};
use super::patterns::Patterns;
use super::vmm::Vmm;
use super::{GuestRange, Jail, MemBackend, Snapshot, SnapshotOptions, build_guest};
use crate::process::MemoryUse;

const DEFAULT_TIMEOUT: Duration = Duration::from_mins(1);

/// A Firecracker process of our own that has no microVM yet, so that its process id is known before it loads one. Dropping
/// it kills the process.
#[derive(Debug)]
pub struct BlankVmm {
    vmm: Vmm,
    console: Console,
}

impl BlankVmm {
    /// Starts one, and waits until it takes requests.
    ///
    /// # Errors
    ///
    /// If Firecracker cannot be had, or does not come up.
    pub fn start() -> Result<Self> {
        Ok(Self::from(Vmm::start()?))
    }

    /// Starts one in a jail. Paths that it gets later are those of the host.
    ///
    /// # Errors
    ///
    /// If the jailer or Firecracker does not come up.
    pub fn start_in(jail: Jail) -> Result<Self> {
        Ok(Self::from(Vmm::start_in(jail)?))
    }

    fn from((vmm, (input, output)): (Vmm, Pipes)) -> Self {
        Self {
            vmm,
            console: Console::new(input, output),
        }
    }

    /// Firecracker's process id.
    pub fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// Has it load the snapshot and resume the guest; how long that took.
    ///
    /// # Errors
    ///
    /// If Firecracker refuses.
    pub fn restore(self, snapshot: &Snapshot, backend: &MemBackend) -> Result<(MicroVm, Duration)> {
        self.load(snapshot, backend, true)
    }

    fn load(self, snapshot: &Snapshot, backend: &MemBackend, resume: bool) -> Result<(MicroVm, Duration)> {
        let took = self.vmm.load(&snapshot.vmstate_path, backend, resume)?;
        Ok((self.with_guest(snapshot.patterns.clone()), took))
    }

    fn with_guest(self, patterns: Patterns) -> MicroVm {
        MicroVm {
            vmm: self.vmm,
            console: self.console,
            patterns,
            timeout: DEFAULT_TIMEOUT,
        }
    }
}

/// A Firecracker process of our own, in a temporary folder of its own. Dropping it kills the process and removes the
/// folder.
///
/// Every error tells the last that Firecracker said.
#[derive(Debug)]
pub struct MicroVm {
    vmm: Vmm,
    console: Console,
    patterns: Patterns,
    timeout: Duration,
}

impl MicroVm {
    /// Boots the tiny guest, with its memory as it is at the start, and waits until it takes commands.
    ///
    /// # Errors
    ///
    /// If Firecracker or the guest cannot be had, or the guest does not come up.
    pub fn boot(options: &SnapshotOptions) -> Result<Self> {
        let mem_mib = options.mem_mib;
        let kernel = build_guest()?;
        let mut vm = BlankVmm::start()?.with_guest(Patterns::zeros(mem_mib));
        let huge_pages = if options.huge_pages { "2M" } else { "None" };
        vm.put(
            "/machine-config",
            &json!({ "vcpu_count": 1, "mem_size_mib": mem_mib, "huge_pages": huge_pages }),
        )?;
        if options.balloon {
            // The guest gives back what it is told to give: there is no size that Firecracker has to want first.
            vm.put("/balloon", &json!({ "amount_mib": 0, "deflate_on_oom": false }))?;
        }
        if let Some(drive) = &options.drive {
            vm.put(
                "/drives/data",
                &json!({
                    "drive_id": "data",
                    "path_on_host": drive.path,
                    "is_root_device": false,
                    "is_read_only": drive.read_only,
                }),
            )?;
        }
        vm.put("/boot-source", &json!({ "kernel_image_path": kernel }))?;
        vm.put("/actions", &json!({ "action_type": "InstanceStart" }))?;
        let found: u32 = vm.reply("ready", |reply| reply.field("mem_mib"))?;
        ensure!(
            found == mem_mib,
            "the guest sees {found} MiB, not {mem_mib} MiB: it can use at most 3 GiB"
        );
        Ok(vm)
    }

    /// A fork of the snapshot, still paused, and how long the load took.
    ///
    /// # Errors
    ///
    /// If Firecracker cannot be had or refuses.
    pub fn restore_paused(snapshot: &Snapshot, backend: &MemBackend) -> Result<(Self, Duration)> {
        BlankVmm::start()?.load(snapshot, backend, false)
    }

    /// A fork of the snapshot, running, and how long it took to load and resume it.
    ///
    /// # Errors
    ///
    /// If Firecracker cannot be had or refuses.
    pub fn restore(snapshot: &Snapshot, backend: &MemBackend) -> Result<(Self, Duration)> {
        BlankVmm::start()?.restore(snapshot, backend)
    }

    /// How long each later command may take, instead of a minute.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Firecracker's process id, which is its own until the `MicroVm` is dropped or killed.
    pub fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// Where it is confined, if it is.
    pub fn jail(&self) -> Option<&Jail> {
        self.vmm.jail()
    }

    /// What the kernel says about Firecracker's memory, the guest's included.
    ///
    /// # Errors
    ///
    /// If Firecracker has ended.
    pub fn memory(&self) -> Result<MemoryUse> {
        MemoryUse::of(self.pid()).map_err(|error| self.vmm.explain(&error))
    }

    /// Pauses the guest; how long that took.
    ///
    /// # Errors
    ///
    /// If Firecracker refuses.
    pub fn pause(&self) -> Result<Duration> {
        self.set_state("Paused")
    }

    /// Resumes a paused guest; how long that took.
    ///
    /// # Errors
    ///
    /// If Firecracker refuses.
    pub fn resume(&self) -> Result<Duration> {
        self.set_state("Resumed")
    }

    fn set_state(&self, state: &str) -> Result<Duration> {
        self.vmm.call(Method::PATCH, "/vm", &json!({ "state": state }))
    }

    pub(crate) fn patterns(&self) -> &Patterns {
        &self.patterns
    }

    pub(crate) fn put(&self, path: &str, body: &Value) -> Result<()> {
        self.vmm.call(Method::PUT, path, body).map(drop)
    }

    /// Asks whether the guest is there; how long the answer took.
    ///
    /// # Errors
    ///
    /// If the guest does not answer in time.
    pub fn ping(&mut self) -> Result<Duration> {
        self.command("ping", |_, elapsed| Ok(elapsed))
    }

    /// Gives every `every`th page (by page number) of the range a pattern: words that depend on their address and on
    /// the pattern's number, which is never 0 unless zeros are wanted. The guest remembers it.
    ///
    /// Forks that are to be told apart write different patterns.
    ///
    /// # Errors
    ///
    /// If the range is not the guest's, or there is no answer in time.
    pub fn write(&mut self, range: GuestRange, every: u32, pattern: u8) -> Result<Written> {
        let written = self.command(&format!("write {range} {every} {pattern}"), Reply::into_written)?;
        self.patterns.write(range, every, pattern);
        Ok(written)
    }

    /// Has the guest read every word of the range and compare it with what it wrote there last, or with zero where it
    /// never wrote or has given the memory back since.
    ///
    /// # Errors
    ///
    /// If the range is not the guest's, or there is no answer in time, or the guest has lost its notes on what it wrote.
    /// Mismatches are not an error.
    pub fn verify(&mut self, range: GuestRange) -> Result<Verified> {
        let (digest, verified) = self.command(&format!("verify {range}"), |reply, elapsed| {
            Ok((reply.field::<u64>("patterns")?, reply.into_verified(elapsed)?))
        })?;
        if digest != self.patterns.digest(range)? {
            let error = anyhow!("the guest's notes on what it wrote are not what it was told to write ({verified:?})");
            return Err(self.vmm.explain(&error));
        }
        Ok(verified)
    }

    /// Has the guest read one word of each page of the range.
    ///
    /// # Errors
    ///
    /// If the range is not the guest's, or there is no answer in time.
    pub fn touch(&mut self, range: GuestRange) -> Result<Touched> {
        self.command(&format!("touch {range}"), Reply::into_touched)
    }

    /// Has the guest give the range back to the host through its balloon, which must have been asked for before it was
    /// booted, and waits until Firecracker has dropped the pages. They must read as zeros from then on, and may be
    /// written again.
    ///
    /// # Errors
    ///
    /// If the range is not the guest's, or it has no balloon, or there is no answer in time.
    pub fn inflate(&mut self, range: GuestRange) -> Result<Inflated> {
        let inflated = self.command(&format!("inflate {range}"), Reply::into_inflated)?;
        self.patterns.write(range, 1, 0);
        Ok(inflated)
    }

    /// Starts a `verify` and does not wait for it. Nothing else can be asked of the guest afterwards, so this is for
    /// forks that are killed, or lose their page server, in the middle of it.
    ///
    /// # Errors
    ///
    /// If Firecracker has ended.
    pub fn start_verify(&mut self, range: GuestRange) -> Result<()> {
        self.console
            .send(&format!("verify {range}"))
            .map_err(|error| self.vmm.explain(&error))
    }

    /// Has the guest reset, and waits until Firecracker has ended by itself.
    ///
    /// # Errors
    ///
    /// If either does not happen in time.
    pub fn halt(&mut self) -> Result<ExitStatus> {
        self.command("halt", |_, _| Ok(()))?;
        self.vmm.wait(self.timeout)
    }

    /// Kills Firecracker with SIGKILL, and reaps it.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.vmm.kill()
    }

    fn command<T>(&mut self, line: &str, read: impl FnOnce(Reply, Duration) -> Result<T>) -> Result<T> {
        let started = Instant::now();
        self.console.send(line).map_err(|error| self.vmm.explain(&error))?;
        self.reply(line, |reply| read(reply, started.elapsed()))
    }

    fn reply<T>(&mut self, command: &str, read: impl FnOnce(Reply) -> Result<T>) -> Result<T> {
        self.console
            .reply(command, self.timeout)
            .and_then(read)
            .map_err(|error| self.vmm.explain(&error))
    }
}
