//! Keys out of the lockbox: it is asked first, and given what the store gives.

use std::sync::PoisonError;

use uuid::Uuid;

use super::{Container, Fetched};
use crate::{
    base::{
        chain::chain,
        key::{KeyId, Location, Place},
    },
    keys::{
        seal::{Entry, EntryContext, Opened},
        store::StoreError,
    },
    unlock::{
        Error,
        lockbox::{EntryError, Lockbox},
    },
};

impl Container {
    /// From now on the lockbox, if there is one and it is open, is asked for keys before the store. To be used where a key
    /// opens a volume that there is; what stores or judges keys has to see the store itself.
    ///
    /// Not where the store is used as the caller of a hook: it has to decide each time whether this caller may have the key.
    pub fn lockbox_first(self) -> Self {
        let from_lockbox = self.lockbox.is_some() && !self.as_caller;
        Self { from_lockbox, ..self }
    }

    /// Fetches a key from the store and adds it to the lockbox; `None` if the store releases it unsealed, and so decides each
    /// time who may have it.
    pub fn prefetch(&self, id: &KeyId) -> Result<Option<EntryContext>, Error> {
        let Fetched::Sealed(opened) = self.fetch_from_store(id, None)? else { return Ok(None) };
        let Some(lockbox) = &self.lockbox else { return Ok(None) };
        let places = self.asked(id).map_or_else(|| self.places_in_store(id), Ok)?;
        Ok(Some(lockbox.add(&self.reference(*id), &opened, places)?))
    }

    /// Where the store has said that a key rests.
    fn asked(&self, id: &KeyId) -> Option<Vec<Place>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// Whether the lockbox has an entry of a key that may be used: then the store need not be reached.
    pub fn has_entry(&self, id: &KeyId, volume: Option<Option<Uuid>>) -> bool {
        self.entry(id, volume).is_some()
    }

    /// The lockbox's entry of a key, if it may be used. Why one may not, is said once, and it is removed if it never will be.
    pub(super) fn entry(&self, id: &KeyId, volume: Option<Option<Uuid>>) -> Option<Entry> {
        let lockbox = self.lockbox.as_ref().filter(|_| self.from_lockbox)?;
        let mut unusable = self.unusable.lock().unwrap_or_else(PoisonError::into_inner);
        if unusable.contains_key(id) {
            return None;
        }
        let why = match self.valid_entry(lockbox, id, volume) {
            Ok(entry) => return entry,
            Err(why) => why,
        };
        let reference = self.reference(*id);
        match why {
            EntryError::Expired { .. } => tracing::debug!("the lockbox's entry of {reference} is not used: {why}"),
            _ => tracing::warn!("the lockbox's entry of {reference} is not used: {}", chain(&why)),
        }
        if why.is_final()
            && let Err(error) = lockbox.forget(&reference)
        {
            tracing::warn!("it cannot be removed: {}", chain(&error));
        }
        unusable.insert(*id, why);
        None
    }

    fn valid_entry(
        &self,
        lockbox: &Lockbox,
        id: &KeyId,
        volume: Option<Option<Uuid>>,
    ) -> Result<Option<Entry>, EntryError> {
        let entry = lockbox.entry(&self.reference(*id), volume)?;
        if let Some(Entry { opened, .. }) = &entry {
            // An older form opens the same volume, but the lockbox is not to bring back what the store has withdrawn.
            let (is, seen) = (opened.context.generation, self.seen_generation(id).unwrap_or(1));
            if is < seen {
                return Err(EntryError::OldGeneration { is, seen });
            }
        }
        Ok(entry)
    }

    /// If the store could not be asked: why the lockbox's entry did not do instead.
    pub(super) fn explain(&self, id: &KeyId, error: Error) -> Error {
        let entry = self.unusable.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        match (error, entry) {
            (Error::Store(source), Some(entry)) if !matches!(source, StoreError::NotFound { .. }) => {
                let (entry, source) = (Box::new(entry), Box::new(source));
                Error::NeitherStoreNorLockbox { reference: self.reference(*id), entry, source }
            }
            (error, _) => error,
        }
    }

    /// Adds an entry for a key that the store has given. The volume attaches without one as well.
    pub(super) fn remember(&self, opened: &Opened) {
        let Some(lockbox) = self.lockbox.as_ref().filter(|lockbox| self.from_lockbox && lockbox.key().is_some()) else {
            return;
        };
        let id = &opened.context.key_id;
        // An entry says where its key rests. Who did not ask for that does not wait for the answer now.
        let Some(places) = self.asked(id) else { return };
        match lockbox.add(&self.reference(*id), opened, places) {
            Ok(entry) => tracing::debug!("the lockbox keeps {} until {}", self.reference(*id), entry.expires),
            Err(error) => tracing::warn!("the lockbox gets no entry of {}: {}", self.reference(*id), chain(&error)),
        }
    }

    /// Where the store keeps the key, as its entry remembers: the store is not asked. What of that is on this host has to be
    /// there to be looked at.
    pub(super) fn remembered(places: Vec<Place>) -> Vec<Place> {
        let look = |place: Place| match &place.at {
            Location::Path(path) if !path.exists() => {
                let why = "it is not there now, so that its disk cannot be told".to_owned();
                Place { at: Location::Elsewhere { name: path.display().to_string(), why }, ..place }
            }
            _ => place,
        };
        places.into_iter().map(look).collect()
    }
}
