//! Leaves of a lineage: the disks, the memory, the chips or the hosts that bytes rest on in the end.

use std::{fmt, fs};

use serde::Serialize;

use super::{network::RemoteEnd, remote::Remote};
use crate::{
    base::key::Replica,
    sys::{
        block::{BlockDevice, DeviceNumber},
        sysfs::{Sysfs, attribute},
    },
};

/// What bytes rest on in the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Leaf {
    /// A disk.
    Disk(Disk),
    /// This host's memory.
    Memory(Memory),
    /// What serves a disk over the network.
    Remote(Remote),
    /// A device of an object store.
    Replica(Replica),
    /// A chip of this machine that is no disk.
    Chip {
        /// In words: "the TPM (IFX)".
        name: String,
    },
}

/// A disk, as this host sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// The kernel's name: "sda".
    pub name: String,
    pub number: DeviceNumber,
    /// World-wide name, in lower case and without "naa." or "0x".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wwn: Option<String>,
    /// Serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// Memory that looks like a file system or a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// "tmpfs", "zram0", ...
    pub name: String,
    /// The number of the file system or device.
    pub number: DeviceNumber,
    /// Its pages may be written to swap.
    pub swappable: bool,
}

/// Why two leaves are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SameBy {
    /// One device number.
    Number,
    /// Two names of one disk, or two paths to it: one world-wide name.
    Wwn,
    /// One serial number, and of disks that this host sees, one model.
    Serial,
    /// One host, which is as near as the level lets it be.
    Host,
    /// One rack, likewise.
    Rack,
}

impl Leaf {
    /// Whether this is the same as the other one, and why. Memory is never a disk. What is on the network is compared by
    /// its host, which takes more than the two.
    pub fn same_as(&self, other: &Self) -> Option<SameBy> {
        match (self, other) {
            (Self::Disk(this), Self::Disk(other)) => this.same_as(other),
            (Self::Memory(this), Self::Memory(other)) => (this.number == other.number).then_some(SameBy::Number),
            _ => None,
        }
    }
}

impl Disk {
    /// Whether both are the same disk: multipath shows one disk under several names.
    pub fn same_as(&self, other: &Self) -> Option<SameBy> {
        if self.number == other.number {
            Some(SameBy::Number)
        } else if self.wwn.is_some() && self.wwn == other.wwn {
            Some(SameBy::Wwn)
        } else if self.serial.is_some() && (&self.serial, &self.model) == (&other.serial, &other.model) {
            Some(SameBy::Serial)
        } else {
            None
        }
    }

    pub(crate) fn read(sysfs: &Sysfs, device: &BlockDevice) -> Self {
        let udev = UdevRecord::read(sysfs, device.number);
        let wwn = [device.attribute("wwid"), device.attribute("device/wwid")]
            .into_iter()
            .flatten()
            .next()
            // ID_WWN alone is the first half of a 128-bit name, which all LUNs of one disk array have in common.
            .or_else(|| udev.value("ID_WWN_WITH_EXTENSION"))
            .or_else(|| udev.value("ID_WWN"))
            .or_else(|| device.attribute("uuid"));
        let model = device.attribute("device/model").or_else(|| udev.value("ID_MODEL"));
        let serial =
            Self::serial_in_sysfs(device).or_else(|| udev.value("ID_SERIAL_SHORT").or(udev.value("ID_SERIAL")));
        Self {
            name: device.name.clone(),
            number: device.number,
            wwn: wwn.map(|wwn| plain_wwn(&wwn)),
            serial: serial.filter(|serial| tells_apart(serial)),
            model: model.map(|model| model.split_whitespace().collect::<Vec<_>>().join(" ")),
        }
    }

    fn serial_in_sysfs(device: &BlockDevice) -> Option<String> {
        if let (Some(pool), Some(image)) = (device.attribute("device/pool"), device.attribute("device/name")) {
            let cluster = device.attribute("device/cluster_fsid").unwrap_or_default();
            return Some(format!("{cluster}/{pool}/{image}")); // Documentation/ABI/testing/sysfs-bus-rbd
        }
        // All namespaces of an NVMe subsystem have its serial number. That is right for an SSD, which is one device;
        // the namespaces of an array on the network are as many as it likes, and their WWIDs tell them apart.
        if RemoteEnd::of(device).is_some() {
            return None;
        }
        let attributes = ["serial", "device/serial"].iter().find_map(|path| device.attribute(path));
        attributes.or_else(|| unit_serial_number(&fs::read(device.directory.join("device/vpd_pg80")).ok()?))
    }
}

/// The serial number in SCSI's Unit Serial Number page: a header of 4 bytes with the length, then text (SPC-4, 7.8.18).
fn unit_serial_number(page: &[u8]) -> Option<String> {
    let (header, text) = page.split_at_checked(4)?;
    let length = usize::from(header[2]) << 8 | usize::from(header[3]);
    let text = String::from_utf8_lossy(text.get(..length)?).trim_matches([' ', '\0']).to_owned();
    (!text.is_empty()).then_some(text)
}

pub(super) fn plain_wwn(wwn: &str) -> String {
    let wwn = wwn.to_ascii_lowercase();
    ["naa.", "0x"].iter().find_map(|prefix| wwn.strip_prefix(prefix)).unwrap_or(&wwn).to_owned()
}

/// Cheap USB bridges say "000000000000" for every disk.
fn tells_apart(serial: &str) -> bool {
    !serial.is_empty() && (serial.len() < 4 || serial.bytes().any(|byte| byte != serial.as_bytes()[0]))
}

/// udev's record of a device: lines `E:KEY=VALUE`. It knows serial numbers that only a command to the disk tells.
struct UdevRecord(String);

impl UdevRecord {
    fn read(sysfs: &Sysfs, number: DeviceNumber) -> Self {
        Self(attribute(&sysfs.at(&format!("run/udev/data/b{number}"))).unwrap_or_default())
    }

    fn value(&self, key: &str) -> Option<String> {
        let value = self.0.lines().find_map(|line| line.strip_prefix("E:")?.strip_prefix(key)?.strip_prefix('='))?;
        (!value.is_empty()).then(|| value.to_owned())
    }
}

impl fmt::Display for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(disk) => disk.fmt(f),
            Self::Memory(memory) => memory.fmt(f),
            Self::Remote(remote) => remote.fmt(f),
            Self::Replica(replica) => write!(f, "device {} of {}", replica.device, replica.host),
            Self::Chip { name } => f.write_str(name),
        }
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {}", self.name)?;
        match (&self.wwn, &self.serial) {
            (Some(wwn), Some(serial)) => write!(f, " (WWN {wwn}, serial {serial})"),
            (Some(wwn), None) => write!(f, " (WWN {wwn})"),
            (None, Some(serial)) => write!(f, " (serial {serial})"),
            (None, None) => Ok(()),
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory ({})", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: &str, minor: u64, wwn: &str, serial: &str, model: &str) -> Leaf {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let number = DeviceNumber(nix::sys::stat::makedev(8, minor));
        Leaf::Disk(Disk { name: name.into(), number, wwn: some(wwn), serial: some(serial), model: some(model) })
    }

    #[test]
    fn disks_are_the_same_by_number_wwn_or_serial_with_model() {
        let sda = disk("sda", 0, "5000c5", "S1", "M1");
        assert_eq!(sda.same_as(&disk("sda", 0, "", "", "")), Some(SameBy::Number));
        assert_eq!(sda.same_as(&disk("sdb", 16, "5000c5", "S2", "M2")), Some(SameBy::Wwn));
        assert_eq!(sda.same_as(&disk("sdb", 16, "5000c6", "S1", "M1")), Some(SameBy::Serial));
        assert_eq!(sda.same_as(&disk("sdb", 16, "5000c6", "S1", "M2")), None);
        assert_eq!(disk("sda", 0, "", "", "").same_as(&disk("sdb", 16, "", "", "")), None, "nothing known, not equal");
    }

    #[test]
    fn memory_is_no_disk() {
        let number = DeviceNumber(nix::sys::stat::makedev(8, 0));
        let memory = Leaf::Memory(Memory { name: "zram0".into(), number, swappable: false });
        assert_eq!(memory.same_as(&disk("sda", 0, "", "", "")), None);
        assert_eq!(memory.same_as(&memory), Some(SameBy::Number));
    }

    #[test]
    fn the_serial_page_of_scsi_is_read_within_its_length() {
        assert_eq!(unit_serial_number(b"\0\x80\0\x05 AB1 junk").as_deref(), Some("AB1"));
        for page in [&b""[..], b"\0\x80\0", b"\0\x80\0\x09short", b"\0\x80\0\x02  "] {
            assert_eq!(unit_serial_number(page), None);
        }
    }

    #[test]
    fn names_are_brought_to_one_form() {
        assert_eq!(plain_wwn("naa.5000C500A1"), plain_wwn("0x5000c500a1"));
        assert_eq!(plain_wwn("eui.0025385b"), "eui.0025385b");
        assert!(tells_apart("S3Z8") && tells_apart("1") && !tells_apart("0000") && !tells_apart(""));
    }
}
