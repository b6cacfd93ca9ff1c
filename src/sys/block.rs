//! Block devices as sysfs shows them.

use std::{
    ffi::OsStr,
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use nix::sys::stat::{major, makedev, minor};
use serde::{Serialize, Serializer};

use super::sysfs::{Sysfs, attribute, base_name, entries};

/// The number of a device (`dev_t`), written `MAJOR:MINOR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber(pub u64);

impl DeviceNumber {
    /// Whether it stands for a file system without a block device of its own (Documentation/admin-guide/devices.txt).
    pub(crate) fn is_anonymous(self) -> bool {
        major(self.0) == 0
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", major(self.0), minor(self.0))
    }
}

/// A text that is not a device number.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not a device number (MAJOR:MINOR)")]
pub struct ParseDeviceNumberError(String);

impl FromStr for DeviceNumber {
    type Err = ParseDeviceNumberError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        parts.map(|(major, minor)| Self(makedev(major, minor))).ok_or_else(|| ParseDeviceNumberError(text.to_owned()))
    }
}

impl Serialize for DeviceNumber {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A block device's directory in sysfs.
#[derive(Clone, Debug)]
pub(crate) struct BlockDevice {
    /// Without symbolic links: its path tells which bus the device is on.
    pub directory: PathBuf,
    /// The kernel's name: "sda1".
    pub name: String,
    pub number: DeviceNumber,
}

/// The node of the device that sysfs calls so: it writes '!' for the '/' of a name (Documentation/ABI/stable/sysfs-block).
pub fn node(name: &str) -> PathBuf {
    Path::new("/dev").join(name.replace('!', "/"))
}

impl BlockDevice {
    /// The device with this number; `None` if sysfs shows none.
    pub fn with_number(sysfs: &Sysfs, number: DeviceNumber) -> Option<Self> {
        let directory = fs::canonicalize(sysfs.at(&format!("sys/dev/block/{number}"))).ok()?;
        Some(Self { name: base_name(&directory), directory, number })
    }

    /// Its node.
    pub fn node(&self) -> PathBuf {
        node(&self.name)
    }

    /// An attribute, by its path below the device's directory.
    pub fn attribute(&self, path: &str) -> Option<String> {
        attribute(&self.directory.join(path))
    }

    /// The disk that this is a part of: a partition, or one of an eMMC's areas (`mmcblk0boot0`), which the kernel shows as
    /// disks of their own below the chip's (drivers/mmc/core/block.c, mmc_blk_alloc_part).
    pub fn parent_disk(&self) -> Option<DeviceNumber> {
        let above = self.directory.parent()?;
        let is_disk = || fs::read_link(above.join("subsystem")).is_ok_and(|subsystem| base_name(&subsystem) == "block");
        (self.attribute("partition").is_some() || is_disk()).then(|| number_in(above)).flatten()
    }

    /// The partitions of this disk.
    pub fn partitions(&self) -> Vec<DeviceNumber> {
        let children = entries(&self.directory);
        children.iter().filter(|child| child.join("partition").exists()).filter_map(|child| number_in(child)).collect()
    }

    /// The devices that this one is made of: of device-mapper, md, bcache, drbd.
    pub fn slaves(&self) -> Vec<DeviceNumber> {
        linked(&self.directory.join("slaves"))
    }

    /// The devices that are made of this one.
    pub fn holders(&self) -> Vec<DeviceNumber> {
        linked(&self.directory.join("holders"))
    }

    /// Whether the kernel makes it up, so that sysfs cannot tell what is behind it: a program, or with LIO's loopback
    /// (`tcm_loop_0`) a file or disk of this host that is exported to itself as a SCSI disk (drivers/target/loopback).
    pub fn is_virtual(&self) -> bool {
        let is_loopback = |part: &OsStr| part.as_encoded_bytes().starts_with(b"tcm_loop_");
        let above = self.directory.parent();
        above.is_some_and(|above| above.ends_with("devices/virtual/block")) || self.directory.iter().any(is_loopback)
    }

    /// Whether its driver keeps the data in memory.
    pub fn is_memory(&self) -> bool {
        ["zram", "ram", "nullb"].iter().any(|driver| is_numbered(&self.name, driver))
    }
}

/// Whether a kernel name is a driver's name and then a number ("nbd0") or an address ("etherd!e1.1").
pub(crate) fn is_numbered(name: &str, driver: &str) -> bool {
    name.strip_prefix(driver).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit() || c == '!'))
}

/// The device number in the attribute `dev` of a sysfs directory.
pub(crate) fn number_in(directory: &Path) -> Option<DeviceNumber> {
    attribute(&directory.join("dev"))?.parse().ok()
}

/// The devices whose directories are linked in one.
pub(crate) fn linked(directory: &Path) -> Vec<DeviceNumber> {
    entries(directory).iter().filter_map(|link| number_in(link)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_and_written() {
        for text in ["8:1", "254:0", "259:1048575", "0:0"] {
            assert_eq!(text.parse::<DeviceNumber>().expect("a number").to_string(), text);
        }
        for text in ["", "8", "8:", ":1", "8:x", "8:1:2", "-1:0"] {
            assert!(text.parse::<DeviceNumber>().is_err(), "{text}");
        }
    }

    #[test]
    fn drivers_are_told_from_names_that_begin_alike() {
        assert!(is_numbered("rbd0", "rbd") && is_numbered("etherd!e1.1", "etherd"));
        assert!(!is_numbered("ramdisk", "ram") && !is_numbered("rbd", "rbd") && !is_numbered("drbd0", "rbd"));
    }
}
