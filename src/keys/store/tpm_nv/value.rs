//! What stands in an NV index: `"ca" 0x01`, a letter for its kind, 16 bytes that name it, and the raw deflate (RFC 1951) of its
//! JSON, for the TPM has little room.
//!
//! A TPM that was exchanged, or another system on this machine, may have written anything: no part is believed.

use miniz_oxide::{deflate::compress_to_vec, inflate::decompress_to_vec_with_limit};
use openssl::sha::sha256;
use serde::Deserialize;
use uuid::Uuid;

use crate::base::key::{Epoch, HostName, KeyId, MAX_SEALED_BYTES, MalformedSealedKey, SealedKey, StoreName};

/// Bytes before the JSON: enough to tell what it is.
pub(super) const HEAD_BYTES: u16 = 20;
/// The magic, and the version of this layout.
const MAGIC: [u8; 3] = *b"ca\x01";
const VERSION_AT: usize = 2;
/// How hard deflate tries.
const LEVEL: u8 = 9;

/// What stands there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
enum Letter {
    Key = b'v',
    ContainerKey = b'k',
    Current = b'c',
    HostKey = b'h',
    Consumers = b'u',
}

impl Letter {
    const ALL: [Self; 5] = [Self::Key, Self::ContainerKey, Self::Current, Self::HostKey, Self::Consumers];
}

/// The name of a value: there is one value of a name, but for a moment while it is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Label {
    letter: Letter,
    id: [u8; 16],
}

impl Label {
    /// A sealed key.
    pub(super) fn key(id: &KeyId) -> Self {
        Self { letter: Letter::Key, id: bytes_of(id) }
    }

    /// Who needs a key.
    pub(super) fn consumers(id: &KeyId) -> Self {
        Self { letter: Letter::Consumers, id: bytes_of(id) }
    }

    /// A container key. One TPM may have several containers, so that the container is in the name, too.
    pub(super) fn container_key(container: &StoreName, epoch: Epoch) -> Self {
        let number: u32 = epoch.to_string().parse().unwrap_or_default();
        Self { letter: Letter::ContainerKey, id: numbered(container, number) }
    }

    /// Which container key is the current one.
    pub(super) fn current(container: &StoreName) -> Self {
        Self { letter: Letter::Current, id: numbered(container, 0) }
    }

    /// A host's lockbox key.
    pub(super) fn host_key(container: &StoreName, host: &HostName) -> Self {
        Self { letter: Letter::HostKey, id: first_of_hash(&format!("{container}/host/{host}")) }
    }

    /// The id, if it is that of a sealed key.
    pub(super) fn as_key(&self) -> Option<KeyId> {
        let id = || Uuid::from_bytes(self.id).hyphenated().to_string().parse().ok();
        if self.letter == Letter::Key { id() } else { None }
    }

    /// The epoch, if it is that of a key of this container.
    pub(super) fn as_container_key(&self, container: &StoreName) -> Option<Epoch> {
        let number = u32::from_be_bytes(self.id[12..].try_into().unwrap_or_default());
        let is_of = self.letter == Letter::ContainerKey && self.id == numbered(container, number);
        is_of.then(|| number.to_string().parse().ok()).flatten()
    }

    /// Whether it is that of a host's lockbox key.
    pub(super) fn is_host_key(&self) -> bool {
        self.letter == Letter::HostKey
    }
}

/// A version 4 UUID.
fn bytes_of(id: &KeyId) -> [u8; 16] {
    Uuid::try_parse(&id.to_string()).map(Uuid::into_bytes).unwrap_or_default()
}

fn first_of_hash(text: &str) -> [u8; 16] {
    let mut first = [0; 16];
    first.copy_from_slice(&sha256(text.as_bytes())[..16]);
    first
}

fn numbered(container: &StoreName, number: u32) -> [u8; 16] {
    let mut id = first_of_hash(container.as_str());
    id[12..].copy_from_slice(&number.to_be_bytes());
    id
}

/// What the first bytes of an index say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// A value of ours, all of which was written: its first part is written last.
    Whole(Label),
    /// Nothing was written to its first part yet: it is as the TPM has made it.
    NotWhole,
    /// Something else, or of a later version.
    Foreign,
}

impl Head {
    /// Of the first [`HEAD_BYTES`] of an index, or all if it is shorter.
    pub fn of(bytes: &[u8]) -> Self {
        let Some((head, _)) = bytes.split_first_chunk::<{ HEAD_BYTES as usize }>() else { return Self::Foreign };
        if head.iter().all(|byte| *byte == head[0]) {
            return Self::NotWhole;
        }
        let letter = Letter::ALL.into_iter().find(|letter| *letter as u8 == head[MAGIC.len()]);
        let mut id = [0; 16];
        id.copy_from_slice(&head[MAGIC.len() + 1..]);
        match letter {
            Some(letter) if head[..=VERSION_AT] == MAGIC => Self::Whole(Label { letter, id }),
            _ => Self::Foreign,
        }
    }
}

/// What stands in an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    pub label: Label,
    /// JSON, if it is well-formed.
    pub json: Vec<u8>,
}

/// What each value has: values of one name are told apart by it.
#[derive(Deserialize)]
struct Counted {
    generation: u64,
}

impl Value {
    /// As it stands in an index.
    pub fn pack(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.push(self.label.letter as u8);
        bytes.extend(self.label.id);
        bytes.extend(compress_to_vec(&self.json, LEVEL));
        bytes
    }

    /// Reads an index. What would be larger than any sealed key is not unpacked.
    pub fn unpack(bytes: &[u8]) -> Result<Self, MalformedSealedKey> {
        let Head::Whole(label) = Head::of(bytes) else { return Err(MalformedSealedKey::Packed) };
        let packed = &bytes[usize::from(HEAD_BYTES)..];
        let json = decompress_to_vec_with_limit(packed, MAX_SEALED_BYTES).map_err(|_| MalformedSealedKey::Packed)?;
        Ok(Self { label, json })
    }

    /// Counts the replacements of a value.
    pub fn generation(&self) -> Result<u64, MalformedSealedKey> {
        match self.label.letter {
            Letter::Key | Letter::ContainerKey | Letter::HostKey => {
                SealedKey::from_json(&self.json)?.claimed_generation()
            }
            Letter::Current | Letter::Consumers => {
                let counted: Counted = serde_json::from_slice(&self.json).map_err(MalformedSealedKey::Json)?;
                Ok(counted.generation)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(json: &str) -> Value {
        Value { label: Label::key(&KeyId::random()), json: json.as_bytes().to_vec() }
    }

    #[test]
    fn a_value_is_what_was_packed_and_python_unpacks_it() {
        let id: KeyId = "3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de".parse().unwrap();
        let value = Value { label: Label::key(&id), json: b"{\"protected\":\"eyJlbmMiOiJBMjU2R0NN\"}\n".repeat(20) };
        let packed = value.pack();
        assert_eq!(packed[..4], *b"ca\x01v");
        assert_eq!(packed[4..8], [0x3f, 0x2a, 0x9c, 0x1e]);
        assert!(packed.len() < 100, "{}", packed.len());
        assert_eq!(Value::unpack(&packed).unwrap(), value);
        assert_eq!(value.label.as_key(), Some(id));
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("v"), &packed).unwrap();
        let by_hand = "import zlib; print(zlib.decompress(open('v', 'rb').read()[20:], -15).decode(), end='')";
        let output = std::process::Command::new("python3").args(["-c", by_hand]).current_dir(folder.path()).output();
        assert_eq!(output.unwrap().stdout, value.json);
    }

    #[test]
    fn containers_of_one_tpm_do_not_take_each_others_keys() {
        let [one, two]: [StoreName; 2] = ["one", "two"].map(|name| name.parse().unwrap());
        let epoch = Epoch::FIRST.next();
        let label = Label::container_key(&one, epoch);
        assert_eq!((label.as_container_key(&one), label.as_container_key(&two)), (Some(epoch), None));
        assert_ne!(Label::current(&one), Label::current(&two));
        assert_eq!(Label::current(&one).as_container_key(&one), None);
        let host = "a".parse().unwrap();
        assert_ne!(Label::host_key(&one, &host), Label::host_key(&two, &host));
        assert_eq!(Label::consumers(&KeyId::random()).as_key(), None);
    }

    #[test]
    fn what_is_not_ours_is_told_from_what_was_not_finished() {
        let packed = value("{}").pack();
        assert!(matches!(Head::of(&packed), Head::Whole(_)));
        for empty in [[0xff; 64], [0; 64]] {
            assert_eq!(Head::of(&empty), Head::NotWhole);
        }
        let changed = |at: usize, byte: u8| {
            let mut bytes = packed.clone();
            bytes[at] = byte;
            bytes
        };
        for foreign in [changed(0, b'x'), changed(2, 2), changed(3, b'?'), packed[..19].to_vec(), b"NDEF".repeat(9)] {
            assert_eq!(Head::of(&foreign), Head::Foreign, "{foreign:?}");
            assert!(matches!(Value::unpack(&foreign), Err(MalformedSealedKey::Packed)));
        }
    }

    #[test]
    fn hostile_values_are_refused_within_bounds() {
        let bomb = value(&" ".repeat(MAX_SEALED_BYTES + 1)).pack();
        assert!(bomb.len() < 2048, "it fits an index: {}", bomb.len());
        assert!(matches!(Value::unpack(&bomb), Err(MalformedSealedKey::Packed)));
        let whole = value("{\"generation\":1}").pack();
        for cut in usize::from(HEAD_BYTES)..whole.len() {
            assert!(Value::unpack(&whole[..cut]).is_err(), "{cut}");
        }
        for json in ["", "{}", "[]", "{\"generation\":-1}", "\u{0}"] {
            assert!(value(json).generation().is_err(), "{json}");
        }
    }
}
