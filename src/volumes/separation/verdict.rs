//! The verdict on where a key rests, and the sentences that say it.

use std::fmt;

use serde::{Serialize, Serializer};

use super::disk::{Leaf, SameBy};
use crate::base::key::{Location, Place};

/// Whether a key and the data that it protects rest on different devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They do; this shows it.
    Apart(Evidence),
    /// They do not: these devices have both.
    Shared(Vec<SharedDevice>),
    /// Nothing was found that has both, but not all could be looked at.
    Unproven(Vec<Gap>),
}

/// What was compared and found to be different.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// What the volume rests on.
    pub volume: Vec<Leaf>,
    /// What the places of the key rest on.
    pub key: Vec<Leaf>,
    /// The hosts that hold the volume, by name or address.
    pub volume_hosts: Vec<String>,
    /// The hosts that hold replicas of the key; none without an object store.
    pub replica_hosts: Vec<String>,
}

/// A device that has the volume and a place of its key, or a host or rack that has the devices of both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SharedDevice {
    /// What rests there besides the volume: "sealed key", ...
    pub what: String,
    /// Where; as JSON its path, or `swift://HOST:PORT/DEVICE`.
    #[serde(rename = "path", serialize_with = "as_location")]
    pub at: Location,
    /// The device, as it was found there.
    pub device: Leaf,
    /// The device, as it was found below the volume: another name of the same one, or equal.
    pub volume_device: Leaf,
    /// What shows that both are the same.
    pub same_by: SameBy,
    /// The host or rack that has both, as the inventory calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within: Option<String>,
}

/// Something that could not be looked at, or that may bring key and data together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// What it is about: "volume /dev/sdb", "sealed key /mnt/keys/cinder", ...
    pub about: String,
    /// Why nothing is proven, in words.
    pub why: String,
}

impl Verdict {
    /// `apart`, `shared` or `unproven`.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Apart(_) => "apart",
            Self::Shared(_) => "shared",
            Self::Unproven(_) => "unproven",
        }
    }

    /// What it is founded on, each a sentence without capital and full stop.
    pub fn sentences(&self) -> Vec<String> {
        match self {
            Self::Apart(evidence) => vec![evidence.to_string()],
            Self::Shared(devices) => devices.iter().map(ToString::to_string).collect(),
            Self::Unproven(gaps) => gaps.iter().map(ToString::to_string).collect(),
        }
    }
}

impl fmt::Display for Verdict {
    /// One line: the word and the sentences.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.word(), self.sentences().join("; "))
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no place of the key is on the volume's {}; all are on {}", list(&self.volume), list(&self.key))?;
        if self.replica_hosts.is_empty() {
            return Ok(());
        }
        let [volume, replicas] = [&self.volume_hosts, &self.replica_hosts].map(|hosts| hosts.join(", "));
        write!(f, " (the volume is held by {volume}, the key's replicas by {replicas})")
    }
}

impl SharedDevice {
    /// What rests there, and where.
    pub(super) fn place(&self) -> Place {
        Place { what: self.what.clone(), at: self.at.clone(), opens: true }
    }

    /// Where it is, in words that follow "is": "on the volume's disk sda".
    pub(super) fn position(&self) -> String {
        let Self { device, volume_device, same_by, within, .. } = self;
        match (same_by, device, volume_device) {
            (SameBy::Number, ..) => format!("on the volume's {volume_device}"),
            (SameBy::Wwn, ..) => format!("on {device}, which is the volume's {volume_device}: they have the same WWN"),
            (SameBy::Serial, Leaf::Replica(_), _) => {
                format!("on the volume's {volume_device}: they have the same serial number")
            }
            (SameBy::Serial, ..) => {
                format!("on {device}, which is the volume's {volume_device}: they have the same serial number")
            }
            (SameBy::Host, _, Leaf::Remote(_)) => {
                let name = within.as_ref().map(|name| format!("{name}, ")).unwrap_or_default();
                format!("on {name}the host that serves the volume ({volume_device})")
            }
            (SameBy::Host, ..) => format!("on this host, which holds the volume ({volume_device})"),
            (SameBy::Rack, ..) => {
                let name = within.as_deref().unwrap_or("one");
                format!("in rack {name}, where the volume is as well ({volume_device})")
            }
        }
    }
}

impl fmt::Display for SharedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {}", self.place(), self.position())
    }
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.about, self.why)
    }
}

/// Leaves as text, each text once: two replicas may be on one device.
fn list(leaves: &[Leaf]) -> String {
    let mut texts: Vec<String> = Vec::new();
    for text in leaves.iter().map(ToString::to_string) {
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    texts.join(", ")
}

fn as_location<S: Serializer>(location: &Location, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(location)
}
