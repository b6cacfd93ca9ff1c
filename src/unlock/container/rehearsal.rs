//! Rehearsal of a recovery: would the escrow's key, or a recovery key on paper, alone open each key of a container? Nothing is
//! changed, and nothing else that this host has is used.

use std::{path::Path, sync::Mutex};

use super::{
    Author, Container, Use,
    each::{Progress, Step, for_each, lock},
};
use crate::{
    base::{
        chain::chain,
        clock::now,
        key::{ContainerKeyId, Epoch, KeyId, SealedKey, StoreName},
        person::Attendant,
    },
    config::{Config, IdentitySpec, LeafName},
    keys::{
        seal::{self, Asking, ContainerKey, For, Identities, Identity, identities},
        store::Stored,
    },
    unlock::Error,
};

/// What alone has to open all.
pub enum By<'a> {
    /// What a person has on paper or in mind.
    Leaf(&'a LeafName),
    /// A private key.
    Identity(&'a IdentitySpec),
}

/// What a rehearsal has found.
#[derive(Debug, serde::Serialize)]
pub struct Rehearsal {
    pub container: StoreName,
    /// The container keys that opened.
    pub container_keys: Vec<Epoch>,
    /// Those that did not, and why.
    pub lost_container_keys: Vec<(Epoch, String)>,
    /// Those that did not, but no key is sealed under them any more.
    pub replaced: Vec<Epoch>,
    /// How many keys opened.
    pub saved: usize,
    /// The keys that did not, and why.
    pub lost: Vec<(KeyId, String)>,
    /// Keys that the store keeps unsealed: they need no recovery, as long as there is the store.
    pub unsealed: usize,
}

impl Rehearsal {
    /// Whether a recovery would lose something.
    pub fn loses(&self) -> bool {
        !self.lost.is_empty() || !self.lost_container_keys.is_empty()
    }
}

/// Opens each container key and each key of a container, or of a backup of it, by this alone.
pub fn rehearse(
    config: &Config,
    name: &StoreName,
    by: &By<'_>,
    backup: Option<&Path>,
    progress: &Progress<'_>,
) -> Result<Rehearsal, Error> {
    let (mut container, file) = match backup {
        None => (Container::open(config, name, None, Use::Keys)?, None),
        Some(path) => {
            let (container, file) = Container::of_backup(config, name, path)?;
            (container, Some((file, path)))
        }
    };
    let alone: Vec<Box<dyn Identity>> = match by {
        By::Identity(spec) => vec![identities::kind(spec).open(&config.tpm)?],
        By::Leaf(leaf) => {
            container.ask_person(leaf)?;
            Vec::new()
        }
    };
    let asking = Asking { attendant: Attendant::default(), ..container.asking.clone() };
    container.alone = Some(Identities::of(alone).with_leaves(Vec::new(), container.names()?).with_person(asking));
    if let Some((file, path)) = &file
        && let Err(error @ Error::Backup(_)) = container.author_of(file, path)
    {
        return Err(error);
    }
    container.rehearse(file.is_some(), progress)
}

/// Shows that a private key opens what is sealed to a public one.
pub fn prove_pair(config: &Config, name: &StoreName, public: &Path, private: &IdentitySpec) -> Result<(), Error> {
    let key = ContainerKey::random(name, None)?;
    let sealed = key.seal_to(seal::recipients([public])?, now())?;
    let alone = Identities::of(vec![identities::kind(private).open(&config.tpm)?]);
    let id = ContainerKeyId { container: name.clone(), epoch: key.epoch() };
    ContainerKey::open(&sealed, &alone, &id).map(drop).map_err(|source| Error::NoPair {
        public: public.to_owned(),
        private: private.clone(),
        source: Box::new(source),
    })
}

impl Container {
    /// Shows that the next container key, if it was sealed now, would open on this host.
    pub fn opens_next(&self) -> Result<(), Error> {
        let current = self.container_keys()?.current()?.map(|current| self.container_key(current.epoch)).transpose()?;
        let next = ContainerKey::random(&self.name, current.as_deref())?;
        let sealed = next.seal_to(self.key_recipients(&next)?, now())?;
        let opened = ContainerKey::open(&sealed, &self.identities()?, &self.key_id(next.epoch()));
        opened
            .map(drop)
            .map_err(|source| Error::WouldLockOut { container: self.name.clone(), source: Box::new(source) })
    }

    /// Asks a person for a leaf of the current container key; the same opens those before.
    fn ask_person(&self, leaf: &LeafName) -> Result<(), Error> {
        let keys = self.container_keys()?;
        let current = keys.current()?.ok_or_else(|| Error::NoContainerKey(self.name.clone()))?;
        let id = self.key_id(current.epoch);
        let refused = |source| Error::ContainerKeyRefused { id: id.clone(), source };
        self.identities()?.ask_person(&keys.get(id.epoch)?, leaf).map_err(refused)
    }

    /// A backup may be older than what this host has seen of the store.
    fn rehearse(&self, is_backup: bool, progress: &Progress<'_>) -> Result<Rehearsal, Error> {
        let keys = self.container_keys()?;
        let (mut container_keys, mut closed) = (Vec::new(), Vec::new());
        for epoch in keys.epochs()? {
            match self.container_key(epoch) {
                Ok(_) => container_keys.push(epoch),
                Err(error) => closed.push((epoch, chain(&error))),
            }
        }
        let ids = self.store.list()?;
        // A machine that knows nothing of the container yet has nothing to compare with.
        let author = if self.trusted_epoch()?.is_some() { Author::Container } else { Author::Pinned };
        let open = |id: &KeyId, sealed: &SealedKey| match is_backup {
            true => self.open_for_restore(id, sealed).map(drop),
            false => self.open_key(id, sealed, For::Any, author).map(drop),
        };
        let (lost, unsealed) = (Mutex::new(Vec::new()), Mutex::new(0));
        // What new keys are sealed under is needed, and what those that there are are sealed under.
        let needed = Mutex::new(keys.current()?.map(|current| current.epoch).into_iter().collect::<Vec<_>>());
        for_each(&ids, progress, &|id| {
            let is_closed = |epoch: Epoch| {
                let is_closed = closed.iter().any(|(closed, _)| *closed == epoch);
                if is_closed && !lock(&needed).contains(&epoch) {
                    lock(&needed).push(epoch);
                }
                is_closed
            };
            match self.rehearse_one(id, &open, &is_closed) {
                Ok(true) => {}
                Ok(false) => *lock(&unsealed) += 1,
                Err(why) => {
                    progress(Step::Not("lost", id, &why));
                    lock(&lost).push((*id, why));
                }
            }
        });
        let (lost, unsealed) = (std::mem::take(&mut *lock(&lost)), *lock(&unsealed));
        let (mut lost_container_keys, mut replaced) = (Vec::new(), Vec::new());
        for (epoch, why) in closed {
            if lock(&needed).contains(&epoch) {
                lost_container_keys.push((epoch, why));
            } else {
                replaced.push(epoch);
            }
        }
        let saved = ids.len() - lost.len() - unsealed;
        let container = self.name.clone();
        Ok(Rehearsal { container, container_keys, lost_container_keys, replaced, saved, lost, unsealed })
    }

    /// Whether it is sealed, and opens; or why not.
    fn rehearse_one(
        &self,
        id: &KeyId,
        open: &dyn Fn(&KeyId, &SealedKey) -> Result<(), Error>,
        is_closed: &dyn Fn(Epoch) -> bool,
    ) -> Result<bool, String> {
        let sealed = match self.store.get(id) {
            Ok(Stored::Sealed(sealed)) => sealed,
            Ok(Stored::Released(_)) => return Ok(false),
            Err(error) => return Err(chain(&error)),
        };
        // A container key that does not open is not asked for again with each of its keys.
        let mut under = sealed.recipient_kids().filter_map(|kid| kid.parse::<ContainerKeyId>().ok());
        let under = under.find(|under| under.container == self.name);
        if let Some(id) = under.filter(|under| is_closed(under.epoch)) {
            return Err(format!("its container key {id} would be lost"));
        }
        open(id, &sealed).map(|()| true).map_err(|error| chain(&error))
    }
}
