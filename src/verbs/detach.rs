//! Detach: remove a mapping, whichever backend made it.

use std::path::Path;

use crate::{
    base::{chain::chain, mapping_name::MappingName},
    config::DeviceSpec,
    sys::device::resolved,
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

/// The name in the path of a plaintext device.
pub fn name_in(text: &str) -> Option<&str> {
    let folders = ["/dev/mapper/", "/dev/disk/by-cryptattach/"];
    folders.iter().find_map(|folder| text.strip_prefix(folder))
}

/// The mapping that is meant by its name, its plaintext device, or the encrypted device (or file) below it.
pub fn named(backends: &dyn Backends, text: &str) -> Result<MappingName, Error> {
    let name = name_in(text).unwrap_or(text).parse::<MappingName>();
    let path = DeviceSpec::path_of(text).unwrap_or_else(|_| text.into());
    if !path.exists() {
        return name.map_err(|_| Error::NothingOn(path));
    }
    for (_, backend) in backends.available() {
        match &name {
            Ok(name) if backend.device(name)?.is_some() => return Ok(name.clone()),
            _ => {}
        }
    }
    let meant = resolved(&path);
    let mut mappings = list(backends)?.into_iter();
    let mapping = mappings.find(|status| [&status.device, &status.source].iter().any(|path| resolved(path) == meant));
    match (mapping, name) {
        (Some(mapping), _) => Ok(mapping.name),
        (None, Ok(name)) => Ok(name),
        (None, Err(_)) => Err(Error::NothingOn(path)),
    }
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
