//! Freshness: the proof that nothing can have been encrypted with a key yet, so that a blank device may be formatted with it.
//!
//! A fresh key carries a mark, which is taken away before its value is given out, and when a volume has been opened with it.
//! A key without the mark may have been used: nothing follows from its age or from who asks.

use super::{Container, Fetched};
use crate::{
    base::{
        chain::chain,
        key::{KeyId, ManagedObject, ObjectFacts, SecretBytes},
    },
    keys::{
        seal::{Content, Opened},
        store::{Released, StoreError},
    },
    unlock::Error,
};

impl Container {
    /// Notes that a key is used, for what, in words; it is fresh no longer.
    ///
    /// A reader of the store may not write there, and goes on: nor may it format what the key then still counts as
    /// unused for.
    pub fn spend(&self, id: &KeyId, fetched: &Fetched, what: &str) -> Result<(), Error> {
        let noted = match self.note_use(id, fetched, what) {
            // Another process has re-sealed it meanwhile.
            Err(Error::Store(StoreError::Outdated { .. })) => self.note_use(id, &self.fetch(id, None)?, what),
            noted => noted,
        };
        match (noted, fetched) {
            (Err(error), Fetched::Released(Released { object, .. })) if !object.facts.fresh => {
                // Nothing depends on it: the key did not count as unused before.
                tracing::debug!("not noted what {} is used for: {}", self.reference(*id), chain(&error));
                Ok(())
            }
            (Err(Error::Store(error @ StoreError::Denied { .. })), _) => {
                tracing::warn!("the key {} still counts as unused, because {}", self.reference(*id), chain(&error));
                Ok(())
            }
            (noted, _) => noted,
        }
    }

    fn note_use(&self, id: &KeyId, fetched: &Fetched, what: &str) -> Result<(), Error> {
        match fetched {
            Fetched::Released(Released { used_for: None, .. }) => Ok(self.store.mark_used(id, what)?),
            Fetched::Sealed(Opened { content: Content::Object(object), context }) if object.facts.fresh => {
                let facts = ObjectFacts { fresh: false, ..object.facts.clone() };
                let object = ManagedObject { facts, value: SecretBytes::copy_of(object.value.expose())? };
                self.reseal(Opened { context: context.clone(), content: Content::Object(object) })
            }
            _ => Ok(()),
        }
    }
}
