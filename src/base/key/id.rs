//! Key ids: random names for keys, unrelated to the volumes that they open.

use std::{fmt, str::FromStr};

use super::serde_as_str;
use uuid::{Uuid, Variant, Version};

/// The name of one volume key for ever: a random (version 4) UUID in lower case, 36 characters.
///
/// This is the one form that fits Cinder's `encryption_key_id`, Barbican's secret ids, Swift object names and file
/// names alike. It is random so that a store's listing says nothing about volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(Uuid);

impl KeyId {
    /// A new random id.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// The id that people and programs tell in other ways: in upper case, or as Barbican's whole reference of a secret, whose
    /// host and path say nothing of the key.
    pub fn as_told(text: &str) -> Result<Self, ParseKeyIdError> {
        let id = text.rsplit_once("/secrets/").map_or(text, |(_, id)| id);
        id.to_ascii_lowercase().parse().map_err(|_| ParseKeyIdError(text.to_owned()))
    }
}

/// A text that is not a key id.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not a key id (a random UUID, version 4)")]
pub struct ParseKeyIdError(String);

impl FromStr for KeyId {
    type Err = ParseKeyIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Exactly one spelling per key: upper case, braces or missing hyphens would name a second file or object.
        Uuid::try_parse(text)
            .ok()
            .filter(|id| id.get_version() == Some(Version::Random))
            .filter(|id| id.get_variant() == Variant::RFC4122)
            .filter(|id| id.hyphenated().to_string() == text)
            .map(Self)
            .ok_or_else(|| ParseKeyIdError(text.to_owned()))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

serde_as_str!(KeyId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_exactly_one_spelling() {
        let id = KeyId::random();
        assert_eq!(id.to_string().parse::<KeyId>().unwrap(), id);
        assert_eq!(id.to_string().len(), 36);
        for wrong in [
            "",
            "3F2A9C1E-0000-4000-8000-000000000000",
            "{3f2a9c1e-0000-4000-8000-000000000000}",
            "3f2a9c1e000040008000000000000000",
            "3f2a9c1e-0000-1000-8000-000000000000",
            "../../etc/passwd",
        ] {
            assert!(wrong.parse::<KeyId>().is_err(), "{wrong}");
        }
    }
}
