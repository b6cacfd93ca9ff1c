//! The inventory: what an operator knows of hosts, and this host cannot see.

use std::{
    borrow::Cow,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, de::Error as _};

use super::remote::{Protocol, Remote, port_name};
use crate::{
    base::{
        address::{Endpoint, HostAddress},
        advice::Advice,
        exit::Exit,
    },
    config,
};

/// Hosts with their addresses and racks, and which devices they serve.
///
/// ```toml
/// [[host]]
/// name = "storage1"
/// addresses = ["10.0.0.5", "fd00::5", "storage1.example"]   # all that it has, on all networks
/// rack = "r1"
///
/// [[device]]                    # a device of an object store
/// host = "storage1"
/// device = "sdb1"               # the ring's name
/// serial = "WD-123"
/// path = "/srv/node/sdb1"       # where it is, if that host is this very host
///
/// [[target]]                    # what serves volumes: portal, iqn, nqn, wwn, export, or cluster (Ceph's name)
/// portal = "10.0.0.5:3260"      # several entries for one name: all these hosts serve it
/// host = "storage1"
/// serial = "WD-123"             # of the device that the volumes are on
/// ```
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inventory {
    #[serde(default, rename = "host")]
    pub(super) hosts: Vec<ListedHost>,
    #[serde(default, rename = "device")]
    pub(super) devices: Vec<ListedDevice>,
    #[serde(default, rename = "target")]
    pub(super) targets: Vec<ListedTarget>,
}

/// `[[host]]`
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListedHost {
    pub name: String,
    #[serde(deserialize_with = "addresses")]
    pub addresses: Vec<HostAddress>,
    pub rack: Option<String>,
}

/// `[[device]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListedDevice {
    pub host: String,
    pub device: String,
    pub serial: Option<String>,
    pub path: Option<PathBuf>,
}

/// `[[target]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListedTarget {
    #[serde(default, deserialize_with = "portal")]
    portal: Option<Endpoint>,
    iqn: Option<String>,
    nqn: Option<String>,
    wwn: Option<String>,
    export: Option<String>,
    cluster: Option<String>,
    pub host: String,
    pub serial: Option<String>,
}

/// The inventory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// It cannot be read.
    #[error("cannot read the inventory {}", .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It is no TOML of the expected form.
    #[error("{} is not an inventory", .path.display())]
    Malformed {
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// Its entries do not go together.
    #[error("the inventory {} contradicts itself", .path.display())]
    Contradiction {
        path: PathBuf,
        #[source]
        source: Contradiction,
    },
}

impl Advice for InventoryError {
    fn exit(&self) -> Exit {
        Exit::Config
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        None
    }
}

/// Entries of an inventory that do not go together.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// A device or target is of a host that is not listed.
    #[error("{entry} belongs to the host '{host}', which is not listed")]
    UnknownHost {
        /// "device sdb1", "target 10.0.0.5:3260", ...
        entry: String,
        host: String,
    },
    /// Two hosts have one name.
    #[error("there are two hosts '{0}'")]
    SameName(String),
    /// Two hosts have one address.
    #[error("the hosts '{}' and '{}' both have the address {address}", .hosts.0, .hosts.1)]
    SameAddress { address: String, hosts: (String, String) },
    /// One device is listed twice.
    #[error("device {device} of the host '{host}' is listed twice")]
    SameDevice { host: String, device: String },
    /// A target has no name or several.
    #[error("a target of the host '{0}' must have one of portal, iqn, nqn, wwn, export and cluster")]
    NotOneName(String),
}

fn addresses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<HostAddress>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
}

fn portal<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Endpoint>, D::Error> {
    String::deserialize(deserializer)?.parse().map(Some).map_err(D::Error::custom)
}

impl Inventory {
    /// The inventory that the configuration names, or an empty one.
    pub fn of(config: &config::Separation) -> Result<Self, InventoryError> {
        config.inventory.as_deref().map_or_else(|| Ok(Self::default()), Self::read)
    }

    /// Reads an inventory.
    pub fn read(path: &Path) -> Result<Self, InventoryError> {
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, path),
            Err(source) => Err(InventoryError::Io { path: path.to_owned(), source }),
        }
    }

    /// Reads an inventory's text; `path` is for the error.
    pub fn parse(text: &str, path: &Path) -> Result<Self, InventoryError> {
        let path = path.to_owned();
        let inventory: Self = match toml::from_str(text) {
            Ok(inventory) => inventory,
            Err(source) => return Err(InventoryError::Malformed { path, source: Box::new(source) }),
        };
        match inventory.check() {
            Ok(()) => Ok(inventory),
            Err(source) => Err(InventoryError::Contradiction { path, source }),
        }
    }

    /// One that lists nothing.
    pub(super) const fn empty() -> Self {
        Self { hosts: Vec::new(), devices: Vec::new(), targets: Vec::new() }
    }

    fn check(&self) -> Result<(), Contradiction> {
        for (n, host) in self.hosts.iter().enumerate() {
            for other in &self.hosts[..n] {
                if other.name == host.name {
                    return Err(Contradiction::SameName(host.name.clone()));
                }
                if let Some(address) = host.addresses.iter().find(|address| other.addresses.contains(address)) {
                    let hosts = (other.name.clone(), host.name.clone());
                    return Err(Contradiction::SameAddress { address: address.to_string(), hosts });
                }
            }
        }
        for (n, device) in self.devices.iter().enumerate() {
            self.listed(&device.host, || format!("device {}", device.device))?;
            if self.devices[..n].iter().any(|other| (&other.host, &other.device) == (&device.host, &device.device)) {
                let (host, device) = (device.host.clone(), device.device.clone());
                return Err(Contradiction::SameDevice { host, device });
            }
        }
        for target in &self.targets {
            let [name] = &target.names()[..] else {
                return Err(Contradiction::NotOneName(target.host.clone()));
            };
            self.listed(&target.host, || format!("target {name}"))?;
        }
        Ok(())
    }

    fn listed(&self, host: &str, entry: impl FnOnce() -> String) -> Result<(), Contradiction> {
        let known = self.hosts.iter().any(|listed| listed.name == host);
        if known { Ok(()) } else { Err(Contradiction::UnknownHost { entry: entry(), host: host.to_owned() }) }
    }
}

impl ListedTarget {
    fn names(&self) -> Vec<String> {
        let names = [&self.iqn, &self.nqn, &self.wwn, &self.export, &self.cluster];
        let names = names.into_iter().flatten().cloned();
        self.portal.iter().map(ToString::to_string).chain(names).collect()
    }

    /// Whether this is the portal at that address; one without a port is it at every port.
    pub fn is_at(&self, address: &Endpoint) -> bool {
        self.portal
            .as_ref()
            .is_some_and(|portal| portal.host == address.host && (portal.port.is_none() || portal.port == address.port))
    }

    /// Whether this is what serves a volume under one of its names.
    pub fn is_called(&self, name: &str, remote: &Remote) -> bool {
        let equal = |listed: &Option<String>| listed.as_deref().is_some_and(|listed| listed.eq_ignore_ascii_case(name));
        match remote.protocol {
            Protocol::Iscsi => equal(&self.iqn),
            Protocol::NvmeOf => equal(&self.nqn),
            Protocol::Nfs | Protocol::GlusterFs => self.export.as_deref() == Some(name),
            Protocol::FibreChannel => self.wwn.as_deref().is_some_and(|wwn| port_name(wwn) == name),
            Protocol::Rbd => self.cluster.as_deref() == name.split('/').next(),
            // A target holds a volume; a key server is known by its host.
            Protocol::KeyServer => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTS: &str = "[[host]]\nname = 's1'\naddresses = ['10.0.0.5', 'S1.example']\nrack = 'r1'\n\
                         [[host]]\nname = 's2'\naddresses = ['fd00::6']\n";

    fn read(text: &str) -> Result<Inventory, InventoryError> {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("inventory.toml");
        fs::write(&path, text).expect("written");
        Inventory::read(&path)
    }

    #[test]
    fn hosts_devices_and_targets_are_read() {
        let entries = "[[device]]\nhost = 's1'\ndevice = 'sdb1'\nserial = 'S'\npath = '/srv/node/sdb1'\n\
                       [[target]]\nportal = '[::ffff:10.0.0.5]:3260'\nhost = 's1'\n\
                       [[target]]\nwwn = '50:01'\nhost = 's2'\nserial = 'S'\n";
        let inventory = read(&format!("{HOSTS}{entries}")).expect("an inventory");
        assert_eq!((inventory.hosts.len(), inventory.devices.len(), inventory.targets.len()), (2, 1, 2));
        assert_eq!(inventory.hosts[0].addresses[1].to_string(), "s1.example");
        assert!(inventory.targets[0].is_at(&"10.0.0.5:3260".parse().expect("an address")));
        assert!(!inventory.targets[0].is_at(&"10.0.0.5:3261".parse().expect("an address")));
    }

    #[test]
    fn contradictions_are_named() {
        for (entry, expected) in [
            ("[[device]]\nhost = 's9'\ndevice = 'sdb1'\n", "device sdb1 belongs to the host 's9', which is not listed"),
            ("[[target]]\nhost = 's9'\niqn = 'i'\n", "target i belongs to the host 's9', which is not listed"),
            ("[[host]]\nname = 's1'\naddresses = []\n", "there are two hosts 's1'"),
            (
                "[[host]]\nname = 's3'\naddresses = ['::ffff:10.0.0.5']\n",
                "the hosts 's1' and 's3' both have the address 10.0.0.5",
            ),
            (
                "[[device]]\nhost = 's1'\ndevice = 'd'\n[[device]]\nhost = 's1'\ndevice = 'd'\n",
                "device d of the host 's1' is listed twice",
            ),
            (
                "[[target]]\nhost = 's1'\n",
                "a target of the host 's1' must have one of portal, iqn, nqn, wwn, export and cluster",
            ),
            (
                "[[target]]\nhost = 's1'\niqn = 'a'\nnqn = 'b'\n",
                "a target of the host 's1' must have one of portal, iqn, nqn, wwn, export and cluster",
            ),
        ] {
            match read(&format!("{HOSTS}{entry}")) {
                Err(InventoryError::Contradiction { source, .. }) => assert_eq!(source.to_string(), expected),
                other => panic!("{entry}: {other:?}"),
            }
        }
    }

    #[test]
    fn other_files_are_refused() {
        for text in ["[[hosts]]\n", "[[host]]\nname = 's'\naddresses = ['a b']\n", "host = 1\n", "x"] {
            assert!(matches!(read(text), Err(InventoryError::Malformed { .. })), "{text}");
        }
        let missing = Inventory::read(Path::new("/nonexistent/inventory.toml")).expect_err("none");
        assert_eq!(missing.to_string(), "cannot read the inventory /nonexistent/inventory.toml");
    }
}
