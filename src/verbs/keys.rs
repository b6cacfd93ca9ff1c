//! What is done to keys as such, for the command line and for the hooks.

use crate::{
    base::{chain::chain, key::KeyReference},
    config::Config,
    unlock::{
        audit::{self, Event},
        container::Container,
        lockbox::Lockbox,
    },
    verbs::error::Error,
};

/// Deletes a key for ever: in its store, and its entry in this host's lockbox.
pub fn delete(config: &Config, container: &Container, key: &KeyReference) -> Result<(), Error> {
    container.store().delete(&key.key)?;
    forget(config, key);
    audit::done(config, &Event { action: "key delete", key: Some(key.to_string()), ..Event::default() });
    Ok(())
}

/// Removes what this host's lockbox has of a key that is deleted.
pub fn forget(config: &Config, key: &KeyReference) {
    // The key is gone: what is left of it here does not make that undone.
    if let Some(lockbox) = Lockbox::of(config)
        && let Err(error) = lockbox.forget(key)
    {
        tracing::warn!("the key {key} is deleted, but not its entry in the lockbox: {}", chain(&error));
    }
}
