use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pagecast_testkit::skip::{Need, skip};
use rustix::event::{PollFd, PollFlags};
use rustix::thread::CapabilitySet;

use super::*;

/// Files for which [`holders`] panics, and how often it has. Each test has files of its own.
static PANICS: Mutex<BTreeMap<InodeId, usize>> = Mutex::new(BTreeMap::new());

fn panics() -> MutexGuard<'static, BTreeMap<InodeId, usize>> {
    PANICS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Drops the capabilities of this thread to inspect processes with more capabilities.
pub(crate) fn look_at_nobody_else() {
    let mut sets = rustix::thread::capabilities(None).unwrap();
    // The latter two are enough on recent kernels.
    for capability in [
        CapabilitySet::SYS_PTRACE,
        CapabilitySet::SYS_ADMIN,
        CapabilitySet::PERFMON,
    ] {
        sets.effective.remove(capability);
        sets.permitted.remove(capability);
    }
    rustix::thread::set_capabilities(None, sets).unwrap();
}

/// Makes every search for processes that map this file panic.
pub(crate) fn panic_about(file: InodeId) {
    panics().insert(file, 0);
}

/// Ends these panics.
pub(crate) fn panic_no_more_about(file: InodeId) {
    panics().remove(&file);
}

/// Returns how often a search for this file has panicked.
pub(crate) fn panics_about(file: InodeId) -> usize {
    panics().get(&file).copied().unwrap_or(0)
}

/// Panics if a test has requested that for one of these files.
pub(super) fn may_panic(files: &BTreeSet<InodeId>) {
    for (file, count) in &mut *panics() {
        if files.contains(file) {
            *count += 1;
            panic!("on purpose");
        }
    }
}

fn maps_file(process: &VmmProcess, file: InodeId) -> io::Result<bool> {
    Ok(!process.mapped_paths(file)?.is_empty())
}
use crate::mapper::Mapper;
use crate::placement::{How, PlannedPlacement, Prefer};

/// A mount that is removed at the end of the test.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

fn template(folder: &Path) -> PathBuf {
    let path = folder.join("mem");
    std::fs::write(&path, [7; 8192]).unwrap();
    path
}

fn id_of(path: &Path) -> InodeId {
    InodeId::of(File::open(path).unwrap()).unwrap()
}

fn await_exit(process: &VmmProcess) {
    rustix::event::poll(&mut [PollFd::new(process, PollFlags::IN)], None).unwrap();
}

#[test]
fn a_process_is_known_until_it_has_exited() {
    let mapper = Mapper::start("turn()", &[]);
    let process = VmmProcess::open(mapper.pid()).unwrap();
    assert_eq!(process.pid(), mapper.pid());
    assert!(!process.wait_exited(Duration::ZERO));
    assert!(process.memory().is_some_and(|memory| memory.rss > 0));
    process.kill().unwrap();
    await_exit(&process);
    assert!(process.wait_exited(Duration::ZERO));
    assert_eq!(process.memory(), None);
    process.kill().unwrap();
    // A zombie cannot be a VMM any more.
    assert!(matches!(
        VmmProcess::open(mapper.pid()),
        Err(VmmError::NoProcess { .. })
    ));
}

#[test]
fn a_saved_process_is_found_again_until_it_has_exited() {
    let mut mapper = Mapper::start("turn()", &[]);
    let saved = VmmProcess::open(mapper.pid()).unwrap().saved().unwrap();
    let saved: SavedVmm = serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap();
    let found = VmmProcess::find(&saved).unwrap().unwrap();
    assert_eq!(found.saved().unwrap(), saved);

    let earlier = SavedVmm {
        start_time: saved.start_time - 1,
        ..saved.clone()
    };
    assert!(VmmProcess::find(&earlier).unwrap().is_none(), "another with its pid");
    let before = SavedVmm {
        boot_id: "00000000-0000-0000-0000-000000000000".to_owned(),
        ..saved.clone()
    };
    assert!(VmmProcess::find(&before).unwrap().is_none(), "before the host started");

    mapper.kill();
    await_exit(&found);
    assert!(VmmProcess::find(&saved).unwrap().is_none(), "a zombie");
    mapper.reap();
    assert!(VmmProcess::find(&saved).unwrap().is_none(), "nobody");
}

#[test]
fn a_pid_that_others_have_by_now_is_no_error() {
    let boot_id = boot_id().unwrap();
    // This process, init, a thread of this process, impossible pids.
    let thread = std::thread::spawn(|| rustix::thread::gettid().as_raw_nonzero().get());
    let thread = thread.join().unwrap();
    let own = i32::try_from(std::process::id()).unwrap();
    for pid in [own, 1, thread, 0, -1, i32::MIN, i32::MAX] {
        let saved = SavedVmm {
            pid,
            start_time: u64::MAX,
            boot_id: boot_id.clone(),
        };
        assert!(VmmProcess::find(&saved).unwrap().is_none(), "{pid}");
    }
}

#[test]
fn what_cannot_be_a_vmm_is_refused() {
    let refused = |pid: i32, why: &str| {
        let error = VmmProcess::open(pid).unwrap_err().to_string();
        assert!(error.contains(why), "{pid}: {error}");
    };
    refused(i32::try_from(std::process::id()).unwrap(), "pagecast itself");
    refused(1, "the init process");
    for pid in [0, -1, i32::MIN, i32::MAX] {
        refused(pid, "there is no process");
    }
    let (tell, told) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        tell.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
        let _ = ended.recv();
    });
    refused(told.recv().unwrap(), "a thread");
    drop(end);
    thread.join().unwrap();

    let kthreadd = Process::new(2).and_then(|process| process.stat());
    if kthreadd.is_ok_and(|stat| stat.comm == "kthreadd") {
        refused(2, "a thread of the kernel");
    } else {
        skip("the threads of the kernel are not visible in this pid namespace");
    }
}

#[test]
fn a_process_that_we_may_not_kill_is_refused() {
    let needed = Need::Capabilities(CapabilitySet::SETUID | CapabilitySet::KILL);
    if !needed.is_there() {
        skip((
            needed,
            "to start a process as somebody else, and to give up the right to kill it",
        ));
        return;
    }
    let mut child = std::process::Command::new("sleep")
        .arg("600")
        .uid(65534)
        .spawn()
        .unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let saved = VmmProcess::open(pid).unwrap().saved().unwrap();
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::KILL);
    rustix::thread::set_capabilities(None, sets).unwrap();

    let opened = VmmProcess::open(pid);
    let found = VmmProcess::find(&saved);
    sets.effective.insert(CapabilitySet::KILL);
    rustix::thread::set_capabilities(None, sets).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();

    assert!(matches!(opened, Err(VmmError::NotOurs { .. })), "{opened:?}");
    // It is alive, which differs from having exited.
    assert!(matches!(found, Err(VmmError::NotOurs { .. })), "{found:?}");
}

#[test]
fn a_process_maps_a_file_or_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = template(dir.path());
    let script = "turn()\nmemory = map(sys.argv[1])\nturn()\nmemory.close()\nturn()";
    let mut mapper = Mapper::start(script, &[path.to_str().unwrap()]);
    let process = VmmProcess::open(mapper.pid()).unwrap();
    assert!(!maps_file(&process, id_of(&path)).unwrap());
    mapper.next();
    assert!(maps_file(&process, id_of(&path)).unwrap());
    assert_eq!(process.mapped_paths(id_of(&path)).unwrap(), std::slice::from_ref(&path));

    // The inode counts, not the file at the path by now.
    let template = id_of(&path);
    std::fs::copy(&path, dir.path().join("copy")).unwrap();
    std::fs::rename(dir.path().join("copy"), &path).unwrap();
    assert!(maps_file(&process, template).unwrap());
    assert!(!maps_file(&process, id_of(&path)).unwrap());

    mapper.next();
    assert!(!maps_file(&process, template).unwrap());
    mapper.reap();
    assert!(!maps_file(&process, template).is_ok_and(|maps| maps), "an error, or no");
}

#[test]
fn the_paths_tell_which_placement_a_process_has_opened() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = template(dir.path());
    let file = File::open(&path).unwrap();
    let place = |at: &Path| {
        PlannedPlacement::new(file.as_fd(), at)
            .unwrap()
            .carry_out(file.as_fd(), Prefer::Link)
            .unwrap()
    };
    let mut placements = vec![place(&dir.path().join("a link"))];
    let needed = Need::Capabilities(CapabilitySet::SYS_ADMIN);
    if needed.is_there() {
        placements.push(place(&elsewhere.path().join("mount")));
    } else {
        skip((needed, "to mount"));
    }
    let plain = Mapper::of_file(&path);
    let mut expected = vec![(plain.pid(), path.clone())];
    let mut mappers = vec![plain];
    for placement in &placements {
        let mapper = Mapper::of_file(placement.path());
        expected.push((mapper.pid(), placement.path().to_owned()));
        mappers.push(mapper);
    }

    // One scan of all processes serves any number of files.
    let other_dir = tempfile::tempdir().unwrap();
    let other = template(other_dir.path());
    let other_mapper = Mapper::of_file(&other);
    let files = BTreeSet::from([id_of(&path), id_of(&other)]);
    let mut expected: Vec<_> = expected
        .into_iter()
        .map(|(pid, at)| (pid, id_of(&path), at))
        .chain([(other_mapper.pid(), id_of(&other), other)])
        .collect();
    expected.sort();
    let mut found: Vec<_> = holders(&files)
        .unwrap()
        .found
        .into_iter()
        .map(|holder| (holder.pid, holder.file, holder.paths[0].clone()))
        .collect();
    found.sort();
    assert_eq!(found, expected);

    for placement in &placements {
        let _ = placement.remove().unwrap();
    }
    // They still map it.
    assert_eq!(
        holders(&BTreeSet::from([id_of(&path)])).unwrap().found.len(),
        mappers.len()
    );
    assert!(placements.iter().any(|placement| placement.how() == How::HardLink));
}

#[test]
fn a_file_on_an_overlay_is_recognised() {
    let needed = Need::Capabilities(CapabilitySet::SYS_ADMIN);
    if !needed.is_there() {
        skip((needed, "to mount"));
        return;
    }
    // Two file systems below: then an overlay shows another device and inode for what is on the lower one.
    let upper = tempfile::tempdir_in("/dev/shm").unwrap();
    let lower = tempfile::tempdir().unwrap();
    let below = template(lower.path());
    let (work, top, merged) = (
        upper.path().join("work"),
        upper.path().join("top"),
        upper.path().join("merged"),
    );
    for folder in [&work, &top, &merged] {
        std::fs::create_dir(folder).unwrap();
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.path().display(),
        top.display(),
        work.display()
    );
    let options = std::ffi::CString::new(options).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    if let Err(errno) = rustix::mount::mount("overlay", &merged, "overlay", flags, options.as_c_str()) {
        skip(&format!("cannot mount an overlay: {errno}"));
        return;
    }
    let path = merged.join("mem");
    let _mounted = Mounted(merged);
    let mapper = Mapper::of_file(&path);
    let process = VmmProcess::open(mapper.pid()).unwrap();
    assert!(maps_file(&process, id_of(&path)).unwrap());
    let maps_below = maps_file(&process, id_of(&below)).unwrap();
    assert!(!maps_below, "an overlay's file is one of its own");
}

/// A complete VMM outlives its daemon only because this can be read.
#[test]
fn faults_of_a_process_are_nobodys_whatever_the_names_of_its_files_are() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir
        .path()
        .join(std::ffi::OsStr::from_bytes(b"VmFlags: um \xff\nVmFlags: um "));
    std::fs::write(&path, [7; 4096]).unwrap();
    let script = "memory = map(sys.argv[1].encode(errors='surrogateescape'))\nturn()";
    let mapper = Mapper::start_with(script, &[path.as_os_str()]);
    let process = VmmProcess::open(mapper.pid()).unwrap();
    assert!(maps_file(&process, id_of(&path)).unwrap());
    assert!(!process.needs_server());
}

/// The vCPUs of such a VMM run on, and `/proc/PID/maps` is empty.
#[test]
fn a_process_whose_first_thread_has_ended_maps_its_files_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = template(dir.path());
    let script = "
import ctypes, threading
memory = map(sys.argv[1])
ready, go = os.pipe()
ends = ctypes.PyDLL(None).syscall
# Waits without the lock that the first thread takes with it.
threading.Thread(target=lambda: os.read(ready, 1), daemon=True).start()
turn()
ends(60, 0)";
    let mut mapper = Mapper::start(script, &[path.to_str().unwrap()]);
    let process = VmmProcess::open(mapper.pid()).unwrap();
    mapper.go_on();
    let until = std::time::Instant::now() + Duration::from_secs(40);
    while !std::fs::read(format!("/proc/{}/maps", mapper.pid())).is_ok_and(|maps| maps.is_empty()) {
        assert!(std::time::Instant::now() < until, "its first thread has not ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!process.wait_exited(Duration::ZERO));
    assert!(maps_file(&process, id_of(&path)).unwrap());
    let found = holders(&BTreeSet::from([id_of(&path)])).unwrap().found;
    assert_eq!(
        found.iter().map(|holder| holder.pid).collect::<Vec<_>>(),
        [mapper.pid()]
    );
}

#[test]
fn a_process_that_cannot_be_looked_at_may_map_any_file_that_it_has_room_for() {
    let needed = Need::Capabilities(CapabilitySet::SYS_PTRACE);
    if !needed.is_there() {
        skip((needed, "to give it up"));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = template(dir.path());
    // It has a capability that this process drops, so it can be killed but not inspected.
    let mapper = Mapper::of_file(&path);
    look_at_nobody_else();

    let process = VmmProcess::open(mapper.pid()).unwrap();
    assert!(process.mapped_paths(id_of(&path)).is_err());
    let holders = holders(&BTreeSet::from([id_of(&path)])).unwrap();
    let may_hold = |bytes| holders.may_hold(bytes).any(|process| process.pid == mapper.pid());
    assert!(may_hold(8192));
    assert!(!may_hold(1 << 46), "no room for such a file");
    assert!(
        holders
            .unreadable
            .iter()
            .all(|process| process.pid != 1 && process.pid != 2)
    );
}
