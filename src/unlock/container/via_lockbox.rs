//! One key, out of this host's lockbox or else out of the store, which then fills the lockbox.

use std::{
    cell::{Cell, OnceCell},
    sync::Arc,
};

use super::{Author, Container, Fetched, Seen, Source};
use crate::{
    base::{
        chain::chain,
        key::{KeyId, Location, Place},
    },
    keys::{
        seal::{Content, Entry, EntryContext, For, Opened},
        store::StoreError,
    },
    unlock::{
        Error,
        lockbox::{EntryError, Lockbox, LockboxError, NewEntry},
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
    /// What to remember once the key has done its work.
    to_remember: Cell<(Seen, Option<NewEntry>)>,
}

/// Whether a key fits the volume that it is to open, or why not.
pub type Fits<'a> = dyn Fn(&Content) -> Result<(), String> + 'a;

impl ViaLockbox {
    /// Looks for an entry that may be used. Why one may not is said once, and it is removed if it never will be.
    pub fn look(container: Arc<Container>, id: KeyId, volume: For, fits: &Fits<'_>) -> Self {
        let (entry, unusable) = match valid_entry(&container, &id, volume, fits) {
            Ok(entry) => (entry, None),
            Err(why) => {
                leave_out(&container, &id, &why);
                (None, Some(why))
            }
        };
        let remembered = entry.as_ref().map(|entry| remembered(entry.context.places.clone()));
        let (entry, unusable) = (Cell::new(entry), Cell::new(unusable));
        let (told, to_remember) = (OnceCell::new(), Cell::default());
        Self { container, id, volume, entry, remembered, unusable, told, to_remember }
    }

    /// The container.
    pub fn container(&self) -> &Container {
        &self.container
    }

    /// The same for another key of it.
    pub fn shared_container(&self) -> Arc<Container> {
        self.container.clone()
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

    /// Fetches the key and opens it, if it is for the volume; a valid entry is enough.
    pub(in crate::unlock) fn fetch(&self, author: Author) -> Result<(Fetched, Source), Error> {
        if let Some(Entry { opened, .. }) = self.entry.take() {
            return Ok((Fetched::Sealed(opened), Source::Lockbox));
        }
        let fetched = self.container.fetch(&self.id, self.volume, author);
        let (fetched, seen) = fetched.map_err(|error| self.explain(error))?;
        let entry = if let Fetched::Sealed(opened) = &fetched { self.new_entry(opened) } else { None };
        self.to_remember.set((seen, entry));
        Ok((fetched, Source::Store))
    }

    /// Remembers what the store has given, and makes it an entry of the lockbox: the key has opened the volume.
    pub(in crate::unlock) fn remember(&self) {
        let (seen, entry) = self.to_remember.take();
        self.container.remember(seen);
        let Some((entry, lockbox)) = entry.zip(self.container.cache()) else { return };
        let reference = self.container.reference(self.id);
        match lockbox.keep_entry(entry) {
            Ok(entry) => tracing::debug!("the lockbox keeps {reference} until {}", entry.expires),
            Err(error) => tracing::warn!("cannot cache {reference} in the lockbox: {}", chain(&error)),
        }
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

    /// An entry for a key that the store has given. The volume attaches without one as well.
    fn new_entry(&self, opened: &Opened) -> Option<NewEntry> {
        let lockbox = self.container.cache().filter(|lockbox| lockbox.key().is_some())?;
        // An entry says where its key rests. Who did not ask for that does not wait for the answer now.
        let places = self.told.get()?;
        let reference = self.container.reference(self.id);
        let failed = |error: &LockboxError| tracing::warn!("cannot cache {reference} in the lockbox: {}", chain(error));
        lockbox.prepare(&reference, opened, places.clone()).inspect_err(failed).ok()
    }
}

impl Container {
    fn is_used_as_caller(&self) -> bool {
        self.tenant.as_ref().is_some_and(|tenant| tenant.caller().is_some())
    }

    /// The lockbox that is asked before the store and given what that gives.
    ///
    /// Not where the store is used as the caller of a hook: it has to decide each time whether this caller may have the key.
    /// Nor where the policy takes more than this host.
    fn cache(&self) -> Option<&Lockbox> {
        let may = self.used.lockbox_first() && !self.is_used_as_caller() && !self.is_lockbox_weaker;
        self.lockbox.as_ref().filter(|_| may)
    }

    /// Fetches a key from the store and adds it to the lockbox, once `is_right` has found no fault with it; `None` if the store
    /// releases it unsealed, and so decides each time who may have it.
    pub(in crate::unlock) fn add_to_lockbox(
        &self,
        id: &KeyId,
        volume: For,
        author: Author,
        is_right: impl FnOnce(Fetched) -> Result<(), Error>,
    ) -> Result<Option<EntryContext>, Error> {
        if self.is_lockbox_weaker {
            let (container, policy) = (self.name.clone(), self.policy().clone());
            return Err(Error::LockboxIsWeaker { container, policy });
        }
        let (fetched, seen) = self.fetch(id, volume, author)?;
        let entry = match (&fetched, &self.lockbox) {
            (Fetched::Sealed(opened), Some(lockbox)) => Some((lockbox, self.new_entry(id, lockbox, opened))),
            _ => None,
        };
        is_right(fetched)?;
        let added = entry.map(|(lockbox, entry)| Ok::<_, Error>(lockbox.keep_entry(entry?)?)).transpose()?;
        self.remember(seen);
        Ok(added)
    }

    /// Adds a key to the lockbox whose volume is not at hand: its author's word is enough.
    pub fn add_reference_to_lockbox(&self, id: &KeyId) -> Result<Option<EntryContext>, Error> {
        self.add_to_lockbox(id, For::Any, Author::Container, |_| Ok(()))
    }

    fn new_entry(&self, id: &KeyId, lockbox: &Lockbox, opened: &Opened) -> Result<NewEntry, Error> {
        let reference = self.reference(*id);
        // A key id names one key for ever, so a good entry with another key proves the store wrong.
        if let Ok(Some(entry)) = lockbox.entry(&reference, For::Any)
            && !entry.opened.content.is_same_key(&opened.content)
        {
            return Err(Error::AnotherKey(reference));
        }
        Ok(lockbox.prepare(&reference, opened, self.places_in_store(id)?)?)
    }
}

fn valid_entry(container: &Container, id: &KeyId, volume: For, fits: &Fits<'_>) -> Result<Option<Entry>, EntryError> {
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
        fits(&opened.content).map_err(EntryError::Unfit)?;
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
