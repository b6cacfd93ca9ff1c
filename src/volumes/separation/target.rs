//! Who serves a volume's data, as OpenStack's connection_info says.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::remote::{Protocol, Remote, host_of_export, port_name};
use crate::base::{address::Endpoint, advice::Advice, exit::Exit};
use std::borrow::Cow;

/// More portals, monitors or names than any volume has.
const MOST_ENTRIES: usize = 64;
/// As long as a path may be.
const MOST_BYTES_OF_NAME: usize = 4096;

/// Who serves a volume's data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// This host itself.
    Local,
    /// Something on the network.
    Remote(Remote),
    /// Something that cannot be followed.
    Unknown {
        /// Why, in words.
        why: String,
    },
}

/// A connection_info that does not say who serves the volume.
#[derive(Debug, thiserror::Error)]
pub enum MalformedConnectionInfo {
    /// It is not JSON.
    #[error("the connection information is not JSON")]
    NotJson(#[from] serde_json::Error),
    /// Something in it is missing, or of another form.
    #[error("the connection information has no {what}")]
    Missing {
        /// What: "data", "data.hosts that is a list of texts", ...
        what: &'static str,
    },
    /// An address cannot be read. The text itself may be a secret at the wrong place, and is not repeated.
    #[error("the connection information has something else than an address in {0}")]
    Address(&'static str),
    /// A name cannot be shown.
    #[error("the connection information has a name of a target that is too long or has control characters")]
    Name,
    /// A list is longer than any.
    #[error("the connection information has more than {MOST_ENTRIES} entries in {0}")]
    TooMany(&'static str),
}

impl Advice for MalformedConnectionInfo {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        None
    }
}

/// The members of connection information that say who serves a volume; nothing else of it is kept, for it also has CHAP
/// passwords and Ceph keyrings.
#[derive(Debug)]
pub struct ConnectionInfo(Value);

const KEPT: [&str; 19] = [
    "connection_info",
    "driver_volume_type",
    "data",
    "target_iqn",
    "target_iqns",
    "target_portal",
    "target_portals",
    "target_port",
    "target_nqn",
    "nqn",
    "portals",
    "volume_replicas",
    "cluster_name",
    "name",
    "hosts",
    "ports",
    "export",
    "target_wwn",
    "target_wwns",
];

impl<'de> Deserialize<'de> for ConnectionInfo {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Kept)
    }
}

struct Kept;

impl<'de> Visitor<'de> for Kept {
    type Value = ConnectionInfo;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("connection information")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<ConnectionInfo, A::Error> {
        let mut kept = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            if KEPT.contains(&&*name) {
                kept.insert(name, members.next_value::<ConnectionInfo>()?.0);
            } else {
                members.next_value::<IgnoredAny>()?;
            }
        }
        Ok(ConnectionInfo(kept.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<ConnectionInfo, A::Error> {
        let mut kept = Vec::new();
        while let Some(ConnectionInfo(entry)) = entries.next_element()? {
            kept.push(entry);
        }
        Ok(ConnectionInfo(kept.into()))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ConnectionInfo, E> {
        Ok(ConnectionInfo(text.into()))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<ConnectionInfo, E> {
        Ok(ConnectionInfo(number.into()))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<ConnectionInfo, E> {
        Ok(ConnectionInfo(number.into()))
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<ConnectionInfo, E> {
        Ok(ConnectionInfo(number.into()))
    }

    fn visit_bool<E: de::Error>(self, truth: bool) -> Result<ConnectionInfo, E> {
        Ok(ConnectionInfo(truth.into()))
    }

    fn visit_unit<E: de::Error>(self) -> Result<ConnectionInfo, E> {
        Ok(ConnectionInfo(Value::Null))
    }
}

impl Target {
    /// Reads what Cinder's initialize_connection answers and Nova keeps, `{"driver_volume_type": ..., "data": {...}}`, alone
    /// or as the member `connection_info`. Other members, secrets among them, are passed over.
    ///
    /// The forms are those of os-brick's connectors and, for `rbd`, of Nova's libvirt driver.
    pub fn from_connection_info(ConnectionInfo(info): &ConnectionInfo) -> Result<Self, MalformedConnectionInfo> {
        use MalformedConnectionInfo::Missing;
        let info = info.get("connection_info").unwrap_or(info);
        let kind = info.get("driver_volume_type").and_then(Value::as_str);
        let kind = kind.ok_or(Missing { what: "text 'driver_volume_type'" })?;
        let data = info.get("data").and_then(Value::as_object).ok_or(Missing { what: "object 'data'" })?;
        let remote = match kind.to_ascii_lowercase().as_str() {
            "local" => return Ok(Self::Local),
            "iscsi" | "iser" => iscsi(data)?,
            "nvmeof" | "nvme" => nvme_of(data)?,
            "rbd" => rbd(data)?,
            "nfs" => export(Protocol::Nfs, data)?,
            "glusterfs" => export(Protocol::GlusterFs, data)?,
            "fibre_channel" => fibre_channel(data)?,
            _ => {
                let kind: String = kind.chars().take(80).collect();
                return Ok(Self::Unknown { why: format!("the server of a volume of the kind {kind:?} is not known") });
            }
        };
        let can_be_shown = |name: &String| name.len() <= MOST_BYTES_OF_NAME && !name.contains(char::is_control);
        if remote.names.iter().all(can_be_shown) {
            Ok(Self::Remote(remote))
        } else {
            Err(MalformedConnectionInfo::Name)
        }
    }

    /// Reads connection information as JSON text; see [`Target::from_connection_info`].
    pub fn parse(json: &[u8]) -> Result<Self, MalformedConnectionInfo> {
        Self::from_connection_info(&serde_json::from_slice(json)?)
    }
}

/// Members that hold one text or several, all of them together.
fn texts(data: &Map<String, Value>, names: [&'static str; 2]) -> Result<Vec<String>, MalformedConnectionInfo> {
    let mut found = Vec::new();
    for what in names {
        let several = match data.get(what) {
            None | Some(Value::Null) => &[],
            Some(Value::Array(several)) => &several[..],
            Some(one) => std::slice::from_ref(one),
        };
        for one in several {
            let text = one.as_str().ok_or(MalformedConnectionInfo::Missing { what })?.to_owned();
            if !found.contains(&text) {
                found.push(text);
            }
        }
        if found.len() > MOST_ENTRIES {
            return Err(MalformedConnectionInfo::TooMany(what));
        }
    }
    Ok(found)
}

fn endpoint(text: &str, what: &'static str) -> Result<Endpoint, MalformedConnectionInfo> {
    text.parse().map_err(|_| MalformedConnectionInfo::Address(what))
}

fn endpoints(data: &Map<String, Value>, names: [&'static str; 2]) -> Result<Vec<Endpoint>, MalformedConnectionInfo> {
    texts(data, names)?.iter().map(|text| endpoint(text, names[0])).collect()
}

fn iscsi(data: &Map<String, Value>) -> Result<Remote, MalformedConnectionInfo> {
    let names = texts(data, ["target_iqn", "target_iqns"])?;
    let addresses = endpoints(data, ["target_portal", "target_portals"])?;
    Ok(Remote { protocol: Protocol::Iscsi, names, addresses })
}

/// Old: `target_portal`, `target_port` and `nqn`. New: `portals`, each an address, a port and a transport, and `target_nqn`;
/// or several such, all of one volume, as `volume_replicas` (os_brick.initiator.connectors.nvmeof, NVMeOFConnProps).
fn nvme_of(data: &Map<String, Value>) -> Result<Remote, MalformedConnectionInfo> {
    let names = texts(data, ["target_nqn", "nqn"])?;
    let mut addresses = endpoints(data, ["target_portal", "target_portal"])?;
    let port = data.get("target_port").and_then(port);
    addresses.iter_mut().for_each(|address| address.port = address.port.or(port));
    let mut remote = Remote { protocol: Protocol::NvmeOf, names, addresses };
    for portal in list(data, "portals")? {
        let [address, number] = [0, 1].map(|n| portal.get(n));
        let address = address.and_then(Value::as_str).ok_or(MalformedConnectionInfo::Address("portals"))?;
        let address = endpoint(address, "portals")?;
        let port = address.port.or(number.and_then(self::port));
        remote.addresses.push(Endpoint { port, ..address });
    }
    for replica in list(data, "volume_replicas")? {
        let replica = replica.as_object().filter(|replica| !replica.contains_key("volume_replicas"));
        let what = "object in 'volume_replicas'";
        remote.add(&nvme_of(replica.ok_or(MalformedConnectionInfo::Missing { what })?)?);
    }
    Ok(remote)
}

fn list<'a>(data: &'a Map<String, Value>, what: &'static str) -> Result<&'a [Value], MalformedConnectionInfo> {
    match data.get(what) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) if list.len() > MOST_ENTRIES => Err(MalformedConnectionInfo::TooMany(what)),
        Some(Value::Array(list)) => Ok(list),
        Some(_) => Err(MalformedConnectionInfo::Missing { what }),
    }
}

/// A port is a number or its digits.
fn port(value: &Value) -> Option<u16> {
    value.as_u64().and_then(|port| port.try_into().ok()).or_else(|| value.as_str()?.parse().ok())
}

fn rbd(data: &Map<String, Value>) -> Result<Remote, MalformedConnectionInfo> {
    let text = |name: &str| data.get(name).and_then(Value::as_str);
    let image = text("name").ok_or(MalformedConnectionInfo::Missing { what: "text 'data.name'" })?;
    // "ceph" is what Ceph itself takes without a name (rados(8), --cluster).
    let cluster = text("cluster_name").unwrap_or("ceph");
    let mut addresses = endpoints(data, ["hosts", "hosts"])?;
    if let Some(Value::Array(ports)) = data.get("ports") {
        addresses.iter_mut().zip(ports).for_each(|(address, value)| address.port = address.port.or(port(value)));
    }
    Ok(Remote { protocol: Protocol::Rbd, names: vec![format!("{cluster}/{image}")], addresses })
}

fn export(protocol: Protocol, data: &Map<String, Value>) -> Result<Remote, MalformedConnectionInfo> {
    let export = data.get("export").and_then(Value::as_str);
    let export = export.ok_or(MalformedConnectionInfo::Missing { what: "text 'data.export'" })?;
    let host = host_of_export(export).ok_or(MalformedConnectionInfo::Address("export"))?;
    Ok(Remote { protocol, names: vec![export.to_owned()], addresses: vec![Endpoint { host, port: None }] })
}

fn fibre_channel(data: &Map<String, Value>) -> Result<Remote, MalformedConnectionInfo> {
    let names = texts(data, ["target_wwn", "target_wwns"])?;
    let names = names.iter().map(|wwn| port_name(wwn)).collect();
    Ok(Remote { protocol: Protocol::FibreChannel, names, addresses: Vec::new() })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(kind: &str, data: Value) -> Result<Target, MalformedConnectionInfo> {
        Target::parse(json!({"driver_volume_type": kind, "data": data, "serial": "1"}).to_string().as_bytes())
    }

    #[test]
    fn secrets_are_not_kept() {
        let json = br#"{"driver_volume_type": "iscsi", "serial": "secret1", "data": {"target_portal": "10.0.0.5:3260",
            "auth_password": "secret2", "discovery_auth_password": {"data": ["secret3"]}, "keyring": "secret\u0034",
            "volume_replicas": [{"target_nqn": "n", "dhchap_key": "secret5"}], "ports": [null, true, -1, 1.5]}}"#;
        let kept: ConnectionInfo = serde_json::from_slice(json).expect("read");
        assert_eq!(
            kept.0,
            json!({"driver_volume_type": "iscsi", "data": {"target_portal": "10.0.0.5:3260",
                "volume_replicas": [{"target_nqn": "n"}], "ports": [null, true, -1, 1.5]}})
        );
    }

    #[test]
    fn each_kind_of_volume_names_who_serves_it() {
        for (kind, data, expected) in [
            (
                "iscsi",
                json!({"target_portal": "10.0.0.5:3260", "target_iqn": "iqn.1:a", "target_lun": 1, "auth_password": "x"}),
                "iSCSI target iqn.1:a at 10.0.0.5:3260",
            ),
            (
                "iscsi",
                json!({"target_portals": ["10.0.0.5:3260", "[fd00::5]:3260"], "target_iqns": ["iqn.1:a", "iqn.1:a"],
                       "target_portal": "10.0.0.5:3260", "target_iqn": "iqn.1:a", "target_luns": [1, 1]}),
                "iSCSI target iqn.1:a at 10.0.0.5:3260, [fd00::5]:3260",
            ),
            (
                "nvmeof",
                json!({"nqn": "nqn.1:a", "target_portal": "10.0.0.5", "target_port": "4420", "transport_type": "tcp"}),
                "NVMe-oF target nqn.1:a at 10.0.0.5:4420",
            ),
            (
                "nvmeof",
                json!({"target_nqn": "nqn.1:a", "portals": [["10.0.0.5", 4420, "tcp"], ["fd00::5", "4420", "RoCEv2"]]}),
                "NVMe-oF target nqn.1:a at 10.0.0.5:4420, [fd00::5]:4420",
            ),
            (
                "nvmeof",
                json!({"volume_replicas": [
                    {"target_nqn": "nqn.1:a", "portals": [["10.0.0.5", 4420, "tcp"]]},
                    {"target_nqn": "nqn.1:b", "portals": [["10.0.0.6", 4420, "tcp"]]},
                ]}),
                "NVMe-oF target nqn.1:a, nqn.1:b at 10.0.0.5:4420, 10.0.0.6:4420",
            ),
            (
                "rbd",
                json!({"name": "volumes/v", "hosts": ["10.0.0.5", "[fd00::6]"], "ports": ["6789", 3300], "keyring": "x"}),
                "Ceph RBD image ceph/volumes/v with monitors at 10.0.0.5:6789, [fd00::6]:3300",
            ),
            ("nfs", json!({"export": "10.0.0.5:/srv/v", "name": "v"}), "NFS export 10.0.0.5:/srv/v"),
            ("glusterfs", json!({"export": "node1:/v"}), "GlusterFS volume node1:/v"),
            (
                "fibre_channel",
                json!({"target_wwn": ["50:01:43:80", "0x5001438A"]}),
                "Fibre Channel target 50014380, 5001438a",
            ),
        ] {
            let Target::Remote(remote) = read(kind, data).expect(kind) else { panic!("{kind}") };
            assert_eq!(remote.to_string(), expected);
        }
    }

    #[test]
    fn what_is_local_is_not_remote_and_what_is_not_known_is_said() {
        assert_eq!(read("local", json!({"device_path": "/dev/sda1"})).expect("read"), Target::Local);
        let why = "the server of a volume of the kind \"quobyte\" is not known".to_owned();
        assert_eq!(read("quobyte", json!({})).expect("read"), Target::Unknown { why });
    }

    #[test]
    fn an_answer_of_the_interface_is_read_as_well() {
        let json = br#"{"connection_info": {"driver_volume_type": "local", "data": {}}}"#;
        assert_eq!(Target::parse(json).expect("read"), Target::Local);
    }

    #[test]
    fn other_forms_are_refused() {
        for (kind, data) in [
            ("iscsi", json!([])),
            ("iscsi", json!({"target_portal": 1})),
            ("iscsi", json!({"target_portal": "10.0.0.5:x"})),
            ("iscsi", json!({"target_portals": (0..70).map(|n| format!("10.0.0.5:{n}")).collect::<Vec<_>>()})),
            ("nvmeof", json!({"portals": [[4420, "tcp"]]})),
            ("nvmeof", json!({"volume_replicas": [{"volume_replicas": []}]})),
            ("rbd", json!({"hosts": ["10.0.0.5"]})),
            ("rbd", json!({"name": "volumes/v", "hosts": ["10.0.0.5/x"]})),
            ("nfs", json!({"export": "/srv"})),
            ("iscsi", json!({"target_iqn": "iqn.1:\u{1b}[2J"})),
        ] {
            assert!(read(kind, data.clone()).is_err(), "{kind} {data}");
        }
        assert!(Target::parse(b"{}").is_err() && Target::parse(b"").is_err());
    }
}
