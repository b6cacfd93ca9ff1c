//! A backup as a store: whatever reads a container reads a backup of it in the same way. Nothing writes to it.

use std::{path::PathBuf, sync::Arc};

use super::{file::BackupFile, slot::Slot};
use crate::{
    base::key::{Consumer, Epoch, HostName, KeyId, Place, SealedKey},
    keys::store::{Consumers, ContainerKeys, Current, HostKeys, KeyStore, StoreError, Stored},
};

pub struct BackupStore {
    pub path: PathBuf,
    pub file: Arc<BackupFile>,
}

impl BackupStore {
    fn at(&self) -> String {
        format!("the backup {}", self.path.display())
    }

    fn sealed(&self, slot: &Slot) -> Result<SealedKey, StoreError> {
        self.file.sealed(slot).ok_or_else(|| StoreError::NotFound { id: slot.to_string(), at: self.at() })
    }

    fn names<T>(&self, of: impl Fn(&Slot) -> Option<T>) -> Vec<T> {
        self.file.slots().filter_map(of).collect()
    }

    fn fixed<T>(&self) -> Result<T, StoreError> {
        let what = "a backup is only read".to_owned();
        Err(StoreError::Answer { action: "write to", at: self.at(), what })
    }
}

impl KeyStore for BackupStore {
    fn get(&self, id: &KeyId) -> Result<Stored, StoreError> {
        self.sealed(&Slot::Key(*id)).map(Stored::Sealed)
    }

    fn create(&self, _: &KeyId, _: &SealedKey) -> Result<(), StoreError> {
        self.fixed()
    }

    fn reseal(&self, _: &KeyId, _: &SealedKey) -> Result<(), StoreError> {
        self.fixed()
    }

    fn delete(&self, _: &KeyId) -> Result<(), StoreError> {
        self.fixed()
    }

    fn list(&self) -> Result<Vec<KeyId>, StoreError> {
        Ok(self.names(|slot| if let Slot::Key(id) = slot { Some(*id) } else { None }))
    }

    fn places(&self, _: &KeyId) -> Result<Vec<Place>, StoreError> {
        Ok(vec![Place::path("backup", &self.path, true)])
    }

    fn container_keys(&self) -> Option<&dyn ContainerKeys> {
        Some(self)
    }

    fn host_keys(&self) -> Option<&dyn HostKeys> {
        Some(self)
    }
}

impl Consumers for BackupStore {
    fn consumers(&self, id: &KeyId) -> Result<Vec<Consumer>, StoreError> {
        Ok(self.file.consumers(id))
    }

    fn add_consumer(&self, _: &KeyId, _: &Consumer) -> Result<(), StoreError> {
        self.fixed()
    }

    fn remove_consumer(&self, _: &KeyId, _: &Consumer) -> Result<(), StoreError> {
        self.fixed()
    }
}

impl ContainerKeys for BackupStore {
    fn current(&self) -> Result<Option<Current>, StoreError> {
        Ok(Some(self.file.head.current()))
    }

    fn set_current(&self, _: &Current, _: &str) -> Result<(), StoreError> {
        self.fixed()
    }

    fn get(&self, epoch: Epoch) -> Result<SealedKey, StoreError> {
        self.sealed(&Slot::ContainerKey(epoch))
    }

    fn create(&self, _: Epoch, _: &SealedKey) -> Result<(), StoreError> {
        self.fixed()
    }

    fn reseal(&self, _: Epoch, _: &SealedKey) -> Result<(), StoreError> {
        self.fixed()
    }

    fn delete(&self, _: Epoch) -> Result<(), StoreError> {
        self.fixed()
    }

    fn epochs(&self) -> Result<Vec<Epoch>, StoreError> {
        Ok(self.names(|slot| if let Slot::ContainerKey(epoch) = slot { Some(*epoch) } else { None }))
    }
}

impl HostKeys for BackupStore {
    fn get(&self, host: &HostName) -> Result<SealedKey, StoreError> {
        self.sealed(&Slot::Host(host.clone()))
    }

    fn create(&self, _: &HostName, _: &SealedKey) -> Result<(), StoreError> {
        self.fixed()
    }

    fn replace(&self, _: &HostName, _: &SealedKey) -> Result<(), StoreError> {
        self.fixed()
    }

    fn delete(&self, _: &HostName) -> Result<(), StoreError> {
        self.fixed()
    }

    fn hosts(&self) -> Result<Vec<HostName>, StoreError> {
        Ok(self.names(|slot| if let Slot::Host(host) = slot { Some(host.clone()) } else { None }))
    }
}
