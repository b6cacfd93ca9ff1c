//! Whether a key was used: the proof that nothing can have been encrypted with it yet, so that a blank device may be formatted
//! with it.
//!
//! An unused key carries a mark. The mark goes before the key's value is given out, and when a volume is opened with it.
//! A key without the mark may have been used: nothing follows from its age or from who asks. A copy that is made here, whose
//! value nobody gets, is as unused as the key that it is made of.

use super::{Author, Container, Fetched};
use crate::{
    base::{
        chain::chain,
        clock::now,
        key::{BoundContext, KeyId, KeyReference, ManagedObject, ObjectFacts, ObjectKind, SecretBytes},
    },
    keys::{
        seal::{Content, For, Opened},
        store::{Released, StoreError},
    },
    unlock::Error,
    volumes::header::Volume,
};

/// A key of fewer bits is not trusted to stand behind the least key derivation that LUKS2 allows.
const LEAST_KEY_BYTES: usize = 32;

/// What a key was used for if its value was given out.
const GIVEN_OUT: &str = "another program (it was given out)";

/// A key that no volume was formatted with yet.
pub struct Unused {
    object: ManagedObject,
    /// What it is sealed with; `None` if the store keeps it unsealed.
    context: Option<BoundContext>,
}

impl Unused {
    /// The passphrase of the keyslot that a volume is formatted with.
    pub fn passphrase(&self) -> Result<SecretBytes, Error> {
        Ok(self.object.passphrase()?)
    }
}

impl Container {
    /// What is known of a key that other programs use: an object, or the passphrase of a volume's keyslot. Its value goes with
    /// it, for who only looks at the facts.
    pub fn object(&self, id: &KeyId) -> Result<ManagedObject, Error> {
        self.as_object(id, self.fetch_object(id)?)
    }

    /// Gives the value of a key to another program: an object's, or the passphrase of a volume's keyslot, never a volume key.
    /// The program may use it, so the key no longer counts as unused: where that cannot be noted, an unused one is not given out.
    pub fn give_out(&self, id: &KeyId) -> Result<ManagedObject, Error> {
        let fetched = self.fetch_object(id)?;
        self.mark(id, &fetched, GIVEN_OUT)
            .map_err(|source| Error::NotNoted { key: self.reference(*id), source: Box::new(source) })?;
        self.as_object(id, fetched)
    }

    /// Fetches a key for its facts or its value; there is no volume to prove it, so its author's word is enough.
    pub(super) fn fetch_object(&self, id: &KeyId) -> Result<Fetched, Error> {
        let (fetched, seen) = self.fetch(id, For::Any, Author::Container)?;
        self.remember(seen);
        Ok(fetched)
    }

    fn as_object(&self, id: &KeyId, fetched: Fetched) -> Result<ManagedObject, Error> {
        match fetched {
            Fetched::Released(Released { object, .. })
            | Fetched::Sealed(Opened { content: Content::Object(object), .. }) => Ok(object),
            Fetched::Sealed(Opened { content: Content::VolumeKey(payload), context }) => {
                let facts = ObjectFacts {
                    kind: ObjectKind::Passphrase,
                    algorithm: None,
                    bit_length: None,
                    name: None,
                    created: Some(context.created),
                    fresh: false,
                    filling: None,
                };
                let value = payload.passphrase.ok_or_else(|| Error::NoPassphrase(self.reference(*id)))?;
                Ok(ManagedObject { facts, value })
            }
        }
    }

    /// Keeps a copy of a key under a new id, for another tenant of the store or the same. What is known of its use goes along.
    pub(super) fn copy(&self, id: &KeyId, to: &Self) -> Result<KeyReference, Error> {
        let fetched = self.fetch_object(id)?;
        let is_used = matches!(fetched, Fetched::Released(Released { used_for: Some(_), .. }));
        let ManagedObject { facts, value } = self.as_object(id, fetched)?;
        let copy =
            to.keep_object(ManagedObject { facts: ObjectFacts { created: None, filling: None, ..facts }, value })?;
        if is_used {
            let noted = to.store.mark_used(&copy.key, &format!("what {id}, of which it is a copy, was used for"), None);
            noted.inspect_err(|_| to.store.abandon(&copy.key))?;
        }
        Ok(copy)
    }

    /// Keeps an object under a new id: in the store as it is, if the store keeps such, or else sealed.
    pub fn keep_object(&self, object: ManagedObject) -> Result<KeyReference, Error> {
        if let Some(objects) = self.store.objects() {
            return Ok(self.reference(objects.create(&object)?));
        }
        let key = self.new_reference()?;
        let facts = ObjectFacts { created: object.facts.created.or(Some(now())), ..object.facts };
        self.create(&key.key, None, &Content::Object(ManagedObject { facts, value: object.value }))?;
        Ok(key)
    }

    /// The key, if it is a symmetric one of enough bits and nothing was encrypted with it yet. With `unmarked`, a store's own
    /// unsealed key counts as unused although nothing says so. Whoever is `filling` a volume from the beginning may begin again,
    /// as long as nobody else has opened it.
    pub fn unused(&self, id: &KeyId, unmarked: bool, filling: Option<&str>) -> Result<Unused, Error> {
        let key = self.reference(*id);
        let used = |volume: String| Err(Error::KeyUsed { key: key.clone(), volume });
        let is_begun = |object: &ManagedObject| filling.is_some() && object.facts.filling.as_deref() == filling;
        let (object, context) = match self.fetch_object(id)? {
            Fetched::Released(Released { object, .. }) if is_begun(&object) => (object, None),
            Fetched::Released(Released { used_for: Some(volume), .. }) => return used(volume),
            Fetched::Released(Released { object, .. }) if !object.facts.fresh && !unmarked => {
                return Err(Error::KeyUnproven(key));
            }
            Fetched::Released(Released { object, .. }) => (object, None),
            Fetched::Sealed(Opened { content: Content::VolumeKey(_), .. }) => return used("a plain volume".to_owned()),
            Fetched::Sealed(Opened { content: Content::Object(object), context }) => (object, Some(context)),
        };
        let volume = context.as_ref().and_then(|context| context.volume).filter(|_| !is_begun(&object));
        if let Some(volume) = volume {
            return used(volume.to_string());
        }
        if context.is_some() && !object.facts.fresh && !is_begun(&object) {
            return used("another program (it was given out, or came from outside)".to_owned());
        }
        if object.facts.kind != ObjectKind::Symmetric || object.value.len() < LEAST_KEY_BYTES {
            return Err(Error::KeyTooWeak(key));
        }
        Ok(Unused { object, context })
    }

    /// Makes an unused key the volume's own, which somebody is going to fill under this id, or not. No store has compare-and-swap: that another host marked the key as well shows
    /// only afterwards, so that is looked at, too.
    pub fn claim(&self, id: &KeyId, unused: Unused, volume: &Volume, filling: Option<&str>) -> Result<(), Error> {
        let uuid = volume.uuid().map(|uuid| uuid.to_string());
        match unused.context {
            None => self.store.mark_used(id, uuid.as_deref().unwrap_or_default(), filling)?,
            Some(context) => {
                let context = BoundContext { volume: volume.uuid(), ..context };
                let filling = filling.map(str::to_owned);
                let facts = ObjectFacts { fresh: false, filling, ..unused.object.facts };
                let object = ManagedObject { facts, value: unused.object.value };
                self.reseal(Opened { context, content: Content::Object(object) })?;
            }
        }
        let marked_for = match self.fetch_object(id)? {
            Fetched::Released(Released { used_for, .. }) => used_for,
            Fetched::Sealed(Opened { context, .. }) => context.volume.map(|uuid| uuid.to_string()),
        };
        match marked_for {
            Some(marked) if Some(&marked) == uuid.as_ref() => Ok(()),
            Some(volume) => Err(Error::KeyUsed { key: self.reference(*id), volume }),
            None => Err(Error::ReadBack(self.reference(*id))),
        }
    }

    /// Notes that a key is used for a volume, which is there: this host, which may not write to the store, cannot note it, but it
    /// cannot format with it either.
    pub(in crate::unlock) fn mark_used(&self, id: &KeyId, fetched: &Fetched, what: &str) -> Result<(), Error> {
        match self.mark(id, fetched, what) {
            // All that this lets happen is that an image overwrites the volume, which it does anyway.
            Err(Error::Store(error)) if error.is_denial() && fetched.is_being_filled() => {
                tracing::debug!("{} still counts as being filled: {}", self.reference(*id), chain(&error));
                Ok(())
            }
            Err(Error::Store(error)) if error.is_denial() => {
                tracing::warn!("the key {} still counts as unused, because {}", self.reference(*id), chain(&error));
                Ok(())
            }
            noted => noted,
        }
    }

    /// Notes that a key is used, for what, in words.
    fn mark(&self, id: &KeyId, fetched: &Fetched, what: &str) -> Result<(), Error> {
        let noted = match self.note_use(id, fetched, what) {
            // Another process has re-sealed it meanwhile.
            Err(Error::Store(StoreError::Outdated { .. })) => self.note_use(id, &self.fetch_object(id)?, what),
            noted => noted,
        };
        match (noted, fetched) {
            (Err(error), Fetched::Released(Released { object, .. }))
                if !object.facts.fresh && !fetched.is_being_filled() =>
            {
                // Nothing depends on it: the key did not count as unused before.
                tracing::debug!("cannot record the use of {}: {}", self.reference(*id), chain(&error));
                Ok(())
            }
            (noted, _) => noted,
        }
    }

    fn note_use(&self, id: &KeyId, fetched: &Fetched, what: &str) -> Result<(), Error> {
        match fetched {
            Fetched::Released(Released { used_for, .. }) if used_for.is_none() || fetched.is_being_filled() => {
                Ok(self.store.mark_used(id, what, None)?)
            }
            Fetched::Sealed(Opened { content: Content::Object(object), context })
                if object.facts.fresh || fetched.is_being_filled() =>
            {
                let facts = ObjectFacts { fresh: false, filling: None, ..object.facts.clone() };
                let object = ManagedObject { facts, value: SecretBytes::copy_of(object.value.expose())? };
                self.reseal(Opened { context: context.clone(), content: Content::Object(object) })?;
                self.remember_written(id, context.generation + 1);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
