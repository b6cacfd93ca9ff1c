//! What the lists `identities` name: private keys of this host.

use std::{convert::Infallible, fmt, path::Path, str::FromStr};

use serde::{Deserialize, Deserializer};

use super::{
    ConfigPath,
    paths::{CREDENTIAL, resolve},
};

/// `PATH` or `SCHEME:PATH`: a private key of this host. Its kind is decided here, and each kind knows its scheme
/// ([`crate::keys::seal::identities`]); nobody asks the file what it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct IdentitySpec {
    /// Empty for a `PATH`.
    pub scheme: String,
    pub path: ConfigPath,
}

impl IdentitySpec {
    /// A key of this kind in this file.
    pub fn of(scheme: &str, path: impl Into<ConfigPath>) -> Self {
        Self { scheme: scheme.to_owned(), path: path.into() }
    }
}

impl FromStr for IdentitySpec {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        // A path with a colon in its first name starts with './'.
        let is_scheme = |word: &str| word.bytes().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit());
        let (scheme, path) = match text.split_once(':') {
            Some((scheme, path)) if is_scheme(scheme) && !text.starts_with(CREDENTIAL) => (scheme, path),
            _ => ("", text),
        };
        Ok(Self::of(scheme, resolve(Path::new(path))))
    }
}

/// As the configuration writes it.
impl fmt::Display for IdentitySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let colon = if self.scheme.is_empty() { "" } else { ":" };
        write!(f, "{}{colon}{}", self.scheme, self.path.display())
    }
}

impl<'de> Deserialize<'de> for IdentitySpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
