//! The root file system that the distribution has mounted: whether it is on this host's own volumes.
//!
//! A boot proves what it opened. What is mounted then may be another disk's: one with the same UUID or label as the root's file
//! system, or one that the distribution has opened by the passphrase of whoever sits there.

use std::path::Path;

use crate::sys::{
    block::{BlockDevice, DeviceNumber},
    mounts,
    sysfs::Sysfs,
};

/// Whether all that the file system at `root` rests on is among these devices, or made of them.
pub fn is_own(sysfs: &Sysfs, root: &Path, own: &[DeviceNumber]) -> bool {
    let Ok(seen) = sysfs.look(root) else { return false };
    let device = if seen.on.is_anonymous() {
        // btrfs says which device is mounted; what others rest on cannot be told.
        let mounts = mounts::seen_by(sysfs, "self");
        mounts::mount_of(&mounts, &seen).and_then(|mount| sysfs.look(Path::new(&mount.source)).ok()?.block)
    } else {
        Some(seen.on)
    };
    device.is_some_and(|device| rests_on(sysfs, device, own))
}

fn rests_on(sysfs: &Sysfs, device: DeviceNumber, own: &[DeviceNumber]) -> bool {
    if own.contains(&device) {
        return true;
    }
    let Some(block) = BlockDevice::with_number(sysfs, device) else { return false };
    let below = block.parent_disk().map_or_else(|| block.slaves(), |disk| vec![disk]);
    !below.is_empty() && below.into_iter().all(|device| rests_on(sysfs, device, own))
}

#[cfg(test)]
mod tests {
    use std::{fs, io, os::unix::fs::symlink, path::PathBuf};

    use nix::sys::stat::makedev;

    use super::*;
    use crate::sys::sysfs::Seen;

    fn number(minor: u64) -> DeviceNumber {
        DeviceNumber(makedev(253, minor))
    }

    /// `/root-N` is a file system on device 253:N; `/btrfs` has an anonymous number, and is mounted from 253:2.
    fn look(path: &Path) -> io::Result<Seen> {
        let text = path.to_str().unwrap();
        let seen = |block, on, mount| Ok(Seen { path: PathBuf::from(path), block, on, mount });
        match text.strip_prefix("/root-") {
            Some(minor) => seen(None, number(minor.parse().unwrap()), None),
            None if text == "/btrfs" => seen(None, DeviceNumber(makedev(0, 30)), Some(7)),
            None if text == "/overlay" => seen(None, DeviceNumber(makedev(0, 31)), Some(8)),
            None if text == "/dev/dm-2" => seen(Some(number(2)), DeviceNumber(makedev(0, 5)), None),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    #[test]
    fn a_root_is_own_if_all_below_it_is() {
        let host = tempfile::tempdir().unwrap();
        let device = |minor: u64, slaves: &[u64]| {
            let folder = host.path().join(format!("sys/devices/virtual/block/dm-{minor}"));
            fs::create_dir_all(folder.join("slaves")).unwrap();
            fs::write(folder.join("dev"), format!("253:{minor}\n")).unwrap();
            fs::create_dir_all(host.path().join("sys/dev/block")).unwrap();
            symlink(&folder, host.path().join(format!("sys/dev/block/253:{minor}"))).unwrap();
            for slave in slaves {
                let at = host.path().join(format!("sys/devices/virtual/block/dm-{slave}"));
                symlink(at, folder.join(format!("slaves/dm-{slave}"))).unwrap();
            }
        };
        // 1: the host's own mapping; 2: a logical volume on it; 3: another mapping; 4: a logical volume on both.
        device(0, &[]);
        for (minor, slaves) in [(1, &[0][..]), (2, &[1]), (3, &[0]), (4, &[1, 3])] {
            device(minor, slaves);
        }
        fs::create_dir_all(host.path().join("proc/self")).unwrap();
        let mounts = "7 1 0:30 /@ /btrfs rw - btrfs /dev/dm-2 rw\n8 1 0:31 / /overlay rw - overlay overlay rw\n";
        fs::write(host.path().join("proc/self/mountinfo"), mounts).unwrap();
        let sysfs = Sysfs::fixture(host.path(), look, || Ok(Vec::new()));
        let own = |root: &str| is_own(&sysfs, Path::new(root), &[number(1)]);
        assert!(own("/root-1") && own("/root-2") && own("/btrfs"));
        assert!(!own("/root-3") && !own("/root-4") && !own("/root-0") && !own("/root-9"));
        assert!(!own("/overlay") && !own("/none"));
        assert!(!is_own(&sysfs, Path::new("/root-1"), &[]));
    }
}
