//! Separation and holders on real loop devices, partitions, overlays and btrfs. Needs root.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::UNIX_EPOCH,
};

use cryptattach::{
    base::key::Place,
    sys::users,
    volumes::separation::{self, Leaf, Lineage, Report, Surroundings},
};
use fuser::{Config, Errno, FileAttr, FileHandle, FileType, Filesystem, INodeNo, MountOption, ReplyAttr, Request};
use tempfile::TempDir;

/// A directory on disk with a tmpfs in it: two devices on any host.
struct Bench {
    // Dropped in this order: a directory with a mount in it would stay.
    _memory: Mounted,
    directory: TempDir,
}

struct Loop(PathBuf);
struct Mounted(PathBuf);

impl Bench {
    fn new() -> Self {
        // /tmp may be in memory.
        let directory = TempDir::with_prefix_in("separation-", "/var/tmp").unwrap();
        let memory = directory.path().join("memory");
        let memory = mount("-t tmpfs -o size=160m none", &memory);
        Self { _memory: memory, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A loop device over a new file of 128 MiB without content.
    fn device(&self, name: &str) -> Loop {
        Loop::over(&self.blank(name))
    }

    /// Likewise, with two partitions of 8 MiB.
    fn partitioned(&self, name: &str) -> Loop {
        let file = self.blank(name);
        run(&format!("printf 'size=8MiB\\nsize=8MiB\\n' | sfdisk --quiet '{}'", file.display()));
        let device = Loop::over(&file);
        // The kernel may know no tables.
        run(&format!("partx --update {}", device.0.display()));
        device
    }

    fn blank(&self, name: &str) -> PathBuf {
        let file = self.path(name);
        File::create_new(&file).unwrap().set_len(128 << 20).unwrap();
        file
    }

    fn check(&self, volume: &Path, place: &Path) -> Report {
        let place = Place::path("sealed key", place, true);
        let report = separation::check(volume, None, &[place], &Surroundings::default());
        println!("{report}\n");
        report
    }
}

impl Loop {
    fn over(file: &Path) -> Self {
        Self(run(&format!("losetup --find --show --partscan '{}'", file.display())).into())
    }

    fn partition(&self, number: u32) -> PathBuf {
        PathBuf::from(format!("{}p{number}", self.0.display()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("partx").arg("--delete").arg(&self.0).stderr(Stdio::null()).status();
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a test with a mount namespace of its own has copies of the mounts of all tests that run beside it.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

struct Swap<'a>(&'a Path);

impl<'a> Swap<'a> {
    fn on(device: &'a Path) -> Self {
        run(&format!("swapon {}", device.display()));
        Self(device)
    }
}

impl Drop for Swap<'_> {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(self.0).status();
    }
}

#[track_caller]
fn run(script: &str) -> String {
    let output = Command::new("sh").args(["-c", script]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

#[track_caller]
fn mount(what: &str, at: &Path) -> Mounted {
    fs::create_dir_all(at).unwrap();
    run(&format!("mount {what} '{}'", at.display()));
    Mounted(at.to_owned())
}

fn words(report: &Report) -> (&'static str, String) {
    (report.verdict.word(), report.verdict.to_string())
}

#[test]
fn a_loop_over_a_file_that_another_covers_is_a_gap() {
    let bench = Bench::new();
    let folder = bench.path("folder");
    fs::create_dir(&folder).unwrap();
    let volume = bench.device("folder/volume");
    assert_eq!(words(&bench.check(&volume.0, &bench.path("keys/new"))).0, "shared");
    let _cover = mount("-t tmpfs none", &folder);
    File::create_new(folder.join("volume")).unwrap();
    let (verdict, why) = words(&bench.check(&volume.0, &bench.path("keys/new")));
    assert!(verdict == "unproven" && why.contains("is not the file behind loop"), "{why}");
}

#[test]
fn a_loop_over_a_file_is_on_the_files_disk() {
    let bench = Bench::new();
    let volume = bench.device("volume");
    assert_eq!(Lineage::of(&volume.0).leaves(), Lineage::of(bench.directory.path()).leaves());
    assert_eq!(words(&bench.check(&volume.0, &bench.path("memory/keys/new"))).0, "apart");
    assert_eq!(words(&bench.check(&volume.0, &bench.path("keys/new"))).0, "shared");
    assert_eq!(words(&bench.check(&bench.path("volume"), &bench.path("keys/new"))).0, "shared");
    assert_eq!(words(&bench.check(&volume.0, &volume.0)).0, "shared", "the place is the volume itself");
}

#[test]
fn partitions_of_one_device_are_not_apart() {
    let bench = Bench::new();
    let disk = bench.partitioned("memory/disk");
    let (keys, volume) = (disk.partition(1), disk.partition(2));
    run(&format!("mkfs.ext4 -q {}", keys.display()));
    let store = mount(&keys.display().to_string(), &bench.path("a store"));
    let (word, sentence) = words(&bench.check(&volume, &store.0));
    assert_eq!(word, "shared", "{sentence}");
    assert_eq!(words(&bench.check(&bench.path("on disk"), &store.0)).0, "apart");
}

#[test]
fn a_bind_mount_leads_to_the_file_system() {
    let bench = Bench::new();
    let volume = bench.device("volume");
    let bound = mount(&format!("--bind {}", bench.path("memory").display()), &bench.path("a bound \\ one"));
    assert_eq!(words(&bench.check(&volume.0, &bound.0)).0, "apart");
    let below = bench.path("below");
    fs::create_dir(&below).unwrap();
    let bound = mount(&format!("--bind {}", below.display()), &bench.path("memory/bound"));
    assert_eq!(words(&bench.check(&volume.0, &bound.0)).0, "shared");
}

#[test]
fn a_mount_that_covers_another_counts() {
    let bench = Bench::new();
    let volume = bench.device("volume");
    let at = bench.path("keys");
    let _first = mount("-t tmpfs none", &at);
    let device = bench.device("other");
    run(&format!("mkfs.ext4 -q {}", device.0.display()));
    let _second = mount(&device.0.display().to_string(), &at);
    assert_eq!(words(&bench.check(&volume.0, &at)).0, "shared");
}

#[test]
fn an_overlay_is_on_all_its_layers() {
    let bench = Bench::new();
    let volume = bench.device("volume");
    for directory in ["memory/a,b:c", "memory/upper", "memory/work", "lower"] {
        fs::create_dir(bench.path(directory)).unwrap();
    }
    let overlay = |lower: &str| {
        let memory = bench.path("memory");
        let options = format!("lowerdir={lower},upperdir={0}/upper,workdir={0}/work", memory.display());
        mount(&format!("-t overlay overlay -o '{options}'"), &bench.path("merged"))
    };
    let in_memory = format!("{}/memory/a\\,b\\:c", bench.directory.path().display());
    {
        let merged = overlay(&in_memory);
        assert_eq!(words(&bench.check(&volume.0, &merged.0)).0, "apart");
    }
    let merged = overlay(&format!("{in_memory}:{}", bench.path("lower").display()));
    fs::write(merged.0.join("key"), "x").unwrap();
    assert_eq!(words(&bench.check(&volume.0, &merged.0.join("key"))).0, "shared");
}

#[test]
fn a_btrfs_is_on_all_its_devices() {
    let bench = Bench::new();
    let (first, second) = (bench.device("memory/one"), bench.device("two"));
    run(&format!("mkfs.btrfs -q -m raid1 -d raid1 {} {}", first.0.display(), second.0.display()));
    run(&format!("btrfs device scan {} {}", first.0.display(), second.0.display()));
    let pool = mount(&first.0.display().to_string(), &bench.path("pool"));
    let subvolume = pool.0.join("subvolume");
    run(&format!("btrfs -q subvolume create '{}'", subvolume.display()));
    let volume = bench.device("volume");
    for place in [&pool.0, &subvolume] {
        assert_eq!(words(&bench.check(&volume.0, place)).0, "shared");
    }
    let leaves = Lineage::of(&subvolume).leaves().into_iter().cloned().collect::<Vec<_>>();
    assert!(leaves.iter().any(|leaf| matches!(leaf, Leaf::Memory(_))), "{leaves:?}");
    let mounted = format!("mounted on {}", pool.0.display());
    assert!(users::of_path(&second.0).contains(&mounted), "also for the device that the mount does not name");
}

#[test]
fn a_deleted_backing_file_is_a_gap() {
    let bench = Bench::new();
    let volume = bench.device("memory/volume");
    fs::remove_file(bench.path("memory/volume")).unwrap();
    let (word, sentence) = words(&bench.check(&volume.0, &bench.path("keys")));
    assert_eq!(word, "unproven");
    assert!(sentence.contains("has been deleted"), "{sentence}");
}

/// Nothing but a root directory: enough to see how the kernel lists the mount.
struct Empty;

impl Filesystem for Empty {
    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if ino != INodeNo::ROOT {
            return reply.error(Errno::ENOENT);
        }
        let (size, blocks, uid, gid, rdev, flags) = (0, 0, 0, 0, 0, 0);
        let (atime, mtime, ctime, crtime) = (UNIX_EPOCH, UNIX_EPOCH, UNIX_EPOCH, UNIX_EPOCH);
        let (kind, perm, nlink, blksize) = (FileType::Directory, 0o755, 2, 512);
        let attr = FileAttr {
            ino,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            crtime,
            kind,
            perm,
            nlink,
            uid,
            gid,
            rdev,
            blksize,
            flags,
        };
        reply.attr(&std::time::Duration::from_secs(1), &attr);
    }
}

#[test]
fn a_userspace_export_leads_to_the_encrypted_device() {
    let bench = Bench::new();
    let volume = bench.device("volume");
    let at = bench.path("memory/export");
    fs::create_dir(&at).unwrap();
    let mut config = Config::default();
    let source = volume.0.display().to_string();
    // As root fuser mounts without fusermount, and then drops MountOption::Subtype; the kernel takes the option itself.
    config.mount_options = vec![MountOption::FSName(source), MountOption::CUSTOM("subtype=cryptattach".into())];
    let _session = fuser::spawn_mount(Empty, &at, &config).unwrap();
    assert_eq!(words(&bench.check(&volume.0, &at)).0, "shared");
}

#[test]
fn holders_are_told_in_words() {
    let bench = Bench::new();
    let disk = bench.partitioned("memory/disk");
    assert_eq!(lasting_holders(&disk.0), [""; 0]);
    assert_eq!(lasting_holders(&bench.path("memory/disk")), [format!("behind the loop device {}", name(&disk.0))]);

    let partition = disk.partition(1);
    run(&format!("mkfs.ext4 -q {}", partition.display()));
    let mounted = mount(&partition.display().to_string(), &bench.path("a mount"));
    let second = PathBuf::from(run(&format!("losetup --find --show --read-only {}", partition.display())));
    let second = Loop(second);
    let mut child = Command::new("sleep").arg("60").stdin(File::open(&partition).unwrap()).spawn().unwrap();
    let holders = lasting_holders(&partition);
    let whole = users::of_path(&disk.0);
    child.kill().unwrap();
    child.wait().unwrap();
    let mut expected = vec![
        format!("behind the loop device {}", name(&second.0)),
        format!("mounted on {}", mounted.0.display()),
        format!("opened by sleep (pid {})", child.id()),
    ];
    expected.sort();
    assert_eq!(holders, expected);
    assert!(whole.contains(&format!("partition {} mounted on {}", name(&partition), mounted.0.display())), "{whole:?}");
}

#[test]
fn a_mount_in_another_namespace_is_found() {
    let bench = Bench::new();
    let disk = bench.device("memory/disk");
    run(&format!("mkfs.ext4 -q {}", disk.0.display()));
    // Below a mount of our own, which is made private: in a chroot, "/" is no mount that could be.
    let (memory, at) = (bench.path("memory"), bench.path("memory/elsewhere"));
    fs::create_dir(&at).unwrap();
    let script = format!(
        "mount --make-private {} && mount {} {} && exec sleep 60",
        memory.display(),
        disk.0.display(),
        at.display()
    );
    let mut child =
        Command::new("unshare").args(["--mount", "--propagation", "unchanged", "sh", "-c", &script]).spawn().unwrap();
    let expected = format!("mounted on {} in the mount namespace of sleep (pid {})", at.display(), child.id());
    let found = (0..50).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(100));
        users::of_path(&disk.0).contains(&expected)
    });
    let seen = users::of_path(&disk.0);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(found, "{seen:?}");
}

#[test]
fn swap_in_memory_is_named_and_does_no_harm() {
    let bench = Bench::new();
    let disk = bench.device("memory/swap");
    run(&format!("mkswap {}", disk.0.display()));
    let _swap = Swap::on(&disk.0);
    let report = bench.check(&bench.path("volume"), &bench.path("memory/keys"));
    assert_eq!(lasting_holders(&disk.0), ["used as swap"]);
    assert!(report.swap.iter().any(|swap| swap.path == disk.0), "{report}");
    assert_eq!(report.verdict.word(), "apart");
}

/// All holders but programs of this host that have a look at each new device for a moment, as udev's do.
fn lasting_holders(path: &Path) -> Vec<String> {
    let mut holders = users::of_path(path);
    holders.retain(|holder| !holder.starts_with("opened by") || holder.contains("sleep"));
    holders
}

fn name(device: &Path) -> String {
    device.file_name().unwrap().to_string_lossy().into_owned()
}
