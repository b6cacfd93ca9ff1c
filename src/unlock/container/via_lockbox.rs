//! One key, out of this host's lockbox or else out of the store, which then fills the lockbox.

use std::{
    cell::{Cell, OnceCell},
    sync::Arc,
};

use super::{Container, Fetched, Source};
use crate::{
    base::{
        chain::chain,
        key::{KeyId, Location, Place},
    },
    keys::{
        seal::{Entry, EntryContext, For, Opened},
        store::StoreError,
    },
    unlock::{
        Error,
        lockbox::{EntryError, Lockbox},
    },
};

/// The way to one key of a container. The lockbox's entry, if the container's [`Use`](super::Use) looks for one, is read and
/// opened once.
pub struct ViaLockbox {
    container: Arc<Container>,
    id: KeyId,
    volume: For,
    entry: Cell<Option<Entry>>,
    /// Where the entry says that the key rests in the store.
    remembered: Option<Vec<Place>>,
    /// Why the entry is not used.
    unusable: Cell<Option<EntryError>>,
    /// Where the store has said that the key rests.
    told: OnceCell<Vec<Place>>,
}

impl ViaLockbox {
    /// Looks for an entry that may be used. Why one may not is said once, and it is removed if it never will be.
    pub fn look(container: Arc<Container>, id: KeyId, volume: For) -> Self {
        let (entry, unusable) = match valid_entry(&container, &id, volume) {
            Ok(entry) => (entry, None),
            Err(why) => {
                leave_out(&container, &id, &why);
                (None, Some(why))
            }
        };
        let remembered = entry.as_ref().map(|entry| remembered(entry.context.places.clone()));
        let (entry, unusable) = (Cell::new(entry), Cell::new(unusable));
        Self { container, id, volume, entry, remembered, unusable, told: OnceCell::new() }
    }

    /// The container.
    pub fn container(&self) -> &Container {
        &self.container
    }

    /// Whether there is an entry that may be used: then the store need not be reached.
    pub fn has_entry(&self) -> bool {
        self.remembered.is_some()
    }

    /// All places where the key, or what opens it, rests.
    ///
    /// Of a key that comes out of the lockbox, its entry says where it rested in the store, and the store is not asked.
    pub fn places(&self) -> Result<Vec<Place>, Error> {
        let mut places = match &self.remembered {
            Some(places) => places.clone(),
            None => {
                let told = self.container.places_in_store(&self.id).map_err(|error| self.explain(error))?;
                self.told.get_or_init(|| told).clone()
            }
        };
        places.extend(self.container.own_places.iter().cloned());
        Ok(places)
    }

    /// Fetches the key and opens it, if it is for the volume; a valid entry is enough, and what the store gives becomes one.
    pub(in crate::unlock) fn fetch(&self) -> Result<(Fetched, Source), Error> {
        if let Some(Entry { opened, .. }) = self.entry.take() {
            return Ok((Fetched::Sealed(opened), Source::Lockbox));
        }
        let fetched = self.container.fetch(&self.id, self.volume).map_err(|error| self.explain(error))?;
        if let Fetched::Sealed(opened) = &fetched {
            self.remember(opened);
        }
        Ok((fetched, Source::Store))
    }

    /// If the store could not be asked: why the lockbox's entry did not do instead.
    fn explain(&self, error: Error) -> Error {
        match (error, self.unusable.take()) {
            (Error::Store(source), Some(entry)) if !matches!(source, StoreError::NotFound { .. }) => {
                let (entry, source) = (Box::new(entry), Box::new(source));
                Error::NeitherStoreNorLockbox { reference: self.container.reference(self.id), entry, source }
            }
            (error, _) => error,
        }
    }

    /// Adds an entry for a key that the store has given. The volume attaches without one as well.
    fn remember(&self, opened: &Opened) {
        let Some(lockbox) = self.container.cache().filter(|lockbox| lockbox.key().is_some()) else { return };
        // An entry says where its key rests. Who did not ask for that does not wait for the answer now.
        let Some(places) = self.told.get() else { return };
        let reference = self.container.reference(self.id);
        match lockbox.add(&reference, opened, places.clone()) {
            Ok(entry) => tracing::debug!("the lockbox keeps {reference} until {}", entry.expires),
            Err(error) => tracing::warn!("cannot cache {reference} in the lockbox: {}", chain(&error)),
        }
    }
}

impl Container {
    fn is_used_as_caller(&self) -> bool {
        self.tenant.as_ref().is_some_and(|tenant| tenant.caller().is_some())
    }

    /// The lockbox that is asked before the store and given what that gives.
    ///
    /// Not where the store is used as the caller of a hook: it has to decide each time whether this caller may have the key.
    fn cache(&self) -> Option<&Lockbox> {
        self.lockbox.as_ref().filter(|_| self.used.lockbox_first() && !self.is_used_as_caller())
    }

    /// Fetches a key from the store and adds it to the lockbox; `None` if the store releases it unsealed, and so decides each
    /// time who may have it.
    pub fn add_to_lockbox(&self, id: &KeyId) -> Result<Option<EntryContext>, Error> {
        let Fetched::Sealed(opened) = self.fetch(id, For::Any)? else { return Ok(None) };
        let Some(lockbox) = &self.lockbox else { return Ok(None) };
        Ok(Some(lockbox.add(&self.reference(*id), &opened, self.places_in_store(id)?)?))
    }
}

fn valid_entry(container: &Container, id: &KeyId, volume: For) -> Result<Option<Entry>, EntryError> {
    let Some(lockbox) = container.cache() else { return Ok(None) };
    let entry = lockbox.entry(&container.reference(*id), volume)?;
    // To other tenants it is as if it were not there.
    let entry = entry.filter(|entry| container.admit(id, entry.opened.context.project.as_ref()).is_ok());
    if let Some(Entry { opened, .. }) = &entry {
        // An older form opens the same volume, but the lockbox is not to bring back what the store has withdrawn.
        let (is, seen) = (opened.context.generation, container.seen_generation(id).unwrap_or(1));
        if is < seen {
            return Err(EntryError::OldGeneration { is, seen });
        }
    }
    Ok(entry)
}

fn leave_out(container: &Container, id: &KeyId, why: &EntryError) {
    let reference = container.reference(*id);
    match why {
        EntryError::Expired { .. } => tracing::debug!("the lockbox's entry of {reference} is not used: {why}"),
        _ => tracing::warn!("the lockbox's entry of {reference} is not used: {}", chain(why)),
    }
    if why.is_final()
        && let Some(lockbox) = container.cache()
        && let Err(error) = lockbox.forget(&reference)
    {
        tracing::warn!("cannot remove the lockbox's entry of {reference}: {}", chain(&error));
    }
}

/// Where the store keeps the key, as its entry remembers. A path of this host has to be there to be looked at.
fn remembered(places: Vec<Place>) -> Vec<Place> {
    let look = |place: Place| match &place.at {
        Location::Path(path) if !path.exists() => {
            let why = "it is not there now, so its disk is not known".to_owned();
            Place { at: Location::Elsewhere { name: path.display().to_string(), why }, ..place }
        }
        _ => place,
    };
    places.into_iter().map(look).collect()
}
