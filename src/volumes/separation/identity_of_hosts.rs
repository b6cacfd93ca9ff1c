//! Which host an address means. No name is looked up: DNS may say something else to the storage than to this host.

use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
};

use super::inventory::{Inventory, ListedDevice, ListedHost};
use crate::{
    base::{
        address::HostAddress,
        key::{Replica, is_device_name},
    },
    config,
    sys::sysfs::Sysfs,
};

/// The hosts that are known: this one and those of the inventory.
pub(super) struct KnownHosts<'a> {
    pub inventory: &'a Inventory,
    /// The addresses of this host; `None` if the kernel does not tell them.
    own: Option<Vec<IpAddr>>,
}

/// This host, as its interfaces and the inventory show it.
pub struct Hosts(Inventory);

impl Hosts {
    /// By the configured inventory, or without one if that cannot be read.
    pub fn known_here(config: &config::Separation) -> Self {
        Self(Inventory::of(config).unwrap_or(Inventory::empty()))
    }

    /// Whether this address or name is this host's.
    pub fn is_here(&self, host: &str) -> bool {
        self.known().at_text(host) == HostId::This
    }

    /// The directory of a replica's device, if that is on this host.
    pub fn directory(&self, replica: &Replica) -> Option<PathBuf> {
        self.known().directory(replica)
    }

    fn known(&self) -> KnownHosts<'_> {
        KnownHosts::known_to(&Sysfs::this(), &self.0)
    }
}

/// A host, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum HostId<'a> {
    /// This one, whether it is listed or not.
    This,
    /// Another one of the inventory.
    Listed(&'a ListedHost),
    /// The one with that address.
    Address(IpAddr),
    /// The one that something calls so.
    Name(String),
}

/// Whether two hosts are one.
pub(super) enum Same {
    Yes,
    No,
    /// Not known; why, in words.
    Unknown(String),
}

impl<'a> KnownHosts<'a> {
    pub fn known_to(sysfs: &Sysfs, inventory: &'a Inventory) -> Self {
        let own = sysfs.addresses().ok();
        Self { inventory, own: own.map(|own| own.into_iter().filter(means_one_host).collect()) }
    }

    /// The host at an address: the inventory's word goes before that of this host's interfaces, so that addresses of the
    /// loopback network may stand for other hosts where somebody says so.
    pub fn at(&self, address: &HostAddress) -> HostId<'a> {
        let listed = self.inventory.hosts.iter().find(|host| host.addresses.contains(address));
        match (listed, address) {
            (Some(host), _) => self.identity(host),
            (None, HostAddress::Ip(ip)) if self.is_own(ip) || ip.is_loopback() => HostId::This,
            (None, HostAddress::Ip(ip)) => HostId::Address(*ip),
            (None, HostAddress::Name(name)) if name == "localhost" => HostId::This, // RFC 6761 section 6.3
            (None, HostAddress::Name(name)) => HostId::Name(name.clone()),
        }
    }

    /// The host that a text addresses.
    pub fn at_text(&self, text: &str) -> HostId<'a> {
        text.parse().map_or_else(|_| HostId::Name(text.to_owned()), |address| self.at(&address))
    }

    /// The host of that name in the inventory, which has checked that there is one.
    pub fn listed(&self, name: &str) -> Option<HostId<'a>> {
        self.inventory.hosts.iter().find(|host| host.name == name).map(|host| self.identity(host))
    }

    fn identity(&self, host: &'a ListedHost) -> HostId<'a> {
        if self.is_this(host) { HostId::This } else { HostId::Listed(host) }
    }

    fn is_this(&self, host: &ListedHost) -> bool {
        host.addresses.iter().any(|address| matches!(address, HostAddress::Ip(ip) if self.is_own(ip)))
    }

    fn is_own(&self, ip: &IpAddr) -> bool {
        self.own.as_ref().is_some_and(|own| own.contains(ip))
    }

    /// Whether two hosts are one. Two addresses of one family are two hosts unless the inventory says otherwise; IPv4 and
    /// IPv6, or a name and an address, may well be one.
    pub fn same(&self, one: &HostId<'_>, other: &HostId<'_>) -> Same {
        use HostId::{Address, Listed, Name, This};
        let many = |host: &HostId<'_>| matches!(host, Address(ip) if !means_one_host(ip));
        let same = match (one, other) {
            _ if many(one) || many(other) => None,
            (This, This) => Some(true),
            (Listed(one), Listed(other)) => Some(one.name == other.name),
            (Name(one), Name(other)) => Some(one == other),
            (Address(one), Address(other)) if one == other => Some(true),
            (Address(one), Address(other)) => (one.is_ipv4() == other.is_ipv4()).then_some(false),
            (This, Listed(_) | Address(_)) | (Listed(_) | Address(_), This) => self.own.is_some().then_some(false),
            (Listed(host), Address(ip)) | (Address(ip), Listed(host)) => has_family_of(host, ip).then_some(false),
            (Name(_), _) | (_, Name(_)) => None,
        };
        match same {
            Some(true) => Same::Yes,
            Some(false) => Same::No,
            None => Same::Unknown(unknown_hosts(one, other)),
        }
    }

    /// Whether more than their addresses tells two hosts apart.
    pub fn are_told_apart(&self, one: &HostId<'_>, other: &HostId<'_>) -> bool {
        [one, other].contains(&&HostId::This) || (one.is_known() && other.is_known())
    }

    /// The rack that a host is in.
    pub fn rack(&self, host: &HostId<'_>) -> Option<&'a str> {
        self.entries(host).find_map(|host| host.rack.as_deref())
    }

    /// What the inventory says of a device of an object store.
    pub fn device(&self, host: &HostId<'_>, device: &str) -> Option<&'a ListedDevice> {
        self.entries(host).find_map(|host| {
            self.inventory.devices.iter().find(|listed| listed.host == host.name && listed.device == device)
        })
    }

    /// The directory of a replica's device, if that is on this host.
    pub fn directory(&self, replica: &Replica) -> Option<PathBuf> {
        let at = self.at_text(&replica.host);
        if at != HostId::This || !is_device_name(&replica.device) {
            return None;
        }
        match self.device(&at, &replica.device) {
            Some(ListedDevice { path: Some(path), .. }) => Some(path.clone()),
            Some(ListedDevice { serial: Some(_), .. }) => None,
            // Swift's own default (object-server.conf, option "devices").
            _ => Some(Path::new("/srv/node").join(&replica.device)),
        }
    }

    fn entries(&self, host: &HostId<'_>) -> impl Iterator<Item = &'a ListedHost> {
        self.inventory.hosts.iter().filter(move |listed| match host {
            HostId::This => self.is_this(listed),
            HostId::Listed(host) => host.name == listed.name,
            HostId::Address(_) | HostId::Name(_) => false,
        })
    }
}

/// The gap between two hosts that may be one.
pub(super) fn unknown_hosts(one: &HostId<'_>, other: &HostId<'_>) -> String {
    format!("{one} and {other} may be the same host: name them, with all their addresses, in the inventory")
}

/// Whether an address is that of one host wherever it is used; that of a link is used on others as well.
fn means_one_host(ip: &IpAddr) -> bool {
    let is_of_link = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !is_of_link && !ip.is_unspecified() && !ip.is_multicast()
}

fn has_family_of(host: &ListedHost, ip: &IpAddr) -> bool {
    host.addresses.iter().any(|address| matches!(address, HostAddress::Ip(listed) if listed.is_ipv4() == ip.is_ipv4()))
}

impl HostId<'_> {
    /// Whether somebody knows it as more than an address.
    pub fn is_known(&self) -> bool {
        matches!(self, Self::This | Self::Listed(_))
    }
}

impl fmt::Display for HostId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::This => f.write_str("this host"),
            Self::Listed(host) => f.write_str(&host.name),
            Self::Address(ip) => ip.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}
