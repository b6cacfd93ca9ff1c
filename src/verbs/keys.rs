//! What is done to keys as such, for the command line and for the hooks.

use crate::{
    base::{chain::chain, key::KeyReference},
    config::Config,
    keys::store::{StoreError, Stored},
    unlock::{
        self,
        audit::{self, Event},
        case::Proven,
        container::Container,
        lockbox::Lockbox,
        tenant::Acting,
    },
    verbs::{detach, error::Error, rotate},
    volumes::backend::Backends,
};

/// Deletes a key for ever: in its store, and its entry in this host's lockbox. One that others need, or a rotation that is under
/// way, is deleted only if that is forced.
pub fn delete(config: &Config, container: &Container, key: &KeyReference, force: bool) -> Result<(), Error> {
    if let Some(device) = rotate::needs(config, key).filter(|_| !force) {
        return Err(Error::Rotating { key: key.clone(), device });
    }
    container.delete(&key.key, force)?;
    deleted(config, key, None);
    Ok(())
}

/// Refuses the key of a volume that is attached here. Other programs say so of theirs by a consumer.
pub fn require_detached(backends: &dyn Backends, container: &Container, key: &KeyReference) -> Result<(), Error> {
    // One that cannot be read can be deleted all the same.
    let Ok(Stored::Sealed(sealed)) = container.store().get(&key.key) else { return Ok(()) };
    let Some(volume) = sealed.claimed_context().ok().and_then(|context| context.volume) else { return Ok(()) };
    match detach::list(backends)?.into_iter().find(|mapping| mapping.volume == Some(volume)) {
        Some(mapping) => Err(Error::Attached { key: key.clone(), name: mapping.name }),
        None => Ok(()),
    }
}

/// Deletes a key for ever whose place another one has taken. A run that was killed may have done it: it is put on record once
/// more rather than never.
pub(super) fn delete_superseded(config: &Config, container: &Container, key: &KeyReference) -> Result<(), Error> {
    match container.delete(&key.key, false) {
        Err(unlock::Error::Store(StoreError::NotFound { .. })) => drop(container.store().is_gone(&key.key)?),
        deleted => deleted?,
    }
    deleted(config, key, None);
    Ok(())
}

/// Has the lockbox open a volume by its key as that is now, if the lockbox does by what the key was.
pub(super) fn keep_in_lockbox(config: &Config, was: &KeyReference, now: &Proven<'_>) -> Result<(), Error> {
    if !Lockbox::of(config).is_some_and(|lockbox| lockbox.has(was)) {
        return Ok(());
    }
    match now.add_to_lockbox() {
        // So the policy of the container wants it.
        Err(error @ unlock::Error::LockboxIsWeaker { .. }) => {
            tracing::warn!("the lockbox cannot keep {}: {}", now.reference(), chain(&error));
            Ok(())
        }
        added => Ok(added.map(drop)?),
    }
}

/// What follows in any case once a key is deleted: what is left of it here does not make that undone.
pub(super) fn deleted(config: &Config, key: &KeyReference, caller: Option<&Acting>) {
    if let Some(lockbox) = Lockbox::of(config)
        && let Err(error) = lockbox.forget(key)
    {
        tracing::warn!("the key {key} is deleted, but not its entry in the lockbox: {}", chain(&error));
    }
    audit::done(config, &Event { action: "key delete", key: Some(key.to_string()), caller, ..Event::default() });
}
