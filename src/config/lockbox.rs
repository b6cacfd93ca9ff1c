//! `[lockbox]`: this host's cache of keys, and what opens it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Deserializer, de};

use super::{Location, StoreConfig, stores::identity_place};
use crate::base::key::{HostName, Place, StoreName};

/// `[lockbox]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockboxConfig {
    /// The name under which this host is admitted.
    pub host: HostName,
    /// The store that keeps this host's lockbox key, sealed.
    pub store: StoreName,
    /// This host's private keys (PEM) that open the lockbox key; those of the store unless given.
    #[serde(default)]
    pub identities: Vec<PathBuf>,
    /// Directory for the entries.
    #[serde(default = "path")]
    pub path: PathBuf,
    /// How long an entry is used, in hours.
    #[serde(default = "lifetime", rename = "lifetime_hours", deserialize_with = "hours")]
    pub lifetime: Duration,
    /// Keep a copy of the sealed lockbox key on this host, for boots without the store.
    #[serde(default)]
    pub offline: bool,
}

fn path() -> PathBuf {
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
    /// The files that it names.
    pub(super) fn files(&mut self) -> Vec<&mut PathBuf> {
        self.identities.iter_mut().chain([&mut self.path]).collect()
    }

    /// The copy of the sealed lockbox key for boots without the store; `state` is the state directory.
    pub fn offline_copy(&self, state: &Path) -> PathBuf {
        state.join("host").join(format!("{}.jwe", self.host))
    }

    /// Where this host keeps what the lockbox has and what opens it. `store` has the sealed lockbox key, if that is not the store
    /// of the key itself, whose places are told already; if it is a directory, it is a place of this host.
    pub fn places(&self, state: &Path, store: Option<&StoreConfig>) -> Vec<Place> {
        let of_store = store.map(|store| store.sealing.identities.as_slice()).unwrap_or_default();
        let identities = if self.identities.is_empty() { of_store } else { &self.identities };
        let identities = identities.iter().map(|path| identity_place(path));
        let copy = self.offline.then(|| Place::path("sealed lockbox key", self.offline_copy(state), true));
        let sealed = match store.map(|store| &store.location) {
            Some(Location::Directory { path }) => Some(Place::path("sealed lockbox key", path, true)),
            _ => None,
        };
        let entries = Place::path("lockbox entries", &self.path, true);
        [entries].into_iter().chain(copy).chain(sealed).chain(identities).collect()
    }
}
