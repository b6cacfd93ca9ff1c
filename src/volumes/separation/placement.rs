//! Whether a place of the key is too near to the volume.

use super::{
    Surroundings,
    disk::{Leaf, SameBy},
    identity_of_hosts::{HostId, KnownHosts, Same, unknown_hosts},
    lineage::Lineage,
    remote::{Protocol, Remote},
    served_by::Holder,
    tree::{Node, Step},
    verdict::{Evidence, Gap, SharedDevice},
};
use crate::{
    base::{
        address::Endpoint,
        key::{Location, Place, Replica},
    },
    config::SeparationLevel,
    sys::sysfs::Sysfs,
};

/// A volume, what it rests on, and who holds that.
pub(super) struct Placement<'a> {
    pub hosts: &'a KnownHosts<'a>,
    pub level: SeparationLevel,
    pub volume: &'a Lineage,
    pub holders: Vec<Holder<'a>>,
}

/// What a place of the key and the volume have in common, and what is not known of it.
#[derive(Default)]
pub(super) struct Found {
    pub shared: Vec<SharedDevice>,
    pub gaps: Vec<Gap>,
}

/// How near two holders are to each other.
enum Nearness {
    Apart,
    Shared(SameBy, Option<String>),
    Unknown(String),
}

impl<'a> Placement<'a> {
    pub fn new(hosts: &'a KnownHosts<'a>, volume: &'a Lineage, surroundings: &Surroundings<'_>) -> Self {
        // What serves a volume stands beside the device only if nothing of the device leads to it: then the device stands
        // for it, and its own disks do not hold the volume.
        let is_remote = |leaf: &Leaf| matches!(leaf, Leaf::Remote(_));
        let stands_in = volume.tree.below.iter().any(|node| matches!(&node.step, Step::Leaf(leaf) if is_remote(leaf)));
        let ends = volume.tree.ends(&|_| true).into_iter().filter(|leaf| !stands_in || is_remote(leaf));
        Self { hosts, level: surroundings.level, volume, holders: ends.flat_map(|leaf| hosts.holders(leaf)).collect() }
    }

    /// What a place rests on.
    pub fn lineage(&self, sysfs: &Sysfs, place: &Place) -> Lineage {
        match &place.at {
            Location::Path(path) => Lineage::on(sysfs, path),
            Location::Replica(replica) => {
                let below = self.directory(sysfs, replica).into_iter().collect();
                Lineage { tree: Node::leaf(Leaf::Replica(replica.clone()), below) }
            }
            Location::Chip { name } => Lineage { tree: Node::leaf(Leaf::Chip { name: name.clone() }, Vec::new()) },
            Location::Server { host, port } => {
                Lineage { tree: Node::leaf(Leaf::Remote(key_server(host, *port)), Vec::new()) }
            }
            Location::Threshold { least, of } => {
                let below = of.iter().map(|place| self.lineage(sysfs, place).tree).collect();
                Lineage { tree: Node::threshold(*least, below) }
            }
            Location::Elsewhere { why, .. } => Lineage { tree: Node::gap(why.clone()) },
        }
    }

    /// The directory of a replica's device, if that matters and it is on this host, as the volume is.
    fn directory(&self, sysfs: &Sysfs, replica: &Replica) -> Option<Node> {
        if self.level != SeparationLevel::Device || !self.holders.iter().any(|holder| holder.host == HostId::This) {
            return None;
        }
        let path = self.hosts.directory(replica)?;
        sysfs.look(&path).is_ok().then(|| Lineage::of_existing(sysfs, &path).tree)
    }

    /// Compares a place with the volume: disk by disk, and then by who holds what is on neither's own disks.
    pub fn compare(&self, place: &Place, lineage: &Lineage) -> Found {
        if let Location::Threshold { least, of } = &place.at {
            return self.compare_parts(*least, of, &lineage.tree.below);
        }
        // A path on this host is compared by its disk, whatever the level.
        let is_replica = matches!(place.at, Location::Replica(_) | Location::Server { .. });
        let level = if is_replica { self.level } else { SeparationLevel::Device };
        let mut found = Found::default();
        for (device, volume_device, same_by) in common(self.volume, lineage) {
            found.shared.push(shared(place, device, volume_device, same_by, None));
        }
        let holders = lineage.tree.ends(&|_| true).into_iter().flat_map(|leaf| self.hosts.holders(leaf));
        for holder in holders.filter(|_| found.shared.is_empty()).collect::<Vec<_>>() {
            let mut unknown = Vec::new();
            let near = self.holders.iter().find_map(|other| match self.nearness(level, &holder, other) {
                Nearness::Apart => None,
                Nearness::Unknown(why) => {
                    unknown.push(Gap { about: place.to_string(), why });
                    None
                }
                Nearness::Shared(same_by, within) => Some(shared(place, holder.leaf, other.leaf, same_by, within)),
            });
            found.gaps.extend(unknown.into_iter().filter(|_| near.is_none()));
            found.shared.extend(near);
        }
        for leaf in lineage.tree.ends(&|_| true) {
            let gap = |why| Gap { about: place.to_string(), why };
            found.gaps.extend(self.hosts.unknown_holders(leaf).into_iter().map(gap));
        }
        found
    }

    /// Parts of a key are too near if enough of them are; and if that depends on what is not known, nothing is proven.
    fn compare_parts(&self, least: usize, of: &[Place], below: &[Node]) -> Found {
        let parts = of.iter().zip(below);
        let parts = parts.map(|(place, tree)| self.compare(place, &Lineage { tree: tree.clone() }));
        let (mut near, mut unproven) = (Vec::new(), Vec::new());
        for part in parts {
            match (part.shared.is_empty(), part.gaps.is_empty()) {
                (false, _) => near.push(part),
                (true, false) => unproven.push(part),
                (true, true) => {}
            }
        }
        let (is_near, may_be_near) = (near.len() >= least, near.len() + unproven.len() >= least);
        let mut found = Found::default();
        for part in near {
            match is_near {
                true => found.shared.extend(part.shared),
                false if may_be_near => found.gaps.extend(part.shared.iter().map(|shared| Gap {
                    about: format!("{} on {}", shared.what, shared.at),
                    why: format!("it is {}, and others that the policy takes with it may be, too", shared.position()),
                })),
                false => {}
            }
        }
        if may_be_near && !is_near {
            found.gaps.extend(unproven.into_iter().flat_map(|part| part.gaps));
        }
        found
    }

    /// What shows that they are apart, if nothing was found.
    pub fn evidence(&self, places: &[(Place, Lineage)]) -> Evidence {
        let leaves = places.iter().flat_map(|(_, lineage)| lineage.leaves());
        let replicas = leaves.clone().filter(|leaf| matches!(leaf, Leaf::Replica(_)));
        Evidence {
            volume: once(self.volume.leaves().into_iter().cloned()),
            key: once(leaves.cloned()),
            volume_hosts: once(self.holders.iter().map(|holder| holder.host.to_string())),
            replica_hosts: once(
                replicas.flat_map(|leaf| self.hosts.holders(leaf)).map(|holder| holder.host.to_string()),
            ),
        }
    }

    /// What may bring memory that is written there, readable, to the volume's device, where that is not a disk which both
    /// are seen to be on.
    pub fn may_reach(&self, swap: &Lineage) -> Vec<String> {
        let leaves = swap.tree.ends(&|step| !step.encrypts());
        let leaves = leaves.into_iter().filter(|leaf| !matches!(leaf, Leaf::Memory(_)));
        let holders: Vec<_> = leaves.flat_map(|leaf| self.hosts.holders(leaf)).collect();
        let pairs = holders.iter().flat_map(|holder| self.holders.iter().map(move |other| (holder, other)));
        let why = |(holder, other)| match self.nearness(SeparationLevel::Device, holder, other) {
            Nearness::Apart => None,
            Nearness::Unknown(why) => Some(why),
            Nearness::Shared(..) => Some(format!("it is on {}, like the volume's {}", holder.leaf, other.leaf)),
        };
        pairs.filter_map(why).collect()
    }

    fn nearness(&self, level: SeparationLevel, one: &Holder<'_>, volume: &Holder<'_>) -> Nearness {
        match (self.hosts.same(&one.host, &volume.host), level) {
            (Same::Unknown(why), _) => Nearness::Unknown(why),
            (Same::Yes, SeparationLevel::Device) => devices(one, volume),
            (Same::Yes, SeparationLevel::Host | SeparationLevel::Rack) => {
                let name = matches!(one.host, HostId::Listed(_)).then(|| one.host.to_string());
                Nearness::Shared(SameBy::Host, name)
            }
            // A network disk of this host is none of a store that says where its replicas are: there, two addresses alone
            // are not yet two hosts.
            (Same::No, _)
                if matches!(one.leaf, Leaf::Remote(_)) && !self.hosts.are_told_apart(&one.host, &volume.host) =>
            {
                Nearness::Unknown(unknown_hosts(&one.host, &volume.host))
            }
            (Same::No, SeparationLevel::Device | SeparationLevel::Host) => Nearness::Apart,
            (Same::No, SeparationLevel::Rack) => self.racks(one, volume),
        }
    }

    fn racks(&self, one: &Holder<'_>, volume: &Holder<'_>) -> Nearness {
        let rack = |holder: &Holder<'_>| self.hosts.rack(&holder.host);
        match (rack(one), rack(volume)) {
            (Some(rack), Some(other)) if rack == other => Nearness::Shared(SameBy::Rack, Some(rack.to_owned())),
            (Some(_), Some(_)) => Nearness::Apart,
            (known, _) => {
                let host = if known.is_none() { &one.host } else { &volume.host };
                Nearness::Unknown(format!("the rack of {host} is not known: name it in the inventory"))
            }
        }
    }
}

/// A name that is no address is called as it is: then nobody knows who serves it.
fn key_server(host: &str, port: u16) -> Remote {
    let address = host.parse().ok().map(|host| Endpoint { host, port: Some(port) });
    let names = if address.is_some() { Vec::new() } else { vec![host.to_owned()] };
    Remote { protocol: Protocol::KeyServer, names, addresses: address.into_iter().collect() }
}

fn once<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for one in all {
        if !found.contains(&one) {
            found.push(one);
        }
    }
    found
}

/// Compares devices on one host, which are not the same as far as the host itself can see.
fn devices(one: &Holder<'_>, volume: &Holder<'_>) -> Nearness {
    let is_here = |holder: &Holder<'_>| matches!(holder.leaf, Leaf::Disk(_) | Leaf::Memory(_));
    if is_here(one) && is_here(volume) {
        return Nearness::Apart;
    }
    let missing: Vec<_> = [one, volume].into_iter().filter(|holder| holder.serials.is_empty()).map(missing).collect();
    if !missing.is_empty() {
        return Nearness::Unknown(format!(
            "it is on {}, like the volume's {}, and may be on the same device: {}",
            one.host,
            volume.leaf,
            missing.join(", ")
        ));
    }
    match one.serials.iter().any(|serial| volume.serials.contains(serial)) {
        true => Nearness::Shared(SameBy::Serial, None),
        false => Nearness::Apart,
    }
}

fn missing(holder: &Holder<'_>) -> String {
    match holder.leaf {
        Leaf::Disk(_) | Leaf::Memory(_) | Leaf::Chip { .. } => format!("{} shows no serial number", holder.leaf),
        Leaf::Replica(_) | Leaf::Remote(_) => format!("the inventory has no serial number of {}", holder.leaf),
    }
}

fn shared(place: &Place, device: &Leaf, volume_device: &Leaf, same_by: SameBy, within: Option<String>) -> SharedDevice {
    let (device, volume_device) = (device.clone(), volume_device.clone());
    SharedDevice { what: place.what.clone(), at: place.at.clone(), device, volume_device, same_by, within }
}

/// The leaves of a place that are the volume's as well: the place's leaf, the volume's, and what shows it.
fn common<'a>(volume: &'a Lineage, place: &'a Lineage) -> Vec<(&'a Leaf, &'a Leaf, SameBy)> {
    let same = |leaf: &'a Leaf| volume.leaves().into_iter().find_map(|other| Some((leaf, other, leaf.same_as(other)?)));
    place.leaves().into_iter().filter_map(same).collect()
}
