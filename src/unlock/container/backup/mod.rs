//! Backups of a container: all that its store has, in one file, which is never opened for that; and what the administrator's
//! register has of its hosts.
//!
//! Whoever holds the current container key vouches for the file, by an HMAC under that key. So a restore knows that the owner's
//! side has made it; and since hosts that were removed know the keys of their time, it is told from an older one.

mod error;
mod file;
mod restore;
mod slot;
mod store;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex},
};

use serde::Serialize;
use uuid::Uuid;

use self::{
    file::{Draft, Head, MOST_BYTES, Name, Object},
    slot::Slot,
    store::BackupStore,
};
use super::{
    Container, Use,
    each::{Progress, lock, try_for_each},
};
use crate::{
    base::{
        chain::chain,
        clock::now,
        key::{Epoch, StoreName},
    },
    config::Config,
    keys::{
        seal::ContainerKey,
        store::{StoreError, Stored},
    },
    sys::durable,
    unlock::{Error, enrol::Register},
};
pub use error::BackupError;
pub use file::{BackupFile, MalformedBackup};
pub use restore::{How, Restored, restore};

/// What a backup has.
#[derive(Debug, Serialize)]
pub struct BackedUp {
    pub container: StoreName,
    /// The container key whose holder vouches for it.
    pub epoch: Epoch,
    pub fingerprint: String,
    pub keys: usize,
    pub container_keys: usize,
    /// Hosts' lockbox keys.
    pub hosts: usize,
    /// Hosts of the administrator's register.
    pub register: usize,
    /// Keys that the store keeps unsealed: they are not in it.
    pub unsealed: usize,
    /// What could not be read, and why.
    pub left_out: Vec<(String, String)>,
}

/// A backup that is not written yet.
pub struct Backup {
    file: BackupFile,
    /// The volumes that its keys open, as the keys claim.
    pub volumes: BTreeSet<Uuid>,
    pub content: BackedUp,
}

/// Collects all that a container has.
pub fn collect(config: &Config, name: &StoreName, progress: &Progress<'_>) -> Result<Backup, Error> {
    let container = Container::open(config, name, None, Use::Keys)?;
    let keys = container.container_keys()?;
    let current = keys.current()?.ok_or_else(|| Error::NoContainerKey(name.clone()))?;
    let author = container.trusted_key(current.epoch)?;
    let slots = Slot::all(container.store())?;
    let (objects, left_out, unsealed) = (Mutex::new(BTreeMap::new()), Mutex::new(Vec::new()), Mutex::new(0));
    try_for_each(&slots, progress, &|slot| {
        match container.read_slot(slot) {
            Ok(Read::Sealed(of)) => lock(&objects).extend(of),
            Ok(Read::Unsealed) => *lock(&unsealed) += 1,
            Ok(Read::Gone) => {}
            Err(error @ StoreError::Malformed { .. }) => lock(&left_out).push((slot.to_string(), chain(&error))),
            Err(error) => return Err(error),
        }
        Ok(())
    })?;
    if keys.current()? != Some(current) {
        return Err(BackupError::Meanwhile(name.clone()).into());
    }
    let mut objects = std::mem::take(&mut *lock(&objects));
    for admitted in Register::of(&config.state).all().map_err(BackupError::from)? {
        if admitted.stores.contains(name) || admitted.lockbox_store == *name {
            objects.insert(Name::Register(admitted.host.clone()), Object::Register(Box::new(admitted)));
        }
    }
    let count = |is: fn(&Name) -> bool| objects.keys().filter(|name| is(name)).count();
    let content = BackedUp {
        container: name.clone(),
        epoch: current.epoch,
        fingerprint: author.fingerprint()?,
        keys: count(|name| matches!(name, Name::Sealed(Slot::Key(_)))),
        container_keys: count(|name| matches!(name, Name::Sealed(Slot::ContainerKey(_)))),
        hosts: count(|name| matches!(name, Name::Sealed(Slot::Host(_)))),
        register: count(|name| matches!(name, Name::Register(_))),
        unsealed: *lock(&unsealed),
        left_out: std::mem::take(&mut *lock(&left_out)),
    };
    let volume = |(name, object): (&Name, &Object)| match (name, object) {
        (Name::Sealed(Slot::Key(_)), Object::Sealed(key)) => key.claimed_context().ok()?.volume,
        _ => None,
    };
    let volumes = objects.iter().filter_map(volume).collect();
    let head = Head::of(name.clone(), now(), current, content.fingerprint.clone(), container.policy().to_string());
    let draft = Draft::of(head, &objects).expect("texts and numbers always serialize");
    let mac = author.vouch_for_backup(&draft.digest())?;
    let bytes = draft.vouched(mac).expect("texts always serialize");
    // What could not be read again is not written.
    let file = BackupFile::parse(bytes);
    let file = file.map_err(|source| BackupError::TooLarge { container: name.clone(), source })?;
    Ok(Backup { file, volumes, content })
}

impl Backup {
    /// Writes it into a new file, whole or not at all, which its owner alone can read.
    pub fn write(self, path: &Path) -> Result<BackedUp, BackupError> {
        let failed = |source| BackupError::File { action: "write", path: path.to_owned(), source };
        durable::create(path, self.file.bytes()).map(|()| self.content).map_err(failed)
    }
}

enum Read {
    Sealed(Vec<(Name, Object)>),
    Unsealed,
    /// It was deleted meanwhile.
    Gone,
}

impl Container {
    fn read_slot(&self, slot: &Slot) -> Result<Read, StoreError> {
        let key = match slot.get(self.store()) {
            Ok(Stored::Sealed(key)) => key,
            Ok(Stored::Released(_)) => return Ok(Read::Unsealed),
            Err(StoreError::NotFound { .. }) => return Ok(Read::Gone),
            Err(error) => return Err(error),
        };
        let mut of = vec![(Name::Sealed(slot.clone()), Object::Sealed(key))];
        if let Slot::Key(id) = slot {
            let consumers = self.store().consumers(id)?;
            of.extend((!consumers.is_empty()).then(|| (Name::Consumers(*id), Object::Consumers(consumers))));
        }
        Ok(Read::Sealed(of))
    }

    /// The container as a backup has it, and the file.
    pub(super) fn of_backup(config: &Config, name: &StoreName, path: &Path) -> Result<(Self, Arc<BackupFile>), Error> {
        let file = Arc::new(read(path)?);
        let is = &file.head.container;
        if is != name {
            let (path, is, asked) = (path.to_owned(), is.clone(), name.clone());
            return Err(BackupError::OtherContainer { path, is, asked }.into());
        }
        let store = BackupStore { path: path.to_owned(), file: file.clone() };
        Ok((Self { store: Box::new(store), ..Self::open(config, name, None, Use::Keys)? }, file))
    }

    /// The container key whose holder has made the backup that this container is of.
    pub(super) fn author_of(&self, file: &BackupFile, path: &Path) -> Result<Arc<ContainerKey>, Error> {
        let author = self.container_key(file.head.epoch)?;
        match author.has_vouched_for_backup(&file.digest, &file.mac)? {
            true => Ok(author),
            false => Err(BackupError::Forged { path: path.to_owned(), author: self.key_id(file.head.epoch) }.into()),
        }
    }
}

fn read(path: &Path) -> Result<BackupFile, BackupError> {
    let failed = |source| BackupError::File { action: "read", path: path.to_owned(), source };
    let bytes = durable::read_bounded(path, MOST_BYTES).map_err(failed)?;
    BackupFile::parse(bytes).map_err(|source| BackupError::Malformed { path: path.to_owned(), source })
}

/// Refuses a file that is there, before much is read.
pub fn require_new(path: &Path) -> Result<(), BackupError> {
    let source = match path.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => source,
        Ok(_) => std::io::ErrorKind::AlreadyExists.into(),
    };
    Err(BackupError::File { action: "write", path: path.to_owned(), source })
}
