//! Hosts that are admitted to a container: container keys are sealed to them as well.
//!
//! Which hosts, the container key itself says, in the part that is authenticated with it; so a store can neither add one nor,
//! but by giving an older form, leave one out. A host that is removed knows the keys that it has opened. What keeps it out is
//! the next key.

use std::sync::PoisonError;

use super::{Container, Progress, Rotation, TrustError, rotation::KEEP};
use crate::{
    base::{
        clock::now,
        key::{Epoch, HostName},
    },
    config::LeafName,
    keys::{
        seal::{self, ContainerKey, OwnerRecipient, Recipient},
        store::{HostKeys, Letters, StoreError},
    },
    unlock::Error,
};

impl Container {
    /// The lockbox keys of hosts that this container's store keeps.
    pub fn host_keys(&self) -> Result<&dyn HostKeys, Error> {
        let unsupported = || crate::unlock::lockbox::LockboxError::Unsupported(self.name.clone());
        Ok(self.store.host_keys().ok_or_else(unsupported)?)
    }

    /// Where hosts that ask to join and their administrator leave letters for each other.
    pub fn letters(&self) -> Result<&dyn Letters, Error> {
        let unsupported = || crate::unlock::lockbox::LockboxError::NoLetters(self.name.clone());
        Ok(self.host_keys()?.letters().ok_or_else(unsupported)?)
    }

    /// Whom a host's lockbox key is sealed to besides its own identity.
    pub fn escrow(&self) -> Result<Vec<Box<dyn Recipient>>, Error> {
        Ok(seal::recipients(&self.sealing.escrow)?)
    }

    /// The hosts that are admitted, as the current container key says.
    pub fn hosts(&self) -> Result<Vec<HostName>, Error> {
        Ok(self.current_key()?.hosts().cloned().collect())
    }

    /// Admits a host: seals the container keys to it as well. `recipient` is that of its lockbox key.
    pub fn admit_host(&self, host: &HostName, recipient: &OwnerRecipient) -> Result<(), Error> {
        if !self.sealing.policy.names(LeafName::HOSTS) {
            return Err(Error::NoHostsInPolicy { container: self.name.clone(), policy: self.sealing.policy.clone() });
        }
        let current = self.current_key()?;
        // Keys may still be sealed under the key before the current one.
        if let Some(before) = current.epoch().before() {
            match self.container_key(before) {
                Ok(previous) if current.follows(&previous)? => {
                    self.reseal_key(&previous.with_host(host, recipient)?)?
                }
                Ok(previous) => return Err(TrustError::Unproven(self.key_id(previous.epoch().next())).into()),
                Err(Error::Store(StoreError::NotFound { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        self.reseal_key(&current.with_host(host, recipient)?)?;
        // A rotation that began meanwhile has left the host out.
        match self.current_key()?.epoch() == current.epoch() {
            true => Ok(()),
            false => self.admit_host(host, recipient),
        }
    }

    /// Removes a host: the next container key is not sealed to it, and all keys are sealed anew under that. If some could
    /// not be ([`Rotation::failed`]), it is to be called again. Each call makes a new key: whom the current one is for, the host
    /// itself may have written.
    pub fn remove_host(&self, host: &HostName, progress: &Progress<'_>) -> Result<Rotation, Error> {
        self.rotate_without(Some(host), KEEP, progress)
    }

    /// Replaces a container key by its form for other hosts.
    pub(super) fn reseal_key(&self, key: &ContainerKey) -> Result<(), Error> {
        let epoch: Epoch = key.epoch();
        let sealed = key.seal_to(self.key_recipients(key)?, now())?;
        let keys = self.container_keys()?;
        self.has_not_made(epoch)?;
        keys.reseal(epoch, &sealed)?;
        // What is open here is what the store has.
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).remove(&epoch);
        let stored = self.container_key(epoch)?;
        match stored.fingerprint()? == key.fingerprint()? && stored.hosts().eq(key.hosts()) {
            true => Ok(()),
            false => Err(StoreError::Outdated { id: self.key_id(epoch).to_string(), generation: 0 }.into()),
        }
    }
}
