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
//! What an object store keeps on other hosts is compared by its host, device or rack with whoever serves the volume: see
//! [`Surroundings`], [`Target`] and [`Inventory`].
//!
//! ```no_run
//! use std::path::Path;
//! use cryptattach::{base::key::Place, volumes::separation::{self, Surroundings, Verdict}};
//!
//! let key = Place::path("sealed key", "/mnt/keys/cinder", true);
//! let report = separation::check(Path::new("/dev/vdb"), None, &[key], &Surroundings::default());
//! println!("{report}");
//! assert!(matches!(report.verdict, Verdict::Apart(_)));
//! ```

mod disk;
mod identity_of_hosts;
mod inventory;
mod lineage;
mod network;
mod outlook;
mod placement;
mod policy;
mod remote;
mod report;
mod served_by;
mod swap;
mod target;
#[cfg(test)]
mod tests;
mod tree;
mod verdict;

use std::path::Path;

pub use disk::{Disk, Leaf, Memory, SameBy};
pub use identity_of_hosts::Hosts;
pub use inventory::{Contradiction, Inventory, InventoryError};
pub use lineage::Lineage;
pub use outlook::{Outlook, outlook};
pub use policy::{Refusal, Refused, Separated, prove};
pub use remote::{Protocol, Remote};
pub use report::Report;
pub use swap::{Swap, SwapKind};
pub use target::{ConnectionInfo, MalformedConnectionInfo, Target};
pub use tree::{Device, Node, Role, Step};
pub use verdict::{Evidence, Gap, SharedDevice, Verdict};

use crate::{base::key::Place, config::SeparationLevel, sys::sysfs::Sysfs};
use identity_of_hosts::KnownHosts;
use placement::{Found, Placement};

/// What is known of the volume and of other hosts besides what this host sees.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Who serves the volume. It completes what sysfs shows of network devices; a device that shows no network stands for
    /// the target, and then its own disks count for places on this host only.
    pub target: Option<&'a Target>,
    /// What an operator knows of the hosts.
    pub inventory: &'a Inventory,
    /// What the volume and a replica of its key must not have in common.
    pub level: SeparationLevel,
}

impl Default for Surroundings<'_> {
    fn default() -> Self {
        static NOTHING: Inventory = Inventory::empty();
        Self { target: None, inventory: &NOTHING, level: SeparationLevel::default() }
    }
}

/// Compares what a volume rests on with what the places of its key rest on.
///
/// Places on this host are compared by disk, replicas in an object store by the level. A detached header is shown and not
/// judged. Swap on the volume's disk that nothing encrypts leaves the answer unproven. Nothing fails: what cannot be looked
/// at is a gap.
pub fn check(device: &Path, header: Option<&Path>, places: &[Place], surroundings: &Surroundings<'_>) -> Report {
    check_on(&Sysfs::this(), device, header, places, surroundings)
}

fn check_on(
    sysfs: &Sysfs,
    device: &Path,
    header: Option<&Path>,
    places: &[Place],
    surroundings: &Surroundings<'_>,
) -> Report {
    let volume = Lineage::of_volume(sysfs, device, surroundings.target);
    let header = header.map(|path| (path.to_owned(), Lineage::on(sysfs, path)));
    let hosts = KnownHosts::known_to(sysfs, surroundings.inventory);
    let placement = Placement::new(&hosts, &volume, surroundings);
    let places: Vec<_> = places.iter().map(|place| (place.clone(), placement.lineage(sysfs, place))).collect();
    let swap = Swap::on(sysfs);

    let Found { shared, gaps: not_compared } = compare(&placement, &places);
    let mut gaps: Vec<Gap> = Vec::new();
    for gap in [
        gaps_in_sight(device, &volume, &places),
        gaps_in_holding(device, &hosts, &volume),
        not_compared,
        gaps_by_swap(&placement, &places, &swap),
    ]
    .concat()
    {
        if !gaps.contains(&gap) {
            gaps.push(gap);
        }
    }
    let verdict = if !shared.is_empty() {
        Verdict::Shared(shared)
    } else if !gaps.is_empty() {
        Verdict::Unproven(gaps.clone())
    } else {
        Verdict::Apart(placement.evidence(&places))
    };
    Report { device: device.to_owned(), volume, header, places, swap, verdict, gaps }
}

/// What the places have in common with the volume. What opens nothing is a gap only: it tells whoever takes the volume
/// where to look for its key.
fn compare(placement: &Placement<'_>, places: &[(Place, Lineage)]) -> Found {
    let mut all = Found::default();
    for (place, lineage) in places {
        let found = placement.compare(place, lineage);
        all.gaps.extend(found.gaps);
        if place.opens {
            all.shared.extend(found.shared);
        } else if let Some(shared) = found.shared.first() {
            let why = format!("it is {}: it opens nothing, but names the key", shared.position());
            all.gaps.push(Gap { about: place.to_string(), why });
        }
    }
    all
}

/// What is not known of those who serve the volume.
fn gaps_in_holding(device: &Path, hosts: &KnownHosts<'_>, volume: &Lineage) -> Vec<Gap> {
    let about = format!("volume {}", device.display());
    let unknown = volume.leaves().into_iter().flat_map(|leaf| hosts.unknown_holders(leaf));
    unknown.map(|why| Gap { about: about.clone(), why }).collect()
}

/// What could not be followed below the volume and the places of its key.
fn gaps_in_sight(device: &Path, volume: &Lineage, places: &[(Place, Lineage)]) -> Vec<Gap> {
    let below = |about: String, lineage: &Lineage| {
        let gaps = lineage.gaps();
        gaps.into_iter().map(|why| Gap { about: about.clone(), why: why.to_owned() }).collect::<Vec<_>>()
    };
    let mut gaps = below(format!("volume {}", device.display()), volume);
    gaps.extend(places.iter().flat_map(|(place, lineage)| below(place.to_string(), lineage)));
    if places.is_empty() {
        gaps.push(Gap { about: "key".into(), why: "its place is not known".into() });
    }
    gaps
}

/// Swap that may bring what this host has in memory to the volume's disk.
///
/// It is no place of the key: keys are locked in memory and not written there. But other programs' memory is, and a
/// hibernation image has all of it, so that nothing is proven.
fn gaps_by_swap(placement: &Placement<'_>, places: &[(Place, Lineage)], swaps: &[Swap]) -> Vec<Gap> {
    let volume_leaves = placement.volume.leaves();
    let mut gaps = Vec::new();
    for swap in swaps {
        let path = swap.path.display();
        let unseen = swap.lineage.plain_gaps().into_iter().map(str::to_owned);
        let unseen = unseen.chain(placement.may_reach(&swap.lineage));
        gaps.extend(unseen.map(|why| Gap { about: format!("swap {path}"), why }));

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
            about: place.to_string(),
            why: format!("it is in memory that may be written to the swap {path} on the volume's {disk}"),
        }));
    }
    gaps
}

fn may_be_swapped(lineage: &Lineage) -> bool {
    lineage.leaves().iter().any(|leaf| matches!(leaf, Leaf::Memory(memory) if memory.swappable))
}
