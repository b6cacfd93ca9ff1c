//! What was flushed is there, what failed is reported, and a full memory does not hang.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use fuser::Errno;
use nix::libc;

use crate::{
    busy::wait_until,
    disk::Disk,
    exports::qemu_io,
    site::{Site, sh},
};

const DISK_BYTES: usize = 24 << 20;

/// A disk with a volume on it.
fn disk_with_volume(site: &Site) -> (Disk, String) {
    let disk = Disk::new(DISK_BYTES);
    let path = disk.path().into_os_string().into_string().unwrap();
    site.ok(&["format", &path]);
    (disk, path)
}

fn block(byte: u8) -> AlignedBlock {
    AlignedBlock([byte; 4096])
}

#[repr(align(4096))]
struct AlignedBlock([u8; 4096]);

fn open_directly(device: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device).unwrap()
}

/// Everything at once goes dark: the disk forgets what was not flushed, the worker dies.
fn cut_power(site: &Site, disk: &Disk, name: &str) {
    disk.cut_power();
    sh(&format!("kill -9 {}", crate::busy::worker(name)));
    wait_until("the worker's death shows", || !site.json(&["status", name])["trouble"].is_null());
    site.ok(&["detach", name]);
}

#[test]
fn after_a_flush_the_data_survives_a_power_cut() {
    let site = Site::new();
    let (disk, volume) = disk_with_volume(&site);
    let name = site.name("power");
    let device = site.attach(&volume, &name, &["--export", "fuse"]);
    {
        let open = open_directly(&device);
        open.write_all_at(&block(b'a').0, 0).unwrap();
        let before = disk.flushes();
        open.sync_all().unwrap();
        assert!(disk.flushes() > before, "the flush has reached the disk");
        open.write_all_at(&block(b'b').0, 4096).unwrap();
        let mut read = block(0);
        open.read_exact_at(&mut read.0, 4096).unwrap();
        assert!(read.0 == block(b'b').0);
    }
    cut_power(&site, &disk, &name);

    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    let lost = qemu_io(&uri, &["read -P 0x61 0 4k", "read -P 0x62 4k 4k"]).unwrap_err();
    assert!(lost.contains("offset 4096") && !lost.contains("offset 0,"), "only what was not flushed is lost: {lost}");
    // A write that is forced (FUA) needs no flush behind it, nor does what the client flushed over another connection.
    qemu_io(&uri, &["write -f -P 0x63 8k 4k", "write -P 0x64 12k 4k"]).unwrap();
    cut_power(&site, &disk, &name);

    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    qemu_io(&uri, &["read -P 0x61 0 4k", "read -P 0x63 8k 4k"]).unwrap();
    site.ok(&["detach", &name]);
}

#[test]
fn a_device_that_fails_is_an_error_and_not_silence() {
    let site = Site::new();
    let (disk, volume) = disk_with_volume(&site);
    let name = site.name("failing");
    let device = site.attach(&volume, &name, &["--export", "fuse"]);
    {
        let open = open_directly(&device);
        open.write_all_at(&block(b'a').0, 1 << 20).unwrap();
        disk.fail_behind(Some((17 << 20, Errno::EIO)));
        let written = open.write_all_at(&block(b'b').0, 1 << 20).unwrap_err();
        assert_eq!(written.raw_os_error(), Some(libc::EIO));
        let read = open.read_exact_at(&mut block(0).0, 1 << 20).unwrap_err();
        assert_eq!(read.raw_os_error(), Some(libc::EIO));
        open.write_all_at(&block(b'c').0, 0).unwrap();
        disk.fail_behind(None);
        let mut read = block(0);
        open.read_exact_at(&mut read.0, 1 << 20).unwrap();
        assert!(read.0 == block(b'a').0, "what failed was not written");
    }
    site.ok(&["detach", &name]);

    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    disk.fail_behind(Some((17 << 20, Errno::EIO)));
    let failed = qemu_io(&uri, &["write 1M 4k"]).unwrap_err();
    assert!(failed.contains("Input/output error"), "{failed}");
    let failed = qemu_io(&uri, &["read 1M 4k"]).unwrap_err();
    assert!(failed.contains("Input/output error"), "{failed}");
    disk.fail_behind(Some((17 << 20, Errno::ENOSPC)));
    let full = qemu_io(&uri, &["write 1M 4k"]).unwrap_err();
    assert!(full.contains("No space left on device"), "{full}");
    disk.fail_behind(None);
    qemu_io(&uri, &["write -P 7 1M 4k", "read -P 7 1M 4k"]).unwrap();
    site.ok(&["detach", &name]);
}

#[test]
fn a_disk_that_takes_no_flush_any_more_is_told_and_given_up() {
    let site = Site::new();
    for export in ["nbd", "fuse"] {
        let (disk, volume) = disk_with_volume(&site);
        let name = site.name(export);
        site.attach(&volume, &name, &["--export", export]);
        disk.fail_flushes();
        let mut told = String::new();
        if export == "fuse" {
            told = site.fails(71, &["detach", &name]);
            assert!(told.contains("run 'detach' again to give up that data"), "{told}");
            assert!(!site.json(&["status", &name])["trouble"].is_null());
        }
        told += &site.fails(71, &["detach", &name]);
        assert!(told.contains("detached, but with errors"), "{told}");
        site.fails(66, &["status", &name]);
    }
}

#[test]
fn a_full_file_system_behind_a_sparse_file_is_an_error() {
    let site = Site::new();
    let small = site.path("small");
    fs::create_dir(&small).unwrap();
    sh(&format!("mount -t tmpfs -o size=20m small {}", small.display()));
    let _unmounted = Unmounted(small.clone());
    let volume = small.join("volume").into_os_string().into_string().unwrap();
    sh(&format!("truncate -s 64M {volume}"));
    site.ok(&["format", &volume]);
    let name = site.name("sparse");
    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    let full = qemu_io(&uri, &["write -P 1 0 1M", "write -P 2 1M 20M"]).unwrap_err();
    assert!(full.contains("No space left on device"), "{full}");
    qemu_io(&uri, &["read -P 1 0 1M"]).unwrap();
    site.ok(&["detach", &name]);

    let device = site.attach(&volume, &name, &["--export", "fuse"]);
    let written = open_directly(&device).write_all_at(&block(1).0, 40 << 20).unwrap_err();
    assert!([Some(libc::ENOSPC), Some(libc::EIO)].contains(&written.raw_os_error()), "{written}");
    site.ok(&["detach", &name]);
}

/// A file system, unmounted with the value.
struct Unmounted(PathBuf);

impl Drop for Unmounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Writers fill their memory limit with dirty pages of a file system on the mapping, which was attached inside the same
/// limit. Were the worker in there as well, and had it to ask for memory, all would wait for each other.
#[test]
fn writers_at_their_memory_limit_do_not_hang() {
    let group =
        MemoryGroup::new("cryptattach-test", 96 << 20).expect("no memory control group can be made on this host");
    let site = Site::new();
    let volume = site.file("volume", 300 << 20).into_os_string().into_string().unwrap();
    site.ok(&["format", &volume]);
    let name = site.name("pressure");
    let attach = format!(
        "{} CRYPTATTACH_CONFIG={} {} attach {volume} {name} --backend userspace --export fuse",
        group.enter(),
        site.keys("cryptattach.toml"),
        env!("CARGO_BIN_EXE_cryptattach")
    );
    let device = PathBuf::from(sh(&attach));
    let worker = crate::busy::worker(&name);
    let groups = fs::read_to_string(format!("/proc/{worker}/cgroup")).unwrap();
    assert!(groups.contains("/cryptattach\n") && !groups.contains("cryptattach-test"), "{groups}");

    sh(&format!("mkfs.ext4 -q {}", device.display()));
    let files = site.mount(&device);
    let writers = format!(
        "{} cd {} && for i in 1 2 3; do dd if=/dev/zero of=$i bs=1M count=60 conv=fsync status=none & done; wait",
        group.enter(),
        files.path().display()
    );
    let mut writers = Command::new("sh").args(["-c", &writers]).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    let ended = loop {
        match writers.try_wait().unwrap() {
            Some(status) => break status.success(),
            None if Instant::now() > deadline => break false,
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    if !ended {
        // So that this machine is not left hanging.
        sh("for c in /sys/fs/fuse/connections/*; do echo 1 > $c/abort; done");
    }
    assert!(ended, "the writers hang");
    assert!(group.was_full(), "the limit was never reached, so that this shows nothing");
    drop(files);
    sh(&format!("e2fsck -fn {} 2>/dev/null", device.display()));
    site.ok(&["detach", &name]);
}

/// A control group with a memory limit; removed with the value.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new(name: &str, bytes: u64) -> Option<Self> {
        let unified = Path::new("/sys/fs/cgroup/cgroup.procs").exists();
        let root = Path::new("/sys/fs/cgroup").join(if unified { "" } else { "memory" });
        // Its own: a run that was killed has left its group.
        let name = format!("{name}-{}", std::process::id());
        let (group, limit) = (root.join(name), if unified { "memory.max" } else { "memory.limit_in_bytes" });
        fs::create_dir(&group).ok()?;
        let group = Self(group);
        fs::write(group.0.join(limit), bytes.to_string()).ok()?;
        Some(group)
    }

    /// A shell's first words, after which it is in the group.
    fn enter(&self) -> String {
        format!("echo 0 > {}/cgroup.procs;", self.0.display())
    }

    fn was_full(&self) -> bool {
        let read = |name: &str| fs::read_to_string(self.0.join(name));
        let failures = read("memory.failcnt").map(|count| count.trim() != "0");
        failures.unwrap_or_else(|_| read("memory.events").is_ok_and(|events| !events.contains("max 0\n")))
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        for _ in 0..50 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
