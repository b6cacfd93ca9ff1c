//! A made-up host: sysfs and procfs are a tree in a temporary directory, device nodes a table.

use std::{fs, io, net::IpAddr, os::unix::fs::symlink, path::Path};

use tempfile::TempDir;

use super::super::{Lineage, Outlook, Report, Surroundings, check_on, outlook::outlook_on};
use crate::{
    base::key::Place,
    sys::sysfs::{Seen, Sysfs},
};

/// The host; it goes with the value.
pub struct MadeUp {
    pub directory: TempDir,
    mounts: String,
}

/// Device nodes and files of all made-up hosts: path, number of the block device, device of the file system.
const PATHS: [(&str, &str, &str); 23] = [
    ("/", "", "8:1"),
    ("/dev/sda", "8:0", "0:5"),
    ("/dev/sda1", "8:1", "0:5"),
    ("/dev/sda2", "8:2", "0:5"),
    ("/dev/sdb", "8:16", "0:5"),
    ("/dev/sdb1", "8:17", "0:5"),
    ("/dev/sdc", "8:32", "0:5"),
    ("/dev/sdd", "8:48", "0:5"),
    ("/dev/dm-0", "253:0", "0:5"),
    ("/dev/loop0", "7:0", "0:5"),
    ("/dev/loop1", "7:1", "0:5"),
    ("/dev/nbd0", "43:0", "0:5"),
    ("/dev/zram0", "252:0", "0:5"),
    ("/dev/nvme0n1", "259:0", "0:5"),
    ("/dev/nvme0n2", "259:1", "0:5"),
    ("/srv/volume.img", "", "8:1"),
    ("/srv/node/d2", "", "8:17"),
    ("/run/plain", "", "0:50"),
    ("/keys", "", "8:17"),
    ("/run/keys", "", "0:21"),
    ("/nfs/keys", "", "0:60"),
    ("/pool/keys", "", "0:70"),
    ("/merged/keys", "", "0:80"),
];

fn look(path: &Path) -> io::Result<Seen> {
    let found = PATHS.iter().find(|(known, ..)| Path::new(known) == path);
    let (_, block, on) = found.ok_or(io::ErrorKind::NotFound)?;
    Ok(Seen { path: path.into(), block: block.parse().ok(), on: on.parse().expect("a number"), mount: None })
}

/// The addresses of all made-up hosts.
fn addresses() -> io::Result<Vec<IpAddr>> {
    Ok(["127.0.0.1", "::1", "10.0.0.9", "fd00::9"].map(|address| address.parse().expect("an address")).to_vec())
}

impl MadeUp {
    /// A host with the partitions sda1 (at /) and sda2 and sdb1 (at /keys).
    pub fn host() -> Self {
        let host = Self { directory: TempDir::new().expect("a directory"), mounts: String::new() };
        host.with_disk("sda", "8:0", &[("device/wwid", "naa.5000aa"), ("device/model", "DISK  A ")])
            .with_partition("sda", "sda1", "8:1")
            .with_partition("sda", "sda2", "8:2")
            .with_disk("sdb", "8:16", &[("device/wwid", "naa.5000bb")])
            .with_partition("sdb", "sdb1", "8:17")
            .with_mount("8:1", "/", "ext4 /dev/sda1 rw")
            .with_mount("8:17", "/keys", "ext4 /dev/sdb1 rw")
            .with_mount("0:21", "/run", "tmpfs tmpfs rw")
    }

    /// Likewise without sdb.
    pub fn with_one_disk() -> Self {
        let host = Self { directory: TempDir::new().expect("a directory"), mounts: String::new() };
        host.with_disk("sda", "8:0", &[("device/wwid", "naa.5000aa")])
            .with_partition("sda", "sda1", "8:1")
            .with_mount("8:1", "/", "ext4 /dev/sda1 rw")
            .with_mount("0:21", "/run", "tmpfs tmpfs rw")
    }

    pub fn outlook(&self, places: &[Place]) -> Vec<Outlook> {
        outlook_on(&self.seen(), places)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.directory.path().join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, text).expect("written");
    }

    pub fn with_file(self, path: &str, text: &str) -> Self {
        self.write(path, text);
        self
    }

    pub fn with_device(self, directory: &str, number: &str, attributes: &[(&str, &str)]) -> Self {
        self.write(&format!("sys/devices/{directory}/dev"), &format!("{number}\n"));
        for (name, value) in attributes {
            self.write(&format!("sys/devices/{directory}/{name}"), &format!("{value}\n"));
        }
        let links = self.directory.path().join("sys/dev/block");
        fs::create_dir_all(&links).expect("made");
        symlink(format!("../../devices/{directory}"), links.join(number)).expect("linked");
        self
    }

    pub fn with_disk(self, name: &str, number: &str, attributes: &[(&str, &str)]) -> Self {
        self.with_device(&format!("pci0/block/{name}"), number, attributes)
    }

    pub fn with_partition(self, disk: &str, name: &str, number: &str) -> Self {
        self.with_device(&format!("pci0/block/{disk}/{name}"), number, &[("partition", "1")])
    }

    /// A virtual device on top of others, given by their paths below `sys/devices`.
    pub fn with_stack(self, name: &str, number: &str, attributes: &[(&str, &str)], slaves: &[&str]) -> Self {
        let host = self.with_device(&format!("virtual/block/{name}"), number, attributes);
        let links = host.directory.path().join(format!("sys/devices/virtual/block/{name}/slaves"));
        fs::create_dir_all(&links).expect("made");
        for slave in slaves {
            let target = host.directory.path().join("sys/devices").join(slave);
            symlink(target, links.join(slave.rsplit('/').next().expect("a name"))).expect("linked");
        }
        host
    }

    pub fn with_mount(mut self, number: &str, point: &str, rest: &str) -> Self {
        let id = self.mounts.lines().count() + 1;
        self.mounts += &format!("{id} 1 {number} / {point} rw - {rest}\n");
        self.write("proc/self/mountinfo", &self.mounts);
        self
    }

    pub fn seen(&self) -> Sysfs {
        Sysfs::fixture(self.directory.path(), look, addresses)
    }

    pub fn check(&self, device: &str, places: &[&str]) -> Report {
        let places: Vec<_> = places.iter().map(|path| Place::path("sealed key", path, true)).collect();
        self.check_among(device, &places, &Surroundings::default())
    }

    pub fn check_among(&self, device: &str, places: &[Place], surroundings: &Surroundings<'_>) -> Report {
        check_on(&self.seen(), Path::new(device), None, places, surroundings)
    }

    pub fn lineage(&self, path: &str) -> Lineage {
        Lineage::on(&self.seen(), Path::new(path))
    }

    /// The disks below a path, by name.
    pub fn disks(&self, path: &str) -> Vec<String> {
        self.lineage(path).leaves().iter().map(|leaf| leaf.to_string().replace("disk ", "")).collect()
    }
}
