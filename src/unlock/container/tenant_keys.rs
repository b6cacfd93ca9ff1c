//! A container as one tenant of the hooks sees it: its own keys, and no sign of others.

use super::{Container, Use};
use crate::{
    base::{
        chain::chain,
        key::{Consumer, KeyId, KeyReference, ManagedObject, ObjectFacts, ProjectId},
    },
    config::Config,
    keys::store::{StoreError, Stored},
    unlock::{
        Error,
        tenant::{Acting, Tenant},
    },
};

/// A tenant's keys in a store.
///
/// ```compile_fail,E0616
/// # use cryptattach::unlock::container::{Container, TenantKeys};
/// fn past_the_tenant(keys: &TenantKeys) -> &Container {
///     &keys.container // the member is private
/// }
/// ```
pub struct TenantKeys {
    container: Container,
}

/// One of a tenant's keys.
pub struct Listed {
    pub key: KeyReference,
    /// What is known of it, or why that is not known.
    pub facts: Result<ObjectFacts, Error>,
}

impl TenantKeys {
    /// Those of a tenant. The store is not asked yet.
    pub fn open(config: &Config, tenant: &Tenant) -> Result<Self, Error> {
        Ok(Self { container: Container::open(config, tenant.store(), Some(tenant), Use::Keys)? })
    }

    /// Who acts, for the audit record.
    pub fn acting(&self) -> Option<&Acting> {
        self.container.acting()
    }

    /// Makes a symmetric key in the store, if the store makes such; `None` if it does not.
    pub fn order(&self, facts: &ObjectFacts) -> Result<Option<KeyReference>, Error> {
        let ordered = self.container.store.objects().map(|objects| objects.order(facts)).transpose()?;
        Ok(ordered.map(|id| self.container.reference(id)))
    }

    /// Keeps an object under a new id.
    pub fn keep(&self, object: ManagedObject) -> Result<KeyReference, Error> {
        self.container.keep_object(object)
    }

    /// What is known of a key without its value. Of one that the store keeps unsealed, the value is not fetched.
    pub fn facts(&self, id: &KeyId) -> Result<ObjectFacts, Error> {
        match self.container.store.released_facts(id) {
            Ok(Some(facts)) => self.container.admit(id, None).map(|()| facts),
            Ok(None) => Ok(self.container.object(id)?.facts),
            Err(error) => Err(self.container.as_told(id, error)),
        }
    }

    /// Keeps a copy of a key under a new id, as a key of `to`. Nobody gets its value, so the copy is as unused as the key.
    pub fn copy(&self, id: &KeyId, to: &Self) -> Result<KeyReference, Error> {
        self.container.copy(id, &to.container)
    }

    /// Gives the value of a key out; it no longer counts as unused.
    pub fn give_out(&self, id: &KeyId) -> Result<ManagedObject, Error> {
        self.container.give_out(id)
    }

    /// Its keys. Of keys that other tenants have, there is no word.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let look = |id: KeyId| match self.facts(&id) {
            // Another tenant's, or deleted meanwhile.
            Err(Error::Store(StoreError::NotFound { .. })) => None,
            facts => Some(Listed { key: self.container.reference(id), facts }),
        };
        Ok(self.container.store.list()?.into_iter().filter_map(look).collect())
    }

    /// Deletes a key for ever; with consumers only if that is forced.
    pub fn delete(&self, id: &KeyId, force: bool) -> Result<(), Error> {
        self.container.delete(id, force)
    }

    /// Who needs the key.
    pub fn consumers(&self, id: &KeyId) -> Result<Vec<Consumer>, Error> {
        self.container.find(id)?;
        match self.container.store.consumers(id) {
            // One whom the store lets use the key, but not see who else does.
            Err(error) if error.is_denial() => Ok(Vec::new()),
            consumers => Ok(consumers?),
        }
    }

    /// Notes who needs the key.
    pub fn add_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), Error> {
        self.container.find(id)?;
        self.container.store.add_consumer(id, consumer).map_err(|error| self.container.as_told(id, error))
    }

    /// Notes who does not need the key any more.
    pub fn remove_consumer(&self, id: &KeyId, consumer: &Consumer) -> Result<(), Error> {
        self.container.find(id)?;
        Ok(self.container.store.remove_consumer(id, consumer)?)
    }
}

impl Container {
    /// Who acts, if the container is used on behalf of a hook's caller whom Keystone vouches for.
    pub(in crate::unlock) fn acting(&self) -> Option<&Acting> {
        self.tenant.as_ref()?.acting()
    }

    /// Lets nobody but its tenant, if there is one, have a key of this project. To others it is a key that does not exist.
    pub(super) fn admit(&self, id: &KeyId, project: Option<&ProjectId>) -> Result<(), Error> {
        match &self.tenant {
            Some(tenant) if !tenant.may_use(project) => Err(self.no_such_key(id)),
            _ => Ok(()),
        }
    }

    /// What the store has under an id, if that is the tenant's to see. What a sealed key claims is authentic only after it was
    /// opened, and is compared again then; but nothing is done with a key that does not even claim to be the tenant's.
    pub(super) fn stored(&self, id: &KeyId) -> Result<Stored, Error> {
        let stored = self.store.get(id).map_err(|error| self.as_told(id, error))?;
        let project = match &stored {
            Stored::Released(_) => None,
            // What cannot be read is nobody's. Opening it says why.
            Stored::Sealed(sealed) => sealed.claimed_context().ok().and_then(|context| context.project),
        };
        self.admit(id, project.as_ref())?;
        Ok(stored)
    }

    /// Makes sure that there is a key of this id, and that it says that it is the tenant's. To delete it, or to note who needs it,
    /// that is enough: whoever can make it say something else can write to the store.
    fn find(&self, id: &KeyId) -> Result<(), Error> {
        match self.store.released_facts(id) {
            Ok(Some(_)) => self.admit(id, None),
            Ok(None) => self.stored(id).map(drop),
            Err(error) => Err(self.as_told(id, error)),
        }
    }

    /// Deletes a key for ever, and what stands beside it. One that has consumers is deleted only if that is forced.
    pub fn delete(&self, id: &KeyId, force: bool) -> Result<(), Error> {
        if self.tenant.is_some() {
            self.find(id)?;
        }
        let consumers = self.store.consumers(id)?;
        if !consumers.is_empty() && !force {
            return Err(Error::InUse { key: self.reference(*id), consumers });
        }
        self.deletions().note(id)?;
        if let Err(error) = self.store.delete(id) {
            // What is still there was not deleted.
            if self.store.is_gone(id).is_ok_and(|gone| !gone) && !matches!(error, StoreError::NotFound { .. }) {
                self.deletions().take_back(id)?;
            }
            return Err(self.as_told(id, error));
        }
        for consumer in &consumers {
            match self.store.remove_consumer(id, consumer) {
                // Barbican deletes them with their secret.
                Ok(()) | Err(StoreError::NoConsumer { .. }) => {}
                Err(error) => tracing::warn!("{id} is deleted, but not its consumer '{consumer}': {}", chain(&error)),
            }
        }
        Ok(())
    }

    /// An error of the store as a tenant is told it: a key that is not there is told in the same words as one of others.
    fn as_told(&self, id: &KeyId, error: StoreError) -> Error {
        match error {
            StoreError::NotFound { .. } if self.tenant.is_some() => self.no_such_key(id),
            error => error.into(),
        }
    }

    fn no_such_key(&self, id: &KeyId) -> Error {
        StoreError::NotFound { id: id.to_string(), at: format!("the store '{}'", self.name) }.into()
    }
}
