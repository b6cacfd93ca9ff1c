//! Detach: remove a mapping, whichever backend made it.

use std::path::Path;

use crate::{
    base::{chain::chain, mapping_name::MappingName},
    verbs::error::Error,
    volumes::backend::{BackendError, BackendKind, Backends, Deferred, MappingStatus},
};

/// Removes the mapping; all its data is on the volume before this returns, unless the removal is deferred.
pub fn detach(backends: &dyn Backends, name: &MappingName, deferred: Deferred) -> Result<BackendKind, Error> {
    for (kind, backend) in backends.available() {
        match backend.deactivate(name, deferred) {
            Err(BackendError::NotActive(_)) => {}
            removed => return Ok(removed.map(|()| kind)?),
        }
    }
    Err(Error::NotAttached(name.clone()))
}

/// Has the I/O on a mapping fail that waits for a rotation of its key which was killed.
pub fn fail_hanging(backends: &dyn Backends, name: &MappingName) -> Result<(), Error> {
    for (_, backend) in backends.available() {
        backend.fail_hanging(name)?;
    }
    Ok(())
}

/// What is known of a mapping.
pub fn status(backends: &dyn Backends, name: &MappingName) -> Result<MappingStatus, Error> {
    for (_, backend) in backends.available() {
        if let Some(status) = backend.status(name)? {
            return Ok(status);
        }
    }
    Err(Error::NotAttached(name.clone()))
}

/// The mapping whose plaintext device is meant.
pub fn find(backends: &dyn Backends, is_meant: impl Fn(&Path) -> bool) -> Result<Option<MappingName>, Error> {
    for (_, backend) in backends.available() {
        for name in backend.list()? {
            // As in a list of them.
            match backend.device(&name) {
                Ok(Some(device)) if is_meant(&device) => return Ok(Some(name)),
                Ok(_) => {}
                Err(error) => tracing::warn!("'{name}': {}", chain(&error)),
            }
        }
    }
    Ok(None)
}

/// All mappings of all backends, by name.
pub fn list(backends: &dyn Backends) -> Result<Vec<MappingStatus>, Error> {
    let mut mappings = Vec::new();
    for (_, backend) in backends.available() {
        for name in backend.list()? {
            // One that went away in between is no mapping any more, and one that cannot be read must not hide the others.
            match backend.status(&name) {
                Ok(status) => mappings.extend(status),
                Err(error) => tracing::warn!("'{name}': {}", chain(&error)),
            }
        }
    }
    mappings.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(mappings)
}
