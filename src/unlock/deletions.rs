//! The keys that this host has deleted: an empty file `deleted/STORE/KEY-ID` of the state directory for each. A backup from before
//! has them still, and a restore asks.
//!
//! The name says all, so nothing in such a file can be damaged. It is there before the key goes, for a crash must not forget it.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use crate::{
    base::key::{KeyId, StoreName},
    sys::state::{self, StateError},
};

/// Those of one store.
pub(super) struct Deletions {
    folder: PathBuf,
}

impl Deletions {
    /// Nothing is looked at yet.
    pub fn of(state: &Path, store: &StoreName) -> Self {
        Self { folder: state.join("deleted").join(store.as_str()) }
    }

    /// Remembers that a key goes.
    pub fn note(&self, key: &KeyId) -> Result<(), StateError> {
        state::mark(&self.file(key))
    }

    /// The key is there.
    pub fn take_back(&self, key: &KeyId) -> Result<(), StateError> {
        state::remove(&self.file(key)).map(drop)
    }

    pub fn all(&self) -> Result<BTreeSet<KeyId>, StateError> {
        Ok(state::names(&self.folder)?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn file(&self, key: &KeyId) -> PathBuf {
        self.folder.join(key.to_string())
    }
}
