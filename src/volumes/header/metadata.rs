//! LUKS2 metadata as JSON (LUKS2 On-Disk Format section 3), typed as far as we judge it.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// The JSON area.
#[derive(Debug, Deserialize)]
pub struct Metadata {
    pub keyslots: BTreeMap<String, Keyslot>,
    pub tokens: BTreeMap<String, Value>,
    pub segments: BTreeMap<String, Segment>,
    pub digests: BTreeMap<String, Digest>,
    pub config: Config,
}

/// One encrypted copy of the volume key.
#[derive(Debug, Deserialize)]
pub struct Keyslot {
    #[serde(rename = "type")]
    pub kind: String,
    pub key_size: u32,
    pub area: Area,
    #[serde(default)]
    pub kdf: Option<Kdf>,
    #[serde(default)]
    pub af: Option<Splitter>,
    /// 0: tried only when it is named; 2: tried before the others.
    pub priority: Option<u32>,
}

/// Where and how a keyslot's key material is encrypted.
#[derive(Debug, Deserialize)]
pub struct Area {
    #[serde(default)]
    pub encryption: Option<String>,
    /// Bytes of the key that a passphrase becomes.
    #[serde(default)]
    pub key_size: Option<u32>,
}

/// How key material is spread over many blocks.
#[derive(Debug, Deserialize)]
pub struct Splitter {
    pub stripes: u64,
}

/// How a passphrase becomes a key.
#[derive(Debug, Deserialize)]
pub struct Kdf {
    #[serde(rename = "type")]
    pub kind: String,
    /// PBKDF2: hash.
    #[serde(default)]
    pub hash: String,
    /// PBKDF2: iterations.
    #[serde(default)]
    pub iterations: u64,
    /// Argon2: passes over its memory.
    #[serde(default)]
    pub time: u64,
    /// Argon2: memory in KiB.
    #[serde(default)]
    pub memory: u64,
    /// Argon2: threads.
    #[serde(default)]
    pub cpus: u64,
}

/// A stretch of the data device.
#[derive(Debug, Deserialize)]
pub struct Segment {
    #[serde(rename = "type")]
    pub kind: String,
    pub offset: String,
    pub size: String,
    pub iv_tweak: Option<String>,
    pub encryption: Option<String>,
    pub sector_size: Option<u32>,
    pub integrity: Option<Value>,
    #[serde(default)]
    pub flags: Vec<String>,
}

/// What a volume key is checked against.
#[derive(Debug, Deserialize)]
pub struct Digest {
    #[serde(rename = "type")]
    pub kind: String,
    pub segments: Vec<String>,
    #[serde(default)]
    pub keyslots: Vec<String>,
    pub hash: String,
    pub iterations: u64,
    pub salt: String,
    pub digest: String,
}

/// Of the whole header.
#[derive(Debug, Deserialize)]
pub struct Config {
    pub requirements: Option<Requirements>,
}

/// What a program must know to touch the volume.
#[derive(Debug, Deserialize)]
pub struct Requirements {
    #[serde(default)]
    pub mandatory: Vec<String>,
}
