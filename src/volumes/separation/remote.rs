//! What serves a volume over the network.

use std::fmt;

use serde::Serialize;

use super::disk::plain_wwn;
use crate::base::address::{Endpoint, HostAddress};

/// The far end of a network volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Remote {
    /// How it is reached.
    pub protocol: Protocol,
    /// What it is called: IQN, NQN, `CLUSTER/POOL/IMAGE`, `HOST:/PATH`, world-wide names of ports. Several where there are
    /// several ways to it, none if that is not known.
    pub names: Vec<String>,
    /// Who serves it; none if that is not known.
    pub addresses: Vec<Endpoint>,
}

/// How a network volume is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// iSCSI, over TCP or iSER.
    Iscsi,
    /// NVMe over TCP or RDMA.
    NvmeOf,
    /// A Ceph RBD image; the addresses are those of the monitors.
    Rbd,
    /// A file on NFS.
    Nfs,
    /// A file on GlusterFS.
    GlusterFs,
    /// A server that has a key, or gives a share of one: OpenBao, Tang.
    KeyServer,
    /// Fibre Channel; the names are world-wide names in lower case, and there are no addresses.
    FibreChannel,
}

impl Protocol {
    /// Whether the data may rest on more hosts than those that are addressed.
    pub(super) fn spreads(self) -> bool {
        matches!(self, Self::Rbd | Self::GlusterFs)
    }
}

impl Remote {
    /// Adds what another description of the same far end knows.
    pub(super) fn add(&mut self, other: &Self) {
        add_all(&mut self.names, &other.names);
        add_all(&mut self.addresses, &other.addresses);
    }
}

fn add_all<T: Clone + PartialEq>(to: &mut Vec<T>, from: &[T]) {
    for one in from {
        if !to.contains(one) {
            to.push(one.clone());
        }
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.protocol {
            Protocol::Iscsi => "iSCSI target",
            Protocol::NvmeOf => "NVMe-oF target",
            Protocol::Rbd => "Ceph RBD image",
            Protocol::Nfs => "NFS export",
            Protocol::GlusterFs => "GlusterFS volume",
            Protocol::FibreChannel => "Fibre Channel target",
            Protocol::KeyServer => "key server",
        })?;
        match &self.names[..] {
            [] if self.protocol == Protocol::KeyServer => {}
            [] => f.write_str(" of unknown name")?,
            names => write!(f, " {}", names.join(", "))?,
        }
        let addresses: Vec<_> = self.addresses.iter().map(ToString::to_string).collect();
        match (self.protocol, &addresses[..]) {
            // The name of an export begins with the address.
            (_, []) | (Protocol::Nfs | Protocol::GlusterFs, _) => Ok(()),
            (Protocol::Rbd, monitors) => write!(f, " with monitors at {}", monitors.join(", ")),
            (_, addresses) => write!(f, " at {}", addresses.join(", ")),
        }
    }
}

/// How a file system is reached that other hosts serve; `None` for those that no [`super::Target`] is served by.
pub(super) fn protocol_of(kind: &str) -> Option<Protocol> {
    match kind {
        "nfs" | "nfs4" => Some(Protocol::Nfs),
        "fuse.glusterfs" => Some(Protocol::GlusterFs),
        _ => None,
    }
}

/// The world-wide name of a port in one form: lower case, without "naa.", "0x" and colons.
pub(super) fn port_name(wwn: &str) -> String {
    plain_wwn(wwn).replace(':', "")
}

/// The host of an export, `HOST:/PATH`, with brackets around an IPv6 address or without.
pub(super) fn host_of_export(export: &str) -> Option<HostAddress> {
    let (host, _path) = export.split_once(":/")?;
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).parse().ok()
}
