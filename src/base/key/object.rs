//! Managed objects: keys and passphrases as castellan and Barbican know them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{SecretBytes, SecretMemoryError};

/// What a managed object is (castellan's objects, Barbican's `secret_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectKind {
    /// A symmetric key.
    Symmetric,
    /// A private key, DER.
    Private,
    /// A public key, DER.
    Public,
    /// A certificate, DER.
    Certificate,
    /// A passphrase.
    Passphrase,
    /// Anything.
    Opaque,
}

/// What is known of an object without its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectFacts {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: ObjectKind,
    /// "AES", "RSA", ...
    #[serde(default)]
    pub algorithm: Option<String>,
    /// Length of the key in bits.
    #[serde(default)]
    pub bit_length: Option<u32>,
    /// A name for people.
    #[serde(default)]
    pub name: Option<String>,
    /// Seconds since 1970-01-01 UTC.
    #[serde(default)]
    pub created: Option<u64>,
    /// It was made here or in the store, and nobody got its value since: nothing can have been encrypted with it yet. Only
    /// a mark that is there proves that; a key without it may have been used.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fresh: bool,
    /// The volume of this id was formatted with it to be filled with an image, and nobody else has opened it since: nothing is
    /// on it but what its maker writes again from the beginning if the first time fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filling: Option<String>,
}

/// A key or passphrase that another program made use of before, or will: Cinder's volume keys are such.
pub struct ManagedObject {
    pub facts: ObjectFacts,
    pub value: SecretBytes,
}

impl ManagedObject {
    /// The passphrase that os-brick makes of it: its bytes in lower-case hexadecimal, unless it is a passphrase itself
    /// (`os_brick.utils.get_passphrase_from_secret`).
    pub fn passphrase(&self) -> Result<SecretBytes, SecretMemoryError> {
        match self.facts.kind {
            ObjectKind::Passphrase => SecretBytes::copy_of(self.value.expose()),
            _ => hex(&self.value),
        }
    }
}

/// Bytes in lower-case hexadecimal.
pub fn hex(bytes: &SecretBytes) -> Result<SecretBytes, SecretMemoryError> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = SecretBytes::zeroed(bytes.len() * 2)?;
    for (byte, digits) in bytes.expose().iter().zip(text.expose_mut().chunks_exact_mut(2)) {
        digits[0] = DIGITS[usize::from(byte >> 4)];
        digits[1] = DIGITS[usize::from(byte & 15)];
    }
    Ok(text)
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Symmetric => "symmetric",
            Self::Private => "private",
            Self::Public => "public",
            Self::Certificate => "certificate",
            Self::Passphrase => "passphrase",
            Self::Opaque => "opaque",
        })
    }
}

#[cfg(test)]
impl ObjectFacts {
    /// A symmetric key of so many bits, for tests.
    pub fn symmetric(bit_length: u32) -> Self {
        Self {
            kind: ObjectKind::Symmetric,
            algorithm: Some("AES".to_owned()),
            bit_length: Some(bit_length),
            name: None,
            created: None,
            fresh: false,
            filling: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn computes_the_passphrase_as_os_brick_does() {
        let object = |kind, value: &[u8]| {
            let facts = ObjectFacts { kind, algorithm: None, ..ObjectFacts::symmetric(256) };
            ManagedObject { facts, value: SecretBytes::copy_of(value).unwrap() }
        };
        assert_eq!(object(ObjectKind::Symmetric, &[0, 0x1f, 0xab]).passphrase().unwrap().expose(), b"001fab");
        assert_eq!(object(ObjectKind::Opaque, &[0xff]).passphrase().unwrap().expose(), b"ff");
        assert_eq!(object(ObjectKind::Passphrase, b"correct horse").passphrase().unwrap().expose(), b"correct horse");
    }
}
