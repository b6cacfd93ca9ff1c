//! `[lockbox]`: this host's cache of keys, and what opens it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Deserializer, de};

use super::{ConfigPath, IdentitySpec};
use crate::base::key::{HostName, StoreName};

/// `[lockbox]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockboxConfig {
    /// The name under which this host is admitted.
    pub host: HostName,
    /// The store that keeps this host's lockbox key, sealed.
    pub store: StoreName,
    /// This host's private keys that open the lockbox key; those of the store unless given.
    #[serde(default)]
    pub identities: Vec<IdentitySpec>,
    /// Directory for the entries.
    #[serde(default = "path")]
    pub path: ConfigPath,
    /// How long an entry is used, in hours.
    #[serde(default = "lifetime", rename = "lifetime_hours", deserialize_with = "hours")]
    pub lifetime: Duration,
    /// Keep a copy of the sealed lockbox key on this host, for boots without the store.
    #[serde(default)]
    pub offline: bool,
    /// Keep keys of containers, too, whose policy takes more than this host.
    #[serde(default)]
    pub weaker: bool,
}

fn path() -> ConfigPath {
    "/var/lib/cryptattach/lockbox".into()
}

fn lifetime() -> Duration {
    Duration::from_secs(24 * 60 * 60)
}

fn hours<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let hours = f64::deserialize(deserializer)?;
    // A year: who wants keys on the host for longer than that, wants no lockbox.
    let fits = hours > 0.0 && hours <= 8760.0;
    if fits { Ok(Duration::from_secs_f64(hours * 3600.0)) } else { Err(de::Error::custom("more than 0, at most 8760")) }
}

impl LockboxConfig {
    /// The copy of the sealed lockbox key for boots without the store; `state` is the state directory.
    pub fn offline_copy(&self, state: &Path) -> PathBuf {
        state.join("host").join(format!("{}.jwe", self.host))
    }
}
