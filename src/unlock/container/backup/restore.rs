//! A backup, back into a store: only what is absent is written, in an order in which it can be used.
//!
//! | step | a crash here |
//! |---|---|
//! | container keys that the store lacks | nothing is sealed under them yet |
//! | which one is the current one; this host trusts it | keys are sealed under it |
//! | keys and hosts' lockbox keys that the store lacks; a key's consumers | those that are there open |
//! | the administrator's register | some hosts are not in it yet |
//!
//! Each object is created, never overwritten, so that the same command goes on after a crash.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde::Serialize;

use super::{BackupError, BackupFile, Name, Slot};
use crate::{
    base::{
        chain::chain,
        key::{BoundContext, Epoch, HostName, KeyId, SealedKey, StoreName},
    },
    config::Config,
    keys::{
        seal::{self, For, Opened},
        store::{self, Access, StoreError, Stored},
    },
    unlock::{
        Error,
        container::{
            Author, Container, Progress, Step, TrustError, Use,
            each::{lock, try_for_each},
        },
        enrol::{Admitted, Register},
    },
};

/// So many keys are not told one by one.
const MANY: usize = 9;

/// How to restore.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// Make the container first.
    pub create: bool,
    /// Put the backup's objects in the place of others; not of later ones.
    pub replace: bool,
    /// Bring back what was retired or removed since the backup.
    pub older: bool,
}

/// What a restore has done.
#[derive(Debug, Serialize)]
pub struct Restored {
    pub container: StoreName,
    /// When the backup was made: seconds since 1970-01-01 UTC.
    pub made: u64,
    /// The container key whose holder has made it.
    pub epoch: Epoch,
    pub fingerprint: String,
    /// How many objects were written.
    pub written: usize,
    /// How many of them were sealed anew, under the store's own container key.
    pub sealed_anew: usize,
    /// How many were there already.
    pub unchanged: usize,
    /// Of which the store has a later form.
    pub later: Vec<String>,
    pub replaced: Vec<String>,
    /// The store has something else under their names.
    pub left_alone: Vec<String>,
    /// What was retired or removed since the backup, and is back.
    pub brought_back: Vec<String>,
    /// What this kind of store does not hold, and why.
    pub not_held: Vec<(String, String)>,
    /// What could open the container then, if that is not what the configuration says now.
    pub policy: Option<String>,
}

/// What a store has in the place of a backup's object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum There {
    Nothing,
    Same,
    Later,
    Other,
}

/// Writes what a backup has and the container's store lacks.
pub fn restore(
    config: &Config,
    name: &StoreName,
    path: &Path,
    how: How,
    progress: &Progress<'_>,
) -> Result<Restored, Error> {
    let (backup, file) = Container::of_backup(config, name, path)?;
    let author = backup.author_of(&file, path)?;
    if how.create {
        make(config, name)?;
    }
    let container = Container::open(config, name, None, Use::Keys)?;
    let stored = container.container_keys()?.current()?.map(|current| current.epoch);
    let register = Register::of(&config.state);
    let deleted = container.deletions().all()?;
    let job =
        Job { container, backup, file: &file, register, how, deleted, is_sealed_anew: stored > Some(author.epoch()) };
    job.check_author(stored)?;

    let there = job.look()?;
    let brings = job.brings_back(&there, stored)?;
    if !brings.is_empty() && !how.older {
        let (author, fingerprint) = (job.container.key_id(author.epoch()), author.fingerprint()?);
        return Err(BackupError::Older { path: path.to_owned(), author, fingerprint, brings }.into());
    }
    let then = file.head.policy.clone();
    let done = Mutex::new(Restored {
        container: name.clone(),
        made: file.head.made,
        epoch: author.epoch(),
        fingerprint: author.fingerprint()?,
        written: 0,
        sealed_anew: 0,
        unchanged: 0,
        later: Vec::new(),
        replaced: Vec::new(),
        left_alone: Vec::new(),
        brought_back: brings,
        not_held: Vec::new(),
        policy: (then != job.container.policy().to_string()).then_some(then),
    });
    let (container_keys, others): (Vec<_>, Vec<_>) =
        there.into_iter().partition(|(slot, _)| matches!(slot, Slot::ContainerKey(_)));
    let count = AtomicUsize::new(0);
    let all = container_keys.len() + others.len();
    let step = || progress(Step::Done(count.fetch_add(1, Ordering::Relaxed) + 1, all));
    job.write_all(&container_keys, &done, &step)?;
    if stored < Some(author.epoch()) {
        job.container.container_keys()?.set_current(&file.head.current(), &author.fingerprint()?)?;
    }
    if !job.is_sealed_anew && job.container.trusted_epoch()? != Some(author.epoch()) {
        job.container.trust(&author, None)?;
    }
    job.write_all(&others, &done, &step)?;
    let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    job.put_register(&mut done)?;
    for names in [&mut done.later, &mut done.replaced, &mut done.left_alone] {
        names.sort_unstable();
    }
    done.not_held.sort_unstable();
    Ok(done)
}

/// Makes the place of a container that is not there. One that is there keeps its access lists.
fn make(config: &Config, name: &StoreName) -> Result<(), Error> {
    let is_absent = |error: &StoreError| match error {
        StoreError::NoContainer { .. } => true,
        StoreError::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    };
    match Container::open(config, name, None, Use::Keys)?.store().list() {
        Err(error) if is_absent(&error) => {
            let store_config = config.store(name)?;
            let made = store::kind(store_config)?.make(name, store_config, &Access { readers: &[], writers: &[] });
            Ok(made.ok_or_else(|| Error::NoContainerKeys(name.clone()))??)
        }
        listed => Ok(listed.map(drop)?),
    }
}

struct Job<'a> {
    container: Container,
    /// The same container, as the backup has it.
    backup: Container,
    file: &'a BackupFile,
    register: Register,
    how: How,
    /// Keys that this host has deleted or erased.
    deleted: BTreeSet<KeyId>,
    /// The store's container key is a later one than the backup's: what is restored is sealed under that.
    is_sealed_anew: bool,
}

impl Job<'_> {
    /// The author is the one whom this host and the store know, or is older and connected with nothing that is left.
    fn check_author(&self, stored: Option<Epoch>) -> Result<(), Error> {
        let author = self.file.head.epoch;
        let is_old = stored.max(self.container.trusted_epoch()?) > Some(author);
        if !is_old {
            self.backup.learn(&*self.backup.container_key(author)?, Author::Container)?;
        }
        let Some(stored) = stored else { return Ok(()) };
        let both = stored.min(author);
        let here = self.container.container_key(both);
        let there = self.backup.container_key(both);
        match (here, there) {
            (Ok(here), Ok(there)) => {
                let (is, trusted) = (there.fingerprint()?, here.fingerprint()?);
                if is == trusted {
                    return Ok(());
                }
                Err(TrustError::Another { id: self.container.key_id(both), is, trusted }.into())
            }
            // An older one is restored by the user's word.
            (Err(Error::Store(StoreError::NotFound { .. })), Ok(_)) if is_old => Ok(()),
            (Ok(_), Err(Error::Store(StoreError::NotFound { .. }))) => {
                Err(TrustError::Gone { id: self.container.key_id(author), trusted: stored }.into())
            }
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }

    /// What the store has in the place of each sealed object.
    fn look(&self) -> Result<BTreeMap<Slot, There>, Error> {
        let listed: BTreeSet<_> = Slot::all(self.container.store())?.into_iter().collect();
        let (slots, absent): (Vec<_>, Vec<_>) = self.file.slots().cloned().partition(|slot| listed.contains(slot));
        let found = Mutex::new(absent.into_iter().map(|slot| (slot, There::Nothing)).collect::<BTreeMap<_, _>>());
        try_for_each(&slots, &|_| {}, &|slot| {
            let there = self.look_at(slot)?;
            lock(&found).insert(slot.clone(), there);
            Ok::<_, StoreError>(())
        })?;
        Ok(found.into_inner().unwrap_or_default())
    }

    fn look_at(&self, slot: &Slot) -> Result<There, StoreError> {
        let Some(ours) = self.file.sealed(slot) else { return Ok(There::Same) };
        Ok(match slot.get(self.container.store()) {
            Ok(Stored::Sealed(stored)) if stored == ours => There::Same,
            Ok(Stored::Sealed(stored)) => match (stored.claimed_generation(), ours.claimed_generation()) {
                (Ok(is), Ok(ours)) if is > ours && self.is_whole(slot, &stored)? => There::Later,
                _ => There::Other,
            },
            Ok(Stored::Released(_)) | Err(StoreError::Malformed { .. }) => There::Other,
            Err(StoreError::NotFound { .. }) => There::Nothing,
            Err(error) => return Err(error),
        })
    }

    /// A store can claim any generation. Only a key that opens is a later form of it.
    fn is_whole(&self, slot: &Slot, stored: &SealedKey) -> Result<bool, StoreError> {
        let Slot::Key(id) = slot else { return Ok(true) };
        match self.container.open_key(id, stored, For::Any, Author::Container) {
            Ok(_) => Ok(true),
            Err(Error::Store(error)) if !matches!(error, StoreError::NotFound { .. }) => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// What would be written that was retired or removed since the backup was made, in words.
    fn brings_back(&self, there: &BTreeMap<Slot, There>, stored: Option<Epoch>) -> Result<Vec<String>, Error> {
        let author = self.file.head.epoch;
        let trusted = self.container.trusted_epoch()?.filter(|trusted| *trusted > author);
        let is_old = trusted.is_some() || self.is_sealed_anew;
        let (mut brings, mut keys) = (Vec::new(), Vec::new());
        if let Some(trusted) = trusted.filter(|_| stored <= Some(author)) {
            brings.push(format!("container key {author} as the current one, where this host knows {trusted}"));
        }
        for slot in there.iter().filter(|(_, there)| self.is_written(**there)).map(|(slot, _)| slot) {
            match slot {
                Slot::ContainerKey(_) if is_old => brings.push(slot.to_string()),
                Slot::Host(host) if is_old || self.was_removed(host)? => brings.push(slot.to_string()),
                Slot::Key(id) if self.deleted.contains(id) => {
                    brings.push(format!("{slot}, which this host has deleted"));
                }
                Slot::Key(id) if is_old || self.container.seen_generation(id)? > self.generation(slot) => {
                    keys.push(slot.to_string());
                }
                _ => {}
            }
        }
        match keys.len() {
            0..MANY => brings.append(&mut keys),
            many => brings.push(format!("{many} keys")),
        }
        Ok(brings)
    }

    fn is_written(&self, there: There) -> bool {
        there == There::Nothing || there == There::Other && self.how.replace
    }

    fn was_removed(&self, host: &HostName) -> Result<bool, Error> {
        let admitted = self.register.get(host).map_err(BackupError::from)?;
        Ok(admitted.is_some_and(|admitted| admitted.removed.is_some()))
    }

    fn generation(&self, slot: &Slot) -> u64 {
        self.file.sealed(slot).and_then(|key| key.claimed_generation().ok()).unwrap_or_default()
    }

    fn write_all(
        &self,
        slots: &[(Slot, There)],
        done: &Mutex<Restored>,
        step: &(dyn Fn() + Sync),
    ) -> Result<(), Error> {
        try_for_each(slots, &|_| {}, &|(slot, there)| {
            self.write(slot, *there, done)?;
            step();
            Ok(())
        })
    }

    fn write(&self, slot: &Slot, there: There, done: &Mutex<Restored>) -> Result<(), Error> {
        let told = slot.to_string();
        match there {
            There::Same => lock(done).unchanged += 1,
            There::Later => lock(done).later.push(told),
            There::Other if !self.how.replace => {
                lock(done).left_alone.push(told);
                return Ok(());
            }
            There::Nothing | There::Other if matches!(slot, Slot::Key(_)) && !self.container.store().takes_any_id() => {
                // Nor is one deleted that would not come back.
                lock(done).not_held.push((told, "it makes up ids by itself".to_owned()));
                return Ok(());
            }
            There::Nothing | There::Other => {
                let Some(sealed) = self.file.sealed(slot) else { return Ok(()) };
                let (sealed, is_anew) = match self.form(slot, sealed) {
                    Ok(form) => form,
                    Err(error @ (Error::NoAuthor(_) | Error::KeyRefused { .. })) => {
                        lock(done).not_held.push((told, chain(&error)));
                        return Ok(());
                    }
                    Err(error) => return Err(error),
                };
                if there == There::Other {
                    match slot.delete(self.container.store()) {
                        Ok(()) | Err(StoreError::NotFound { .. }) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                match slot.create(self.container.store(), &sealed) {
                    Ok(()) => {}
                    // A store may list late.
                    Err(StoreError::Exists { .. }) => {
                        match self.look_at(slot)? {
                            There::Same => lock(done).unchanged += 1,
                            There::Later => lock(done).later.push(told),
                            There::Nothing | There::Other => lock(done).left_alone.push(told),
                        }
                        return Ok(());
                    }
                    // The store has no such part.
                    Err(error @ StoreError::NotFound { .. }) => {
                        lock(done).not_held.push((told, chain(&error)));
                        return Ok(());
                    }
                    Err(error) => return Err(error.into()),
                }
                match slot.get(self.container.store())? {
                    Stored::Sealed(stored) if stored == sealed => {}
                    _ => return Err(BackupError::ReadBack(told).into()),
                }
                let mut done = lock(done);
                done.written += 1;
                done.sealed_anew += usize::from(is_anew);
                done.replaced.extend((there == There::Other).then_some(told));
            }
        }
        if let Slot::Key(id) = slot {
            self.container.deletions().take_back(id)?;
            self.add_consumers(id)?;
        }
        Ok(())
    }

    /// The form in which an object is written, and whether it was sealed anew.
    fn form(&self, slot: &Slot, sealed: SealedKey) -> Result<(SealedKey, bool), Error> {
        let Slot::Key(id) = slot else { return Ok((sealed, false)) };
        let seen = self.container.seen_generation(id)?;
        let generation = self.generation(slot);
        if !self.is_sealed_anew && seen <= generation {
            return Ok((sealed, false));
        }
        let Opened { context, content } = self.backup.open_for_restore(id, &sealed)?;
        let context = BoundContext { generation: seen.max(generation) + 1, ..context };
        let key = self.container.current_key()?;
        Ok((seal::seal(&context, &content, &[Box::new(Arc::clone(&key))])?, true))
    }

    fn add_consumers(&self, id: &KeyId) -> Result<(), Error> {
        let ours = self.file.consumers(id);
        if ours.is_empty() {
            return Ok(());
        }
        let store = self.container.store();
        let there = store.consumers(id)?;
        ours.iter().filter(|consumer| !there.contains(consumer)).try_for_each(|one| Ok(store.add_consumer(id, one)?))
    }

    /// The administrator's register. A host that was removed since stays so.
    fn put_register(&self, done: &mut Restored) -> Result<(), BackupError> {
        for ours in self.file.register() {
            let told = Name::Register(ours.host.clone()).to_string();
            let json = |admitted: &Admitted| serde_json::to_value(admitted).ok();
            match self.register.get(&ours.host)? {
                None => {
                    self.register.put(&ours)?;
                    done.written += 1;
                }
                Some(there) if json(&there) == json(&ours) => done.unchanged += 1,
                Some(there) if there.removed > ours.removed || there.admitted > ours.admitted => done.later.push(told),
                Some(_) if self.how.replace => {
                    self.register.put(&ours)?;
                    done.written += 1;
                    done.replaced.push(told);
                }
                Some(_) => done.left_alone.push(told),
            }
        }
        Ok(())
    }
}

impl Container {
    /// Opens a key of a backup whose author is known.
    pub(in super::super) fn open_for_restore(&self, id: &KeyId, sealed: &SealedKey) -> Result<Opened, Error> {
        let key = self.container_key(self.sealed_under(id, sealed)?)?;
        self.open_under(key, id, sealed, For::Any)
    }
}
