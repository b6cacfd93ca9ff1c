//! Who holds what is at the end of a lineage.

use super::{
    disk::Leaf,
    identity_of_hosts::{HostId, KnownHosts},
    inventory::ListedTarget,
    remote::{Protocol, Remote},
};

/// A host that holds a leaf.
pub(super) struct Holder<'a> {
    pub leaf: &'a Leaf,
    pub host: HostId<'a>,
    /// The serial numbers of the devices that it holds the leaf on; none if they are not known.
    pub serials: Vec<&'a str>,
}

impl<'a> KnownHosts<'a> {
    /// The hosts that hold a leaf.
    pub fn holders(&self, leaf: &'a Leaf) -> Vec<Holder<'a>> {
        match leaf {
            Leaf::Disk(disk) => {
                vec![Holder { leaf, host: HostId::This, serials: disk.serial.as_deref().into_iter().collect() }]
            }
            Leaf::Memory(_) => vec![Holder { leaf, host: HostId::This, serials: Vec::new() }],
            Leaf::Replica(replica) => {
                let host = self.at_text(&replica.host);
                let serial = self.device(&host, &replica.device).and_then(|device| device.serial.as_deref());
                vec![Holder { leaf, host, serials: serial.into_iter().collect() }]
            }
            Leaf::Remote(remote) => self.servers(leaf, remote),
            // No disk is in it, whoever holds it.
            Leaf::Chip { .. } => Vec::new(),
        }
    }

    fn servers(&self, leaf: &'a Leaf, remote: &Remote) -> Vec<Holder<'a>> {
        let targets: Vec<_> = self.targets(remote).collect();
        let mut hosts: Vec<_> = Vec::new();
        let mut add = |host: HostId<'a>| {
            if !hosts.contains(&host) {
                hosts.push(host);
            }
        };
        targets.iter().filter_map(|target| self.listed(&target.host)).for_each(&mut add);
        // Whoever lists the target by its name knows its hosts; an address that nobody knows adds none then.
        let is_named = remote.names.iter().any(|name| targets.iter().any(|target| target.is_called(name, remote)));
        for address in &remote.addresses {
            let host = self.at(&address.host);
            let is_listed = targets.iter().any(|target| target.is_at(address));
            if !is_listed && (!is_named || host.is_known()) {
                add(host);
            }
        }
        let holder = |host: HostId<'a>| {
            let entries = targets.iter().filter(|target| self.listed(&target.host).as_ref() == Some(&host));
            // One entry without a serial number, and the device is not known.
            let serials =
                entries.map(|target| target.serial.as_deref()).collect::<Option<Vec<_>>>().unwrap_or_default();
            Holder { leaf, host, serials }
        };
        hosts.into_iter().map(holder).collect()
    }

    fn targets(&self, remote: &Remote) -> impl Iterator<Item = &'a ListedTarget> {
        self.inventory.targets.iter().filter(|target| {
            remote.names.iter().any(|name| target.is_called(name, remote))
                || remote.addresses.iter().any(|address| target.is_at(address))
        })
    }

    /// What is not known of who holds a leaf, in words.
    pub fn unknown_holders(&self, leaf: &Leaf) -> Vec<String> {
        let Leaf::Remote(remote) = leaf else {
            return Vec::new();
        };
        let is_named = |name: &str| self.inventory.targets.iter().any(|target| target.is_called(name, remote));
        match remote.protocol {
            // Each port is one of a disk array, and nothing but the inventory tells of which.
            Protocol::FibreChannel => {
                let unnamed = remote.names.iter().filter(|name| !is_named(name));
                let gap = |name| {
                    format!("the server of the Fibre Channel target {name} is not known: name its WWN in the inventory")
                };
                let gaps: Vec<_> = unnamed.map(gap).collect();
                if remote.names.is_empty() { vec![format!("the server of the {remote} is not known")] } else { gaps }
            }
            protocol if protocol.spreads() && !remote.names.iter().any(|name| is_named(name)) => vec![format!(
                "the {remote} may rest on other hosts than these: name all that hold data of it in the inventory ({})",
                if protocol == Protocol::Rbd { "cluster" } else { "export" }
            )],
            _ if self.servers(leaf, remote).is_empty() => {
                vec![format!("the server of the {remote} is not known: name it in the inventory")]
            }
            _ => Vec::new(),
        }
    }
}
