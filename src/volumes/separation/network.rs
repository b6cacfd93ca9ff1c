//! Network block devices as sysfs shows them: who is on the other end.

use std::path::{Path, PathBuf};

use super::remote::{Protocol, Remote};
use crate::{
    base::address::{Endpoint, HostAddress},
    sys::{
        block::{BlockDevice, is_numbered},
        sysfs::{attribute, base_name, entries},
    },
};

/// The other end of the network that a device is reached over.
pub(crate) enum RemoteEnd {
    /// It has an address.
    Known(Remote),
    /// sysfs does not tell its address; this is what it tells, in words.
    Unknown(String),
}

impl RemoteEnd {
    pub fn of(device: &BlockDevice) -> Option<Self> {
        iscsi_target(device).or_else(|| nvme_fabric(device)).or_else(|| network_driver(&device.name))
    }

    fn new(protocol: Protocol, names: Vec<String>, addresses: Vec<Endpoint>) -> Self {
        let remote = Remote { protocol, names, addresses };
        if remote.addresses.is_empty() { Self::Unknown(remote.to_string()) } else { Self::Known(remote) }
    }
}

fn iscsi_target(device: &BlockDevice) -> Option<RemoteEnd> {
    // .../host3/session1/target3:0:0/3:0:0:0/block/sdb (drivers/scsi/scsi_transport_iscsi.c)
    let session = device.directory.ancestors().find(|above| above.join("iscsi_session").is_dir())?;
    let name = attribute(&session.join("iscsi_session").join(base_name(session)).join("targetname"));
    let mut addresses = Vec::new();
    for below in entries(session).iter().filter(|below| base_name(below).starts_with("connection")) {
        let connection = below.join("iscsi_connection").join(base_name(below));
        // Where it was told to log in, and where that sent it on to (RFC 7143 section 11.9, redirection).
        for (address, port) in [("persistent_address", "persistent_port"), ("address", "port")] {
            match endpoint(&connection, address, port) {
                Some(endpoint) if !addresses.contains(&endpoint) => addresses.push(endpoint),
                _ => {}
            }
        }
    }
    Some(RemoteEnd::new(Protocol::Iscsi, name.into_iter().collect(), addresses))
}

fn endpoint(directory: &Path, address: &str, port: &str) -> Option<Endpoint> {
    let host = address_of(&attribute(&directory.join(address))?)?;
    Some(Endpoint { host, port: attribute(&directory.join(port)).and_then(|port| port.parse().ok()) })
}

/// An address as the kernel or the initiator wrote it: IPv6 with brackets or without.
fn address_of(text: &str) -> Option<HostAddress> {
    text.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

fn nvme_fabric(device: &BlockDevice) -> Option<RemoteEnd> {
    // `device` is the controller, or with native multipath the subsystem with its controllers below it.
    let above = device.directory.join("device");
    let controllers = entries(&above).into_iter().filter(|below| base_name(below).starts_with("nvme"));
    let controllers: Vec<_> = [above].into_iter().chain(controllers).collect();
    let transport = |controller: &PathBuf| attribute(&controller.join("transport"));
    // "loop" is the kernel's own target, on this host (drivers/nvme/target/loop.c).
    let is_fabric = |transport: &String| matches!(transport.as_str(), "tcp" | "rdma" | "fc" | "loop");
    let transports: Vec<_> = controllers.iter().filter_map(transport).filter(is_fabric).collect();
    let first = transports.first()?;
    let name = controllers.iter().find_map(|controller| attribute(&controller.join("subsysnqn")));
    let addressed = controllers.iter().filter(|one| matches!(transport(one).as_deref(), Some("tcp" | "rdma")));
    let found: Vec<_> = addressed
        .map(|controller| attribute(&controller.join("address")).and_then(|text| transport_address(&text)))
        .collect();
    // One way to it without an address, and it is not known who serves it.
    match found.into_iter().collect::<Option<Vec<_>>>() {
        Some(addresses) if addresses.len() == transports.len() => {
            Some(RemoteEnd::new(Protocol::NvmeOf, name.into_iter().collect(), addresses))
        }
        _ => Some(RemoteEnd::Unknown(format!("NVMe over {first}"))),
    }
}

/// "traddr=10.0.0.5,trsvcid=4420,src_addr=10.0.0.9" (drivers/nvme/host/fabrics.c, nvmf_get_address)
fn transport_address(address: &str) -> Option<Endpoint> {
    let value = |key: &str| address.split(',').find_map(|part| part.trim().strip_prefix(key)?.strip_prefix('='));
    Some(Endpoint { host: address_of(value("traddr")?)?, port: value("trsvcid").and_then(|port| port.parse().ok()) })
}

fn network_driver(name: &str) -> Option<RemoteEnd> {
    const DRIVERS: [(&str, &str); 5] = [
        ("nbd", "network block device"),
        ("rbd", "Ceph RBD image"),
        ("drbd", "DRBD peer"),
        ("etherd", "ATA over Ethernet shelf"),
        ("rnbd", "RDMA network block device"),
    ];
    let (_, words) = DRIVERS.iter().find(|(driver, _)| is_numbered(name, driver))?;
    Some(RemoteEnd::Unknown((*words).to_owned()))
}
