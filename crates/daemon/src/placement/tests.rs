use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use pagecast::template::Identity;
use pagecast_testkit::skip::{Need, skip};
use rustix::fs::StatVfsMountFlags;
use rustix::thread::CapabilitySet;

use super::*;

const CONTENT: &[u8] = &[7; 4096];

/// A template, a folder on its file system and one on another. Mounts in them are removed at the end.
struct Files {
    dir: tempfile::TempDir,
    elsewhere: tempfile::TempDir,
    file: File,
}

impl Files {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("mem"), CONTENT).unwrap();
        Self {
            file: File::open(dir.path().join("mem")).unwrap(),
            // Always a file system of its own.
            elsewhere: tempfile::tempdir_in("/dev/shm").unwrap(),
            dir,
        }
    }

    fn mem(&self) -> PathBuf {
        self.dir.path().join("mem")
    }

    fn near(&self) -> PathBuf {
        self.dir.path().join("placed")
    }

    fn far(&self) -> PathBuf {
        self.elsewhere.path().join("placed")
    }

    fn place(&self, at: &Path) -> Result<Placement, PlaceError> {
        PlannedPlacement::new(self.file.as_fd(), at)?.carry_out(self.file.as_fd(), Prefer::Link)
    }

    fn identity(&self) -> Identity {
        Identity::of(&self.file.metadata().unwrap())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // Left by a failed test.
        let _ = rustix::mount::unmount(self.far(), UnmountFlags::DETACH);
        let _ = rustix::mount::unmount(self.near(), UnmountFlags::DETACH);
    }
}

fn id_at(path: &Path) -> InodeId {
    let metadata = std::fs::symlink_metadata(path).unwrap();
    InodeId::from((metadata.dev(), metadata.ino()))
}

fn may_mount() -> bool {
    let needed = Need::Capabilities(CapabilitySet::SYS_ADMIN);
    let may = needed.is_there();
    if !may {
        skip((needed, "to mount"));
    }
    may
}

/// Drops a capability of this thread, which only this test uses.
fn give_up(capability: CapabilitySet) {
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.remove(capability);
    rustix::thread::set_capabilities(None, sets).unwrap();
}

fn reloaded<T: Serialize + serde::de::DeserializeOwned>(value: &T) -> T {
    serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap()
}

#[test]
fn on_the_same_file_system_it_is_a_hard_link_of_the_held_inode() {
    let files = Files::new();
    let before = files.identity();
    // The path leads to another file now.
    std::fs::rename(files.mem(), files.dir.path().join("renamed")).unwrap();
    std::fs::write(files.mem(), "another file").unwrap();

    let placement = files.place(&files.near()).unwrap();
    assert_eq!(placement.how(), How::HardLink);
    assert_eq!(placement.path(), files.near());
    assert_eq!(id_at(&files.near()), InodeId::of(&files.file).unwrap());
    assert_eq!(before.difference(&files.identity()), None);

    assert_eq!(placement.remove().unwrap(), Removal::Removed);
    assert!(!files.near().exists());
    assert_eq!(std::fs::read(files.dir.path().join("renamed")).unwrap(), CONTENT);
    assert_eq!(before.difference(&files.identity()), None);
    assert_eq!(placement.remove().unwrap(), Removal::Gone);
}

#[test]
fn on_another_file_system_it_is_a_read_only_mount_of_the_held_inode() {
    if !may_mount() {
        return;
    }
    let files = Files::new();
    let before = files.identity();
    std::fs::rename(files.mem(), files.dir.path().join("renamed")).unwrap();
    std::fs::write(files.mem(), "another file").unwrap();

    let placement = files.place(&files.far()).unwrap();
    assert!(matches!(placement.how(), How::BindMount { .. }), "{placement:?}");
    assert_eq!(id_at(&files.far()), InodeId::of(&files.file).unwrap());
    let refused = File::options().write(true).open(files.far()).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    let flags = rustix::fs::statvfs(files.far()).unwrap().f_flag;
    let all =
        StatVfsMountFlags::RDONLY | StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV | StatVfsMountFlags::NOEXEC;
    assert!(flags.contains(all), "{flags:?}");
    // Read-only is the mount, not the file.
    File::options()
        .write(true)
        .open(files.dir.path().join("renamed"))
        .unwrap();
    assert_eq!(before.difference(&files.identity()), None);

    assert_eq!(placement.remove().unwrap(), Removal::Removed);
    assert!(!files.far().exists());
    assert_eq!(std::fs::read(files.dir.path().join("renamed")).unwrap(), CONTENT);
    assert_eq!(placement.remove().unwrap(), Removal::Gone);
}

#[test]
fn who_has_opened_a_mounted_template_keeps_it() {
    if !may_mount() {
        return;
    }
    let files = Files::new();
    let placement = files.place(&files.far()).unwrap();
    let mut vmm = File::open(files.far()).unwrap();
    assert_eq!(placement.remove().unwrap(), Removal::Removed);
    assert!(!files.far().exists());
    let mut content = Vec::new();
    vmm.read_to_end(&mut content).unwrap();
    assert_eq!(content, CONTENT);
}

#[test]
fn a_mount_that_another_mount_namespace_has_too_is_removed_all_the_same() {
    if !may_mount() {
        return;
    }
    let files = Files::new();
    let placement = files.place(&files.far()).unwrap();
    // A namespace as Firecracker's jailer creates it. The process prints a line once it is in there, and ends with the
    // test.
    let mut jailed = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", "echo; read end"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    jailed.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    assert_eq!(placement.remove().unwrap(), Removal::Removed);
    assert!(!files.far().exists());
    drop(jailed.stdin.take());
    jailed.wait().unwrap();
}

#[test]
fn a_placed_template_can_still_be_renamed_written_and_deleted() {
    let files = Files::new();
    let mut placements = vec![files.place(&files.near()).unwrap()];
    if may_mount() {
        placements.push(files.place(&files.far()).unwrap());
    }
    let renamed = files.dir.path().join("renamed");
    std::fs::rename(files.mem(), &renamed).unwrap();
    let writer = File::options().write(true).open(&renamed).unwrap();
    writer.write_all_at(&[8], 0).unwrap();
    std::fs::remove_file(&renamed).unwrap();
    for placement in placements {
        // It is the same inode everywhere.
        assert_eq!(std::fs::read(placement.path()).unwrap()[..2], [8, 7]);
        assert_eq!(placement.remove().unwrap(), Removal::Removed);
        assert!(!placement.path().exists());
    }
    assert_eq!(files.file.metadata().unwrap().nlink(), 0);
}

#[test]
fn a_hard_link_has_the_owner_and_mode_of_the_template() {
    let files = Files::new();
    std::fs::set_permissions(files.mem(), std::fs::Permissions::from_mode(0o640)).unwrap();
    let placement = files.place(&files.near()).unwrap();
    assert_eq!(std::fs::metadata(files.near()).unwrap().mode() & 0o7777, 0o640);
    assert_eq!(placement.remove().unwrap(), Removal::Removed);
}

#[test]
fn nothing_that_exists_is_replaced() {
    let files = Files::new();
    for path in [files.near(), files.far()] {
        let refused = |what: &str| match files.place(&path) {
            Err(PlaceError::Exists { what: found, .. }) => assert_eq!(found, what),
            other => panic!("{other:?}"),
        };
        std::fs::write(&path, "precious").unwrap();
        refused("a file");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();

        std::fs::create_dir(&path).unwrap();
        refused("a folder");
        std::fs::remove_dir(&path).unwrap();

        // One dangling link, and one link to the template.
        for target in [files.dir.path().join("nowhere"), files.mem()] {
            std::os::unix::fs::symlink(&target, &path).unwrap();
            refused("a symbolic link");
            assert_eq!(std::fs::read_link(&path).unwrap(), target);
            std::fs::remove_file(&path).unwrap();
        }
        assert!(!files.dir.path().join("nowhere").exists());
    }
    let placement = files.place(&files.near()).unwrap();
    assert!(matches!(
        files.place(&files.near()),
        Err(PlaceError::Exists {
            what: "the template itself",
            ..
        })
    ));
    assert_eq!(placement.remove().unwrap(), Removal::Removed);
}

#[test]
fn what_appears_after_the_plan_is_not_replaced_either() {
    let files = Files::new();
    for path in [files.near(), files.far()] {
        let plan = PlannedPlacement::new(files.file.as_fd(), &path).unwrap();
        std::os::unix::fs::symlink(files.dir.path().join("nowhere"), &path).unwrap();
        if path == files.far() && !may_mount() {
            continue;
        }
        let error = plan.carry_out(files.file.as_fd(), Prefer::Link).unwrap_err();
        assert!(matches!(error, PlaceError::Exists { .. }), "{error}");
        assert!(std::fs::symlink_metadata(&path).unwrap().is_symlink());
        assert!(!files.dir.path().join("nowhere").exists());
        assert_eq!(plan.undo().unwrap(), Removal::NotOurs);
        assert!(std::fs::symlink_metadata(&path).unwrap().is_symlink());
    }
}

#[test]
fn paths_that_cannot_be_are_refused() {
    let files = Files::new();
    let place = |path: &Path| files.place(path).unwrap_err();
    for path in ["relative", "", "/", "/tmp/..", "/tmp/x/"] {
        assert!(matches!(place(Path::new(path)), PlaceError::Path { .. }), "{path}");
    }
    let no_folder = files.dir.path().join("no/folder");
    assert!(matches!(place(&no_folder), PlaceError::Folder { .. }));
    assert!(matches!(place(&files.mem().join("x")), PlaceError::Folder { .. }));
    let long = files.dir.path().join("x".repeat(300));
    assert!(matches!(place(&long), PlaceError::Io { .. }));
}

#[test]
fn a_plan_is_for_one_file_and_one_folder() {
    let files = Files::new();
    let folder = files.dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    let plan = PlannedPlacement::new(files.file.as_fd(), &folder.join("placed")).unwrap();

    let other = File::open("/dev/null").unwrap();
    assert!(matches!(
        plan.carry_out(other.as_fd(), Prefer::Link),
        Err(PlaceError::OtherFile { .. })
    ));

    std::fs::rename(&folder, files.dir.path().join("renamed")).unwrap();
    std::fs::create_dir(&folder).unwrap();
    assert!(matches!(
        plan.carry_out(files.file.as_fd(), Prefer::Link),
        Err(PlaceError::Interfered { .. })
    ));
    assert!(!folder.join("placed").exists());
}

#[test]
fn what_somebody_else_put_in_its_place_is_left_alone() {
    let files = Files::new();
    let mut paths = vec![files.near()];
    if may_mount() {
        paths.push(files.far());
    }
    for path in paths {
        let placement = files.place(&path).unwrap();
        if path == files.far() {
            rustix::mount::unmount(&path, UnmountFlags::DETACH).unwrap();
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(placement.remove().unwrap(), Removal::NotOurs);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}

#[test]
fn a_link_of_the_template_by_somebody_else_is_not_the_mount_that_we_made() {
    if !may_mount() {
        return;
    }
    let files = Files::new();
    // An immutable or protected template is mounted where it could be linked to: a mount on its own file system.
    let plan = PlannedPlacement::new(files.file.as_fd(), &files.near()).unwrap();
    let spot = plan.spot().unwrap();
    let over = plan.bind(&spot, files.file.as_fd(), Errno::PERM).unwrap();
    let placement = Placement {
        plan,
        how: How::BindMount { over },
    };
    rustix::mount::unmount(files.near(), UnmountFlags::DETACH).unwrap();
    std::fs::remove_file(files.near()).unwrap();
    std::fs::hard_link(files.mem(), files.near()).unwrap();
    assert_eq!(placement.remove().unwrap(), Removal::NotOurs);
    assert!(files.near().exists());
}

#[test]
fn in_a_folder_that_was_replaced_nothing_is_taken_away() {
    let files = Files::new();
    let folder = files.dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    let placement = files.place(&folder.join("placed")).unwrap();
    std::fs::rename(&folder, files.dir.path().join("renamed")).unwrap();
    std::fs::create_dir(&folder).unwrap();
    std::fs::hard_link(files.mem(), folder.join("placed")).unwrap();
    assert_eq!(placement.remove().unwrap(), Removal::NotOurs);
    assert!(folder.join("placed").exists());

    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(placement.remove().unwrap(), Removal::Gone);
}

#[test]
fn a_placement_that_was_read_back_can_be_removed() {
    let files = Files::new();
    let mut paths = vec![files.near()];
    if may_mount() {
        paths.push(files.far());
    }
    for path in paths {
        let placement = files.place(&path).unwrap();
        let later = reloaded(&placement);
        assert_eq!(later, placement);
        assert_eq!(later.remove().unwrap(), Removal::Removed);
        assert!(!path.exists());
    }
}

#[test]
fn a_plan_that_was_read_back_undoes_what_a_killed_process_had_done() {
    let files = Files::new();
    let mut paths = vec![files.near()];
    if may_mount() {
        paths.push(files.far());
    }
    for path in paths {
        let plan = PlannedPlacement::new(files.file.as_fd(), &path).unwrap();
        assert_eq!(reloaded(&plan).undo().unwrap(), Removal::Gone);
        // Killed before it could save the placement.
        let _ = plan.carry_out(files.file.as_fd(), Prefer::Link).unwrap();
        assert_eq!(reloaded(&plan).undo().unwrap(), Removal::Removed);
        assert!(!path.exists());
    }
    assert_eq!(std::fs::read(files.mem()).unwrap(), CONTENT);
}

#[test]
fn of_a_mount_that_is_gone_the_empty_file_is_removed() {
    if !may_mount() {
        return;
    }
    let files = Files::new();
    let placement = files.place(&files.far()).unwrap();
    rustix::mount::unmount(files.far(), UnmountFlags::DETACH).unwrap();
    assert_eq!(placement.remove().unwrap(), Removal::Removed);
    assert!(!files.far().exists());
}

#[test]
fn where_neither_is_possible_the_error_says_why_and_nothing_is_left() {
    let files = Files::new();
    give_up(CapabilitySet::SYS_ADMIN);
    let error = files.place(&files.far()).unwrap_err();
    assert!(matches!(error, PlaceError::Impossible { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("another file system"), "{text}");
    assert!(text.contains("needs CAP_SYS_ADMIN"), "{text}");
    assert!(!files.far().exists());
}

#[test]
fn an_immutable_template_is_mounted() {
    if !may_mount() {
        return;
    }
    let files = Files::new();
    let immutable = rustix::fs::IFlags::IMMUTABLE;
    let flags = rustix::fs::ioctl_getflags(&files.file);
    let Ok(()) = flags.and_then(|flags| rustix::fs::ioctl_setflags(&files.file, flags | immutable)) else {
        skip("needs a file system with an immutable flag in the folder for temporary files, and CAP_LINUX_IMMUTABLE");
        return;
    };
    let placed = files.place(&files.near());
    let removed = placed.as_ref().map(Placement::remove);
    let flags = rustix::fs::ioctl_getflags(&files.file).unwrap();
    rustix::fs::ioctl_setflags(&files.file, flags - immutable).unwrap();

    assert!(matches!(placed.as_ref().unwrap().how(), How::BindMount { .. }));
    assert_eq!(removed.unwrap().unwrap(), Removal::Removed);
    assert!(!files.near().exists());
}

/// An orchestrator prepares a jail, and gives all of it to the jail's user.
#[test]
fn changing_the_owner_of_all_that_is_in_a_jail_does_not_change_the_templates() {
    if !may_mount() {
        return;
    }
    let needed = Need::Capabilities(CapabilitySet::CHOWN);
    if !needed.is_there() {
        return skip(needed);
    }
    let files = Files::new();
    let before = (
        files.file.metadata().unwrap().uid(),
        files.file.metadata().unwrap().mode(),
    );
    for at in [files.near(), files.far()] {
        let plan = PlannedPlacement::new(files.file.as_fd(), &at).unwrap();
        let placement = plan.carry_out(files.file.as_fd(), Prefer::Mount).unwrap();
        assert!(matches!(placement.how(), How::BindMount { .. }), "{placement:?}");
        let refused = std::os::unix::fs::chown(&at, Some(54_321), None).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
        let refused = std::fs::set_permissions(&at, std::fs::Permissions::from_mode(0o777)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
        let after = (
            files.file.metadata().unwrap().uid(),
            files.file.metadata().unwrap().mode(),
        );
        assert_eq!(before, after);
        assert!(placement.holds(files.file.as_fd()));
        assert_eq!(std::fs::read(&at).unwrap(), CONTENT);

        assert_eq!(reloaded(&placement).remove().unwrap(), Removal::Removed);
        assert!(!at.exists());
        assert_eq!(placement.remove().unwrap(), Removal::Gone);
    }
}

#[test]
fn a_mount_over_a_link_is_taken_away_however_far_it_came() {
    if !may_mount() {
        return;
    }
    let files = Files::new();
    // Killed before it could save the placement.
    let plan = PlannedPlacement::new(files.file.as_fd(), &files.near()).unwrap();
    let _ = plan.carry_out(files.file.as_fd(), Prefer::Mount).unwrap();
    assert_eq!(reloaded(&plan).undo().unwrap(), Removal::Removed);
    assert!(!files.near().exists());
    // Killed between link and mount; then unmounted by another process.
    std::fs::hard_link(files.mem(), files.near()).unwrap();
    assert_eq!(reloaded(&plan).undo().unwrap(), Removal::Removed);
    let placement = plan.carry_out(files.file.as_fd(), Prefer::Mount).unwrap();
    rustix::mount::unmount(files.near(), UnmountFlags::DETACH).unwrap();
    assert!(!placement.holds(files.file.as_fd()));
    assert_eq!(placement.remove().unwrap(), Removal::Removed);
    assert!(!files.near().exists());
    assert_eq!(files.file.metadata().unwrap().nlink(), 1);
}

#[test]
fn without_the_right_to_mount_a_place_in_a_jail_is_a_link() {
    give_up(CapabilitySet::SYS_ADMIN);
    let files = Files::new();
    let plan = PlannedPlacement::new(files.file.as_fd(), &files.near()).unwrap();
    let placement = plan.carry_out(files.file.as_fd(), Prefer::Mount).unwrap();
    assert_eq!(placement.how(), How::HardLink);
    assert_eq!(placement.remove().unwrap(), Removal::Removed);
    assert!(!files.near().exists());
}

/// Prints the file at a path, and whether its owner can be changed, in a mount namespace of its own.
const JAIL: &str = "
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
NEWNS, SLAVE, REC = 0x20000, 1 << 19, 1 << 14
call(libc.unshare(NEWNS))
call(libc.mount(None, b'/', None, SLAVE | REC, None))
path = sys.argv[1]
while True:
    print(flush=True)
    sys.stdin.readline() or os._exit(0)
    try:
        status = os.stat(path)
        try:
            os.chown(path, status.st_uid, status.st_gid)
            owner = 'writable'
        except OSError as error:
            owner = error.strerror
        print(status.st_ino, owner, flush=True)
    except FileNotFoundError:
        print('nothing', flush=True)
";

/// A mount namespace as a jailer creates it.
struct Jail {
    child: std::process::Child,
    lines: std::io::BufReader<std::process::ChildStdout>,
}

impl Jail {
    fn around(path: &Path) -> Self {
        use std::process::{Command, Stdio};
        let mut child = Command::new("python3")
            .args(["-c", JAIL])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the tests of the daemon need python3");
        let mut lines = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        std::io::BufRead::read_line(&mut lines, &mut line).unwrap();
        assert_eq!(line, "\n", "the script has failed");
        Self { child, lines }
    }

    fn looks(&mut self) -> String {
        use std::io::{BufRead as _, Write as _};
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(b"\n").unwrap();
        let (mut line, mut turn) = (String::new(), String::new());
        self.lines.read_line(&mut line).unwrap();
        self.lines.read_line(&mut turn).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// If mounts propagate, an existing jail sees the mount; otherwise it sees the link.
#[test]
fn a_jail_that_is_there_already_gets_the_template_read_only_where_mounts_propagate() {
    if !may_mount() {
        return;
    }
    let files = Files::new();
    // A separate file system, with the template on it.
    let shared = files.elsewhere.path().canonicalize().unwrap();
    rustix::mount::mount("tmpfs", &shared, "tmpfs", MountFlags::empty(), None::<&std::ffi::CStr>).unwrap();
    let _mounted = Unmounted(&shared);
    for (propagates, owner) in [(true, "Read-only file system"), (false, "writable")] {
        let flags = if propagates {
            rustix::mount::MountPropagationFlags::SHARED
        } else {
            rustix::mount::MountPropagationFlags::PRIVATE
        };
        rustix::mount::mount_change(&shared, flags).unwrap();
        let template = shared.join("template");
        std::fs::write(&template, CONTENT).unwrap();
        let file = File::open(&template).unwrap();
        let at = shared.join("place");
        let mut earlier = Jail::around(&at);
        assert_eq!(earlier.looks(), "nothing");
        let plan = PlannedPlacement::new(file.as_fd(), &at).unwrap();
        let placement = plan.carry_out(file.as_fd(), Prefer::Mount).unwrap();
        let inode = file.metadata().unwrap().ino();
        assert_eq!(earlier.looks(), format!("{inode} {owner}"));
        let mut later = Jail::around(&at);
        assert_eq!(later.looks(), format!("{inode} Read-only file system"));
        assert_eq!(placement.remove().unwrap(), Removal::Removed);
        assert_eq!(earlier.looks(), "nothing");
        if propagates {
            assert_eq!(later.looks(), "nothing");
        }
        std::fs::remove_file(&template).unwrap();
    }
}

struct Unmounted<'a>(&'a Path);

impl Drop for Unmounted<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, UnmountFlags::DETACH);
    }
}
