//! Rotation: the next container key, and all keys sealed anew under it.
//!
//! It can be stopped at any point and started again: the container says that a rotation is under way until it is finished.
//! The keys before the current one stay for a while: another host may just have sealed a key under one of them, and a store
//! like Swift may list a key only days after it was written.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{Author, Container, Progress, Step, TrustError, each::for_each, lock};
use crate::{
    base::{
        chain::chain,
        clock::now,
        key::{ContainerKeyId, Epoch, HostName, KeyId},
    },
    keys::{
        seal::{ContainerKey, For},
        store::{ContainerKeys, Current, StoreError, Stored},
    },
    unlock::Error,
};

/// How long a container key stays after its successor was made: Swift lists a key late by its reclaim age at most.
pub const KEEP: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a rotation has done.
#[derive(Debug, serde::Serialize)]
pub struct Rotation {
    /// The container key that all keys are sealed under now.
    pub epoch: Epoch,
    pub fingerprint: String,
    /// How many keys were sealed anew.
    pub resealed: usize,
    /// How many were sealed under it already.
    pub unchanged: usize,
    /// The keys that could not be sealed anew, and why.
    pub failed: Vec<(KeyId, String)>,
    /// What is no key of this container's, for nobody who holds a container key made it. It stays as it is.
    pub left_alone: Vec<KeyId>,
    /// The container keys that were deleted.
    pub deleted: Vec<Epoch>,
}

impl Container {
    pub(super) fn container_keys(&self) -> Result<&dyn ContainerKeys, Error> {
        self.store.container_keys().ok_or_else(|| Error::NoContainerKeys(self.name.clone()))
    }

    /// Asks the store for as little as it has to know.
    pub fn is_there(&self) -> Result<(), Error> {
        match self.store.container_keys() {
            Some(keys) => drop(keys.current()?),
            None => drop(self.store.list()?),
        }
        Ok(())
    }

    /// Makes the container's first key, unless it has one: an administrator need not be able to open that.
    pub fn make_first_key(&self) -> Result<(), Error> {
        match self.container_keys()?.current()? {
            Some(_) => Ok(()),
            None => self.make_key(None, None).map(drop),
        }
    }

    /// Makes the next container key and seals all keys anew; or if that was begun and not finished, finishes it.
    ///
    /// Container keys that have not been the current one for `keep` are deleted.
    pub fn rotate(&self, keep: Duration, progress: &Progress<'_>) -> Result<Rotation, Error> {
        self.rotate_without(None, keep, progress)
    }

    /// Likewise; from then on container keys are not for this host.
    pub(super) fn rotate_without(
        &self,
        host: Option<&HostName>,
        keep: Duration,
        progress: &Progress<'_>,
    ) -> Result<Rotation, Error> {
        let keys = self.container_keys()?;
        let mut target = match keys.current()? {
            None => self.make_key(None, host)?,
            Some(Current { epoch, rotating }) => {
                let current = self.trusted_key(epoch)?;
                // Begun for others than it would be begun for now, it is no end of a withdrawal. A host that has the key
                // can hide that: what says whom the key is for, it can write anew.
                let goes_on = rotating && host.is_none() && self.has_made(&current)?;
                if goes_on { current } else { self.make_key(Some(&current), host)? }
            }
        };
        let mut rotation = self.reseal_all(&target, progress)?;
        // Another rotation may have begun meanwhile, to leave a host out: what was sealed here is sealed anew under its key.
        while let Some(later) = keys.current()?.filter(|current| current.epoch > target.epoch()) {
            target = self.trusted_key(later.epoch)?;
            rotation = self.reseal_all(&target, progress)?;
        }
        if rotation.failed.is_empty() {
            for epoch in keys.epochs()?.into_iter().filter(|epoch| epoch.next() < target.epoch()) {
                let since = now().saturating_sub(self.container_key(epoch.next())?.created());
                if since < keep.as_secs() {
                    break;
                }
                keys.delete(epoch)?;
                rotation.deleted.push(epoch);
            }
            let current = Current { epoch: target.epoch(), rotating: false };
            keys.set_current(&current, &rotation.fingerprint)?;
        }
        Ok(rotation)
    }

    /// The key is stored and can be had back before anything is sealed under it.
    pub(super) fn make_key(
        &self,
        previous: Option<&ContainerKey>,
        without: Option<&HostName>,
    ) -> Result<Arc<ContainerKey>, Error> {
        let key = ContainerKey::random(&self.name, previous)?;
        self.announce(without.into_iter().fold(key, ContainerKey::without_host), previous)
    }

    fn announce(&self, key: ContainerKey, previous: Option<&ContainerKey>) -> Result<Arc<ContainerKey>, Error> {
        let sealed = key.seal_to(self.key_recipients(&key)?, now())?;
        let keys = self.container_keys()?;
        match keys.create(key.epoch(), &sealed) {
            // Its maker was killed before announcing it.
            Err(StoreError::Exists { .. }) => {
                let left = self.container_key(key.epoch())?;
                if !previous.map_or(Ok(true), |previous| left.follows(previous))? {
                    return Err(TrustError::Unproven(self.key_id(key.epoch())).into());
                }
                // Or a host that is to be left out has put it there: no key is sealed under it.
                if previous.is_some() || !self.is_by_the_policy(&left)? {
                    return self.announce(key.after(&left)?, Some(&left));
                }
                return self.make_current(left, previous, None);
            }
            created => created?,
        }
        // What keys are sealed under is what the store has. The administrator may be no recipient.
        if keys.get(key.epoch())? != sealed {
            let (is, trusted) = (self.container_key(key.epoch())?.fingerprint()?, key.fingerprint()?);
            if is != trusted {
                return Err(TrustError::Another { id: self.key_id(key.epoch()), is, trusted }.into());
            }
        }
        let made_for = self.whom_for(&key)?;
        self.make_current(Arc::new(key), previous, Some(made_for))
    }

    fn make_current(
        &self,
        key: Arc<ContainerKey>,
        previous: Option<&ContainerKey>,
        made_for: Option<String>,
    ) -> Result<Arc<ContainerKey>, Error> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).insert(key.epoch(), key.clone());
        let (keys, current) = (self.container_keys()?, Current { epoch: key.epoch(), rotating: previous.is_some() });
        // A host that is killed between the two must go on with what the store says then. Of a store that names no key it trusts
        // one that is no more; one that names a key would seem to have gone back.
        if self.trusted_epoch()?.is_some() && keys.current()?.is_none() {
            self.trust(&key, made_for)?;
            keys.set_current(&current, &key.fingerprint()?)?;
        } else {
            keys.set_current(&current, &key.fingerprint()?)?;
            self.trust(&key, made_for)?;
        }
        Ok(key)
    }

    pub(super) fn key_id(&self, epoch: Epoch) -> ContainerKeyId {
        ContainerKeyId { container: self.name.clone(), epoch }
    }

    fn reseal_all(&self, target: &Arc<ContainerKey>, progress: &Progress<'_>) -> Result<Rotation, Error> {
        let ids = self.store.list()?;
        let resealed = AtomicUsize::new(0);
        let (failed, left_alone) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
        for_each(&ids, progress, &|id| match self.reseal_one(id, target) {
            Ok(true) => drop(resealed.fetch_add(1, Ordering::Relaxed)),
            Ok(false) => {}
            Err(Error::NoAuthor(_)) => {
                progress(Step::Not("left alone", id, "nobody vouches for it"));
                lock(&left_alone).push(*id);
            }
            Err(error) => {
                let why = chain(&error);
                progress(Step::Not("failed", id, &why));
                lock(&failed).push((*id, why));
            }
        });
        let (failed, left_alone) = (std::mem::take(&mut *lock(&failed)), std::mem::take(&mut *lock(&left_alone)));
        let resealed = resealed.into_inner();
        Ok(Rotation {
            epoch: target.epoch(),
            fingerprint: target.fingerprint()?,
            resealed,
            unchanged: ids.len() - resealed - failed.len() - left_alone.len(),
            failed,
            left_alone,
            deleted: Vec::new(),
        })
    }

    /// Whether it was sealed anew; not if it is sealed under the target or a later one already, or was deleted meanwhile.
    fn reseal_one(&self, id: &KeyId, target: &Arc<ContainerKey>) -> Result<bool, Error> {
        let sealed = match self.store.get(id) {
            Ok(Stored::Sealed(sealed)) => sealed,
            Ok(Stored::Released(_)) | Err(StoreError::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let mut kids = sealed.recipient_kids().filter_map(|kid| kid.parse::<ContainerKeyId>().ok());
        if kids.any(|kid| kid.container == self.name && kid.epoch >= target.epoch()) {
            return Ok(false);
        }
        let (opened, seen) = self.open_key(id, &sealed, For::Any, Author::Container)?;
        self.reseal_under(opened, target.clone())?;
        self.remember(seen);
        Ok(true)
    }
}
