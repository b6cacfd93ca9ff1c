//! Detach: remove a mapping, whichever backend made it.

use crate::{
    base::{chain::chain, mapping_name::MappingName},
    verbs::error::Error,
    volumes::backend::{self, BackendError, BackendKind, Deferred, MappingStatus},
};

/// Removes the mapping; all its data is on the volume before this returns, unless the removal is deferred.
pub fn detach(name: &MappingName, deferred: Deferred) -> Result<BackendKind, Error> {
    for (kind, backend) in backend::available() {
        match backend.deactivate(name, deferred) {
            Err(BackendError::NotActive(_)) => {}
            removed => return Ok(removed.map(|()| kind)?),
        }
    }
    Err(Error::NotAttached(name.clone()))
}

/// What is known of a mapping.
pub fn status(name: &MappingName) -> Result<MappingStatus, Error> {
    for (_, backend) in backend::available() {
        if let Some(status) = backend.status(name)? {
            return Ok(status);
        }
    }
    Err(Error::NotAttached(name.clone()))
}

/// All mappings of all backends, by name.
pub fn list() -> Result<Vec<MappingStatus>, Error> {
    let mut mappings = Vec::new();
    for (_, backend) in backend::available() {
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
