//! Names of TPM entities (TPM 2.0 Part 1, section 16), and digests in hexadecimal.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::esys::SHA256;
use crate::base::hex;

/// A name: the hash algorithm, always SHA-256, and the digest of the public area.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name([u8; Self::BYTES]);

impl Name {
    const BYTES: usize = 34;

    /// Of a marshalled public area.
    pub fn of(public_area: &[u8]) -> Self {
        let mut name = [0; Self::BYTES];
        name[..2].copy_from_slice(&SHA256.to_be_bytes());
        name[2..].copy_from_slice(&openssl::sha::sha256(public_area));
        Self(name)
    }

    /// A name as the TPM gives it; `None` if it is none under SHA-256.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let name: [u8; Self::BYTES] = bytes.try_into().ok()?;
        (name[..2] == SHA256.to_be_bytes()).then_some(Self(name))
    }

    /// The name as the TPM has it.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// That is no name.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not the name of a TPM key (000b and 64 hexadecimal digits)")]
pub struct ParseNameError(String);

impl FromStr for Name {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, ParseNameError> {
        let name = hex::decode(text).as_deref().and_then(Self::from_bytes);
        name.ok_or_else(|| ParseNameError(text.to_owned()))
    }
}

impl TryFrom<String> for Name {
    type Error = ParseNameError;

    fn try_from(text: String) -> Result<Self, ParseNameError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.to_string()
    }
}
