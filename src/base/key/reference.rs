//! Key references: where a key is, never what it is.

use std::{fmt, str::FromStr};

use super::{KeyId, ParseKeyIdError, serde_as_str};

/// The name of a store in the configuration, and of the container that its keys belong to.
///
/// 1 to 64 characters of `a-z`, `0-9`, `-` and `_`, not starting with `-`: safe as a file name, a Swift container, a
/// TOML key and a command-line argument.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoreName(String);

impl StoreName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// `STORE/KEY-ID`, for example `cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KeyReference {
    /// The store, as the configuration names it.
    pub store: StoreName,
    pub key: KeyId,
}

/// A text that is not a key reference or a store name.
#[derive(Debug, thiserror::Error)]
pub enum ParseKeyReferenceError {
    /// There is no `/` between store and key id.
    #[error("'{0}' is not a key reference (STORE/KEY-ID)")]
    NoSlash(String),
    /// The part before the slash is not a store name.
    #[error("'{0}' is not a store name (1 to 64 of a-z, 0-9, '-', '_', not starting with '-')")]
    StoreName(String),
    /// The part after the slash is not a key id.
    #[error(transparent)]
    KeyId(#[from] ParseKeyIdError),
}

impl FromStr for StoreName {
    type Err = ParseKeyReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = (1..=64).contains(&text.len())
            && !text.starts_with('-')
            && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'));
        if fits { Ok(Self(text.to_owned())) } else { Err(ParseKeyReferenceError::StoreName(text.to_owned())) }
    }
}

impl FromStr for KeyReference {
    type Err = ParseKeyReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (store, key) = text.split_once('/').ok_or_else(|| ParseKeyReferenceError::NoSlash(text.to_owned()))?;
        Ok(Self { store: store.parse()?, key: KeyId::as_told(key)? })
    }
}

impl fmt::Display for StoreName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for KeyReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.store, self.key)
    }
}

serde_as_str!(StoreName);
serde_as_str!(KeyReference);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_prints() {
        let text = "cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de";
        assert_eq!(text.parse::<KeyReference>().unwrap().to_string(), text);
        for wrong in ["", "cinder", "/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de", "Cinder/x", "a/b/c", "../x/y", "-v/x"] {
            assert!(wrong.parse::<KeyReference>().is_err(), "{wrong}");
        }
    }
}
