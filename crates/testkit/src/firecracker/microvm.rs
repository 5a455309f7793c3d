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
    /// Starts Firecracker, and waits until its API answers.
    ///
    /// # Errors
    ///
    /// Firecracker is missing, or does not start.
    pub fn start() -> Result<Self> {
        Ok(Self::from(Vmm::start()?))
    }

    /// Starts Firecracker in a jail. Later paths are those of the host.
    ///
    /// # Errors
    ///
    /// The jailer or Firecracker does not start.
    pub fn start_in(jail: Jail) -> Result<Self> {
        Ok(Self::from(Vmm::start_in(jail)?))
    }

    fn from((vmm, (input, output)): (Vmm, Pipes)) -> Self {
        Self {
            vmm,
            console: Console::new(input, output),
        }
    }

    /// Returns Firecracker's process ID.
    pub fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// Loads the snapshot and resumes the guest. Returns the time.
    ///
    /// # Errors
    ///
    /// Firecracker refuses.
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

/// A Firecracker process in a temporary folder of its own. Dropping it kills the process and removes the folder.
///
/// Every error has the end of Firecracker's log.
#[derive(Debug)]
pub struct MicroVm {
    vmm: Vmm,
    console: Console,
    patterns: Patterns,
    timeout: Duration,
}

impl MicroVm {
    /// Boots the tiny guest, with its memory as at the start, and waits until it accepts commands.
    ///
    /// # Errors
    ///
    /// Firecracker or the guest is missing, or the guest does not start.
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
            // The guest gives back memory on command, so Firecracker requests no size.
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

    /// Loads a fork of the snapshot, still paused. Returns the time of the load, too.
    ///
    /// # Errors
    ///
    /// Firecracker is missing or refuses.
    pub fn restore_paused(snapshot: &Snapshot, backend: &MemBackend) -> Result<(Self, Duration)> {
        BlankVmm::start()?.load(snapshot, backend, false)
    }

    /// Loads and resumes a fork of the snapshot. Returns the time of both, too.
    ///
    /// # Errors
    ///
    /// Firecracker is missing or refuses.
    pub fn restore(snapshot: &Snapshot, backend: &MemBackend) -> Result<(Self, Duration)> {
        BlankVmm::start()?.restore(snapshot, backend)
    }

    /// Sets the time that each later command may take, instead of a minute.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Returns Firecracker's process ID, which is its own until the `MicroVm` is dropped or killed.
    pub fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// Returns its jail, if it has one.
    pub fn jail(&self) -> Option<&Jail> {
        self.vmm.jail()
    }

    /// Returns the memory of Firecracker, the guest's included.
    ///
    /// # Errors
    ///
    /// Firecracker has ended.
    pub fn memory(&self) -> Result<MemoryUse> {
        MemoryUse::of(self.pid()).map_err(|error| self.vmm.explain(&error))
    }

    /// Pauses the guest. Returns the time.
    ///
    /// # Errors
    ///
    /// Firecracker refuses.
    pub fn pause(&self) -> Result<Duration> {
        self.set_state("Paused")
    }

    /// Resumes a paused guest. Returns the time.
    ///
    /// # Errors
    ///
    /// Firecracker refuses.
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

    /// Pings the guest. Returns the time until its answer.
    ///
    /// # Errors
    ///
    /// The guest does not answer in time.
    pub fn ping(&mut self) -> Result<Duration> {
        self.command("ping", |_, elapsed| Ok(elapsed))
    }

    /// Writes a pattern to every `every`th page (by page number) of the range: words that depend on their address and
    /// on the pattern's number, which is 0 for zeros only. The guest notes it.
    ///
    /// Forks write different patterns, to tell them apart.
    ///
    /// # Errors
    ///
    /// The range is not the guest's, or there is no answer in time.
    pub fn write(&mut self, range: GuestRange, every: u32, pattern: u8) -> Result<Written> {
        let written = self.command(&format!("write {range} {every} {pattern}"), Reply::into_written)?;
        self.patterns.write(range, every, pattern);
        Ok(written)
    }

    /// Has the guest read every word of the range and compare it with its last write, or with zero if there was none or
    /// the memory was given back since.
    ///
    /// # Errors
    ///
    /// The range is not the guest's, there is no answer in time, or the guest has lost its notes on its writes.
    /// Mismatches are no error.
    pub fn verify(&mut self, range: GuestRange) -> Result<Verified> {
        let (digest, verified) = self.command(&format!("verify {range}"), |reply, elapsed| {
            Ok((reply.field::<u64>("patterns")?, reply.into_verified(elapsed)?))
        })?;
        if digest != self.patterns.digest(range)? {
            let error = anyhow!("the guest's notes are not of the patterns that were written ({verified:?})");
            return Err(self.vmm.explain(&error));
        }
        Ok(verified)
    }

    /// Has the guest read one word of each page of the range.
    ///
    /// # Errors
    ///
    /// The range is not the guest's, or there is no answer in time.
    pub fn touch(&mut self, range: GuestRange) -> Result<Touched> {
        self.command(&format!("touch {range}"), Reply::into_touched)
    }

    /// Has the guest give the range back to the host through its balloon, which must be configured before the boot.
    /// Waits until Firecracker has dropped the pages. They must read as zeros from then on, and may be written again.
    ///
    /// # Errors
    ///
    /// The range is not the guest's, it has no balloon, or there is no answer in time.
    pub fn inflate(&mut self, range: GuestRange) -> Result<Inflated> {
        let inflated = self.command(&format!("inflate {range}"), Reply::into_inflated)?;
        self.patterns.write(range, 1, 0);
        Ok(inflated)
    }

    /// Starts a `verify` and does not wait for it. The guest takes no other command afterwards, so this is for forks
    /// that are killed, or lose their page server, in the middle of it.
    ///
    /// # Errors
    ///
    /// Firecracker has ended.
    pub fn start_verify(&mut self, range: GuestRange) -> Result<()> {
        self.console
            .send(&format!("verify {range}"))
            .map_err(|error| self.vmm.explain(&error))
    }

    /// Resets the guest, and waits until Firecracker has ended by itself.
    ///
    /// # Errors
    ///
    /// One of them does not happen in time.
    pub fn halt(&mut self) -> Result<ExitStatus> {
        self.command("halt", |_, _| Ok(()))?;
        self.vmm.wait(self.timeout)
    }

    /// Kills Firecracker with SIGKILL, and reaps it.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
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
