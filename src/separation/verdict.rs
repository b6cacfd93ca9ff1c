//! The verdict on where a key rests, and the sentences that say it.

use std::{fmt, path::PathBuf};

use serde::Serialize;

use super::{
    disk::{Leaf, SameBy},
    tree::as_text,
};

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
}

/// A device that has the volume and a place of its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SharedDevice {
    /// What rests there besides the volume: "sealed key", ...
    pub what: String,
    /// Its path.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// The device, as it was found below that path.
    pub device: Leaf,
    /// The device, as it was found below the volume: another name of the same one, or equal.
    pub volume_device: Leaf,
    /// What shows that both are the same.
    pub same_by: SameBy,
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
        write!(f, "no place of the key is on the volume's {}, all are on {}", list(&self.volume), list(&self.key))
    }
}

impl fmt::Display for SharedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, path, device, volume_device, same_by } = self;
        write!(f, "{what} {} is on ", path.display())?;
        match same_by {
            SameBy::Number => write!(f, "the volume's {volume_device}"),
            SameBy::Wwn => write!(f, "{device}, which is the volume's {volume_device}: they have one WWN"),
            SameBy::Serial => write!(f, "{device}, which is the volume's {volume_device}: they have one serial number"),
        }
    }
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.about, self.why)
    }
}

pub(super) fn list(leaves: &[Leaf]) -> String {
    leaves.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
