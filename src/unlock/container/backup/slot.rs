//! What a container keeps sealed: container keys, lockbox keys and keys are read, written and removed alike.

use std::fmt;

use crate::{
    base::key::{Epoch, HostName, KeyId, SealedKey},
    keys::store::{ContainerKeys, HostKeys, KeyStore, StoreError, Stored},
};

/// The place of a sealed object in a store.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    ContainerKey(Epoch),
    /// A host's lockbox key.
    Host(HostName),
    Key(KeyId),
}

impl Slot {
    /// All that a store has. Keys come first: what they are sealed under may only have come since.
    pub fn all(store: &dyn KeyStore) -> Result<Vec<Self>, StoreError> {
        let mut all: Vec<_> = store.list()?.into_iter().map(Self::Key).collect();
        let epochs = store.container_keys().map_or_else(|| Ok(Vec::new()), ContainerKeys::epochs)?;
        all.extend(epochs.into_iter().map(Self::ContainerKey));
        let hosts = store.host_keys().map_or_else(|| Ok(Vec::new()), HostKeys::hosts)?;
        all.extend(hosts.into_iter().map(Self::Host));
        Ok(all)
    }

    pub fn get(&self, store: &dyn KeyStore) -> Result<Stored, StoreError> {
        match self {
            Self::ContainerKey(epoch) => self.part(store.container_keys())?.get(*epoch).map(Stored::Sealed),
            Self::Host(host) => self.part(store.host_keys())?.get(host).map(Stored::Sealed),
            Self::Key(id) => store.get(id),
        }
    }

    pub fn create(&self, store: &dyn KeyStore, key: &SealedKey) -> Result<(), StoreError> {
        match self {
            Self::ContainerKey(epoch) => self.part(store.container_keys())?.create(*epoch, key),
            Self::Host(host) => self.part(store.host_keys())?.create(host, key),
            Self::Key(id) => store.create(id, key),
        }
    }

    pub fn delete(&self, store: &dyn KeyStore) -> Result<(), StoreError> {
        match self {
            Self::ContainerKey(epoch) => self.part(store.container_keys())?.delete(*epoch),
            Self::Host(host) => self.part(store.host_keys())?.delete(host),
            Self::Key(id) => store.delete(id),
        }
    }

    /// A kind of store that has no such part holds none of it.
    fn part<'a, T: ?Sized>(&self, part: Option<&'a T>) -> Result<&'a T, StoreError> {
        let at = || "a store of this kind, which keeps none".to_owned();
        part.ok_or_else(|| StoreError::NotFound { id: self.to_string(), at: at() })
    }
}

/// For people.
impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ContainerKey(epoch) => write!(f, "container key {epoch}"),
            Self::Host(host) => write!(f, "lockbox key of host {host}"),
            Self::Key(key) => write!(f, "key {key}"),
        }
    }
}
