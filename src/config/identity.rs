//! What the lists `identities` name: private keys of this host.

use std::{
    convert::Infallible,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Deserializer};

use super::{ConfigPath, paths::resolve};

/// A private key of this host. Its kind is decided here; nobody asks the file what it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IdentitySpec {
    /// `PATH`: a private key in PEM.
    Pem(ConfigPath),
    /// `tpm:PATH`: a key file of this host's TPM.
    Tpm(ConfigPath),
}

/// What names a key file of the TPM.
const TPM: &str = "tpm:";

impl IdentitySpec {
    /// Its file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Pem(path) | Self::Tpm(path) => path,
        }
    }

    /// One of the same kind, whose file is there.
    pub fn at(&self, path: PathBuf) -> Self {
        match self {
            Self::Pem(_) => Self::Pem(path.into()),
            Self::Tpm(_) => Self::Tpm(path.into()),
        }
    }
}

impl FromStr for IdentitySpec {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.strip_prefix(TPM) {
            Some(path) => Self::Tpm(resolve(Path::new(path))),
            None => Self::Pem(resolve(Path::new(text))),
        })
    }
}

/// As the configuration writes it.
impl fmt::Display for IdentitySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = if matches!(self, Self::Tpm(_)) { TPM } else { "" };
        write!(f, "{prefix}{}", self.path().display())
    }
}

impl<'de> Deserialize<'de> for IdentitySpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
