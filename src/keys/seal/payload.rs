//! What is sealed: a volume key with what a header must agree with before it is used, or a managed object.
//!
//! The JSON is written into and read from secret memory in place: neither serde nor base64 gets a buffer of its own.

use std::io::{self, Write};

use base64ct::{Base64UrlUnpadded, Encoding};
use serde::{Deserialize, Serialize, Serializer, ser};

use super::SealError;
use crate::base::key::{KeyReference, KeySize, ManagedObject, ObjectFacts, SecretBytes, VolumeKey};

/// The content of a sealed key.
pub enum Content {
    /// A volume key of ours.
    VolumeKey(Payload),
    /// A key or passphrase of another program's.
    Object(ManagedObject),
}

/// A volume key and what belongs to it.
pub struct Payload {
    pub volume_key: VolumeKey,
    /// Cipher in dm-crypt's notation.
    pub cipher: String,
    /// Encryption sector size in bytes.
    pub sector_size_bytes: u32,
    /// Where the data begins on its device.
    pub data_offset_bytes: u64,
    /// Added to the sector number for the tweak, in units of 512 bytes; 0 for LUKS.
    pub iv_offset_sectors: u64,
    /// The header's digest of the volume key.
    pub digest: Option<String>,
    /// The passphrase of the one keyslot: 64 lower-case hexadecimal digits.
    pub passphrase: Option<SecretBytes>,
    /// The one that takes its place, from before a keyslot has it until it is proved to open that.
    pub passphrase_next: Option<SecretBytes>,
    /// The key that the volume had before its key was rotated: who has pinned that one may take this one for it.
    pub replaces: Option<KeyReference>,
}

impl Content {
    /// Whether both are the same key, whatever else is said of it.
    pub fn is_same_key(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::VolumeKey(one), Self::VolumeKey(other)) => one.volume_key == other.volume_key,
            (Self::Object(one), Self::Object(other)) => one.value == other.value,
            _ => false,
        }
    }
}

impl Payload {
    /// Whether both say the same, to the last member.
    pub fn is(&self, other: &Self) -> Result<bool, SealError> {
        Ok(self.to_json()? == other.to_json()?)
    }
}

#[cfg(test)]
impl Payload {
    /// With a random key and nothing special, for tests.
    pub fn random() -> Self {
        Self {
            volume_key: VolumeKey::random(KeySize::Bits512).unwrap(),
            cipher: "aes-xts-plain64".to_owned(),
            sector_size_bytes: 512,
            data_offset_bytes: 0,
            iv_offset_sectors: 0,
            digest: None,
            passphrase: None,
            passphrase_next: None,
            replaces: None,
        }
    }
}

/// Larger payloads are not ours: a key, a passphrase and a few numbers fit easily.
const MOST_JSON_BYTES: usize = 4096;

#[derive(Serialize)]
struct Written<'a> {
    volume_key: Base64<'a>,
    cipher: &'a str,
    key_size_bits: u32,
    sector_size_bytes: u32,
    data_offset_bytes: u64,
    iv_offset_sectors: u64,
    digest: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    passphrase: Option<Text<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    passphrase_next: Option<Text<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replaces: Option<&'a KeyReference>,
}

/// Members that are not known are let pass: later versions may add some.
#[derive(Deserialize)]
struct Read<'a> {
    /// Borrowed from the secret memory that the JSON is in. A text with escapes cannot be borrowed and is refused.
    volume_key: &'a str,
    cipher: String,
    key_size_bits: u32,
    sector_size_bytes: u32,
    #[serde(default)]
    data_offset_bytes: u64,
    #[serde(default)]
    iv_offset_sectors: u64,
    digest: Option<String>,
    passphrase: Option<&'a str>,
    #[serde(default)]
    passphrase_next: Option<&'a str>,
    #[serde(default)]
    replaces: Option<KeyReference>,
}

#[derive(Serialize)]
struct WrittenObject<'a> {
    object: &'a ObjectFacts,
    value: Base64<'a>,
}

#[derive(Deserialize)]
struct ReadObject<'a> {
    object: ObjectFacts,
    #[serde(borrow)]
    value: &'a str,
}

/// Which of the two it is; what is not known is let pass, and the secrets are not copied.
#[derive(Deserialize)]
struct Which {
    #[serde(default)]
    object: Option<serde::de::IgnoredAny>,
}

/// Bytes as base64url text.
pub(super) struct Base64<'a>(pub &'a SecretBytes);
struct Text<'a>(&'a SecretBytes);

impl Serialize for Base64<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes = self.0.expose();
        let mut text = SecretBytes::zeroed(Base64UrlUnpadded::encoded_len(bytes)).map_err(ser::Error::custom)?;
        let text = Base64UrlUnpadded::encode(bytes, text.expose_mut()).map_err(ser::Error::custom)?;
        serializer.serialize_str(text)
    }
}

impl Serialize for Text<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(std::str::from_utf8(self.0.expose()).map_err(ser::Error::custom)?)
    }
}

/// Writes into secret memory of a fixed size.
struct Into<'a> {
    secret: &'a mut SecretBytes,
    len: usize,
}

impl Write for Into<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let end = self.len + bytes.len();
        let room = self.secret.expose_mut().get_mut(self.len..end).ok_or(io::ErrorKind::WriteZero)?;
        room.copy_from_slice(bytes);
        self.len = end;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Payload {
    /// The payload as JSON.
    pub(super) fn to_json(&self) -> Result<SecretBytes, SealError> {
        let written = Written {
            volume_key: Base64(self.volume_key.secret()),
            cipher: &self.cipher,
            key_size_bits: self.volume_key.size().bits(),
            sector_size_bytes: self.sector_size_bytes,
            data_offset_bytes: self.data_offset_bytes,
            iv_offset_sectors: self.iv_offset_sectors,
            digest: self.digest.as_deref(),
            passphrase: self.passphrase.as_ref().map(Text),
            passphrase_next: self.passphrase_next.as_ref().map(Text),
            replaces: self.replaces.as_ref(),
        };
        write_json(&written, MOST_JSON_BYTES)
    }

    /// Reads the JSON.
    pub(super) fn from_json(json: &SecretBytes) -> Result<Self, SealError> {
        let read: Read<'_> = read_json(json)?;
        let volume_key = decode(read.volume_key)?
            .filter(|key| KeySize::from_bits(read.key_size_bits) == Some(key.size()))
            .ok_or_else(|| SealError::Payload(format!("expected a key of {} bits", read.key_size_bits)))?;
        let text = |text: &str| SecretBytes::copy_of(text.as_bytes());
        Ok(Self {
            volume_key,
            cipher: read.cipher,
            sector_size_bytes: read.sector_size_bytes,
            data_offset_bytes: read.data_offset_bytes,
            iv_offset_sectors: read.iv_offset_sectors,
            digest: read.digest,
            passphrase: read.passphrase.map(text).transpose()?,
            passphrase_next: read.passphrase_next.map(text).transpose()?,
            replaces: read.replaces,
        })
    }
}

impl Content {
    /// The content as JSON.
    pub fn to_json(&self) -> Result<SecretBytes, SealError> {
        match self {
            Self::VolumeKey(payload) => payload.to_json(),
            Self::Object(object) => {
                let room = MOST_JSON_BYTES + 2 * object.value.len();
                write_json(&WrittenObject { object: &object.facts, value: Base64(&object.value) }, room)
            }
        }
    }

    /// Reads the JSON.
    pub fn from_json(json: &SecretBytes) -> Result<Self, SealError> {
        if read_json::<Which>(json)?.object.is_none() {
            return Payload::from_json(json).map(Self::VolumeKey);
        }
        let read: ReadObject<'_> = read_json(json)?;
        let value = decode_bytes(read.value)?.ok_or_else(|| SealError::Payload("not base64url".to_owned()))?;
        Ok(Self::Object(ManagedObject { facts: read.object, value }))
    }
}

/// A value as JSON, in secret memory.
pub(super) fn write_json(value: &impl Serialize, room: usize) -> Result<SecretBytes, SealError> {
    let mut secret = SecretBytes::zeroed(room)?;
    let mut into = Into { secret: &mut secret, len: 0 };
    serde_json::to_writer(&mut into, value).map_err(|error| SealError::Payload(error.to_string()))?;
    let len = into.len;
    secret.truncate(len);
    Ok(secret)
}

/// A value out of JSON; what it borrows stays in the secret memory.
pub(super) fn read_json<'a, T: Deserialize<'a>>(json: &'a SecretBytes) -> Result<T, SealError> {
    // serde_json's messages quote what they do not expect, which may be the key.
    serde_json::from_slice(json.expose())
        .map_err(|error| SealError::Payload(format!("line {} column {}", error.line(), error.column())))
}

/// Base64url text as bytes, in secret memory; `None` if the text is not base64url.
pub(super) fn decode_bytes(text: &str) -> Result<Option<SecretBytes>, SealError> {
    let mut bytes = SecretBytes::zeroed(text.len())?;
    let Ok(decoded) = Base64UrlUnpadded::decode(text, bytes.expose_mut()) else { return Ok(None) };
    let len = decoded.len();
    bytes.truncate(len);
    Ok(Some(bytes))
}

fn decode(text: &str) -> Result<Option<VolumeKey>, SealError> {
    Ok(decode_bytes(text)?.and_then(VolumeKey::from_secret))
}
