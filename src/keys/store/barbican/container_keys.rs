//! Container keys in Barbican: ordinary secrets of one name, told apart by user metadata. They belong to the user that the
//! configuration logs in as, also where keys are stored and fetched as the caller of a hook.

use serde_json::{Map, Value};

use super::{Barbican, secrets::PayloadType};
use crate::{
    base::key::{Epoch, KeyId, SealedKey},
    keys::store::{ContainerKeys, Current, Facts, StoreError},
};

/// User metadata: the number of a container key.
const EPOCH: &str = "cryptattach-epoch";
/// User metadata: it is the current one; and what it says then.
const STATE: &str = "cryptattach-state";
const CURRENT: &str = "current";
const ROTATING: &str = "rotating";
/// User metadata: what people compare.
const FINGERPRINT: &str = "cryptattach-fingerprint";

/// A container key's secret.
struct Found {
    epoch: Epoch,
    id: KeyId,
    metadata: Map<String, Value>,
}

impl Found {
    fn text(&self, name: &str) -> Option<&str> {
        self.metadata.get(name)?.as_str()
    }

    /// The secret of its re-sealed form, if it has one.
    fn resealed(&self) -> Option<KeyId> {
        self.text(super::CURRENT)?.parse().ok()
    }
}

impl Barbican {
    fn name_of_container_keys(&self) -> String {
        format!("cryptattach container key of {}", self.container)
    }

    /// All container keys, in order.
    fn found(&self) -> Result<Vec<Found>, StoreError> {
        let mut found = Vec::new();
        for id in self.secrets(Some(&self.name_of_container_keys()), |_| true)? {
            let metadata = self.metadata(&id)?;
            let epoch = metadata.get(EPOCH).and_then(Value::as_str).and_then(|text| text.parse().ok());
            found.extend(epoch.map(|epoch| Found { epoch, id, metadata }));
        }
        found.sort_unstable_by_key(|found| found.epoch);
        Ok(found)
    }

    fn find_epoch(&self, epoch: Epoch) -> Result<Found, StoreError> {
        let mut found = self.found()?.into_iter().filter(|found| found.epoch == epoch);
        found.next().ok_or_else(|| StoreError::NotFound { id: format!("kek/{epoch}"), at: self.to_string() })
    }

    /// The form that counts.
    fn form(&self, found: &Found) -> Result<SealedKey, StoreError> {
        let bytes = self.payload(&found.resealed().unwrap_or(found.id), PayloadType::Bytes)?;
        let malformed = |source| StoreError::Malformed { what: format!("{self}/kek/{}", found.epoch), source };
        SealedKey::from_json(bytes.expose()).map_err(malformed)
    }

    fn current_found(&self) -> Result<Option<Found>, StoreError> {
        Ok(self.found()?.into_iter().rfind(|found| found.text(STATE).is_some()))
    }

    /// What it says of its container keys.
    pub(super) fn facts_of_container(&self) -> Result<Facts, StoreError> {
        let current = self.current_found()?;
        Ok(Facts {
            own: Map::new(),
            lines: vec![("store", self.to_string())],
            epoch: current.as_ref().map(|found| Value::from(found.epoch.to_string())),
            rotating: current.as_ref().is_some_and(|found| found.text(STATE) == Some(ROTATING)),
            fingerprint: current.and_then(|found| found.text(FINGERPRINT).map(str::to_owned)),
        })
    }
}

impl ContainerKeys for Barbican {
    fn current(&self) -> Result<Option<Current>, StoreError> {
        let current = self.current_found()?;
        Ok(current.map(|found| Current { epoch: found.epoch, rotating: found.text(STATE) == Some(ROTATING) }))
    }

    fn set_current(&self, current: &Current, fingerprint: &str) -> Result<(), StoreError> {
        let found = self.found()?;
        let state = if current.rotating { ROTATING } else { CURRENT };
        for Found { id, epoch, mut metadata } in found.into_iter().rev() {
            let before = metadata.clone();
            if epoch == current.epoch {
                metadata.insert(STATE.to_owned(), state.into());
                metadata.insert(FINGERPRINT.to_owned(), fingerprint.into());
            } else {
                metadata.remove(STATE);
            }
            if metadata != before {
                self.put_metadata(&id, &metadata)?;
            }
        }
        Ok(())
    }

    fn get(&self, epoch: Epoch) -> Result<SealedKey, StoreError> {
        self.form(&self.find_epoch(epoch)?)
    }

    fn create(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError> {
        let exists = || StoreError::Exists { id: format!("kek/{epoch}"), at: self.to_string() };
        let taken = |but: Option<KeyId>| -> Result<bool, StoreError> {
            Ok(self.found()?.iter().any(|found| found.epoch == epoch && Some(found.id) != but))
        };
        if taken(None)? {
            return Err(exists());
        }
        let id = self.begin(&self.name_of_container_keys())?;
        let stored = self.fill(&id, key).and_then(|()| self.set_metadata(&id, EPOCH, &epoch.to_string()));
        // Barbican does not refuse a second secret of one name. Each looks for the other after its own is there; so of two
        // that store at the same time at most one stays.
        let stored = stored.and_then(|()| if taken(Some(id))? { Err(exists()) } else { Ok(()) });
        stored.inspect_err(|_| self.abandon_secret(&id))
    }

    fn reseal(&self, epoch: Epoch, key: &SealedKey) -> Result<(), StoreError> {
        let found = self.find_epoch(epoch)?;
        self.replace(&found.id, &self.form(&found)?, found.resealed(), key)
    }

    fn delete(&self, epoch: Epoch) -> Result<(), StoreError> {
        let found = self.find_epoch(epoch)?;
        if let Some(form) = found.resealed() {
            self.delete_secret(&form)?;
        }
        self.delete_secret(&found.id).map(drop)
    }

    fn epochs(&self) -> Result<Vec<Epoch>, StoreError> {
        Ok(self.found()?.into_iter().map(|found| found.epoch).collect())
    }
}
