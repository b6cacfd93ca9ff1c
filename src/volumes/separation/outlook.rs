//! What can be said of the places of keys before there is a volume: a store is made once, and the refusals would come later, one for
//! each volume.

use std::{collections::BTreeSet, fmt, fs, io};

use super::{Leaf, Lineage};
use crate::{
    base::key::{Location, Place},
    sys::{
        block::{BlockDevice, number_in},
        sysfs::Sysfs,
    },
};

/// Why a store will be of little use on this machine.
#[derive(Debug, PartialEq, Eq)]
pub enum Outlook {
    /// Something that opens its keys is on each disk, so that no volume here is apart from them.
    OnEveryDisk {
        disks: Vec<String>,
        /// In words.
        places: Vec<String>,
    },
    /// It is gone after the next boot.
    InMemory {
        /// In words.
        places: Vec<String>,
    },
}

/// What to say of these places.
pub fn outlook(places: &[Place]) -> Vec<Outlook> {
    outlook_on(&Sysfs::this(), places)
}

pub(super) fn outlook_on(sysfs: &Sysfs, places: &[Place]) -> Vec<Outlook> {
    let (mut on_disks, mut in_memory, mut numbers) = (Vec::new(), Vec::new(), BTreeSet::new());
    for place in places.iter().filter(|place| place.opens) {
        let Location::Path(path) = &place.at else { continue };
        let lineage = Lineage::on(sysfs, path);
        for leaf in lineage.plain_leaves() {
            let (of, number) = match leaf {
                Leaf::Disk(disk) => (&mut on_disks, Some(disk.number)),
                Leaf::Memory(_) => (&mut in_memory, None),
                _ => continue,
            };
            numbers.extend(number);
            if !of.contains(&place.to_string()) {
                of.push(place.to_string());
            }
        }
    }
    let disks = disks(sysfs).unwrap_or_default();
    let has_other = disks.iter().any(|disk| !numbers.contains(&disk.number));
    let mut found = Vec::new();
    if !disks.is_empty() && !has_other && !on_disks.is_empty() {
        let disks = disks.into_iter().map(|disk| disk.name).collect();
        found.push(Outlook::OnEveryDisk { disks, places: on_disks });
    }
    if !in_memory.is_empty() {
        found.push(Outlook::InMemory { places: in_memory });
    }
    found
}

/// The disks of this machine: neither partitions nor what the kernel makes up, nor drives for CDs and floppies.
fn disks(sysfs: &Sysfs) -> io::Result<Vec<BlockDevice>> {
    let entries = fs::read_dir(sysfs.at("sys/dev/block"))?.flatten();
    let devices = entries.filter_map(|entry| BlockDevice::with_number(sysfs, number_in(&entry.path())?));
    let is_disk = |device: &BlockDevice| {
        let is_removed = device.attribute("size").is_some_and(|size| size == "0");
        let is_drive = ["sr", "fd"].iter().any(|driver| crate::sys::block::is_numbered(&device.name, driver));
        let is_whole = device.parent_disk().is_none() && device.slaves().is_empty();
        is_whole && !is_removed && !is_drive && !device.is_virtual() && !device.is_memory()
    };
    let mut disks: Vec<_> = devices.filter(is_disk).collect();
    disks.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(disks)
}

impl fmt::Display for Outlook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnEveryDisk { disks, places } => {
                let (which, has) = match &disks[..] {
                    [disk] => (format!("the only disk of this machine ({disk})"), "has"),
                    disks => (format!("all disks of this machine ({})", disks.join(", ")), "have"),
                };
                write!(
                    f,
                    "{which} {has} what opens these keys ({}): 'format' refuses each volume there. Ways out: keep the keys in \
                     the TPM ('cryptattach init --tpm-nv'), on another disk or a stick (with the owner's private key and the \
                     configuration), or on a server ('cryptattach container create')",
                    places.join(", ")
                )
            }
            Self::InMemory { places } => write!(
                f,
                "in memory, and lost with the next boot, is what opens these keys: {}. Without it no volume opens",
                places.join(", ")
            ),
        }
    }
}
