//! Separation: the proof that a key and the data that it protects are on different devices.
//!
//! [`Lineage`] follows a path through file systems, partitions, RAID, logical volumes and loop devices down to disks, with
//! what sysfs and procfs say and nothing else. [`check`] does that for a volume and for all places of its key and compares
//! the disks: by device number, by world-wide name (one disk under several names) and by serial number.
//!
//! A disk is what this host sees as one. A virtual machine's disks may be files on one disk of its host, and LUNs of a disk
//! array may be on the same spindles; that is not visible from here. Where a device says itself that something else is
//! behind it (network, FUSE, ZFS), the answer is a [`Gap`], never a guess.
//!
//! ```no_run
//! use std::path::Path;
//! use cryptattach::{key::Place, separation::{self, Verdict}};
//!
//! let key = Place { what: "sealed key".into(), path: "/mnt/keys/cinder".into(), opens: true };
//! let report = separation::check(Path::new("/dev/vdb"), None, &[key]);
//! println!("{report}");
//! assert!(matches!(report.verdict, Verdict::Apart(_)));
//! ```

mod block;
mod disk;
pub(crate) mod host;
mod lineage;
pub(crate) mod mounts;
mod policy;
mod report;
mod swap;
#[cfg(test)]
mod tests;
mod tree;
mod verdict;

use std::path::Path;

pub(crate) use block::BlockDevice;
pub use block::{DeviceNumber, ParseDeviceNumberError};
pub use disk::{Disk, Leaf, Memory, SameBy};
pub use lineage::Lineage;
pub use policy::Refusal;
pub use report::Report;
pub use swap::{Swap, SwapKind};
pub use tree::{Device, Node, Role, Step};
pub use verdict::{Evidence, Gap, SharedDevice, Verdict};

use crate::key::Place;
use host::Host;

/// Compares what a volume rests on with what the places of its key rest on.
///
/// A detached header is shown and not judged. Swap on the volume's disk that nothing encrypts leaves the answer unproven.
/// Nothing fails: what cannot be looked at is a gap.
pub fn check(device: &Path, header: Option<&Path>, places: &[Place]) -> Report {
    check_on(&Host::this(), device, header, places)
}

fn check_on(host: &Host, device: &Path, header: Option<&Path>, places: &[Place]) -> Report {
    let volume = Lineage::on(host, device);
    let header = header.map(|path| (path.to_owned(), Lineage::on(host, path)));
    let places: Vec<_> = places.iter().map(|place| (place.clone(), Lineage::on(host, &place.path))).collect();
    let swap = Swap::on(host);

    let shared = shared_devices(&volume, &places);
    let gaps: Vec<_> = [
        gaps_in_sight(device, &volume, &places),
        gaps_by_telling(&volume, &places),
        gaps_by_swap(&volume, &places, &swap),
    ]
    .concat();
    let verdict = if !shared.is_empty() {
        Verdict::Shared(shared)
    } else if !gaps.is_empty() {
        Verdict::Unproven(gaps.clone())
    } else {
        Verdict::Apart(evidence(&volume, &places))
    };
    Report { device: device.to_owned(), volume, header, places, swap, verdict, gaps }
}

fn shared_devices(volume: &Lineage, places: &[(Place, Lineage)]) -> Vec<SharedDevice> {
    let opening = places.iter().filter(|(place, _)| place.opens);
    let shared = |(place, lineage): &(Place, Lineage)| {
        let device = |(device, volume_device, same_by): (&Leaf, &Leaf, SameBy)| SharedDevice {
            what: place.what.clone(),
            path: place.path.clone(),
            device: device.clone(),
            volume_device: volume_device.clone(),
            same_by,
        };
        common(volume, lineage).into_iter().map(device).collect::<Vec<_>>()
    };
    opening.flat_map(shared).collect()
}

/// The leaves of a place that are the volume's as well: the place's leaf, the volume's, and what shows it.
fn common<'a>(volume: &'a Lineage, place: &'a Lineage) -> Vec<(&'a Leaf, &'a Leaf, SameBy)> {
    let same = |leaf: &'a Leaf| volume.leaves().into_iter().find_map(|other| Some((leaf, other, leaf.same_as(other)?)));
    place.leaves().into_iter().filter_map(same).collect()
}

/// What opens nothing, but tells whoever takes the volume where to look for its key.
fn gaps_by_telling(volume: &Lineage, places: &[(Place, Lineage)]) -> Vec<Gap> {
    let telling = places.iter().filter(|(place, _)| !place.opens);
    let gap = |(place, lineage): &(Place, Lineage)| {
        common(volume, lineage).first().map(|(_, disk, _)| Gap {
            about: format!("{} {}", place.what, place.path.display()),
            why: format!("it is on the volume's {disk}: it opens nothing, but says where the key is"),
        })
    };
    telling.filter_map(gap).collect()
}

/// What could not be followed below the volume and the places of its key.
fn gaps_in_sight(device: &Path, volume: &Lineage, places: &[(Place, Lineage)]) -> Vec<Gap> {
    let about = |what: &str, path: &Path, lineage: &Lineage| {
        let about = format!("{what} {}", path.display());
        let gaps = lineage.gaps();
        gaps.into_iter().map(|why| Gap { about: about.clone(), why: why.to_owned() }).collect::<Vec<_>>()
    };
    let mut gaps = about("volume", device, volume);
    gaps.extend(places.iter().flat_map(|(place, lineage)| about(&place.what, &place.path, lineage)));
    if places.is_empty() {
        gaps.push(Gap { about: "key".into(), why: "no place of it is known".into() });
    }
    gaps
}

/// Swap that may bring what this host has in memory to the volume's disk.
///
/// It is no place of the key: keys are locked in memory and not written there. But other programs' memory is, and a
/// hibernation image has all of it, so that nothing is proven.
fn gaps_by_swap(volume: &Lineage, places: &[(Place, Lineage)], swaps: &[Swap]) -> Vec<Gap> {
    let volume_leaves = volume.leaves();
    let mut gaps = Vec::new();
    for swap in swaps {
        let path = swap.path.display();
        let unseen = swap.lineage.plain_gaps();
        gaps.extend(unseen.into_iter().map(|why| Gap { about: format!("swap {path}"), why: why.to_owned() }));

        let on_disk = |leaf: &&Leaf| matches!(leaf, Leaf::Disk(_));
        let common = |leaf: &&Leaf| volume_leaves.iter().any(|other| leaf.same_as(other).is_some());
        let Some(disk) = swap.lineage.plain_leaves().into_iter().find(|leaf| on_disk(leaf) && common(leaf)) else {
            continue;
        };
        let why = match swap.kind {
            SwapKind::Pages => format!(
                "it is on the volume's {disk}: memory of this host, a hibernation image included, may be written there; \
                 keys of cryptattach itself are locked in memory"
            ),
            SwapKind::Hibernation => format!("it is on the volume's {disk}: hibernation writes all memory there"),
        };
        let about = match swap.kind {
            SwapKind::Pages => format!("swap {path}"),
            SwapKind::Hibernation => format!("hibernation image {path}"),
        };
        gaps.push(Gap { about, why });
        gaps.extend(places.iter().filter(|(_, lineage)| may_be_swapped(lineage)).map(|(place, _)| Gap {
            about: format!("{} {}", place.what, place.path.display()),
            why: format!("it is in memory that may be written to the swap {path} on the volume's {disk}"),
        }));
    }
    gaps
}

fn may_be_swapped(lineage: &Lineage) -> bool {
    lineage.leaves().iter().any(|leaf| matches!(leaf, Leaf::Memory(memory) if memory.swappable))
}

fn evidence(volume: &Lineage, places: &[(Place, Lineage)]) -> Evidence {
    let mut key: Vec<Leaf> = Vec::new();
    for leaf in places.iter().flat_map(|(_, lineage)| lineage.leaves()) {
        if !key.contains(leaf) {
            key.push(leaf.clone());
        }
    }
    Evidence { volume: volume.leaves().into_iter().cloned().collect(), key }
}
