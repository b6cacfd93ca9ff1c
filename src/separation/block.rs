//! Block devices as sysfs shows them.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use nix::sys::stat::{major, makedev, minor};
use serde::{Serialize, Serializer};

use super::{
    disk::Disk,
    host::{Host, attribute, base_name, entries},
};

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

/// A text that is no device number.
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
    /// Its number.
    pub number: DeviceNumber,
}

impl BlockDevice {
    /// The device with this number; `None` if sysfs shows none.
    pub fn with_number(host: &Host, number: DeviceNumber) -> Option<Self> {
        let directory = fs::canonicalize(host.at(&format!("sys/dev/block/{number}"))).ok()?;
        Some(Self { name: base_name(&directory), directory, number })
    }

    /// An attribute, by its path below the device's directory.
    pub fn attribute(&self, path: &str) -> Option<String> {
        attribute(&self.directory.join(path))
    }

    /// The disk that this is a partition of.
    pub fn parent_disk(&self) -> Option<DeviceNumber> {
        self.attribute("partition")?;
        number_in(self.directory.parent()?)
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

    /// What is on the other end of the network that this device is reached over, in words.
    pub fn over_the_network(&self) -> Option<String> {
        self.iscsi_target().or_else(|| self.nvme_fabric()).or_else(|| self.network_driver())
    }

    fn iscsi_target(&self) -> Option<String> {
        // .../host3/session1/target3:0:0/3:0:0:0/block/sdb (drivers/scsi/scsi_transport_iscsi.c)
        let session = self.directory.ancestors().find(|above| above.join("iscsi_session").is_dir())?;
        let target = attribute(&session.join("iscsi_session").join(base_name(session)).join("targetname"));
        let address =
            entries(session).iter().filter(|below| base_name(below).starts_with("connection")).find_map(|below| {
                attribute(&below.join("iscsi_connection").join(base_name(below)).join("persistent_address"))
            });
        let target = target.unwrap_or_else(|| "of unknown name".to_owned());
        Some(match address {
            Some(address) => format!("iSCSI target {target} at {address}"),
            None => format!("iSCSI target {target}"),
        })
    }

    fn nvme_fabric(&self) -> Option<String> {
        // `device` is the controller, or with native multipath the subsystem with its controllers below it.
        let above = self.directory.join("device");
        let controllers = entries(&above).into_iter().filter(|below| base_name(below).starts_with("nvme"));
        [above].into_iter().chain(controllers).find_map(|controller| {
            let transport = attribute(&controller.join("transport"))?;
            let address = attribute(&controller.join("address")).unwrap_or_default();
            // "loop" is the kernel's own target, on this host (drivers/nvme/target/loop.c).
            let fabric = matches!(transport.as_str(), "tcp" | "rdma" | "fc" | "loop");
            fabric.then(|| format!("NVMe over {transport} {address}").trim_end().to_owned())
        })
    }

    fn network_driver(&self) -> Option<String> {
        const DRIVERS: [(&str, &str); 5] = [
            ("nbd", "network block device"),
            ("rbd", "Ceph RBD image"),
            ("drbd", "DRBD peer"),
            ("etherd", "ATA over Ethernet shelf"),
            ("rnbd", "RDMA network block device"),
        ];
        let (_, words) = DRIVERS.iter().find(|(driver, _)| is_numbered(&self.name, driver))?;
        Some((*words).to_owned())
    }

    /// Whether the kernel makes it up, so that sysfs cannot tell what is behind it.
    pub fn is_virtual(&self) -> bool {
        self.directory.parent().is_some_and(|above| above.ends_with("devices/virtual/block"))
    }

    /// Whether its driver keeps the data in memory.
    pub fn is_memory(&self) -> bool {
        ["zram", "ram", "nullb"].iter().any(|driver| is_numbered(&self.name, driver))
    }

    /// The disk that this is, with all that tells it from others.
    pub fn disk(&self, host: &Host) -> Disk {
        Disk::read(host, self)
    }
}

/// Whether a kernel name is a driver's name and then a number ("nbd0") or an address ("etherd!e1.1").
fn is_numbered(name: &str, driver: &str) -> bool {
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
