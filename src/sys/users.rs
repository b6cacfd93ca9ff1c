//! Who has a device open: mounts, swap, other block devices, processes.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    process,
};

use crate::sys::{
    block::{BlockDevice, DeviceNumber, number_in},
    device::Identity,
    mounts::{self, Mount, decoded},
    stores::Footing,
    sysfs::{Seen, Sysfs, attribute, base_name, entries},
};

/// Who uses the block device or file at `path`, each in words: "mounted on /srv", "opened by fio (pid 412)".
///
/// It says what this process may see, without itself; for all of it that must be root's. An empty list is no proof that
/// nobody uses the device.
pub fn of_path(path: &Path) -> Vec<String> {
    of_path_on(&Sysfs::this(), path)
}

/// Who uses the bytes of a device or file by another name, each in words: what is mounted above or below it, and loop devices
/// over it, or over the file that it shows. The kernel lets somebody else have those for himself at the same time.
pub fn beside(identity: Identity) -> Vec<String> {
    let sysfs = Sysfs::this();
    let ours = Footing::of(identity);
    let own = match identity {
        Identity::BlockDevice { number, .. } => Some(DeviceNumber(number)),
        Identity::File { .. } => None,
    };
    let others = entries(&sysfs.at("sys/class/block")).into_iter().filter_map(|path| number_in(&path));
    let mut holders = BTreeSet::new();
    for number in others.filter(|number| Some(*number) != own) {
        let theirs = Footing::of(Identity::BlockDevice { number: number.0, sequence: None });
        let Some(device) = BlockDevice::with_number(&sysfs, number).filter(|_| theirs.overlaps(&ours)) else {
            continue;
        };
        // A partition of a loop device comes and goes with that.
        let is_over_us = !ours.stands_on(&theirs) && device.parent_disk().is_none();
        if is_over_us && device.name.starts_with("loop") {
            holders.insert(format!("behind the loop device {}", device.name));
        }
        holders.extend(mounted(&sysfs, &device).into_iter().map(|where_to| format!("as {} {where_to}", device.name)));
        holders.extend(Used::Device(device.clone()).as_swap(&sysfs).map(|used| format!("as {} {used}", device.name)));
    }
    holders.into_iter().collect()
}

fn of_path_on(sysfs: &Sysfs, path: &Path) -> Vec<String> {
    match sysfs.look(path) {
        Ok(Seen { block: Some(number), .. }) => of_device_on(sysfs, number),
        Ok(seen) => Used::File(seen.path).holders(sysfs),
        Err(_) => Vec::new(),
    }
}

fn of_device_on(sysfs: &Sysfs, number: DeviceNumber) -> Vec<String> {
    match BlockDevice::with_number(sysfs, number) {
        Some(device) => Used::Device(device).holders(sysfs),
        None => Vec::new(),
    }
}

/// What is used.
enum Used {
    /// A block device.
    Device(BlockDevice),
    /// A regular file, by its path without links.
    File(PathBuf),
}

impl Used {
    fn holders(&self, sysfs: &Sysfs) -> Vec<String> {
        let mut holders = BTreeSet::new();
        holders.extend(self.as_swap(sysfs));
        holders.extend(self.loops(sysfs));
        if let Self::Device(device) = self {
            holders.extend(mounted(sysfs, device));
            holders.extend(stacked(sysfs, device));
            holders.extend(partitions(sysfs, device));
        }
        holders.extend(self.processes(sysfs));
        holders.into_iter().collect()
    }

    /// Whether a path that the kernel names is this.
    fn is_at(&self, sysfs: &Sysfs, path: &Path) -> bool {
        match self {
            Self::File(file) => file == path,
            // Not every path is looked at: a dead network file system would keep us waiting.
            Self::Device(device) => {
                self.may_be_called(path) && sysfs.look(path).is_ok_and(|seen| seen.block == Some(device.number))
            }
        }
    }

    fn as_swap(&self, sysfs: &Sysfs) -> Option<String> {
        let table = fs::read(sysfs.at("proc/swaps")).unwrap_or_default();
        let mut lines = table.split(|byte| *byte == b'\n').skip(1);
        lines
            .any(|line| {
                let path = line.split(u8::is_ascii_whitespace).next().unwrap_or_default();
                !path.is_empty() && self.is_at(sysfs, Path::new(&decoded(path)))
            })
            .then(|| "used as swap".to_owned())
    }

    fn loops(&self, sysfs: &Sysfs) -> Vec<String> {
        let devices =
            entries(&sysfs.at("sys/block")).into_iter().filter(|device| base_name(device).starts_with("loop"));
        devices
            .filter(|device| {
                attribute(&device.join("loop/backing_file")).is_some_and(|path| self.is_at(sysfs, Path::new(&path)))
            })
            .map(|device| format!("behind the loop device {}", base_name(&device)))
            .collect()
    }

    fn processes(&self, sysfs: &Sysfs) -> Vec<String> {
        let own = process::id().to_string();
        processes(sysfs)
            .into_iter()
            .filter(|process| base_name(process) != own && self.is_open_in(process))
            .map(|process| format!("opened by {}", named(&process)))
            .collect()
    }

    fn is_open_in(&self, process: &Path) -> bool {
        entries(&process.join("fd")).iter().any(|link| {
            // The link's text costs nothing. To look at the file itself may wait for a dead network file system for ever, so
            // that is done only where the name is right: in a container /dev may be elsewhere, a file have another path.
            fs::read_link(link).is_ok_and(|target| self.may_be_called(&target)) && self.is_the_file(link)
        })
    }

    fn may_be_called(&self, target: &Path) -> bool {
        match self {
            Self::Device(device) => {
                target.ends_with(&device.name) || target.components().any(|part| part.as_os_str() == "dev")
            }
            Self::File(file) => target.file_name() == file.file_name(),
        }
    }

    fn is_the_file(&self, link: &Path) -> bool {
        let Ok(open) = fs::metadata(link) else { return false };
        match self {
            Self::Device(device) => open.file_type().is_block_device() && open.rdev() == device.number.0,
            Self::File(file) => {
                fs::metadata(file).is_ok_and(|file| (file.dev(), file.ino()) == (open.dev(), open.ino()))
            }
        }
    }
}

/// Where the device is mounted, in the mount namespaces of all processes.
fn mounted(sysfs: &Sysfs, device: &BlockDevice) -> Vec<String> {
    let own = mount_points(sysfs, "self", device);
    let elsewhere = one_process_for_each_mount_namespace(sysfs).into_iter().flat_map(|process| {
        let points = mount_points(sysfs, &base_name(&process), device);
        points.into_iter().map(move |point| (point, named(&process))).collect::<Vec<_>>()
    });
    // Most services have a copy of the host's mounts; only what they alone have mounted is worth a word.
    let mut told = own.clone();
    let mut holders: Vec<_> = own.iter().map(|point| format!("mounted on {}", point.display())).collect();
    for (point, process) in elsewhere {
        if !told.contains(&point) {
            holders.push(format!("mounted on {} in the mount namespace of {process}", point.display()));
            told.push(point);
        }
    }
    holders
}

fn mount_points(sysfs: &Sysfs, process: &str, device: &BlockDevice) -> Vec<PathBuf> {
    let mounts = mounts::seen_by(sysfs, process);
    mounts.into_iter().filter(|mount| is_on(sysfs, mount, device)).map(|mount| mount.point).collect()
}

/// Whether a mount is of this device. That of a btrfs has a number of its own and names one of its devices.
fn is_on(sysfs: &Sysfs, mount: &Mount, device: &BlockDevice) -> bool {
    if mount.kind != "btrfs" {
        return mount.number == device.number;
    }
    let Some(source) = mounts::source_path(mount).and_then(|path| sysfs.look(path).ok()?.block) else { return false };
    mounts::btrfs_with(sysfs, source).is_some_and(|btrfs| btrfs.devices.contains(&device.number))
}

/// A process of each mount namespace but our own.
fn one_process_for_each_mount_namespace(sysfs: &Sysfs) -> Vec<PathBuf> {
    let namespace = |process: &Path| fs::read_link(process.join("ns/mnt")).ok();
    let mut known: BTreeSet<_> = namespace(&sysfs.at("proc/self")).into_iter().collect();
    processes(sysfs).into_iter().filter(|process| namespace(process).is_some_and(|ns| known.insert(ns))).collect()
}

/// Devices that are made of this one: mappings, RAID.
fn stacked(sysfs: &Sysfs, device: &BlockDevice) -> Vec<String> {
    let holders = device.holders().into_iter().filter_map(|number| BlockDevice::with_number(sysfs, number));
    holders
        .map(|holder| match holder.attribute("dm/name") {
            Some(called) => format!("held by {} ({called})", holder.name),
            None => format!("held by {}", holder.name),
        })
        .collect()
}

fn partitions(sysfs: &Sysfs, device: &BlockDevice) -> Vec<String> {
    let partitions = device.partitions().into_iter().filter_map(|number| BlockDevice::with_number(sysfs, number));
    partitions
        .flat_map(|partition| {
            let name = partition.name.clone();
            let holders = Used::Device(partition).holders(sysfs);
            holders.into_iter().map(move |holder| format!("partition {name} {holder}"))
        })
        .collect()
}

fn processes(sysfs: &Sysfs) -> Vec<PathBuf> {
    let mut all = entries(&sysfs.at("proc"));
    all.retain(|process| base_name(process).bytes().all(|byte| byte.is_ascii_digit()));
    all
}

/// "fio (pid 412)"
pub fn process(pid: u32) -> String {
    named(&Sysfs::this().at("proc").join(pid.to_string()))
}

fn named(process: &Path) -> String {
    let name = attribute(&process.join("comm")).unwrap_or_else(|| "a process".to_owned());
    format!("{name} (pid {})", base_name(process))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_that_has_a_file_open_is_named_and_we_are_not() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        // Another test's child has a copy of our files until its program starts.
        let names = |pid| of_path(file.path()).iter().any(|holder| holder.ends_with(&format!("(pid {pid})")));
        assert!(!names(std::process::id()));
        let input = fs::File::open(file.path()).expect("opened");
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::from(input)).spawn().expect("started");
        let (holders, and_us) = (of_path(file.path()), names(std::process::id()));
        child.kill().expect("killed");
        child.wait().expect("ended");
        assert!(holders.contains(&format!("opened by sleep (pid {})", child.id())) && !and_us, "{holders:?}");
    }

    #[test]
    fn what_does_not_exist_has_no_holders() {
        assert_eq!(of_path(Path::new("/does/not/exist")), [""; 0]);
        assert_eq!(of_device_on(&Sysfs::this(), DeviceNumber(0)), [""; 0]);
    }
}
